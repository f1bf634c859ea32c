"""What is a module? A norm, with a gate or not, an MLP, or experts, recognised by parameters and a numeric check.

The check compares it with its own forward: that of the module's class, called on a copy on the CPU, with random weights
and a few random rows, so the module's weights may be sharded, in 4 bits or without memory. Classes and their names play
no part.
"""

import copy
import itertools
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import TypeVar, cast

import torch
from torch import Tensor, nn

from unsloth_fast.failures import FAILURES, in_words
from unsloth_fast.models.checking import (
    BY_GRADIENT,
    BY_MODE,
    Sparse,
    copy_with,
    has_gradients_of,
    in_both_modes,
    inputs_of,
    plain,
    quietly_on_the_cpu,
    refusal,
    rows_of_scales,
    sizes_of,
)
from unsloth_fast.models.expert_structure import BIASES, find_experts
from unsloth_fast.models.experts import WEIGHTS, Experts
from unsloth_fast.models.methods import hooks_of
from unsloth_fast.models.mlp import Gated, mlp_forward
from unsloth_fast.models.norm import GatedNorm, LayerNorm, Norm, gated_norm_forward, layer_norm_forward, norm_forward
from unsloth_ref import kernels as reference

_EPS_NAMES = ("variance_epsilon", "eps", "epsilon", "norm_eps", "rms_norm_eps")
_GATES = (("swiglu", None), ("geglu", "none"), ("geglu", "tanh"))
_WIDTH = 24  # of the rows of a norm without a weight that takes any
_OTHER_ROUNDING = 1 / 32  # of 16-bit results, a norm that rounds once more changes about a third
_AnyNorm = TypeVar("_AnyNorm", Norm, LayerNorm, GatedNorm)

Found = Norm | LayerNorm | GatedNorm | Gated | Experts | str | None


def recognise(module: nn.Module, known: dict[Hashable, Found]) -> Found:
    """What a module is, or in words why one with such parameters is none of these; None for any other module.

    Args:
        module: a module whose forward is its class's.
        known: what was found before in the same model, by class, attributes and sizes; extended in place.
    """
    parameters, children = dict(module.named_parameters(recurse=False)), dict(module.named_children())
    sizes = {name: size for name, child in children.items() if (size := sizes_of(child))}
    others = [child for name, child in children.items() if name not in sizes]
    dimensions = {name: weight.dim() for name, weight in parameters.items()}
    is_norm = not children and dimensions in ({"weight": 1}, {})
    is_gated = not parameters and len(sizes) in (2, 3) and len(others) <= 1
    is_experts = set(parameters) in ({*WEIGHTS}, {*WEIGHTS, *BIASES})
    is_experts = is_experts and all(parameters[name].dim() == 3 for name in WEIGHTS)
    taken = inputs_of(type(module).forward)
    if not (is_norm or is_gated or is_experts) or _has_state(module, others):
        return None
    if taken not in ((1, 2) if is_norm and parameters else (3,) if is_experts else (1,)):
        return None
    if any(map(hooks_of, others)):
        return "hooks on its activation"
    shapes = tuple(tuple(tensor.shape) for tensor in parameters.values())
    attributes = tuple(plain(each) for each in (module, *others))
    key = type(module), type(module).forward, shapes, tuple(sizes.items()), attributes
    if key not in known:
        try:
            with quietly_on_the_cpu():
                if is_norm:
                    size = shapes[0][0] if shapes else getattr(module, "normalized_shape", (_WIDTH,))[-1]
                    known[key] = (_norm if taken == 1 else _gated_norm)(module, size)
                else:
                    known[key] = find_experts(module) if is_experts else _gated(module, sizes)
        except FAILURES as failure:
            known[key] = f"its check failed: {in_words(failure)}"
    return known[key]


def _has_state(module: nn.Module, others: list[nn.Module]) -> bool:
    """Whether there are tensors beside a norm's weight and linear layers."""
    tensors = itertools.chain(*((*child.parameters(), *child.buffers()) for child in others))
    return next(itertools.chain(module.buffers(recurse=False), tensors), None) is not None


def _norm(module: nn.Module, size: int) -> Norm | LayerNorm | str | None:
    """How a norm works: the offset is found in float32, then the casting in 16 bits, where alone it matters.

    Without a weight there is one candidate. A norm that is no RMSNorm may be a layer norm without a bias.
    """
    eps = _eps(module)
    if eps is None:
        return None
    candidates = [Norm(eps, offset, casting) for offset in (0.0, 1.0) for casting in ("llama", "gemma")]
    if not _is_weighted(module):
        candidates = [Norm(eps, 0.0, "gemma", weighted=False)]
    calls = {norm: norm_forward(norm, reference.rms_norm) for norm in candidates}
    found = _agreeing_norm(module, size, calls, "rms_norm", 1)
    if isinstance(found, Norm) or not _is_weighted(module):
        return found
    centred = {LayerNorm(eps): layer_norm_forward(LayerNorm(eps), reference.layer_norm)}
    layer_norm = _agreeing_norm(module, size, centred, "layer_norm", 1)
    return layer_norm if isinstance(layer_norm, LayerNorm) else found


def _gated_norm(module: nn.Module, size: int) -> GatedNorm | str | None:
    """The order and the groups from float32, then the casting from 16 bits."""
    eps, count = _eps(module), getattr(module, "n_groups", None)
    group = size // count if isinstance(count, int) and count > 0 else getattr(module, "group_size", size)
    if eps is None or not isinstance(group, int) or group < 1 or size % group:
        return None
    candidates = [GatedNorm(eps, group, before, casting) for before in (True, False) for casting in ("llama", "gemma")]
    calls = {norm: gated_norm_forward(norm, reference.gated_rms_norm) for norm in candidates}
    return _agreeing_norm(module, size, calls, "gated_rms_norm", 2)


