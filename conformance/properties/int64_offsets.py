"""Tensors that span more than 2^31 elements give correct results.

In each dimension but the last in turn, the last index is 2^31 elements after the first: nine gigabytes of address
space, of which only the elements are touched. Half a million tokens of 4096 elements are as many. A call that plain
PyTorch refuses, because a library counts a stride in 32 bits, is not made. Of an operation of the command line, every
input is spread.

That shows how inputs are read. On a GPU with enough memory a kernel also gets as many elements in 16 bits, a smaller
call repeated, and the results of the last repetition must be right: outputs, what is stored between, and gradients
where memory holds those of so many.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from conformance.case import Case
from conformance.instruments.plain import is_plain
from conformance.profiles import Profile
from conformance.properties.layouts import naming
from conformance.property import Property, of_file
from conformance.spec import Inputs, Spec, accepted_options
from conformance.tolerances.gates import Failure, Unchecked
from conformance.trial import Run, Trial, as_leaves, bits

FAR = 2**31
CUBLAS = "at::cuda::blas"  # in the messages of PyTorch that refuse a stride of a matrix
ROWS = 512  # of the call that is repeated
FREE_BYTES = 64 * 2**30  # eight tensors of FAR elements in 16 bits
OUT_OF_MEMORY = "OutOfMemoryError"  # in the message of a call that does not fit


def cases(spec: Spec, profile: Profile) -> list[Case]:
    """Two rows of about one tile each; then several heads, where there are heads; then the call to repeat."""
    return [spec.case(2, 130), spec.case(3, 15), *_repeated(spec)]


def _repeated(spec: Spec) -> list[Case]:
    if spec.memory is None:
        return []
    case, rows = spec.memory.case, spec.row_dimension
    return [case.resized(**{rows: min(ROWS, case.size(rows))})]


def check(trial: Trial, case: Case) -> float:
    """Spread each input that may be so large, then the gradient of each output that has rows; or repeat the case."""
    return _check_repeated(trial, case) if case in _repeated(trial.spec) else _check_spread(trial, case)


def _check_repeated(trial: Trial, case: Case) -> float:
    if trial.device != "cuda" or trial.dtype == torch.float32:
        raise Unchecked("so many elements are judged on a GPU, in 16 bits")
    if torch.cuda.mem_get_info()[0] < FREE_BYTES:
        raise Unchecked(f"this GPU has less than {FREE_BYTES / 2**30:.0f} GiB of free memory")
    trial, total = replace(trial, source=trial.device), trial.spec.total_options
    used = last_repetition(trial, trial.rowwise(case))
    if total and set(total) <= set(accepted_options(trial.function, trial.spec)):
        used = max(used, last_repetition(trial, case.with_options(total)))
    return used


def last_repetition(trial: Trial, case: Case) -> float:
    """Repeat a case and judge the last repetition as if it were the only one; a total is not compared.

    Where memory does not hold the gradients of so many, outputs are judged alone.
    """
    for names in (trial.spec.grads, ()):
        try:
            return _last_repetition(trial, case, names)
        except Failure as failure:
            if OUT_OF_MEMORY not in str(failure):
                raise
        torch.cuda.empty_cache()
    raise Unchecked("this GPU has too little memory for the outputs of so many repetitions")


def _last_repetition(trial: Trial, case: Case, names: Sequence[str]) -> float:
    parts, inputs = trial.spec.parts, trial.inputs(case)
    grads = [name for name in parts.grads if name in names]
    peer = trial.run(case, inputs, function=trial.spec.reference, grads=grads)
    if is_plain(trial.call(as_leaves(inputs, trial.spec.grads), trial.options(case))):
        raise Unchecked("plain PyTorch, which counts in 64 bits")
    grad_outputs = trial.grad_outputs(case, peer.outputs)
    times = FAR // max(inputs[name].numel() for name in parts.grads) + 1
    many, changed, rows = parts.pick(inputs, [*range(parts.count(inputs))] * times)
    by_row = [output.ndim > 0 for output in peer.outputs]
    gradients = [g[rows] if own else g for g, own in zip(grad_outputs, by_row, strict=True)]
    run = trial.run(case.with_options(changed), many, grads=grads, grad_outputs=gradients)
    last = Run(
        tuple(y[-len(p) :] if own else p for y, p, own in zip(run.outputs, peer.outputs, by_row, strict=True)),
        {name: gradient[-len(inputs[name]) :] for name, gradient in run.grads.items()},
    )
    with naming(f"the last of {times} repetitions"):
        return trial.judge(case, last, inputs, grad_outputs, peer)


def _check_spread(trial: Trial, case: Case) -> float:
    used = 0.0
    for name in trial.spec.far or trial.spec.rowwise or trial.inputs(case):
        inputs = trial.inputs(case)
        for dimension in _dimensions(inputs[name]) if inputs[name].is_floating_point() else ():
            with naming(f"{name} spread in dimension {dimension}"):
                spread = {**inputs, name: _spread(inputs[name], dimension)}
                if (run := _run(trial, case, spread)) is not None:
                    used = max(used, trial.judge(case, run, inputs))
    case = trial.rowwise(case)
    outputs = trial.run(case, function=trial.spec.reference, grads=()).outputs
    for index, name in enumerate(trial.spec.outputs) if trial.spec.grads else ():
        for dimension in _dimensions(outputs[index]):
            grad_outputs = trial.grad_outputs(case, outputs)
            with naming(f"grad_output of {name} spread in dimension {dimension}"):
                far = [_spread(g, dimension) if g is grad_outputs[index] else g for g in grad_outputs]
                if (run := _run(trial, case, None, far)) is not None:
                    used = max(used, trial.judge(case, run, grad_outputs=grad_outputs))
    return used


def _run(trial: Trial, case: Case, inputs: Inputs | None, grad_outputs: list[Tensor] | None = None) -> Run | None:
    """The call; None if a library refuses it, be it the reference's or the backend's."""
    try:
        trial.run(case, inputs, function=trial.spec.reference, grad_outputs=grad_outputs)
    except Failure:
        return None
    try:
        return trial.run(case, inputs, grad_outputs=grad_outputs)
    except Failure as failure:
        if CUBLAS in str(failure):
            return None
        raise


def _dimensions(tensor: Tensor) -> list[int]:
    """The dimensions whose stride can be large: of at least size 2, and not the last of several."""
    return [d for d in range(max(min(tensor.ndim, 1), tensor.ndim - 1)) if tensor.shape[d] > 1]


def _spread(tensor: Tensor, dimension: int) -> Tensor:
    """The same elements, with the last index of a dimension FAR elements after the first."""
    stride = -(-FAR // (tensor.shape[dimension] - 1))
    inner = tensor.transpose(0, dimension)[0].numel()
    buffer = torch.empty((tensor.shape[dimension] - 1) * stride + inner, dtype=tensor.dtype, device=tensor.device)
    others = [size for d, size in enumerate(tensor.shape) if d != dimension]
    strides = list(torch.empty(others, device="meta").stride())
    far = buffer.as_strided(tensor.shape, (*strides[:dimension], stride, *strides[dimension:]))
    if not bits(far.copy_(tensor)).equal(bits(tensor)):
        raise Failure("this machine cannot allocate nine gigabytes of address space")
    return far


def _exempt(spec: Spec) -> str:
    found = spec.far or spec.rowwise or spec.budget.measured
    return "" if found else "no input is declared to be large"


PROPERTY = Property(*of_file(check), cases=cases, needs=("gigabytes",), exempt=_exempt)
