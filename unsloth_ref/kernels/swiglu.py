"""Gated activation with SiLU.

    s = 1 / (1 + exp(-gate))      y = gate * s * up
    dgate = dy * up * s * (1 + gate * (1 - s))      dup = dy * gate * s

Source: Shazeer 2020, arXiv:2002.05202. Rounding: as transformers' LlamaMLP, the activation and then the product.
"""

from torch import Tensor
from torch.nn.functional import silu

from unsloth_ref import checks


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Multiply the SiLU of gate by up, element by element.

    Args:
        gate: [..., F], any float dtype.
        up: [..., F], as gate.

    Returns:
        [..., F] in gate.dtype.

    Raises:
        ValueError: up differs from gate in shape or device.
        TypeError: gate does not have a float dtype, or up differs from it in dtype.
    """
    checks.gated_arguments(gate, up)
    return silu(gate) * up
