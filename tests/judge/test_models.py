"""Whole models under the laws of models: right ones hold, and each planted fault breaks the law that is about it."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from conformance import cli
from conformance.laws import LAWS
from conformance.models import task
from conformance.models import trial as trials
from conformance.models.building import LENGTHS, Subject
from conformance.models.trial import ModelTrial
from conformance.page.reading import read
from conformance.running.search import Result
from conformance.tolerances.gates import Unchecked
from conformance.verbs import model as verb
from tests import tiny
from tests.judge.model_trials import after_placing, broken, llama, trial_of, with_operation
from unsloth_fast.backends import Backend
from unsloth_fast.models import head, placement

pytestmark = pytest.mark.usefixtures("quiet_models")

OF_ADAPTERS = {"adapters", "embeddings", "adapter_saved"}  # another truth, as expensive as the first
ELSEWHERE = {"ends", "dora", "switched", "quantized", "dropout"}  # tests/judge/test_model_adapters.py
ONE_LAYER = {"num_hidden_layers": 1}
FULL = ONE_LAYER | {"layer_types": ["full_attention"]}
# Models and the fields that make them smaller still; the last three are named nowhere else in the project.
RIGHT: dict[str, dict[str, Any]] = {
    "llama": ONE_LAYER,
    "mixtral": ONE_LAYER,
    "qwen3": FULL,
    "gemma2": {},
    "gemma3_text": {},
    "mistral": ONE_LAYER,
    "phi3": ONE_LAYER,
    "olmo2": ONE_LAYER,
    "smollm3": FULL | {"no_rope_layers": [0]},
    "apertus": ONE_LAYER,
    "helium": ONE_LAYER,
    "arcee": ONE_LAYER,
}
OTHERS: dict[str, dict[str, Any]] = {"jamba": {}, "gpt2": {"n_layer": 1}}
WITH_ADAPTERS = ("llama", "mixtral")


def small(name: str) -> ModelTrial:
    """A tiny model, still smaller."""
    return trial_of(name, **(RIGHT | OTHERS)[name])


@pytest.mark.parametrize("name", RIGHT)
def test_a_right_model_satisfies_every_law(name: str) -> None:
    """No law is skipped, and none uses its whole budget."""
    skipped = {"reference"} | ELSEWHERE | (set() if name in WITH_ADAPTERS else OF_ADAPTERS)
    used = [law.check(small(name)) for law in LAWS.values() if law.name not in skipped]
    assert 0 < max(u for u in used if u is not None) < 1


def test_a_norm_with_the_wrong_offset(monkeypatch: pytest.MonkeyPatch) -> None:
    own = placement.norm_forward
    monkeypatch.setattr(placement, "norm_forward", lambda norm, op: own(replace(norm, offset=1.0 - norm.offset), op))
    message = broken("layers", llama())
    assert message.startswith("gate G1") and "the hidden states of model.layers.0 at index" in message
    assert "measured" in message and "allowed" in message


def test_a_head_whose_cap_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    own = head.logit_options
    monkeypatch.setattr(head, "logit_options", lambda *args: (own(*args) or {}) | {"softcap": 0.0})
    assert "in the loss" in broken("gradients", small("gemma2"))


def test_an_adapter_of_an_expert_without_a_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    def lose(model: Any) -> None:
        for name, parameter in model.named_parameters():
            if name.endswith("experts.lora_A.default.weight"):
                parameter.register_hook(lambda g: torch.cat((torch.zeros_like(g[:2]), g[2:])))

    after_placing(monkeypatch, lose)
    message = broken("adapters", small("mixtral"))
    assert "the gradient of" in message and "experts.lora_A.default.weight at index (" in message


def test_projections_of_one_input_that_are_exchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of keys and values, which are as wide."""

    def exchanged(lora_linears: Callable[..., Any], *layers: Any) -> Any:
        q, k, v = lora_linears(*layers)
        return q, v, k

    with_operation(monkeypatch, "lora_linears", exchanged)
    assert "the hidden states of base_model.model.model.layers.0" in broken("adapters", llama())


def test_the_gradient_of_one_projection_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    def detached(lora_linears: Callable[..., Any], *layers: Any) -> Any:
        q, *others = lora_linears(*layers)
        return q.detach(), *others

    with_operation(monkeypatch, "lora_linears", detached)
    assert "q_proj.lora_B.default.weight is missing (None)" in broken("adapters", llama())


def test_an_adapter_that_is_not_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    def freeze(model: Any) -> None:
        for name, parameter in model.named_parameters():
            if name.endswith("v_proj.lora_B.default.weight"):
                parameter.requires_grad_(False)

    after_placing(monkeypatch, freeze)
    assert "v_proj.lora_B.default.weight is missing (None)" in broken("adapters", llama())


