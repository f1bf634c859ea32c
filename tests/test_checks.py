"""What each operation refuses: both backends raise the same, naming the argument, what was seen and what is allowed."""

import re
from importlib import import_module
from math import inf, nan
from typing import Any

import pytest
import torch

from unsloth_ref import checks

BACKENDS = ["unsloth_ref.kernels", "unsloth_fast.kernels"]
GOOD = {
    "rms_norm": {"x": torch.ones(3, 5), "weight": torch.ones(5)},
    "swiglu": {"gate": torch.ones(3, 5), "up": torch.ones(3, 5)},
    "cross_entropy": {"logits": torch.ones(3, 5), "labels": torch.tensor([0, -100, 4])},
}
# operation, what changes in its good arguments, the error, and what its message says: argument, seen, allowed
BAD = [
    ("rms_norm", {"x": torch.tensor(1.0)}, ValueError, "x", "a 0-dimensional tensor", "at least one dimension"),
    ("rms_norm", {"x": torch.ones(3, 5).long()}, TypeError, "x", "torch.int64", "torch.bfloat16"),
    ("rms_norm", {"x": torch.ones(3, 5).bool()}, TypeError, "x", "torch.bool", "torch.float32"),
    ("rms_norm", {"weight": torch.ones(5).int()}, TypeError, "weight", "torch.int32", "torch.float16"),
    ("rms_norm", {"weight": torch.ones(6)}, ValueError, "weight", "[6]", "[5], one entry a column of x"),
    ("rms_norm", {"weight": torch.ones(1)}, ValueError, "weight", "[1]", "[5]"),
    ("rms_norm", {"weight": torch.ones(1, 5)}, ValueError, "weight", "[1, 5]", "[5]"),
    ("rms_norm", {"weight": torch.ones(5, device="meta")}, ValueError, "weight", "meta", "cpu, where x is"),
    ("rms_norm", {"eps": -1e-6}, ValueError, "eps", "-1e-06", "from 0.0"),
    ("rms_norm", {"eps": nan}, ValueError, "eps", "nan", "from 0.0"),
    ("rms_norm", {"eps": inf}, ValueError, "eps", "inf", "a finite number from 0.0"),
    ("rms_norm", {"casting": "qwen"}, ValueError, "casting", "'qwen'", "'llama', 'gemma'"),
    ("swiglu", {"gate": torch.tensor(1.0)}, ValueError, "gate", "a 0-dimensional tensor", "at least one dimension"),
    ("swiglu", {"gate": torch.ones(3, 5).long()}, TypeError, "gate", "torch.int64", "torch.float32"),
    ("swiglu", {"up": torch.ones(3, 4)}, ValueError, "up", "[3, 4]", "[3, 5], the shape of gate"),
    ("swiglu", {"up": torch.ones(1, 5)}, ValueError, "up", "[1, 5]", "[3, 5], the shape of gate"),
    ("swiglu", {"up": torch.ones(3, 5).half()}, TypeError, "up", "torch.float16", "torch.float32"),
    ("swiglu", {"up": torch.ones(3, 5, device="meta")}, ValueError, "up", "meta", "cpu, where gate is"),
    ("cross_entropy", {"logits": torch.ones(5)}, ValueError, "logits", "[5]", "[T, V]"),
    ("cross_entropy", {"logits": torch.ones(1, 3, 5)}, ValueError, "logits", "[1, 3, 5]", "[T, V]"),
    ("cross_entropy", {"logits": torch.ones(3, 0)}, ValueError, "logits", "[3, 0]", "V at least 1"),
    ("cross_entropy", {"logits": torch.ones(3, 5).int()}, TypeError, "logits", "torch.int32", "torch.float64"),
    ("cross_entropy", {"labels": torch.zeros(2).long()}, ValueError, "labels", "[2]", "[3], one label a row of logits"),
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
]
NAMES = [f"{operation}: {argument} {seen}" for operation, _, _, argument, seen, _ in BAD]
LIMITS = [
    ("rms_norm", {"eps": 0}),
    ("rms_norm", {"weight": torch.ones(5).half()}),
    ("swiglu", {"gate": torch.ones(0), "up": torch.ones(0)}),
    ("cross_entropy", {"softcap": 0, "label_smoothing": 0, "z_loss": 0}),
    ("cross_entropy", {"label_smoothing": 1}),
    ("cross_entropy", {"num_items": 0}),
    ("cross_entropy", {"num_items": torch.tensor(3.0)}),
    ("cross_entropy", {"labels": torch.tensor([0, 4, -100], dtype=torch.int32)}),
    ("cross_entropy", {"labels": torch.tensor([0, 4, 7]), "ignore_index": 7}),
]


def call(backend: str, operation: str, arguments: dict[str, Any]) -> torch.Tensor:
    """The operation of a backend on these arguments."""
    return getattr(import_module(backend), operation)(**arguments)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("operation", "changes", "error", "argument", "seen", "allowed"), BAD, ids=NAMES)
def test_an_error_names_the_argument_what_was_seen_and_what_is_allowed(
    backend: str,
    operation: str,
    changes: dict[str, Any],
    error: type[Exception],
    argument: str,
    seen: str,
    allowed: str,
) -> None:
    """The type of the error, and its message, part by part."""
    message = f"^{argument}: got .*{re.escape(seen)}.*; allowed: .*{re.escape(allowed)}"
    with pytest.raises(error, match=message) as raised:
        call(backend, operation, GOOD[operation] | changes)
    assert raised.type is error


@pytest.mark.parametrize(("operation", "changes"), [case[:2] for case in BAD], ids=NAMES)
def test_both_backends_raise_the_same(operation: str, changes: dict[str, Any]) -> None:
    """The same message to the letter: who switches backends learns nothing new from an error."""
    messages = []
    for backend in BACKENDS:
        with pytest.raises((TypeError, ValueError)) as raised:
            call(backend, operation, GOOD[operation] | changes)
        messages.append(str(raised.value))
    assert messages[0] == messages[1]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("operation", "changes"), LIMITS, ids=str)
def test_the_limits_themselves_are_allowed(backend: str, operation: str, changes: dict[str, Any]) -> None:
    """What the messages call allowed gives a finite result, up to the very ends."""
    device = "cuda" if torch.cuda.is_available() else "cpu"  # compiled kernels run on no CPU tensor
    arguments = {
        name: value.to(device) if isinstance(value, torch.Tensor) else value
        for name, value in (GOOD[operation] | changes).items()
    }
    assert call(backend, operation, arguments).isfinite().all()


def test_labels_are_read_where_reading_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU always; elsewhere ("meta" stands for a GPU) only when UNSLOTH_DEBUG is 1."""
    monkeypatch.delenv("UNSLOTH_DEBUG", raising=False)
    here, elsewhere = torch.zeros(1).long(), torch.zeros(1, device="meta").long()
    assert checks.must_read_labels(here)
    assert not checks.must_read_labels(elsewhere)
    monkeypatch.setenv("UNSLOTH_DEBUG", "1")
    assert checks.must_read_labels(elsewhere)
