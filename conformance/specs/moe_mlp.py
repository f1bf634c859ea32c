"""The MLPs of a mixture of experts."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import cache
from math import nan

import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from conformance.bounds import SHARED, Bound, added_in_float32, exact, float32_error, product, total
from conformance.case import Case, Draw
from conformance.promises import Law, Memory
from conformance.spec import (
    Budget,
    Call,
    Drawing,
    Inputs,
    Options,
    Spec,
    Speed,
    change_inputs,
    nbytes,
)
from conformance.specs._moe_mlp import ERRORS
from unsloth_ref.kernels import moe_mlp


def _build(draw: Draw, tokens: int, experts: int, per_token: int, wide: int, inner: int, hidden: int) -> Inputs:
    """`wide` weights of experts are float32 for every dtype under test.

    Seed 1 leaves some experts out, seed 2 sends all tokens to one, and seed 3 may send a token to an expert twice.
    """
    x = draw.filled(tokens, hidden)
    gate_up = draw.matrix(experts * 2 * inner, hidden).unflatten(0, (experts, 2 * inner))
    down = draw.matrix(experts * hidden, inner).unflatten(0, (experts, hidden))
    generator = torch.Generator().manual_seed(draw.case.seed)
    scores = torch.rand(tokens, experts, generator=generator)
    if draw.case.seed == 1 and experts > per_token:
        scores[:, :: max(3, per_token + 1)] = -1
    indices = scores.argsort(1, descending=True)[:, :per_token]
    if per_token > experts or draw.case.seed == 3:
        indices = torch.randint(experts, (tokens, per_token), generator=generator)
    if draw.case.seed == 2:
        indices = torch.full((tokens, per_token), experts // 2)
    weights = draw.tensor("rand", tokens, per_token, dtype=torch.float32 if wide else None)
    return {
        "x": x,
        "gate_up": gate_up,
        "down": down,
        "expert_indices": draw.lay_out(indices),
        "expert_weights": weights,
    }


def _shape(rows: int, columns: int) -> tuple[int, ...]:
    """An even number of columns is that of x, an odd one that of the MLP; an odd number of rows has wide weights."""
    few, columns = 3 + columns % 5, columns if columns <= 130 else 20 + columns % 61
    return rows, 2 + columns % 3, 2, rows % 2, *((few, columns) if columns % 2 == 0 else (columns, few))


def _hidden(budget: int) -> st.SearchStrategy[int]:
    """Numbers of columns around the edges of one tile; the products themselves are those of grouped_gemm."""
    return st.sampled_from([size for size in (16, 1, 5, 20, 31, 33, 64, 65, 129) if size <= max(16, budget // 16)])


def _activation(gate: Tensor, name: str) -> Tensor:
    return F.silu(gate) if name == "silu" else F.gelu(gate, approximate="tanh" if name == "gelu_tanh" else "none")


@cache
def _curvature(name: str) -> float:
    """The largest absolute value of the activation's second derivative, which is near 0."""
    gate = torch.linspace(-8, 8, 64001, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(_activation(gate, name).sum(), gate, create_graph=True)
    return float(torch.autograd.grad(slope.sum(), gate)[0].abs().max())


def activated(gate: Bound, call: Call) -> tuple[Bound, Bound]:
    """The activation of a gate and its slope, not yet rounded.

    An error e of the gate changes a by at most |a'| e + max |a''| e^2 / 2, and a' by max |a''| e. Float32 arithmetic
    loses a few bits of 1 + x (1 - s), or of 1 + tanh or 1 + erf, and as many as |x| has in an exponential.
    """
    name = call.options.get("activation", "silu")
    with torch.enable_grad():
        x = gate.value.detach().requires_grad_()
        value = _activation(x, name)
        (slope,) = torch.autograd.grad(value.sum(), x)
    x, value, curvature = x.detach(), value.detach(), _curvature(name)
    envelope = torch.sigmoid(x) if name == "silu" else torch.ones_like(x)
    size = (1 + x.abs()) ** 2 * envelope + call.smallest
    arithmetic = float32_error(call.elements) * size
    activated = Bound(
        value,
        slope.abs() * gate.error + curvature * gate.error.square() / 2 + arithmetic,
        slope.square() * gate.square + (SHARED * size) ** 2,
    )
    error = curvature * gate.error + arithmetic
    return activated, Bound(slope, error, curvature**2 * gate.square + (SHARED * size) ** 2)


@dataclass(frozen=True)
class _Expert:
    """What an expert computes for its slots; all roundings but those of results are made.

    Attributes:
        slots: their tokens and their places among the token's experts.
        index: of the expert.
        weighted: [slots, H], the parts of y.
        hidden: [slots, F], h.
        dz, dout: [slots, 2F] and [slots, H]; 0 without a backward pass.
        dx: [slots, H], the parts of dx.
        dweights: [slots].
    """

    slots: tuple[Tensor, ...]
    index: int
    weighted: Bound
    hidden: Bound
    dz: Bound
    dout: Bound
    dx: Bound
    dweights: Bound


def _larger(one: Bound, other: Bound) -> Bound:
    """Of two ways to compute a number, the larger error."""
    return Bound(one.value, torch.maximum(one.error, other.error), torch.maximum(one.square, other.square))


def _joined(left: Bound, right: Bound) -> Bound:
    parts = zip(*((b.value, b.error, b.square) for b in (left, right)), strict=True)
    return Bound(*(torch.cat(both, 1) for both in parts))


def _experts(call: Call) -> Iterator[_Expert]:
    """The experts that have slots.

    The gradient of an expert's weight is a sum over H of dy * out, or one over F of (dy @ down) * h.
    """
    i, inner, n = call.inputs, call.inputs["down"].shape[2], call.elements
    wide = call.wide("expert_weights")

    def rounded(number: Bound) -> Bound:
        return number.rounded(call.unit, call.smallest)

    for index in range(len(i["gate_up"])):
        slots = torch.where(i["expert_indices"] == index)
        if not len(slots[0]):
            continue
        x, gate_up, down = exact(i["x"][slots[0]]), exact(i["gate_up"][index]), exact(i["down"][index])
        weight = i["expert_weights"][slots][:, None]
        z = rounded(product(x, gate_up.t(), n))
        gate, up = (Bound(*(t[:, half] for t in _parts(z))) for half in (slice(inner), slice(inner, None)))
        activation, slope = activated(gate, call)
        activation = rounded(activation)
        hidden = rounded(activation * up)
        out = rounded(product(hidden, down.t(), n))
        weighted = added_in_float32(out.times(weight) if wide else rounded(out.times(weight)), n)
        dy = exact(call.grad_outputs[0][slots[0]] if call.grad_outputs else torch.zeros_like(x.value))
        dout = rounded(dy.times(weight))
        dhidden = rounded(product(dout, down, n))
        dz = _joined(rounded(rounded(dhidden * up) * slope), rounded(dhidden * activation))
        dx = added_in_float32(rounded(product(dz, gate_up, n)), n)
        of_out = dy * out if wide else rounded(dy * out)
        of_hidden = rounded(product(dy, down, n)) * hidden
        dweights = _larger(total(of_out.t(), n), total(of_hidden.t(), n))
        yield _Expert(slots, index, weighted, hidden, dz, dout, dx, dweights)


def _parts(number: Bound) -> tuple[Tensor, Tensor, Tensor]:
    return number.value, number.error, number.square


def _per_token(call: Call, name: str) -> Bound:
    """The sum over a token's slots of what experts give."""
    sums = [torch.zeros_like(call.inputs["x"]) for _ in range(3)]
    for expert in _experts(call):
        for into, part in zip(sums, _parts(getattr(expert, name)), strict=True):
            into.index_add_(0, expert.slots[0], part)
    return Bound(*sums)


def _per_expert(call: Call, name: str) -> Bound:
    """A gradient of the experts' matrices: dz^T @ x, or dout^T @ h."""
    found = [torch.zeros_like(call.inputs[name]) for _ in range(3)]
    for expert in _experts(call):
        if name == "gate_up":
            grad = product(expert.dz.t(), exact(call.inputs["x"][expert.slots[0]]), call.elements)
        else:
            grad = product(expert.dout.t(), expert.hidden, call.elements)
        for into, part in zip(found, _parts(grad), strict=True):
            into[expert.index] = part
    return Bound(*found)


def _weights_bound(call: Call) -> Bound:
    """The gradient of each slot's weight."""
    found = [torch.zeros_like(call.inputs["expert_weights"]) for _ in range(3)]
    for expert in _experts(call):
        for into, part in zip(found, _parts(expert.dweights), strict=True):
            into[expert.slots] = part
    return Bound(*found)


def _slots(inputs: Inputs) -> int:
    return inputs["expert_indices"].numel()


def _bytes(inputs: Inputs) -> tuple[int, int]:
    """Forward: x, all matrices and y. Backward: these, dy and dx; the matrices are frozen."""
    x, matrices = nbytes(inputs["x"]), nbytes(inputs["gate_up"], inputs["down"])
    return 2 * x + matrices, 3 * x + matrices


def _flops(inputs: Inputs, options: Options, grads: Collection[str]) -> tuple[int, int]:
    """Forward: both products. Backward: dh, and one product per gradient of x, gate_up and down."""
    down = 2 * _slots(inputs) * inputs["down"][0].numel()
    backward = down if grads else 0
    backward += 2 * down * len({"x", "gate_up"}.intersection(grads)) + down * ("down" in grads)
    return 3 * down, backward


def _saved(inputs: Inputs) -> int:
    """z, and the order and place of each slot."""
    element = inputs["x"].element_size()
    return _slots(inputs) * (inputs["gate_up"].shape[1] * element + 8)


def _working(inputs: Inputs) -> int:
    """Forward: h, and out. Backward: dh, dz, the weighted h and the parts of dx."""
    columns = 2 * inputs["gate_up"].shape[1] + inputs["x"].shape[1]
    return _slots(inputs) * columns * inputs["x"].element_size()


def _bench(tokens: int, experts: int, per_token: int, inner: int, hidden: int, *grads: str) -> dict[str, object]:
    return {
        "tokens": tokens, "experts": experts, "per_token": per_token, "wide": 0, "inner": inner, "hidden": hidden,
        "grads": grads or ("x", "expert_weights"),
    }  # fmt: skip


spec = Spec(
    reference=moe_mlp,
    drawing=Drawing(
        sizes={
            "tokens": lambda budget: st.integers(1, max(16, min(budget, 40))),
            "experts": lambda budget: st.sampled_from([3, 1, 2, 4]),
            "per_token": lambda budget: st.sampled_from([2, 1, 3]),
            "wide": lambda budget: st.sampled_from([0, 1]),
            "inner": lambda budget: st.sampled_from([8, 1, 2, 16, 33]),
            "hidden": _hidden,
        },
        build=_build,
        options={"activation": ["silu", "gelu_tanh"]},
        fills=["randn", "ones", "zeros", "tiny", "outlier"],
        shape=_shape,
    ),
    outputs=["y"],
    grads=["x", "gate_up", "down", "expert_weights"],
    budget=Budget(
        roundings=1,  # that a row may share: of the only z or dh that matters if F is 1
        bounds={
            "y": lambda call: _per_token(call, "weighted"),
            "x": lambda call: _per_token(call, "dx"),
            "gate_up": lambda call: _per_expert(call, "gate_up"),
            "down": lambda call: _per_expert(call, "down"),
            "expert_weights": _weights_bound,
        },
    ),
    rowwise=["x", "expert_indices", "expert_weights"],
    bits_vary="BLAS libraries choose the order of a product's sums by its number of rows",
    far=["x", "gate_up", "down"],
    laws={
        "expert_weights twice as large": Law(
            {"expert_weights": 2.0}, dict.fromkeys(["y", "x", "gate_up", "down"], 2.0)
        ),
        "down negated": Law({"down": -1.0}, dict.fromkeys(["y", "x", "gate_up", "expert_weights"], -1.0)),
        "dy four times as large": Law(
            {}, dict.fromkeys(["x", "gate_up", "down", "expert_weights"], 4.0), grad_outputs=4.0
        ),
    },
    memory=Memory(
        Case((("tokens", 8192), ("experts", 4), ("per_token", 2), ("wide", 0), ("inner", 64), ("hidden", 1024))),
        grads=["x", "gate_up", "down", "expert_weights"],
        saved=_saved,
        working=_working,
    ),
    argument_kinds={
        "indices of 32 bits": change_inputs(lambda i: {"expert_indices": i["expert_indices"].int()}),
        "all tokens to the last expert": change_inputs(
            lambda i: {"expert_indices": torch.full_like(i["expert_indices"], len(i["gate_up"]) - 1)}
        ),
        "every expert of a token is the same": change_inputs(
            lambda i: {"expert_indices": i["expert_indices"][:, :1].expand(i["expert_indices"].shape)}
        ),
        "weights in float32": change_inputs(lambda i: {"expert_weights": i["expert_weights"].float() * (1 + 2**-13)}),
        "no column between": change_inputs(lambda i: {"gate_up": i["gate_up"][:, :0], "down": i["down"][..., :0]}),
    },
    special_values=[nan],  # infinity gives terms of both signs
    errors=ERRORS,
    speed=Speed(
        shapes={
            "qwen-3-moe": _bench(16384, 128, 8, 768, 2048),
            "qwen-3-moe, trained": _bench(16384, 128, 8, 768, 2048, "x", "gate_up", "down", "expert_weights"),
            "mixtral": _bench(8192, 8, 2, 14336, 4096),
        },
        bytes=_bytes,
        flops=_flops,
    ),
)
