"""The loss inside the model's forward: for which heads the logits are never made, and that it is the same loss."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    StableLmConfig,
    StableLmForCausalLM,
)

from tests import tiny
from tests.trainer.runs import arguments, build
from unsloth_fast import UnslothTrainer, backends
from unsloth_fast.models.head import add_loss

pytestmark = pytest.mark.filterwarnings("ignore")

SIZES: dict[str, Any] = {
    "vocab_size": len(tiny.WORDS),
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
}


def adapted(name: str = "default", tied: bool = False, **options: Any) -> Any:
    """A model with LoRA on its queries, and perhaps more, that has begun to differ from the model below."""
    model = get_peft_model(
        tiny.model(tie_word_embeddings=tied),
        LoraConfig(r=2, target_modules=["q_proj", *options.pop("more", [])], task_type="CAUSAL_LM", **options),
        adapter_name=name,
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    return model


def with_bias() -> Any:
    """A model whose head has a bias."""
    model = tiny.model()
    model.lm_head.bias = nn.Parameter(torch.randn(len(tiny.WORDS)))
    return model


# The model, and whether its logits are made.
HEADS: dict[str, tuple[Any, bool]] = {
    **{family: (lambda family=family: tiny.model(family), False) for family in tiny.FAMILIES},
    "capped": (lambda: tiny.model("gemma2", final_logit_softcapping=2.0), False),
    "tied": (lambda: tiny.model(tie_word_embeddings=True), False),
    "frozen": (lambda: frozen_head(), False),
    "bias": (with_bias, False),
    "cohere": (lambda: CohereForCausalLM(CohereConfig(**SIZES, logit_scale=0.25)), False),
    "phi3": (lambda: Phi3ForCausalLM(Phi3Config(**SIZES)), False),
    "modules_to_save": (lambda: adapted(modules_to_save=["lm_head"]), False),
    "modules_to_save, another adapter's": (lambda: adapted("cpt", modules_to_save=["lm_head", "embed_tokens"]), False),
    "modules_to_save, tied": (lambda: adapted(tied=True, modules_to_save=["lm_head"], ensure_weight_tying=True), False),
    "LoRA on the head": (lambda: adapted(more=["lm_head"]), True),
    "an unknown kind": (lambda: StableLmForCausalLM(StableLmConfig(**SIZES)), True),
    "hooks": (lambda: hooked_head(), True),
}


def frozen_head() -> Any:
    """A model whose head does not train."""
    model = tiny.model()
    model.lm_head.requires_grad_(False)
    return model


def hooked_head() -> Any:
    """A model with something that wants to see the head at work."""
    model = tiny.model()
    model.lm_head.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 0.5,))
    return model


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("head", HEADS)
def test_the_loss_is_that_of_the_logits(head: str, smoothing: float) -> None:
    """In value and in every gradient, in float64; and where the head is plain the head itself is never called."""
    make, logits_are_made = HEADS[head]
    torch.manual_seed(0)
    model = make().double().train()
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    tokens = torch.randint(3, len(tiny.WORDS), (2, 9))
    labels = tokens.masked_fill(torch.rand(2, 9) < 0.3, -100)
    with tiny.KeepFloat64():
        logits = model(input_ids=tokens, use_cache=False).logits[:, :-1]
        expected = nn.functional.cross_entropy(
            logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum", label_smoothing=smoothing
        )
        (expected / 5).backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad(set_to_none=True)
        add_loss(inner, backends.resolve("reference"), label_smoothing=smoothing)
        calls: list[bool] = []
        forward = nn.Linear.forward

        def watched(self: nn.Linear, *inputs: torch.Tensor) -> torch.Tensor:
            calls.append(self.out_features == len(tiny.WORDS))
            return forward(self, *inputs)

        nn.Linear.forward = watched
        try:
            loss = model(input_ids=tokens, labels=labels, use_cache=False, backend_loss=True, num_items=5)
        finally:
            nn.Linear.forward = forward
        loss.backward()
        again = model(input_ids=tokens, use_cache=False).logits[:, :-1]
    assert torch.equal(again, logits)  # its own forward is as it was
    assert any(calls) == logits_are_made
    assert loss.item() == pytest.approx(expected.item() / 5, rel=1e-12)
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("family", ["llama", "an unknown kind"])
def test_a_copy_of_a_trained_model_is_a_model_of_its_own(tmp_path: Path, family: str) -> None:
    """With its own weights, as a model to compare with needs it: of zeros, all words are as likely."""
    model = tiny.model() if family == "llama" else StableLmForCausalLM(StableLmConfig(**SIZES))
    trainer = build(UnslothTrainer, arguments(tmp_path, max_steps=1), model=model)
    trainer.train()
    tokens = torch.arange(3, 20)[None]
    before = trainer.model.eval()(tokens).logits
    zeros = copy.deepcopy(trainer.model)
    with torch.no_grad():
        for parameter in zeros.parameters():
            parameter.zero_()
    assert not zeros(tokens).logits.any()
    loss = zeros(input_ids=tokens, labels=tokens, backend_loss=True)
    assert loss.item() == pytest.approx(math.log(len(tiny.WORDS)), rel=1e-6)
    assert torch.equal(trainer.model(tokens).logits, before)


def test_a_quantised_head_keeps_its_products() -> None:
    """bitsandbytes' linear layers are none of torch's."""
    from bitsandbytes.nn import Linear4bit

    from unsloth_fast.models.head import plain_head

    model = tiny.model()
    assert plain_head(model) is model.lm_head
    model.lm_head = Linear4bit(32, len(tiny.WORDS), bias=False)
    assert plain_head(model) is None


def test_label_smoothing_of_the_arguments(tmp_path: Path) -> None:
    """As torch smooths."""
    args = arguments(tmp_path, label_smoothing_factor=0.25, max_steps=1, padding_free=False)
    with tiny.KeepFloat64():
        trainer = build(UnslothTrainer, args, texts=2)
        batch = trainer.data_collator(list(trainer.train_dataset))
        labels = batch.pop("labels")
        logits = tiny.model(dtype=torch.float64)(**batch, use_cache=False).logits[:, :-1]
        expected = nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), label_smoothing=0.25)
        trainer.train()
    assert trainer.losses == [pytest.approx(expected.item(), rel=1e-12)]


@pytest.mark.parametrize("packing", [False, True])
def test_one_thread_for_autograd_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packing: bool
) -> None:
    """The same losses to the bit; a model that is split over devices keeps autograd's threads."""
    runs, seen = [], []
    own = UnslothTrainer.compute_loss

    def compute_loss(self: Any, *positional: Any, **keywords: Any) -> Any:
        seen.append(torch.autograd.is_multithreading_enabled())
        return own(self, *positional, **keywords)

    monkeypatch.setattr(UnslothTrainer, "compute_loss", compute_loss)
    for split in (False, True):
        trainer = build(UnslothTrainer, arguments(tmp_path, packing=packing, max_length=24), torch.float32)
        if split:
            trainer.model.hf_device_map = {"model.layers.0": 0, "model.layers.1": 1}
        trainer.train()
        runs.append(trainer.losses)
    assert runs[0] == runs[1]
    assert seen == [False] * 6 + [True] * 6
