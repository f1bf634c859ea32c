"""Which sizes a dimension may have: a rule learned from those that a reference accepts, and what is drawn by it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import gcd, prod

from hypothesis import strategies as st

from conformance.spec import COLUMNS

LARGEST = 2**18  # elements of the largest case of `extents`
LONG = 4097  # one more than several tiles
BEYOND = (129, 131)  # two dimensions of which each is beyond a tile


@dataclass(frozen=True)
class Counts:
    """The sizes of one dimension: a function from an element budget to a strategy, as `Drawing.sizes` has them.

    Attributes:
        example: its size in the example.
        of: every size is a multiple of this.
        low, high: the smallest size above 0, and the largest if there is one.
        growth: the power of the size that the reference's work grows with.
        only: the sizes that are accepted, if they follow no rule.
        empty: whether 0 is accepted. It is not drawn, as a stranger's kernel may refuse empty tensors.
    """

    example: int
    of: int = 1
    low: int = 1
    high: int | None = None
    growth: int = 1
    only: Sequence[int] = ()
    empty: bool = False

    def __call__(self, budget: int) -> st.SearchStrategy[int]:
        """Sizes within the budget, small ones first."""
        top = max(self.low, int(budget ** (1 / self.growth)))
        if self.only:
            return st.sampled_from([n for n in self.only if n <= top] or [min(self.only)])
        top = min(top, self.high or top)
        first, last = -(-self.low // self.of), min(top, max(300, 8 * self.of)) // self.of
        steps = st.integers(first, max(first, last)).map(lambda step: step * self.of)
        edges = {self.fit(n) for n in (*COLUMNS, self.example)}
        return st.one_of(steps, st.sampled_from(sorted(n for n in edges if n <= top) or [self.fit(self.low)]))

    def fit(self, size: int) -> int:
        """The closest size that is accepted."""
        if self.only:
            return min(self.only, key=lambda n: abs(n - size))
        fitted = max(self.low, -(-size // self.of) * self.of)
        return min(fitted, self.high // self.of * self.of) if self.high else fitted

    def accepts(self, size: int) -> bool:
        """Whether the rule allows a size."""
        return size % self.of == 0 and self.low <= size <= (self.high or size)

    def __str__(self) -> str:
        """The rule in words."""
        if self.only:
            return str(self.only[0]) if len(self.only) == 1 else f"one of {', '.join(map(str, self.only))}"
        parts = [f"multiples of {self.of}"] if self.of > 1 else []
        parts += [f"from {self.low}"] if self.low > self.of else []
        parts += [f"to {self.high}"] if self.high else []
        return " ".join(parts) or "any"


def shape(counts: Mapping[str, Counts], rows: int, columns: int) -> tuple[int, ...]:
    """Sizes with about this many rows, the first, and columns, the last; those between are small. None if none vary."""
    if not counts:
        return ()
    wanted = dict.fromkeys(counts, 3)
    names = list(counts)
    wanted[names[0]], wanted[names[-1]] = rows, columns
    left, found = LARGEST, {}
    for name in (*names[1:-1], names[-1], names[0]):
        one = counts[name]
        most = max(one.low, int(left ** (1 / one.growth)))
        found[name] = one.fit(min(wanted[name], most))
        left = max(1, left // max(1, found[name]) ** one.growth)
    return tuple(found[name] for name in names)


def edges(counts: Mapping[str, Counts]) -> list[dict[str, int]]:
    """Small sizes, of which one is 1 or LONG, or one is 0 where that is accepted; `shape` makes the last one long.

    Then two of them are beyond a tile: the second tile of one with the second of the other.
    """
    usual = dict(zip(counts, shape(counts, 3, 7), strict=True))
    found = []
    for name, one in list(counts.items())[:-1]:
        left = LARGEST // prod(size for other, size in usual.items() if other != name)
        most = max(one.low, int(left ** (1 / one.growth)))
        found += [{**usual, name: one.fit(min(size, most))} for size in (1, LONG)]
    found += [{**usual, name: 0} for name, one in counts.items() if one.empty]
    few = {name: one.fit(2) for name, one in counts.items()}
    for pair in combinations(counts, 2):
        left = (LARGEST / prod(size for name, size in few.items() if name not in pair)) ** 0.5
        most = {name: max(counts[name].low, int(left ** (1 / counts[name].growth))) for name in pair}
        found.append({**few, **{n: counts[n].fit(min(size, most[n])) for n, size in zip(pair, BEYOND, strict=True)}})
    return found


def rule(example: int, accepted: Sequence[int], probed: Sequence[int]) -> Counts:
    """The rule that separates the accepted sizes from the others; a list of them if there is none."""
    above = [n for n in accepted if n > 0] or [example]
    if above in ([example], [1, example]):  # 1 alone is accepted because operators broadcast it
        return Counts(example, only=(example,))
    of = gcd(*above)
    high = above[-1] if any(n > above[-1] and n % of == 0 for n in probed) else None
    counts = Counts(example, of=of, low=above[0], high=high)
    if [n for n in probed if n > 0 and counts.accepts(n)] == above:
        return counts
    return Counts(example, only=tuple(above))
