"""Work runs on the current stream: a side stream that is delayed gives the bits of the default stream."""

import torch

from conformance.case import Case
from conformance.property import Property, of_file
from conformance.trial import Trial, demand_same_bits

WAIT_CYCLES = 20_000_000  # about 10 ms


def check(trial: Trial, case: Case) -> None:
    """Fill the inputs late on a side stream: a kernel on another stream would read the zeros that they held before.

    The inputs of both calls have one layout: where they lie decides how wide a kernel reads, and so the order of a sum.
    """
    inputs, late = trial.inputs(case), trial.inputs(case)
    on_default = trial.run(case, inputs)
    grad_outputs, late_grads = (trial.grad_outputs(case, on_default.outputs) for _ in range(2))
    sources = [_memory(tensor) for tensor in (*inputs.values(), *grad_outputs)]
    targets = [_memory(tensor).zero_() for tensor in (*late.values(), *late_grads)]
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(WAIT_CYCLES)
        for target, source in zip(targets, sources, strict=True):
            target.copy_(source)
        run = trial.run(case, late, grad_outputs=late_grads)
    torch.cuda.synchronize()
    demand_same_bits(trial.spec, on_default, run, "a side stream changes the results")


def _memory(tensor: torch.Tensor) -> torch.Tensor:
    """The memory of a tensor as bytes, with what lies around its elements."""
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())


PROPERTY = Property(*of_file(check), share=0.3, needs=("cuda",))
