"""Neither pass synchronises with the device more often than the spec declares."""

import warnings
from typing import Any

import torch

from conformance.case import Case
from conformance.property import Property, of_file
from conformance.tolerances.gates import Failure
from conformance.trial import Trial, as_leaves


def check(trial: Trial, case: Case) -> None:
    """Run once to compile; then forbid synchronisation, or count it if the spec declares some."""
    grad_outputs = trial.grad_outputs(case, trial.run(case).outputs)
    inputs = as_leaves(trial.inputs(case), trial.spec.grads)
    with _Synchronisations(trial.spec.syncs) as forward:
        outputs = trial.call(inputs, trial.options(case))
    with _Synchronisations(trial.spec.syncs) as backward:
        trial.backward(outputs, inputs, trial.spec.grads, grad_outputs)
    for name, count in (("forward", forward.count), ("backward", backward.count)):
        if count > trial.spec.syncs:
            raise Failure(f"the {name} pass synchronises with the device {count} times, allowed: {trial.spec.syncs}")


class _Synchronisations:
    """Counts synchronisations; if none is allowed, the first one raises."""

    def __init__(self, allowed: int) -> None:
        self._mode = "warn" if allowed else "error"
        self._warnings = warnings.catch_warnings(record=True)
        self.count = 0

    def __enter__(self) -> "_Synchronisations":
        self._seen = self._warnings.__enter__()
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode(self._mode)
        return self

    def __exit__(self, *error: Any) -> None:
        torch.cuda.set_sync_debug_mode("default")
        self._warnings.__exit__(*error)
        self.count = sum("called a synchronizing" in str(warning.message) for warning in self._seen or ())


PROPERTY = Property(*of_file(check), share=0.3, needs=("cuda",))
