"""Which parameters an optimizer treats alike: the ids of the embedding parameters in a set, then one pass by name."""

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
    """Every trainable parameter of the model in exactly one group.

    A parameter has the role "embedding" if it lives anywhere under the model's input embedding or output head (where
    the model has `get_input_embeddings` and `get_output_embeddings`), under an `nn.Embedding`, or under a wrapper that
    peft put around one: full fine-tuning, `modules_to_save`, LoRA on embeddings and trainable tokens alike.

    Args:
        model: any module; wrapped by peft, DistributedDataParallel or torch.compile or not.
        lr: learning rate per step; not negative.
        embedding_lr: learning rate of the role "embedding"; None for lr, and then everything has the role "base".
        weight_decay: of the parameters that decay; not negative.
        decay_names: names of the parameters that decay, as in `model.named_parameters()`, with or without the prefixes
            of DistributedDataParallel and torch.compile. None: those of two or more dimensions, so no bias and no norm.

    Returns:
        The groups that are not empty, in the order: base with decay, base without, embedding with decay, embedding
        without. Parameters in the order of the model, tied ones once.

    Raises:
        ValueError: nothing is trainable, or a rate or the decay is negative.
    """
    checks.in_range("lr", lr, 0.0)
    checks.in_range("weight_decay", weight_decay, 0.0)
    if embedding_lr is not None:
        checks.in_range("embedding_lr", embedding_lr, 0.0)

    embedding_ids = set() if embedding_lr is None else _embedding_ids(model)
    plain_names = None if decay_names is None else {_plain(name) for name in decay_names}
    keys: list[tuple[Role, bool]] = [("base", True), ("base", False), ("embedding", True), ("embedding", False)]
    params: dict[tuple[Role, bool], list[Parameter]] = {key: [] for key in keys}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decays = parameter.ndim >= 2 if plain_names is None else _plain(name) in plain_names
            params["embedding" if id(parameter) in embedding_ids else "base", decays].append(parameter)
    rates = {"base": lr, "embedding": lr if embedding_lr is None else embedding_lr}
    groups = [
        ParamGroup(role, tuple(found), rates[role], weight_decay if decays else 0.0)
        for (role, decays), found in params.items()
        if found
    ]
    if not groups:
        raise ValueError("model: got no trainable parameter; allowed: at least one (unfreeze some or add an adapter)")
    return groups


def _embedding_ids(model: Module) -> set[int]:
    """The ids of all parameters under the input embedding, the output head, and what is or wraps an `nn.Embedding`."""
    modules: list[Module | None] = [
        module for module in model.modules() if any(isinstance(layer, nn.Embedding) for layer in _layers(module))
    ]
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        owner = next((module for module in model.modules() if hasattr(module, getter)), None)
        with suppress(NotImplementedError):  # transformers' answer for a model without token embedding
            modules.append(None if owner is None else getattr(owner, getter)())
    return {id(parameter) for module in modules if module is not None for parameter in module.parameters()}


def _layers(module: Module) -> tuple[Module | None, ...]:
    """The module and what peft wraps with it."""
    return module, module._modules.get("base_layer"), module._modules.get("original_module")


def _plain(name: str) -> str:
    """The parameter's name without the prefixes of DistributedDataParallel and torch.compile."""
    return name.removeprefix("module.").replace("_orig_mod.", "").removeprefix("module.")
