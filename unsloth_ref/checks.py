"""The contract's argument checks, one a kind of mistake; both backends call them, so both raise the same.

Each message names the argument, what was seen and what is allowed.
"""

import os
from collections.abc import Sequence

import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (torch.int32, torch.int64)


def one_of(name: str, value: object, allowed: Sequence[object]) -> None:
    """Raise ValueError unless value is one of those allowed."""
    if value not in allowed:
        raise ValueError(f"{name}: got {value!r}; allowed: {', '.join(map(repr, allowed))}")


def in_range(name: str, value: float, low: float, high: float = float("inf")) -> None:
    """Raise ValueError unless value is finite and low <= value <= high."""
    if not low <= value <= high or value == float("inf"):
        raise ValueError(f"{name}: got {value!r}; allowed: a finite number from {low} to {high}")


def dtype(name: str, tensor: Tensor, allowed: Sequence[torch.dtype] = FLOATS) -> None:
    """Raise TypeError unless the tensor's dtype is one of those allowed."""
    if tensor.dtype not in allowed:
        raise TypeError(f"{name}: got dtype {tensor.dtype}; allowed: {', '.join(map(str, allowed))}")


def shape(name: str, tensor: Tensor, allowed: Sequence[int], meaning: str) -> None:
    """Raise ValueError unless the tensor has exactly this shape; meaning says where the shape comes from."""
    if tuple(tensor.shape) != tuple(allowed):
        raise ValueError(f"{name}: got shape {list(tensor.shape)}; allowed: {list(allowed)}, {meaning}")


def dimensions(name: str, tensor: Tensor, count: int, letters: str) -> None:
    """Raise ValueError unless the tensor has this many dimensions; letters names them, as in "[T, V]"."""
    if tensor.ndim != count:
        raise ValueError(f"{name}: got shape {list(tensor.shape)}; allowed: {letters}")


def has_rows(name: str, tensor: Tensor) -> None:
    """Raise ValueError for a 0-dimensional tensor, which has no last dimension to work along."""
    if tensor.ndim == 0:
        raise ValueError(f"{name}: got a 0-dimensional tensor; allowed: at least one dimension")


