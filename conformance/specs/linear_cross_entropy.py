"""Cross entropy of a linear layer's output against labels."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import reduce
from math import nan
from operator import add
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from conformance.case import Case, Draw
from conformance.promises import BLAS, ExactLaw, Memory
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
from conformance.specs._mistakes import one_column_short
from conformance.specs.cross_entropy import (
    OPTION_ERRORS,
    OPTIONS,
    counted,
    label_error,
    loss_factor,
    may_be_combined,
)
from conformance.tolerances.bounds import SHARED, Bound, exact, joined, product, total
from unsloth_ref.accuracy import float32_error
from unsloth_ref.kernels import linear_cross_entropy
from unsloth_ref.types import IGNORE_INDEX

LOGITS_BYTES = 2**29  # that a call may have at once
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
    """Some rows of a call.

    Attributes:
        hidden: of these rows, 0 in ignored ones.
        loss: their losses; the value is not computed.
        dx: the gradient of their logits.
    """

    hidden: Bound
    loss: Bound
    dx: Bound


def _growth(exponent: Tensor) -> Tensor:
    return torch.expm1(exponent.clamp(max=LARGEST_EXPONENT))


def _logits(call: Call, hidden: Bound) -> Bound:
    """A float32 sum of products, rounded once, and again after adding a bias."""
    x = product(hidden, exact(call.inputs["weight"]).t(), call.elements).rounded(call.unit, call.smallest)
    bias = call.inputs.get("bias")
    return x if bias is None else (x + exact(bias.expand_as(x.value))).rounded(call.unit, 0.0)


def _capped(call: Call, x: Bound) -> tuple[Bound, Bound]:
    """z of the logits x, and dz/dx; tanh and its derivative are not linear over the error of x.

    log(1 - tanh^2) has a derivative of at most 2, which bounds the factor by which 1 - tanh^2 may change.
    """
    scale, cap = call.options.get("logit_scale", 1.0), call.options.get("softcap", 0.0)
    if not cap:
        return x.times(scale), exact(torch.full_like(x.value, scale))
    slope = scale / torch.cosh((scale * x.value / cap).clamp(-300, 300)).square()
    growth = _growth(2 * abs(scale) / cap * x.error)
    steepest = (slope.abs() * (1 + growth)).clamp(max=abs(scale))
    z = Bound(
        cap * torch.tanh(scale * x.value / cap),
        (steepest * x.error).clamp(max=2 * cap),
        (steepest.square() * x.square).clamp(max=cap**2),
    )
    # 1 - tanh^2 may cancel in float32
    error = slope.abs() * growth + float32_error(call.elements) * abs(scale)
    square = (2 * scale / cap * slope).square() * x.square + (SHARED * scale) ** 2
    return z, Bound(slope, error, square)


def _chunks(call: Call) -> Iterator[_Chunk]:
    """The rows of the call, in chunks.

    If logit j has an error of at most e_j, the log-sum-exp has one of at most D = log(sum of p_j exp(e_j)), and p_j
    changes by a factor of at most exp(e_j + D), for errors of any size. Float32 arithmetic adds the errors that it has
    for exact logits, and dx is rounded. Mean squares follow the first derivatives: of the log-sum-exp the p_j.
    """
    smoothing, z_loss = call.options.get("label_smoothing", 0.0), call.options.get("z_loss", 0.0)
    dloss = (call.grad_outputs[0] if call.grad_outputs else torch.ones((), dtype=torch.float64)) * loss_factor(call)
    vocab, not_ignored, in_float32 = len(call.inputs["weight"]), counted(call), float32_error(call.elements)
    for rows in torch.arange(len(not_ignored), device=not_ignored.device).split(max(1, LOGITS_PER_CHUNK // vocab)):
        kept = not_ignored[rows, None]
        hidden = exact(call.inputs["hidden"][rows].nan_to_num().masked_fill(~kept, 0.0))
        z, slope = _capped(call, _logits(call, hidden))
        lse = torch.logsumexp(z.value, -1, keepdim=True)
        p = torch.exp(z.value - lse) + 2.0**-102  # float32 may flush p below 2^-126 to 0: one rounding of 2^-102
        shift = torch.logsumexp(z.value - lse + z.error, -1, keepdim=True)
        shift_square = (p.square() * z.square).sum(-1, keepdim=True)
        onehot = torch.zeros_like(p).scatter_(1, call.inputs["labels"][rows, None].clamp(0, vocab - 1), 1.0)

        size = 1 + lse.abs() + (p * z.value.abs()).sum(-1, keepdim=True)
        size = size + (onehot * z.value.abs()).sum(-1, keepdim=True) + smoothing * z.value.abs().mean(-1, keepdim=True)
        size = size * (1 + 2 * z_loss * lse.abs())
        error = shift + (1 - smoothing) * (onehot * z.error).sum(-1, keepdim=True)
        error = error + smoothing * z.error.mean(-1, keepdim=True) + z_loss * shift * (2 * lse.abs() + shift)
        dz_dlse = 1 + 2 * z_loss * lse
        dz = p * dz_dlse - (1 - smoothing) * onehot - smoothing / vocab
        square = (dz.square() * z.square).sum(-1, keepdim=True) + (SHARED * size) ** 2
        loss = Bound(lse, error + in_float32 * size, square)

        error = p * _growth(z.error + shift) * (dz_dlse.abs() + 2 * z_loss * shift) + 2 * z_loss * shift * p
        terms = p * (1 + z.value.abs() + lse.abs()) * (1 + 2 * z_loss * lse.abs()) + smoothing / vocab
        terms = terms + (1 - smoothing) * onehot
        square = (p * dz_dlse).square() * (z.square + shift_square) + (2 * z_loss * p).square() * shift_square
        dz = Bound(dz, error + in_float32 * terms, square + (SHARED * terms) ** 2)
        grad_loss = torch.where(kept, (dloss[rows, None] if dloss.ndim else dloss).abs(), 0.0)
        dx = (dz * slope).times(grad_loss).rounded(call.unit, 2 * call.smallest * (1 + grad_loss))
        yield _Chunk(hidden, loss.times(kept.double()).reshape(rows.shape), dx.times(kept.double()))


def _loss_bound(call: Call) -> Bound:
    """The bound of each row's loss, or of the total; losses are float32 for every dtype under test."""
    losses = joined(chunk.loss for chunk in _chunks(call)).times(loss_factor(call))
    if call.options.get("reduction", "mean") == "none":
        return losses
    return Bound(losses.value.sum(), losses.error.sum(), losses.square.sum())


