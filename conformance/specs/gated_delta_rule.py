"""The gated delta rule on packed documents.

No input is row-wise: an output depends on all earlier rows of its document, and a gradient on all rows of it. Inputs
are those of models: q and k of length 1, beta between 0 and 1, and logarithms of decays in float32, weak in some heads
and strong in others.
"""

from collections.abc import Collection
from copy import copy

import torch
from hypothesis import strategies as st
from torch import Generator, Tensor

from conformance.case import FILLS, Case, Draw
from conformance.promises import ExactLaw, Memory
from conformance.spec import (
    Budget,
    Call,
    Drawing,
    Inputs,
    Options,
    Spec,
    Speed,
    change_inputs,
    mistake,
    nbytes,
    wrong_option,
)
from conformance.specs._documents import bounds_errors, document_kinds, documents_as_parts, laid_out
from conformance.specs._gated_delta_rule import sizes_of
from conformance.specs._mistakes import wrong_input
from conformance.tolerances.bounds import Terms
from unsloth_ref.kernels import gated_delta_rule

WIDTHS = (16, 64, 32, 128, 1, 7, 33, 80)
TENSORS = ("q", "k", "v", "g", "beta")


def _build(draw: Draw, tokens: int, documents: int, kv_heads: int, group: int, width: int, columns: int) -> Inputs:
    """Fills are those of q, k and v; q and k are then normalised, as models do it."""
    generator, heads = Generator().manual_seed(draw.case.seed), kv_heads * group
    numbers = torch.randn((tokens, heads, 2), generator=generator, dtype=torch.float64)
    rates = torch.exp(torch.linspace(-4, 1.5, max(2, heads), dtype=torch.float64))[:heads].flip(0)
    logarithms = copy(draw)
    logarithms.dtype = torch.float32
    return {
        "q": draw.place(_of_length_1(draw, 1, tokens, kv_heads, width)),
        "k": draw.place(_of_length_1(draw, 2, tokens, kv_heads, width)),
        "v": draw.filled(tokens, heads, columns),
        "g": logarithms.place(-rates * torch.nn.functional.softplus(numbers[..., 0])),
        "beta": draw.place(numbers[..., 1].sigmoid()),
        "cu_seqlens": laid_out(draw, tokens, documents),
    }


def _of_length_1(draw: Draw, number: int, *shape: int) -> Tensor:
    values = FILLS[draw.case.fill](Generator().manual_seed(1000 * draw.case.seed + 100 + number), shape)
    return values * torch.rsqrt(values.square().sum(-1, keepdim=True) + 1e-6)


def _shape(rows: int, columns: int) -> tuple[int, ...]:
    """Columns up to 130 are the width of a head, more are tokens, including sizes around the ends of chunks."""
    if columns <= 130 or rows == 0:
        # Once nine heads share a key, more than in random cases: kernels loop over them.
        heads = 1 + columns % 2, 9 if (rows, columns) == (3, 7) else 1 + columns % 2
        return min(rows, 40), 1 + rows % 2, *heads, max(1, columns), max(1, (columns + 3) % 31)
    tokens = 66 + columns % 7 if rows == 1 else 30 + columns % 31
    return tokens, min(rows, 2), 1, 1 + columns % 2, WIDTHS[columns % 3], 1 + columns % 31


def _terms(name: str, call: Call) -> Terms:
    return sizes_of(call).terms(name, call, wide=name in call.wider)


def _bytes(inputs: Inputs) -> tuple[int, int]:
    """Forward: the inputs are read and the output is written. Backward: these are read, five gradients are written."""
    q, v, rest = inputs["q"], inputs["v"], nbytes(inputs["g"], inputs["beta"])
    return 2 * nbytes(q) + 2 * nbytes(v) + rest, 4 * nbytes(q) + 3 * nbytes(v) + 2 * rest


def _flops(inputs: Inputs, options: Options, grads: Collection[str]) -> tuple[int, int]:
    """Three products with a state per token forward, nine backward; those within a chunk could be of any length."""
    (tokens, heads, columns), width = inputs["v"].shape, inputs["q"].shape[2]
    product = 2 * tokens * heads * columns * width
    return 3 * product, 9 * product if grads else 0


def _scratch(inputs: Inputs) -> int:
    """Two matrices and two states per chunk of 32 tokens, and two numbers per element of v, all of them float32."""
    (tokens, heads, columns), width, documents = inputs["v"].shape, inputs["q"].shape[2], len(inputs["cu_seqlens"]) - 1
    chunks = tokens // 32 + documents
    return 4 * chunks * heads * (2 * 32 * 32 + 2 * width * columns) + 8 * tokens * heads * columns


def _bench(tokens: int, documents: int, kv_heads: int, group: int) -> dict[str, int]:
    sizes = {"tokens": tokens, "documents": documents, "kv_heads": kv_heads, "group": group}
    return sizes | {"width": 128, "columns": 128}


