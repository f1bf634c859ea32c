"""The loss inside a model's forward: output head and cross entropy in one operation, without the whole logits.

The forward of one model instance gets a private keyword. Because the loss is computed inside it, not from its outputs,
DistributedDataParallel, FSDP and autocast see an ordinary forward, and FSDP has gathered the head's weight.
"""

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.functional import linear
from transformers import PreTrainedModel

from unsloth_fast.backends import Backend
from unsloth_fast.models.dtypes import product_dtype
from unsloth_fast.models.load_balancing import load_balancing_loss
from unsloth_fast.models.logits import logit_options, without_head
from unsloth_fast.models.methods import has_foreign_forward, hooks_of, replace_method, replaced_method, restore_method
from unsloth_fast.models.protocols import CausalLM
from unsloth_fast.models.scores import score


class LossOutputs(NamedTuple):
    """What a forward returns with `backend_loss=True`; what was not asked for is None.

    Attributes:
        loss: of the next tokens, 0-dim.
        outputs: the model's own, with logits, by `with_outputs=True`.
        scores: the `scores.score` of the predictions, which need no whole logits, by `with_scores=True`.
        load_balancing: the `load_balancing_loss` of the routers, 0-dim, by `with_load_balancing=True`.
    """

    loss: Tensor
    outputs: Any = None
    scores: Tensor | None = None
    load_balancing: Tensor | None = None


def add_loss(model: CausalLM, backend: Backend, *, label_smoothing: float = 0.0) -> None:
    """Let `model(..., labels=labels, backend_loss=True, num_items=None)` return the loss, as `LossOutputs`.

    Without `backend_loss=True` the forward works as before.

    Head and cross entropy are the backend's `linear_cross_entropy` if the head is a plain linear layer of the last
    hidden states, trained or frozen, tied or not, which the first call checks (`logits.logit_options`). The logits are
    computed first if outputs are wanted, and for any other head: one with an adapter, a quantised one, one in tensor
    parallelism, one whose logits are more than its product.

    Args:
        model: the language model itself, inside any adapter; its `forward` is replaced on the instance, and
            `remove_loss` restores it. labels are [B, S], not shifted, -100 for positions that are no targets; num_items
            divides the summed loss, None for the call's own number of targets.
        backend: the result of `unsloth_fast.backends.resolve`.
        label_smoothing: the share, 0 to 1, of the target spread evenly over the vocabulary.
    """
    remove_loss(model)
    previous = model.forward
    parameters = inspect.signature(type(model).forward).parameters
    caches = "use_cache" in parameters or any(one.kind is one.VAR_KEYWORD for one in parameters.values())
    checked: dict[bool, dict[str, float] | None] = {}  # by mode: a layer before the head may work in training alone

    @functools.wraps(type(model).forward)  # `generate` reads the parameters
    def forward(
        self: CausalLM,
        *positional: object,
        backend_loss: bool = False,
        num_items: float | Tensor | None = None,
        with_outputs: bool = False,
        with_scores: bool = False,
        with_load_balancing: bool = False,
        **inputs: Any,
    ) -> object:
        # A deep copy shares this function, but TRL's fused head below it would run the model that was copied.
        own = previous if self is model else functools.partial(type(self).forward, self)
        if not backend_loss:
            return own(*positional, **inputs)
        if not caches:
            inputs.pop("use_cache", None)
        labels: Tensor = inputs.pop("labels")
        inputs |= {"output_router_logits": True} if with_load_balancing else {}
        options = {"num_items": num_items, "label_smoothing": label_smoothing}
        head = None if with_outputs else plain_head(self)
        if head is not None and self.training not in checked:
            checked[self.training] = logit_options(self, own, inputs | {"labels": labels})
        found = None if head is None else checked[self.training]
        if head is not None and found is not None:
            outputs = without_head(self)(*positional, **inputs)
            hidden = outputs.last_hidden_state
            loss, scores = _loss_of_hidden(self, head, hidden, labels, backend, options | found, with_scores)
        else:
            outputs = own(*positional, **inputs)
            if not hasattr(outputs, "logits"):
                found_type, owner = type(outputs).__name__, type(self).__name__
                raise TypeError(f"{owner}.forward: got a {found_type}; allowed: an output with the attribute logits")
            loss, scores = _loss_of_logits(outputs.logits, labels, backend, options, with_scores)
        load_balancing = None
        if with_load_balancing:
            routers = outputs.router_logits
            load_balancing = load_balancing_loss(self, routers, inputs.get("attention_mask")).to(loss.device)
        return LossOutputs(loss, outputs if with_outputs else None, scores, load_balancing)

    replace_method(model, "forward", forward, "loss")


def forward_with_loss(
    model: nn.Module,
    inputs: dict[str, Any],
    num_items: float | Tensor | None,
    *,
    with_outputs: bool,
    with_scores: bool,
    with_load_balancing: bool,
) -> LossOutputs:
    """The loss of a batch, without a cache.

    Args:
        model: the model, inside any wrapper; its forward is one that `add_loss` made.
        inputs: its keyword arguments, with labels [B, S].
        num_items: as in `add_loss`.
        with_outputs: whether the outputs are wanted.
        with_scores: whether the scores are wanted.
        with_load_balancing: whether the load-balancing loss is wanted.
    """
    options = {"with_outputs": with_outputs, "with_scores": with_scores, "with_load_balancing": with_load_balancing}
    options |= {"num_items": num_items, "use_cache": False, "backend_loss": True}
    return model(**{**inputs, **options})  # a batch may have a use_cache of its own


