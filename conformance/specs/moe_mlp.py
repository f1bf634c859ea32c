"""The MLPs of a mixture of experts."""

from collections.abc import Collection
from math import nan

import torch
from hypothesis import strategies as st

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
    nbytes,
)
from conformance.specs._moe_mlp import ERRORS, experts_of
from conformance.specs.fused_swiglu import GPT_OSS
from conformance.tolerances.bounds import Bound, exact, product, total
from unsloth_ref.kernels import moe_mlp

_BIASES = ("gate_up_bias", "down_bias")


def _build(
    draw: Draw, tokens: int, experts: int, per_token: int, wide: int, biased: int, inner: int, hidden: int
) -> Inputs:
    """`wide` weights of experts are float32 for every dtype under test; `biased` experts have both biases.

    Seed 1 leaves some experts out, seed 2 sends all tokens to one, and seed 3 may send a token to an expert twice.
    """
    x = draw.filled(tokens, hidden)
    gate_up = draw.matrix(experts * 2 * inner, hidden).unflatten(0, (experts, 2 * inner))
    down = draw.matrix(experts * hidden, inner).unflatten(0, (experts, hidden))
    generator = torch.Generator().manual_seed(draw.case.seed)
    scores = torch.rand(tokens, experts, generator=generator)
    if draw.case.seed == 1 and experts > per_token:
        scores[:, :: max(3, per_token + 1)] = -1
    indices = scores.argsort(1, descending=True)[:, :per_token]
    if per_token > experts or draw.case.seed == 3:
        indices = torch.randint(experts, (tokens, per_token), generator=generator)
    if draw.case.seed == 2:
        indices = torch.full((tokens, per_token), experts // 2)
    weights = draw.tensor("rand", tokens, per_token, dtype=torch.float32 if wide else None)
    inputs = {
        "x": x,
        "gate_up": gate_up,
        "down": down,
        "expert_indices": draw.lay_out(indices),
        "expert_weights": weights,
    }
    if biased:
        inputs["gate_up_bias"] = draw.weight(experts * 2 * inner).unflatten(0, (experts, 2 * inner))
        inputs["down_bias"] = draw.weight(experts * hidden).unflatten(0, (experts, hidden))
    return inputs


def _shape(rows: int, columns: int) -> tuple[int, ...]:
    """An even number of columns is that of x, an odd one that of the MLP; odd rows have wide weights and biases."""
    few, columns = 3 + columns % 5, columns if columns <= 130 else 20 + columns % 61
    return rows, 2 + columns % 3, 2, rows % 2, rows % 2, *((few, columns) if columns % 2 == 0 else (columns, few))


def _hidden(budget: int) -> st.SearchStrategy[int]:
    """Numbers of columns around the edges of one tile; the products themselves are those of grouped_gemm."""
    return st.sampled_from([size for size in (16, 1, 5, 20, 31, 33, 64, 65, 129) if size <= max(16, budget // 16)])


def _per_token(call: Call, name: str) -> Bound:
    """The sum over a token's slots of what experts give."""
    sums = [torch.zeros_like(call.inputs["x"]) for _ in range(3)]
    for expert in experts_of(call):
        for into, part in zip(sums, getattr(expert, name).parts(), strict=True):
            into.index_add_(0, expert.slots[0], part)
    return Bound(*sums)


def _per_expert(call: Call, name: str) -> Bound:
    """A gradient of the experts' matrices or biases: dz^T @ x, or the sum of dz or dout."""
    found = [torch.zeros_like(call.inputs[name]) for _ in range(3)]
    for expert in experts_of(call):
        if name.endswith("bias"):
            grad = total(expert.dz if name == "gate_up_bias" else expert.dout, call.elements)
        elif name == "gate_up":
            grad = product(expert.dz.t(), exact(call.inputs["x"][expert.slots[0]]), call.elements)
        else:
            grad = expert.ddown
        for into, part in zip(found, grad.parts(), strict=True):
            into[expert.index] = part
    return Bound(*found)


def _weights_bound(call: Call) -> Bound:
    """The gradient of each slot's weight."""
    found = [torch.zeros_like(call.inputs["expert_weights"]) for _ in range(3)]
    for expert in experts_of(call):
        for into, part in zip(found, expert.dweights.parts(), strict=True):
            into[expert.slots] = part
    return Bound(*found)


def _slots(inputs: Inputs) -> int:
    return inputs["expert_indices"].numel()


def _bytes(inputs: Inputs) -> tuple[int, int]:
    """Forward: x, all matrices and y. Backward: these, dy and dx; the matrices are frozen."""
    x, matrices = nbytes(inputs["x"]), nbytes(inputs["gate_up"], inputs["down"])
    return 2 * x + matrices, 3 * x + matrices


def _flops(inputs: Inputs, options: Options, grads: Collection[str]) -> tuple[int, int]:
    """Forward: both products. Backward: dh, and one product per gradient of x, gate_up and down."""
    down = 2 * _slots(inputs) * inputs["down"][0].numel()
    backward = down if grads else 0
    backward += 2 * down * len({"x", "gate_up"}.intersection(grads)) + down * ("down" in grads)
    return 3 * down, backward


def _saved(inputs: Inputs) -> int:
    """z, and the order and place of each slot."""
    element = inputs["x"].element_size()
    return _slots(inputs) * (inputs["gate_up"].shape[1] * element + 8)


def _working(inputs: Inputs) -> int:
    """Forward: h, and out. Backward: dh, dz, the weighted h and the parts of dx; dy . down_bias of each slot."""
    columns = 2 * inputs["gate_up"].shape[1] + inputs["x"].shape[1]
    return _slots(inputs) * (columns * inputs["x"].element_size() + 4 * ("down_bias" in inputs))


def _no_inner(inputs: Inputs) -> Inputs:
    """No column between the two products; a bias of the second product stays."""
    none = {"gate_up": inputs["gate_up"][:, :0], "down": inputs["down"][..., :0]}
    return none | ({"gate_up_bias": inputs["gate_up_bias"][:, :0]} if "gate_up_bias" in inputs else {})


def _bench(
    tokens: int, experts: int, per_token: int, inner: int, hidden: int, *grads: str, biased: int = 0
) -> dict[str, object]:
    return {
        "tokens": tokens, "experts": experts, "per_token": per_token, "wide": 0, "biased": biased, "inner": inner,
        "hidden": hidden, "grads": grads or ("x", "expert_weights"),
    }  # fmt: skip


spec = Spec(
    reference=moe_mlp,
    drawing=Drawing(
        sizes={
            "tokens": lambda budget: st.integers(1, max(16, min(budget, 40))),
            "experts": lambda budget: st.sampled_from([3, 1, 2, 4]),
            "per_token": lambda budget: st.sampled_from([2, 1, 3]),
            "wide": lambda budget: st.sampled_from([0, 1]),
            "biased": lambda budget: st.sampled_from([0, 1]),
            "inner": lambda budget: st.sampled_from([8, 1, 2, 16, 33]),
            "hidden": _hidden,
        },
        build=_build,
        options={
            "activation": ["silu", "gelu_tanh"],
            "interleaved": [False, True],
            "alpha": [1.0, 1.702],
            "limit": [None, 7.0, 1.0],
            "offset": [0.0, 1.0],
        },
        consistent=lambda options: options["activation"] == "silu" or options["alpha"] == 1.0,
        fills=["randn", "ones", "zeros", "tiny", "outlier"],
        shape=_shape,
    ),
    outputs=["y"],
    grads=["x", "gate_up", "down", "expert_weights", *_BIASES],
    budget=Budget(
        roundings=1,  # that a row may share: of the only z or dh that matters if F is 1
        bounds={
            "y": lambda call: _per_token(call, "weighted"),
            "x": lambda call: _per_token(call, "dx"),
            "gate_up": lambda call: _per_expert(call, "gate_up"),
            "down": lambda call: _per_expert(call, "down"),
            "expert_weights": _weights_bound,
            "gate_up_bias": lambda call: _per_expert(call, "gate_up_bias"),
            "down_bias": lambda call: _per_expert(call, "down_bias"),
        },
    ),
    rowwise=["x", "expert_indices", "expert_weights"],
    bits_vary=BLAS,
    far=["x", "gate_up", "down"],
    exact_laws={
        "expert_weights twice as large": ExactLaw(
            {"expert_weights": 2.0}, dict.fromkeys(["y", "x", "gate_up", "down", *_BIASES], 2.0)
        ),
        "down and its bias negated": ExactLaw(
            {"down": -1.0, "down_bias": -1.0}, dict.fromkeys(["y", "x", "gate_up", "expert_weights", _BIASES[0]], -1.0)
        ),
        "dy four times as large": ExactLaw(
            {}, dict.fromkeys(["x", "gate_up", "down", "expert_weights", *_BIASES], 4.0), grad_outputs=4.0
        ),
    },
    memory=Memory(
        Case(
            (
                ("tokens", 8192),
                ("experts", 4),
                ("per_token", 2),
                ("wide", 0),
                ("biased", 1),
                ("inner", 64),
                ("hidden", 1024),
            )
        ),
        grads=["x", "gate_up", "down", "expert_weights", *_BIASES],
        saved=_saved,
        working=_working,
    ),
    argument_kinds={
        "indices of 32 bits": change_inputs(lambda i: {"expert_indices": i["expert_indices"].int()}),
        "all tokens to the last expert": change_inputs(
            lambda i: {"expert_indices": torch.full_like(i["expert_indices"], len(i["gate_up"]) - 1)}
        ),
        "every expert of a token is the same": change_inputs(
            lambda i: {"expert_indices": i["expert_indices"][:, :1].expand(i["expert_indices"].shape)}
        ),
        "weights in float32": change_inputs(lambda i: {"expert_weights": i["expert_weights"].float() * (1 + 2**-13)}),
        "no column between": change_inputs(_no_inner),
        "a bias of gate_up": change_inputs(lambda i: {"gate_up_bias": 1 + i["gate_up"][..., 0]}),
        "a bias of down": change_inputs(lambda i: {"down_bias": 1 + i["down"][..., 0]}),
    },
    special_values=[nan],  # infinity gives terms of both signs
    errors=ERRORS,
    speed=Speed(
        shapes={
            "qwen-3-moe": _bench(16384, 128, 8, 768, 2048),
            "qwen-3-moe, trained": _bench(16384, 128, 8, 768, 2048, "x", "gate_up", "down", "expert_weights"),
            "mixtral": _bench(8192, 8, 2, 14336, 4096),
            "gpt-oss": _bench(16384, 32, 4, 2880, 2880, biased=1) | GPT_OSS,
        },
        bytes=_bytes,
        flops=_flops,
    ),
)
