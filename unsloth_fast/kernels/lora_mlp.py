"""A gated MLP whose three layers have low-rank adapters, which keeps no activation besides gate and up.

    [low_0, low_1] = x @ [lora_a_0; lora_a_1]^T       low_2 = h @ lora_a_2^T
    gate, up, y: each layer of x, x and h = a(gate) * up, as in `lora_linears`
    dh = dy @ weight_2 + dlow_2 @ lora_a_2            dgate, dup, and h again: one kernel, of `_gated.py`
    dx = dgate @ weight_0 + dup @ weight_1 + [dlow_0, dlow_1] @ [lora_a_0; lora_a_1]
    dlow_i, dlora_a_i, dlora_b_i, dweight_i, dbias_i: as in `lora_linears`

Both passes take CHUNK tokens at a time from gate and up on. h is computed for the tokens of a chunk and dropped; the
backward pass computes it again, from gate and up, in the kernel that computes their gradients, and writes dgate over
dh. So besides inputs, results and what is saved, there are at most CHUNK F elements forward and 3 CHUNK F backward.
Saved: x, gate, up, low, all weights and adapters; nothing that is saved is written to. A weight in 4 bits or float8 is
dequantised for each product, to the dtype of x: there is one such copy at a time. With float8, x^ and the h^ of a
chunk, quantised as in `fp8_linear`, come on top in the forward pass.

All products are the library's; sums are made by the products, in place. Precision is that of `lora_linear` and the
gated activations: sums in float32; gate, up, h, dh, dgate, dup, low, dlow and the partial sums of dx are rounded to
x.dtype. Gradients of several chunks are added in float32 and rounded once.

For one chunk, adapters in float32 and a scaling of 1, three calls of `lora_linear` and one of `swiglu` in brackets:

    launches, forward     12 (16)
    launches, backward    15 (23)
    T F elements          saved 2 (3), allocated by the backward pass 3 (3)
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from unsloth_fast.kernels._autograd import Context, Gradients, once_differentiable
from unsloth_fast.kernels._gated import gated_forward, launch_backward
from unsloth_fast.kernels._launch import check_runnable, register
from unsloth_fast.kernels._replay import call
from unsloth_fast.kernels.lora_linear import adapted_product, matrix, product, summed_in_float32
from unsloth_fast.kernels.lora_linears import (
    Tensors,
    Weight,
    as_read,
    dtype_of_all,
    gradient_of_low,
    layers_of,
    parts,
    rank_of_all,
    rounded,
    tensors_of,
    wide,
)
from unsloth_ref import adapter_checks
from unsloth_ref.types import GatedActivation, QuantisedWeight

CHUNK = 4096  # tokens. For Llama 3.2 1B a product has 137 GFLOP, which at 700 TFLOP/s take 40 times as long as a launch

Needs = Sequence[bool]


def chunks(lines: int) -> Iterator[slice]:
    """The tokens of each chunk."""
    return (slice(start, start + CHUNK) for start in range(0, lines, CHUNK))


@summed_in_float32
def lora_mlp_forward(
    x: Tensor, of_gate: Weight, of_up: Weight, of_down: Weight, lora_a: Tensors, lora_b: Tensors,
    bias: Sequence[Tensor | None], scaling: Sequence[float], activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Compute y, gate, up, [low_0, low_1] and low_2, new and contiguous; the last four as matrices."""
    y, gate, up, low, inner_low = lora_mlp_forward_outputs(x, of_gate, of_up, of_down, lora_a, lora_b)
    lines = low.shape[0]
    rows, out = matrix(x, lines), y.view(lines, y.shape[-1])
    a, (*b, inner_a) = rounded(x, lora_a[:2], [*lora_b, lora_a[2]])
    torch.mm(rows, a.t(), out=low)
    reads, lows = as_read(rows, of_gate, of_up), parts(low, lora_a[:2], 1)
    for i, (weight, into) in enumerate(((of_gate, gate), (of_up, up))):
        adapted_product(reads[i], wide(weight, rows, b[i]), b[i], lows[i].contiguous(), bias[i], scaling[i], into)
    del reads
    down = wide(of_down, gate, b[2])
    for chunk in chunks(lines):
        hidden = gated_forward(gate[chunk], up[chunk], activation)
        torch.mm(hidden, inner_a.t(), out=inner_low[chunk])
        adapted_product(as_read(hidden, of_down)[0], down, b[2], inner_low[chunk], bias[2], scaling[2], out[chunk])
    return y, gate, up, low, inner_low


