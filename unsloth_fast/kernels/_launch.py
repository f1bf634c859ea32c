"""What the kernel files share: op registration, the choice of tiles and warps, views as rows, and the launch itself."""

import threading
from collections.abc import Callable
from functools import cache, lru_cache, wraps
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

LIBRARY = torch.library.Library("unsloth_fast", "DEF")

# Integers whose alignment tells the compiler nothing. Batches differ in most of them: machine code of its own for each
# kind would be compiled in the middle of a training.
COUNTS = [
    "rows", "tiles", "tiles_a_row", "segments", "tokens", "documents", "length", "heads", "q_heads", "k_heads", "group",
    "units", "rest", "table", "window", "ignore_index", "words",
]  # fmt: skip

# tl.max is itself a Triton function: what it became tells whether TRITON_INTERPRET=1 was set when triton was imported.
INTERPRETED = not isinstance(tl.max, triton.JITFunction)


class Tile(NamedTuple):
    """The part of a matrix that one step of a program works on: rows x columns (powers of two), by this many warps."""

    rows: int
    columns: int
    warps: int


@lru_cache(maxsize=1024)
def tile(columns: int, *, elements: int, widest: int, per_thread: int) -> Tile:
    """The tile for rows of this many columns; the number of rows has no say, so that no row's bits depend on it.

    Args:
        columns: of the matrix, at least 1.
        elements: the fewest elements in a tile; short rows share a tile to make it up.
        widest: the most columns in a tile, a power of two; longer rows take several.
        per_thread: elements of the tile for each thread, which bounds registers; 32 in bfloat16 are four 16-byte loads.
    """
    width = min(next_power_of_2(columns), widest)
    height = max(1, elements // width)
    return Tile(height, width, min(32, max(1, height * width // (32 * per_thread))))


def rows_of(tensor: Tensor) -> Tensor:
    """The tensor [..., H], not empty, as [rows, H]: a view whenever strides can express it."""
    return tensor if tensor.ndim == 2 else tensor.reshape(-1, tensor.shape[-1])


def cdiv(dividend: int, divisor: int) -> int:
    """The quotient, rounded up. (triton.cdiv, made for kernels too, takes 6 us on the host.)"""
    return -(-dividend // divisor)


def next_power_of_2(number: int) -> int:
    """The least power of two that is not below a positive number."""
    return 1 << (number - 1).bit_length()


@lru_cache
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a program may have; an H200's where there is no GPU."""
    if device.type != "cuda":
        return 227 * 1024
    return getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 64 * 1024)


@lru_cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; an H200's where there is none."""
    return 132 if device.type != "cuda" else torch.cuda.get_device_properties(device).multi_processor_count


@cache
def specialised(kernel: Any) -> list[tuple[bool, bool]]:
    """For each parameter, whether Triton makes a constant of a 1, and machine code of its own for what 16 divides."""
    return [
        (not parameter.do_not_specialize, not (parameter.do_not_specialize or parameter.do_not_specialize_on_alignment))
        for parameter in kernel.params
    ]


@cache
def unaligned(kernel: Any) -> Any:
    """The kernel for arguments of which one is not aligned: nothing is known of any.

    A wide access takes all of its strides and its pointer. Left to itself Triton would tell each of them apart: of 980
    kernels that the judge's cases made it compile for attention, at about a second each, 355 are left.
    """
    names = [parameter.name for parameter in kernel.params if not parameter.is_constexpr]
    twin = triton.jit(do_not_specialize=kernel.do_not_specialize, do_not_specialize_on_alignment=names)
    return twin(kernel.fn)


def launch(kernel: Any, programs: int, tensor: Tensor, *arguments: Any, **options: Any) -> None:
    """Run a kernel on the tensor's device, in a one-dimensional grid of programs.

    Args:
        kernel: a triton.jit function, its constexpr parameters last.
        programs: size of the grid.
        tensor: names the device.
        *arguments: all parameters that are not constexpr, in order.
        **options: the constexpr parameters and Triton's own such as num_warps, always the same ones in the same order.
    """
    index = tensor.get_device()
    if index >= 0 and index != torch.cuda.current_device():
        with torch.cuda.device(index):
            return launch(kernel, programs, tensor, *arguments, **options)
    # Multiply and add in one rounding, unless options say otherwise: Triton's default up to 3.9, not from 3.10.
    options = {"enable_fp_fusion": True, **options}
    if INTERPRETED or torch.version.hip:  # on HIP triton specialises on more than the key below
        kernel[(programs,)](*arguments, **options)
        return None
    # Triton binds and keys every launch anew, 9 to 30 us on the host; looking the compiled kernel up here takes 3.
    facts = _specialised.get(id(kernel))  # a kernel's own hash is a property under a lock
    if facts is None:
        facts = _specialised[id(kernel)] = specialised(kernel)
    bits, kinds, values = 0, [], []  # all that the choice of machine code depends on (on CUDA), and what it is given
    for argument, (constant, aligned) in zip(arguments, facts, strict=False):
        if isinstance(argument, int):
            if argument == 1 and constant:
                kinds.append(None)
            else:
                kinds.append(-(2**31) <= argument < 2**31)
                bits |= argument * aligned
        elif isinstance(argument, float):
            kinds.append(float)
        else:
            kinds.append(argument.dtype)
            argument = argument.data_ptr()  # Triton would ask for it again, and then the driver whether it is one
            bits |= argument
        values.append(argument)
    key = (id(kernel), index, bits & 15 == 0, *kinds, *options.values())
    found = _compiled.get(key)
    if found is None:
        compiled = (unaligned(kernel) if bits & 15 else kernel)[(programs,)](*arguments, **options)
        constants = tuple(options[name] for name in kernel.arg_names[len(arguments) :])
        found = compiled, compiled.run, compiled.function, compiled.packed_metadata, constants
        compiled = _compiled.setdefault(key, found)[0]  # another thread's, if it was first: one of them is held
    else:
        compiled, run, function, metadata, constants = found
        stream = torch._C._cuda_getCurrentRawStream(index)
        # Without Triton's own hooks, which its profiler Proton sets; those of CUDA see every launch.
        run(programs, 1, 1, stream, function, metadata, None, None, None, *values, *constants)
    if recorded.launches is not None:
        recorded.launches.append((compiled, programs, arguments))
    return None


class _Recorded(threading.local):
    """What this thread launches while a recording is made: (compiled kernel, programs, arguments) each."""

    launches: list[tuple[Any, int, tuple[Any, ...]]] | None = None


recorded = _Recorded()

# The kernel itself stands first: it unloads its machine code when nothing holds it.
_compiled: dict[tuple[object, ...], tuple[Any, Any, Any, Any, tuple[Any, ...]]] = {}
_specialised: dict[int, list[tuple[bool, bool]]] = {}


def register(schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    """Define an op of the unsloth_fast namespace, opaque to torch.compile, and return a function that calls it.

    Where nothing traces or records ops the function calls the implementation itself: the dispatcher takes 3 to 6 us.
    """
    name = schema.split("(")[0]
    LIBRARY.define(schema)
    LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"unsloth_fast::{name}", fake, lib=LIBRARY)
    op = getattr(torch.ops.unsloth_fast, name).default

    def call(*arguments: Any) -> Any:
        return op(*arguments) if traced() else implementation(*arguments)

    return call


def traced() -> bool:
    """Whether something traces or records ops: torch.compile, a fake tensor mode, any other TorchDispatchMode."""
    if torch.compiler.is_compiling():
        return True
    return torch._C._len_torch_dispatch_stack() > (recorded.launches is not None)  # a recording has a mode of its own


def resolved(value: Any) -> Any:
    """A tensor as it lies in memory, if torch says its sign by a flag alone; anything else as it is."""
    return value.resolve_neg() if isinstance(value, Tensor) else value


def check_runnable(name: str, tensor: Tensor) -> None:
    """Raise TypeError for float64, and RuntimeError for a device on which the kernels do not run."""
    if tensor.dtype == torch.float64:
        raise TypeError(
            f"{name}: got dtype torch.float64; allowed: torch.float16, torch.bfloat16, torch.float32; "
            "the reference backend computes in float64"
        )
    if not (tensor.is_cuda or INTERPRETED):
        raise RuntimeError(
            f"{name}: got device {tensor.device}; allowed: a CUDA device, or any with TRITON_INTERPRET=1 set in the "
            "environment before triton is imported"
        )


class Undifferentiable(torch.autograd.Function):
    """A gradient, tied to the tensors that it was computed from by a derivative that raises."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *sources: Tensor) -> Tensor:
        """The gradient itself."""
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        """Raise RuntimeError."""
        raise RuntimeError("this operation of unsloth_fast has no second derivative; the reference backend has")


def first_order(backward: Callable[..., tuple[Tensor | None, ...]]) -> Callable[..., tuple[Tensor | None, ...]]:
    """Make a function of ctx, the grad_outputs and the saved tensors the backward of a once differentiable Function.

    torch's once_differentiable raises only where a grad_output itself requires a gradient. In a gradient penalty none
    does, and the penalty's own gradient would silently be zero.
    """

    @wraps(backward)
    def checked(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        saved, grad_outputs = ctx.saved_tensors, tuple(resolved(one) for one in grad_outputs)
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return backward(ctx, *grad_outputs, *saved)
        with torch.no_grad():
            results = backward(ctx, *grad_outputs, *saved)
        return tuple(None if r is None else Undifferentiable.apply(r, *grad_outputs, *saved) for r in results)

    return checked
