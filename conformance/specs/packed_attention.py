"""Causal attention of packed documents.

No input is row-wise: an output depends on all earlier rows of its document, and a gradient on all rows of it. The
argument kinds that fill one document with NaN check that documents do not attend to each other.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import inf

import torch
from hypothesis import strategies as st
from torch import Tensor

from conformance.case import Case, Draw
from conformance.promises import ExactLaw, Memory
from conformance.spec import (
    Budget,
    Call,
    Change,
    Drawing,
    ErrorCase,
    Inputs,
    Options,
    Spec,
    Speed,
    change_inputs,
    mistake,
    nbytes,
    wrong_option,
)
from conformance.specs._documents import (
    bounds_errors,
    bounds_of,
    document_kinds,
    documents_as_parts,
    laid_out,
)
from conformance.specs._mistakes import wrong_input
from conformance.tolerances.bounds import ROUNDING_RMS, SHARED, Bound, Terms, float32_error
from unsloth_ref.kernels import packed_attention

WIDTHS = (64, 16, 40, 80, 96, 128, 256, 1, 7, 33, 72, 300, 512)
ROUNDINGS = 3  # in a gradient: of dp; of ds, or of the output in delta; of one head's part of its group's sum
# Float32 may flush numbers below 2^-126 to 0: one rounding of this.
FLUSHED = 2.0**-102
TENSORS = ("q", "k", "v")  # those with an entry per token
DOCUMENTS = documents_as_parts(TENSORS, TENSORS)


def _build(draw: Draw, tokens: int, documents: int, kv_heads: int, group: int, width: int, sinks: int = 0) -> Inputs:
    """With `sinks`, each query head has one."""
    inputs = {
        "q": draw.filled(tokens, kv_heads * group, width),
        "k": draw.filled(tokens, kv_heads, width),
        "v": draw.filled(tokens, kv_heads, width),
        "cu_seqlens": laid_out(draw, tokens, documents),
    }
    return inputs | ({"sinks": draw.weight(kv_heads * group)} if sinks else {})


def _longest(bounds: Sequence[int]) -> int:
    return max(end - begin for begin, end in pairwise(bounds))


def _required(case: Case) -> Options:
    """max_seqlen, exactly the length of the longest document."""
    return {"max_seqlen": _longest(bounds_of(case.size("tokens"), case.size("documents"), case.seed))}


def _shape(rows: int, columns: int) -> tuple[int, ...]:
    """Columns are tokens, including sizes around tile edges; rows are documents, at most two long ones.

    Only very many rows give very many documents: the interpreter takes a hundredth of a second per document.
    """
    if rows >= 10_000:
        return 2000 * columns if columns < 131 else columns, 2000, 1, 2, 64, rows % 2
    length = columns if columns < 131 else 1 + columns % 131
    if length < 16:
        width = WIDTHS[columns % len(WIDTHS)]
        # Nine queries share a key, more than in random cases: models have up to 64, and a kernel loops over them.
        group = 1 + 8 * (columns % 2)
        return min(rows, 3) * length, max(1, min(rows, 3)), 1 + (rows == 3), group, width, columns % 2
    return length, min(rows, 2), 1, 1 + columns % 2, WIDTHS[columns % 2], columns % 2


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
    sink: Tensor  # the probability of the sink, [G, L, 1]; 0 without sinks
    sink_roundings: Tensor  # number of float32 roundings that it carries, relative to it


def _smallest(call: Call) -> float:
    """Numbers below this have absolute instead of relative errors."""
    return max(call.smallest, FLUSHED)


def _parts(call: Call) -> Iterator[_Part]:
    """One document and key head at a time: the scores of all heads of a long document do not fit in memory."""
    q, k, v, cu_seqlens = (call.inputs[name] for name in ("q", "k", "v", "cu_seqlens"))
    group, options, scale = q.shape[1] // k.shape[1], call.options, _scale(call)
    window, cap = options.get("window") or len(q), options.get("softcap", 0.0)
    for begin, end in pairwise(cu_seqlens.tolist()):
        position = torch.arange(end - begin, device=q.device)
        seen = (position <= position[:, None]) & (position > position[:, None] - window)
        for head in range(k.shape[1] if end > begin else 0):
            rows, heads = slice(begin, end), slice(head * group, (head + 1) * group)
            part_q, part_k, part_v = q[rows, heads].transpose(0, 1), k[rows, head], v[rows, head]
            z = part_q @ part_k.mT * scale
            z = cap * torch.tanh(z / cap) if cap else z
            z = z.masked_fill(~seen, -torch.inf)
            sink = q.new_full((group, 1, 1), -torch.inf)
            if "sinks" in call.inputs:
                sink = call.inputs["sinks"][heads, None, None]
            lse = torch.logaddexp(z.logsumexp(-1, keepdim=True), sink)
            p, p_sink = torch.exp(z - lse), torch.exp(sink - lse)
            # Roundings of a score are those of its sum; those of p add its log-sum-exp's and the mean of its row's.
            score = 1 + lse.abs() + part_q.abs() @ part_k.abs().mT * scale
            sink_score = 1 + lse.abs() + sink.abs().nan_to_num(posinf=0.0)
            mean = (p * score).sum(-1, keepdim=True) + p_sink * sink_score
            p = (p + _smallest(call)).where(seen, 0.0)
            p_roundings, sink_roundings = (score + mean).where(seen, 0.0), sink_score + mean
            yield _Part(rows, head, heads, part_q, part_k, part_v, p, p_roundings, p_sink, sink_roundings)


def _scale(call: Call) -> float:
    scale = call.options.get("scale")
    return call.inputs["q"].shape[2] ** -0.5 if scale is None else scale


def _p(part: _Part) -> tuple[Tensor, Tensor]:
    """p carries a rounding to v's dtype, and in float32 the roundings of its score."""
    return part.p, part.p * (1 + part.p_roundings)


