"""The parameter groups of an optimizer."""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import nn

from conformance.piece import Mistake, Piece, PieceCase, PieceTrial
from conformance.pieces._shared import Arguments, comparable, equal
from conformance.tolerances.gates import Failure
from unsloth_ref.types import ParamGroup

SIZE = 3


@dataclass(frozen=True)
class GroupsCase(PieceCase):
    """A small language model, and which of its parameters are trained.

    Attributes:
        training: "full", or what an adapter trains in addition to projections: "projections" (nothing), "saved" (copies
            of embedding and head), "saved_norm" (and of the norm), "lora" (on embedding and head), "tokens" (some
            embeddings).
        adapter: the name of the adapter.
        tied: whether the head shares the weight of the embedding.
        getters: whether the model has `get_input_embeddings` and `get_output_embeddings`, as Hugging Face's do.
        frozen: parameters with this in their name are frozen; "" freezes none.
        wrapper: "none", "module" (as DistributedDataParallel), "_orig_mod" (as torch.compile) or "both".
        embedding_lr: in thousandths; None for the same rate.
        weight_decay: in hundredths.
        decay: whether parameters decay by "shape", by "names", or by "wrapped" names, those of the wrapped model.
    """

    training: str = "full"
    adapter: str = "default"
    tied: bool = False
    getters: bool = True
    frozen: str = ""
    wrapper: str = "none"
    embedding_lr: int | None = None
    weight_decay: int = 1
    decay: str = "shape"


def draw(elements: int) -> st.SearchStrategy[GroupsCase]:
    """Draw any combination of the fields."""
    return st.builds(
        GroupsCase,
        training=st.sampled_from(["full", "projections", "saved", "saved_norm", "lora", "tokens"]),
        adapter=st.sampled_from(["default", "cpt"]),
        tied=st.booleans(),
        getters=st.booleans(),
        frozen=st.sampled_from(["", "norm", "bias", "head"]),
        wrapper=st.sampled_from(["none", "module", "_orig_mod", "both"]),
        embedding_lr=st.sampled_from([5, None, 0, 10]),
        weight_decay=st.sampled_from([1, 0]),
        decay=st.sampled_from(["shape", "names", "wrapped"]),
    )


class Saved(nn.Module):
    """A frozen module and a trainable copy of it, as peft's modules_to_save."""

    def __init__(self, module: nn.Module, adapter: str) -> None:
        """Copy the module."""
        super().__init__()
        self.original_module = module.requires_grad_(False)
        self.modules_to_save = nn.ModuleDict({adapter: copy.deepcopy(module).requires_grad_()})


class Adapted(nn.Module):
    """A frozen layer with two small matrices, as peft's LoRA layers."""

    def __init__(self, layer: nn.Module, adapter: str) -> None:
        """The matrices of an embedding are parameters, not modules, as in peft."""
        super().__init__()
        self.base_layer = layer.requires_grad_(False)
        if isinstance(layer, nn.Embedding):
            self.lora_embedding_A = nn.ParameterDict({adapter: torch.ones(1, SIZE)})
            self.lora_embedding_B = nn.ParameterDict({adapter: torch.ones(SIZE, 1)})
        else:
            self.lora_A = nn.ModuleDict({adapter: nn.Linear(SIZE, 1, bias=False)})
            self.lora_B = nn.ModuleDict({adapter: nn.Linear(1, SIZE, bias=False)})


class Tokens(nn.Module):
    """A frozen embedding with some trainable rows, as peft's trainable tokens."""

    def __init__(self, layer: nn.Module, adapter: str) -> None:
        """Add two trainable rows to the layer."""
        super().__init__()
        self.base_layer = layer.requires_grad_(False)
        self.trainable_tokens_delta = nn.ParameterDict({adapter: torch.ones(2, SIZE)})


class Wrapper(nn.Module):
    """Prefixes every parameter name with the name of its attribute."""

    def __init__(self, name: str, module: nn.Module) -> None:
        """Store the module under this name."""
        super().__init__()
        self.add_module(name, module)


class Model(nn.Module):
    """Embeddings of tokens and of positions, a projection with bias, experts in one tensor, a norm and a head."""

    def __init__(self, tied: bool) -> None:
        """The head has its own weight unless tied."""
        super().__init__()
        self.embed_tokens = nn.Embedding(5, SIZE)
        self.position_embed = nn.Embedding(4, SIZE)
        self.projection = nn.Linear(SIZE, SIZE)
        self.experts = nn.Parameter(torch.ones(2, SIZE, SIZE))
        self.norm = nn.LayerNorm(SIZE)
        self.head = nn.Linear(SIZE, 5, bias=False)
        if tied:
            self.head.weight = self.embed_tokens.weight


class ModelWithGetters(Model):
    """The same model with the getters of Hugging Face's models."""

    def get_input_embeddings(self) -> nn.Module:
        """The token embedding."""
        return self.embed_tokens

    def get_output_embeddings(self) -> nn.Module:
        """The head."""
        return self.head


def model_of(case: GroupsCase) -> tuple[nn.Module, dict[str, nn.Parameter]]:
    """The model, and its trainable parameters by their names without the wrapper."""
    model: nn.Module = (ModelWithGetters if case.getters else Model)(case.tied)
    if case.training != "full":
        model.requires_grad_(False)
        _adapt(model, "projection", Adapted, case)
        wrap = {"saved": Saved, "saved_norm": Saved, "lora": Adapted, "tokens": Tokens}.get(case.training)
        if wrap is not None:
            _adapt(model, "embed_tokens", wrap, case)
        if wrap in (Saved, Adapted):
            _adapt(model, "head", wrap, case)
        if case.training == "saved_norm":
            _adapt(model, "norm", Saved, case)
    for name, parameter in model.named_parameters():
        if case.frozen and case.frozen in name:
            parameter.requires_grad_(False)
    names = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    for name in {"module": ["module"], "_orig_mod": ["_orig_mod"], "both": ["_orig_mod", "module"]}.get(
        case.wrapper, []
    ):
        model = Wrapper(name, model)
    return model, names


