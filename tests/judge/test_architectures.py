"""Tiny models of any architecture: every kind of layer, models that are not judged, and models with their own ways."""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from conformance.laws import LAWS
from conformance.models.building import NotBuilt, Subject, architectures, image_text_architectures
from conformance.models.task import ModelTask
from conformance.running.runner import run
from conformance.running.search import Result
from conformance.tolerances.gates import Unchecked
from conformance.verbs import model as verb
from tests.judge.model_trials import trial_of

pytestmark = pytest.mark.filterwarnings("ignore")

OF_EACH_LAYER = ("gemma4_text", "dots3_note_text")  # fields of single layers differ


@pytest.mark.parametrize(
    "name",
    ["deepseek_v3", "flint", "inkling2_loop_text", "qwen3_next", "gemma3n_text", "mamba2", "gpt_oss", *OF_EACH_LAYER],
)
def test_a_tiny_model_has_every_kind_of_layer(name: str) -> None:
    """And every class of modules, such as experts behind the first layers without them, but few parameters."""
    if name not in CONFIG_MAPPING:
        pytest.skip(f"transformers has no {name}")
    subject = Subject.named(name)
    config = subject.config().get_text_config()
    assert set(getattr(config, "layer_types", None) or ()) == set(
        getattr(CONFIG_MAPPING[name](), "layer_types", None) or ()
    )
    with torch.device("meta"):
        tiny, whole = (AutoModelForCausalLM.from_config(each) for each in (config, CONFIG_MAPPING[name]()))
    assert {type(module) for module in whole.modules()} <= {type(module) for module in tiny.modules()}
    assert tiny.num_parameters() < 10**5


@pytest.mark.parametrize("name", ["qwen2_5_vl", "mistral4", "glm4v_moe"])
def test_the_text_part_of_an_image_text_model_is_judged(name: str) -> None:
    """It has a name for `--config`, although transformers has no causal language model of it."""
    if name not in CONFIG_MAPPING:
        pytest.skip(f"transformers has no {name}")
    assert name in image_text_architectures() and name not in architectures()
    assert LAWS["gradients"].check(trial_of(name))


@pytest.mark.parametrize("name", ["qwen2_vl", "step3p7", "ernie4_5_vl_moe", "granite_docling", "paddleocr_vl"])
def test_a_tower_is_tiny_too(name: str) -> None:
    """And sizes that two parts share are the same, kinds of layers in lists stay, and the text part runs alone."""
    if name not in CONFIG_MAPPING:
        pytest.skip(f"transformers has no {name}")
    model = Subject.named(name).model(torch.float32, "cpu")
    assert model.num_parameters() < 10**6
    with torch.no_grad():
        assert model(input_ids=torch.arange(3, 9)[None]).logits.isfinite().all()


def test_linear_layers_whose_names_others_end_with_get_adapters_too() -> None:
    """Reformer's are called as modules that hold them."""
    assert LAWS["adapter_saved"].check(trial_of("reformer")) is None


@pytest.mark.parametrize("name", ["doge", "ctrl", "lara_mini"])
def test_documents_apart_in_a_model_of_its_own_kind(name: str) -> None:
    """Another kernel without gradients; embeddings changed in place; a mixer that untouched takes no packed rows."""
    if name not in CONFIG_MAPPING:
        pytest.skip(f"transformers has no {name}")
    LAWS["apart"].check(trial_of(name))


@pytest.mark.parametrize(
    ("name", "some", "none"),
    [
        ("ctrl", "ffn.0", "0"),
        ("llama4_text", "q_proj", "router"),
        ("modernbert-decoder", "q_proj", "decoder"),
        ("falcon", "query_key_value", "lm_head"),
    ],
)
def test_linear_layers_alone_get_adapters(name: str, some: str, none: str) -> None:
    """Not all of "h.0" for "ffn.0"; no router, which returns more, and no head, but Falcon's own kind."""
    found = trial_of(name).adapter[0].target_modules
    assert some in found and none not in found


def test_a_model_that_is_not_trained_is_skipped_by_every_law() -> None:
    trial = trial_of("bart")
    for law in LAWS.values():
        with pytest.raises(Unchecked):
            law.check(trial)


