"""Fields of the arguments as keywords of the trainer: checked and completed as in the arguments themselves."""

import math
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainingArguments
from trl import SFTConfig

from tests import tiny
from tests.trainer.runs import arguments
from unsloth_fast import UnslothTrainingArguments
from unsloth_fast.arguments.sft_config import rename_arguments

PARAMETERS = ("train_dataset", "processing_class")

KINDS = pytest.mark.parametrize(
    "kind",
    [UnslothTrainingArguments, SFTConfig, TrainingArguments, None],
    ids=lambda kind: getattr(kind, "__name__", kind),
)


def renamed(folder: Path, kind: type | None, **keywords: Any) -> Any:
    """The arguments of a trainer that was called with fields as keywords."""
    args = kind and arguments(folder, kind)
    keywords = keywords if kind else {"use_cpu": True, "bf16": False} | keywords
    return rename_arguments(tiny.model(), args, keywords, PARAMETERS)[0]


@KINDS
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("max_length", -1, "max_length: got -1; allowed: an integer from 1, or None"),
        ("max_seq_length", 0, "max_length: got 0; allowed: an integer from 1, or None"),
        ("learning_rate", math.nan, "learning_rate: got nan; allowed: a finite number from 0"),
        ("per_device_train_batch_size", 0, "per_device_train_batch_size: got 0; allowed: an integer from 1"),
        ("neftune_noise_alpha", -5, "neftune_noise_alpha: got -5; allowed"),
        ("embedding_learning_rate", -1, "embedding_learning_rate: got -1; allowed"),
        ("backend", "quick", "backend: got 'quick'; allowed"),
        ("eval_strategy", "sometimes", "sometimes is not a valid IntervalStrategy"),
    ],
)
def test_fields_as_keywords_are_checked(tmp_path: Path, kind: type | None, name: str, value: Any, message: str) -> None:
    """They are checked like those of the arguments, whichever arguments stand beside them."""
    with pytest.raises(ValueError, match=message):
        renamed(tmp_path, kind, **{name: value})


@KINDS
def test_fields_as_keywords_have_their_consequences(tmp_path: Path, kind: type | None) -> None:
    """Fields that the arguments derive from them follow, and so does a field's second name."""
    args = renamed(
        tmp_path, kind, evaluation_strategy="steps", logging_steps=7, gradient_checkpointing=True, backend="fast"
    )
    assert (args.eval_strategy, args.eval_steps, args.do_eval) == ("steps", 7, True)
    assert args.gradient_checkpointing is True and args.backend == "fast"
    assert getattr(args, "activation_checkpointing", True) is True
    assert renamed(tmp_path, kind, gradient_checkpointing=False).gradient_checkpointing is False
    half = renamed(tmp_path, kind, bf16=True)
    assert half.bf16 and not half.fp16
    again = rename_arguments(tiny.model(), half, {"bf16": False}, PARAMETERS)[0]
    assert not again.bf16 and not again.fp16


def test_what_is_no_field_of_the_arguments_is_kept(tmp_path: Path) -> None:
    args = arguments(tmp_path, SFTConfig)
    args.of_the_user = object()
    assert rename_arguments(tiny.model(), args, {"max_length": 9}, PARAMETERS)[0].of_the_user is args.of_the_user


def test_keywords_alone_choose_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They do without `args`; transformers refuses the default, bfloat16, on a machine without a GPU."""
    monkeypatch.chdir(tmp_path)
    args = rename_arguments(tiny.model(), None, {"use_cpu": True, "bf16": False, "warmup_ratio": 0.5}, PARAMETERS)[0]
    assert (args.use_cpu, args.bf16, args.warmup_steps, args.output_dir) == (True, False, 0.5, "-SFT")
