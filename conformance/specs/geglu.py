"""Gated activation with GELU; the cases and most errors are those of swiglu."""

import math
from dataclasses import replace

import torch
from torch import Tensor

from conformance.spec import Call, Speed, wrong_option
from conformance.specs import swiglu
from conformance.tolerances.bounds import Terms
from unsloth_ref.accuracy import UNIT_FLOAT32
from unsloth_ref.kernels import geglu
from unsloth_ref.types import Approximate


def _twice_z(x: Tensor) -> Tensor:
    """2 z, where z is the argument of tanh: (1 + tanh z) / 2 = sigmoid(2 z)."""
    return 2 * math.sqrt(2 / math.pi) * x * (1 + 0.044715 * x.square())


def _gate_fraction(x: Tensor, approximate: Approximate) -> Tensor:
    """The fraction of the gate that passes, without the cancellation in (1 + erf) / 2 and (1 + tanh) / 2."""
    return torch.special.erfc(-x / math.sqrt(2)) / 2 if approximate == "none" else torch.sigmoid(_twice_z(x))


def truth(gate: Tensor, up: Tensor, *, approximate: Approximate = "none") -> Tensor:
    """The contract without cancellation in float64: a gate of -9 and an infinite up give -inf, not NaN from 0 inf."""
    return gate * _gate_fraction(gate, approximate) * up


def _curve(call: Call) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The fraction of the gate that passes, its terms, its derivative, and |exponent|.

    An exponential carries |exponent| roundings. The derivative is one; of the fraction, that part which decays is.
    """
    x, approximate = call.inputs["gate"], call.options.get("approximate", "none")
    fraction, rest = (_gate_fraction(one, approximate) for one in (x, -x))
    if approximate == "none":
        slope, exponent = torch.exp(-x.square() / 2) / math.sqrt(2 * math.pi), x.square() / 2
    else:
        slope = fraction * rest * 2 * math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * x.square())
        exponent = _twice_z(x).abs()
    return fraction, fraction + torch.minimum(fraction, rest) * exponent, slope, exponent


def _cancelled(call: Call, value: Tensor) -> Tensor:
    """Terms of a small value computed as a difference from 1 in float32: one rounding of 1, or the whole value."""
    return torch.clamp(value / UNIT_FLOAT32, max=1.0) * (UNIT_FLOAT32 / call.unit)


def _activation_terms(call: Call, factor: Tensor) -> Terms:
    """The fraction is (1 + erf) / 2 or (1 + tanh) / 2; the activation may be below the normal numbers."""
    x = call.inputs["gate"]
    fraction, terms, _, _ = _curve(call)
    size = terms + _cancelled(call, fraction)
    return Terms((x * size * factor).abs() + 2 * call.smallest * factor.abs(), root=(x * fraction * factor).abs())


def _gate_terms(call: Call) -> Terms:
    """fraction + gate slope, in any order, changes sign; with tanh, the slope is computed from 1 - tanh^2."""
    x = call.inputs["gate"]
    fraction, terms, slope, exponent = _curve(call)
    root = torch.hypot(fraction, x * slope)
    size = terms + x.abs() * slope * (1 + exponent) + _cancelled(call, fraction + x.abs() * slope)
    if call.options.get("approximate", "none") == "tanh":
        square = torch.sigmoid(2 * math.sqrt(2 / math.pi) * x.abs() * (1 + 0.044715 * x.square()))
        square = 4 * square * (1 - square)  # 1 - tanh^2
        size = size + _cancelled(call, square) * x.abs() * (1 + 3 * 0.044715 * x.square())
    factor = (call.grad_outputs[0] * call.inputs["up"]).abs()
    return Terms((factor + 2 * call.smallest) * size, root=factor * root)


spec = replace(
    swiglu.spec,
    reference=geglu,
    drawing=replace(swiglu.spec.drawing, options={"approximate": ["none", "tanh"]}),
    budget=replace(
        swiglu.spec.budget,
        terms={
            "y": lambda call: _activation_terms(call, call.inputs["up"]),
            "up": lambda call: _activation_terms(call, call.grad_outputs[0]),
            "gate": _gate_terms,
        },
        truth=truth,
    ),
    errors=[
        *swiglu.spec.errors,
        wrong_option("approximate is unknown", "approximate", approximate="erf"),
    ],
    speed=Speed(
        shapes={
            "tanh": {"rows": 8192, "hidden": 8192, "approximate": "tanh"},
            "none": {"rows": 8192, "hidden": 8192},
            "gemma-2-9b": {"rows": 8192, "hidden": 14336, "approximate": "tanh"},
        },
        bytes=swiglu.bytes_moved,
    ),
)
