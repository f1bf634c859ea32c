"""Models with weights in float8: loading, adapters and their gradients, training, saving and merging."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.integrations.finegrained_fp8 import FP8Linear

from tests import tiny
from tests.models.adapted import adapted, config_of, load, logits_of, merged, trained
from unsloth_fast import FastLanguageModel, backends
from unsloth_fast.models import float8, place
from unsloth_ref.kernels import fp8_dequantize, fp8_quantize

TOKENS = torch.arange(20)[None]
BAND = 0.01  # of the loss: what a run in float8 may differ by; these thirty steps differ by 0.0033 at most


def in_float8(folder: Path, **options: Any) -> tuple[Any, Any]:
    return load(tiny.folder(folder), load_in_4bit=None, load_in_fp8=True, **options)


def layers_of(model: Any) -> dict[str, FP8Linear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, FP8Linear)}


def steps(model: Any, count: int) -> list[float]:
    """The losses of a run with AdamW on the same row."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer, losses = torch.optim.AdamW(parameters, lr=5e-3), []
    for _ in range(count):
        loss = model(TOKENS, labels=TOKENS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def gradients_of(model: Any) -> dict[str, Tensor]:
    model.zero_grad()
    model(TOKENS, labels=TOKENS).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_linear_layers_become_float8_and_the_head_does_not(tmp_path: Path) -> None:
    """The weights are those of fp8_quantize; adapters start as those of a model that is not quantised."""
    model, _ = in_float8(tmp_path / "a")
    plain, _ = load(tiny.folder(tmp_path / "b"))
    layers = layers_of(model)
    assert len(layers) == 14 and type(model.lm_head) is torch.nn.Linear
    placed = place(model, backends.resolve("reference"))
    assert placed["fp8_linear"] == 14 and not placed.keys() & {"lora_linear", "lora_linears", "lora_mlp"}
    for name, layer in layers.items():
        values, scale = fp8_quantize(plain.get_submodule(name).weight)
        assert torch.equal(layer.weight.view(torch.uint8), values.view(torch.uint8))
        assert torch.equal(layer.weight_scale_inv, scale)
    start, other = (dict(FastLanguageModel.get_peft_model(each, r=4).named_parameters()) for each in (model, plain))
    moving = [name for name, parameter in start.items() if parameter.requires_grad]
    assert len(moving) == 28
    assert all(torch.equal(start[name], other[name]) and start[name].dtype == torch.float32 for name in moving)


def test_a_run_stays_in_a_band_around_that_of_float32(tmp_path: Path) -> None:
    """Each of thirty steps does, in which the loss falls by more than 1."""
    runs = []
    for fp8 in (True, False):
        model, _ = in_float8(tmp_path / "a") if fp8 else load(tiny.folder(tmp_path / "b"))
        runs.append(steps(FastLanguageModel.get_peft_model(model, r=8, lora_alpha=16), 30))
    quantised, plain = map(torch.tensor, runs)
    assert quantised[-1] < quantised[0] - 1
    assert ((quantised - plain).abs() <= BAND * plain).all()


def test_both_backends_give_the_same_gradients_of_adapters(tmp_path: Path) -> None:
    """After a step, when no adapter is zero, and closer than one bit of bfloat16.

    Sums in another order change the last bit of an activation, and then a few are quantised to the other neighbour.
    """
    model, _ = in_float8(tmp_path)
    model = FastLanguageModel.get_peft_model(model, r=4, use_gradient_checkpointing=False)
    steps(model, 1)
    expected = gradients_of(model)
    assert place(model, backends.resolve("fast"))["fp8_linear"] == 14
    found = gradients_of(model)
    assert found.keys() == expected.keys() and len(found) == 28
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= torch.finfo(torch.bfloat16).eps * gradient.norm()


def test_a_layer_is_one_operation_with_its_adapter(tmp_path: Path) -> None:
    """Its MLP, and those of one input, too; with the results of peft, which calls a layer of another package.

    A hook of the layer is called.
    """
    model, _ = in_float8(tmp_path)
    model = FastLanguageModel.get_peft_model(model, r=4, use_gradient_checkpointing=False)
    steps(model, 1)
    together = {"fp8_linear": 14, "lora_linear": 2, "lora_linears": 2, "lora_mlp": 2}
    placed = place(model, backends.resolve("reference"))
    assert together.items() <= placed.items()
    found = gradients_of(model)
    hook = next(iter(layers_of(model).values())).register_forward_hook(lambda module, inputs, y: 2 * y)
    assert not all(torch.equal(found[name], gradient) for name, gradient in gradients_of(model).items())
    hook.remove()
    apart = place(model, backends.resolve("reference,fp8_linear=fast"))
    assert apart["fp8_linear"] == 14 and not apart.keys() & {"lora_linear", "lora_linears", "lora_mlp"}
    for name, gradient in gradients_of(model).items():
        assert (found[name] - gradient).norm() <= torch.finfo(torch.bfloat16).eps * gradient.norm()


def test_the_gradients_are_those_of_the_dequantised_weights(tmp_path: Path) -> None:
    """A frozen layer passes on dy @ weight: compared with plain layers of these weights whose input is quantised."""
    model, _ = in_float8(tmp_path)
    layer = next(iter(layers_of(model).values()))
    x = torch.randn(5, layer.in_features, generator=torch.Generator().manual_seed(0)).requires_grad_()
    y = layer(x)
    weight = fp8_dequantize(layer.weight, layer.weight_scale_inv, torch.float32)
    rows = fp8_dequantize(*fp8_quantize(x, 1), torch.float32)
    torch.testing.assert_close(y, rows @ weight.t())
    torch.testing.assert_close(torch.autograd.grad(y.sum(), x)[0], torch.ones_like(y) @ weight)


def test_a_saved_model_is_one_of_transformers_and_is_loaded_as_it_was(tmp_path: Path) -> None:
    """Its bits need not be asked for. On a CPU plain transformers dequantises it."""
    model, tokenizer = in_float8(tmp_path / "base")
    folder = tmp_path / "saved"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    stored = config_of(folder)["quantization_config"]
    assert (stored["quant_method"], stored["modules_to_not_convert"]) == ("fp8", ["lm_head"])
    for options in ({"load_in_4bit": None}, {"load_in_4bit": None, "load_in_fp8": True}):
        again, _ = load(str(folder), **options)
        assert len(layers_of(again)) == 14
        assert torch.equal(logits_of(again), logits_of(model))
    by_transformers = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert not layers_of(by_transformers)
    for name, layer in layers_of(model).items():
        assert torch.equal(by_transformers.get_submodule(name).weight, float8.dequantised(layer))


def test_an_adapter_is_merged_into_the_dequantised_weights(tmp_path: Path) -> None:
    model, _ = in_float8(tmp_path / "base")
    model = trained(FastLanguageModel.get_peft_model(model, r=4))
    plain = merged(model, tmp_path / "merged")
    assert "quantization_config" not in config_of(tmp_path / "merged")
    for name, layer in layers_of(model).items():
        wrapper = model.get_submodule(name.removesuffix(".base_layer"))
        update = wrapper.get_delta_weight("default")
        path = name.removeprefix("base_model.model.").removesuffix(".base_layer")
        torch.testing.assert_close(plain.get_submodule(path).weight, float8.dequantised(layer) + update)


def test_an_adapter_of_another_kind_is_peft_s(tmp_path: Path) -> None:
    """With dropout, peft calls the layer, and the gradients still reach every adapter."""
    model, _ = in_float8(tmp_path)
    model = FastLanguageModel.get_peft_model(model, r=4, lora_dropout=0.1)
    assert len(gradients_of(model)) == 28


def test_a_plain_model_is_not_affected(tmp_path: Path) -> None:
    model, _ = adapted(tiny.folder(tmp_path))
    assert not layers_of(model)


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        (
            {"quant_method": "fp8", "activation_scheme": "static"},
            "a model with activation_scheme='static'; allowed: 'dyn",
        ),
        (
            {"quant_method": "fp8", "weight_block_size": [64, 64]},
            r"weight_block_size=\[64, 64\]; allowed: \[128, 128\]",
        ),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "a model that is stored as 'bitsandbytes'"),
    ],
)
def test_other_forms_are_refused(stored: dict[str, Any], message: str) -> None:
    config = transformers.LlamaConfig(quantization_config=stored)
    with pytest.raises(ValueError, match=f"load_in_fp8: got True and .*{message}"):
        float8.is_wanted(True, [False] * 4, config)
    assert not float8.is_wanted(None, [False] * 4, config)


def test_the_device_is_one() -> None:
    cpu = torch.device("cpu")
    assert [float8.one_device(each) for each in (None, "cpu", cpu, {"": "cpu"})] == [cpu] * 4
    assert float8.one_device(1) == float8.one_device({"": 1}) == torch.device("cuda:1")
    for several in ("balanced", {"model": 0, "lm_head": 1}):
        with pytest.raises(ValueError, match=r"device_map: got .* with load_in_fp8=True; allowed: one device"):
            float8.one_device(several)
