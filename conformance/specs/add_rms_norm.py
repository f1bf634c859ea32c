"""Residual addition and root-mean-square normalisation."""

from dataclasses import replace

from torch import Tensor

from conformance.case import Draw
from conformance.spec import Call, ErrorCase, Inputs, Spec, columns, nbytes, rows
from conformance.specs import rms_norm


def _build(draw: Draw, rows: int, hidden: int) -> Inputs:
    return {"x": draw.rows(rows, hidden), "residual": draw.rows(rows, hidden), "weight": draw.weight(hidden)}


def _of_the_sum(call: Call) -> Call:
    """The call of rms_norm that it holds."""
    return replace(call, inputs={**call.inputs, "x": call.inputs["x"] + call.inputs["residual"]})


def _x_terms(call: Call) -> Tensor:
    """Dsum is added to the gradient of the norm: |dsum| + r (|g| + 3 |n| mean |g n|).

    The sum's rounding, by u at most, changes r by u and n by 2 u, and so the gradient by u r (|g| + 5 |n| mean |g n|);
    the other two roundings change it by u r (|g| + |n| mean |g n|) each: 3 |g| and 7 |n| mean |g n| in all.
    """
    n, r = rms_norm.normed(_of_the_sum(call))
    g = call.grad_outputs[0] * (call.inputs["weight"] + call.options.get("offset", 0.0))
    norm = r * (g.abs() + 3 * n.abs() * (g * n).abs().mean(-1, keepdim=True) + 2 * call.smallest)
    return norm + call.grad_outputs[1].abs()


spec = Spec(
    op="add_rms_norm",
    sizes={"rows": rows, "hidden": columns},
    options=rms_norm.spec.options,
    build=_build,
    outputs=["normed", "sum"],
    grads=["x", "residual", "weight"],
    rowwise=["x", "residual"],
    roundings=3,  # rms_norm's two, and that of the sum
    terms={
        "normed": lambda call: rms_norm.spec.terms["y"](_of_the_sum(call)),
        "x": _x_terms,
        "residual": _x_terms,
        "weight": lambda call: rms_norm.spec.terms["weight"](_of_the_sum(call)),
    },
    kinds={
        "no leading dimension": lambda i, o: ({**i, "x": i["x"][0], "residual": i["residual"][0]}, o),
        "two leading dimensions": lambda i, o: (
            {**i, "x": i["x"].unflatten(0, (2, -1)), "residual": i["residual"].unflatten(0, (2, -1))},
            o,
        ),
    },
    bytes=lambda inputs: (
        4 * nbytes(inputs["x"]) + nbytes(inputs["weight"]),
        4 * nbytes(inputs["x"]) + 2 * nbytes(inputs["weight"]),
    ),
    bench=rms_norm.spec.bench,
    errors=[
        ErrorCase(
            "weight is one short",
            lambda i, o: ({**i, "weight": i["weight"][:-1]}, o),
            ValueError,
            "weight",
            senseless=True,
        ),
        ErrorCase(
            "residual is one column short",
            lambda i, o: ({**i, "residual": i["residual"][..., :-1]}, o),
            ValueError,
            "residual",
            senseless=True,
        ),
        ErrorCase(
            "residual would broadcast", lambda i, o: ({**i, "residual": i["residual"][:1]}, o), ValueError, "residual"
        ),
        ErrorCase(
            "residual has another dtype",
            lambda i, o: ({**i, "residual": i["residual"].double()}, o),
            TypeError,
            "residual",
        ),
        ErrorCase("x has no dimension", lambda i, o: ({**i, "x": i["x"][0, 0]}, o), ValueError, "x"),
        ErrorCase("x is integer", lambda i, o: ({**i, "x": i["x"].long()}, o), TypeError, "x"),
        ErrorCase("casting is unknown", lambda i, o: (i, {**o, "casting": "lama"}), ValueError, "casting"),
        ErrorCase("eps is negative", lambda i, o: (i, {**o, "eps": -1.0}), ValueError, "eps"),
    ],
)
