"""Do a stack's masks reach its attentions as transformers' functions made them? Seen by running a few tokens.

The source of a forward does not show what its helpers do. So the stack runs under an attn_implementation that watches:
its mask function gives out a marker for the bounds of documents, and its attention function must get that marker. Any
operator of torch that takes the bounds or a marker computes with masks, which the bounds of documents are not.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from unsloth_fast.failures import FAILURES
from unsloth_fast.models.logits import undisturbed, vocabulary_of

_TOKENS = 3  # Each token is a document. The mask then has one column more than the row has tokens: a slice is noticed.
_FAR = 2**40  # a distance that no window of a causal mask ends
_READS = ("__get__", "size", "dim", "is_floating_point")  # of a tensor's shape, dtype and device, not of its elements

FunctionOf = Callable[[Module], Callable[..., Any] | None]


@dataclass
class _Watch:
    """What a run showed.

    Attributes:
        function_of: the attention function that a module has without us.
        bounds: of the documents, as the attention_mask of a packed row; None for an ordinary row.
        markers: the masks given out for them.
        attentions: the modules that called the attention function, by their id.
        fault: what is in the way of bounds; "" for nothing.
    """

    function_of: FunctionOf
    bounds: Tensor | None = None
    markers: list[Tensor] = field(default_factory=list)
    attentions: dict[int, Module] = field(default_factory=dict)
    fault: str = ""


_WATCH: ContextVar[_Watch] = ContextVar("unsloth_watch")


def wired_attentions(stack: PreTrainedModel, before: str, function_of: FunctionOf) -> list[Module]:
    """The attentions of a stack that bounds of documents reach untouched; none if anything else is seen, or raised.

    Every attention must get a causal or a sliding mask of transformers' function, made of the bounds that the stack was
    given as its attention_mask, an ordinary row must keep its bits, and a document must give what it gives alone. The
    stack runs on three tokens, in evaluation mode and without gradients; it is afterwards as it was.

    Args:
        stack: a stack of layers, in which no forward is replaced.
        before: its attn_implementation, "sdpa" or "eager".
        function_of: the attention function that a module has with it; None if it was not found.
    """
    if any(each.is_meta for each in stack.parameters()):
        return []
    bounds = torch.arange(_TOKENS + 1, dtype=torch.int32, device=stack.device).view(1, 1, -1)
    keywords = {"cu_seq_lens_q": bounds[0, 0], "cu_seq_lens_k": bounds[0, 0], "max_length_q": 1, "max_length_k": 1}
    packed, ordinary = _Watch(function_of, bounds), _Watch(function_of)
    try:
        row = torch.arange(_TOKENS, device=stack.device)[None] % vocabulary_of(stack)
        with undisturbed(stack, stack, stack.device):
            with _watching(stack, before, packed), _Untouched(packed):
                joined = _states(stack, row, attention_mask=bounds, position_ids=torch.zeros_like(row), **keywords)
            if packed.fault or not packed.attentions:
                return []
            with _watching(stack, before, ordinary):
                seen = _states(stack, row)
            same = torch.equal(_states(stack, row), seen)
            # A document of one token attends to its value alone. RoBERTa's own positions do not begin at 0.
            alone = torch.cat([_states(stack, token) for token in row.split(1, 1)], 1)
            same &= bool((joined - alone).norm() <= torch.finfo(alone.dtype).eps ** 0.5 * alone.norm())
    except FAILURES:
        return []
    return list(packed.attentions.values()) if same and packed.attentions.keys() == ordinary.attentions.keys() else []


def _states(stack: Any, row: Tensor, **keywords: Any) -> Tensor:
    return stack(input_ids=row, use_cache=False, **keywords)[0]


@contextmanager
def _watching(stack: PreTrainedModel, before: str, watch: _Watch) -> Iterator[None]:
    token, own = _WATCH.set(watch), stack.config._attn_implementation
    stack.config._attn_implementation = f"watched_{before}"
    try:
        yield
    finally:
        stack.config._attn_implementation = own
        _WATCH.reset(token)


class _Untouched(TorchFunctionMode):
    """Sees each operator that takes the bounds or a marker; `_mask` and `_attention` themselves use none."""

    def __init__(self, watch: _Watch) -> None:
        super().__init__()
        self.watch = watch

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        watched = {*map(id, self.watch.markers), id(self.watch.bounds)}
        given = (*args, *(kwargs or {}).values())
        if func.__name__ not in _READS and any(isinstance(each, Tensor) and id(each) in watched for each in given):
            self.watch.fault = f"{func.__name__} of a mask"
        return func(*args, **(kwargs or {}))


def _mask(
    *args: Any,
    before: str,
    attention_mask: Tensor | None = None,
    mask_function: Callable[..., Any],
    allow_is_causal_skip: bool = True,
    local_size: int | None = None,
    **options: Any,
) -> Any:
    watch = _WATCH.get()
    if watch.bounds is None:
        given = {"attention_mask": attention_mask, "mask_function": mask_function, "local_size": local_size}
        given |= {"allow_is_causal_skip": allow_is_causal_skip} | options
        return ALL_MASK_ATTENTION_FUNCTIONS[before](*args, **given)
    if attention_mask is not watch.bounds or not allow_is_causal_skip or not _is_sliding(mask_function, local_size):
        watch.fault = "a mask of another kind"
    watch.markers.append(torch.zeros(1, 1, _TOKENS, _TOKENS + 1, dtype=torch.int32, device=watch.bounds.device))
    return watch.markers[-1]


def _is_sliding(mask_function: Callable[..., Any], window: int | None) -> bool:
    """Whether the last key in the window is seen, wherever the query is, and the one before is not; nor later ones."""
    size, zero = window or _FAR, torch.zeros((), dtype=torch.int64)
    queries = [zero + size, zero + 2 * size - 1]
    return all(
        bool(mask_function(zero, zero, query, query - size + 1))
        and not (window and bool(mask_function(zero, zero, query, query - size)))
        and not bool(mask_function(zero, zero, query, query + 1))
        for query in queries
    )


def _attention(
    module: Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *args: Any, **options: Any
) -> tuple[Tensor, Tensor | None]:
    watch = _WATCH.get()
    watch.attentions[id(module)] = module
    if watch.bounds is not None:
        if not any(attention_mask is marker for marker in watch.markers):
            watch.fault = "an attention with another mask"
        return value.repeat_interleave(query.shape[1] // value.shape[1], 1).transpose(1, 2), None
    function = watch.function_of(module)
    if function is None:
        raise LookupError("no attention function")
    return function(module, query, key, value, attention_mask, *args, **options)


for _before in ("sdpa", "eager"):
    AttentionInterface.register(f"watched_{_before}", _attention)
    AttentionMaskInterface.register(f"watched_{_before}", functools.partial(_mask, before=_before))
