"""`torch.compile(fullgraph=True)` compiles both passes; the traced graph gives eager's bits, Inductor's correct ones.

The traced graph, run operator by operator, computes what eager calls compute: a compiled call that takes another path,
or rounds a number that eager does not, has other bits. What records no autograd nodes but PyTorch's own is an
exception: tracing decomposes its backward pass and chooses other memory layouts, and so other orders of sums.

Inductor itself fuses and contracts arithmetic, which changes bits; on CUDA its results are therefore judged by the
gates, with the eager run as the peer. On a CPU only the traced graph runs, to save time. There Triton's interpreter
runs the kernels, which torch.compile cannot trace: only a GPU can tell about kernels that are launched without a custom
operator.
"""

from typing import Any

import torch

from conformance.case import Case
from conformance.instruments.plain import is_plain
from conformance.properties import opcheck
from conformance.property import Property, of_file
from conformance.tolerances.gates import Failure, Unchecked
from conformance.trial import Trial, as_leaves, demand_same_bits


def check(trial: Trial, case: Case) -> float:
    """Compile without cached graphs, then run twice: the second run uses the cached graph."""
    eager, used = trial.run(case), 0.0
    leaves = as_leaves(trial.inputs(case), trial.spec.grads)
    plain = is_plain(trial.call(leaves, trial.options(case)))
    for engine in ("aot_eager", "inductor") if trial.device == "cuda" else ("aot_eager",):
        torch._dynamo.reset()
        compiled: Any = torch.compile(trial.function, fullgraph=True, backend=engine)
        for _ in range(2):
            try:
                run = trial.run(case, function=compiled)
            except Failure as failure:
                if trial.device == "cpu" and "triton/runtime" in str(failure.__cause__):
                    raise Unchecked("a kernel without a custom operator: only a GPU can tell") from failure
                raise
            used = max(used, trial.judge(case, run, peer=eager if engine == "inductor" else None))
            if engine == "aot_eager" and trial.spec.same_bits and not plain:
                demand_same_bits(trial.spec, eager, run, "the traced graph differs from the eager call")
    if not trial.spec.same_bits and not plain:  # the order of a total's sum may change, not the rows
        rows = trial.rowwise(case)
        torch._dynamo.reset()
        compiled = torch.compile(trial.function, fullgraph=True, backend="aot_eager")
        run = trial.run(rows, function=compiled)
        demand_same_bits(trial.spec, trial.run(rows), run, "the traced graph differs from the eager call")
    return used


PROPERTY = Property(*of_file(check), cases=opcheck.cases)
