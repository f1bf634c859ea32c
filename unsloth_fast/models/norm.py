"""The RMSNorm of a known family on the backend's operation."""

from functools import partial

from torch import Tensor

from unsloth_fast.backends import Backend
from unsloth_fast.models.families import Norm
from unsloth_fast.models.protocols import Placement, RMSNorm
from unsloth_fast.models.recomputed import recomputable


def norm_placement(norm: Norm, backend: Backend) -> Placement:
    """The operation and the forward of a norm."""
    rms_norm, eps_name = backend.kernels.rms_norm, norm.eps

    def forward(self: RMSNorm, hidden_states: Tensor) -> Tensor:
        apply = partial(rms_norm, eps=getattr(self, eps_name), offset=norm.offset, casting=norm.casting)
        normed = apply(hidden_states, self.weight)
        return recomputable(normed, partial(apply, hidden_states.detach(), self.weight.detach()))

    return ("rms_norm",), forward
