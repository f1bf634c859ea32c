"""A function has the parameters of the contract: the same names, kinds, order and defaults.

It may add keyword-only parameters of its own if they have defaults.
"""

import inspect

from conformance.case import Case
from conformance.profiles import Profile
from conformance.property import Property, of_file
from conformance.spec import Spec
from conformance.tolerances.gates import Failure
from conformance.trial import Function, Trial


def cases(spec: Spec, profile: Profile) -> list[Case]:
    """One case: a signature does not depend on it."""
    return [Case(tuple((name, 1) for name in spec.drawing.sizes))]


def check(trial: Trial, case: Case) -> None:
    """Compare with the reference, parameter by parameter."""
    demand_signature(trial.function, trial.spec.reference)


def demand_signature(function: Function, reference: Function) -> None:
    """Raise Failure unless the function accepts every call that the reference accepts."""
    wanted = inspect.signature(reference).parameters
    seen = inspect.signature(getattr(function, "forward", function)).parameters
    for name, parameter in wanted.items():
        if name not in seen:
            raise Failure(f"parameter {name} is missing; the contract has {', '.join(wanted)}")
        kinds = (parameter.kind, parameter.POSITIONAL_OR_KEYWORD)  # the latter accepts keywords too
        if seen[name].kind not in kinds or seen[name].default != parameter.default:
            raise Failure(f"parameter {name} is {_words(seen[name])}, should be {_words(parameter)}")
    if [name for name in seen if name in wanted] != list(wanted):
        raise Failure(f"parameters are in the order {', '.join(seen)}, should be {', '.join(wanted)}")
    for name, parameter in seen.items():
        if name not in wanted and (
            parameter.default is parameter.empty or parameter.kind is not parameter.KEYWORD_ONLY
        ):
            raise Failure(f"parameter {name} is not in the contract; allowed: keyword-only parameters with a default")


def _words(parameter: inspect.Parameter) -> str:
    default = "without a default" if parameter.default is parameter.empty else f"with default {parameter.default!r}"
    return f"{parameter.kind.description} {default}"


PROPERTY = Property(*of_file(check), cases=cases)
