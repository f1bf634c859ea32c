"""Nothing waits for the device: no hidden synchronisation in either pass."""

import torch

from conformance.case import Case
from conformance.trial import Trial

CUDA_ONLY = True
SHARE = 0.3


def check(trial: Trial, case: Case) -> None:
    """Run once to compile, then with synchronisation forbidden."""
    inputs = trial.inputs(case)
    grad_outputs = trial.grad_outputs(case, trial.run(case, inputs).outputs)
    torch.cuda.set_sync_debug_mode("error")
    try:
        trial.run(case, inputs, grad_outputs=grad_outputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")
