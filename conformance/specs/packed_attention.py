"""Causal attention of packed documents.

No input is row-wise: an output depends on all earlier rows of its document, and a gradient on all rows of it. The
argument kinds that fill one document with NaN check that documents do not attend to each other.
"""

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from itertools import pairwise
from math import nan
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Generator, Tensor

from conformance.case import Case, Draw
from conformance.gates import UNIT_FLOAT32
from conformance.spec import Budget, Call, Change, Drawing, ErrorCase, Inputs, Options, Spec, Speed, nbytes
from unsloth_ref.kernels import packed_attention

WIDTHS = (64, 16, 40, 80, 96, 128, 256, 1, 7, 33, 72)
# Float32 may flush numbers below 2^-126 to 0: one rounding of this.
FLUSHED = 2.0**-102
ROUNDINGS = 3  # in a gradient: of dp; of ds, or of the output in delta; of one head's part of its group's sum


def _bounds(tokens: int, documents: int, seed: int) -> list[int]:
    """The start of each document, then the number of tokens. With few tokens, some documents are empty.

    Lengths are log-normal like those of web pages: half of the tokens are in a sixth of the documents.
    """
    weights = torch.exp(1.1 * torch.randn(documents, generator=Generator().manual_seed(seed), dtype=torch.float64))
    ends = (weights.cumsum(0) / weights.sum() * tokens).round().long().tolist()
    return [0, *ends[:-1], tokens]


def _longest(bounds: list[int]) -> int:
    return max(end - begin for begin, end in pairwise(bounds))


def _build(draw: Draw, tokens: int, documents: int, kv_heads: int, group: int, width: int) -> Inputs:
    cu_seqlens = torch.tensor(_bounds(tokens, documents, draw.case.seed), dtype=torch.int32)
    return {
        "q": draw.filled(tokens, kv_heads * group, width),
        "k": draw.filled(tokens, kv_heads, width),
        "v": draw.filled(tokens, kv_heads, width),
        # Expanding would change the bounds.
        "cu_seqlens": cu_seqlens.to(draw.device) if draw.case.layout == "expanded" else draw.lay_out(cu_seqlens),
    }


def _required(case: Case) -> Options:
    """max_seqlen, exactly the length of the longest document."""
    return {"max_seqlen": _longest(_bounds(case.size("tokens"), case.size("documents"), case.seed))}


def _shape(rows: int, columns: int) -> tuple[int, ...]:
    """Columns are tokens, including sizes around tile edges; rows are documents, at most two long ones.

    Only very many rows give very many documents: the interpreter takes a hundredth of a second per document.
    """
    if rows >= 10_000:
        return 2000 * columns if columns < 131 else columns, 2000, 1, 2, 64
    length = columns if columns < 131 else 1 + columns % 131
    if length < 16:
        return min(rows, 3) * length, max(1, min(rows, 3)), 1 + (rows == 3), 1 + columns % 2, WIDTHS[columns % 11]
    return length, min(rows, 2), 1, 1 + columns % 2, WIDTHS[columns % 2]


@dataclass(frozen=True)
class _Part:
    """What the terms need of one document and one key head: q [G, L, D], k and v [L, D], scores [G, L, L]."""

    rows: slice
    head: int
    heads: slice
    q: Tensor
    k: Tensor
    v: Tensor
    p: Tensor  # probabilities plus the smallest number with a relative error; 0 where a key is masked
    p_roundings: Tensor  # number of float32 roundings that p carries, relative to p


def _smallest(call: Call) -> float:
    """Numbers below this have absolute instead of relative errors."""
    return max(call.smallest, FLUSHED)


