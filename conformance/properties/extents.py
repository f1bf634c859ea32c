"""Every size is right: 0, 1, primes, both sides of a tile's edge, over 65536 columns, more rows than a grid axis."""

from conformance.case import Case
from conformance.profiles import Profile
from conformance.spec import Spec
from conformance.trial import Trial

SMALL = ((0, 8), (1, 1), (2, 1), (1, 2), (3, 7), (17, 31), (5, 127), (5, 128), (5, 129), (129, 3))
WIDE = (1021, 1024, 1025, 2560, 4096, 5120, 8191, 16384, 16385, 32768, 65536, 65537, 131073)
MANY_ROWS = 70_001  # beyond the 65535 of a grid's second and third axis


def cases(spec: Spec, profile: Profile) -> list[Case]:
    """The simplest first."""
    # Of the widest one row: two would take Triton's interpreter a third of the time of all sizes.
    sizes = [*SMALL, *((2 if columns <= 32768 else 1, columns) for columns in WIDE)]
    if profile.elements >= 4 * MANY_ROWS:
        sizes += [(MANY_ROWS, 4), (3, 300_007)]
    return [spec.case(rows, columns) for rows, columns in sizes]


def check(trial: Trial, case: Case) -> float:
    """Within the gates: the forward pass alone, which may be another kernel's, and both passes."""
    return max(trial.judge(case, trial.run(case, grads=grads)) for grads in ((), None))
