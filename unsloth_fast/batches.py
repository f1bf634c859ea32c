"""From a data set to batches: what a run's model and data allow, what cannot be trained on, and the collator."""

import copy
import inspect
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import transformers
from datasets import Dataset, IterableDataset
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig, ProcessorMixin
from trl import SFTConfig
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from unsloth_fast.config import UnslothTrainingArguments
from unsloth_ref import checks
from unsloth_ref.types import BatchingPlan, ConfigFacts, ModelFacts, PackedBatch

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


def labels_of(example: Mapping[str, Any], completion_only: bool) -> dict[str, Any]:
    """The labels of an example that has none: its tokens, -100 where a mask of it is 0. TRL makes them since 1.8."""
    if "labels" in example:
        return {}
    names = (*(("completion_mask",) if completion_only else ()), "assistant_masks")
    masks = [example[name] for name in names if name in example]
    columns = zip(example["input_ids"], *masks, strict=True)
    return {"labels": [token if all(mask) else -100 for token, *mask in columns]}


def labelled(dataset: Dataset, completion_only: bool) -> Dataset:
    """The data set with a column of labels; its masks are in them."""
    if not has_lists(dataset, "input_ids") or "labels" in dataset.column_names:
        return dataset
    masks = [name for name in ("completion_mask", "assistant_masks") if name in dataset.column_names]
    return dataset.map(labels_of, fn_kwargs={"completion_only": completion_only}, remove_columns=masks)


def plan(
    model: Any, args: SFTConfig, given: Mapping[str, Any], batching_plan: Callable[..., BatchingPlan]
) -> BatchingPlan:
    """Whether this run packs, whether its batches go without padding, and why not.

    A plain `trl.SFTConfig` cannot say nothing about padding_free; with packing its False counts as that.

    Args:
        model: the model, or the name or path of one.
        args: the run's arguments.
        given: the trainer's other keywords.
        batching_plan: the training piece of that name.
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
    """What the training piece knows nothing of."""
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


def check_columns(given: Mapping[str, Any], args: SFTConfig) -> None:
    """Raise before any work is done if a data set is empty or has no column that can be trained on.

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
    for name, dataset in _datasets(given):
        first = next(iter(dataset), None)
        if first is None:
            raise ValueError(f"{name}: got no row; allowed: at least one (look at its path, split and filters)")
        if skip or given.get("formatting_func") is not None or _VISION_COLUMNS & first.keys():
            continue
        trainable = first.keys() & {text, "messages", "conversations", "input_ids"}
        if not trainable and not {"prompt", "completion"} <= first.keys():
            raise ValueError(
                f"{name}: got no column {text!r}, only {', '.join(map(repr, first))}; allowed: {text!r} (the name is "
                "dataset_text_field), 'messages', 'prompt' and 'completion', or 'input_ids'"
            )


def with_targets(dataset: Dataset, name: str, *, max_length: int | None = None, drop: bool = False) -> Dataset:
    """The data set, once it is sure that there is something to train on or to evaluate.

    The first token of a document is no target: nothing foretells it.

    Args:
        dataset: with a column "labels" of lists of integers, a document each.
        name: of the data set, for messages.
        max_length: what lies behind so many tokens will be cut off; None for nothing.
        drop: whether to leave out the documents without target, which change nothing where documents are kept apart.

    Raises:
        ValueError: no token is a target.
    """
    labels, lengths = flat_column(dataset, "labels")
    starts = lengths.cumsum() - lengths
    targets = labels != -100
    targets[starts[lengths > 0]] = False
    before = np.concatenate(([0], targets.cumsum()))  # targets before each token
    kept = lengths if max_length is None else np.minimum(lengths, max_length)
    trains = before[starts + kept] > before[starts]
    if not trains.any():
        cut = "" if max_length is None else f" within max_length={max_length} tokens"
        raise ValueError(
            f"{name} data set: got no target in {len(lengths)} documents{cut}; allowed: at least one label that is not "
            "-100 after a document's first token (look at labels, completion_mask and assistant_masks)"
        )
    if trains.all():
        return dataset
    logger.warning(
        "%s data set: %d of %d documents have no target and count for nothing", name, (~trains).sum(), len(trains)
    )
    return dataset.select(np.flatnonzero(trains)) if drop else dataset


def check_packed_rows(dataset: Dataset, name: str, max_length: int | None) -> None:
    """Raise for rows that were packed before and are longer than a row may be: cutting one would cut documents apart.

    Raises:
        ValueError: the longest row, and what is allowed.
    """
    longest = flat_column(dataset, "input_ids")[1].max(initial=0)
    if max_length is not None and longest > max_length:
        raise ValueError(
            f"{name} data set: got a packed row of {longest} tokens; allowed: up to max_length={max_length} (raise it, "
            "or pack the documents anew without the column 'seq_lengths')"
        )


def log_packing(dataset: Dataset, packed: Dataset, name: str, max_length: int) -> None:
    """Log how full the rows are, and how many tokens were cut off."""
    lengths, kept = flat_column(dataset, "input_ids")[1], int(flat_column(packed, "input_ids")[1].sum())
    lost = int(lengths.sum()) - kept
    logger.info(
        "%s data set: %d documents of %d tokens packed into %d rows of %d, %.1f %% full",
        *(name, len(lengths), lengths.sum(), len(packed), max_length, 100 * kept / (len(packed) * max_length)),
    )
    if lost:
        logger.warning(
            "%s data set: %d tokens were cut off %d documents of more than %d tokens; packing_strategy='bfd_split' "
            "keeps them, in pieces",
            *(name, lost, (lengths > max_length).sum(), max_length),
        )


def flat_column(dataset: Dataset, name: str) -> tuple[np.ndarray, np.ndarray]:
    """The numbers of a column of lists one after the other, and the length of each list."""
    table: Any = dataset.select_columns([name]).with_format("arrow")[:]
    column = table.column(name)
    values = [chunk.flatten().to_numpy(zero_copy_only=False) for chunk in column.chunks]
    lengths = [np.diff(chunk.offsets.to_numpy()) for chunk in column.chunks]
    nothing = np.zeros(0, dtype=np.int64)
    return np.concatenate([nothing, *values]), np.concatenate([nothing, *lengths])


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


def has_lists(dataset: Any, name: str) -> bool:
    """Whether it is a map-style data set with a column of that name that holds lists of integers."""
    if not isinstance(dataset, Dataset) or name not in dataset.column_names:
        return False
    kind = dataset.data.schema.field(name).type
    return (pa.types.is_list(kind) or pa.types.is_large_list(kind)) and pa.types.is_integer(kind.value_type)


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
