"""Residual addition and root-mean-square normalisation."""

from dataclasses import replace

import torch

from conformance.case import Draw
from conformance.promises import ExactLaw
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
from conformance.specs import rms_norm
from conformance.specs._mistakes import one_column_short
from conformance.tolerances.bounds import Terms, root_of_mean
from unsloth_ref.kernels import add_rms_norm


def _build(draw: Draw, rows: int, hidden: int) -> Inputs:
    return {"x": draw.filled(rows, hidden), "residual": draw.filled(rows, hidden), "weight": draw.weight(hidden)}


def _norm_of_the_sum(call: Call) -> Call:
    """The call of rms_norm that the operation contains."""
    return replace(call, inputs={**call.inputs, "x": call.inputs["x"] + call.inputs["residual"]})


def _x_terms(call: Call) -> Terms:
    """|dsum| + r (|g| + 3 |n| mean |g n|): dsum is added to the gradient of the norm.

    The sum's rounding, by u at most, changes r by u and n by 2 u, and so the gradient by u r (|g| + 5 |n| mean |g n|);
    the other two roundings change it by u r (|g| + |n| mean |g n|) each: 3 |g| and 7 |n| mean |g n| in all.
    """
    (n, r), dsum = rms_norm.normed(_norm_of_the_sum(call)), call.grad_outputs[1]
    g = call.grad_outputs[0] * (call.inputs["weight"] + call.options.get("offset", 0.0))
    along = (g * n).mean(-1, keepdim=True)
    size = g.abs() + 3 * n.abs() * (g * n).abs().mean(-1, keepdim=True) + 2 * call.smallest
    root = torch.hypot(torch.hypot(g, n * along), n * root_of_mean(g * n))
    return Terms(r * size + dsum.abs(), root=torch.hypot(r * root, dsum))


spec = Spec(
    reference=add_rms_norm,
    drawing=Drawing(
        sizes={"rows": row_counts, "hidden": column_counts},
        build=_build,
        options=rms_norm.spec.drawing.options,
        costly=rms_norm.MANY_LONG_ROWS,
    ),
    outputs=["normed", "sum"],
    grads=["x", "residual", "weight"],
    budget=Budget(
        roundings=3,  # the two of rms_norm, and that of the sum
        terms={
            "normed": lambda call: rms_norm.y_terms(_norm_of_the_sum(call)),
            "x": _x_terms,
            "residual": _x_terms,
            "weight": lambda call: rms_norm.weight_terms(_norm_of_the_sum(call), rounded=True),  # the sum is
        },
    ),
    rowwise=["x", "residual"],
    exact_laws={
        "x and residual negated": ExactLaw(
            {"x": -1.0, "residual": -1.0}, {"normed": -1.0, "sum": -1.0, "weight": -1.0}
        ),
        "dnormed and dsum four times as large": ExactLaw(
            {}, {"x": 4.0, "residual": 4.0, "weight": 4.0}, grad_outputs=4.0
        ),
    },
    memory=replace(rms_norm.MEMORY, grads=["x", "residual", "weight"]),
    argument_kinds=leading_dimensions("x", "residual") | rms_norm.WIDE_WEIGHTS,
    special_values=rms_norm.SPECIAL_VALUES,
    errors=[
        *rms_norm.spec.errors,
        one_column_short("residual"),
        mistake("residual would broadcast", ValueError, "residual", lambda i: {"residual": i["residual"][:1]}),
        mistake("residual has another dtype", TypeError, "residual", lambda i: {"residual": i["residual"].double()}),
    ],
    speed=Speed(
        shapes=rms_norm.spec.speed.shapes,
        bytes=lambda inputs: (
            4 * nbytes(inputs["x"]) + nbytes(inputs["weight"]),
            4 * nbytes(inputs["x"]) + 2 * nbytes(inputs["weight"]),
        ),
    ),
)
