"""The tests of correctness that other projects apply to a kernel, as far as their tolerances and inputs define them.

Each compares outputs and gradients with plain PyTorch in the same dtype, on standard normal inputs and a few sizes. To
be fair to all of them, each sees every option of an operation, one at a time, which few of the original tests do.

Sources: the public tests of each project, as of November 2026; torch.testing's documented defaults.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from conformance.case import DTYPES, Case
from conformance.spec import Spec
from conformance.tolerances.gates import Failure
from conformance.trial import Function, Trial

SIZES = ((4, 8), (63, 41), (64, 512))  # two that fit into a tile, one that does not; the second is odd
Close = Callable[[str, Tensor, Tensor], bool]  # operation, result, plain PyTorch's result
Tolerances = Mapping[str, tuple[float, float]]  # by dtype: relative, absolute


@dataclass(frozen=True)
class Oracle:
    """One way to decide whether a kernel is right.

    Attributes:
        name: shown in the table.
        what: when a result is right, in words.
        dtypes: of the inputs.
        close: whether two tensors agree.
    """

    name: str
    what: str
    dtypes: tuple[str, ...]
    close: Close


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _by_dtype(tolerances: Tolerances) -> Close:
    """torch.allclose with the tolerances of the result's dtype."""

    def close(op: str, one: Tensor, other: Tensor) -> bool:
        relative, absolute = tolerances[_dtype(other)]
        return torch.allclose(one, other, rtol=relative, atol=absolute)

    return close


def _liger(op: str, one: Tensor, other: Tensor) -> bool:
    relative, absolute = LIGER[op][0 if other.dtype == torch.float32 else 1]
    return torch.allclose(one, other, rtol=relative, atol=absolute)


def _flashinfer_bench(op: str, one: Tensor, other: Tensor) -> bool:
    """An element is wrong if both its absolute and its relative error exceed 1e-2."""
    if not one.isfinite().equal(other.isfinite()):
        return False
    error = (one - other).abs().float()
    return not ((error > 1e-2) & (error > 1e-2 * other.abs().float())).any()


ALL, WIDE_AND_BFLOAT16 = tuple(DTYPES), ("float32", "bfloat16")

# (relative, absolute) in float32 and in bfloat16, by operation.
LIGER = {
    "rms_norm": ((1e-6, 1e-4), (2e-2, 2e-1)),
    "add_rms_norm": ((1e-6, 1e-4), (2e-2, 2e-1)),
    "layer_norm": ((1e-5, 1e-5), (1e-5, 1e-5)),
    "rope": ((1e-5, 1e-5), (1e-5, 1e-1)),
    "swiglu": ((1e-5, 1.0), (1e-2, 1e4)),
    "geglu": ((1e-5, 1.0), (1e-2, 1e4)),
    "cross_entropy": ((1e-6, 1e-8), (5e-2, 1e-8)),
    "linear_cross_entropy": ((5e-4, 1e-5), (5e-2, 5e-3)),
}

ORACLES = (
    Oracle(
        "allclose 1e-2",
        "`torch.allclose` with rtol 1e-2 and atol 1e-2",
        ALL,
        _by_dtype(dict.fromkeys(ALL, (1e-2, 1e-2))),
    ),
    Oracle(
        "allclose 1e-3",
        "`torch.allclose` with rtol 1e-3 and atol 1e-3",
        ALL,
        _by_dtype(dict.fromkeys(ALL, (1e-3, 1e-3))),
    ),
    Oracle(
        "assert_close",
        "`torch.testing.assert_close` with its defaults for the dtype",
        ALL,
        _by_dtype({"float32": (1.3e-6, 1e-5), "float16": (1e-3, 1e-5), "bfloat16": (1.6e-2, 1e-5)}),
    ),
    Oracle(
        "KernelBench",
        "rtol and atol 1e-4 in float32, 1e-2 in 16 bits",
        ALL,
        _by_dtype({"float32": (1e-4, 1e-4), "float16": (1e-2, 1e-2), "bfloat16": (1e-2, 1e-2)}),
    ),
    Oracle(
        "liger",
        "the tolerances of the operation's own test, in float32 and bfloat16; only for operations that it has",
        WIDE_AND_BFLOAT16,
        _liger,
    ),
    Oracle(
        "quack",
        "rtol 1e-3; atol 1e-4 in float32, 1e-2 in float16, 1e-1 in bfloat16",
        ALL,
        _by_dtype({"float32": (1e-3, 1e-4), "float16": (1e-3, 1e-2), "bfloat16": (1e-3, 1e-1)}),
    ),
    Oracle(
        "flashinfer-bench",
        "no element has both an absolute and a relative error above 1e-2",
        ALL,
        _flashinfer_bench,
    ),
)


def asked(op: str) -> list[Oracle]:
    """The oracles that have a tolerance for an operation."""
    return [oracle for oracle in ORACLES if oracle.name != "liger" or op in LIGER]


def rejecting(spec: Spec, function: Function, device: str) -> set[str]:
    """The names of the oracles that reject a function: in some case it raises, or a result is not close.

    Each case runs once for all oracles.
    """
    left = asked(spec.op)
    for dtype, case in _cases(spec):
        if interested := [oracle for oracle in left if dtype in oracle.dtypes]:
            pairs = _pairs(Trial(spec, function, DTYPES[dtype], device), case)
            left = [one for one in left if one not in interested or (pairs is not None and _agrees(one, spec, pairs))]
    return {oracle.name for oracle in asked(spec.op) if oracle not in left}


def _cases(spec: Spec) -> Iterator[tuple[str, Case]]:
    for dtype, size in product(ALL, SIZES):
        case = spec.case(*size)
        yield dtype, case
        for name, values in spec.drawing.options.items():
            yield from ((dtype, case.with_options({name: value})) for value in values[1:])


def _pairs(trial: Trial, case: Case) -> list[tuple[Tensor, Tensor]] | None:
    """Each output and gradient beside plain PyTorch's; None if the function raises."""
    right = trial.run(case, function=trial.spec.reference).named(trial.spec)
    try:
        found = trial.run(case).named(trial.spec)
    except Failure:
        return None
    return [(_comparable(one), _comparable(other)) for (_, _, one), (_, _, other) in zip(found, right, strict=True)]


def _comparable(tensor: Tensor) -> Tensor:
    """The tensor; in bfloat16 if it is in float8, which no tolerance is for and torch does not compare."""
    return tensor.bfloat16() if tensor.dtype.itemsize == 1 and tensor.is_floating_point() else tensor


def _agrees(oracle: Oracle, spec: Spec, pairs: Sequence[tuple[Tensor, Tensor]]) -> bool:
    return all(
        one.shape == other.shape and one.dtype == other.dtype and oracle.close(spec.op, one, other)
        for one, other in pairs
    )
