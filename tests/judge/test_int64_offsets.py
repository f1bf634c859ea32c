"""A call that is repeated until it has very many elements: its last repetition is judged."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from conformance.case import Case
from conformance.properties import int64_offsets
from conformance.specs import specs
from conformance.tolerances.gates import Failure, Unchecked
from conformance.trial import Trial
from unsloth_ref import kernels as reference

FAR = 2**12  # elements, in place of 2^31
SPEC = specs()["cross_entropy"]
CASE = Case((("tokens", 16), ("vocab", 12)))
OPTIONS = [SPEC.row_options, SPEC.total_options]


def backend(of_rows: int, of_totals: int) -> Callable[..., Tensor]:
    """Cross entropy whose gradient is 0 beyond so many elements, as after an overflow of offsets."""

    class Loss(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, logits: Tensor, labels: Tensor, options: dict[str, Any]) -> Tensor:
            ctx.inputs = logits.detach().requires_grad_(), labels, options
            return reference.cross_entropy(logits, labels, **options)

        @staticmethod
        def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
            logits, labels, options = ctx.inputs
            with torch.enable_grad():
                loss = reference.cross_entropy(logits, labels, **options)
            (gradient,) = torch.autograd.grad(loss, logits, grad_outputs)
            gradient.view(-1)[of_rows if loss.ndim else of_totals :] = 0
            return gradient, None, None

    def cross_entropy(
        logits: Tensor, labels: Tensor, *, reduction: str = "mean", num_items: int | None = None
    ) -> Tensor:
        return Loss.apply(logits, labels, {"reduction": reduction, "num_items": num_items})

    return cross_entropy


def without_memory(function: Callable[..., Tensor], of_outputs: int = 2 * FAR) -> Callable[..., Tensor]:
    """A backend that has no memory for gradients of more than FAR elements, nor for outputs of more than these."""

    class NoMemory(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, logits: Tensor) -> Tensor:
            ctx.elements = logits.numel()
            if logits.numel() > of_outputs:
                raise torch.OutOfMemoryError
            return logits.clone()

        @staticmethod
        def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
            if ctx.elements > FAR:
                raise torch.OutOfMemoryError
            return grad_outputs[0]

    def cross_entropy(
        logits: Tensor, labels: Tensor, *, reduction: str = "mean", num_items: int | None = None
    ) -> Tensor:
        return function(NoMemory.apply(logits), labels, reduction=reduction, num_items=num_items)

    return cross_entropy


def judged(function: Callable[..., Tensor], options: dict[str, Any]) -> float:
    return int64_offsets.last_repetition(Trial(SPEC, function, torch.float16, "cpu"), CASE.with_options(options))


@pytest.fixture(autouse=True)
def _near(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int64_offsets, "FAR", FAR)


@pytest.mark.parametrize("options", OPTIONS, ids=["rows", "total"])
def test_right_results_pass(options: dict[str, Any]) -> None:
    assert judged(backend(2 * FAR, 2 * FAR), options) <= 1


@pytest.mark.parametrize(("options", "reach"), [(OPTIONS[0], (FAR, 2 * FAR)), (OPTIONS[1], (2 * FAR, FAR))])
def test_what_is_wrong_beyond_the_limit_fails(options: dict[str, Any], reach: tuple[int, int]) -> None:
    with pytest.raises(Failure, match=r"the last of 22 repetitions: gate G1 .* in gradient of logits"):
        judged(backend(*reach), options)
    (other,) = (one for one in OPTIONS if one is not options)
    assert judged(backend(*reach), other) <= 1


def test_outputs_are_judged_where_memory_does_not_hold_gradients() -> None:
    right = without_memory(backend(2 * FAR, 2 * FAR))
    assert judged(right, OPTIONS[0]) <= 1

    def wrong(logits: Tensor, labels: Tensor, *, reduction: str = "mean", num_items: int | None = None) -> Tensor:
        loss = right(logits, labels, reduction=reduction, num_items=num_items)
        return loss * (torch.arange(len(loss)) < FAR // logits.shape[1])

    with pytest.raises(Failure, match=r"the last of 22 repetitions: .* in output loss"):
        judged(wrong, OPTIONS[0])


def test_what_does_not_fit_is_not_judged() -> None:
    with pytest.raises(Unchecked, match="too little memory for the outputs"):
        judged(without_memory(backend(2 * FAR, 2 * FAR), of_outputs=FAR), OPTIONS[0])


def test_plain_pytorch_is_not_repeated() -> None:
    with pytest.raises(Unchecked, match="plain PyTorch"):
        judged(reference.cross_entropy, OPTIONS[0])


@pytest.mark.parametrize("op", [op for op, spec in specs().items() if spec.memory])
def test_the_repeated_case_is_small(op: str) -> None:
    *_, case = int64_offsets.cases(specs()[op], None)  # type: ignore[arg-type]
    inputs = specs()[op].inputs(case, torch.bfloat16, "cpu")
    assert max(tensor.numel() for tensor in inputs.values()) <= 2**27
