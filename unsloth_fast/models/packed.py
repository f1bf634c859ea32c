"""How do concatenated documents go through transformers' attention interface without seeing each other?

A packed batch is one row of documents, in the form that transformers' flash attention takes: cu_seq_lens_q among the
keyword arguments, no attention_mask. The stack of layers passes the bounds of the documents as a mask of
[1, 1, documents + 1], int32, which transformers hands to the mask function of the model's attn_implementation. Ours,
"packed_sdpa" or "packed_eager", answers with the same bounds as [1, 1, W, documents + 1], W being the window. The
attention function of that name calls `packed_attention` for such a mask. So whatever reaches the attention, in a
checkpoint's recomputation too, says by itself what may be seen, and any other mask goes to the implementation before.

Patterns other than causal and sliding masks, and attention that `packed_attention` does not compute, get a mask of
[1, 1, T, T] made of the same bounds, for the implementation before; "masked_sdpa" and "masked_eager" always make it.
"""

import functools
import inspect
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.functional import pad
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    AttentionMaskInterface,
    causal_mask_function,
    sliding_window_causal_mask_function,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from unsloth_fast.models.dtypes import product_dtype
from unsloth_fast.models.interface import DELEGATES, WIDEST, Stack, examine, extras_of, takes_cap
from unsloth_fast.models.protocols import Forward
from unsloth_ref import document_checks

logger = logging.getLogger(__name__)

_STATE = "unsloth_documents"  # the attribute of a stack, of the attentions below it, and of the bounds that it passes
_DENSE = "unsloth_mask"  # the attribute of bounds with the mask that was made of them


@dataclass
class Documents:
    """What a stack and its attentions know of packed batches; one per stack.

    Attributes:
        name: the class of the stack, for the warning.
        masked: why all packed batches get a mask, ours or transformers'; None if they get none.
        kernel: the backend's `packed_attention`.
        function: the attention function of the implementation before; None for one that is left to transformers.
        extras: its keywords that the kernel has no counterpart for.
        sinks: whether it reads sinks of its module.
        mixed: whether layers carry a state, which needs the bounds too.
        wired: whether a run showed that the bounds reach the attentions, not the source.
        capped: whether that function knows of a cap on the scores; the sdpa of older releases passes over it.
        outer: whether a model around the stack makes its masks, which those of a packed batch replace.
        running: whether a packed batch is in the stack; known of one that is wired.
        warned: whether a mask was warned of.
        graphs: called with the stack's forward, the stack and the arguments, where the layers are recorded.
    """

    name: str
    masked: str | None
    kernel: Callable[..., Tensor]
    function: Callable[..., Any] | None
    extras: frozenset[str]
    sinks: bool
    mixed: bool = False
    wired: bool = False
    capped: bool = True
    outer: bool = False
    running: bool = False
    warned: bool = False
    graphs: Callable[..., Any] | None = None

    def warn(self, reason: str, tokens: int) -> None:
        """Warn once of a mask, with its cost."""
        if not (self.warned or torch.compiler.is_compiling()):
            self.warned = True
            logger.warning(
                "packed batches: %s attends under a mask of %d x %d (%s), over all pairs of tokens of a row: slower, "
                "and more memory, the longer the row; padding_free=False gives each document a row of its own",
                self.name, tokens, tokens, reason,
            )  # fmt: skip


def implementation_of(config: PreTrainedConfig) -> str | None:
    """The attn_implementation of a model, as it is without ours."""
    name: str | None = config._attn_implementation
    return name.split("_", 1)[1] if name in _NAMES else name


def place_documents(stack: PreTrainedModel, kernel: Callable[..., Tensor]) -> tuple[Stack, Forward | None]:
    """Make the implementation of a stack ours.

    Args:
        stack: one of `stacks_of`, in which no forward is replaced.
        kernel: the backend's `packed_attention`.

    Returns:
        How it takes documents, and the forward that it needs for that or for the warning of a mask; None for its own.
    """
    implementation = implementation_of(stack.config)
    found = examine(stack, implementation)
    if implementation not in DELEGATES:
        return found, None
    extras = frozenset[str]() if found.function is None else extras_of(found.function)
    reason = found.foreign or found.masked
    mixed = bool(found.mixers)
    known = (found.function, extras, found.sinks, mixed, found.wired, takes_cap(found.function))
    documents = Documents(type(stack).__name__, reason, kernel, *known)
    for module in (stack, *(found.attentions if found.function else ())):
        setattr(module, _STATE, documents)
    if found.function is not None:
        stack.config._attn_implementation = f"{'masked' if reason else 'packed'}_{implementation}"
    return found, _forward_of(type(stack).forward)


def documents_of(stack: PreTrainedModel) -> Documents | None:
    """What one of `stacks_of` knows of packed batches; None if it was not placed."""
    return getattr(stack, _STATE, None)


