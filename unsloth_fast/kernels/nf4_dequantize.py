"""Weights that bitsandbytes stores in 4 bits, in a dtype to compute with.

    w_i = code[n_i] * scale_(i // 64)
    scale_b = absmax_b, or with nested scales nested_code[absmax_b] * nested_absmax_(b // 256) + nested_offset

One launch, nested scales included. A program takes words of four bytes, eight elements each, that lie in one group of
256 blocks; it holds the 16 numbers of `code` in shared memory. Nothing is saved: there is no backward pass. All
arithmetic is float32 and never fused, with one rounding at the store: the bits are those of the contract. Bytes moved
for N elements of b bytes: N / 2 + N / 64 + 4 (N / 16384) with nested scales, N / 2 + 4 (N / 64) otherwise; bN written.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from unsloth_fast.kernels._launch import cdiv, check_dtype, check_runnable, kernel, launch, register
from unsloth_ref import nf4_checks

WORDS = 1024  # of a program; a divisor of the 2048 of a group
WARPS = 4


@triton.jit
def code_table():
    """The 16 quantiles."""
    n = tl.arange(0, 16)
    table = tl.where(n == 0, -1.0, 1.0)
    table = tl.where(n == 1, -0.6961928009986877, table)
    table = tl.where(n == 2, -0.5250730514526367, table)
    table = tl.where(n == 3, -0.39491748809814453, table)
    table = tl.where(n == 4, -0.28444138169288635, table)
    table = tl.where(n == 5, -0.18477343022823334, table)
    table = tl.where(n == 6, -0.09105003625154495, table)
    table = tl.where(n == 7, 0.0, table)
    table = tl.where(n == 8, 0.07958029955625534, table)
    table = tl.where(n == 9, 0.16093020141124725, table)
    table = tl.where(n == 10, 0.24611230194568634, table)
    table = tl.where(n == 11, 0.33791524171829224, table)
    table = tl.where(n == 12, 0.44070982933044434, table)
    table = tl.where(n == 13, 0.5626170039176941, table)
    return tl.where(n == 14, 0.7229568362236023, table)


@kernel(fixed=("size", "packed_bytes"))
def nf4_dequantize_kernel(
    packed_ptr, absmax_ptr, nested_code_ptr, nested_absmax_ptr, nested_offset_ptr, w_ptr, size, packed_bytes,
    NESTED: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """w for the words of one program; each thread stores the 8 elements of a word at once."""
    start = tl.program_id(0).to(tl.int64) * WORDS
    bytes_left = tl.minimum(packed_bytes - start * 4, WORDS * 4).to(tl.int32)
    left = tl.minimum(size - start * 8, WORDS * 8).to(tl.int32)
    word = tl.arange(0, WORDS)
    byte = word[:, None] * 4 + tl.arange(0, 4)[None, :]
    packed = tl.load(packed_ptr + start * 4 + byte, byte < bytes_left, other=0)
    absmax = tl.load(absmax_ptr + start // 8 + word // 8, word * 8 < left, other=0)
    if NESTED:
        scale = tl.load(nested_absmax_ptr + start // 2048)
        absmax = tl.load(nested_code_ptr + absmax.to(tl.int32)) * scale + tl.load(nested_offset_ptr)
    half = tl.join(packed >> 4, packed & 15).reshape(WORDS * 8)
    w = tl.gather(code_table(), half.to(tl.int32), 0).reshape(WORDS, 8) * absmax[:, None]
    place = word[:, None] * 8 + tl.arange(0, 8)[None, :]
    tl.store(w_ptr + start * 8 + place, w.to(w_ptr.dtype.element_ty), place < left)


def nf4_dequantize_forward(
    packed: Tensor,
    absmax: Tensor,
    nested_code: Tensor | None,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    shape: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    """Compute the weight, new and contiguous."""
    w = nf4_dequantize_forward_outputs(packed, absmax, nested_code, nested_absmax, nested_offset, shape, dtype)
    if w.numel() == 0:
        return w
    given = nested_code, nested_absmax, nested_offset
    packed, absmax = packed.contiguous(), absmax.contiguous()
    nested = [absmax if tensor is None else tensor.contiguous() for tensor in given]
    options = {"NESTED": nested_code is not None, "WORDS": WORDS, "num_warps": WARPS, "enable_fp_fusion": False}
    sizes = w.numel(), packed.numel()
    launch(nf4_dequantize_kernel, cdiv(w.numel(), 8 * WORDS), w, packed, absmax, *nested, w, *sizes, **options)
    return w


def nf4_dequantize_forward_outputs(
    packed: Tensor,
    absmax: Tensor,
    nested_code: Tensor | None,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    shape: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    """Allocate the weight."""
    return packed.new_empty(shape, dtype=dtype)


forward_op = register(
    "nf4_dequantize_forward(Tensor packed, Tensor absmax, Tensor? nested_code, Tensor? nested_absmax,"
    " Tensor? nested_offset, SymInt[] shape, ScalarType dtype) -> Tensor",
    nf4_dequantize_forward,
    nf4_dequantize_forward_outputs,
)


def check(
    packed: Tensor,
    absmax: Tensor,
    nested_code: Tensor | None,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    shape: Sequence[int],
    dtype: torch.dtype,
) -> None:
    """Raise for arguments that nf4_dequantize does not allow."""
    nf4_checks.nf4_arguments(packed, absmax, nested_code, nested_absmax, nested_offset, shape, dtype)
    check_runnable("absmax", absmax)
    if nested_offset is not None:
        check_runnable("nested_offset", nested_offset)
    check_dtype("dtype", dtype)


def nf4_dequantize(
    packed: Tensor,
    absmax: Tensor,
    nested_code: Tensor | None = None,
    nested_absmax: Tensor | None = None,
    nested_offset: Tensor | None = None,
    *,
    shape: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    """Dequantise a weight of N elements; nothing is differentiated.

    Args:
        packed: ceil(N / 2) elements in any shape, uint8: two elements each. Of an odd N, half of the last is not used.
        absmax: [ceil(N / 64)], the scale of each block of 64 elements: float32, or with nested scales uint8.
        nested_code: [256], float32: the scale that each value of absmax stands for, before it is scaled.
        nested_absmax: [ceil(N / 64 / 256)], float32: the scale of each group of 256 blocks.
        nested_offset: [], float32: it is added to every scale.
        shape: of the weight; N is its product.
        dtype: of the result: float16, bfloat16 or float32.

    Returns:
        [*shape] in dtype, contiguous.

    Raises:
        ValueError: shapes or devices do not match, or only some of the nested arguments are given.
        TypeError: a tensor or the result has another dtype.
        RuntimeError: on a CPU without Triton's interpreter.

    Source: Dettmers et al. 2023, arXiv:2305.14314. The bits are those of bitsandbytes 0.50.
    """
    arguments = packed, absmax, nested_code, nested_absmax, nested_offset, shape, dtype
    check(*arguments)
    return forward_op(*arguments)
