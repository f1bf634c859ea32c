"""Gated activation with GELU.

    "none"    a = gate * Phi(gate)         a' = Phi(gate) + gate * phi(gate)
              Phi(x) = (1 + erf(x / sqrt(2))) / 2      phi(x) = exp(-x^2 / 2) / sqrt(2 pi)
    "tanh"    a = gate * (1 + t) / 2       a' = (1 + t) / 2 + gate * (1 - t^2) / 2 * c * (1 + 3 * 0.044715 * gate^2)
              t = tanh(c * (gate + 0.044715 * gate^3))      c = sqrt(2 / pi)
    y = a * up      dgate = dy * up * a'      dup = dy * a

Sources: Hendrycks and Gimpel 2016, arXiv:1606.08415; Shazeer 2020, arXiv:2002.05202. Rounding: as transformers'
GemmaMLP, the activation and then the product.
"""

from torch import Tensor
from torch.nn.functional import gelu

from unsloth_ref import checks
from unsloth_ref.types import Approximate


def geglu(gate: Tensor, up: Tensor, *, approximate: Approximate = "none") -> Tensor:
    """Multiply the GELU of gate by up, element by element.

    Args:
        gate: [..., F], any float dtype.
        up: [..., F], as gate.
        approximate: "none" for the exact GELU, "tanh" for the approximation that Gemma uses.

    Returns:
        [..., F] in gate.dtype.

    Raises:
        ValueError: up differs from gate in shape or device, or approximate is unknown.
        TypeError: gate does not have a float dtype, or up differs from it in dtype.
    """
    checks.gated_arguments(gate, up)
    checks.one_of("approximate", approximate, ("none", "tanh"))
    return gelu(gate, approximate=approximate) * up
