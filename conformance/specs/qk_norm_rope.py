"""The norm of the heads of queries and keys, then their rotary position embedding; most parts are those of rope."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from hypothesis import strategies as st
from torch import Tensor

from conformance.case import Case, Draw
from conformance.promises import ExactLaw, Memory, Parts
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
from conformance.specs import rms_norm, rope
from conformance.specs._mistakes import one_short
from conformance.tolerances.bounds import UNIT_FLOAT32, Terms, root_of_mean
from unsloth_ref.kernels import qk_norm_rope

# Of the normalised heads n and their products with the weight; of the products with cos and sin, before their sum;
# backward of those, and of the gradients of the products and of n.
ROUNDINGS = 4
KINDS = (
    "halves of cos and sin differ", "cos and sin in float32", "a table", "a table and one row of positions",
    "queries alone", "keys alone",
)  # fmt: skip
MISTAKES = ("k has another width", "k has another dtype", "cos is wider than q", "a position is the table's length")


def _build(draw: Draw, **sizes: int) -> Inputs:
    inputs = rope.spec.drawing.build(draw, **sizes)
    width = inputs["q"].shape[-1]
    q, k = inputs.pop("q"), inputs.pop("k")
    return {"q": q, "k": k, "q_weight": draw.weight(width), "k_weight": draw.weight(width), **inputs}


def _shape(rows: int, columns: int) -> tuple[int, ...]:
    """Columns up to 256 are the width of a head; few heads of one token each, for tokens take the interpreter long."""
    rotary = max(2, min(columns, 256) // 2 * 2)
    return rows, 1 + columns % 3, 1 + columns % 2, 1, rotary, columns % 2 if columns > 2 else 0, 0


def _of(call: Call, name: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of the heads q or k: the normalised ones n, r, and offset + weight, itself and the sum of both sizes."""
    x, weight, offset = call.inputs[name], call.inputs[f"{name}_weight"], call.options.get("offset", 0.0)
    n, r = rms_norm.normed(replace(call, inputs={"x": x}))
    return n, r, weight + offset, weight.abs() + abs(offset)


def _forward_terms(call: Call, name: str) -> Terms:
    """rope's, of the sizes of the normalised heads, which small numbers and cancelling weights make larger."""
    n, _, scale, size = _of(call, name)
    rotated = rope.spec.budget.terms["rotated_q"]
    heads = (n.abs() + 2 * call.smallest) * size + call.smallest
    whole, exact = (
        rotated(replace(call, inputs={**call.inputs, "q": part}, dtype=torch.float32)) for part in (heads, n * scale)
    )
    assert isinstance(whole, Terms) and isinstance(exact, Terms)
    return Terms(whole.size, root=exact.root)


def _gradient_of_normed(call: Call, name: str) -> Terms:
    """rope's terms of the gradient of the normalised and weighted heads."""
    dy = call.grad_outputs[("q", "k").index(name)]
    terms = rope.spec.budget.terms["q"](replace(call, grad_outputs=[dy]))
    assert isinstance(terms, Terms) and terms.root is not None
    return terms


def _x_terms(call: Call, name: str) -> Terms:
    """As rms_norm's: r (|g| + |n| mean |g n|), where g is a sum of two terms times the weight."""
    n, r, scale, larger = _of(call, name)
    d = _gradient_of_normed(call, name)
    assert d.root is not None
    g, root = d.size * larger, d.root * scale.abs()
    size = g + n.abs() * (g * n.abs()).mean(-1, keepdim=True) + 2 * call.smallest
    return Terms(r * size, root=r * torch.hypot(root, n * root_of_mean(root * n)))


def _weight_terms(call: Call, name: str) -> Terms:
    """Sum |d n| over tokens and heads; d and n are rounded to the dtype of q, if the weight is wider too."""
    n, d = _of(call, name)[0], _gradient_of_normed(call, name)
    assert d.root is not None
    factor = call.unit / UNIT_FLOAT32 if f"{name}_weight" in call.wider else 1.0
    size = (n.abs() + 2 * call.smallest) * d.size + call.smallest * n.abs()
    return Terms(factor * size, root=factor * (d.root * n).abs(), in_float32=size).over_rows()


def _sequences(inputs: Inputs, chosen: Sequence[int]) -> tuple[Inputs, Options, Tensor]:
    """A call with these sequences alone."""
    assert rope.spec.independent is not None
    return rope.spec.independent.pick(inputs, chosen)


