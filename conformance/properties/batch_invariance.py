"""A row, or a document, has the same bits whatever the number of others in the call, their order and its own place.

A loss that is checked alone, in another batch size or on more devices must not differ from that of the run. Gradients
of weights are sums over rows: another number of rows is another sum, and they are not compared.

PyTorch's own operators keep the bits of a row only on a CPU, and only where all rows begin at whole vectors: on CUDA
the order of a sum depends on the number of rows. What records no autograd nodes but PyTorch's own is not checked
elsewhere.
"""

import torch

from conformance.case import Case
from conformance.instruments.plain import is_plain
from conformance.profiles import Profile
from conformance.property import Property, of_file
from conformance.spec import Spec
from conformance.tolerances.gates import Failure, Unchecked
from conformance.trial import Run, Trial, as_leaves, bits

VECTOR = 64  # columns: a multiple of what a loop of a CPU takes at once
# A launcher may choose by rows: below a tile's height, around one wave of a grid, one program per row.
COUNTS = ((9, 128), (19, 1024), (5, 4096))
MANY = ((9, 130), (67, 64), (1031, 64), (3, 20_001))


def cases(spec: Spec, profile: Profile) -> list[Case]:
    """Short and long rows, few and many of them."""
    counts = (*COUNTS, *MANY) if profile.elements > 2**16 else COUNTS
    return [spec.case(*count) for count in counts]


def check(trial: Trial, case: Case) -> None:
    """Call with single parts, with half of them, and with all of them twice, once in reverse."""
    case, parts = trial.rowwise(case), trial.spec.parts
    inputs = trial.inputs(case)
    whole_vectors = all(tensor.shape[-1] % VECTOR == 0 for tensor in inputs.values() if tensor.is_floating_point())
    if trial.device == "cuda" or not whole_vectors:
        leaves = as_leaves(inputs, trial.spec.grads)
        if is_plain(trial.call(leaves, trial.options(case))):
            raise Unchecked("plain PyTorch, whose order of sums depends on the number of rows")
    count = parts.count(inputs)
    every = list(range(count))
    grad_outputs = trial.grad_outputs(case, trial.run(case, inputs, grads=()).outputs)
    whole = trial.run(case, inputs, grad_outputs=grad_outputs)
    choices = {
        # Several: the last bit of a sum often does not reach the rounded results.
        **{f"number {i} alone": [i] for i in sorted({0, count // 3, 2 * count // 3, count - 1}) if i >= 0},
        "the second half": every[count // 2 :],
        "all of them in reverse, then in order": every[::-1] + every,
    }
    for name, chosen in choices.items():
        if chosen:
            picked, options, rows = parts.pick(inputs, chosen)
            changed = case.with_options(options)
            run = trial.run(changed, picked, grad_outputs=[gradient[rows] for gradient in grad_outputs])
            _demand_same(trial, whole, run, rows, f"{name} of {count}")


def _demand_same(trial: Trial, whole: Run, part: Run, rows: torch.Tensor, chosen: str) -> None:
    compared = (*trial.spec.outputs, *trial.spec.parts.grads)
    for (key, name, one), (_, _, other) in zip(whole.named(trial.spec), part.named(trial.spec), strict=True):
        if key not in compared:
            continue
        differs = (bits(one[rows]) != bits(other)) & ((one[rows] != 0) | (other != 0))  # nobody sees the sign of a 0
        if differs.any():
            index = tuple(differs.nonzero()[0].tolist())
            raise Failure(
                f"{name} has other bits in a call with {chosen}: {int(differs.sum())} of {differs.numel()} elements,"
                f" first at index {index} of that call\n"
                f"in the whole call {float(one[rows][index])!r}, in that one {float(other[index])!r}"
            )


def _exempt(spec: Spec) -> str:
    undeclared = spec.independent is None and not spec.rowwise
    return "no independent rows or parts are declared" if undeclared else spec.bits_vary


PROPERTY = Property(*of_file(check), cases=cases, exempt=_exempt)
