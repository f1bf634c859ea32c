"""Calls without a defined result raise an error: shapes that do not match, a label outside the vocabulary.

ValueError, TypeError, IndexError and RuntimeError are all accepted: a plausible result harms a user, the type of an
error does not. A separate test requires that `unsloth_ref` and `unsloth_fast` raise the same type for every mistake.
"""

from conformance.calling import placed
from conformance.case import Case
from conformance.profiles import Profile
from conformance.property import Property, of_file
from conformance.spec import ErrorCase, Spec
from conformance.tolerances.gates import Failure
from conformance.trial import Caught, Trial

REFUSALS = (ValueError, TypeError, IndexError, RuntimeError)


def cases(spec: Spec, profile: Profile) -> list[Case]:
    """One valid case, which each mistake of the spec makes invalid."""
    return [spec.case(3, 8)] if spec.errors else []


def check(trial: Trial, case: Case) -> None:
    """Make each mistake whose result is undefined, and require an error."""
    for mistake in trial.spec.errors:
        if mistake.undefined and mistake.device in (None, trial.device):
            _demand_refusal(trial, case, mistake)


def _demand_refusal(trial: Trial, case: Case, mistake: ErrorCase) -> None:
    inputs, options = mistake.change(trial.inputs(case), trial.options(case))
    positional, by_name = placed(trial.spec.reference, inputs)
    with Caught() as caught:
        trial.function(*positional, **by_name, **options)
    if caught.error is None:
        raise Failure(f"{mistake.what}: no error, should raise {mistake.raises.__name__} naming {mistake.names}")
    if not isinstance(caught.error, REFUSALS):
        kind = type(caught.error).__name__
        raise Failure(f"{mistake.what}: raised {kind} ({caught.error}), should raise {mistake.raises.__name__}")


PROPERTY = Property(*of_file(check), cases=cases)
