"""Layer normalisation."""

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
    change_inputs,
    column_counts,
    leading_dimensions,
    mistake,
    nbytes,
    row_counts,
)
from conformance.specs.rms_norm import NORM_ERRORS
from unsloth_ref.kernels import layer_norm


def _build(draw: Draw, rows: int, hidden: int) -> Inputs:
    return {"x": draw.filled(rows, hidden), "weight": draw.weight(hidden), "bias": draw.weight(hidden)}


def _parts(call: Call) -> tuple[Tensor, Tensor]:
    """r (|x| + mean |x|), the terms of the normalised row, since x - mean x may cancel; and r."""
    x = call.inputs["x"]
    variance = (x - x.mean(-1, keepdim=True)).square().mean(-1, keepdim=True)
    r = torch.rsqrt(variance + call.options.get("eps", 1e-5))
    return r * (x.abs() + x.abs().mean(-1, keepdim=True)), r


def _y_terms(call: Call) -> Tensor:
    return _parts(call)[0] * call.inputs["weight"].abs() + call.inputs["bias"].abs()


def _x_terms(call: Call) -> Tensor:
    """The gradient of x is g without its mean and without its part along the normalised row."""
    n, r = _parts(call)
    g = (call.grad_outputs[0] * call.inputs["weight"]).abs()
    return r * (g + g.mean(-1, keepdim=True) + n * (g * n).mean(-1, keepdim=True))


def _summed_over_rows(terms: Tensor) -> Tensor:
    """The gradients of the weight and the bias are sums over rows."""
    return terms.reshape(-1, terms.shape[-1]).sum(0)


spec = Spec(
    reference=layer_norm,
    drawing=Drawing(
        sizes={"rows": row_counts, "hidden": column_counts},
        build=_build,
        options={"eps": [1e-5, 1e-6, 0.5]},
        # "level": mean square minus squared mean is nothing but rounding errors.
        fills=["randn", "ones", "zeros", "tiny", "outlier", "wide", "level"],
    ),
    outputs=["y"],
    grads=["x", "weight", "bias"],
    budget=Budget(
        roundings=1,  # the contract rounds once, at the end; one more for another order of operations, in either pass
        terms={
            "y": _y_terms,
            "x": _x_terms,
            "weight": lambda call: _summed_over_rows(call.grad_outputs[0].abs() * _parts(call)[0]),
            "bias": lambda call: _summed_over_rows(call.grad_outputs[0].abs()),
        },
    ),
    rowwise=["x"],
    argument_kinds=leading_dimensions("x")
    | {
        "weight in float32": change_inputs(lambda i: {"weight": i["weight"].float()}),
        "bias in float32": change_inputs(lambda i: {"bias": i["bias"].float()}),
    },
    errors=[
        *NORM_ERRORS,
        mistake("bias is one short", ValueError, "bias", lambda i: {"bias": i["bias"][:-1]}, undefined=True),
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
