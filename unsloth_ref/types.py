"""The nouns that the reference, the fast package and the judge share."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor
from torch.nn import Parameter

Approximate = Literal["none", "tanh"]
Casting = Literal["llama", "gemma"]
Reduction = Literal["mean", "sum", "none"]
Role = Literal["base", "embedding"]
Strategy = Literal["bfd", "bfd_split", "wrapped"]

IGNORE_INDEX = -100  # the label of a token that is not trained on, as in torch.nn.CrossEntropyLoss


@dataclass(frozen=True, eq=False)  # tensors have no ==
class ParamGroup:
    """Parameters that one optimizer treats alike.

    Attributes:
        role: "embedding" for whatever trains the token embedding or the output head, "base" for all else.
        params: the parameters, in the order of the model.
        lr: learning rate, per step.
        weight_decay: decoupled weight decay, per step and unit of learning rate.
    """

    role: Role
    params: tuple[Parameter, ...]
    lr: float
    weight_decay: float

    def as_dict(self) -> dict[str, Any]:
        """The group as torch.optim optimizers take it, its role under the key "role"."""
        return {"role": self.role, "params": list(self.params), "lr": self.lr, "weight_decay": self.weight_decay}


Microbatches = Iterable[Tensor]


@dataclass(frozen=True, eq=False)
class PackingPlan:
    """Which tokens of which documents lie in which packed row, in which order; int64 tensors on the CPU.

    Span i holds the tokens starts[i] to starts[i] + lengths[i] - 1 of the document documents[i]; row r holds the spans
    offsets[r] to offsets[r + 1] - 1 one after the other. No span is empty.

    Attributes:
        documents: [spans], indices of documents.
        starts: [spans], the first token of each span within its document.
        lengths: [spans], in tokens, at least 1.
        offsets: [rows + 1], the first span of each row, then the number of spans.
    """

    documents: Tensor
    starts: Tensor
    lengths: Tensor
    offsets: Tensor


@dataclass(frozen=True, eq=False)
class PackedBatch:
    """Documents one after the other in one row, and where each begins.

    Attributes:
        input_ids: [1, T] int64.
        labels: [1, T] int64, not shifted; -100 for what is no target, and at the first token of each document.
        position_ids: [1, T] int64, from 0 in each document.
        cu_seqlens: [documents + 1] int32: 0, then where each document ends.
        max_seqlen: tokens of the longest document.
    """

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor
    cu_seqlens: Tensor
    max_seqlen: int

    def as_dict(self) -> dict[str, Any]:
        """The batch as models of transformers take it: no attention_mask, which would join the documents again."""
        return {
            "input_ids": self.input_ids,
            "labels": self.labels,
            "position_ids": self.position_ids,
            "cu_seq_lens_q": self.cu_seqlens,
            "cu_seq_lens_k": self.cu_seqlens,
            "max_length_q": self.max_seqlen,
            "max_length_k": self.max_seqlen,
        }


@dataclass(frozen=True)
class ModelFacts:
    """What decides about batching in a model.

    Attributes:
        model_type: as in the model's config, such as "llama".
        encoder_decoder: whether an encoder reads the prompt.
        multimodal: whether it takes images, video or sound beside tokens.
        recurrent: whether a layer carries a state or a convolution from token to token (linear attention, Mamba), which
            would leak from one document into the next.
    """

    model_type: str = ""
    encoder_decoder: bool = False
    multimodal: bool = False
    recurrent: bool = False


@dataclass(frozen=True)
class ConfigFacts:
    """What decides about batching in a run.

    Attributes:
        packing: whether packing was asked for.
        padding_free: whether batches without padding were asked for; None where nothing was said.
        custom_collator: whether a data collator was given.
        processor: whether the processing class is a processor, not a tokenizer.
        processing_class: whether a processing class was given at all.
        vision_columns: whether the data have columns of images or video.
    """

    packing: bool = False
    padding_free: bool | None = None
    custom_collator: bool = False
    processor: bool = False
    processing_class: bool = True
    vision_columns: bool = False


@dataclass(frozen=True)
class BatchingPlan:
    """How documents become batches.

    Attributes:
        packing: whether rows are packed to the maximum length.
        padding_free: whether a batch is one row without padding; true wherever packing is.
        reasons: why both are off although they could have been on; empty where nothing stands in the way.
    """

    packing: bool
    padding_free: bool
    reasons: tuple[str, ...] = ()
