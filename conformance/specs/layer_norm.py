"""Layer normalisation."""

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
)
from conformance.specs._mistakes import one_short
from conformance.specs.rms_norm import NORM_ERRORS, PROGRAMS, WIDE_WEIGHT
from conformance.tolerances.bounds import Terms, root_of_mean
from unsloth_ref.kernels import layer_norm

ROUNDINGS = 1  # the contract rounds once, at the end; one more for another order of operations, in either pass


def _build(draw: Draw, rows: int, hidden: int) -> Inputs:
    return {"x": draw.filled(rows, hidden), "weight": draw.weight(hidden), "bias": draw.weight(hidden)}


def _parts(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """The normalised row n; r (|x| + mean |x|), its terms in float32, since x - mean x may cancel; and r."""
    x = call.inputs["x"]
    centred = x - x.mean(-1, keepdim=True)
    r = torch.rsqrt(centred.square().mean(-1, keepdim=True) + call.options.get("eps", 1e-5))
    return centred * r, r * (x.abs() + x.abs().mean(-1, keepdim=True)), r


def _y_terms(call: Call) -> Terms:
    """|n weight| + |bias|; only float32 may see the difference from the mean.

    With a weight or bias that is wider than x, only the result is rounded to the dtype of x.
    """
    n, in_float32, _ = _parts(call)
    weight, bias = call.inputs["weight"].abs(), call.inputs["bias"].abs()
    wide = in_float32 * weight + bias
    if call.inexact("weight", "bias"):
        return Terms(torch.zeros_like(wide), in_float32=wide)
    return Terms(n.abs() * weight + bias, torch.hypot(n * weight, bias), wide)


def _x_terms(call: Call) -> Terms:
    """The gradient of x is g without its mean and without its part along the normalised row."""
    n, in_float32, r = _parts(call)
    g = (call.grad_outputs[0] * call.inputs["weight"]).abs()

    def size(n: Tensor) -> Tensor:
        return r * (g + g.mean(-1, keepdim=True) + n * (g * n).mean(-1, keepdim=True))

    root = r * torch.hypot(torch.hypot(g, root_of_mean(g)), n * root_of_mean(g * n))
    return Terms(size(n.abs()), root, size(in_float32))


def _weight_terms(call: Call) -> Terms:
    """Sum |dy n|."""
    (n, in_float32, _), dy = _parts(call), call.grad_outputs[0]
    return Terms((dy * n).abs(), in_float32=dy.abs() * in_float32).over_rows()


def _times_four(options: Options) -> Options:
    return {"eps": 4 * options.get("eps", 1e-5)}


spec = Spec(
    reference=layer_norm,
    drawing=Drawing(
        sizes={"rows": row_counts, "hidden": column_counts},
        build=_build,
        options={"eps": [1e-5, 1e-6, 0.5]},
        # "level": mean square minus squared mean is nothing but rounding errors.
        fills=["randn", "ones", "zeros", "tiny", "outlier", "wide", "level"],
        costly=[Case((("rows", 257), ("hidden", 8193)))],
    ),
    outputs=["y"],
    grads=["x", "weight", "bias"],
    budget=Budget(
        roundings=ROUNDINGS,
        terms={
            "y": _y_terms,
            "x": _x_terms,
            "weight": _weight_terms,
            "bias": lambda call: Terms(call.grad_outputs[0].abs()).over_rows(),
        },
    ),
    rowwise=["x"],
    exact_laws={
        "x twice as large, with four times the eps": ExactLaw({"x": 2.0}, {"x": 0.5}, options=_times_four),
        "weight and bias negated": ExactLaw({"weight": -1.0, "bias": -1.0}, {"y": -1.0, "x": -1.0}),
        "x and weight negated": ExactLaw({"x": -1.0, "weight": -1.0}, {"x": -1.0, "weight": -1.0}),
        "dy four times as large": ExactLaw({}, {"x": 4.0, "weight": 4.0, "bias": 4.0}, grad_outputs=4.0),
    },
    memory=Memory(
        Case((("rows", 16384), ("hidden", 4096))),
        grads=["x", "weight", "bias"],
        saved=lambda inputs: 8 * len(inputs["x"]),  # mean and 1 / standard deviation
        working=lambda inputs: 2 * 4 * PROGRAMS * inputs["x"].shape[-1],
    ),
    argument_kinds=leading_dimensions("x")
    | WIDE_WEIGHT
    | {"bias in float32": change_inputs(lambda i: {"bias": i["bias"].float() * (1 + 2**-13)})},
    errors=[
        *NORM_ERRORS,
        one_short("bias"),
        mistake("bias is a number", ValueError, "bias", lambda i: {"bias": i["bias"][0]}),
        mistake("bias is integer", TypeError, "bias", lambda i: {"bias": i["bias"].long()}),
    ],
    speed=Speed(
        shapes={
            "phi-2": {"rows": 8192, "hidden": 2560},
            "gpt-j-6b": {"rows": 8192, "hidden": 4096},
            "starcoder2-15b": {"rows": 8192, "hidden": 6144},
        },
        bytes=lambda inputs: (
            2 * nbytes(inputs["x"]) + nbytes(inputs["weight"], inputs["bias"]),
            3 * nbytes(inputs["x"]) + 2 * nbytes(inputs["weight"]) + nbytes(inputs["bias"]),
        ),
    ),
)
