"""The backend flag: the backend that each specification means, on this machine and on simulated ones."""

import logging
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import unsloth_fast.training
import unsloth_ref.kernels
import unsloth_ref.training
from tests.processes import PATIENCE
from unsloth_fast import backends

ROOT = Path(__file__).parents[2]
without_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without CUDA")


def python(code: str, **environment: str) -> str:
    """What the code prints in a new interpreter, without UNSLOTH_BACKEND and TRITON_INTERPRET."""
    kept = {name: value for name, value in os.environ.items() if name not in ("UNSLOTH_BACKEND", "TRITON_INTERPRET")}
    done = subprocess.run(
        [sys.executable, "-c", code], env=kept | environment, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_reference_means_the_reference_for_every_operation() -> None:
    """The functions are those of unsloth_ref."""
    backend = backends.resolve("reference")
    assert backend.name == "reference"
    assert backend.training is unsloth_ref.training
    assert vars(backend.kernels) == {name: getattr(unsloth_ref.kernels, name) for name in unsloth_ref.kernels.__all__}


def test_fast_with_one_operation_of_the_reference() -> None:
    """Only that operation is the reference's."""
    import unsloth_fast.kernels

    backend = backends.resolve("fast, rms_norm=reference")
    assert backend.name == "fast,rms_norm=reference"
    assert backend.training is unsloth_fast.training
    assert backend.kernels.rms_norm is unsloth_ref.kernels.rms_norm
    assert backend.kernels.swiglu is unsloth_fast.kernels.swiglu
    assert backend.kernels.cross_entropy is unsloth_fast.kernels.cross_entropy


def test_reference_with_one_operation_fast() -> None:
    """Only that operation is the fast one."""
    import unsloth_fast.kernels

    backend = backends.resolve("reference,swiglu=fast")
    assert backend.training is unsloth_ref.training
    assert backend.kernels.swiglu is unsloth_fast.kernels.swiglu
    assert backend.kernels.rms_norm is unsloth_ref.kernels.rms_norm


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("quick", "backend: got 'quick'; allowed: 'auto', 'fast', 'reference'"),
        ("", "backend: got ''; allowed: 'auto', 'fast', 'reference'"),
        ("fast,rop=reference", f"operation: got 'rop'; allowed: {', '.join(map(repr, unsloth_ref.kernels.__all__))}"),
        ("fast,rms_norm", "rms_norm: got ''; allowed: 'fast', 'reference'"),
        ("fast,rms_norm=auto", "rms_norm: got 'auto'; allowed: 'fast', 'reference'"),
        (3, "backend: got 3; allowed: a string"),
    ],
)
def test_an_invalid_specification_is_refused(spec: str, message: str) -> None:
    """The message gives the value and the allowed ones."""
    with pytest.raises(ValueError, match=message):
        backends.resolve(spec)


def test_the_environment_gives_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """None reads UNSLOTH_BACKEND; an argument overrides it."""
    monkeypatch.setenv("UNSLOTH_BACKEND", "reference,swiglu=reference")
    assert backends.resolve().name == "reference,swiglu=reference"
    assert backends.resolve("reference").name == "reference"
    monkeypatch.setenv("UNSLOTH_BACKEND", "quick")
    with pytest.raises(ValueError, match="got 'quick'"):
        backends.resolve()


@without_cuda
def test_auto_without_cuda_means_the_reference_and_warns_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """On a machine with a GPU the user must see that it was not found."""
    monkeypatch.delenv("UNSLOTH_BACKEND", raising=False)
    backends._log_choice.cache_clear()
    for spec in (None, "auto"):
        backend = backends.resolve(spec)
        assert (backend.name, backend.reason) == ("reference", "auto: no CUDA device")
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("WARNING", "backend reference (auto: no CUDA device)")
    ]


def test_auto_with_cuda_means_fast(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """This holds if triton is installed."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    backends._log_choice.cache_clear()
    with caplog.at_level("INFO"):
        assert backends.resolve("auto").name == "fast"
    assert [record.getMessage() for record in caplog.records] == ["backend fast (auto: CUDA and triton are available)"]


RESOLVE_FAST = """
try:
    print(backends.resolve("fast").name)
except RuntimeError as error:
    print(error)
"""


@without_cuda
@pytest.mark.parametrize(
    ("before", "environment", "expected"),
    [
        ("", {}, "no CUDA device (to run the kernels on a CPU, slowly, set TRITON_INTERPRET=1 before triton is"),
        ("", {"TRITON_INTERPRET": "1"}, "fast"),
        ("import triton, os; os.environ['TRITON_INTERPRET'] = '1'", {}, "was set after triton was imported"),
        ("import sys; sys.modules['triton'] = None", {}, "triton is not installed"),
    ],
)
def test_an_explicit_fast_never_falls_back(before: str, environment: dict[str, str], expected: str) -> None:
    """The backend runs, or the error names what is missing."""
    printed = python(f"{before}\nfrom unsloth_fast import backends\n{RESOLVE_FAST}", **environment)
    assert printed == "fast" if expected == "fast" else expected in printed
    assert printed == "fast" or printed.startswith("backend: 'fast' cannot run here: ")


def test_a_backend_is_pickled_by_its_name() -> None:
    """Unpickling gives the same functions and modules."""
    backend = backends.resolve("reference,rope=reference")
    again = pickle.loads(pickle.dumps(backend))
    assert (again.name, again.reason) == (backend.name, backend.reason)
    assert again.kernels == backend.kernels and again.training is backend.training


def test_importing_the_fast_package_loads_nothing_heavy() -> None:
    """Triton, transformers and trl are imported with the names that need them."""
    heavy = "[name for name in ('triton', 'transformers', 'trl', 'peft') if name in sys.modules]"
    assert python(f"import sys, unsloth_fast; from unsloth_fast import backends; print({heavy})") == "[]"
    assert all(callable(getattr(unsloth_fast, name)) for name in unsloth_fast.__all__)


def test_bitsandbytes_warning_of_a_missing_kernel_is_hidden() -> None:
    """Other messages of the same logger are shown."""
    theirs = logging.getLogger("bitsandbytes.backends.cpu.ops")
    messages = ("Failed to load CPU gemm_4bit_forward from kernels-community: %s.", "something else")
    records = [theirs.makeRecord(theirs.name, logging.WARNING, "", 0, text, (), None) for text in messages]
    assert [bool(theirs.filter(record)) for record in records] == [False, True]


def test_the_reference_works_without_triton() -> None:
    """Every operation and training piece can be imported."""
    code = """
import sys
sys.modules["triton"] = None
import torch, unsloth_ref.kernels, unsloth_ref.training
print(unsloth_ref.kernels.rms_norm(torch.ones(1, 2), torch.ones(2)).shape)
"""
    assert python(code) == "torch.Size([1, 2])"


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = unsloth_fast.nothing


def test_a_resolved_backend_compiles_without_a_graph_break() -> None:
    """It is resolved outside the compiled function."""
    kernels = backends.resolve("reference").kernels
    x, weight = torch.randn(3, 8), torch.randn(8)
    compiled = torch.compile(lambda x: kernels.rms_norm(x, weight), fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), kernels.rms_norm(x, weight))


def test_auto_on_a_cpu_beside_a_gpu_is_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """`use_cpu=True` is such a case: the kernels cannot read the host's memory."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert backends.resolve("auto", on_cpu=True).name == "reference"
    assert backends.resolve("auto", on_cpu=True).reason == "auto: the run is on a CPU"
    assert backends.resolve("auto").name == "fast"
