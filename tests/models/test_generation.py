"""Methods of loaded models, and generation as scripts for Unsloth call it."""

import copy
import pickle
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM

import unsloth_fast.save
from tests import tiny
from tests.models.adapted import adapted, assert_near, load, logits_of, merged, trained
from unsloth_fast import FastLanguageModel
from unsloth_fast.models import generation


@pytest.mark.parametrize("adapter", [False, True])
def test_a_deep_copys_methods_are_its_own(tmp_path: Path, adapter: bool) -> None:
    model, _ = load(tiny.folder(tmp_path))
    names = list(tiny.model().state_dict())
    assert list(model.state_dict()) == names
    model = FastLanguageModel.get_peft_model(model, r=4) if adapter else model
    other = copy.deepcopy(model)
    trained(other)
    assert other.for_inference() is other and not other.training and model.training
    assert not any(module.training for module in other.modules())
    assert other.for_training() is other and all(module.training for module in other.modules())
    other.save_pretrained_merged(tmp_path / "merged")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert_near(logits_of(found), logits_of(other.eval()), 3e-3)
    assert (logits_of(other) - logits_of(model.eval())).abs().max() > 0.05


class Owner(nn.Module):
    """A module that can be pickled."""


def test_methods_can_be_pickled() -> None:
    owner = Owner()
    unsloth_fast.save._bind(owner, {"pad": generation.pad_left, "train": FastLanguageModel.for_training})
    again = pickle.loads(pickle.dumps(owner))
    assert again.pad.args == (again,) and again.pad.func is generation.pad_left
    assert again.pad.__doc__ == generation.pad_left.__doc__


@pytest.mark.parametrize("adapter", [False, True])
def test_generate_takes_what_a_tokenizer_returns(tmp_path: Path, adapter: bool) -> None:
    """It takes it by position, as input_ids or unpacked; other arguments replace what it holds."""
    folder = tiny.folder(tmp_path)
    model, tokenizer = adapted(folder) if adapter else load(folder)
    FastLanguageModel.for_inference(model)
    batch = tokenizer(["w1 w2 w3", "w4"], return_tensors="pt", padding=True)
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]
    options = {"max_new_tokens": 5, "do_sample": False}
    plain = merged(model, tmp_path / "merged")
    expected = plain.generate(batch["input_ids"], attention_mask=batch["attention_mask"], **options)
    assert torch.equal(model.generate(**batch, **options), expected)
    assert torch.equal(model.generate(batch, **options), expected)
    assert torch.equal(model.generate(inputs=batch, **options), expected)
    assert torch.equal(model.generate(input_ids=batch, **options), expected)
    assert torch.equal(model.generate(input_ids=batch, token_type_ids=batch["input_ids"], **options), expected)
    other = torch.ones_like(batch["input_ids"])
    assert torch.equal(
        model.generate(input_ids=batch, attention_mask=other, **options),
        plain.generate(batch["input_ids"], attention_mask=other, **options),
    )


def test_chat_templates_and_streamers_generate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, tokenizer = load(tiny.folder(tmp_path))
    model.for_inference()
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }} {% endfor %}"
    messages = [{"role": "user", "content": "w1 w2 w3"}]
    ids = tokenizer.apply_chat_template(messages, return_tensors="pt", add_generation_prompt=True)
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    streamer = transformers.TextStreamer(tokenizer, skip_prompt=True)
    out = model.generate(input_ids=ids, streamer=streamer, **options)
    assert out.shape == (1, 7)
    assert capsys.readouterr().out.split() == tokenizer.decode(out[0, 3:]).split()
    assert torch.equal(model.generate(ids, **options), out)


@pytest.mark.parametrize("side", ["right", "left"])
def test_the_tokenizer_pads_on_the_left_for_inference_alone(tmp_path: Path, side: str) -> None:
    """Whichever side was set before is set again for training."""
    model, tokenizer = load(tiny.folder(tmp_path))
    model = FastLanguageModel.get_peft_model(model, r=4)
    tokenizer.padding_side = side
    for _ in range(2):
        FastLanguageModel.for_inference(model)
        assert tokenizer.padding_side == "left"
    FastLanguageModel.for_training(model)
    assert tokenizer.padding_side == side
