"""Tensors on a second device give the bits of the first, which stays the current device, also in alternation."""

from dataclasses import replace

import torch

from conformance.case import Case
from conformance.property import Property, of_file
from conformance.tolerances.gates import Failure
from conformance.trial import Run, Trial, demand_same_bits

FIRST, SECOND = "cuda:0", "cuda:1"


def check(trial: Trial, case: Case) -> None:
    """Call on the first, the second and the first device again, twice: later calls may reuse what earlier ones kept."""
    with torch.cuda.device(FIRST):
        first, second = replace(trial, device=FIRST), replace(trial, device=SECOND)
        wanted = first.run(case)
        for _ in range(2):
            found = second.run(case)
            if torch.cuda.current_device() != 0:
                raise Failure(f"a call on {SECOND} left device {torch.cuda.current_device()} current; allowed: 0")
            for _, name, tensor in found.named(trial.spec):
                if str(tensor.device) != SECOND:
                    raise Failure(f"{name} is on {tensor.device}; allowed: {SECOND}, as the inputs")
            torch.cuda.synchronize(SECOND)
            moved = Run(tuple(map(_moved, found.outputs)), {name: _moved(g) for name, g in found.grads.items()})
            demand_same_bits(trial.spec, wanted, moved, "the second device changes the results")
            demand_same_bits(
                trial.spec, wanted, first.run(case), "a call on a second device changes the first's results"
            )


def _moved(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to(FIRST)


PROPERTY = Property(*of_file(check), share=0.3, needs=("two devices",))
