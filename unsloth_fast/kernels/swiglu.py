"""Gated activation with SiLU.

    s = 1 / (1 + exp(-gate))      y = gate * s * up
    dgate = dy * up * s * (1 + gate * (1 - s))      dup = dy * gate * s

The kernels are those of every gated activation, in `_gated.py`, which documents what is saved and moved.
"""

from torch import Tensor

from unsloth_fast.kernels._gated import Gated, check_gated
from unsloth_fast.kernels._replay import call_recorded


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Multiply the SiLU of gate by up, element by element.

    Args:
        gate: [..., F], float16, bfloat16 or float32.
        up: [..., F], as gate.

    Returns:
        [..., F] in gate.dtype, contiguous.

    Raises:
        ValueError: up differs from gate in shape or device.
        TypeError: gate does not have a float dtype or is float64, or up differs from it in dtype.
        RuntimeError: on a CPU without Triton's interpreter, and in a second derivative.

    Source: Shazeer 2020, arXiv:2002.05202. Rounded once; transformers' LlamaMLP rounds the activation too.
    """
    return call_recorded(Gated, check_gated, gate, up, "silu")
