"""The contract's argument checks, one function per kind of mistake; both backends call them and raise the same errors.

Each message names the argument, the value seen and the values allowed.
"""

import os
from collections.abc import Sequence
from math import inf

import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (torch.int32, torch.int64)


def counted(number: int, noun: str) -> str:
    """A number and its noun, such as "1 row" and "2 rows"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def one_of(name: str, value: object, allowed: Sequence[object]) -> None:
    """Raise ValueError unless the value is one of the allowed values."""
    if value not in allowed:
        raise ValueError(f"{name}: got {value!r}; allowed: {', '.join(map(repr, allowed))}")


def in_range(name: str, value: float, low: float, high: float = inf) -> None:
    """Raise ValueError unless value is finite and low <= value <= high."""
    if not low <= value <= high or value == inf:
        end = "" if high == inf else f" to {high}"
        raise ValueError(f"{name}: got {value!r}; allowed: a finite number from {low}{end}")


def dtype(name: str, tensor: Tensor, allowed: Sequence[torch.dtype] = FLOATS) -> None:
    """Raise TypeError unless the tensor's dtype is one of the allowed dtypes."""
    if tensor.dtype not in allowed:
        raise TypeError(f"{name}: got dtype {tensor.dtype}; allowed: {', '.join(map(str, allowed))}")


def shape(name: str, tensor: Tensor, allowed: Sequence[int], meaning: str) -> None:
    """Raise ValueError unless the tensor has exactly this shape; meaning explains where the shape comes from."""
    if tuple(tensor.shape) != tuple(allowed):
        raise ValueError(f"{name}: got shape {list(tensor.shape)}; allowed: {list(allowed)}, {meaning}")


def dimensions(name: str, tensor: Tensor, count: int, letters: str) -> None:
    """Raise ValueError unless the tensor has this many dimensions; letters name them, as in "[T, V]"."""
    if tensor.ndim != count:
        raise ValueError(f"{name}: got shape {list(tensor.shape)}; allowed: {letters}")


def has_rows(name: str, tensor: Tensor) -> None:
    """Raise ValueError for a 0-dimensional tensor, which has no last dimension."""
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
    """Raise unless a tensor has a float dtype (TypeError) and one entry per column of rows, on the device of rows."""
    dtype(name, tensor)
    shape(name, tensor, rows.shape[-1:], f"one entry per column of {rows_name}")
    same_device(name, tensor, rows_name, rows)


def labels_in_vocabulary(labels: Tensor, vocab: int, ignore_index: int) -> None:
    """Raise ValueError for a label outside [0, vocab) that is not ignore_index. Synchronises a GPU."""
    wrong = (labels != ignore_index) & ((labels < 0) | (labels >= vocab))
    if wrong.any():
        index = int(wrong.nonzero()[0, 0])
        raise ValueError(
            f"labels: got {int(labels[index])} at index {index};"
            f" allowed: 0 to {vocab - 1}, or ignore_index {ignore_index}"
        )


def norm_arguments(x: Tensor, weight: Tensor, eps: float) -> None:
    """Check the arguments of a norm: float rows x [..., H], one float weight per column, an eps of at least 0."""
    has_rows("x", x)
    dtype("x", x)
    column_vector("weight", weight, "x", x)
    in_range("eps", eps, 0.0)


def gated_norm_arguments(x: Tensor, gate: Tensor, weight: Tensor, eps: float, group_size: int | None) -> None:
    """Check the arguments of a norm with a gate, whose groups of columns have this size."""
    norm_arguments(x, weight, eps)
    same("gate", gate, "x", x)
    columns = x.shape[-1]
    if group_size is not None and (group_size < 1 or columns % group_size):
        raise ValueError(f"group_size: got {group_size}; allowed: a divisor of {columns}, the H of x, or None")


def gated_arguments(gate: Tensor, up: Tensor) -> None:
    """Check the arguments of a gated activation: two float tensors [..., F] of the same shape, dtype and device."""
    has_rows("gate", gate)
    dtype("gate", gate)
    same("up", up, "gate", gate)


def fused_gated_arguments(gate_up: Tensor, alpha: float, limit: float | None, offset: float) -> None:
    """Check the arguments of a gated activation of one float tensor [..., 2F]."""
    has_rows("gate_up", gate_up)
    dtype("gate_up", gate_up)
    if gate_up.shape[-1] % 2:
        raise ValueError(f"gate_up: got shape {list(gate_up.shape)}; allowed: [..., 2F], an even number of columns")
    gate_options(alpha, limit, offset)


