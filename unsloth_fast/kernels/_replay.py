"""How a public function reaches its kernels: `call`, and `call_recorded`, which replays earlier calls in compiled code.

Each operation ends with one of these two, given its autograd.Function, a function that checks the arguments, and the
arguments:

    call(function, check, *arguments)            check(*arguments), then function.apply(*arguments)
    call_recorded(function, check, *arguments)   the same; later calls with the same signature are replayed, unchecked

`call_recorded` is for a Function whose passes only allocate, take views and launch. Both are documented below.

For small tensors the time on the host decides: on the host of an H200, torch's own rms_norm takes 0.14 ms forward and
backward, an autograd.Function in Python that does nothing takes 0.12, and one with three launches 0.35. So the first
call with a signature (function, shapes, strides, dtypes, alignment, other arguments) is recorded while its Python runs,
which takes the host 0.5 ms more. From then on `_replay.cpp` allocates and launches the same, with an autograd node of
its own, in 0.14 ms. torch.utils.cpp_extension compiles it once, in about 20 s; if that fails, the Python code runs.
"""

import logging
import re
import struct
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import torch
import triton
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from unsloth_fast.kernels._autograd import resolved
from unsloth_fast.kernels._launch import INTERPRETED, recorded, traced

logger = logging.getLogger(__name__)

Check = Callable[..., None]
Function = type[torch.autograd.Function]
Program = tuple[list[Any], list[Any], list[int]]  # buffers, launches and results, as _replay.cpp reads them
Result = TypeVar("Result")

# Properties of a kernel that a plain launch with its own arguments does not provide for.
_SPECIAL = (
    "global_scratch_size", "profile_scratch_size", "launch_cooperative_grid", "launch_pdl", "instrumentation_mode",
)  # fmt: skip
_ALLOCATIONS = ("aten::empty.memory_format", "aten::new_empty", "aten::empty_like")


class _Unrecordable(Exception):
    """A call does more than allocate, take views, and launch."""


class _Allocations(TorchDispatchMode):
    """Collects the tensors that are allocated, and notes whether torch did anything else."""

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


class _RecordedContext:
    """The ctx of a recorded call; attributes that the Function sets stay on it. See `_autograd.Context`."""

    def __init__(self, needs_input_grad: Sequence[bool]) -> None:
        self.needs_input_grad, self.saved_tensors = tuple(needs_input_grad), ()
        self.non_differentiable, self.materialize = (), True

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        self.saved_tensors = tensors

    def mark_non_differentiable(self, *tensors: Tensor) -> None:
        self.non_differentiable = tensors

    def set_materialize_grads(self, value: bool) -> None:
        self.materialize = value


class _TensorTable:
    """Numbers the tensors of a program: first its inputs, then the tensors that it allocates, by their addresses."""

    def __init__(self, inputs: Sequence[Tensor | None], allocated: Sequence[Tensor]) -> None:
        self.inputs, self.allocated = inputs, {tensor.data_ptr(): tensor for tensor in allocated}
        self.numbers: dict[int, int] = {}  # by address
        for number, tensor in enumerate(inputs):
            if tensor is not None and tensor.numel():
                self.numbers.setdefault(tensor.data_ptr(), number)
        self.buffers: list[Tensor] = []

    def of_result(self, tensor: Tensor | None) -> int:
        """The number of a result, which is an input or an allocated tensor; -1 for None."""
        if tensor is None:
            return -1
        for number, known in enumerate((*self.inputs, *self.buffers)):
            if known is tensor:
                return number
        address = tensor.data_ptr()
        whole = self.allocated.get(address)
        if tensor.numel() and (address in self.numbers or whole is None or whole.nbytes != tensor.nbytes):
            raise _Unrecordable  # a part of an allocation, or one of two views of it
        return self._add(tensor)

    def of_argument(self, tensor: Tensor) -> int:
        """The number of the tensor that begins at the address of a kernel's argument; -1 if it has no memory."""
        address = tensor.data_ptr()
        if address and address not in self.numbers:
            if address not in self.allocated:
                raise _Unrecordable
            self._add(self.allocated[address])
        return self.numbers[address] if address else -1

    def _add(self, tensor: Tensor) -> int:
        number = len(self.inputs) + len(self.buffers)
        self.buffers.append(tensor)
        if tensor.numel():
            self.numbers[tensor.data_ptr()] = number
        return number