def is_foreign(stack: PreTrainedModel) -> bool:
    """Whether the masks of one of `stacks_of` are left to its own forward, placed or not."""
    documents = documents_of(stack)
    if documents is not None:
        return documents.function is None
    implementation = implementation_of(stack.config)
    return implementation in DELEGATES and examine(stack, implementation).foreign is not None


def remove_documents(model: Module) -> None:
    """Give each stack the implementation that it had before `place_documents`."""
    for module in model.modules():
        if vars(module).pop(_STATE, None) is not None and isinstance(module, PreTrainedModel):
            config: PreTrainedConfig = module.config
            if config._attn_implementation in _NAMES:
                config._attn_implementation = implementation_of(config)


def _forward_of(own: Callable[..., Any]) -> Forward:
    _, *names = inspect.signature(own).parameters
    caches = "use_cache" in names

    def with_documents(self: Any, *args: Any, **kwargs: Any) -> Any:
        bounds = kwargs.get("cu_seq_lens_q")
        documents = documents_of(self)
        if isinstance(bounds, Tensor):  # a model may give its stack the mask by position
            args, kwargs = args[:1], dict(zip(names[1:], args[1:], strict=False)) | kwargs
        if documents is not None and isinstance(bounds, Tensor) and documents.masked is not None:
            documents.warn(documents.masked, _inputs(args, kwargs).shape[1])
            if documents.function is None and caches:
                kwargs["use_cache"] = False  # with a cache, transformers does not look for documents in a row
        if documents is not None and isinstance(bounds, Tensor) and self.config._attn_implementation in _NAMES:
            check_batch(args, kwargs, outer=documents.outer)
            if documents.mixed:  # a cache would hold a state; some layers pass on no other keyword
                kwargs["seq_idx"] = bounds
                kwargs |= {"use_cache": False} if caches else {}
            kwargs["attention_mask"] = bounds.to(torch.int32).view(1, 1, -1)
            _remember(kwargs["attention_mask"], _STATE, documents)
        if documents is None or not documents.wired or not isinstance(bounds, Tensor):
            return type(self).forward(self, *args, **kwargs)
        documents.running = True
        try:
            return type(self).forward(self, *args, **kwargs)
        finally:
            documents.running = False

    @functools.wraps(own)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        documents = documents_of(self)
        if documents is not None and documents.graphs is not None:
            return documents.graphs(functools.partial(with_documents, self), self, args, kwargs)
        return with_documents(self, *args, **kwargs)

    return forward


