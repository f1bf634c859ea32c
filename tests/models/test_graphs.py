"""A stack of layers that is recorded and replayed trains as one that is launched layer by layer.

CUDA graphs need a GPU. Here a stand-in records the operators that torch dispatches, and computes them again into the
same tensors; so whatever Python does between them is missing from a replay, as with CUDA. On a GPU the graphs are real.
"""

import copy
import logging
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests import tiny
from unsloth_fast.backends import resolve
from unsloth_fast.models import graphs, place
from unsloth_fast.models.checkpointing import enable_checkpointing, enable_offloading
from unsloth_fast.models.interface import stacks_of
from unsloth_fast.models.packed import documents_of
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
                for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
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
        monkeypatch.setattr(graphs, "other_stream", nullcontext)
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


def backend_for_graphs() -> Any:
    """The fast backend on a GPU; on a CPU the reference, as far as it is all torch's operators."""
    if ON_GPU:
        return resolve("fast")
    found = resolve("reference")
    return replace(found, kernels=SimpleNamespace(**vars(found.kernels) | {"packed_attention": attention}))


def model_of(name: str = "llama", lora: bool = True, **options: Any) -> Any:
    """A small model in training."""
    torch.manual_seed(0)
    model: Any = tiny.model(name, **options)
    model.to(DEVICE, torch.float32)
    if lora:
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    place(model, backend_for_graphs())
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


def stack_graphs(model: Any) -> Any:
    """The graphs of the model's stack."""
    (stack,) = stacks_of(model)
    documents = documents_of(stack)
    assert documents is not None
    return documents.graphs


FULL, SHORT, OTHER = batch(64, 64, 64, 64), batch(50, 60, 40), batch(60, 60, 40, 50, 46)
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
        assert list(recordings) == [256]
    for (losses, grads), (expected_losses, expected_grads), step in zip(found, expected, STEPS, strict=True):
        exact = not any(each is SHORT for each in step)  # a padded batch may sum in another order, in float32
        for one, other in zip([*losses, *grads], [*expected_losses, *expected_grads], strict=True):
            assert torch.equal(one, other) if exact else (one - other).abs().max() <= 1e-5 * other.abs().max() + 1e-9


def graphs_after(model: Any, *batches: dict[str, Any]) -> Any:
    """The graphs of a model in the context, after passes over the batches."""
    for each in batches:
        passes(model, each)
    return stack_graphs(model)


@pytest.mark.parametrize("offloaded", [False, True])
def test_checkpointed_layers_are_recorded(offloaded: bool) -> None:
    """With the bits of those that keep their activations; dropping them is part of the recording."""
    expected = passes(model_of(), OTHER)
    model = model_of()
    if offloaded:
        enable_offloading(model.get_base_model())
    model.enable_input_require_grads()
    enable_checkpointing(model.get_base_model(), True)
    with graphs.recorded(model):
        passes(model, FULL)
        found = passes(model, OTHER)
        assert list(stack_graphs(model)._recordings) == [256]
    assert all(map(torch.equal, [*found[0], *found[1]], [*expected[0], *expected[1]]))


def test_a_changed_model_is_recorded_again() -> None:
    """A weight that moves, another scaling, another adapter: each has its own bits."""

    def move(model: Any) -> None:
        for parameter in model.parameters():
            parameter.data = parameter.data * 2

    def scale(model: Any) -> None:
        model.base_model.model.model.layers[1].mlp.up_proj.set_scale("default", 3.0)

    def add(model: Any) -> None:
        torch.manual_seed(1)
        model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
        model.set_adapter("second")

    for change in (move, scale, add):
        plain, model = model_of(), model_of()
        with graphs.recorded(model):
            assert graphs_after(model, FULL, OTHER)._recordings
            change(plain)
            change(model)
            for each in (OTHER, FULL, OTHER):
                found, expected = passes(model, each), passes(plain, each)
                assert all(map(torch.equal, [*found[0], *found[1]], [*expected[0], *expected[1]])), change.__name__
            assert stack_graphs(model)._recordings


def test_evaluation_and_other_batches_run_as_usual() -> None:
    """Nothing is recorded of them, and they change nothing of what is recorded."""
    model = model_of()
    with graphs.recorded(model):
        before = graphs_after(model, FULL, OTHER).passes
        model.eval()
        passes(model, FULL)
        model.train()
        with torch.no_grad():
            model(input_ids=FULL["input_ids"], position_ids=FULL["position_ids"], use_cache=False)
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):
            passes(model, FULL)
        many = batch(*[3] * 21)  # more documents than there is room for
        expected, found = passes(model_of(), many), passes(model, many)
        assert all(map(torch.equal, [*found[0], *found[1]], [*expected[0], *expected[1]]))
        assert stack_graphs(model).passes == before > 0


