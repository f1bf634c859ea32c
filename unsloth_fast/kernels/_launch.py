"""What the kernel files share: kernel declarations, op registration, tiles and warps, views as rows, the launch."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, lru_cache
from inspect import signature
from typing import Any, NamedTuple, Protocol

import torch
import triton
import triton.language as tl
from torch import Tensor

LIBRARY = torch.library.Library("unsloth_fast", "DEF")

# tl.max is itself a Triton function; its type shows whether TRITON_INTERPRET=1 was set when triton was imported.
INTERPRETED = not isinstance(tl.max, triton.JITFunction)


class Integers(NamedTuple):
    """The integer parameters of a kernel, strides excepted, by how Triton specialises machine code on their values."""

    varying: tuple[str, ...]
    loops: tuple[str, ...]
    fixed: tuple[str, ...]


class Kernel(Protocol):
    """A Triton kernel, compiled or interpreted.

    Attributes:
        fn: the Python function.
        integers: its declared integer parameters.
        arg_names: the names of all its parameters.
        params: Triton's descriptions of them; only a compiled kernel has them.
    """

    fn: Callable[..., None]
    integers: Integers
    arg_names: Sequence[str]
    params: Sequence[Any]

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        """The launch of a grid."""
        ...


def kernel(
    *, varying: Sequence[str] = (), loops: Sequence[str] = (), fixed: Sequence[str] = ()
) -> Callable[[Callable[..., None]], Kernel]:
    """triton.jit for a kernel that `launch` starts, with a declaration of its integer parameters.

    Triton compiles a kernel again, for about a second, where an integer argument becomes 1 or divisible by 16 or ceases
    to be. Batches differ in most of their counts: without a declaration they would recompile in mid-training.

    Args:
        varying: integers that change from batch to batch, and others where nothing is gained, such as numbers of blocks
            and of heads; Triton specialises on none of their values. Any other that is no multiple of 16 turns off wide
            accesses to all tensors.
        loops: numbers of iterations that change from batch to batch; only a 1, which removes the loop, is specialised.
        fixed: integers that the model decides, such as a number of columns; Triton specialises on 1 and on multiples of
            16, as it does for strides, which are not declared.

    Raises:
        TypeError: a declared name is not a parameter.
    """

    def declare(function: Callable[..., None]) -> Kernel:
        declared = Integers(tuple(varying), tuple(loops), tuple(fixed))
        unknown = {name for names in declared for name in names} - set(signature(function).parameters)
        if unknown:
            raise TypeError(f"{function.__name__}: got {', '.join(sorted(unknown))}; allowed: names of its parameters")
        jitted: Any = triton.jit(do_not_specialize=varying, do_not_specialize_on_alignment=loops)(function)
        jitted.integers = declared
        return jitted

    return declare


class Tile(NamedTuple):
    """The part of a matrix that a program computes in one step: rows x columns (powers of two), and its warps."""

    rows: int
    columns: int
    warps: int


@lru_cache(maxsize=1024)
def tile(columns: int, *, elements: int, widest: int, per_thread: int) -> Tile:
    """The tile for rows of this many columns; it does not depend on the number of rows, so neither do a row's bits.

    Args:
        columns: number of columns of the matrix, at least 1.
        elements: least number of elements in a tile; several short rows share a tile.
        widest: largest number of columns in a tile, a power of two; longer rows take several tiles.
        per_thread: elements of the tile per thread, which bounds registers; 32 in bfloat16 are four 16-byte loads.
    """
    width = min(next_power_of_2(columns), widest)
    height = max(1, elements // width)
    return Tile(height, width, min(32, max(1, height * width // (32 * per_thread))))


def rows_of(tensor: Tensor) -> Tensor:
    """A tensor [..., H] that is not empty as [rows, H]: a view if strides can express it, otherwise a copy."""
    return tensor if tensor.ndim == 2 else tensor.reshape(-1, tensor.shape[-1])


def rows_in_one_piece(*tensors: Tensor) -> Iterator[Tensor]:
    """The tensors, with copies of those whose last stride, the third, is not 1."""
    return (tensor if tensor.stride(2) == 1 else tensor.contiguous() for tensor in tensors)


def strides_of(*tensors: Tensor) -> tuple[int, ...]:
    """The strides between tokens and between heads of each tensor."""
    return tuple(stride for tensor in tensors for stride in tensor.stride()[:2])


def strides_of_angles(cos: Tensor, sin: Tensor, positions: Tensor | None) -> tuple[int, ...]:
    """The strides of cos, sin and positions; 0 for what all sequences share."""
    tables = (table.stride() if positions is None else (0, *table.stride()) for table in (cos, sin))
    strides = [(0, *s[1:]) if len(cos) == 1 and positions is None else s for s in tables]
    where = (0, 0) if positions is None else (positions.stride(0) if len(positions) > 1 else 0, positions.stride(1))
    return *strides[0], *strides[1], *where


def cdiv(dividend: int, divisor: int) -> int:
    """The quotient, rounded up. (triton.cdiv, which also works in kernels, takes 6 us on the host.)"""
    return -(-dividend // divisor)


def next_power_of_2(number: int) -> int:
    """The least power of two that is not below a positive number."""
    return 1 << (number - 1).bit_length()


def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a program may use; of the absent GPU if the device is none, by default an H200."""
    return _shared_memory_of(device) if device.type == "cuda" else _absent_shared_memory


