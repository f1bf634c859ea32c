"""Float8 numbers in blocks, times their scales."""

import torch
from torch import Tensor

from conformance.case import Case, Draw
from conformance.promises import ExactLaw, Memory
from conformance.spec import (
    Budget,
    Drawing,
    ErrorCase,
    Inputs,
    Options,
    Spec,
    Speed,
    change_inputs,
    mistake,
    nbytes,
)
from conformance.specs._mistakes import one_row_short
from conformance.specs.fp8_quantize import spec as quantize
from unsloth_ref.kernels import fp8_dequantize, fp8_quantize


def quantised(draw: Draw, x: Tensor, block_rows: int) -> tuple[Tensor, Tensor]:
    """The values and scales of a matrix, with the case's layout."""
    values, scale = fp8_quantize(x.float(), block_rows)
    return draw.lay_out(values), draw.lay_out(scale)


def _build(draw: Draw, rows: int, columns: int) -> Inputs:
    """Odd seeds have a block per row."""
    values, scale = quantised(draw, draw.filled(rows, columns), 1 if draw.case.seed % 2 else 128)
    return {"values": values, "scale": scale}


def _every_number(inputs: Inputs) -> Inputs:
    """All 256 of them, NaN included, in two blocks."""
    numbers = torch.arange(256, dtype=torch.uint8, device=inputs["values"].device).view(2, 128)
    return {"values": numbers.view(torch.float8_e4m3fn), "scale": inputs["scale"].new_tensor([[1.0], [0.75]])}


def _truth(values: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The product, not rounded."""
    return fp8_dequantize(values, scale, torch.float64)


def _wrong_dtype(dtype: object) -> ErrorCase:
    def change(inputs: Inputs, options: Options) -> tuple[Inputs, Options]:
        return inputs, {**options, "dtype": dtype}

    return ErrorCase(f"the result in {dtype}", change, TypeError, "dtype")


spec = Spec(
    reference=fp8_dequantize,
    drawing=Drawing(
        sizes=quantize.drawing.sizes,
        build=_build,
        typed="dtype",
        fills=quantize.drawing.fills,
        shape=quantize.drawing.shape,
    ),
    outputs=["x"],
    grads=[],
    budget=Budget(truth=_truth),
    far=["values"],
    exact_laws={"scale much smaller": ExactLaw({"scale": 2.0**-60}, {"x": 2.0**-60})},
    memory=Memory(Case((("rows", 8192), ("columns", 8192))), grads=[]),
    argument_kinds={
        "every number": change_inputs(_every_number),
        "scales of 0": change_inputs(lambda i: {"scale": i["scale"] * 0}),
        "no columns": change_inputs(lambda i: {"values": i["values"][:, :0], "scale": i["scale"][:, :0]}),
        "no rows": change_inputs(lambda i: {"values": i["values"][:0], "scale": i["scale"][:0]}),
    },
    errors=[
        mistake("values are a vector", ValueError, "values", lambda i: {"values": i["values"][0]}, undefined=True),
        mistake("values are bytes", TypeError, "values", lambda i: {"values": i["values"].view(torch.uint8)}),
        one_row_short("scale"),
        mistake("scale would broadcast", ValueError, "scale", lambda i: {"scale": i["scale"][0]}),
        mistake("scale is narrower", TypeError, "scale", lambda i: {"scale": i["scale"].half()}),
        _wrong_dtype(torch.int32),
    ],
    speed=Speed(
        shapes={"llama-3.1-8b gate, up": {"rows": 14336, "columns": 4096}},
        bytes=lambda inputs: (nbytes(inputs["values"], inputs["scale"]) + 2 * inputs["values"].numel(), 0),
    ),
    lacks={"double_backward": "the operation has no gradients"},
)
