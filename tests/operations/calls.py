"""Calls of every operation, derived from the specs."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from conformance.calling import grouped
from conformance.case import LAYOUTS
from conformance.spec import Spec
from conformance.specs import specs

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Every operation with its defaults; those whose rows are results under other options with these too.
CALLS: list[tuple[Spec, dict[str, Any]]] = [
    (spec, options) for spec in specs().values() for options in [{}, *([spec.row_options] if spec.row_options else [])]
]
CALL_NAMES = [f"{spec.op} {' '.join(map(str, options.values()))}".strip() for spec, options in CALLS]
DIFFERENTIABLE = [
    pytest.param(spec, options, id=name) for (spec, options), name in zip(CALLS, CALL_NAMES, strict=True) if spec.grads
]


def call_of(
    spec: Spec, rows: int, columns: int, options: dict[str, Any], dtype: torch.dtype = torch.float32
) -> tuple[Callable[..., tuple[Tensor, ...]], list[Tensor]]:
    """A function of a module of kernels and the differentiable inputs, and these inputs, as models lay them out.

    The function returns a tuple of outputs.
    """
    case = spec.case(rows, columns)
    inputs = spec.inputs(case, dtype, DEVICE)
    names = [name for name in spec.grads if name in inputs]

    def call(kernels: ModuleType, *leaves: Tensor) -> tuple[Tensor, ...]:
        arguments = inputs | dict(zip(names, leaves, strict=True))
        options_of_case = spec.required(case, dtype) | options
        results = getattr(kernels, spec.op)(**grouped(spec.arguments(arguments)), **options_of_case)
        return results if isinstance(results, tuple) else (results,)

    return call, [LAYOUTS[spec.speed.layout](inputs[name]) for name in names]
