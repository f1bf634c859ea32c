"""Names of older releases of transformers and TRL: which keywords they are today, and which belong to the config."""

import functools
import logging
import math
import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import fields
from typing import Any, TypeVar

Value = TypeVar("Value")

logger = logging.getLogger(__name__)

# Names of older releases, and their names today.
RENAMED = {
    "tokenizer": "processing_class",
    "max_seq_length": "max_length",
    "evaluation_strategy": "eval_strategy",
    "no_cuda": "use_cpu",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
    "push_to_hub_model_id": "hub_model_id",
    "push_to_hub_token": "hub_token",
    "torchdynamo": "torch_compile_backend",
    "use_liger": "use_liger_kernel",
    "xpu_backend": "ddp_backend",
}

# Names that were removed and change no result, with the values that ask for nothing. Any other value is logged.
WITHOUT_EFFECT: dict[str, tuple[Any, ...]] = {
    "chars_per_token": (3.6,),
    "dataset_batch_size": (1000,),
    "fp16_backend": ("auto",),
    "fp16_opt_level": ("O1",),
    "half_precision_backend": ("auto",),
    "include_tokens_per_second": (False,),
    "infinite": (False,),
    "jit_mode_eval": (False,),
    "mp_parameters": ("",),
    "num_of_sequences": (1024,),
    "overwrite_output_dir": (False, True),
    "past_index": (-1,),
    "ray_scope": ("last",),
    "save_safetensors": (True,),
    "tpu_metrics_debug": (False,),
    "tpu_num_cores": (),
    "unsloth_num_chunks": (-1, 0),
    "use_ipex": (False,),
    "use_mps_device": (False, True),
    "vllm_sampling_params": (),
}


def _warmup(share: Any) -> dict[str, Any]:
    if not isinstance(share, int | float) or not 0 <= share <= 1:
        raise ValueError(f"warmup_ratio: got {share!r}; allowed: a number from 0 to 1")
    return {"warmup_steps": min(float(share), math.nextafter(1.0, 0.0))}  # 1 would be one step


def _logging_dir(folder: Any) -> dict[str, Any]:
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(folder)  # what replaces the field in transformers 5
    return {}


def _no_galore(config: Any) -> dict[str, Any]:
    raise ValueError(f"q_galore_config: got {config!r}; allowed: None, as Q-GaLore does not exist here")


# Names whose meaning moved to a field with other values.
CONVERTED: dict[str, Callable[[Any], dict[str, Any]]] = {
    "adafactor": lambda on: {"optim": "adafactor"} if on else {},
    "group_by_length": lambda on: {"train_sampling_strategy": "group_by_length"} if on else {},
    "include_inputs_for_metrics": lambda on: {"include_for_metrics": ["inputs"]} if on else {},
    "logging_dir": _logging_dir,
    "q_galore_config": _no_galore,
    "warmup_ratio": _warmup,
}


def current_names(known: Collection[str], given: Mapping[str, Any]) -> dict[str, Any]:
    """Keywords under the names of today. A name that is known, or was never one, is kept.

    Args:
        known: the names of the installed release.
        given: the keywords of a call. An older name with None asks for nothing and is left out.

    Raises:
        ValueError: two names of one field, with different values; or a value of an older name that has no counterpart.
    """
    current: dict[str, Any] = {}
    if given.get("warmup_ratio") is not None and "warmup_steps" in given:  # steps win, unless they are 0
        loser, winner = ("warmup_ratio", "warmup_steps") if given["warmup_steps"] else ("warmup_steps", "warmup_ratio")
        logger.warning("%s: got %r, which %s=%r overrides", loser, given[loser], winner, given[winner])
        given = {name: value for name, value in given.items() if name != loser}
    for name, value in given.items():
        for today, converted in _converted(known, name, value).items():
            if today in current and current[today] is not converted and current[today] != converted:
                old = name if name != today else next(old for old in given if RENAMED.get(old) == today)
                raise ValueError(f"{old}: got {given[old]!r}, and {today}={given[today]!r}; allowed: one of the two")
            current[today] = converted
    return current


def _converted(known: Collection[str], name: str, value: Any) -> dict[str, Any]:
    if name in known or name not in (*RENAMED, *CONVERTED, *WITHOUT_EFFECT):
        return {name: value}
    if value is None:
        return {}
    if name in RENAMED:
        return {RENAMED[name]: value}
    if name in CONVERTED:
        return CONVERTED[name](value)
    if value not in WITHOUT_EFFECT[name]:
        logger.warning("%s: got %r, which has no effect: the installed release has no such argument", name, value)
    return {}


def accept_older_names(init: Callable[..., None]) -> Callable[..., None]:
    """A constructor of a dataclass that accepts the names of older releases as well."""

    @functools.wraps(init)
    def __init__(self: Any, *positional: object, **keywords: object) -> None:
        init(self, *positional, **current_names([entry.name for entry in fields(self)], keywords))

    __init__.unsloth_fast = True  # type: ignore[attr-defined]  # recognised by compat
    return __init__


def split_keywords(
    trainer_parameters: Collection[str], config_fields: Collection[str], keywords: Mapping[str, Value]
) -> tuple[dict[str, Value], dict[str, Value]]:
    """Split keywords into those of the trainer and those of its config, renaming those of older releases.

    A name that the trainer or the config still has is kept: `tokenizer` becomes `processing_class`, and
    `max_seq_length` becomes `max_length`, only if the old name is unknown.

    Args:
        trainer_parameters: names of the trainer's parameters.
        config_fields: names of the config's fields.
        keywords: the keywords that the trainer was called with.

    Returns:
        The keywords of the trainer, and the fields of the config with their values. A keyword passed under both its
        names, with one value, appears once. Nothing is dropped but older names with values that ask for nothing.

    Raises:
        TypeError: a keyword that neither the trainer nor the config has.
        ValueError: a keyword passed under both its names, with different values.
    """
    known = {*trainer_parameters, *config_fields}
    for name in keywords:
        if RENAMED.get(name, name) not in known and name not in (*known, *CONVERTED, *WITHOUT_EFFECT):
            raise TypeError(
                f"{name}: got an unknown keyword; allowed: parameters of the trainer and fields of its config"
            )
    renamed: dict[str, Value] = current_names(known, keywords)
    trainer = {name: value for name, value in renamed.items() if name in trainer_parameters}
    return trainer, {name: value for name, value in renamed.items() if name not in trainer}
