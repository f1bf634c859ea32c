"""Cross entropy of a linear layer's output against labels."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from math import nan
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from conformance.case import Draw
from conformance.gates import UNIT_FLOAT32
from conformance.spec import (
    Budget,
    Call,
    Drawing,
    Inputs,
    Options,
    Spec,
    Speed,
    change_inputs,
    column_counts,
    mistake,
    nbytes,
)
from conformance.specs.cross_entropy import (
    OPTION_ERRORS,
    OPTIONS,
    counted,
    label_error,
    loss_factor,
    may_be_combined,
)
from unsloth_ref.kernels import linear_cross_entropy
from unsloth_ref.types import IGNORE_INDEX

ROUNDINGS = 1
LARGEST_EXPONENT = 80.0  # beyond it the allowed error is larger than any result
LOGITS_PER_CHUNK = 2**26  # in float64: 512 MiB, so that the shapes of the bench fit on a GPU


def _build(draw: Draw, tokens: int, ignored: int, vocab: int, hidden: int) -> Inputs:
    """`ignored` is in tenths of the tokens; odd seeds have a bias."""
    inputs = {
        "hidden": draw.filled(tokens, hidden),
        "weight": draw.matrix(vocab, hidden),
        "labels": draw.labels(tokens, vocab, ignored / 10),
    }
    return inputs | ({"bias": draw.weight(vocab)} if draw.case.seed % 2 else {})


def _shape(rows: int, columns: int) -> tuple[int, ...]:
    """Columns are classes; the width of hidden depends on their number."""
    return rows, 2, columns, 2 + columns % 7


def _hidden(budget: int) -> st.SearchStrategy[int]:
    """Widths of hidden, mostly small, so that the vocabulary can be large."""
    wide = [size for size in (96, 129, 512, 1024, 2048, 4096) if size <= budget // 256]
    return st.sampled_from([1, 2, 5, 16, 33, 48, *wide])


def truth(hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None = None, **options: Any) -> Tensor:
    """The contract; if there are many logits, in chunks of rows, which the backward pass recomputes."""
    size = max(1, LOGITS_PER_CHUNK // max(1, len(weight)))
    if len(labels) <= size:
        return linear_cross_entropy(hidden, weight, labels, bias, **options)
    if options.get("reduction", "mean") == "mean" and options.get("num_items") is None:
        options["num_items"] = (labels != options.get("ignore_index", IGNORE_INDEX)).sum()
    losses = [
        checkpoint(linear_cross_entropy, *rows, use_reentrant=False, **options)
        for rows in ((hidden[i : i + size], weight, labels[i : i + size], bias) for i in range(0, len(labels), size))
    ]
    return torch.cat(losses) if options.get("reduction") == "none" else torch.stack(losses).sum()


@dataclass(frozen=True)
class _Chunk:
    """Some rows of a call, in float64.

    Attributes:
        hidden: of these rows, 0 in ignored ones.
        loss_error: bound of the error of their losses.
        dx, dx_error: the gradient of their logits, and a bound of its error.
    """

    hidden: Tensor
    loss_error: Tensor
    dx: Tensor
    dx_error: Tensor


def _growth(exponent: Tensor) -> Tensor:
    return torch.expm1(exponent.clamp(max=LARGEST_EXPONENT))


def _logits(call: Call, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Logits, and a bound of their error: a float32 sum of products, rounded once, and again after adding a bias."""
    weight, bias = call.inputs["weight"], call.inputs.get("bias")
    x = hidden @ weight.t()
    error = call.float32_error * (hidden.abs() @ weight.abs().t()) + call.unit * x.abs()
    if bias is not None:
        x = x + bias
        error += call.unit * x.abs()
    return x, error + call.smallest * call.unit


