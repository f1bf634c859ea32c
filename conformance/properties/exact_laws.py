"""Exact laws of the formulas hold bit by bit in floating point: scaling by a power of two, negation.

A power of two changes exponents alone, and a sign changes nothing else, as long as no number leaves the normal range.
Each exact law of a spec changes a call, and names the factor by which each output and gradient changes. No tolerance
hides a constant that is rounded, an eps in the wrong place, or a branch on the size of a number.
"""

import torch

from conformance.case import Case
from conformance.profiles import Profile
from conformance.promises import ExactLaw
from conformance.property import Property, of_file
from conformance.spec import Spec
from conformance.tolerances.gates import Failure
from conformance.trial import Trial, bits
from unsloth_ref.accuracy import is_float, widen_float8

# Products of few numbers of this size stay in the normal range of 16 bits too.
LEAST, MOST = 0.25, 4.0
# How many times an exact law of incoming gradients alone is applied, to find thresholds; float16 has no range for it.
FAR = 15


def cases(spec: Spec, profile: Profile) -> list[Case]:
    """Short rows and rows of several tiles; then every option set."""
    case = spec.case(3, 70)
    options = {name: values[-1] for name, values in spec.drawing.options.items()}
    mixed = [case.with_options(options)] if options and spec.drawing.consistent(options) else []
    return [case, spec.case(2, 1030), *mixed] if spec.exact_laws else []


def check(trial: Trial, case: Case) -> None:
    """Compare a call with one that each exact law changes."""
    for name, law in trial.spec.exact_laws.items():
        demand_exact_law(trial, case, name, law)


def demand_exact_law(trial: Trial, case: Case, name: str, law: ExactLaw) -> None:
    """Raise Failure unless the law holds bit by bit."""
    inputs = {n: _moderate(t) if is_float(t) else t for n, t in trial.inputs(case).items()}
    if any(needed not in inputs for needed in law.inputs) or any(absent in inputs for absent in law.without):
        return
    if law.grad_outputs != 1 and not law.inputs and trial.dtype != torch.float16:
        name, law = f"{name}, {FAR} times over", law.to_the(FAR)
    accepted = trial.options(case)
    if not law.holds(accepted):
        return
    outputs = trial.run(case, inputs, function=trial.spec.reference, grads=()).outputs
    grad_outputs = [_moderate(g) if is_float(g) else g for g in trial.grad_outputs(case, outputs)]
    first = trial.run(case, inputs, grad_outputs=grad_outputs)
    changed = {n: t * law.inputs.get(n, 1) if is_float(t) else t for n, t in inputs.items()}
    scaled = [g * law.grad_outputs if is_float(g) else g for g in grad_outputs]
    second = trial.run(case.with_options(law.options(accepted)), changed, grad_outputs=scaled)
    for (key, what, one), (_, _, other) in zip(first.named(trial.spec), second.named(trial.spec), strict=True):
        _demand_multiple(name, what, one, other, law.factors.get(key, 1.0))


def _demand_multiple(law: str, what: str, one: torch.Tensor, other: torch.Tensor, factor: float) -> None:
    one, other = widen_float8(one), widen_float8(other)
    wanted = one * factor
    smallest = 4 * torch.finfo(one.dtype).smallest_normal * max(abs(factor), 1 / abs(factor))
    differs = (bits(wanted) != bits(other)) & ((wanted.abs() > smallest) | (other.abs() > smallest))
    if differs.any():
        index = tuple(differs.nonzero()[0].tolist())
        raise Failure(
            f"{law}: {what} should be {factor:g} times as large in every bit; it is not in {int(differs.sum())} of"
            f" {differs.numel()} elements, first at index {index}\n"
            f"got {float(other[index])!r}, should be {float(wanted[index])!r}"
        )


def _moderate(values: torch.Tensor) -> torch.Tensor:
    """The same signs, with magnitudes from LEAST to MOST."""
    signs = torch.where(values < 0, -1.0, 1.0).to(values.dtype)
    return signs * values.abs().clamp(LEAST, MOST)


PROPERTY = Property(*of_file(check), cases=cases)
