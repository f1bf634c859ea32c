"""`unsloth-fast env`: versions, GPUs and the backend."""

import platform

import pytest
import torch

from unsloth_fast import cli


def test_env(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The output has a line per package, driver, GPU and backend with its reason, in two columns."""
    monkeypatch.delenv("UNSLOTH_BACKEND", raising=False)
    assert cli.main(["env"]) == 0
    lines = capsys.readouterr().out.splitlines()
    found = {line[:12].strip(): line[14:] for line in lines}
    assert torch.__version__.startswith(found["torch"]) and found["python"] == platform.python_version()
    assert {
        "unsloth-fast",
        "triton",
        "transformers",
        "trl",
        "peft",
        "accelerate",
        "bitsandbytes",
        "driver",
    } <= found.keys()
    if not torch.cuda.is_available():
        assert (found["GPU"], found["backend"]) == ("none", "reference (auto: no CUDA device)")
    assert all(line[12:14] == "  " and line[14] != " " for line in lines)


def test_env_without_a_backend(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The error is printed in place of the backend."""
    monkeypatch.setenv("UNSLOTH_BACKEND", "quick")
    assert cli.main(["env"]) == 0
    assert "backend       none: backend: got 'quick'; allowed: 'auto'" in capsys.readouterr().out
