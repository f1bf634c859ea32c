"""A gated MLP whose three layers have low-rank adapters; the layers and most errors are those of lora_linears."""

from collections.abc import Callable, Collection
from dataclasses import replace
from math import nan

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
    column_counts,
    leading_dimensions,
    mistake,
    nbytes,
    row_counts,
    wrong_option,
)
from conformance.specs import lora_linear, lora_linears
from conformance.specs._mistakes import one_column_short
from conformance.specs._moe_mlp import activated
from conformance.specs.lora_linears import ADAPTERS, LAYERS, each
from conformance.tolerances.bounds import Bound
from unsloth_ref.kernels import lora_mlp

CHUNK = 4096  # tokens for which a call may hold a few tensors between the layers at once


def _build(draw: Draw, rows: int, rank: int, wide: int, inner: int, columns: int) -> Inputs:
    """Odd seeds have one column more in y than in x."""
    sizes = (inner, columns), (inner, columns), (columns + draw.case.seed % 2, inner)
    return {"x": draw.filled(rows, columns)} | lora_linears.layers(draw, sizes, rank, wide)


def _shape(rows: int, columns: int) -> tuple[int, ...]:
    """An even number of columns is that of x, an odd one that between; an odd number of rows has wide adapters."""
    few = 3 + columns % 29
    return rows, 1 + (columns + 1) % 5, rows % 2, *((columns, few) if columns % 2 else (few, columns))


class _Steps:
    """The layers of a call, each with the error of what the layers before it computed."""

    def __init__(self, call: Call) -> None:
        forward = replace(call, grad_outputs=())
        calls = [lora_linears.layer(forward, index) for index in range(LAYERS)]
        of_gate, of_up = (lora_linear.Steps(one) for one in calls[:2])
        gate, up = (steps.rounded(steps.y()) for steps in (of_gate, of_up))
        activation, slope = activated(gate, call)
        activation = of_gate.rounded(activation)
        hidden = of_gate.rounded(activation * up)
        inputs = calls[2].inputs | {"x": hidden.value}
        of_down = lora_linear.Steps(replace(calls[2], inputs=inputs, grad_outputs=call.grad_outputs), x=hidden)
        if call.grad_outputs:
            of_layer, of_adapter = of_down.terms_of_dx()
            dhidden = of_gate.rounded(of_layer + of_adapter)
            dgate = of_gate.rounded(of_gate.rounded(dhidden * up) * slope)
            dup = of_gate.rounded(dhidden * activation)
            of_gate, of_up = lora_linear.Steps(calls[0], dy=dgate), lora_linear.Steps(calls[1], dy=dup)
        self.layers = of_gate, of_up, of_down


def _y_bound(call: Call) -> Bound:
    y = _Steps(call).layers[2].y()
    return y.reshape((*call.inputs["x"].shape[:-1], y.value.shape[-1]))


def _x_bound(call: Call) -> Bound:
    return lora_linears.sum_of_dx(_Steps(call).layers[:2], call)


def _of_layer(name: str, index: int) -> Callable[[Call], Bound]:
    """The bound of the gradient of a weight, an adapter or a bias."""
    return lambda call: _Steps(call).layers[index].gradient(name)


def _between(inputs: Inputs, tokens: int) -> int:
    """Bytes of a tensor between the layers for so many tokens."""
    return tokens * len(inputs["weight[0]"]) * inputs["x"].element_size()


def _tokens(inputs: Inputs) -> int:
    return inputs["x"].shape[:-1].numel()


def _bytes(inputs: Inputs) -> tuple[int, int]:
    """Forward: x, all weights and y; gate and up are kept. Backward: all of these, dx and the adapters' gradients."""
    x, adapters = nbytes(inputs["x"]), nbytes(*(inputs[name] for name in ADAPTERS))
    y = _tokens(inputs) * len(inputs["weight[2]"]) * inputs["x"].element_size()
    moved = x + y + adapters + nbytes(*(inputs[n] for n in each("weight"))) + 2 * _between(inputs, _tokens(inputs))
    return moved, moved + x + adapters


def _flops(inputs: Inputs, options: Options, grads: Collection[str]) -> tuple[int, int]:
    """Those of each layer; the gradient of what lies between is needed for all that comes before."""
    forward = backward = 0
    for index in range(LAYERS):
        own = {name: inputs[f"{name}[{index}]"] for name in ("weight", "lora_a", "lora_b")}
        own["x"] = (
            inputs["x"] if index < 2 else inputs["x"][..., :1].expand(*inputs["x"].shape[:-1], own["lora_a"].shape[1])
        )
        names = [name for name in own if f"{name}[{index}]" in grads]
        before = [name for name in grads if index == 2 and not name.endswith("[2]")]
        names += ["x"] if before or (index < 2 and "x" in grads) else []
        ones = lora_linear.spec.speed.flops(own, {}, names)
        forward, backward = forward + ones[0], backward + ones[1]
    return forward, backward


def _saved(inputs: Inputs) -> int:
    """Gate, up, and the product of each layer's input with lora_a^T."""
    return 2 * _between(inputs, _tokens(inputs)) + lora_linears.low_bytes(inputs)


