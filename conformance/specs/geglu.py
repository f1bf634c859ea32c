"""Gated activation with GELU: what is drawn, and most of what is refused, is swiglu's."""

import math
from dataclasses import replace

import torch
from torch import Tensor

from conformance.gates import UNIT_FLOAT32
from conformance.spec import Call, ErrorCase
from conformance.specs import swiglu
from unsloth_ref.types import Approximate


def _twice(x: Tensor) -> Tensor:
    """2 z, of which (1 + tanh z) / 2 is the sigmoid."""
    return 2 * math.sqrt(2 / math.pi) * x * (1 + 0.044715 * x.square())


def _share(x: Tensor, approximate: Approximate) -> Tensor:
    """The share of the gate that passes, without the cancellation of (1 + erf) / 2 and (1 + tanh) / 2."""
    return torch.special.erfc(-x / math.sqrt(2)) / 2 if approximate == "none" else torch.sigmoid(_twice(x))


def truth(gate: Tensor, up: Tensor, *, approximate: Approximate = "none") -> Tensor:
    """The contract, also where float64 cancels: at a gate of -9 an infinite up gives -inf, not the NaN of 0 inf."""
    return gate * _share(gate, approximate) * up


def _curve(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """The share of the gate that passes, how it grows with the gate, and |exponent|, whose roundings both carry."""
    x, approximate = call.inputs["gate"], call.options.get("approximate", "none")
    share = _share(x, approximate)
    if approximate == "none":
        return share, torch.exp(-x.square() / 2) / math.sqrt(2 * math.pi), x.square() / 2
    twice = _twice(x)
    growth = share * torch.sigmoid(-twice) * 2 * math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * x.square())
    return share, growth, twice.abs()


def _cancelled(call: Call, value: Tensor) -> Tensor:
    """What float32 leaves of a small value that is 1 - something, whatever the dtype: one rounding of 1, or nothing."""
    return torch.clamp(value / UNIT_FLOAT32, max=1.0) * (UNIT_FLOAT32 / call.unit)


def _activation_terms(call: Call, factor: Tensor) -> Tensor:
    """The share is written as (1 + erf) / 2 or (1 + tanh) / 2, and the activation may lie below the normal numbers."""
    x = call.inputs["gate"]
    share, _, exponent = _curve(call)
    size = share * (1 + exponent) + _cancelled(call, share)
    return (x * size * factor).abs() + 2 * call.smallest * factor.abs()


def _gate_terms(call: Call) -> Tensor:
    """The derivative changes sign: (1 + erf) / 2 + gate growth, in any order; a growth is written with 1 - tanh^2."""
    x = call.inputs["gate"]
    share, growth, exponent = _curve(call)
    size = share + x.abs() * growth
    size = size * (1 + exponent) + _cancelled(call, size)
    if call.options.get("approximate", "none") == "tanh":
        square = torch.sigmoid(2 * math.sqrt(2 / math.pi) * x.abs() * (1 + 0.044715 * x.square()))
        square = 4 * square * (1 - square)  # 1 - tanh^2
        size = size + _cancelled(call, square) * x.abs() * (1 + 3 * 0.044715 * x.square())
    return ((call.grad_outputs[0] * call.inputs["up"]).abs() + 2 * call.smallest) * size


spec = replace(
    swiglu.spec,
    op="geglu",
    options={"approximate": ["none", "tanh"]},
    truth=truth,
    terms={
        "y": lambda call: _activation_terms(call, call.inputs["up"]),
        "up": lambda call: _activation_terms(call, call.grad_outputs[0]),
        "gate": _gate_terms,
    },
    bench={
        "tanh": {"rows": 8192, "hidden": 8192, "approximate": "tanh"},
        "none": {"rows": 8192, "hidden": 8192},
        "gemma-2-9b": {"rows": 8192, "hidden": 14336, "approximate": "tanh"},
    },
    errors=[
        *swiglu.spec.errors,
        ErrorCase("approximate is unknown", lambda i, o: (i, {**o, "approximate": "erf"}), ValueError, "approximate"),
    ],
)
