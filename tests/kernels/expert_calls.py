"""Calls of the operations of experts that are refused, and calls at the edge that are not; for test_refusals.py."""

from typing import Any

import torch

# As in test_refusals.py: operation, changes of its arguments, the error, argument, seen, allowed.
BAD: list[tuple[str, dict[str, Any], type[Exception], str, str, str]] = [
    ("grouped_gemm", {"x": torch.ones(3)}, ValueError, "x", "[3]", "[T, H]"),
    ("grouped_gemm", {"weight": torch.ones(4, 5)}, ValueError, "weight", "[4, 5]", "[E, O, H]"),
    ("grouped_gemm", {"weight": torch.ones(0, 5, 8)}, ValueError, "weight", "[0, 5, 8]", "E at least 1"),
    ("grouped_gemm", {"group_sizes": torch.tensor([3])}, ValueError, "group_sizes", "[1]", "one size per matrix"),
    ("grouped_gemm", {"group_sizes": torch.ones(4)}, TypeError, "group_sizes", "torch.float32", "torch.int64"),
    ("moe_mlp", {"activation": "relu"}, ValueError, "activation", "'relu'", "'silu', 'gelu_tanh'"),
    ("moe_mlp", {"gate_up": torch.ones(4, 3, 8)}, ValueError, "gate_up", "[4, 3, 8]", "[E, 2F, 8]"),
    ("moe_mlp", {"down": torch.ones(4, 5, 8)}, ValueError, "down", "[4, 5, 8]", "those of gate_up"),
    ("moe_mlp", {"expert_indices": torch.zeros(3, 0).long()}, ValueError, "expert_indices", "[3, 0]", "k at least 1"),
    ("moe_mlp", {"expert_indices": torch.full((3, 2), 4)}, ValueError, "expert_indices", "4 at index (0, 0)", "0 to 3"),
    ("moe_mlp", {"expert_weights": torch.ones(3, 1)}, ValueError, "expert_weights", "[3, 1]", "of expert_indices"),
    ("moe_mlp", {"expert_weights": torch.ones(3, 2).half()}, TypeError, "expert_weights", "torch.float16", "float32"),
    ("moe_mlp", {"gate_up_bias": torch.ones(4, 5)}, ValueError, "gate_up_bias", "[4, 5]", "row of its matrices"),
    ("moe_mlp", {"down_bias": torch.ones(4)}, ValueError, "down_bias", "[4]", "[4, 8]"),
    ("moe_mlp", {"alpha": 1.702, "activation": "gelu_tanh"}, ValueError, "alpha", "1.702", "with 'silu', or 1.0"),
]
LIMITS: list[tuple[str, dict[str, Any]]] = [
    ("grouped_gemm", {"x": torch.ones(0, 8), "group_sizes": torch.zeros(4, dtype=torch.int32)}),
    ("moe_mlp", {"expert_indices": torch.full((3, 2), 3, dtype=torch.int32)}),
    ("moe_mlp", {"gate_up_bias": None, "limit": 0.0, "alpha": 0.0, "offset": -1.0}),
]
