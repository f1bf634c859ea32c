"""Work runs on the current stream: a side stream that is delayed gives the bits of the default stream."""

import torch

from conformance.case import Case
from conformance.property import Property
from conformance.trial import Trial, demand_same_bits

WAIT_CYCLES = 20_000_000  # about 10 ms


def check(trial: Trial, case: Case) -> None:
    """Fill the inputs late on a side stream: a kernel on another stream would read the zeros that they held before."""
    inputs = trial.inputs(case)
    on_default = trial.run(case, inputs)
    grad_outputs = trial.grad_outputs(case, on_default.outputs)
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
    demand_same_bits(trial.spec, on_default, run, "a side stream changes the results")


PROPERTY = Property.of_file(check, share=0.3, needs=("cuda",))