def same(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Raise unless two tensors have the same shape (ValueError), dtype (TypeError) and device (ValueError)."""
    shape(name, tensor, other.shape, f"the shape of {other_name}")
    dtype(name, tensor, (other.dtype,))
    same_device(name, tensor, other_name, other)


def same_device(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Raise ValueError unless two tensors are on the same device."""
    if tensor.device != other.device:
        raise ValueError(f"{name}: got device {tensor.device}; allowed: {other.device}, where {other_name} is")


def column_vector(name: str, tensor: Tensor, rows_name: str, rows: Tensor) -> None:
    """Raise unless a tensor is of a float dtype (TypeError), with one entry a column of rows, where those are."""
    dtype(name, tensor)
    shape(name, tensor, rows.shape[-1:], f"one entry a column of {rows_name}")
    same_device(name, tensor, rows_name, rows)


def labels_in_vocabulary(labels: Tensor, vocab: int, ignore_index: int) -> None:
    """Raise ValueError for a label outside [0, vocab) that is not ignore_index. Reads the labels: syncs on a GPU."""
    wrong = (labels != ignore_index) & ((labels < 0) | (labels >= vocab))
    if wrong.any():
        index = int(wrong.nonzero()[0, 0])
        raise ValueError(
            f"labels: got {int(labels[index])} at index {index};"
            f" allowed: 0 to {vocab - 1}, or ignore_index {ignore_index}"
        )


def norm_arguments(x: Tensor, weight: Tensor, eps: float) -> None:
    """What every norm asks: float rows x [..., H], one float weight per column, an eps that is not negative."""
    has_rows("x", x)
    dtype("x", x)
    column_vector("weight", weight, "x", x)
    in_range("eps", eps, 0.0)


def gated_arguments(gate: Tensor, up: Tensor) -> None:
    """What every gated activation asks: two float tensors [..., F] of the same shape, dtype and device."""
    has_rows("gate", gate)
    dtype("gate", gate)
    same("up", up, "gate", gate)


def loss_arguments(
    logits: Tensor,
    labels: Tensor,
    softcap: float,
    label_smoothing: float,
    z_loss: float,
    reduction: str,
    num_items: object,
) -> None:
    """What every cross entropy asks of logits [T, V], labels [T] and its options."""
    dimensions("logits", logits, 2, "[T, V]")
    if logits.shape[1] == 0:
        raise ValueError(f"logits: got shape {list(logits.shape)}; allowed: [T, V] with V at least 1")
    dtype("logits", logits)
    shape("labels", labels, logits.shape[:1], "one label a row of logits")
    dtype("labels", labels, INTEGERS)
    same_device("labels", labels, "logits", logits)
    in_range("softcap", softcap, 0.0)
    in_range("label_smoothing", label_smoothing, 0.0, 1.0)
    in_range("z_loss", z_loss, 0.0)
    one_of("reduction", reduction, ("mean", "sum", "none"))
    if num_items is not None:
        if reduction == "none":
            raise ValueError(f"num_items: got {num_items!r} with reduction='none'; allowed: with 'mean' or 'sum'")
        if isinstance(num_items, Tensor):
            dimensions("num_items", num_items, 0, "a number or a 0-dimensional tensor")
        else:
            in_range("num_items", num_items, 0)  # type: ignore[arg-type]


def rope_arguments(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None) -> None:
    """What rotary embedding asks of q [B, N, S, D], k [B, K, S, D], cos, sin and positions."""
    dimensions("q", q, 4, "[B, N, S, D]")
    dtype("q", q)
    dimensions("k", k, 4, "[B, K, S, D]")
    batch, _, length, width = q.shape
    shape("k", k, (batch, k.shape[1], length, width), "[B, K, S, D] with B, S and D of q")
    dtype("k", k, (q.dtype,))
    same_device("k", k, "q", q)
    if positions is None:
        dimensions("cos", cos, 3, "[B or 1, S, D'], or a table [P, D'] with positions")
        if cos.shape[0] not in (1, batch) or cos.shape[1] != length:
            raise ValueError(f"cos: got shape {list(cos.shape)}; allowed: [{batch} or 1, {length}, D'], B and S of q")
    else:
        dimensions("cos", cos, 2, "a table [P, D'], with positions")
        dimensions("positions", positions, 2, "[B or 1, S]")
        if positions.shape[0] not in (1, batch) or positions.shape[1] != length:
            seen = list(positions.shape)
            raise ValueError(f"positions: got shape {seen}; allowed: [{batch} or 1, {length}], B and S of q")
        dtype("positions", positions, INTEGERS)
        same_device("positions", positions, "q", q)
    if cos.shape[-1] % 2 or not 0 < cos.shape[-1] <= width:
        raise ValueError(f"cos: got {cos.shape[-1]} columns; allowed: an even number from 2 to {width}, the D of q")
    dtype("cos", cos, (q.dtype, torch.float32))
    same_device("cos", cos, "q", q)
    same("sin", sin, "cos", cos)
    for name, constant in (("cos", cos), ("sin", sin)):
        if constant.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name}: got a tensor that requires a gradient; allowed: a constant, as by detach()")


def positions_in_table(positions: Tensor, rows: int) -> None:
    """Raise ValueError for a position outside [0, rows). Reads the positions: syncs on a GPU."""
    wrong = (positions < 0) | (positions >= rows)
    if wrong.any():
        index = tuple(wrong.nonzero()[0].tolist())
        raise ValueError(f"positions: got {int(positions[index])} at index {index}; allowed: 0 to {rows - 1}")


def must_read_labels(labels: Tensor) -> bool:
    """Whether labels are checked by value: on a CPU; on CUDA, where that waits for the device, if UNSLOTH_DEBUG=1.

    Never while compiling, where reading a value would break the graph.
    """
    return not torch.compiler.is_compiling() and (labels.device.type == "cpu" or os.environ.get("UNSLOTH_DEBUG") == "1")