def _inputs(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    given = (*args[:1], kwargs.get("input_ids"), kwargs.get("inputs_embeds"))
    return next(tensor for tensor in given if tensor is not None)


def check_batch(args: tuple[Any, ...], kwargs: dict[str, Any], *, outer: bool = False) -> None:
    """Raise ValueError for a packed batch of several rows, or with a cache, or a mask that no outer model made."""
    rows = _inputs(args, kwargs).shape[0]
    if kwargs.get("attention_mask") is not None and not outer:
        raise ValueError(
            "attention_mask: got one together with cu_seq_lens_q; allowed: None, as a packed batch has no padding"
        )
    if rows != 1:
        raise ValueError(f"input_ids: got {rows} rows and cu_seq_lens_q; allowed: 1 row of all documents")
    cache = kwargs.get("cache", kwargs.get("past_key_values"))  # the first name since transformers 5.24
    if cache is not None and cache.get_seq_length():
        raise ValueError(f"past_key_values: got {cache.get_seq_length()} tokens and cu_seq_lens_q; allowed: none")


def _mask(
    *args: Any,
    before: str,
    packed: bool,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    local_size: int | None = None,
    **options: Any,
) -> Any:
    """The mask function: the documents' bounds for a packed batch, else what the implementation before makes.

    allow_is_causal_skip is False if anything but a causal or a sliding mask is wanted.
    """
    if attention_mask is None or attention_mask.ndim != 3:
        skip = {"attention_mask": attention_mask, "allow_is_causal_skip": allow_is_causal_skip}
        return ALL_MASK_ATTENTION_FUNCTIONS[before](*args, **skip, local_size=local_size, **options)
    tokens, bounds = options["q_length"], attention_mask[0, 0]
    if packed and allow_is_causal_skip:
        window = tokens if local_size is None else min(local_size, tokens)
        return bounds.view(1, 1, 1, -1).expand(1, 1, window, -1)
    documents: Documents | None = getattr(attention_mask, _STATE, None)
    if packed and documents is not None:
        documents.warn("a mask that is neither causal nor sliding", tokens)
    return _dense(bounds, tokens, before, **options)


def _dense(bounds: Tensor, tokens: int, before: str, *, mask_function: Callable[..., Any], **options: Any) -> Any:
    """The mask of [1, 1, T, T] that keeps documents apart, in the form of the implementation before.

    Patterns such as chunks are those of positions within a document.
    """
    token = torch.arange(tokens, device=bounds.device)
    document = document_checks.document_of(bounds, token)
    position = token - bounds[document]

    def within(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = mask_function(row, head, position[query], position[key])
        return seen & (document[query] == document[key])

    sizes = {"batch_size": 1, "q_length": tokens, "kv_length": tokens, "q_offset": 0, "kv_offset": 0}
    return ALL_MASK_ATTENTION_FUNCTIONS[before](
        **options | sizes, mask_function=within, attention_mask=None, allow_is_causal_skip=False
    )


def _attention(
    module: Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    *,
    before: str,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """The attention function: `packed_attention` for the documents' bounds, else that of the implementation before.

    Args:
        module: the attention.
        query: [1, N, T, D]; key and value with K heads.
        key: see query.
        value: see query; its heads may be narrower.
        attention_mask: the bounds of the documents, [1, 1, window, documents + 1] int32, or any mask.
        before: the name of the implementation before.
        **options: the keywords that the module calls its attention function with.
    """
    documents: Documents | None = getattr(module, _STATE, None)
    function = (documents.function if documents else None) or _function_before(module, before)
    if attention_mask is None or attention_mask.dtype != torch.int32:
        if documents is not None and documents.running:
            raise ValueError(
                f"attention_mask: {documents.name} gave {type(module).__name__} a mask of its own for a packed batch, "
                "which may join documents; allowed: packing=False and padding_free=False"
            )
        return function(module, query, key, value, attention_mask, **options)
    tokens, window, bounds = query.shape[2], attention_mask.shape[2], attention_mask[0, 0, 0]
    if key.shape[2] != tokens:
        raise ValueError(f"past_key_values: got {key.shape[2] - tokens} tokens and cu_seq_lens_q; allowed: none")
    reason = "unknown attention" if documents is None else _obstacle(documents, query, key, value, options)
    if documents is None or reason is not None:
        if documents is not None:
            documents.warn(f"{type(module).__name__}: {reason}", tokens)
        mask = _dense_of(attention_mask, bounds, tokens, before, query.dtype)
        return function(module, query, key, value, mask, **options)
    width = value.shape[3]
    if value.dtype != query.dtype or query.dtype == torch.float32:  # as autocast does for torch's own attention
        dtype = product_dtype(query, key, value)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if width < query.shape[3]:  # as in multi-head latent attention; columns of zeros add nothing
        value = pad(value, (0, query.shape[3] - width))
    q, k, v = (heads.squeeze(0).transpose(0, 1) for heads in (query, key, value))
    limits = {"scale": options.get("scaling"), "softcap": (documents.capped and options.get("softcap")) or 0.0}
    limits |= {"window": window if window < tokens else None, "sinks": module.sinks if documents.sinks else None}
    out = documents.kernel(q, k, v, bounds, tokens, **limits)
    return out[None, :, :, :width], None


def _obstacle(documents: Documents, query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]) -> str | None:
    """Why `packed_attention` does not compute this call."""
    (_, heads, _, width), key_heads = query.shape, key.shape[1]
    if options.get("dropout"):
        return f"dropout={options['dropout']}"
    given = sorted(name for name in documents.extras if options.get(name) is not None)
    if given:
        return f"the keyword {given[0]}"
    if options.get("is_causal") is False:
        return "is_causal=False"
    if (options.get("scaling") or 0.0) < 0:
        return f"scaling={options['scaling']}"
    if heads % key_heads or key_heads != value.shape[1]:
        return f"{heads} heads of queries, {key_heads} of keys, {value.shape[1]} of values"
    if width > WIDEST or width != key.shape[3] or width < value.shape[3]:
        return f"heads of {width}, {key.shape[3]} and {value.shape[3]} columns"
    return None


def _dense_of(mask: Tensor, bounds: Tensor, tokens: int, before: str, dtype: torch.dtype) -> Any:
    """The mask of [1, 1, T, T] for bounds that an attention cannot take; layers that share these share it."""
    made = getattr(mask, _DENSE, None)
    if made is None:
        window = mask.shape[2]
        pattern = causal_mask_function if window >= tokens else sliding_window_causal_mask_function(window)
        made = _dense(bounds, tokens, before, mask_function=pattern, dtype=dtype, device=bounds.device)
        _remember(mask, _DENSE, made)
    return made


def _remember(tensor: Tensor, name: str, value: object) -> None:
    """Set an attribute of a tensor, which compiled code cannot."""
    if not torch.compiler.is_compiling():
        setattr(tensor, name, value)


def _function_before(module: Module, before: str) -> Callable[..., Any]:
    """The attention function of a module that was not placed, whose model shares its config with one that was."""
    if before != "eager":
        return ALL_ATTENTION_FUNCTIONS[before]
    return inspect.unwrap(type(module).forward).__globals__["eager_attention_forward"]


_NAMES = frozenset(f"{kind}_{before}" for kind in ("packed", "masked") for before in DELEGATES)

for _before in DELEGATES:
    for _kind in ("packed", "masked"):
        AttentionInterface.register(f"{_kind}_{_before}", functools.partial(_attention, before=_before))
        AttentionMaskInterface.register(
            f"{_kind}_{_before}", functools.partial(_mask, before=_before, packed=_kind == "packed")
        )
