"""Short causal convolution of packed documents.

No input is row-wise: an output depends on the tokens before it, and a gradient on those behind it.
"""

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
    change_inputs,
    column_counts,
    mistake,
    nbytes,
    row_counts,
    wrong_option,
)
from conformance.specs._documents import Shifts, bounds_errors, document_kinds, documents_as_parts, laid_out
from conformance.specs.rms_norm import WIDE_WEIGHT
from conformance.tolerances.bounds import Terms, lost
from unsloth_ref.kernels import causal_conv


def _build(draw: Draw, tokens: int, documents: int, channels: int, width: int) -> Inputs:
    """Odd seeds have a bias."""
    inputs = {
        "x": draw.filled(tokens, channels),
        "weight": draw.matrix(channels, width),
        "cu_seqlens": laid_out(draw, tokens, documents),
    }
    return inputs | ({"bias": draw.weight(channels)} if draw.case.seed % 2 else {})


class _Sums:
    """z of a call, the size of its terms, and how they reach a result; all [T, C].

    `lost` is the error of sigmoid(z), where z may be rounded three times.
    """

    def __init__(self, call: Call) -> None:
        self.call, self.x = call, call.inputs["x"]
        self.taps = call.inputs["weight"].flip(1).unbind(1)  # that of the token itself comes first
        self.shifts = Shifts.of(call.inputs["cu_seqlens"], len(self.x))
        bias = call.inputs.get("bias", torch.zeros_like(self.x[:1]))
        terms = [tap * self.shifts.before(self.x, back) for back, tap in enumerate(self.taps)]
        self.z = bias + sum(terms)
        self.size = bias.abs() + sum(term.abs() for term in terms)
        self.silu = call.options.get("activation") == "silu"
        self.s = torch.sigmoid(self.z)
        self.lost = lost(self.z, 3 * call.unit * self.size)

    def dz(self) -> Terms:
        """dy times the derivative of the activation; the derivative changes with the roundings of z."""
        dy = self.call.grad_outputs[0].abs()
        if not self.silu:
            return Terms(dy)
        other = 1 - self.s
        slope = (self.s * (1 + self.z * other)).abs()
        bend = (self.s * other * (2 + self.z * (1 - 2 * self.s))).abs()
        far = self.z.abs()
        wide = self.s * (1 + far * other * (2 + far) + (1 + far) * self.lost) + bend * self.size
        size = slope + bend * self.z.abs()
        return Terms(dy * size, root=dy * torch.hypot(slope, bend * self.z), in_float32=dy * wide)


def _y_terms(call: Call) -> Terms:
    """z may be rounded before the bias is added, and before the activation, which has float32 errors of its own."""
    sums = _Sums(call)
    if not sums.silu:
        size = sums.z.abs() + call.inputs.get("bias", torch.zeros_like(sums.z[:1])).abs()
        return Terms(size, in_float32=sums.size)
    slope, y = (sums.s * (1 + sums.z * (1 - sums.s))).abs(), (sums.z * sums.s).abs()
    wide = slope * sums.size + y * (1 + sums.z.abs() * (1 - sums.s) + sums.lost)
    return Terms(slope * sums.z.abs() + y, root=torch.hypot(slope * sums.z, y), in_float32=wide)


def _wide(terms: Terms) -> tuple[Tensor, Tensor, Tensor]:
    root = terms.size if terms.root is None else terms.root
    return terms.size, root, terms.size if terms.in_float32 is None else terms.in_float32


def _x_terms(call: Call) -> Terms:
    """The sum of |weight dz| over the tokens that see this one."""
    sums = _Sums(call)
    size, squares, wide = (torch.zeros_like(sums.x) for _ in range(3))
    for ahead, tap in enumerate(sums.taps):
        parts = [tap.abs() * sums.shifts.behind(part, ahead) for part in _wide(sums.dz())]
        size, squares, wide = size + parts[0], squares + parts[1].square(), wide + parts[2]
    return Terms(size, squares.sqrt(), wide)


