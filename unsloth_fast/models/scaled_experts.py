"""Experts that get their tokens multiplied by the scores of a router, as in Llama 4, beside an MLP for all tokens.

    scores, logits = router(x)       y_t = shared(x_t) + sum over the experts e of token t of e(score_te * x_t)

Such a model gives every token to every expert; the score of an expert that was not chosen is 0, and so is what it
computes. Here a token goes through its own experts alone. The product with a score is rounded, as the model rounds it.
What holds the router, the experts and the MLP is recognised by a numeric check against the forward of its class, on a
copy with a few small experts.
"""

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn

from unsloth_fast.failures import FAILURES, in_words
from unsloth_fast.models.checking import (
    BY_MODE,
    copy_with,
    inputs_of,
    plain,
    quietly_on_the_cpu,
    rows_of_scales,
    sizes_of,
)
from unsloth_fast.models.expert_structure import COLUMNS, EXPERTS, agreeing_experts, set_sizes, small_experts, stored_as
from unsloth_fast.models.experts import WEIGHTS, Experts, inner_experts, inside_of, routed_through
from unsloth_fast.models.methods import is_more_than_its_class
from unsloth_fast.models.protocols import Forward
from unsloth_ref import kernels as reference

_CHOSEN = 2  # experts of a token in the check


@dataclass(frozen=True)
class ScaledExperts:
    """What holds experts that get scaled tokens.

    Attributes:
        router, experts, shared: the names of its parts.
        inner: how its experts work.
    """

    router: str
    experts: str
    shared: str
    inner: Experts

    def operations(self, module: nn.Module) -> tuple[str, ...]:
        """What the forward calls in a module."""
        return ("grouped_gemm",) if isinstance(module._modules[self.experts], ParamWrapper) else ("moe_mlp",)


def scaled_experts_forward(found: ScaledExperts, kernels: Any) -> Forward:
    """The forward that calls operations of these kernels, and returns the logits of the router too, [T, E]."""

    def forward(self: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        experts = self._modules[found.experts]
        routed = None if _is_called(experts) else routed_through(experts, found.inner, kernels)
        if routed is None:
            return type(self).forward(self, hidden_states)
        x = hidden_states.flatten(0, -2)
        scores, logits = getattr(self, found.router)(x)
        chosen, indices = scores.topk(self.top_k, -1)
        rows = (x[:, None] * chosen[:, :, None]).flatten(0, 1)
        y = routed(rows, indices.view(-1, 1), torch.ones_like(chosen).view(-1, 1))
        out = getattr(self, found.shared)(x)
        return out.add_(y.unflatten(0, indices.shape).sum(1)), logits

    return forward


def _is_called(experts: Any) -> bool:
    """Whether experts must be called: they do more than their class, or accelerate loads their weights then."""
    parts = (experts, *inside_of(experts))
    return any(map(is_more_than_its_class, parts)) or inner_experts(experts).gate_up_proj.is_meta


def recognise_scaled_experts(module: nn.Module, known: dict[Hashable, Any]) -> ScaledExperts | str | None:
    """How a module holds experts that get scaled tokens, or in words why one with such parts does not; None for others.

    Args:
        module: a module whose forward is its class's.
        known: what was found before in the same model; extended in place.
    """
    names = _parts(module)
    if names is None:
        return None
    children = [inner_experts(module._modules[name]) for name in names]
    shapes = tuple(tuple(tensor.shape) for tensor in children[1].parameters())
    key = type(module), type(module).forward, names, shapes, *map(plain, (module, *children))
    if key not in known:
        try:
            with quietly_on_the_cpu():
                known[key] = _checked(module, *names)
        except FAILURES as failure:
            known[key] = f"its check failed: {in_words(failure)}"
    return known[key]


def experts_inside(module: nn.Module) -> tuple[nn.Module, ...]:
    """The experts that get scaled tokens, with peft's adapters around them; empty for any other module."""
    names = _parts(module)
    experts: Any = module._modules[names[1]] if names else None
    return (experts, *inside_of(experts)) if names else ()


def _parts(module: nn.Module) -> tuple[str, str, str] | None:
    """The names of the router, the experts and the MLP, if there are these three and nothing else."""
    children = {name: inner_experts(child) for name, child in module.named_children()}
    experts = [name for name, child in children.items() if _takes_tokens_alone(child)]
    routers = [name for name, child in children.items() if sizes_of(child)]
    others = [name for name in children if name not in (*experts, *routers)]
    own = next(module.parameters(recurse=False), None)
    if own is not None or not len(experts) == len(routers) == len(others) == 1 or inputs_of(type(module).forward) != 1:
        return None
    count = getattr(module, "top_k", None)
    same = isinstance(count, int) and count == getattr(children[routers[0]], "top_k", None)
    return (routers[0], experts[0], others[0]) if same else None


def _takes_tokens_alone(module: nn.Module) -> bool:
    """Whether a module has the weights of experts, and its forward takes no indices."""
    weights = dict(module.named_parameters(recurse=False))
    return {*WEIGHTS} <= weights.keys() and weights[WEIGHTS[0]].dim() == 3 and inputs_of(type(module).forward) == 1


def _checked(module: Any, router: str, experts: str, shared: str) -> ScaledExperts | str:
    inner = inner_experts(module._modules[experts])
    stored = stored_as(inner)
    if stored is None:
        return "the weights of its experts are stored otherwise"
    generator = torch.Generator().manual_seed(0)

    def matrix(*size: int) -> nn.Parameter:
        return nn.Parameter(torch.randn(size, generator=generator, dtype=torch.float64), requires_grad=False)

    small = {
        router: copy_with(module._modules[router], {"weight": matrix(EXPERTS, COLUMNS)}),
        experts: small_experts(inner, *stored, generator),
        shared: nn.Linear(COLUMNS, COLUMNS, bias=False),
    }
    small[shared].weight = matrix(COLUMNS, COLUMNS)
    copied = copy_with(module, children=small)
    for part in (copied, small[router]):
        set_sizes(part)
        part.top_k = _CHOSEN
    rows = rows_of_scales(COLUMNS, generator)[None]
    own, logits = type(module).forward(copied.eval(), rows)
    again, _ = type(module).forward(copied.train(), rows)
    if not torch.equal(own, again):
        return BY_MODE

    def computed(found: Experts) -> Tensor:
        forward: Any = scaled_experts_forward(ScaledExperts(router, experts, shared, found), reference)
        result, same_logits = forward(copied, rows)
        return result if torch.equal(logits, same_logits) else result * torch.nan

    found = agreeing_experts(inner, *stored, own, computed)
    return found if isinstance(found, str) else ScaledExperts(router, experts, shared, found)