def _parts(call: Call) -> Iterator[_Part]:
    """One document and key head at a time: the scores of all heads of a long document do not fit in memory."""
    q, k, v, cu_seqlens = (call.inputs[name] for name in ("q", "k", "v", "cu_seqlens"))
    group, options = q.shape[1] // k.shape[1], call.options
    scale = q.shape[2] ** -0.5 if options.get("scale") is None else options["scale"]
    window, cap = options.get("window") or len(q), options.get("softcap", 0.0)
    for begin, end in pairwise(cu_seqlens.tolist()):
        position = torch.arange(end - begin, device=q.device)
        seen = (position <= position[:, None]) & (position > position[:, None] - window)
        for head in range(k.shape[1] if end > begin else 0):
            rows, heads = slice(begin, end), slice(head * group, (head + 1) * group)
            part_q, part_k, part_v = q[rows, heads].transpose(0, 1), k[rows, head], v[rows, head]
            z = part_q @ part_k.mT * scale
            z = cap * torch.tanh(z / cap) if cap else z
            p = torch.softmax(z.masked_fill(~seen, -torch.inf), -1)
            # Roundings of a score are those of its sum; those of p add its log-sum-exp's and the mean of its row's.
            score = 1 + z.masked_fill(~seen, -torch.inf).logsumexp(-1, keepdim=True).abs()
            score = score + part_q.abs() @ part_k.abs().mT * scale
            p_roundings = (score + (p * score).sum(-1, keepdim=True)).where(seen, 0.0)
            yield _Part(rows, head, heads, part_q, part_k, part_v, (p + _smallest(call)).where(seen, 0.0), p_roundings)


def _float32_weight(call: Call) -> float:
    """Weight of a float32 rounding in S: for 16 bits, the gates allow ROUNDINGS of u instead of log2(n) of 2^-24."""
    return 1.0 if call.unit == UNIT_FLOAT32 else call.float32_error / ROUNDINGS / call.unit


def _out_terms(call: Call) -> Tensor:
    """Sum of p |v|; p carries a rounding to v's dtype, and the roundings of its score."""
    terms, weight = torch.zeros_like(call.inputs["q"]), _float32_weight(call)
    for part in _parts(call):
        terms[part.rows, part.heads] = (part.p * (1 + weight * part.p_roundings) @ part.v.abs()).transpose(0, 1)
    return terms


def _dv_terms(call: Call) -> Tensor:
    """Sum of p |do| over queries and the heads of the group."""
    terms, weight = torch.zeros_like(call.inputs["v"]), _float32_weight(call)
    for part in _parts(call):
        do = call.grad_outputs[0][part.rows, part.heads].transpose(0, 1).abs()
        terms[part.rows, part.head] = ((part.p * (1 + weight * part.p_roundings)).mT @ do).sum(0)
    return terms


def _ds_terms(call: Call, part: _Part) -> Tensor:
    """p (|dp| + |delta|), each with the terms of its own sum; delta also carries the roundings of p in its sum."""
    cap, weight = call.options.get("softcap", 0.0), _float32_weight(call)
    do = call.grad_outputs[0][part.rows, part.heads].transpose(0, 1).abs()
    dp = do @ part.v.abs().mT
    delta = (part.p * dp).sum(-1, keepdim=True)
    delta_roundings = (part.p * part.p_roundings * dp).sum(-1, keepdim=True)
    slope: Tensor | float = 1.0
    if cap:
        scale = call.options.get("scale") or part.q.shape[2] ** -0.5
        slope = 1 - torch.tanh(part.q @ part.k.mT * scale / cap).square()
    in_float32 = (1 + part.p_roundings) * (dp + delta) + delta_roundings
    return part.p * (slope * (dp + delta) + weight * in_float32) + (part.p > 0) * _smallest(call)


def _dq_terms(call: Call) -> Tensor:
    """Sum of scale |ds| |k| over keys."""
    terms = torch.zeros_like(call.inputs["q"])
    for part in _parts(call):
        terms[part.rows, part.heads] = (_ds_terms(call, part) @ part.k.abs()).transpose(0, 1)
    return terms * (call.options.get("scale") or terms.shape[2] ** -0.5)


def _dk_terms(call: Call) -> Tensor:
    """Sum of scale |ds| |q| over queries and the heads of the group."""
    terms = torch.zeros_like(call.inputs["k"])
    for part in _parts(call):
        terms[part.rows, part.head] = (_ds_terms(call, part).mT @ part.q.abs()).sum(0)
    return terms * (call.options.get("scale") or terms.shape[2] ** -0.5)


