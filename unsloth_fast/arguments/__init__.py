"""How are the arguments of a trainer resolved? Those of every release are checked and resolved once.

Nothing that is given is changed: the trainer receives copies.
"""

import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

from transformers import PreTrainedConfig, TrainingArguments
from trl import SFTConfig, SFTTrainer

from unsloth_fast import backends
from unsloth_fast.arguments.load_balancing import prepare_load_balancing
from unsloth_fast.arguments.sft_config import rename_arguments
from unsloth_fast.arguments.types import check_model, check_types
from unsloth_fast.backends import Backend
from unsloth_fast.config import UnslothTrainingArguments
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
from unsloth_ref import checks

logger = logging.getLogger(__name__)


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


def check_device(args: TrainingArguments) -> None:
    """Refuse what the run's device cannot do.

    Raises:
        ValueError: activation_offloading on a CPU, where there is no device memory to free.
    """
    if getattr(args, "activation_offloading", False) and args.device.type == "cpu":
        raise ValueError("activation_offloading: got True on a CPU; allowed: False, as there is no GPU to relieve")


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
