"""Do a stranger's modules keep the documents of a row apart? Checked by running a few tokens.

The source shows how transformers' own layers attend, but not what a module does that transformers does not have: a
convolution over the tokens, an attention without a mask, positions that are counted by the row. So a model with such
modules runs with three documents of a few tokens, alone and in rows of two, without gradients.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from unsloth_fast.backends import resolve
from unsloth_fast.failures import FAILURES, in_words
from unsloth_fast.models.interface import stacks_of
from unsloth_fast.models.logits import of_a_library, undisturbed, vocabulary_of
from unsloth_fast.models.methods import has_foreign_forward, has_replaced_method
from unsloth_fast.models.packed import documents_of
from unsloth_fast.models.placement import placed
from unsloth_fast.models.positions import position_limit

_TOKENS = 72  # of a document, or as many as the model has positions: more than blocks have that are pooled
_WIDEST = 2.0**-24  # unit roundoff: norms and rotations are computed in float32 in float64 too
_SMALL = 0.1  # of what stands in for weights that are all 0
_OVER_TOKENS = (nn.Conv1d, nn.RNNBase, nn.MultiheadAttention, nn.TransformerEncoderLayer)


def joined_documents(model: PreTrainedModel) -> str | None:
    """What a run of a few tokens shows to join documents, or how it failed; None if nothing does.

    A document in a row must get the logits that it has alone, up to roundings, and keep every bit if its neighbour
    changes, unless bits change with a neighbour in another row too, as products of experts may. Weights that are all 0
    are others meanwhile: a gate that starts at 0 would hide what it opens. A model whose modules are all libraries'
    does not run.

    Args:
        model: the language model, inside any adapter; as it was afterwards.
    """
    strange = [module for module in model.modules() if _is_strange(module)]
    if not strange:
        return None
    try:
        with undisturbed(model, model, model.device), placed(model, resolve("reference")), _without_zeros(strange):
            joined = _are_joined(model)
    except FAILURES as failure:
        return f"a row of two short documents raises {in_words(failure)}"
    if not joined:
        return None
    names = sorted({type(module).__name__ for module in strange})
    return f"a document in a row has other logits than alone; modules that no library has: {', '.join(names)}"


def _is_strange(module: nn.Module) -> bool:
    """Whether a module's class or its forward is no library's, or it is a container of torch's that joins tokens."""
    kind = type(module)
    foreign = has_foreign_forward(module) and not has_replaced_method(module, "forward")
    known = of_a_library(kind) and of_a_library(inspect.unwrap(kind.forward))
    contains = kind.__module__.startswith("torch.") and any(isinstance(c, _OVER_TOKENS) for c in module.children())
    return foreign or not known or contains


def _are_joined(model: Any) -> bool:
    vocabulary = vocabulary_of(model)
    length = min(_TOKENS, position_limit(model.config) or _TOKENS)
    places, device = torch.arange(length, device=model.device), model.device
    neighbour, other, document = (((places + shift) % vocabulary)[None] for shift in range(3))
    for documents in filter(None, map(documents_of, stacks_of(model))):
        documents.warned = True  # these rows are not the user's
    bounds = torch.arange(3, device=device, dtype=torch.int32) * length
    packed = {"position_ids": places.repeat(2)[None], "cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds}
    packed |= {"max_length_q": length, "max_length_k": length}

    def last(rows: Tensor, **keywords: Any) -> Tensor:
        return model(input_ids=rows, **keywords, use_cache=False).logits[-1, -length:].double()

    alone = last(document)
    seen, changed = (last(torch.cat((first, document), 1), **packed) for first in (neighbour, other))
    allowed = max(torch.finfo(model.dtype).eps / 2, _WIDEST) ** 0.5 * alone.norm()
    if not max((seen - alone).norm(), (changed - alone).norm()) <= allowed:
        return True
    moves = not torch.equal(*(last(torch.cat((first, document))) for first in (neighbour, other)))
    return not moves and not torch.equal(seen, changed)


@contextmanager
def _without_zeros(modules: list[nn.Module]) -> Iterator[None]:
    """Give weights of these modules that are all 0 small random values for a while."""
    own = {id(each): each for module in modules for each in module.parameters()}
    wide = (each for each in own.values() if each.is_floating_point() and each.itemsize > 1)  # float8 has no `any`
    plain = (each for each in wide if not isinstance(each, DTensor))
    zeros = [each for each in plain if not each.is_meta and each.numel() and not each.any()]
    try:
        for each in zeros:
            each.normal_(std=_SMALL)
        yield
    finally:
        for each in zeros:
            each.zero_()
