"""Every fill and every value of every option gives correct results by itself, whatever the random draws contain.

A number that the judge added to an option is judged on small elements too: a limit or an eps shows there.
"""

from dataclasses import replace

from conformance.case import Case
from conformance.profiles import Profile
from conformance.property import Property, of_file
from conformance.spec import Spec
from conformance.trial import Trial


def cases(spec: Spec, profile: Profile) -> list[Case]:
    """Each fill with every option at its default, then each other option value on normal elements."""
    case = spec.case(5, 130)
    fills = [Case(case.sizes, fill=fill) for fill in spec.drawing.fills]
    if spec.drawing.partial:
        fills.append(Case(spec.case(257, 17).sizes, fill="short"))  # so many sums of rows that some are ties
        if "lowest" in spec.drawing.fills:
            fills += [Case(case.sizes, fill=fill) for fill in ("one_lowest", "one_highest")]
    values = [case.with_options({name: v}) for name, values in spec.drawing.options.items() for v in values[1:]]
    numbers = {name: value for name, value in spec.drawing.added.items() if isinstance(value, float)}
    return fills + values + [replace(case.with_options({n: v}), fill="tiny") for n, v in numbers.items()]


def check(trial: Trial, case: Case) -> float:
    """Judge both passes."""
    return trial.judge(case, trial.run(case))


PROPERTY = Property(*of_file(check), cases=cases, each_option=True)
