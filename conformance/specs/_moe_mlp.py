"""The error of what an expert computes, and calls of experts' MLPs that the contract refuses.

The error of the activation, `activated`, is that of lora_mlp too.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from math import inf

import torch
from torch import Tensor
from torch.nn import functional as F

from conformance.spec import Call, mistake, wrong_option
from conformance.specs._mistakes import one_column_short
from conformance.tolerances.bounds import SHARED, Bound, added_in_float32, exact, float32_error, joined, product, total
from unsloth_ref.accuracy import ROUNDING_RMS


@dataclass(frozen=True)
class Expert:
    """What an expert computes for its slots; all roundings but those of results are made.

    Attributes:
        slots: their tokens and their places among the token's experts.
        index: of the expert.
        weighted: [slots, H], the parts of y.
        dz, dout: [slots, 2F] and [slots, H]; 0 without a backward pass.
        dx: [slots, H], the parts of dx.
        ddown: [H, F], a sum over slots.
        dweights: [slots].
    """

    slots: tuple[Tensor, ...]
    index: int
    weighted: Bound
    dz: Bound
    dout: Bound
    dx: Bound
    ddown: Bound
    dweights: Bound


def _activation(gate: Tensor, name: str, alpha: float) -> Tensor:
    if name == "silu":
        return gate * torch.sigmoid(alpha * gate)
    return F.gelu(gate, approximate="tanh" if name == "gelu_tanh" else "none")


@cache
def _curvature(name: str, alpha: float) -> float:
    """The largest absolute value of the activation's second derivative, which is near 0."""
    gate = torch.linspace(-8, 8, 64001, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(_activation(gate, name, alpha).sum(), gate, create_graph=True)
    return float(torch.autograd.grad(slope.sum(), gate)[0].abs().max())


def activated(gate: Bound, call: Call) -> tuple[Bound, Bound]:
    """The activation of a gate and its slope, not yet rounded but for the factors of a SiLU with alpha.

    An error e of the gate changes a by at most |a'| e + max |a''| e^2 / 2, and a' by max |a''| e. Float32 arithmetic
    loses a few bits of 1 + x (1 - s), x = alpha * gate, or of 1 + tanh or 1 + erf, and as many as |x| has in an
    exponential.
    """
    name, alpha = call.options.get("activation", "silu"), call.options.get("alpha", 1.0)
    with torch.enable_grad():
        leaf = gate.value.detach().requires_grad_()
        value = _activation(leaf, name, alpha)
        (slope,) = torch.autograd.grad(value.sum(), leaf)
    value, curvature, x = value.detach(), _curvature(name, alpha), alpha * gate.value
    envelope = torch.sigmoid(x) if name == "silu" else torch.ones_like(x)
    size = (1 + x.abs()) * (1 + torch.maximum(x.abs(), gate.value.abs())) * envelope + call.smallest
    arithmetic = float32_error(call.elements) * size
    found = Bound(
        value,
        slope.abs() * gate.error + curvature * gate.error.square() / 2 + arithmetic,
        slope.square() * gate.square + (SHARED * size) ** 2,
    )
    error = curvature * gate.error + arithmetic
    sloped = Bound(slope, error, curvature**2 * gate.square + (SHARED * size) ** 2)
    return (found, sloped) if alpha == 1.0 else _with_rounded_factors(found, sloped, gate.value, x, call)


def _with_rounded_factors(activated: Bound, slope: Bound, gate: Tensor, x: Tensor, call: Call) -> tuple[Bound, Bound]:
    """g * s, s = sigmoid(x), where x and s are rounded, and its slope, a sum of two products of five factors.

    As in fused_swiglu's terms: s has |x| (1 - s) roundings of x, and 1 - s loses what s is rounded by.
    """
    s, complement = torch.sigmoid(x), torch.sigmoid(-x)
    other = x.abs() * complement * (call.unit * x.abs()).exp()
    tiny = 2 * call.smallest * call.unit * (1 + gate.abs())
    rounded = call.unit * (gate * s).abs() * (1 + other) + tiny
    square = (ROUNDING_RMS * call.unit * gate * s) ** 2 * (1 + other.square())
    size = s * (1 + other * (2 + x.abs()) + x.abs() * (complement / call.unit).clamp(max=1.0))
    of_slope = (ROUNDING_RMS * call.unit * s) ** 2 * 5 * (1 + other.square())
    return (
        Bound(activated.value, activated.error + rounded, activated.square + square),
        Bound(slope.value, slope.error + 5 * call.unit * size + tiny, slope.square + of_slope),
    )


def _clamped(number: Bound, low: float, high: float) -> tuple[Bound, Bound]:
    """A number within limits, and whether it was, as 0 and 1; an error may take it to the other side."""
    value = number.value
    if high == inf:
        return number, exact(torch.ones_like(value))
    near = torch.minimum((value - low).abs(), (value - high).abs()) <= number.error
    either = (near & (number.error > 0)).double()
    inside = ((value >= low) & (value <= high)).double()
    return Bound(value.clamp(low, high), number.error, number.square), Bound(inside, either, either)


def _through(gradient: Bound, within: Bound) -> Bound:
    """A gradient where a number was within its limits; elsewhere exactly 0, even of NaN."""
    outside = within.value + within.error == 0
    return Bound(*(tensor.masked_fill(outside, 0.0) for tensor in (gradient * within).parts()))


def _larger(one: Bound, other: Bound) -> Bound:
    """Of two ways to compute a number, the larger error."""
    return Bound(one.value, torch.maximum(one.error, other.error), torch.maximum(one.square, other.square))


def _split(z: Bound, interleaved: bool) -> tuple[Bound, Bound]:
    """Gate and up."""
    halves = [(t[:, ::2], t[:, 1::2]) if interleaved else t.chunk(2, -1) for t in z.parts()]
    gate, up = (Bound(*half) for half in zip(*halves, strict=True))
    return gate, up


def _joined(gate: Bound, up: Bound, interleaved: bool) -> Bound:
    """The inverse of `_split`."""
    return joined((gate, up), lambda pair: torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1))