def _working(inputs: Inputs) -> int:
    """Of a chunk: dgate, dup, what they are multiplied with, and gradients of low. All adapters, rounded and summed."""
    tokens = min(_tokens(inputs), CHUNK)
    adapters = sum(inputs[name].numel() for name in ADAPTERS)
    return 3 * _between(inputs, tokens) + lora_linears.low_bytes(inputs) * tokens // _tokens(inputs) + 8 * adapters


def _without_columns(inputs: Inputs) -> Inputs:
    names = "x", *each("weight")[:2], *each("lora_a")[:2]
    return {name: inputs[name][..., :0] for name in names} | lora_linears.biases(inputs)


def _nothing_between(inputs: Inputs) -> Inputs:
    """Rows of the first two layers and columns of the last."""
    rows, columns = (*each("weight")[:2], *each("lora_b")[:2]), ("weight[2]", "lora_a[2]")
    changed = {name: inputs[name][:0] for name in rows} | {name: inputs[name][:, :0] for name in columns}
    return changed | {
        "bias[0]": inputs["x"][0, :0],
        "bias[1]": inputs["x"][0, :0],
        "bias[2]": inputs["weight[2]"][:, 0],
    }


def _bench(inner: int, columns: int, tokens: int = 16384, **options: str) -> dict[str, object]:
    """Frozen layers with adapters of rank 16, in float32 as peft keeps them."""
    sizes: dict[str, object] = {"rows": tokens, "rank": 16, "wide": 1, "inner": inner, "columns": columns}
    return sizes | options | {"grads": ("x", *ADAPTERS)}


BEFORE = [f"{name}[{index}]" for name in ("weight", "lora_a", "lora_b", "bias") for index in range(2)]

spec = Spec(
    reference=lora_mlp,
    drawing=Drawing(
        sizes={
            "rows": lambda budget: row_counts(max(budget, 16)),
            "rank": lambda budget: st.sampled_from([1, 4, 8, 16, 24, 129]),
            "wide": lambda budget: st.sampled_from([0, 1]),
            "inner": lambda budget: st.sampled_from([8, 1, 2, 16, 33, 64]),
            "columns": column_counts,
        },
        build=_build,
        options={
            "scaling": [None, (1.0, 2.0, 0.25)],  # with 0, BLAS libraries do not read what may be NaN
            "activation": ["silu", "gelu", "gelu_tanh"],
        },
        fills=["randn", "ones", "zeros", "tiny", "outlier"],
        shape=_shape,
    ),
    outputs=["y"],
    grads=["x", *each("weight"), *ADAPTERS, *each("bias")],
    budget=Budget(
        roundings=1,  # that a row may share: of the only element between the layers
        bounds={"y": _y_bound, "x": _x_bound}
        | {
            f"{name}[{index}]": _of_layer(name, index)
            for name in ("weight", "lora_a", "lora_b", "bias")
            for index in range(LAYERS)
        },
    ),
    rowwise=["x"],
    bits_vary=BLAS,
    exact_laws={
        "the last layer negated": ExactLaw(
            {"weight[2]": -1.0, "lora_b[2]": -1.0},
            dict.fromkeys(["y", "x", *BEFORE, "lora_a[2]"], -1.0),
            without=each("bias"),
        ),
        "lora_b half as large, with twice the scaling": lora_linears.spec.exact_laws[
            "lora_b half as large, with twice the scaling"
        ],
        "dy four times as large": ExactLaw(
            {}, dict.fromkeys(["x", *each("weight"), *ADAPTERS, *each("bias")], 4.0), grad_outputs=4.0
        ),
    },
    memory=Memory(
        Case((("rows", 16384), ("rank", 16), ("wide", 1), ("inner", 4096), ("columns", 1024))),
        grads=["x", *ADAPTERS],
        saved=_saved,
        working=_working,
    ),
    argument_kinds=leading_dimensions("x")
    | {
        "biases": change_inputs(lora_linears.biases),
        "one adapter in float32": lora_linears.spec.argument_kinds["one adapter in float32"],
        "a scaling of 0": lambda inputs, options: (inputs, {**options, "scaling": (0.5, 0.0, 1.0)}),
        "one of rank 0": lora_linears.spec.argument_kinds["one of rank 0"],
        "no columns but biases": change_inputs(_without_columns),
        "nothing between but biases": change_inputs(_nothing_between),
        "no output": lora_linears.spec.argument_kinds["one without output"],
        "thousands of rows": change_inputs(lambda i: {"x": i["x"].repeat(1500, 1)}),
    },
    special_values=[nan],  # infinity gives terms of both signs, and inf or NaN with a scaling of 0
    errors=[
        *lora_linears.spec.errors,
        mistake(
            "up has one row more than gate",
            ValueError,
            "weight[1]",
            lambda i: {n: i[n].repeat(2, 1)[: len(i[n]) + 1] for n in ("weight[1]", "lora_b[1]")},
            undefined=True,
        ),
        one_column_short("weight[2]", undefined=False),
        wrong_option("activation is unknown", "activation", activation="relu"),
    ],
    speed=Speed(
        shapes={
            "llama-3.2-1b": _bench(8192, 2048),
            "llama-3.2-1b, few": _bench(8192, 2048, tokens=2048),
            "llama-3.2-1b, long": _bench(8192, 2048, tokens=32768),
            "llama-3.1-8b": _bench(14336, 4096),
            "gemma-2-2b": _bench(9216, 2304, activation="gelu_tanh"),
        },
        bytes=_bytes,
        flops=_flops,
    ),
)
