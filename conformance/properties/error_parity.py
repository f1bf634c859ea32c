"""Bad input is refused, where the contract refuses it.

Any of ValueError, TypeError, IndexError and RuntimeError will do: a user suffers from a plausible result, not from the
choice of a type. (That `unsloth_ref` and `unsloth_fast` raise the same type and name the argument is a test of theirs.)
"""

from conformance.case import Case
from conformance.gates import Failure
from conformance.profiles import Profile
from conformance.spec import ErrorCase, Spec, accepted_options
from conformance.trial import Raised, Trial

REFUSALS = (ValueError, TypeError, IndexError, RuntimeError)


def cases(spec: Spec, profile: Profile) -> list[Case]:
    """One right input, to be made wrong in every way of the spec."""
    return [Case(tuple((name, size) for name, size in zip(spec.sizes, (3, 8), strict=True)))]


def check(trial: Trial, case: Case) -> None:
    """Make each mistake."""
    for mistake in trial.spec.errors:
        if mistake.device in (None, trial.device):
            _demand_refusal(trial, case, mistake)


def _demand_refusal(trial: Trial, case: Case, mistake: ErrorCase) -> None:
    inputs, options = mistake.change(trial.inputs(case), trial.options(case))
    if not set(options) <= set(accepted_options(trial.function, trial.spec)):
        return  # a keyword that the function lacks is signature_parity's finding
    with Raised() as raised:
        trial.function(*inputs.values(), **options)
    if raised.error is None:
        raise Failure(f"{mistake.what}: no error, should raise {mistake.raises.__name__} naming {mistake.names}")
    if not isinstance(raised.error, REFUSALS):
        kind = type(raised.error).__name__
        raise Failure(f"{mistake.what}: raised {kind} ({raised.error}), should raise {mistake.raises.__name__}")
