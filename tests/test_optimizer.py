"""The trainer's optimizer: whose groups, which rates, and what wins."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

from tests import tiny
from tests.runs import arguments, build
from unsloth_fast import UnslothTrainer

# TRL warns of what it deprecates and peft of tied weights.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_without_an_embedding_rate_the_groups_are_hugging_faces(tmp_path: Path, lora: bool) -> None:
    """The optimizer's groups, empty ones aside, are those of `param_groups` on the same names."""
    trainer = build(UnslothTrainer, arguments(tmp_path), lora=lora)
    optimizer = trainer.create_optimizer()
    names = trainer.get_decay_parameter_names(trainer.model)
    ours = trainer.backend.training.param_groups(trainer.model, lr=1e-3, weight_decay=0.1, decay_names=names)
    theirs = [group for group in optimizer.param_groups if group["params"]]
    assert [(list(map(id, group.params)), group.lr, group.weight_decay) for group in ours] == [
        (list(map(id, group["params"])), group["lr"], group["weight_decay"]) for group in theirs
    ]


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_the_embedding_rate(tmp_path: Path, lora: bool, caplog: pytest.LogCaptureFixture) -> None:
    """The role's parameters have it, through the schedule; decay and the optimizer's options stay as configured."""
    args = arguments(tmp_path, embedding_learning_rate=1e-4, adam_beta2=0.9, warmup_steps=2)
    trainer = build(UnslothTrainer, args, lora=lora)
    names = {id(p): name for name, p in trainer.model.named_parameters()}
    trainer.train()
    decaying = trainer.get_decay_parameter_names(trainer.model)
    assert trainer.optimizer.defaults["betas"] == (0.9, 0.9)
    assert trainer.optimizer_cls_and_kwargs is None
    for group in trainer.optimizer.param_groups:
        assert group["params"]
        for parameter in group["params"]:
            name = names[id(parameter)]
            assert (group["role"] == "embedding") == ("embed_tokens" in name or "lm_head" in name)
            assert group["initial_lr"] == (1e-4 if group["role"] == "embedding" else 1e-3)
            assert group["weight_decay"] == (0.1 if name in decaying else 0.0)
    logs = trainer.state.log_history[:6]
    for log in logs:
        assert log["embedding_learning_rate"] == pytest.approx(log["learning_rate"] / 10)
    assert logs[1]["learning_rate"] == 5e-4 and logs[2]["learning_rate"] == 1e-3
    assert "has no effect" not in caplog.text


def test_a_rate_without_a_trained_embedding_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """LoRA on projections alone."""
    model = get_peft_model(tiny.model(), LoraConfig(r=2, target_modules=["q_proj"]))
    trainer = build(UnslothTrainer, arguments(tmp_path, embedding_learning_rate=1e-4), model=model)
    assert {group["role"] for group in trainer.create_optimizer().param_groups} == {"base"}
    assert "embedding_learning_rate=0.0001 has no effect: neither" in caplog.text
    assert 'modules_to_save=["embed_tokens", "lm_head"]' in caplog.text


def test_a_given_optimizer_is_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """And the log says that the rate has no effect."""
    model = tiny.model()
    mine = torch.optim.SGD(model.parameters(), lr=0.1)
    args = arguments(tmp_path, embedding_learning_rate=1e-4)
    trainer = build(UnslothTrainer, args, model=model, optimizers=(mine, None))
    assert trainer.create_optimizer(trainer.model) is mine
    assert "embedding_learning_rate=0.0001 has no effect: an optimizer was given" in caplog.text


def test_an_optimizer_that_groups_itself_does(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As GaLore does, through the key "params"."""
    model = tiny.model()
    groups = [{"params": [model.lm_head.weight], "lr": 0.5}]
    args = arguments(tmp_path, embedding_learning_rate=1e-4)
    kind = (torch.optim.SGD, {"lr": 0.1, "params": groups})
    trainer = build(UnslothTrainer, args, model=model, optimizer_cls_and_kwargs=kind)
    assert [group["lr"] for group in trainer.create_optimizer().param_groups] == [0.5]
    assert "has no effect" in caplog.text


def test_a_given_class_and_options_get_the_groups(tmp_path: Path) -> None:
    """`optimizer_cls_and_kwargs` is kept for the next call."""
    kind = (torch.optim.SGD, {"lr": 0.1, "momentum": 0.5})
    args = arguments(tmp_path, embedding_learning_rate=1e-4)
    trainer = build(UnslothTrainer, args, optimizer_cls_and_kwargs=kind)
    optimizer = trainer.create_optimizer()
    assert type(optimizer) is torch.optim.SGD
    assert {(group["role"], group["lr"], group["momentum"]) for group in optimizer.param_groups} == {
        ("base", 0.1, 0.5),
        ("embedding", 1e-4, 0.5),
    }
    assert trainer.optimizer_cls_and_kwargs == (torch.optim.SGD, {"lr": 0.1, "momentum": 0.5})
