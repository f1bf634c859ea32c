"""Sizes of `extents` that random cases do not reach."""

from typing import Any

import pytest
import torch
from torch import Tensor

from conformance import backends
from conformance.properties import PROPERTIES
from conformance.running.search import reproduce
from conformance.specs import specs
from conformance.trial import Function, Trial
from tests.judge.contract import as_backend
from unsloth_ref import kernels as reference
from unsloth_ref.types import IGNORE_INDEX


def cross_entropy_counts_4096_rows(
    logits: Tensor, labels: Tensor, *, reduction: str = "mean", num_items: Any = None, **options: Any
) -> Tensor:
    """Divides by the targets of the first 4096 rows."""
    if reduction == "mean" and num_items is None:
        num_items = int((labels[:4096] != options.get("ignore_index", IGNORE_INDEX)).sum().clamp(min=1))
    return reference.cross_entropy(logits, labels, reduction=reduction, num_items=num_items, **options)


def swiglu_of_4096_rows(gate: Tensor, up: Tensor) -> Tensor:
    """Leaves out what lies beyond."""
    y = reference.swiglu(gate, up)
    return torch.cat([y[:4096], 0 * y[4096:]])


def verdict(op: str, function: Function) -> str:
    spec = specs()[op]
    trial = Trial(spec, function, torch.float32, "cpu")
    return reproduce(trial, PROPERTIES["extents"], spec.case(4099, 4), "float32").verdict


@pytest.mark.parametrize(
    ("op", "wrong"), [("cross_entropy", cross_entropy_counts_4096_rows), ("swiglu", swiglu_of_4096_rows)]
)
def test_rows_beyond_4096_count(op: str, wrong: Function) -> None:
    assert verdict(op, getattr(as_backend(op, wrong), op)) == "fail"
    assert verdict(op, getattr(reference, op)) == "pass"


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's interpreter runs where there is no GPU")
def test_an_interpreter_gets_fewer_rows() -> None:
    function = backends.load("fast", "cpu").functions["cross_entropy"]
    assert verdict("cross_entropy", function) == "skip"
