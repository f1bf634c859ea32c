"""Do hooks pack the tensors that autograd saves? Operations and recorded layers ask."""

import torch


def saved_tensors_hooked() -> bool:
    """Whether hooks pack saved tensors (checkpoints, offloading); they would not see a gradient computed early."""
    top = torch._C._autograd._top_saved_tensors_default_hooks  # pyright: ignore[reportAttributeAccessIssue]
    return top(False) is not None
