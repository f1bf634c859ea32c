"""Decisions about packing and padding."""

from dataclasses import dataclass, fields, replace

from hypothesis import strategies as st

from conformance.gates import Failure
from conformance.piece import Piece, PieceCase, PieceTrial
from conformance.pieces._shared import Arguments, equal
from unsloth_ref.types import BatchingPlan, ConfigFacts, ModelFacts


@dataclass(frozen=True)
class FactsCase(PieceCase):
    """The facts of a model and of a run; names as in ModelFacts and ConfigFacts."""

    model_type: str = "llama"
    encoder_decoder: bool = False
    multimodal: bool = False
    recurrent: bool = False
    packing: bool = False
    padding_free: bool | None = None
    custom_collator: bool = False
    processor: bool = False
    processing_class: bool = True
    vision_columns: bool = False


# Facts that stand in the way whatever else holds.
OBSTACLES = {"model_type": "gpt_oss", "encoder_decoder": True, "recurrent": True, "custom_collator": True}


def draw(elements: int) -> st.SearchStrategy[FactsCase]:
    """Any facts, none of them likely enough to hide the others."""
    rarely = st.sampled_from([False, False, False, False, True])
    return st.builds(
        FactsCase,
        model_type=st.sampled_from(["llama", "gemma2", "gpt_oss"]),
        encoder_decoder=rarely,
        multimodal=rarely,
        recurrent=rarely,
        packing=st.booleans(),
        padding_free=st.sampled_from([None, True, False]),
        custom_collator=rarely,
        processor=rarely,
        processing_class=st.booleans(),
        vision_columns=rarely,
    )


def arguments(case: FactsCase, device: str) -> Arguments:
    """The two records of facts."""
    model, config = (
        kind(**{field.name: getattr(case, field.name) for field in fields(kind)}) for kind in (ModelFacts, ConfigFacts)
    )
    return (model, config), {}


def _plan(trial: PieceTrial, case: FactsCase) -> BatchingPlan:
    return trial.function(*arguments(case, trial.device)[0])


def refusals_said(trial: PieceTrial, case: FactsCase) -> None:
    """What was asked for is on, or both are off and it is said why; reasons stand only where both are off."""
    plan = _plan(trial, case)
    refused = (case.packing and not plan.packing) or (case.padding_free and not plan.padding_free)
    if refused and not plan.reasons:
        raise Failure(f"{plan}: what was asked for is off without a reason")
    if plan.reasons and (plan.packing or plan.padding_free):
        raise Failure(f"{plan}: something stands in the way, and yet is on")


def refusals_kept(trial: PieceTrial, case: FactsCase) -> None:
    """padding_free=False is never overturned, nothing is packed unasked, and packed rows are padding-free."""
    plan = _plan(trial, case)
    if case.padding_free is False and plan.padding_free:
        raise Failure(f"{plan}: padding-free is on, although it was refused")
    if plan.packing and not (case.packing and plan.padding_free):
        raise Failure(f"{plan}: packing is on, unasked or with padding")


def monotone(trial: PieceTrial, case: FactsCase) -> None:
    """One more obstacle turns nothing on, and turns both off."""
    for name, value in OBSTACLES.items():
        plan = _plan(trial, replace(case, **{name: value}))
        if plan.packing or plan.padding_free or not plan.reasons:
            raise Failure(f"with {name}={value}: {plan}, should be off, with a reason")


piece = Piece(
    op="batching_plan",
    draw=draw,
    laws=(refusals_said, refusals_kept, monotone, equal(arguments)),
    plain=FactsCase(),
)
