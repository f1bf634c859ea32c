"""From a data set to batches: what a run's model and data allow, what cannot be trained on, and the collator."""

import copy
import inspect
import logging
import reprlib
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass, fields
from typing import Any

import torch
import transformers
from datasets import Dataset, IterableDataset
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig, ProcessorMixin
from trl import SFTConfig
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from unsloth_fast.config import UnslothTrainingArguments
from unsloth_fast.data.batching import BatchingPlan, ConfigFacts, ModelFacts, batching_plan
from unsloth_fast.packed_dataset import (
    check_as_read,
    check_stream,
    check_vocabulary,
    has_lists,
    labels_of,
    with_targets,
)
from unsloth_ref import checks
from unsloth_ref.types import PackedBatch

logger = logging.getLogger(__name__)

_VISION_COLUMNS = frozenset(
    (
        *("image", "images", "image_sizes", "image_grid_thw", "pixel_values", "pixel_values_videos", "video", "videos"),
        *("pixel_attention_mask", "video_grid_thw", "mm_token_type_ids", "audio", "audios"),
    )
)
_OTHER_INPUTS = ("vision_config", "audio_config", "img_processor", "image_token_index", "projector_config")
EXAMPLE_ENDS = "example_ends"  # the key, in a batch of an evaluation, of where each example ends in the row
_ATTENTION_LAYERS = frozenset(("full_attention", "sliding_attention", "chunked_attention"))


@dataclass
class PackedCollator(DataCollatorForLanguageModeling):
    """All documents of the examples in one row, by the backend's `collate`; TRL's class, which TRL looks for.

    Args:
        collate: the training piece of that name.
        vocab_size: tokens and labels must be below it.
        completion_only: whether a completion_mask counts, where the examples have no labels yet.
        say_ends: whether the batch says where each example ends, too; no model takes that.
    """

    collate: Callable[..., PackedBatch] | None = None
    vocab_size: int | None = None
    completion_only: bool = False
    say_ends: bool = False

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """The batch as the model's keyword arguments."""
        assert self.collate is not None
        batch = self.collate(
            [example | labels_of(example, self.completion_only) for example in examples],
            pad_to_multiple_of=self.pad_to_multiple_of,
            pad_token_id=self.pad_token_id,
            vocab_size=self.vocab_size,
        ).as_dict()
        if self.say_ends:
            batch[EXAMPLE_ENDS] = torch.tensor([len(example["input_ids"]) for example in examples]).cumsum(0)
        return batch


def without_repeated(labels: Tensor, ends: Tensor | None, new: int) -> Tensor:
    """The labels of a batch without targets in its last examples, which were in another batch before.

    Args:
        labels: [B, S].
        ends: [examples] int64: where each ends, if they are laid end to end in one row; None for a row an example.
        new: how many examples are in this batch alone; may be less than none, or more than all.
    """
    labels, new = labels.clone(), max(new, 0)
    if ends is None:
        labels[new:] = -100
    elif new < len(ends):
        labels[:, ends[new - 1] if new else 0 :] = -100
    return labels


def plan(model: Any, args: SFTConfig, given: Mapping[str, Any]) -> BatchingPlan:
    """Whether this run packs, whether its batches go without padding, and why not.

    A plain `trl.SFTConfig` cannot say nothing about padding_free; with packing its False counts as that.

    Args:
        model: the model, or the name or path of one.
        args: the run's arguments.
        given: the trainer's other keywords.
    """
    padding_free = args.padding_free
    if args.packing and not padding_free and not isinstance(args, UnslothTrainingArguments):
        padding_free = None
    processor = given.get("processing_class")
    facts = ConfigFacts(
        packing=args.packing,
        padding_free=padding_free,
        custom_collator=given.get("data_collator") is not None,
        processor=isinstance(processor, ProcessorMixin),
        processing_class=processor is not None,
        vision_columns=any(_VISION_COLUMNS & set(_columns(data)) for _, data in _datasets(given)),
    )
    config, kind = _config_and_class(model, args)
    made = batching_plan(_model_facts(config, kind), facts)
    others = _other_reasons(model, kind, given.get("peft_config"))
    return BatchingPlan(packing=False, padding_free=False, reasons=made.reasons + others) if others else made


