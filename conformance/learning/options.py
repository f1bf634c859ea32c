"""Which values of an option does the judge add to the known ones, those of the example and the default?

A kernel that ignores an option, or rounds it, is right wherever the option has one value. A backend may refuse a value
that was added, and the reference too: then it is not judged.

An option that the example leaves at its default is one with a single known value.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

SMALL = 0.03


def others(known: Sequence[Any]) -> Iterator[Any]:
    """Values to add one of, the best first.

    Of several values the last float gets a number beside it. An only float gets one far from it: half of it, or SMALL
    where it is smaller, as an eps is, which no result would show; 0 alone gets one beside 0.1. An only boolean gets the
    other one, an only integer from 0 the next, its double or its half. Negative ones count from the end, or mark
    something. A tuple gets the others of its elements.
    """
    if len(known) == 1:
        yield from (other for value in known if (other := beside(far(value))) is not None)
    yield from (other for value in reversed(known) if (other := beside(value)) is not None)
    yield from (beside(0.1) for value in known if isinstance(value, float) and value == 0)
    if len(known) == 1:
        yield from _unlike(known[0])


def _unlike(value: Any) -> Iterator[Any]:
    if isinstance(value, bool):
        yield not value
    elif isinstance(value, int) and value >= 0:
        yield from (value + 1, 2 * value, *((value // 2,) if value >= 4 else ()))
    elif isinstance(value, tuple):
        yield from zip(*map(_unlike, value), strict=False)


def far(value: Any) -> Any:
    """A float whose effect differs, also on numbers around 1; of a tuple each; any other value as it is."""
    if isinstance(value, tuple):
        return tuple(map(far, value))
    if not isinstance(value, float) or not value:
        return value
    return math.copysign(max(SMALL, abs(value) / 2), value)


def beside(value: Any) -> Any:
    """A number near a float that 16 bits hold badly, so that rounding it to them shows; None for any other value.

    In bfloat16 and in float16 it lies just below the middle of two numbers. In a tuple each float has its own.
    """
    if isinstance(value, tuple):
        others = [beside(one) for one in value]
        found = tuple(one if other is None else other for one, other in zip(value, others, strict=True))
        return None if found == value else found
    if not isinstance(value, float) or not value or not math.isfinite(value):
        return None
    step = 2.0 ** math.floor(math.log2(abs(value)))
    below = step / 128 * (math.floor(abs(value) / step * 128) + 1)  # by no power of two, whose products are exact
    return math.copysign(float(f"{below + step * (2**-8 - 2**-11 - 2**-15):.5g}"), value)
