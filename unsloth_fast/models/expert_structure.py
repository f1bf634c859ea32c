"""How do experts work? Recognised in float64, with few and small ones: all weights of a model take gigabytes."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from math import isfinite
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor, nn

from unsloth_fast.models.checking import (
    BY_GRADIENT,
    BY_MODE,
    copy_with,
    has_gradients_of,
    in_both_modes,
    refusal,
    rows_of_scales,
)
from unsloth_fast.models.experts import WEIGHTS, Experts, experts_forward
from unsloth_ref import kernels as reference

BIASES = ("gate_up_proj_bias", "down_proj_bias")
EXPERTS, COLUMNS, _INNER = 3, 5, 4  # of the experts that are checked
_ALPHAS = ("alpha", "swiglu_alpha")
_LIMITS = ("limit", "swiglu_limit")


def find_experts(module: Any) -> Experts | str:
    """How experts are stored and gated, or in words why no operation computes them."""
    stored = stored_as(module)
    if stored is None:
        return "its weights are stored otherwise"
    generator = torch.Generator().manual_seed(0)
    copied, rows = small_experts(module, *stored, generator), rows_of_scales(COLUMNS, generator)
    weights = torch.randn(rows[:, :2].shape, generator=generator, dtype=torch.float64)
    inputs = rows, torch.tensor([[0, 2], [2, 0], [1, 1], [0, 1]]), weights
    own = in_both_modes(copied, *inputs)
    if own is None:
        return BY_MODE
    found = agreeing_experts(module, *stored, own, lambda each: experts_forward(each, reference)(copied, *inputs))
    if isinstance(found, str) or has_gradients_of(experts_forward(found, reference), copied, *inputs):
        return found
    return BY_GRADIENT


def small_experts(module: Any, transposed: bool, biased: bool, generator: torch.Generator) -> Any:
    """A copy with a few small experts in float64; all weights of a model take gigabytes."""
    shapes = (EXPERTS, 2 * _INNER, COLUMNS), (EXPERTS, COLUMNS, _INNER)
    sizes = [*shapes, *(shape[:2] for shape in shapes if biased)]
    tensors = [torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes]
    tensors = [tensor.mT.contiguous() if transposed and tensor.ndim == 3 else tensor for tensor in tensors]
    frozen = (nn.Parameter(tensor, requires_grad=False) for tensor in tensors)
    copied = copy_with(module, dict(zip((*WEIGHTS, *BIASES), frozen, strict=False)))
    set_sizes(copied)
    if hasattr(module, "config"):
        copied.config = SimpleNamespace(_experts_implementation="eager")
    return copied


def set_sizes(copied: Any) -> None:
    """Give a copy of experts, or of what holds them, the numbers of a few small ones, under the names that it has."""
    sizes = {"num_experts": EXPERTS, "hidden_dim": COLUMNS, "hidden_size": COLUMNS}
    for name, size in (sizes | {"intermediate_dim": _INNER, "intermediate_size": _INNER}).items():
        if hasattr(copied, name):
            setattr(copied, name, size)


def agreeing_experts(
    module: Any, transposed: bool, biased: bool, own: Tensor, computed: Callable[[Experts], object]
) -> Experts | str:
    """The one way of gating experts that computes what their own forward does, or in words why there is none."""
    agreeing, differences = [], []
    for found in _gates_of(module, transposed, biased):
        result = cast(Tensor, computed(found))
        differences.append(float(((result - own).abs() / own.abs().amax(-1, keepdim=True)).max()))
        if result.dtype == own.dtype and differences[-1] <= 64 * torch.finfo(torch.float64).eps:
            agreeing.append(found)
    return agreeing[0] if len(agreeing) == 1 else refusal("moe_mlp", len(agreeing), min(differences))


def stored_as(module: Any) -> tuple[bool, bool] | None:
    """Whether the weights of experts are transposed, and whether they have biases; None if their shapes are others."""
    (count, first, second), narrow = module.gate_up_proj.shape, module.down_proj.shape
    biases = [bias.shape for name in BIASES if (bias := getattr(module, name, None)) is not None]
    for transposed, wide, hidden in ((False, first, second), (True, second, first)):
        shape = (count, wide // 2, hidden) if transposed else (count, hidden, wide // 2)
        if wide % 2 == 0 and narrow == shape and biases in ([], [(count, wide), (count, hidden)]):
            return transposed, bool(biases)
    return None


def _gates_of(module: Any, transposed: bool, biased: bool) -> Iterator[Experts]:
    """Every gate that experts with weights of this kind may have."""
    alphas, limits = ({default, *_numbers(module, names)} for default, names in ((1.0, _ALPHAS), (None, _LIMITS)))
    for interleaved, alpha, limit, offset in itertools.product((False, True), alphas, limits, (0.0, 1.0)):
        yield Experts("silu", interleaved, alpha, limit, offset, transposed, biased)
    yield Experts("gelu_tanh", transposed=transposed, biased=biased)


def _numbers(module: nn.Module, names: Sequence[str]) -> list[float]:
    """The attributes with these names that are finite numbers; an infinite limit is none."""
    numbers = (getattr(module, name, None) for name in names)
    return [float(number) for number in numbers if isinstance(number, int | float) and isfinite(number)]
