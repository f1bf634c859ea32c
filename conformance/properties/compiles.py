"""`torch.compile(fullgraph=True)` compiles both passes, and the compiled function gives correct results.

On CUDA, Inductor compiles the graph. On a CPU the traced graph runs uncompiled, to save time. There Triton's
interpreter runs the kernels, which torch.compile cannot trace: only a GPU can tell about kernels that are launched
without a custom operator.
"""

from typing import Any

import torch

from conformance.case import Case
from conformance.gates import Failure
from conformance.properties import opcheck
from conformance.property import Property
from conformance.trial import Trial


def check(trial: Trial, case: Case) -> float:
    """Compile without cached graphs, then run twice: the second run uses the cached graph."""
    torch._dynamo.reset()
    engine = "inductor" if trial.device == "cuda" else "aot_eager"
    compiled: Any = torch.compile(trial.function, fullgraph=True, backend=engine)
    try:
        return max(trial.judge(case, trial.run(case, function=compiled)) for _ in range(2))
    except Failure as failure:
        if trial.device == "cpu" and "triton/runtime" in str(failure.__cause__):
            return 0.0
        raise


PROPERTY = Property.of_file(check, cases=opcheck.cases)