def _hidden_bound(call: Call) -> Bound:
    """dx @ weight, and the rounding of a product with dloss."""
    weight = exact(call.inputs["weight"])
    found = joined(product(chunk.dx, weight, call.elements) for chunk in _chunks(call))
    return found.rounded(call.unit, call.smallest)


def _weight_bound(call: Call) -> Bound:
    """dx^T @ hidden, with the same rounding."""
    found = reduce(add, (product(chunk.dx.t(), chunk.hidden, call.elements) for chunk in _chunks(call)))
    return found.rounded(call.unit, call.smallest)


def _bias_bound(call: Call) -> Bound:
    """The sum of dx, with the same rounding."""
    found = reduce(add, (total(chunk.dx, call.elements) for chunk in _chunks(call)))
    return found.rounded(call.unit, call.smallest)


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
        alike=["ones", "zeros", "tiny"],  # equal logits have equal probabilities, whose rounding all gradients share
    ),
    outputs=["loss"],
    grads=["hidden", "weight", "bias"],
    budget=Budget(
        roundings=1,  # that a row may share: of the only logit or gradient of a logit that matters
        bounds={"loss": _loss_bound, "hidden": _hidden_bound, "weight": _weight_bound, "bias": _bias_bound},
        truth=truth,
    ),
    rowwise=["hidden", "labels"],
    row_options={"reduction": "none", "num_items": None},
    total_options={"num_items": 7},
    bits_vary=BLAS,
    exact_laws={
        "hidden twice and weight half as large": ExactLaw(
            {"hidden": 2.0, "weight": 0.5}, {"hidden": 0.5, "weight": 2.0}
        ),
        "dloss four times as large": ExactLaw({}, {"hidden": 4.0, "weight": 4.0, "bias": 4.0}, grad_outputs=4.0),
    },
    memory=Memory(
        Case((("tokens", 8192), ("ignored", 2), ("vocab", 65536), ("hidden", 512))),
        grads=["hidden", "weight"],
        # Both gradients, that of the weight in float32; the log-sum-exp and the index of each row.
        saved=lambda i: nbytes(i["hidden"]) + 4 * i["weight"].numel() + 32 * len(i["labels"]),
        # The logits of some rows, far fewer than there are; the rows themselves; both gradients if computed later.
        working=lambda i: LOGITS_BYTES + 2 * nbytes(i["hidden"]) + 4 * i["weight"].numel() + 32 * len(i["labels"]),
    ),
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
        mistake("one label too few", ValueError, "labels", lambda i: {"labels": i["labels"][:-1]}, undefined=True),
        mistake("labels are a matrix", ValueError, "labels", lambda i: {"labels": i["labels"][None]}, undefined=True),
        mistake("labels are floats", TypeError, "labels", lambda i: {"labels": i["labels"].float()}, undefined=True),
        mistake("hidden is a cube", ValueError, "hidden", lambda i: {"hidden": i["hidden"][None]}, undefined=True),
        one_column_short("weight"),
        mistake("weight is a vector", ValueError, "weight", lambda i: {"weight": i["weight"][0]}, undefined=True),
        mistake("there is no class", ValueError, "weight", lambda i: {"weight": i["weight"][:0]}, undefined=True),
        mistake("bias is one short", ValueError, "bias", lambda i: {"bias": i["weight"][1:, 0]}, undefined=True),
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
