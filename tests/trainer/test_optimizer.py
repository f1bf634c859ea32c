"""The trainer's optimizer: parameter groups, their rates, the user's own optimizer, models that cannot be trained."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import TrainerCallback

from tests import tiny
from tests.trainer.runs import arguments, build
from unsloth_fast import UnslothTrainer
from unsloth_fast.hooks.optimizer import check_trainable, embedding_rate

# TRL warns of deprecated options and peft of tied weights.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_without_an_embedding_rate_the_groups_are_those_of_transformers(tmp_path: Path, lora: bool) -> None:
    """They equal those of `param_groups` on the same names; transformers' empty groups are not compared."""
    trainer = build(UnslothTrainer, arguments(tmp_path), lora=lora)
    optimizer = trainer.create_optimizer()
    names = trainer.get_decay_parameter_names(trainer.model)
    ours = trainer.backend.training.param_groups(trainer.model, lr=1e-3, weight_decay=0.1, decay_names=names)
    theirs = [group for group in optimizer.param_groups if group["params"]]
    assert [(list(map(id, group.params)), group.lr, group.weight_decay) for group in ours] == [
        (list(map(id, group["params"])), group["lr"], group["weight_decay"]) for group in theirs
    ]


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_the_embeddings_have_their_own_rate(tmp_path: Path, lora: bool, caplog: pytest.LogCaptureFixture) -> None:
    """It follows the schedule; weight decay and the optimizer's options stay as configured."""
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


def test_a_rate_without_a_trained_embedding_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """LoRA is on the queries only."""
    model = get_peft_model(tiny.model(), LoraConfig(r=2, target_modules=["q_proj"]))
    trainer = build(UnslothTrainer, arguments(tmp_path, embedding_learning_rate=1e-4), model=model)
    assert {group["role"] for group in trainer.create_optimizer().param_groups} == {"base"}
    assert "embedding_learning_rate=0.0001 has no effect: neither" in caplog.text
    assert 'modules_to_save=["embed_tokens", "lm_head"]' in caplog.text


def test_the_users_optimizer_is_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The log states that the rate has no effect."""
    model = tiny.model()
    mine = torch.optim.SGD(model.parameters(), lr=0.1)
    args = arguments(tmp_path, embedding_learning_rate=1e-4)
    trainer = build(UnslothTrainer, args, model=model, optimizers=(mine, None))
    assert trainer.create_optimizer(trainer.model) is mine
    assert "embedding_learning_rate=0.0001 has no effect: an optimizer was given" in caplog.text


def test_a_second_training_keeps_the_optimizer_of_the_first(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Its embeddings have their rate, so no log says that the rate has no effect."""
    trainer = build(UnslothTrainer, arguments(tmp_path, embedding_learning_rate=1e-4))
    first = trainer.create_optimizer()
    assert trainer.create_optimizer() is first
    assert "has no effect" not in caplog.text


