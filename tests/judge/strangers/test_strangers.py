"""Operations that the project does not have are judged from a reference and an example alone, then with a spec."""

from dataclasses import replace

import pytest
import torch

from conformance import backends
from conformance.operations import Source, specs
from conformance.profiles import PROFILES
from conformance.properties import PROPERTIES
from conformance.search import DTYPES, Result, search
from conformance.trial import Trial
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
        Source(f"{HERE}.references:scaled_add_", "x=randn(16,32) y=randn(16,32) alpha=0.5", in_place=("x",)),
    )
    if source.reference
}
# Few and small cases: the machine is slow, and the search is tested elsewhere.
SMALL = replace(PROFILES["ci"], name="small", examples=3, elements=2**9, shrink_seconds=0.2)
LONG = ("extents", "layouts", "compiles", "opcheck", "guard_reads", "guard_writes", "int64_offsets")


def judged(source: Source, kernel: str, name: str, dtype: str) -> Result:
    ((op, spec),) = specs(source).items()
    function = backends.load(f"{HERE}.kernels:{kernel}", "cpu", source).functions[op]
    return search(Trial(spec, function, DTYPES[dtype], "cpu"), PROPERTIES[name], SMALL, dtype)


def turn(number: int) -> str:
    return tuple(DTYPES)[number % 3]


@here
@pytest.mark.parametrize(("op", "kernel"), [(op, kernel) for op, kernels in RIGHT.items() for kernel in kernels])
def test_a_right_kernel_of_a_stranger_passes(op: str, kernel: str) -> None:
    """Each property in one dtype, values and gradients in all."""
    for number, name in enumerate(PROPERTIES):
        if name in LONG:
            continue
        for dtype in DTYPES if name in ("value", "gradients") else (turn(number),):
            result = judged(SOURCES[op], kernel, name, dtype)
            assert result.verdict != "fail", f"{name} / {dtype}: {result.message} ({result.case})"


@here
@pytest.mark.parametrize(
    ("op", "kernel", "properties"), [(op, kernel, names) for op, kernels in WRONG.items() for kernel, names in kernels]
)
def test_a_wrong_kernel_of_a_stranger_fails(op: str, kernel: str, properties: tuple[str, ...]) -> None:
    for dtype in DTYPES:
        assert any(judged(SOURCES[op], kernel, name, dtype).verdict == "fail" for name in properties), dtype
