"""Root-mean-square normalisation."""

from math import nan

import torch
from torch import Tensor

from conformance.case import Case, Draw
from conformance.promises import ExactLaw, Memory
from conformance.spec import (
    Budget,
    Call,
    Drawing,
    Inputs,
    Options,
    Spec,
    Speed,
    change_inputs,
    column_counts,
    leading_dimensions,
    mistake,
    nbytes,
    row_counts,
    wrong_option,
)
from conformance.specs._mistakes import one_short
from conformance.tolerances.bounds import Terms, root_of_mean
from unsloth_ref.accuracy import UNIT_FLOAT32
from unsloth_ref.kernels import rms_norm

# Also mistakes in a call of the other two norms.
NORM_ERRORS = (
    one_short("weight"),
    mistake("weight is a matrix", ValueError, "weight", lambda i: {"weight": i["weight"][None]}),
    mistake("x has no dimension", ValueError, "x", lambda i: {"x": i["x"][0, 0]}),
    mistake("x is integer", TypeError, "x", lambda i: {"x": i["x"].long()}),
    wrong_option("eps is negative", "eps", eps=-1.0),
)
# Forward: the normalised row; backward: dy times weight; one more for another order of operations.
ROUNDINGS = 2
CASTING_ERROR = wrong_option("casting is unknown", "casting", casting="lama")


def _build(draw: Draw, rows: int, hidden: int) -> Inputs:
    return {"x": draw.filled(rows, hidden), "weight": draw.weight(hidden)}


def normed(call: Call) -> tuple[Tensor, Tensor]:
    """The normalised rows n, and r = 1 / sqrt(mean x^2 + eps)."""
    r = torch.rsqrt(call.inputs["x"].square().mean(-1, keepdim=True) + call.options.get("eps", 1e-6))
    return call.inputs["x"] * r, r


def y_terms(call: Call) -> Tensor:
    """|n| (|weight| + offset): offset + weight may cancel."""
    return (normed(call)[0].abs() + 2 * call.smallest) * (call.inputs["weight"].abs() + call.options.get("offset", 0.0))


def _y_terms(call: Call) -> Terms | Tensor:
    """With a weight that is wider than x and "gemma" casting, all products are float32: nothing else is rounded."""
    terms = y_terms(call)
    if call.options.get("casting", "llama") == "llama" or not call.inexact("weight"):
        return terms
    return Terms(torch.zeros_like(terms), in_float32=terms)


def _x_terms(call: Call) -> Terms:
    """r (|g| + |n| mean |g n|): the gradient of x is g without its part along the normalised row."""
    n, r = normed(call)
    g = call.grad_outputs[0] * (call.inputs["weight"] + call.options.get("offset", 0.0))
    size = g.abs() + n.abs() * (g * n).abs().mean(-1, keepdim=True) + 2 * call.smallest
    return Terms(r * size, root=r * torch.hypot(g, n * root_of_mean(g * n)))


def weight_terms(call: Call, rounded: bool) -> Terms:
    """Sum |dy n|: the gradient of the weight is a sum over rows; `rounded`: n is rounded to x's dtype.

    The gradient of a weight that is wider than x has a smaller unit roundoff than the rounding of n.
    """
    n, dy = normed(call)[0], call.grad_outputs[0]
    size, factor = (n.abs() + 2 * call.smallest) * dy.abs(), 1.0
    if rounded and "weight" in call.wider:
        factor = call.unit / UNIT_FLOAT32
    return Terms(factor * size, root=factor * (dy * n).abs(), in_float32=size).over_rows()


def times_four(options: Options) -> Options:
    """An eps for rows that are twice as large."""
    return {"eps": 4 * options.get("eps", 1e-6)}


EXACT_LAWS = {
    "x twice as large, with four times the eps": ExactLaw({"x": 2.0}, {"x": 0.5}, options=times_four),
    "x negated": ExactLaw({"x": -1.0}, {"y": -1.0, "weight": -1.0}),
    "weight negated": ExactLaw({"weight": -1.0}, {"y": -1.0, "x": -1.0}, holds=lambda o: o.get("offset", 0.0) == 0.0),
    "dy four times as large": ExactLaw({}, {"x": 4.0, "weight": 4.0}, grad_outputs=4.0),
}
WIDE_WEIGHT = {"weight in float32": change_inputs(lambda i: {"weight": i["weight"].float() * (1 + 2**-13)})}
# The other casting does not hide the weight's rounding among its own.
WIDE_WEIGHTS = WIDE_WEIGHT | {
    "weight in float32, gemma": lambda i, o: WIDE_WEIGHT["weight in float32"](i, {**o, "casting": "gemma"})
}
PROGRAMS = 1024  # of a backward pass, each with a float32 row of partial sums: eight for each of 128 processors
MEMORY = Memory(
    Case((("rows", 16384), ("hidden", 4096))),
    grads=["x", "weight"],
    saved=lambda inputs: 4 * len(inputs["x"]),  # 1 / root mean square
    working=lambda inputs: 4 * PROGRAMS * inputs["x"].shape[-1],
)


# A program takes several rows that are too long for its registers.
MANY_LONG_ROWS = [Case((("rows", 257), ("hidden", 16385)))]
SPECIAL_VALUES = [nan]  # infinity gives a row of 0, or of NaN, depending on how the squares are summed

spec = Spec(
    reference=rms_norm,
    drawing=Drawing(
        sizes={"rows": row_counts, "hidden": column_counts},
        build=_build,
        options={"eps": [1e-6, 1e-5, 0.5], "offset": [0.0, 1.0], "casting": ["llama", "gemma"]},
        costly=MANY_LONG_ROWS,
    ),
    outputs=["y"],
    grads=["x", "weight"],
    budget=Budget(
        roundings=ROUNDINGS,
        terms={
            "y": _y_terms,
            "x": _x_terms,
            "weight": lambda call: weight_terms(call, call.options.get("casting", "llama") == "llama"),
        },
    ),
    rowwise=["x"],
    exact_laws=EXACT_LAWS,
    memory=MEMORY,
    argument_kinds=leading_dimensions("x") | WIDE_WEIGHTS,
    special_values=SPECIAL_VALUES,
    errors=[*NORM_ERRORS, CASTING_ERROR],
    speed=Speed(
        shapes={
            "llama-3.2-1b": {"rows": 8192, "hidden": 2048},
            "llama-3.1-8b": {"rows": 8192, "hidden": 4096},
            "llama-3.1-70b": {"rows": 8192, "hidden": 8192},
            "short": {"rows": 2048, "hidden": 4096},
            "llama-3.1-405b": {"rows": 4096, "hidden": 16384},
        },
        bytes=lambda inputs: (
            2 * nbytes(inputs["x"]) + nbytes(inputs["weight"]),
            3 * nbytes(inputs["x"]) + 2 * nbytes(inputs["weight"]),
        ),
    ),
)
