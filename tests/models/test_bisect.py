"""`conformance bisect` names what was planted, exactly, and nothing in a right model."""

import json
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from conformance import cli
from conformance.models import bisecting
from conformance.models.bisecting import Bisection, smallest
from conformance.models.building import Subject
from conformance.models.task import quiet
from conformance.models.trial import ModelTrial
from conformance.tolerances.gates import Unchecked
from tests.planted import plant
from unsloth_fast.models import head
from unsloth_fast.models.methods import replace_method
from unsloth_fast.models.norm import Norm, norm_forward
from unsloth_ref import kernels as reference

ARCHITECTURE = "qwen3"  # it has norms of two widths
QUERY_NORM = "model.layers.0.self_attn.q_norm"


@pytest.fixture(scope="module")
def trial() -> Iterator[ModelTrial]:
    """Its truth is computed once."""
    with quiet():  # separated, the norms of the heads are calls of rms_norm
        yield ModelTrial(Subject(ARCHITECTURE, random=True), "fast,qk_norm_rope=reference", torch.float32, "cpu")


def bisection(trial: ModelTrial) -> Bisection:
    return Bisection(trial, lambda line: None)


def scaled(name: str, error: float, where: Callable[[Tensor], bool] = lambda x: True) -> Callable[..., Any]:
    """An operation of one output that is wrong by a relative error, for some first inputs."""

    def operation(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y = getattr(reference, name)(x, *args, **kwargs)
        return y * (1 + error) if where(x) else y

    return operation


def test_smallest() -> None:
    """Every single element, pair and triple of eight is found from all of them."""
    elements = list("abcdefgh")
    for wanted in ("a", "e", "h", "ab", "ah", "cf", "bdg", "abcdefgh"):
        assert smallest(elements, lambda some, wanted=wanted: set(wanted) <= set(some)) == list(wanted)


def test_a_right_model_breaks_nothing(trial: ModelTrial, monkeypatch: pytest.MonkeyPatch) -> None:
    """No call breaks the budget, and neither does the whole model."""
    plant(monkeypatch)
    right = bisection(trial)
    assert right.packed
    assert right.calls() == []
    assert right.search() == []


def test_one_operation_wrong_for_one_shape(trial: ModelTrial, monkeypatch: pytest.MonkeyPatch) -> None:
    """The norm of the heads alone is named, with its shape; the norms of wider rows are right."""
    plant(monkeypatch, rms_norm=scaled("rms_norm", 0.01, lambda x: x.shape[-1] == 8))
    wrong = bisection(trial)
    calls = wrong.calls()
    assert {one.operation for one in calls} == {"rms_norm"}
    assert all(one.module.endswith(("q_norm", "k_norm")) and ", 8] float32, weight [8]" in one.inputs for one in calls)
    operations, of_modules = wrong.search()
    assert (operations.kind, operations.members) == ("operations", ("rms_norm",))
    assert (of_modules.kind, of_modules.members) == ("calls", (f"rms_norm@{QUERY_NORM}",))
    assert "gate G" in of_modules.message


def test_two_operations_that_break_only_together(trial: ModelTrial, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each alone is scaled by nearly as much as the budget allows."""
    errors: dict[str, float] = {}
    for name in ("swiglu", "rms_norm"):
        errors[name] = 2e-5
        while True:
            plant(monkeypatch, **{name: scaled(name, errors[name])})
            found = bisection(trial).only([name])
            if found is None:
                break
            errors[name] *= 0.9 / (found.used or 2.0)
    plant(monkeypatch, **{name: scaled(name, error) for name, error in errors.items()})
    operations, calls = bisection(trial).search()
    assert set(operations.members) == set(errors)
    assert {call.partition("@")[0] for call in calls.members} == set(errors)


def test_errors_that_have_nothing_to_do_with_each_other(trial: ModelTrial, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is a set of its own, with the smallest set of its calls."""
    plant(monkeypatch, swiglu=scaled("swiglu", 0.01), rms_norm=scaled("rms_norm", 0.01))
    found = bisection(trial).search()
    assert [(one.kind, {member.partition("@")[0] for member in one.members}) for one in found] == [
        ("operations", {"rms_norm"}),
        ("calls", {"rms_norm"}),
        ("operations", {"swiglu"}),
        ("calls", {"swiglu"}),
    ]
    assert all(len(one.members) == 1 for one in found)


def test_weights_that_an_operation_changes(trial: ModelTrial, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next set is tried with the weights as they were."""

    def rms_norm(x: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y = reference.rms_norm(x, weight, *args, **kwargs)
        weight.data.mul_(1.01)
        return y

    plant(monkeypatch, rms_norm=rms_norm)
    wrong = bisection(trial)
    assert {(one.operation, one.result) for one in wrong.calls()} == {("rms_norm", "weight")}
    operations, calls = wrong.search()
    assert (operations.members, len(calls.members)) == (("rms_norm",), 1)
    assert "has other bits after a step" in calls.message


def wrong_where(where: Callable[[Tensor], bool]) -> Callable[..., Any]:
    return scaled("swiglu", 0.01, where)


def adapted_mlp(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return 1.01 * reference.lora_mlp(x, *args, **kwargs)


def runs_again(x: Tensor) -> bool:
    """Whether a backward pass runs, and x has a graph: a layer is computed again, not the input of a product."""
    return torch._C._current_graph_task_id() != -1 and x.requires_grad


def runs_without_gradients(x: Tensor) -> bool:
    """Whether no backward pass runs, and none follows."""
    return torch._C._current_graph_task_id() == -1 and not torch.is_grad_enabled() and x.shape[:2] == (1, 16)


SITUATED: dict[str, dict[str, Callable[..., Any]]] = {
    "gradients": {"swiglu": wrong_where(lambda x: x.shape[0] > 1)},
    "accumulated": {"swiglu": wrong_where(lambda x: x.shape[:2] == (1, 6))},
    "evaluated": {"swiglu": wrong_where(runs_without_gradients)},
    "checkpointed": {"swiglu": wrong_where(runs_again)},
    "adapters": {"lora_mlp": adapted_mlp},
}


@pytest.mark.parametrize("law", SITUATED)
def test_an_error_in_one_situation_alone(
    law: str, trial: ModelTrial, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its law is named, and the line that reproduces it has the law."""
    monkeypatch.setattr("conformance.models.task._trial", lambda *args: trial)
    plant(monkeypatch, **SITUATED[law])
    (operation,) = SITUATED[law]
    assert bisection(trial).search() == []
    assert cli.main(["bisect", "--config", ARCHITECTURE, "--device", "cpu"]) == 1
    printed = capsys.readouterr().out
    assert f"\noperations: {operation}\n" in printed
    lines = [line.removeprefix("reproduce: ") for line in printed.splitlines() if line.startswith("reproduce: ")]
    assert all(f" --law {law} " in line and f" --only {operation}" in line for line in lines)
    assert cli.main(shlex.split(lines[-1])[3:]) == 1


def test_errors_in_two_situations(
    trial: ModelTrial, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The operation that is found first is the reference's where the second is sought."""
    monkeypatch.setattr("conformance.models.task._trial", lambda *args: trial)
    plant(monkeypatch, lora_mlp=adapted_mlp, rms_norm=scaled("rms_norm", 0.01))
    file = tmp_path / "found.json"
    assert cli.main(["bisect", "--config", ARCHITECTURE, "--device", "cpu", "--json", str(file)]) == 1
    sets = [one for one in json.loads(file.read_text())["results"] if one["kind"] == "operations"]
    assert [one["members"] for one in sets] == [["rms_norm"], ["lora_mlp"]]
    assert "--law adapters --dtype float32 --backend fast,rms_norm=reference " in sets[1]["reproduce"]


def test_more_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    """An attention that is wrong for more than four documents in a row holds with three."""

    def packed_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, *args: Any, **options: Any) -> Tensor:
        y = reference.packed_attention(q, k, v, cu_seqlens, *args, **options)
        return 1.01 * y if len(cu_seqlens) > 5 else y

    plant(monkeypatch, packed_attention=packed_attention)
    subject = Subject.named("llama", num_hidden_layers=1)
    with quiet():
        few, many = (
            Bisection(ModelTrial(subject, "fast", torch.float32, "cpu", count=count), lambda line: None)
            for count in (None, 5)
        )
        assert few.search() == []
        assert many.search()[0].members == ("packed_attention",)


def test_a_set_that_breaks_no_more_than_the_untouched_model(trial: ModelTrial, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is no finding, whether it is sought or tried alone."""
    plant(monkeypatch, swiglu=scaled("swiglu", 0.01))
    run = ModelTrial.run

    def wrong(self: ModelTrial, *args: Any, **options: Any) -> Any:
        judged = run(self, *args, **options)
        judged.results["the loss"] = judged.results["the loss"] * 1.01
        return judged

    monkeypatch.setattr(ModelTrial, "run", wrong)
    for search in (bisection(trial).search, lambda: bisection(trial).only(["swiglu"])):
        with pytest.raises(Unchecked, match="the untouched model breaks a gate too: gate G"):
            search()


@pytest.fixture
def misplaced(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Right operations, and one norm that is placed with another offset."""
    name, place = "model.layers.1.input_layernorm", bisecting.place

    def wrong(model: Any, backend: Any) -> dict[str, int]:
        placed = place(model, backend)
        forward = norm_forward(Norm("variance_epsilon", 0.01, "llama"), backend.kernels.rms_norm)
        replace_method(model.get_submodule(name), "forward", forward, "operation")
        return placed

    plant(monkeypatch)
    monkeypatch.setattr(bisecting, "place", wrong)
    yield name


def test_one_layer_wrong(trial: ModelTrial, misplaced: str) -> None:
    """Every call agrees with the reference; the module is named."""
    wrong = bisection(trial)
    assert wrong.calls() == []
    (found,) = wrong.search()
    assert (found.kind, found.members) == ("modules", (misplaced,))


def test_a_loss_with_another_scale(trial: ModelTrial, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is placed for the loss is named as such."""
    plant(monkeypatch)
    monkeypatch.setattr(head, "logit_options", lambda *args: {"logit_scale": 1.01, "softcap": 0.0})
    (found,) = bisection(trial).search()
    assert (found.kind, found.members) == ("modules", ("loss",))


def test_an_operation_that_raises(trial: ModelTrial, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is named like one that is wrong."""

    def rope(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("no such kernel")

    plant(monkeypatch, rope=rope)
    wrong = bisection(trial)
    assert wrong.calls() == []
    operations, _ = wrong.search()
    assert operations.members == ("rope",)
    assert operations.message == "raised RuntimeError: no such kernel"
    assert operations.used is None


def test_the_command_line(
    trial: ModelTrial, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The exit status is 1, with a line that reproduces each failure and runs; it is 0 once the operation is right."""
    monkeypatch.setattr("conformance.models.task._trial", lambda *args: trial)
    plant(monkeypatch, swiglu=scaled("swiglu", 0.01))
    file = tmp_path / "found.json"
    assert cli.main(["bisect", "--config", ARCHITECTURE, "--device", "cpu", "--json", str(file)]) == 1
    printed = capsys.readouterr().out
    results = json.loads(file.read_text())["results"]
    assert [(one["kind"], one["members"]) for one in results if one["kind"] != "call"] == [
        ("operations", ["swiglu"]),
        ("calls", ["swiglu@model.layers.0.mlp"]),
    ]
    assert {one["operation"] for one in results if one["kind"] == "call"} == {"swiglu"}
    assert all(one["reproduce"] in printed for one in results)
    again = shlex.split(results[-1]["reproduce"])[3:]
    assert cli.main(again) == 1
    assert "calls: swiglu@model.layers.0.mlp\n" in capsys.readouterr().out
    plant(monkeypatch)
    assert cli.main(again) == 0
    assert cli.main([*again, "soup"]) == 2
    assert "--only: got swiglu@model.layers.0.mlp soup; allowed: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "model: got none"),
        (("--config", "llama", "qwen3"), "bisect: got 2 of models and dtypes; allowed: one of each"),
        (("--config", "llama", "--backend", "soup"), "backend: got 'soup'"),
        (
            ("--config", "llama", "--law", "apart"),
            "law: got 'apart'; allowed: padding_free, gradients, accumulated, eva",
        ),
        (("--config", "llama", "--documents", "1"), "--documents: got 1; allowed: 2 or more"),
        (("--config", "bloom", "--law", "padding_free"), "bisect: packing is refused: "),
        (("nowhere/at/all",), "nowhere/at/all"),
        ((__file__,), f"model: got {__file__}: "),
        (
            ("--config", "llama", "--law", "gradients", "--only", "packed"),
            "--only: got packed; allowed: operations such",
        ),
    ],
)
def test_usage_errors(
    words: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A usage error prints one line and exits with status 2."""
    plant(monkeypatch)
    assert cli.main(["bisect", "--device", "cpu", *words]) == 2
    assert message in capsys.readouterr().err


def test_a_folder_without_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Subject.named("llama").config().save_pretrained(tmp_path)
    assert cli.main(["bisect", "--device", "cpu", str(tmp_path)]) == 2
    assert f"bisect: {tmp_path} is not loaded: OSError: Error no file named model" in capsys.readouterr().err
