"""The pieces of a training step. Each piece has a twin of the same name and signature in `unsloth_ref.training`."""

from unsloth_fast.training.collate import collate
from unsloth_fast.training.loss import count_targets, next_token_loss, shift_labels
from unsloth_fast.training.packing import pack, packed_indices
from unsloth_fast.training.param_groups import param_groups

__all__ = [
    "collate",
    "count_targets",
    "next_token_loss",
    "pack",
    "packed_indices",
    "param_groups",
    "shift_labels",
]
