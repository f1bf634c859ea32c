"""Cross entropy of a linear layer's output against labels."""

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from math import log2, nan
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from conformance.case import Draw
from conformance.spec import Call, ErrorCase, Inputs, Options, Spec, columns, nbytes
from unsloth_ref.kernels import linear_cross_entropy
from unsloth_ref.types import IGNORE_INDEX

ROUNDINGS = 1
FLOAT32 = 2.0**-24
LARGE = 80.0  # of an exponent: what it allows is more than any number
AT_ONCE = 2**26  # logits in float64, so that the shapes of the bench fit a card


def _build(draw: Draw, tokens: int, ignored: int, vocab: int, hidden: int) -> Inputs:
    """So many tenths of the tokens are ignored; a bias under odd seeds."""
    inputs = {
        "hidden": draw.rows(tokens, hidden),
        "weight": draw.matrix(vocab, hidden),
        "labels": draw.labels(tokens, vocab, ignored / 10),
    }
    return inputs | ({"bias": draw.weight(vocab)} if draw.case.seed % 2 else {})


def _shape(rows: int, columns: int) -> tuple[int, ...]:
    """Columns as classes; the width of hidden changes with them."""
    return rows, 2, columns, 2 + columns % 7


def _hidden(budget: int) -> st.SearchStrategy[int]:
    """A number of columns of hidden, mostly so few that the vocabulary gets its share of the elements."""
    wide = [size for size in (96, 129, 512, 1024, 2048, 4096) if size <= budget // 256]
    return st.sampled_from([1, 2, 5, 16, 33, 48, *wide])


def truth(hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None = None, **options: Any) -> Tensor:
    """The contract, some rows at a time where there are many logits; each time computed again on the way back."""
    size = max(1, AT_ONCE // max(1, len(weight)))
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
class _Rows:
    """Some rows of a call, in float64.

    Attributes:
        hidden: theirs, 0 where they do not count.
        loss_error: by how much their losses may be off.
        dx, dx_error: the gradient of their logits, and by how much it may be off.
    """

    hidden: Tensor
    loss_error: Tensor
    dx: Tensor
    dx_error: Tensor


def _counted(call: Call) -> Tensor:
    """Which rows count."""
    return call.inputs["labels"] != call.options.get("ignore_index", IGNORE_INDEX)


def _share(call: Call) -> float | Tensor:
    """What a row's loss is multiplied by in the result."""
    if call.options.get("reduction", "mean") == "none":
        return 1.0
    if call.options.get("num_items") is not None:
        return 1.0 / call.options["num_items"]
    valid = _counted(call).sum().clamp(min=1)
    return 1.0 / valid if call.options.get("reduction", "mean") == "mean" else 1.0


def _float32(call: Call) -> float:
    """What float32 arithmetic may cost a term: as much as gate G1 grants one."""
    return 2 * max(1.0, log2(max(1, *(tensor.numel() for tensor in call.inputs.values())))) * FLOAT32


def _growth(exponent: Tensor) -> Tensor:
    return torch.expm1(exponent.clamp(max=LARGE))


def _logits(call: Call, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Logits, and how far rounded ones may be off: a sum of products in float32, rounded once, or before a bias too."""
    weight, bias = call.inputs["weight"], call.inputs.get("bias")
    x = hidden @ weight.t()
    error = _float32(call) * (hidden.abs() @ weight.abs().t()) + call.unit * x.abs()
    if bias is not None:
        x = x + bias
        error += call.unit * x.abs()
    return x, error + call.smallest * call.unit


def _capped(call: Call, x: Tensor, error: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """z of the logits x and its error, and dz/dx and its error; neither tanh nor its derivative is linear in between.

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
    slope_error = slope.abs() * growth + (_float32(call) * abs(scale) if cap else 0.0)  # 1 - tanh^2 may cancel
    return z, (steepest * error).clamp(max=2 * cap) if cap else steepest * error, slope, slope_error


def _rows(call: Call) -> Iterator[_Rows]:
    """All rows, some at a time.

    With logits off by e_j the log-sum-exp is off by at most D = log(sum of p_j exp(e_j)), and p_j by a factor of at
    most exp(e_j + D), however large they are. On top comes float32 arithmetic as for logits that are given, and the
    rounding of dx.
    """
    smoothing, z_loss = call.options.get("label_smoothing", 0.0), call.options.get("z_loss", 0.0)
    dloss = (call.grad_outputs[0] if call.grad_outputs else torch.ones((), dtype=torch.float64)) * _share(call)
    vocab, counts = len(call.inputs["weight"]), _counted(call)
    for rows in torch.arange(len(counts), device=counts.device).split(max(1, AT_ONCE // vocab)):
        kept = counts[rows, None]
        hidden = call.inputs["hidden"][rows].nan_to_num().masked_fill(~kept, 0.0)
        x, error = _logits(call, hidden)
        z, error, slope, slope_error = _capped(call, x, error)
        lse = torch.logsumexp(z, -1, keepdim=True)
        p = torch.exp(z - lse) + 2.0**-102  # may be 0 below float32's normal numbers: 2^-126 is one rounding of 2^-102
        shift = torch.logsumexp(z - lse + error, -1, keepdim=True)
        onehot = torch.zeros_like(z).scatter_(1, call.inputs["labels"][rows, None].clamp(0, vocab - 1), 1.0)

        size = 1 + lse.abs() + (p * z.abs()).sum(-1, keepdim=True)
        size = size + (onehot * z.abs()).sum(-1, keepdim=True) + smoothing * z.abs().mean(-1, keepdim=True)
        size = size * (1 + 2 * z_loss * lse.abs())
        wrong = shift + (1 - smoothing) * (onehot * error).sum(-1, keepdim=True)
        wrong = wrong + smoothing * error.mean(-1, keepdim=True) + z_loss * shift * (2 * lse.abs() + shift)

        steep = 1 + 2 * z_loss * lse
        dz = p * steep - (1 - smoothing) * onehot - smoothing / vocab
        dz_error = p * _growth(error + shift) * (steep.abs() + 2 * z_loss * shift) + 2 * z_loss * shift * p
        terms = p * (1 + z.abs() + lse.abs()) * (1 + 2 * z_loss * lse.abs()) + smoothing / vocab
        dz_error = dz_error + _float32(call) * (terms + (1 - smoothing) * onehot)
        given = torch.where(kept, (dloss[rows, None] if dloss.ndim else dloss).abs(), 0.0)
        dx = dz * slope * given
        dx_error = (dz_error * (slope.abs() + slope_error) + dz.abs() * slope_error) * given + call.unit * dx.abs()
        dx_error = torch.where(kept, dx_error + 2 * call.unit * call.smallest * (1 + given), 0.0)
        yield _Rows(hidden, torch.where(kept, wrong + _float32(call) * size, 0.0)[:, 0], dx, dx_error)


def _terms(call: Call, error: Tensor, unit: float) -> Tensor:
    """The size of terms of which gate G1 grants this error to a result of this unit roundoff."""
    return error / (ROUNDINGS * unit + _float32(call))


def _loss_terms(call: Call) -> Tensor:
    """Of each row or of all; losses are float32 whatever the dtype under test."""
    errors = torch.cat([call.inputs["hidden"].new_zeros(0), *(rows.loss_error for rows in _rows(call))]) * _share(call)
    return _terms(call, errors if call.options.get("reduction", "mean") == "none" else errors.sum(), FLOAT32)


def _hidden_terms(call: Call) -> Tensor:
    """dx @ weight: what dx is off by, a sum in float32, and the rounding of a product with dloss."""
    weight, found = call.inputs["weight"], [call.inputs["hidden"].new_zeros(0, call.inputs["hidden"].shape[1])]
    for rows in _rows(call):
        error = (rows.dx_error + _float32(call) * rows.dx.abs()) @ weight.abs()
        found.append(error + call.unit * (rows.dx @ weight).abs())
    return _terms(call, torch.cat(found), call.unit)


def _weight_terms(call: Call) -> Tensor:
    """dx^T @ hidden, likewise."""
    error, value = (torch.zeros_like(call.inputs["weight"]) for _ in range(2))
    for rows in _rows(call):
        error += (rows.dx_error + _float32(call) * rows.dx.abs()).t() @ rows.hidden.abs()
        value += rows.dx.t() @ rows.hidden
    return _terms(call, error + call.unit * value.abs(), call.unit)


def _bias_terms(call: Call) -> Tensor:
    """The sum of dx, likewise."""
    error, value = (torch.zeros_like(call.inputs["bias"]) for _ in range(2))
    for rows in _rows(call):
        error += (rows.dx_error + _float32(call) * rows.dx.abs()).sum(0)
        value += rows.dx.sum(0)
    return _terms(call, error + call.unit * value.abs(), call.unit)


def _bytes(inputs: Inputs) -> tuple[int, int]:
    """Rows that count and the weight are read once; the gradient of hidden is written. A frozen weight gets none."""
    hidden, labels = nbytes(inputs["hidden"]), inputs["labels"]
    return nbytes(inputs["weight"]) + hidden * int((labels != IGNORE_INDEX).sum()) // max(1, len(labels)), hidden


def _flops(inputs: Inputs, options: Options, grads: Collection[str]) -> tuple[int, int]:
    """Of rows that count: the logits, then a product each for the gradients of hidden and weight."""
    counted = int((inputs["labels"] != options.get("ignore_index", IGNORE_INDEX)).sum())
    product = 2 * counted * inputs["weight"].numel()
    return product, product * len({"hidden", "weight"}.intersection(grads))


def _every_second_ignored(inputs: Inputs, options: Options) -> tuple[Inputs, Options]:
    """From the first one on, so that each row that counts has another place among those that do; row by row."""
    labels = torch.arange(len(inputs["labels"]), device=inputs["labels"].device) % len(inputs["weight"])
    return {**inputs, "labels": labels.where(labels % 2 == 1, IGNORE_INDEX)}, {**options, "reduction": "none"}


def _senseless(
    what: str, raises: type[Exception], names: str, change: Callable[[Inputs], Inputs], device: str | None = None
) -> ErrorCase:
    """A mistake in the tensors."""

    def changed(inputs: Inputs, options: Options) -> tuple[Inputs, Options]:
        return {**inputs, **change(inputs)}, options

    return ErrorCase(what, changed, raises, names, senseless=True, device=device)


def _option(what: str, names: str, **options: object) -> ErrorCase:
    """An option out of its range."""
    return ErrorCase(what, lambda i, o: (i, {**o, **options}), ValueError, names)


spec = Spec(
    op="linear_cross_entropy",
    sizes={
        "tokens": lambda budget: st.sampled_from([1, 2, 3, 4]),  # each its own: more would say nothing new
        "ignored": lambda budget: st.sampled_from([2, 0, 5, 8]),
        "vocab": columns,
        "hidden": _hidden,
    },
    options={
        "reduction": ["mean", "none", "sum"],
        "ignore_index": [IGNORE_INDEX, 2],
        "logit_scale": [1.0, 0.0625],
        "softcap": [0.0, 30.0, 5.0],
        "label_smoothing": [0.0, 0.1],
        "z_loss": [0.0, 1e-4, 0.1],
        "num_items": [None, 7],
    },
    fills=["randn", "ones", "zeros", "tiny", "wide", "outlier"],
    build=_build,
    shape=_shape,
    outputs=["loss"],
    grads=["hidden", "weight", "bias"],
    rowwise=["hidden", "labels"],
    row_options={"reduction": "none", "num_items": None},
    consistent=lambda options: options.get("reduction") != "none" or options.get("num_items") is None,
    specials=[nan],  # an infinity makes logits of both signs: inf or NaN, as the log-sum-exp is written
    same_bits=False,  # a total sums in another order where it computes its gradients with it
    waits=1,  # for the number of rows that are not ignored, which the sizes of all products follow
    roundings=ROUNDINGS,
    terms={"loss": _loss_terms, "hidden": _hidden_terms, "weight": _weight_terms, "bias": _bias_terms},
    kinds={
        "num_items is a tensor": lambda i, o: (i, {**o, "num_items": torch.tensor(7, device=i["labels"].device)}),
        "every second one is ignored": _every_second_ignored,
        "all are ignored": lambda i, o: ({**i, "labels": torch.full_like(i["labels"], IGNORE_INDEX)}, o),
        "labels are int32": lambda i, o: ({**i, "labels": i["labels"].int()}, o),
    },
    bytes=_bytes,
    flops=_flops,
    truth=truth,
    bench={
        "llama-3.2-1b, head frozen": {
            "tokens": 8192,
            "ignored": 0,
            "vocab": 128256,
            "hidden": 2048,
            "grads": ("hidden",),
        },
        "llama-3.2-1b, head frozen, half ignored": {
            "tokens": 8192,
            "ignored": 5,
            "vocab": 128256,
            "hidden": 2048,
            "grads": ("hidden",),
        },
        "llama-3.1-8b, head frozen": {
            "tokens": 8192,
            "ignored": 0,
            "vocab": 128256,
            "hidden": 4096,
            "grads": ("hidden",),
        },
        "llama-3.2-1b, head trained": {
            "tokens": 8192,
            "ignored": 0,
            "vocab": 128256,
            "hidden": 2048,
            "grads": ("hidden", "weight"),
        },
        "qwen-3-8b, head frozen": {
            "tokens": 16384,
            "ignored": 0,
            "vocab": 151936,
            "hidden": 4096,
            "grads": ("hidden",),
        },
    },
    errors=[
        _senseless("one label too few", ValueError, "labels", lambda i: {"labels": i["labels"][:-1]}),
        _senseless("labels are a matrix", ValueError, "labels", lambda i: {"labels": i["labels"][None]}),
        _senseless("labels are floats", TypeError, "labels", lambda i: {"labels": i["labels"].float()}),
        _senseless("hidden is a cube", ValueError, "hidden", lambda i: {"hidden": i["hidden"][None]}),
        _senseless("weight is one column short", ValueError, "weight", lambda i: {"weight": i["weight"][:, :-1]}),
        _senseless("weight is a vector", ValueError, "weight", lambda i: {"weight": i["weight"][0]}),
        _senseless("there is no class", ValueError, "weight", lambda i: {"weight": i["weight"][:0]}),
        _senseless("bias is one short", ValueError, "bias", lambda i: {"bias": i["weight"][1:, 0]}),
        _senseless(
            "a label is the vocabulary's size",
            ValueError,
            "labels",
            lambda i: {"labels": torch.full_like(i["labels"], len(i["weight"]))},
            device="cpu",
        ),
        _senseless(
            "a label is negative",
            ValueError,
            "labels",
            lambda i: {"labels": torch.full_like(i["labels"], -1)},
            device="cpu",
        ),
        ErrorCase(
            "weight is wider than hidden", lambda i, o: ({**i, "weight": i["weight"].double()}, o), TypeError, "weight"
        ),
        _option("reduction is unknown", "reduction", reduction="avg"),
        _option("softcap is negative", "softcap", softcap=-1.0),
        _option("smoothing is above 1", "label_smoothing", label_smoothing=1.5),
        _option("num_items with reduction none", "num_items", reduction="none", num_items=3),
    ],
)
