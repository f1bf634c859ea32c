"""How long to look: every setting of a search, in full, so that no environment changes it."""

from dataclasses import dataclass

from hypothesis import HealthCheck, Phase, settings


@dataclass(frozen=True)
class Profile:
    """One way of searching.

    Attributes:
        name: as on the command line.
        examples: cases for a law whose SHARE is 1.
        elements: the largest input, in elements.
        derandomize: whether the same cases come every time.
        shrink_seconds: how long to look for a smaller failing case; 0 for not at all.
    """

    name: str
    examples: int
    elements: int
    derandomize: bool
    shrink_seconds: float

    def settings(self, share: float) -> settings:
        """Hypothesis' settings for a law worth this share of the examples."""
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
