"""The pieces of a training step. Each has a twin of the same name and signature in `unsloth_ref.training`."""

from unsloth_fast.training.loss import count_targets, next_token_loss, shift_labels
from unsloth_fast.training.param_groups import param_groups

__all__ = ["count_targets", "next_token_loss", "param_groups", "shift_labels"]
