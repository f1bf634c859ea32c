"""Calls are independent: another call between or after the forward and backward passes changes no bit of the results.

A model runs the forward pass of every layer before the backward pass of any. A process may call in several dtypes: a
table that is kept by shape alone has the wrong one.
"""

from dataclasses import replace

import torch

from conformance.case import Case
from conformance.gates import Failure
from conformance.property import Property
from conformance.trial import Run, Trial, as_leaves, demand_same_bits, detached


def check(trial: Trial, case: Case) -> float:
    """Call with the same sizes and other elements, between the two passes and after them; judge another dtype.

    What raises in that dtype is not judged in it: then a table that a call in this dtype left behind is not found.
    """
    alone = trial.run(case)
    alone = Run(tuple(y.clone() for y in alone.outputs), {name: g.clone() for name, g in alone.grads.items()})
    inputs = as_leaves(trial.inputs(case), trial.spec.grads)
    outputs = trial.call(inputs, trial.options(case))
    other = trial.run(replace(case, seed=case.seed + 1))
    grads = trial.backward(outputs, inputs, trial.spec.grads, trial.grad_outputs(case, outputs))
    trial.run(replace(case, seed=case.seed + 2))
    demand_same_bits(trial.spec, alone, Run(detached(outputs), grads), "another call in between changes the results")
    del other  # kept alive until here, as a model keeps its activations
    dtype = torch.float16 if trial.dtype == torch.bfloat16 else torch.bfloat16  # float32 may be lacking
    elsewhere = replace(trial, dtype=dtype)
    try:
        run = elsewhere.run(case)
    except Failure:  # a function may take one dtype alone
        return 0.0
    try:
        return elsewhere.judge(case, run)
    except Failure as failure:
        raise Failure(f"after calls in {trial.dtype}, in {dtype}: {failure}", failure.used) from failure


PROPERTY = Property.of_file(check, share=0.2)
