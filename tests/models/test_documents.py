"""Documents of a packed row under any model whose attention goes through transformers' interface."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import PreTrainedModel
from trl import SFTConfig, SFTTrainer

from tests import tiny
from tests.models.test_attention import LENGTHS, assert_near, gradients_of, separately, together
from tests.models.windowed import (
    ComparingLayer,
    LoudAttention,
    OwnMaskModel,
    RenamingAttention,
    ScalingModel,
    SlicingAttention,
    WindowedConfig,
    WindowedForCausalLM,
)
from tests.trainer.runs import arguments, build, textbook
from unsloth_fast import UnslothTrainer, UnslothTrainingArguments, backends
from unsloth_fast.models import place, placement, remove
from unsloth_fast.models.interface import examine

REFERENCE = backends.resolve("reference")
TOKENS = sum(LENGTHS)
WINDOW = {"sliding_window": 4}
WINDOWS = WINDOW | {"layer_types": ["sliding_attention", "full_attention"]}
EXPERTS = {"moe_intermediate_size": 16, "num_experts_per_tok": 2}
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6}
GROUPS = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
NO_DROPOUT = {"attention_dropout": 0.0, "residual_dropout": 0.0}
# Names of families in transformers, and what a config needs beside tiny.SIZES.
FAMILIES: dict[str, dict[str, Any]] = {
    "Phi3": WINDOW,
    "Qwen3Moe": EXPERTS | {"num_experts": 4},
    "Olmo2": {},
    "Olmo3": WINDOWS,
    "Cohere2": WINDOWS,
    "Granite": {"attention_multiplier": 0.3},
    "SmolLM3": WINDOWS | {"use_sliding_window": True},
    "Ministral": WINDOWS,
    "Ministral3": {},
    "Glm4": {},
    "SeedOss": NO_DROPOUT,
    "Starcoder2": WINDOW | NO_DROPOUT,
    "StableLm": {},
    "DeepseekV3": EXPERTS | LATENT | GROUPS | {"head_dim": 4, "num_key_value_heads": 4},  # narrow values
    "GptOss": EXPERTS | WINDOWS | {"num_local_experts": 4},  # sinks
    "GraniteSWA": WINDOWS,  # sinks
    "Afmoe": EXPERTS | WINDOWS | {"num_experts": 4, "num_dense_layers": 1},  # its own mask lets documents leak
}


def model_of(name: str, **config: Any) -> PreTrainedModel:
    """In float64, with weights that make the attention uneven."""
    model_class = getattr(t, f"{name}ForCausalLM", None)
    if model_class is None:
        pytest.skip(f"this transformers has no {name}")
    torch.manual_seed(0)
    options = {"experts_implementation": "eager"}  # the fast one takes no float64
    made = model_class._from_config(model_class.config_class(**tiny.SIZES | FAMILIES[name] | config), **options)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return made.double()


def masks_of(model: torch.nn.Module) -> list[int]:
    """The bytes behind every mask that a layer or an attention gets, collected from now on."""
    sizes: list[int] = []

    def collect(module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        mask = kwargs.get("attention_mask")
        if isinstance(mask, Tensor) and not isinstance(module, PreTrainedModel):
            sizes.append(mask.untyped_storage().nbytes())

    for module in model.modules():
        module.register_forward_pre_hook(collect, with_kwargs=True)
    return sizes


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    ours = [record for record in caplog.records if record.name.startswith("unsloth_fast")]
    return [record.getMessage() for record in ours if record.levelname == "WARNING"]


def assert_alone(model: PreTrainedModel, places: int, *, checkpointed: bool = False) -> list[int]:
    """Packed documents equal the same documents alone, logits and every gradient; return the sizes of the masks."""
    batch = tiny.packed(LENGTHS)
    with tiny.KeepFloat64():
        expected, expected_gradients = separately(model, batch)
        assert place(model, REFERENCE).get("packed_attention", 0) == places
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.train()
        sizes = masks_of(model)
        logits, gradients = together(model, batch)
    assert_near(logits, expected, 1e-13)
    assert gradients.keys() == expected_gradients.keys()
    largest = max(gradient.abs().max() for gradient in expected_gradients.values())
    for name, gradient in gradients.items():
        scale = max(expected_gradients[name].abs().max(), 1e-3 * largest)  # some are 0 but for rounding
        assert (gradient - expected_gradients[name]).abs().max() <= 1e-11 * scale, name
    assert sizes
    return sizes


@pytest.mark.parametrize("name", ["Granite", "GraniteSWA", "Starcoder2", "StableLm", "Afmoe"])
def test_packed_documents_equal_the_same_documents_alone(name: str) -> None:
    """No layer gets more than the bounds of the documents; for further families see test_any_model.py."""
    sizes = assert_alone(model_of(name), 2)
    assert set(sizes) == {4 * (len(LENGTHS) + 1)}


def test_sinks_of_another_kind_get_a_mask_and_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    """One warning per model states the reason and the cost."""
    model = windowed(attn_implementation="eager")
    for layer in model.model.layers:
        layer.attention = LoudAttention(model.config).double()
    sizes = assert_alone(model, 0)
    assert max(sizes) >= TOKENS**2
    together(model, tiny.packed(LENGTHS))
    (warning,) = warnings_of(caplog)
    assert f"under a mask of {TOKENS} x {TOKENS} (sinks of another kind in its eager attention)" in warning


@pytest.mark.parametrize("name", FAMILIES)
def test_padded_batches_and_generation_have_the_same_bits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """This holds where norms, MLPs and rotations stay as they are."""
    monkeypatch.setattr(placement, "recognise", lambda module, known: None)
    monkeypatch.setattr(placement, "attention_placement", lambda *arguments: None)
    model = model_of(name).eval()
    tokens = torch.arange(3, 23).reshape(2, 10)
    mask = torch.ones_like(tokens)
    mask[1, :3] = 0

    def run() -> list[Tensor]:
        model.zero_grad()
        outputs = model(tokens, attention_mask=mask, labels=tokens.masked_fill(mask == 0, -100))
        outputs.loss.backward()
        options = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
        return [outputs.logits, model.generate(tokens, **options), *gradients_of(model).values()]

    expected = run()
    place(model, REFERENCE)
    assert model.config._attn_implementation.startswith(("packed_", "masked_"))
    for seen, before in zip(run(), expected, strict=True):
        torch.testing.assert_close(seen, before, rtol=0, atol=0, equal_nan=True)  # a row that is all masked


@pytest.mark.parametrize(("name", "checkpointed"), [("Phi3", False), ("StableLm", True)])
def test_under_adapters_and_checkpointing(name: str, checkpointed: bool) -> None:
    model = model_of(name)
    torch.manual_seed(1)
    config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    sizes = assert_alone(get_peft_model(model, config), 2, checkpointed=checkpointed)
    assert set(sizes) == {4 * (len(LENGTHS) + 1)}


def windowed(**config: Any) -> WindowedForCausalLM:
    torch.manual_seed(0)
    return WindowedForCausalLM(WindowedConfig(**config)).double()


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_model_with_a_causal_and_a_window_layer(implementation: str) -> None:
    sizes = assert_alone(windowed(attn_implementation=implementation), 2)
    assert set(sizes) == {4 * (len(LENGTHS) + 1)}


@pytest.mark.parametrize("packing", [False, True])
def test_it_trains_as_with_plain_trl(tmp_path: Path, packing: bool) -> None:
    """Here documents share a row; TRL pads or packs them. AdamW makes at most 1e-12 of rounding."""
    losses = []
    for trainer_kind, args_kind in ((UnslothTrainer, UnslothTrainingArguments), (SFTTrainer, SFTConfig)):
        own_loss = {"compute_loss_func": textbook} if trainer_kind is SFTTrainer else {}
        with tiny.KeepFloat64():
            args = arguments(tmp_path, args_kind, max_steps=3, packing=packing, max_length=24)
            trainer = build(trainer_kind, args, model=windowed(), **own_loss)
            sizes = masks_of(trainer.model)
            trainer.train()
        assert trainer_kind is SFTTrainer or max(sizes) < 24 * 4
        losses.append(trainer.losses)
    assert len(losses[0]) == 3 and len(set(losses[0])) == 3
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize(
    ("config", "reason"),
    [({"prefix": 2}, "neither causal nor sliding"), ({"bias": True}, "WindowedAttention: the keyword position_bias")],
)
def test_what_is_seen_only_in_the_forward(
    implementation: str, config: dict[str, Any], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The forward shows a mask of another pattern, and a bias on the scores."""
    sizes = assert_alone(windowed(attn_implementation=implementation, **config), 2)
    assert "prefix" not in config or max(sizes) >= TOKENS**2
    (warning,) = warnings_of(caplog)
    assert reason in warning