def test_a_mixer_that_carries_its_state_into_the_next_document(monkeypatch: pytest.MonkeyPatch) -> None:
    trial = small("jamba")
    with pytest.raises(Unchecked, match="packing is refused: the model has recurrent layers"):
        LAWS["padding_free"].check(trial)
    monkeypatch.setitem(vars(trial), "obstacles", ())
    assert "in another document" in broken("apart", trial)
    assert "gate G1" in broken("padding_free", trial)


def test_a_window_off_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def wider(right: Callable[..., Tensor], *args: Any, window: int | None = None, **options: Any) -> Tensor:
        return right(*args, window=None if window is None else window + 1, **options)

    with_operation(monkeypatch, "packed_attention", wider)
    assert "the hidden states of model.layers.0" in broken("padding_free", small("mistral"))


def test_positions_that_do_not_restart(monkeypatch: pytest.MonkeyPatch) -> None:
    def run_on(model: Any) -> None:
        table = model.transformer.wpe
        table.register_forward_pre_hook(lambda module, args: (torch.arange(args[0].shape[1])[None],))

    trial = small("gpt2")
    assert LAWS["padding_free"].check(trial)
    after_placing(monkeypatch, run_on)
    assert "the hidden states of transformer.h.0" in broken("padding_free", trial)


