"""A linear layer with a low-rank adapter."""

from collections.abc import Callable, Collection, Mapping
from copy import copy
from math import nan
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from conformance.case import Case, Draw
from conformance.promises import BLAS, ExactLaw, Memory
from conformance.spec import (
    Budget,
    Call,
    Drawing,
    ErrorCase,
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
from conformance.specs._mistakes import one_column_short, one_row_short
from conformance.specs.fp8_linear import in_float8, weight_after, x_after
from conformance.tolerances.bounds import Bound, added_in_float32, as_rows, exact, product, total
from unsloth_ref.accuracy import UNIT_FLOAT32
from unsloth_ref.kernels import lora_linear, nf4_dequantize
from unsloth_ref.nf4_checks import NF4_BLOCK, NF4_GROUP
from unsloth_ref.types import Float8Weight, NF4Weight


def _build(draw: Draw, rows: int, rank: int, wide: int, columns: int, out: int) -> Inputs:
    """`wide` adapters are float32 for every dtype under test; if `wide` is 2, the weight has 4 bits; if 3, float8.

    Odd seeds have a bias.
    """
    x, weight, bias = draw.filled(rows, columns), draw.matrix(out, columns), draw.weight(out)
    adapters = copy(draw)
    if wide:
        adapters.dtype = torch.float32
    inputs = {
        "x": x,
        "weight": weight,
        "lora_a": adapters.matrix(rank, columns),
        "lora_b": adapters.matrix(out, rank),
    }
    if wide == 2:
        del inputs["weight"]
        inputs |= _in_4_bits(adapters, out, columns)
    if wide == 3:
        del inputs["weight"]
        inputs |= dict(zip(Float8Weight._fields, in_float8(draw, out, columns), strict=True))
    return inputs | ({"bias": bias} if draw.case.seed % 2 else {})


def _in_4_bits(draw: Draw, rows: int, columns: int) -> Inputs:
    """The parts of a weight, for any fill with the magnitude that `draw.matrix` has; odd seeds have plain scales."""
    blocks, size = -(-rows * columns // NF4_BLOCK), max(1, columns) ** -0.5
    packed = draw.tensor("randint", -(-rows * columns // 2), dtype=torch.uint8, high=256)
    if draw.case.seed % 2:
        return {"packed": packed, "absmax": size * draw.weight(blocks)}
    return {
        "packed": packed,
        "absmax": draw.tensor("randint", blocks, dtype=torch.uint8, high=256),
        "nested_code": draw.weight(256),
        "nested_absmax": size * draw.weight(-(-blocks // NF4_GROUP)),
        "nested_offset": size * draw.weight(1)[0],
    }


def _parts_of_weight(inputs: Inputs) -> list[Tensor | None]:
    return [inputs.get(name) for name in NF4Weight._fields[:-1]]


def _arguments(inputs: Inputs) -> Mapping[str, Any]:
    """Those of a call, with the parts of a weight in 4 bits or float8 as one argument."""
    if "values" in inputs:
        others = {name: tensor for name, tensor in inputs.items() if name not in Float8Weight._fields}
        return others | {"weight": Float8Weight(inputs["values"], inputs["scale"])}
    if "packed" not in inputs:
        return inputs
    shape = len(inputs["lora_b"]), inputs["x"].shape[-1]
    others = {name: tensor for name, tensor in inputs.items() if name not in NF4Weight._fields}
    return others | {"weight": NF4Weight(*_parts_of_weight(inputs), shape)}  # type: ignore[arg-type]


def _weight(call: Call) -> Bound:
    """The weight; one in 4 bits may be rounded to the dtype of x, after a few roundings to float32."""
    if "weight" in call.inputs:
        return exact(call.inputs["weight"])
    if "values" in call.inputs:
        return weight_after(call, "values")
    shape = len(call.inputs["lora_b"]), call.inputs["x"].shape[-1]
    parts = _parts_of_weight(call.inputs)
    sizes = [None if part is None else part if part.dtype == torch.uint8 else part.abs() for part in parts]
    value, size = (nf4_dequantize(*each, shape=shape, dtype=torch.float64) for each in (parts, sizes))  # type: ignore[arg-type]
    error = 4 * UNIT_FLOAT32 * size.abs()
    return Bound(value, error, (error / 2) ** 2).rounded(call.unit, call.smallest)


def _shape(rows: int, columns: int) -> tuple[int, ...]:
    """An even number of columns is that of x, an odd one that of y.

    An odd number of rows has wide adapters; 17, 33 and so on a weight in 4 bits too, 5 with up to 129 columns one in
    float8.
    """
    few, wide = 3 + columns % 29, 3 if rows == 5 and columns < 130 else 2 if rows % 16 == 1 < rows else rows % 2
    return rows, 1 + (columns + 1) % 5, wide, *((few, columns) if columns % 2 else (columns, few))


def _out(budget: int) -> st.SearchStrategy[int]:
    """Numbers of columns of y, mostly small, so that x can have many columns."""
    many = [size for size in (96, 129, 512, 1024, 2048, 4096) if size <= budget // 64]
    return st.sampled_from([1, 2, 4, 8, 16, 33, 64, *many])


class Steps:
    """The intermediate results of a call, with error bounds.

    Each product is a float32 sum that is rounded to the dtype of x, as are its factors: forward, x @ lora_a^T, its
    product with lora_b^T and that times scaling; backward, dy times scaling and its product with lora_b. Adapters with
    more bits than x are first rounded to the dtype of x.

    Args:
        call: of lora_linear.
        x: its x, if that has an error.
        dy: the gradient of y, if that has an error.
    """

    def __init__(self, call: Call, x: Bound | None = None, dy: Bound | None = None) -> None:
        self._call = call
        self.scaling = call.options.get("scaling", 1.0)
        self.x, self.weight = x or exact(as_rows(call.inputs["x"])), _weight(call)
        self.read = x_after(call) if "values" in call.inputs else self.x  # by the layer; its adapter reads x
        self.a, self.b = (exact(call.inputs[name]) for name in ("lora_a", "lora_b"))
        if _wide(call):
            self.a, self.b = self.rounded(self.a), self.rounded(self.b)
        self.low = self.rounded(self.product(self.x, self.a.t()))
        if call.grad_outputs or dy:
            self.dy = dy or exact(as_rows(call.grad_outputs[0]))
            self.dz = self.rounded(self.dy.times(self.scaling))
            self.dlow = self.rounded(self.product(self.dz, self.b))

    def product(self, left: Bound, right: Bound) -> Bound:
        """left @ right, not yet rounded."""
        return product(left, right, self._call.elements)

    def y(self) -> Bound:
        """Two products and a bias, as rows, rounded one after the other; scaling adds a rounding."""
        call = self._call
        base = self.rounded(self.product(self.read, self.weight.t()))
        if "bias" in call.inputs:
            bias = exact(call.inputs["bias"])  # it may be the first term of the sum, to which all others are added
            base = self.rounded(base + added_in_float32(bias, call.elements, self.x.value.shape[-1]))
        added = self.rounded(self.product(self.low, self.b.t()))
        return base + self.rounded(added.times(self.scaling))

    def gradient(self, name: str) -> Bound:
        """Of lora_a or lora_b, rounded once, to the dtype of x or to that of a wider adapter; of weight or bias."""
        if name == "bias":
            return total(self.dy, self._call.elements)
        if name == "weight":  # only the result is rounded
            return self.product(self.dy.t(), self.x)
        found = self.product(self.dlow.t(), self.x) if name == "lora_a" else self.product(self.dz.t(), self.low)
        return found if _wide(self._call) else self.rounded(found)

    def terms_of_dx(self) -> tuple[Bound, Bound]:
        """The gradients of x, as rows: of the layer and of the adapter."""
        of_layer, of_adapter = self.product(self.dy, self.weight), self.product(self.dlow, self.a)
        return self.rounded(of_layer), self.rounded(of_adapter)

    def rounded(self, number: Bound) -> Bound:
        """The number rounded to the dtype of x."""
        return number.rounded(self._call.unit, self._call.smallest)


def _wide(call: Call) -> bool:
    """Whether adapters have more bits than x."""
    return call.inexact("lora_a", "lora_b")


def _y_bound(call: Call) -> Bound:
    shape = *call.inputs["x"].shape[:-1], len(call.inputs["lora_b"])
    return Steps(call).y().reshape(shape)


def _x_bound(call: Call) -> Bound:
    """dy @ weight and dlow @ lora_a, each rounded."""
    of_layer, of_adapter = Steps(call).terms_of_dx()
    return (of_layer + of_adapter).reshape(call.inputs["x"].shape)


def _gradient_bound(name: str) -> Callable[[Call], Bound]:
    return lambda call: Steps(call).gradient(name)


def _bytes(inputs: Inputs) -> tuple[int, int]:
    """Forward: x, all weights and y. Backward: these, dx and the adapters' gradients; the weight is frozen."""
    x, adapters = inputs["x"], nbytes(inputs["lora_a"], inputs["lora_b"])
    read = nbytes(x, inputs["weight"]) + adapters
    y = x[..., 0].numel() * len(inputs["weight"]) * x.element_size()
    return read + y, read + y + nbytes(x) + adapters


def _flops(inputs: Inputs, options: Options, grads: Collection[str]) -> tuple[int, int]:
    """Forward: the product with the weight and the two of the adapter. Backward: those that the gradients need."""
    x, (out, columns), rank = inputs["x"], inputs["weight"].shape, len(inputs["lora_a"])
    tokens = 2 * x[..., 0].numel()
    whole, narrow_in, narrow_out = tokens * out * columns, tokens * rank * columns, tokens * rank * out
    needs = {
        "x": whole + narrow_in,  # dy @ weight, dlow @ lora_a
        "weight": whole,
        "lora_a": narrow_in,
        "lora_b": narrow_out,
    }
    dlow = narrow_out if {"x", "lora_a"}.intersection(grads) else 0
    return whole + narrow_in + narrow_out, dlow + sum(needs.get(name, 0) for name in grads)


def _low_bytes(inputs: Inputs) -> int:
    """x @ lora_a^T."""
    return inputs["x"][..., 0].numel() * len(inputs["lora_a"]) * inputs["x"].element_size()


def _bias_error(
    what: str, raises: type[Exception], bias: Callable[[Inputs], Tensor], *, undefined: bool = False
) -> ErrorCase:
    """A wrong bias, passed by name: in the signature, an option precedes it."""

    def change(inputs: Inputs, options: Options) -> tuple[Inputs, Options]:
        return inputs, {**options, "bias": bias(inputs)}

    return ErrorCase(what, change, raises, "bias", undefined)


def _bench(columns: int, out: int, wide: int = 1, tokens: int = 16384) -> dict[str, object]:
    """A frozen layer with an adapter of rank 16, in float32 as peft keeps it."""
    return {
        "rows": tokens, "rank": 16, "wide": wide, "columns": columns, "out": out, "grads": ("x", "lora_a", "lora_b")
    }  # fmt: skip


spec = Spec(
    reference=lora_linear,
    drawing=Drawing(
        sizes={
            "rows": lambda budget: row_counts(max(budget, 16)),
            "rank": lambda budget: st.sampled_from([1, 4, 8, 16, 24, 64, 129]),
            "wide": lambda budget: st.sampled_from([0, 1, 2, 3]),
            "columns": column_counts,
            "out": _out,
        },
        build=_build,
        options={"scaling": [1.0, 2.0, 0.25, 0.0]},
        shape=_shape,
    ),
    outputs=["y"],
    grads=["x", "weight", "lora_a", "lora_b", "bias"],
    budget=Budget(
        roundings=1,  # that a row may share: of x @ lora_a^T or dy @ lora_b if the rank is 1
        bounds={
            "y": _y_bound,
            "x": _x_bound,
        }
        | {name: _gradient_bound(name) for name in ("weight", "lora_a", "lora_b", "bias")},
    ),
    arguments=_arguments,
    rowwise=["x"],
    bits_vary=BLAS,
    exact_laws={
        "x twice as large": ExactLaw(
            {"x": 2.0}, {"y": 2.0, "weight": 2.0, "lora_a": 2.0, "lora_b": 2.0}, without=["bias"]
        ),
        "lora_b half as large, with twice the scaling": ExactLaw(
            {"lora_b": 0.5}, {"lora_b": 2.0}, options=lambda options: {"scaling": 2 * options.get("scaling", 1.0)}
        ),
        "dy four times as large": ExactLaw(
            {}, dict.fromkeys(["x", "weight", "lora_a", "lora_b", "bias"], 4.0), grad_outputs=4.0
        ),
    },
    memory=Memory(
        Case((("rows", 16384), ("rank", 16), ("wide", 1), ("columns", 2048), ("out", 4096))),
        grads=["x", "lora_a", "lora_b"],
        saved=_low_bytes,
        # Its gradient; both adapters in the dtype of x, and a float32 sum.
        working=lambda i: _low_bytes(i) + 8 * (i["lora_a"].numel() + i["lora_b"].numel()),
    ),
    argument_kinds=leading_dimensions("x")
    | {
        "a bias": change_inputs(lambda i: {"bias": i["weight"][:, 0].contiguous()}),
        "adapters in float32": change_inputs(lambda i: {n: i[n].float() * (1 + 2**-13) for n in ("lora_a", "lora_b")}),
        "rank 0": change_inputs(lambda i: {"lora_a": i["lora_a"][:0], "lora_b": i["lora_b"][:, :0]}),
        "no columns but a bias": change_inputs(
            lambda i: {n: i[n][..., :0] for n in ("x", "weight", "lora_a")} | {"bias": i["weight"][:, 0].contiguous()}
        ),
        "no output": change_inputs(lambda i: {n: i[n][:0] for n in ("weight", "lora_b")}),
    },
    special_values=[nan],  # infinity gives terms of both signs, and inf or NaN with a scaling of 0
    errors=[
        one_column_short("weight"),
        mistake("weight is a vector", ValueError, "weight", lambda i: {"weight": i["weight"][0]}),
        one_column_short("lora_a"),
        mistake("lora_a is a vector", ValueError, "lora_a", lambda i: {"lora_a": i["lora_a"][0]}),
        one_row_short("lora_b"),
        mistake(
            "lora_b has another rank", ValueError, "lora_b", lambda i: {"lora_b": i["lora_b"][:, 1:]}, undefined=True
        ),
        mistake("lora_b would broadcast", ValueError, "lora_b", lambda i: {"lora_b": i["lora_b"][:1]}),
        _bias_error("bias is one short", ValueError, lambda i: i["weight"][1:, 0], undefined=True),
        _bias_error("bias would broadcast", ValueError, lambda i: i["weight"][:1, 0]),
        mistake("x has no dimension", ValueError, "x", lambda i: {"x": i["x"][0, 0]}, undefined=True),
        mistake("x is integer", TypeError, "x", lambda i: {"x": i["x"].long()}),
        mistake("weight is wider than x", TypeError, "weight", lambda i: {"weight": i["weight"].double()}),
        _bias_error("bias is wider than x", TypeError, lambda i: i["weight"][:, 0].double()),
        mistake(
            "adapters are narrower than x",
            TypeError,
            "lora_a",
            lambda i: {n: i[n].to(torch.bfloat16) for n in ("lora_a", "lora_b")},
        ),
        mistake("adapters of two dtypes", TypeError, "lora_b", lambda i: {"lora_b": i["lora_b"].half()}),
    ],
    speed=Speed(
        shapes={
            "llama-3.2-1b q, o": _bench(2048, 2048),
            "llama-3.2-1b gate, up": _bench(2048, 8192),
            "llama-3.2-1b down": _bench(8192, 2048),
            "llama-3.2-1b down, adapters as x": _bench(8192, 2048, wide=0),
            "llama-3.2-1b q, o, few": _bench(2048, 2048, tokens=2048),
        },
        bytes=_bytes,
        flops=_flops,
    ),
)
