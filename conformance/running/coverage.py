"""Which code paths of its kernels can an operation reach, by which cases, and which of these has a property run?

Kernels are chosen by settings: constants such as the width of a tile or whether an option is in use, whether an integer
is 1, alignment, the number of programs (see conformance/instruments/variants.py). The combinations of all settings are
too many to run each of them under every property: cross entropy's kernels have thousands. But nearly every fault needs
one or two settings to show (Kuhn, Wallace and Gallo 2004, doi:10.1109/TSE.2004.24: 70 to 97 percent of the faults of
four large programs). So coverage counts *pairs*: two settings of one launch, such as `SMOOTHING=True, SEGMENTS=4`.

`explore` calls an operation with many cases, without running its kernels, and notes the pairs of each. A quarter of
the cases are drawn as every property draws them. The others are larger; they differ in layout, and some have as many
rows as fit. `Explored.cover` chooses among them the cases that a property runs besides its random ones.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache, cached_property
from itertools import combinations
from math import inf
from random import Random
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from torch import Tensor

from conformance.case import Case
from conformance.instruments.variants import Seen, Setting, Variant, launches
from conformance.profiles import Profile, same_everywhere
from conformance.spec import Options, Spec, accepted_options
from conformance.tolerances.gates import Failure
from conformance.trial import Caught, Trial

Pair = tuple[str, tuple[Setting, ...]]  # a kernel and two of its settings, or fewer if it has no more that vary

OFF = ("False", "None", "0", "0.0")
LAYOUTS = ("contiguous", "contiguous", "offset", "halves", "transposed")
LARGER = 4  # how many times as many elements as the profile's cases the larger ones have
ELEMENTS = 8192  # that cost as much as a program
AFFORDABLE = 32.0  # what any case may cost: about 0.05 s in Triton's interpreter


@dataclass(frozen=True)
class Reached:
    """Which of the explored pairs were run.

    Attributes:
        pairs: one bit per pair, in the order of `Explored.pairs`.
        explored: the number of pairs.
    """

    pairs: int
    explored: int

    @property
    def share(self) -> float:
        """The share of the pairs that were run."""
        return self.pairs.bit_count() / self.explored

    def __or__(self, other: Reached) -> Reached:
        """The pairs that either of both reached."""
        return Reached(self.pairs | other.pairs, self.explored)


@dataclass(frozen=True)
class _Launched:
    """The launches of one case.

    Attributes:
        variants: of all launches.
        cost: of a call. In Triton's interpreter the number of its programs, and of its elements in units of 8192, which
            plain PyTorch takes about as long for as the interpreter for a program; on a GPU its elements alone.
    """

    case: Case
    variants: frozenset[Variant]
    cost: float


@dataclass(frozen=True)
class Explored:
    """The cases of an exploration.

    Attributes:
        drawn: drawn as every property draws them.
        beyond: the others that are affordable.
        most: the largest cost of an affordable case.
        consistent: whether options may be combined.
    """

    drawn: Sequence[_Launched]
    beyond: Sequence[_Launched]
    most: float
    consistent: Callable[[Options], bool]

    @cached_property
    def _varying(self) -> Mapping[str, frozenset[str]]:
        """The names of the settings of each kernel that have several values."""
        values: dict[str, dict[str, set[str]]] = {}
        for one in (*self.drawn, *self.beyond):
            for variant in one.variants:
                for name, value in variant.settings:
                    values.setdefault(variant.kernel, {}).setdefault(name, set()).add(value)
        return {k: frozenset(name for name, found in v.items() if len(found) > 1) for k, v in values.items()}

    def pairs_of(self, variants: Iterable[Variant]) -> set[Pair]:
        """All pairs of settings of these variants; settings that are the same in every launch are left out."""
        found: set[Pair] = set()
        for kernel, all_settings in variants:
            varying = self._varying.get(kernel, ())
            own = [setting for setting in all_settings if setting[0] in varying]
            found |= {(kernel, pair) for pair in combinations(own, min(2, len(own)))}
        return found

    @cached_property
    def pairs(self) -> Mapping[Pair, Case]:
        """Every pair that the exploration reached, and the cheapest case that reaches it."""
        found: dict[Pair, Case] = {}
        for one in sorted((*self.drawn, *self.beyond), key=lambda one: one.cost):
            for pair in self.pairs_of(one.variants):
                found.setdefault(pair, one.case)
        return dict(sorted(found.items()))

    def reached(self, variants: Iterable[Variant]) -> Reached:
        """Which pairs these variants contain."""
        run = self.pairs_of(variants)
        return Reached(sum(1 << place for place, pair in enumerate(self.pairs) if pair in run), len(self.pairs))

    def cover(self, count: int, random: int) -> list[Case]:
        """At most this many cases that reach what a number of random ones probably do not.

        A pair that a share f of the drawn cases reaches is missed by n of them with probability (1 - f)^n. Each case is
        the one with the largest sum of these probabilities over the pairs that no case before it has. A single setting
        counts too, as much as all pairs that contain it: few cases should reach every setting before one of them
        reaches more combinations. What contains a flag that is off counts half: there the kernel leaves code out. The
        sum is divided by the square root of the cost: cheap cases have few rows or columns, and would be chosen alone
        if the cost counted in full.
        """
        found: list[Case] = []
        every = [one for one in (*self.drawn, *self.beyond) if one.cost <= self.most]
        items = {item: place for place, item in enumerate(_with_settings(self.pairs))}

        def reach(launched: Sequence[_Launched]) -> Tensor:
            reached = torch.zeros(len(launched), len(items), dtype=torch.float64)
            for row, one in enumerate(launched):
                reached[row, [items[item] for item in _with_settings(self.pairs_of(one.variants))]] = 1
            return reached

        contained: Counter[Pair] = Counter((kernel, (setting,)) for kernel, pair in self.pairs for setting in pair)
        worth = [(contained[item] or 1) / 2 ** sum(value in OFF for _, value in item[1]) for item in items]
        missed = torch.tensor(worth) * (1 - reach(self.drawn).mean(0)) ** random
        price = torch.tensor([one.cost for one in every], dtype=torch.float64)
        price, reached = (price + price.mean()).sqrt(), reach(every)
        while every and len(found) < count:
            gain = reached @ missed
            best = int((gain / price).argmax())
            if gain[best] < 0.5:  # of a pair
                break
            found.append(every[best].case)
            missed *= 1 - reached[best]
        return found

    def smaller(self, case: Case) -> Iterator[Case]:
        """Simpler cases, with sizes of the explored ones."""
        return smaller(case, [one.case for one in (*self.drawn, *self.beyond)], self.consistent)


def smaller(case: Case, others: Sequence[Case], consistent: Callable[[Options], bool]) -> Iterator[Case]:
    """Simpler cases: without one option, then with a smaller size, which another case has, a simpler layout or seed."""
    for name, _ in case.options:
        options = {other: value for other, value in case.options if other != name}
        if consistent(options):
            yield replace(case, options=tuple(options.items()))
    for name, size in case.sizes:
        sizes = sorted({one.size(name) for one in others if one.size(name) < size})
        for place in sorted({0, len(sizes) // 2, 3 * len(sizes) // 4, len(sizes) - 1}) if sizes else ():
            yield case.resized(**{name: sizes[place]})
    for simpler in (replace(case, layout="contiguous"), replace(case, seed=0), replace(case, seed=case.seed % 2)):
        if simpler != case:
            yield simpler


def _with_settings(pairs: Iterable[Pair]) -> dict[Pair, None]:
    """The pairs, and each of their settings alone."""
    singles = ((kernel, (setting,)) for kernel, pair in pairs for setting in pair)
    return dict.fromkeys([*pairs, *singles])


def explore(trial: Trial, profile: Profile, notify: Callable[[str], None] = lambda case: None) -> Explored:
    """The exploration of an operation, the same in every process; empty if the first cases launch no Triton kernel.

    Args:
        trial: of the operation.
        profile: the number and size of the cases.
        notify: called with each case before its call; not called for what this process has explored before.
    """
    # Not a subclass, which may keep results: those of an exploration are those of kernels that did not run. The source
    # is the device, which draws faster if it is a GPU.
    plain = Trial(trial.spec, trial.function, trial.dtype, trial.device, source=trial.device)
    key = plain, profile.elements, profile.explored
    if key not in _explored:
        _explored[key] = _exploration(*key, notify)
    return _explored[key]


_explored: dict[tuple[Trial, int, int], Explored] = {}


def _exploration(trial: Trial, elements: int, count: int, notify: Callable[[str], None]) -> Explored:
    options = tuple(accepted_options(trial.function, trial.spec))
    drawn: list[_Launched] = []
    with launches(run=False) as seen:
        for case in drawn_cases(trial.spec, elements, options, count // 4):
            notify(str(case))
            drawn.append(_dry(trial, case, seen))
            if len(drawn) == 4 and not any(one.variants for one in drawn):
                break
        if not any(one.variants for one in drawn):
            return Explored([], [], 0.0, trial.spec.drawing.consistent)
        most = max(AFFORDABLE, *(one.cost for one in drawn)) if trial.device == "cpu" else inf
        beyond: list[_Launched] = []
        for case in _larger(trial, LARGER * elements, options, count - len(drawn)):
            notify(str(case))
            if (one := _dry(trial, case, seen)).cost <= most:
                beyond.append(one)
    return Explored(drawn, beyond, most, trial.spec.drawing.consistent)


@cache
def drawn_cases(spec: Spec, elements: int, options: tuple[str, ...], count: int) -> list[Case]:
    """Cases as a property draws them."""
    return _examples(spec.op, spec.cases(elements, options), count)


@cache
def _pool(spec: Spec, elements: int, count: int) -> list[dict[str, int]]:
    """Values of every dimension, each drawn as if it were the only one."""
    sizes = {name: strategy(elements) for name, strategy in spec.drawing.sizes.items()}
    return _examples(spec.op, st.fixed_dictionaries(sizes), count)


def _examples(name: str, strategy: SearchStrategy[Any], count: int) -> list[Any]:
    """The same ones in all processes: those that judge send places of pairs to the one that shows them."""
    found: list[Any] = []

    @seed(zlib.crc32(name.encode()))
    @settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),  # pyright: ignore[reportArgumentType]
    )
    @given(strategy)
    def draw(example: Any) -> None:
        found.append(example)

    with same_everywhere():
        draw()
    return found


def _larger(trial: Trial, elements: int, options: tuple[str, ...], count: int) -> Iterator[Case]:
    """This many cases of other sizes, options and layouts, with the simplest fill."""
    spec, random = trial.spec, Random(count)
    pool = _pool(spec, elements, count // 5)
    for index in range(count):
        sizes = _sizes(spec, pool, elements, random)
        chosen = _options(spec, options, index % 2 == 0, random)
        case = Case(tuple(sizes.items()), (), spec.drawing.fills[0], random.choice(LAYOUTS), random.randint(0, 3))
        yield _with_many_rows(trial, spec.having(case, chosen), elements, random)


def _sizes(spec: Spec, pool: Sequence[Mapping[str, int]], elements: int, random: Random) -> dict[str, int]:
    """Sizes from the pool with at most this many elements; every magnitude of a dimension is as likely."""
    chosen: dict[str, int] = {}
    for name in reversed(list(spec.drawing.sizes)):
        by_magnitude: dict[int, list[int]] = {}
        for sizes in pool:
            by_magnitude.setdefault(sizes[name].bit_length() // 2, []).append(sizes[name])
        fitting = [found for found in by_magnitude.values() if min(found) <= elements] or [*by_magnitude.values()]
        of_one = random.choice(fitting)
        chosen[name] = random.choice([size for size in of_one if size <= elements] or of_one)
        elements = max(1, elements // max(1, chosen[name]))
    return {name: chosen[name] for name in spec.drawing.sizes}


def _options(spec: Spec, names: Sequence[str], all_set: bool, random: Random) -> Options:
    """Values of these options that may be combined: any, or only values that are not the defaults."""
    for _ in range(20):
        chosen: Options = {}
        for name in names:
            default, *others = spec.drawing.options[name]
            chosen[name] = random.choice(others if all_set and others else [default, *others])
        if spec.drawing.consistent(chosen):
            return chosen
    return {}


def _with_many_rows(trial: Trial, case: Case, elements: int, random: Random) -> Case:
    """The case as it is or, one time in four, with as many rows (or whatever else the spec counts) as fit."""
    if random.random() < 0.75:
        return case
    most = trial.spec.drawing.counts or {trial.spec.row_dimension: elements}
    name = random.choice([*most])
    fit = elements // max(1, *(tensor.numel() for tensor in trial.inputs(case).values()))
    size = case.size(name)
    return case.resized(**{name: max(size, min(size * fit, most[name]))})


def _dry(trial: Trial, case: Case, seen: Seen) -> _Launched:
    """The launches of both passes of a case, which are not executed; none if a pass raises."""
    seen.clear()
    elements = 0
    variants: frozenset[Variant] = frozenset()
    with suppress(Failure), Caught():
        inputs = trial.inputs(case)
        elements = sum(tensor.numel() for tensor in inputs.values())
        trial.run(case, inputs)
        variants = frozenset(seen.variants)
    return _Launched(case, variants, elements / ELEMENTS + (seen.programs if trial.device == "cpu" else 0))


def shown(pair: Pair) -> str:
    """A pair in words: "total_kernel with SMOOTHING=True, SEGMENTS<16"."""
    kernel, found = pair
    words = (f"{name} {value}" if value.startswith("is") else f"{name}={value}" for name, value in found)
    return f"{kernel} with {', '.join(words).replace('=<', '<')}" if found else kernel
