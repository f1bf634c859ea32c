"""Wrong and right implementations of param_groups."""

from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any

from torch import nn
from torch.nn import Module, Parameter

from tests.judge.pieces import Collected
from unsloth_ref import checks, training
from unsloth_ref.types import ParamGroup, Role

collected = Collected()


def grouped(
    model: Module, of: Callable[[str, Parameter], tuple[Role, float, float]], *, frozen: bool = False
) -> list[ParamGroup]:
    """Group trainable parameters by role, rate and decay, which `of` returns; in the order of the contract."""
    found: dict[tuple[Role, float, float], list[Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad or frozen:
            found.setdefault(of(name, parameter), []).append(parameter)
    keys = sorted(found, key=lambda key: (key[0] == "embedding", -key[2]))
    return [ParamGroup(key[0], tuple(found[key]), *key[1:]) for key in keys]


def regrouped(groups: list[ParamGroup], **changes: Any) -> list[ParamGroup]:
    """Change the given fields of every group."""
    return [replace(group, **changes) for group in groups]


def by_suffix(model: Module, embedding_lr: float | None, is_embedding: Callable[[str], bool], **options: Any) -> Any:
    """The groups of the reference, but embeddings are selected by name."""
    plain = training.param_groups(model, **options)
    if embedding_lr is None:
        return plain
    decays = {id(parameter): group.weight_decay for group in plain for parameter in group.params}

    def of(name: str, parameter: Parameter) -> tuple[Role, float, float]:
        embeds = is_embedding(name)
        return "embedding" if embeds else "base", embedding_lr if embeds else options["lr"], decays[id(parameter)]

    return grouped(model, of)


@collected.passes("param_groups")
def walked_from_the_root(
    model: Module,
    *,
    lr: float,
    embedding_lr: float | None = None,
    weight_decay: float = 0.0,
    decay_names: Collection[str] | None = None,
) -> list[ParamGroup]:
    """Goes down the modules and remembers whether it is under an embedding."""
    for name, rate in (("lr", lr), ("weight_decay", weight_decay), ("embedding_lr", embedding_lr or 0.0)):
        checks.in_range(name, rate, 0.0)
    heads = set()
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        owner = next((module for module in model.modules() if hasattr(module, getter)), None)
        heads.add(id(getattr(owner, getter)()) if owner is not None else 0)
    roles: dict[int, Role] = {}

    def walk(module: Module, under: bool) -> None:
        wrapped = [getattr(module, name, None) for name in ("base_layer", "original_module")]
        under = under or id(module) in heads or any(isinstance(m, nn.Embedding) for m in (module, *wrapped))
        for parameter in module.parameters(recurse=False):
            if under or id(parameter) not in roles:
                roles[id(parameter)] = "embedding" if under else "base"
        for child in module.children():
            walk(child, under)

    walk(model, False)
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    if not trained:
        raise ValueError("model: got no trainable parameter")
    bare = None if decay_names is None else [_bare(name) for name in decay_names]

    def group(role: Role, decaying: bool) -> ParamGroup:
        params = tuple(
            p
            for n, p in trained
            if (roles[id(p)] if embedding_lr is not None else "base") == role
            and (p.ndim >= 2 if bare is None else _bare(n) in bare) == decaying
        )
        rate = embedding_lr if role == "embedding" and embedding_lr is not None else lr
        return ParamGroup(role, params, rate, weight_decay if decaying else 0.0)

    groups = [group(role, decaying) for role in ("base", "embedding") for decaying in (True, False)]
    return [found for found in groups if found.params]


def _bare(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in ("module", "_orig_mod"))


@collected.passes("param_groups")
def wrappers_taken_off(
    model: Module, *, decay_names: Collection[str] | None = None, **options: Any
) -> list[ParamGroup]:
    """Unwraps the model first."""
    while [name for name, _ in model.named_children()] in (["module"], ["_orig_mod"]):
        model = next(model.children())
    return training.param_groups(model, decay_names=decay_names, **options)


@collected.fails("param_groups", "roles")
def suffix_of_the_default_adapter(model: Module, *, embedding_lr: float | None = None, **options: Any) -> Any:
    """Embeddings are the parameters with one fixed suffix."""
    return by_suffix(model, embedding_lr, lambda name: name.endswith("modules_to_save.default.weight"), **options)


@collected.fails("param_groups", "roles")
def everything_saved_is_an_embedding(model: Module, *, embedding_lr: float | None = None, **options: Any) -> Any:
    """Norms under modules_to_save count as embeddings."""
    return by_suffix(
        model, embedding_lr, lambda name: "modules_to_save" in name or "embed" in name or "head" in name, **options
    )


@collected.fails("param_groups", "roles")
def embeddings_by_class(model: Module, *, embedding_lr: float | None = None, **options: Any) -> Any:
    """Only parameters of an nn.Embedding count: not LoRA on one, not the head."""
    own = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    names = {name for name, p in model.named_parameters() if id(p) in own}
    return by_suffix(model, embedding_lr, lambda name: name in names, **options)


@collected.fails("param_groups", "roles")
def zero_is_none(model: Module, *, embedding_lr: float | None = None, **options: Any) -> Any:
    """An embedding_lr of 0 counts as None."""
    return training.param_groups(model, embedding_lr=embedding_lr or None, **options)


@collected.fails("param_groups", "roles")
def value_never_stored(model: Module, *, embedding_lr: float | None = None, **options: Any) -> Any:
    """Ignores embedding_lr."""
    return training.param_groups(model, **options)


@collected.fails("param_groups", "decay")
def decay_lost_with_embedding_rate(model: Module, *, embedding_lr: float | None = None, **options: Any) -> Any:
    """With an embedding_lr, weight decay is lost."""
    groups = training.param_groups(model, embedding_lr=embedding_lr, **options)
    return groups if embedding_lr is None else regrouped(groups, weight_decay=0.0)


@collected.fails("param_groups", "decay")
def norms_and_biases_decay(model: Module, *, weight_decay: float = 0.0, **options: Any) -> Any:
    """All parameters decay."""
    return regrouped(training.param_groups(model, weight_decay=weight_decay, **options), weight_decay=weight_decay)


@collected.fails("param_groups", "decay")
def prefixes_unread(model: Module, *, decay_names: Collection[str] | None = None, **options: Any) -> Any:
    """decay_names do not match the names under a wrapper."""
    if decay_names is not None:
        known = {name for name, _ in model.named_parameters()}
        decay_names = [name for name in decay_names if name in known]
    return training.param_groups(model, decay_names=decay_names, **options)


@collected.fails("param_groups", "decay")
def prefixed_names_unread(model: Module, *, decay_names: Collection[str] | None = None, **options: Any) -> Any:
    """decay_names do not match if they have the prefix of a wrapper."""
    if decay_names is not None:
        decay_names = [name for name in decay_names if not name.startswith(("module.", "_orig_mod."))]
    return training.param_groups(model, decay_names=decay_names, **options)


@collected.fails("param_groups", "decay")
def matrices_alone_decay(model: Module, *, decay_names: Collection[str] | None = None, **options: Any) -> Any:
    """By default a tensor of three dimensions, such as one of all experts, does not decay."""
    if decay_names is None:
        decay_names = [name for name, parameter in model.named_parameters() if parameter.ndim == 2]
    return training.param_groups(model, decay_names=decay_names, **options)


@collected.fails("param_groups", "decay")
def embeddings_never_decay(model: Module, **options: Any) -> Any:
    """Embeddings do not decay, as in some recipes."""
    groups = training.param_groups(model, **options)
    return [replace(g, weight_decay=0.0) if g.role == "embedding" else g for g in groups]


@collected.fails("param_groups", "partition")
def always_two_groups(model: Module, **options: Any) -> Any:
    """Returns empty groups."""
    groups = training.param_groups(model, **options)
    return [*groups, *(ParamGroup(role, (), 0.01, 0.0) for role in ("base", "embedding"))]


@collected.fails("param_groups", "partition")
def frozen_included(model: Module, *, lr: float, **options: Any) -> Any:
    """Includes frozen parameters."""
    training.param_groups(model, lr=lr, **options)
    return grouped(model, lambda name, parameter: ("base", lr, 0.0), frozen=True)


@collected.fails("param_groups", "partition")
def tied_twice(model: Module, **options: Any) -> Any:
    """Includes a tied weight twice, once under each name."""
    groups = training.param_groups(model, **options)
    every = [id(p) for _, p in model.named_parameters(remove_duplicate=False)]
    return [replace(g, params=tuple(p for p in g.params for _ in range(every.count(id(p))))) for g in groups]


@collected.fails("param_groups", "partition")
def lora_on_embeddings_forgotten(model: Module, **options: Any) -> Any:
    """LoRA parameters of embeddings are in no group."""
    skipped = {id(p) for name, p in model.named_parameters() if "lora_embedding" in name}
    groups = training.param_groups(model, **options)
    kept = [replace(g, params=tuple(p for p in g.params if id(p) not in skipped)) for g in groups]
    return [group for group in kept if group.params]


@collected.fails("param_groups", "order")
def by_size(model: Module, **options: Any) -> Any:
    """Sorts the parameters of a group by size."""
    groups = training.param_groups(model, **options)
    return [replace(g, params=tuple(sorted(g.params, key=lambda p: p.numel()))) for g in groups]


@collected.fails("param_groups", "untouched")
def thaws_the_embedding(model: Module, **options: Any) -> Any:
    """Makes the embedding trainable."""
    groups = training.param_groups(model, **options)
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            module.requires_grad_()
    return groups


@collected.fails("param_groups", "error_parity")
def nothing_to_train_is_fine(model: Module, **options: Any) -> Any:
    """Returns no groups if no parameter is trainable."""
    if not any(parameter.requires_grad for parameter in model.parameters()):
        return []
    return training.param_groups(model, **options)


@collected.fails("param_groups", "signature_parity", contract=False)
def rate_by_default(model: Module, *, lr: float = 5e-5, **options: Any) -> Any:
    """lr has a default."""
    return training.param_groups(model, lr=lr, **options)
