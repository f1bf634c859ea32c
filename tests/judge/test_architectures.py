"""Tiny models of any architecture: every kind of layer, models that are not judged, and models with their own ways."""

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from conformance.gates import Unchecked
from conformance.laws import LAWS
from conformance.models.building import NotBuilt, Subject
from conformance.models.trial import ModelTrial
from conformance.search import Result
from conformance.verbs import model as verb

pytestmark = pytest.mark.filterwarnings("ignore")

OF_EACH_LAYER = ("gemma4_text", "dots3_note_text")  # fields of single layers differ


def trial_of(name: str) -> ModelTrial:
    """A tiny model under the reference's operations."""
    return ModelTrial(Subject.named(name), "reference", torch.float32, "cpu")


@pytest.mark.parametrize("name", ["deepseek_v3", "qwen3_next", "gemma3n_text", "mamba2", "gpt_oss", *OF_EACH_LAYER])
def test_a_tiny_model_has_every_kind_of_layer(name: str) -> None:
    """And few parameters."""
    if name not in CONFIG_MAPPING:
        pytest.skip(f"transformers has no {name}")
    subject = Subject.named(name)
    config = subject.config().get_text_config()
    assert set(getattr(config, "layer_types", None) or ()) == set(
        getattr(CONFIG_MAPPING[name](), "layer_types", None) or ()
    )
    with torch.device("meta"):
        assert AutoModelForCausalLM.from_config(config).num_parameters() < 10**5


@pytest.mark.parametrize("name", ["doge", "ctrl", "lara_mini"])
def test_documents_apart_in_a_model_of_its_own_kind(name: str) -> None:
    """Another kernel without gradients; embeddings changed in place; a mixer that untouched takes no packed rows."""
    if name not in CONFIG_MAPPING:
        pytest.skip(f"transformers has no {name}")
    LAWS["apart"].check(trial_of(name))


@pytest.mark.parametrize(
    ("name", "some", "none"),
    [("ctrl", "ffn.0", "0"), ("llama4_text", "q_proj", "router"), ("modernbert-decoder", "q_proj", "decoder")],
)
def test_linear_layers_alone_get_adapters(name: str, some: str, none: str) -> None:
    """Not all of "h.0" for a layer "ffn.0"; no router, which returns more than a product; a head called "decoder"."""
    found = trial_of(name).adapter[0].target_modules
    assert some in found and none not in found


def test_a_model_that_is_not_trained_is_skipped_by_every_law() -> None:
    trial = trial_of("bart")
    for law in LAWS.values():
        with pytest.raises(Unchecked):
            law.check(trial)


def test_a_reason_is_said_once() -> None:
    """For all models and laws that it holds for."""
    skipped = [Result(op, law, "float32", "skip", message="no") for op in ("a", "b") for law in ("apart", "saved")]
    others = [Result("c", "apart", "float32", "skip", message="no"), Result("c", "saved", "float32", "pass")]
    assert verb._skipped([*skipped, *others]) == [
        "skip a, b / apart, saved / float32: no",
        "skip c / apart / float32: no",
    ]


def test_an_encoder_decoder_is_refused_in_one_sentence() -> None:
    with pytest.raises(NotBuilt, match=r"got a model of type 'bart'; allowed: causal language models"):
        Subject.named("bart").config()
