"""Does a stranger's model compute another loss than the cross entropy of its logits, such as a sum with a penalty?"""

import inspect
import logging
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from unsloth_fast.failures import FAILURES
from unsloth_fast.models.logits import of_a_library, undisturbed, vocabulary_of

logger = logging.getLogger(__name__)

_TOKENS = 6
_ROUNDINGS = 8  # of a mean of logarithms of sums


def warn_of_own_loss(model: PreTrainedModel) -> None:
    """Warn if a model's own loss of a few tokens is not the cross entropy of the next ones, which replaces it.

    TRL does not minimise a model's own loss either. A forward of a library computes the cross entropy, and is not run.

    Args:
        model: the language model, inside any adapter; its forward is its class's or somebody else's.
    """
    if of_a_library(inspect.unwrap(type(model).forward)):
        return
    mode = model.training
    try:
        tokens = (torch.arange(_TOKENS, device=model.device) % vocabulary_of(model))[None]
        with undisturbed(model, model, model.device):
            model.training = True  # penalties are often left out of evaluations
            outputs: Any = model(input_ids=tokens, labels=tokens, use_cache=False)
            own, logits = outputs.loss, outputs.logits
    except FAILURES:  # it takes no labels, or returns something else
        return
    finally:
        model.training = mode
    if own is None:
        return
    expected = cross_entropy(logits[0, :-1].to(own.dtype), tokens[0, 1:].to(logits.device)).to(own.device)
    unit = max(torch.finfo(own.dtype).eps / 2, 2.0**-24)  # a loss in float64 may be one of logits in float32
    if (own - expected).abs() > _ROUNDINGS * unit * expected.abs():
        logger.warning(
            "loss: the %s computes a loss of its own, %.5g for a few tokens, where the cross entropy of its logits is "
            "%.5g; the cross entropy is minimised, and all else in its loss has no effect",
            type(model).__name__,
            own,
            expected,
        )