def test_dropout_that_is_turned_on_later(caplog: pytest.LogCaptureFixture) -> None:
    """Documents are apart nevertheless, and layers without dropout stay as they are."""
    model, batch = model_of("Phi3").train(), tiny.packed(LENGTHS)
    place(model, REFERENCE)
    model.model.layers[1].self_attn.attention_dropout = 0.5
    inputs = model.get_input_embeddings()(batch.pop("input_ids")).detach().requires_grad_()
    model(inputs_embeds=inputs, **batch).logits[:, 8:20].square().sum().backward()
    outside = torch.ones(TOKENS, dtype=torch.bool)
    outside[8:20] = False
    assert (inputs.grad[:, outside] == 0).all() and (inputs.grad[:, ~outside] != 0).any()
    (warning,) = warnings_of(caplog)
    assert "dropout=0.5" in warning


def test_remove_is_the_inverse() -> None:
    """It undoes placing once or twice; a copy stays placed, and a model that shares the config computes as before."""
    model, other, batch = model_of("Phi3"), model_of("Phi3"), tiny.packed(LENGTHS)
    other.model.config = other.config = model.config
    for layer in other.model.layers:
        layer.self_attn.config = model.config
    expected = other(batch["input_ids"]).logits
    for _ in range(2):
        place(model, REFERENCE)
    twin = copy.deepcopy(model)
    packed = model(**batch).logits
    assert model.config._attn_implementation == "packed_sdpa"
    assert torch.equal(other(batch["input_ids"]).logits, expected)
    remove(model)
    assert model.config._attn_implementation == "sdpa"
    assert not any("forward" in vars(module) or "unsloth_documents" in vars(module) for module in model.modules())
    assert torch.equal(twin(**batch).logits, packed)
    assert "packed_attention" not in place(model, REFERENCE, documents=False)
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_model_loaded_with_the_name_alone_computes_as_before(implementation: str) -> None:
    """Trainers load a second model like the first in this way."""
    model, named = (model_of("Olmo3") for _ in range(2))
    model.set_attn_implementation(implementation)
    named.set_attn_implementation(f"packed_{implementation}")
    batch = tiny.packed(LENGTHS)
    for given in ({"input_ids": batch["input_ids"]}, batch):
        assert torch.equal(named(**given, use_cache=False).logits, model(**given, use_cache=False).logits)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_any_packed_batch_compiles_without_a_graph_break(dropout: float) -> None:
    """This holds with the bounds of the documents and with a mask of them."""
    model, batch = model_of("Granite", attention_dropout=dropout).eval(), tiny.packed(LENGTHS)
    place(model, REFERENCE)
    expected = model(**batch, use_cache=False).logits
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert_near(compiled(**batch, use_cache=False).logits, expected, 1e-13)