def _capped(call: Call, x: Tensor, error: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """z of the logits x, its error, dz/dx and its error; tanh and its derivative are not linear over the error of x.

    log(1 - tanh^2) has a derivative of at most 2, which bounds the factor by which 1 - tanh^2 may change.
    """
    scale, cap = call.options.get("logit_scale", 1.0), call.options.get("softcap", 0.0)
    slope, growth = torch.full_like(x, scale), torch.zeros_like(x)
    z = scale * x
    if cap:
        slope = scale / torch.cosh((z / cap).clamp(-300, 300)).square()
        growth = _growth(2 * abs(scale) / cap * error)
        z = cap * torch.tanh(z / cap)
    steepest = (slope.abs() * (1 + growth)).clamp(max=abs(scale))
    slope_error = slope.abs() * growth + (call.float32_error * abs(scale) if cap else 0.0)  # 1 - tanh^2 may cancel
    return z, (steepest * error).clamp(max=2 * cap) if cap else steepest * error, slope, slope_error


def _chunks(call: Call) -> Iterator[_Chunk]:
    """All rows, in chunks.

    If logit j has an error of at most e_j, the log-sum-exp has one of at most D = log(sum of p_j exp(e_j)), and p_j
    changes by a factor of at most exp(e_j + D), for errors of any size. Float32 arithmetic adds the errors that it has
    for exact logits, and dx is rounded.
    """
    smoothing, z_loss = call.options.get("label_smoothing", 0.0), call.options.get("z_loss", 0.0)
    dloss = (call.grad_outputs[0] if call.grad_outputs else torch.ones((), dtype=torch.float64)) * loss_factor(call)
    vocab, not_ignored = len(call.inputs["weight"]), counted(call)
    for rows in torch.arange(len(not_ignored), device=not_ignored.device).split(max(1, LOGITS_PER_CHUNK // vocab)):
        kept = not_ignored[rows, None]
        hidden = call.inputs["hidden"][rows].nan_to_num().masked_fill(~kept, 0.0)
        x, error = _logits(call, hidden)
        z, error, slope, slope_error = _capped(call, x, error)
        lse = torch.logsumexp(z, -1, keepdim=True)
        p = torch.exp(z - lse) + 2.0**-102  # float32 may flush p below 2^-126 to 0: one rounding of 2^-102
        shift = torch.logsumexp(z - lse + error, -1, keepdim=True)
        onehot = torch.zeros_like(z).scatter_(1, call.inputs["labels"][rows, None].clamp(0, vocab - 1), 1.0)

        size = 1 + lse.abs() + (p * z.abs()).sum(-1, keepdim=True)
        size = size + (onehot * z.abs()).sum(-1, keepdim=True) + smoothing * z.abs().mean(-1, keepdim=True)
        size = size * (1 + 2 * z_loss * lse.abs())
        loss_error = shift + (1 - smoothing) * (onehot * error).sum(-1, keepdim=True)
        loss_error = loss_error + smoothing * error.mean(-1, keepdim=True) + z_loss * shift * (2 * lse.abs() + shift)

        dz_dlse = 1 + 2 * z_loss * lse
        dz = p * dz_dlse - (1 - smoothing) * onehot - smoothing / vocab
        dz_error = p * _growth(error + shift) * (dz_dlse.abs() + 2 * z_loss * shift) + 2 * z_loss * shift * p
        terms = p * (1 + z.abs() + lse.abs()) * (1 + 2 * z_loss * lse.abs()) + smoothing / vocab
        dz_error = dz_error + call.float32_error * (terms + (1 - smoothing) * onehot)
        grad_loss = torch.where(kept, (dloss[rows, None] if dloss.ndim else dloss).abs(), 0.0)
        dx = dz * slope * grad_loss
        dx_error = (dz_error * (slope.abs() + slope_error) + dz.abs() * slope_error) * grad_loss + call.unit * dx.abs()
        dx_error = torch.where(kept, dx_error + 2 * call.unit * call.smallest * (1 + grad_loss), 0.0)
        yield _Chunk(hidden, torch.where(kept, loss_error + call.float32_error * size, 0.0)[:, 0], dx, dx_error)


def _loss_terms(call: Call) -> Tensor:
    """Of each row or of the total; losses are float32 for every dtype under test."""
    errors = torch.cat([call.inputs["hidden"].new_zeros(0), *(chunk.loss_error for chunk in _chunks(call))])
    errors = errors * loss_factor(call)
    errors = errors if call.options.get("reduction", "mean") == "none" else errors.sum()
    return call.terms_of(errors, ROUNDINGS, UNIT_FLOAT32)


def _hidden_terms(call: Call) -> Tensor:
    """dx @ weight: the error of dx, a sum in float32, and the rounding of a product with dloss."""
    weight, found = call.inputs["weight"], [call.inputs["hidden"].new_zeros(0, call.inputs["hidden"].shape[1])]
    for chunk in _chunks(call):
        error = (chunk.dx_error + call.float32_error * chunk.dx.abs()) @ weight.abs()
        found.append(error + call.unit * (chunk.dx @ weight).abs())
    return call.terms_of(torch.cat(found), ROUNDINGS, call.unit)


def _weight_terms(call: Call) -> Tensor:
    """dx^T @ hidden, with the same errors."""
    error, value = (torch.zeros_like(call.inputs["weight"]) for _ in range(2))
    for chunk in _chunks(call):
        error += (chunk.dx_error + call.float32_error * chunk.dx.abs()).t() @ chunk.hidden.abs()
        value += chunk.dx.t() @ chunk.hidden
    return call.terms_of(error + call.unit * value.abs(), ROUNDINGS, call.unit)


def _bias_terms(call: Call) -> Tensor:
    """The sum of dx, with the same errors."""
    error, value = (torch.zeros_like(call.inputs["bias"]) for _ in range(2))
    for chunk in _chunks(call):
        error += (chunk.dx_error + call.float32_error * chunk.dx.abs()).sum(0)
        value += chunk.dx.sum(0)
    return call.terms_of(error + call.unit * value.abs(), ROUNDINGS, call.unit)


def _bytes(inputs: Inputs) -> tuple[int, int]:
    """Rows that are not ignored and the weight are read once; only the gradient of hidden is written."""
    hidden, labels = nbytes(inputs["hidden"]), inputs["labels"]
    return nbytes(inputs["weight"]) + hidden * int((labels != IGNORE_INDEX).sum()) // max(1, len(labels)), hidden


def _flops(inputs: Inputs, options: Options, grads: Collection[str]) -> tuple[int, int]:
    """For rows that are not ignored: the logits, then one product per gradient of hidden and weight."""
    rows = int((inputs["labels"] != options.get("ignore_index", IGNORE_INDEX)).sum())
    product = 2 * rows * inputs["weight"].numel()
    return product, product * len({"hidden", "weight"}.intersection(grads))


def _every_second_ignored(inputs: Inputs, options: Options) -> tuple[Inputs, Options]:
    """Ignore every second row, starting with the first; without a reduction, so that misplaced rows are visible."""
    labels = torch.arange(len(inputs["labels"]), device=inputs["labels"].device) % len(inputs["weight"])
    return {**inputs, "labels": labels.where(labels % 2 == 1, IGNORE_INDEX)}, {**options, "reduction": "none"}


def _bench(tokens: int, vocab: int, hidden: int, grads: tuple[str, ...], ignored: int = 0) -> dict[str, object]:
    return {"tokens": tokens, "ignored": ignored, "vocab": vocab, "hidden": hidden, "grads": grads}


spec = Spec(
    reference=linear_cross_entropy,
    drawing=Drawing(
        sizes={
            "tokens": lambda budget: st.sampled_from([1, 2, 3, 4]),  # rows are independent: more would test nothing new
            "ignored": lambda budget: st.sampled_from([2, 0, 5, 8]),
            "vocab": column_counts,
            "hidden": _hidden,
        },
        build=_build,
        options=OPTIONS,
        consistent=may_be_combined,
        fills=["randn", "ones", "zeros", "tiny", "wide", "outlier"],
        shape=_shape,
    ),
    outputs=["loss"],
    grads=["hidden", "weight", "bias"],
    budget=Budget(
        roundings=ROUNDINGS,
        terms={"loss": _loss_terms, "hidden": _hidden_terms, "weight": _weight_terms, "bias": _bias_terms},
        truth=truth,
    ),
    rowwise=["hidden", "labels"],
    row_options={"reduction": "none", "num_items": None},
    argument_kinds={
        "num_items is a tensor": lambda i, o: (i, {**o, "num_items": torch.tensor(7, device=i["labels"].device)}),
        "every second one is ignored": _every_second_ignored,
        "all are ignored": change_inputs(lambda i: {"labels": torch.full_like(i["labels"], IGNORE_INDEX)}),
        "labels are int32": change_inputs(lambda i: {"labels": i["labels"].int()}),
    },
    special_values=[nan],  # infinity gives logits of both signs: inf or NaN, depending on the log-sum-exp
    same_bits=False,  # the order of summation of a total may depend on whether gradients are computed with it
    syncs=1,  # to read the number of rows that are not ignored, on which the sizes of all products depend
    errors=[
        mistake("one label too few", ValueError, "labels", lambda i: {"labels": i["labels"][:-1]}, True),
        mistake("labels are a matrix", ValueError, "labels", lambda i: {"labels": i["labels"][None]}, True),
        mistake("labels are floats", TypeError, "labels", lambda i: {"labels": i["labels"].float()}, True),
        mistake("hidden is a cube", ValueError, "hidden", lambda i: {"hidden": i["hidden"][None]}, True),
        mistake("weight is one column short", ValueError, "weight", lambda i: {"weight": i["weight"][:, :-1]}, True),
        mistake("weight is a vector", ValueError, "weight", lambda i: {"weight": i["weight"][0]}, True),
        mistake("there is no class", ValueError, "weight", lambda i: {"weight": i["weight"][:0]}, True),
        mistake("bias is one short", ValueError, "bias", lambda i: {"bias": i["weight"][1:, 0]}, True),
        label_error("a label is the vocabulary's size", lambda i: len(i["weight"])),
        label_error("a label is negative", lambda i: -1),
        mistake("weight is wider than hidden", TypeError, "weight", lambda i: {"weight": i["weight"].double()}),
        *OPTION_ERRORS,
    ],
    speed=Speed(
        shapes={
            "llama-3.2-1b, head frozen": _bench(8192, 128256, 2048, ("hidden",)),
            "llama-3.2-1b, head frozen, half ignored": _bench(8192, 128256, 2048, ("hidden",), ignored=5),
            "llama-3.1-8b, head frozen": _bench(8192, 128256, 4096, ("hidden",)),
            "llama-3.2-1b, head trained": _bench(8192, 128256, 2048, ("hidden", "weight")),
            "qwen-3-8b, head frozen": _bench(16384, 151936, 4096, ("hidden",)),
        },
        bytes=_bytes,
        flops=_flops,
    ),
)