def _flops(inputs: Inputs, options: Options, grads: Collection[str]) -> tuple[int, int]:
    """Two products in the forward pass and five in the backward pass, per pair of a query and a visible key.

    As flash attention, which recomputes the scores because they would not fit in memory.
    """
    pairs = 0
    for begin, end in pairwise(inputs["cu_seqlens"].tolist()):
        seen = min(end - begin, options.get("window") or end - begin)  # by each query except the first ones
        pairs += seen * (seen + 1) // 2 + (end - begin - seen) * seen
    product = 2 * pairs * inputs["q"][0].numel()
    return 2 * product, 5 * product if grads else 0


def _cut(cut: Callable[[int], list[int]]) -> Change:
    """Other document bounds; `cut` computes them from the number of tokens."""

    def change(inputs: Inputs, options: Options) -> tuple[Inputs, Options]:
        bounds = cut(len(inputs["q"]))
        cu_seqlens = torch.tensor(bounds, dtype=torch.int32, device=inputs["q"].device)
        return {**inputs, "cu_seqlens": cu_seqlens}, {**options, "max_seqlen": _longest(bounds)}

    return change


def _nan_in(document: int) -> Change:
    """Three documents, one filled with NaN: a tile that reads into its neighbour is found."""

    def change(inputs: Inputs, options: Options) -> tuple[Inputs, Options]:
        inputs, options = _cut(lambda tokens: [0, tokens // 3, tokens // 2, tokens])(inputs, options)
        bounds = inputs["cu_seqlens"].tolist()
        inputs |= {name: inputs[name].clone() for name in ("q", "k", "v")}
        for name in ("q", "k", "v"):
            inputs[name][bounds[document] : bounds[document + 1]] = nan
        return inputs, options

    return change


def _change(**changes: Any) -> Change:
    """A change of these inputs and options, each computed from the valid inputs."""

    def change(inputs: Inputs, options: Options) -> tuple[Inputs, Options]:
        options = {"max_seqlen": _longest(inputs["cu_seqlens"].tolist()), **options}
        made = {name: make(inputs) for name, make in changes.items()}
        wrong = {name: value for name, value in made.items() if name in inputs}
        return {**inputs, **wrong}, {**options, **{name: v for name, v in made.items() if name not in inputs}}

    return change


def _bench(tokens: int, documents: int, width: int) -> dict[str, int]:
    return {"tokens": tokens, "documents": documents, "kv_heads": 8, "group": 4, "width": width}


spec = Spec(
    reference=packed_attention,
    drawing=Drawing(
        sizes={
            "tokens": lambda budget: st.integers(1, max(1, min(budget, max(32, budget // 64), 600))),
            "documents": lambda budget: st.integers(1, 6 if budget > 2**15 else 2),
            "kv_heads": lambda budget: st.sampled_from([1, 2, 3] if budget > 2**15 else [1, 1, 1, 2]),
            "group": lambda budget: st.sampled_from([1, 2, 3, 4] if budget > 2**15 else [1, 1, 2]),
            "width": lambda budget: st.sampled_from(WIDTHS),
        },
        build=_build,
        options={
            "scale": [None, 0.05],
            "window": [None, 1, 5, 100],
            "softcap": [0.0, 30.0, 2.0],
        },
        required=_required,
        fills=["randn", "ones", "zeros", "tiny", "outlier", "wide"],
        shape=_shape,
        counts=["tokens", "documents"],
    ),
    outputs=["out"],
    grads=["q", "k", "v"],
    budget=Budget(
        roundings=ROUNDINGS,
        terms={"out": _out_terms, "q": _dq_terms, "k": _dk_terms, "v": _dv_terms},
    ),
    rowwise=[],
    argument_kinds={
        "one document": _cut(lambda tokens: [0, tokens]),
        "documents of a token": _cut(lambda tokens: [*range(min(tokens, 4)), tokens]),
        "empty documents on both sides": _cut(lambda tokens: [0, 0, tokens // 2, tokens // 2, tokens, tokens]),
        "a longer max_seqlen": lambda i, o: (i, {**o, "max_seqlen": 10_000}),
        "NaN before": _nan_in(0),
        "NaN in between": _nan_in(1),
        "NaN behind": _nan_in(2),
    },
    errors=[
        ErrorCase("q is a matrix", _change(q=lambda i: i["q"][0]), ValueError, "q", undefined=True),
        ErrorCase("k has another length", _change(k=lambda i: i["k"][:-1]), ValueError, "k", undefined=True),
        ErrorCase("k has another width", _change(k=lambda i: i["k"][..., :-1]), ValueError, "k", undefined=True),
        ErrorCase("v has another length", _change(v=lambda i: i["v"][:-1]), ValueError, "v", undefined=True),
        ErrorCase(
            "heads of k do not divide those of q",
            _change(**{n: lambda i: i["k"].repeat(1, 2 + i["q"].shape[1], 1) for n in ("k", "v")}),
            ValueError,
            "k",
            undefined=True,
        ),
        ErrorCase("k has another dtype", _change(k=lambda i: i["k"].double()), TypeError, "k"),
        ErrorCase("v has another dtype", _change(v=lambda i: i["v"].double()), TypeError, "v"),
        ErrorCase("q is integer", _change(**{n: lambda i, n=n: i[n].long() for n in "qkv"}), TypeError, "q"),
        ErrorCase(
            "cu_seqlens is a matrix", _change(cu_seqlens=lambda i: i["cu_seqlens"][None]), ValueError, "cu_seqlens"
        ),
        ErrorCase(
            "cu_seqlens are floats", _change(cu_seqlens=lambda i: i["cu_seqlens"].float()), TypeError, "cu_seqlens"
        ),
        ErrorCase(
            "cu_seqlens is of 64 bits", _change(cu_seqlens=lambda i: i["cu_seqlens"].long()), TypeError, "cu_seqlens"
        ),
        ErrorCase("cu_seqlens is empty", _change(cu_seqlens=lambda i: i["cu_seqlens"][:0]), ValueError, "cu_seqlens"),
        ErrorCase(
            "cu_seqlens ends early",
            _change(cu_seqlens=lambda i: i["cu_seqlens"].clamp(max=len(i["q"]) - 1)),
            ValueError,
            "cu_seqlens",
            undefined=True,
            device="cpu",
        ),
        ErrorCase(
            "cu_seqlens ends late",
            _change(cu_seqlens=lambda i: i["cu_seqlens"] + (i["cu_seqlens"] == len(i["q"])).int()),
            ValueError,
            "cu_seqlens",
            undefined=True,
            device="cpu",
        ),
        ErrorCase(
            "cu_seqlens begins late",
            _change(cu_seqlens=lambda i: i["cu_seqlens"].clamp(min=1)),
            ValueError,
            "cu_seqlens",
            undefined=True,
            device="cpu",
        ),
        ErrorCase(
            "cu_seqlens falls",
            _change(cu_seqlens=lambda i: i["cu_seqlens"].new_tensor([0, 2, 1, len(i["q"])])),
            ValueError,
            "cu_seqlens",
            undefined=True,
            device="cpu",
        ),
        ErrorCase(
            "max_seqlen is short of the longest document",
            _change(max_seqlen=lambda i: _longest(i["cu_seqlens"].tolist()) - 1),
            ValueError,
            "max_seqlen",
            device="cpu",
        ),
        ErrorCase("max_seqlen is negative", _change(max_seqlen=lambda i: -1), ValueError, "max_seqlen"),
        ErrorCase("a window of nothing", _change(window=lambda i: 0), ValueError, "window"),
        ErrorCase("softcap is negative", _change(softcap=lambda i: -1.0), ValueError, "softcap"),
        ErrorCase("scale is infinite", _change(scale=lambda i: float("inf")), ValueError, "scale"),
    ],
    speed=Speed(
        shapes={
            "text-mix-16k-d64": _bench(16384, 41, 64),
            "text-mix-16k-d128": _bench(16384, 41, 128),
            "long-16k-d64": _bench(16384, 1, 64),
            "long-16k-d128": _bench(16384, 1, 128),
        },
        bytes=lambda inputs: (
            2 * nbytes(inputs["q"]) + nbytes(inputs["k"], inputs["v"]),
            4 * nbytes(inputs["q"]) + 2 * nbytes(inputs["k"], inputs["v"]),
        ),
        flops=_flops,
    ),
)
