"""What is a layer that carries something from token to token? A convolution, a delta rule or a scan, recognised.

Both are given the bounds of documents, which they keep apart: those of a packed batch, or the rows of any other. Calls
with a cache, as in generation, go to the module's own forward. Recognised are, by a numeric check against the forward
of the module's class on a copy on the CPU, with random weights and a few random tokens, some of them padding:

- the gated delta rule of Qwen3-Next and Qwen3.5: projections to q, k and v, which pass a short convolution, to a decay,
  to beta and to a gate, whose norm stays the module's own;
- the scan of Mamba 2 in Mamba 2, Granite 4, Falcon-H1, Nemotron-H, Bamba and Zamba 2: one projection to a gate, to x, b
  and c, which pass a short convolution, and to dt, with a norm of the module's own that takes the gate, or without;
- the short convolution of LFM2: out(second * conv(first * values)) with first, second and values from one projection.
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import silu, softplus

from unsloth_fast.failures import FAILURES, in_words
from unsloth_fast.models.checking import (
    BY_GRADIENT,
    BY_MODE,
    Sparse,
    copy_with,
    has_gradients_of,
    in_both_modes,
    plain,
    quietly_on_the_cpu,
    sizes_of,
)
from unsloth_fast.models.methods import has_own_method, is_more_than_its_class
from unsloth_fast.models.protocols import Forward
from unsloth_ref import kernels as reference

CACHES = ("cache", "cache_params", "past_key_values")
_SEPARATE = frozenset(("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj"))
_FUSED = frozenset(("in_proj_qkvz", "in_proj_ba", "out_proj"))
_SCANNED = frozenset(("A_log", "D", "dt_bias"))
_EPS = 1e-6  # added to the squared length of q and k
_TOKENS = 6
_CHUNK = 64  # tokens: transformers computes the rule in chunks, in float32 for any dtype, and adds up over each
_TOLERANCE = _TOKENS * _CHUNK * 2.0**-24


@dataclass(frozen=True)
class Mixer:
    """How a mixer works.

    Attributes:
        operations: that it calls.
        first: the name of the layer that projects the hidden states, or of one of them.
        last: the name of the layer that computes its result.
        conv: the name of its convolution.
    """

    operations: tuple[str, ...]
    first: str
    last: str
    conv: str


def mixer_forward(mixer: Mixer, kernels: Any) -> Forward:
    """The forward of a mixer that calls the operations of these kernels."""
    mix = _MIXES[mixer.operations]

    def forward(self: nn.Module, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        bounds: Tensor | None = kwargs.get("cu_seq_lens_q")
        bounds = kwargs.get("seq_idx") if bounds is None else bounds
        offloaded = getattr(self, mixer.conv).weight.is_meta  # accelerate loads it when the convolution is called
        cached = any(kwargs.get(name) is not None for name in CACHES)
        if cached and bounds is not None:
            raise ValueError("past_key_values: got a cache beside cu_seq_lens_q; allowed: one of them")
        if args or cached or (offloaded and bounds is None) or (bounds is not None and bounds.ndim != 1):
            return type(self).forward(self, hidden_states, *args, **kwargs)
        mask: Tensor | None = kwargs.get("attention_mask")
        if mask is not None:  # of padding, [B, S]
            hidden_states = (hidden_states * mask[:, :, None]).to(hidden_states.dtype)
        rows, length = hidden_states.shape[:2]
        if bounds is None:
            bounds = torch.arange(0, rows * length + 1, max(1, length), device=hidden_states.device)
        return mix(self, mixer, kernels, hidden_states, bounds.to(torch.int32), mask)

    return forward


def _short_convolution(
    module: Any, mixer: Mixer, kernels: Any, x: Tensor, bounds: Tensor, mask: Tensor | None
) -> Tensor:
    first, second, values = getattr(module, mixer.first)(x).chunk(3, -1)
    conv = getattr(module, mixer.conv)
    mixed = kernels.causal_conv((first * values).flatten(0, 1), conv.weight.squeeze(1), bounds, conv.bias)
    return getattr(module, mixer.last)(second * mixed.view(second.shape))


def _gated_delta_rule(
    module: Any, mixer: Mixer, kernels: Any, x: Tensor, bounds: Tensor, mask: Tensor | None
) -> Tensor:
    mixed, gate, b, a = _projected(module, x)
    conv = getattr(module, mixer.conv)
    mixed = kernels.causal_conv(mixed.flatten(0, 1), conv.weight.squeeze(1), bounds, conv.bias, activation="silu")
    width, tokens = module.head_k_dim, len(mixed)
    q, k, v = mixed.split([module.key_dim, module.key_dim, module.value_dim], -1)
    # x / |x| is a norm: x / root(mean x^2 + eps / D) / root(D).
    wide = torch.promote_types(torch.float32, mixed.dtype)
    weight = mixed.new_full((width,), width**-0.5, dtype=wide)
    q, k = (
        kernels.rms_norm(heads.reshape(tokens, -1, width), weight, _EPS / width, casting="gemma") for heads in (q, k)
    )
    decay = -module.A_log.to(wide).exp() * softplus(a.to(wide) + module.dt_bias)
    out = kernels.gated_delta_rule(
        q, k, v.view(tokens, -1, module.head_v_dim), decay.flatten(0, 1), b.sigmoid().flatten(0, 1), bounds
    )
    out = module.norm(out.view(-1, module.head_v_dim), gate.reshape(-1, module.head_v_dim))
    return module.out_proj(out.view(*x.shape[:2], -1))


def _mamba2_scan(module: Any, mixer: Mixer, kernels: Any, x: Tensor, bounds: Tensor, mask: Tensor | None) -> Tensor:
    inner, shared, conv = module.intermediate_size, module.n_groups * module.ssm_state_size, getattr(module, mixer.conv)
    projected = module.in_proj(x * getattr(module, "ssm_in_multiplier", 1.0)) * getattr(module, "mup_vector", 1.0)
    gate, mixed, dt = projected.split([inner, inner + 2 * shared, module.num_heads], -1)
    mixed = kernels.causal_conv(mixed.flatten(0, 1), conv.weight.squeeze(1), bounds, conv.bias, activation="silu")
    if mask is not None:  # the convolution reads the bias of the projection where there is padding
        mixed = (mixed * mask.reshape(-1, 1)).to(mixed.dtype)
    values, b, c = mixed.split([inner, shared, shared], -1)
    b, c = (heads.view(len(mixed), module.n_groups, -1) for heads in (b, c))
    wide = torch.promote_types(torch.float32, mixed.dtype)
    step = softplus(dt.flatten(0, 1).to(wide) + module.dt_bias).clamp(*module.time_step_limit)
    rate = -module.A_log.to(wide).exp()
    out = kernels.mamba2_scan(values.view(len(mixed), -1, module.head_dim), step, rate, b, c, module.D, bounds)
    out = out.view(gate.shape)
    out = module.norm(out, gate) if getattr(module, "mamba_rms_norm", True) else out * silu(gate)
    return module.out_proj(out.to(x.dtype))


def _projected(module: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k and v one after the other, [B, S, 2ND + ME]; the gate; beta and the decay before their activations."""
    if "in_proj_qkv" in module._modules:
        return module.in_proj_qkv(x), module.in_proj_z(x), module.in_proj_b(x), module.in_proj_a(x)
    q, k, v, gate, b, a = module.fix_query_key_value_ordering(module.in_proj_qkvz(x), module.in_proj_ba(x))
    return torch.cat([part.flatten(2) for part in (q, k, v)], -1), gate, b, a


