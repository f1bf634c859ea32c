"""Arguments of a type that no run can use are refused by name, where Python's own error would come later."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoTokenizer, ProgressCallback

from tests import tiny
from unsloth_fast.arguments.types import check_model, check_types
from unsloth_fast.hooks.optimizer import check_trainable

TOKENIZER = {"processing_class": tiny.tokenizer()}
CPU: Any = type("Arguments", (), {"bf16": False, "device": torch.device("cpu")})()


@pytest.mark.parametrize("name", ["llama", "a path", "an adapter"])
def test_language_models_and_their_names_are_allowed(name: str) -> None:
    models: dict[str, Any] = {"llama": tiny.model(), "a path": "a/path"}
    check_model(models.get(name) or get_peft_model(tiny.model(), LoraConfig(target_modules=["q_proj"])))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (None, "model: got NoneType; allowed: a language model of transformers"),
        ({"name": 1}, "model: got dict; allowed: "),
        (nn.Linear(2, 2), "model: got Linear; allowed: a language model of transformers"),
        (tiny.model().model, "model: got LlamaModel; allowed: one with an output head"),
    ],
    ids=["None", "dict", "Linear", "without head"],
)
def test_what_is_no_language_model_is_refused(model: Any, message: str) -> None:
    with pytest.raises(TypeError, match=f"^{message}"):
        check_model(model)


@pytest.mark.parametrize(
    "given",
    [
        {"callbacks": [ProgressCallback, ProgressCallback()], "optimizers": (None, None)},
        {"optimizer_cls_and_kwargs": (torch.optim.SGD, {}), "compute_metrics": print},
        {"callbacks": None, "optimizer_cls_and_kwargs": None, "formatting_func": None},
    ],
    ids=["callbacks", "functions", "None"],
)
def test_arguments_of_the_right_types_are_allowed(given: dict[str, Any]) -> None:
    check_types(tiny.model(), TOKENIZER | given)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("processing_class", "gpt2", "got str; allowed: a tokenizer or a processor of transformers, or None"),
        ("callbacks", ProgressCallback(), "got ProgressCallback; allowed: a list of TrainerCallback"),
        ("optimizers", torch.optim.SGD, r"got type; allowed: the pair \(an optimizer or None, a scheduler or None\)"),
        ("optimizer_cls_and_kwargs", torch.optim.SGD, r"got type; allowed: the pair \(a class of optimizers, "),
        ("compute_loss_func", "nll", "got str; allowed: a function, or None"),
        ("compute_metrics", 5, "got int; allowed: a function, or None"),
        ("preprocess_logits_for_metrics", 5, "got int; allowed: a function, or None"),
        ("formatting_func", "text", "got str; allowed: a function, or None"),
    ],
)
def test_arguments_of_wrong_types_are_refused(name: str, value: Any, message: str) -> None:
    with pytest.raises(TypeError, match=f"^{name}: {message}"):
        check_types(tiny.model(), TOKENIZER | {name: value})


def test_a_callback_of_another_type_is_named_by_its_index() -> None:
    with pytest.raises(TypeError, match=r"^callbacks\[1\]: got int; allowed: a transformers.TrainerCallback"):
        check_types(tiny.model(), TOKENIZER | {"callbacks": [ProgressCallback, 5]})


def test_a_model_without_a_name_needs_a_processing_class() -> None:
    """TRL looks for a tokenizer named ''."""
    with pytest.raises(ValueError, match=r"^processing_class: got None, and the model has no name"):
        check_types(tiny.model(), {})
    with pytest.raises((OSError, ValueError)):
        AutoTokenizer.from_pretrained(tiny.model().config._name_or_path)
    check_types("a/path", {})


@pytest.mark.parametrize("adapter", [False, True], ids=["another model", "without the adapter"])
def test_an_optimizer_of_nothing_that_is_trained_is_refused(adapter: bool) -> None:
    """It would take steps that change nothing: of another model, or of weights that a later adapter froze."""
    model = tiny.model()
    optimizer = torch.optim.SGD((model if adapter else tiny.model()).parameters(), lr=0.1)
    whole: Any = get_peft_model(model, LoraConfig(target_modules=["q_proj"])) if adapter else model
    with pytest.raises(ValueError, match=r"^optimizers: got an optimizer of none of the parameters that the "):
        check_trainable(whole, CPU, optimizer)
    check_trainable(whole, CPU, torch.optim.SGD(whole.parameters(), lr=0.1))
    check_trainable(whole, CPU)