def _bits(dtype: str, value: float) -> int:
    """The bits of a number as a kernel's parameter of one of Triton's types."""
    if dtype == "fp32":
        return struct.unpack("I", struct.pack("f", value))[0]
    if dtype not in ("i32", "i64"):
        raise _Unrecordable
    return int(value) & (2**64 - 1)


def _launches(launched: Sequence[tuple[Any, int, Sequence[Any]]], table: _TensorTable) -> list[Any]:
    """Launches as (function, programs, threads, shared memory, [(number, bits) for each parameter])."""
    launches = []
    for compiled, programs, arguments in launched:
        metadata, parameters = compiled.metadata, []
        if metadata.num_ctas > 1 or any(getattr(metadata, name, None) for name in _SPECIAL):
            raise _Unrecordable
        for dtype, value in zip(compiled.src.signature.values(), arguments, strict=False):
            if isinstance(value, Tensor):
                parameters.append((table.of_argument(value), 0))
            elif dtype != "constexpr":  # Triton makes a constant of a 1
                parameters.append((-1, _bits(dtype, value)))
        parameters += [(-1, 0)] * 2  # scratch memory, which only Triton's own tools use
        launches.append((compiled.function, programs, 32 * metadata.num_warps, metadata.shared, parameters))
    return launches


def _run(call: Callable[..., Result], *arguments: Any) -> tuple[Result, _Allocations, list[Any]]:
    """Returns the results of the call, its allocations, and its launches."""
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
    """The recorded call of an autograd.Function; `_replay.cpp` reads its attributes, and calls its methods.

    Attributes:
        program: the forward pass.
        inputs: how many of the arguments are tensors.
        saved: numbers of the saved tensors.
        early_gradients: numbers of the tensors on ctx, which the first backward pass takes.
        non_differentiable: numbers of the outputs that get no gradient.
        materialize: whether the gradient of an unused output is zeros, not None.
        single: whether the result is a tensor, not a tuple.
        allocated: the tensors that this call allocated, until `_replay.cpp` takes them as its results.
    """

    def __init__(self, function: Function, arguments: Sequence[object]) -> None:
        self.function, self.are_tensors = function, [isinstance(one, Tensor) for one in arguments]
        inputs = [one for one in arguments if isinstance(one, Tensor)]
        self.inputs = len(inputs)
        ctx = _RecordedContext([isinstance(one, Tensor) and one.requires_grad for one in arguments])
        own = set(vars(ctx))
        with torch.no_grad():
            results, allocations, launched = _run(function.forward, ctx, *arguments)
        table = _TensorTable(inputs, allocations.allocated)
        self.single = isinstance(results, Tensor)
        outputs = [table.of_result(one) for one in ((results,) if self.single else results)]
        self.saved = [table.of_result(one) for one in ctx.saved_tensors]
        self.non_differentiable = [table.of_result(one) for one in ctx.non_differentiable]
        attributes = {name: value for name, value in vars(ctx).items() if name not in own}
        early: Mapping[str, Tensor] = {name: one for name, one in attributes.items() if isinstance(one, Tensor)}
        self.constants = {name: value for name, value in attributes.items() if name not in early}
        self.early_names, self.early_gradients = list(early), [table.of_result(one) for one in early.values()]
        self.materialize = ctx.materialize
        launches = _launches(launched, table)
        self.program: Program = (_described(table.buffers), launches, outputs)
        self.allocated: list[Tensor] | None = table.buffers

    def backward(
        self, needs: Sequence[bool], grad_outputs: Sequence[Tensor | None], saved: Sequence[Tensor | None],
        early: Sequence[Tensor],
    ) -> list[Tensor | None]:  # fmt: skip
        """The gradients of the tensors among the arguments, by the Function's own Python.

        Args:
            needs: for each of those tensors, whether its gradient is needed.
            grad_outputs: the gradients of the results.
            saved: the saved tensors.
            early: the early gradients; empty if an earlier backward pass took them.
        """
        each = iter(needs)
        ctx = _RecordedContext([is_tensor and next(each) for is_tensor in self.are_tensors])
        ctx.saved_tensors = tuple(saved)
        vars(ctx).update(self.constants)
        vars(ctx).update(zip(self.early_names, early or [None] * len(self.early_names), strict=True))
        grads = self.function.backward(ctx, *grad_outputs)
        return [grad for is_tensor, grad in zip(self.are_tensors, grads, strict=True) if is_tensor]

    def record_backward(
        self, needs: Sequence[bool], grad_outputs: Sequence[Tensor | None], saved: Sequence[Tensor | None],
        early: Sequence[Tensor],
    ) -> tuple[Program, list[Tensor]] | None:  # fmt: skip
        """The same as a program with inputs (*grad_outputs, *saved, *early), and what it allocated.

        None if it does more than allocate, take views and launch.
        """
        try:
            grads, allocations, launched = _run(self.backward, needs, grad_outputs, saved, early)
            table = _TensorTable((*grad_outputs, *saved, *early), allocations.allocated)
            results = [table.of_result(grad) for grad in grads]
            launches = _launches(launched, table)
        except _Unrecordable:
            return None
        return (_described(table.buffers), launches, results), table.buffers


