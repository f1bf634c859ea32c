"""Generated text is that of the untouched model, from padded prompts, with a cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from conformance.laws._law import Law
from conformance.property import of_file
from conformance.tolerances.bounds import Arithmetic
from conformance.tolerances.gates import Failure, Unchecked
from conformance.trial import Caught, describe

if TYPE_CHECKING:
    from conformance.models.trial import ModelTrial

NEW = 6  # tokens


def check(trial: ModelTrial) -> None:
    """Greedily, after a step of training; where two tokens are as likely up to roundings, either may come."""
    from conformance.models.running import excuse
    from unsloth_fast import FastLanguageModel

    prompts = {name: value for name, value in trial.documents.padded(left=True).items() if name != "labels"}
    untouched = trial.untouched().eval()
    if not hasattr(untouched, "generate"):
        raise Unchecked("transformers has no generation for this model")
    with excuse():
        expected = _generate(untouched, prompts)
    placed = trial.placed()
    with suppress(Failure):  # other laws judge the step
        trial.run([trial.documents.padded() if trial.obstacles else trial.documents.packed()], model=placed)
    placed = FastLanguageModel.for_inference(placed)
    with Caught() as caught:
        found = _generate(placed, prompts)
    if caught.error is not None:
        raise Failure(f"raised {describe(caught.error)}") from caught.error
    for index, (seen, right) in enumerate(zip(found, expected, strict=True)):
        _demand_equal(trial, index, seen, right, prompts["input_ids"].shape[1])


def _generate(model: Any, prompts: dict[str, Any]) -> Tensor:
    return model.generate(**prompts, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, pad_token_id=0)


def _demand_equal(trial: ModelTrial, index: int, seen: Tensor, right: Tensor, start: int) -> None:
    """Raise Failure if the new tokens of a document differ, other than by a tie."""
    differs = (seen != right).nonzero()
    if not len(differs):
        return
    place = int(differs[0])
    tokens = right[start - trial.documents.lengths[index] : place]
    margin, allowed = _margin(trial, tokens, int(right[place]), int(seen[place]))
    if margin > allowed:
        raise Failure(
            f"new token {place - start} of document {index} is {int(seen[place])}, should be {int(right[place])}\n"
            f"its logit is {margin:.3g} below the largest, allowed {allowed:.3g} for a tie"
        )


def _margin(trial: ModelTrial, tokens: Tensor, first: int, second: int) -> tuple[float, float]:
    """By how much the first token's logit exceeds the second's after a prefix in float64, and what roundings explain.

    The prefix is [S].
    """
    from conformance.tolerances import condition

    models = {dtype: trial.untouched(wide=dtype == torch.float64) for dtype in (torch.float64, trial.dtype)}

    def again(inputs: Mapping[str, Tensor], gradients: Sequence[Tensor]) -> dict[str, Tensor]:
        with torch.no_grad():
            logits = trial.logits(models[inputs["in the dtype"].dtype], {"input_ids": tokens[None]})[0, -1]
        return {"difference": (logits[first] - logits[second])[None]}

    one, key = torch.ones(1, dtype=trial.dtype, device=trial.device), (trial, first, second, tuple(tokens.tolist()))
    found = condition.measured(again, {"in the dtype": one}, (), trial.dtype, key, work=0)["difference"]
    how = Arithmetic(torch.finfo(trial.dtype).eps / 2, 1, tokens.numel() * trial.documents.targets)
    return float(found.truth), 2 * float(found.largest(how))


LAW = Law(*of_file(check))
