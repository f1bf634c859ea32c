"""What tests of recorded layers share: a stand-in for CUDA graphs, small models, and batches.

The stand-in records the operators that torch dispatches, and computes them again into the same tensors; so whatever
Python does between them is missing from a replay, as with CUDA. On a GPU the graphs are real.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.nn.functional import linear
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests import tiny
from tests.models import zoo
from unsloth_fast.backends import resolve
from unsloth_fast.models import place, recording
from unsloth_fast.models.interface import stacks_of
from unsloth_fast.models.packed import documents_of
from unsloth_fast.training.collate import collate
from unsloth_ref import document_checks
from unsloth_ref.kernels import fused_swiglu

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"


class Recorder(TorchDispatchMode):
    """Keeps each operator with its arguments and results, and computes them again.

    Args:
        pool: the recorders that take their memory from the same pool; each overwrites what the others left there.
    """

    def __init__(self, pool: list["Recorder"]) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []
        self.made: list[Tensor] = []  # in memory of the pool
        self.replays = 0
        self._pool = pool

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing")
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        given = {_storage(one) for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)}
        results = [one for one in tree_leaves(result) if isinstance(one, Tensor) and one.is_floating_point()]
        self.made += [one for one in results if _storage(one) not in given]
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
            for other in self._pool:
                for tensor in other.made if other is not self else ():
                    tensor.fill_(float("nan"))

    def pool(self) -> list["Recorder"]:
        """What another recorder may share."""
        return self._pool


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def record(work: Callable[[], Any], pool: Any) -> tuple[Any, Recorder]:
    """What `recording.capture` returns, without CUDA."""
    with Recorder([] if pool is None else pool) as recorder:
        result = work()
    recorder.pool().append(recorder)
    return result, recorder


class Counted:
    """A graph that counts its replays."""

    def __init__(self, graph: Any) -> None:
        self.graph, self.pool, self.replays = graph, graph.pool, 0

    def replay(self) -> None:
        """Launch it."""
        self.replays += 1
        self.graph.replay()


def use_recorder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Record with the stand-in, or on a GPU count the replays."""
    own = recording.capture

    def counted(work: Callable[[], Any], pool: Any) -> tuple[Any, Counted]:
        result, graph = own(work, pool)
        return result, Counted(graph)

    monkeypatch.setattr(recording, "capture", counted if ON_GPU else record)
    if not ON_GPU:
        monkeypatch.setattr(recording, "DEVICE", "cpu")
        monkeypatch.setattr(recording, "other_stream", nullcontext)


def batch(*lengths: int) -> dict[str, Any]:
    """Documents of these lengths in a row, with tokens of their own."""
    drawn = torch.Generator().manual_seed(sum(lengths))
    rows = [torch.randint(3, 48, (length,), generator=drawn) for length in lengths]
    found = collate([{"input_ids": row} for row in rows]).as_dict()
    return {name: value.to(DEVICE) if isinstance(value, Tensor) else value for name, value in found.items()}


def attention(
    q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, _: int, *, scale: float | None = None, window: int | None = None,
    sinks: Tensor | None = None, **others: Any,
) -> Tensor:  # fmt: skip
    """packed_attention without a loop over the documents, which would read their bounds on the host."""
    assert not any(others.values())
    token = torch.arange(len(q), device=q.device)
    document = document_checks.document_of(bounds, token.to(bounds.dtype))
    distance = token[:, None] - token
    seen = (document[:, None] == document) & (distance >= 0) & (distance < (window or len(q)))
    k, v = (each.repeat_interleave(q.shape[1] // k.shape[1], 1) for each in (k, v))
    scores = torch.einsum("ind,jnd->nij", q, k) * (q.shape[2] ** -0.5 if scale is None else scale)
    scores = scores.masked_fill(~seen, float("-inf"))
    if sinks is not None:
        scores = torch.cat([scores, sinks[:, None, None].expand(-1, len(q), 1)], -1)
    return torch.einsum("nij,jnd->ind", scores.softmax(-1)[..., : len(q)], v)


def grouped_gemm(x: Tensor, weight: Tensor, group_sizes: Tensor) -> Tensor:
    """grouped_gemm of all rows and all matrices, as the sizes of the groups are values on the host."""
    group = torch.searchsorted(group_sizes.cumsum(0), torch.arange(len(x), device=x.device), right=True)
    parts = (linear(x, matrix) * (group == index)[:, None] for index, matrix in enumerate(weight))
    return torch.stack(list(parts)).sum(0)


def moe_mlp(
    x: Tensor, gate_up: Tensor, down: Tensor, indices: Tensor, weights: Tensor, gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None, *, activation: str, **options: Any,
) -> Tensor:  # fmt: skip
    """moe_mlp of all tokens and all experts, for the same reason."""
    assert activation == "silu"
    y = torch.zeros_like(x)
    for index in range(len(gate_up)):
        biases = [None if bias is None else bias[index] for bias in (gate_up_bias, down_bias)]
        hidden = fused_swiglu(linear(x, gate_up[index], biases[0]), **options)
        y = y + linear(hidden, down[index], biases[1]) * (weights * (indices == index)).sum(1, keepdim=True)
    return y


PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RECORDABLE: dict[str, Any] = {"packed_attention": attention, "grouped_gemm": grouped_gemm, "moe_mlp": moe_mlp}


def backend_for_graphs() -> Any:
    """The fast backend on a GPU; on a CPU the reference, as far as it is all torch's operators."""
    if ON_GPU:
        return resolve("fast")
    found = resolve("reference")
    return replace(found, kernels=SimpleNamespace(**vars(found.kernels) | RECORDABLE))


def model_of(name: str = "llama", lora: bool = True, **options: Any) -> Any:
    """A small model in training."""
    torch.manual_seed(0)
    model: Any = tiny.model(name, **options) if name in tiny.FAMILIES else zoo.model(name)
    model.to(DEVICE, torch.float32)
    if lora:
        # With "all-linear", peft merges an adapter of a router into its weight in each forward pass.
        targets = PROJECTIONS if name in zoo.ZOO else "all-linear"
        model = get_peft_model(model, LoraConfig(r=4, target_modules=targets, init_lora_weights=False))
    place(model, backend_for_graphs())
    return model.train()


def passes(model: Any, *batches: dict[str, Any]) -> list[list[Tensor]]:
    """The loss of each microbatch, then the gradients of all."""
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


def graphs_after(model: Any, *batches: dict[str, Any]) -> Any:
    """The graphs of a model in the context, after passes over the batches."""
    for each in batches:
        passes(model, each)
    return stack_graphs(model)


def replays(model: Any) -> int:
    """The replayed forward passes of the recordings that a model has."""
    return sum(one._forward.replays for one in stack_graphs(model)._recordings.values())


def same(found: list[list[Tensor]], expected: list[list[Tensor]]) -> bool:
    """Whether losses and gradients have the same bits."""
    pairs = zip([*found[0], *found[1]], [*expected[0], *expected[1]], strict=True)
    return all(torch.equal(one, other) for one, other in pairs)


def loss_of(model: Any, each: dict[str, Any]) -> Tensor:
    """The sum of the squared logits of a batch."""
    inputs = {name: value for name, value in each.items() if name != "labels"}
    return model(**inputs, use_cache=False).logits.square().sum()
