"""Gated activation with SiLU."""

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
)
from conformance.specs._mistakes import one_column_short
from conformance.tolerances.bounds import Terms, lost
from unsloth_ref.kernels import swiglu


def _build(draw: Draw, rows: int, hidden: int) -> Inputs:
    return {"gate": draw.filled(rows, hidden), "up": draw.filled(rows, hidden)}


def _silu_terms(call: Call, factor: Tensor) -> Terms:
    """exp(-x) carries |x| roundings of its argument, and so s = sigmoid(x) carries |x| (1 - s).

    The activation may be below the normal numbers.
    """
    gate = call.inputs["gate"]
    root, absolute = (gate * torch.sigmoid(gate) * factor).abs(), 2 * call.smallest * factor.abs()
    size = root * (1 + gate.abs() * torch.sigmoid(-gate)) + absolute
    return Terms(size, root, in_float32=size + root * lost(gate))


def _gate_terms(call: Call) -> Terms:
    """|dy up| s (1 + |x| (1 - s)), for the derivative of SiLU changes sign; s (1 - s) carries at most |x| roundings.

    1 - s is a difference from 1: a rounding of 1, or all of it, is lost.
    """
    x, factor = call.inputs["gate"], (call.grad_outputs[0] * call.inputs["up"]).abs()
    s, complement = torch.sigmoid(x), torch.sigmoid(-x)
    other = x.abs() * complement
    size = s * (1 + other * (2 + x.abs()) + x.abs() * (complement / call.unit).clamp(max=1.0))
    factor_size = factor + 2 * call.smallest
    in_float32 = factor_size * (size + s * (1 + other) * lost(x))
    return Terms(factor_size * size, factor * torch.hypot(s, s * other), in_float32)


def bytes_moved(inputs: Inputs) -> tuple[int, int]:
    """Forward: two tensors are read and one is written. Backward: three and two."""
    return 3 * nbytes(inputs["gate"]), 5 * nbytes(inputs["gate"])


spec = Spec(
    reference=swiglu,
    drawing=Drawing(
        sizes={"rows": row_counts, "hidden": column_counts},
        build=_build,
        fills=["randn", "ones", "zeros", "tiny", "wide", "far", "outlier"],
    ),
    outputs=["y"],
    grads=["gate", "up"],
    budget=Budget(
        roundings=2,  # forward: the activation; backward: dy times up; one more for kernels that round the sigmoid
        terms={
            "y": lambda call: _silu_terms(call, call.inputs["up"]),
            "up": lambda call: _silu_terms(call, call.grad_outputs[0]),
            "gate": _gate_terms,
        },
    ),
    rowwise=["gate", "up"],
    exact_laws={
        "up twice as large": ExactLaw({"up": 2.0}, {"y": 2.0, "gate": 2.0}),
        "up negated": ExactLaw({"up": -1.0}, {"y": -1.0, "gate": -1.0}),
        "dy four times as large": ExactLaw({}, {"gate": 4.0, "up": 4.0}, grad_outputs=4.0),
    },
    memory=Memory(Case((("rows", 8192), ("hidden", 8192))), grads=["gate", "up"]),
    argument_kinds=leading_dimensions("gate", "up"),
    errors=[
        one_column_short("up"),
        mistake("up would broadcast", ValueError, "up", lambda i: {"up": i["up"][:1]}),
        mistake("up has another dtype", TypeError, "up", lambda i: {"up": i["up"].double()}),
        mistake("gate is integer", TypeError, "gate", lambda i: {name: i[name].long() for name in i}),
    ],
    speed=Speed(
        shapes={
            "llama-3.2-1b": {"rows": 8192, "hidden": 8192},
            "llama-3.1-8b": {"rows": 8192, "hidden": 14336},
        },
        bytes=bytes_moved,
    ),
)
