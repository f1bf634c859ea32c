"""From a data set to the rows of a run: texts are tokenized, labelled, checked, cut and packed here.

TRL tokenizes conversations. A map-style data set is packed as a whole; a stream is packed by TRL, batch by batch.
"""

from dataclasses import dataclass
from types import ModuleType
from typing import Any, Protocol, cast

from datasets import Dataset, IterableDataset
from trl import SFTConfig

from unsloth_fast.data.choice import TOKENS
from unsloth_fast.data.labels import require_kept_labels, require_targets, require_targets_in_stream, with_labels
from unsloth_fast.data.lists import has_lists
from unsloth_fast.data.packing import check_packed_rows, log_packing, pack_dataset
from unsloth_fast.data.streams import picklable
from unsloth_fast.data.text import read_texts
from unsloth_fast.data.tokens import check_tokens_while_reading, require_tokens, without_empty_rows
from unsloth_fast.data.truncation import truncation_of, without_truncation
from unsloth_fast.data.vocabulary import check_vocabulary, check_while_reading
from unsloth_ref import checks
from unsloth_ref.batch_checks import STRATEGIES
from unsloth_ref.types import Strategy


class TrlPreparation(Protocol):
    """TRL's own preparation of a data set: tokenization, then truncation or packing, as the arguments request."""

    def __call__(
        self, dataset: Any, processing_class: Any, args: Any, *, packing: bool = False, formatting_func: Any = None
    ) -> Any:
        """The prepared data set."""
        ...


@dataclass(frozen=True)
class Preparation:
    """How the data sets of a run become rows of tokens and labels.

    Attributes:
        by_trl: TRL's preparation.
        training: the backend's training pieces, whose `pack` is used.
        vocabulary: how many tokens the model has; None if that is not known.
        completion_only: whether a completion_mask counts.
        names_text_field: whether the user named dataset_text_field.
    """

    by_trl: TrlPreparation
    training: ModuleType
    vocabulary: int | None
    completion_only: bool
    names_text_field: bool

    def __call__(
        self,
        dataset: Any,
        name: str,
        processing_class: Any,
        args: SFTConfig,
        packing: bool,
        formatting_func: Any = None,
    ) -> Any:
        """The rows of a data set.

        Args:
            dataset: documents, tokenized or not, or packed rows with a column "seq_lengths".
            name: of the data set, for messages.
            processing_class: the tokenizer or processor.
            args: the run's arguments.
            packing: whether to pack documents into rows of args.max_length tokens.
            formatting_func: the user's function that makes the text of a row.

        Raises:
            ValueError: a token outside the vocabulary; no token is a target; packing without a max_length or
                by an unknown strategy; a packed row longer than max_length; or what TRL raises.
        """
        if packing:
            checks.one_of("packing_strategy", args.packing_strategy, STRATEGIES)
        packed = TOKENS[0] in next(iter(dataset), ()) and has_lists(dataset, "seq_lengths")
        if packing and args.max_length is None and not packed:
            raise ValueError("max_length: got None with packing=True; allowed: an integer from 1, the size of a row")
        read = read_texts(dataset, name, args, processing_class, formatting_func, named=self.names_text_field)
        dataset, processing_class = read.dataset, read.processing_class
        if read.columns == TOKENS and isinstance(dataset, IterableDataset):
            dataset = check_tokens_while_reading(dataset, name, args.max_length)
        elif read.columns == TOKENS:  # before a map gives a column of empty lists a type of its own
            dataset = without_empty_rows(dataset, name)
        if packed:
            return self._packed_rows(dataset, name, processing_class, args)
        whole = without_truncation(args)
        tokenized = self.by_trl(dataset, processing_class, whole, formatting_func=read.formatting_func)
        if isinstance(tokenized, Dataset):
            return self._documents(tokenized, name, processing_class, args, packing)
        return self._stream(tokenized, name, processing_class, args, packing)

    def _packed_rows(self, dataset: Dataset, name: str, processing_class: Any, args: SFTConfig) -> Any:
        """Rows that were packed earlier: neither cut nor packed again."""
        check_packed_rows(dataset, name, args.max_length)
        rows = self.by_trl(dataset, processing_class, without_truncation(args))
        check_vocabulary(rows, name, self.vocabulary)
        return require_targets(rows, name) if has_lists(rows, "labels") else rows

    def _stream(self, stream: IterableDataset, name: str, processing_class: Any, args: SFTConfig, packing: bool) -> Any:
        """Tokenized documents of a stream: checked as they are read, cut and packed by TRL."""
        stream = without_empty_rows(check_while_reading(stream, name, self.vocabulary), name)
        require_tokens(stream, name)
        if "seq_lengths" in next(iter(stream)):  # packed earlier: neither cut nor packed again
            args, packing = without_truncation(args), False
        cut = truncation_of(args, packing)
        require_targets_in_stream(stream, name, cut, completion_only=self.completion_only)
        rows = self.by_trl(stream, processing_class, args, packing=packing)
        require_kept_labels(stream, rows, name)
        return picklable(rows)

    def _documents(self, dataset: Dataset, name: str, processing_class: Any, args: SFTConfig, packing: bool) -> Any:
        """Tokenized documents: labelled and checked as a whole, then cut by TRL or packed here."""
        dataset = with_labels(without_empty_rows(dataset, name), self.completion_only)
        check_vocabulary(dataset, name, self.vocabulary)
        strategy = args.packing_strategy if packing else None
        if has_lists(dataset, "labels"):
            drop_empty = strategy in ("bfd", "bfd_split")  # with "wrapped" a document's neighbours would move
            dataset = require_targets(dataset, name, truncation_of(args, packing), drop_empty=drop_empty)
        if strategy is None:
            return self.by_trl(dataset, processing_class, args)
        dataset = dataset.select_columns(["input_ids", "labels"])
        shuffled = getattr(args, "shuffle_dataset", False)  # TRL's field since 0.26
        if shuffled:
            dataset = dataset.shuffle(seed=args.seed)
        assert args.max_length is not None  # checked before the documents were tokenized
        packed = pack_dataset(dataset, args.max_length, cast(Strategy, strategy), self.training)
        log_packing(dataset, packed, name, args.max_length)
        return packed.shuffle(seed=args.seed) if shuffled else packed
