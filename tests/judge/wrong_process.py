"""Implementations that are right for one call and wrong beside other calls, other numbers of rows or other dtypes.

Each is a backend, such as `tests.judge.wrong_process.swiglu_seeds_torch`.
"""

import gc
import itertools
import os
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tests.judge.contract import wrong
from unsloth_ref import kernels as reference


@wrong("rms_norm", "batch_invariance")
def rms_norm_sums_by_the_number_of_rows(
    x: Tensor, weight: Tensor, eps: float = 1e-6, *, offset: float = 0.0, casting: str = "llama"
) -> Tensor:
    """Splits the sums of few rows, to occupy the device."""
    few = x.numel() // max(1, x.shape[-1]) < 8
    squares = x.float().square()
    half = x.shape[-1] // 2
    total = squares[..., :half].sum(-1, True) + squares[..., half:].sum(-1, True) if few else squares.sum(-1, True)
    normed = x.float() * torch.rsqrt(total / max(1, x.shape[-1]) + eps)
    normed = normed.to(x.dtype).float() if casting == "llama" else normed
    return (normed * (weight.float() + offset)).to(x.dtype)


@wrong("packed_attention", "batch_invariance")
def packed_attention_scales_by_the_number_of_documents(q: Tensor, *inputs: Any, **options: Any) -> Tensor:
    """Rounds differently if there is a single document."""
    out = reference.packed_attention(q, *inputs, **options)
    return out if len(inputs[2]) > 2 else out * (1 + torch.finfo(q.dtype).eps)


@wrong("rms_norm", "changed_inputs")
def rms_norm_keeps_its_converted_weight(x: Tensor, weight: Tensor, *others: Any, **options: Any) -> Tensor:
    """Keeps a copy of the weight in float32 on the tensor, which is stale after a step of an optimizer."""
    if torch.compiler.is_compiling():
        return reference.rms_norm(x, weight, *others, **options)
    kept = getattr(weight, "_kept", None)
    if kept is None:
        kept = weight._kept = weight.detach().clone()  # type: ignore[attr-defined]
    return reference.rms_norm(x, weight + (kept - weight).detach(), *others, **options)


@wrong("swiglu", "process_state")
def swiglu_seeds_torch(gate: Tensor, up: Tensor) -> Tensor:
    """Sets the seed of every generator."""
    torch.manual_seed(0)
    return reference.swiglu(gate, up)


@wrong("swiglu", "process_state")
def swiglu_sets_the_precision_of_products(gate: Tensor, up: Tensor) -> Tensor:
    """Allows TF32 in the whole process."""
    torch.set_float32_matmul_precision("high")
    return reference.swiglu(gate, up)


@wrong("swiglu", "process_state")
def swiglu_leaves_gradients_disabled(gate: Tensor, up: Tensor) -> Tensor:
    """Disables gradients and enables them for its own output alone."""
    y = reference.swiglu(gate, up)
    if y.requires_grad and not torch.compiler.is_compiling():
        torch.set_grad_enabled(False)
    return y


@wrong("swiglu", "process_state")
def swiglu_leaves_float64_as_default(gate: Tensor, up: Tensor) -> Tensor:
    """Changes the default dtype."""
    torch.set_default_dtype(torch.float64)
    return reference.swiglu(gate, up)


@wrong("swiglu", "process_state")
def swiglu_chooses_cudnn_algorithms(gate: Tensor, up: Tensor) -> Tensor:
    """Sets a flag of cuDNN."""
    torch.backends.cudnn.benchmark = True
    return reference.swiglu(gate, up)


@wrong("swiglu", "process_state")
def swiglu_flushes_subnormal_numbers(gate: Tensor, up: Tensor) -> Tensor:
    """Makes small numbers 0 in the whole process."""
    if not torch.compiler.is_compiling():
        torch.set_flush_denormal(True)
    return reference.swiglu(gate, up)


@wrong("swiglu", "process_state")
def swiglu_stops_the_collection_of_garbage(gate: Tensor, up: Tensor) -> Tensor:
    """Avoids a pause, for ever."""
    if not torch.compiler.is_compiling():
        gc.disable()
    return reference.swiglu(gate, up)


TABLES: dict[int, Tensor] = {}


@wrong("swiglu", "calls_apart")
def swiglu_keeps_a_table_by_shape(gate: Tensor, up: Tensor) -> Tensor:
    """Keeps what it multiplies by in the dtype of the first call, which the results of another then have."""
    y = reference.swiglu(gate, up)
    return y if torch.compiler.is_compiling() else y * TABLES.setdefault(y.shape[-1], y.new_ones(y.shape[-1]))


CALLS = itertools.count()


@wrong("swiglu", "process_state")
def swiglu_writes_to_the_environment(gate: Tensor, up: Tensor) -> Tensor:
    """Counts its calls in a variable."""
    if not torch.compiler.is_compiling():
        os.environ["SWIGLU_CALLS"] = str(next(CALLS))
    return reference.swiglu(gate, up)


@wrong("swiglu", "exact_laws")
def swiglu_multiplies_large_numbers_in_another_order(gate: Tensor, up: Tensor) -> Tensor:
    """Has two branches, by the size of up; both are accurate."""
    return torch.where(up.abs() < 2, F.silu(gate) * up, gate * (torch.sigmoid(gate) * up))


class _Copy(torch.autograd.Function):
    """A copy, with a node of its own in the graph, as kernels have."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return dy.clone()


@wrong("swiglu", "compiles")
def swiglu_multiplies_in_another_order_if_compiled(gate: Tensor, up: Tensor) -> Tensor:
    """Has a path for torch.compile; both are accurate."""
    gate = _Copy.apply(gate)  # type: ignore[assignment]
    if torch.compiler.is_compiling():
        return gate * (torch.sigmoid(gate) * up)
    return F.silu(gate) * up


class _Chunked(torch.autograd.Function):
    """Multiplies by a weight, whose gradient it adds up over chunks of 64 rows in 16 bits."""

    @staticmethod
    def forward(ctx: Any, normed: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(normed, weight)
        return (normed.float() * weight.float()).to(normed.dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        normed, weight = ctx.saved_tensors
        total = torch.zeros_like(weight)
        terms = (dy.float() * normed.float()).reshape(-1, len(weight))
        for chunk in terms.split(64):
            total += chunk.sum(0).to(total.dtype)
        return (dy.float() * weight.float()).to(dy.dtype), total


@wrong("layer_norm", "extents", dtype="float16")
def layer_norm_adds_chunks_of_rows_in_16_bits(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """Adds up the gradient of the weight in 16 bits, which hundreds of rows show."""
    normed = reference.layer_norm(x.float(), torch.ones_like(weight).float(), torch.zeros_like(bias).float(), eps)
    if weight.dtype != x.dtype or bias.dtype != x.dtype or torch.compiler.is_compiling():
        return (normed * weight.float() + bias.float()).to(x.dtype)
    return (_Chunked.apply(normed, weight) + bias.float()).to(x.dtype)


@wrong("rms_norm", "argument_kinds", dtype="bfloat16")
def rms_norm_rounds_a_wide_weight(x: Tensor, weight: Tensor, *others: Any, **options: Any) -> Tensor:
    """Converts the weight to the dtype of x."""
    return reference.rms_norm(x, weight.to(x.dtype), *others, **options)


@wrong("rope", "argument_kinds", dtype="bfloat16")
def rope_rounds_wide_angles(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *positions: Any) -> tuple[Tensor, Tensor]:
    """Converts cos and sin to the dtype of q."""
    return reference.rope(q, k, cos.to(q.dtype), sin.to(q.dtype), *positions)
