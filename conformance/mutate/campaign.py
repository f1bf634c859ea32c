"""The mutants of several operations: chosen, examined, given a verdict.

A mutant is examined in stages, the cheapest checks first, because most mutants die at once: in each stage under every
operation that uses the changed code. It runs the checks in which the unchanged backend runs the changed expression: in
any other check nothing can differ.
"""

import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

from conformance.backends import OPERATIONS, Judged
from conformance.case import Case
from conformance.mutate.edits import mutants
from conformance.mutate.equivalent import Equivalent
from conformance.mutate.examine import Check, Examination, Examined, stages
from conformance.mutate.mutant import Mutant, Region
from conformance.mutate.sources import sources_of
from conformance.operations import PROJECT, Source
from conformance.properties import PROPERTIES
from conformance.running import runner
from conformance.running.search import Result

# The longest case of a correct kernel takes 15 s in Triton's interpreter, and up to 60 to be compiled by torch.compile.
HANG_SECONDS = {"cpu": 60.0, "cuda": 150.0}
Verdict = Literal["killed", "raised", "survived", "unreached", "same bits", "equivalent"]
OPEN = ("unreached", "same bits", "survived")
WEIGHT = {verdict: weight for weight, verdict in enumerate((*OPEN, "equivalent", "raised", "killed"))}
Key = tuple[str, Mutant]  # the operation that is examined, and the mutant


@dataclass(frozen=True)
class Outcome:
    """The verdict on a mutant.

    Attributes:
        op: the operation that was examined.
        mutant: the mutant.
        verdict: "killed" by a property; "raised" if the plainest call raises; "survived"; "unreached" if it survived
            because no case runs the changed expression; "same bits" if it is a launch parameter that was used and
            changed no bit of any result; "equivalent" if it was confirmed to be.
        failed: the checks that failed.
        same: whether all results have the bits of the unchanged backend.
        reason: why it is equivalent.
    """

    op: str
    mutant: Mutant
    verdict: Verdict
    failed: tuple[Result, ...] = ()
    same: bool = False
    reason: str = ""

    @property
    def survives(self) -> bool:
        """Whether the judge should have failed it, as far as anybody knows."""
        return self.verdict in ("survived", "unreached")


@dataclass
class Original:
    """The results of the unchanged backend, and the cases that cover its code paths, by check."""

    bits: dict[Check, int] = field(default_factory=dict)
    ran: dict[Check, set[int]] = field(default_factory=dict)
    covers: dict[Check, tuple[Case, ...]] = field(default_factory=dict)
    failed: list[Result] = field(default_factory=list)

    def add(self, found: Result) -> None:
        """Add the checks of one task."""
        found = _examined(found)
        self.bits |= found.bits
        self.ran |= found.ran
        self.covers |= dict(found.covers)
        self.failed += found.failed

    def passes(self, check: Check) -> bool:
        """Whether a check can say anything about a mutant."""
        return not any(one.property == "import" or (one.property, one.dtype) == check for one in self.failed)


@dataclass
class Found:
    """What the checks so far found about a mutant: which failed, whether every call raises, the bits of results."""

    failed: list[Result] = field(default_factory=list)
    raised: bool = False
    bits: dict[Check, int] = field(default_factory=dict)

    def add(self, result: Examined) -> None:
        """Add the checks of a stage."""
        self.failed += result.failed
        self.raised |= result.raised
        self.bits |= result.bits


def choose(
    judged: Judged,
    ops: Sequence[str],
    *,
    files: Sequence[Path] = (),
    sample: int | None = None,
    seed: int = 0,
    names: Collection[str] = (),
) -> list[Key]:
    """The mutants of these operations.

    Args:
        judged: the backend.
        ops: operations that it defines.
        files: mutate these alone; by default those that the operation's function comes from.
        sample: number of mutants per operation, drawn at random; all by default. A draw depends on each fault alone:
            where the code stays as it was, the mutants of two revisions are the same.
        seed: of the draw.
        names: these mutants alone.
    """
    chosen: list[Key] = []
    for op in ops:
        found = [mutant for source in sources_of(judged.functions[op], files) for mutant in mutants(source)]
        if names:
            found = [mutant for mutant in found if mutant.name in names]
        if sample is not None and sample < len(found):
            drawn = sorted(found, key=lambda mutant: _draw(seed, op, mutant))[:sample]
            found = [mutant for mutant in found if mutant in drawn]
        chosen += [(op, mutant) for mutant in found]
    return chosen


