"""Gated activation with GELU.

    "none"    a = gate * Phi(gate)         a' = Phi(gate) + gate * exp(-gate^2 / 2) / sqrt(2 pi)
    "tanh"    a = gate * (1 + tanh z) / 2, z = sqrt(2 / pi) * (gate + 0.044715 * gate^3)
    y = a * up      dgate = dy * up * a'      dup = dy * a

The kernels are those of every gated activation, in `_gated.py`, which documents what is saved and moved.
"""

from torch import Tensor

from unsloth_fast.kernels._autograd import Context
from unsloth_fast.kernels._gated import Gated, check_gated
from unsloth_fast.kernels._replay import call_recorded
from unsloth_ref import checks
from unsloth_ref.types import Approximate


class _Geglu(Gated):
    @staticmethod
    def forward(ctx: Context, gate: Tensor, up: Tensor, approximate: Approximate) -> Tensor:
        return Gated.forward(ctx, gate, up, "gelu_tanh" if approximate == "tanh" else "gelu")


def check(gate: Tensor, up: Tensor, approximate: Approximate) -> None:
    """Raise for arguments that geglu does not allow."""
    checks.one_of("approximate", approximate, ("none", "tanh"))
    check_gated(gate, up, approximate)


def geglu(gate: Tensor, up: Tensor, *, approximate: Approximate = "none") -> Tensor:
    """Multiply the GELU of gate by up, element by element.

    Args:
        gate: [..., F], float16, bfloat16 or float32.
        up: [..., F], as gate.
        approximate: "none" for the exact GELU, "tanh" for the approximation that Gemma uses.

    Returns:
        [..., F] in gate.dtype, contiguous.

    Raises:
        ValueError: up differs from gate in shape or device, or approximate is unknown.
        TypeError: gate does not have a float dtype or is float64, or up differs from it in dtype.
        RuntimeError: on a CPU without Triton's interpreter, and in a second derivative.

    Sources: Hendrycks and Gimpel 2016, arXiv:1606.08415; Shazeer 2020, arXiv:2002.05202. Rounded once; transformers'
    GemmaMLP rounds the activation too.
    """
    return call_recorded(_Geglu, check, gate, up, approximate)
