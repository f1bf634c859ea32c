"""Training on responses only: the labels of a trainer's data sets, masked."""

import logging
from collections.abc import Mapping
from itertools import islice
from typing import Any, cast

import numpy as np
from datasets import Dataset, IterableDataset
from transformers import DataCollatorForLanguageModeling, DataCollatorForSeq2Seq, ProcessorMixin, Trainer

from unsloth_fast.chat_templates.parts import find_parts
from unsloth_fast.data.columns import datasets_of
from unsloth_fast.data.labels import STREAM_CHECK
from unsloth_fast.data.lists import flat
from unsloth_fast.data.packing import SPANS
from unsloth_fast.data.responses import ResponseLabels, forms_of, longest_matches, mask_cut_documents
from unsloth_fast.data.types import ProcessingClass, TokenRow
from unsloth_ref import checks
from unsloth_ref.checks import counted
from unsloth_ref.types import IGNORE_INDEX

logger = logging.getLogger(__name__)

_TOKEN_COLUMNS = ("input_ids", "labels", "attention_mask", "seq_lengths", "completion_mask", "assistant_masks")


def train_on_responses_only(
    trainer: Trainer | None,
    instruction_part: str | None = None,
    response_part: str | None = None,
    force_match: bool = True,
    tokenizer: ProcessingClass | None = None,
    return_function: bool = False,
    num_proc: int | None = None,
    last_response_only: bool = False,
) -> Any:
    """Mask every label outside responses, in a trainer's data sets.

    A response starts after `response_part` and ends before the next `instruction_part` or `response_part`, or at the
    end of its document: the end token belongs to it. In packed rows each document is masked separately. Tokens at the
    start of a document are not a response until `response_part` occurs. Documents that the strategies "wrapped" and
    "bfd_split" cut are masked as a whole where `UnslothTrainer` packed them. Where TRL did, as it does with streams,
    "bfd_split" loses the targets of a response that goes on in another row, and a warning says so. Labels that are
    masked already stay masked. Rows without a target are dropped, as TRL drops them, and counted in the log.

    Args:
        trainer: a trainer whose data sets are tokenized, as those of `UnslothTrainer` and `trl.SFTTrainer` are; they
            are replaced. May be None with return_function.
        instruction_part: the text before what a user says, such as "<|im_start|>user\\n".
        response_part: the text before a response, such as "<|im_start|>assistant\\n". Parts that are None are found in
            the tokenizer's chat template.
        force_match: whether the whitespace at the ends of the parts must match.
        tokenizer: None for the trainer's.
        return_function: whether to return the function that makes the labels, for `datasets.Dataset.map`, and leave
            the trainer as it is.
        num_proc: the number of processes, for data sets that are not streams.
        last_response_only: whether to mask all responses of a document but its last.

    Returns:
        The trainer, or a function of a row or a batch of rows that returns {"labels": ...}.

    Raises:
        ValueError: a part that is empty or cannot be found; a data set that is not tokenized, or in which no row keeps
            a target; a data collator that replaces labels; last_response_only with documents that TRL cut.
    """
    checks.one_of("last_response_only", last_response_only, (True, False))
    if tokenizer is None:
        tokenizer = getattr(trainer, "processing_class", None) or getattr(trainer, "tokenizer", None)
    if tokenizer is None:
        raise ValueError("tokenizer: got None; allowed: a tokenizer, or a trainer that has one")
    parts = _parts(tokenizer, instruction_part, response_part)
    inner = tokenizer.tokenizer if isinstance(tokenizer, ProcessorMixin) else tokenizer
    asked, answered = (forms_of(part, inner, exact=force_match) for part in parts)
    labels = ResponseLabels(asked, answered, last_response_only)
    if return_function:
        return labels
    given = {name: getattr(trainer, name, None) for name in ("train_dataset", "eval_dataset")}
    for name, data in datasets_of(given):
        _check_cuts(data, name, getattr(trainer, "args", None), last_response_only)
    masked = {name: _masked(data, name, labels, parts, inner, num_proc) for name, data in datasets_of(given)}
    _keep_labels(trainer, inner, next(iter(masked.values()), None))
    trained = cast(Trainer, trainer)
    if "train_dataset" in masked:
        trained.train_dataset = masked["train_dataset"]
    if isinstance(trained.eval_dataset, dict):
        parts_of_eval = {key: masked[f"eval_dataset[{key!r}]"] for key in trained.eval_dataset}
        trained.eval_dataset = type(trained.eval_dataset)(parts_of_eval)
    elif "eval_dataset" in masked:
        trained.eval_dataset = masked["eval_dataset"]
    return trainer


