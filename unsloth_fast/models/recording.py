"""The two passes of a stack of layers for one size of batches, recorded as CUDA graphs, and their replay.

The first recording of a stack is that of the largest size. Its forward pass has a pool of memory, in which later
recordings take what they need; so a replay overwrites whatever another one has left there. Its backward pass has a pool
of its own, in which the gradients of all recordings stay until the optimizer has used them.
"""

import random
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import cache, partial
from itertools import compress
from operator import eq, is_not
from typing import Any

import numpy
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import Module, Parameter
from torch.utils.checkpoint import checkpoint

from unsloth_fast.models.recordable import CHECKPOINT
from unsloth_fast.models.stack_outputs import HIDDEN, gradients_of, leaves_of, returned_outputs, stacked_outputs

Run = Callable[..., Any]
DEVICE = "cuda"


def most_bounds(size: int) -> int:
    """Room for the bounds of documents of 32 tokens, at least 16."""
    return max(16, size // 32)


class Pass:
    """A replayed forward pass; it is gone when none of its outputs is left."""

    waits = True  # for its backward pass


class Gradients:
    """Where all recordings of a stack leave the gradients of its parameters.

    Attributes:
        parameters: those that get a gradient.
        tensors: their gradients after a replay, as the parameters.
    """

    def __init__(self, parameters: Sequence[Parameter], tensors: list[Tensor]) -> None:
        self.parameters, self.tensors = parameters, tensors
        self._holders = list(map(_holders, tensors))

    def replayed(self, replay: Callable[[], None]) -> list[Tensor]:
        """The gradients after a replay: the tensors themselves, or copies of them where somebody keeps earlier ones.

        A parameter may still have its gradient from an earlier replay, and adds to it.
        """
        for parameter, own in zip(self.parameters, self.tensors, strict=True):
            if parameter.grad is not None and parameter.grad.data_ptr() == own.data_ptr():
                parameter.grad = parameter.grad.clone()
        if all(map(eq, map(_holders, self.tensors), self._holders)):
            replay()
            return [own.detach() for own in self.tensors]
        kept = [own.clone() for own in self.tensors]
        replay()
        found = [own.clone() for own in self.tensors]
        torch._foreach_copy_(self.tensors, kept)
        return found


class Memory:
    """What the recordings of a stack share.

    Attributes:
        pool: where their passes take memory, except the first backward pass; None before the first recording.
        gradients: where their backward passes leave the gradients; None before the first recording.
        latest: the replayed forward pass whose activations are in the memory.
    """

    def __init__(self) -> None:
        self.pool: Any = None
        self.gradients: Gradients | None = None
        self.latest: Callable[[], Pass | None] = lambda: None

    def is_awaited(self) -> bool:
        """Whether the activations are needed for a backward pass."""
        latest = self.latest()
        return latest is not None and latest.waits


class Recording:
    """The passes of a stack for one size.

    Attributes:
        parameters: those that get a gradient.

    Args:
        run: the forward of the stack.
        size: tokens of a batch, with its padding.
        batch: a packed batch, with at most that many tokens.
        parameters: of the stack.
        modules: the stack and all below it.
        memory: shared with the other recordings; those of the first one become its own.

    Raises:
        ValueError: the stack returns more than hidden states and router logits, trains no weight, draws random
            numbers, or trains a tensor that is not one of the parameters.
        Exception: whatever an operation raises that cannot be recorded.
    """

    def __init__(
        self, run: Run, size: int, batch: dict[str, Any], parameters: Sequence[Parameter], modules: Sequence[Module],
        memory: Memory,
    ) -> None:  # fmt: skip
        ids: Tensor = batch["input_ids"]
        self._size = size
        self._ids, self._positions = ids.new_zeros(1, size), ids.new_zeros(1, size)
        self._bounds = torch.full((most_bounds(size),), size, dtype=torch.int32, device=ids.device)
        self.take(batch)
        bounds = {"cu_seq_lens_q": self._bounds, "cu_seq_lens_k": self._bounds}
        bounds |= {"max_length_q": size, "max_length_k": size}
        run = partial(run, input_ids=self._ids, position_ids=self._positions, use_cache=False, **bounds)
        precision = {"dtype": torch.get_autocast_dtype(DEVICE), "enabled": torch.is_autocast_enabled(DEVICE)}
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        # Autocast's cache would keep what is recorded beyond the recording.
        with _checkpointed_for_graphs(modules), torch.autocast(DEVICE, cache_enabled=False, **precision):
            outputs, found = _rehearse(partial(stacked_outputs, run, size), trained)
            self._output_type, self._names = type(outputs), list(outputs)
            self._grads = list(map(torch.zeros_like, outputs.values()))
            self.parameters = [one for one, grad in zip(trained, found, strict=True) if grad is not None]
            leaves = leaves_of(outputs.values())
            del outputs, found
            outputs, self._forward = capture(partial(stacked_outputs, run, size), memory.pool)
            if leaves_of(outputs.values()) & leaves - set(self.parameters):
                raise ValueError("the layers train a tensor that is none of their weights")
            del leaves
            gradients = partial(gradients_of, list(outputs.values()), self.parameters, self._grads)
            self._gradients, self._backward = self._capture_backward(gradients, memory)
        self._outputs = [one.detach() for one in outputs.values()]
        self.fixed = [not one.requires_grad for one in outputs.values()]
        memory.pool, memory.gradients = memory.pool or self._forward.pool(), self._gradients

    def _capture_backward(self, gradients: Callable[[], tuple[Tensor, ...]], memory: Memory) -> tuple[Gradients, Any]:
        shared = memory.gradients
        if shared is None:
            tensors, graph = capture(lambda: _apart(gradients()), None)
            return Gradients(self.parameters, tensors), graph
        if len(shared.parameters) != len(self.parameters) or any(map(is_not, shared.parameters, self.parameters)):
            raise ValueError("another size has gradients of other weights")
        return shared, capture(lambda: torch._foreach_copy_(shared.tensors, gradients()), memory.pool)[1]

    def take(self, batch: dict[str, Any]) -> None:
        """Copy a batch to where the recorded kernels read it; what remains of an earlier one behind it is padding."""
        tokens, bounds = batch["input_ids"].shape[1], batch["cu_seq_lens_q"]
        self._ids[:, :tokens].copy_(batch["input_ids"], non_blocking=True)
        self._positions[:, :tokens].copy_(batch["position_ids"], non_blocking=True)
        self._bounds[: len(bounds)].copy_(bounds, non_blocking=True)
        self._bounds[len(bounds) :].fill_(self._size)

    def outputs(self, tensors: Sequence[Tensor], tokens: int) -> Any:
        """What the stack returns, without the padding, of what `forward` returned."""
        cut = [one[:, :tokens] if tokens < self._size else one for one in tensors]
        return returned_outputs(self._output_type, self._names, cut)

    def forward(self) -> tuple[Tensor, ...]:
        """Replay the forward pass: hidden states [1, size, H], and of some stacks router logits [layers, size, E]."""
        self._forward.replay()
        return tuple(one.clone() for one in self._outputs)

    def backward(self, grads: Sequence[Tensor]) -> list[Tensor]:
        """Replay the backward pass; the gradients of the parameters for those of what `forward` returned."""
        for own, grad in zip(self._grads, grads, strict=True):
            own.copy_(grad)
        return self._gradients.replayed(self._backward.replay)


class Replay(torch.autograd.Function):
    """The replayed passes; the parameters are inputs so that autograd hands them their gradients."""

    @staticmethod
    def forward(ctx: Any, memory: Memory, recording: Recording, *parameters: Tensor) -> tuple[Tensor, ...]:
        """What `Recording.forward` returns for the batch that the recording has taken."""
        ctx.save_for_backward(*parameters)
        ctx.memory, ctx.recording, ctx.own = memory, recording, Pass()
        memory.latest = weakref.ref(ctx.own)
        outputs = recording.forward()
        ctx.mark_non_differentiable(*compress(outputs, recording.fixed))
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of the parameters, or an error where a later pass has overwritten the activations."""
        _ = ctx.saved_tensors  # raises if one has changed since the forward pass
        if ctx.memory.latest() is not ctx.own:
            raise RuntimeError(
                "backward: got a second backward pass of outputs whose activations a later forward pass has "
                "overwritten, as the layers are recorded as CUDA graphs; allowed: all backward passes before the next "
                "forward pass, or cuda_graphs=False"
            )
        if not ctx.own.waits:  # an earlier backward pass has overwritten the activations
            ctx.recording.forward()
        ctx.own.waits = False
        return None, None, *ctx.recording.backward(grads)


def capture(work: Callable[[], Any], pool: Any) -> tuple[Any, Any]:
    """What the work returns, computed by each replay of the graph, and the graph.

    Args:
        work: launches kernels.
        pool: of another graph, whose memory this one may use; None for a pool of its own.

    Raises:
        Exception: what the work raises, or CUDA. The stream, the memory and the random numbers are then as before.
    """
    graph, generator = torch.cuda.CUDAGraph(), torch.cuda.default_generators[torch.cuda.current_device()]
    pool = torch.cuda.graph_pool_handle() if pool is None else pool
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    with torch.cuda.stream(_recorded_stream(torch.cuda.current_device())), ExitStack() as failed:
        failed.callback(_abandon, graph, pool, generator, generator.clone_state())
        # Another thread may pin a batch meanwhile, or watch NCCL.
        graph.capture_begin(pool=pool, capture_error_mode="thread_local")
        result = work()
        graph.capture_end()
        failed.pop_all()
    return result, graph


@cache
def _recorded_stream(device: int) -> Any:
    """The stream of all recordings, which share memory on it alone."""
    return torch.cuda.Stream(device)


def _abandon(graph: Any, pool: Any, generator: Any, numbers: Any) -> None:
    """End a recording that has failed.

    torch leaves the memory and the random numbers as they are while it records if CUDA cannot end the recording, as
    after an operation that cannot be recorded.
    """
    with suppress(RuntimeError):
        graph.capture_end()
    with suppress(RuntimeError):  # where that was done
        torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)
        torch._C._cuda_releasePool(torch.cuda.current_device(), pool)
    generator.graphsafe_set_state(numbers)


def _rehearse(work: Callable[[], Any], trained: Sequence[Parameter]) -> tuple[Any, Sequence[Tensor | None]]:
    """Compile and load all kernels, which cannot be done while CUDA records, on another stream, as CUDA asks for.

    Returns:
        The outputs, and the gradients of the parameters.
    """
    with other_stream(), _no_random_numbers():
        outputs = work()
        if not outputs[HIDDEN].requires_grad:
            raise ValueError("the layers have no weight to train")
        tensors = list(outputs.values())
        return outputs, gradients_of(tensors, trained, list(map(torch.zeros_like, tensors)), allow_unused=True)


@contextmanager
def other_stream() -> Iterator[None]:
    """Run on a stream of its own, between what was launched before and what is launched after."""
    stream, current = torch.cuda.Stream(), torch.cuda.current_stream()
    stream.wait_stream(current)
    try:
        with torch.cuda.stream(stream):
            yield
    finally:
        current.wait_stream(stream)


@contextmanager
def _no_random_numbers() -> Iterator[None]:
    """Raise ValueError if somebody draws random numbers within the context; later ones are as without it.

    A checkpointed layer would draw other ones when it is recomputed, and what Python decides by them is recorded.
    """
    generators = [(torch.get_rng_state, torch.set_rng_state), (random.getstate, random.setstate)]
    generators += [(numpy.random.get_state, numpy.random.set_state)]
    generators += [(torch.cuda.get_rng_state, torch.cuda.set_rng_state)] * (DEVICE == "cuda")
    before = [get() for get, _ in generators]
    try:
        yield
    finally:
        after = [get() for get, _ in generators]
        for (_, put), state in zip(generators, before, strict=True):
            put(state)
    if not all(map(_same, before, after)):
        raise ValueError("the layers draw random numbers")


def _same(state: Any, other: Any) -> bool:
    """Whether two states of a generator are equal: tensors, or tuples with arrays."""
    if isinstance(state, Tensor):
        return torch.equal(state, other)
    return all(numpy.array_equal(one, two) for one, two in zip(state, other, strict=True))


def _apart(grads: Sequence[Tensor]) -> list[Tensor]:
    """The gradients, none in the memory of another, as each becomes that of its parameter."""
    shared = Counter(grad.untyped_storage().data_ptr() for grad in grads)
    return [grad.clone() if shared[grad.untyped_storage().data_ptr()] > 1 else grad for grad in grads]


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
