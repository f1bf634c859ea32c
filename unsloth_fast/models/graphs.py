"""The layers of a model as two CUDA graphs: one launch for their forward pass, and one for their backward pass.

The host launches some two thousand kernels for a step of Llama 3.2 1B with LoRA, which takes it 120 ms; for 2 rows of
2048 tokens an H200 needs 48 ms to run them. So the Python of a stack of layers, from the embedding to the last norm,
runs three times for packed batches of a size: once as usual, and for the second batch once to load all kernels and once
while CUDA records what it launches. From then on the inputs of a batch are copied to where the recorded kernels read
them, and the recording is replayed. The output head, the loss and the optimizer run as usual.

A batch is padded within the stack to the next size: a multiple of 256 tokens, above 4096 one of 512, and so on. The
padding is one more document, whose outputs are cut off, so that its gradients are 0. Batches of a size without padding
have the bits that they have without graphs; others may differ by the rounding of matrix products with another number of
rows.

The recordings share their memory, which holds the activations of the largest size for as long as they exist; a larger
size begins anew. While a replayed forward pass waits for its backward pass, others run as without graphs.

What Python does between the launches is not repeated. So nothing is recorded where it may matter, and a recording is
dropped when the model has changed since then (`recordable.Snapshot`): another adapter, a hook, a module or an attribute
of one, a weight that moved.
"""

import logging
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import Module, Parameter
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from unsloth_fast.models.checkpointing import offloads
from unsloth_fast.models.interface import stacks_of
from unsloth_fast.models.packed import documents_of
from unsloth_fast.models.recordable import CHECKPOINT, Snapshot

logger = logging.getLogger(__name__)