def _adapt(model: nn.Module, name: str, wrap: Any, case: GroupsCase) -> None:
    setattr(model, name, wrap(getattr(model, name), case.adapter))


def _options(case: GroupsCase, names: dict[str, nn.Parameter]) -> dict[str, Any]:
    embedding_lr = None if case.embedding_lr is None else case.embedding_lr / 1000
    options = {"lr": 0.01, "embedding_lr": embedding_lr, "weight_decay": case.weight_decay / 100}
    if case.decay == "shape":
        return options
    prefixes = {"module": "module.", "_orig_mod": "_orig_mod.", "both": "module._orig_mod."}
    prefix = prefixes.get(case.wrapper, "") if case.decay == "wrapped" else ""
    return options | {"decay_names": [prefix + name for name in _decaying(names)]}


def _decaying(names: dict[str, nn.Parameter]) -> list[str]:
    """A deliberately unusual choice: the declared names decide, whatever they are."""
    return [name for name in names if "bias" in name or "embed" in name]


def _groups(trial: PieceTrial, case: GroupsCase) -> tuple[list[ParamGroup], dict[str, nn.Parameter]]:
    """The groups, and the trainable parameters by name; no groups if there are none, which `equal` covers."""
    model, names = model_of(case)
    if not names:
        return [], names
    return trial.function(model, **_options(case, names)), names


def partition(trial: PieceTrial, case: GroupsCase) -> None:
    """Each trainable parameter is in exactly one group, no frozen parameter is in any, and no group is empty."""
    groups, names = _groups(trial, case)
    found = [id(parameter) for group in groups for parameter in group.params]
    for name, parameter in names.items():
        if found.count(id(parameter)) != 1:
            raise Failure(f"{name} is in {found.count(id(parameter))} groups, should be in one")
    if len(found) != len(names):
        raise Failure(f"groups have {len(found)} parameters, should have the {len(names)} trainable ones")
    if any(not group.params for group in groups):
        raise Failure(f"a group is empty: {[(group.role, len(group.params)) for group in groups]}")


def roles(trial: PieceTrial, case: GroupsCase) -> None:
    """Exactly the parameters that train embedding or head have embedding_lr, under any name and any adapter."""
    groups, names = _groups(trial, case)
    rate = 0.01 if case.embedding_lr is None else case.embedding_lr / 1000
    for name, parameter in names.items():
        # Without getters the head is not recognised: it is an ordinary linear layer.
        embeds = "embed" in name or (case.getters and "head" in name)
        wanted = ("embedding", rate) if embeds and case.embedding_lr is not None else ("base", 0.01)
        for group in groups:
            if any(own is parameter for own in group.params) and (group.role, group.lr) != wanted:
                raise Failure(f"{name} has role {group.role} and rate {group.lr}, should be {wanted}")


def decay(trial: PieceTrial, case: GroupsCase) -> None:
    """Parameters decay if decay_names or their two dimensions say so, with any embedding_lr; else decay is 0."""
    groups, names = _groups(trial, case)
    declared = _decaying(names)
    for name, parameter in names.items():
        decays = parameter.ndim >= 2 if case.decay == "shape" else name in declared
        for group in groups:
            seen = any(own is parameter for own in group.params)
            if seen and group.weight_decay != (case.weight_decay / 100 if decays else 0.0):
                raise Failure(f"{name} has weight decay {group.weight_decay}; should it decay: {decays}")


def order(trial: PieceTrial, case: GroupsCase) -> None:
    """Parameters of a group are in the order of the model, which the optimizer state of a checkpoint relies on."""
    groups, names = _groups(trial, case)
    place = {id(parameter): index for index, parameter in enumerate(names.values())}
    for group in groups:
        places = [place.get(id(parameter), -1) for parameter in group.params]
        if places != sorted(places):
            raise Failure(
                f"group {group.role} has parameters {places} of the model, should have them in increasing order"
            )


def untouched(trial: PieceTrial, case: GroupsCase) -> None:
    """The call changes neither the weights of the model nor which of them are trainable."""
    model, names = model_of(case)

    def state() -> list[Any]:
        return [
            (n, p.requires_grad, comparable(p), p.tolist()) for n, p in model.named_parameters(remove_duplicate=False)
        ]

    before = state()
    if names:
        trial.function(model, **_options(case, names))
    if state() != before:
        raise Failure("the model's parameters changed")


def arguments(case: GroupsCase, device: str) -> Arguments:
    """The model and its options."""
    model, names = model_of(case)
    return (model,), _options(case, names)


def _call(model: nn.Module | None = None, **options: Any) -> Arguments:
    return (nn.Linear(2, 2) if model is None else model,), {"lr": 0.1, **options}


piece = Piece(
    op="param_groups",
    draw=draw,
    checks=(partition, roles, decay, order, untouched, equal(arguments)),
    simplest=GroupsCase(),
    mistakes=(
        Mistake("no trainable parameter", lambda: _call(nn.Linear(2, 2).requires_grad_(False)), ValueError, "model"),
        Mistake("a negative lr", lambda: _call(lr=-1.0), ValueError, "lr"),
        Mistake("a rate that is NaN", lambda: _call(lr=float("nan")), ValueError, "lr"),
        Mistake("a negative embedding_lr", lambda: _call(embedding_lr=-1.0), ValueError, "embedding_lr"),
        Mistake("a negative weight_decay", lambda: _call(weight_decay=-1.0), ValueError, "weight_decay"),
    ),
)
