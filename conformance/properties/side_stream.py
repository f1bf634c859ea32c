"""Work goes to the current stream: on a side stream, behind a long wait, the results are the default stream's."""

import torch

from conformance.case import Case
from conformance.trial import Trial, demand_same_bits

CUDA_ONLY = True
SHARE = 0.3
WAIT_CYCLES = 20_000_000  # about 10 ms


def check(trial: Trial, case: Case) -> None:
    """Inputs arrive on the side stream late: a kernel on another stream reads what was there before."""
    inputs = trial.inputs(case)
    plain = trial.run(case, inputs)
    grad_outputs = trial.grad_outputs(case, plain.outputs)
    late = {name: torch.zeros_like(tensor) for name, tensor in inputs.items()}
    late_grads = [torch.zeros_like(gradient) for gradient in grad_outputs]
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(WAIT_CYCLES)
        for target, source in [*((late[n], t) for n, t in inputs.items()), *zip(late_grads, grad_outputs, strict=True)]:
            target.copy_(source)
        run = trial.run(case, late, grad_outputs=late_grads)
    torch.cuda.synchronize()
    demand_same_bits(trial.spec, plain, run, "a side stream changes the results")
