"""Checkpoints whose experts are stored in MXFP4, as those of gpt-oss: what is loaded, and what may be asked for."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.lora.layer import ParamWrapper
from safetensors.torch import load_file, save_file
from torch import Tensor

from conformance.models.building import Subject
from tests import tiny
from tests.models.adapted import TOKENS, load
from unsloth_fast import FastLanguageModel

GROUP = 32  # numbers that share a scale
NUMBERS = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
EXPERTS = "model.layers.1.mlp.experts.down_proj"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny gpt-oss as its makers store it: two numbers a byte, and the exponent of each 32, for [E, O, I]."""
    path = tmp_path_factory.mktemp("mxfp4")
    model = Subject.named("gpt_oss", hidden_size=GROUP, intermediate_size=2 * GROUP).model(torch.bfloat16, "cpu")
    generator, tensors = torch.Generator().manual_seed(0), {}
    for name, tensor in model.state_dict().items():
        if name.endswith(("gate_up_proj", "down_proj")):
            experts, inputs, outputs = tensor.shape
            sizes = experts, outputs, inputs // GROUP
            tensors[f"{name}_blocks"] = torch.randint(256, (*sizes, GROUP // 2), generator=generator).byte()
            tensors[f"{name}_scales"] = torch.randint(122, 126, sizes, generator=generator).byte()
        else:
            tensors[name] = tensor.contiguous()
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    model.config.save_pretrained(path)
    config = json.loads((path / "config.json").read_text())
    config |= {"architectures": ["GptOssForCausalLM"], "quantization_config": {"quant_method": "mxfp4"}}
    (path / "config.json").write_text(json.dumps(config))
    tiny.tokenizer().save_pretrained(path)
    return path


def decoded(blocks: Tensor, scales: Tensor) -> Tensor:
    """Low half byte first; its highest bit is the sign; the weight of gpt-oss is [E, I, O]."""
    halves = torch.stack((blocks & 15, blocks >> 4), -1).long()
    numbers = NUMBERS[halves & 7] * torch.where(halves > 7, -1.0, 1.0)
    return (numbers.flatten(-2) * torch.exp2(scales.float() - 127)[..., None]).flatten(-2).mT


def test_experts_are_converted_and_train(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """They are numbers of the dtype; the log says so and how much memory they take."""
    caplog.set_level(logging.INFO)
    model, _ = load(str(folder), dtype=torch.bfloat16)
    stored, weight = load_file(folder / "model.safetensors"), model.get_parameter(EXPERTS)
    assert weight.dtype == torch.bfloat16
    assert torch.equal(weight.float(), decoded(stored[f"{EXPERTS}_blocks"], stored[f"{EXPERTS}_scales"]))
    size = 2 * 4 * 3 * GROUP * 2 * GROUP * 2 / 2**30  # layers, experts, weights, sizes, bytes
    line = f"experts stored in MXFP4 become torch.bfloat16, as there is no training in MXFP4: they take {size:.3g} GiB"
    assert line in caplog.messages and "experts are not quantised" not in caplog.text
    model = FastLanguageModel.get_peft_model(model, r=2, use_gradient_checkpointing=False)
    model(TOKENS, labels=TOKENS).loss.backward()
    adapted: list[Any] = [module for module in model.modules() if isinstance(module, ParamWrapper)]
    assert len(adapted) == 4
    assert all(layer.lora_B["default"].weight.grad.abs().sum() > 0 for layer in adapted)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"load_in_4bit": True}, "; load_in_4bit=True has no effect on such a model"),
        ({"load_in_16bit": True}, " GiB"),
        ({"full_finetuning": True}, " GiB"),
    ],
)
def test_what_may_be_asked_for(
    folder: Path, options: dict[str, Any], message: str, caplog: pytest.LogCaptureFixture
) -> None:
    model, _ = load(str(folder), **{"load_in_4bit": None} | options)
    assert {parameter.dtype for parameter in model.parameters()} <= {torch.float32, torch.bfloat16}
    assert any(line.startswith("experts stored in MXFP4") and line.endswith(message) for line in caplog.messages)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"load_in_8bit": True}, "load_in_8bit: got True and a model that is stored quantised otherwise; allowed: F"),
        ({"load_in_fp8": True}, "load_in_fp8: got True and a model that is stored as 'mxfp4'; allowed: False"),
    ],
)
def test_other_bits_are_refused(folder: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(str(folder), **{"load_in_4bit": None} | options)
