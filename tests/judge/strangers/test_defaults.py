"""Options that the example does not give are varied too, also at long sizes; a size may be held."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from conformance import backends, operations
from conformance.cli import main
from conformance.learning.writing import text
from conformance.mutate.campaign import Campaign, Key, Outcome
from conformance.operations import Source, specs
from conformance.profiles import PROFILES
from conformance.properties import PROPERTIES, extents, one_at_a_time
from conformance.reporting.report import learned
from conformance.running.search import reproduce
from conformance.spec import Spec
from conformance.trial import Trial

HERE = "tests.judge.strangers.defaults"
EXAMPLES = {
    "similarity": "x=randn(16,32) y=randn(16,32)",
    "kept": "x=randn(16,32) keep=mask(16,32)",
    "pooled": "x=randn(B=2,C=3,L=16)",
    "sums_of_rows": "x=randn(8,16)",
    "scaled_any": "x=randn(T=64,D==128) weight=randn(D)",
}
here = pytest.mark.skipif(torch.cuda.is_available(), reason="judges on the CPU, in this process")


def trial(op: str, kernel: str) -> tuple[Spec, Trial]:
    source = Source(f"{HERE}:{op}", EXAMPLES[op])
    (spec,) = specs(source).values()
    function = backends.load(f"{HERE}:{kernel}", "cpu", source).functions[op]
    return spec, Trial(spec, function, torch.float32, "cpu")


@here
@pytest.mark.parametrize(
    ("op", "option", "right", "wrong"),
    [
        ("similarity", {"eps": 0.030082}, "similarity_by_units", "similarity_of_one_eps"),
        ("kept", {"p": 0.050155}, "kept_by_where", "kept_of_nine_tenths"),
        ("pooled", {"size": 3}, "pooled_by_parts", "pooled_by_pairs"),
    ],
)
def test_an_option_that_the_example_leaves_out_has_another_value(
    op: str, option: dict[str, float], right: str, wrong: str
) -> None:
    for kernel, verdict in ((right, {"pass"}), (wrong, {"pass", "fail"})):
        spec, one = trial(op, kernel)
        assert dict(spec.drawing.added) == option
        cases = one_at_a_time.cases(spec, PROFILES["ci"])
        found = {case: reproduce(one, PROPERTIES["one_at_a_time"], case, "float32").verdict for case in cases}
        assert {*found.values()} == verdict, found
        assert all(case.options for case, one in found.items() if one == "fail")


def test_options_that_are_not_varied_are_named() -> None:
    spec, _ = trial("pooled", "pooled_by_parts")
    assert "  options    size 2, 3 (added)\n  not varied dim=-1, mode=max\n" in learned(spec)


@here
@pytest.mark.parametrize(
    ("kernel", "verdict"), [("sums_of_rows_by_difference", "pass"), ("sums_of_rows_without_a_carry", "fail")]
)
def test_an_option_at_a_long_size(kernel: str, verdict: str) -> None:
    spec, one = trial("sums_of_rows", kernel)
    (case,) = (case for case in extents.cases(spec, PROFILES["ci"]) if case.options)
    assert case.size("x_1") > 4096
    assert reproduce(one, PROPERTIES["extents"], case, "float32").verdict == verdict


@here
@pytest.mark.parametrize(
    ("op", "example"),
    [
        ("scaled_any", "x=randn(==6,D==12) weight=randn(D)"),
        ("converted", "x=randn(5,8) dtype=torch.float32|torch.float16"),
    ],
)
def test_a_written_spec_without_sizes_and_one_with_dtypes(op: str, example: str, tmp_path: Path) -> None:
    source = Source(f"{HERE}:{op}", example)
    file = tmp_path / "written_spec.py"
    file.write_text(text(operations.learner(source), f"{HERE}:{op}"))
    (spec,) = specs(Source(spec=str(file))).values()
    for case in one_at_a_time.cases(spec, PROFILES["ci"])[:2]:
        one = Trial(spec, spec.reference, torch.float32, "cpu")
        assert reproduce(one, PROPERTIES["one_at_a_time"], case, "float32").verdict == "pass"


@here
def test_a_size_that_is_held() -> None:
    spec, one = trial("scaled_any", "scaled_128")
    assert list(spec.drawing.sizes) == ["T"]
    for case in extents.cases(spec, PROFILES["ci"]):
        assert reproduce(one, PROPERTIES["extents"], case, "float32").verdict == "pass"


def test_a_survivor_is_examined_again_as_it_was(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the dtype and under the properties that were asked for."""
    place = "tests.judge.strangers"
    softmax = ("--reference", f"{place}.references:tempered_softmax", "--backend", f"{place}.tempered_softmax:Softmax")
    how = ("--dtype", "float32", "--property", "inputs_untouched", "no_grad", "--profile", "dev", "--sample", "1")

    def survived(campaign: Campaign, keys: list[Key], *_: Any) -> tuple[list[Outcome], dict[str, Any]]:
        return [Outcome(op, mutant, "survived") for op, mutant in keys], {}

    monkeypatch.setattr(Campaign, "run", survived)
    assert main(["mutate", *softmax, "--example", "x=randn(64,128) temperature=0.5", "--device", "cpu", *how]) == 1
    again = re.search(r"again: (.*)", capsys.readouterr().out)
    assert again and "--profile dev --dtype float32 --property inputs_untouched no_grad --mutant" in again[1]