def gradients_of(
    x: Tensor, lora_a: Tensors, lora_b: Tensors, needs_x: bool, needs_weight: Needs, needs_a: Needs, needs_b: Needs,
    needs_bias: Needs,
) -> dict[str, tuple[Sequence[int], torch.dtype]]:  # fmt: skip
    """Shape and dtype of the gradients that are needed, by name, in the order of results; "lora_a": of gate and up."""
    inner, columns = lora_b[0].shape[0], x.shape[-1]
    shapes = (inner, columns), (inner, columns), (lora_b[2].shape[0], inner)
    found: dict[str, tuple[Sequence[int], torch.dtype]] = {"x": (x.shape, x.dtype)} if needs_x else {}
    if any(needs_a[:2]):
        found["lora_a"] = (rank_of_all(lora_a[:2]), columns), dtype_of_all(x, lora_a[:2])
    if needs_a[2]:
        found["lora_a[2]"] = lora_a[2].shape, lora_a[2].dtype
    for i, shape in enumerate(shapes):
        found |= {f"weight[{i}]": (shape, x.dtype)} if needs_weight[i] else {}
        found |= {f"lora_b[{i}]": (lora_b[i].shape, lora_b[i].dtype)} if needs_b[i] else {}
        found |= {f"bias[{i}]": (shape[:1], x.dtype)} if needs_bias[i] else {}
    return found


@summed_in_float32
def lora_mlp_backward(
    dy: Tensor, x: Tensor, gate: Tensor, up: Tensor, low: Tensor, inner_low: Tensor,
    of_gate: Weight, of_up: Weight, of_down: Weight, lora_a: Tensors, lora_b: Tensors, scaling: Sequence[float],
    activation: str, needs_x: bool, needs_weight: Needs, needs_a: Needs, needs_b: Needs, needs_bias: Needs,
) -> list[Tensor]:  # fmt: skip
    """Compute the gradients that are needed, in the order of `gradients_of`, new and contiguous."""
    wanted = gradients_of(x, lora_a, lora_b, needs_x, needs_weight, needs_a, needs_b, needs_bias)
    if dy.numel() == 0:
        return [x.new_zeros(shape, dtype=dtype) for shape, dtype in wanted.values()]
    lines = low.shape[0]
    rows, dy = matrix(x, lines), matrix(dy, lines)
    a, (*b, inner_a) = rounded(x, lora_a[:2], [*lora_b, lora_a[2]])
    lows = *parts(low, lora_a[:2], 1), inner_low
    needs_hidden, needs_low = needs_a[2] or needs_weight[2], needs_x or any(needs_a[:2])
    needs_inner = needs_low or any(any(needs[:2]) for needs in (needs_weight, needs_b, needs_bias))
    dx, sums = x.new_empty(rows.shape if needs_x else 0), dict[str, Tensor]()

    def add(name: str, left: Tensor, right: Tensor | None, factor: float = 1.0) -> None:
        if name in wanted:
            dtype = wanted[name][1] if lines <= CHUNK else torch.float32
            term = left.sum(0, dtype=torch.float32) if right is None else product(left, right, dtype, factor)
            sums[name] = sums[name].add_(term) if name in sums else term

    def add_layer(i: int, one: Tensor, inputs: Tensor | None, chunk: slice) -> None:
        add(f"lora_b[{i}]", one, lows[i][chunk], scaling[i])
        add(f"weight[{i}]", one, inputs)
        add(f"bias[{i}]", one, None)

    def add_chunk(chunk: slice) -> None:  # what it allocates is free before the next chunk
        own, into = (dy[chunk], gate[chunk], up[chunk]), dx[chunk]
        inner_dlow = gradient_of_low(own[:1], lora_a[2:], b[2:], scaling[2:])
        hidden = torch.empty_like(own[1]) if needs_hidden else None
        if needs_inner:
            dgate, dup = (torch.empty_like(one) for one in own[1:])
            dh = torch.mm(inner_dlow, inner_a, out=dgate).addmm_(own[0], wide(of_down, gate, b[2]))
            launch_backward(dh, *own[1:], dgate, dup, hidden, activation)
            for i, one in enumerate((dgate, dup)):
                add_layer(i, one, rows[chunk], chunk)
            if needs_low:
                dlow = gradient_of_low((dgate, dup), lora_a[:2], b[:2], scaling[:2])
                add("lora_a", dlow, rows[chunk])
                if needs_x:
                    torch.mm(dlow, a, out=into)
                    into.addmm_(dgate, wide(of_gate, rows, b[0])).addmm_(dup, wide(of_up, rows, b[1]))
        elif hidden is not None:
            hidden = gated_forward(*own[1:], activation)
        add("lora_a[2]", inner_dlow, hidden)
        add_layer(2, own[0], hidden, chunk)

    for chunk in chunks(lines):
        add_chunk(chunk)
    sums["x"] = dx.view(x.shape) if needs_x else dx
    return [sums[name].to(dtype) for name, (_, dtype) in wanted.items()]


