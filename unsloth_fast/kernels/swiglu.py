"""Gated activation with SiLU.

    s = 1 / (1 + exp(-gate))      y = gate * s * up
    dgate = dy * up * s * (1 + gate * (1 - s))      dup = dy * gate * s

The kernels are those of every gated activation, in `_gated.py`, which says what is saved and moved.
"""

from torch import Tensor

from unsloth_fast.kernels._gated import Gated, check
from unsloth_fast.kernels._replay import apply


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """SiLU of the gate times up, element by element.

    Args:
        gate: [..., F], float16, bfloat16 or float32.
        up: [..., F], as gate.

    Returns:
        [..., F] in gate.dtype, contiguous.

    Raises:
        ValueError: up has not the shape or device of gate.
        TypeError: gate is not of a float dtype or is float64, or up is not of the same.
        RuntimeError: on a CPU without Triton's interpreter, and on a second backward through the gradients.

    Source: Shazeer 2020, arXiv:2002.05202. Rounded once, where transformers' LlamaMLP rounds the activation too.
    """
    return apply(Gated, check, gate, up, "silu")
