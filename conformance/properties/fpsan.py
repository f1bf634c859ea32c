"""In exact arithmetic, results do not depend on warps, and gradients of rows add up to the whole bit by bit.

Triton's floating-point sanitizer makes every operation of a kernel exact (conformance/instruments/exact.py). Two
programs that add up the same terms then agree in every bit, whatever their order: the kernel, the same kernel with
other warps, and the naive sum over calls with a few rows each. A term that is lost, counted twice or taken from another
row shows, however small it is beside the sum.

A call whose arithmetic is not all in Triton kernels that the sanitizer understands is not checked.
"""

import torch

from conformance.case import Case
from conformance.profiles import Profile
from conformance.property import Property, of_file
from conformance.spec import Inputs, Spec
from conformance.tolerances.gates import Failure, Unchecked
from conformance.trial import Run, Trial, as_leaves, bits, demand_same_bits, detached

COUNTS = ((9, 130), (67, 64), (5, 4097))


def cases(spec: Spec, profile: Profile) -> list[Case]:
    """Short rows of several tiles, many rows, long rows; then every option set."""
    options = {name: values[-1] for name, values in spec.drawing.options.items()}
    case = spec.case(*COUNTS[0])
    mixed = [case.with_options(options)] if options and spec.drawing.consistent(options) else []
    return [*(spec.case(*count) for count in COUNTS), *mixed]


def check(trial: Trial, case: Case) -> None:
    """Compare with other warps, and with a sum over calls; losses row by row, and their total."""
    spec = trial.spec
    for options in [spec.row_options, *([spec.total_options] if spec.total_options else [])]:
        chosen = trial.rowwise(case) if options is spec.row_options else case.with_options(options)
        inputs = trial.inputs(chosen)
        plain = trial.run(chosen, inputs, function=spec.reference, grads=()).outputs
        grad_outputs = trial.grad_outputs(chosen, plain)
        whole = _run(trial, chosen, inputs, grad_outputs)
        try:
            other = _run(trial, chosen, inputs, grad_outputs, other_warps=True)
        except Failure as failure:
            raise Unchecked(f"with another number of warps the call {failure}") from failure
        demand_same_bits(spec, whole, other, "in exact arithmetic another number of warps changes the results")
        if (spec.independent or spec.rowwise) and not spec.bits_vary:
            _demand_sums(trial, chosen, inputs, grad_outputs, whole)


def _run(trial: Trial, case: Case, inputs: Inputs, grad_outputs: list[torch.Tensor], other_warps: bool = False) -> Run:
    """A run in exact arithmetic; raises Unchecked if some of it is not exact."""
    from conformance.instruments.exact import exact_arithmetic

    options = trial.options(case)
    leaves = as_leaves(inputs, trial.spec.grads)
    with exact_arithmetic(other_warps) as exact:
        outputs = trial.call(leaves, options)
        gradients = trial.backward(outputs, leaves, trial.spec.grads, grad_outputs)
    if exact.outside:
        raise Unchecked(f"not all in exact arithmetic: {', '.join(sorted(exact.outside))}")
    if not exact.kernels:
        raise Unchecked("no Triton kernel")
    return Run(detached(outputs), gradients)


def _demand_sums(trial: Trial, case: Case, inputs: Inputs, grad_outputs: list[torch.Tensor], whole: Run) -> None:
    """Call with the first part, the odd ones in reverse and the others; what has no parts must add up."""
    from conformance.instruments.exact import add, exact_arithmetic

    parts, totals = trial.spec.parts, dict[str, torch.Tensor]()
    every = list(range(parts.count(inputs)))
    for chosen in filter(None, (every[:1], every[1::2][::-1], every[2::2])):
        picked, options, rows = parts.pick(inputs, chosen)
        part_grads = [gradient[rows] if gradient.ndim else gradient for gradient in grad_outputs]
        part = _run(trial, case.with_options(options), picked, part_grads)
        for (key, name, one), (_, _, found) in zip(whole.named(trial.spec), part.named(trial.spec), strict=True):
            if one.ndim and key in (*trial.spec.outputs, *parts.grads):
                _demand_same(f"{name} in a call with {len(chosen)} of {len(every)} parts", one[rows], found)
                continue
            with exact_arithmetic():
                totals[name] = add(totals[name], found) if name in totals else found
    for _, name, one in whole.named(trial.spec):
        if name in totals:
            _demand_same(f"{name}, added up over the parts,", totals[name], one)


def _demand_same(what: str, one: torch.Tensor, other: torch.Tensor) -> None:
    differs = bits(one) != bits(other)
    if differs.any():
        index = tuple(differs.nonzero()[0].tolist())
        raise Failure(
            f"in exact arithmetic {what} differs from the whole call's in {int(differs.sum())} of {differs.numel()}"
            f" elements, first at index {index}"
        )


PROPERTY = Property(*of_file(check), cases=cases, needs=("cuda", "fpsan"))