spec = Spec(
    reference=gated_delta_rule,
    drawing=Drawing(
        sizes={
            # The interpreter takes a quarter of a second per chunk and head: on a CPU most cases have one of each.
            "tokens": lambda budget: st.integers(1, 300) if budget > 2**15 else st.sampled_from([5, 1, 2, 17, 36]),
            "documents": lambda budget: st.integers(1, 3) if budget > 2**15 else st.sampled_from([1, 1, 2]),
            "kv_heads": lambda budget: st.sampled_from([1, 2, 3] if budget > 2**15 else [1]),
            "group": lambda budget: st.sampled_from([1, 2, 3] if budget > 2**15 else [1, 1, 2]),
            "width": lambda budget: st.sampled_from(WIDTHS if budget > 2**15 else (16, 7, 1, 33)),
            "columns": lambda budget: st.sampled_from([16, 8, 33, 1] if budget > 2**15 else [16, 16, 8, 33, 1]),
        },
        build=_build,
        options={"scale": [None, 0.0, 0.5]},
        shape=_shape,
        counts={"tokens": 256, "documents": 64},
    ),
    outputs=["out"],
    grads=TENSORS,
    budget=Budget(
        roundings=1,  # of a state and of u, which kernels may multiply on tensor cores
        terms={name: lambda call, name=name: _terms(name, call) for name in ("out", *TENSORS)},
    ),
    independent=documents_as_parts(TENSORS, TENSORS),
    far=["q", "k", "v"],
    exact_laws={
        "v twice as large": ExactLaw({"v": 2.0}, {"out": 2.0, "q": 2.0, "k": 2.0, "g": 2.0, "beta": 2.0}),
        "v negated": ExactLaw({"v": -1.0}, dict.fromkeys(["out", "q", "k", "g", "beta"], -1.0)),
        "q twice as large, with half the scale": ExactLaw(
            {"q": 2.0}, {"q": 0.5}, options=lambda o: {"scale": o["scale"] / 2}, holds=lambda o: bool(o.get("scale"))
        ),
        "dout four times as large": ExactLaw({}, dict.fromkeys(TENSORS, 4.0), grad_outputs=4.0),
    },
    memory=Memory(
        Case(
            (("tokens", 4096), ("documents", 2), ("kv_heads", 2), ("group", 2), ("width", 128), ("columns", 128)),
        ),
        grads=TENSORS,
        working=_scratch,
    ),
    argument_kinds=document_kinds(TENSORS)
    | {
        "no decay": change_inputs(lambda i: {"g": torch.zeros_like(i["g"])}),
        "g as narrow as q": change_inputs(lambda i: {"g": i["g"].to(i["q"].dtype)}),
        "beta up to 2": change_inputs(lambda i: {"beta": 2 * i["beta"]}),
        "beta in float32": change_inputs(lambda i: {"beta": i["beta"].float() * (1 + 2**-13)}),
        "equal keys, which are replaced": change_inputs(
            lambda i: {"k": i["k"][:1].expand(i["k"].shape).contiguous(), "beta": torch.ones_like(i["beta"])}
        ),
    },
    errors=[
        wrong_input("q is a matrix", ValueError, undefined=True, q=lambda q: q[0]),
        mistake("q is integer", TypeError, "q", lambda i: {name: i[name].long() for name in "qkv"}),
        wrong_input("k has another length", ValueError, undefined=True, k=lambda k: k[:-1]),
        wrong_input("k has another width", ValueError, undefined=True, k=lambda k: k[..., :-1]),
        wrong_input("k has another dtype", TypeError, k=lambda k: k.double()),
        wrong_input("v has another length", ValueError, undefined=True, v=lambda v: v[:-1]),
        wrong_input("v has another dtype", TypeError, v=lambda v: v.double()),
        mistake(
            "heads of q do not divide those of v",
            ValueError,
            "v",
            lambda i: {name: i[name].repeat(1, 1 + i["v"].shape[1], *[1] * (i[name].ndim - 2)) for name in "qk"},
            undefined=True,
        ),
        wrong_input("g has another length", ValueError, undefined=True, g=lambda g: g[:-1]),
        wrong_input("g is integer", TypeError, g=lambda g: g.long()),
        wrong_input("beta is a cube", ValueError, undefined=True, beta=lambda beta: beta[..., None]),
        wrong_input("beta is integer", TypeError, beta=lambda beta: beta.long()),
        *bounds_errors("q"),
        wrong_option("scale is infinite", "scale", scale=float("inf")),
        wrong_option("scale is negative", "scale", scale=-1.0),
    ],
    speed=Speed(
        shapes={
            # The reference keeps three states per token in float64: 24 GiB.
            "qwen-3.5 text-mix-2k": _bench(2048, 5, 16, 2),
            "qwen-3.5 long-2k": _bench(2048, 1, 16, 2),
        },
        bytes=_bytes,
        flops=_flops,
    ),
)
