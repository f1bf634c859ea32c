"""In which dtype weights are trained, and the precision of a run on a GPU without bfloat16."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from trl import SFTConfig

from tests import tiny
from tests.trainer.runs import arguments
from unsloth_fast import FastLanguageModel, UnslothTrainer, UnslothTrainingArguments
from unsloth_fast.arguments.sft_config import as_sft_config
from unsloth_fast.compat import patch_trl
from unsloth_fast.hooks.optimizer import check_trainable

ROWS = Dataset.from_dict({"text": tiny.texts(4)})
LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"], "modules_to_save": ["lm_head"]}


def four_bits(folder: Path, dtype: torch.dtype) -> Any:
    """A model in 4 bits."""
    pytest.importorskip("bitsandbytes")
    options = {"load_in_4bit": True, "dtype": dtype, "device_map": "cpu", "backend": "reference"}
    return FastLanguageModel.from_pretrained(tiny.folder(folder), **options)[0]


def trainer_of(kind: type, folder: Path, model: Any, **options: Any) -> Any:
    args = arguments(folder, SFTConfig if kind is trl.SFTTrainer else UnslothTrainingArguments, max_steps=2, bf16=True)
    return kind(model=model, args=args, train_dataset=ROWS, processing_class=tiny.tokenizer(), **options)


@pytest.mark.parametrize("kind", [UnslothTrainer, trl.SFTTrainer], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_trained_weights_of_a_quantised_model_keep_their_dtype(tmp_path: Path, dtype: torch.dtype, kind: type) -> None:
    """The bits are kept after the constructor; the dtype also after training, in which each weight moves."""
    model = FastLanguageModel.get_peft_model(four_bits(tmp_path, dtype), **LORA)
    patch_trl()
    given = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    assert {p.dtype for name, p in given.items() if "lora" in name} == {torch.float32}
    trainer = trainer_of(kind, tmp_path, model)
    assert isinstance(trainer, UnslothTrainer)
    trained = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert trained.keys() == given.keys()
    for name, parameter in trained.items():
        assert parameter.dtype == given[name].dtype and torch.equal(parameter, given[name]), name
    trainer.train()
    for name, parameter in trained.items():
        assert parameter.dtype == given[name].dtype and not torch.equal(parameter, given[name]), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_an_adapter_that_the_constructor_adds_to_a_quantised_model(tmp_path: Path, dtype: torch.dtype) -> None:
    """It is float32, as peft makes it; a module trained in full is exact, in float32 where loss scaling needs that."""
    model = four_bits(tmp_path, dtype)
    head = model.lm_head.weight.detach().clone()
    trainer = trainer_of(UnslothTrainer, tmp_path, model, peft_config=LoraConfig(**LORA, task_type="CAUSAL_LM"))
    trained = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert {p.dtype for name, p in trained.items() if "lora" in name} == {torch.float32}
    (saved,) = (p for name, p in trained.items() if "modules_to_save" in name)
    assert saved.dtype == (torch.float32 if dtype == torch.float16 else dtype)
    assert torch.equal(saved.float(), head.float())
    assert torch.equal(trainer.model.get_base_model().lm_head.original_module.weight, head)
    trainer.train()
    assert not torch.equal(saved.float(), head.float())


def test_weights_in_bfloat16_stay_in_bfloat16(tmp_path: Path) -> None:
    """They belong to an adapter that was made in bfloat16."""
    base = four_bits(tmp_path, torch.bfloat16)
    model: Any = get_peft_model(base, LoraConfig(**LORA, task_type="CAUSAL_LM"), autocast_adapter_dtype=False)
    for name, parameter in model.named_parameters():
        if "lora" in name:
            parameter.data = parameter.data.to(torch.bfloat16)
    trainer = trainer_of(UnslothTrainer, tmp_path, model)
    assert {p.dtype for p in trainer.model.parameters() if p.requires_grad} == {torch.bfloat16}


def without_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this machine look like one with a GPU that only emulates bfloat16."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Tesla T4")
    for module in ("transformers.training_args", "unsloth_fast.config"):  # transformers' own remembers its first answer
        monkeypatch.setattr(f"{module}.is_torch_bf16_gpu_available", lambda: torch.cuda.is_bf16_supported())


def test_a_quantised_model_trains_on_a_card_without_bfloat16(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of it is in bfloat16 after the constructor."""
    model = FastLanguageModel.get_peft_model(four_bits(tmp_path, torch.float16), **LORA)
    trainer = trainer_of(UnslothTrainer, tmp_path, model)
    without_bfloat16(monkeypatch)
    args = copy.copy(trainer.args)
    args.bf16, args.fp16 = False, True
    monkeypatch.setattr(type(args), "device", torch.device("cuda", 0))
    check_trainable(trainer.model, args)


@pytest.mark.parametrize(
    ("kind", "options", "expected"),
    [
        (UnslothTrainingArguments, {}, (True, False)),
        (UnslothTrainingArguments, {"fp16": True}, (True, False)),
        (UnslothTrainingArguments, {"bf16": False}, (False, False)),
        (UnslothTrainingArguments, {"bf16": True}, (False, True)),  # refused when the trainer is built
        (SFTConfig, {}, (True, False)),
        (SFTConfig, {"fp16": True}, (True, False)),
        (SFTConfig, {"bf16": False}, (False, False)),
    ],
)
def test_fp16_where_neither_is_named_on_a_card_without_bfloat16(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    kind: type,
    options: dict[str, bool],
    expected: tuple[bool, bool],
) -> None:
    """The log says so; what was named stays. The user's own arguments do not change."""
    without_bfloat16(monkeypatch)
    given = kind(str(tmp_path), **options)
    before = given.fp16, given.bf16
    resolved = as_sft_config(given, None)
    assert (resolved.fp16, resolved.bf16) == expected and (given.fp16, given.bf16) == before
    assert resolved.mixed_precision == ("fp16" if expected[0] else "bf16" if expected[1] else "no")
    assert ("precision: fp16=True in place of bf16=True" in caplog.text) is (not options)


def test_bf16_where_the_card_has_it_or_there_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL's default stays; on a CPU whatever the GPU beside it lacks."""
    without_bfloat16(monkeypatch)
    assert UnslothTrainingArguments(str(tmp_path), use_cpu=True).bf16
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    args = UnslothTrainingArguments(str(tmp_path))
    assert args.bf16 and not args.fp16
