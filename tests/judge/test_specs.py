"""Specs and operations match, and a spec's own form of the truth equals the contract."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from conformance.case import Case
from conformance.declarations import SpecError
from conformance.instruments.plain import is_plain
from conformance.profiles import PROFILES
from conformance.properties import exact_laws, special_values
from conformance.specs import geglu, specs, swiglu
from conformance.specs import linear_cross_entropy as linear
from conformance.tolerances.gates import Failure
from conformance.trial import Run, Trial, as_leaves
from unsloth_fast import kernels as fast
from unsloth_ref import kernels as reference
from unsloth_ref.accuracy import widen
from unsloth_ref.types import Approximate

OPERATIONS = tuple(reference.__all__)
SIZES = {"tokens": 23, "ignored": 3, "vocab": 31, "hidden": 7}


class _Largest(TorchDispatchMode):
    """Records the number of elements of the largest tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if isinstance(found, Tensor):
            self.elements = max(self.elements, found.numel())
        return found


def run(function: Any, case: Case) -> Run:
    trial = Trial(linear.spec, function, torch.float64, "cpu")
    return trial.run(case, {name: widen(tensor) for name, tensor in trial.inputs(case).items()})


@pytest.mark.parametrize("tokens", [0, 1, 23])
@pytest.mark.parametrize(
    "options", [{}, {"reduction": "none"}, {"reduction": "sum", "softcap": 5.0}, {"num_items": 7}, {"ignore_index": 2}]
)
def test_the_truth_in_chunks_is_the_contract(
    options: dict[str, Any], tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(tuple({**SIZES, "tokens": tokens}.items()), tuple(options.items()), seed=1)
    monkeypatch.setattr(linear, "LOGITS_PER_CHUNK", 4 * SIZES["vocab"])
    whole, chunks = run(reference.linear_cross_entropy, case), run(linear.truth, case)
    assert {"hidden", "weight", "bias"} == set(whole.grads)
    for (_, name, one), (_, _, other) in zip(whole.named(linear.spec), chunks.named(linear.spec), strict=True):
        torch.testing.assert_close(other, one, rtol=1e-13, atol=1e-15, msg=lambda text, name=name: f"{name}: {text}")


def test_the_truth_in_chunks_never_holds_all_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(tuple({**SIZES, "tokens": 400}.items()))
    monkeypatch.setattr(linear, "LOGITS_PER_CHUNK", 4 * SIZES["vocab"])
    with _Largest() as whole:
        run(reference.linear_cross_entropy, case)
    with _Largest() as chunks:
        run(linear.truth, case)
    assert whole.elements == 400 * SIZES["vocab"]
    assert chunks.elements == 400 * SIZES["hidden"]


def test_the_judge_uses_the_truth_of_the_spec(monkeypatch: pytest.MonkeyPatch) -> None:
    case, dtypes = Case(tuple(SIZES.items())), []
    spec = linear.spec

    def recorded(*inputs: Any, **options: Any) -> Tensor:
        dtypes.append(inputs[0].dtype)
        return linear.truth(*inputs, **options)

    trial = Trial(replace(spec, budget=replace(spec.budget, truth=recorded)), spec.reference, torch.float32, "cpu")
    trial.judge(case, trial.run(case))
    assert dtypes == [torch.float64]


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_the_truth_of_geglu_is_the_contract_without_cancellation(approximate: Approximate) -> None:
    gate = torch.linspace(-8, 8, 1001, dtype=torch.float64, requires_grad=True)
    up = torch.ones_like(gate)
    whole, exact = (function(gate, up, approximate=approximate) for function in (reference.geglu, geglu.truth))
    torch.testing.assert_close(exact, whole, rtol=0, atol=1e-14)
    for one, other in zip(*(torch.autograd.grad(y.sum(), gate) for y in (exact, whole)), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-14)
    below = torch.tensor([[-9.0]], dtype=torch.float64), torch.tensor([[torch.inf]], dtype=torch.float64)
    assert reference.geglu(*below, approximate=approximate).isnan().all()  # -9 times 0, times infinity
    assert geglu.truth(*below, approximate=approximate).isneginf().all()


@pytest.mark.parametrize("backend", [fast, reference])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_an_infinite_up_at_a_cancelled_gate_may_give_infinity_or_nan_as_in_plain_pytorch(
    backend: Any, dtype: torch.dtype
) -> None:
    case = geglu.spec.parse("rows=1 hidden=3 fill=wide seed=1")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    trial = Trial(geglu.spec, backend.geglu, dtype, device)
    assert trial.inputs(case)["gate"][0, 2] < -8.3  # where 1 + erf is 0 in float64
    special_values.check(trial, case)


def test_a_spec_without_an_operation_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "__all__", [op for op in reference.__all__ if op != "swiglu"])
    with pytest.raises(SpecError, match=r"specs/swiglu\.py: unsloth_ref\.kernels has no swiglu"):
        specs.__wrapped__()