def _parts(tokenizer: Any, instruction: str | None, response: str | None) -> tuple[str, str]:
    """Both parts: as they were given, else as the template writes them."""
    for name, part in (("instruction_part", instruction), ("response_part", response)):
        if part is not None and (not isinstance(part, str) or not part):
            raise ValueError(f"{name}: got {part!r}; allowed: a text, or None to find it in the chat template")
    if instruction is None or response is None:
        found = find_parts(tokenizer)
        instruction, response = instruction or found[0], response or found[1]
        logger.info("responses are between %r and %r", response, instruction)
    return instruction, response


def _check_cuts(dataset: Any, name: str, args: Any, last_only: bool) -> None:
    """Refuse rows of concatenated documents if it is not known where they begin, and warn of pieces of documents.

    Raises:
        ValueError: a response would go on into the next document, or a piece would count as a document.
    """
    for_all, for_evaluation = (getattr(args, field, None) for field in ("packing", "eval_packing"))
    packed = for_all if name == "train_dataset" or for_evaluation is None else for_evaluation
    strategy, first = getattr(args, "packing_strategy", "bfd"), next(iter(dataset), None) or {}
    if not packed or SPANS in first or strategy == "bfd":
        return
    if "seq_lengths" not in first:
        raise ValueError(
            f"packing_strategy: got {strategy!r}, and {name} does not show where its documents begin; allowed: "
            "'bfd' or 'bfd_split', or an UnslothTrainer on a data set that is not a stream"
        )
    if last_only:
        raise ValueError(
            f"last_response_only: got True, and packing_strategy={strategy!r} cut the documents of {name}; allowed: "
            "packing_strategy='bfd', or an UnslothTrainer on a data set that is not a stream"
        )
    logger.warning(
        "packing_strategy: got %r, which cuts documents; responses that go on in another row are not trained on there "
        "(packing_strategy='bfd' cuts none)",
        strategy,
    )


def _masked(
    dataset: Any, name: str, labels: ResponseLabels, parts: tuple[str, str], tokenizer: Any, num_proc: int | None
) -> Any:
    """The data set with the labels of responses only, without the rows that have none."""
    first: Any = next(iter(dataset), None)
    if first is None or "input_ids" not in first:
        columns = "no row" if first is None else f"only the columns {', '.join(map(repr, first))}"
        raise ValueError(f"{name}: got {columns}; allowed: rows of tokens in 'input_ids', as a trainer prepares them")
    if not isinstance(dataset, Dataset):
        return _masked_stream(dataset, name, labels, parts, tokenizer)
    if SPANS in first and "labels" in first:
        result = mask_cut_documents(dataset, labels)
    else:
        options: dict[str, Any] = {"num_proc": num_proc, "desc": f"Masking all but responses in {name}"}
        result = dataset.with_format(None).map(labels, batched=True, **options)
    found, lengths = flat(result, "labels")
    kept = _rows_with_targets(found.to_numpy(zero_copy_only=False), lengths)
    _report(name, kept, parts, tokenizer, first)
    _check_instructions(name, result.select_columns(["input_ids"]), labels, parts)
    return result if kept.all() else result.select(np.flatnonzero(kept))