def _bench(heads: int, kv_heads: int, width: int) -> dict[str, int]:
    return {
        "batch": 4, "heads": heads, "kv_heads": kv_heads, "length": 2048, "rotary": width, "rest": 0, "table": 0,
    }  # fmt: skip


def bytes_moved(inputs: Inputs) -> tuple[int, int]:
    """Forward: q and k are read and written. Backward: two gradients, q and k are read, two gradients are written."""
    heads, rest = nbytes(inputs["q"], inputs["k"]), nbytes(inputs["cos"], inputs["sin"])
    return 2 * heads + rest, 3 * heads + rest


spec = Spec(
    reference=qk_norm_rope,
    drawing=Drawing(
        sizes={
            "batch": lambda budget: st.integers(1, max(1, min(budget, 2))),
            "heads": lambda budget: st.integers(1, max(1, min(budget, 5))),
            "kv_heads": lambda budget: st.integers(1, max(1, min(budget, 3))),
            "length": lambda budget: st.integers(1, max(1, min(budget, 2))),
            "rotary": lambda budget: st.sampled_from(rope.ROTARY),
            "rest": lambda budget: st.sampled_from([0, 0, 1, 16, 33]),
            "table": lambda budget: st.sampled_from([0, 7]),
        },
        build=_build,
        options={"eps": [1e-6, 0.5], "offset": [0.0, 1.0], "casting": ["llama", "gemma"]},
        shape=_shape,
        counts={"batch": 2**24, "length": 2**24},
    ),
    outputs=["rotated_q", "rotated_k"],
    grads=["q", "k", "q_weight", "k_weight"],
    budget=Budget(
        roundings=ROUNDINGS,
        terms={
            "rotated_q": lambda call: _forward_terms(call, "q"),
            "rotated_k": lambda call: _forward_terms(call, "k"),
            "q": lambda call: _x_terms(call, "q"),
            "k": lambda call: _x_terms(call, "k"),
            "q_weight": lambda call: _weight_terms(call, "q"),
            "k_weight": lambda call: _weight_terms(call, "k"),
        },
    ),
    rowwise=["q", "k"],
    independent=Parts(lambda inputs: len(inputs["q"]), _sequences, ["q", "k"]),
    exact_laws={
        "q and k twice as large, with four times the eps": ExactLaw(
            {"q": 2.0, "k": 2.0}, {"q": 0.5, "k": 0.5}, options=rms_norm.times_four
        ),
        "q and k negated": ExactLaw(
            {"q": -1.0, "k": -1.0}, {"rotated_q": -1.0, "rotated_k": -1.0, "q_weight": -1.0, "k_weight": -1.0}
        ),
        "gradients four times as large": ExactLaw(
            {}, dict.fromkeys(("q", "k", "q_weight", "k_weight"), 4.0), grad_outputs=4.0
        ),
    },
    memory=Memory(
        Case(tuple(_bench(32, 8, 128).items())),
        grads=["q", "k", "q_weight", "k_weight"],
        saved=lambda inputs: 4 * (inputs["q"].numel() + inputs["k"].numel()) // inputs["q"].shape[-1],
        working=lambda inputs: 8 * rms_norm.PROGRAMS * inputs["q"].shape[-1],
    ),
    argument_kinds={name: rope.spec.argument_kinds[name] for name in KINDS}
    | {
        "heads that a kernel may take in several steps": change_inputs(
            lambda i: {name: i[name].repeat(1, 40, 1, 1) for name in ("q", "k")}
        ),
        "weights in float32": change_inputs(
            lambda i: {name: i[name].float() * (1 + 2**-13) for name in ("q_weight", "k_weight")}
        ),
    },
    special_values=rms_norm.SPECIAL_VALUES,
    errors=[
        *(error for error in rope.spec.errors if error.what in MISTAKES),
        *(error for error in rms_norm.spec.errors if error.names in ("eps", "casting")),
        one_short("q_weight"),
        mistake("k_weight is a matrix", ValueError, "k_weight", lambda i: {"k_weight": i["k_weight"][None]}),
        mistake("k_weight is integer", TypeError, "k_weight", lambda i: {"k_weight": i["k_weight"].long()}),
    ],
    speed=Speed(
        shapes={
            "qwen3-8b": _bench(32, 8, 128),
            "qwen3-8b, frozen weights": {**_bench(32, 8, 128), "grads": ["q", "k"]},
            "gemma-3-4b": {**_bench(8, 4, 256), "offset": 1.0, "casting": "gemma"},
        },
        bytes=bytes_moved,
        layout="transposed",  # token by token, as projections produce them
    ),
)