def _do(call: Call, part: _Part) -> Tensor:
    return call.grad_outputs[0][part.rows, part.heads].transpose(0, 1)


def _added(call: Call, name: str, factors: Callable[[_Part], tuple[Tensor, Tensor, Tensor]]) -> Terms:
    """The terms of products that are added up: for q over keys, for k and v over queries and the heads of the group.

    Factors of a part: the left one, [G, L, L], in the dtype and in float32; the exact right one.
    """
    size, squares, in_float32 = (torch.zeros_like(call.inputs[name]) for _ in range(3))
    for part in _parts(call):
        left, wide, right = factors(part)
        if name != "q":
            left, wide = left.mT, wide.mT
        products = (left @ right.abs(), left.square() @ right.square(), wide @ right.abs())
        for into, found in zip((size, squares, in_float32), products, strict=True):
            if name == "q":
                into[part.rows, part.heads] = found.transpose(0, 1)
            else:
                into[part.rows, part.head] = found.sum(0)
    return Terms(size, squares.sqrt(), in_float32)


def _ds(call: Call, part: _Part) -> tuple[Tensor, Tensor]:
    """Scale p (|dp| + |delta|), each with the terms of its sum; delta also carries the roundings of p in its sum."""
    cap = call.options.get("softcap", 0.0)
    dp = _do(call, part).abs() @ part.v.abs().mT
    delta = (part.p * dp).sum(-1, keepdim=True)
    delta_roundings = (part.p * part.p_roundings * dp).sum(-1, keepdim=True)
    slope: Tensor | float = 1.0
    if cap:
        slope = 1 - torch.tanh(part.q @ part.k.mT * _scale(call) / cap).square()
    smallest = (part.p > 0) * _smallest(call)
    in_dtype = part.p * slope * (dp + delta) + smallest
    in_float32 = in_dtype + part.p * ((1 + part.p_roundings) * (dp + delta) + delta_roundings)
    return in_dtype * _scale(call), in_float32 * _scale(call)


