"""Three linear layers with low-rank adapters of one input, as those of queries, keys and values."""

from collections.abc import Callable, Collection, Mapping, Sequence
from copy import copy
from dataclasses import replace
from math import nan
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from conformance.case import Case, Draw
from conformance.promises import BLAS, ExactLaw, Memory
from conformance.spec import (
    Budget,
    Call,
    Drawing,
    ErrorCase,
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
)
from conformance.specs import lora_linear
from conformance.specs._mistakes import one_column_short, one_row_short
from conformance.tolerances.bounds import Bound
from unsloth_ref.accuracy import ROUNDING_RMS
from unsloth_ref.kernels import lora_linears

LAYERS = 3


def each(name: str) -> list[str]:
    """The names of an input of all layers."""
    return [f"{name}[{index}]" for index in range(LAYERS)]


ADAPTERS = [*each("lora_a"), *each("lora_b")]


def layers(draw: Draw, sizes: Sequence[tuple[int, int]], rank: int, wide: int) -> Inputs:
    """Layers of these sizes, outputs and inputs of each. Odd seeds have biases, and a rank of its own per layer."""
    odd = draw.case.seed % 2
    ranks = [rank + odd * index for index in range(LAYERS)]
    adapters = copy(draw)
    if wide:
        adapters.dtype = torch.float32
    every = list(zip(sizes, ranks, strict=True))
    inputs = {name: draw.matrix(*size) for name, size in zip(each("weight"), sizes, strict=True)}
    inputs |= {n: adapters.matrix(own, columns) for n, ((_, columns), own) in zip(each("lora_a"), every, strict=True)}
    inputs |= {n: adapters.matrix(out, own) for n, ((out, _), own) in zip(each("lora_b"), every, strict=True)}
    return inputs | ({n: draw.weight(out) for n, (out, _) in zip(each("bias"), sizes, strict=True)} if odd else {})


def _build(draw: Draw, rows: int, rank: int, wide: int, columns: int, out: int, others: int) -> Inputs:
    """`out` columns of the first y, `others` of each other."""
    sizes = (out, columns), (others, columns), (others, columns)
    return {"x": draw.filled(rows, columns)} | layers(draw, sizes, rank, wide)


def _shape(rows: int, columns: int) -> tuple[int, ...]:
    """An even number of columns is that of x, an odd one that of the first y; an odd number of rows, wide adapters."""
    few = 3 + columns % 29
    return rows, 1 + (columns + 1) % 5, rows % 2, *((few, columns) if columns % 2 else (columns, few)), few


def _arguments(inputs: Inputs) -> Mapping[str, Any]:
    """Those of a call: layers without a bias beside others with one have None."""
    given = [inputs.get(name) for name in each("bias")]
    if all(one is None for one in given) or not any(one is None for one in given):
        return inputs
    return {name: tensor for name, tensor in inputs.items() if not name.startswith("bias")} | {"bias": given}


def layer(call: Call, index: int) -> Call:
    """The call of lora_linear that computes one layer."""
    names = {f"{name}[{index}]": name for name in ("weight", "lora_a", "lora_b", "bias")}
    inputs = {names.get(name, name): t for name, t in call.inputs.items() if name in names or name == "x"}
    scaling = call.options.get("scaling")
    options = {} if scaling is None else {"scaling": scaling[index]}
    return replace(call, inputs=inputs, options=options, grad_outputs=call.grad_outputs[index : index + 1])


def _of_layer(name: str, index: int) -> Callable[[Call], Bound]:
    """The bound that lora_linear has for this output or gradient."""
    return lambda call: lora_linear.spec.budget.bounds[name](layer(call, index))


def sum_of_dx(each_layer: Sequence[lora_linear.Steps], call: Call) -> Bound:
    """The gradient of x: the terms of all layers and adapters, each rounded; each addition rounds, except the last."""
    terms = [term for steps in each_layer for term in steps.terms_of_dx()]
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    # In any order: no partial sum is larger than the sum of sizes; its mean square is at most that of all terms.
    size = sum((t.value.abs() + t.error for t in terms), torch.zeros_like(total.value))
    square = sum((t.value.square() for t in terms), torch.zeros_like(total.value))
    additions = len(terms) - 2
    error = total.error + additions * call.unit * ((1 + call.unit) ** additions * size + call.smallest)
    rounding = additions * (ROUNDING_RMS * call.unit) ** 2 * square
    return Bound(total.value, error, total.square + rounding).reshape(call.inputs["x"].shape)