@pytest.mark.parametrize(
    ("part", "kind", "reason"),
    [
        ("model.layers.1.attention", SlicingAttention, "SlicingAttention changes its mask"),
        ("model.layers.1.attention", RenamingAttention, "RenamingAttention takes its mask by another name"),
        ("model.layers.1", ComparingLayer, "ComparingLayer compares the name of its attn_implementation"),
        ("model", ScalingModel, "it changes its masks"),
        ("model", OwnMaskModel, "its masks are its own"),
    ],
)
def test_code_that_needs_the_mask_of_transformers_gets_it(part: str, kind: Any, reason: str) -> None:
    """It computes what it did before."""
    model, batch = windowed(), tiny.packed(LENGTHS)
    model.set_submodule(part, kind(model.config).double())
    expected = model(**batch).logits
    assert examine(model.model, "sdpa").foreign == reason
    assert place(model, REFERENCE) == {}
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(model(**batch).logits, expected)


def chunked() -> PreTrainedModel:
    sizes = tiny.SIZES | {"intermediate_size_mlp": 40, "num_local_experts": 2, "attention_chunk_size": 8}
    return t.Llama4ForCausalLM(t.Llama4TextConfig(**sizes, moe_layers=[]))


def test_a_model_with_masks_of_its_own_keeps_them(caplog: pytest.LogCaptureFixture) -> None:
    """The reason is logged, and warned of with the first packed batch."""
    caplog.set_level("INFO")
    model = chunked()
    assert "packed_attention" not in place(model, REFERENCE) and model.config._attn_implementation == "sdpa"
    assert "'packed Llama4TextAttention (its masks: create_chunked_causal_mask)': 2" in caplog.text
    model(**tiny.packed(LENGTHS))
    assert f"under a mask of {TOKENS} x {TOKENS} (its masks: create_chunked_causal_mask)" in caplog.text


def test_a_cap_that_the_attention_passes_over_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' sdpa did until 5.22: packed documents get what padded ones get."""
    sdpa: Any = t.modeling_utils.ALL_ATTENTION_FUNCTIONS["sdpa"]

    def older(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, scaling: float, **others: Any) -> Any:
        return sdpa(module, q, k, v, mask, scaling=scaling, is_causal=others.get("is_causal"))

    monkeypatch.setitem(t.modeling_utils.ALL_ATTENTION_FUNCTIONS, "sdpa", older)
    made = tiny.model("gemma2", torch.float64, attn_logit_softcapping=0.5, attn_implementation="eager")
    made.config._attn_implementation = "sdpa"
    assert_alone(made, 2)
