"""How long a search takes: every Hypothesis setting is explicit, so that the environment cannot change one."""

from dataclasses import dataclass

from hypothesis import HealthCheck, Phase, settings


@dataclass(frozen=True)
class Profile:
    """The settings of one search.

    Attributes:
        name: on the command line.
        examples: cases for a property whose share is 1.
        elements: of the largest input.
        derandomize: whether every run draws the same cases.
        shrink_seconds: time to spend on finding a smaller failing case; 0 disables shrinking.
    """

    name: str
    examples: int
    elements: int
    derandomize: bool
    shrink_seconds: float

    def settings(self, share: float) -> settings:
        """Hypothesis settings for a property that gets this share of the examples."""
        return settings(
            max_examples=max(3, round(self.examples * share)),
            derandomize=self.derandomize,
            database=None,
            deadline=None,
            phases=(Phase.generate, Phase.shrink) if self.shrink_seconds else (Phase.generate,),
            suppress_health_check=list(HealthCheck),  # pyright: ignore[reportArgumentType]
            report_multiple_bugs=False,
            print_blob=False,
        )


PROFILES = {
    profile.name: profile
    for profile in (
        Profile("dev", examples=8, elements=2**13, derandomize=False, shrink_seconds=5),
        Profile("ci", examples=20, elements=2**14, derandomize=True, shrink_seconds=10),
        Profile("gpu", examples=60, elements=2**22, derandomize=True, shrink_seconds=10),
        Profile("nightly", examples=1000, elements=2**24, derandomize=False, shrink_seconds=60),
    )
}
