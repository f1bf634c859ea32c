"""How are the arguments of a trainer resolved? Those of every release are checked and resolved once.

Nothing that is given is changed: the trainer receives copies.
"""

import copy
import inspect
import logging
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from types import MappingProxyType
from typing import Any, TypeVar

from transformers import PreTrainedConfig, TrainingArguments
from transformers.trainer_pt_utils import AcceleratorConfig
from trl import SFTConfig, SFTTrainer

from unsloth_fast import backends
from unsloth_fast.arguments.load_balancing import prepare_load_balancing
from unsloth_fast.arguments.types import check_model, check_types
from unsloth_fast.backends import Backend
from unsloth_fast.config import CHECKPOINTING, UnslothTrainingArguments, check_fields, take_float16
from unsloth_fast.data.batching import BatchingPlan
from unsloth_fast.data.choice import names_text_field
from unsloth_fast.data.columns import (
    check_columns,
    completion_only,
    has_stream,
    prepared_rows,
    with_messages,
    with_rows,
    without_empty_media,
)
from unsloth_fast.data.facts import config_and_class, decide_batching, takes_images, vocabulary_size
from unsloth_fast.data.preparation import Preparation, TrlPreparation
from unsloth_fast.data.text import check_processing_classes
from unsloth_fast.keywords import split_keywords
from unsloth_fast.models.checkpointing import is_usual
from unsloth_ref import checks

logger = logging.getLogger(__name__)
Arguments = TypeVar("Arguments", bound=TrainingArguments)


@dataclass(frozen=True)
class ResolvedArguments:
    """The arguments of a run as they are used.

    Attributes:
        args: the arguments, as TRL's trainer receives them: a copy.
        keywords: TRL's further keywords, in the installed release's names.
        config: the model's configuration, as it was loaded.
        backend: the backend that runs.
        batching: whether the run packs, whether its batches are padding-free, and what was refused, with reasons.
        vocabulary: how many tokens the model has; None if data may hold others.
        completion_only: whether only completions are trained on.
        names_text_field: whether the user named dataset_text_field.
    """

    args: SFTConfig
    keywords: dict[str, Any]
    config: PreTrainedConfig
    backend: Backend
    batching: BatchingPlan
    vocabulary: int | None
    completion_only: bool
    names_text_field: bool

    @property
    def own_collator(self) -> bool:
        """Whether the user gave a data collator, which then makes the batches itself."""
        return self.keywords.get("data_collator") is not None

    def preparation(self) -> Callable[[TrlPreparation], Preparation]:
        """Makes the run's preparation from TRL's. It holds no data set, unlike `keywords`."""
        return partial(
            Preparation,
            training=self.backend.training,
            vocabulary=self.vocabulary,
            completion_only=self.completion_only,
            names_text_field=self.names_text_field,
        )


def resolve_arguments(
    model: Any,
    args: TrainingArguments | None,
    positional: tuple[Any, ...],
    keywords: Mapping[str, Any],
    *,
    kind: type | None = None,
    as_trl: bool = False,
) -> ResolvedArguments:
    """Resolve the arguments that a trainer is called with.

    Args:
        model: the model, or the name or path of one.
        args: as the user gave them.
        positional: what followed `args`.
        keywords: the further keywords, in names of any release of TRL.
        kind: the trainer's class, which may be derived from `UnslothTrainer`; None for that itself.
        as_trl: whether the call was one of `trl.SFTTrainer`.

    Raises:
        TypeError: an unknown keyword, too many arguments, one given twice, one of a type that no run can use, or no
            data set.
        ValueError: a value that is not allowed, or a data set that cannot be trained on.
        RuntimeError: the fast backend was asked for by name and cannot run here.
    """
    _, _, *parameters = (name for name in inspect.signature(SFTTrainer.__init__).parameters if name != "self")
    check_model(model)
    given = _by_name(parameters, positional, keywords)
    settings, given, updates = rename_arguments(model, args, given, parameters)
    check_types(model, given)
    settings.max_length = _max_length(settings, model, asked="max_length" in updates)
    spec = getattr(settings, "backend", None) or getattr(model, "unsloth_backend", None)
    backend = backends.resolve(spec, on_cpu=settings.device.type == "cpu")
    check_device(settings)
    config, model_class = config_and_class(model, settings)
    prepare_load_balancing(config, model_class, settings)
    vocabulary = vocabulary_size(model, settings, given)
    named = names_text_field(args, updates)
    given = without_empty_media(with_rows(given, settings))
    images = takes_images(model, settings, given)
    check_columns(given, settings, vocabulary, named=named, images=images)
    check_processing_classes(given, settings, named=named)
    given = with_messages(prepared_rows(given, settings), settings, named=named, images=images)
    plan = decide_batching(model, settings, given, kind=kind)
    _log_batching(plan, asked=bool(settings.packing or settings.padding_free))
    # TRL refuses padding-free batches with a max_length, as it would not cut documents then. So documents are prepared
    # as for padding, which cuts them, and the collator concatenates them. A script for TRL gets TRL's answer.
    settings.packing, settings.padding_free = plan.packing, as_trl and not updates and _asks_trl(settings, model)
    if settings.eval_packing and not plan.padding_free:
        logger.warning("eval_packing: off, as batches are padded")
        settings.eval_packing = False
    _configure_loading(settings, own_rows=plan.padding_free or has_stream(given))
    only_completions = completion_only(given, settings, named=named)
    return ResolvedArguments(settings, given, config, backend, plan, vocabulary, only_completions, named)


