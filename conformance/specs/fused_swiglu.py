"""Gated activation with SiLU of a gate and an up projection in one tensor; without options the terms of swiglu."""

import torch
from torch import Tensor

from conformance.case import Case, Draw
from conformance.promises import ExactLaw, Memory
from conformance.spec import (
    Budget,
    Call,
    Drawing,
    Inputs,
    Spec,
    Speed,
    column_counts,
    leading_dimensions,
    mistake,
    nbytes,
    row_counts,
    wrong_option,
)
from conformance.tolerances.bounds import Terms, lost
from unsloth_ref.kernels import fused_swiglu

GPT_OSS = {"interleaved": True, "alpha": 1.702, "limit": 7.0, "offset": 1.0}


def _build(draw: Draw, rows: int, hidden: int) -> Inputs:
    return {"gate_up": draw.filled(rows, 2 * hidden)}


def _factors(call: Call) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The clamped gate; the clamped up plus offset; where either was within the limit, as 0 and 1."""
    gate_up, limit = call.inputs["gate_up"], call.options.get("limit")
    gate, up = (gate_up[..., ::2], gate_up[..., 1::2]) if call.options.get("interleaved") else gate_up.chunk(2, -1)
    offset = call.options.get("offset", 0.0)
    if limit is None:
        return gate, up + offset, torch.ones_like(gate), torch.ones_like(up)
    within = (gate <= limit).double(), (up.abs() <= limit).double()
    return gate.clamp(max=limit), up.clamp(-limit, limit) + offset, *within


def _terms(size: Tensor, root: Tensor, roundings: int, in_float32: Tensor) -> Terms:
    """Terms that are rounded so often, in a budget of one rounding."""
    return Terms(roundings * size, root=roundings**0.5 * root, in_float32=in_float32)


def _lost(call: Call, x: Tensor) -> Tensor:
    """Where exp(-alpha g) overflows, if alpha g is rounded."""
    return lost(x, 0.0 if call.options.get("alpha", 1.0) == 1.0 else call.unit * x.abs())


def _activation_terms(call: Call, factor: Tensor, offset: bool) -> Terms:
    """As swiglu's: s = sigmoid(alpha g) carries |alpha g| (1 - s) roundings of its argument.

    Roundings: s, and g s; with an offset, that of the other factor. s and g s may be below the normal numbers.
    """
    gate, alpha = _factors(call)[0], call.options.get("alpha", 1.0)
    x = alpha * gate
    root = (gate * torch.sigmoid(x) * factor).abs()
    size = root * (1 + x.abs() * torch.sigmoid(-x)) + 2 * call.smallest * (1 + gate.abs()) * factor.abs()
    return _terms(size, root, 2 + offset, size + root * _lost(call, x))


def _y_terms(call: Call) -> Terms:
    return _activation_terms(call, _factors(call)[1], bool(call.options.get("offset")))


def _gate_terms(call: Call, dy: Tensor) -> Terms:
    """As swiglu's, of x = alpha g: |dy (u + offset)| s (1 + |x| (1 - s)), for the derivative changes sign.

    Roundings without alpha: dy times up, and one more for kernels that round the sigmoid. With alpha, of which the
    derivative consists of two products: dy (u + offset), times g, times s (1 - s), times alpha, and s. All of these
    may be below the normal numbers.
    """
    gate, factor, within, _ = _factors(call)
    alpha = call.options.get("alpha", 1.0)
    x, factor = alpha * gate, (dy * factor).abs() * within
    s, complement = torch.sigmoid(x), torch.sigmoid(-x)
    other = x.abs() * complement
    size = s * (1 + other * (2 + x.abs()) + x.abs() * (complement / call.unit).clamp(max=1.0))
    roundings = (2 if alpha == 1.0 else 5) + bool(call.options.get("offset"))
    absolute = 2 * call.smallest * within * (size + (1 + x.abs()) * (1 + factor))
    size = factor * size + absolute
    in_float32 = size + factor * s * (1 + other) * _lost(call, x)
    return _terms(size, factor * torch.hypot(s, s * other), roundings, in_float32)


def _gradient_terms(call: Call) -> Terms:
    """Those of the gate and of up, as they lie in gate_up; 0 where a factor was clamped."""
    dy, within = call.grad_outputs[0], _factors(call)[3]
    gate, up = _gate_terms(call, dy), _activation_terms(call, dy * within, offset=False)

    def joined(*of_both: Tensor | None) -> Tensor:
        interleaved = call.options.get("interleaved")
        return torch.stack(of_both, -1).flatten(-2) if interleaved else torch.cat(of_both, -1)  # type: ignore[arg-type]

    return Terms(joined(gate.size, up.size), joined(gate.root, up.root), joined(gate.in_float32, up.in_float32))


spec = Spec(
    reference=fused_swiglu,
    drawing=Drawing(
        sizes={"rows": row_counts, "hidden": lambda budget: column_counts(max(1, budget // 2))},
        build=_build,
        # With ones every factor is at the limit of 1; 0 is a value too, not the lack of one. Limits are numbers of
        # every dtype, so that none is rounded.
        options={
            "interleaved": [False, True],
            "alpha": [1.0, 0.0, 1.702],
            "limit": [None, 7.0, 0.0, 1.0],
            "offset": [0.0, 1.0],
        },
        fills=["randn", "ones", "zeros", "tiny", "wide", "far", "outlier"],
    ),
    outputs=["y"],
    grads=["gate_up"],
    budget=Budget(roundings=1, terms={"y": _y_terms, "gate_up": _gradient_terms}),
    rowwise=["gate_up"],
    exact_laws={"dy four times as large": ExactLaw({}, {"gate_up": 4.0}, grad_outputs=4.0)},
    memory=Memory(Case((("rows", 8192), ("hidden", 8192))), grads=["gate_up"]),
    argument_kinds=leading_dimensions("gate_up"),
    errors=[
        mistake(
            "gate_up has an odd number of columns",
            ValueError,
            "gate_up",
            lambda i: {"gate_up": i["gate_up"][..., :-1]},
            undefined=True,
        ),
        mistake("gate_up has no dimension", ValueError, "gate_up", lambda i: {"gate_up": i["gate_up"][0, 0]}),
        mistake("gate_up is integer", TypeError, "gate_up", lambda i: {"gate_up": i["gate_up"].long()}),
        wrong_option("alpha is negative", "alpha", alpha=-1.0),
        wrong_option("limit is negative", "limit", limit=-1.0),
        wrong_option("offset is infinite", "offset", offset=torch.inf),
    ],
    speed=Speed(
        shapes={
            "phi-3-mini": {"rows": 8192, "hidden": 8192},
            "glm-4-9b": {"rows": 8192, "hidden": 13696},
            "gpt-oss": {"rows": 32768, "hidden": 2880, **GPT_OSS},
        },
        bytes=lambda inputs: (3 * nbytes(inputs["gate_up"]) // 2, 5 * nbytes(inputs["gate_up"]) // 2),
    ),
)
