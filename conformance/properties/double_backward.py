"""Differentiating twice gives the right second derivative, or an error: never a wrong one.

Looked at in float32 whatever the dtype: a term is missing or it is not, and in 16 bits rounding would hide which.
"""

from dataclasses import replace

import torch
from torch import Tensor

from conformance.case import Case
from conformance.gates import Failure
from conformance.profiles import Profile
from conformance.spec import Spec
from conformance.trial import Function, Raised, Trial, describe, leaf, widen

TOLERANCE = 0.05  # of the largest entry: tells a missing term from rounding


def cases(spec: Spec, profile: Profile) -> list[Case]:
    """Few elements, so that the second derivatives stand out beside the first; every option by itself."""
    plain = spec.case(2, 5)
    return [plain, *(plain.with_options({name: v}) for name, values in spec.options.items() for v in values[1:])]


def check(trial: Trial, case: Case) -> None:
    """Differentiate the outputs plus the squares of their gradients, by every input that gets one."""
    trial = replace(trial, dtype=torch.float32)
    with Raised() as raised:
        seen = _second_derivatives(trial, case, trial.function, wide=False)
        right = _second_derivatives(trial, case, trial.spec.reference, wide=True)
        for name, y in seen.items():
            r = right[name]
            error = (y.double() - r).abs().max() if r.numel() else r.sum()
            if not error <= TOLERANCE * r.abs().max().clamp(min=1e-3):
                raise Failure(
                    f"the second derivative by {name} is wrong: off by {float(error):.2g},"
                    f" where the largest entry is {float(r.abs().max()):.2g}; an operation without one must raise"
                )
    if raised.error is not None and not isinstance(raised.error, RuntimeError):  # NotImplementedError is one
        raise Failure(f"differentiating twice raised {describe(raised.error)}, should raise RuntimeError")


def _second_derivatives(trial: Trial, case: Case, function: Function, wide: bool) -> dict[str, Tensor]:
    inputs = {n: widen(t) if wide else t for n, t in trial.inputs(case).items()}
    inputs = {name: leaf(tensor, name in trial.spec.grads) for name, tensor in inputs.items()}
    leaves = {name: inputs[name] for name in trial.spec.grads if name in inputs}
    outputs = function(*inputs.values(), **trial.options(case))
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    grads = torch.autograd.grad(outputs, [*leaves.values()], [torch.ones_like(o) for o in outputs], create_graph=True)
    # As a gradient penalty does it: beside the loss, so that gradients cut off from the graph go unnoticed by autograd.
    total = torch.stack([o.double().sum() for o in outputs] + [g.double().square().sum() for g in grads]).sum()
    return dict(zip(leaves, torch.autograd.grad(total, [*leaves.values()]), strict=True))