def _by_name(parameters: Sequence[str], positional: Sequence[Any], keywords: Mapping[str, Any]) -> dict[str, Any]:
    """All arguments after `args` as keywords; raise TypeError as Python does for one too many or given twice."""
    if len(positional) > len(parameters):
        raise TypeError(
            f"positional arguments: got {len(positional) + 2}; allowed: up to {len(parameters) + 2}, model and args "
            "included"
        )
    given = dict(zip(parameters, positional, strict=False))
    if twice := given.keys() & keywords.keys():
        raise TypeError(f"{', '.join(sorted(twice))}: got a value by position and one by keyword; allowed: one of them")
    return given | dict(keywords)


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


def check_device(args: TrainingArguments) -> None:
    """Refuse what the run's device cannot do.

    Raises:
        ValueError: activation_offloading on a CPU, where there is no device memory to free.
    """
    if getattr(args, "activation_offloading", False) and args.device.type == "cpu":
        raise ValueError("activation_offloading: got True on a CPU; allowed: False, as there is no GPU to relieve")


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


def _max_length(args: SFTConfig, model: Any, asked: bool) -> int | None:
    """The run's max_length, which is at most the `max_seq_length` that the model was loaded with.

    Where max_length is TRL's default and was not asked for, it becomes the model's max_seq_length. A model that was
    loaded without one has the number of its positions, which says nothing about the texts of this run.

    Raises:
        ValueError: a max_length below 1.
    """
    if args.max_length is not None:
        checks.in_range("max_length", args.max_length, 1)
    length = getattr(model, "max_seq_length", None)
    asked_of_model = getattr(model, "unsloth_length_asked", False)
    limit = None if length is None else getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if length is None or (length == limit and not asked_of_model):
        return args.max_length
    default = next(entry.default for entry in fields(args) if entry.name == "max_length")
    keeps = args.max_length is not None and args.max_length <= length and (asked or args.max_length != default)
    if keeps or args.max_length == length:
        return args.max_length
    logger.warning("max_length: %d, the max_seq_length of the model, replaces %s", length, args.max_length)
    return length


def _asks_trl(args: SFTConfig, model: Any) -> bool:
    """Whether a `trl.SFTConfig` asks for padding-free batches without packing, and the model brings no max_length."""
    ours = isinstance(args, UnslothTrainingArguments) or getattr(model, "max_seq_length", None) is not None
    return bool(args.padding_free) and not args.packing and not ours


def _log_batching(plan: BatchingPlan, asked: bool) -> None:
    logger.log(
        logging.WARNING if asked and plan.reasons else logging.INFO,
        "batching: packing %s, padding-free %s%s",
        *("on" if on else "off" for on in (plan.packing, plan.padding_free)),
        f", because {'; '.join(plan.reasons)}" if plan.reasons else "",
    )


def _configure_loading(settings: SFTConfig, *, own_rows: bool) -> None:
    """Let accelerate copy pinned batches without waiting for the device.

    With own_rows each process reads its own rows. By default one process reads a stream for all of them and splits
    every tensor along its first dimension. That dimension is 1 for a padding-free row, and rows that are padded to
    different lengths cannot be concatenated.
    """
    accelerator_config: Any = settings.accelerator_config
    accelerator_config.non_blocking |= settings.dataloader_pin_memory
    if own_rows and accelerator_config.dispatch_batches:
        logger.warning("dispatch_batches=True has no effect: each process reads its own rows")
    if own_rows:
        accelerator_config.dispatch_batches = False
