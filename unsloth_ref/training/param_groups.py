"""Which parameters an optimizer treats alike: by role (embedding or not) and by whether they decay.

The role is found from modules and parameter identity, never from a name: adapters may have any name.
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

    def role_of(parameter: Parameter) -> Role:
        return "embedding" if embedding_lr is not None and _is_embedding(model, parameter) else "base"

    def decays(name: str, parameter: Parameter) -> bool:
        return parameter.ndim >= 2 if decay_names is None else _is_named(name, decay_names)

    groups = []
    roles: list[tuple[Role, float]] = [("base", lr), ("embedding", lr if embedding_lr is None else embedding_lr)]
    for role, rate in roles:
        for decaying, decay in ((True, weight_decay), (False, 0.0)):
            params = []
            for name, parameter in model.named_parameters():  # a tied parameter comes once
                if parameter.requires_grad and role_of(parameter) == role and decays(name, parameter) == decaying:
                    params.append(parameter)
            if params:
                groups.append(ParamGroup(role, tuple(params), rate, decay))
    if not groups:
        raise ValueError("model: got no trainable parameter; allowed: at least one (unfreeze some or add an adapter)")
    return groups


def _is_embedding(model: Module, parameter: Parameter) -> bool:
    """Whether the parameter lives under a module that embeds tokens or under the output head."""
    for module in _embedding_modules(model):
        for owned in module.parameters():
            if owned is parameter:
                return True
    return False


def _embedding_modules(model: Module) -> list[Module]:
    found = []
    for module in model.modules():
        # peft keeps the layer that it wraps under one of these names.
        wrapped = [child for name, child in module.named_children() if name in ("base_layer", "original_module")]
        if any(isinstance(layer, nn.Embedding) for layer in [module, *wrapped]):
            found.append(module)
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        for module in model.modules():
            if hasattr(module, getter):  # the outermost that has it: DistributedDataParallel has not
                with suppress(NotImplementedError):  # transformers' answer for a model without token embedding
                    found.append(getattr(module, getter)())
                break
    return [module for module in found if module is not None]


def _is_named(name: str, names: Collection[str]) -> bool:
    return any(_plain(name) == _plain(other) for other in names)


def _plain(name: str) -> str:
    """The parameter's name without the prefixes of DistributedDataParallel and torch.compile."""
    return name.removeprefix("module.").replace("_orig_mod.", "").removeprefix("module.")
