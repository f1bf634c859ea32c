"""Calls without a defined result raise an error: shapes that do not match, a label outside the vocabulary.

ValueError, TypeError, IndexError and RuntimeError are all accepted: a plausible result harms a user, the type of an
error does not. A separate test requires that `unsloth_ref` and `unsloth_fast` raise the same type for every mistake.
"""

from collections.abc import Callable
from functools import partial
from typing import Protocol

from conformance.calling import placed
from conformance.case import Case
from conformance.profiles import Profile
from conformance.property import Property, of_file
from conformance.spec import Spec
from conformance.tolerances.gates import Failure
from conformance.trial import Caught, Trial

REFUSALS = (ValueError, TypeError, IndexError, RuntimeError)


class Refused(Protocol):
    """What declares a mistake: an `ErrorCase` of an operation, or a `Mistake` of a training piece."""

    @property
    def what(self) -> str:
        """The mistake, in words."""
        ...

    @property
    def raises(self) -> type[Exception]:
        """The type of the error that `unsloth_ref` and `unsloth_fast` raise."""
        ...

    @property
    def names(self) -> str:
        """The argument that the error names."""
        ...


def cases(spec: Spec, profile: Profile) -> list[Case]:
    """One valid case, which each mistake of the spec makes invalid."""
    return [spec.case(3, 8)] if spec.errors else []


def check(trial: Trial, case: Case) -> None:
    """Make each mistake whose result is undefined, and require an error."""
    for mistake in trial.spec.errors:
        if mistake.undefined and mistake.device in (None, trial.device):
            inputs, options = mistake.change(trial.inputs(case), trial.options(case))
            positional, by_name = placed(trial.spec.reference, inputs)
            demand_refusal(mistake, partial(trial.function, *positional, **by_name, **options))


def demand_refusal(
    mistake: Refused, call: Callable[[], object], refusals: tuple[type[Exception], ...] = REFUSALS
) -> None:
    """Raise Failure unless a call that makes a mistake raises one of these errors."""
    with Caught() as caught:
        call()
    if caught.error is None:
        raise Failure(f"{mistake.what}: no error, should raise {mistake.raises.__name__} naming {mistake.names}")
    if not isinstance(caught.error, refusals):
        kind = type(caught.error).__name__
        raise Failure(f"{mistake.what}: raised {kind} ({caught.error}), should raise {mistake.raises.__name__}")


PROPERTY = Property(*of_file(check), cases=cases)