def test_an_operation_without_a_spec_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "__all__", [*reference.__all__, "unheard_of"])
    with pytest.raises(SpecError, match=r"unheard_of has no spec: conformance/specs/unheard_of\.py is missing"):
        specs.__wrapped__()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (replace(swiglu.spec, reference=reference.geglu), "got a spec named geglu; allowed: swiglu"),
        (None, "got spec = None"),
    ],
)
def test_a_spec_of_another_operation_is_refused(spec: Any, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(swiglu, "spec", spec)
    with pytest.raises(SpecError, match=rf"specs/swiglu\.py: {message}"):
        specs.__wrapped__()


@pytest.mark.parametrize("op", OPERATIONS)
def test_the_reference_satisfies_every_exact_law_in_float64(op: str) -> None:
    spec = specs()[op]
    assert spec.exact_laws
    for case in exact_laws.cases(spec, PROFILES["dev"]):
        exact_laws.check(Trial(spec, spec.reference, torch.float64, "cpu"), case.resized(wide=0))


def test_an_exact_law_that_does_not_hold_is_reported() -> None:
    exact_law = replace(next(iter(swiglu.spec.exact_laws.values())), factors={"y": 4.0})
    with pytest.raises(Failure, match="doubled: output y should be 4 times as large in every bit"):
        exact_laws.demand_exact_law(
            Trial(swiglu.spec, reference.swiglu, torch.float32, "cpu"), swiglu.spec.case(3, 8), "doubled", exact_law
        )


@pytest.mark.parametrize("op", [op for op in OPERATIONS if specs()[op].independent or specs()[op].rowwise])
@pytest.mark.parametrize("size", [(3, 64), (3, 33)])  # some inputs are there for an odd number of columns alone
def test_all_parts_of_a_call_are_the_whole_call(op: str, size: tuple[int, int]) -> None:
    spec = specs()[op]
    trial = Trial(spec, spec.reference, torch.float32, "cpu")
    case = trial.rowwise(spec.case(*size))
    inputs = trial.inputs(case)
    picked, options, rows = spec.parts.pick(inputs, range(spec.parts.count(inputs)))
    assert picked.keys() == inputs.keys()
    whole, parts = trial.run(case, inputs, grads=()), trial.run(case.with_options(options), picked, grads=())
    for one, other in zip(whole.outputs, parts.outputs, strict=True):
        torch.testing.assert_close(other, one[rows])


@pytest.mark.parametrize("op", [op for op in OPERATIONS if specs()[op].grads])
def test_plain_pytorch_is_told_from_kernels_by_its_autograd_nodes(op: str) -> None:
    spec = specs()[op]
    case = spec.case(2, 8)
    for package, plain in ((reference, True), (fast, False)):
        trial = Trial(spec, getattr(package, op), torch.float32, "cpu")
        inputs = as_leaves(trial.inputs(case), spec.grads)
        assert is_plain(trial.call(inputs, trial.options(case))) == plain


@pytest.mark.skipif(torch.cuda.is_available(), reason="judges on the CPU, in this process")
def test_equal_probabilities_share_their_rounding() -> None:
    """Of tiny scores each exponential is nearly 1: rounding it to bfloat16 moves all results to one side."""

    def rounded(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, sinks: Tensor, **options: Any) -> Tensor:
        score = (q * k.float()).sum(-1, keepdim=True) * q.shape[2] ** -0.5  # of each token with itself
        sink = sinks.float()[None, :, None]
        largest = torch.maximum(score, sink)
        power = torch.exp(score - largest)
        return (power.to(q.dtype) * v.float() / (power + torch.exp(sink - largest))).to(q.dtype)

    spec = specs()["packed_attention"]
    line = "tokens=31 documents=2 kv_heads=1 group=1 width=80 sinks=1 window=1 fill=tiny seed=2"
    trial, case = Trial(spec, rounded, torch.bfloat16, "cpu"), spec.parse(line)
    assert trial.judge(case, trial.run(case, grads=())) < 0.7
    independent = replace(spec, drawing=replace(spec.drawing, alike=["ones", "zeros"]))
    with pytest.raises(Failure, match=r"gate G3 used 1\.1\d of the budget in output out: results are biased"):
        replace(trial, spec=independent).judge(case, trial.run(case, grads=()))