Run = Callable[..., Any]
DEVICE = "cuda"
LARGEST = 16384  # tokens; above, the device needs longer than the host
LARGEST_OFFLOADED = 4096  # the layers' inputs, which would wait on the host, stay on the device
RECORDED_AT = 2  # batches of a size
MOST = 16  # sizes
_BATCH = frozenset(("input_ids", "position_ids", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"))


@contextmanager
def recorded(model: Module) -> Iterator[None]:
    """Within the context the stacks of layers are recorded and replayed for packed batches in training.

    Args:
        model: with `packed_attention` placed under it; elsewhere nothing happens.
    """
    found = [documents for stack in stacks_of(model) if (documents := documents_of(stack)) is not None]
    for documents in found:
        documents.graphs = StackGraphs()
    try:
        yield
    finally:
        for documents in found:
            documents.graphs = None


def padded_size(tokens: int) -> int:
    """The next size: a multiple of 256 up to 4096 tokens, of 512 up to 8192, and so on."""
    step = max(256, 1 << max(0, (tokens - 1).bit_length() - 4))
    return -(-tokens // step) * step


def most_bounds(size: int) -> int:
    """Room for the bounds of documents of 32 tokens, at least 16."""
    return max(16, size // 32)


class StackGraphs:
    """The recordings of one stack, one per size; a copy of the stack begins without."""

    def __init__(self) -> None:
        self._recordings: dict[int, _Recording] = {}
        self._seen: Counter[int] = Counter()
        self._snapshot: Snapshot | None = None
        self._said: set[str] = set()
        self._obstacle: str | None = None
        self._largest = LARGEST
        self._pool: Any = None
        self.passes = 0  # that were replayed
        self.latest: Callable[[], _Pass | None] = lambda: None  # the one that the memory belongs to

    def __reduce__(self) -> tuple[type["StackGraphs"], tuple[()]]:
        return StackGraphs, ()

    def __call__(self, run: Run, stack: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What run(*args, **kwargs) returns.

        Args:
            run: the forward of the stack.
            stack: the stack.
            args: of its forward.
            kwargs: of its forward, with cu_seq_lens_q.
        """
        hooks = torch._C._autograd._top_saved_tensors_default_hooks  # pyright: ignore[reportAttributeAccessIssue]
        trains = stack.training and torch.is_grad_enabled()
        if not trains or torch.compiler.is_compiling() or hooks(False) is not None:
            return run(*args, **kwargs)
        batch, latest = None if args else _batch_of(kwargs), self.latest()
        if batch is None or (latest is not None and latest.waits):
            return run(*args, **kwargs)
        snapshot = self._recordable(stack)
        if snapshot is None:
            return run(*args, **kwargs)
        tokens = batch["input_ids"].shape[1]
        size = padded_size(tokens)
        fits = size <= self._largest and len(batch["cu_seq_lens_q"]) < most_bounds(size)
        self._seen[size] += fits
        recording = self._recordings.get(size)
        if recording is not None and recording.is_kept():
            self._give_up("gradients of earlier steps are kept")
            return run(*args, **kwargs)
        if fits and recording is None and self._seen[size] >= RECORDED_AT and len(self._recordings) < MOST:
            recording = self._record(run, snapshot, size, batch)
        if not fits or recording is None:
            return run(*args, **kwargs)
        recording.take(batch)
        hidden: Tensor = _Replay.apply(self, recording, *recording.parameters)
        return recording.output_type(last_hidden_state=hidden[:, :tokens] if tokens < size else hidden)

    def _recordable(self, stack: PreTrainedModel) -> Snapshot | None:
        """The stack as it is, None if it cannot be recorded; drops what was recorded if it has changed since then."""
        if self._snapshot is None or not self._snapshot.is_current():
            self._forget()
            self._seen.clear()
            self._snapshot = Snapshot(stack, DEVICE)
            self._obstacle = self._snapshot.obstacle()
            offloaded = any(offloads(vars(module).get(CHECKPOINT)) for module in self._snapshot.modules)
            self._largest = LARGEST_OFFLOADED if offloaded else LARGEST
            self._say(self._obstacle)
        return self._snapshot if self._obstacle is None else None

    def _forget(self) -> None:
        self._recordings.clear()
        self._pool = None

    def _record(self, run: Run, snapshot: Snapshot, size: int, batch: dict[str, Any]) -> "_Recording | None":
        if size > max(self._recordings, default=size):  # the memory of smaller ones is in pieces that are too small
            self._forget()
        try:
            with _checkpointed_for_graphs(snapshot.modules):
                recording = _Recording(run, size, batch, snapshot.parameters, self._pool)
        except (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            self._give_up(f"recording failed: {str(error).partition(chr(10))[0]}")
            return None
        self._recordings[size], self._pool = recording, recording.forward.pool()
        logger.info(
            "CUDA graphs: %s is recorded for batches of up to %d tokens", type(snapshot.modules[0]).__name__, size
        )
        return recording

    def _give_up(self, obstacle: str) -> None:
        self._forget()
        self._obstacle = obstacle
        self._say(obstacle)

    def _say(self, obstacle: str | None) -> None:
        if obstacle is not None and obstacle not in self._said:
            self._said.add(obstacle)
            logger.info("CUDA graphs: the layers are launched one by one: %s", obstacle)


class _Recording:
    """The passes of a stack for one size.

    Attributes:
        parameters: those that get a gradient.
        output_type: the class of the stack's outputs.
        forward: the graph of the forward pass.
        backward: the graph of the backward pass.
        hidden: the output of the forward pass, [1, size, H].
        grad_hidden: the input of the backward pass.
        grads: its outputs, as parameters.
    """

    def __init__(self, run: Run, size: int, batch: dict[str, Any], parameters: Sequence[Parameter], pool: Any) -> None:
        ids: Tensor = batch["input_ids"]
        self._size = size
        self._ids, self._positions = ids.new_zeros(1, size), ids.new_zeros(1, size)
        self._bounds = torch.full((most_bounds(size),), size, dtype=torch.int32, device=ids.device)
        self.take(batch)
        bounds = {"cu_seq_lens_q": self._bounds, "cu_seq_lens_k": self._bounds}
        bounds |= {"max_length_q": size, "max_length_k": size}
        work = partial(run, input_ids=self._ids, position_ids=self._positions, use_cache=False, **bounds)
        precision = {"dtype": torch.get_autocast_dtype(DEVICE), "enabled": torch.is_autocast_enabled(DEVICE)}
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        # Autocast's cache would keep what is recorded beyond the recording.
        with torch.enable_grad(), torch.autocast(DEVICE, cache_enabled=False, **precision):
            outputs, grads = _rehearse(work, trained)
            self.output_type = type(outputs)
            self.grad_hidden = torch.zeros_like(outputs["last_hidden_state"])
            self.parameters = [one for one, grad in zip(trained, grads, strict=True) if grad is not None]
            del outputs, grads
            outputs, self.forward = capture(work, pool)
            hidden: Tensor = outputs["last_hidden_state"]
            gradients = partial(torch.autograd.grad, hidden, self.parameters, self.grad_hidden)
            self.grads, self.backward = capture(lambda: _apart(gradients()), pool)
        self.hidden = hidden.detach()
        self._holders = list(map(_holders, self.grads))

    def take(self, batch: dict[str, Any]) -> None:
        """Copy a batch to where the recorded kernels read it; what remains of an earlier one behind it is padding."""
        tokens, bounds = batch["input_ids"].shape[1], batch["cu_seq_lens_q"]
        self._ids[:, :tokens].copy_(batch["input_ids"], non_blocking=True)
        self._positions[:, :tokens].copy_(batch["position_ids"], non_blocking=True)
        self._bounds[: len(bounds)].copy_(bounds, non_blocking=True)
        self._bounds[len(bounds) :].fill_(self._size)

    def is_kept(self) -> bool:
        """Whether somebody keeps a gradient that the next replay would overwrite, other than its parameter."""
        return any(
            _holders(grad) > holders + _is_at(parameter.grad, grad)
            for parameter, grad, holders in zip(self.parameters, self.grads, self._holders, strict=True)
        )

    def take_back(self, parameters: Sequence[Tensor], hidden: Tensor) -> tuple[Tensor, ...]:
        """The gradients of self.parameters for one of the hidden states, where the recording leaves them.

        A parameter may still have them from the last replay, and adds to them.
        """
        for parameter, grad in zip(parameters, self.grads, strict=True):
            if parameter.grad is not None and _is_at(parameter.grad, grad):
                parameter.grad = parameter.grad.clone()
        self.grad_hidden.copy_(hidden)
        self.backward.replay()
        return tuple(grad.detach() for grad in self.grads)


class _Pass:
    """A replayed forward pass; it is gone when none of its outputs is left."""

    waits = True  # for its backward pass


class _Replay(torch.autograd.Function):
    """The replayed passes; the parameters are inputs so that autograd hands them their gradients."""

    @staticmethod
    def forward(ctx: Any, graphs: StackGraphs, recording: _Recording, *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(*parameters)
        ctx.graphs, ctx.recording, ctx.own = graphs, recording, _Pass()
        graphs.passes += 1
        graphs.latest = weakref.ref(ctx.own)
        recording.forward.replay()
        return recording.hidden.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, hidden: Tensor) -> tuple[Tensor | None, ...]:
        parameters = ctx.saved_tensors  # raises if one has changed since the forward pass
        if ctx.graphs.latest() is not ctx.own:
            raise RuntimeError(
                "backward: got a second backward pass of outputs whose activations a later forward pass has "
                "overwritten, as the layers are recorded as CUDA graphs; allowed: all backward passes before the next "
                "forward pass, or cuda_graphs=False"
            )
        if not ctx.own.waits:  # an earlier backward pass has overwritten the activations
            ctx.recording.forward.replay()
        ctx.own.waits = False
        return None, None, *ctx.recording.take_back(parameters, hidden)


def capture(work: Callable[[], Any], pool: Any) -> tuple[Any, Any]:
    """What the work returns, computed by each replay of the graph, and the graph."""
    graph = torch.cuda.CUDAGraph()
    # Another thread may pin a batch meanwhile, or watch NCCL.
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        result = work()
    return result, graph


def _rehearse(work: Callable[[], Any], trained: Sequence[Parameter]) -> tuple[Any, Sequence[Tensor | None]]:
    """Compile and load all kernels, which cannot be done while CUDA records, on another stream, as CUDA asks for.

    Returns:
        The outputs, and the gradients of the parameters.
    """
    with other_stream():
        outputs = work()
        if not isinstance(outputs, ModelOutput) or list(outputs) != ["last_hidden_state"]:
            raise ValueError(
                f"the stack returns {', '.join(outputs) if isinstance(outputs, ModelOutput) else 'a tuple'}"
            )
        hidden: Tensor = outputs["last_hidden_state"]
        if not hidden.requires_grad:
            raise ValueError("the layers have no weight to train")
        return outputs, torch.autograd.grad(hidden, trained, torch.zeros_like(hidden), allow_unused=True)


@contextmanager
def other_stream() -> Iterator[None]:
    """Run on a stream of its own, between what was launched before and what is launched after."""
    stream, current = torch.cuda.Stream(), torch.cuda.current_stream()
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        yield
    current.wait_stream(stream)


def _batch_of(kwargs: Mapping[str, Any]) -> dict[str, Any] | None:
    """The keywords of a packed batch; None if there are others that say something."""
    given = {name: value for name, value in kwargs.items() if value is not None and value is not False}
    names = {"input_ids", "position_ids", "cu_seq_lens_q"}
    if not names <= given.keys() <= _BATCH or given["input_ids"].shape != given["position_ids"].shape:
        return None
    return given if given["input_ids"].ndim == 2 and len(given["input_ids"]) == 1 else None


def _apart(grads: Sequence[Tensor]) -> list[Tensor]:
    """The gradients, none in the memory of another, as each becomes that of its parameter."""
    shared = Counter(grad.untyped_storage().data_ptr() for grad in grads)
    return [grad.clone() if shared[grad.untyped_storage().data_ptr()] > 1 else grad for grad in grads]


def _is_at(grad: Tensor | None, other: Tensor) -> bool:
    return grad is not None and grad.data_ptr() == other.data_ptr()


def _holders(grad: Tensor) -> int:
    """How many tensors hold the memory of a gradient."""
    return torch._C._storage_Use_Count(grad.untyped_storage()._cdata)  # pyright: ignore[reportAttributeAccessIssue]


@contextmanager
def _checkpointed_for_graphs(modules: Sequence[Module]) -> Iterator[None]:
    """Let checkpointed layers save no state of the random numbers, which cannot be read while CUDA records."""
    plain = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
    with ExitStack() as stack:
        for module in modules:
            if CHECKPOINT in vars(module):
                stack.callback(setattr, module, CHECKPOINT, getattr(module, CHECKPOINT))
                setattr(module, CHECKPOINT, plain)
        yield
