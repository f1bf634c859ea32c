"""The arguments of any release, those among the trainer's keywords too, as one configuration of TRL's: a copy."""

import copy
import os
from collections.abc import Collection, Mapping
from dataclasses import fields, replace
from types import MappingProxyType
from typing import Any, TypeVar

from transformers import TrainingArguments
from transformers.trainer_pt_utils import AcceleratorConfig
from trl import SFTConfig

from unsloth_fast.config import CHECKPOINTING, UnslothTrainingArguments, check_fields, take_float16
from unsloth_fast.keywords import split_keywords
from unsloth_fast.models.checkpointing import is_usual

Arguments = TypeVar("Arguments", bound=TrainingArguments)


def rename_arguments(
    model: Any, args: TrainingArguments | None, keywords: Mapping[str, Any], parameters: Collection[str]
) -> tuple[SFTConfig, dict[str, Any], dict[str, Any]]:
    """Arguments of any release in the installed release's names, gradient checkpointing resolved.

    Args:
        model: the model, or the name or path of one.
        args: as the user gave them.
        keywords: what the trainer was called with.
        parameters: the names that TRL's trainer takes.

    Returns:
        The arguments, a copy; the trainer's keywords; and the fields of the arguments that were among the keywords.

    Raises:
        TypeError: a name that neither the trainer nor the arguments ever had, or args of another type.
        ValueError: two names of one thing, with different values.
    """
    kind = type(args) if isinstance(args, SFTConfig) else UnslothTrainingArguments
    known = {entry.name for entry in (*fields(kind), *fields(UnslothTrainingArguments)) if entry.init}
    kept, updates = split_keywords(parameters, known, keywords)
    settings = as_sft_config(args, model, updates)
    checkpointing = _checkpointing(settings, args, model, updates)
    for name in CHECKPOINTING:
        if hasattr(settings, name):
            setattr(settings, name, checkpointing)
    return settings, kept, updates


def as_sft_config(
    args: TrainingArguments | None, model: Any, updates: Mapping[str, Any] = MappingProxyType({})
) -> SFTConfig:
    """The user's arguments as a configuration of TRL's.

    Args:
        args: what the user gave: a `trl.SFTConfig`, which is copied; a `transformers.TrainingArguments`, whose values
            are copied; None for the defaults.
        model: the model, or the name or path of one, after which the output folder is named where args is None.
        updates: fields that have other values, checked as in args.

    Raises:
        TypeError: args has another type.
        ValueError: a field is out of its range.
    """
    changed = _with_implied(updates)
    if args is None:
        name = model if isinstance(model, str) else getattr(model.config, "_name_or_path", "")
        output_dir = f"{name.rstrip('/').split('/')[-1]}-SFT"  # TRL's own default
        values: dict[str, Any] = {"output_dir": output_dir, **changed}
        return UnslothTrainingArguments(**values)
    if isinstance(args, SFTConfig):
        return _updated(_on_this_card(_copied(args)), changed)
    if not isinstance(args, TrainingArguments):
        raise TypeError(
            f"args: got {type(args).__name__}; allowed: UnslothTrainingArguments, trl.SFTConfig or "
            "transformers.TrainingArguments"
        )
    values = _copied(args).to_dict() | {"hub_token": args.hub_token} | changed  # to_dict hides the token
    return UnslothTrainingArguments(**values)


def _copied(args: Arguments) -> Arguments:
    """A copy with containers of its own: transformers and TRL write into those of `*_kwargs` and `*_config`."""
    copied = copy.copy(args)
    for name, value in vars(args).items():
        if isinstance(value, dict | list | AcceleratorConfig):
            setattr(copied, name, copy.deepcopy(value))
    return copied


def _with_implied(updates: Mapping[str, Any]) -> dict[str, Any]:
    """The updates, and those that follow from them: of a field's second name, and of the other precision."""
    implied = dict(updates)
    known = {entry.name for entry in fields(UnslothTrainingArguments)}
    for name, value in updates.items():
        start, _, rest = name.partition("_checkpointing")
        other = {"gradient": "activation", "activation": "gradient"}.get(start, "")
        if f"{other}_checkpointing{rest}" in known:
            implied.setdefault(f"{other}_checkpointing{rest}", value)
    for name, other in (("fp16", "bf16"), ("bf16", "fp16")):
        if updates.get(name):
            implied.setdefault(other, False)
    return implied


def _updated(args: SFTConfig, updates: dict[str, Any]) -> SFTConfig:
    """The arguments with other values, made and checked as new ones are; what is no field of theirs is kept."""
    if not updates:
        return args
    own = {entry.name for entry in fields(args) if entry.init}
    made = replace(args, **{name: value for name, value in updates.items() if name in own})
    others = {name: value for name, value in vars(args).items() if name not in vars(made)}
    for name, value in (others | {name: value for name, value in updates.items() if name not in own}).items():
        setattr(made, name, value)
    check_fields(made, updates)
    return made


def _on_this_card(args: SFTConfig) -> SFTConfig:
    """The arguments; with fp16 where TRL's own have bf16=True, which is their default, and the GPU does not support it.

    `UnslothTrainingArguments` chose when they were made, and keep a bf16=True that was asked for.
    """
    if args.bf16 and not isinstance(args, UnslothTrainingArguments) and args.device.type == "cuda":
        take_float16(args)
        if args.fp16 and hasattr(args, "mixed_precision"):
            args.mixed_precision = "fp16"
        elif args.fp16:
            # Older releases have no such field. Their arguments write "bf16" into this variable when they are made, and
            # accelerate reads it when the trainer is built: fp16=True alone would not be seen.
            os.environ["ACCELERATE_MIXED_PRECISION"] = "fp16"
    return args


def _checkpointing(
    settings: SFTConfig, args: TrainingArguments | None, model: Any, updates: Mapping[str, Any]
) -> bool | None:
    """Whether to checkpoint: as the trainer's keywords say, else the arguments, else the model, else TRL's default.

    A `trl.SFTConfig` with True and a `transformers.TrainingArguments` with False leave it open: those are defaults.
    """
    default = None if args is None or isinstance(args, UnslothTrainingArguments) else isinstance(args, SFTConfig)
    said = next((updates[name] for name in reversed(CHECKPOINTING) if name in updates), None)
    if said is None and settings.gradient_checkpointing is not default:
        said = settings.gradient_checkpointing
    if said is not None:
        return said
    asked = getattr(model, "unsloth_gradient_checkpointing", None)
    return default is not False and is_usual(model) if asked is None else bool(asked)
