"""In exact arithmetic kernels and their twins agree bit for bit, and a term that is lost shows; on a GPU with FpSan.

Without a GPU a stand-in in Triton's interpreter has the same identities.
"""

from contextlib import nullcontext, suppress

import pytest
import torch

from conformance import backends
from conformance.case import Case
from conformance.instruments import exact
from conformance.profiles import PROFILES
from conformance.properties import PROPERTIES, fpsan
from conformance.specs import specs
from conformance.tolerances.gates import Failure, Unchecked
from conformance.trial import Trial, demand_same_bits
from tests.judge.right import RIGHT

PROPERTY = PROPERTIES["fpsan"]
ON_GPU = PROPERTY.lacks("cuda" if torch.cuda.is_available() else "cpu") is None
DEVICE = "cuda" if ON_GPU else "cpu"
# What masks columns by -inf does so by tiles: in exact arithmetic exp(-inf) is not 0.
TWINS = [op for op in specs() if f"{op}_in_other_tiles" in RIGHT and op not in ("cross_entropy", "packed_attention")]
# Operations whose arithmetic is in Triton kernels alone.
WHOLE = ("rms_norm", "add_rms_norm", "layer_norm", "rope", "swiglu", "geglu", "cross_entropy", "packed_attention")


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    if not ON_GPU:
        from tests.judge import ring

        monkeypatch.setattr(exact, "exact_arithmetic", ring.exact_arithmetic)


def trial(op: str, backend: str = "fast", dtype: torch.dtype = torch.float32) -> Trial:
    return Trial(specs()[op], backends.load(backend, DEVICE).functions[op], dtype, DEVICE)


def cases(op: str) -> list[Case]:
    """Those of the property on a GPU; the interpreter takes a second for a small one."""
    spec = specs()[op]
    return fpsan.cases(spec, PROFILES["dev"]) if ON_GPU else [spec.case(5, 70)]


@pytest.mark.parametrize("op", list(specs()) if ON_GPU else ["rms_norm", "swiglu", "cross_entropy"])
def test_kernels_of_the_project_hold(op: str) -> None:
    for case in cases(op):
        with nullcontext() if op in WHOLE else suppress(Unchecked):  # some compute with torch's operators too
            PROPERTY.check(trial(op, dtype=torch.float16), case)


@pytest.mark.parametrize("op", TWINS if ON_GPU else ["rms_norm", "layer_norm"])
def test_a_twin_in_other_tiles_has_the_same_bits(op: str) -> None:
    one = trial(op)
    other = trial(op, f"tests.judge.right.{op}_in_other_tiles")
    for case in cases(op):
        inputs = one.inputs(case)
        grad_outputs = one.grad_outputs(case, one.run(case, inputs, function=one.spec.reference, grads=()).outputs)
        first, second = (fpsan._run(each, case, inputs, grad_outputs) for each in (one, other))
        demand_same_bits(one.spec, first, second, "the twin differs")


def test_a_lost_row_shows() -> None:
    wrong = trial("rms_norm", "tests.judge.mutants.rms_norm_dweight_without_the_last_row")
    with pytest.raises(Failure, match="in exact arithmetic gradient of weight, added up over the parts, differs"):
        PROPERTY.check(wrong, wrong.spec.case(9, 130))


def test_plain_pytorch_is_not_checked() -> None:
    with pytest.raises(Unchecked):
        PROPERTY.check(trial("rms_norm", "reference"), specs()["rms_norm"].case(3, 8))


def test_it_needs_a_gpu_and_a_sanitizer(monkeypatch: pytest.MonkeyPatch) -> None:
    assert PROPERTY.lacks("cpu") == "needs CUDA"
    monkeypatch.setattr("conformance.property._has_fpsan", lambda: False)
    assert "floating-point sanitizer" in (PROPERTY.lacks("cuda") or "")


SUM = """%5 = "tt.reduce"(%4) <{axis = 0 : i32}> ({
^bb0(%a: f32 loc(#loc1), %b: f32 loc(#loc1)):
  %6 = arith.addf %a, %b : f32 loc(#loc2)
  tt.reduce.return %6 : f32 loc(#loc2)
}) : (tensor<16xf32>) -> f32"""


@pytest.mark.parametrize(
    ("code", "found"),
    [
        (SUM, set[str]()),
        (SUM.replace("arith.addf %a, %b", "arith.divf %a, %b"), {"a reduction with a combining function"}),
        (SUM.replace("f32", "i32").replace("arith.addf", "arith.subi"), set[str]()),
        ("%9 = tt.atomic_rmw fadd, acq_rel, gpu, %7, %8", {"an atomic addition"}),
    ],
)
def test_what_the_sanitizer_does_not_model_is_seen(code: str, found: set[str]) -> None:
    assert exact.unmodelled(code) == found


@pytest.mark.parametrize(
    ("operator", "dtypes", "rounds"),
    [
        ("aten::mm", ["float", "float"], True),
        ("aten::add", ["long int", "long int"], False),
        ("aten::copy_", ["float", "c10::BFloat16"], True),
        ("aten::copy_", ["float", "float"], False),
        ("aten::empty_like", ["float"], False),
        ("custom::product", ["float"], False),  # its operators are seen themselves
    ],
)
def test_operators_of_torch_that_round_are_seen(operator: str, dtypes: list[str], rounds: bool) -> None:
    assert (exact._rounding(operator, dtypes) is not None) == rounds
