"""The tests of correctness that other projects apply to a kernel, as far as their tolerances and inputs define them.

Each compares outputs and gradients with plain PyTorch in the same dtype, on standard normal inputs and a few sizes. To
be fair to all of them, each sees every option of an operation, one at a time, which few of the original tests do.

Sources: the public tests of each project, as of November 2026; torch.testing's documented defaults.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from conformance.case import Case
from conformance.gates import Failure
from conformance.search import DTYPES
from conformance.spec import Spec
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

    def finds(self, spec: Spec, function: Function, device: str) -> bool:
        """Whether some case fails: the function raises, or a result is not close."""
        return any(not self._agrees(spec, function, device, dtype, case) for dtype, case in self._cases(spec, function))

    def _cases(self, spec: Spec, function: Function) -> Iterator[tuple[str, Case]]:
        for dtype in self.dtypes:
            for size in SIZES:
                case = spec.case(*size)
                yield dtype, case
                for name, values in spec.drawing.options.items():
                    yield from ((dtype, case.with_options({name: value})) for value in values[1:])

    def _agrees(self, spec: Spec, function: Function, device: str, dtype: str, case: Case) -> bool:
        trial = Trial(spec, function, DTYPES[dtype], device)
        try:
            found, right = trial.run(case), trial.run(case, function=spec.reference)
        except Failure:
            return False
        pairs = zip(found.named(spec), right.named(spec), strict=True)
        return all(
            one.shape == other.shape and one.dtype == other.dtype and self.close(spec.op, one, other)
            for (_, _, one), (_, _, other) in pairs
        )


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


ALL, WIDE_AND_BFLOAT16 = ("float32", "float16", "bfloat16"), ("float32", "bfloat16")

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
