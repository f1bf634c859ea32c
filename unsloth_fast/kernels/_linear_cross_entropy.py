"""Chunks of rows of a linear layer's output, and the sums of their gradients, for linear_cross_entropy.py."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

BUDGET_BYTES = 500 * 2**20  # for the logits of a chunk and dhidden; with the smaller tensors less than 512 MiB
# On an H200, products of 1664 or 1792 rows took 15 % longer per row; more than 4096 rows gain nothing.
CHUNK_ROWS = (4096, 2048, 1536, 1280, 1024, 512, 256, 128)


def chunk_rows(rows: int, columns: int, vocab: int, itemsize: int, trained: bool = False) -> int:
    """Number of rows per chunk. It depends on sizes alone, so that results are reproducible.

    The logits of a chunk get the part of BUDGET_BYTES that dhidden leaves, but at least a quarter. If the weight is
    trained, each chunk reads and writes its gradient in float32: logits may then take as many bytes as that.
    """
    available = max(BUDGET_BYTES - rows * columns * itemsize, BUDGET_BYTES // 4, trained * vocab * columns * 4)
    return next((size for size in CHUNK_ROWS if size * vocab * itemsize <= available), CHUNK_ROWS[-1])


def captured(tensor: Tensor) -> bool:
    """Whether a CUDA graph is being captured, during which the host cannot wait for the device."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


class Chunk(NamedTuple):
    """Rows that are processed together.

    Attributes:
        rows: an index of the first dimension: a slice, or int64 indices.
        hidden: hidden[rows].
        labels: labels[rows].
        logits: the logits of these rows, contiguous, in memory that the next chunk overwrites.
    """

    rows: slice | Tensor
    hidden: Tensor
    labels: Tensor
    logits: Tensor


class Chunks:
    """The rows that are not ignored, chunk by chunk.

    Attributes:
        targets: the number of these rows; a tensor if a CUDA graph counts them.
        ignored: [T], which rows are ignored, if they could not be left out; else None.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        ignore_index: int,
        trained: bool = False,
    ) -> None:
        """Find the rows that are not ignored, which waits for the device; a CUDA graph cannot and takes all rows."""
        self._weight, self._bias, self._labels = weight, bias, labels
        self.targets: float | Tensor
        self.ignored: Tensor | None = None
        self._index: Tensor | None = None
        counts = labels.long() != ignore_index
        if captured(hidden):
            self.targets, self.ignored = counts.sum(), ~counts
            hidden = hidden.masked_fill(self.ignored[:, None], 0.0)  # NaN times a zero of dx would reach dweight
            rows = len(labels)
        else:
            index = counts.nonzero()[:, 0]
            rows = len(index)
            self.targets = float(rows)
            if rows < len(labels):
                self._index = index
        self._hidden = hidden
        size = chunk_rows(rows, hidden.shape[1], len(weight), hidden.element_size(), trained)
        self._spans = [slice(begin, min(rows, begin + size)) for begin in range(0, rows, size)]
        self._buffer = hidden.new_empty(min(rows, size), len(weight))

    def __iter__(self) -> Iterator[Chunk]:
        """Compute the logits of each chunk."""
        for span in self._spans:
            rows = span if self._index is None else self._index[span]
            hidden, logits = self._hidden[rows].contiguous(), self._buffer[: span.stop - span.start]
            # Autocast does not affect products with an `out`.
            if self._bias is None:
                torch.mm(hidden, self._weight.t(), out=logits)
            else:
                torch.addmm(self._bias, hidden, self._weight.t(), out=logits)
            yield Chunk(rows, hidden, self._labels[rows], logits)


class GradientSums:
    """The gradient of hidden, and those of weight and bias in float32; those that are not needed have no elements."""

    def __init__(self, hidden: Tensor, weight: Tensor, needs: tuple[bool, bool, bool]) -> None:
        """Start with zeros."""
        self._weight, self._needs, self._first = weight, needs, True
        self.hidden = hidden.new_zeros(hidden.shape if needs[0] else 0)
        self.weight = weight.new_empty(weight.shape if needs[1] else 0, dtype=torch.float32)
        self.bias = weight.new_zeros(len(weight) if needs[2] else 0, dtype=torch.float32)

    def add(self, chunk: Chunk, dlogits: Tensor) -> None:
        """Add the part of a chunk."""
        if self._needs[0] and isinstance(chunk.rows, slice):
            torch.mm(dlogits, self._weight, out=self.hidden[chunk.rows])
        elif self._needs[0]:
            self.hidden[chunk.rows] = torch.mm(dlogits, self._weight, out=self._weight.new_empty(chunk.hidden.shape))
        if self._needs[1]:
            self._add_to_weight(dlogits.t(), chunk.hidden)
        if self._needs[2]:
            self.bias += dlogits.sum(0, dtype=torch.float32)

    def _add_to_weight(self, dlogits: Tensor, hidden: Tensor) -> None:
        beta, self._first = 0 if self._first else 1, False
        if dlogits.dtype == torch.float32 or not dlogits.is_cuda:
            self.weight.addmm_(dlogits.float(), hidden.float(), beta=beta)
        else:
            torch.ops.aten.addmm.dtype_out(self.weight, dlogits, hidden, torch.float32, beta=beta, out=self.weight)

    def finish(self, ignored: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """All three gradients; zeros for ignored rows, and if there was no chunk."""
        if self._first:
            self.weight.zero_()
        if ignored is not None and self._needs[0]:
            self.hidden.masked_fill_(ignored[:, None], 0.0)
        return self.hidden, self.weight, self.bias
