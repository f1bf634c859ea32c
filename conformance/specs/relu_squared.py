"""The square of ReLU."""

from conformance.case import Case, Draw
from conformance.promises import ExactLaw, Memory
from conformance.spec import (
    Budget,
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
from unsloth_ref.kernels import relu_squared


def _build(draw: Draw, rows: int, hidden: int) -> Inputs:
    return {"x": draw.filled(rows, hidden)}


spec = Spec(
    reference=relu_squared,
    drawing=Drawing(
        sizes={"rows": row_counts, "hidden": column_counts},
        build=_build,
        fills=["randn", "ones", "zeros", "tiny", "wide", "far"],
    ),
    outputs=["y"],
    grads=["x"],
    budget=Budget(roundings=1),  # of dy times x, for kernels that double it afterwards or add it twice
    rowwise=["x"],
    exact_laws={
        "x twice as large": ExactLaw({"x": 2.0}, {"y": 4.0, "x": 2.0}),
        "dy four times as large": ExactLaw({}, {"x": 4.0}, grad_outputs=4.0),
    },
    memory=Memory(Case((("rows", 8192), ("hidden", 8192))), grads=["x"]),
    argument_kinds=leading_dimensions("x"),
    errors=[
        mistake("x has no dimension", ValueError, "x", lambda i: {"x": i["x"][0, 0]}),
        mistake("x is integer", TypeError, "x", lambda i: {"x": i["x"].long()}),
    ],
    speed=Speed(
        shapes={
            "nemotron-mini-4b": {"rows": 8192, "hidden": 9216},
            "nemotron-h-8b": {"rows": 8192, "hidden": 21504},
        },
        bytes=lambda inputs: (2 * nbytes(inputs["x"]), 3 * nbytes(inputs["x"])),
    ),
)