def test_hidden_states_with_the_tokens_first_are_those_of_the_documents() -> None:
    """XLNet's layers return [S, B, H]; a document of one token alone looks the same in both orders."""
    trial = trial_of("xlnet")
    assert LAWS["gradients"].check(trial)
    states = trial.truth.peer["the hidden states of transformer.layer.0"]
    assert len(states) == sum(trial.documents.lengths)


def test_what_a_model_prints_is_not_shown(capsys: pytest.CaptureFixture[str]) -> None:
    """Reformer's code prints while it generates."""
    result = ModelTask("reformer", True, "generated", "float32", "reference", "cpu")()
    assert (result.verdict, capsys.readouterr().out) == ("pass", "")


def rows(*results: Result) -> dict[str, str]:
    """What the verb prints of each model, without the name."""
    table = verb.Rows([], [result.op for result in results], ["float32"], "laws")
    for result in results:
        table._results[result.op] = [*table._results[result.op], result]
    return {result.op: table._row(result.op).removeprefix(result.op).strip() for result in results}


def test_a_row_says_what_became_of_a_model() -> None:
    """One line: what fails, what is skipped and why; a reason is said once for the laws that it holds for."""

    def skip(op: str, law: str, why: str) -> Result:
        return Result(op, law, "float32", "skip", message=f"{why}\nand more")

    found = rows(
        Result("right", "layers", "float32", "pass", 0.25),
        *(skip("some", law, "packing is refused: no") for law in ("padding_free", "apart")),
        Result("some", "layers", "float32", "pass", 0.5),
        Result("wrong", "layers", "float32", "fail", 2.0, message="gate G1"),
        Result("wrong", "saved", "float32", "fail", message="gone"),
        skip("wrong", "apart", "packing is refused: no"),
        *(skip("none", law, "no tiny model: ValueError: no") for law in ("layers", "saved")),
    )
    assert found == {
        "right": "ok   25 %        1/1",
        "some": "ok   50 %        1/1          skip padding_free, apart: packing is refused: no",
        "wrong": "FAIL 200 %       0/2          FAIL layers, saved; skip apart: packing is refused: no",
        "none": "-  not judged: no tiny model: ValueError: no",
    }


@dataclass(frozen=True)
class Endless:
    """A task without a result."""

    op: str
    property: str
    backend: str = "reference"
    device: str = "cpu"
    dtype: str | None = None

    def __call__(self, notify: Callable[[str], None]) -> Result:
        while True:
            time.sleep(1)


def test_a_model_without_a_result_stops_no_other() -> None:
    """Its task is stopped, its other tasks are skipped, and those of the next model start."""
    tasks = [Endless("slow", "layers"), Endless("slow", "saved"), Endless("next", "layers")]
    found = [result for _, result in run(tasks, lambda *_: None, jobs=1, limit=0.5)]
    assert [(result.op, result.verdict, result.message) for result in found] == [
        ("slow", "fail", "no result in 0.5 s: the process was stopped"),
        ("slow", "skip", "no time is left of the 0.5 s for slow"),
        ("next", "fail", "no result in 0.5 s: the process was stopped"),
    ]


def test_models_are_counted_by_what_became_of_them() -> None:
    verdicts: Any = {"a": ["pass"], "b": ["pass", "skip"], "c": ["pass", "fail", "skip"], "d": ["skip"]}
    results = [Result(op, "layers", "float32", v) for op, all_of in verdicts.items() for v in all_of]
    assert verb._counted(results) == "4 models: 2 pass (1 of them with laws skipped), 1 fail, 1 not judged"


def test_an_encoder_decoder_is_refused_in_one_sentence() -> None:
    with pytest.raises(NotBuilt, match=r"got a model of type 'bart'; allowed: causal language models"):
        Subject.named("bart").config()


@pytest.mark.parametrize(("words", "compared"), [(["--law", "reference"], True), ([], False)])
def test_the_reference_is_not_compared_with_itself_unless_asked(words: list[str], compared: bool) -> None:
    """So that a model that is not judged has one reason."""
    parser = argparse.ArgumentParser()
    verb.add(parser.add_subparsers())
    tasks = verb.tasks_asked(
        parser.parse_args(["model", "--config", "gpt2", "--backend", "reference", "--device", "cpu", *words])
    )
    assert ("reference" in {each.property for each in tasks}) == compared
