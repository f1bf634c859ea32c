"""The RMSNorm of a known family on the backend's operation."""

from functools import partial

from torch import Tensor

from unsloth_fast.backends import Backend
from unsloth_fast.models.dtypes import product_dtype, promoted_dtype
from unsloth_fast.models.families import Norm
from unsloth_fast.models.protocols import Placement, RMSNorm
from unsloth_fast.models.recomputed import recomputable


def norm_placement(norm: Norm, backend: Backend) -> Placement:
    """The operation and the forward of a norm.

    The operation returns the dtype of its input. So does Gemma's own norm; Llama's returns the promoted dtype of input
    and weight, which matters unless autocast then rounds the result to the dtype of the input.
    """
    rms_norm, eps_name = backend.kernels.rms_norm, norm.eps

    def forward(self: RMSNorm, hidden_states: Tensor) -> Tensor:
        weight = self.weight
        if weight.dtype != hidden_states.dtype and norm.casting == "llama":
            wide = promoted_dtype(hidden_states, weight)
            if product_dtype(hidden_states, weight) != hidden_states.dtype:
                hidden_states = hidden_states.to(wide)
        apply = partial(rms_norm, eps=getattr(self, eps_name), offset=norm.offset, casting=norm.casting)
        normed = apply(hidden_states, weight)
        return recomputable(normed, partial(apply, hidden_states.detach(), weight.detach()))

    return ("rms_norm",), forward
