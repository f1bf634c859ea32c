"""Calls of the float8 operations that are refused, and calls at the edge that are not; for test_refusals.py."""

from typing import Any

import torch

from unsloth_ref.types import Float8Weight

FLOAT8 = torch.ones(2, 3).to(torch.float8_e4m3fn)
WEIGHT = Float8Weight(torch.ones(5, 8).to(torch.float8_e4m3fn), torch.ones(1, 1))
# As in test_refusals.py: operation, changes of its arguments, the error, argument, seen, allowed.
BAD: list[tuple[str, dict[str, Any], type[Exception], str, str, str]] = [
    ("fp8_quantize", {"x": torch.ones(5)}, ValueError, "x", "[5]", "[O, I]"),
    ("fp8_quantize", {"x": torch.ones(3, 5).int()}, TypeError, "x", "torch.int32", "torch.float16"),
    ("fp8_quantize", {"block_rows": 64}, ValueError, "block_rows", "64", "1, 128"),
    ("fp8_dequantize", {"values": torch.ones(3, 5)}, TypeError, "values", "torch.float32", "torch.float8_e4m3fn"),
    ("fp8_dequantize", {"scale": torch.ones(2, 1)}, ValueError, "scale", "[2, 1]", "[1, 1] or [3, 1], one entry per"),
    ("fp8_dequantize", {"scale": torch.ones(1, 1).half()}, TypeError, "scale", "torch.float16", "torch.float32"),
    ("fp8_dequantize", {"dtype": torch.int8}, TypeError, "dtype", "torch.int8", "torch.bfloat16"),
    ("fp8_linear", {"x": torch.tensor(1.0)}, ValueError, "x", "a 0-dimensional tensor", "at least one dimension"),
    ("fp8_linear", {"weight": FLOAT8}, ValueError, "weight", "[2, 3]", "[2, 8], [O, I], the last dimension"),
    ("fp8_linear", {"weight": torch.ones(5, 8)}, TypeError, "weight", "torch.float32", "torch.float8_e4m3fn"),
    ("fp8_linear", {"scale": torch.ones(1)}, ValueError, "scale", "[1]", "[1, 1], one entry per block of 128 x 128"),
    ("fp8_linear", {"scale": torch.ones(1, 1).requires_grad_()}, ValueError, "scale", "requires", "a constant"),
    ("fp8_linear", {"bias": torch.ones(7)}, ValueError, "bias", "[7]", "[5], one entry per row of weight"),
    (
        "lora_linear",
        {"weight": WEIGHT._replace(values=FLOAT8)},
        ValueError,
        "weight",
        "[2, 3]",
        "[2, 8], [O, I], the last",
    ),
    ("lora_linear", {"weight": WEIGHT._replace(values=FLOAT8[0])}, ValueError, "weight", "[3]", "[O, I]"),
    (
        "lora_linear",
        {"weight": WEIGHT._replace(values=torch.ones(5, 8))},
        TypeError,
        "weight",
        "torch.float32",
        "torch.float8_e4m3fn",
    ),
    (
        "lora_linear",
        {"weight": WEIGHT._replace(scale=torch.ones(1, 1).requires_grad_())},
        ValueError,
        "scale",
        "requires",
        "a constant",
    ),
    (
        "lora_linears",
        {"weight": [WEIGHT, WEIGHT, WEIGHT._replace(scale=torch.ones(2, 1))], "lora_b": [torch.ones(5, 2)] * 3},
        ValueError,
        "scale[2]",
        "[2, 1]",
        "[1, 1], one entry per block of 128 x 128 of weight[2]",
    ),
    ("lora_linears", {"weight": WEIGHT}, ValueError, "weight", "a Float8Weight", "a list of at least 1 layer"),
    ("lora_mlp", {"weight": WEIGHT}, ValueError, "weight", "a Float8Weight", "3, one each for gate, up, down"),
]
LIMITS: list[tuple[str, dict[str, Any]]] = [
    ("fp8_quantize", {"x": torch.ones(0, 5).half(), "block_rows": 1}),
    ("fp8_dequantize", {"scale": torch.ones(3, 1)}),
    ("fp8_linear", {"x": torch.ones(0, 8)}),
    ("lora_linear", {"x": torch.ones(0, 8), "weight": WEIGHT}),
]
