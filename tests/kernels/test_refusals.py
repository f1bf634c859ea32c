"""Both backends refuse the same mistakes: the error names the argument, the value seen and the values allowed."""

import re
from importlib import import_module
from math import inf, nan
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_map_only

from conformance.calling import grouped, placed
from conformance.spec import ErrorCase, Spec
from conformance.specs import specs
from tests.kernels import document_calls, expert_calls, float8_calls
from tests.operations.calls import DEVICE
from tests.operations.lora_linear import nf4_weight
from unsloth_ref import checks

BACKENDS = ["unsloth_ref.kernels", "unsloth_fast.kernels"]
MISTAKES = [(spec, mistake) for spec in specs().values() for mistake in spec.errors]
CASES = {spec.op: spec.case(3, 5) for spec in specs().values()}
CASES |= {op: specs()[op].case(3, 8) for op in ("grouped_gemm", "moe_mlp")}
for name in ("rope", "qk_norm_rope"):
    CASES[name] = specs()[name].parse("batch=2 heads=3 kv_heads=1 length=4 rotary=6 rest=0 table=0 seed=1")
GOOD = {
    op: grouped(specs()[op].inputs(case, torch.float32, "cpu")) | specs()[op].required(case, torch.float32)
    for op, case in CASES.items()
}
GOOD["cross_entropy"]["labels"] = torch.tensor([0, -100, 4])
TABLE = {"cos": torch.ones(9, 6), "sin": torch.ones(9, 6), "positions": torch.full((2, 4), 8)}
NOT_NESTED: dict[str, Any] = dict.fromkeys(("nested_code", "nested_absmax", "nested_offset"))
# Operation, changes of its arguments, the error, and the parts of its message: argument, seen, allowed.
BAD = [
    *float8_calls.BAD,
    *document_calls.BAD,
    *expert_calls.BAD,
    ("rms_norm", {"x": torch.tensor(1.0)}, ValueError, "x", "a 0-dimensional tensor", "at least one dimension"),
    ("rms_norm", {"x": torch.ones(3, 5).long()}, TypeError, "x", "torch.int64", "torch.bfloat16"),
    ("rms_norm", {"x": torch.ones(3, 5).bool()}, TypeError, "x", "torch.bool", "torch.float32"),
    ("rms_norm", {"weight": torch.ones(5).int()}, TypeError, "weight", "torch.int32", "torch.float16"),
    ("rms_norm", {"weight": torch.ones(6)}, ValueError, "weight", "[6]", "[5], one entry per column of x"),
    ("rms_norm", {"weight": torch.ones(1)}, ValueError, "weight", "[1]", "[5]"),
    ("rms_norm", {"weight": torch.ones(1, 5)}, ValueError, "weight", "[1, 5]", "[5]"),
    ("rms_norm", {"weight": torch.ones(5, device="meta")}, ValueError, "weight", "meta", "cpu, where x is"),
    ("rms_norm", {"eps": -1e-6}, ValueError, "eps", "-1e-06", "from 0.0"),
    ("rms_norm", {"eps": nan}, ValueError, "eps", "nan", "from 0.0"),
    ("rms_norm", {"eps": inf}, ValueError, "eps", "inf", "a finite number from 0.0"),
    ("rms_norm", {"casting": "qwen"}, ValueError, "casting", "'qwen'", "'llama', 'gemma'"),
    ("add_rms_norm", {"x": torch.tensor(1.0)}, ValueError, "x", "a 0-dimensional tensor", "at least one dimension"),
    ("add_rms_norm", {"x": torch.ones(3, 5).long()}, TypeError, "x", "torch.int64", "torch.bfloat16"),
    ("add_rms_norm", {"residual": torch.ones(3, 4)}, ValueError, "residual", "[3, 4]", "[3, 5], the shape of x"),
    ("add_rms_norm", {"residual": torch.ones(1, 5)}, ValueError, "residual", "[1, 5]", "[3, 5], the shape of x"),
    ("add_rms_norm", {"residual": torch.ones(3, 5).half()}, TypeError, "residual", "torch.float16", "torch.float32"),
    ("add_rms_norm", {"residual": torch.ones(3, 5, device="meta")}, ValueError, "residual", "meta", "cpu, where x is"),
    ("add_rms_norm", {"weight": torch.ones(6)}, ValueError, "weight", "[6]", "[5], one entry per column of x"),
    ("add_rms_norm", {"weight": torch.ones(5, device="meta")}, ValueError, "weight", "meta", "cpu, where x is"),
    ("add_rms_norm", {"eps": -1e-6}, ValueError, "eps", "-1e-06", "from 0.0"),
    ("add_rms_norm", {"casting": "qwen"}, ValueError, "casting", "'qwen'", "'llama', 'gemma'"),
    ("layer_norm", {"x": torch.tensor(1.0)}, ValueError, "x", "a 0-dimensional tensor", "at least one dimension"),
    ("layer_norm", {"x": torch.ones(3, 5).bool()}, TypeError, "x", "torch.bool", "torch.float32"),
    ("layer_norm", {"weight": torch.ones(5, 1)}, ValueError, "weight", "[5, 1]", "[5], one entry per column of x"),
    ("layer_norm", {"weight": torch.ones(5).int()}, TypeError, "weight", "torch.int32", "torch.float16"),
    ("layer_norm", {"bias": torch.ones(5).int()}, TypeError, "bias", "torch.int32", "torch.float16"),
    ("layer_norm", {"bias": torch.ones(4)}, ValueError, "bias", "[4]", "[5], one entry per column of x"),
    ("layer_norm", {"bias": torch.ones(1)}, ValueError, "bias", "[1]", "[5]"),
    ("layer_norm", {"bias": torch.ones(5, device="meta")}, ValueError, "bias", "meta", "cpu, where x is"),
    ("layer_norm", {"eps": inf}, ValueError, "eps", "inf", "a finite number from 0.0"),
    ("swiglu", {"gate": torch.tensor(1.0)}, ValueError, "gate", "a 0-dimensional tensor", "at least one dimension"),
    ("swiglu", {"gate": torch.ones(3, 5).long()}, TypeError, "gate", "torch.int64", "torch.float32"),
    ("swiglu", {"up": torch.ones(3, 4)}, ValueError, "up", "[3, 4]", "[3, 5], the shape of gate"),
    ("swiglu", {"up": torch.ones(1, 5)}, ValueError, "up", "[1, 5]", "[3, 5], the shape of gate"),
    ("swiglu", {"up": torch.ones(3, 5).half()}, TypeError, "up", "torch.float16", "torch.float32"),
    ("swiglu", {"up": torch.ones(3, 5, device="meta")}, ValueError, "up", "meta", "cpu, where gate is"),
    ("geglu", {"gate": torch.tensor(1.0)}, ValueError, "gate", "a 0-dimensional tensor", "at least one dimension"),
    ("geglu", {"gate": torch.ones(3, 5).long()}, TypeError, "gate", "torch.int64", "torch.float32"),
    ("geglu", {"up": torch.ones(3, 4)}, ValueError, "up", "[3, 4]", "[3, 5], the shape of gate"),
    ("geglu", {"up": torch.ones(3, 5).half()}, TypeError, "up", "torch.float16", "torch.float32"),
    ("geglu", {"approximate": "erf"}, ValueError, "approximate", "'erf'", "'none', 'tanh'"),
    (
        "fused_swiglu",
        {"gate_up": torch.tensor(1.0)},
        ValueError,
        "gate_up",
        "a 0-dimensional",
        "at least one dimension",
    ),
    ("fused_swiglu", {"gate_up": torch.ones(3, 5)}, ValueError, "gate_up", "[3, 5]", "[..., 2F], an even number"),
    ("fused_swiglu", {"gate_up": torch.ones(3, 6).int()}, TypeError, "gate_up", "torch.int32", "torch.float16"),
    ("fused_swiglu", {"alpha": -1.0}, ValueError, "alpha", "-1.0", "a finite number from 0.0"),
    ("fused_swiglu", {"limit": nan}, ValueError, "limit", "nan", "a finite number from 0.0"),
    ("fused_swiglu", {"offset": inf}, ValueError, "offset", "inf", "a finite number"),
    ("gated_rms_norm", {"gate": torch.ones(3, 4)}, ValueError, "gate", "[3, 4]", "[3, 5], the shape of x"),
    ("gated_rms_norm", {"gate": torch.ones(3, 5).half()}, TypeError, "gate", "torch.float16", "torch.float32"),
    ("gated_rms_norm", {"weight": torch.ones(6)}, ValueError, "weight", "[6]", "[5], one entry per column of x"),
    ("gated_rms_norm", {"eps": nan}, ValueError, "eps", "nan", "from 0.0"),
    ("gated_rms_norm", {"group_size": 2}, ValueError, "group_size", "2", "a divisor of 5, the H of x"),
    ("gated_rms_norm", {"casting": "qwen"}, ValueError, "casting", "'qwen'", "'llama', 'gemma'"),
    ("relu_squared", {"x": torch.tensor(1.0)}, ValueError, "x", "a 0-dimensional tensor", "at least one dimension"),
    ("relu_squared", {"x": torch.ones(3, 5).int()}, TypeError, "x", "torch.int32", "torch.float16"),
    ("rope", {"q": torch.ones(3, 4, 6)}, ValueError, "q", "[3, 4, 6]", "[B, N, S, D]"),
    ("rope", {"q": torch.ones(2, 3, 4, 6).int()}, TypeError, "q", "torch.int32", "torch.bfloat16"),
    ("rope", {"k": torch.ones(4, 6)}, ValueError, "k", "[4, 6]", "[B, K, S, D]"),
    ("rope", {"k": torch.ones(2, 1, 5, 6)}, ValueError, "k", "[2, 1, 5, 6]", "[2, 1, 4, 6]"),
    ("rope", {"k": torch.ones(1, 1, 4, 6)}, ValueError, "k", "[1, 1, 4, 6]", "[2, 1, 4, 6]"),
    ("rope", {"k": torch.ones(2, 1, 4, 6).half()}, TypeError, "k", "torch.float16", "torch.float32"),
    ("rope", {"k": torch.ones(2, 1, 4, 6, device="meta")}, ValueError, "k", "meta", "cpu, where q is"),
    ("rope", {"cos": torch.ones(4, 6)}, ValueError, "cos", "[4, 6]", "[B or 1, S, D'], or a table"),
    ("rope", {"cos": torch.ones(3, 4, 6)}, ValueError, "cos", "[3, 4, 6]", "[2 or 1, 4, D']"),
    ("rope", {"cos": torch.ones(2, 5, 6)}, ValueError, "cos", "[2, 5, 6]", "[2 or 1, 4, D']"),
    ("rope", {"cos": torch.ones(2, 4, 5)}, ValueError, "cos", "5 columns", "an even number from 2 to 6"),
    ("rope", {"cos": torch.ones(2, 4, 8)}, ValueError, "cos", "8 columns", "an even number from 2 to 6"),
    ("rope", {"cos": torch.ones(2, 4, 0)}, ValueError, "cos", "0 columns", "an even number from 2 to 6"),
    ("rope", {"cos": torch.ones(2, 4, 6).half()}, TypeError, "cos", "torch.float16", "torch.float32"),
    ("rope", {"cos": torch.ones(2, 4, 6, device="meta")}, ValueError, "cos", "meta", "cpu, where q is"),
    ("rope", {"cos": torch.ones(2, 4, 6, requires_grad=True)}, ValueError, "cos", "requires a gradient", "a constant"),
    ("rope", {"sin": torch.ones(1, 4, 6)}, ValueError, "sin", "[1, 4, 6]", "[2, 4, 6], the shape of cos"),
    ("rope", {"sin": torch.ones(2, 4, 6).half()}, TypeError, "sin", "torch.float16", "torch.float32"),
    ("rope", {"sin": torch.ones(2, 4, 6, requires_grad=True)}, ValueError, "sin", "requires a gradient", "a constant"),
    (
        "rope",
        {"positions": torch.zeros(2, 4).long()},
        ValueError,
        "cos",
        "[2, 4, 6]",
        "a table [P, D'], with positions",
    ),
    ("rope", TABLE | {"positions": torch.zeros(4).long()}, ValueError, "positions", "[4]", "[B or 1, S]"),
    ("rope", TABLE | {"positions": torch.zeros(2, 3).long()}, ValueError, "positions", "[2, 3]", "[2 or 1, 4]"),
    ("rope", TABLE | {"positions": torch.zeros(2, 4)}, TypeError, "positions", "torch.float32", "torch.int64"),
    ("rope", TABLE | {"positions": torch.full((1, 4), 9)}, ValueError, "positions", "9 at index (0, 0)", "0 to 8"),
    ("rope", TABLE | {"positions": torch.full((2, 4), -1)}, ValueError, "positions", "-1 at index (0, 0)", "0 to 8"),
    (
        "mamba2_scan",
        {"b": torch.ones(3, 3, 5)},
        ValueError,
        "b",
        "[3, 3, 5]",
        "[3, N, D], T of x, with an N that divides",
    ),
    ("qk_norm_rope", {"k": torch.ones(2, 1, 5, 6)}, ValueError, "k", "[2, 1, 5, 6]", "[2, 1, 4, 6]"),
    ("qk_norm_rope", {"q_weight": torch.ones(5)}, ValueError, "q_weight", "[5]", "[6], one entry per column of q"),
    ("qk_norm_rope", {"k_weight": torch.ones(6).int()}, TypeError, "k_weight", "torch.int32", "torch.float16"),
    ("qk_norm_rope", {"eps": -1.0}, ValueError, "eps", "-1.0", "from 0.0"),
    ("qk_norm_rope", {"casting": "qwen"}, ValueError, "casting", "'qwen'", "'llama', 'gemma'"),
    ("qk_norm_rope", TABLE | {"positions": torch.full((1, 4), 9)}, ValueError, "positions", "9 at index", "0 to 8"),
    ("lora_linear", {"weight": nf4_weight(5, 6)}, ValueError, "weight", "[5, 6]", "[5, 8], [O, I], the last dimension"),
    ("lora_linear", {"weight": nf4_weight(99, 8)}, ValueError, "lora_b", "[5, 2]", "[99, 2]"),
    (
        "lora_linear",
        {"weight": nf4_weight(5, 8)._replace(packed=torch.ones(9).byte())},
        ValueError,
        "packed",
        "9 elements",
        "20 elements, two of shape [5, 8] each",
    ),
    (
        "nf4_dequantize",
        {"packed": torch.ones(7).byte()},
        ValueError,
        "packed",
        "7 elements",
        "8 elements, two of shape",
    ),
    ("nf4_dequantize", {"packed": torch.ones(8).int()}, TypeError, "packed", "torch.int32", "torch.uint8"),
    ("nf4_dequantize", {"absmax": torch.ones(2).byte()}, ValueError, "absmax", "[2]", "[1], one per 64 elements"),
    ("nf4_dequantize", {"absmax": torch.ones(1)}, TypeError, "absmax", "torch.float32", "torch.uint8"),
    ("nf4_dequantize", {"nested_code": torch.ones(16)}, ValueError, "nested_code", "[16]", "[256], one per value"),
    (
        "nf4_dequantize",
        {"nested_absmax": None},
        ValueError,
        "nested_absmax",
        "None with nested_code",
        "or none of them",
    ),
    ("nf4_dequantize", {"nested_absmax": torch.ones(2)}, ValueError, "nested_absmax", "[2]", "[1], one per 256 blocks"),
    ("nf4_dequantize", {"nested_offset": torch.ones(1)}, ValueError, "nested_offset", "[1]", "[], a single number"),
    ("nf4_dequantize", {"shape": (3, -5)}, ValueError, "shape", "[3, -5]", "sizes from 0"),
    ("nf4_dequantize", {"shape": (3, 6)}, ValueError, "packed", "8 elements", "9 elements, two of shape [3, 6]"),
    ("nf4_dequantize", {"dtype": torch.int8}, TypeError, "dtype", "torch.int8", "torch.bfloat16"),
    ("cross_entropy", {"logits": torch.ones(5)}, ValueError, "logits", "[5]", "[T, V]"),
    ("cross_entropy", {"logits": torch.ones(1, 3, 5)}, ValueError, "logits", "[1, 3, 5]", "[T, V]"),
    ("cross_entropy", {"logits": torch.ones(3, 0)}, ValueError, "logits", "[3, 0]", "V at least 1"),
    ("cross_entropy", {"logits": torch.ones(3, 5).int()}, TypeError, "logits", "torch.int32", "torch.float64"),
    (
        "cross_entropy",
        {"labels": torch.zeros(2).long()},
        ValueError,
        "labels",
        "[2]",
        "[3], one label per row of logits",
    ),
    ("cross_entropy", {"labels": torch.zeros(3, 1).long()}, ValueError, "labels", "[3, 1]", "[3]"),
    ("cross_entropy", {"labels": torch.zeros(3)}, TypeError, "labels", "torch.float32", "torch.int32, torch.int64"),
    ("cross_entropy", {"labels": torch.zeros(3).byte()}, TypeError, "labels", "torch.uint8", "torch.int32"),
    (
        "cross_entropy",
        {"labels": torch.zeros(3, device="meta").long()},
        ValueError,
        "labels",
        "meta",
        "cpu, where logits is",
    ),
    ("cross_entropy", {"labels": torch.tensor([0, 1, 5])}, ValueError, "labels", "5 at index 2", "0 to 4"),
    ("cross_entropy", {"labels": torch.tensor([0, -1, 9])}, ValueError, "labels", "-1 at index 1", "ignore_index -100"),
    ("cross_entropy", {"ignore_index": -1}, ValueError, "labels", "-100 at index 1", "ignore_index -1"),
    ("cross_entropy", {"softcap": -30.0}, ValueError, "softcap", "-30.0", "from 0.0"),
    ("cross_entropy", {"softcap": inf}, ValueError, "softcap", "inf", "a finite number from 0.0"),
    ("cross_entropy", {"label_smoothing": -0.1}, ValueError, "label_smoothing", "-0.1", "from 0.0 to 1.0"),
    ("cross_entropy", {"label_smoothing": 1.1}, ValueError, "label_smoothing", "1.1", "from 0.0 to 1.0"),
    ("cross_entropy", {"z_loss": -1e-4}, ValueError, "z_loss", "-0.0001", "from 0.0"),
    ("cross_entropy", {"reduction": "avg"}, ValueError, "reduction", "'avg'", "'mean', 'sum', 'none'"),
    ("cross_entropy", {"num_items": -1}, ValueError, "num_items", "-1", "from 0"),
    ("cross_entropy", {"num_items": nan}, ValueError, "num_items", "nan", "from 0"),
    ("cross_entropy", {"num_items": torch.ones(2)}, ValueError, "num_items", "[2]", "0-dimensional"),
    ("cross_entropy", {"num_items": 4, "reduction": "none"}, ValueError, "num_items", "4", "with 'mean' or 'sum'"),
    (
        "grouped_gemm",
        {"group_sizes": torch.tensor([4, -1, 0, 0])},
        ValueError,
        "group_sizes",
        "[4, -1, 0, 0]",
        "sizes from 0 that add up to 3, the T of x",
    ),
    (
        "lora_linears",
        {"weight": nf4_weight(2, 8)},
        ValueError,
        "weight",
        "an NF4Weight",
        "a list of at least 1 layer",
    ),
    ("lora_linears", {"weight": [nf4_weight(9, 8)] * 3}, ValueError, "lora_b[0]", "[5, 2]", "[9, 2], [O, R], the rows"),
    ("lora_linears", {"weight": []}, ValueError, "weight", "0 layers", "a list of at least 1 layer"),
    ("lora_linears", {"lora_a": [torch.ones(2, 8)]}, ValueError, "lora_a", "1 layer", "3, one per weight"),
    ("lora_linears", {"scaling": (1.0, 2.0)}, ValueError, "scaling", "2 layers", "3, one per weight"),
    ("lora_linears", {"bias": [None, torch.ones(4), None]}, ValueError, "bias[1]", "[4]", "[8], one entry per row of"),
    ("lora_linears", {"lora_b": [torch.ones(5, 1)] * 3}, ValueError, "lora_b[0]", "[5, 1]", "[5, 2], [O, R], the rows"),
    ("lora_mlp", {"weight": nf4_weight(8, 8)}, ValueError, "weight", "an NF4Weight", "3, one each for gate, up, down"),
    ("lora_mlp", {"activation": "relu"}, ValueError, "activation", "'relu'", "'silu', 'gelu', 'gelu_tanh'"),
    ("lora_mlp", {"bias": [None, torch.ones(2), None]}, ValueError, "bias[1]", "[2]", "one entry per row of weight[1]"),
]
NAMES = [f"{operation}: {argument} {seen}" for operation, _, _, argument, seen, _ in BAD]
LIMITS = [
    *float8_calls.LIMITS,
    *document_calls.LIMITS,
    *expert_calls.LIMITS,
    ("rms_norm", {"eps": 0}),
    ("rms_norm", {"weight": torch.ones(5).half()}),
    ("add_rms_norm", {"eps": 0, "weight": torch.ones(5).half()}),
    ("layer_norm", {"weight": torch.ones(5).half(), "bias": torch.ones(5).bfloat16()}),
    ("swiglu", {"gate": torch.ones(0), "up": torch.ones(0)}),
    ("geglu", {"gate": torch.ones(0), "up": torch.ones(0)}),
    ("geglu", {"approximate": "tanh"}),
    ("fused_swiglu", {"gate_up": torch.ones(0), "alpha": 0.0, "limit": 0.0, "offset": -1.0}),
    ("gated_rms_norm", {"group_size": 1, "norm_before_gate": False}),
    ("gated_rms_norm", {"group_size": None, "weight": torch.ones(5).half(), "eps": 0}),
    ("relu_squared", {"x": torch.ones(0)}),
    ("rope", {"cos": torch.ones(1, 4, 2), "sin": torch.ones(1, 4, 2)}),
    ("rope", TABLE),
    ("rope", TABLE | {"positions": torch.zeros(1, 4, dtype=torch.int32)}),
    ("rope", TABLE | {"interleaved": True}),
    ("rope", {"q": torch.ones(2, 0, 4, 6)}),
    ("rope", {"q": torch.ones(2, 3, 4, 6).half(), "k": torch.ones(2, 3, 4, 6).half()}),
    ("qk_norm_rope", {"q": torch.ones(2, 0, 4, 6), "cos": torch.ones(1, 4, 2), "sin": torch.ones(1, 4, 2)}),
    ("qk_norm_rope", TABLE | {"q_weight": torch.ones(6).half(), "eps": 0}),
    ("lora_linears", {"scaling": (0, 1, 2.0), "bias": [None, torch.ones(8), None]}),
    ("lora_mlp", {"scaling": [0, 1, 2.0], "activation": "gelu", "bias": [None, None, None]}),
    ("nf4_dequantize", {"packed": torch.ones(8, 1).byte(), "shape": (16,), "dtype": torch.float16}),
    ("nf4_dequantize", NOT_NESTED | {"absmax": torch.ones(1)}),
    ("nf4_dequantize", NOT_NESTED | {"packed": torch.ones(0).byte(), "absmax": torch.ones(0), "shape": (0, 7)}),
    ("cross_entropy", {"softcap": 0, "label_smoothing": 0, "z_loss": 0}),
    ("cross_entropy", {"label_smoothing": 1}),
    ("cross_entropy", {"num_items": 0}),
    ("cross_entropy", {"num_items": torch.tensor(3.0)}),
    ("cross_entropy", {"labels": torch.tensor([0, 4, -100], dtype=torch.int32)}),
    ("cross_entropy", {"labels": torch.tensor([0, 4, 7]), "ignore_index": 7}),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("spec", "mistake"), MISTAKES, ids=[f"{spec.op}-{mistake.what}" for spec, mistake in MISTAKES])
