"""The trainer's arguments: a dataclass over `trl.SFTConfig`, every field checked."""

import logging
import math
from collections.abc import Container
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

import torch
from transformers.utils import is_torch_bf16_gpu_available, is_torch_xla_available
from trl import SFTConfig

from unsloth_fast import backends
from unsloth_fast.keywords import accept_older_names

logger = logging.getLogger(__name__)

_COUNTS = {  # name and least value
    "max_length": 1,
    "dataset_num_proc": 1,
    "seed": 0,
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "dataloader_num_workers": 0,
    "dataloader_prefetch_factor": 1,
    "pad_to_multiple_of": 1,
    "verify_every": 1,
}
_RATES = (
    *("learning_rate", "embedding_learning_rate", "weight_decay", "adam_epsilon", "neftune_noise_alpha"),
    *("max_grad_norm", "num_train_epochs", "warmup_steps"),
)
_SHARES = {  # name: greatest value, and the range in words
    "adam_beta1": (math.nextafter(1.0, 0.0), "a number from 0 to less than 1"),
    "adam_beta2": (math.nextafter(1.0, 0.0), "a number from 0 to less than 1"),
    "label_smoothing_factor": (1.0, "a number from 0 to 1"),
}
_OPTIONAL = (
    *("dataloader_prefetch_factor", "pad_to_multiple_of", "embedding_learning_rate", "neftune_noise_alpha"),
    *("max_length", "dataset_num_proc", "verify_every"),
)
DEFAULT_TEXT = "text"  # TRL's dataset_text_field
# Both of transformers' names for it; the second exists since 5.2x.
CHECKPOINTING = ("gradient_checkpointing", "activation_checkpointing")


@dataclass
class UnslothTrainingArguments(SFTConfig):
    """`trl.SFTConfig` with an embedding learning rate, a backend and its verification, and padding-free by default.

    Args:
        gradient_checkpointing: whether the backward pass recomputes activations instead of keeping them. None for the
            `use_gradient_checkpointing` that the model was loaded with, or else True, TRL's default, if the model
            supports it. transformers' other name for it, activation_checkpointing, works as well.
        padding_free: whether the documents of a batch are concatenated in one row instead of padded to the longest.
            None for True where the model and the data allow it.
        dataset_text_field: the column of the texts; None for "text", TRL's default. A field that is given is trained
            on where the data set has it, also beside a prompt and a completion.
        embedding_learning_rate: learning rate of all parameters that train the token embedding or the output head; None
            for `learning_rate`.
        backend: "auto", "fast" or "reference", optionally with exceptions for single operations:
            "fast,rms_norm=reference". None for the environment variable UNSLOTH_BACKEND, or "auto" if that is not set.
        verify_every: compare the fast operations of every so many optimizer steps with the reference: each call of such
            a step, forward and backward, on its own inputs. The log gets each operation's budget use, and a warning
            where it is above 1. The training's numbers do not change. None for never.
        cuda_graphs: whether the layers of small packed batches are recorded as CUDA graphs and replayed, so that the
            device does not wait for the host. None for True where nothing forbids it; with a load-balancing loss of
            experts, only under adapters. The log says what does, for True as a warning.

    Names of older releases are accepted: max_seq_length, warmup_ratio, evaluation_strategy and others.

    Without bf16 and fp16 it is bf16=True, TRL's default, or on a GPU without bfloat16 fp16=True, which is logged.

    Raises:
        ValueError: a field is out of its range, where transformers does not check it; backend names an unknown backend
            or operation; bfloat16 on no GPU that has it, without use_cpu; or what `trl.SFTConfig` raises.
        RuntimeError: bfloat16 likewise, with a backend that cannot run on a CPU either.
    """

    # Not `bool | None`, for which a parser would want a value after the option.
    gradient_checkpointing: bool = field(  # type: ignore[assignment]
        default=None,
        metadata={
            "help": "Whether the backward pass recomputes activations instead of keeping them. `None` for what the "
            "model was loaded with, or else `True`."
        },
    )
    padding_free: bool = field(  # type: ignore[assignment]
        default=None,
        metadata={
            "help": "Whether the documents of a batch are concatenated in one row instead of padded to the longest. "
            "`None` for `True` where the model and the data allow it."
        },
    )
    dataset_text_field: str | None = field(  # type: ignore[assignment]  # TRL's is a string
        default=None, metadata={"help": "Name of the column that contains the texts. `None` for 'text'."}
    )
    embedding_learning_rate: float | None = field(
        default=None,
        metadata={
            "help": "Learning rate of all parameters of the token embedding and the output head: of the modules "
            "themselves, `modules_to_save`, LoRA on them, trainable tokens. `None` for `learning_rate`."
        },
    )
    backend: str | None = field(
        default=None,
        metadata={
            "help": "Implementation of the operations: 'auto', 'fast' or 'reference', optionally with exceptions for "
            "single operations: 'fast,rms_norm=reference'. `None` for the environment variable UNSLOTH_BACKEND, or "
            "'auto'."
        },
    )
    verify_every: int | None = field(
        default=None,
        metadata={
            "help": "Compare the fast operations of every so many optimizer steps with the reference, and log their "
            "budget use. `None` for never."
        },
    )
    cuda_graphs: bool = field(  # type: ignore[assignment]
        default=None,
        metadata={
            "help": "Whether the layers of small packed batches are recorded as CUDA graphs and replayed. `None` for "
            "`True` where nothing forbids it; with a load-balancing loss of experts, only under adapters."
        },
    )

    def __post_init__(self) -> None:
        """Check the fields, TRL's and ours."""
        if self.bf16 is None and not self.fp16 and not self.use_cpu and torch.cuda.is_available():
            take_float16(self)
        _check_bfloat16(self)
        self.names_text_field = self.dataset_text_field is not None  # not a field: see data/choice.py
        self.dataset_text_field = self.dataset_text_field or DEFAULT_TEXT
        unset = all(getattr(self, name, None) is None for name in CHECKPOINTING)
        super().__post_init__()
        if unset:  # transformers sets it to False
            for name in CHECKPOINTING:
                if hasattr(self, name):
                    setattr(self, name, None)
        check_fields(self)


