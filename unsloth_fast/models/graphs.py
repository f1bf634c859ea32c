"""The layers of a model as two CUDA graphs: one launch for their forward pass, and one for their backward pass.

The host launches some two thousand kernels for a step of Llama 3.2 1B with LoRA, which takes it 120 ms; for 2 rows of
2048 tokens an H200 needs 48 ms to run them. So the Python of a stack of layers, from the embedding to the last norm,
runs three times for packed batches of a size: once as usual, and for the second batch once to load all kernels and once
while CUDA records what it launches. From then on the inputs of a batch are copied to where the recorded kernels read
them, and the recording is replayed. The output head, the loss and the optimizer run as usual.

A batch is padded within the stack to the next size: a multiple of 256 tokens, above 4096 one of 512, and so on; or, if
that is not recorded, to a recorded one that is at most an eighth above its tokens, or at most twice them while its own
size is rare, such as that of an epoch's last batch. The padding is one more document, whose outputs are cut off, so
that its gradients are 0. Batches of a size without padding have the bits that they have
without graphs; others may differ by the rounding of matrix products with another number of rows.

The recordings share their memory (`recording.Memory`), which holds the activations of the largest size for as long as
they exist; a larger size begins anew. While a replayed forward pass waits for its backward pass, others run as without
graphs. Where memory runs out, the recordings are dropped, and what ran runs once more.

What Python does between the launches is not repeated. So nothing is recorded where it may matter, and a recording is
dropped when the model has changed since then (`recordable.Snapshot`): another adapter, a hook, a module or an attribute
of one, a weight that moved.
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
from torch.nn import Module
from transformers import PreTrainedModel
from transformers.utils import output_capturing

from unsloth_fast.failures import failures_of_kernels
from unsloth_fast.models import recording
from unsloth_fast.models.checkpointing import is_reentrant, offloads
from unsloth_fast.models.interface import stacks_of
from unsloth_fast.models.packed import documents_of
from unsloth_fast.models.recordable import CHECKPOINT, Snapshot
from unsloth_fast.models.recording import Memory, Recording, Replay, Run, most_bounds

logger = logging.getLogger(__name__)

Result = TypeVar("Result")
LARGEST = 16384  # tokens; above, the device needs longer than the host
LARGEST_OFFLOADED = 4096  # the layers' inputs, which would wait on the host, stay on the device
RECORDED_AT = 2  # batches of a size
RARE = 4  # times as many: until then a size is rare
LATER = 16  # times as many, after the recordings left too little memory
MOST = 16  # sizes
CHANGES = 4  # passes in a row that each change the stack
_BATCH = frozenset(("input_ids", "position_ids", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"))
_ROUTERS = "output_router_logits"  # a field of configurations, too
_OFF = frozenset(("use_cache", "output_attentions", "output_hidden_states"))  # if they are False


class Recordings(list["StackGraphs"]):
    """Those of the stacks of a model."""

    def with_room(self, work: Callable[[], Result], model: Module | None = None) -> Result:
        """What the work returns; if it runs out of memory beside recordings, they are dropped and it runs once more.

        Args:
            work: a forward pass, or all of a step.
            model: to whose gradients the work adds; if there were some before, it cannot run once more.
        """
        repeats = model is None or not self or all(one.grad is None for one in model.parameters())
        try:
            return work()
        except torch.OutOfMemoryError:
            if not (repeats and any([graphs.make_room() for graphs in self])):
                raise
        if model is not None:
            model.zero_grad()
        return work()


@contextmanager
def recorded(model: Module, level: int = logging.INFO) -> Iterator[Recordings]:
    """Within the context the stacks of layers are recorded and replayed for packed batches in training.

    Args:
        model: with `packed_attention` placed under it; elsewhere nothing happens.
        level: of the log's line about what is not recorded.
    """
    found = [documents for stack in stacks_of(model) if (documents := documents_of(stack)) is not None]
    said: set[str] = set()
    recordings = Recordings(StackGraphs(level, said) for _ in found)
    for documents, graphs in zip(found, recordings, strict=True):
        documents.graphs = graphs
    try:
        yield recordings
    finally:
        recordings.clear()
        for documents in found:
            documents.graphs = None


def padded_size(tokens: int) -> int:
    """The next size: a multiple of 256 up to 4096 tokens, of 512 up to 8192, and so on."""
    step = max(256, 1 << max(0, (tokens - 1).bit_length() - 4))
    return -(-tokens // step) * step


class StackGraphs:
    """The recordings of one stack, one per size; a copy of the stack has none.

    Args:
        level: of the log's line about what is not recorded.
        said: what the log has of that; shared with other stacks.
    """

    def __init__(self, level: int, said: set[str]) -> None:
        self._level, self._said = level, said
        self._recordings: dict[int, Recording] = {}
        self._memory = Memory()
        self._seen: Counter[int] = Counter()
        self._recorded_at = RECORDED_AT
        self._snapshot: Snapshot | None = None
        self._routers = False  # wanted in the latest call
        self._changes = 0  # in a row
        self._obstacle: str | None = None
        self._largest, self._for_want = LARGEST, ""  # of memory

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()

    def __call__(self, run: Run, stack: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What run(*args, **kwargs) returns.

        Args:
            run: the forward of the stack.
            stack: the stack.
            args: of its forward.
            kwargs: of its forward.
        """
        if torch.compiler.is_compiling():
            return run(*args, **kwargs)
        found = self._recording_for(run, stack, args, kwargs) if stack.training and torch.is_grad_enabled() else None
        if found is None:
            return Recordings([self]).with_room(partial(run, *args, **kwargs))
        found.take(kwargs)
        outputs = Replay.apply(self._memory, found, *found.parameters)
        return found.outputs(outputs, kwargs["input_ids"].shape[1])

    def make_room(self) -> bool:
        """Drop all recordings and free their memory; whether there were any."""
        if not self._recordings:
            return False
        self._forget()
        self._recorded_at *= LATER
        self._say("out of memory beside the recordings, which are dropped; they are made again later")
        torch.cuda.empty_cache()
        return True

    def _recording_for(
        self, run: Run, stack: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Recording | None:
        """The recording that may be replayed for a call, made now or before; None if the call is to run as usual."""
        obstacle = "positional arguments" if args else _obstacle_of_call(kwargs)
        if obstacle is not None:
            self._say(f"a call with {obstacle}")
            return None
        usual = bool(getattr(stack.config, _ROUTERS, False))
        routers = bool(kwargs.get(_ROUTERS, usual))
        if self._memory.is_awaited() or not self._is_recordable(stack, routers):
            return None
        tokens = kwargs["input_ids"].shape[1]
        self._seen[padded_size(tokens)] += 1
        size = self._size_for(tokens)
        if size > self._largest:
            self._say(f"batches of more than {self._largest} tokens{self._for_want}")
            return None
        if len(kwargs["cu_seq_lens_q"]) >= most_bounds(size):
            self._say("batches with more than 15 documents, and more than one for each 32 tokens")
            return None
        if size not in self._recordings and self._seen[size] >= self._recorded_at and len(self._recordings) < MOST:
            self._record(run if routers == usual else partial(run, **{_ROUTERS: routers}), size, kwargs)
        return self._recordings.get(size)

    def _size_for(self, tokens: int) -> int:
        """The size that a batch is padded to: for one that needs padding, possibly a larger one that is recorded.

        Until a size of its own is recorded, the batch would take memory beside that of the recordings.
        """
        size = padded_size(tokens)
        if size in self._recordings or size == tokens:
            return size
        most = tokens * 2 if self._seen[size] < RARE * self._recorded_at else tokens * 9 // 8
        return min((one for one in self._recordings if size < one <= most), default=size)

    def _is_recordable(self, stack: PreTrainedModel, routers: bool) -> bool:
        """Whether the stack as it is can be recorded; drops what was recorded if it has changed since then.

        Args:
            stack: the stack.
            routers: whether its router logits are wanted.
        """
        if self._snapshot is None or routers != self._routers or not self._snapshot.is_current():
            self._changes += self._snapshot is not None
            if self._changes == CHANGES:
                self._say("each forward pass changes something of them")
            self._forget()
            self._snapshot, self._routers = Snapshot(stack, recording.DEVICE), routers
            self._obstacle = self._snapshot.obstacle()
            checkpoints = [vars(module).get(CHECKPOINT) for module in self._snapshot.modules]
            if routers and any(map(is_reentrant, checkpoints)):  # a recorded layer has them, with their gradients
                self._obstacle = self._obstacle or "router logits without gradients, as use_reentrant=True"
            self._largest, self._for_want = LARGEST_OFFLOADED if any(map(offloads, checkpoints)) else LARGEST, ""
            self._say(self._obstacle)
        else:
            self._changes = 0
        return self._obstacle is None

    def _forget(self) -> None:
        self._recordings.clear()
        self._seen.clear()
        self._memory = Memory()

    def _record(self, run: Run, size: int, batch: dict[str, Any]) -> None:
        snapshot, seen = self._snapshot, self._seen.copy()
        assert snapshot is not None
        if size > max(self._recordings, default=0):  # the memory of smaller ones is in pieces that are too small
            self._forget()
            self._seen = seen
        try:
            made = Recording(run, size, batch, snapshot.parameters, snapshot.modules, self._memory)
        except torch.OutOfMemoryError:
            self._largest, self._for_want = size - 1, ", for which there is no memory"
            obstacle = f"batches of more than {self._largest} tokens{self._for_want}"
        except failures_of_kernels() as error:
            self._obstacle = obstacle = f"recording failed: {str(error).partition(chr(10))[0] or type(error).__name__}"
        else:
            self._recordings[size] = made
            name = type(snapshot.modules[0]).__name__
            logger.info("CUDA graphs: %s is recorded for batches of up to %d tokens", name, size)
            return
        self._forget()
        self._say(obstacle)
        torch.cuda.empty_cache()

    def _say(self, obstacle: str | None) -> None:
        if obstacle is not None and obstacle not in self._said:
            self._said.add(obstacle)
            logger.log(self._level, "CUDA graphs: the layers are launched one by one: %s", obstacle)


def _obstacle_of_call(kwargs: Mapping[str, Any]) -> str | None:
    """Why a call of a stack cannot be replayed; None if it can."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks  # pyright: ignore[reportAttributeAccessIssue]
    if hooks(False) is not None:
        return "hooks on saved tensors, such as those of offloading"
    if torch.nn.modules.module._has_any_global_hook():
        return "hooks on all modules"
    if torch._C._len_torch_dispatch_stack() or torch._C._are_functorch_transforms_active():  # pyright: ignore
        return "an observer of torch's operators"
    if output_capturing._active_collector.get():
        return "outputs that a model around the layers collects"
    given = {name for name, value in kwargs.items() if value is not None and not (value is False and name in _OFF)}
    missing, more = _BATCH - given, sorted(given - _BATCH - {_ROUTERS})
    if more:
        return more[0]
    if missing & {"input_ids", "position_ids", "cu_seq_lens_q"}:
        return "a batch that is not packed"
    ids, positions = kwargs["input_ids"], kwargs["position_ids"]
    if ids.shape != positions.shape or ids.ndim != 2 or len(ids) != 1:
        return f"input_ids of {list(ids.shape)} and position_ids of {list(positions.shape)}"
    return None