def _described(buffers: Sequence[Tensor]) -> list[Any]:
    return [(list(buffer.shape), list(buffer.stride()), buffer.dtype) for buffer in buffers]


def record(function: Function, check: Check, *arguments: object) -> Recording | None:
    """Check and record a call; None if it does more than allocate, take views, and launch."""
    check(*arguments)
    try:
        return Recording(function, arguments)
    except _Unrecordable:
        return None


def call(function: Function, check: Check, *arguments: object) -> Any:
    """check(*arguments), then function.apply(*arguments), with the negative bit of tensors resolved."""
    check(*arguments)
    if torch.compiler.is_compiling():
        arguments = distinct(arguments)
    return function.apply(*[resolved(one) for one in arguments])


def distinct(arguments: tuple[object, ...]) -> tuple[object, ...]:
    """The arguments, with a view in place of a tensor that was there before.

    torch.compile refuses a Function with the same tensor twice. Autograd adds the gradients of the views.
    """
    found: list[object] = []
    for one in arguments:
        again = isinstance(one, Tensor) and any(one is other for other in found)
        found.append(one.view_as(one) if again else one)  # type: ignore[attr-defined]
    return tuple(found)


@cache
def _library() -> Any:
    """The compiled code; None without a CUDA device, in the interpreter, or if it cannot be compiled."""
    if INTERPRETED or not torch.version.cuda or not torch.cuda.is_available():
        return None
    headers = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
    try:
        from torch.utils.cpp_extension import load

        library: Any = load(
            "unsloth_fast_replay_" + re.sub(r"\W", "_", torch.__version__),  # its classes' layout is part of the code
            [str(Path(__file__).with_suffix(".cpp"))],
            extra_cflags=["-O2"],
            extra_ldflags=["-lc10_cuda"],
            extra_include_paths=[str(headers)],
            with_cuda=False,
        )
    except (RuntimeError, OSError, ImportError) as error:  # no compiler, no ninja, or no writable directory
        logger.warning("calls are not replayed by compiled code, which costs up to 0.2 ms per call: %s", error)
        return None
    library.set_python(record, call)
    return library


def watched() -> bool:
    """Whether something other than autograd must see what an operation does."""
    return (
        traced()
        or torch._C._are_functorch_transforms_active()  # pyright: ignore[reportAttributeAccessIssue]
        or torch._C._is_tracing()  # by torch.jit.trace
        or getattr(sys.modules.get("torch._dynamo.compiled_autograd"), "compiled_autograd_enabled", False)
    )


def call_recorded(function: Function, check: Check, *arguments: object) -> Any:
    """As `call`; compiled code replays later calls with the same signature, without check.

    Args:
        function: its forward and backward only allocate, take views and launch, and treat ctx as `_autograd.Context`
            describes.
        check: raises for arguments that are not allowed. It may depend on arguments that are not tensors, on the
            dtypes, shapes, strides, devices and requires_grad of tensors, and on whether gradients are enabled, but not
            on the values of tensors: to check values, use `call`.
        *arguments: of the function.

    If compiled autograd is enabled around the backward pass alone, a replayed call raises NotImplementedError there.
    """
    if watched() or _library() is None:
        return call(function, check, *arguments)
    return _library().apply(function, check, *arguments)