def lora_mlp_forward_outputs(
    x: Tensor, of_gate: Weight, of_up: Weight, of_down: Weight, lora_a: Tensors, lora_b: Tensors, *others: object
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Allocate y, gate, up, [low_0, low_1] and low_2."""
    lead, (inner, _, columns) = x.shape[:-1], (len(one) for one in lora_b)
    widths = inner, inner, rank_of_all(lora_a[:2]), len(lora_a[2])
    gate, up, low, inner_low = (x.new_empty((lead.numel(), width)) for width in widths)
    return x.new_empty((*lead, columns)), gate, up, low, inner_low


def lora_mlp_backward_outputs(
    dy: Tensor, x: Tensor, gate: Tensor, up: Tensor, low: Tensor, inner_low: Tensor,
    of_gate: Weight, of_up: Weight, of_down: Weight, lora_a: Tensors, lora_b: Tensors, scaling: Sequence[float],
    activation: str, needs_x: bool, needs_weight: Needs, needs_a: Needs, needs_b: Needs, needs_bias: Needs,
) -> list[Tensor]:  # fmt: skip
    """Allocate the gradients that are needed."""
    wanted = gradients_of(x, lora_a, lora_b, needs_x, needs_weight, needs_a, needs_b, needs_bias)
    return [x.new_empty(shape, dtype=dtype) for shape, dtype in wanted.values()]


forward_op = register(
    "lora_mlp_forward(Tensor x, Tensor?[] of_gate, Tensor?[] of_up, Tensor?[] of_down, Tensor[] lora_a,"
    " Tensor[] lora_b, Tensor?[] bias, float[] scaling, str activation) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    lora_mlp_forward,
    lora_mlp_forward_outputs,
)
backward_op = register(
    "lora_mlp_backward(Tensor dy, Tensor x, Tensor gate, Tensor up, Tensor low, Tensor inner_low, Tensor?[] of_gate,"
    " Tensor?[] of_up, Tensor?[] of_down, Tensor[] lora_a, Tensor[] lora_b, float[] scaling, str activation,"
    " bool needs_x, bool[] needs_weight, bool[] needs_a, bool[] needs_b, bool[] needs_bias) -> Tensor[]",
    lora_mlp_backward,
    lora_mlp_backward_outputs,
)


class _LoraMlp(torch.autograd.Function):
    """Its tensors are x, those of each weight, of which counts has the numbers, and all lora_a, lora_b and biases."""

    @staticmethod
    def forward(
        ctx: Context, activation: str, scaling: tuple[float, ...], counts: tuple[int, ...], x: Tensor, *tensors: Tensor
    ) -> Tensor:
        weights, *adapters, bias = layers_of(counts, tensors)
        y, *made = forward_op(x, *weights, *adapters, bias, scaling, activation)
        ctx.save_for_backward(x, *made, *tensors[:-3])
        ctx.constants = activation, scaling, counts
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Context, dy: Tensor, *saved: Tensor) -> Gradients:
        activation, scaling, counts = ctx.constants
        (x, *made), tensors = saved[:5], saved[5:]
        weights, lora_a, lora_b, _ = layers_of(counts, tensors)
        of_weights, *others = layers_of(counts, ctx.needs_input_grad[4:])
        needs: Any = ctx.needs_input_grad[3], [one[0] and len(one) == 1 for one in of_weights], *others
        found = backward_op(dy, x, *made, *weights, lora_a, lora_b, scaling, activation, *needs)
        named = dict(zip(gradients_of(x, lora_a, lora_b, *needs), found, strict=True))
        below = parts(named["lora_a"], lora_a[:2], 0) if "lora_a" in named else ()
        named |= {f"lora_a[{i}]": one.to(lora_a[i].dtype) for i, one in enumerate(below) if needs[2][i]}
        of_layers = [[named.get(f"{name}[{i}]") for i in range(3)] for name in ("weight", "lora_a", "lora_b", "bias")]
        each = [(one, *[None] * (count - 1)) for one, count in zip(of_layers[0], counts, strict=True)]
        flat = [one for group in (*each, *of_layers[1:]) for one in group]
        return None, None, None, named.get("x"), *flat


def check(activation: str, scaling: tuple[float, ...], counts: tuple[int, ...], x: Tensor, *tensors: Tensor) -> None:
    """Raise for arguments that do not run here; the public function has checked the others."""
    check_runnable("x", x)
    for index, one in enumerate(layers_of(counts, tensors)[1]):
        check_runnable(f"lora_a[{index}]", one)


def lora_mlp(
    x: Tensor,
    weight: Sequence[Tensor | QuantisedWeight],
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    scaling: Sequence[float] | None = None,
    bias: Sequence[Tensor | None] | None = None,
    *,
    activation: GatedActivation = "silu",
) -> Tensor:
    """Apply a gated MLP of layers with adapters: gate, up and down, in this order. Autocast has no effect.

    Args:
        x: [..., H], float16, bfloat16 or float32.
        weight: [F, H], [F, H] and [O, F], in the dtype of x; or in 4 bits, then it is dequantised in both passes, to
            the dtype of x; or in float8, then the layer is fp8_linear, and the input of its adapter is not quantised.
            The last two have no gradient.
        lora_a: [R, H], [R, H] and [R, F], in the dtype of x or a wider one; R may differ from layer to layer.
        lora_b: [F, R], [F, R] and [O, R], in the dtype of its lora_a.
        scaling: the factor of each adapter's output; None for 1.
        bias: [F] or None, [F] or None, and [O] or None, in the dtype of x; None for none.
        activation: of the gate: "silu", "gelu" or "gelu_tanh", the approximation of GELU that Gemma uses.

    Returns:
        [..., O] in x.dtype, contiguous.

    Raises:
        ValueError: shapes, devices or numbers of layers do not match, or activation is unknown.
        TypeError: x does not have a float dtype or is float64, a weight or bias differs from it in dtype, or an adapter
            is narrower, or float64.
        RuntimeError: on a CPU without Triton's interpreter, and in a second derivative.

    Sources: Hu et al. 2021, arXiv:2106.09685; Shazeer 2020, arXiv:2002.05202. The activation is rounded with its
    product; transformers' MLPs round it before that too.
    """
    adapter_checks.lora_mlp_arguments(x, weight, lora_a, lora_b, scaling, bias, activation)
    factors = tuple(map(float, scaling or [1.0] * 3))
    each = tensors_of(weight)
    tensors = *(one for group in each for one in group), *lora_a, *lora_b, *(bias or [None] * 3)
    return call(_LoraMlp, check, activation, factors, tuple(map(len, each)), x, *tensors)