def _masked_stream(
    stream: IterableDataset, name: str, labels: ResponseLabels, parts: tuple[str, str], tokenizer: Any
) -> IterableDataset:
    result = stream.map(labels)
    start: list[Mapping[str, Any]] = []
    for row in islice(result, STREAM_CHECK):
        start.append(row)
        if has_target(row):
            break
    kept = np.array([has_target(row) for row in start])
    if kept.any() or len(start) < STREAM_CHECK:
        _report(name, kept, parts, tokenizer, start[0])
    else:
        logger.warning("%s: none of the first %d rows has a response after %r", name, STREAM_CHECK, parts[1])
    _check_instructions(name, filter(has_target, start), labels, parts)
    logger.info("%s: a stream; rows without a response after %r are dropped as they are read", name, parts[1])
    return result.filter(has_target)


def has_target(row: TokenRow) -> bool:
    """Whether a label after the first is a target."""
    return any(label != IGNORE_INDEX for label in row["labels"][1:])


def _rows_with_targets(labels: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Which rows have a target after their first token, [rows] bool."""
    before = np.concatenate(([0], (labels != IGNORE_INDEX).cumsum()))
    ends = lengths.cumsum()
    return before[ends] > before[np.minimum(ends - lengths + 1, ends)]


def _report(name: str, kept: np.ndarray, parts: tuple[str, str], tokenizer: Any, row: Mapping[str, Any]) -> None:
    """Refuse a data set without a response; log how many rows have none.

    Raises:
        ValueError: no row has a response.
    """
    if not kept.any():
        begin = tokenizer.decode(list(row["input_ids"][:60]))
        raise ValueError(
            f"{name}: got no response after response_part={parts[1]!r} in {counted(len(kept), 'row')}, the first of "
            f"which begins {begin!r}; allowed: at least one (check both parts against this text, and max_length)"
        )
    if empty := np.count_nonzero(~kept):
        logger.warning(
            "%s: rows without a response after response_part=%r are dropped: %d of %d; max_length may have cut it off",
            *(name, parts[1], empty, len(kept)),
        )


def _check_instructions(name: str, rows: Any, labels: ResponseLabels, parts: tuple[str, str]) -> None:
    """Warn if no row has the instruction part: responses would then go on to the end of each document."""
    for row in islice(rows, STREAM_CHECK):
        ids = np.asarray(row["input_ids"])
        if longest_matches(ids, np.zeros(len(ids), np.int64), labels.instruction).any():
            return
    logger.warning(
        "%s: instruction_part=%r does not occur: each response extends to the next one, or to its document's end",
        *(name, parts[0]),
    )


def _keep_labels(trainer: Any, tokenizer: Any, dataset: Any) -> None:
    """Replace a data collator that makes labels of all tokens; refuse another that changes them.

    Raises:
        ValueError: the collator's batches have targets outside responses.
    """
    collator = trainer.data_collator
    if isinstance(collator, DataCollatorForLanguageModeling) and not collator.mlm:
        pad_to = collator.pad_to_multiple_of
        trainer.data_collator = DataCollatorForSeq2Seq(tokenizer, pad_to_multiple_of=pad_to)
        logger.warning("data_collator: DataCollatorForLanguageModeling makes labels of all tokens and is replaced")
        return
    if dataset is None:
        return
    row: Any = next(iter(dataset))
    try:
        batch = collator([{name: row[name] for name in _TOKEN_COLUMNS if name in row}])
    except KeyError:  # a collator of the user's, which takes columns of its own
        batch = collator([row])
    found = batch.get("labels") if isinstance(batch, Mapping) else None
    wanted = sum(label != IGNORE_INDEX for label in row["labels"])
    if found is not None and int((found != IGNORE_INDEX).sum()) > wanted:
        raise ValueError(
            f"data_collator: got {type(collator).__name__}, which makes labels of other tokens than the rows' labels; "
            "allowed: one that keeps them, such as the trainer's default or transformers.DataCollatorForSeq2Seq"
        )
