"""The types that the reference, the fast package and the judge share."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, Self

import torch
from torch import Tensor
from torch.nn import Parameter

Approximate = Literal["none", "tanh"]
Casting = Literal["llama", "gemma"]
ExpertActivation = Literal["silu", "gelu_tanh"]
GatedActivation = Literal["silu", "gelu", "gelu_tanh"]
Reduction = Literal["mean", "sum", "none"]
Role = Literal["base", "embedding"]
Strategy = Literal["bfd", "bfd_split", "wrapped"]

Column = Sequence[int] | Tensor  # one integer per token, or per document
Example = Mapping[str, Column | None]
Microbatches = Iterable[Tensor]  # the labels of each

IGNORE_INDEX = -100  # the label of a token that is not trained on, as in torch.nn.CrossEntropyLoss


class NF4Weight(NamedTuple):
    """A weight in 4 bits, as bitsandbytes stores it; `nf4_dequantize` documents the tensors.

    Attributes:
        packed, absmax: the elements and their scales.
        nested_code, nested_absmax, nested_offset: of nested scales; None otherwise.
        shape: of the weight.
    """

    packed: Tensor
    absmax: Tensor
    nested_code: Tensor | None
    nested_absmax: Tensor | None
    nested_offset: Tensor | None
    shape: Sequence[int]


class Float8Weight(NamedTuple):
    """A weight in float8 (e4m3), as `fp8_linear` takes it: it multiplies x after x is quantised to float8 as well.

    Attributes:
        values: [O, I], torch.float8_e4m3fn.
        scale: [ceil(O / 128), ceil(I / 128)], float32, one per block.
    """

    values: Tensor
    scale: Tensor

    @property
    def shape(self) -> Sequence[int]:
        """[O, I]."""
        return self.values.shape


QuantisedWeight = NF4Weight | Float8Weight


@dataclass(frozen=True, eq=False)  # tensors have no ==
class ParamGroup:
    """Parameters that share their learning rate and weight decay in an optimizer.

    Attributes:
        role: "embedding" for parameters that train the token embedding or the output head, "base" for all others.
        params: the parameters, in the order of the model.
        lr: learning rate.
        weight_decay: decoupled weight decay; a step multiplies a parameter by 1 - lr * weight_decay.
    """

    role: Role
    params: tuple[Parameter, ...]
    lr: float
    weight_decay: float

    def as_dict(self) -> dict[str, Any]:
        """The group as `torch.optim` takes it; the key "role" holds its role."""
        return {"role": self.role, "params": list(self.params), "lr": self.lr, "weight_decay": self.weight_decay}


@dataclass(frozen=True, eq=False)
class PackingPlan:
    """Which span of which document is where in which packed row; int64 tensors on the CPU.

    Span i is the tokens starts[i] to starts[i] + lengths[i] - 1 of document documents[i]. Row r concatenates the spans
    offsets[r] to offsets[r + 1] - 1. No span is empty.

    Attributes:
        documents: [spans], the index of the document of each span.
        starts: [spans], the position of the first token of each span in its document.
        lengths: [spans], the number of tokens of each span, at least 1.
        offsets: [rows + 1], the first span of each row, and the number of spans at the end.
    """

    documents: Tensor
    starts: Tensor
    lengths: Tensor
    offsets: Tensor


@dataclass(frozen=True, eq=False)
class PackedBatch:
    """Documents concatenated into one row, and where each begins.

    Attributes:
        input_ids: [1, T] int64.
        labels: [1, T] int64, not shifted; -100 at tokens that are not targets, such as the first of each document.
        position_ids: [1, T] int64, starting from 0 in each document.
        cu_seqlens: [documents + 1] int32, cumulative lengths: 0, then the end of each document.
        max_seqlen: the number of tokens of the longest document.
    """

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor
    cu_seqlens: Tensor
    max_seqlen: int

    def to(self, device: torch.device | str) -> Self:
        """The batch with its tensors on the device."""
        names = ("input_ids", "labels", "position_ids", "cu_seqlens")
        return replace(self, **{name: getattr(self, name).to(device) for name in names})

    def as_dict(self) -> dict[str, Any]:
        """The keyword arguments of a transformers model: no attention_mask, which would join the documents."""
        return {
            "input_ids": self.input_ids,
            "labels": self.labels,
            "position_ids": self.position_ids,
            "cu_seq_lens_q": self.cu_seqlens,
            "cu_seq_lens_k": self.cu_seqlens,
            "max_length_q": self.max_seqlen,
            "max_length_k": self.max_seqlen,
        }
