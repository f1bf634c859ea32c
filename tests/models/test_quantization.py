"""Which linear layers 4 and 8 bits leave out, and that models with such layers train."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import nn
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.quantizers_utils import should_convert_module

from tests import tiny
from tests.models import zoo
from tests.models.adapted import adapted, load, logits_of, merged
from tests.trainer.runs import arguments
from unsloth_fast import FastLanguageModel, FastModel, UnslothTrainer, backends
from unsloth_fast.models import place, quantization
from unsloth_fast.models.layers import read_layers

REFERENCE = backends.resolve("reference")
ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
MLP = {"gate_proj", "up_proj", "down_proj"}
ALTUP = {"altup_projections", "altup_unembed_projections", "correction_coefs", "modality_router", "prediction_coefs"}

# By family: the last names of the layers that are left out beside the head, and of those that are quantised.
SPLIT: dict[str, tuple[set[str], set[str]]] = {
    "granitemoehybrid": ({"in_proj", "out_proj"}, ATTENTION | {"input_linear", "output_linear"}),
    "falcon_h1": ({"in_proj", "out_proj"}, ATTENTION | MLP),
    "mamba2": ({"in_proj", "out_proj"}, set()),
    "jamba": ({"in_proj", "out_proj", "x_proj", "dt_proj"}, ATTENTION | MLP),
    "qwen2_moe": ({"shared_expert_gate"}, ATTENTION | MLP),
    "qwen3_moe": (set(), ATTENTION),
    "phi3": (set(), {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}),
}


def quantised_names(model: Any) -> set[str]:
    """The layers that bitsandbytes' quantiser of transformers converts, given what we leave out."""
    kept = quantization.kept_modules(model) or ["lm_head"]  # transformers' default
    layers = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)]
    return {name for name in layers if should_convert_module(name, kept)}


