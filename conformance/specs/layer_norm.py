"""Layer normalisation."""

import torch
from torch import Tensor

from conformance.case import Draw
from conformance.spec import Call, ErrorCase, Inputs, Spec, columns, nbytes, rows


def _build(draw: Draw, rows: int, hidden: int) -> Inputs:
    return {"x": draw.rows(rows, hidden), "weight": draw.weight(hidden), "bias": draw.weight(hidden)}


def _parts(call: Call) -> tuple[Tensor, Tensor]:
    """What the normalised row is the difference of, r (|x| + mean |x|), since x - m may cancel; and r."""
    x = call.inputs["x"]
    variance = (x - x.mean(-1, keepdim=True)).square().mean(-1, keepdim=True)
    r = torch.rsqrt(variance + call.options.get("eps", 1e-5))
    return r * (x.abs() + x.abs().mean(-1, keepdim=True)), r


def _y_terms(call: Call) -> Tensor:
    return _parts(call)[0] * call.inputs["weight"].abs() + call.inputs["bias"].abs()


def _x_terms(call: Call) -> Tensor:
    """The gradient of x subtracts the mean of g and the part of it along the normalised row."""
    n, r = _parts(call)
    g = (call.grad_outputs[0] * call.inputs["weight"]).abs()
    return r * (g + g.mean(-1, keepdim=True) + n * (g * n).mean(-1, keepdim=True))


def _added_up(terms: Tensor) -> Tensor:
    """The gradients of the weight and the bias add up over rows."""
    return terms.reshape(-1, terms.shape[-1]).sum(0)


spec = Spec(
    op="layer_norm",
    sizes={"rows": rows, "hidden": columns},
    options={"eps": [1e-5, 1e-6, 0.5]},
    # On a level, the difference of the mean square and the squared mean is all rounding.
    fills=["randn", "ones", "zeros", "tiny", "outlier", "wide", "level"],
    build=_build,
    outputs=["y"],
    grads=["x", "weight", "bias"],
    rowwise=["x"],
    roundings=1,  # the contract rounds once, at the end; and one for another order, on the way out or back
    terms={
        "y": _y_terms,
        "x": _x_terms,
        "weight": lambda call: _added_up(call.grad_outputs[0].abs() * _parts(call)[0]),
        "bias": lambda call: _added_up(call.grad_outputs[0].abs()),
    },
    kinds={
        "no leading dimension": lambda i, o: ({**i, "x": i["x"][0]}, o),
        "two leading dimensions": lambda i, o: ({**i, "x": i["x"].unflatten(0, (2, -1))}, o),
        "weight in float32": lambda i, o: ({**i, "weight": i["weight"].float()}, o),
        "bias in float32": lambda i, o: ({**i, "bias": i["bias"].float()}, o),
    },
    bytes=lambda inputs: (
        2 * nbytes(inputs["x"]) + nbytes(inputs["weight"], inputs["bias"]),
        3 * nbytes(inputs["x"]) + 2 * nbytes(inputs["weight"]) + nbytes(inputs["bias"]),
    ),
    bench={
        "phi-2": {"rows": 8192, "hidden": 2560},
        "gpt-j-6b": {"rows": 8192, "hidden": 4096},
        "starcoder2-15b": {"rows": 8192, "hidden": 6144},
    },
    errors=[
        ErrorCase(
            "weight is one short",
            lambda i, o: ({**i, "weight": i["weight"][:-1]}, o),
            ValueError,
            "weight",
            senseless=True,
        ),
        ErrorCase(
            "bias is one short", lambda i, o: ({**i, "bias": i["bias"][:-1]}, o), ValueError, "bias", senseless=True
        ),
        ErrorCase("bias is a number", lambda i, o: ({**i, "bias": i["bias"][0]}, o), ValueError, "bias"),
        ErrorCase("bias is integer", lambda i, o: ({**i, "bias": i["bias"].long()}, o), TypeError, "bias"),
        ErrorCase("weight is a matrix", lambda i, o: ({**i, "weight": i["weight"][None]}, o), ValueError, "weight"),
        ErrorCase("x has no dimension", lambda i, o: ({**i, "x": i["x"][0, 0]}, o), ValueError, "x"),
        ErrorCase("x is integer", lambda i, o: ({**i, "x": i["x"].long()}, o), TypeError, "x"),
        ErrorCase("eps is negative", lambda i, o: (i, {**o, "eps": -1.0}), ValueError, "eps"),
    ],
)