def _draw(seed: int, op: str, mutant: Mutant) -> bytes:
    """A random number of a fault, the same on every line of every revision."""
    return sha256(repr((seed, op, mutant.kind, mutant.function, mutant.change, mutant.index)).encode()).digest()


def users(judged: Judged, chosen: Sequence[Key]) -> dict[Key, list[str]]:
    """For each mutant, the other operations of the backend that use the changed code."""
    ops = [op for op in OPERATIONS if op in judged.functions]
    names = {op: {source.module: source.names for source in sources_of(judged.functions[op])} for op in ops}
    found: dict[Key, list[str]] = {}
    for op, mutant in chosen:
        module, name = mutant.source.module, mutant.function.partition(".")[0]
        found[op, mutant] = [other for other in ops if other != op and name in (names[other].get(module) or ())]
    return found


@dataclass(frozen=True)
class Campaign:
    """How mutants are examined.

    Attributes:
        backend, device, profile: as for `conformance run`.
        properties, dtypes: what to check.
        jobs: number of processes.
        every: do not stop at the first property that kills a mutant.
        confirmed: mutants known to be equivalent.
        source: of the operation.
    """

    backend: str
    device: str
    profile: str
    properties: Sequence[str]
    dtypes: Sequence[str]
    jobs: int
    every: bool = False
    confirmed: Sequence[Equivalent] = ()
    source: Source = PROJECT

    def run(
        self, chosen: Sequence[Key], others: Mapping[Key, Sequence[str]], on_outcome: Callable[[Outcome], None]
    ) -> tuple[list[Outcome], dict[str, Original]]:
        """Examine mutants.

        Args:
            chosen: operations and mutants.
            others: a mutant that survives one operation is examined under these too, which use the same code.
            on_outcome: called with each verdict when it is known.

        Returns:
            The outcomes in the order of the mutants, and what the unchanged backend does.
        """
        under = {key: [(op, key[1]) for op in (key[0], *others.get(key, ()))] for key in chosen}
        asked: dict[Key, list[Key]] = {}  # by what is examined: what was asked for
        for key, examined in under.items():
            for one in examined:
                asked.setdefault(one, []).append(key)
        found = {one: Found() for one in asked}
        originals = {op: Original() for op, _ in asked}
        outcomes: dict[Key, Outcome] = {}
        ordered = stages(self.properties, self.dtypes)

        def conclude(key: Key, last: bool) -> None:
            verdicts = [self._outcome(one, found[one], originals[one[0]], last) for one in under[key]]
            known = [verdict for verdict in verdicts if verdict is not None]
            if known and key not in outcomes:
                outcomes[key] = max(known, key=lambda outcome: WEIGHT[outcome.verdict])
                on_outcome(outcomes[key])

        def after(one: Key, result: Examined) -> None:
            found[one].add(result)
            for key in asked[one] if not self.every else ():
                conclude(key, last=False)

        for stage in ordered:
            done: set[Key] = set()
            for turn in range(max(map(len, under.values()), default=0)):
                waiting = [under[key] for key in chosen if key not in outcomes and turn < len(under[key])]
                batch = {ones[turn]: None for ones in waiting if not any(found[one].failed for one in ones[:turn])}
                self._stage([one for one in batch if one not in done], stage, originals, after)
                done |= batch.keys()
            for key in chosen:
                conclude(key, last=stage is ordered[-1])
        return [outcomes[key] for key in chosen], originals

    def _stage(
        self,
        examined: Sequence[Key],
        stage: Sequence[Check],
        originals: Mapping[str, Original],
        on_found: Callable[[Key, Examined], None],
    ) -> None:
        """Examine the unchanged backend and each mutant under the checks of a stage."""
        regions: dict[str, list[tuple[str, Region]]] = {op: [] for op, _ in examined}
        for op, mutant in examined:
            if mutant.region is not None and (place := (str(mutant.source.path), mutant.region)) not in regions[op]:
                regions[op].append(place)
        self._add_originals(originals, regions, stage)
        plans = {key: self._plan(key, originals[key[0]], regions[key[0]], stage) for key in examined}
        self._examine(plans, originals, on_found)

    def _outcome(self, key: Key, found: Found, original: Original, last: bool) -> Outcome | None:
        """The verdict on a mutant after a stage; None if the next stage decides."""
        if found.failed and (last or not self.every):
            return Outcome(*key, "raised" if found.raised else "killed", tuple(found.failed))
        entry = next((one for one in self.confirmed if one.matches(key[1])), None)
        if entry is not None and not found.failed:
            return Outcome(*key, "equivalent", reason=entry.reason)
        if not last:
            return None
        same = all(original.bits.get(check) == value for check, value in found.bits.items())
        survived: Verdict = "survived" if found.bits else "unreached"
        return Outcome(*key, "same bits" if found.bits and same and key[1].choice else survived, same=same)

    def _plan(
        self, key: Key, original: Original, regions: Sequence[tuple[str, Region]], stage: Sequence[Check]
    ) -> list[Check]:
        """The checks in which the unchanged backend runs the changed expression, and passes."""
        mutant = key[1]
        passed = [check for check in stage if original.passes(check)]
        if mutant.region is None:
            return passed
        number = regions.index((str(mutant.source.path), mutant.region))
        return [check for check in passed if number in original.ran.get(check, ())]

    def _add_originals(
        self,
        originals: Mapping[str, Original],
        regions: Mapping[str, Sequence[tuple[str, Region]]],
        stage: Sequence[Check],
    ) -> None:
        """Examine the unchanged backend under the checks of a stage, in one process per job."""
        parts = max(1, self.jobs // max(1, len(regions)))
        waiting = [(op, stage[part::parts]) for part in range(parts) for op in regions]
        every = [check for one in stages(self.properties, self.dtypes) for check in one]
        while waiting:
            tasks: dict[Any, Sequence[Check]] = {}
            for op, part in waiting:
                known = originals[op].covers
                explores = any(PROPERTIES[check[0]].cases is None and check not in known for check in part)
                later = tuple(check for check in every if check not in stage) if explores else ()
                facts = {"later": later, "covers": tuple(known.items()), "regions": tuple(regions[op])}
                if part:
                    tasks[self._task(op, checks=tuple(part), every=True, **facts)] = part
            waiting = []
            for task, result in self._run(tasks):
                originals[task.op].add(result)
                if not isinstance(result, Examined):  # the process died in one check: the others again
                    waiting.append((task.op, [check for check in tasks[task] if originals[task.op].passes(check)]))

    def _examine(
        self,
        plans: Mapping[Key, Sequence[Check]],
        originals: Mapping[str, Original],
        on_found: Callable[[Key, Examined], None],
    ) -> None:
        """Run every mutant under its checks; one without checks passes."""
        keys: dict[Examination, list[Key]] = {}
        for (op, mutant), plan in plans.items():
            edited = mutant.source.module, mutant.text
            covers = tuple((check, cases) for check, cases in originals[op].covers.items() if check in plan)
            facts = {"checks": tuple(plan), "covers": covers, "every": self.every}
            task = self._task(op, mutant=mutant.name, edited=edited, **facts)
            keys.setdefault(task, []).append((op, mutant))

        def on_result(task: Examination, result: Result) -> None:
            for key in keys[task]:
                on_found(key, _examined(result))

        self._run([task for task in keys if task.checks], on_result)
        for task in keys:
            if not task.checks:
                on_result(task, Examined(task.op, "", None, "pass"))

    def _task(self, op: str, **facts: Any) -> Examination:
        return Examination(self.backend, op, "", None, self.device, self.profile, source=self.source, **facts)

    def _run(
        self, tasks: Iterable[Examination], on_result: Callable[..., None] = lambda task, result: None
    ) -> list[tuple[Any, Result]]:
        preload = ["conformance.mutate.examine", *(f"conformance.specs.{op}" for op in OPERATIONS)]
        if "triton" in sys.modules:  # the backend uses it
            preload += ["triton", "triton.language", "triton.runtime.interpreter"]
        return runner.run(tasks, on_result, jobs=self.jobs, timeout=HANG_SECONDS[self.device], preload=preload)


def _examined(found: Result) -> Examined:
    """The result of an examination; of one whose process died, the check that it ran is in its case."""
    if isinstance(found, Examined):
        return found
    check, _, case = (found.case or "").partition(": ")
    name, _, dtype = check.partition(" ")
    facts = vars(found) | {
        "property": name or found.property or "import",
        "dtype": dtype or None,
        "case": case or None,
    }
    return Examined(**facts, failed=(Result(**facts),))
