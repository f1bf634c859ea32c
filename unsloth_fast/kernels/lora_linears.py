"""Linear layers with low-rank adapters of one input: what `lora_linear` computes for each, with fewer passes over x.

    low = x @ [lora_a_0; lora_a_1; ...]^T            low_i: its columns of layer i
    y_i = x @ weight_i^T + bias_i + scaling_i * low_i @ lora_b_i^T
    dlow_i = scaling_i * dy_i @ lora_b_i             dlow = [dlow_0, dlow_1, ...]
    dx = sum of dy_i @ weight_i + dlow @ [lora_a_0; lora_a_1; ...]
    [dlora_a_0; dlora_a_1; ...] = dlow^T @ x         dlora_b_i = scaling_i * dy_i^T @ low_i
    dweight_i = dy_i^T @ x                           dbias_i = sum over rows of dy_i

All products are the library's. One launch rounds all adapters to the dtype of x, with the lora_a below each other. The
terms of dx are added up by the products themselves, in one tensor: autograd would add whole tensors. A layer whose
output has no gradient costs no product. Saved: x, all weights, adapters and low. Precision is that of `lora_linear`:
sums in float32; low, dlow, the adapter's part of y and the partial sums of dx are rounded to x.dtype. A weight in 4
bits or float8 is dequantised for each product, to the dtype of x: there is one such copy at a time. All layers in
float8 read one x^ in the forward pass, quantised as in `fp8_linear`.

For n layers, T rows of I columns, adapters in float32 and a scaling of 1, n calls of `lora_linear` and their sum of dx
in brackets:

    launches, forward             2n + 2 (5n)
    launches, backward            3n + 3 (8n - 1)
    passes over T x I elements    2n + 3 (8n - 3): x for low and for dlora_a 1 (n) each, dx 2n + 1 (6n - 3)

The layers' own products, which read x and write each y, and the products that add to y are the same in both. Expected
of queries, keys and values in Llama 3.2 1B: 18 fewer launches per decoder layer, 288 per step, and 12 passes fewer:
0.2 GB per layer at 4096 tokens and 0.8 GB at 16384, which at 4.25 TB/s are 0.8 and 3.0 ms per step.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from unsloth_fast.kernels._autograd import Context, Gradients, once_differentiable
from unsloth_fast.kernels._launch import check_runnable, register
from unsloth_fast.kernels._replay import call
from unsloth_fast.kernels.fp8_dequantize import fp8_dequantize_forward
from unsloth_fast.kernels.fp8_quantize import through_float8
from unsloth_fast.kernels.lora_linear import adapted_product, matrix, product, summed_in_float32
from unsloth_fast.kernels.nf4_dequantize import nf4_dequantize_forward
from unsloth_ref import adapter_checks
from unsloth_ref.types import Float8Weight, NF4Weight, QuantisedWeight

Tensors = Sequence[Tensor]
Weight = Sequence[Tensor | None]  # a single matrix, the two tensors of a Float8Weight, or the five of an NF4Weight


def tensors_of(weight: Sequence[Tensor | QuantisedWeight]) -> list[Weight]:
    """The tensors of each weight, float8 as bytes."""
    return [_tensors_of(one) for one in weight]


def _tensors_of(weight: Tensor | QuantisedWeight) -> Weight:
    if isinstance(weight, Float8Weight):
        return weight.values.view(torch.uint8), weight.scale
    return weight[:5] if isinstance(weight, NF4Weight) else (weight,)


def layers_of(counts: Sequence[int], values: Sequence[Any]) -> tuple[list[Any], Any, Any, Any]:
    """Split values, one per tensor: of each weight, which has so many, and of all lora_a, lora_b and biases."""
    groups: list[Any] = []
    for count in (*counts, *[len(counts)] * 3):
        groups.append(values[:count])
        values = values[count:]
    return groups[:-3], *groups[-3:]


def wide(weight: Weight, rows: Tensor, lora_b: Tensor) -> Tensor:
    """The weight [O, I] of a layer of these rows [T, I], in their dtype; `lora_b` [O, R] says what O is."""
    if len(weight) == 1:
        return weight[0]  # type: ignore[return-value]
    if len(weight) == 2:
        return fp8_dequantize_forward(*weight, rows.dtype)  # type: ignore[arg-type]
    return nf4_dequantize_forward(*weight, (lora_b.shape[0], rows.shape[1]), rows.dtype)  # type: ignore[arg-type]


def as_read(rows: Tensor, *weights: Weight) -> list[Tensor]:
    """The rows as the layers with these weights read them: through float8, quantised once, where the weight is."""
    quantised = through_float8(rows) if any(len(one) == 2 for one in weights) else rows
    return [quantised if len(one) == 2 else rows for one in weights]


def parts(whole: Tensor, lora_a: Tensors, dimension: int) -> Tensors:
    """The part of each layer in a tensor with one entry for each row of all lora_a along a dimension."""
    return whole.split_with_sizes([one.shape[0] for one in lora_a], dimension)


def rank_of_all(lora_a: Tensors) -> int:
    """The number of columns of low."""
    return sum(one.shape[0] for one in lora_a)


def rounded(x: Tensor, lora_a: Tensors, lora_b: Tensors) -> tuple[Tensor, list[Tensor]]:
    """All lora_a below each other, and each lora_b, in the dtype of x."""
    below = x.new_empty((rank_of_all(lora_a), x.shape[-1]))
    each = [one if one.dtype == x.dtype else x.new_empty(one.shape) for one in lora_b]
    pairs = [*zip(parts(below, lora_a, 0), lora_a, strict=True)]
    pairs += [(new, one) for new, one in zip(each, lora_b, strict=True) if new is not one]
    torch._foreach_copy_([new for new, _ in pairs], [one for _, one in pairs])
    return below, each


def dtype_of_all(x: Tensor, lora_a: Tensors) -> torch.dtype:
    """The dtype in which the gradient of all lora_a is computed: float32 if one of them is stored so."""
    return x.dtype if all(one.dtype == x.dtype for one in lora_a) else torch.float32


def gradient_of_low(each_dy: Tensors, lora_a: Tensors, lora_b: Tensors, scaling: Sequence[float]) -> Tensor:
    """The gradient of low from those of the outputs, as matrices; each lora_b has their dtype."""
    dlow = each_dy[0].new_empty((each_dy[0].shape[0], rank_of_all(lora_a)))
    for own, one, by, factor in zip(parts(dlow, lora_a, 1), each_dy, lora_b, scaling, strict=True):
        own.addmm_(one, by, beta=0, alpha=factor)
    return dlow


@summed_in_float32
def lora_linears_forward(
    x: Tensor,
    weight: Weight,
    counts: Sequence[int],
    lora_a: Tensors,
    lora_b: Tensors,
    bias: Sequence[Tensor | None],
    scaling: Sequence[float],
) -> list[Tensor]:
    """Compute low and each y, new and contiguous. `weight` has the tensors of all weights, `counts` of each."""
    low, *outputs = lora_linears_forward_outputs(x, weight, counts, lora_a, lora_b)
    each, lines = layers_of(counts, weight)[0], low.shape[0]
    rows = matrix(x, lines)
    a, b = rounded(x, lora_a, lora_b)
    torch.mm(rows, a.t(), out=low)
    for i, (own, read) in enumerate(zip(parts(low, lora_a, 1), as_read(rows, *each), strict=True)):
        out = outputs[i].view(lines, b[i].shape[0])
        adapted_product(read, wide(each[i], rows, b[i]), b[i], own, bias[i], scaling[i], out)
    return [low, *outputs]


@summed_in_float32
def lora_linears_backward(
    x: Tensor,
    dy: Tensors,
    weight: Weight,
    counts: Sequence[int],
    lora_a: Tensors,
    lora_b: Tensors,
    low: Tensors,
    scaling: Sequence[float],
    needs_x: bool,
    needs_weight: Sequence[bool],
    needs_a: Sequence[bool],
    needs_b: Sequence[bool],
    needs_bias: Sequence[bool],
) -> list[Tensor]:
    """Compute the gradients that are needed: of x, of all lora_a below each other; of weight, lora_b and bias."""
    lines, found = x.shape[:-1].numel(), list[Tensor]()
    if lines == 0:
        needs = needs_x, needs_weight, needs_a, needs_b, needs_bias
        empty = lora_linears_backward_outputs(x, dy, weight, counts, lora_a, lora_b, low, scaling, *needs)
        return [one.zero_() for one in empty]
    rows, each_dy = matrix(x, lines), [matrix(one, lines) for one in dy]
    if needs_x or any(needs_a):
        a, b = rounded(x, lora_a, lora_b)
        dlow = gradient_of_low(each_dy, lora_a, b, scaling)
        if needs_x:
            dx = x.new_empty(x.shape)
            total = dx.view(rows.shape)
            each = layers_of(counts, weight)[0]
            torch.mm(dlow, a, out=total)
            for one, by, to in zip(each_dy, each, b, strict=True):
                total.addmm_(one, wide(by, rows, to))
            found.append(dx)
        if any(needs_a):
            found.append(product(dlow, rows, dtype_of_all(x, lora_a)))
    for i, one in enumerate(each_dy):
        if needs_weight[i]:
            found.append(product(one, rows, x.dtype))
        if needs_b[i]:
            found.append(product(one, low[i], lora_b[i].dtype, scaling[i]))
        if needs_bias[i]:
            found.append(one.sum(0, dtype=torch.float32).to(x.dtype))
    return found


def lora_linears_forward_outputs(
    x: Tensor, weight: Weight, counts: Sequence[int], lora_a: Tensors, lora_b: Tensors, *others: object
) -> list[Tensor]:
    """Allocate low and each y."""
    lead = x.shape[:-1]
    low = x.new_empty((lead.numel(), rank_of_all(lora_a)))
    return [low, *(x.new_empty((*lead, one.shape[0])) for one in lora_b)]


def lora_linears_backward_outputs(
    x: Tensor,
    dy: Tensors,
    weight: Weight,
    counts: Sequence[int],
    lora_a: Tensors,
    lora_b: Tensors,
    low: Tensors,
    scaling: Sequence[float],
    needs_x: bool,
    needs_weight: Sequence[bool],
    needs_a: Sequence[bool],
    needs_b: Sequence[bool],
    needs_bias: Sequence[bool],
) -> list[Tensor]:
    """Allocate the gradients that are needed."""
    found = [x.new_empty(x.shape)] if needs_x else []
    if any(needs_a):
        found.append(x.new_empty((rank_of_all(lora_a), x.shape[-1]), dtype=dtype_of_all(x, lora_a)))
    for i, one in enumerate(lora_b):
        found += [x.new_empty((one.shape[0], x.shape[-1]))] if needs_weight[i] else []
        found += [one.new_empty(one.shape)] if needs_b[i] else []
        found += [x.new_empty(one.shape[:1])] if needs_bias[i] else []
    return found


forward_op = register(
    "lora_linears_forward(Tensor x, Tensor?[] weight, int[] counts, Tensor[] lora_a, Tensor[] lora_b, Tensor?[] bias,"
    " float[] scaling) -> Tensor[]",
    lora_linears_forward,
    lora_linears_forward_outputs,
)
backward_op = register(
    "lora_linears_backward(Tensor x, Tensor[] dy, Tensor?[] weight, int[] counts, Tensor[] lora_a, Tensor[] lora_b,"
    " Tensor[] low, float[] scaling, bool needs_x, bool[] needs_weight, bool[] needs_a, bool[] needs_b,"
    " bool[] needs_bias) -> Tensor[]",
    lora_linears_backward,
    lora_linears_backward_outputs,
)


class _LoraLinears(torch.autograd.Function):
    """Its tensors are those of each weight, of which counts has the numbers, and all lora_a, lora_b and biases."""

    @staticmethod
    def forward(
        ctx: Context, scaling: tuple[float, ...], counts: tuple[int, ...], x: Tensor, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        _, *others = layers_of(counts, tensors)
        low, *outputs = forward_op(x, tensors[: sum(counts)], counts, *others, scaling)
        ctx.save_for_backward(x, low, *tensors[: -len(counts)])
        ctx.constants = scaling, counts
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Context, *tensors: Tensor) -> Gradients:
        scaling, counts = ctx.constants
        used = [i for i in range(len(counts)) if tensors[i] is not None]  # a layer without dy gets no gradients
        needs_x, of_weights, *others = ctx.needs_input_grad[2], *layers_of(counts, ctx.needs_input_grad[3:])
        needs = [one[0] and len(one) == 1 for one in of_weights], *others
        gradients: list[list[Tensor | None]] = [[None] * len(counts) for _ in needs]
        dx: Tensor | None = None
        if used:

            def of_used(values: Sequence[Any]) -> list[Any]:
                return [values[i] for i in used]

            x, low, *saved = tensors[len(counts) :]
            weights, lora_a, lora_b, _ = layers_of(counts, saved)
            below = of_used(lora_a)
            operands = of_used(counts), below, of_used(lora_b), of_used(parts(low, lora_a, 1)), of_used(scaling)
            narrow = [one for weight in of_used(weights) for one in weight]
            found = iter(backward_op(x, of_used(tensors), narrow, *operands, needs_x, *map(of_used, needs)))
            dx = next(found) if needs_x else None
            each_a = parts(next(found), below, 0) if any(of_used(needs[1])) else below
            for i, one in zip(used, each_a, strict=True):
                gradients[1][i] = one.to(lora_a[i].dtype) if needs[1][i] else None
                for group in (0, 2, 3):
                    gradients[group][i] = next(found) if needs[group][i] else None
        each = [(one, *[None] * (count - 1)) for one, count in zip(gradients[0], counts, strict=True)]
        return None, None, dx, *(one for group in (*each, *gradients[1:]) for one in group)


def check(scaling: tuple[float, ...], counts: tuple[int, ...], x: Tensor, *tensors: Tensor) -> None:
    """Raise for arguments that do not run here; the public function has checked the others."""
    check_runnable("x", x)
    for index, one in enumerate(layers_of(counts, tensors)[1]):
        check_runnable(f"lora_a[{index}]", one)


def lora_linears(
    x: Tensor,
    weight: Sequence[Tensor | QuantisedWeight],
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    scaling: Sequence[float] | None = None,
    bias: Sequence[Tensor | None] | None = None,
) -> tuple[Tensor, ...]:
    """Apply linear layers and their adapters to one input. Autocast has no effect.

    Args:
        x: [..., I], float16, bfloat16 or float32.
        weight: [O, I] for each layer, in the dtype of x; O may differ from layer to layer. Or in 4 bits, then it is
            dequantised in both passes, to the dtype of x; or in float8, then the layer is fp8_linear, and the
            adapter's x is not quantised. The last two have no gradient.
        lora_a: [R, I] for each layer, in the dtype of x or a wider one; R may differ from layer to layer.
        lora_b: [O, R] for each layer, in the dtype of its lora_a.
        scaling: the factor of each adapter's output; None for 1.
        bias: [O] or None for each layer, in the dtype of x; None for none.

    Returns:
        [..., O] in x.dtype for each layer, contiguous.

    Raises:
        ValueError: shapes, devices or numbers of layers do not match.
        TypeError: x does not have a float dtype or is float64, a weight or bias differs from it in dtype, or an adapter
            is narrower, or float64.
        RuntimeError: on a CPU without Triton's interpreter, and in a second derivative.

    Source: Hu et al. 2021, arXiv:2106.09685.
    """
    adapter_checks.lora_layers_arguments(x, weight, lora_a, lora_b, scaling, bias)
    count, each = len(weight), tensors_of(weight)
    factors = tuple(map(float, scaling or [1.0] * count))
    tensors = *(one for group in each for one in group), *lora_a, *lora_b, *(bias or [None] * count)
    return call(_LoraLinears, check, factors, tuple(map(len, each)), x, *tensors)
