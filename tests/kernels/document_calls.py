"""Calls of operations that carry a state that are refused, and calls at the edge that are not; for test_refusals.py."""

from math import inf
from typing import Any

import torch

BOUNDS = torch.tensor([0, 3], dtype=torch.int32)
# As in test_refusals.py: operation, changes of its arguments, the error, argument, seen, allowed.
BAD: list[tuple[str, dict[str, Any], type[Exception], str, str, str]] = [
    ("causal_conv", {"x": torch.ones(3)}, ValueError, "x", "[3]", "[T, C]"),
    ("causal_conv", {"weight": torch.ones(4, 2)}, ValueError, "weight", "[4, 2]", "[5, W], the C of x, W at least 1"),
    ("causal_conv", {"weight": torch.ones(5, 0)}, ValueError, "weight", "[5, 0]", "W at least 1"),
    ("causal_conv", {"bias": torch.ones(4)}, ValueError, "bias", "[4]", "[5], one entry per column of x"),
    ("causal_conv", {"activation": "relu"}, ValueError, "activation", "'relu'", "None, 'silu'"),
    ("causal_conv", {"cu_seqlens": BOUNDS + 1}, ValueError, "cu_seqlens", "[1, 4]", "from 0 to 3, the T of x"),
    ("causal_conv", {"cu_seqlens": BOUNDS.long()}, TypeError, "cu_seqlens", "torch.int64", "torch.int32"),
    ("gated_delta_rule", {"q": torch.ones(3, 5)}, ValueError, "q", "[3, 5]", "[T, N, D]"),
    ("gated_delta_rule", {"k": torch.ones(3, 1, 4)}, ValueError, "k", "[3, 1, 4]", "[3, 2, 5], the shape of q"),
    ("gated_delta_rule", {"v": torch.ones(2, 2, 8)}, ValueError, "v", "[2, 2, 8]", "[3, M, E], T of q"),
    ("gated_delta_rule", {"v": torch.ones(3, 2, 8).half()}, TypeError, "v", "torch.float16", "torch.float32"),
    ("gated_delta_rule", {"g": torch.ones(3, 3)}, ValueError, "g", "[3, 3]", "[3, 4], T and M of v"),
    ("gated_delta_rule", {"beta": torch.ones(3, 4).int()}, TypeError, "beta", "torch.int32", "torch.bfloat16"),
    ("gated_delta_rule", {"cu_seqlens": BOUNDS - 1}, ValueError, "cu_seqlens", "[-1, 2]", "from 0 to 3, the T of q"),
    ("gated_delta_rule", {"scale": inf}, ValueError, "scale", "inf", "a finite number from 0.0"),
    ("mamba2_scan", {"x": torch.ones(3, 4)}, ValueError, "x", "[3, 4]", "[T, M, E]"),
    ("mamba2_scan", {"x": torch.ones(3, 4, 0)}, ValueError, "x", "[3, 4, 0]", "M and E at least 1"),
    ("mamba2_scan", {"b": torch.ones(3, 2, 5).half()}, TypeError, "b", "torch.float16", "torch.float32"),
    ("mamba2_scan", {"c": torch.ones(3, 2, 4)}, ValueError, "c", "[3, 2, 4]", "[3, 2, 5], the shape of b"),
    ("mamba2_scan", {"dt": torch.ones(3, 3)}, ValueError, "dt", "[3, 3]", "[3, 4], T and M of x"),
    ("mamba2_scan", {"dt": torch.ones(3, 4).int()}, TypeError, "dt", "torch.int32", "torch.bfloat16"),
    ("mamba2_scan", {"a": torch.ones(3, 4)}, ValueError, "a", "[3, 4]", "[4], M of x"),
    ("mamba2_scan", {"d": torch.ones(4).long()}, TypeError, "d", "torch.int64", "torch.bfloat16"),
    ("mamba2_scan", {"cu_seqlens": BOUNDS + 1}, ValueError, "cu_seqlens", "[1, 4]", "from 0 to 3, the T of x"),
]
LIMITS: list[tuple[str, dict[str, Any]]] = [
    ("causal_conv", {"x": torch.ones(0, 5), "cu_seqlens": BOUNDS * 0}),
    ("causal_conv", {"weight": torch.ones(5, 9).half(), "bias": torch.ones(5).bfloat16(), "activation": "silu"}),
    ("gated_delta_rule", {"scale": 0, "g": torch.zeros(3, 4), "beta": torch.zeros(3, 4).half()}),
    ("mamba2_scan", {"dt": torch.zeros(3, 4).half(), "a": torch.zeros(4), "d": torch.zeros(4).bfloat16()}),
]
