"""The loss inside a model's forward: the output head and the cross entropy in one operation, the logits never whole.

The forward of one model instance learns a private keyword. Computing the loss inside of it, not from its outputs, is
what lets DistributedDataParallel, FSDP and autocast see an ordinary forward, with the head's weight gathered.
"""

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from unsloth_fast.backends import Backend

# Models whose logits are lm_head(hidden), then times a scale and capped: where the configuration keeps either.
_PLAIN: dict[str, str | None] = {"logit_scale": None, "softcap": None}
_HEADS: dict[str, dict[str, str | None]] = {
    "LlamaForCausalLM": _PLAIN,
    "MistralForCausalLM": _PLAIN,
    "Qwen2ForCausalLM": _PLAIN,
    "Qwen3ForCausalLM": _PLAIN,
    "GemmaForCausalLM": _PLAIN,
    "Phi3ForCausalLM": _PLAIN,
    "SmolLM3ForCausalLM": _PLAIN,
    "Gemma2ForCausalLM": _PLAIN | {"softcap": "final_logit_softcapping"},
    "Gemma3ForCausalLM": _PLAIN | {"softcap": "final_logit_softcapping"},
    "CohereForCausalLM": _PLAIN | {"logit_scale": "logit_scale"},
    "Cohere2ForCausalLM": _PLAIN | {"logit_scale": "logit_scale"},
}


def add_loss(model: Any, backend: Backend, *, label_smoothing: float = 0.0) -> None:
    """Let `model(..., labels=labels, backend_loss=True, num_items=None)` return the loss of the next tokens alone.

    Without `backend_loss=True` the forward stays what it is. With it, the head and the cross entropy are the backend's
    `linear_cross_entropy` where the head is a plain linear layer of a known kind of model, trained or not, tied or not;
    elsewhere (an adapter on the head, a quantised head, one in tensor parallelism, an unknown kind) the logits are made
    first.

    Args:
        model: the language model itself, inside of any adapter; its `forward` is replaced on the instance. Labels are
            [B, S], not shifted, and -100 where they are no targets; num_items divides the summed loss, None for the
            call's own number of targets.
        backend: of `unsloth_fast.backends.resolve`.
        label_smoothing: the share, 0 to 1, of the target spread evenly over the vocabulary.
    """
    original: Callable[..., Any] = model.forward
    options = _logit_options(model)

    @functools.wraps(type(model).forward)  # `generate` looks at the parameters
    def forward(
        self: Any, *positional: Any, backend_loss: bool = False, with_outputs: bool = False, **keywords: Any
    ) -> Any:
        # A deep copy has this function, too, but TRL's fused head under it would run the model that was copied.
        own = original if self is model else functools.partial(type(self).forward, self)
        if not backend_loss:
            return own(*positional, **keywords)
        labels, num_items = keywords.pop("labels"), keywords.pop("num_items", None)
        head = None if options is None or with_outputs else plain_head(self)
        if head is None:
            outputs = own(*positional, **keywords)
            logits = outputs.logits
            loss = backend.training.next_token_loss(
                logits,
                labels.to(logits.device),  # the last device of a model that is split over several
                cross_entropy=backend.kernels.cross_entropy,
                num_items=num_items,
                label_smoothing=label_smoothing,
            )
            return (loss, outputs) if with_outputs else loss
        targets = backend.training.shift_labels(labels).flatten()

        def loss_of(input: Tensor) -> Tensor:
            hidden = input.to(head.weight.device)
            return backend.kernels.linear_cross_entropy(
                hidden.flatten(0, 1),
                head.weight,
                targets.to(hidden.device),
                head.bias,
                num_items=num_items,
                label_smoothing=label_smoothing,
                **(options or {}),
            )

        hidden = self.base_model(*positional, **keywords).last_hidden_state
        outer = self.get_output_embeddings()
        if not _gathers(outer, head):
            return loss_of(hidden)
        # FSDP gathers a weight for a call of its module, and takes in the gradient after the call's backward.
        head.forward = loss_of
        try:
            return outer(hidden)
        finally:
            del head.forward

    model.forward = MethodType(forward, model)


def plain_head(model: Any) -> nn.Linear | None:
    """The linear layer whose weight and bias alone make the logits of the hidden states; None if they do not.

    peft's copy under `modules_to_save` counts, and one that FSDP gathers when it is called; an adapter on the head, a
    quantised one, one that is sharded otherwise, one on no device and one with hooks do not.
    """
    outer = head = model.get_output_embeddings()
    copies = getattr(head, "modules_to_save", None)
    if copies is not None:
        off = head.disable_adapters or not head.active_adapters
        head = head.original_module if off else copies[head.active_adapters[0]]
    # fully_shard derives a class.
    kind = type(head).__bases__[-1] if issubclass(type(head), FSDPModule) else type(head)
    plain = (
        kind is nn.Linear
        and (_gathers(outer, head) or not isinstance(head.weight, DTensor))
        and head.weight.device.type != "meta"
        and not any(_is_foreign(hook) for module in (outer, head) for hook in _hooks(module))
    )
    return head if plain else None


def _gathers(*modules: nn.Module) -> bool:
    """Whether a call of one of the modules gathers a sharded weight."""
    return any(isinstance(module, FSDPModule) for module in modules)


def _hooks(module: nn.Module) -> Iterable[Any]:
    return (*module._forward_hooks.values(), *module._forward_pre_hooks.values())


def _is_foreign(hook: Any) -> bool:
    return not getattr(hook, "__module__", "").startswith("torch.distributed.fsdp.")


def _logit_options(model: Any) -> dict[str, float] | None:
    """The options of `linear_cross_entropy` for a model of a known kind; None for an unknown one."""
    fields = _HEADS.get(type(model).__name__)
    if fields is None:
        return None
    values = {option: field and getattr(model.config, field) for option, field in fields.items()}
    return {option: float(value) for option, value in values.items() if value}


def without_adapter(model: Any) -> Any:
    """The language model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@contextmanager
def head_without_adapter(model: Any) -> Iterator[None]:
    """Show the output head without its adapter: TRL refuses one, which its own loss would not train; ours does."""
    if isinstance(model, str):
        yield
        return
    inner = without_adapter(model)

    def get_output_embeddings() -> Any:
        head = type(inner).get_output_embeddings(inner)
        return head.get_base_layer() if isinstance(head, BaseTunerLayer) else head

    inner.get_output_embeddings = get_output_embeddings
    try:
        yield
    finally:
        del inner.get_output_embeddings
