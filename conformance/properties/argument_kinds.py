"""Every kind of argument that the contract allows gives correct results: leading dimensions, numbers as tensors."""

from conformance.case import Case
from conformance.profiles import Profile
from conformance.property import Property
from conformance.spec import Spec
from conformance.trial import Trial


def cases(spec: Spec, profile: Profile) -> list[Case]:
    """One case, which each kind of argument changes."""
    return [spec.case(6, 70)] if spec.argument_kinds else []


def check(trial: Trial, case: Case) -> float:
    """Judge each kind of argument in turn."""
    used = 0.0
    for kind in trial.spec.argument_kinds.values():
        inputs, options = kind(trial.inputs(case), trial.options(case))
        changed = case.with_options(options)
        used = max(used, trial.judge(changed, trial.run(changed, inputs), inputs))
    return used


PROPERTY = Property.of_file(check, cases=cases)
