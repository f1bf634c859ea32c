"""Where there is nothing to compute (shapes that do not fit, a label outside the vocabulary), nothing is returned.

Any of ValueError, TypeError, IndexError and RuntimeError will do: a user suffers from a plausible result, not from the
choice of a type. That `unsloth_ref` and `unsloth_fast` refuse all of a spec's mistakes alike is a test of theirs.
"""

from conformance.case import Case
from conformance.gates import Failure
from conformance.profiles import Profile
from conformance.spec import ErrorCase, Spec
from conformance.trial import Raised, Trial

REFUSALS = (ValueError, TypeError, IndexError, RuntimeError)


def cases(spec: Spec, profile: Profile) -> list[Case]:
    """One right input, to be made wrong in every senseless way of the spec."""
    return [spec.case(3, 8)]


def check(trial: Trial, case: Case) -> None:
    """Make each mistake."""
    for mistake in trial.spec.errors:
        if mistake.senseless and mistake.device in (None, trial.device):
            _demand_refusal(trial, case, mistake)


def _demand_refusal(trial: Trial, case: Case, mistake: ErrorCase) -> None:
    inputs, options = mistake.change(trial.inputs(case), trial.options(case))
    with Raised() as raised:
        trial.function(*inputs.values(), **options)
    if raised.error is None:
        raise Failure(f"{mistake.what}: no error, should raise {mistake.raises.__name__} naming {mistake.names}")
    if not isinstance(raised.error, REFUSALS):
        kind = type(raised.error).__name__
        raise Failure(f"{mistake.what}: raised {kind} ({raised.error}), should raise {mistake.raises.__name__}")