def _dsinks(call: Call) -> Bound:
    """A sum over queries of p delta, where delta is a sum over keys and carries the roundings of p, as in `_ds`.

    Not as terms: whatever the dtype of the sinks is, the output in delta is rounded to that of q.
    """
    value, size, squares, in_float32 = (torch.zeros_like(call.inputs["sinks"]) for _ in range(4))
    for part in _parts(call):
        products = part.sink * part.p * (_do(call, part).abs() @ part.v.abs().mT)
        value[part.heads] -= (part.sink * part.p * (_do(call, part) @ part.v.mT)).sum((1, 2))
        size[part.heads] += products.sum((1, 2))
        squares[part.heads] += products.square().sum((1, 2))
        in_float32[part.heads] += (products * (1 + part.sink_roundings + part.p_roundings)).sum((1, 2))
    error = ROUNDINGS * call.unit * (1 + call.unit) * size + float32_error(call.elements) * in_float32
    return Bound(value, error, ROUNDINGS * (ROUNDING_RMS * call.unit) ** 2 * squares + (SHARED * in_float32) ** 2)


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


def _pick(inputs: Inputs, chosen: Sequence[int]) -> tuple[Inputs, Options, Tensor]:
    """A call with these documents alone, in this order."""
    picked, options, rows = DOCUMENTS.pick(inputs, chosen)
    return picked, options | {"max_seqlen": _longest(picked["cu_seqlens"].tolist())}, rows


def _lse_bytes(inputs: Inputs) -> int:
    """A float32 per query and head."""
    return 4 * inputs["q"][..., 0].numel()


def _with_max_seqlen(change: Change) -> Change:
    """A change of the bounds, and max_seqlen for them."""

    def changed(inputs: Inputs, options: Options) -> tuple[Inputs, Options]:
        inputs, options = change(inputs, options)
        return inputs, {**options, "max_seqlen": _longest(inputs["cu_seqlens"].tolist())}

    return changed


def _sinks(values: Callable[[int], Tensor]) -> Change:
    """These sinks, from the number of query heads."""
    return change_inputs(lambda inputs: {"sinks": values(inputs["q"].shape[1]).to(inputs["q"].device)})


def _bench(tokens: int, documents: int, width: int, group: int = 4, sinks: int = 0) -> dict[str, int]:
    heads = {"kv_heads": 8, "group": group}
    return {"tokens": tokens, "documents": documents, **heads, "width": width, "sinks": sinks}


