"""What does a model compute for some documents: hidden states of its layers, logits, losses, every gradient?"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from conformance.tolerances.gates import Unchecked
from conformance.trial import Caught, describe
from unsloth_fast.call_tensors import sum_of_bits
from unsloth_fast.models.head import without_adapter
from unsloth_fast.models.load_balancing import load_balancing_loss

Results = dict[str, Tensor]

LOGITS, LOSS, LOAD_BALANCING = "logits", "the loss", "the load-balancing loss"
HIDDEN, GRADIENT = "the hidden states of ", "the gradient of "  # before a name


def layers_of(model: nn.Module) -> dict[str, nn.Module]:
    """The layers of a model by name: the members of its outermost lists of modules that have parameters."""
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{layer}.") for layer in found)
        if isinstance(module, nn.ModuleList) and not inside:
            layers = {f"{name}.{index}": layer for index, layer in enumerate(module)}
            found |= {name: layer for name, layer in layers.items() if any(True for _ in layer.parameters())}
    return found


def run(
    model: Any,
    batches: Sequence[Mapping[str, Any]],
    *,
    targets: int | None = None,
    own_loss: bool = False,
    balanced: bool = False,
) -> Results:
    """Run a model on batches, and the backward pass of the loss, if the batches have labels.

    Args:
        model: in training mode; its gradients are replaced.
        batches: keyword arguments of the forward. Their documents are in the same order in any kind of batch.
        targets: divides the summed loss; None for the number of targets of a single batch.
        own_loss: whether the forward takes `backend_loss`, as `unsloth_fast.models.head.add_loss` makes it. There are
            no logits then. Otherwise the loss is computed here, by its definition.
        balanced: whether the load-balancing loss of experts is wanted too, over the tokens of all documents, which is
            no sum over documents. For the backward pass it is added with a factor of 1, not the small one of the
            configuration, so that its gradients show in 16 bits.

    Returns:
        By name: the hidden states of each layer, [T, H], and the logits, [T, V], of all tokens of the documents; the
        losses; the gradient of each parameter that has one.
    """
    model.zero_grad(set_to_none=True)
    parts: dict[str, list[Tensor]] = {}
    losses: list[Tensor] = []
    balances: list[Tensor] = []
    routers: list[list[Tensor]] = []
    for batch in batches:
        inputs = dict(batch)
        mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
        labels = inputs.get("labels")
        with _recording(model, mask, parts):
            if own_loss:
                options = {"backend_loss": True, "num_items": targets, "with_load_balancing": balanced}
                outputs = model(**inputs, **without_cache(model), **options)
                loss = outputs.loss
                balances += [outputs.load_balancing] if balanced else []
            else:
                inputs |= {"output_router_logits": True} if balanced else {}
                inputs.pop("labels", None)
                outputs = model(**inputs, **without_cache(model))
                parts.setdefault(LOGITS, []).append(outputs.logits[mask])
                loss = None if labels is None else textbook_loss(outputs.logits, labels, targets)
                routers += [[each[mask.flatten()] for each in outputs.router_logits]] if balanced else []
        if loss is not None:
            losses.append(loss)
            if not balanced and loss.requires_grad:
                loss.backward()
    if routers:
        logits = tuple(map(torch.cat, zip(*routers, strict=True)))
        balances = [load_balancing_loss(without_adapter(model), logits, None)]
    if balances:
        (torch.stack(losses).sum() + torch.stack(balances).sum()).backward()
    found = {name: torch.cat(pieces).detach() for name, pieces in parts.items()}
    for name, values in ((LOSS, losses), (LOAD_BALANCING, balances)):
        found |= {name: torch.stack(values).detach().sum()} if values else {}
    return found | gradients_of(model)


def textbook_loss(logits: Tensor, labels: Tensor, targets: int | None) -> Tensor:
    """The cross entropy of the next tokens, in float32 at least, divided by `targets` or by their number."""
    rows, following = logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten()
    count = targets if targets is not None else (following != -100).sum()
    return cross_entropy(rows, following, reduction="sum") / count


def gradients_of(model: nn.Module) -> Results:
    """The gradients by the names of their parameters; the last layer's come first, as in a backward pass."""
    named = [*model.named_parameters()]
    return {f"{GRADIENT}{name}": p.grad for name, p in reversed(named) if p.grad is not None}


def turned_back(results: Results, lengths: Sequence[int]) -> Results:
    """The results of documents of these lengths, run in the opposite order, in this order."""
    of_tokens = [name for name in results if name.startswith((HIDDEN, LOGITS))]
    return results | {name: torch.cat(results[name].split([*reversed(lengths)])[::-1]) for name in of_tokens}


def copied(batches: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The batches with tensors of their own."""
    return [{name: each.clone() if isinstance(each, Tensor) else each for name, each in one.items()} for one in batches]


def sums_of_bits(model: nn.Module, batches: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """The `sum_of_bits` of each parameter and input."""
    named = [(name, parameter) for name, parameter in model.named_parameters() if not parameter.is_meta]
    named += [(name, each) for batch in batches for name, each in batch.items() if isinstance(each, Tensor)]
    sums = [sum_of_bits(each.detach()) for _, each in named]
    return dict(zip((name for name, _ in named), torch.stack(sums).tolist(), strict=True))


@contextmanager
def excuse() -> Iterator[None]:
    """Raise Unchecked for what the untouched model raises within the context: nothing can be compared with it then."""
    with Caught() as caught:
        yield
    if caught.error is not None:
        raise Unchecked(f"the untouched model raises {describe(caught.error)}") from caught.error


def without_cache(model: nn.Module) -> dict[str, bool]:
    """The keyword that turns a cache off, for a forward that takes it."""
    parameters = inspect.signature(type(without_adapter(model)).forward).parameters
    takes = "use_cache" in parameters or any(one.kind is one.VAR_KEYWORD for one in parameters.values())
    return {"use_cache": False} if takes else {}


@contextmanager
def _recording(model: nn.Module, mask: Tensor, parts: dict[str, list[Tensor]]) -> Iterator[None]:
    """Append what layers return for the tokens of documents; a layer that is called again has a number in its name."""
    calls: dict[str, int] = {}

    def record(name: str, outputs: Any) -> None:
        states = outputs[0] if isinstance(outputs, tuple) and outputs else outputs
        if isinstance(states, Tensor) and states.shape[:2] == mask.T.shape != mask.shape:  # tokens come first
            states = states.transpose(0, 1)
        if isinstance(states, Tensor) and states.shape[:2] == mask.shape and states.is_floating_point():
            calls[name] = calls.get(name, 0) + 1
            called = f"{name}, call {calls[name]}" if calls[name] > 1 else name
            parts.setdefault(f"{HIDDEN}{called}", []).append(states.detach()[mask])

    with ExitStack() as stack:
        for name, layer in layers_of(model).items():
            hook = layer.register_forward_hook(lambda module, args, outputs, name=name: record(name, outputs))
            stack.callback(hook.remove)
        yield