UnslothTrainingArguments.__init__ = accept_older_names(UnslothTrainingArguments.__init__)


def check_fields(args: SFTConfig, names: Container[str] | None = None) -> None:
    """Refuse values that no run can use, where transformers does not check them.

    Args:
        args: the arguments.
        names: the fields to check; None for all.

    Raises:
        ValueError: a field is out of its range, or the backend is unknown.
    """
    for name in (*_COUNTS, *_RATES, *_SHARES):
        if not hasattr(args, name) or (names is not None and name not in names):
            continue
        value = getattr(args, name)
        if name in _COUNTS:
            fits = isinstance(value, int) and not isinstance(value, bool) and value >= _COUNTS[name]
            _check(name, value, fits, f"an integer from {_COUNTS[name]}")
        elif name in _RATES:
            _check(name, value, _is_rate(value), "a finite number from 0")
        else:
            most, words = _SHARES[name]
            _check(name, value, _is_rate(value) and value <= most, words)
    graphs = getattr(args, "cuda_graphs", None)
    _check("cuda_graphs", graphs, graphs in (True, False, None), "True, False, or None")
    backend = getattr(args, "backend", None)
    if backend is not None:
        backends.parse(backend)


def _check_bfloat16(args: UnslothTrainingArguments) -> None:
    """Refuse bfloat16, TRL's default, where no device has it. transformers' message names no field.

    Raises:
        RuntimeError, ValueError: as `UnslothTrainingArguments`.
    """
    wanted = args.bf16_full_eval or (not args.fp16 if args.bf16 is None else args.bf16)
    if not wanted or args.use_cpu or is_torch_bf16_gpu_available() or is_torch_xla_available():
        return
    backends.resolve(args.backend)
    raise ValueError(
        "bf16: got True (TRL's default), and torch finds no GPU with bfloat16; allowed: use_cpu=True with bf16=False "
        "on a CPU, fp16=True on a GPU"
    )


def take_float16(args: SFTConfig) -> None:
    """Let a run on a GPU without bfloat16 use fp16 in place of bf16, TRL's default, and log it."""
    if not torch.cuda.is_bf16_supported(including_emulation=False):
        args.bf16, args.fp16 = False, True
        logger.warning("precision: fp16=True in place of bf16=True, TRL's default, which this GPU does not support")


def _check(name: str, value: object, fits: bool, allowed: str) -> None:
    """Raise for a field that does not fit; None fits if it is optional."""
    optional = name in _OPTIONAL
    if not (fits or (optional and value is None)):
        raise ValueError(f"{name}: got {value!r}; allowed: {allowed}{', or None' if optional else ''}")


def _is_rate(value: Any) -> bool:
    return isinstance(value, Real) and 0 <= float(value) < math.inf
