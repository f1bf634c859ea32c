"""Numbers as float8 in blocks, each with a scale."""

import torch
from hypothesis import strategies as st
from torch import Tensor

from conformance.case import Case, Draw
from conformance.promises import ExactLaw, Memory
from conformance.spec import Budget, Drawing, Inputs, Spec, Speed, change_inputs, mistake, nbytes, wrong_option
from conformance.specs.grouped_gemm import moderate, moderate_column_counts
from unsloth_ref.kernels import fp8_quantize
from unsloth_ref.kernels.fp8_quantize import spread


def _build(draw: Draw, rows: int, columns: int) -> Inputs:
    return {"x": draw.filled(rows, columns)}


def _truth(x: Tensor, block_rows: int = 128) -> tuple[Tensor, Tensor]:
    """The quotients before they are rounded to e4m3, so that one in the middle of two numbers may become either."""
    _, scale = fp8_quantize(x, block_rows)
    return x / spread(scale.double(), *x.shape), scale.double()


def _bytes(inputs: Inputs) -> tuple[int, int]:
    """x and the values; scales are few."""
    return nbytes(inputs["x"]) + inputs["x"].numel(), 0


spec = Spec(
    reference=fp8_quantize,
    drawing=Drawing(
        sizes={
            "rows": lambda budget: st.one_of(
                st.integers(1, max(1, min(budget, 40))),
                st.sampled_from([127, 129, 260]),
            ),
            "columns": moderate_column_counts,
        },
        build=_build,
        options={"block_rows": [128, 1]},
        fills=["randn", "ones", "zeros", "tiny", "outlier", "graded", "saturated"],
        shape=lambda rows, columns: (rows, moderate(columns)),
    ),
    outputs=["values", "scale"],
    grads=[],
    budget=Budget(truth=_truth),
    rowwise=["x"],
    row_options={"block_rows": 1},
    exact_laws={
        "x twice as large": ExactLaw({"x": 2.0}, {"scale": 2.0}),
        "x negated": ExactLaw({"x": -1.0}, {"values": -1.0}),
    },
    memory=Memory(Case((("rows", 8192), ("columns", 8192))), grads=[]),
    argument_kinds={
        "numbers that the scale of a block rounds to 0": change_inputs(
            lambda i: {"x": torch.where(i["x"] < 0, -1.0, 1.0).to(i["x"]) * 2.0**-120}
        ),
        "no columns": change_inputs(lambda i: {"x": i["x"][:, :0]}),
        "no rows": change_inputs(lambda i: {"x": i["x"][:0]}),
        "a block of zeros beside others": change_inputs(
            lambda i: {"x": torch.cat([torch.zeros_like(i["x"]).repeat(1, 2)[:, :128], i["x"]], 1)}
        ),
    },
    errors=[
        mistake("x is a vector", ValueError, "x", lambda i: {"x": i["x"][0]}, undefined=True),
        mistake("x is integer", TypeError, "x", lambda i: {"x": i["x"].long()}),
        wrong_option("blocks of 64 rows", "block_rows", block_rows=64),
    ],
    speed=Speed(
        shapes={
            "llama-3.1-8b gate, up": {"rows": 14336, "columns": 4096},
            "llama-3.1-8b x": {"rows": 16384, "columns": 4096, "block_rows": 1},
        },
        bytes=_bytes,
    ),
)