def _weight_terms(call: Call) -> Terms:
    """The sum of |dz x| over all tokens, for each column of the weight."""
    sums = _Sums(call)
    columns = []
    for back in reversed(range(len(sums.taps))):
        x = sums.shifts.before(sums.x, back).abs()
        size, root, wide = (part * x for part in _wide(sums.dz()))
        columns.append(Terms(size, root, wide).over_rows())
    stacked = [torch.stack(parts, 1) for parts in zip(*map(_wide, columns), strict=True)]
    return Terms(*stacked)


def _bias_terms(call: Call) -> Terms:
    """The sum of |dz| over all tokens."""
    return Terms(*_wide(_Sums(call).dz())).over_rows()


def _bench(tokens: int, channels: int, width: int, activation: str | None) -> dict[str, object]:
    return {"tokens": tokens, "documents": 41, "channels": channels, "width": width, "activation": activation}


spec = Spec(
    reference=causal_conv,
    drawing=Drawing(
        sizes={
            "tokens": row_counts,
            "documents": lambda budget: st.integers(1, 5),
            "channels": column_counts,
            "width": lambda budget: st.sampled_from([4, 3, 1, 2, 5, 8]),
        },
        build=_build,
        options={"activation": [None, "silu"]},
        shape=lambda rows, columns: (rows, 1 + rows % 3, columns, 4 - columns % 3),
        counts={"tokens": 2**24, "documents": 1024},
    ),
    outputs=["y"],
    grads=["x", "weight", "bias"],
    budget=Budget(
        roundings=2,  # of z before the bias or the activation, and of the sigmoid; backward of z and of dz
        terms={"y": _y_terms, "x": _x_terms, "weight": _weight_terms, "bias": _bias_terms},
    ),
    independent=documents_as_parts(["x"], ["x"]),
    far=["x"],
    exact_laws={
        "x twice as large, without an activation": ExactLaw(
            {"x": 2.0}, {"y": 2.0, "weight": 2.0}, holds=lambda o: not o.get("activation"), without=["bias"]
        ),
        "x and weight negated": ExactLaw({"x": -1.0, "weight": -1.0}, {"x": -1.0, "weight": -1.0}),
        "dy four times as large": ExactLaw({}, {"x": 4.0, "weight": 4.0, "bias": 4.0}, grad_outputs=4.0),
    },
    memory=Memory(
        Case((("tokens", 16384), ("documents", 41), ("channels", 4096), ("width", 4))),
        grads=["x", "weight"],
        working=lambda inputs: nbytes(inputs["x"]) // 16,  # sums of many tokens, for each column of the weight
    ),
    argument_kinds=document_kinds(["x"])
    | WIDE_WEIGHT
    | {
        "a bias in float32": change_inputs(lambda i: {"bias": i["weight"][:, 0].float() * (1 + 2**-13)}),
        "a weight of one column": change_inputs(lambda i: {"weight": i["weight"][:, :1]}),
    },
    errors=[
        mistake("x is a cube", ValueError, "x", lambda i: {"x": i["x"][None]}, undefined=True),
        mistake("x is integer", TypeError, "x", lambda i: {"x": i["x"].long()}),
        mistake(
            "weight is one channel short", ValueError, "weight", lambda i: {"weight": i["weight"][:-1]}, undefined=True
        ),
        mistake("weight is a cube", ValueError, "weight", lambda i: {"weight": i["weight"][:, None]}, undefined=True),
        mistake("weight has no column", ValueError, "weight", lambda i: {"weight": i["weight"][:, :0]}),
        mistake("weight is integer", TypeError, "weight", lambda i: {"weight": i["weight"].long()}),
        mistake("bias is one short", ValueError, "bias", lambda i: {"bias": i["weight"][1:, 0]}, undefined=True),
        mistake("bias is integer", TypeError, "bias", lambda i: {"bias": i["weight"][:, 0].long()}),
        *bounds_errors("x"),
        wrong_option("activation is unknown", "activation", activation="gelu"),
    ],
    speed=Speed(
        shapes={
            "qwen-3.5 delta net": _bench(16384, 8192, 4, "silu"),
            "lfm-2-1.2b": _bench(16384, 2048, 3, None),
        },
        bytes=lambda inputs: (
            2 * nbytes(inputs["x"]) + nbytes(inputs["weight"]),
            3 * nbytes(inputs["x"]) + 2 * nbytes(inputs["weight"]),
        ),
    ),
)
