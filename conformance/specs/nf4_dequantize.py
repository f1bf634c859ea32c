"""Dequantisation of weights in 4 bits: every implementation must give the same bits."""

from collections.abc import Callable
from math import inf, nan
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from conformance.case import Draw
from conformance.promises import ExactLaw
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
    mistake,
    nbytes,
    row_counts,
)
from conformance.specs._mistakes import one_short
from conformance.tolerances.bounds import Terms
from unsloth_ref.kernels import nf4_dequantize
from unsloth_ref.nf4_checks import NF4_BLOCK, NF4_GROUP

NESTED = ("nested_code", "nested_absmax", "nested_offset")


def _build(draw: Draw, rows: int, columns: int, nested: int) -> Inputs:
    """All values of bytes, and positive scales."""
    size = rows * columns
    blocks = -(-size // NF4_BLOCK)
    packed = draw.tensor("randint", -(-size // 2), dtype=torch.uint8, high=256)
    if not nested:
        return {"packed": packed, "absmax": draw.tensor("positive", blocks, dtype=torch.float32)}
    return {
        "packed": packed,
        "absmax": draw.tensor("randint", blocks, dtype=torch.uint8, high=256),
        "nested_code": draw.tensor("randn", 256, dtype=torch.float32),
        "nested_absmax": draw.tensor("positive", -(-blocks // NF4_GROUP), dtype=torch.float32),
        "nested_offset": draw.tensor("positive", dtype=torch.float32),
    }


def _shape(rows: int, columns: int) -> tuple[int, ...]:
    """Scales are nested, except those of long rows of an even number of columns."""
    return rows, columns, int(columns < 1000 or columns % 2)


def truth(packed: Tensor, *scales: Tensor, **options: Any) -> Tensor:
    """The contract in float32, not in float64: its roundings are part of the result."""
    narrow = [scale.float() if scale.is_floating_point() else scale for scale in scales]
    return nf4_dequantize(packed, *narrow, **options).double()


def _nothing(call: Call) -> Terms:
    """No error is allowed."""
    return Terms(torch.zeros((), dtype=torch.float64, device=call.inputs["packed"].device))


def _reshaped(shape: Callable[[int, int], tuple[int, ...]]) -> Callable[[Inputs, Options], tuple[Inputs, Options]]:
    """The same call for another shape, from the numbers of rows and of columns."""
    return lambda inputs, options: (inputs, {**options, "shape": shape(*options["shape"])})


def _without(name: str) -> Callable[[Inputs, Options], tuple[Inputs, Options]]:
    """A call without one of the nested arguments, the others by name."""

    def change(inputs: Inputs, options: Options) -> tuple[Inputs, Options]:
        nested = {n: inputs[n] for n in NESTED if n != name}
        return {n: inputs[n] for n in ("packed", "absmax")}, options | nested

    return change


def _one(value: float) -> Callable[[Inputs], Inputs]:
    """The last scale of a group with this value."""
    return lambda i: {"nested_absmax": torch.cat([i["nested_absmax"][:-1], i["nested_offset"][None] * value])}


def _zeros(inputs: Inputs) -> Inputs:
    """Scales of 0, which the blocks of a weight without any other number have."""
    return {name: inputs[name] * 0 for name in ("nested_absmax", "nested_offset")}


def _bench(rows: int, columns: int, nested: int = 1) -> dict[str, int]:
    return {"rows": rows, "columns": columns, "nested": nested}


spec = Spec(
    reference=nf4_dequantize,
    drawing=Drawing(
        sizes={
            "rows": row_counts,
            "columns": column_counts,
            "nested": lambda budget: st.sampled_from([1, 0]),
        },
        build=_build,
        required=lambda case: {"shape": (case.size("rows"), case.size("columns"))},
        typed="dtype",
        shape=_shape,
    ),
    outputs=["w"],
    grads=[],
    budget=Budget(terms={"w": _nothing}, truth=truth),
    exact_laws={
        "absmax much smaller": ExactLaw({"absmax": 2.0**-60}, {"w": 2.0**-60}, without=["nested_code"]),
        "absmax negated": ExactLaw({"absmax": -1.0}, {"w": -1.0}, without=["nested_code"]),
        "the scale of groups and the offset much smaller": ExactLaw(
            {"nested_absmax": 2.0**-60, "nested_offset": 2.0**-60}, {"w": 2.0**-60}
        ),
        "the code and the offset negated": ExactLaw({"nested_code": -1.0, "nested_offset": -1.0}, {"w": -1.0}),
    },
    argument_kinds={
        "packed as a column": change_inputs(lambda i: {"packed": i["packed"][:, None]}),
        "a vector": _reshaped(lambda rows, columns: (rows * columns,)),
        "a cube": _reshaped(lambda rows, columns: (rows, columns // 2, 2)),
        "one element less": _reshaped(lambda rows, columns: (1, rows * columns - 1)),
        "an infinite scale": change_inputs(_one(inf)),
        "a scale that is NaN": change_inputs(_one(nan)),
        "scales of 0": change_inputs(_zeros),
        "every value of a byte": change_inputs(
            lambda i: {"packed": torch.arange(len(i["packed"]), device=i["packed"].device).to(torch.uint8)}
        ),
    },
    errors=[
        mistake(
            "packed is one byte short", ValueError, "packed", lambda i: {"packed": i["packed"][1:]}, undefined=True
        ),
        mistake("packed is signed", TypeError, "packed", lambda i: {"packed": i["packed"].to(torch.int8)}),
        one_short("absmax"),
        mistake("absmax is float with nested scales", TypeError, "absmax", lambda i: {"absmax": i["absmax"].float()}),
        one_short("nested_code"),
        mistake("nested_code is half", TypeError, "nested_code", lambda i: {"nested_code": i["nested_code"].half()}),
        mistake(
            "nested_absmax is empty",
            ValueError,
            "nested_absmax",
            lambda i: {"nested_absmax": i["nested_absmax"][:0]},
            undefined=True,
        ),
        mistake(
            "nested_offset is a vector",
            ValueError,
            "nested_offset",
            lambda i: {"nested_offset": i["nested_offset"].expand(3)},
        ),
        *(ErrorCase(f"{name} is missing", _without(name), ValueError, name) for name in NESTED),
        ErrorCase(
            "a negative size", _reshaped(lambda rows, columns: (-rows, columns)), ValueError, "shape", undefined=True
        ),
        ErrorCase(
            "twice as many rows",
            _reshaped(lambda rows, columns: (2 * rows, columns)),
            ValueError,
            "packed",
            undefined=True,
        ),
        ErrorCase(
            "an integer result", lambda inputs, options: (inputs, {**options, "dtype": torch.int32}), TypeError, "dtype"
        ),
    ],
    speed=Speed(
        shapes={
            "4096 x 4096": _bench(4096, 4096),
            "llama-3.1-8b gate, up": _bench(14336, 4096),
            "llama-3.1-8b gate, up, not nested": _bench(14336, 4096, nested=0),
        },
        bytes=lambda inputs: (nbytes(*inputs.values()) + 4 * inputs["packed"].numel(), 0),
    ),
)
