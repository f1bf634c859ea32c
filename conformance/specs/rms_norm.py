"""Root-mean-square normalisation."""

import torch
from torch import Tensor

from conformance.case import Draw
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
from unsloth_ref.kernels import rms_norm

# Also mistakes in a call of the other two norms.
NORM_ERRORS = (
    mistake("weight is one short", ValueError, "weight", lambda i: {"weight": i["weight"][:-1]}, undefined=True),
    mistake("weight is a matrix", ValueError, "weight", lambda i: {"weight": i["weight"][None]}),
    mistake("x has no dimension", ValueError, "x", lambda i: {"x": i["x"][0, 0]}),
    mistake("x is integer", TypeError, "x", lambda i: {"x": i["x"].long()}),
    wrong_option("eps is negative", "eps", eps=-1.0),
)
CASTING_ERROR = wrong_option("casting is unknown", "casting", casting="lama")


def _build(draw: Draw, rows: int, hidden: int) -> Inputs:
    return {"x": draw.filled(rows, hidden), "weight": draw.weight(hidden)}


def normed(call: Call) -> tuple[Tensor, Tensor]:
    """The normalised rows n, and r = 1 / sqrt(mean x^2 + eps)."""
    r = torch.rsqrt(call.inputs["x"].square().mean(-1, keepdim=True) + call.options.get("eps", 1e-6))
    return call.inputs["x"] * r, r


def _y_terms(call: Call) -> Tensor:
    """|n| (|weight| + offset): offset + weight may cancel."""
    return (normed(call)[0].abs() + 2 * call.smallest) * (call.inputs["weight"].abs() + call.options.get("offset", 0.0))


def _x_terms(call: Call) -> Tensor:
    """r (|g| + |n| mean |g n|): the gradient of x is g without its part along the normalised row."""
    n, r = normed(call)
    g = call.grad_outputs[0] * (call.inputs["weight"] + call.options.get("offset", 0.0))
    return r * (g.abs() + n.abs() * (g * n).abs().mean(-1, keepdim=True) + 2 * call.smallest)


def _weight_terms(call: Call) -> Tensor:
    """Sum |dy n|: the gradient of the weight is a sum over rows."""
    terms = (normed(call)[0].abs() + 2 * call.smallest) * call.grad_outputs[0].abs()
    return terms.reshape(-1, terms.shape[-1]).sum(0)


spec = Spec(
    reference=rms_norm,
    drawing=Drawing(
        sizes={"rows": row_counts, "hidden": column_counts},
        build=_build,
        options={"eps": [1e-6, 1e-5, 0.5], "offset": [0.0, 1.0], "casting": ["llama", "gemma"]},
    ),
    outputs=["y"],
    grads=["x", "weight"],
    budget=Budget(
        roundings=2,  # forward: the normalised row; backward: dy times weight; one more for another order of operations
        terms={"y": _y_terms, "x": _x_terms, "weight": _weight_terms},
    ),
    rowwise=["x"],
    argument_kinds=leading_dimensions("x"),
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
