"""One line in a test judges a kernel: `judge`."""

import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from conformance import testing
from conformance.running.runner import Task
from conformance.running.search import Result
from conformance.specs.swiglu import spec as swiglu_spec
from conformance.testing import judge
from tests.judge.test_pytest_plugin import Here, in_this_process
from unsloth_ref.kernels import swiglu

EXAMPLE = "x=randn(8,16)"
ONE = {"device": "cpu", "profile": "dev", "dtypes": ["float32"]}


def definition(x: Tensor) -> Tensor:
    return torch.softmax(x, -1)


def right(x: Tensor) -> Tensor:
    powers = torch.exp(x - x.detach().amax(-1, keepdim=True))
    return powers / powers.sum(-1, keepdim=True)


def wrong(x: Tensor) -> Tensor:
    return right(x) * 1.01


def deadly(x: Tensor) -> Tensor:
    os.kill(os.getpid(), signal.SIGKILL)


class Module(torch.nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return right(x)


module = Module()


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Judge in this process."""
    monkeypatch.setattr(testing, "OneByOne", Here)


def test_a_kernel_that_ends_its_process_fails_the_test(monkeypatch: pytest.MonkeyPatch) -> None:
    """The message has a line that reproduces the failure in the folder of the call, whatever that folder is."""
    monkeypatch.chdir(Path(__file__).parent)
    with pytest.raises(AssertionError, match=r"the process died \(SIGKILL\)") as raised:
        judge(deadly, reference=definition, example=EXAMPLE, properties=["no_sync", "value"], jobs=1, **ONE)
    message = str(raised.value)
    names = "--reference test_testing.py:definition --example 'x=randn(8,16)' --backend test_testing.py:deadly"
    assert (
        f"  reproduce:     python -m conformance repro {names} --device cpu 'definition float32 value x_0=" in message
    )
    assert message.endswith("\n\n1 of 1 checks failed, 1 skipped")


@in_this_process
@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("kernel", [right, module, f"{__file__}:right"], ids=["function", "module", "name"])
def test_a_right_kernel_passes(kernel: Any) -> None:
    (result,) = judge(kernel, reference=definition, example=EXAMPLE, properties=["gradients"], jobs=1, **ONE)
    assert result.verdict == "pass"
    assert 0 < (result.budget_use or 0) <= 1


@in_this_process
@pytest.mark.usefixtures("here")
def test_several_processes_share_the_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int | None] = []

    def run(tasks: Sequence[Task], on_result: Any, *, jobs: int | None) -> list[tuple[Task, Result]]:
        asked.append(jobs)
        return [(task, task()) for task in tasks]

    monkeypatch.setattr(testing, "run", run)
    for jobs in (None, 3):
        results = judge(right, reference=definition, example=EXAMPLE, properties=["value", "no_grad"], jobs=jobs, **ONE)
        assert [result.property for result in results] == ["value", "no_grad"]
    assert asked == [None, 3]


@in_this_process
@pytest.mark.usefixtures("here")
def test_what_is_wrong_is_said_as_by_run(tmp_path: Path) -> None:
    """A failure has the message that `run` prints; a file of known deviations makes it expected."""

    def judged(**options: Any) -> Any:
        return judge(wrong, reference=definition, example=EXAMPLE, properties=["value"], jobs=1, **ONE, **options)

    with pytest.raises(AssertionError, match=r"^FAIL definition / value / float32: gate G1 used .* in output result"):
        judged()
    file = tmp_path / "known.toml"
    file.write_text('[[deviation]]\noperation = "definition"\nproperty = "value"\nreason = "one percent more"\n')
    (result,) = judged(known=file)
    assert result.verdict == "xfail"


@in_this_process
@pytest.mark.usefixtures("here")
def test_a_spec_takes_the_place_of_reference_and_example() -> None:
    """A spec is accepted by its name and as an object."""
    for spec in ("conformance.specs.swiglu", swiglu_spec):
        (result,) = judge(swiglu, spec=spec, properties=["value"], jobs=1, **ONE)
        assert (result.op, result.verdict) == ("swiglu", "pass")


def mistakes() -> list[tuple[Callable[[], Any], str]]:
    def local(x: Tensor) -> Tensor:
        return x

    def asked(**options: Any) -> Callable[[], Any]:
        settings = {"kernel": right, "reference": definition, "example": EXAMPLE, "jobs": 1, **ONE, **options}
        return lambda: judge(**settings)

    return [
        (asked(reference=None, example=None), "allowed: reference and example"),
        (asked(example=None), "allowed: reference and example"),
        (asked(spec="conformance.specs.swiglu"), "or spec instead"),
        (asked(kernel=local), "local.* allowed: what a module, or the file of the test, gives a name"),
        (asked(properties=["beauty"]), "property: got 'beauty'; allowed: metadata"),
        (asked(dtypes=["float8"]), "dtype: got 'float8'; allowed: float32"),
        (asked(device="tpu"), "device: got 'tpu'; allowed: cpu, cuda"),
        (asked(profile="lazy"), "profile: got 'lazy'; allowed: dev"),
        (asked(example="x=soup(3)"), "got x=soup"),
        (asked(properties=["side_stream"]), "nothing was checked: needs CUDA"),
    ]


@in_this_process
@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(("call", "message"), mistakes())
def test_what_cannot_be_judged_is_refused(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
