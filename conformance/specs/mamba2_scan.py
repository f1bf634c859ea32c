"""The scan of Mamba 2 on packed documents.

No input is row-wise: an output depends on all earlier rows of its document, and a gradient on all rows of it. Steps are
those of models, softplus of a number in float32, as are rates: weak decays in some heads and strong ones in others.
"""

from collections.abc import Collection
from copy import copy

import torch
from hypothesis import strategies as st
from torch import Generator

from conformance.case import Case, Draw
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
)
from conformance.specs._documents import bounds_errors, document_kinds, documents_as_parts, laid_out
from conformance.specs._mamba2_scan import sizes_of
from conformance.specs._mistakes import one_short, wrong_input
from conformance.tolerances.bounds import Terms
from unsloth_ref.kernels import mamba2_scan

WIDTHS = (16, 64, 128, 32, 1, 7, 33, 80)
TENSORS = ("x", "dt", "b", "c")  # those with an entry per token
GRADS = ("x", "dt", "a", "b", "c", "d")


def _build(draw: Draw, tokens: int, documents: int, kv_heads: int, group: int, width: int, columns: int) -> Inputs:
    """Fills are those of x, b and c. Rates are never a number of 16 bits, so that their gradient is seen to be wide."""
    generator, heads = Generator().manual_seed(draw.case.seed), kv_heads * group
    steps = torch.randn((tokens, heads), generator=generator, dtype=torch.float64) - 1
    rates = torch.exp(torch.linspace(2, -3, max(2, heads), dtype=torch.float64))[:heads]
    in_float32 = copy(draw)
    in_float32.dtype = torch.float32
    return {
        "x": draw.filled(tokens, heads, columns),
        "dt": in_float32.place(torch.nn.functional.softplus(steps)),
        "a": in_float32.place(-rates),
        "b": draw.filled(tokens, kv_heads, width),
        "c": draw.filled(tokens, kv_heads, width),
        "d": draw.weight(heads),
        "cu_seqlens": laid_out(draw, tokens, documents),
    }


def _shape(rows: int, columns: int) -> tuple[int, ...]:
    """Columns up to 130 are the width of a head, more are tokens, including sizes around the ends of chunks."""
    if columns <= 130 or rows == 0:
        # Once nine heads share a key, more than in random cases: kernels loop over them.
        heads = 1 + columns % 2, 9 if (rows, columns) == (3, 7) else 1 + columns % 2
        return min(rows, 40), 1 + rows % 2, *heads, max(1, columns), max(1, (columns + 3) % 31)
    tokens = 130 + columns % 7 if rows == 1 else 30 + columns % 31
    return tokens, min(rows, 2), 1, 1 + columns % 2, WIDTHS[columns % 3], 1 + columns % 31


def _terms(name: str, call: Call) -> Terms:
    return sizes_of(call)[name].terms(call, wide=name in call.wider)


def _bytes(inputs: Inputs) -> tuple[int, int]:
    """Forward: the inputs are read and y is written. Backward: these are read, and the gradients are written."""
    x, b, dt = (nbytes(inputs[name]) for name in ("x", "b", "dt"))
    return 2 * x + 2 * b + dt, 3 * x + 4 * b + 2 * dt


def _flops(inputs: Inputs, options: Options, grads: Collection[str]) -> tuple[int, int]:
    """Two products with a state per token forward, five backward; those within a chunk could be of any length."""
    (tokens, heads, columns), width = inputs["x"].shape, inputs["b"].shape[2]
    product = 2 * tokens * heads * columns * width
    return 2 * product, 5 * product if grads else 0


