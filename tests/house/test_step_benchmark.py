"""`examples/step_benchmark.py` without a GPU: what it asks of its processes, and the file that it writes."""

import json
import sys
from argparse import Namespace
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
import torch

from conformance.bench import card
from conformance.gate import schema
from conformance.reporting import results_file
from docs import figures
from examples import step_benchmark

RESULT = {
    "who": "fast", "what": "this trainer", "tokens_per_second": 8e4, "step_ms": 51.2, "peak_gib": 6.5,
    "teraflops": 400.0, "idle_share": 0.05, "losses": [12.0, 11.0], "kernels": None,
}  # fmt: skip


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """A GPU, and processes of contenders that only write a result; that of liger-varlen fails."""
    asked: list[list[str]] = []

    def run(command: list[str], **_: Any) -> CompletedProcess[str]:
        asked.append(command)
        who, path = (command[command.index(option) + 1] for option in ("--who", "--json"))
        if who == "liger-varlen":
            return CompletedProcess(command, 1, "", "the trace\nRuntimeError: no memory\nLoading: 100%\n")
        Path(path).write_text(json.dumps(RESULT | {"who": who}))
        return CompletedProcess(command, 0, "", "")

    class Card:
        def rates(self) -> Namespace:
            return Namespace(matmul=8e14)

    monkeypatch.setattr(step_benchmark.subprocess, "run", run)
    monkeypatch.setattr(step_benchmark.random_model, "save", lambda *_, **__: None)
    monkeypatch.setattr(results_file, "commit", lambda: "abc")
    monkeypatch.setattr(card, "Card", Card)
    names = {"is_available": lambda: True, "device_count": lambda: 4, "get_device_name": lambda: "NVIDIA H200"}
    for name, value in names.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return asked


def called(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["step_benchmark.py", *arguments])
    return step_benchmark.main()


def test_the_file_has_what_ran(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], commands: list[list[str]], tmp_path: Path
) -> None:
    """The file is there after each contender; a contender that fails is no result, and its trace is shown."""
    path = tmp_path / "new" / "2x2048.json"
    options = ["--rows", "2", "--steps", "12", "--mode", "gc", "--json", str(path)]
    assert called(monkeypatch, *options, "--who", "fast", "liger-varlen", "fast-4bit") == 1
    found = json.loads(path.read_text())
    assert schema.problem(found, figures.STEPS, figures.STEPS) is None
    assert [one["who"] for one in found["results"]] == ["fast", "fast-4bit"]
    meta = {"schema": 2, "shape": "llama-3.2-1b", "rows": 2, "length": 2048, "mode": "gc", "gpus": 1, "commit": "abc"}
    assert found["meta"].items() >= meta.items() and found["meta"]["matmul_teraflops"] == 800.0
    shown = capsys.readouterr()
    assert "liger-varlen  failed: RuntimeError: no memory" in shown.out and "the trace" in shown.err
    for command, who in zip(commands, ("fast", "liger-varlen", "fast-4bit"), strict=True):
        words = " ".join(command)
        assert f"--who {who} " in words and "--rows 2 --length 2048 --mode gc --steps 12 --gpus 1" in words
        assert str(path) not in words


def test_a_process_that_a_signal_ends_has_no_message() -> None:
    assert step_benchmark.reason(CompletedProcess([], -9, "", "Loading: 100%\n")) == "exit status -9, without a message"


def test_without_a_file_nothing_is_written(
    monkeypatch: pytest.MonkeyPatch, commands: list[list[str]], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert called(monkeypatch, "--who", "fast", "--gpus", "2") == 0
    assert "torch.distributed.run" in commands[0] and list(tmp_path.iterdir()) == []
