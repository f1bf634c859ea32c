"""An input that changed in place gives the results of its new elements, whatever earlier calls with it computed.

Every optimizer step changes weights in place, and every data loader may fill the same memory again. A result, or a
converted copy of a weight, or a plan made of indices, that is kept per tensor, per address or per shape is then stale.
Some optimizers and wrappers write through `.data`, which leaves the tensor's version as it was. What is kept in
inference, or for tensors that need no gradient, is stale too after the next steps of training. A tensor of which only
some elements change places has the same sum, first and last elements: what looks at these alone sees no change.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch

from conformance.calling import same_memory
from conformance.case import Case
from conformance.interpreter import Interpreted
from conformance.profiles import Profile
from conformance.property import Property, of_file
from conformance.spec import Inputs, Spec
from conformance.tolerances.gates import Failure
from conformance.trial import Run, Trial, as_leaves, demand_same_bits, detached


def cases(spec: Spec, profile: Profile) -> list[Case]:
    """One size, with an even and an odd seed: an odd one has the inputs that a case may lack."""
    return [replace(spec.case(3, 70), seed=seed) for seed in (0, 1)]


def check(trial: Trial, case: Case) -> float:
    """Call, change one input of the same tensors in place, call again; compare with a call on fresh copies.

    First in training, then in inference. With an odd seed, elements of the second half change places, through `.data`.
    """
    return max(_check(trial, case, grads) for grads in (trial.spec.grads, ()))


def _check(trial: Trial, case: Case, grads: Sequence[str]) -> float:
    inputs, through_data = trial.inputs(case), case.seed % 2 == 1
    drawn = trial.inputs(replace(case, seed=case.seed + 2))
    other = {n: _exchanged(t) for n, t in inputs.items()} if through_data else drawn
    leaves = as_leaves({name: tensor.clone() for name, tensor in inputs.items()}, grads)
    grad_outputs = trial.grad_outputs(case, trial.run(case, leaves, grads=()).outputs)
    first = _run(trial, case, leaves, grad_outputs)
    views = [any(same_memory(y, tensor) for tensor in leaves.values()) for y in first.outputs]
    first = Run(tuple(y.clone() if view else y for y, view in zip(first.outputs, views, strict=True)), first.grads)
    kept = Run(tuple(y.clone() for y in first.outputs), {n: g.clone() for n, g in first.grads.items()})
    _run(trial, case, leaves, grad_outputs)  # a second call is one that may reuse what the first one kept
    used = 0.0
    for name, tensor in leaves.items():
        if tensor.is_floating_point() or _accepted(trial, case, {**leaves, name: other[name]}):
            with torch.no_grad():
                (tensor.data if through_data else tensor).copy_(other[name])
            seen = _run(trial, case, leaves, grad_outputs)
            now = {n: t.detach().clone() for n, t in leaves.items()}
            fresh = as_leaves(now, grads)
            how = "through .data" if through_data else "in place"
            message = f"results are not those of {name}, which was changed {how}"
            demand_same_bits(trial.spec, _run(trial, case, fresh, grad_outputs), seen, message)
            used = max(used, trial.judge(case, seen, now, grad_outputs))  # kept by shape: stale for fresh copies too
    demand_same_bits(trial.spec, kept, first, "later calls with the same tensors change earlier results")
    return used


def _accepted(trial: Trial, case: Case, inputs: Inputs) -> bool:
    """Whether the reference accepts these inputs: other bounds of documents, for one, may not fit an option."""
    try:
        trial.run(case, inputs, function=trial.spec.reference, grads=())
    except Failure:
        return False
    return True


def _exchanged(tensor: torch.Tensor) -> torch.Tensor:
    flat = tensor.flatten()
    places = torch.arange(len(flat))
    places[len(flat) // 2 : -1] = places[len(flat) // 2 : -1].flip(0)  # no dtype of 8 bits can be flipped itself
    return flat[places].view(tensor.shape)


def _run(trial: Trial, case: Case, leaves: Inputs, grad_outputs: list[torch.Tensor]) -> Run:
    """Both passes on these very tensors, or inference if none requires a gradient; `Trial.run` makes new ones."""
    names = [name for name, leaf in leaves.items() if leaf.requires_grad]
    with Interpreted() as forward, torch.set_grad_enabled(bool(names)):
        outputs = trial.call(leaves, trial.options(case))
    with Interpreted() as backward:
        grads = trial.backward(outputs, leaves, names, grad_outputs)
    return Run(detached(outputs), grads, bool(forward), bool(backward))


PROPERTY = Property(*of_file(check), cases=cases)