@lru_cache
def _shared_memory_of(gpu: torch.device) -> int:
    return getattr(torch.cuda.get_device_properties(gpu), "shared_memory_per_block_optin", 64 * 1024)


@lru_cache
def processors(device: torch.device) -> int:
    """Number of multiprocessors of a GPU; those of an H200 if the device is not a GPU."""
    return 132 if device.type != "cuda" else torch.cuda.get_device_properties(device).multi_processor_count


@cache
def specialised(kernel: Kernel) -> list[tuple[bool, bool]]:
    """For each parameter, whether Triton specialises machine code on the value 1, and on multiples of 16."""
    return [
        (not parameter.do_not_specialize, not (parameter.do_not_specialize or parameter.do_not_specialize_on_alignment))
        for parameter in kernel.params
    ]


@cache
def unaligned(kernel: Kernel) -> Kernel:
    """The kernel for calls in which an argument is not aligned: it assumes no alignment for any argument.

    A wide access needs its pointer and all of its strides aligned. By default Triton distinguishes which of them are:
    of 980 kernels compiled for the judge's cases of attention, at about a second each, 355 are left.
    """
    names = [parameter.name for parameter in kernel.params if not parameter.is_constexpr]
    twin: Any = triton.jit(do_not_specialize=kernel.integers.varying, do_not_specialize_on_alignment=names)(kernel.fn)
    twin.integers = kernel.integers
    return twin


def _aligned(kernel: Kernel, arguments: Sequence[Tensor | float]) -> bool:
    """Whether `launch` takes the kernel itself for these arguments, not its `unaligned` twin."""
    for argument, (constant, aligned) in zip(arguments, specialised(kernel), strict=False):
        if isinstance(argument, int):
            if aligned and argument % 16 and not (constant and argument == 1):
                return False
        elif isinstance(argument, Tensor) and argument.data_ptr() % 16:
            return False
    return True


_H200 = 227 * 1024  # bytes of shared memory per program
_intercepted = False
_absent_shared_memory = _H200


@contextmanager
def launched_by_triton(shared: int = _H200) -> Iterator[None]:
    """Within this context every launch calls the `run` method of the kernel it is for, for tensors on any device.

    For tools that replace `run`, to inspect launches instead of executing them. Affects all threads. Launches for
    tensors that are on no GPU are those for one with so many bytes of shared memory per program.
    """
    global _intercepted, _absent_shared_memory
    before = _intercepted, _absent_shared_memory
    _intercepted, _absent_shared_memory = True, shared
    try:
        yield
    finally:
        _intercepted, _absent_shared_memory = before


