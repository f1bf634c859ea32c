"""`verify_every`: the same training to the bit, budget uses in its log, and a warning that names a wrong operation."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import tiny
from tests.planted import plant
from tests.trainer import runs
from unsloth_fast import UnslothTrainer, UnslothTrainingArguments
from unsloth_ref import kernels as reference

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
}  # enough elements for a statistic


def trained(folder: Path, lora: bool = False, **options: Any) -> Any:
    """A trainer after its training in float32."""
    options = {"backend": "fast", "max_steps": 2} | options
    model = tiny.model(dtype=torch.float32, **SIZES)
    trainer = runs.build(UnslothTrainer, runs.arguments(folder, **options), model=model, lora=lora)
    trainer.train()
    return trainer


def weights(trainer: Any) -> dict[str, Tensor]:
    return dict(trainer.model.named_parameters())


CASES: dict[str, dict[str, Any]] = {
    "padded, accumulated": {"padding_free": False, "gradient_accumulation_steps": 2},
    "padding-free, checkpointed": {"gradient_checkpointing": True},
    "reentrant, lora": {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": True},
        "lora": True,
    },
    "mixed, packed, lora": {"backend": "fast,rope=reference", "packing": True, "lora": True},
}


@pytest.mark.parametrize("case", CASES)
def test_numbers_stay(
    case: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Losses and weights have the same bits; the log of the second step has the budget use of each placed operation."""
    plant(monkeypatch)
    without, verified = (trained(tmp_path / str(n), **CASES[case], verify_every=n) for n in (None, 2))
    assert without.losses == verified.losses
    assert all(torch.equal(tensor, weights(verified)[name]) for name, tensor in weights(without).items())
    logs = [entry for entry in verified.state.log_history if "loss" in entry]
    assert [any(key.startswith("verify/") for key in entry) for entry in logs] == [False, True]
    expected = {"rms_norm", "swiglu", "linear_cross_entropy"}
    expected |= set() if case.startswith("mixed") else {"rope"}
    expected |= {"lora_linear"} if CASES[case].get("lora") else set()
    expected |= set() if case.startswith("padded") else {"packed_attention"}
    uses = {key: value for key, value in logs[1].items() if key.startswith("verify/")}
    assert uses.keys() == {f"verify/{name}_budget_use" for name in (*expected, "worst")}
    assert all(0 <= used < 1 for used in uses.values())
    assert not [record for record in caplog.records if "verify_every" in record.message]


def test_the_real_kernels_stay_within_the_budget(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The Triton kernels run forward and backward in a step of one text."""
    options = {"max_steps": 1, "per_device_train_batch_size": 1, "backend": "reference,rms_norm=fast,swiglu=fast"}
    log = trained(tmp_path, **options, verify_every=1).state.log_history[0]
    assert 0 < log["verify/rms_norm_budget_use"] < 1
    assert 0 < log["verify/swiglu_budget_use"] < 1
    assert "verify_every" not in caplog.text


class WrongGradient(torch.autograd.Function):
    """swiglu whose backward pass forgets a thousandth of the gradient of `up`."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return reference.swiglu(gate, up)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            gate, up = (tensor.detach().requires_grad_() for tensor in ctx.saved_tensors)
            of_gate, of_up = torch.autograd.grad(reference.swiglu(gate, up), (gate, up), grad_outputs)
        return of_gate, of_up * (1 - 1e-3)


def wrong_norm(x: Tensor, weight: Tensor, eps: float = 1e-6, *, offset: float = 0.0, casting: Any = "llama") -> Tensor:
    """rms_norm with ten times the eps."""
    return reference.rms_norm(x, weight, 10 * eps, offset=offset, casting=casting)


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"swiglu": WrongGradient.apply}, ["swiglu in ", "layers.0.mlp, gradient of up of (gate [", "] float32, up ["]),
        ({"rms_norm": wrong_norm}, ["rms_norm in ", "norm, output of (x [", "weight [64] float32)"]),
    ],
    ids=["gradient", "output"],
)
def test_a_wrong_operation_is_named(
    wrong: dict[str, Any], named: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """The warning names operation, module, result, shapes and dtype; no other operation is warned of."""
    plant(monkeypatch, **wrong)
    with caplog.at_level(logging.WARNING, "unsloth_fast.hooks.verification"):
        log = trained(tmp_path, max_steps=1, verify_every=1).state.log_history[0]
    (message,) = (record.message for record in caplog.records if record.name == "unsloth_fast.hooks.verification")
    assert message.startswith("verify_every: step 1: ")
    assert all(part in message for part in named)
    assert "allowed" in message
    (operation,) = wrong
    assert log[f"verify/{operation}_budget_use"] == log["verify/worst_budget_use"] > 1
    assert log["verify/rope_budget_use"] < 1


def test_a_wrong_operation_is_named_before_the_error_that_it_causes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The product that fails is not the operation that is wrong."""
    plant(monkeypatch, swiglu=lambda gate, up: reference.swiglu(gate, up)[..., :-1])
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        trained(tmp_path, max_steps=1, verify_every=1)
    assert "verify_every: step 1: swiglu in model.layers.0.mlp, output of " in caplog.text
    assert "instead of torch.float32 of shape [" in caplog.text


@pytest.mark.parametrize("value", [0, -1, 2.5, "3", True])
def test_other_values_are_refused(value: Any, tmp_path: Path) -> None:
    """The error names the argument and the value."""
    with pytest.raises(ValueError, match=f"verify_every: got {value!r}; allowed: an integer from 1, or None"):
        UnslothTrainingArguments(output_dir=str(tmp_path), verify_every=value, use_cpu=True)


def test_nothing_to_verify_is_an_error(tmp_path: Path) -> None:
    """The reference has nothing to verify, and neither has compiled code."""
    with pytest.raises(ValueError, match=r"verify_every: got 5 with backend 'reference'.*nothing to verify"):
        trained(tmp_path, backend="reference", verify_every=5)
    with pytest.raises(ValueError, match="verify_every: got 5 with torch_compile=True"):
        trained(tmp_path, backend="fast", torch_compile=True, verify_every=5)