spec = Spec(
    reference=packed_attention,
    drawing=Drawing(
        sizes={
            "tokens": lambda budget: st.integers(1, max(1, min(budget, max(32, budget // 64), 600))),
            "documents": lambda budget: st.integers(1, 6 if budget > 2**15 else 2),
            "kv_heads": lambda budget: st.sampled_from([1, 2, 3] if budget > 2**15 else [1, 1, 1, 2]),
            "group": lambda budget: st.sampled_from([1, 2, 3, 4] if budget > 2**15 else [1, 1, 2]),
            "width": lambda budget: st.sampled_from(WIDTHS),
            "sinks": lambda budget: st.integers(0, 1),
        },
        build=_build,
        options={
            "scale": [None, 0.05],
            "window": [None, 1, 5, 100],
            "softcap": [0.0, 30.0, 2.0],
        },
        required=_required,
        shape=_shape,
        counts={"tokens": 1024, "documents": 1024},
        alike=["ones", "zeros", "tiny"],  # equal scores have equal probabilities, whose rounding all rows share
    ),
    outputs=["out"],
    grads=["q", "k", "v", "sinks"],
    budget=Budget(
        roundings=ROUNDINGS,
        terms={
            "out": lambda call: _added(call, "q", lambda part: (*_p(part), part.v)),
            "q": lambda call: _added(call, "q", lambda part: (*_ds(call, part), part.k)),
            "k": lambda call: _added(call, "k", lambda part: (*_ds(call, part), part.q)),
            "v": lambda call: _added(call, "v", lambda part: (*_p(part), _do(call, part))),
        },
        bounds={"sinks": _dsinks},
    ),
    independent=DOCUMENTS._replace(pick=_pick),
    far=["q", "k", "v"],
    exact_laws={
        "v twice as large": ExactLaw({"v": 2.0}, {"out": 2.0, "q": 2.0, "k": 2.0, "sinks": 2.0}),
        "v negated": ExactLaw({"v": -1.0}, {"out": -1.0, "q": -1.0, "k": -1.0, "sinks": -1.0}),
        "q twice as large, with half the scale": ExactLaw(
            {"q": 2.0}, {"q": 0.5}, options=lambda o: {"scale": o["scale"] / 2}, holds=lambda o: bool(o.get("scale"))
        ),
        "dout four times as large": ExactLaw({}, {"q": 4.0, "k": 4.0, "v": 4.0, "sinks": 4.0}, grad_outputs=4.0),
    },
    memory=Memory(
        Case((("tokens", 16384), ("documents", 2), ("kv_heads", 4), ("group", 2), ("width", 64), ("sinks", 0))),
        grads=["q", "k", "v"],
        saved=_lse_bytes,  # log-sum-exps
        working=_lse_bytes,  # sums of dout times out
    ),
    argument_kinds={what: _with_max_seqlen(change) for what, change in document_kinds(TENSORS).items()}
    | {
        "sinks in float32, with a stride": _sinks(lambda heads: torch.linspace(-4, 4, 2 * heads)[::2]),
        "a sink that takes nothing": _sinks(lambda heads: torch.full((heads,), -torch.inf)),
        "a sink that takes nearly all": _sinks(lambda heads: torch.full((heads,), 100.0)),
        "a longer max_seqlen": lambda i, o: (i, {**o, "max_seqlen": 10_000}),
    },
    errors=[
        wrong_input("q is a matrix", ValueError, undefined=True, q=lambda q: q[0]),
        wrong_input("k has another length", ValueError, undefined=True, k=lambda k: k[:-1]),
        wrong_input("k has another width", ValueError, undefined=True, k=lambda k: k[..., :-1]),
        wrong_input("v has another length", ValueError, undefined=True, v=lambda v: v[:-1]),
        mistake(
            "heads of k do not divide those of q",
            ValueError,
            "k",
            lambda i: {name: i["k"].repeat(1, 2 + i["q"].shape[1], 1) for name in "kv"},
            undefined=True,
        ),
        wrong_input("k has another dtype", TypeError, k=lambda k: k.double()),
        wrong_input("v has another dtype", TypeError, v=lambda v: v.double()),
        mistake("q is integer", TypeError, "q", lambda i: {name: i[name].long() for name in TENSORS}),
        *bounds_errors("q"),
        ErrorCase(
            "max_seqlen is short of the longest document",
            lambda inputs, options: (inputs, {**options, "max_seqlen": options["max_seqlen"] - 1}),
            ValueError,
            "max_seqlen",
            device="cpu",
        ),
        wrong_option("max_seqlen is negative", "max_seqlen", max_seqlen=-1),
        wrong_option("a window of nothing", "window", window=0),
        wrong_option("softcap is negative", "softcap", softcap=-1.0),
        mistake("sinks are one short", ValueError, "sinks", lambda i: {"sinks": i["q"][0, 1:, 0]}, undefined=True),
        mistake("sinks are integer", TypeError, "sinks", lambda i: {"sinks": i["q"][0, :, 0].long()}),
        wrong_option("scale is infinite", "scale", scale=inf),
    ],
    speed=Speed(
        shapes={
            "text-mix-16k-d64": _bench(16384, 41, 64),
            "text-mix-16k-d128": _bench(16384, 41, 128),
            "gpt-oss-16k-d64": _bench(16384, 41, 64, group=8, sinks=1) | {"window": 128},
            "long-16k-d64": _bench(16384, 1, 64),
            "long-16k-d128": _bench(16384, 1, 128),
            "gemma-4-16k-d512": _bench(16384, 41, 512) | {"kv_heads": 1, "group": 8},
        },
        bytes=lambda inputs: (
            2 * nbytes(inputs["q"]) + nbytes(inputs["k"], inputs["v"]),
            4 * nbytes(inputs["q"]) + 2 * nbytes(inputs["k"], inputs["v"]),
        ),
        flops=_flops,
    ),
)
