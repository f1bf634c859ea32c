"""The choice of the loss: the backend's, or TRL's with the reason in the log."""

import logging
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from peft import AdaLoraConfig, AdaptionPromptConfig, LoraConfig, PrefixTuningConfig, get_peft_model
from torch.distributed.fsdp import MixedPrecisionPolicy

from tests import tiny
from tests.models import zoo
from unsloth_fast import backends
from unsloth_fast.hooks.loss_choice import choose_loss, reason_for_trl_loss

BALANCED: dict[str, Any] = {"aux_loss_enabled": True, "router_aux_loss_coef": 0.1}
ADALORA = AdaLoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM", total_step=9)
PREFIX = PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")


def trainer_with(model: Any = None, **options: Any) -> Any:
    """The attributes of a trainer that decide about its loss; nothing in them asks for TRL's."""
    parallelism = options.pop("parallelism", None)
    plugin = options.pop("fsdp_plugin", None)
    names = ("compute_loss_func", "aux_loss_enabled", "router_aux_loss_coef")
    given = {"compute_loss_func": None, "aux_loss_enabled": False}
    given |= {name: options.pop(name) for name in names if name in options}
    return SimpleNamespace(
        model=model or tiny.model(),
        args=SimpleNamespace(**{"loss_type": "nll", "label_smoothing_factor": 0.0} | options),
        accelerator=SimpleNamespace(
            parallelism_config=parallelism, state=SimpleNamespace(**{"fsdp_plugin": plugin} if plugin else {})
        ),
        **given,
    )


def doge() -> Any:
    """A model whose load-balancing loss has another function."""
    sizes: dict[str, Any] = {"vocab_size": 48, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return transformers.DogeForCausalLM(transformers.DogeConfig(**sizes, is_moe=True, num_experts=16))


def parallelism(**enabled: bool) -> Any:
    """accelerate's configuration of parallelism, with context or sequence parallelism."""
    return SimpleNamespace(**{"cp_enabled": False, "sp_enabled": False} | enabled)


REASONS: dict[str, tuple[Callable[[], Any], str | None]] = {
    "none": (trainer_with, None),
    "data parallelism": (lambda: trainer_with(parallelism=parallelism()), None),
    "LoRA": (lambda: trainer_with(get_peft_model(tiny.model(), LoraConfig(target_modules=["q_proj"]))), None),
    "loss_type": (lambda: trainer_with(loss_type="dft"), "loss_type='dft'"),
    "compute_loss_func": (lambda: trainer_with(compute_loss_func=print), "compute_loss_func is given"),
    "experts": (lambda: trainer_with(zoo.model("qwen3_moe"), **BALANCED), None),
    "experts of an older TRL": (
        lambda: trainer_with(zoo.model("qwen3_moe"), aux_loss_enabled=True),
        "the load-balancing loss is the model's own",
    ),
    "other experts": (lambda: trainer_with(doge(), **BALANCED), "the load-balancing loss is the model's own"),
    "prefix": (
        lambda: trainer_with(get_peft_model(tiny.model(), PREFIX)),
        "prompt learning adds positions that have no label",
    ),
    "AdaLoRA": (
        lambda: trainer_with(get_peft_model(tiny.model(), ADALORA)),
        "the adapter has a forward of its own (AdaLoraModel), which may change the loss",
    ),
    "context": (
        lambda: trainer_with(parallelism=parallelism(cp_enabled=True)),
        "the sequence is split across devices",
    ),
    "sequence": (
        lambda: trainer_with(parallelism=parallelism(sp_enabled=True)),
        "the sequence is split across devices",
    ),
}


def test_an_adapter_that_passes_over_the_loss_is_refused() -> None:
    """peft's adaption prompts keep the forward that the model had when they were added."""
    config = AdaptionPromptConfig(adapter_len=2, adapter_layers=1, task_type="CAUSAL_LM")
    trainer = trainer_with(get_peft_model(tiny.model(), config))
    with pytest.raises(ValueError, match=r"got AdaptionPromptConfig, .* computes no loss; allowed: LoRA"):
        choose_loss(trainer, backends.resolve("reference"))


@pytest.mark.parametrize("name", REASONS)
def test_each_reason_for_trls_loss(name: str, caplog: pytest.LogCaptureFixture) -> None:
    """It is logged as a warning, and the trainer stays as it is. Without a reason the loss is the backend's."""
    make, reason = REASONS[name]
    trainer = make()
    before = dict(vars(trainer))
    assert reason_for_trl_loss(trainer) == reason
    assert choose_loss(trainer, backends.resolve("reference")) == (reason is None)
    warnings = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert warnings == ([f"loss: TRL's own, not the backend's: {reason}"] if reason else [])
    assert (vars(trainer) == before) == (reason is not None)


@pytest.mark.parametrize("smoothing", [0.0, 0.25])
def test_the_backends_loss_is_put_into_the_forward_and_not_divided_again(smoothing: float) -> None:
    """It has the label smoothing of the arguments. transformers' flags say that it is already divided."""
    trainer = trainer_with(label_smoothing_factor=smoothing)
    tokens = torch.tensor([[3, 4, 5, 6]])
    logits = trainer.model(tokens).logits[0, :-1]
    assert choose_loss(trainer, backends.resolve("reference"))
    assert trainer.loss_is_scaled_for_ga and trainer.model_accepts_loss_kwargs
    loss = trainer.model(input_ids=tokens, labels=tokens, backend_loss=True, num_items=2).loss
    expected = torch.nn.functional.cross_entropy(logits, tokens[0, 1:], reduction="sum", label_smoothing=smoothing) / 2
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("name", ["loss_type", "compute_loss_func"])
def test_an_adapter_on_the_head_needs_the_backends_loss(name: str) -> None:
    """TRL's loss would not train it."""
    model = get_peft_model(tiny.model(), LoraConfig(r=2, target_modules=["lm_head"]))
    options = {"loss_type": "dft"} if name == "loss_type" else {"compute_loss_func": print}
    trainer = trainer_with(model, **options)
    message = r"^target_modules: got an adapter on the output head.*; allowed: modules_to_save=\['lm_head'\] \(" + name
    with pytest.raises(ValueError, match=message):
        choose_loss(trainer, backends.resolve("reference"))
    assert choose_loss(trainer_with(model), backends.resolve("reference"))


def test_fsdp_does_not_round_the_loss() -> None:
    """accelerate's policy rounds every output to the computing dtype; the rest of the policy stays."""
    plugin = SimpleNamespace(
        mixed_precision_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, output_dtype=torch.bfloat16)
    )
    assert choose_loss(trainer_with(fsdp_plugin=plugin), backends.resolve("reference"))
    assert plugin.mixed_precision_policy == MixedPrecisionPolicy(param_dtype=torch.bfloat16, output_dtype=None)


def test_trls_loss_keeps_the_policy_of_fsdp() -> None:
    policy = MixedPrecisionPolicy(output_dtype=torch.bfloat16)
    plugin = SimpleNamespace(mixed_precision_policy=policy)
    assert not choose_loss(trainer_with(fsdp_plugin=plugin, loss_type="dft"), backends.resolve("reference"))
    assert plugin.mixed_precision_policy is policy
