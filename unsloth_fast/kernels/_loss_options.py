"""The options that cross_entropy and linear_cross_entropy share."""

from typing import NamedTuple

import torch
from torch import Tensor

from unsloth_ref import checks

# As ops take them: schemas have no type for a tuple of names.
SCHEMA = "int ignore_index, float logit_scale, float softcap, float label_smoothing, float z_loss"


class LossOptions(NamedTuple):
    """What the losses of rows depend on besides logits and labels; in the order of the kernels' parameters."""

    ignore_index: int
    logit_scale: float
    softcap: float
    label_smoothing: float
    z_loss: float

    def flags(self) -> dict[str, bool]:
        """Which options are in use, as constexpr parameters of the kernels."""
        return {
            "SCALED": self.logit_scale != 1,
            "SOFTCAP": self.softcap != 0,
            "SMOOTHING": self.label_smoothing != 0,
            "Z_LOSS": self.z_loss != 0,
        }


def divisor_of(reduction: str, num_items: float | Tensor | None, device: torch.device) -> float | Tensor | None:
    """The divisor of the summed loss, on this device if it is a tensor; None for the number of targets.

    Raises:
        ValueError: the reduction is unknown, or num_items is not allowed.
    """
    checks.reduction_arguments(reduction, num_items)
    if num_items is None:
        return 1 if reduction == "sum" else None
    return num_items.to(device) if isinstance(num_items, Tensor) else num_items
