"""What surrounds the passes of a step walks through no modules, reads nothing back, and changes no number."""

import copy
import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.utils import DistributedType
from torch.nn import Linear, Module, Parameter
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from tests import tiny
from tests.trainer.runs import arguments, build
from tests.trainer.test_arguments import resolve
from unsloth_fast import UnslothTrainer
from unsloth_fast.hooks.module_lists import ModuleLists
from unsloth_fast.models.methods import has_own_method

pytestmark = pytest.mark.filterwarnings("ignore")
METHODS = ("parameters", "train", "num_parameters")


@pytest.mark.parametrize("pinned", [True, False])
def test_pinned_batches_are_copied_without_waiting(tmp_path: Path, pinned: bool) -> None:
    args = arguments(tmp_path)
    args.dataloader_pin_memory = pinned  # on a CPU the default is False
    assert resolve(args).args.accelerator_config.non_blocking is pinned


def test_a_step_walks_through_no_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """This holds from the second step on; afterwards the model has its own methods again."""
    walks: Counter[int] = Counter()
    trainer = build(UnslothTrainer, arguments(tmp_path, max_steps=4, logging_steps=4), lora=True)
    own = Module.named_modules

    def named_modules(self: Module, *positional: Any, **keywords: Any) -> Any:
        walks[trainer.state.global_step] += self is trainer.model
        return own(self, *positional, **keywords)

    monkeypatch.setattr(Module, "named_modules", named_modules)
    with tiny.KeepFloat64():
        trainer.train()
    assert walks[0] > 0
    assert [walks[step] for step in (1, 2, 3)] == [0, 0, 0]
    assert not any(has_own_method(trainer.model, name) for name in METHODS)


def test_the_loss_of_a_microbatch_is_not_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers reads it through torch.isnan and torch.isinf."""
    trainer = build(UnslothTrainer, arguments(tmp_path, gradient_accumulation_steps=2, max_steps=2))
    for name in ("isnan", "isinf"):
        monkeypatch.setattr(torch, name, lambda _: pytest.fail("a loss is read back"))
    with tiny.KeepFloat64():
        trainer.train()
    assert trainer.args.logging_nan_inf_filter is True


def logged(folder: Path, kind: type, args: type, bad: float, **options: Any) -> list[float]:
    """The logged losses of six steps of two microbatches; four of the twelve losses are not finite."""
    trainer = build(kind, arguments(folder, args, gradient_accumulation_steps=2, **options), texts=24)
    usual, numbers = trainer.compute_loss, iter(range(12))

    def compute_loss(*positional: Any, **keywords: Any) -> Any:
        return usual(*positional, **keywords) + (bad if next(numbers) in (0, 3, 8, 9) else 0.0)

    trainer.compute_loss = compute_loss
    with tiny.KeepFloat64():
        trainer.train()
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("steps", [1, 3])
def test_losses_that_are_not_finite_are_filtered_as_by_transformers(tmp_path: Path, bad: float, steps: int) -> None:
    options = {"logging_steps": steps, "use_cpu": True}
    ours = logged(tmp_path, UnslothTrainer, type(arguments(tmp_path)), bad, padding_free=False, **options)
    assert ours == pytest.approx(logged(tmp_path, SFTTrainer, SFTConfig, bad, **options), rel=20 * 2.0**-24)
    assert len(ours) == 6 // steps


def test_without_the_filter_they_are_logged(tmp_path: Path) -> None:
    """transformers' sum stays NaN when it is set back by a subtraction."""
    ours = logged(tmp_path, UnslothTrainer, type(arguments(tmp_path)), float("nan"), logging_nan_inf_filter=False)
    assert len(ours) == 6
    assert all(loss != loss for loss in ours)


def test_a_module_that_is_added_during_training_is_in_the_lists(tmp_path: Path) -> None:
    """Its gradients are dropped; modules and parameters of the model that a callback changed train on."""
    seen = []

    class Adds(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            if state.global_step == 1:
                model.extra = Linear(2, 2).double()
                model.model.norm.eval()
            if state.global_step == 2:
                model.extra.bias = Parameter(torch.zeros(2).double())
                model.extra.bias.grad = torch.ones(2).double()
                model.extra.weight.grad = torch.ones(2, 2).double()
            if state.global_step == 3:
                seen.append((model.model.norm.training, model.extra.bias.grad, model.extra.weight.grad))

    trainer = build(UnslothTrainer, arguments(tmp_path, max_steps=3))
    trainer.add_callback(Adds())
    with tiny.KeepFloat64():
        trainer.train()
    assert seen == [(True, None, None)]


def test_copies_of_a_model_in_training_have_methods_of_their_own() -> None:
    model = tiny.model()
    with ModuleLists() as lists:
        lists.use(model, DistributedType.NO)
        lists.use(model, DistributedType.NO)
        assert all(has_own_method(model, name) for name in METHODS)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert {id(one) for one in other.parameters()}.isdisjoint(id(one) for one in model.parameters())
            other.eval()
            assert other.train() is other and all(module.training for module in other.modules())
            assert other.num_parameters(exclude_embeddings=True) == model.num_parameters(exclude_embeddings=True)
        model.eval()
        assert model.train() is model and all(module.training for module in model.modules())
        assert list(model.parameters(recurse=False)) == []
        model.requires_grad_(False)
        assert model.num_parameters(only_trainable=True) == 0
    lists.use(model, DistributedType.NO)  # as in a call of `training_step` after the training
    assert not any(has_own_method(model, name) for name in METHODS)


def test_a_method_that_is_wrapped_in_training_has_no_list_afterwards() -> None:
    model = tiny.model()
    with ModuleLists() as lists:
        lists.use(model, DistributedType.NO)
        parameters = model.parameters
        before = len(list(parameters()))
        model.parameters = lambda: parameters()
    model.extra = Linear(2, 2)
    assert len(list(model.parameters())) == before + 2


def test_models_whose_parameters_are_exchanged_keep_their_methods() -> None:
    with ModuleLists() as lists:
        sharded, offloaded = tiny.model(), tiny.model()
        offloaded.lm_head.weight = Parameter(offloaded.lm_head.weight.to("meta"))
        lists.use(sharded, DistributedType.FSDP)
        lists.use(offloaded, DistributedType.NO)
        assert not any(has_own_method(model, name) for model in (sharded, offloaded) for name in METHODS)
