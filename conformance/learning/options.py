"""Which values of an option does the judge add to the known ones, those of the example and the default?

A kernel that ignores an option, or rounds it, is right wherever the option has one value. A backend may refuse a value
that was added, and the reference too: then it is not judged.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any


def others(known: Sequence[Any]) -> Iterator[Any]:
    """Values to add one of, the best first.

    A float always gets a number beside it, the last float of several; 0 alone gets one beside 0.1. An only boolean
    gets the other one, an only integer from 0 the next, its double or its half. Negative ones count from the end, or
    mark something. A tuple gets the others of its elements.
    """
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
