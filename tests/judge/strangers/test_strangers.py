"""Operations that the project does not have are judged from a reference and an example alone, then with a spec."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from conformance import backends, operations
from conformance.case import DTYPES
from conformance.cli import main
from conformance.declarations import SpecError
from conformance.operations import Source, specs
from conformance.profiles import PROFILES
from conformance.properties import PROPERTIES
from conformance.search import Result, search
from conformance.trial import Trial
from conformance.writing import text
from tests.judge.strangers.kernels import RIGHT, WRONG

here = pytest.mark.skipif(torch.cuda.is_available(), reason="judges on the CPU, in this process")
HERE = "tests.judge.strangers"
SOURCES = {
    source.reference.rpartition(":")[2]: source
    for source in (
        Source(f"{HERE}.references:tempered_softmax", "x=randn(64,128) temperature=0.5", rows=("x",)),
        Source(f"{HERE}.references:group_norm", "x=randn(2,8,5) groups=4 weight=randn(8) bias=randn(8)"),
        Source(
            f"{HERE}.references:kl_divergence",
            "log_p=log_probabilities(16,32) q=probabilities(16,32) reduction=batchmean|sum|none",
        ),
        Source(f"{HERE}.references:top_k_gate", "logits=randn(16,8) k=2"),
        Source(f"{HERE}.references:scatter_rows", "src=randn(T=64,H=16) index=randint(N=10,T) count=N"),
        Source(f"{HERE}.references:masked_softmax", "x=randn(16,32) mask=mask(16,32)", rows=("x", "mask")),
        Source(f"{HERE}.references:scaled_add_", "x=randn(16,32) y=randn(16,32) alpha=0.5", in_place=("x",)),
    )
    if source.reference
}
# Few and small cases: the machine is slow, and the search is tested elsewhere.
SMALL = replace(PROFILES["ci"], name="small", examples=2, elements=2**7, shrink_seconds=0.1)
SHORT = (
    "metadata", "gradients", "one_at_a_time", "special_values", "signature_parity", "inputs_untouched",
    "row_independence", "double_backward", "no_grad", "checkpoint",
)  # fmt: skip


def judged(source: Source, kernel: str, name: str, dtype: str) -> Result:
    ((op, spec),) = specs(source).items()
    function = backends.load(f"{HERE}.kernels:{kernel}", "cpu", source).functions[op]
    return search(Trial(spec, function, DTYPES[dtype], "cpu"), PROPERTIES[name], SMALL, dtype)


def turn(number: int) -> str:
    return tuple(DTYPES)[number % 3]


@here
@pytest.mark.parametrize(("op", "kernel"), [(op, kernel) for op, kernels in RIGHT.items() for kernel in kernels])
def test_a_right_kernel_of_a_stranger_passes(op: str, kernel: str) -> None:
    """A right kernel passes each property in one dtype, and `gradients` in all."""
    for number, name in enumerate(SHORT):
        for dtype in DTYPES if name == "gradients" else (turn(number),):
            result = judged(SOURCES[op], kernel, name, dtype)
            assert result.verdict != "fail", f"{name} / {dtype}: {result.message} ({result.case})"


@here
@pytest.mark.parametrize(
    ("op", "kernel", "properties"), [(op, kernel, names) for op, kernels in WRONG.items() for kernel, names in kernels]
)
def test_a_wrong_kernel_of_a_stranger_fails(op: str, kernel: str, properties: tuple[str, ...]) -> None:
    for dtype in DTYPES:
        assert any(judged(SOURCES[op], kernel, name, dtype).verdict == "fail" for name in properties), dtype


@here
@pytest.mark.parametrize("op", SOURCES)
def test_a_written_spec_judges_as_the_learned_one(op: str, tmp_path: Path) -> None:
    source = SOURCES[op]
    assert source.reference
    file = tmp_path / f"{op}_spec.py"
    file.write_text(text(operations.learner(source), source.reference))
    written = Source(spec=str(file))
    ((_, learned),), ((name, spec),) = specs(source).items(), specs(written).items()
    assert (name, spec.outputs, spec.grads) == (op, list(learned.outputs), list(learned.grads))
    case = learned.case(3, 16)
    for one, other in zip(*(s.inputs(case, torch.float16, "cpu").values() for s in (learned, spec)), strict=True):
        assert one.equal(other)
    wrong, properties = WRONG[op][0]
    assert judged(written, RIGHT[op][0], "value", "float32").verdict == "pass"
    assert judged(written, wrong, properties[0], "float32").verdict == "fail"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (Source(f"{HERE}.references:tempered_softmax"), "needs --example"),
        (
            Source(f"{HERE}.references:tempered_softmax", "temperature=2.0"),
            "x is missing, which tempered_softmax needs",
        ),
        (
            Source(f"{HERE}.references:tempered_softmax", "x=randn(3,4) heat=2.0"),
            "has no argument heat; it has x, temp",
        ),
        (
            Source(f"{HERE}.references:group_norm", "x=randn(2,8) groups=3 weight=randn(8)"),
            "raised RuntimeError: Expected",
        ),
        (Source(f"{HERE}.references:group_norms", "x=randn(2,8)"), "cannot be imported"),
        (Source("torch.nn.functional:gelu", "input=randn(2,8)"), "unknown (ValueError: no signature"),
        (Source("torch.nn:Linear", "input=randn(2,8)"), "unknown (TypeError"),
        (Source(f"{HERE}.references:kl_divergence", "log_p=randn(2,8) q=randn(2,8)", rows=("q",)), "has no such rows"),
        (
            Source(f"{HERE}.references:scaled_add_", "x=randn(2) y=randn(2)", in_place=("z",)),
            "--in-place: got z; allowed",
        ),
        (Source(f"{HERE}.references:top_k_gate", "logits=randn(4,8) k=2", grads=("k",)), "--grads: got k; allowed"),
    ],
)
def test_an_example_that_does_not_fit_is_refused(source: Source, message: str) -> None:
    with pytest.raises(SpecError) as refused:
        specs(source)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


KERNEL = (
    "--reference", f"{HERE}.references:tempered_softmax", "--backend", f"{HERE}.tempered_softmax:Softmax",
    "--example", "x=randn(64,128) temperature=0.5", "--device", "cpu", "--profile", "dev", "--dtype", "float32",
)  # fmt: skip


@here
def test_the_kernels_of_a_stranger_are_mutated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The autograd.Function that is judged leads to both kernels; the reference stays as it is."""
    file = tmp_path / "mutants.json"
    options = ("--property", "one_at_a_time", "--sample", "2", "--jobs", "1", "--json", str(file))
    assert main(["mutate", *KERNEL, *options]) == 0
    assert "2 of 2 mutants killed" in capsys.readouterr().out
    found = json.loads(file.read_text())
    assert found["meta"]["source"][:2] == list(KERNEL[:2])
    assert {one["op"] for one in found["results"]} == {"tempered_softmax"}
    assert all("strangers/tempered_softmax.py:" in one["mutant"] for one in found["results"])
    assert main(["mutate", *KERNEL[:3], "kernels.py:fast", *KERNEL[4:]]) == 2
    assert "--backend: got kernels.py:fast; allowed for mutate: module:function" in capsys.readouterr().err


@here
def test_the_coverage_of_the_kernels_of_a_stranger_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["coverage", *KERNEL, "--property", "value", "--jobs", "1", "--lines", "1"]) == 0
    printed = capsys.readouterr().out
    assert "pairs of settings of 2 kernels, of which were run" in printed
    assert f"run it: python -m conformance repro --reference {KERNEL[1]} --example" in printed