def experts_of(call: Call) -> Iterator[Expert]:
    """The experts that have slots.

    The gradient of an expert's weight is a sum over H of dy * out, or one over F of (dy @ down) * h, and dy * bias. The
    weight multiplies out or h, and dy or dy @ down: of numbers that are subnormal only then, either may be rounded.
    """
    i, n, options = call.inputs, call.elements, call.options
    wide, interleaved = call.inexact("expert_weights"), options.get("interleaved", False)
    limit = options.get("limit", inf)

    def rounded(number: Bound) -> Bound:
        return number.rounded(call.unit, call.smallest)

    def with_bias(number: Bound, name: str, terms: int) -> Bound:
        """The bias may be the first term of the sum, to which all others are added."""
        if name not in i:
            return rounded(number)
        bias = exact(i[name][index].expand_as(number.value))
        return rounded(rounded(number) + added_in_float32(bias, n, terms))

    for index in range(len(i["gate_up"])):
        slots = torch.where(i["expert_indices"] == index)
        if not len(slots[0]):
            continue
        x, gate_up, down = exact(i["x"][slots[0]]), exact(i["gate_up"][index]), exact(i["down"][index])
        weight = i["expert_weights"][slots][:, None]
        gate, up = _split(with_bias(product(x, gate_up.t(), n), "gate_up_bias", x.value.shape[1]), interleaved)
        (gate, gate_within), (up, up_within) = _clamped(gate, -inf, limit), _clamped(up, -limit, limit)
        if options.get("offset"):
            up = rounded(up + exact(torch.full_like(up.value, options["offset"])))
        activation, slope = activated(gate, call)
        activation = rounded(activation)
        hidden = rounded(activation * up)
        out = with_bias(product(hidden, down.t(), n), "down_bias", hidden.value.shape[1])
        light = rounded(hidden.times(weight))
        before = rounded(product(light, down.t(), n))
        if "down_bias" in i:
            before = rounded(before + exact(i["down_bias"][index] * weight))
        after = out.times(weight) if wide else rounded(out.times(weight))
        weighted = added_in_float32(_larger(after, before), n)
        dy = exact(call.grad_outputs[0][slots[0]] if call.grad_outputs else torch.zeros_like(x.value))
        dout = rounded(dy.times(weight))
        of_dy = rounded(product(dy, down, n))
        dhidden = _larger(rounded(product(dout, down, n)), rounded(of_dy.times(weight)))
        dgate = _through(rounded(rounded(dhidden * up) * slope), gate_within)
        dz = _joined(dgate, _through(rounded(dhidden * activation), up_within), interleaved)
        dx = added_in_float32(rounded(product(dz, gate_up, n)), n)
        of_out = dy * out if wide else rounded(dy * out)
        of_hidden = total((of_dy * hidden).t(), n)
        if "down_bias" in i:
            of_hidden += total(dy.times(i["down_bias"][index]).t(), n)
        dweights = _larger(total(of_out.t(), n), of_hidden)
        ddown = _larger(product(dout.t(), hidden, n), product(dy.t(), light, n))
        yield Expert(slots, index, weighted, dz, dout, dx, ddown, dweights)


