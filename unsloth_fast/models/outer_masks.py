"""Masks that an image-text model makes for the layers of its text part: of the documents of a packed row, too.

Such a model makes masks in its own forward and hands them to the stack of layers inside. For a packed batch the stack
makes its masks itself, of the documents' bounds (see `unsloth_fast.models.packed`). So that the outer model makes none
of [1, 1, T, T] that nobody reads, its attention_mask is a dictionary, as when `generate` has made the masks, or, where
it takes none, the bounds.
"""

import functools
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from transformers import PreTrainedModel

from unsloth_fast.models.interface import stacks_of
from unsloth_fast.models.packed import check_batch, documents_of
from unsloth_fast.models.protocols import Forward
from unsloth_fast.models.reading import makes_masks, takes_mask, uses_of


def place_outer_masks(model: Module) -> Iterator[tuple[PreTrainedModel, Forward]]:
    """Tell each stack whose masks an outer model makes; the outer models, and the forwards that they need."""
    stacks = {id(stack): stack for stack in stacks_of(model)}
    for outer in model.modules():
        if not isinstance(outer, PreTrainedModel) or id(outer) in stacks or not _hands_masks_on(outer):
            continue
        inside = [documents_of(stacks[id(each)]) for each in outer.modules() if id(each) in stacks]
        known = [documents for documents in inside if documents is not None and documents.function is not None]
        for documents in known:
            documents.outer = True
        if known:
            yield outer, _forward_of(outer)


def _hands_masks_on(outer: PreTrainedModel) -> bool:
    """Whether a model makes masks of its attention_mask by functions of transformers, and does nothing else with it."""
    uses = uses_of(inspect.unwrap(type(outer).forward)) if takes_mask(outer) else None
    return uses is not None and any(map(makes_masks, uses.names)) and uses.receivers <= {"container", "isinstance"}


def _forward_of(outer: PreTrainedModel) -> Forward:
    own, uses = type(outer).forward, uses_of(inspect.unwrap(type(outer).forward))
    takes_masks = uses is not None and "isinstance" in uses.receivers
    _, *names = inspect.signature(own).parameters

    @functools.wraps(own)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        bounds = kwargs.get("cu_seq_lens_q")
        if isinstance(bounds, Tensor):
            args, kwargs = args[:1], dict(zip(names[1:], args[1:], strict=False)) | kwargs
            check_batch(args, kwargs)
            kwargs["attention_mask"] = {} if takes_masks else bounds.to(torch.int32).view(1, 1, -1)
        return type(self).forward(self, *args, **kwargs)

    return forward