def _bytes(inputs: Inputs) -> tuple[int, int]:
    """Forward: x, all weights and each y. Backward: these, dx and the adapters' gradients; the weights are frozen."""
    x, adapters = inputs["x"], nbytes(*(inputs[name] for name in ADAPTERS))
    weights = [inputs[name] for name in each("weight")]
    read = nbytes(x, *weights) + adapters
    y = x[..., 0].numel() * sum(map(len, weights)) * x.element_size()
    return read + y, read + y + nbytes(x) + adapters


def _flops(inputs: Inputs, options: Options, grads: Collection[str]) -> tuple[int, int]:
    """Those of each layer."""
    forward = backward = 0
    for index in range(LAYERS):
        own = {name: inputs[f"{name}[{index}]"] for name in ("weight", "lora_a", "lora_b")} | {"x": inputs["x"]}
        ones = lora_linear.spec.speed.flops(own, {}, [n for n in own if n == "x" in grads or f"{n}[{index}]" in grads])
        forward, backward = forward + ones[0], backward + ones[1]
    return forward, backward


def low_bytes(inputs: Inputs) -> int:
    """The products of x with each lora_a^T."""
    ranks = sum(len(inputs[name]) for name in each("lora_a"))
    return inputs["x"][..., 0].numel() * ranks * inputs["x"].element_size()


def _option_error(
    what: str, raises: type[Exception], names: str, name: str, value: Callable[[Inputs], object]
) -> ErrorCase:
    """A wrong option, or a wrong bias: in the signature, an option precedes it."""

    def change(inputs: Inputs, options: Options) -> tuple[Inputs, Options]:
        return inputs, {**options, name: value(inputs)}

    return ErrorCase(what, change, raises, names, undefined=True)


def _without(name: str) -> ErrorCase:
    """A layer without one of its tensors."""

    def change(inputs: Inputs, options: Options) -> tuple[Inputs, Options]:
        return {n: t for n, t in inputs.items() if n != f"{name}[{LAYERS - 1}]"}, options

    return ErrorCase(f"one {name} too few", change, ValueError, name, undefined=True)


def biases(inputs: Inputs) -> dict[str, Tensor]:
    """A bias of each layer."""
    return {f"bias[{index}]": inputs[f"weight[{index}]"][:, 0].contiguous() for index in range(LAYERS)}


def _bench(columns: int, out: int, others: int, tokens: int = 16384) -> dict[str, object]:
    """Frozen layers with adapters of rank 16, in float32 as peft keeps them."""
    sizes: dict[str, object] = {"rows": tokens, "rank": 16, "wide": 1, "columns": columns, "out": out, "others": others}
    return sizes | {"grads": ("x", *ADAPTERS)}


