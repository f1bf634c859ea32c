"""What the judge learns from a definition that torch cannot differentiate, or that takes more than a kernel has to."""

import pytest
import torch

from conformance import backends
from conformance.operations import Source, specs
from conformance.profiles import PROFILES
from conformance.properties import PROPERTIES, extents
from conformance.running.search import reproduce
from conformance.trial import Trial

HERE = "tests.judge.strangers.learned"
EXAMPLES = {
    "weighted_losses": "logits=randn(T=5,V=8) labels=randint(V,T) weight=None|positive(V)",
    "penalised": "logits=randn(B=4,V=32) seen=randint(V,B,L=6) penalty=1.3",
    "histogram": "x=randint(N=10,T=50) bins=N",
    "halves": "x=randn(T=16,2*D=16) scale=rand(T,2)",
    "doubled": "x=randn(T=16,H=8)",
    "moved": "p=randn(16,8) g=randn(16,8) v=positive(16,8)",
}


def source_of(op: str) -> Source:
    in_place = ("p", "v") if op == "moved" else ()
    return Source(f"{HERE}:{op}", EXAMPLES[op], in_place=in_place, grads=() if op == "doubled" else None)


@pytest.mark.parametrize(
    ("op", "grads"),
    [
        ("weighted_losses", ["logits"]),
        ("penalised", []),
        ("histogram", []),
        ("halves", ["x", "scale"]),
        ("moved", []),
    ],
)
def test_gradients_that_torch_has(op: str, grads: list[str]) -> None:
    (spec,) = specs(source_of(op)).values()
    assert list(spec.grads) == grads


def test_integers_below_no_class_are_not_drawn() -> None:
    (spec,) = specs(source_of("histogram")).values()
    cases = extents.cases(spec, PROFILES["ci"])
    assert {case.size("N") for case in cases if case.size("T") == 0} - {0}
    assert all(case.size("N") for case in cases)


@pytest.mark.skipif(torch.cuda.is_available(), reason="judges on the CPU, in this process")
@pytest.mark.parametrize(
    ("kernel", "verdict", "name", "sizes"),
    [
        ("weighted_losses_by_logsumexp", "pass", "gradients", "T=5 V=8"),
        ("weighted_losses_without_weights", "fail", "gradients", "T=5 V=8"),
        ("penalised_by_a_mask", "pass", "one_at_a_time", "B=3 V=5 L=9 penalty=1.3"),
        ("penalised_each_time", "fail", "one_at_a_time", "B=3 V=5 L=9 penalty=1.3"),
        ("histogram_by_comparing", "pass", "extents", "T=4097 N=3 fill=lowest"),
        ("histogram_in_bytes", "fail", "extents", "T=4097 N=3 fill=lowest"),
        ("halves_of_two", "pass", "gradients", "T=3 D=5 scale_1=2"),
        ("halves_by_turns", "fail", "gradients", "T=3 D=5 scale_1=2"),
        ("moved_by_copies", "pass", "value", "p_0=5 p_1=7"),
        ("moved_and_returned", "pass", "extents", "p_0=0 p_1=7"),
        ("moved_with_the_old_mean", "fail", "value", "p_0=5 p_1=7"),
        ("doubled_by_offsets", "pass", "int64_offsets", "T=3 H=15"),
        ("doubled_by_offsets_of_32_bits", "fail", "int64_offsets", "T=3 H=15"),
    ],
)
def test_kernels_of_these(kernel: str, verdict: str, name: str, sizes: str) -> None:
    (op,) = (op for op in EXAMPLES if kernel.startswith(op))
    source = source_of(op)
    (spec,) = specs(source).values()
    function = backends.load(f"{HERE}:{kernel}", "cpu", source).functions[op]
    found = reproduce(Trial(spec, function, torch.float32, "cpu"), PROPERTIES[name], spec.parse(sizes), "float32")
    assert found.verdict == verdict, found.message
