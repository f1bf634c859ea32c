"""A captured CUDA graph, replayed after its inputs have changed in place, gives the results of an eager call."""

from dataclasses import replace

import torch

from conformance.case import Case
from conformance.property import Property, of_file
from conformance.trial import Trial, demand_same_bits


def check(trial: Trial, case: Case) -> None:
    """Capture with one seed, replay with another of the same parity: the shapes of some inputs depend on the parity."""
    other = replace(case, seed=case.seed + 2)
    static, fresh = trial.inputs(case), trial.inputs(other)
    grad_outputs = trial.grad_outputs(case, trial.run(case, static).outputs)  # also compiles
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        trial.run(case, static, grad_outputs=grad_outputs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = trial.run(case, static, grad_outputs=grad_outputs)
    for name, tensor in static.items():
        tensor.copy_(fresh[name])
    graph.replay()
    torch.cuda.synchronize()
    eager = trial.run(case, fresh, grad_outputs=grad_outputs)
    if trial.spec.syncs:
        trial.judge(case, captured, fresh, grad_outputs)
    else:
        demand_same_bits(trial.spec, eager, captured, "a replayed CUDA graph differs from an eager call")


PROPERTY = Property(*of_file(check), share=0.3, needs=("cuda",))