def test_an_optimizer_with_groups_of_its_own_keeps_them(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """GaLore has such groups, under the key "params" of its options."""
    model = tiny.model()
    groups = [{"params": [model.lm_head.weight], "lr": 0.5}]
    args = arguments(tmp_path, embedding_learning_rate=1e-4)
    kind = (torch.optim.SGD, {"lr": 0.1, "params": groups})
    trainer = build(UnslothTrainer, args, model=model, optimizer_cls_and_kwargs=kind)
    assert [group["lr"] for group in trainer.create_optimizer().param_groups] == [0.5]
    assert "has no effect" in caplog.text


def test_the_users_optimizer_class_gets_the_groups(tmp_path: Path) -> None:
    """`optimizer_cls_and_kwargs` has its own value again after the call."""
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


def adapted(name: str = "default", tied: bool = False, **options: Any) -> Any:
    """A model with LoRA on its queries and on `more_targets`; the other options are fields of LoraConfig."""
    targets = ["q_proj", *options.pop("more_targets", [])]
    config = LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM", **options)
    return get_peft_model(tiny.model(tie_word_embeddings=tied), config, adapter_name=name)


BOTH = ["embed_tokens", "lm_head"]
# Every way of training embeddings: a model, and parts of the names of the parameters that train them.
WAYS: dict[str, tuple[Callable[[], Any], set[str]]] = {
    "full": (tiny.model, set(BOTH)),
    "full, tied": (lambda: tiny.model(tie_word_embeddings=True), {"embed_tokens"}),
    "modules_to_save": (lambda: adapted(modules_to_save=BOTH), set(BOTH)),
    "modules_to_save, named adapter": (lambda: adapted("cpt", modules_to_save=BOTH), set(BOTH)),
    "modules_to_save, tied": (
        lambda: adapted(tied=True, modules_to_save=BOTH, ensure_weight_tying=True),
        {"embed_tokens"},
    ),
    "modules_to_save, with a norm": (lambda: adapted(modules_to_save=["embed_tokens", "norm"]), {"embed_tokens"}),
    "LoRA": (lambda: adapted(more_targets=BOTH), set(BOTH)),
    "LoRA, named adapter": (lambda: adapted("cpt", more_targets=["embed_tokens"]), {"embed_tokens"}),
    "single tokens": (lambda: adapted(trainable_token_indices={"embed_tokens": list(range(3, 48))}), {"embed_tokens"}),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("fixed", ["embeddings", "others"])
def test_the_rate_is_of_the_embeddings_alone(tmp_path: Path, way: str, fixed: str) -> None:
    """Parameters with a rate of 0 keep their bits while the others move: first the embeddings, then all others."""
    make, pieces = WAYS[way]
    rates = {"learning_rate": 1e-2, "embedding_learning_rate": 0.0}
    if fixed == "others":
        rates = {"learning_rate": 0.0, "embedding_learning_rate": 1e-2}
    trainer = build(UnslothTrainer, arguments(tmp_path, max_steps=3, **rates), model=make())
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    embeddings = {name for name in before if any(piece in name for piece in pieces)}
    assert embeddings and before.keys() - embeddings
    trainer.train()
    after = dict(trainer.model.named_parameters())
    for name, start in before.items():
        assert torch.equal(start, after[name]) == ((name in embeddings) == (fixed == "embeddings")), name
    decaying = trainer.get_decay_parameter_names(trainer.model)
    for group in trainer.optimizer.param_groups:
        names = {name for name, p in trainer.model.named_parameters() for mine in group["params"] if p is mine}
        assert group["weight_decay"] == (0.1 if names <= set(decaying) else 0.0)
        assert names <= set(decaying) or not names & set(decaying)


@pytest.mark.parametrize("optim", ["adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"])
def test_optimizers_of_bitsandbytes_get_the_groups(tmp_path: Path, optim: str) -> None:
    """The state of the embeddings stays in 32 bits, as transformers configures it."""
    from bitsandbytes.optim import GlobalOptimManager

    args = arguments(tmp_path, optim=optim, embedding_learning_rate=1e-4)
    trainer = build(UnslothTrainer, args, torch.float32, lora=True)
    optimizer = trainer.create_optimizer()
    assert type(optimizer).__module__.startswith("bitsandbytes")
    groups = {(group["role"], group["lr"], group["weight_decay"]) for group in optimizer.param_groups}
    assert groups == {("base", 1e-3, 0.1), ("base", 1e-3, 0.0), ("embedding", 1e-4, 0.1)}
    embedding = trainer.model.get_input_embeddings()
    if "8bit" in optim:
        overrides = GlobalOptimManager.get_instance().module_weight_config_triple
        assert any(module is embedding.original_module for module, _, _ in overrides)


@pytest.mark.parametrize("optim", ["adamw_8bit", "paged_adamw_8bit"])
def test_a_step_of_bitsandbytes_keeps_the_groups(tmp_path: Path, optim: str) -> None:
    """The state is in 8 bits, except for the embeddings, whose rate of 0 keeps their bits."""
    args = arguments(tmp_path, optim=optim, max_steps=1, embedding_learning_rate=0.0, lr_scheduler_type="constant")
    model = tiny.model(hidden_size=96, intermediate_size=128)  # fewer than 4096 weights have state in 32 bits
    trainer = build(UnslothTrainer, args, model=model)
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trainer.train()
    groups = {(group["role"], group["lr"], group["weight_decay"]) for group in trainer.optimizer.param_groups}
    assert groups == {("base", 1e-3, 0.1), ("base", 1e-3, 0.0), ("embedding", 0.0, 0.1)}
    grouped = [id(parameter) for group in trainer.optimizer.param_groups for parameter in group["params"]]
    assert sorted(grouped) == sorted(map(id, model.parameters()))
    for name, parameter in model.named_parameters():
        embedding = "embed_tokens" in name or "lm_head" in name
        assert torch.equal(parameter, start[name]) == embedding, name
        assert (parameter - start[name]).abs().max() < 2e-3  # a first step of Adam is the rate, and decay 1e-4 of it
        bits = trainer.optimizer.state[parameter]["state1"].dtype
        assert bits == (torch.uint8 if parameter.numel() >= 4096 and "embed_tokens" not in name else torch.float32)


def test_trackers_receive_the_rate_of_each_group(tmp_path: Path) -> None:
    """`report_to` names such callbacks."""
    seen: list[dict[str, float]] = []

    class Tracker(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **more: Any) -> None:
            seen.append(dict(logs))

    args = arguments(tmp_path, max_steps=2, embedding_learning_rate=1e-4, lr_scheduler_type="constant")
    build(UnslothTrainer, args, callbacks=[Tracker()]).train()
    assert [(log["learning_rate"], log["embedding_learning_rate"]) for log in seen[:2]] == [(1e-3, 1e-4)] * 2


def run(bf16: bool = False, device: str = "cpu") -> Any:
    """The arguments that decide whether a model can be trained."""
    return SimpleNamespace(bf16=bf16, device=torch.device(device))


def test_a_model_without_trainable_parameters_is_refused() -> None:
    """peft freezes adapters that are loaded for inference."""
    model = tiny.model().requires_grad_(False)
    with pytest.raises(ValueError, match=r"^model: got no trainable parameter; allowed: at least one \(unfreeze some"):
        check_trainable(model, run())
    next(model.parameters()).requires_grad_(True)
    check_trainable(model, run())


@pytest.mark.parametrize(
    ("dtype", "bf16", "refused"),
    [(torch.bfloat16, False, True), (torch.float32, True, True), (torch.float32, False, False)],
)
def test_bfloat16_on_a_gpu_without_it_is_refused(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, bf16: bool, refused: bool
) -> None:
    """It may be in the model or bf16=True. Emulated bfloat16 does not count; on a CPU both are allowed."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    model = tiny.model(dtype=dtype)
    check_trainable(model, run(bf16))
    if not refused:
        check_trainable(model, run(bf16, "cuda:0"))
        return
    with pytest.raises(ValueError, match=r"^bf16: got bfloat16 on 'Tesla T4', which has none; allowed: fp16=True"):
        check_trainable(model, run(bf16, "cuda:0"))


def test_bfloat16_on_a_gpu_that_supports_it_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    check_trainable(tiny.model(dtype=torch.bfloat16), run(True, "cuda:0"))


@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        ([{"role": "base", "lr": 1.0}, {"role": "embedding", "lr": 0.5}, {"role": "embedding", "lr": 0.5}], 0.5),
        ([{"role": "base", "lr": 1.0}], None),
        ([{"lr": 1.0}, {"lr": 0.5}], None),
    ],
)
def test_the_embedding_rate_is_read_from_the_groups(groups: list[dict[str, Any]], expected: float | None) -> None:
    """An optimizer that was not grouped by role has none."""
    assert embedding_rate(SimpleNamespace(param_groups=groups)) == expected