def _config_and_class(model: Any, args: SFTConfig) -> tuple[PreTrainedConfig, type]:
    if not isinstance(model, str):
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        return inner.config, type(inner)
    options: Any = args.model_init_kwargs or {}
    revision = options.get("revision") or "main"
    trusted = getattr(args, "trust_remote_code", options.get("trust_remote_code", False))  # of TRL's since 1.6
    config = AutoConfig.from_pretrained(model, revision=revision, trust_remote_code=trusted)
    return config, getattr(transformers, (config.architectures or [""])[0], object)  # the class that TRL loads


def _model_facts(config: PreTrainedConfig, kind: type) -> ModelFacts:
    layers = getattr(config.get_text_config(), "layer_types", None) or ()
    return ModelFacts(
        model_type=config.model_type,
        encoder_decoder=bool(config.is_encoder_decoder),
        multimodal=any(hasattr(config, name) for name in _OTHER_INPUTS),
        recurrent=bool(getattr(kind, "_is_stateful", False)) or not _ATTENTION_LAYERS.issuperset(layers),
    )


def _other_reasons(model: Any, kind: type, peft_config: Any) -> tuple[str, ...]:
    """What `batching_plan` knows nothing of."""
    reasons = []
    adapter = peft_config or getattr(model, "active_peft_config", None)
    if getattr(adapter, "is_prompt_learning", False):
        reasons.append("prompt learning puts positions before each row that belong to no document")
    # transformers finds the documents of a row by its positions; without them each would see those before it.
    forward = getattr(kind, "forward", None)
    if forward is None or "position_ids" not in inspect.signature(forward).parameters:
        reasons.append(f"{kind.__name__} is not known to take position_ids, by which documents of a row are kept apart")
    return tuple(reasons)


def take_length(args: SFTConfig, model: Any, asked: bool) -> None:
    """Bring max_length in line with the `max_seq_length` that `FastLanguageModel` loaded the model with.

    A model that was loaded without one has that of its positions, which says nothing about the texts of this run.

    Args:
        args: changed in place: max_length becomes the model's where it is TRL's default, or more than the model's.
        model: the model, or the name or path of one.
        asked: whether max_length was said to the trainer itself, and so is not just TRL's default.

    Raises:
        ValueError: a max_length below 1.
    """
    if args.max_length is not None:
        checks.in_range("max_length", args.max_length, 1)
    length = getattr(model, "max_seq_length", None)
    if length is None or length == getattr(model.config.get_text_config(), "max_position_embeddings", None):
        return
    default = next(entry.default for entry in fields(args) if entry.name == "max_length")
    if args.max_length is None or args.max_length > length or (args.max_length == default and not asked):
        if args.max_length != length:
            logger.warning("max_length: %d, for which the model was loaded, not %s", length, args.max_length)
        args.max_length = length


def vocabulary(model: Any, args: SFTConfig, given: Mapping[str, Any]) -> int | None:
    """How many tokens the model has; None where data may hold others: for a collator, or tokens that TRL will add.

    Args:
        model: the model, or the name or path of one.
        args: the run's arguments.
        given: the trainer's other keywords.
    """
    template = args.chat_template_path  # of another model, whose tokens are added, or a file
    if given.get("data_collator") is not None or (template and not template.endswith((".jinja", ".j2"))):
        return None
    return getattr(_config_and_class(model, args)[0].get_text_config(), "vocab_size", None)


