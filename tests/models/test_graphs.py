"""A stack of layers that is recorded and replayed trains as one that is launched layer by layer.

CUDA graphs need a GPU. Here a stand-in records the operators that torch dispatches, and computes them again into the
same tensors; so whatever Python does between them is missing from a replay, as with CUDA. On a GPU the graphs are real.
"""

import copy
import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests import tiny
from unsloth_fast.backends import resolve
from unsloth_fast.models import graphs, place
from unsloth_fast.models.checkpointing import enable_checkpointing
from unsloth_fast.training.collate import collate

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"


class Recorder(TorchDispatchMode):
    """Keeps each operator with its arguments and results, and computes them again."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []
        self.replays = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing")
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result

    def replay(self) -> None:
        """Compute everything again."""
        self.replays += 1
        with torch.no_grad():
            for func, args, kwargs, result in self.calls:
                if func.is_view:
                    continue
                again = func(*args, **kwargs)
                for old, new in zip(torch.utils._pytree.tree_leaves(result), torch.utils._pytree.tree_leaves(again)):
                    if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)

    def pool(self) -> None:
        """There is no pool."""


def capture(work: Callable[[], Any], pool: Any) -> tuple[Any, Recorder]:
    """As `graphs.capture`."""
    with Recorder() as recorder:
        return work(), recorder


@pytest.fixture(autouse=True)
def _recorder(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if not ON_GPU:
        monkeypatch.setattr(graphs, "DEVICE", "cpu")
        monkeypatch.setattr(graphs, "capture", capture)
    yield


def batch(*lengths: int) -> dict[str, Any]:
    """Documents of these lengths in a row, with tokens of their own."""
    drawn = torch.Generator().manual_seed(sum(lengths))
    rows = [torch.randint(3, 48, (length,), generator=drawn) for length in lengths]
    found = collate([{"input_ids": row} for row in rows]).as_dict()
    return {name: value.to(DEVICE) if isinstance(value, Tensor) else value for name, value in found.items()}


def attention(
    q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, _: int, *, scale: float | None = None, window: int | None = None,
    **others: Any,
) -> Tensor:  # fmt: skip
    """packed_attention without a loop over the documents, which would read their bounds on the host."""
    assert not any(others.values())
    token = torch.arange(len(q), device=q.device)
    document = torch.searchsorted(bounds[1:].contiguous(), token.to(bounds.dtype), right=True)
    distance = token[:, None] - token
    seen = (document[:, None] == document) & (distance >= 0) & (distance < (window or len(q)))
    k, v = (each.repeat_interleave(q.shape[1] // k.shape[1], 1) for each in (k, v))
    scores = torch.einsum("ind,jnd->nij", q, k) * (q.shape[2] ** -0.5 if scale is None else scale)
    return torch.einsum("nij,jnd->ind", scores.masked_fill(~seen, float("-inf")).softmax(-1), v)


def model_of(name: str = "llama", lora: bool = True, **options: Any) -> Any:
    """A small model in training, placed on operations that are all torch's on a CPU."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model: Any = tiny.model(name, **options).to(DEVICE, torch.float32)
    if lora:
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    backend = resolve("fast" if ON_GPU else "reference")
    if not ON_GPU:
        backend = replace(backend, kernels=SimpleNamespace(**vars(backend.kernels) | {"packed_attention": attention}))
    place(model, backend)
    return model.train()


def passes(model: Any, *batches: dict[str, Any]) -> list[list[Tensor]]:
    """For each microbatch its loss; then the gradients of all."""
    losses = []
    for each in batches:
        inputs = {name: value for name, value in each.items() if name != "labels"}
        logits = model(**inputs, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits[0, :-1], each["labels"][0, 1:], reduction="sum")
        loss.backward()
        losses.append(loss.detach())
    grads = [one.grad.clone() for one in model.parameters() if one.grad is not None]
    model.zero_grad()
    return [losses, grads]


FULL, SHORT, OTHER = batch(30, 20, 14), batch(25, 30), batch(40, 24)
STEPS = [(FULL,), (OTHER,), (SHORT, FULL), (FULL, OTHER, SHORT), (OTHER,)]


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3"])
@pytest.mark.parametrize("lora", [True, False])
def test_a_recorded_stack_has_the_bits_of_the_others(name: str, lora: bool) -> None:
    """Losses and gradients, over batches of one size, with and without padding, accumulated or not."""
    expected = [passes(model_of(name, lora), *step) for step in STEPS]
    model = model_of(name, lora)
    with graphs.recorded(model):
        found = [passes(model, *step) for step in STEPS]
        recordings = stack_graphs(model)._recordings
        assert list(recordings) == [64]
    for (losses, grads), (expected_losses, expected_grads), step in zip(found, expected, STEPS, strict=True):
        exact = not any(each is SHORT for each in step)
        for one, other in zip([*losses, *grads], [*expected_losses, *expected_grads], strict=True):
            assert torch.equal(one, other) if exact else (one - other).abs().max() <= 1e-5 * other.abs().max() + 1e-9


def stack_graphs(model: Any) -> Any:
    """The graphs of the model's stack."""
    from unsloth_fast.models.interface import stacks_of
    from unsloth_fast.models.packed import documents_of

    (stack,) = stacks_of(model)
    documents = documents_of(stack)
    assert documents is not None
    return documents.graphs
