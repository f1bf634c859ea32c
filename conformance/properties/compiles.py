"""`torch.compile(fullgraph=True)` takes the function, forward and backward, and the results stay right.

On a CPU the graph is traced and run as it is, for want of time; on CUDA Inductor compiles it.
"""

from typing import Any

import torch

from conformance.case import Case
from conformance.profiles import Profile
from conformance.properties import opcheck
from conformance.spec import Spec
from conformance.trial import Trial


def cases(spec: Spec, profile: Profile) -> list[Case]:
    """Every option at its default, the same laid out otherwise, then every option set."""
    return opcheck.cases(spec, profile)


def check(trial: Trial, case: Case) -> float:
    """Compile afresh, then run twice: the second run takes the cached graph."""
    torch._dynamo.reset()
    engine = "inductor" if trial.device == "cuda" else "aot_eager"
    compiled: Any = torch.compile(trial.function, fullgraph=True, backend=engine)
    return max(trial.judge(case, trial.run(case, function=compiled)) for _ in range(2))