def check_columns(given: Mapping[str, Any], args: SFTConfig, vocabulary: int | None) -> None:
    """Raise before any work is done if a data set is empty or has nothing that can be trained on.

    Args:
        given: the trainer's keywords.
        args: the run's arguments.
        vocabulary: as in `check_vocabulary`; looked at here where nothing is prepared.

    Raises:
        ValueError: which data set, what was found, and what is allowed.
        TypeError: several data sets to train on.
    """
    if isinstance(train := given.get("train_dataset"), dict):
        names = ", ".join(map(repr, train))
        raise TypeError(
            f"train_dataset: got a {type(train).__name__} of {names}; allowed: one data set, such as one of them"
        )
    options: Any = args.dataset_kwargs or {}
    skip = options.get("skip_prepare_dataset", False)
    text = args.dataset_text_field
    layouts = (  # what is allowed in which columns, in the order in which TRL looks for them
        ("a list", "input_ids"),
        ("a string or a list", "prompt", "completion"),
        ("a list", "messages"),
        ("a list", "conversations"),
        ("a string", text),
    )
    for name, dataset in _datasets(given):
        first = next(iter(dataset), None)
        if first is None:
            raise ValueError(f"{name}: got no row; allowed: at least one (look at its path, split and filters)")
        if skip:
            check_vocabulary(dataset, name, vocabulary)
        if skip and has_lists(dataset, "labels"):
            with_targets(dataset, name)
        elif skip and isinstance(dataset, IterableDataset) and isinstance(first.get("labels"), Sized):
            check_stream(check_as_read(dataset, name, vocabulary), name)
        if skip or given.get("formatting_func") is not None or _VISION_COLUMNS & first.keys():
            continue
        allowed, *columns = next((layout for layout in layouts if first.keys() >= set(layout[1:])), ("",))
        if not columns:
            raise ValueError(
                f"{name}: got no column {text!r}, only {', '.join(map(repr, first))}; allowed: {text!r} (the name is "
                "dataset_text_field), 'messages', 'prompt' and 'completion', or 'input_ids'"
            )
        for column in columns:
            _check_values(dataset, name, column, first, allowed)


def _check_values(dataset: Any, name: str, column: str, first: Mapping[str, Any], allowed: str) -> None:
    """Raise for a value that is none of what is allowed; of a stream only the first row is looked at."""
    rows: Any = [first]
    # A column has one type, which is that of its first value, but for nulls and where it is JSON of any kind.
    if isinstance(dataset, Dataset) and column in dataset.column_names:
        mixed = type(dataset.features[column]).__name__ == "Json"  # not in every release of datasets
        if mixed or dataset.data.column(column).null_count:
            rows = dataset.select_columns([column]).with_format(None)
    for index, row in enumerate(rows):
        if not isinstance(row[column], str if allowed == "a string" else Sized):
            raise ValueError(
                f"{name}: got {reprlib.repr(row[column])} in row {index} of column {column!r}; allowed: {allowed} in "
                "every row (leave the others out with the data set's `filter`)"
            )


def let_each_process_read(args: SFTConfig) -> None:
    """Keep accelerate from reading for all processes in one, as it does with a stream; args is changed in place.

    It would cut every tensor of a row without padding at the first dimension of the batch, 1, and can put no batches
    together that are padded to different lengths.
    """
    accelerator: Any = copy.copy(args.accelerator_config)
    if accelerator.dispatch_batches:
        logger.warning("dispatch_batches=True has no effect: each process reads its own rows")
    accelerator.dispatch_batches = False
    args.accelerator_config = accelerator


def uncut(args: SFTConfig) -> SFTConfig:
    """The arguments for preparing data that are cut, packed and shuffled later, or have been."""
    args = copy.copy(args)
    args.max_length, args.shuffle_dataset = None, False
    return args


def has_stream(given: Mapping[str, Any]) -> bool:
    """Whether a data set that was given to the trainer can only be read from its start."""
    return any(isinstance(dataset, IterableDataset) for _, dataset in _datasets(given))


def _datasets(given: Mapping[str, Any]) -> Iterable[tuple[str, Any]]:
    """Every data set that was given, by the name of its argument."""
    for name in ("train_dataset", "eval_dataset"):
        data = given.get(name)
        if isinstance(data, dict):  # one evaluation for each
            yield from ((f"{name}[{key!r}]", part) for key, part in data.items())
        elif data is not None:
            yield name, data


def _columns(dataset: Any) -> Sequence[str]:
    return getattr(dataset, "column_names", None) or ()  # a stream may not know