def remove_loss(model: CausalLM) -> None:
    """Undo `add_loss`: give the model its previous forward back.

    A forward that somebody else has put over it since then, such as accelerate's for autocast, stays.
    """
    restore_method(model, "forward", "loss")


def _loss_of_logits(
    logits: Tensor, labels: Tensor, backend: Backend, options: dict[str, Any], with_scores: bool
) -> tuple[Tensor, Tensor | None]:
    """The loss of whole logits [B, S, V], and the scores; None if they are not wanted."""
    labels = labels.to(logits.device)  # a model that is split over several devices has its logits on the last one
    loss = backend.training.next_token_loss(logits, labels, cross_entropy=backend.kernels.cross_entropy, **options)
    if not with_scores:
        return loss, None
    return loss, score(logits.flatten(0, 1), backend.training.shift_labels(labels).flatten())


def _loss_of_hidden(
    model: CausalLM,
    head: nn.Linear,
    hidden: Tensor,
    labels: Tensor,
    backend: Backend,
    options: dict[str, Any],
    with_scores: bool,
) -> tuple[Tensor, Tensor | None]:
    """The loss without the whole logits; the scores, None if they are not wanted.

    Args:
        model: the language model.
        head: its `plain_head`.
        hidden: the last hidden states, [B, S, H].
        labels: [B, S], not shifted.
        backend: as in `add_loss`.
        options: of `linear_cross_entropy`.
        with_scores: whether the scores are wanted.
    """
    targets = backend.training.shift_labels(labels).flatten()

    def loss_of(head: nn.Linear, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        dtype = product_dtype(hidden, head.weight)
        hidden = hidden.to(head.weight.device, dtype).flatten(0, 1)
        weight, bias = head.weight.to(dtype), None if head.bias is None else head.bias.to(dtype)
        loss = backend.kernels.linear_cross_entropy(hidden, weight, targets.to(hidden.device), bias, **options)
        if not with_scores:
            return loss, None

        def logits_of(rows: Tensor) -> Tensor:
            logits, cap = linear(rows, weight, bias) * options["logit_scale"], options["softcap"]
            return cap * (logits / cap).tanh() if cap else logits

        return loss, score(hidden, targets, logits_of)

    outer = model.get_output_embeddings()
    if outer is None or not _gathers(outer, head):
        return loss_of(head, hidden)
    # FSDP gathers a weight when its module is called, and reduces the gradient after the backward pass of that call.
    with replaced_method(head, "forward", loss_of, "head"):
        return outer(hidden)


def plain_head(model: CausalLM) -> nn.Linear | None:
    """The linear layer that computes the logits from the hidden states by its weight and bias alone; None without one.

    It may be peft's copy under `modules_to_save`, and FSDP may shard it, which gathers it when it is called. It has no
    adapter, no hooks, no forward that somebody has set, no quantised weight, no weight on the meta device and none that
    is sharded otherwise.
    """
    outer: Any = model.get_output_embeddings()
    head = outer
    copies = getattr(head, "modules_to_save", None)
    if copies is not None:
        off = head.disable_adapters or not head.active_adapters
        head = head.original_module if off else copies[head.active_adapters[0]]
    # fully_shard replaces the class of a module by one derived from FSDPModule and that class.
    own_class = type(head).__bases__[-1] if issubclass(type(head), FSDPModule) else type(head)
    plain = (
        own_class is nn.Linear
        and (_gathers(outer, head) or not isinstance(head.weight, DTensor))
        and head.weight.device.type != "meta"
        and head.weight.dim() == 2  # DeepSpeed shards it in a way of its own
        and not any(has_foreign_forward(module) for module in (outer, head))
        and not any(_is_foreign(hook) for module in (outer, head) for hook in hooks_of(module))
    )
    return head if plain else None


def _gathers(*modules: nn.Module) -> bool:
    """Whether calling one of the modules gathers a sharded weight."""
    return any(isinstance(module, FSDPModule) for module in modules)


def _is_foreign(hook: Callable[..., object]) -> bool:
    return not getattr(hook, "__module__", "").startswith("torch.distributed.fsdp.")


def without_adapter(model: object) -> PreTrainedModel:
    """The language model inside a `peft.PeftModel`; any other model itself."""
    whole: Any = model
    return whole.get_base_model() if hasattr(whole, "get_base_model") else whole


@contextmanager
def head_without_adapter(model: nn.Module | str) -> Iterator[None]:
    """Hide the adapter of the output head: TRL refuses one because its own loss would not train it; ours does."""
    if isinstance(model, str):
        yield
        return

    def get_output_embeddings(self: CausalLM) -> nn.Module | None:
        head = type(self).get_output_embeddings(self)
        return head.get_base_layer() if isinstance(head, BaseTunerLayer) else head

    with replaced_method(without_adapter(model), "get_output_embeddings", get_output_embeddings, "head"):
        yield
