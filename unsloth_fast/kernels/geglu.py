"""Gated activation with GELU.

    "none"    a = gate * Phi(gate)         a' = Phi(gate) + gate * exp(-gate^2 / 2) / sqrt(2 pi)
    "tanh"    a = gate * (1 + tanh z) / 2, z = sqrt(2 / pi) * (gate + 0.044715 * gate^3)
    y = a * up      dgate = dy * up * a'      dup = dy * a

The kernels are those of every gated activation, in `_gated.py`, which says what is saved and moved.
"""

from torch import Tensor

from unsloth_fast.kernels._gated import Gated, check
from unsloth_fast.kernels._replay import apply
from unsloth_ref import checks
from unsloth_ref.types import Approximate


def geglu(gate: Tensor, up: Tensor, *, approximate: Approximate = "none") -> Tensor:
    """GELU of the gate times up, element by element.

    Args:
        gate: [..., F], float16, bfloat16 or float32.
        up: [..., F], as gate.
        approximate: "none" for the normal distribution itself, "tanh" for the approximation of it that Gemma uses.

    Returns:
        [..., F] in gate.dtype, contiguous.

    Raises:
        ValueError: up has not the shape or device of gate, or approximate is unknown.
        TypeError: gate is not of a float dtype or is float64, or up is not of the same.
        RuntimeError: on a CPU without Triton's interpreter, and on a second backward through the gradients.

    Sources: Hendrycks and Gimpel 2016, arXiv:1606.08415; Shazeer 2020, arXiv:2002.05202. Rounded once, where
    transformers' GemmaMLP rounds the activation too.
    """
    checks.one_of("approximate", approximate, ("none", "tanh"))
    return apply(Gated, check, gate, up, "tanh" if approximate == "tanh" else "gelu")