def gate_options(alpha: float, limit: float | None, offset: float) -> None:
    """Check the options of a clamped gate."""
    in_range("alpha", alpha, 0.0)
    if limit is not None:
        in_range("limit", limit, 0.0)
    if not -inf < offset < inf:  # Dynamo traces comparisons of an option that changes, not isfinite
        raise ValueError(f"offset: got {offset!r}; allowed: a finite number")


def reduction_arguments(reduction: str, num_items: object) -> None:
    """Check how a cross entropy sums up the losses of its rows."""
    one_of("reduction", reduction, ("mean", "sum", "none"))
    if num_items is not None:
        if reduction == "none":
            raise ValueError(f"num_items: got {num_items!r} with reduction='none'; allowed: with 'mean' or 'sum'")
        if isinstance(num_items, Tensor):
            dimensions("num_items", num_items, 0, "a number or a 0-dimensional tensor")
        else:
            in_range("num_items", num_items, 0)  # type: ignore[arg-type]


def loss_arguments(logits: Tensor, labels: Tensor, softcap: float, label_smoothing: float, z_loss: float) -> None:
    """Check logits [T, V], labels [T] and the options of a cross entropy."""
    dimensions("logits", logits, 2, "[T, V]")
    if logits.shape[1] == 0:
        raise ValueError(f"logits: got shape {list(logits.shape)}; allowed: [T, V] with V at least 1")
    dtype("logits", logits)
    _label_arguments("logits", logits, labels)
    _loss_options(softcap, label_smoothing, z_loss)


def linear_loss_arguments(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    softcap: float,
    label_smoothing: float,
    z_loss: float,
) -> None:
    """Check hidden [T, H], weight [V, H], labels [T], bias [V] and the options of a linear layer's cross entropy."""
    dimensions("hidden", hidden, 2, "[T, H]")
    dtype("hidden", hidden)
    dimensions("weight", weight, 2, "[V, H]")
    if weight.shape[0] == 0 or weight.shape[1] != hidden.shape[1]:
        seen = list(weight.shape)
        raise ValueError(f"weight: got shape {seen}; allowed: [V, {hidden.shape[1]}], the H of hidden, V at least 1")
    dtype("weight", weight, (hidden.dtype,))
    same_device("weight", weight, "hidden", hidden)
    _label_arguments("hidden", hidden, labels)
    if bias is not None:
        shape("bias", bias, weight.shape[:1], "one entry per row of weight")
        dtype("bias", bias, (hidden.dtype,))
        same_device("bias", bias, "hidden", hidden)
    _loss_options(softcap, label_smoothing, z_loss)


def _label_arguments(rows_name: str, rows: Tensor, labels: Tensor) -> None:
    shape("labels", labels, rows.shape[:1], f"one label per row of {rows_name}")
    dtype("labels", labels, INTEGERS)
    same_device("labels", labels, rows_name, rows)


def _loss_options(softcap: float, label_smoothing: float, z_loss: float) -> None:
    in_range("softcap", softcap, 0.0)
    in_range("label_smoothing", label_smoothing, 0.0, 1.0)
    in_range("z_loss", z_loss, 0.0)


def rope_arguments(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None) -> None:
    """Check q [B, N, S, D], k [B, K, S, D], cos, sin and positions of a rotary embedding."""
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
        raise ValueError(
            f"cos: got {counted(cos.shape[-1], 'column')}; allowed: an even number from 2 to {width}, the D of q"
        )
    dtype("cos", cos, (q.dtype, torch.float32))
    same_device("cos", cos, "q", q)
    same("sin", sin, "cos", cos)
    for name, constant in (("cos", cos), ("sin", sin)):
        if constant.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name}: got a tensor that requires a gradient; allowed: a constant; detach() makes one")


def head_norm_arguments(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    eps: float,
) -> None:
    """Check the arguments of a rotary embedding whose heads are normalised first, with weights [D]."""
    rope_arguments(q, k, cos, sin, positions)
    column_vector("q_weight", q_weight, "q", q)
    column_vector("k_weight", k_weight, "k", k)
    in_range("eps", eps, 0.0)


def positions_in_table(positions: Tensor, rows: int) -> None:
    """Raise ValueError for a position outside [0, rows). Synchronises a GPU."""
    wrong = (positions < 0) | (positions >= rows)
    if wrong.any():
        index = tuple(wrong.nonzero()[0].tolist())
        raise ValueError(f"positions: got {int(positions[index])} at index {index}; allowed: 0 to {rows - 1}")


def values_are_checked(tensor: Tensor) -> bool:
    """Whether the values of labels, positions or lengths are checked: on a CPU, and on CUDA if UNSLOTH_DEBUG=1.

    On CUDA reading them waits for the device. They are never read under torch.compile, where that breaks the graph.
    """
    return not torch.compiler.is_compiling() and (tensor.device.type == "cpu" or os.environ.get("UNSLOTH_DEBUG") == "1")
