"""The pieces of a training step. Each piece has a twin of the same name and signature in `unsloth_fast.training`."""

from unsloth_ref.training.collate import collate
from unsloth_ref.training.loss import count_targets, next_token_loss, shift_labels
from unsloth_ref.training.packing import pack, packed_indices
from unsloth_ref.training.param_groups import param_groups

__all__ = [
    "collate",
    "count_targets",
    "next_token_loss",
    "pack",
    "packed_indices",
    "param_groups",
    "shift_labels",
]
