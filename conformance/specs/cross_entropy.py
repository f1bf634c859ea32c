"""Cross entropy of logits against labels."""

from collections.abc import Callable
from math import inf, nan

import torch
from torch import Tensor

from conformance.case import Case, Draw
from conformance.promises import ExactLaw, Memory
from conformance.spec import (
    Budget,
    Call,
    Drawing,
    ErrorCase,
    Inputs,
    Options,
    Spec,
    Speed,
    column_counts,
    few_row_counts,
    mistake,
    nbytes,
    wrong_option,
)
from unsloth_ref.kernels import cross_entropy
from unsloth_ref.types import IGNORE_INDEX

# Options of both cross entropies, and mistakes in them.
OPTIONS = {
    "reduction": ["mean", "none", "sum"],
    "ignore_index": [IGNORE_INDEX, 2],
    "logit_scale": [1.0, 0.0625],
    "softcap": [0.0, 30.0, 5.0],
    "label_smoothing": [0.0, 0.1],
    "z_loss": [0.0, 1e-4, 0.1],
    "num_items": [None, 7],
}
OPTION_ERRORS = (
    wrong_option("reduction is unknown", "reduction", reduction="avg"),
    wrong_option("softcap is negative", "softcap", softcap=-1.0),
    wrong_option("smoothing is above 1", "label_smoothing", label_smoothing=1.5),
    wrong_option("num_items with reduction none", "num_items", reduction="none", num_items=3),
)


def label_error(what: str, label: Callable[[Inputs], int]) -> ErrorCase:
    """Every label is one that is outside the vocabulary; only a CPU checks that."""

    def change(inputs: Inputs) -> Inputs:
        return {"labels": torch.full_like(inputs["labels"], label(inputs))}

    return mistake(what, ValueError, "labels", change, undefined=True, device="cpu")


def may_be_combined(options: Options) -> bool:
    """num_items divides a total, which reduction "none" does not have."""
    return options.get("reduction") != "none" or options.get("num_items") is None


def half_the_scale(options: Options) -> Options:
    """A logit_scale for logits that are twice as large."""
    return {"logit_scale": options.get("logit_scale", 1.0) / 2}


def _twice_the_items(options: Options) -> Options:
    return {"num_items": 2 * options["num_items"]}


def has_items(options: Options) -> bool:
    """Whether a number of items is given."""
    return options.get("num_items") is not None


def _build(draw: Draw, tokens: int, vocab: int) -> Inputs:
    return {"logits": draw.filled(tokens, vocab), "labels": draw.labels(tokens, vocab)}


def counted(call: Call) -> Tensor:
    """Which rows are not ignored."""
    return call.inputs["labels"] != call.options.get("ignore_index", IGNORE_INDEX)


