"""The loss inside the model's forward: the heads for which no logits are computed, and the value and gradients."""

import copy
import math
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
import transformers
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from accelerate.utils.operations import convert_outputs_to_fp32
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import StableLmConfig, StableLmForCausalLM

from tests import tiny
from tests.models import zoo
from tests.trainer.runs import arguments, build
from unsloth_fast import UnslothTrainer, backends
from unsloth_fast.models.head import add_loss, forward_with_loss, plain_head, remove_loss, without_adapter

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
    """A model with LoRA on its queries and maybe other modules; its trained weights are not the initial ones."""
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


def of_family(family: str, **config: Any) -> Any:
    """A model of a family that has no row."""
    model_class = getattr(transformers, f"{family}ForCausalLM")
    return model_class(model_class.config_class(**SIZES | config))


def with_bias() -> Any:
    """A model whose head has a bias."""
    model = tiny.model()
    model.lm_head.bias = nn.Parameter(torch.randn(len(tiny.WORDS)))
    return model


def frozen_head() -> Any:
    """A model whose head is not trained."""
    model = tiny.model()
    model.lm_head.requires_grad_(False)
    return model


class Shifted(StableLmForCausalLM):
    """Its first logit is larger than its head's product."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The logits, with 0.1 added to the first."""
        outputs = super().forward(*args, **kwargs)
        outputs.logits = outputs.logits + 0.1 * (torch.arange(len(tiny.WORDS)) == 0)
        return outputs


def shifted_head() -> Any:
    """A model whose head is a linear layer, and whose logits are not its product."""
    return Shifted(StableLmConfig(**SIZES))


def hooked_head(backward: bool = False) -> Any:
    """A model whose head has a hook."""
    model: Any = tiny.model()
    if backward:
        model.lm_head.register_full_backward_hook(lambda module, inputs, outputs: (inputs[0] * 0.5,))
    else:
        model.lm_head.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 0.5,))
    return model


def replaced_head() -> Any:
    """A model whose head has a forward of its own."""
    model: Any = tiny.model()
    model.lm_head.forward = MethodType(lambda self, x: 2 * nn.Linear.forward(self, x), model.lm_head)
    return model


