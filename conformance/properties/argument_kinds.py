"""Arguments of every kind that the contract takes are right: leading dimensions in any number, numbers as tensors."""

from conformance.case import Case
from conformance.profiles import Profile
from conformance.spec import Spec
from conformance.trial import Trial


def cases(spec: Spec, profile: Profile) -> list[Case]:
    """One size, which every kind changes in its way."""
    return [spec.case(6, 70)] if spec.kinds else []


def check(trial: Trial, case: Case) -> float:
    """Each kind in turn."""
    used = 0.0
    for kind in trial.spec.kinds.values():
        inputs, options = kind(trial.inputs(case), trial.options(case))
        changed = case.with_options(options)
        used = max(used, trial.judge(changed, trial.run(changed, inputs), inputs))
    return used