_MIXES = {
    ("causal_conv",): _short_convolution,
    ("causal_conv", "gated_delta_rule"): _gated_delta_rule,
    ("causal_conv", "mamba2_scan"): _mamba2_scan,
}


def recognise_mixer(module: nn.Module, known: dict[Hashable, Any]) -> Mixer | str | None:
    """What a mixer is, or in words why a module with the parts of one is none; None for any other module.

    Args:
        module: a module whose forward is its class's.
        known: what was found before in the same model; extended in place.
    """
    mixer = _candidate(module)
    if mixer is None:
        return None
    if is_more_than_its_class(getattr(module, mixer.conv)):  # its forward is not called
        return "hooks on its convolution"
    shapes = tuple((name, tuple(tensor.shape)) for name, tensor in module.named_parameters() if "lora_" not in name)
    attributes = tuple(entry for entry in plain(module) if not isinstance(entry, tuple) or entry[0] != "layer_idx")
    key = type(module), type(module).forward, shapes, attributes
    if key not in known:
        try:
            with quietly_on_the_cpu():
                known[key] = _checked(module, mixer)
        except FAILURES as failure:
            known[key] = f"its check failed: {in_words(failure)}"
    return known[key]


def mixers_of(model: nn.Module) -> dict[int, Mixer]:
    """The modules of a model that are recognised as mixers, by their id; their forwards are those of their classes."""
    known: dict[Hashable, Any] = {}
    modules = [module for module in model.modules() if not has_own_method(module, "forward")]
    found = {id(module): recognise_mixer(module, known) for module in modules}
    return {key: mixer for key, mixer in found.items() if isinstance(mixer, Mixer)}


