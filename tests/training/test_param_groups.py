"""Parameter groups: both implementations compared with each other, and with the known parameter names."""

import math
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn

import unsloth_fast.training
import unsloth_ref.training
from tests import tiny
from unsloth_ref.types import ParamGroup

PACKAGES = [unsloth_ref.training, unsloth_fast.training]

# Ways to train a Llama: full fine-tuning (None), or options of LoraConfig.
ADAPTERS: dict[str, dict[str, Any] | None] = {
    "full": None,
    "projections only": {"target_modules": ["q_proj"]},
    "modules_to_save": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    "modules_to_save with norms": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "norm"]},
    "LoRA on embeddings": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    "trainable tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [3, 4]},
}


class Wrapped(nn.Module):
    """Prefixes every name with `module.`, as DistributedDataParallel does."""

    def __init__(self, module: nn.Module) -> None:
        """Store the module."""
        super().__init__()
        self.module = module


def build(adapter: str, adapter_name: str = "default", tied: bool = False) -> nn.Module:
    """A tiny Llama, set up for one of the ways in ADAPTERS."""
    model = tiny.model(tie_word_embeddings=tied, num_hidden_layers=1)
    options = ADAPTERS[adapter]
    if options is None:
        return model
    return get_peft_model(model, LoraConfig(r=2, **options), adapter_name=adapter_name)


def by_identity(groups: list[ParamGroup]) -> list[tuple[Any, ...]]:
    """Groups with the ids of their parameters, which == can compare."""
    return [(group.role, [id(p) for p in group.params], group.lr, group.weight_decay) for group in groups]


@settings(max_examples=40, deadline=None)
@given(
    adapter=st.sampled_from(list(ADAPTERS)),
    adapter_name=st.sampled_from(["default", "cpt"]),
    tied=st.booleans(),
    wrapper=st.sampled_from(["none", "module", "_orig_mod", "both"]),
    lr=st.floats(0, 1),
    embedding_lr=st.none() | st.floats(0, 1),
    weight_decay=st.floats(0, 1),
    frozen=st.sampled_from(["", "lora_A", "lm_head", "layernorm"]),
    named=st.booleans(),
)
@pytest.mark.filterwarnings("ignore")  # peft warns about tied weights
def test_fast_equals_reference_and_the_known_names(
    adapter: str,
    adapter_name: str,
    tied: bool,
    wrapper: str,
    lr: float,
    embedding_lr: float | None,
    weight_decay: float,
    frozen: str,
    named: bool,
) -> None:
    """Each trainable parameter is in exactly one group, which follows from its name; prefixes make no difference."""
    model = build(adapter, adapter_name, tied)
    for name, parameter in model.named_parameters():
        if frozen and frozen in name:
            parameter.requires_grad_(False)
    names = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    decay_names = [name for name in names if "norm" not in name] if named else None
    expected = {}
    for name, parameter in names.items():
        embedding = embedding_lr is not None and ("embed_tokens" in name or "lm_head" in name)
        decays = "norm" not in name if named else parameter.ndim >= 2
        expected[id(parameter)] = (
            "embedding" if embedding else "base",
            embedding_lr if embedding else lr,
            weight_decay if decays else 0.0,
        )
    if wrapper in ("_orig_mod", "both"):
        model = torch.compile(model)  # does not compile before the first call
    if wrapper in ("module", "both"):
        model = Wrapped(model)

    groups = [
        package.param_groups(
            model, lr=lr, embedding_lr=embedding_lr, weight_decay=weight_decay, decay_names=decay_names
        )
        for package in PACKAGES
    ]
    assert by_identity(groups[0]) == by_identity(groups[1])
    found = [(id(p), (group.role, group.lr, group.weight_decay)) for group in groups[0] for p in group.params]
    assert len(found) == len(expected)
    assert dict(found) == expected
    assert all(group.params for group in groups[0])
    order = list(expected)
    for group in groups[0]:
        positions = [order.index(id(parameter)) for parameter in group.params]
        assert positions == sorted(positions)


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.__name__)
def test_tied_weights_appear_once_as_embedding(package: ModuleType) -> None:
    """A head that shares the weight of the embedding adds no parameter."""
    model = tiny.model(tie_word_embeddings=True)
    groups = package.param_groups(model, lr=1.0, embedding_lr=0.5)
    assert [id(p) for group in groups if group.role == "embedding" for p in group.params] == [
        id(model.get_input_embeddings().weight)
    ]


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.__name__)
def test_plain_modules_and_wrapped_position_embeddings(package: ModuleType) -> None:
    """Without Hugging Face's getters, every nn.Embedding counts, and every peft module that wraps one."""

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.positions = nn.Embedding(4, 3)
            self.body = nn.Linear(3, 3)

    model = get_peft_model(Plain(), LoraConfig(r=2, target_modules=["positions", "body"]))
    groups = package.param_groups(model, lr=1.0, embedding_lr=0.5)
    roles = {id(p): group.role for group in groups for p in group.params}
    assert {name: roles[id(p)] for name, p in model.named_parameters() if p.requires_grad} == {
        name: "embedding" if "positions" in name else "base" for name, p in model.named_parameters() if p.requires_grad
    }


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.__name__)
@pytest.mark.parametrize(
    ("options", "argument"),
    [
        ({"lr": -1.0}, "lr"),
        ({"lr": math.nan}, "lr"),
        ({"lr": 1.0, "embedding_lr": -1.0}, "embedding_lr"),
        ({"lr": 1.0, "weight_decay": -1.0}, "weight_decay"),
    ],
)
def test_a_rate_out_of_range_is_named(package: ModuleType, options: dict[str, float], argument: str) -> None:
    """The message begins with the name of the argument."""
    with pytest.raises(ValueError, match=f"^{argument}: got"):
        package.param_groups(nn.Linear(2, 2), **options)


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.__name__)
def test_nothing_trainable_says_what_to_do(package: ModuleType) -> None:
    """The message for a frozen model names the remedy."""
    with pytest.raises(ValueError, match="no trainable parameter; allowed: at least one"):
        package.param_groups(nn.Linear(2, 2).requires_grad_(False), lr=1.0)


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.__name__)
def test_groups_work_in_an_optimizer(package: ModuleType) -> None:
    """One rate for both roles gives the same bits as a single group; a rate of 0 leaves embeddings unchanged."""

    def step(**options: Any) -> dict[str, torch.Tensor]:
        model = tiny.model(num_hidden_layers=1)
        groups = package.param_groups(model, lr=0.01, **options)
        optimizer = torch.optim.AdamW([group.as_dict() for group in groups])
        model(torch.arange(10)[None], labels=torch.arange(10)[None]).loss.backward()
        optimizer.step()
        return model.state_dict()

    start, one, same, still = (
        tiny.model(num_hidden_layers=1).state_dict(),
        step(),
        step(embedding_lr=0.01),
        step(embedding_lr=0.0),
    )
    assert all(torch.equal(one[name], same[name]) for name in one)
    unmoved = {name for name in start if torch.equal(start[name], still[name])}
    assert unmoved == {"model.embed_tokens.weight", "lm_head.weight"}
