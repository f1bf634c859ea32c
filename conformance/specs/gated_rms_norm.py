"""Root-mean-square normalisation with a gate, over groups of columns."""

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

from conformance.case import Case, Draw
from conformance.promises import ExactLaw, Memory
from conformance.spec import (
    Budget,
    Call,
    Drawing,
    Inputs,
    Spec,
    Speed,
    column_counts,
    few_row_counts,
    leading_dimensions,
    mistake,
    nbytes,
    wrong_option,
)
from conformance.specs import rms_norm
from conformance.specs._mistakes import one_column_short
from conformance.tolerances.bounds import UNIT_FLOAT32, Terms, lost, root_of_mean
from unsloth_ref.kernels import gated_rms_norm


def _build(draw: Draw, rows: int, groups: int, hidden: int) -> Inputs:
    columns = groups * hidden
    return {"x": draw.filled(rows, columns), "gate": draw.filled(rows, columns), "weight": draw.weight(columns)}


@dataclass(frozen=True)
class _Parts:
    """The parts of a call, [..., groups, columns of a group], and the float32 errors of some, relative, in roundings.

    Attributes:
        activation, slope: SiLU of the gate and its derivative.
        slope_root: the root of the sum of squares of the slope's two terms.
        slope_in_float32: the slope's terms with their errors.
        exponential: the errors of the activation: exp(-gate) carries |gate| roundings of its argument.
        of_r, of_n: the errors of r, and of n: that and the activation's, if the gate comes before the norm.
        n, r: the normalised rows, and the reciprocal root mean square.
        x, weight, dy: the inputs.
        g: the gradient of n.
        in_g: the errors of g.
    """

    activation: Tensor
    slope: Tensor
    slope_root: Tensor
    slope_in_float32: Tensor
    exponential: Tensor
    of_r: Tensor
    of_n: Tensor
    n: Tensor
    r: Tensor
    x: Tensor
    weight: Tensor
    dy: Tensor
    g: Tensor
    in_g: Tensor

    def of_v(self, smallest: float) -> tuple[Tensor, Tensor, Tensor]:
        """r (|g| + |n| mean |g n|), its root, and the same with the errors of all factors in float32."""
        gn = (self.g * self.n).abs()
        along = gn.mean(-1, keepdim=True)
        size = self.r * (self.g.abs() + self.n.abs() * along + 2 * smallest)
        erring = self.g.abs() * self.in_g + self.n.abs() * (
            along * self.of_n + (gn * (self.in_g + self.of_n)).mean(-1, keepdim=True)
        )
        root = self.r * torch.hypot(self.g, self.n * root_of_mean(gn))
        return size, root, size * (1 + self.of_r) + self.r * erring


def _parts(call: Call) -> _Parts:
    size = call.options["group_size"] or call.inputs["x"].shape[-1]
    x, gate = (call.inputs[name].unflatten(-1, (-1, size)) for name in ("x", "gate"))
    weight = call.inputs["weight"].unflatten(-1, (-1, size))
    share, complement = torch.sigmoid(gate), torch.sigmoid(-gate)
    activation, other = gate * share, gate.abs() * complement
    exponential = 1 + other + lost(gate)
    before = _before(call)
    v = x if before else x * activation
    square = v.square()
    mean = square.mean(-1, keepdim=True)
    added = mean + call.options.get("eps", 1e-6)
    r = torch.rsqrt(added)
    of_r = torch.zeros_like(mean) if before else (square * exponential).mean(-1, keepdim=True) / added.clamp(min=1e-300)
    dy = call.grad_outputs[0].unflatten(-1, (-1, size)) if call.grad_outputs else torch.zeros_like(x)
    g = dy * weight * (activation if before else 1.0)
    ones = torch.ones_like(x)
    return _Parts(
        activation=activation,
        slope=share * (1 + other),
        slope_root=torch.hypot(share, share * other),
        slope_in_float32=share
        * (
            1
            + other * (2 + gate.abs())
            + gate.abs() * (complement / UNIT_FLOAT32).clamp(max=1.0)
            + (1 + other) * lost(gate)
        ),
        exponential=exponential,
        of_r=of_r,
        of_n=ones if before else exponential + of_r,
        n=v * r,
        r=r,
        x=x,
        weight=weight,
        dy=dy,
        g=g,
        in_g=exponential if before else ones,
    )


def _before(call: Call) -> bool:
    return call.options.get("norm_before_gate", True)


def _y_terms(call: Call) -> Terms:
    """|n weight a|, or |n weight|; small factors have absolute errors.

    With a weight that is wider than x and "gemma" casting, all products are float32: nothing else is rounded.
    """
    parts = _parts(call)
    a = parts.activation.abs() if _before(call) else torch.ones_like(parts.x)
    n, weight = parts.n.abs(), parts.weight.abs()
    size = n * weight * a + call.smallest * (2 * (1 + weight) * a + 2 * n * weight)
    in_float32 = size * (parts.exponential if _before(call) else parts.of_n)
    if call.options.get("casting", "llama") == "gemma" and call.inexact("weight"):
        return Terms(torch.zeros_like(size).flatten(-2), in_float32=in_float32.flatten(-2))
    return Terms(size.flatten(-2), root=(n * weight * a).flatten(-2), in_float32=in_float32.flatten(-2))


