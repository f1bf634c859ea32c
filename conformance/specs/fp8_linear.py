"""A linear layer with a float8 weight, whose input is quantised to float8 as well."""

from collections.abc import Callable, Collection

import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import pad

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
    leading_dimensions,
    mistake,
    nbytes,
)
from conformance.specs._mistakes import one_column_short, one_row_short
from conformance.specs.fp8_dequantize import quantised
from conformance.specs.grouped_gemm import moderate, moderate_column_counts
from conformance.tolerances.bounds import Bound, added_in_float32, as_rows, exact, product, total
from unsloth_ref.accuracy import UNIT_FLOAT32
from unsloth_ref.kernels import fp8_linear

TIE = 2.0**-22  # a quotient so close to the middle of two e4m3 numbers, relative to its size, may become either


def _build(draw: Draw, rows: int, out: int, columns: int) -> Inputs:
    """Odd seeds have a bias."""
    x = draw.filled(rows, columns)
    weight, scale = in_float8(draw, out, columns)
    return {"x": x, "weight": weight, "scale": scale} | ({"bias": draw.weight(out)} if draw.case.seed % 2 else {})


def in_float8(draw: Draw, out: int, columns: int) -> tuple[Tensor, Tensor]:
    """The values and scales of a weight whose blocks differ in size; with seed 2 one is zero."""
    matrix = draw.matrix(out, columns)
    sizes = (1 + torch.arange(out) // 128)[:, None] + 2 * (torch.arange(columns) // 128)
    matrix = matrix * sizes.to(matrix)
    if draw.case.seed == 2:
        matrix[:128, :128] = 0
    return quantised(draw, matrix, 128)


def _shape(rows: int, columns: int) -> tuple[int, ...]:
    """An even number of columns is that of x, an odd one that of y."""
    few, columns = 3 + columns % 29, moderate(columns)
    return rows, *((few, columns) if columns % 2 == 0 else (columns, few))


def _of_elements(scale: Tensor, rows: int, columns: int) -> Tensor:
    """The scale of each element, of blocks of 128 columns and of as many rows as scale shows."""
    height = 1 if len(scale) == rows else 128
    row, column = (torch.arange(size, device=scale.device) // b for size, b in ((rows, height), (columns, 128)))
    return scale[row[:, None], column]


def _e4m3(quotient: Tensor) -> Tensor:
    """The nearest numbers with 3 bits of fraction, at least 2^-9 apart."""
    exponent = torch.frexp(quotient).exponent.clamp(min=-5) - 1
    step = 2.0 ** (exponent.double() - 3)
    return (quotient / step).round() * step


def x_after(call: Call) -> Bound:
    """x quantised and back: near the middle of two numbers either is right; then some float32 arithmetic."""
    x = as_rows(call.inputs["x"])
    tiles = pad(x, (0, -x.shape[1] % 128)).unflatten(1, (-1, 128))
    largest = tiles.abs().amax(2) if x.numel() else tiles.new_zeros(tiles.shape[:2])
    scale = torch.where(largest == 0, 1.0, (largest / 448).clamp(min=2.0**-126)).float().double()
    scale = _of_elements(scale, *x.shape)
    value, low, high = (_e4m3(x / scale * factor) * scale for factor in (1.0, 1 - TIE, 1 + TIE))
    either, arithmetic = (high - low).abs(), 4 * UNIT_FLOAT32 * value.abs()
    return _rounded(Bound(value, either + arithmetic, either**2 + (arithmetic / 2) ** 2), call)


def weight_after(call: Call, name: str = "weight") -> Bound:
    """The weight, the input of this name, times its scales, rounded to the dtype of x or not."""
    weight = call.inputs[name].double()
    return _rounded(exact(weight * _of_elements(call.inputs["scale"], *weight.shape)), call)


def _rounded(number: Bound, call: Call) -> Bound:
    return number.rounded(call.unit, call.smallest)


def _y_bound(call: Call) -> Bound:
    """One product, which may be rounded before the bias is added."""
    y = product(x_after(call), weight_after(call).t(), call.elements)
    if "bias" in call.inputs:
        y = _rounded(y, call) + added_in_float32(exact(call.inputs["bias"]), call.elements)
    return y.reshape((*call.inputs["x"].shape[:-1], len(call.inputs["weight"])))


def _x_bound(call: Call) -> Bound:
    """dy times the weight."""
    dy = exact(as_rows(call.grad_outputs[0]))
    return product(dy, weight_after(call), call.elements).reshape(call.inputs["x"].shape)


def _bias_bound(call: Call) -> Bound:
    """The sum of dy over rows."""
    return total(exact(as_rows(call.grad_outputs[0])), call.elements)


def _bytes(inputs: Inputs) -> tuple[int, int]:
    """Forward: x, weight and y. Backward: dy, weight and dx."""
    x, weight = inputs["x"], inputs["weight"]
    moved = nbytes(x, weight, inputs["scale"]) + x[..., 0].numel() * len(weight) * x.element_size()
    return moved, moved


def _flops(inputs: Inputs, options: Options, grads: Collection[str]) -> tuple[int, int]:
    """One product, and one for the gradient of x."""
    work = 2 * inputs["x"][..., 0].numel() * inputs["weight"].numel()
    return work, work * ("x" in grads)


def _bias_error(
    what: str, raises: type[Exception], bias: Callable[[Inputs], Tensor], *, undefined: bool = False
) -> ErrorCase:
    """A wrong bias, in place of none."""

    def change(inputs: Inputs, options: Options) -> tuple[Inputs, Options]:
        return {**inputs, "bias": bias(inputs)}, options

    return ErrorCase(what, change, raises, "bias", undefined)


def _or_whole(any_size: st.SearchStrategy[int], whole: list[int], budget: int) -> st.SearchStrategy[int]:
    """Any size, or one that libraries allow in products of float8 numbers, which may then compute it in another way."""
    return st.one_of(any_size, st.sampled_from([size for size in whole if size <= max(budget, whole[0])]))


def _long(inputs: Inputs) -> Inputs:
    """Columns as many as models have, and rows enough for a statistic: no part of a sum may be rounded to 16 bits.

    x is powers of two and a 7 per block, whose scale is then 2^-6: it is exact in float8, however it is divided. The
    columns repeat, and with them a rounding that may go either way. Sizes are those of the library's product of float8
    numbers, which adds up the terms of a block in fewer bits than float32 has.
    """
    x, weight = inputs["x"].repeat(8, 64), inputs["weight"].repeat(16, 64)
    x = x.sign() * x.abs().log2().round().clamp(-4, 2).exp2()
    x[:, ::128] = 7
    return {
        "x": x,
        "weight": weight,
        "scale": inputs["scale"][:1, :1].repeat(-(-len(weight) // 128), x.shape[1] // 128),
    }


def _working(inputs: Inputs) -> int:
    """x and the weight after they are dequantised; backward the weight alone."""
    return (inputs["x"].numel() + inputs["weight"].numel()) * inputs["x"].element_size()


def _bench(out: int, columns: int, rows: int = 16384) -> dict[str, object]:
    return {"rows": rows, "out": out, "columns": columns, "grads": ("x",)}


spec = Spec(
    reference=fp8_linear,
    drawing=Drawing(
        sizes={
            "rows": lambda budget: _or_whole(st.integers(1, max(1, min(budget, 140))), [4, 16, 128], budget),
            "out": lambda budget: st.sampled_from([1, 2, 8, 16, 33, 64, 127, 128, 129, 256, 260]),
            "columns": lambda budget: _or_whole(moderate_column_counts(budget), [16, 128, 512], budget),
        },
        build=_build,
        fills=["randn", "ones", "zeros", "tiny", "outlier", "wide", "graded"],
        shape=_shape,
    ),
    outputs=["y"],
    grads=["x", "bias"],
    budget=Budget(roundings=1, bounds={"y": _y_bound, "x": _x_bound, "bias": _bias_bound}),
    rowwise=["x"],
    bits_vary=BLAS,
    far=["x", "weight"],
    exact_laws={
        "x twice as large": ExactLaw({"x": 2.0}, {"y": 2.0}, without=["bias"]),
        "x negated": ExactLaw({"x": -1.0}, {"y": -1.0}, without=["bias"]),
        "scale twice as large": ExactLaw({"scale": 2.0}, {"y": 2.0, "x": 2.0}, without=["bias"]),
        "dy four times as large": ExactLaw({}, {"x": 4.0, "bias": 4.0}, grad_outputs=4.0),
    },
    memory=Memory(Case((("rows", 16384), ("out", 4096), ("columns", 2048))), grads=["x"], working=_working),
    argument_kinds=leading_dimensions("x")
    | {
        "a long row": change_inputs(_long),
        "a bias": change_inputs(lambda i: {"bias": torch.linspace(-2, 3, len(i["weight"])).to(i["x"])}),
        "no columns but a bias": change_inputs(
            lambda i: {n: i[n][..., :0] for n in ("x", "weight", "scale")}
            | {"bias": torch.linspace(-2, 3, len(i["weight"])).to(i["x"])}
        ),
        "no output": change_inputs(lambda i: {n: i[n][:0] for n in ("weight", "scale")}),
        "no rows": change_inputs(lambda i: {"x": i["x"][:0]}),
    },
    errors=[
        one_column_short("weight"),
        mistake("weight is a vector", ValueError, "weight", lambda i: {"weight": i["weight"][0]}),
        mistake("weight is not quantised", TypeError, "weight", lambda i: {"weight": i["weight"].to(i["x"].dtype)}),
        one_row_short("scale"),
        mistake("scale would broadcast", ValueError, "scale", lambda i: {"scale": i["scale"][0]}),
        mistake("scale is narrower", TypeError, "scale", lambda i: {"scale": i["scale"].bfloat16()}),
        mistake("x has no dimension", ValueError, "x", lambda i: {"x": i["x"][0, 0]}, undefined=True),
        mistake("x is integer", TypeError, "x", lambda i: {"x": i["x"].long()}),
        _bias_error("bias is one short", ValueError, lambda i: i["x"].new_ones(len(i["weight"]) - 1), undefined=True),
        _bias_error("bias is wider than x", TypeError, lambda i: i["x"].new_ones(len(i["weight"])).double()),
    ],
    speed=Speed(
        shapes={
            "llama-3.2-1b q, o": _bench(2048, 2048),
            "llama-3.2-1b gate, up": _bench(8192, 2048),
            "llama-3.1-8b gate, up": _bench(14336, 4096),
            "llama-3.1-8b down": _bench(4096, 14336),
            "llama-3.1-8b gate, up, few": _bench(14336, 4096, 2048),
            "llama-3.1-8b gate, up, one row": _bench(14336, 4096, 1),
        },
        bytes=_bytes,
        flops=_flops,
    ),
)