ERRORS = (
    mistake("x is a vector", ValueError, "x", lambda i: {"x": i["x"][0]}, undefined=True),
    mistake("x is integer", TypeError, "x", lambda i: {"x": i["x"].long()}),
    mistake("gate_up is a matrix", ValueError, "gate_up", lambda i: {"gate_up": i["gate_up"][0]}, undefined=True),
    mistake("gate_up has an odd number of rows", ValueError, "gate_up", lambda i: {"gate_up": i["gate_up"][:, 1:]}),
    one_column_short("gate_up"),
    mistake("gate_up is wider than x", TypeError, "gate_up", lambda i: {"gate_up": i["gate_up"].double()}),
    mistake("down has one expert less", ValueError, "down", lambda i: {"down": i["down"][1:]}, undefined=True),
    mistake(
        "down is transposed", ValueError, "down", lambda i: {"down": torch.cat([i["down"].mT] * 2, 1)}, undefined=True
    ),
    mistake("down is wider than x", TypeError, "down", lambda i: {"down": i["down"].double()}),
    mistake(
        "indices of one token too few",
        ValueError,
        "expert_indices",
        lambda i: {"expert_indices": i["expert_indices"][1:]},
        undefined=True,
    ),
    mistake(
        "indices are floats", TypeError, "expert_indices", lambda i: {"expert_indices": i["expert_indices"].float()}
    ),
    mistake(
        "weights would broadcast",
        ValueError,
        "expert_weights",
        lambda i: {"expert_weights": i["expert_weights"][:1]},
    ),
    mistake(
        "an index is the number of experts",
        ValueError,
        "expert_indices",
        lambda i: {"expert_indices": torch.full_like(i["expert_indices"], len(i["gate_up"]))},
        undefined=True,
        device="cpu",
    ),
    mistake(
        "an index is negative",
        ValueError,
        "expert_indices",
        lambda i: {"expert_indices": torch.full_like(i["expert_indices"], -1)},
        undefined=True,
        device="cpu",
    ),
    mistake(
        "gate_up_bias is one short",
        ValueError,
        "gate_up_bias",
        lambda i: {"gate_up_bias": i["gate_up"][:, 1:, 0]},
        undefined=True,
    ),
    mistake(
        "gate_up_bias would broadcast", ValueError, "gate_up_bias", lambda i: {"gate_up_bias": i["gate_up"][:1, :, 0]}
    ),
    mistake(
        "gate_up_bias is wider than x",
        TypeError,
        "gate_up_bias",
        lambda i: {"gate_up_bias": i["gate_up"][..., 0].double()},
    ),
    mistake(
        "down_bias is one short", ValueError, "down_bias", lambda i: {"down_bias": i["down"][:, 1:, 0]}, undefined=True
    ),
    mistake("down_bias would broadcast", ValueError, "down_bias", lambda i: {"down_bias": i["down"][:1, :, 0]}),
    mistake("down_bias is wider than x", TypeError, "down_bias", lambda i: {"down_bias": i["down"][..., 0].double()}),
    wrong_option("an unknown activation", "activation", activation="relu"),
    wrong_option("alpha is negative", "alpha", alpha=-1.0),
    wrong_option("alpha with GELU", "alpha", activation="gelu_tanh", alpha=1.702),
    wrong_option("limit is negative", "limit", limit=-1.0),
    wrong_option("offset is infinite", "offset", offset=inf),
)
