"""A right kernel may add up in float32 one after the other, also terms that are equal or nearly so."""

import numpy
import pytest
import torch

from conformance import backends
from conformance.operations import Source, specs
from conformance.properties import PROPERTIES
from conformance.running.search import reproduce
from conformance.tolerances.sums import error_of_sums
from conformance.trial import Trial

HERE = "tests.judge.strangers.totals"
EXAMPLES = {
    "mean_loss": "logits=randn(T=64,V=32) labels=randint(V,T)",
    "mean_softplus": "x=randn(R=64,C=32)",
    "variance": "x=randn(R=64,C=32)",
    "shifted_loss": "x=randn(R=64,C=32) shift=randn(C)",
    "running_log": "x=randn(R=4,C=12)",
    "states": "x=randn(T=16,D=4) decay=rand(T,D) gate=randn(T,D)",
}
CASES = [  # operation, property, a case in which a right kernel's terms are alike, and one that shows a wrong kernel
    ("mean_loss", "value", "T=4097 V=5 fill=zeros", "T=4097 V=5", "but_one"),
    ("mean_softplus", "value", "R=1031 C=257 fill=tiny", "R=40 C=9", "in_16_bits"),
    ("variance", "value", "R=1031 C=257 fill=wide", "R=1031 C=257", "of_a_sample"),
    ("variance", "value", "R=3 C=4097 fill=tiny", "R=3 C=4097", "of_a_sample"),
    ("shifted_loss", "gradients", "R=1031 C=65 fill=outlier", "R=1031 C=65", "but_a_row"),
    ("running_log", "value", "R=2 C=1021", "R=2 C=33 fill=outlier", "of_the_largest"),
    ("states", "gradients", "T=130 D=3 fill=outlier", "T=33 D=17", "in_16_bits"),
]


@pytest.mark.skipif(torch.cuda.is_available(), reason="judges on the CPU, in this process")
@pytest.mark.parametrize(("op", "name", "alike", "usual", "wrong"), CASES)
def test_float32_sums_one_after_the_other(op: str, name: str, alike: str, usual: str, wrong: str) -> None:
    source = Source(f"{HERE}:{op}", EXAMPLES[op])
    (spec,) = specs(source).values()
    for kernel, verdict, sizes in (("in_order", "pass", alike), ("in_order", "pass", usual), (wrong, "fail", usual)):
        function = backends.load(f"{HERE}:{op}_{kernel}", "cpu", source).functions[op]
        trial = Trial(spec, function, torch.float32, "cpu")
        found = reproduce(trial, PROPERTIES[name], spec.parse(sizes), "float32")
        assert found.verdict == verdict, f"{kernel}: {found.message}"


@pytest.mark.parametrize(
    ("share", "spread", "least", "most"),
    [(1.0, 0.0, 1.0, 1.0), (1.0, 3e-5, 0.85, 1.0), (0.5, 0.0, 0.45, 0.55), (0.0, 0.0, 0.0, 0.05)],
)
def test_the_share_of_terms_that_are_alike(share: float, spread: float, least: float, most: float) -> None:
    """As large as the error of their sum: in units of n u P, c of n terms that are alike make c / n."""
    terms = torch.randn(4, 4096, dtype=torch.float64).abs()
    alike = int(4096 * share)
    terms[:, :alike] = 0.7 + spread * torch.randn(4, alike, dtype=torch.float64)
    for func, args in (
        (torch.ops.aten.sum.dim_IntList, (terms, [1])),
        (torch.ops.aten.mean.dim, (terms, [1])),
        (torch.ops.aten.mv.default, (terms, torch.ones(4096, dtype=torch.float64))),
    ):
        error, count = error_of_sums(func, args, {})
        ratio = error / (func(*args) * count)
        assert bool((ratio >= least - 1e-9).all() and (ratio <= most + 1e-9).all()), (func, ratio)


def test_equal_terms_have_such_an_error_in_float32() -> None:
    terms = numpy.full(4096, 0.7, numpy.float32)
    measured = abs(float(numpy.add.accumulate(terms)[-1]) - 4096 * float(terms[0]))
    wide = torch.from_numpy(terms).double()[None]
    error, _ = error_of_sums(torch.ops.aten.sum.dim_IntList, (wide, [1]), {})
    assert 0.1 < measured / (float(error) * 2.0**-24) < 1