def _is_weighted(module: nn.Module) -> bool:
    return next(module.parameters(recurse=False), None) is not None


def _eps(module: nn.Module) -> str | None:
    """The name of the attribute with eps: one of the usual ones, or, beside a weight, that of the only number."""
    numbers = [name for name, value in vars(module).items() if isinstance(value, float) and value > 0]
    usual = (name for name in _EPS_NAMES if isinstance(getattr(module, name, None), float))
    return next(usual, numbers[0] if len(numbers) == 1 and _is_weighted(module) else None)


def _agreeing_norm(
    module: nn.Module, size: int, calls: Mapping[_AnyNorm, Callable[..., object]], operation: str, inputs: int
) -> _AnyNorm | str:
    """The one norm of calls whose forward agrees with the module's own, or in words why there is none."""
    generator = torch.Generator().manual_seed(0)
    # The first rows are as small as eps is.
    sizes = torch.tensor([getattr(module, _eps(module) or "") ** 0.5, 1.0, 30.0], dtype=torch.float32)[:, None, None]
    rows = [torch.randn((3, 2, size), generator=generator, dtype=torch.float32) for _ in range(inputs)]
    rows[0] = sizes * rows[0]
    weight = torch.randn(size, generator=generator, dtype=torch.float32)
    found = list(calls)
    for weights, dtype, agree in (
        (torch.float32, torch.float32, _agree_in_float32),
        (torch.bfloat16, torch.bfloat16, _agree_in_16_bits),
        (torch.float32, torch.bfloat16, _agree_in_kind),
    ):
        random = {"weight": nn.Parameter(weight.to(weights), requires_grad=False)} if _is_weighted(module) else {}
        copied = copy_with(module, parameters=random)
        given = [tensor.to(dtype) for tensor in rows]
        own = in_both_modes(copied, *given)
        if own is None:
            return BY_MODE
        results = {norm: cast(Tensor, calls[norm](copied, *given)) for norm in found}
        found = [norm for norm, result in results.items() if agree(result, own)]
        if not found:
            return refusal(operation, 0, min(float((result - own).abs().max()) for result in results.values()))
        if weights == dtype == torch.float32:
            found = [norm for norm in found if has_gradients_of(calls[norm], copied, *given)]
            if not found:
                return BY_GRADIENT
    return found[0] if len(found) == 1 else refusal(operation, len(found))


def _agree_in_float32(result: Tensor, own: Tensor) -> bool:
    """Whether they agree up to roundings of a mean over H, a root and three products, each of at most half an ulp."""
    roundings = 4 + max(own.shape[-1], 2).bit_length()
    return result.dtype == own.dtype and bool(((result - own).abs() <= roundings * 2.0**-24 * own.abs()).all())


def _agree_in_16_bits(result: Tensor, own: Tensor) -> bool:
    """Whether nearly all bits agree: float32 sums in another order rarely fall on the other side of a rounding."""
    return _agree_in_kind(result, own) and float((result != own).float().mean()) <= _OTHER_ROUNDING


def _agree_in_kind(result: Tensor, own: Tensor) -> bool:
    """Whether they agree in dtype, and up to the two roundings to bfloat16 that either may make."""
    error = (result.float() - own.float()).abs()
    return result.dtype == own.dtype and bool((error <= 2 * torch.finfo(torch.bfloat16).eps * own.float().abs()).all())


def _gated(module: nn.Module, sizes: dict[str, tuple[int, int]]) -> Gated | str | None:
    """The roles of its linear layers and its activation, in float64 with sparse linear layers of the same sizes."""
    candidates = list(_roles(sizes))
    if not candidates:
        return None
    generator = torch.Generator().manual_seed(0)
    others = {name: copy.deepcopy(child) for name, child in module.named_children() if name not in sizes}
    copied = copy_with(module, children=others | {name: Sparse(size, generator) for name, size in sizes.items()})
    rows = rows_of_scales(sizes[candidates[0].gate][0], generator)
    own = in_both_modes(copied, rows)
    if own is None:
        return BY_MODE
    agreeing, differences = [], []
    for gated in candidates:
        result = cast(Tensor, mlp_forward(gated, reference)(copied, rows))
        differences.append(float(((result - own).abs() / own.abs().amax(-1, keepdim=True)).max()))
        if result.dtype == own.dtype and differences[-1] <= 64 * torch.finfo(torch.float64).eps:
            agreeing.append(gated)
    if len(agreeing) == 1:
        return agreeing[0] if has_gradients_of(mlp_forward(agreeing[0], reference), copied, rows) else BY_GRADIENT
    if all(gated.operation == "relu_squared" for gated in candidates):  # two layers and another activation
        return None
    return refusal("swiglu and geglu", len(agreeing), min(differences))


def _roles(sizes: dict[str, tuple[int, int]]) -> Iterator[Gated]:
    """Every way in which linear layers, inputs and outputs by name, can be an MLP, with or without a gate."""
    for names in itertools.permutations(sizes):
        *first, down = names
        hidden, inner = sizes[down][1], sizes[down][0]
        for operation, approximate in _GATES:
            if len(first) == 2 and all(sizes[name] == (hidden, inner) for name in first):
                yield Gated(operation, approximate, first[0], first[1], down)
            elif len(first) == 1 and sizes[first[0]] == (hidden, 2 * inner):
                for gate_first in (True, False):
                    yield Gated(operation, approximate, first[0], first[0], down, gate_first)
        # The other order has fitting sizes too; layers are declared in the order of their use.
        if len(first) == 1 and sizes[first[0]] == (hidden, inner) and names == tuple(sizes):
            yield Gated("relu_squared", None, first[0], first[0], down)
