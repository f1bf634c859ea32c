"""Operations as recordings: what a call allocates and launches, run again by compiled code for every call like it.

For small tensors the host decides: on the host of an H200 that takes 0.14 ms for torch's own rms_norm, forward and
backward, an autograd.Function in Python that does nothing takes 0.12, and one with three launches 0.35. So the first
call of each kind (function, shapes, strides, dtypes, alignment, other arguments) is recorded while its Python runs,
which takes the host 0.5 ms more, and `_replay.cpp` allocates and launches the same from then on, with an autograd node
of its own, in 0.14. It is compiled once, in about 20 s, by torch.utils.cpp_extension; where that fails the Python runs
on.
"""

import logging
import re
import struct
import sys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from unsloth_fast.kernels._launch import INTERPRETED, recorded, resolved, traced

logger = logging.getLogger(__name__)

Check = Callable[..., None]
Program = tuple[list[Any], list[Any], list[int]]  # buffers, launches and results, as _replay.cpp takes them

_NEW_EMPTY = Tensor.new_empty
# What a plain launch with the kernel's own arguments is not enough for.
_SPECIAL = (
    "global_scratch_size", "profile_scratch_size", "launch_cooperative_grid", "launch_pdl", "instrumentation_mode",
)  # fmt: skip
_ALLOCATIONS = ("aten::empty.memory_format", "aten::new_empty", "aten::empty_like")


class _Unrecordable(Exception):
    """A call does more than allocate, take views, and launch."""


class _Allocations(TorchDispatchMode):
    """Keeps what is allocated, and tells whether torch did anything besides."""

    def __init__(self) -> None:
        super().__init__()
        self.allocated: list[Tensor] = []
        self.only = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.name() in _ALLOCATIONS:
            self.allocated.append(result)
        elif not func.is_view:
            self.only = False
        return result


class _Context:
    """Stands in for the ctx of an autograd.Function; what else is set on it stays."""

    def __init__(self, needs_input_grad: Sequence[bool]) -> None:
        self.needs_input_grad, self.saved_tensors = tuple(needs_input_grad), ()
        self.constant, self.materialize = (), True

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        self.saved_tensors = tensors

    def mark_non_differentiable(self, *tensors: Tensor) -> None:
        self.constant = tensors

    def set_materialize_grads(self, value: bool) -> None:
        self.materialize = value


class _Numbers:
    """The tensors of a program: those it is given, then, by where they begin, those it allocates."""

    def __init__(self, given: Sequence[Tensor | None], allocated: Sequence[Tensor]) -> None:
        self.given, self.allocated = given, {tensor.data_ptr(): tensor for tensor in allocated}
        self.addresses: dict[int, int] = {}
        for number, tensor in enumerate(given):
            if tensor is not None and tensor.numel():
                self.addresses.setdefault(tensor.data_ptr(), number)
        self.buffers: list[Tensor] = []

    def of(self, tensor: Tensor | None) -> int:
        """The number of a result, which is one of the given or begins where an allocation does; -1 for None."""
        if tensor is None:
            return -1
        for number, known in enumerate((*self.given, *self.buffers)):
            if known is tensor:
                return number
        address = tensor.data_ptr()
        whole = self.allocated.get(address)
        if tensor.numel() and (address in self.addresses or whole is None or whole.nbytes != tensor.nbytes):
            raise _Unrecordable  # a part of an allocation, or one of two views of it
        return self._add(tensor)

    def address(self, tensor: Tensor) -> int:
        """The number of the tensor that begins where an argument of a kernel does; -1 where there is no memory."""
        address = tensor.data_ptr()
        if address and address not in self.addresses:
            if address not in self.allocated:
                raise _Unrecordable
            self._add(self.allocated[address])
        return self.addresses[address] if address else -1

    def _add(self, tensor: Tensor) -> int:
        number = len(self.given) + len(self.buffers)
        self.buffers.append(tensor)
        if tensor.numel():
            self.addresses[tensor.data_ptr()] = number
        return number


def _bits(kind: str, value: float) -> int:
    """A number as a kernel's parameter of this type of Triton's."""
    if kind == "fp32":
        return struct.unpack("I", struct.pack("f", value))[0]
    if kind not in ("i32", "i64"):
        raise _Unrecordable
    return int(value) & (2**64 - 1)


def _launches(launched: Sequence[tuple[Any, int, Sequence[Any]]], numbers: _Numbers) -> list[Any]:
    """Launches as (function, programs, threads, shared memory, [(number, bits) for each parameter])."""
    launches = []
    for compiled, programs, arguments in launched:
        metadata, parameters = compiled.metadata, []
        if metadata.num_ctas > 1 or any(getattr(metadata, name, None) for name in _SPECIAL):
            raise _Unrecordable
        for kind, value in zip(compiled.src.signature.values(), arguments, strict=False):
            if isinstance(value, Tensor):
                parameters.append((numbers.address(value), 0))
            elif kind != "constexpr":  # Triton makes a constant of a 1
                parameters.append((-1, _bits(kind, value)))
        parameters += [(-1, 0)] * 2  # the memory that Triton's own tools would have
        launches.append((compiled.function, programs, 32 * metadata.num_warps, metadata.shared, parameters))
    return launches


def _run(call: Callable[..., Any], *arguments: Any) -> tuple[Any, _Allocations, list[Any]]:
    """What the call returns, what it allocated, and what it launched."""
    launched = recorded.launches = []
    try:
        with _Allocations() as allocations:
            results = call(*arguments)
    finally:
        recorded.launches = None
    if not allocations.only:
        raise _Unrecordable
    return results, allocations, launched


