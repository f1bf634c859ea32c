"""How long a search takes: every Hypothesis setting is explicit, so that the environment cannot change one."""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from unittest.mock import patch

from hypothesis import HealthCheck, Phase, settings
from hypothesis.internal.conjecture import providers
from hypothesis.internal.constants_ast import Constants


@dataclass(frozen=True)
class Profile:
    """The settings of one search.

    Attributes:
        name: on the command line.
        examples: cases for a property whose share is 1.
        elements: of the largest input.
        explored: cases from which those are chosen that reach what random ones may miss; 0 for none. See
            conformance/running/coverage.py.
        derandomize: whether every run draws the same cases.
        shrink_seconds: time to spend on finding a smaller failing case; 0 disables shrinking.
    """

    name: str
    examples: int
    elements: int
    explored: int
    derandomize: bool
    shrink_seconds: float

    @property
    def affords_costly(self) -> bool:
        """Whether the costly cases of a spec are checked: they take longer than all cases of a short profile."""
        return self.examples >= 20

    def count(self, share: float) -> int:
        """The number of cases of a property that gets this share of the examples."""
        return max(3, round(self.examples * share))

    def settings(self, count: int) -> settings:
        """Hypothesis settings for this many random cases."""
        return settings(
            max_examples=count,
            derandomize=self.derandomize,
            database=None,
            deadline=None,
            phases=(Phase.generate, Phase.shrink) if self.shrink_seconds else (Phase.generate,),
            suppress_health_check=list(HealthCheck),  # pyright: ignore[reportArgumentType]
            report_multiple_bugs=False,
            print_blob=False,
        )


def same_everywhere() -> AbstractContextManager[object]:
    """Within it all processes draw the same: none of the constants in modules, of which each may have loaded others."""
    return patch.multiple(providers, _get_local_constants=Constants, CONSTANTS_CACHE={})


PROFILES = {
    profile.name: profile
    for profile in (
        Profile("dev", examples=8, elements=2**13, explored=160, derandomize=False, shrink_seconds=5),
        Profile("ci", examples=20, elements=2**14, explored=360, derandomize=True, shrink_seconds=10),
        Profile("gpu", examples=60, elements=2**22, explored=480, derandomize=True, shrink_seconds=10),
        Profile("nightly", examples=1000, elements=2**24, explored=960, derandomize=False, shrink_seconds=60),
    )
}