def _x_terms(call: Call) -> Terms:
    """As rms_norm's, of v; times |a| for a gate before the norm."""
    parts = _parts(call)
    size, root, in_float32 = parts.of_v(call.smallest)
    if not _before(call):
        a = parts.activation.abs()
        size, root, in_float32 = size * a, root * a, a * (in_float32 + size * parts.exponential)
    return Terms(size.flatten(-2), root=root.flatten(-2), in_float32=in_float32.flatten(-2))


def _gate_terms(call: Call) -> Terms:
    """|dy weight n| or |dv x|, times s (1 + |gate| (1 - s)): the derivative of SiLU changes sign.

    s may be below the normal numbers.
    """
    parts = _parts(call)
    slope = parts.slope + 2 * call.smallest * (1 + call.inputs["gate"].abs().unflatten(-1, parts.x.shape[-2:]))
    if _before(call):
        root = (parts.dy * parts.weight * parts.n).abs()
        size = root + 2 * call.smallest * parts.dy.abs() * (1 + parts.weight.abs())
        in_float32 = size
    else:
        size, root, in_float32 = (part * parts.x.abs() for part in parts.of_v(call.smallest))
    in_float32 = in_float32 * slope + size * parts.slope_in_float32
    return Terms((size * slope).flatten(-2), (root * parts.slope_root).flatten(-2), in_float32.flatten(-2))


def _weight_terms(call: Call) -> Terms:
    """Sum |dy a n| or |dy n|; the gradient of a weight wider than x has a smaller unit roundoff than n's rounding."""
    parts = _parts(call)
    of_product = (parts.dy * parts.activation if _before(call) else parts.dy).abs()
    size = (parts.n.abs() + 2 * call.smallest) * of_product
    factor = call.unit / UNIT_FLOAT32 if "weight" in call.wider and call.options.get("casting") != "gemma" else 1.0
    in_float32 = size * (parts.of_n + (parts.exponential if _before(call) else 0.0))
    root = (parts.n * of_product).flatten(-2)
    return Terms(factor * size.flatten(-2), factor * root, in_float32.flatten(-2)).over_rows()


spec = Spec(
    reference=gated_rms_norm,
    drawing=Drawing(
        sizes={
            "rows": few_row_counts,
            "groups": lambda budget: st.integers(1, min(budget, 4)),
            "hidden": column_counts,
        },
        build=_build,
        options={"norm_before_gate": [True, False], "casting": ["llama", "gemma"], "eps": [1e-6, 1e-5, 0.5]},
        required=lambda case: {"group_size": case.size("hidden")},
        shape=lambda rows, columns: (rows, 1 + (columns % 3 == 0), columns),
        costly=[Case((("rows", r), ("groups", 1), ("hidden", h))) for r, h in ((129, 8192), (257, 8193))],
    ),
    outputs=["y"],
    grads=["x", "gate", "weight"],
    budget=Budget(
        roundings=3,  # n, its product with the weight, and the activation or dy times it
        terms={"y": _y_terms, "x": _x_terms, "gate": _gate_terms, "weight": _weight_terms},
    ),
    rowwise=["x", "gate"],
    exact_laws={
        "x twice as large, with four times the eps": ExactLaw({"x": 2.0}, {"x": 0.5}, options=rms_norm.times_four),
        "x negated": ExactLaw({"x": -1.0}, {"y": -1.0, "gate": -1.0, "weight": -1.0}),
        "weight negated": ExactLaw({"weight": -1.0}, {"y": -1.0, "x": -1.0, "gate": -1.0}),
        "dy four times as large": ExactLaw({}, {"x": 4.0, "gate": 4.0, "weight": 4.0}, grad_outputs=4.0),
    },
    memory=Memory(
        Case((("rows", 16384), ("groups", 1), ("hidden", 4096))),
        grads=["x", "gate", "weight"],
        saved=lambda inputs: 4 * len(inputs["x"]),
        working=lambda inputs: 4 * rms_norm.PROGRAMS * inputs["x"].shape[-1],
    ),
    argument_kinds=leading_dimensions("x", "gate")
    | rms_norm.WIDE_WEIGHTS
    | {"all columns in one group, by default": lambda inputs, options: (inputs, {**options, "group_size": None})},
    special_values=rms_norm.SPECIAL_VALUES,
    errors=[
        *rms_norm.spec.errors,
        one_column_short("gate"),
        mistake("gate would broadcast", ValueError, "gate", lambda i: {"gate": i["gate"][:1]}),
        mistake("gate has another dtype", TypeError, "gate", lambda i: {"gate": i["gate"].double()}),
        wrong_option("group_size is no divisor", "group_size", group_size=5),
        wrong_option("group_size is 0", "group_size", group_size=0),
    ],
    speed=Speed(
        shapes={
            "qwen3-next": {"rows": 262144, "groups": 1, "hidden": 128},
            "mamba-2": {"rows": 8192, "groups": 1, "hidden": 8192, "norm_before_gate": False},
            "nemotron-h": {"rows": 8192, "groups": 8, "hidden": 1024, "norm_before_gate": False},
        },
        bytes=lambda inputs: (
            3 * nbytes(inputs["x"]) + nbytes(inputs["weight"]),
            5 * nbytes(inputs["x"]) + 2 * nbytes(inputs["weight"]),
        ),
    ),
)