# The model, and whether its logits are computed.
HEADS: dict[str, tuple[Any, bool]] = {
    **{family: (lambda family=family: tiny.model(family), False) for family in tiny.FAMILIES},
    "capped": (lambda: tiny.model("gemma2", final_logit_softcapping=2.0), False),
    "tied": (lambda: tiny.model(tie_word_embeddings=True), False),
    "frozen": (frozen_head, False),
    "bias": (with_bias, False),
    "stablelm": (lambda: of_family("StableLm"), False),
    "cohere": (lambda: of_family("Cohere", logit_scale=0.25), False),
    "granite": (lambda: of_family("Granite", logits_scaling=8.0), False),
    "modules_to_save": (lambda: adapted(modules_to_save=["lm_head"]), False),
    "modules_to_save, another adapter's": (lambda: adapted("cpt", modules_to_save=["lm_head", "embed_tokens"]), False),
    "modules_to_save, tied": (lambda: adapted(tied=True, modules_to_save=["lm_head"], ensure_weight_tying=True), False),
    "LoRA on the head": (lambda: adapted(more=["lm_head"]), True),
    "more than a product": (shifted_head, True),
    "hooks": (hooked_head, True),
    "a hook of the backward pass": (lambda: hooked_head(backward=True), True),
    "a forward of somebody else's": (replaced_head, True),
}


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens, and labels of which about a third are no targets."""
    tokens = torch.randint(3, len(tiny.WORDS), (2, 9))
    return tokens, tokens.masked_fill(torch.rand(2, 9) < 0.3, -100)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("head", HEADS)
def test_the_loss_is_that_of_the_logits(head: str, smoothing: float) -> None:
    """Its value and every gradient agree in float64; a plain head itself is never called."""
    build_model, logits_are_computed = HEADS[head]
    torch.manual_seed(0)
    model = build_model().double().train()
    inner = without_adapter(model)
    tokens, labels = batch()
    with tiny.KeepFloat64():
        logits = model(input_ids=tokens, use_cache=False).logits[:, :-1]
        expected = nn.functional.cross_entropy(
            logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum", label_smoothing=smoothing
        )
        (expected / 5).backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad(set_to_none=True)
        add_loss(inner, backends.resolve("reference"), label_smoothing=smoothing)
        model(input_ids=tokens, labels=labels, use_cache=False, backend_loss=True)  # checks the head
        calls: list[bool] = []
        forward = nn.Linear.forward

        def watched(self: nn.Linear, *inputs: torch.Tensor) -> torch.Tensor:
            calls.append(self.out_features == len(tiny.WORDS))
            return forward(self, *inputs)

        nn.Linear.forward = watched
        try:
            loss = model(input_ids=tokens, labels=labels, use_cache=False, backend_loss=True, num_items=5).loss
        finally:
            nn.Linear.forward = forward
        loss.backward()
        again = model(input_ids=tokens, use_cache=False).logits[:, :-1]
    assert torch.equal(again, logits)  # without the keyword the forward is the model's own
    assert any(calls) == logits_are_computed
    assert loss.item() == pytest.approx(expected.item() / 5, rel=1e-12)
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("head", ["llama", "modules_to_save", "LoRA on the head", "more than a product", "cohere"])
@pytest.mark.parametrize("num_items", [None, 5, torch.tensor(5)], ids=["None", "int", "tensor"])
def test_outputs_come_with_the_same_loss(head: str, num_items: Any) -> None:
    """The logits are the model's own; loss and gradients are those of the call without outputs."""
    torch.manual_seed(0)
    model = HEADS[head][0]().double().train()
    tokens, labels = batch()
    options = {"input_ids": tokens, "use_cache": False}
    with tiny.KeepFloat64():
        logits = model(**options).logits
        add_loss(without_adapter(model), backends.resolve("reference"), label_smoothing=0.1)
        options |= {"labels": labels, "backend_loss": True, "num_items": num_items}
        results = []
        for found in (model(**options), model(**options, with_outputs=True)):
            loss, outputs = found.loss, found.outputs
            model.zero_grad(set_to_none=True)
            loss.backward()
            results.append((loss, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
    assert outputs is not None and torch.equal(outputs.logits, logits) and outputs.loss is None
    (loss, gradients), (expected_loss, expected) = results
    assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-12) and gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_outputs_under_accelerates_autocast(dtype: torch.dtype) -> None:
    """accelerate converts the outputs to float32; the loss is that of the converted logits, to float32's rounding."""
    model = tiny.model(dtype=dtype)
    own = model.forward
    add_loss(model, backends.resolve("reference"))
    with_loss = model.forward
    model.forward = convert_outputs_to_fp32(torch.autocast("cpu", torch.bfloat16)(with_loss))
    tokens, labels = batch()
    found = model(input_ids=tokens, labels=labels, backend_loss=True, num_items=5, with_outputs=True)
    loss, logits = found.loss, found.outputs.logits
    assert (loss.dtype, logits.dtype) == (torch.float32, torch.float32)
    shifted = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    assert loss.item() == pytest.approx(nn.functional.cross_entropy(*shifted, reduction="sum").item() / 5, rel=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(own(input_ids=tokens).logits.float(), logits)


def test_the_loss_and_the_outputs_pass_through_distributed_data_parallel(tmp_path: Path) -> None:
    """On one process the wrapper hands both on, and every gradient arrives."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model, alone = tiny.model(), tiny.model()
        for each in (model, alone):
            add_loss(each, backends.resolve("reference"))
        tokens, labels = batch()
        options = {"input_ids": tokens, "labels": labels, "backend_loss": True, "with_outputs": True}
        found, expected = nn.parallel.DistributedDataParallel(model)(**options), alone(**options)
        assert torch.equal(found.loss, expected.loss) and torch.equal(found.outputs.logits, expected.outputs.logits)
        found.loss.backward()
        expected.loss.backward()
        for parameter, reference in zip(model.parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(parameter.grad, reference.grad)
    finally:
        torch.distributed.destroy_process_group()


def test_a_head_that_accelerate_puts_on_a_device_is_plain() -> None:
    """accelerate does so for a `device_map`; its forward calls the one that it replaces."""
    model: Any = tiny.model()
    add_hook_to_module(model.lm_head, AlignDevicesHook(execution_device="cpu", io_same_device=True))
    assert plain_head(model) is model.lm_head


@pytest.mark.parametrize("wanted", [{"with_outputs"}, {"with_scores"}, {"with_load_balancing"}, set[str]()], ids=str)
def test_what_is_not_wanted_of_a_forward_is_none(wanted: set[str]) -> None:
    """And a batch with a `use_cache` of its own gets none."""
    model = zoo.model("qwen3_moe")
    add_loss(model, backends.resolve("reference"))
    tokens, labels = batch()
    options = {name: name in wanted for name in ("with_outputs", "with_scores", "with_load_balancing")}
    found = forward_with_loss(model, {"input_ids": tokens, "labels": labels, "use_cache": True}, 5, **options)
    given = {f"with_{name}" for name, value in found._asdict().items() if value is not None}
    assert given == wanted | {"with_loss"}
    assert found.outputs is None or found.outputs.past_key_values is None


def test_removing_the_loss_gives_back_the_fused_head_of_trl(tmp_path: Path) -> None:
    """TRL sets a forward of its own on the model, in some releases; adding the loss twice is adding it once."""
    trainer = build(UnslothTrainer, arguments(tmp_path, max_steps=1))
    model = trainer.model
    with_loss = model.forward
    remove_loss(model)
    own = vars(model).get("forward")
    add_loss(model, backends.resolve("reference"))
    add_loss(model, backends.resolve("reference"))
    assert model.forward is not own
    remove_loss(model)
    assert vars(model).get("forward") is own
    remove_loss(model)
    assert vars(model).get("forward") is own
    tokens, labels = batch()
    assert hasattr(model(input_ids=tokens, labels=labels, backend_loss=True), "logits")  # the keyword has no effect
    assert with_loss(input_ids=tokens, labels=labels, backend_loss=True).loss.isfinite()


@pytest.mark.parametrize("head", ["llama", "more than a product"])
def test_a_copy_of_a_trained_model_has_its_own_weights(tmp_path: Path, head: str) -> None:
    """With weights of zero, every word has the same probability; the trained model does not change."""
    model = HEADS[head][0]()
    trainer = build(UnslothTrainer, arguments(tmp_path, max_steps=1), model=model)
    trainer.train()
    tokens = torch.arange(3, 20)[None]
    before = trainer.model.eval()(tokens).logits
    zeros = copy.deepcopy(trainer.model)
    with torch.no_grad():
        for parameter in zeros.parameters():
            parameter.zero_()
    assert not zeros(tokens).logits[..., 1:].any()
    loss = zeros(input_ids=tokens, labels=tokens, backend_loss=True).loss
    assert loss.item() == pytest.approx(math.log(len(tiny.WORDS)), rel=1e-2 if head != "llama" else 1e-6)
    assert torch.equal(trainer.model(tokens).logits, before)


def test_a_quantised_head_keeps_its_products() -> None:
    """bitsandbytes' linear layers are not torch's."""
    from bitsandbytes.nn import Linear4bit

    model = tiny.model()
    assert plain_head(model) is model.lm_head
    model.lm_head = Linear4bit(32, len(tiny.WORDS), bias=False)
    assert plain_head(model) is None


def test_label_smoothing_of_the_arguments(tmp_path: Path) -> None:
    """The loss equals torch's."""
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
    """The losses are the same to the bit; for a model split over devices autograd keeps its threads."""
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