spec = Spec(
    reference=lora_linears,
    drawing=Drawing(
        sizes={
            "rows": lambda budget: row_counts(max(budget, 16)),
            "rank": lambda budget: st.sampled_from([1, 4, 8, 16, 24, 129]),
            "wide": lambda budget: st.sampled_from([0, 1]),
            "columns": column_counts,
            "out": lambda budget: st.sampled_from([1, 2, 4, 16, 33, 64]),
            "others": lambda budget: st.sampled_from([1, 3, 8, 16]),
        },
        build=_build,
        options={"scaling": [None, (1.0, 2.0, 0.25), (0.5, 0.0, 1.0)]},
        shape=_shape,
    ),
    outputs=["q", "k", "v"],
    grads=["x", *each("weight"), *ADAPTERS, *each("bias")],
    budget=Budget(
        roundings=1,  # that a row may share, as in lora_linear
        bounds={name: _of_layer("y", index) for index, name in enumerate(("q", "k", "v"))}
        | {"x": lambda call: sum_of_dx([lora_linear.Steps(layer(call, index)) for index in range(LAYERS)], call)}
        | {
            f"{name}[{index}]": _of_layer(name, index)
            for name in ("weight", "lora_a", "lora_b", "bias")
            for index in range(LAYERS)
        },
    ),
    arguments=_arguments,
    rowwise=["x"],
    bits_vary=BLAS,
    exact_laws={
        "x twice as large": ExactLaw(
            {"x": 2.0}, dict.fromkeys(["q", "k", "v", *each("weight"), *ADAPTERS], 2.0), without=each("bias")
        ),
        "lora_b half as large, with twice the scaling": ExactLaw(
            dict.fromkeys(each("lora_b"), 0.5),
            dict.fromkeys(each("lora_b"), 2.0),
            options=lambda options: {"scaling": tuple(2 * s for s in options.get("scaling") or [1.0] * LAYERS)},
        ),
        "each dy four times as large": ExactLaw(
            {}, dict.fromkeys(["x", *each("weight"), *ADAPTERS, *each("bias")], 4.0), grad_outputs=4.0
        ),
    },
    memory=Memory(
        Case((("rows", 16384), ("rank", 16), ("wide", 1), ("columns", 2048), ("out", 4096), ("others", 1024))),
        grads=["x", *ADAPTERS],
        saved=low_bytes,
        # Its gradient; all adapters in the dtype of x, and a float32 sum.
        working=lambda i: low_bytes(i) + 8 * sum(i[name].numel() for name in ADAPTERS),
    ),
    argument_kinds=leading_dimensions("x")
    | {
        "biases": change_inputs(biases),
        "a bias of the last layer alone": change_inputs(lambda i: dict([biases(i).popitem()])),
        "one adapter in float32": change_inputs(
            lambda i: {n: i[n].float() * (1 + 2**-13) for n in ("lora_a[1]", "lora_b[1]")}
        ),
        "one of rank 0": change_inputs(lambda i: {"lora_a[1]": i["lora_a[1]"][:0], "lora_b[1]": i["lora_b[1]"][:, :0]}),
        "no columns but biases": change_inputs(
            lambda i: {n: i[n][..., :0] for n in ("x", *each("weight"), *each("lora_a"))} | biases(i)
        ),
        "one without output": change_inputs(lambda i: {n: i[n][:0] for n in ("weight[2]", "lora_b[2]")}),
    },
    special_values=[nan],  # infinity gives terms of both signs, and inf or NaN with a scaling of 0
    errors=[
        _without("lora_a"),
        _without("lora_b"),
        _option_error("two scalings", ValueError, "scaling", "scaling", lambda i: (1.0, 2.0)),
        _option_error("one bias", ValueError, "bias", "bias", lambda i: [i["weight[0]"][:, 0]]),
        _option_error(
            "a bias is one short", ValueError, "bias[1]", "bias", lambda i: [None, i["weight[1]"][1:, 0], None]
        ),
        one_column_short("weight[1]"),
        mistake("a weight is wider than x", TypeError, "weight[2]", lambda i: {"weight[2]": i["weight[2]"].double()}),
        one_column_short("lora_a[2]"),
        one_row_short("lora_b[0]"),
        mistake("a lora_b would broadcast", ValueError, "lora_b[1]", lambda i: {"lora_b[1]": i["lora_b[1]"][:1]}),
        mistake("x has no dimension", ValueError, "x", lambda i: {"x": i["x"][0, 0]}, undefined=True),
        mistake("x is integer", TypeError, "x", lambda i: {"x": i["x"].long()}),
        mistake(
            "an adapter is narrower than x",
            TypeError,
            "lora_a[1]",
            lambda i: {n: i[n].to(torch.bfloat16) for n in ("lora_a[1]", "lora_b[1]")},
        ),
        mistake("an adapter of two dtypes", TypeError, "lora_b[2]", lambda i: {"lora_b[2]": i["lora_b[2]"].half()}),
    ],
    speed=Speed(
        shapes={
            "llama-3.2-1b q, k, v": _bench(2048, 2048, 512),
            "llama-3.2-1b q, k, v, few": _bench(2048, 2048, 512, tokens=4096),
            "llama-3.1-8b q, k, v": _bench(4096, 4096, 1024),
        },
        bytes=_bytes,
        flops=_flops,
    ),
)
