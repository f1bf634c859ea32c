"""Every custom operator that a call uses passes `torch.library.opcheck`: schema, fake tensors, tracing, autograd."""

from dataclasses import replace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from conformance.case import Case
from conformance.profiles import Profile
from conformance.property import Property, of_file
from conformance.spec import Spec
from conformance.tolerances.gates import Failure
from conformance.trial import Caught, Trial

BUILT_IN = ("aten", "prim", "prims", "c10d", "inductor", "debugprims", "profiler", "quantized")


class _Recorder(TorchDispatchMode):
    """Records the first call of each custom operator."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[Any, tuple[tuple[Any, ...], dict[str, Any]]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace not in BUILT_IN:
            self.calls.setdefault(func, (args, kwargs or {}))
        return func(*args, **(kwargs or {}))


def cases(spec: Spec, profile: Profile) -> list[Case]:
    """Every option at its default, the same in another layout, then every option set and the inputs of an odd seed."""
    case = spec.case(3, 70)
    options = {name: values[-1] for name, values in spec.drawing.options.items()}
    other = replace(case, seed=1)  # in some specs, odd seeds have a bias or other shapes
    if options and spec.drawing.consistent(options):
        other = other.with_options(options)
    differs = other.options != case.options or _shapes(spec, other) != _shapes(spec, case)
    return [case, replace(case, layout="transposed"), *([other] if differs else [])]


def _shapes(spec: Spec, case: Case) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in spec.inputs(case, torch.float32, "cpu").items()}


def check(trial: Trial, case: Case) -> None:
    """Record the operators of both passes, then run opcheck on each recorded call."""
    with _Recorder() as recorder:
        trial.run(case)
    for operator, (args, kwargs) in recorder.calls.items():
        args = tree_map_only(torch.Tensor, torch.Tensor.detach, args)
        with Caught() as caught:
            torch.library.opcheck(operator, args, kwargs)
        if caught.error is not None:
            raise Failure(f"opcheck of {operator}: {str(caught.error).strip()[:400]}") from caught.error


PROPERTY = Property(*of_file(check), cases=cases)
