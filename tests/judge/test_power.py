"""The oracles of other projects find a kernel that is far off and pass a right one; the document counts them."""

from conformance import backends
from conformance.specs import specs
from tests.judge.power import document, measure
from tests.judge.power.oracles import LIGER, ORACLES, rejecting
from unsloth_ref.kernels import rms_norm


def test_each_oracle_finds_a_wrong_kernel_and_passes_the_reference() -> None:
    spec = specs()["rms_norm"]
    assert not rejecting(spec, rms_norm, "cpu")
    wrong = rejecting(spec, lambda x, weight, *eps, **options: 2 * rms_norm(x, weight, *eps, **options), "cpu")
    assert wrong == {oracle.name for oracle in ORACLES}


def test_every_kernel_of_the_tests_is_measured() -> None:
    kernels = measure.kernels("cpu")
    assert {kernel.population for kernel in kernels} == set(document.POPULATIONS)
    assert {kernel.op for kernel in kernels} == set(backends.OPERATIONS)
    assert set(LIGER) <= set(backends.OPERATIONS)


def test_the_document_counts_what_each_oracle_rejects() -> None:
    oracle = ORACLES[0].name
    found = [
        {
            "backend": "a",
            "op": "rope",
            "population": "mutants",
            "asked": [measure.JUDGE, oracle],
            "rejected_by": [oracle],
        },
        {"backend": "b", "op": "rope", "population": "right", "asked": [measure.JUDGE, oracle], "rejected_by": []},
    ]
    meta = {"versions": {"torch": "2", "triton": "3"}, "device": "cpu", "profile": "ci"}
    peer = {
        "meta": {"backend": "liger", "gpu": "a card", "device": "cuda", "profile": "ci"},
        "results": [
            {
                "op": "rope",
                "property": "value",
                "dtype": "float32",
                "verdict": "fail",
                "case": "length=1",
                "message": "gate G1 | used 2",
            }
        ],
    }
    text = document.text({"meta": meta, "kernels": found}, [peer])
    assert f"| {measure.JUDGE} | 0 of 1 | 0 of 0 | 0 of 0 | 0 of 1 |" in text
    assert f"| {oracle} | 1 of 1 | 0 of 0 | 0 of 0 | 0 of 1 |" in text
    assert "a card, profile ci: 1 of 1 checks fail." in text
    assert "| rope | value | float32 | `length=1` | gate G1 \\| used 2 |" in text
