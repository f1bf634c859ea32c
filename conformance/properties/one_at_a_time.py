"""Every kind of elements and every value of every option is right by itself: chance must not pass one over."""

from conformance.case import Case
from conformance.profiles import Profile
from conformance.spec import Spec
from conformance.trial import Trial


def cases(spec: Spec, profile: Profile) -> list[Case]:
    """Each fill with every option at its default, then each option's other values on standard normal elements."""
    plain = spec.case(5, 130)
    fills = [Case(plain.sizes, fill=fill) for fill in spec.fills]
    return fills + [plain.with_options({name: v}) for name, values in spec.options.items() for v in values[1:]]


def check(trial: Trial, case: Case) -> float:
    """Forward and backward within the gates."""
    return trial.judge(case, trial.run(case))
