"""Root-mean-square normalisation."""

import torch
from torch import Tensor

from conformance.case import Draw
from conformance.spec import Call, ErrorCase, Inputs, Spec, columns, nbytes, rows


def _build(draw: Draw, rows: int, hidden: int) -> Inputs:
    return {"x": draw.rows(rows, hidden), "weight": draw.weight(hidden)}


def normed(call: Call) -> tuple[Tensor, Tensor]:
    """The normalised rows, and r."""
    r = torch.rsqrt(call.inputs["x"].square().mean(-1, keepdim=True) + call.options.get("eps", 1e-6))
    return call.inputs["x"] * r, r


def _y_terms(call: Call) -> Tensor:
    """With an offset, offset + weight may cancel: |n| (|weight| + offset)."""
    return (normed(call)[0].abs() + 2 * call.smallest) * (call.inputs["weight"].abs() + call.options.get("offset", 0.0))


def _x_terms(call: Call) -> Tensor:
    """The gradient of x subtracts the part of g along the normalised row: r (|g| + |n| mean |g n|)."""
    n, r = normed(call)
    g = call.grad_outputs[0] * (call.inputs["weight"] + call.options.get("offset", 0.0))
    return r * (g.abs() + n.abs() * (g * n).abs().mean(-1, keepdim=True) + 2 * call.smallest)


def _weight_terms(call: Call) -> Tensor:
    """The gradient of the weight adds up over rows: sum |dy n|."""
    terms = (normed(call)[0].abs() + 2 * call.smallest) * call.grad_outputs[0].abs()
    return terms.reshape(-1, terms.shape[-1]).sum(0)


spec = Spec(
    op="rms_norm",
    sizes={"rows": rows, "hidden": columns},
    options={"eps": [1e-6, 1e-5, 0.5], "offset": [0.0, 1.0], "casting": ["llama", "gemma"]},
    build=_build,
    outputs=["y"],
    grads=["x", "weight"],
    rowwise=["x"],
    roundings=2,  # the normalised row on the way out, dy times weight on the way back; and one for another order
    terms={"y": _y_terms, "x": _x_terms, "weight": _weight_terms},
    kinds={
        "no leading dimension": lambda i, o: ({**i, "x": i["x"][0]}, o),
        "two leading dimensions": lambda i, o: ({**i, "x": i["x"].unflatten(0, (2, -1))}, o),
    },
    bytes=lambda inputs: (
        2 * nbytes(inputs["x"]) + nbytes(inputs["weight"]),
        3 * nbytes(inputs["x"]) + 2 * nbytes(inputs["weight"]),
    ),
    bench={
        "llama-3.2-1b": {"rows": 8192, "hidden": 2048},
        "llama-3.1-8b": {"rows": 8192, "hidden": 4096},
        "llama-3.1-70b": {"rows": 8192, "hidden": 8192},
        "short": {"rows": 2048, "hidden": 4096},
        "llama-3.1-405b": {"rows": 4096, "hidden": 16384},
    },
    errors=[
        ErrorCase(
            "weight is one short",
            lambda i, o: ({**i, "weight": i["weight"][:-1]}, o),
            ValueError,
            "weight",
            senseless=True,
        ),
        ErrorCase("weight is a matrix", lambda i, o: ({**i, "weight": i["weight"][None]}, o), ValueError, "weight"),
        ErrorCase("x has no dimension", lambda i, o: ({**i, "x": i["x"][0, 0]}, o), ValueError, "x"),
        ErrorCase("x is integer", lambda i, o: ({**i, "x": i["x"].long()}, o), TypeError, "x"),
        ErrorCase("casting is unknown", lambda i, o: (i, {**o, "casting": "lama"}), ValueError, "casting"),
        ErrorCase("eps is negative", lambda i, o: (i, {**o, "eps": -1.0}), ValueError, "eps"),
    ],
)