def launch(kernel: Kernel, programs: int, tensor: Tensor, *arguments: Tensor | float, **options: object) -> None:
    """Run a kernel on the tensor's device, in a one-dimensional grid of programs.

    Args:
        kernel: a Triton kernel whose constexpr parameters come last.
        programs: size of the grid.
        tensor: determines the device.
        *arguments: all parameters that are not constexpr, in order.
        **options: the constexpr parameters and Triton's own options such as num_warps. Each call of a kernel gives the
            same names in the same order.
    """
    index = tensor.get_device()
    if index >= 0 and index != torch.cuda.current_device():
        with torch.cuda.device(index):
            return launch(kernel, programs, tensor, *arguments, **options)
    # Multiply and add with one rounding, unless options disable it: Triton's default up to 3.9, but not from 3.10 on.
    options = {"enable_fp_fusion": True, **options}
    by_triton = INTERPRETED or torch.version.hip  # on HIP, Triton specialises on more than the key below
    if by_triton or _intercepted:
        (kernel if by_triton or _aligned(kernel, arguments) else unaligned(kernel))[(programs,)](*arguments, **options)
        return None
    # Triton binds the arguments and computes a key in every launch: 9 to 30 us on the host. This lookup takes 3.
    facts = _specialised.get(id(kernel))  # a kernel's own hash is a property that takes a lock
    if facts is None:
        facts = _specialised[id(kernel)] = specialised(kernel)
    bits, kinds, values = 0, [], []  # what the choice of machine code depends on (on CUDA), and the values to pass
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
            argument = argument.data_ptr()  # Triton would read it again and ask the driver whether it is valid
            bits |= argument
        values.append(argument)
    key = (id(kernel), index, bits & 15 == 0, *kinds, *options.values())
    found = _compiled.get(key)
    if found is None:
        compiled = (unaligned(kernel) if bits & 15 else kernel)[(programs,)](*arguments, **options)
        constants = tuple(options[name] for name in kernel.arg_names[len(arguments) :])
        found = compiled, compiled.run, compiled.function, compiled.packed_metadata, constants
        compiled = _compiled.setdefault(key, found)[0]  # of threads that compile at once, the first one's stays alive
    else:
        compiled, run, function, metadata, constants = found
        stream = torch._C._cuda_getCurrentRawStream(index)
        # Without Triton's own launch hooks, which its profiler Proton uses; CUDA's hooks see every launch.
        run(programs, 1, 1, stream, function, metadata, None, None, None, *values, *constants)
    if recorded.launches is not None:
        recorded.launches.append((compiled, programs, arguments))
    return None


class _Recorded(threading.local):
    """The launches of this thread during a recording: (compiled kernel, programs, arguments) each."""

    launches: list[tuple[Any, int, tuple[Any, ...]]] | None = None


recorded = _Recorded()

# The kernel itself comes first: Triton unloads its machine code when nothing refers to it.
_compiled: dict[tuple[object, ...], tuple[Any, Any, Any, Any, tuple[Any, ...]]] = {}
_specialised: dict[int, list[tuple[bool, bool]]] = {}


def register(schema: str, implementation: Callable[..., object], outputs: Callable[..., object]) -> Callable[..., Any]:
    """Define an op of the unsloth_fast namespace, opaque to torch.compile, and return a function that calls it.

    Unless ops are traced or recorded, the function calls the implementation itself: the dispatcher takes 3 to 6 us.

    Args:
        schema: the op's name, arguments and results.
        implementation: computes the results.
        outputs: allocates them with the same arguments; serves as the op's fake implementation under torch.compile.
    """
    name = schema.split("(")[0]
    LIBRARY.define(schema)
    LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"unsloth_fast::{name}", outputs, lib=LIBRARY)
    op = getattr(torch.ops.unsloth_fast, name).default

    def call(*arguments: Any) -> Any:
        return op(*arguments) if traced() else implementation(*arguments)

    return call


def traced() -> bool:
    """Whether ops are traced or recorded: by torch.compile, a fake tensor mode or another TorchDispatchMode."""
    if torch.compiler.is_compiling():
        return True
    return torch._C._len_torch_dispatch_stack() > (recorded.launches is not None)  # a recording has a mode of its own


def check_dtype(name: str, dtype: torch.dtype) -> None:
    """Raise TypeError for float64, which the kernels neither read nor write."""
    if dtype == torch.float64:
        raise TypeError(
            f"{name}: got dtype torch.float64; allowed: torch.float16, torch.bfloat16, torch.float32; "
            "the reference backend computes in float64"
        )


def check_runnable(name: str, tensor: Tensor) -> None:
    """Raise TypeError for float64, and RuntimeError for a device on which the kernels do not run."""
    check_dtype(name, tensor.dtype)
    if not (tensor.is_cuda or INTERPRETED or _intercepted):
        raise RuntimeError(
            f"{name}: got device {tensor.device}; allowed: a CUDA device, or any with TRITON_INTERPRET=1 set in the "
            "environment before triton is imported"
        )