def _capped(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """Capped logits z, their log-sum-exp, and which rows are not ignored."""
    z = call.inputs["logits"].nan_to_num() * call.options.get("logit_scale", 1.0)
    cap = call.options.get("softcap", 0.0)
    z = cap * torch.tanh(z / cap) if cap else z
    return z, torch.logsumexp(z, -1, keepdim=True), counted(call)[:, None]


def loss_factor(call: Call) -> float | Tensor:
    """The factor of a row's loss in the result."""
    if call.options.get("reduction", "mean") == "none":
        return 1.0
    if call.options.get("num_items") is not None:
        return 1.0 / call.options["num_items"]
    valid = counted(call).sum().clamp(min=1)
    return 1.0 / valid if call.options.get("reduction", "mean") == "mean" else 1.0


def _loss_terms(call: Call) -> Tensor:
    """A loss is a difference of log-sum-exp and logits; exp(z) carries |z| roundings."""
    z, lse, counts = _capped(call)
    p = torch.exp(z - lse)
    target = z.gather(1, call.inputs["labels"].clamp(0, z.shape[1] - 1)[:, None])
    size = 1 + lse.abs() + (p * z.abs()).sum(-1, keepdim=True) + target.abs()
    size = size + call.options.get("label_smoothing", 0.0) * z.abs().mean(-1, keepdim=True)
    size = size + call.options.get("z_loss", 0.0) * 2 * lse.abs() * size
    losses = torch.where(counts, size, 0.0)[:, 0] * loss_factor(call)
    return losses if call.options.get("reduction", "mean") == "none" else losses.sum()


def _logits_terms(call: Call) -> Tensor:
    """dz adds probability, target and smoothing; the probability carries |z| + |lse| roundings of its exponent."""
    z, lse, counts = _capped(call)
    smoothing, z_loss = call.options.get("label_smoothing", 0.0), call.options.get("z_loss", 0.0)
    p = torch.exp(z - lse) + 2.0**-102  # float32 may flush p below 2^-126 to 0: one rounding of 2^-102
    size = p * (1 + z.abs() + lse.abs()) * (1 + 2 * z_loss * lse.abs()) + smoothing / z.shape[1]
    onehot = torch.zeros_like(z).scatter_(1, call.inputs["labels"].clamp(0, z.shape[1] - 1)[:, None], 1 - smoothing)
    dloss = call.grad_outputs[0].abs() * loss_factor(call)
    dloss = dloss[:, None] if dloss.ndim else dloss
    return torch.where(counts, (size + onehot) * dloss, 0.0) * call.options.get("logit_scale", 1.0)


def _bytes(inputs: Inputs) -> tuple[int, int]:
    """Rows that are not ignored are read once; the gradient of every row is written once."""
    logits = nbytes(inputs["logits"])
    return logits * int((inputs["labels"] != IGNORE_INDEX).sum()) // max(1, len(inputs["labels"])), logits


spec = Spec(
    reference=cross_entropy,
    drawing=Drawing(
        sizes={"tokens": few_row_counts, "vocab": column_counts},
        build=_build,
        options=OPTIONS,
        consistent=may_be_combined,
        fills=["randn", "ones", "zeros", "wide", "outlier", "saturated", "confident"],
    ),
    outputs=["loss"],
    grads=["logits"],
    budget=Budget(
        roundings=0,  # everything is float32 until the gradient is rounded once
        terms={"loss": _loss_terms, "logits": _logits_terms},
    ),
    rowwise=["logits", "labels"],
    row_options={"reduction": "none", "num_items": None},
    total_options={"num_items": 7},
    exact_laws={
        "logits twice as large, with half the logit_scale": ExactLaw(
            {"logits": 2.0}, {"logits": 0.5}, options=half_the_scale
        ),
        "twice the num_items": ExactLaw({}, {"loss": 0.5, "logits": 0.5}, options=_twice_the_items, holds=has_items),
        "dloss four times as large": ExactLaw({}, {"logits": 4.0}, grad_outputs=4.0),
    },
    memory=Memory(
        Case((("tokens", 4096), ("vocab", 32768))),
        grads=["logits"],
        saved=lambda inputs: nbytes(inputs["logits"]) + 16 * len(inputs["labels"]),  # the gradient, lse and losses
        working=lambda inputs: 16 * len(inputs["labels"]) * (1 + inputs["logits"].shape[1] // 1024),  # parts of a row
    ),
    argument_kinds={
        "num_items is a tensor": lambda i, o: (i, {**o, "num_items": torch.tensor(7, device=i["labels"].device)}),
    },
    special_values=[nan, -inf],  # -inf excludes a class; +inf gives inf or NaN, depending on the log-sum-exp
    same_bits=False,  # the order of summation of a total may depend on whether the gradient is computed with it
    errors=[
        mistake("one label too few", ValueError, "labels", lambda i: {"labels": i["labels"][:-1]}, undefined=True),
        mistake("labels are a matrix", ValueError, "labels", lambda i: {"labels": i["labels"][None]}, undefined=True),
        mistake("labels are floats", TypeError, "labels", lambda i: {"labels": i["labels"].float()}, undefined=True),
        mistake("logits are a cube", ValueError, "logits", lambda i: {"logits": i["logits"][None]}, undefined=True),
        label_error("a label is the vocabulary's size", lambda i: i["logits"].shape[1]),
        label_error("a label is negative", lambda i: -1),
        *OPTION_ERRORS,
    ],
    speed=Speed(
        shapes={
            "llama-2-7b": {"tokens": 8192, "vocab": 32000},
            "llama-3.1-8b": {"tokens": 4096, "vocab": 128256},
            "qwen-3-8b": {"tokens": 4096, "vocab": 151936},
            "gemma-2-9b": {"tokens": 2048, "vocab": 256000},
        },
        bytes=_bytes,
    ),
)