def test_mistakes_of_the_specs_are_refused(spec: Spec, mistake: ErrorCase, backend: str) -> None:
    """The error has the contract's type, and a message that names the argument."""
    case = spec.case(3, 8)
    inputs, options = mistake.change(spec.inputs(case, torch.float32, "cpu"), spec.required(case, torch.float32))
    positional, by_name = placed(spec.reference, inputs)
    with pytest.raises(mistake.raises, match=rf"^{re.escape(mistake.names)}: got .*; allowed: "):
        getattr(import_module(backend), spec.op)(*positional, **by_name, **options)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("operation", "changes", "error", "argument", "seen", "allowed"), BAD, ids=NAMES)
def test_a_message_names_the_argument_and_the_values_seen_and_allowed(
    backend: str,
    operation: str,
    changes: dict[str, Any],
    error: type[Exception],
    argument: str,
    seen: str,
    allowed: str,
) -> None:
    message = f"^{re.escape(argument)}: got .*{re.escape(seen)}.*; allowed: .*{re.escape(allowed)}"
    with pytest.raises(error, match=message) as raised:
        getattr(import_module(backend), operation)(**GOOD[operation] | changes)
    assert raised.type is error


@pytest.mark.parametrize(("operation", "changes"), [case[:2] for case in BAD], ids=NAMES)
def test_both_backends_raise_the_same_message(operation: str, changes: dict[str, Any]) -> None:
    messages = []
    for backend in BACKENDS:
        with pytest.raises((TypeError, ValueError)) as raised:
            getattr(import_module(backend), operation)(**GOOD[operation] | changes)
        messages.append(str(raised.value))
    assert messages[0] == messages[1]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("operation", "changes"), [*LIMITS, *((op, {}) for op in GOOD)], ids=str)
def test_limits_are_allowed(backend: str, operation: str, changes: dict[str, Any]) -> None:
    """The first and last allowed values give a finite result; so do the arguments that the mistakes above change."""
    # compiled kernels need a CUDA tensor
    arguments = tree_map_only(torch.Tensor, lambda tensor: tensor.to(DEVICE), GOOD[operation] | changes)
    found = getattr(import_module(backend), operation)(**arguments)
    assert all(output.float().isfinite().all() for output in (found if isinstance(found, tuple) else (found,)))


def test_values_are_checked_where_reading_them_does_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are checked on a CPU always; elsewhere ("meta" stands for a GPU) only if UNSLOTH_DEBUG is 1."""
    monkeypatch.delenv("UNSLOTH_DEBUG", raising=False)
    here, elsewhere = torch.zeros(1).long(), torch.zeros(1, device="meta").long()
    assert checks.values_are_checked(here)
    assert not checks.values_are_checked(elsewhere)
    monkeypatch.setenv("UNSLOTH_DEBUG", "1")
    assert checks.values_are_checked(elsewhere)
