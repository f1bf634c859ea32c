"""A gated MLP whose three layers have low-rank adapters.

    gate, up = lora_linear(x, ...) with the first and the second weight, adapter, scaling and bias
    h = a(gate) * up          y = lora_linear(h, ...) with the third
    dh = the gradient of h    dgate = dh * up * a'(gate)    dup = dh * a(gate)    dx = the sum of those of gate and up

a is SiLU or GELU. Sources: Hu et al. 2021, arXiv:2106.09685; Shazeer 2020, arXiv:2002.05202. Rounding: that of
`lora_linear`, `swiglu` and `geglu`, one after the other. The gradient of x is a sum like that of `lora_linears`.
"""

from collections.abc import Sequence

from torch import Tensor

from unsloth_ref import adapter_checks
from unsloth_ref.kernels.geglu import geglu
from unsloth_ref.kernels.lora_linear import lora_linear
from unsloth_ref.kernels.swiglu import swiglu
from unsloth_ref.types import GatedActivation, QuantisedWeight


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
        x: [..., H], any float dtype.
        weight: [F, H], [F, H] and [O, F], in the dtype of x; or in 4 bits, then it is dequantised in both passes, to
            the dtype of x; or in float8, then the layer is fp8_linear, and the input of its adapter is not quantised.
            The last two have no gradient.
        lora_a: [R, H], [R, H] and [R, F], in the dtype of x or a wider one; R may differ from layer to layer.
        lora_b: [F, R], [F, R] and [O, R], in the dtype of its lora_a.
        scaling: the factor of each adapter's output; None for 1.
        bias: [F] or None, [F] or None, and [O] or None, in the dtype of x; None for none.
        activation: of the gate: "silu", "gelu" or "gelu_tanh", the approximation of GELU that Gemma uses.

    Returns:
        [..., O] in x.dtype.

    Raises:
        ValueError: shapes, devices or numbers of layers do not match, or activation is unknown.
        TypeError: x does not have a float dtype, a weight or bias differs from it in dtype, or an adapter is narrower.
    """
    adapter_checks.lora_mlp_arguments(x, weight, lora_a, lora_b, scaling, bias, activation)
    layers = zip(weight, lora_a, lora_b, scaling or [1.0] * 3, bias or [None] * 3, strict=True)
    of_gate, of_up, of_down = layers
    x = x.contiguous()  # once, not once per layer
    gate, up = lora_linear(x, *of_gate), lora_linear(x, *of_up)
    if activation == "silu":
        hidden = swiglu(gate, up)
    else:
        hidden = geglu(gate, up, approximate="tanh" if activation == "gelu_tanh" else "none")
    return lora_linear(hidden, *of_down)
