"""Parameter groups of an optimizer: a set of the ids of embedding parameters, then one pass over the model."""

from collections.abc import Collection
from contextlib import suppress

from torch import nn
from torch.nn import Module, Parameter

from unsloth_ref import checks
from unsloth_ref.types import ParamGroup, Role


def param_groups(
    model: Module,
    *,
    lr: float,
    embedding_lr: float | None = None,
    weight_decay: float = 0.0,
    decay_names: Collection[str] | None = None,
) -> list[ParamGroup]:
    """Put every trainable parameter of the model into exactly one group, by role and by weight decay.

    A parameter has the role "embedding" if it is anywhere under the model's input embedding or output head (if the
    model has `get_input_embeddings` and `get_output_embeddings`), under an `nn.Embedding`, or under a peft module that
    wraps one. This covers full fine-tuning, `modules_to_save`, LoRA on embeddings and trainable tokens.

    Args:
        model: any module; peft, DistributedDataParallel or torch.compile may have wrapped it.
        lr: learning rate, at least 0.
        embedding_lr: learning rate of the role "embedding", at least 0. None uses lr, and gives all parameters the role
            "base".
        weight_decay: weight decay of the parameters that decay, at least 0.
        decay_names: names of the parameters that decay, as in `model.named_parameters()`, with or without the prefixes
            of DistributedDataParallel and torch.compile. None selects those of two or more dimensions, which excludes
            biases and norms.

    Returns:
        The groups that are not empty, in this order: base with decay, base without, embedding with decay, embedding
        without. Parameters are in the order of the model; tied parameters appear once.

    Raises:
        ValueError: no parameter is trainable, or lr, embedding_lr or weight_decay is negative.
    """
    checks.in_range("lr", lr, 0.0)
    checks.in_range("weight_decay", weight_decay, 0.0)
    if embedding_lr is not None:
        checks.in_range("embedding_lr", embedding_lr, 0.0)

    embedding_ids = set() if embedding_lr is None else _embedding_ids(model)
    decaying = None if decay_names is None else {_unprefixed(name) for name in decay_names}
    keys: list[tuple[Role, bool]] = [("base", True), ("base", False), ("embedding", True), ("embedding", False)]
    params: dict[tuple[Role, bool], list[Parameter]] = {key: [] for key in keys}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decays = parameter.ndim >= 2 if decaying is None else _unprefixed(name) in decaying
            params["embedding" if id(parameter) in embedding_ids else "base", decays].append(parameter)
    rates = {"base": lr, "embedding": lr if embedding_lr is None else embedding_lr}
    groups = [
        ParamGroup(role, tuple(found), rates[role], weight_decay if decays else 0.0)
        for (role, decays), found in params.items()
        if found
    ]
    if not groups:
        raise ValueError("model: got no trainable parameter; allowed: at least one (unfreeze some, or add an adapter)")
    return groups


def _embedding_ids(model: Module) -> set[int]:
    """The ids of the parameters under the input embedding, the output head, and each (wrapped) `nn.Embedding`."""
    modules: list[Module | None] = [
        module for module in model.modules() if any(isinstance(layer, nn.Embedding) for layer in _layers(module))
    ]
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        owner = next((module for module in model.modules() if hasattr(module, getter)), None)
        with suppress(NotImplementedError):  # raised by transformers for a model without a token embedding
            modules.append(None if owner is None else getattr(owner, getter)())
    return {id(parameter) for module in modules if module is not None for parameter in module.parameters()}


def _layers(module: Module) -> tuple[Module | None, ...]:
    """The module, and the layer that it wraps if it is a module of peft."""
    return module, module._modules.get("base_layer"), module._modules.get("original_module")


def _unprefixed(name: str) -> str:
    """The name of the parameter without the prefixes of DistributedDataParallel and torch.compile."""
    return name.removeprefix("module.").replace("_orig_mod.", "").removeprefix("module.")
