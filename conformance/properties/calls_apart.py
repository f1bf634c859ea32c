"""Calls are independent: another call between or after the forward and backward passes changes no bit of the results.

A model runs the forward pass of every layer before the backward pass of any; generation runs it alone, and a kernel may
then return memory that it uses again. A process may call in several dtypes: a table that is kept by shape alone has the
wrong one.
"""

from dataclasses import replace

import torch

from conformance.case import Case
from conformance.property import Property, of_file
from conformance.tolerances.gates import Failure
from conformance.trial import Run, Trial, as_leaves, demand_same_bits, detached

# Rows and columns, by the dtype under test, that no other property has: the first call with them is in another dtype.
OWN = {torch.float32: (7, 75), torch.float16: (7, 77), torch.bfloat16: (7, 79)}


def check(trial: Trial, case: Case) -> float:
    """Call with the same sizes and other elements, between the two passes and after them; judge another dtype."""
    alone = _copied(trial.run(case))
    inputs = as_leaves(trial.inputs(case), trial.spec.grads)
    outputs = trial.call(inputs, trial.options(case))
    other = trial.run(replace(case, seed=case.seed + 1))
    grads = trial.backward(outputs, inputs, trial.spec.grads, trial.grad_outputs(case, outputs))
    trial.run(replace(case, seed=case.seed + 2))
    demand_same_bits(trial.spec, alone, Run(detached(outputs), grads), "another call in between changes the results")
    without_graph = trial.run(case, grads=())
    kept = _copied(without_graph)
    trial.run(replace(case, seed=case.seed + 1), grads=())
    demand_same_bits(trial.spec, kept, without_graph, "a later call changes results that need no gradient")
    del other  # kept alive until here, as a model keeps its activations
    dtype = torch.float16 if trial.dtype == torch.bfloat16 else torch.bfloat16  # float32 may be lacking
    elsewhere = replace(trial, dtype=dtype)
    try:
        run = elsewhere.run(case)
    except Failure:
        _demand_in_turn(trial, elsewhere)
        return 0.0
    try:
        return elsewhere.judge(case, run)
    except Failure as failure:
        raise Failure(f"after calls in {trial.dtype}, in {dtype}: {failure}", failure.used) from failure


def _copied(run: Run) -> Run:
    return Run(tuple(y.clone() for y in run.outputs), {name: g.clone() for name, g in run.grads.items()})


def _demand_in_turn(trial: Trial, elsewhere: Trial) -> None:
    """Raise Failure if calls raise in the dtype under test after one in the other; a function may take one alone."""
    case = trial.spec.case(*OWN[trial.dtype])
    try:
        elsewhere.run(case)
    except Failure:
        return
    try:
        trial.run(case)
    except Failure as failure:
        raise Failure(f"after a call in {elsewhere.dtype}, in {trial.dtype}: {failure}") from failure


PROPERTY = Property(*of_file(check), share=0.2)