def _candidate(module: nn.Module) -> Mixer | None:
    """The mixer that a module can be by its parts."""
    children = dict(module.named_children())
    sizes = {name: size for name, child in children.items() if (size := sizes_of(child))}
    convs = [name for name, child in children.items() if type(child) is nn.Conv1d and _is_depthwise(child)]
    own = {name for name, _ in module.named_parameters(recurse=False)}
    if len(convs) != 1:
        return None
    if own == {"A_log", "dt_bias"} and set(sizes) in (_SEPARATE, _FUSED):
        first = "in_proj_qkv" if "in_proj_qkv" in sizes else "in_proj_qkvz"
        return Mixer(("causal_conv", "gated_delta_rule"), first, "out_proj", convs[0])
    if own == _SCANNED and set(sizes) == {"in_proj", "out_proj"}:
        return Mixer(("causal_conv", "mamba2_scan"), "in_proj", "out_proj", convs[0])
    if own or len(sizes) != 2 or len(children) != 3:
        return None
    for first, last in (tuple(sizes), tuple(sizes)[::-1]):
        channels = sizes[last][0]
        if sizes[first][1] == 3 * channels and sizes[first][0] == sizes[last][1]:
            return Mixer(("causal_conv",), first, last, convs[0])
    return None


def _is_depthwise(conv: nn.Conv1d) -> bool:
    return conv.groups == conv.in_channels == conv.out_channels and conv.stride == conv.dilation == (1,)


def _checked(module: nn.Module, mixer: Mixer) -> Mixer | str:
    """The mixer if it computes what the forward of the module's class does."""
    generator = torch.Generator().manual_seed(0)

    def random(like: Tensor) -> nn.Parameter:
        return nn.Parameter(torch.randn(like.shape, generator=generator, dtype=torch.float64), requires_grad=False)

    children: dict[str, nn.Module] = {}
    for name, child in module.named_children():
        size = sizes_of(child)
        children[name] = Sparse(size, generator) if size else _randomised(child, random)
    own = {name: random(tensor) for name, tensor in module.named_parameters(recurse=False)}
    copied = copy_with(module, parameters=own, children=children)
    hidden: Any = sizes_of(getattr(module, mixer.first))
    rows = torch.randn((2, _TOKENS, hidden[0]), generator=generator, dtype=torch.float64)
    mask = torch.ones(2, _TOKENS, dtype=torch.int64)
    mask[1, :2] = 0
    forward = mixer_forward(mixer, reference)
    for given in ({}, {"attention_mask": mask}):
        result = in_both_modes(copied, rows, **given)
        if result is None:
            return BY_MODE
        found: Any = forward(copied, rows, **given)
        difference = float(((found - result).abs() / result.abs().amax((0, 1), keepdim=True).clamp(min=1e-30)).max())
        if found.dtype != result.dtype or not difference <= _TOLERANCE:
            return f"differs from {' and '.join(mixer.operations)} by {difference:.2g}"
        if not has_gradients_of(forward, copied, rows, **given):
            return BY_GRADIENT
    return mixer


def _randomised(child: nn.Module, random: Callable[[Tensor], nn.Parameter]) -> nn.Module:
    """A convolution or a norm with other weights, which has no memory in common with the module's."""
    parameters = {name: random(tensor) for name, tensor in child.named_parameters(recurse=False)}
    return copy_with(child, parameters=parameters)
