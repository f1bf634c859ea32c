"""Chunks of the rows of a linear layer's output, and the sums of their gradients, for linear_cross_entropy.py."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

ROOM = 500 * 2**20  # bytes for the logits of a chunk and for dhidden; with what is small beside them under 512 MiB
# Rows of a chunk. A product with 1664 or 1792 rows took 15 % longer for each on an H200; above 4096 nothing is gained.
GOOD_ROWS = (4096, 2048, 1536, 1280, 1024, 512, 256, 128)


def chunk_rows(rows: int, columns: int, vocab: int, itemsize: int, trained: bool = False) -> int:
    """Rows whose logits are made at once, by the sizes alone, so that results repeat.

    As many as fit beside dhidden in ROOM (in a quarter of it, where dhidden takes more than the rest). Each chunk reads
    and writes the gradient of a weight that is trained, in float32: logits may take as much as it does.
    """
    room = max(ROOM - rows * columns * itemsize, ROOM // 4, trained * vocab * columns * 4)
    return next((good for good in GOOD_ROWS if good * vocab * itemsize <= room), GOOD_ROWS[-1])


def captured(tensor: Tensor) -> bool:
    """Whether a CUDA graph is being captured, which cannot wait for the device."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


class Chunk(NamedTuple):
    """Rows that are worked on together.

    Attributes:
        rows: which they are, as an index of the first dimension: a slice, or int64 indices.
        hidden: theirs.
        labels: theirs.
        logits: theirs, contiguous, in memory that the next chunk takes over.
    """

    rows: slice | Tensor
    hidden: Tensor
    labels: Tensor
    logits: Tensor


class Work:
    """The rows that count, chunk by chunk.

    Attributes:
        count: how many; a tensor, where a CUDA graph counts them.
        ignored: [T], where rows that do not count could not be left out, else None.
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
        """Read back which rows count, which waits for the device; a CUDA graph, which cannot, takes all rows."""
        self._weight, self._bias, self._labels = weight, bias, labels
        self.count: float | Tensor
        self.ignored: Tensor | None = None
        self._index: Tensor | None = None
        counts = labels.long() != ignore_index
        if captured(hidden):
            self.count, self.ignored = counts.sum(), ~counts
            hidden = hidden.masked_fill(self.ignored[:, None], 0.0)  # a NaN times a zero of dx would reach dweight
            rows = len(labels)
        else:
            index = counts.nonzero()[:, 0]
            rows = len(index)
            self.count = float(rows)
            if rows < len(labels):
                self._index = index
        self._hidden = hidden
        size = chunk_rows(rows, hidden.shape[1], len(weight), hidden.element_size(), trained)
        self._spans = [slice(begin, min(rows, begin + size)) for begin in range(0, rows, size)]
        self._buffer = hidden.new_empty(min(rows, size), len(weight))

    def __iter__(self) -> Iterator[Chunk]:
        """Each chunk with its logits."""
        for span in self._spans:
            rows = span if self._index is None else self._index[span]
            hidden, logits = self._hidden[rows].contiguous(), self._buffer[: span.stop - span.start]
            # Autocast leaves products with an `out` alone.
            if self._bias is None:
                torch.mm(hidden, self._weight.t(), out=logits)
            else:
                torch.addmm(self._bias, hidden, self._weight.t(), out=logits)
            yield Chunk(rows, hidden, self._labels[rows], logits)


class Gradients:
    """Of hidden, and in float32 of weight and bias, of those that are needed; the others have no elements."""

    def __init__(self, hidden: Tensor, weight: Tensor, needs: tuple[bool, bool, bool]) -> None:
        """Zeros."""
        self._weight, self._needs, self._first = weight, needs, True
        self.hidden = hidden.new_zeros(hidden.shape if needs[0] else 0)
        self.weight = weight.new_empty(weight.shape if needs[1] else 0, dtype=torch.float32)
        self.bias = weight.new_zeros(len(weight) if needs[2] else 0, dtype=torch.float32)

    def add(self, chunk: Chunk, dlogits: Tensor) -> None:
        """What a chunk gives."""
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
        """All three; zeros where a row is ignored, and where there was no chunk."""
        if self._first:
            self.weight.zero_()
        if ignored is not None and self._needs[0]:
            self.hidden.masked_fill_(ignored[:, None], 0.0)
        return self.hidden, self.weight, self.bias
