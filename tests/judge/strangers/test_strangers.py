"""Operations that the project does not have are judged from a reference and an example alone, then with a spec."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from conformance import backends, operations
from conformance.case import DTYPES, Case
from conformance.cli import main
from conformance.counts import Counts
from conformance.learning.writing import text
from conformance.operations import Source, specs
from conformance.profiles import PROFILES
from conformance.properties import PROPERTIES
from conformance.reporting.report import learned
from conformance.running.search import Result, reproduce, search
from conformance.spec import Spec
from conformance.trial import Trial
from tests.judge.strangers import RIGHT, WRONG, kept, kernels, losses, sums

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
        Source(f"{HERE}.references:masked_mean", "x=randn(16,32) mask=mask(16,32)"),
        Source(f"{HERE}.references:means_of_parts", "x=randn(T=16,H=8) starts=offsets(T,S=5)"),
        Source(f"{HERE}.references:token_losses", "logits=randn(T=16,V=32) labels=randint(V,T,or=-100)"),
        Source(f"{HERE}.references:shifted", "x=randn(N=2,C=4,L=5) bias=randn(C)"),
        Source(f"{HERE}.references:twice_added", "x=randn(16,32) y=randn(16,32)"),
        Source(f"{HERE}.references:scaled_add_", "x=randn(16,32) y=randn(16,32) alpha=0.5", in_place=("x",)),
        Source(f"{HERE}.references:heads", "x=randn(2,5,12) count=4"),
        Source(f"{HERE}.references:marked", "x=randn(16,32) limit=1.5"),
        Source(f"{HERE}.references:running_sum", "x=randn(B=2,S=40,D=16)"),
    )
    if source.reference
}
# Few and small cases: the machine is slow, and the search is tested elsewhere.
SMALL = replace(PROFILES["ci"], name="small", examples=2, elements=2**7, shrink_seconds=0.1)
SHORT = (
    "metadata", "gradients", "one_at_a_time", "special_values", "signature_parity", "inputs_untouched",
    "row_independence", "double_backward", "no_grad", "checkpoint",
)  # fmt: skip


def path(kernel: str) -> str:
    """The name of a kernel on the command line."""
    return next(f"{file.__name__}:{kernel}" for file in (kept, kernels, losses, sums) if hasattr(file, kernel))


def judged(source: Source, kernel: str, name: str, dtype: str) -> Result:
    ((op, spec),) = specs(source).items()
    function = backends.load(path(kernel), "cpu", source).functions[op]
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


def spec_of(op: str, example: str) -> Spec:
    return specs(Source(f"{HERE}.references:{op}", example))[op]


def test_every_dimension_is_once_1_once_long_and_once_empty() -> None:
    spec = spec_of("running_sum", "x=randn(B=2,S=40,D=16)")
    sizes = [dict(case.sizes) for case in PROPERTIES["extents"].cases(spec, SMALL)]
    for name in ("B", "S", "D"):
        assert {0, 1} <= {one[name] for one in sizes}
        assert max(one[name] for one in sizes) > 4096


@here
@pytest.mark.parametrize("kernel", ["group_norm_by_moments", "GroupNorm"])
def test_a_definition_that_is_nan_without_elements_asks_for_nothing_there(kernel: str) -> None:
    source = SOURCES["group_norm"]
    spec = spec_of("group_norm", source.example or "")
    function = backends.load(path(kernel), "cpu", source).functions["group_norm"]
    trial = Trial(spec, function, torch.float32, "cpu")
    for case in (spec.case(3, 7).resized(x_2=0), spec.case(3, 7).resized(x_1=0)):
        result = reproduce(trial, PROPERTIES["extents"], case, "float32")
        assert result.verdict in ("pass", "skip"), result.message


@here
def test_two_dimensions_are_beyond_a_tile_together() -> None:
    spec = spec_of("running_sum", "x=randn(B=2,S=40,D=16)")
    (case,) = (
        case
        for case in PROPERTIES["extents"].cases(spec, SMALL)
        if case.size("S") > 128 < case.size("D") and case.size("B") < 3
    )
    function = backends.load(path("sums_of_a_wrong_tile"), "cpu", SOURCES["running_sum"]).functions
    trial = Trial(spec, function["running_sum"], torch.float32, "cpu")
    assert reproduce(trial, PROPERTIES["extents"], case, "float32").verdict == "fail"


@here
@pytest.mark.parametrize(
    ("kernel", "sizes", "verdict"),
    [
        ("sums_without_a_carry", {"S": 4097}, "fail"),
        ("sums_of_nothing", {"S": 0}, "fail"),
        ("sums_refusing_nothing", {"S": 0}, "skip"),
        ("sums_refusing_nothing", {"S": 5}, "pass"),
    ],
)
def test_long_and_empty_dimensions_between_others(kernel: str, sizes: dict[str, int], verdict: str) -> None:
    spec = spec_of("running_sum", "x=randn(B=2,S=40,D=16)")
    function = backends.load(path(kernel), "cpu", SOURCES["running_sum"]).functions["running_sum"]
    case = spec.case(3, 7).resized(**sizes)
    result = reproduce(Trial(spec, function, torch.float32, "cpu"), PROPERTIES["extents"], case, "float32")
    assert result.verdict == verdict, result.message


@pytest.mark.parametrize(("classes", "words"), [(100, "from 100"), (40, "from 40"), (64, "from 64")])
def test_a_size_that_is_at_least_a_constant_is_no_multiple(classes: int, words: str) -> None:
    spec = spec_of("token_losses", f"logits=randn(T=16,V={classes}) labels=randint({classes},T)")
    assert str(spec.drawing.sizes["V"]) == words


def test_a_loop_of_operators_is_not_drawn_long() -> None:
    high = spec_of("moving_average", "x=randn(T=10,H=32)").drawing.sizes["T"]
    assert isinstance(high, Counts)
    assert 10 < (high.high or 0) < 2048


@here
@pytest.mark.parametrize(
    ("op", "example", "sizes", "dtype"),
    [
        ("bag", "weight=randn(V=50,H=32) index=randint(V,T=20,K=4)", "V=1 H=1 T=20 K=511", "bfloat16"),
        ("bag", "weight=randn(V=50,H=32) index=randint(V,T=20,K=4)", "V=2 H=3 T=3 K=5120", "float32"),
        ("stretched", "x=randn(B=2,C=3,L=20) size=37", "B=2 C=3 L=33", "bfloat16"),
        ("stretched", "x=randn(B=2,C=3,L=20) size=37", "B=5 C=3 L=130", "float32"),
        ("marked", "x=randn(16,32) limit=1.5", "x_0=4 x_1=8", "float16"),
        ("group_norm", "x=randn(2,8,5) groups=4 weight=randn(8)", "x_0=3 x_1=0 x_2=7", "float32"),
        ("penalty", "log_p=randn(4,32) log_q=randn(4,32)", "log_p_0=5 log_p_1=130 fill=outlier seed=8", "float32"),
    ],
)
def test_plain_pytorch_passes_whatever_its_operators_round_inside(
    op: str, example: str, sizes: str, dtype: str
) -> None:
    spec = spec_of(op, example)
    trial = Trial(spec, spec.reference, DTYPES[dtype], "cpu")
    result = reproduce(trial, PROPERTIES["one_at_a_time"], spec.parse(sizes), dtype)
    assert result.verdict == "pass", result.message


@here
def test_a_table_of_another_dtype_that_raises_is_found_in_one_dtype() -> None:
    assert "after a call in torch.bfloat16, in torch.float32: raised RuntimeError" in str(
        judged(SOURCES["running_sum"], "sums_with_a_table", "calls_apart", "float32").message
    )


@here
@pytest.mark.parametrize("kernel", ["heads_by_copy", "heads_by_view"])
def test_a_view_may_follow_its_input(kernel: str) -> None:
    assert judged(SOURCES["heads"], kernel, "changed_inputs", "float32").verdict == "pass"


@here
@pytest.mark.parametrize(
    ("kernel", "verdict"), [("losses_without_nan_in_ignored_rows", "pass"), ("losses_without_any_nan", "fail")]
)
def test_a_gradient_of_0_beside_finite_outputs_need_not_be_nan(kernel: str, verdict: str) -> None:
    source = replace(SOURCES["token_losses"], rows=("logits", "labels"))
    (spec,) = specs(source).values()
    function = backends.load(path(kernel), "cpu", source).functions["token_losses"]
    trial = Trial(spec, function, torch.float32, "cpu")
    result = reproduce(trial, PROPERTIES["special_values"], spec.parse("T=5 V=7"), "float32")
    assert result.verdict == verdict, result.message


@here
@pytest.mark.parametrize("name", PROPERTIES)
def test_a_kernel_may_take_one_dtype_alone(name: str) -> None:
    """It is judged in that one."""
    assert judged(SOURCES["running_sum"], "sums_in_float32_alone", name, "float32").verdict in ("pass", "skip")


@here
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize(
    ("op", "kernel", "sizes"),
    [
        ("scaled_add_", "add_rounding_ties_away", "x_0=5 x_1=130"),
        ("scatter_rows", "scatter_rounding_ties_away", "T=200 H=90 N=8 fill=short"),
    ],
)
def test_a_rounding_with_another_rule_at_ties(op: str, kernel: str, sizes: str, dtype: str) -> None:
    ((_, spec),) = specs(SOURCES[op]).items()
    function, case = backends.load(path(kernel), "cpu", SOURCES[op]).functions[op], spec.parse(sizes)
    found = reproduce(Trial(spec, function, DTYPES[dtype], "cpu"), PROPERTIES["one_at_a_time"], case, dtype)
    assert "half-way between two away from 0" in str(found.message)
    right = backends.load(path(RIGHT[op][0]), "cpu", SOURCES[op]).functions[op]
    trial = Trial(spec, right, DTYPES[dtype], "cpu")
    assert reproduce(trial, PROPERTIES["one_at_a_time"], case, dtype).verdict == "pass"


@here
@pytest.mark.parametrize("sizes", ["logits_0=1 logits_1=3", "logits_0=2 logits_1=8"])
@pytest.mark.parametrize(
    ("kernel", "verdict"),
    [("gate_by_sorting", "pass"), ("gate_by_differences", "pass"), ("gate_by_a_small_softmax", "fail")],
)
def test_a_gradient_without_a_right_digit_where_the_definition_has_all(kernel: str, verdict: str, sizes: str) -> None:
    ((_, spec),) = specs(SOURCES["top_k_gate"]).items()
    function = backends.load(path(kernel), "cpu", SOURCES["top_k_gate"]).functions["top_k_gate"]
    trial, case = Trial(spec, function, torch.float32, "cpu"), spec.parse(f"{sizes} fill=outlier")
    assert reproduce(trial, PROPERTIES["checkpoint"], case, "float32").verdict == verdict


@here
@pytest.mark.parametrize(
    ("op", "kernel", "verdict"),
    [
        ("nucleus", "nucleus_in_float64", "pass"),
        ("nucleus", "nucleus_without_the_last", "fail"),
        ("weight_of_time", "weight_of_time_by_exp", "pass"),
        ("weight_of_time", "weight_of_time_at_most", "fail"),
    ],
)
def test_roundings_may_decide_whether_a_result_is_infinite(op: str, kernel: str, verdict: str) -> None:
    source = Source(f"{HERE}.references:{op}", {"nucleus": "logits=randn(8,32) p=0.8"}.get(op, "u=randn(8,32)"))
    ((_, spec),) = specs(source).items()
    trial = Trial(spec, backends.load(path(kernel), "cpu", source).functions[op], torch.float32, "cpu")
    cases = [Case(spec.case(5, 130).sizes, fill=fill) for fill in ("ones", "outlier")]
    found = [reproduce(trial, PROPERTIES["one_at_a_time"], case, "float32") for case in cases]
    assert ("fail" if any(one.verdict == "fail" for one in found) else "pass") == verdict, found


@here
@pytest.mark.parametrize(("op", "kernel"), [("top_k_gate", "gate_of_two"), ("group_norm", "group_norm_of_four")])
def test_an_only_integer_gets_another_one(op: str, kernel: str) -> None:
    ((_, spec),) = specs(SOURCES[op]).items()
    function = backends.load(path(kernel), "cpu", SOURCES[op]).functions[op]
    trial = Trial(spec, function, torch.float32, "cpu")
    plain = spec.case(5, 130)
    for case, verdict in ((plain, "pass"), (plain.with_options(spec.drawing.added), "fail")):
        assert reproduce(trial, PROPERTIES["one_at_a_time"], case, "float32").verdict == verdict


@here
def test_a_kernel_may_refuse_a_number_that_the_example_does_not_have() -> None:
    source = SOURCES["scaled_add_"]
    assert specs(source)["scaled_add_"].drawing.options["alpha"] == [1.0, 0.5, 0.5056]
    assert judged(source, "add_by_halves_alone", "one_at_a_time", "float32").verdict == "pass"


def test_what_the_example_leaves_at_its_default_is_said() -> None:
    spec = spec_of("group_norm", "x=randn(2,8,5) groups=4 weight=randn(8)")
    assert "eps 1e-05, 0.030082 (added)\n  not varied bias=None\n" in learned(spec)


@here
def test_many_rows_are_once_in_one_group() -> None:
    spec = spec_of("scatter_rows", SOURCES["scatter_rows"].example or "")
    (case,) = (c for c in PROPERTIES["extents"].cases(spec, SMALL) if c.fill == "lowest" and c.size("T") > 4096)
    function = backends.load(path("scatter_of_1024_rows"), "cpu", SOURCES["scatter_rows"]).functions["scatter_rows"]
    for kernel, verdict in ((function, "fail"), (spec.reference, "pass")):
        result = reproduce(Trial(spec, kernel, torch.float32, "cpu"), PROPERTIES["extents"], case, "float32")
        assert result.verdict == verdict, result.message


def test_an_option_that_follows_a_size_is_said() -> None:
    spec = spec_of("scatter_rows", "src=randn(T=64,H=16) index=randint(N=10,T) count=N")
    assert "  options    count as N\n" in learned(spec)


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
    """`value` has no backward pass: its command would not run a kernel of that pass."""
    assert main(["coverage", *KERNEL, "--property", "value", "--jobs", "1", "--lines", "99"]) == 0
    printed = capsys.readouterr().out
    assert "pairs of settings of 2 kernels, of which were run" in printed
    shown = re.findall(rf"value: (\w+)_kernel.*\n  run it: .* --reference {KERNEL[1]} .* float32 (\w+) ", printed)
    assert ("backward", "gradients") in shown and {*shown} <= {("backward", "gradients"), ("forward", "value")}
