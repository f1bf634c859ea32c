"""How do losses that are not finite stay out of the log, without waiting for the device?

With logging_nan_inf_filter, its default, transformers reads the loss of every microbatch back before it launches the
optimizer's step. The device then idles until the host has launched it. Here the device chooses.
"""

from typing import Any

import torch
from torch import Tensor


class FiniteLosses:
    """transformers' filter of one trainer's losses, which transformers itself does not apply between `begin` and `end`.

    It keeps no reference to the trainer, which would keep the trainer alive.
    """

    def __init__(self) -> None:
        self._before: Tensor | None = None

    def begin(self, trainer: Any) -> None:
        """The passes of a microbatch are launched; transformers adds its loss to the others next."""
        self.end(trainer)
        before: Tensor | None = getattr(trainer, "_tr_loss", None)  # None outside of `train`
        if trainer.args.logging_nan_inf_filter and before is not None:
            trainer.args.logging_nan_inf_filter, self._before = False, before.clone()

    def end(self, trainer: Any) -> None:
        """The loss was added: take the mean of those before it instead, if the sum is not finite any more."""
        if self._before is None:
            return
        before, self._before = self._before, None
        trainer.args.logging_nan_inf_filter = True
        steps = 1 + trainer.state.global_step - trainer._globalstep_last_logged
        trainer._tr_loss = torch.where(trainer._tr_loss.isfinite(), trainer._tr_loss, before + before / steps)
