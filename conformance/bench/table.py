"""The table of speeds: every contender on every shape of a spec, judged on the very inputs that are timed."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from conformance import backends
from conformance.bench.sampler import Times, interleave, matmul_rate, peak_mebibytes
from conformance.case import Case
from conformance.gates import Failure
from conformance.search import DTYPES
from conformance.spec import Inputs, Spec, specs
from conformance.trial import Trial, leaf


@dataclass(frozen=True)
class Row:
    """One contender on one shape.

    Attributes:
        forward, full: (20 %, 50 %, 80 %) quantiles in milliseconds; None where the result is not right, except for
            peers: they are timed as they are, and their deviation is shown.
        peak_mebibytes: memory at the peak of a full call, above its inputs.
        error_use: share of the error budget used on these inputs.
        roofline: bytes that must move / copy rate / full time.
        red: the gate that was broken.
    """

    op: str
    shape: str
    dtype: str
    backend: str
    forward: tuple[float, float, float] | None = None
    full: tuple[float, float, float] | None = None
    peak_mebibytes: float | None = None
    error_use: float | None = None
    roofline: float | None = None
    red: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """As written to JSON."""
        return asdict(self)


def heading(copy: float) -> str:
    """The card, its two rates, and how times were taken."""
    return (
        f"{torch.cuda.get_device_name()}, copy {copy / 1e12:.2f} TB/s, bf16 matmul {matmul_rate() / 1e12:.0f} TFLOP/s,"
        " cold L2, host launch included, median of interleaved rounds [20 %, 80 %]"
    )


def measure(ops: Sequence[str], names: Sequence[str], dtype: str, copy: float) -> Iterator[list[Row]]:
    """Time backends against each other, one list of rows a shape.

    Args:
        ops: operations.
        names: backends; what one does not define is left out.
        dtype: of the inputs.
        copy: bytes a second of the card.
    """
    judged = {name: backends.load(name, "cuda") for name in names}
    for op in ops:
        spec = specs()[op]
        trials = {
            name: Trial(spec, backend.functions[op], DTYPES[dtype], "cuda", source="cuda")
            for name, backend in judged.items()
            if op in backend.functions
        }
        for shape, sizes in spec.bench.items():
            case = Case(tuple((name, sizes[name]) for name in spec.sizes))
            yield _rows(spec, shape, case, dtype, trials, copy)


def _rows(spec: Spec, shape: str, case: Case, dtype: str, trials: dict[str, Trial], copy: float) -> list[Row]:
    shape = f"{shape} {'x'.join(str(size) for _, size in case.sizes)}"
    inputs = spec.inputs(case, DTYPES[dtype], "cuda", source="cuda")
    rows = {name: _judge(Row(spec.op, shape, dtype, name), trial, case, inputs) for name, trial in trials.items()}
    timed = {name: trial for name, trial in trials.items() if rows[name].red is None or name in backends.PEERS}
    calls = {name: _calls(trial, case, inputs) for name, trial in timed.items()}
    for forward, full in calls.values():
        for call in (forward, full, full):
            call()
    forward = interleave({name: call for name, (call, _) in calls.items()})
    full = interleave({name: call for name, (_, call) in calls.items()})
    least = sum(spec.bytes(inputs)) / copy
    return [
        _timed(row, forward[name], full[name], peak_mebibytes(calls[name][1]), least, copy) if name in timed else row
        for name, row in rows.items()
    ]


def _copies(inputs: Inputs) -> Inputs:
    """Copies, for a contender that may write over them."""
    return {name: tensor.clone() for name, tensor in inputs.items()}


def _judge(row: Row, trial: Trial, case: Case, inputs: Inputs) -> Row:
    try:
        return replace(row, error_use=trial.judge(case, trial.run(case, _copies(inputs)), inputs))
    except Failure as failure:
        return replace(row, red=str(failure).split("\n")[0])


def _calls(trial: Trial, case: Case, inputs: Inputs) -> tuple[Callable[[], object], Callable[[], object]]:
    """The forward pass alone, and with all gradients; inputs are made once and kept."""
    plain = _copies(inputs)
    leaves = {name: leaf(tensor, name in trial.spec.grads) for name, tensor in _copies(inputs).items()}
    wanted = [leaves[name] for name in trial.spec.grads]
    grad_outputs = trial.grad_outputs(case, trial.call(leaves, {}))

    def forward() -> object:
        with torch.no_grad():
            return trial.function(*plain.values())

    def full() -> object:
        return torch.autograd.grad(trial.function(*leaves.values()), wanted, grad_outputs)

    return forward, full


def _timed(row: Row, forward: Times, full: Times, peak: float, least: float, copy: float) -> Row:
    share = least / (full.median * 1e-3)
    cached = 2 * torch.cuda.get_device_properties(0).L2_cache_size / copy  # what a pass may leave there for the next
    if full.median * 1e-3 < least - cached:
        return replace(row, red=f"{share:.2f} of the roofline: not all the work was done")
    return replace(row, forward=forward.spread, full=full.spread, peak_mebibytes=peak, roofline=share)


def text(rows: Sequence[Row]) -> str:
    """One shape as a table."""
    title = f"{rows[0].op} {rows[0].shape} {rows[0].dtype}"
    lines = [f"{title:<50}{'forward':<24}{'forward + backward':<24}{'peak MiB':<11}{'error use':<12}of roofline"]
    for row in rows:
        if row.full is None:
            lines.append(f"  {row.backend:<48}not timed: {row.red}")
            continue
        error = "red" if row.red else f"{100 * (row.error_use or 0):.0f} %"
        lines.append(
            f"  {row.backend:<48}{_spread(row.forward):<24}{_spread(row.full):<24}{row.peak_mebibytes or 0:<11.0f}"
            f"{error:<12}{100 * (row.roofline or 0):.0f} %" + (f"   {row.red}" if row.red else "")
        )
    return "\n".join(lines)


def _spread(times: tuple[float, float, float] | None) -> str:
    low, middle, high = times or (0.0, 0.0, 0.0)
    return f"{middle:.3f} [{low:.3f} {high:.3f}]"