@pytest.mark.parametrize("name", SPLIT)
def test_layers_are_left_out_by_structure(name: str) -> None:
    """They are Mamba's projections, which are read instead of called, gates of experts, and linear routers."""
    model = zoo.empty(name)
    kept, quantised = SPLIT[name]
    converted = quantised_names(model)
    layers = {path for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert {path.rpartition(".")[2] for path in converted} == quantised  # not the router that older releases have
    assert {path.rpartition(".")[2] for path in layers - converted} - {"router"} == kept | {"lm_head"}


@pytest.mark.parametrize("name", ["gemma3", "mistral3", "qwen2_5_vl"])
def test_all_of_the_text_model_and_nothing_else_is_quantised(name: str) -> None:
    """The vision tower is not quantised, and neither is what joins it to the text model."""
    model = zoo.empty(name)
    layers = {path for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert quantised_names(model) == {path for path in layers if path.startswith("model.language_model.layers.")}
    assert all(entry.count(".") <= 1 for entry in quantization.kept_modules(model))  # whole branches


def test_alternating_updates_are_left_out() -> None:
    """Gemma 3n reads the coefficients, and the router among them decides about all hidden states."""
    model = zoo.empty("gemma3n")
    converted = quantised_names(model)
    assert not any("altup" in name for name in converted)
    assert sum(name.endswith("_proj") for name in converted) == 2 * 7
    assert {entry.partition(".")[0] for entry in quantization.kept_modules(model)} == ALTUP | {"lm_head"}


class Reader(nn.Module):
    """Reads the weights of some of its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.called, self.read, self.placed, self.inner = (nn.Linear(2, 2) for _ in range(4))
        self.block = nn.ModuleDict({"deep": nn.Linear(2, 2)})
        self.norm = nn.LayerNorm(2)

    def init_weights(self) -> None:
        nn.init.zeros_(self.inner.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.called(x).to(self.placed.weight.device) * self.norm.weight
        return nn.functional.linear(self.inner(x), self.read.weight) + self.block.deep.weight.sum()


def test_a_layer_is_read_if_the_source_of_the_class_reads_its_weight() -> None:
    """Code that initialises the weight or asks for its device does not read it; the source of a subclass counts too."""
    derived = type("Derived", (Reader,), {"__module__": __name__})
    for kind in (Reader, derived):
        assert read_layers(nn.Sequential(kind())) == {"0.read", "0.block.deep"}


@pytest.mark.parametrize(("name", "bits"), [("granitemoehybrid", 4), ("gemma3", 4), ("phi3", 8)])
def test_a_model_with_such_layers_trains(tmp_path: Path, name: str, bits: int) -> None:
    folder = zoo.folder(tmp_path / "model", name)
    model, tokenizer = load(folder, load_in_4bit=bits == 4, load_in_8bit=bits == 8)
    classes = {type(module).__name__ for module in model.modules()}
    assert ("Linear4bit" in classes, "Linear8bitLt" in classes) == (bits == 4, bits == 8)
    model = FastModel.get_peft_model(model, r=2, use_gradient_checkpointing=False)
    before = {key: value.clone() for key, value in model.named_parameters() if value.requires_grad}
    texts = Dataset.from_dict({"text": ["w1 w2 w3", "w4 w5"] * 2})
    args = arguments(tmp_path / "out", max_steps=1, warmup_steps=0)
    trainer = UnslothTrainer(model, args, train_dataset=texts, processing_class=tokenizer)
    assert 3 < trainer.train().training_loss < 5
    moved = {key for key, value in model.named_parameters() if key in before and not torch.equal(value, before[key])}
    assert moved == before.keys()


def test_8_bits_are_merged_from_the_dequantised_weights(tmp_path: Path) -> None:
    """The layers of bitsandbytes round their inputs to 8 bits as well, so the logits agree only roughly."""
    model, _ = load(tiny.folder(tmp_path / "base"), load_in_8bit=True)
    model = FastLanguageModel.get_peft_model(model, r=2)
    plain = merged(FastLanguageModel.for_inference(model), tmp_path / "merged")
    expected = logits_of(plain)
    assert (logits_of(model) - expected).abs().max() < 0.1 * expected.abs().max()


def test_a_float16_model_in_8_bits_trains_float32_adapters(tmp_path: Path) -> None:
    model, _ = load(tiny.folder(tmp_path), load_in_8bit=True, dtype="float16")
    model = FastLanguageModel.get_peft_model(model, r=2)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


def test_an_adapter_on_experts_and_4_bits_is_loaded_again(tmp_path: Path) -> None:
    """Its layers outside the list are the same ones."""
    folder = zoo.folder(tmp_path / "base", "qwen2_moe")
    model, _ = adapted(folder, four=True)
    model.save_pretrained(tmp_path / "adapter")
    again, _ = load(str(tmp_path / "adapter"), load_in_4bit=True)
    assert type(again.get_base_model().model.layers[0].mlp.shared_expert_gate) is nn.Linear
    torch.testing.assert_close(logits_of(again.eval()), logits_of(model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bits", [{"load_in_4bit": True}, {"load_in_8bit": True}, {"load_in_fp8": True}, {}], ids=str)
@pytest.mark.parametrize("name", ["qwen3_moe", "granitemoehybrid"])
def test_experts_that_stay_wide_are_logged_once_with_their_size(
    tmp_path: Path, name: str, bits: dict[str, bool], caplog: pytest.LogCaptureFixture
) -> None:
    """Convolutions, whose weights have three dimensions too, do not count, nor does a model that is not quantised."""
    model, _ = load(zoo.folder(tmp_path, name), **{"load_in_4bit": None if "load_in_fp8" in bits else False} | bits)
    wide = [weight for key, weight in model.named_parameters() if weight.ndim == 3 and "conv" not in key]
    size = sum(4 * weight.numel() for weight in wide) / 2**30
    expected = f"experts are not quantised, as only linear layers are: they take {size:.3g} GiB in torch.float32"
    FastLanguageModel.get_peft_model(model, r=2)
    place(model, REFERENCE)
    assert [line for line in caplog.messages if line.startswith("experts")] == ([expected] if bits else [])
    assert size > 0
