"""Parameter groups of an optimizer: by role (embedding or not) and by weight decay.

The role follows from modules and parameter identity, never from a name, because adapters may have any name.
"""

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

    def role_of(parameter: Parameter) -> Role:
        return "embedding" if embedding_lr is not None and _is_embedding(model, parameter) else "base"

    def decays(name: str, parameter: Parameter) -> bool:
        return parameter.ndim >= 2 if decay_names is None else _is_named(name, decay_names)

    groups = []
    roles: list[tuple[Role, float]] = [("base", lr), ("embedding", lr if embedding_lr is None else embedding_lr)]
    for role, rate in roles:
        for decaying, decay in ((True, weight_decay), (False, 0.0)):
            params = []
            for name, parameter in model.named_parameters():  # yields a tied parameter once
                if parameter.requires_grad and role_of(parameter) == role and decays(name, parameter) == decaying:
                    params.append(parameter)
            if params:
                groups.append(ParamGroup(role, tuple(params), rate, decay))
    if not groups:
        raise ValueError("model: got no trainable parameter; allowed: at least one (unfreeze some, or add an adapter)")
    return groups


def _is_embedding(model: Module, parameter: Parameter) -> bool:
    """Whether the parameter is under a module that embeds tokens or under the output head."""
    for module in _embedding_modules(model):
        for owned in module.parameters():
            if owned is parameter:
                return True
    return False


def _embedding_modules(model: Module) -> list[Module]:
    found = []
    for module in model.modules():
        # peft stores the layer that it wraps under one of these names.
        wrapped = [child for name, child in module.named_children() if name in ("base_layer", "original_module")]
        if any(isinstance(layer, nn.Embedding) for layer in [module, *wrapped]):
            found.append(module)
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        for module in model.modules():
            if hasattr(module, getter):  # the outermost module that has it; DistributedDataParallel does not
                with suppress(NotImplementedError):  # raised by transformers for a model without a token embedding
                    found.append(getattr(module, getter)())
                break
    return [module for module in found if module is not None]


def _is_named(name: str, names: Collection[str]) -> bool:
    return any(_unprefixed(name) == _unprefixed(other) for other in names)


def _unprefixed(name: str) -> str:
    """The name of the parameter without the prefixes of DistributedDataParallel and torch.compile."""
    return name.removeprefix("module.").replace("_orig_mod.", "").removeprefix("module.")
