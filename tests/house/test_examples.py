"""The examples: plain_loop.py is short, runs on both backends, and trains as untouched transformers code would."""

import math
import runpy
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from examples import plain_loop
from tests import tiny
from tests.operations.calls import DEVICE
from unsloth_fast import backends, models

EXAMPLES = Path(__file__).parents[2] / "examples"
PLAIN_LOOP = EXAMPLES / "plain_loop.py"
DOCUMENTS = [list(text.encode()) for text in ("gradient", "of", "a", "packed", "row", "documents", "x", "accumulation")]


def model() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config)


def weights(model: torch.nn.Module) -> Tensor:
    return torch.cat([parameter.detach().double().cpu().flatten() for parameter in model.parameters()])


def printed(capsys: pytest.CaptureFixture[str]) -> list[float]:
    return [float(line.removeprefix("loss ")) for line in capsys.readouterr().out.splitlines()]


def trained(capsys: pytest.CaptureFixture[str], name: str, **options: Any) -> tuple[list[float], Tensor]:
    """The printed losses, and the change of all weights: the reference trains in float64, fast in float32."""
    backend = backends.resolve(name)
    trainee = model().double() if name == "reference" else model().float().to(DEVICE)
    start = weights(trainee)
    models.place(trainee, backend)
    printed(capsys)
    with tiny.KeepFloat64() if name == "reference" else nullcontext():
        plain_loop.train(trainee, DOCUMENTS, backend.training, backend.kernels.cross_entropy, **options)
    return printed(capsys), weights(trainee) - start


def test_the_plain_loop_is_at_most_40_lines() -> None:
    assert len(PLAIN_LOOP.read_text().splitlines()) <= 40


def test_the_plain_loop_prints_the_same_loss_on_both_backends(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The script runs from the command line, with a shorter text."""
    losses = []
    for backend in ("reference", "fast"):
        monkeypatch.setattr("sys.argv", [str(PLAIN_LOOP), "--backend", backend])
        runpy.run_path(str(PLAIN_LOOP), {"dir": lambda _: ["split", "join", "strip"]}, run_name="__main__")
        losses += printed(capsys)
    assert len(losses) == 2
    assert losses == pytest.approx([math.log(128)] * 2, rel=0.05)  # nearly even logits at the start
    assert losses[1] == pytest.approx(losses[0], abs=2e-6)  # float32 results, printed to 1e-6


def test_the_plain_loop_names_an_unknown_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", [str(PLAIN_LOOP), "--backend", "slow"])
    with pytest.raises(ValueError, match=r"^backend: got 'slow'; allowed: 'auto'"):
        runpy.run_path(str(PLAIN_LOOP), run_name="__main__")


@pytest.mark.parametrize(("name", "unit"), [("reference", 2.0**-53), ("fast", 2.0**-24)])
def test_accumulated_rows_train_as_one_row_of_all_documents(
    name: str, unit: float, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both take one step of SGD, which changes the weights by the gradient times the learning rate.

    Adding this to the weights rounds them, and the gradient itself has smaller errors.
    """
    monkeypatch.setattr(torch.optim, "AdamW", torch.optim.SGD)
    losses, change = trained(capsys, name, capacity=12, accumulation=8)
    whole_losses, whole_change = trained(capsys, "reference", capacity=64, accumulation=1)
    assert len(losses) == 1 and losses == pytest.approx(whole_losses, abs=2e-6)
    assert (change - whole_change).norm() <= 4 * unit * weights(model()).norm() < 1e-3 * whole_change.norm()


def test_the_last_step_may_have_fewer_rows(capsys: pytest.CaptureFixture[str]) -> None:
    """Four rows are trained on in steps of three."""
    losses, _ = trained(capsys, "reference", capacity=12, accumulation=3)
    assert len(losses) == 2


def test_the_first_loss_is_that_of_the_untouched_model(capsys: pytest.CaptureFixture[str]) -> None:
    """The model runs document by document, with transformers' own modules and torch's own cross entropy."""
    untouched, total, targets = model().double(), 0.0, 0
    with torch.no_grad(), tiny.KeepFloat64():
        for document in DOCUMENTS:
            tokens = torch.tensor(document)
            logits = untouched(tokens[None]).logits[0, :-1]
            total += float(torch.nn.functional.cross_entropy(logits, tokens[1:], reduction="sum"))
            targets += len(document) - 1
    losses, _ = trained(capsys, "reference", capacity=12, accumulation=8)
    assert losses == [pytest.approx(total / targets, abs=1e-6)]


def test_embeddings_have_a_learning_rate_of_their_own(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Their rate is a tenth of that of the other parameters."""
    seen = []
    adamw = torch.optim.AdamW

    def spy(groups: list[dict[str, Any]]) -> torch.optim.AdamW:
        seen.extend((group["role"], group["lr"]) for group in groups)
        return adamw(groups)

    monkeypatch.setattr(torch.optim, "AdamW", spy)
    trained(capsys, "reference")
    assert set(seen) == {("base", 1e-2), ("embedding", 1e-3)}


def test_the_first_run_names_an_unknown_backend(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The script exits with status 2 before any work."""
    example = EXAMPLES / "first_run.py"
    monkeypatch.syspath_prepend(str(EXAMPLES))  # as for a script: it imports its parts
    monkeypatch.setattr("sys.argv", [str(example), "--backends", "reference", "foo"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(example), run_name="__main__")
    assert stop.value.code == 2
    assert "error: argument --backends: backend: got 'foo'; allowed: 'auto'" in capsys.readouterr().err
