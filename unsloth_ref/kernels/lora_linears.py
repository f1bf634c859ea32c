"""Linear layers with low-rank adapters of one input, such as the projections of queries, keys and values.

    y_i = lora_linear(x, weight_i, lora_a_i, lora_b_i, scaling_i, bias_i)

Source: Hu et al. 2021, arXiv:2106.09685. Rounding: that of `lora_linear`, layer by layer. The gradient of x is the sum
of those of the layers and of their adapters, rounded to the dtype of x after each addition; the order is not defined.
"""

from collections.abc import Sequence

from torch import Tensor

from unsloth_ref import adapter_checks
from unsloth_ref.kernels.lora_linear import lora_linear
from unsloth_ref.types import QuantisedWeight


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
        x: [..., I], any float dtype.
        weight: [O, I] for each layer, in the dtype of x; O may differ from layer to layer. Or in 4 bits, then it is
            dequantised in both passes, to the dtype of x; or in float8, then the layer is fp8_linear, and the
            adapter's x is not quantised. The last two have no gradient.
        lora_a: [R, I] for each layer, in the dtype of x or a wider one; R may differ from layer to layer.
        lora_b: [O, R] for each layer, in the dtype of its lora_a.
        scaling: the factor of each adapter's output; None for 1.
        bias: [O] or None for each layer, in the dtype of x; None for none.

    Returns:
        [..., O] in x.dtype for each layer.

    Raises:
        ValueError: shapes, devices or numbers of layers do not match.
        TypeError: x does not have a float dtype, a weight or bias differs from it in dtype, or an adapter is narrower.
    """
    adapter_checks.lora_layers_arguments(x, weight, lora_a, lora_b, scaling, bias)
    count = len(weight)
    x = x.contiguous()  # once, not once per layer
    layers = zip(weight, lora_a, lora_b, scaling or [1.0] * count, bias or [None] * count, strict=True)
    return tuple(lora_linear(x, *layer) for layer in layers)