def _scratch(inputs: Inputs) -> int:
    """Two states per chunk: of 64 tokens in bfloat16, else of 32 tokens in float32; two sums per token, in float32.

    Programs that add up 8 heads of a group also write the gradients of b and c in float32, if it has more: one program
    for all of them would leave most of a GPU idle.
    """
    (tokens, heads, columns), (_, kv_heads, width) = inputs["x"].shape, inputs["b"].shape
    rows, size = (64, 2) if inputs["x"].dtype == torch.bfloat16 else (32, 4)
    states = (tokens // rows + len(inputs["cu_seqlens"]) - 1) * heads * 2 * size * width * columns
    splits = -(-heads // (8 * kv_heads))
    return states + 8 * tokens * heads + 16 * heads + (8 * splits * inputs["b"].numel() if splits > 1 else 0)


def _bench(tokens: int, documents: int, kv_heads: int, group: int, width: int, columns: int) -> dict[str, int]:
    sizes = {"tokens": tokens, "documents": documents, "kv_heads": kv_heads, "group": group}
    return sizes | {"width": width, "columns": columns}


spec = Spec(
    reference=mamba2_scan,
    drawing=Drawing(
        sizes={
            # The interpreter takes a tenth of a second per chunk and head: on a CPU most cases have one of each.
            "tokens": lambda budget: st.integers(1, 100) if budget > 2**15 else st.sampled_from([5, 1, 2, 17, 36]),
            "documents": lambda budget: st.integers(1, 3) if budget > 2**15 else st.sampled_from([1, 1, 2]),
            "kv_heads": lambda budget: st.sampled_from([1, 2, 3] if budget > 2**15 else [1]),
            "group": lambda budget: st.sampled_from([1, 2, 3] if budget > 2**15 else [1, 1, 2]),
            "width": lambda budget: st.sampled_from(WIDTHS if budget > 2**15 else (16, 7, 1, 33)),
            "columns": lambda budget: st.sampled_from([16, 8, 33, 1] if budget > 2**15 else [16, 16, 8, 33, 1]),
        },
        build=_build,
        shape=_shape,
        counts={"tokens": 256, "documents": 64},
    ),
    outputs=["y"],
    grads=GRADS,
    budget=Budget(
        roundings=2,  # of what is added to a state, then of the state, which kernels may multiply on tensor cores
        terms={name: lambda call, name=name: _terms(name, call) for name in ("y", *GRADS)},
    ),
    independent=documents_as_parts(TENSORS, TENSORS),
    far=["x", "b", "c"],
    exact_laws={
        "x twice as large": ExactLaw({"x": 2.0}, dict.fromkeys(["y", "dt", "a", "b", "c", "d"], 2.0)),
        "b and d negated": ExactLaw({"b": -1.0, "d": -1.0}, dict.fromkeys(["y", "x", "dt", "a", "c"], -1.0)),
        "steps and d twice as large, with half the rates": ExactLaw(
            {"dt": 2.0, "a": 0.5, "d": 2.0}, {"y": 2.0, "x": 2.0, "a": 4.0, "b": 2.0, "c": 2.0}
        ),
        "dy four times as large": ExactLaw({}, dict.fromkeys(GRADS, 4.0), grad_outputs=4.0),
    },
    memory=Memory(
        Case(
            (("tokens", 2048), ("documents", 2), ("kv_heads", 1), ("group", 16), ("width", 128), ("columns", 64)),
        ),
        grads=GRADS,
        working=_scratch,
    ),
    argument_kinds=document_kinds(TENSORS)
    | {
        "hardly any decay": change_inputs(lambda i: {"a": i["a"] * 2**-40}),
        "a decay that leaves nothing": change_inputs(lambda i: {"a": i["a"] * 2**10}),
        "some steps of 0": change_inputs(
            lambda i: {"dt": i["dt"] * (torch.arange(len(i["dt"])) % 3 > 0).to(i["dt"])[:, None]}
        ),
        "dt as narrow as x": change_inputs(lambda i: {"dt": i["dt"].to(i["x"].dtype)}),
        "d in float32": change_inputs(lambda i: {"d": i["d"].float() * (1 + 2**-13)}),
    },
    errors=[
        wrong_input("x is a matrix", ValueError, undefined=True, x=lambda x: x[0]),
        mistake("x is integer", TypeError, "x", lambda i: {name: i[name].long() for name in "xbc"}),
        wrong_input("b has another length", ValueError, undefined=True, b=lambda b: b[:-1]),
        wrong_input("b has another dtype", TypeError, b=lambda b: b.double()),
        wrong_input("c has another width", ValueError, undefined=True, c=lambda c: c[..., :-1]),
        wrong_input("c has another dtype", TypeError, c=lambda c: c.double()),
        mistake(
            "heads of b do not divide those of x",
            ValueError,
            "b",
            lambda i: {name: i[name].repeat(1, 1 + i["x"].shape[1], 1) for name in "bc"},
            undefined=True,
        ),
        wrong_input("dt has another length", ValueError, undefined=True, dt=lambda dt: dt[:-1]),
        wrong_input("dt is integer", TypeError, dt=lambda dt: dt.long()),
        wrong_input("a has an entry per token", ValueError, a=lambda a: a.expand(3, -1)),
        wrong_input("a is integer", TypeError, a=lambda a: a.long()),
        one_short("d"),
        wrong_input("d is integer", TypeError, d=lambda d: d.long()),
        *bounds_errors("x"),
    ],
    speed=Speed(
        shapes={
            # The reference keeps a state per token in float64: 32 GiB.
            "granite-4 text-mix-2k": _bench(2048, 5, 1, 128, 128, 64),
            "nemotron-h long-2k": _bench(2048, 1, 8, 16, 128, 64),
            "falcon-h1 text-mix-2k": _bench(2048, 5, 1, 24, 256, 128),
        },
        bytes=_bytes,
        flops=_flops,
    ),
)
