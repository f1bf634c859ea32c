"""Cross entropy of logits against labels."""

from math import inf, nan

import torch
from torch import Tensor

from conformance.case import Draw
from conformance.spec import Call, ErrorCase, Inputs, Spec, columns, few_rows, nbytes
from unsloth_ref.types import IGNORE_INDEX


def _build(draw: Draw, tokens: int, vocab: int) -> Inputs:
    return {"logits": draw.rows(tokens, vocab), "labels": draw.labels(tokens, vocab)}


def _counted(call: Call) -> Tensor:
    """Which rows count."""
    return call.inputs["labels"] != call.options.get("ignore_index", IGNORE_INDEX)


def _capped(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """Capped logits z, their log-sum-exp, and which rows count."""
    z = call.inputs["logits"].nan_to_num() * call.options.get("logit_scale", 1.0)
    cap = call.options.get("softcap", 0.0)
    z = cap * torch.tanh(z / cap) if cap else z
    return z, torch.logsumexp(z, -1, keepdim=True), _counted(call)[:, None]


def _share(call: Call) -> float | Tensor:
    """What a row's loss is multiplied by in the result."""
    if call.options.get("reduction", "mean") == "none":
        return 1.0
    if call.options.get("num_items") is not None:
        return 1.0 / call.options["num_items"]
    valid = _counted(call).sum().clamp(min=1)
    return 1.0 / valid if call.options.get("reduction", "mean") == "mean" else 1.0


def _loss_terms(call: Call) -> Tensor:
    """A loss is a difference of log-sum-exp and logits, the exponentials of which carry |z| roundings."""
    z, lse, counts = _capped(call)
    p = torch.exp(z - lse)
    target = z.gather(1, call.inputs["labels"].clamp(0, z.shape[1] - 1)[:, None])
    size = 1 + lse.abs() + (p * z.abs()).sum(-1, keepdim=True) + target.abs()
    size = size + call.options.get("label_smoothing", 0.0) * z.abs().mean(-1, keepdim=True)
    size = size + call.options.get("z_loss", 0.0) * 2 * lse.abs() * size
    losses = torch.where(counts, size, 0.0)[:, 0] * _share(call)
    return losses if call.options.get("reduction", "mean") == "none" else losses.sum()


def _logits_terms(call: Call) -> Tensor:
    """dz adds probability, target and smoothing; the probability carries |z| + |lse| roundings of its exponent."""
    z, lse, counts = _capped(call)
    smoothing, z_loss = call.options.get("label_smoothing", 0.0), call.options.get("z_loss", 0.0)
    p = torch.exp(z - lse) + 2.0**-102  # may be 0 below float32's normal numbers: 2^-126 is one rounding of 2^-102
    size = p * (1 + z.abs() + lse.abs()) * (1 + 2 * z_loss * lse.abs()) + smoothing / z.shape[1]
    onehot = torch.zeros_like(z).scatter_(1, call.inputs["labels"].clamp(0, z.shape[1] - 1)[:, None], 1 - smoothing)
    dloss = call.grad_outputs[0].abs() * _share(call)
    dloss = dloss[:, None] if dloss.ndim else dloss
    return torch.where(counts, (size + onehot) * dloss, 0.0) * call.options.get("logit_scale", 1.0)


def _bytes(inputs: Inputs) -> tuple[int, int]:
    """Rows that count are read once; the gradient of every row is written once."""
    logits = nbytes(inputs["logits"])
    return logits * int((inputs["labels"] != IGNORE_INDEX).sum()) // max(1, len(inputs["labels"])), logits


spec = Spec(
    op="cross_entropy",
    sizes={"tokens": few_rows, "vocab": columns},
    options={
        "reduction": ["mean", "none", "sum"],
        "ignore_index": [IGNORE_INDEX, 2],
        "logit_scale": [1.0, 0.0625],
        "softcap": [0.0, 30.0, 5.0],
        "label_smoothing": [0.0, 0.1],
        "z_loss": [0.0, 1e-4, 0.1],
        "num_items": [None, 7],
    },
    fills=["randn", "ones", "zeros", "wide", "outlier", "saturated", "confident"],
    build=_build,
    outputs=["loss"],
    grads=["logits"],
    rowwise=["logits", "labels"],
    row_options={"reduction": "none", "num_items": None},
    consistent=lambda options: options.get("reduction") != "none" or options.get("num_items") is None,
    specials=[nan, -inf],  # a class ruled out is -inf; a +inf gives inf or NaN, as the log-sum-exp is written
    same_bits=False,  # a total sums in another order where it computes its gradient with it
    roundings=0,  # float32 up to the one rounding of the gradient
    terms={"loss": _loss_terms, "logits": _logits_terms},
    kinds={
        "num_items is a tensor": lambda i, o: (i, {**o, "num_items": torch.tensor(7, device=i["labels"].device)}),
    },
    bytes=_bytes,
    bench={
        "llama-2-7b": {"tokens": 8192, "vocab": 32000},
        "llama-3.1-8b": {"tokens": 4096, "vocab": 128256},
        "qwen-3-8b": {"tokens": 4096, "vocab": 151936},
        "gemma-2-9b": {"tokens": 2048, "vocab": 256000},
    },
    errors=[
        ErrorCase(
            "one label too few",
            lambda i, o: ({**i, "labels": i["labels"][:-1]}, o),
            ValueError,
            "labels",
            senseless=True,
        ),
        ErrorCase(
            "labels are a matrix",
            lambda i, o: ({**i, "labels": i["labels"][None]}, o),
            ValueError,
            "labels",
            senseless=True,
        ),
        ErrorCase(
            "labels are floats",
            lambda i, o: ({**i, "labels": i["labels"].float()}, o),
            TypeError,
            "labels",
            senseless=True,
        ),
        ErrorCase(
            "logits are a cube",
            lambda i, o: ({**i, "logits": i["logits"][None]}, o),
            ValueError,
            "logits",
            senseless=True,
        ),
        ErrorCase(
            "a label is the vocabulary's size",
            lambda i, o: ({**i, "labels": torch.full_like(i["labels"], i["logits"].shape[1])}, o),
            ValueError,
            "labels",
            senseless=True,
            device="cpu",
        ),
        ErrorCase(
            "a label is negative",
            lambda i, o: ({**i, "labels": torch.full_like(i["labels"], -1)}, o),
            ValueError,
            "labels",
            senseless=True,
            device="cpu",
        ),
        ErrorCase("reduction is unknown", lambda i, o: (i, {**o, "reduction": "avg"}), ValueError, "reduction"),
        ErrorCase("softcap is negative", lambda i, o: (i, {**o, "softcap": -1.0}), ValueError, "softcap"),
        ErrorCase(
            "smoothing is above 1", lambda i, o: (i, {**o, "label_smoothing": 1.5}), ValueError, "label_smoothing"
        ),
        ErrorCase(
            "num_items with reduction none",
            lambda i, o: (i, {**o, "reduction": "none", "num_items": 3}),
            ValueError,
            "num_items",
        ),
    ],
)