@pytest.mark.parametrize("seen", [[0, -1], [0, 1, -1]], ids=["no bound", "the first bound"])
def test_documents_that_see_each_other(seen: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    def joined(
        right: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, *rest: Any, **o: Any
    ) -> Tensor:
        return right(q, k, v, bounds[seen], *rest, **o)

    with_operation(monkeypatch, "packed_attention", joined)
    assert "in another document\nmeasured" in broken("apart", llama())


def test_a_step_that_divides_by_its_own_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    def own_mean(right: Callable[..., Tensor], *args: Any, num_items: Any = None, **options: Any) -> Tensor:
        return right(*args, **options)

    add = trials.add_loss

    def planted(model: Any, backend: Backend) -> None:
        kernels = vars(backend.kernels)
        wrong = {"linear_cross_entropy": lambda *a, **o: own_mean(kernels["linear_cross_entropy"], *a, **o)}
        add(model, replace(backend, kernels=SimpleNamespace(**kernels | wrong)))

    monkeypatch.setattr(trials, "add_loss", planted)
    assert LAWS["gradients"].check(llama())
    assert "in the loss" in broken("accumulated", llama())


def test_a_generation_that_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The generation differs only while it uses its cache."""

    def later(right: Callable[..., Any], q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *rest: Any, **o: Any) -> Any:
        return right(q, k, sin, cos, *rest, **o) if q.shape[2] == 1 else right(q, k, cos, sin, *rest, **o)

    with_operation(monkeypatch, "rope", later)
    assert LAWS["layers"].check(llama())
    message = broken("generated", llama())
    assert message.startswith("new token ") and "of document" in message and "allowed" in message


@pytest.mark.parametrize("law", ["saved", "adapter_saved"])
def test_a_save_that_loses_a_tensor(monkeypatch: pytest.MonkeyPatch, law: str) -> None:
    def lose(model: Any) -> None:
        save = model.save_pretrained

        def saving(folder: str) -> None:
            weights = {name: tensor for name, tensor in model.state_dict().items() if "o_proj" not in name}
            save(folder, state_dict=weights)

        model.save_pretrained = saving

    after_placing(monkeypatch, lose)
    assert "o_proj" in broken(law, llama())


def test_a_checkpoint_that_recomputes_something_else(monkeypatch: pytest.MonkeyPatch) -> None:
    def forgetful(model: Any) -> None:
        norm, calls = model.model.layers[0].input_layernorm, []
        own = norm.forward

        def forward(states: Tensor) -> Tensor:
            calls.extend([1] * torch.is_grad_enabled())  # not the loss's check of the head
            return own(states) * (1.01 if len(calls) > 1 else 1.0)

        norm.forward = forward

    after_placing(monkeypatch, forgetful)
    assert "the gradient of" in broken("checkpointed", llama())


def test_what_the_untouched_model_does_not_do_either_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    trial = llama()
    padded = trial.documents.padded()
    padded["labels"] = padded["labels"].roll(1, 0)
    with pytest.raises(Unchecked, match="the untouched model breaks a gate too: gate G1"):
        trial.compare([padded])


def test_a_model_that_does_not_run_on_text_is_not_judged() -> None:
    """Packing asks no other law first; IDEFICS wants an image."""
    trial = ModelTrial(Subject.named("idefics"), "reference", torch.float32, "cpu")
    with pytest.raises(Unchecked, match="the untouched model raises ValueError: Exactly 1 of pixel_values"):
        LAWS["padding_free"].check(trial)


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run tasks in this process, on the models of this file."""

    def run(tasks: Any, on_result: Callable[[Any, Result], None], **_: Any) -> list[tuple[Any, Result]]:
        done = [(each, each()) for each in tasks]
        for each in done:
            on_result(*each)
        return done

    monkeypatch.setattr(verb, "run", run)
    monkeypatch.setattr(task, "_trial", lambda name, *_: small(name))


OPTIONS = ["--backend", "reference", "--device", "cpu"]


@pytest.mark.usefixtures("here")
def test_the_verb_shows_what_fails_and_how_to_run_it_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def enlarge(model: Any) -> None:
        for norm in (module for name, module in model.named_modules() if name == "model.norm"):
            norm.register_forward_hook(lambda *args: 1.01 * args[2])

    after_placing(monkeypatch, enlarge)
    words = ["--law", "layers", "padding_free", "--json", str(tmp_path / "out.json")]
    assert cli.main(["model", "--config", "llama", "jamba", *OPTIONS, *words]) == 1
    shown = capsys.readouterr().out
    assert "% of error budget" in shown and "laws" in shown
    assert re.search(r"\njamba +ok +[\d.]+ % +1/1 +skip padding_free: packing is refused: ", shown)
    assert ", at most 900 s for a model\n" in shown
    assert "2 models: 1 pass (1 of them with laws skipped), 1 fail, 0 not judged\n" in shown
    assert "FAIL llama / layers / float32: gate G1 used " in shown and " in logits at index (" in shown
    again = "python -m conformance model --config llama --law layers --dtype float32 --backend reference --device cpu"
    assert f"  reproduce: {again}\n" in shown
    assert f"must hold:     {LAWS['layers'].statement}" in shown
    file = read(tmp_path / "out.json")
    assert file.kind == "run" and [check.verdict for check in file.checks] == ["fail", "fail", "pass", "skip"]
    assert (file.checks[0].op, file.checks[0].property, file.checks[0].dtype) == ("llama", "layers", "float32")
    assert file.checks[0].message is not None and file.checks[0].message.endswith(again)
    assert "transformers" in file.meta.versions


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(("law", "status"), [("layers", 0), ("padding_free", 2)])
def test_exit_status_without_a_failure(law: str, status: int) -> None:
    """The status is 2 if every law was skipped."""
    assert cli.main(["model", "--config", "jamba", "--law", law, *OPTIONS]) == status


@pytest.mark.usefixtures("here")
def test_all_architectures(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("conformance.models.building.architectures", lambda: ["gpt2", "jamba"])
    assert cli.main(["model", "--config", "all", "--law", "saved", *OPTIONS]) == 0
    shown = capsys.readouterr().out
    assert "gpt2" in shown and "jamba" in shown and "0 of 2 checks failed" in shown and "2 models: 2 pass, 0 " in shown


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "model: got none; allowed: PATH_OR_NAME, --config ARCH, or both"),
        (["--config", "soup"], "--config: got 'soup'; allowed: all, or one of transformers' "),
        (["--config", "llama", "--law", "order"], "law: got 'order'; allowed: layers, gradients"),
        (["--config", "llama", "--dtype", "float64"], "dtype: got 'float64'; allowed: "),
        (["--config", "llama", "--timeout", "0"], "--timeout: got 0; allowed: above 0"),
        (["--config", "llama", "--jobs", "0"], "--jobs: got 0; allowed: 1 or more"),
        (["--config", "llama", "--data", "nowhere.txt"], "--data: got nowhere.txt, which is no file"),
        (["--config", "llama", "--backend", "soup"], "backend: got 'soup'; allowed: "),
        (["./nowhere"], "model_name: got './nowhere', which does not exist"),
    ],
)
def test_usage_errors_are_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = [] if "--backend" in words else OPTIONS[:2]
    assert cli.main(["model", *words, *options, "--device", "cpu"]) == 2
    assert capsys.readouterr().err.startswith(f"conformance: {message}")


def test_an_unknown_architecture_gets_the_nearest_names(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["model", "--config", "lama", "--device", "cpu"]) == 2
    assert "such as llama, " in capsys.readouterr().err


def test_a_model_in_a_folder_with_texts(tmp_path: Path) -> None:
    """The model has its own weights and tokenizer; documents are cut."""
    folder = tiny.folder(tmp_path / "model")
    data = tmp_path / "texts.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in tiny.texts(6)))
    trial = ModelTrial(Subject(folder), "reference", torch.float32, "cpu", data)
    assert all(1 < length <= max(LENGTHS) for length in trial.documents.lengths)
    assert 0 < (LAWS["gradients"].check(trial) or 0) < 1
