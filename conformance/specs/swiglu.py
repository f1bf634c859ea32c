"""Gated activation with SiLU."""

import torch
from torch import Tensor

from conformance.case import Draw
from conformance.spec import Call, ErrorCase, Inputs, Spec, columns, nbytes, rows


def _build(draw: Draw, rows: int, hidden: int) -> Inputs:
    return {"gate": draw.rows(rows, hidden), "up": draw.rows(rows, hidden)}


def _silu_terms(call: Call, factor: Tensor) -> Tensor:
    """The exponential of x carries x roundings of its argument, and the activation may lie below the normal numbers."""
    gate = call.inputs["gate"]
    return (gate * torch.sigmoid(gate) * factor).abs() * (1 + gate.abs()) + 2 * call.smallest * factor.abs()


def _gate_terms(call: Call) -> Tensor:
    """The derivative of SiLU changes sign: |dy up| s (1 + |gate| (1 - s)), with |gate| roundings in s."""
    gate = call.inputs["gate"]
    size = torch.sigmoid(gate) * (1 + gate.abs() * torch.sigmoid(-gate)) * (1 + gate.abs())
    return ((call.grad_outputs[0] * call.inputs["up"]).abs() + 2 * call.smallest) * size


spec = Spec(
    op="swiglu",
    sizes={"rows": rows, "hidden": columns},
    # Between wide and far, near a gate of -88, exp(-gate) overflows in float32 and gives 0 for 1e-36.
    fills=["randn", "ones", "zeros", "tiny", "wide", "far"],
    build=_build,
    outputs=["y"],
    grads=["gate", "up"],
    rowwise=["gate", "up"],
    roundings=2,  # the activation on the way out, dy times up on the way back; and one for whoever rounds the sigmoid
    terms={
        "y": lambda call: _silu_terms(call, call.inputs["up"]),
        "up": lambda call: _silu_terms(call, call.grad_outputs[0]),
        "gate": _gate_terms,
    },
    kinds={
        "no leading dimension": lambda i, o: ({n: t[0] for n, t in i.items()}, o),
        "two leading dimensions": lambda i, o: ({n: t.unflatten(0, (2, -1)) for n, t in i.items()}, o),
    },
    bytes=lambda inputs: (3 * nbytes(inputs["gate"]), 5 * nbytes(inputs["gate"])),
    bench={
        "llama-3.2-1b": {"rows": 8192, "hidden": 8192},
        "llama-3.1-8b": {"rows": 8192, "hidden": 14336},
    },
    errors=[
        ErrorCase(
            "up is one column short", lambda i, o: ({**i, "up": i["up"][..., :-1]}, o), ValueError, "up", senseless=True
        ),
        ErrorCase("up would broadcast", lambda i, o: ({**i, "up": i["up"][:1]}, o), ValueError, "up"),
        ErrorCase("up has another dtype", lambda i, o: ({**i, "up": i["up"].double()}, o), TypeError, "up"),
        ErrorCase("gate is integer", lambda i, o: ({n: t.long() for n, t in i.items()}, o), TypeError, "gate"),
    ],
)