OBSTACLES: dict[str, tuple[Callable[[Any], object], str]] = {
    "weight": (lambda model: model.model.norm.weight.register_hook(lambda grad: grad / 2), "a hook of a weight"),
    "hook": (lambda model: model.model.layers[1].mlp.register_forward_hook(lambda *_: None), "a hook of a LlamaMLP"),
    "dropout": (lambda model: setattr(model.model.layers[0], "extra", torch.nn.Dropout(0.1)), "dropout"),
    "attention": (lambda model: setattr(model.config, "attention_dropout", 0.1), "attention_dropout=0.1"),
    "frozen": (lambda model: model.model.requires_grad_(False), "the layers have no weight to train"),
    "router": (lambda model: setattr(model.config, "output_router_logits", True), "router logits are asked for"),
}


@pytest.mark.parametrize("name", OBSTACLES)
def test_what_forbids_recording_is_logged_once(name: str, caplog: pytest.LogCaptureFixture) -> None:
    """The layers then run one by one, with the same results."""
    change, reason = OBSTACLES[name]
    model = model_of(lora=False)
    change(model)
    caplog.set_level(logging.INFO, graphs.__name__)
    with graphs.recorded(model):
        assert not graphs_after(model, FULL, OTHER, FULL, OTHER)._recordings
    assert caplog.text.count("the layers are launched one by one: ") == caplog.text.count(reason) == 1


def test_a_recording_that_fails_is_given_up(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """An operation that reads a value on the host cannot be recorded."""
    model = model_of()
    own = graphs.capture

    def failing(*arguments: Any) -> Any:
        own(*arguments)
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(graphs, "capture", failing)
    caplog.set_level(logging.INFO, graphs.__name__)
    with graphs.recorded(model):
        found = [passes(model, each) for each in (FULL, OTHER, FULL)]
    expected = [passes(model_of(), each) for each in (FULL, OTHER, FULL)]
    for one, other in zip(found, expected, strict=True):
        assert all(map(torch.equal, [*one[0], *one[1]], [*other[0], *other[1]]))
    assert "recording failed: operation not permitted when stream is capturing" in caplog.text
    assert "more" not in caplog.text


def test_a_recording_that_fails_frees_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """They would not be used any more."""
    model, large = model_of(), batch(*[64] * 8)
    with graphs.recorded(model):
        assert list(graphs_after(model, large, large)._recordings) == [512]
        monkeypatch.setattr(graphs, "capture", lambda *_: {}["missing"])
        assert not graphs_after(model, FULL, OTHER)._recordings


def test_a_copy_begins_without_recordings() -> None:
    """Graphs cannot be copied, nor pickled."""
    model = model_of(lora=False)
    with graphs.recorded(model):
        graphs_after(model, FULL, OTHER)
        copied = copy.deepcopy(model)
        assert stack_graphs(model)._recordings and not stack_graphs(copied)._recordings
        found, expected = passes(copied, FULL), passes(model, FULL)
        assert all(map(torch.equal, [*found[0], *found[1]], [*expected[0], *expected[1]]))
    assert stack_graphs(model) is None


def test_a_larger_size_begins_anew() -> None:
    """Smaller ones are recorded again, in its memory; each has the bits of the others."""
    model, large = model_of(), batch(*[64] * 8)
    sizes = []
    with graphs.recorded(model):
        for each in (FULL, OTHER, large, large, FULL, large):
            found, expected = passes(model, each), passes(model_of(), each)
            assert all(map(torch.equal, [*found[0], *found[1]], [*expected[0], *expected[1]]))
            sizes.append(list(stack_graphs(model)._recordings))
    assert sizes == [[], [256], [256], [512], [512, 256], [512, 256]]


@pytest.mark.parametrize(
    ("tokens", "size"), [(1, 256), (257, 512), (2049, 2304), (4096, 4096), (4097, 4608), (8193, 9216)]
)
def test_sizes(tokens: int, size: int) -> None:
    """At most an eighth above the tokens, from 2048 on."""
    assert graphs.padded_size(tokens) == size