class Recording:
    """One call of an autograd.Function, recorded; see the fields of _replay.cpp's.

    Attributes:
        made: the tensors that the call allocated, for whoever wants its results.
    """

    def __init__(self, function: type[torch.autograd.Function], arguments: Sequence[Any]) -> None:
        self.function, self.places = function, [isinstance(one, Tensor) for one in arguments]
        given = [one for one in arguments if isinstance(one, Tensor)]
        self.inputs = len(given)
        ctx = _Context([isinstance(one, Tensor) and one.requires_grad for one in arguments])
        own = set(vars(ctx))
        with torch.no_grad():
            results, allocations, launched = _run(function.forward, ctx, *arguments)
        numbers = _Numbers(given, allocations.allocated)
        self.single = isinstance(results, Tensor)
        outputs = [numbers.of(one) for one in ((results,) if self.single else results)]
        self.saved = [numbers.of(one) for one in ctx.saved_tensors]
        self.constant = [numbers.of(one) for one in ctx.constant]
        self.materialize, self.attributes, kept = ctx.materialize, {}, {}
        for name, value in vars(ctx).items():
            if name not in own:
                (kept if isinstance(value, Tensor) else self.attributes)[name] = value
        self.kept_names, self.kept = list(kept), [numbers.of(one) for one in kept.values()]
        launches = _launches(launched, numbers)
        self.program: Program = (_described(numbers.buffers), launches, outputs)
        self.made = numbers.buffers

    def backward(
        self, needs: Sequence[bool], grad_outputs: Sequence[Tensor | None], saved: Sequence[Tensor | None],
        kept: Sequence[Tensor],
    ) -> list[Tensor | None]:  # fmt: skip
        """The gradient of each tensor among the arguments, by the function's own Python."""
        tensors = iter(needs)
        ctx = _Context([place and next(tensors) for place in self.places])
        ctx.saved_tensors = tuple(saved)
        vars(ctx).update(self.attributes)
        vars(ctx).update(zip(self.kept_names, kept or [None] * len(self.kept_names), strict=True))
        grads = self.function.backward(ctx, *grad_outputs)
        return [grad for place, grad in zip(self.places, grads, strict=True) if place]

    def record_backward(
        self, needs: Sequence[bool], grad_outputs: Sequence[Tensor | None], saved: Sequence[Tensor | None],
        kept: Sequence[Tensor],
    ) -> tuple[Program, list[Tensor]] | None:  # fmt: skip
        """The same as a program, given the grad_outputs, saved and kept, and what it allocated; None if it is none."""
        try:
            grads, allocations, launched = _run(self.backward, needs, grad_outputs, saved, kept)
            numbers = _Numbers((*grad_outputs, *saved, *kept), allocations.allocated)
            results = [numbers.of(grad) for grad in grads]
            launches = _launches(launched, numbers)
        except _Unrecordable:
            return None
        return (_described(numbers.buffers), launches, results), numbers.buffers


def _described(buffers: Sequence[Tensor]) -> list[Any]:
    return [(list(buffer.shape), list(buffer.stride()), buffer.dtype) for buffer in buffers]


def record(function: type[torch.autograd.Function], check: Check | None, *arguments: Any) -> Recording | None:
    """The recording of a call; None if it does more than allocate, take views, and launch."""
    if check is not None:
        check(*arguments)
    try:
        return Recording(function, arguments)
    except _Unrecordable:
        return None


def plain(function: type[torch.autograd.Function], check: Check | None, *arguments: Any) -> Any:
    """The call as it is written."""
    if check is not None:
        check(*arguments)
    return function.apply(*[resolved(one) for one in arguments])


@cache
def _library() -> Any:
    """The compiled code, or None where there is none."""
    if INTERPRETED or not torch.version.cuda or not torch.cuda.is_available():
        return None
    headers = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
    try:
        from torch.utils.cpp_extension import load

        library: Any = load(
            "unsloth_fast_replay_" + re.sub(r"\W", "_", torch.__version__),  # whose classes lie in memory as it says
            [str(Path(__file__).with_suffix(".cpp"))],
            extra_cflags=["-O2"],
            extra_ldflags=["-lc10_cuda"],
            extra_include_paths=[str(headers)],
            with_cuda=False,
        )
    except (RuntimeError, OSError, ImportError) as error:  # no compiler, no ninja, no place to write
        logger.warning("calls are not replayed by compiled code, which costs up to 0.2 ms each: %s", error)
        return None
    library.set_python(record, plain)
    return library


def watched() -> bool:
    """Whether something other than autograd is to see what an operation does."""
    return (
        traced()
        or torch._C._are_functorch_transforms_active()  # pyright: ignore[reportAttributeAccessIssue]
        or torch._C._is_tracing()  # by torch.jit.trace
        or getattr(sys.modules.get("torch._dynamo.compiled_autograd"), "compiled_autograd_enabled", False)
        or Tensor.new_empty is not _NEW_EMPTY
    )


def apply(function: type[torch.autograd.Function], check: Check | None, *arguments: Any) -> Any:
    """function.apply(*arguments), after check(*arguments).

    Args:
        function: its forward and backward only allocate, take views and launch; anything else on its ctx than what
            ctx's methods take is a constant, or a tensor that the first backward pass takes and replaces by None.
        check: raises for what is not allowed, by the arguments that are not tensors, the dtypes, shapes, strides and
            devices of those that are, whether they require a gradient and whether gradients are enabled. A call like
            an earlier one is not checked again.
        *arguments: of the function.

    Compiled autograd that is enabled around the backward pass alone raises NotImplementedError at a replayed call.
    """
    if watched() or _library() is None:
        return plain(function, check, *arguments)
    return _library().apply(function, check, *arguments)
