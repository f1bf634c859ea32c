"""Every size gives correct results: 0, 1, primes, sizes around tile edges, over 65536 columns, over 65535 rows.

Of an operation of the command line, every dimension is once 1 and once long, and every two are beyond a tile together;
every other value of every option has one of these sizes, in turn. Its kernel may refuse empty tensors. Where the
reference gives NaN for them, as PyTorch's group norm does for the gradient of its weight, the kernel may give any
number.
"""

import itertools
from dataclasses import replace
from math import nan

import torch
from torch import Tensor

from conformance.case import Case
from conformance.counts import LONG, Counts, edges
from conformance.profiles import Profile
from conformance.property import Property, of_file
from conformance.spec import Spec
from conformance.tolerances.gates import Failure, Unchecked
from conformance.trial import Run, Trial

SMALL = ((0, 8), (1, 1), (2, 1), (1, 2), (3, 7), (129, 3), (17, 31), (5, 127), (5, 128), (5, 129))
SUMMED = (1031, 257)  # for sums over rows in 16 bits; with so many columns that their errors are a statistic
WIDE = (1021, 1024, 1025, 2560, 4096, 5120, 8191, 16384, 16385, 32768, 65536, 65537, 131073)
OVER_4096 = (4099, 4)  # rows that a plain function takes at once; an interpreter would take seconds, a program for each
TILE = 128
MANY_ROWS = 70_001  # more than 65535, the limit of a grid's second and third axis


def cases(spec: Spec, profile: Profile) -> list[Case]:
    """The simplest first."""
    # One row of the widest sizes: two rows would take Triton's interpreter a third of the time of all sizes.
    sizes = [*SMALL, *((2 if columns <= 32768 else 1, columns) for columns in WIDE)]
    if set(spec.grads) - set(spec.rowwise):  # a gradient that adds up rows
        sizes.append(SUMMED)
    if spec.rowwise:
        sizes.append(OVER_4096)
    if profile.elements >= 4 * MANY_ROWS:
        sizes += [(MANY_ROWS, 4), (3, 300_007)]
    costly = spec.drawing.costly if profile.affords_costly else ()
    return [*(spec.case(rows, columns) for rows, columns in sizes), *_of_stranger(spec), *costly]


def _of_stranger(spec: Spec) -> list[Case]:
    counts = {name: count for name, count in spec.drawing.sizes.items() if isinstance(count, Counts)}
    if not counts or len(counts) < len(spec.drawing.sizes):
        return []
    found = [Case(tuple(sizes.items())) for sizes in edges(counts)]
    long = [case for case in found if LONG in dict(case.sizes).values()] if "lowest" in spec.drawing.fills else []
    beyond = itertools.cycle([spec.case(3, LONG), *(case for case in found if max(dict(case.sizes).values()) > TILE)])
    others = [{name: value} for name, values in spec.drawing.options.items() for value in values[1:]]
    return [
        *found,
        *(replace(case, fill="lowest") for case in long),  # all rows in one group
        *(next(beyond).with_options(option) for option in others),
    ]


def check(trial: Trial, case: Case) -> float:
    """Judge the forward pass alone, which may run another kernel, and then both passes; costly cases in one dtype."""
    if case in trial.spec.drawing.costly:
        if trial.dtype != torch.float32:
            raise Unchecked("a costly case is judged in float32 alone")
        return trial.judge(case, trial.run(case))
    if case == trial.spec.case(*OVER_4096) and _is_interpreted(trial):
        raise Unchecked("so many rows would take Triton's interpreter long")
    judged = _judge_empty if trial.spec.drawing.partial and 0 in dict(case.sizes).values() else _judge
    return max(judged(trial, case, grads) for grads in ((), None))


def _is_interpreted(trial: Trial) -> bool:
    return trial.device == "cpu" and trial.run(trial.spec.case(1, 4), grads=()).forward_interpreted


def _judge(trial: Trial, case: Case, grads: tuple[str, ...] | None) -> float:
    return trial.judge(case, trial.run(case, grads=grads))


def _judge_empty(trial: Trial, case: Case, grads: tuple[str, ...] | None) -> float:
    try:
        run = trial.run(case, grads=grads)
    except Failure as failure:
        if failure.__cause__ is not None:
            raise Unchecked(f"an empty tensor is refused: {failure}") from failure
        raise
    peer = trial.run(case, function=trial.spec.reference, grads=grads)

    def defined(y: Tensor, p: Tensor) -> Tensor:
        return y.masked_fill(p.isnan(), nan) if y.shape == p.shape and y.is_floating_point() else y

    outputs = tuple(map(defined, run.outputs, peer.outputs))
    found = Run(outputs, {name: defined(gradient, peer.grads[name]) for name, gradient in run.grads.items()})
    return trial.judge(case, found, peer=peer)


PROPERTY = Property(*of_file(check), cases=cases)
