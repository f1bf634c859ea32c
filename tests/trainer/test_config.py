"""The trainer's arguments: a dataclass that survives round trips and checks its fields."""

import copy
import dataclasses
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import HfArgumentParser, TrainingArguments
from trl import SFTConfig, TrlParser

from tests.trainer.runs import arguments, build
from unsloth_fast import UnslothTrainer, UnslothTrainingArguments


def test_arguments_survive_every_round_trip(tmp_path: Path) -> None:
    """to_dict, JSON, `dataclasses.replace` and both parsers keep them; output_dir is the first argument."""
    plain = {"output_dir": str(tmp_path), "use_cpu": True, "bf16": False}
    assert UnslothTrainingArguments(str(tmp_path), use_cpu=True, bf16=False).output_dir == str(tmp_path)
    args = arguments(tmp_path, embedding_learning_rate=5e-5, backend="fast,rms_norm=reference")
    ours = {"embedding_learning_rate": 5e-5, "backend": "fast,rms_norm=reference"}
    assert ours.items() <= args.to_dict().items()
    assert ours.items() <= json.loads(args.to_json_string()).items()
    replaced = dataclasses.replace(args, learning_rate=0.5)
    assert (replaced.embedding_learning_rate, replaced.backend, replaced.learning_rate) == (*ours.values(), 0.5)
    line = ["--output_dir", str(tmp_path), "--use_cpu", "--bf16", "false", "--embedding_learning_rate", "5e-5"]
    for parser in (HfArgumentParser(UnslothTrainingArguments), TrlParser(UnslothTrainingArguments)):
        (parsed,) = parser.parse_args_into_dataclasses([*line, "--backend", ours["backend"]])
        assert (parsed.embedding_learning_rate, parsed.backend) == tuple(ours.values())
        (parsed,) = parser.parse_args_into_dataclasses(line)
        assert parsed.backend is None and parsed.gradient_checkpointing is None
        for value in (["True"], ["False"], []):
            (parsed,) = parser.parse_args_into_dataclasses(
                [*line, "--gradient_checkpointing", *value, "--padding_free"]
            )
            assert parsed.gradient_checkpointing is (value != ["False"]) and parsed.padding_free is True
    assert UnslothTrainingArguments(**UnslothTrainingArguments(**plain).to_dict()).gradient_checkpointing is None


@pytest.mark.parametrize("rate", [-1e-9, math.nan, math.inf, "5e-5"])
def test_a_wrong_embedding_rate_is_refused(tmp_path: Path, rate: Any) -> None:
    """A rate is finite and not negative; 0 is allowed."""
    with pytest.raises(ValueError, match=r"^embedding_learning_rate: got"):
        arguments(tmp_path, embedding_learning_rate=rate)
    assert arguments(tmp_path, embedding_learning_rate=0).embedding_learning_rate == 0


def test_an_unknown_backend_is_refused(tmp_path: Path) -> None:
    """It is refused before a model is loaded."""
    with pytest.raises(ValueError, match=r"^backend: got 'quick'; allowed"):
        arguments(tmp_path, backend="quick")


@pytest.mark.parametrize(
    ("name", "least"),
    [
        ("per_device_train_batch_size", 1),
        ("per_device_eval_batch_size", 1),
        ("gradient_accumulation_steps", 1),
        ("dataloader_num_workers", 0),
        ("dataloader_prefetch_factor", 1),
        ("pad_to_multiple_of", 1),
        ("max_length", 1),
        ("dataset_num_proc", 1),
        ("seed", 0),
    ],
)
def test_a_wrong_count_is_refused(tmp_path: Path, name: str, least: int) -> None:
    """It is refused before transformers divides by it, or torch starts so many processes."""
    workers = {"dataloader_num_workers": 1} if name == "dataloader_prefetch_factor" else {}
    for value in (least - 1, least + 0.5):
        with pytest.raises(ValueError, match=f"^{name}: got {value}; allowed: an integer from {least}"):
            arguments(tmp_path, **workers | {name: value})


@pytest.mark.parametrize(
    ("name", "wrong", "right"),
    [
        *((name, [-1.0, math.nan, math.inf, "1e-3"], 0.0) for name in ("learning_rate", "weight_decay")),
        ("adam_epsilon", [-1e-8, math.nan], 0.0),
        ("max_grad_norm", [-1.0, math.nan], 0.0),
        ("num_train_epochs", [-1.0, math.inf], 0.5),
        ("neftune_noise_alpha", [-5.0], 5.0),
        *((name, [-0.1, 1.0, 2, math.nan], 0.99) for name in ("adam_beta1", "adam_beta2")),
        ("label_smoothing_factor", [-0.1, 1.5, math.nan], 1.0),
    ],
)
def test_a_number_out_of_range_is_refused(tmp_path: Path, name: str, wrong: list[Any], right: float) -> None:
    """It is refused before an optimizer or a loss uses it."""
    for value in wrong:
        with pytest.raises(ValueError, match=f"^{name}: got {value!r}; allowed: a"):
            arguments(tmp_path, **{name: value})
    assert getattr(arguments(tmp_path, **{name: right}), name) == right


def test_older_names_are_accepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scripts of several years pass them; a name that never existed is an error."""
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    args = UnslothTrainingArguments(
        output_dir=str(tmp_path),
        max_seq_length=17,
        warmup_ratio=0.1,
        evaluation_strategy="steps",
        eval_steps=5,
        group_by_length=True,
        logging_dir="logs",
        no_cuda=True,
        fp16=False,
        bf16=False,
        per_gpu_train_batch_size=3,
        overwrite_output_dir=True,
    )
    assert (args.max_length, args.warmup_steps, args.eval_strategy, args.eval_steps) == (17, 0.1, "steps", 5)
    assert (args.use_cpu, args.per_device_train_batch_size) == (True, 3)
    assert args.train_sampling_strategy == "group_by_length"
    assert os.environ.pop("TENSORBOARD_LOGGING_DIR") == "logs"
    with pytest.raises(TypeError, match="max_sequence_length"):
        arguments(tmp_path, max_sequence_length=17)
    with pytest.raises(ValueError, match=r"^max_seq_length: got 17, and max_length=18; allowed: one of the two"):
        arguments(tmp_path, max_seq_length=17, max_length=18)


@pytest.mark.parametrize(("share", "steps"), [(0.0, 0), (0.1, 4), (1.0, 40)])
def test_a_warmup_ratio_is_a_share_of_all_steps(tmp_path: Path, share: float, steps: int) -> None:
    assert arguments(tmp_path, warmup_ratio=share).get_warmup_steps(40) == steps


@pytest.mark.parametrize("kind", [UnslothTrainingArguments, SFTConfig, TrainingArguments])
def test_arguments_serve_several_trainers(tmp_path: Path, kind: type) -> None:
    """transformers writes the number of steps into accelerate's options, and refuses options that have it already."""
    nested = {"gradient_accumulation_kwargs": {"sync_each_batch": True}}
    options = {"gradient_accumulation_steps": 2, "accelerator_config": nested}
    options |= {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"preserve_rng_state": True}}
    args = arguments(tmp_path, kind, **options)
    before = copy.deepcopy(args.to_dict())
    for _ in range(2):
        build(UnslothTrainer, args, dtype=torch.float32, lora=True)
    assert args.to_dict() == before
    assert nested == {"gradient_accumulation_kwargs": {"sync_each_batch": True}}
