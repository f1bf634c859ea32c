"""Models of people's own are trained as they compute: packed where documents stay apart, else padded, with a reason."""

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import TrainerCallback

from tests import tiny
from tests.models import modeling_stranger, own_layers
from tests.models.modeling_stranger import StrangerConfig, StrangerForCausalLM
from tests.trainer.runs import arguments
from unsloth_fast import FastLanguageModel, UnslothTrainer, backends
from unsloth_fast.models import place

pytestmark = pytest.mark.filterwarnings("ignore")

# How often each operation is placed under a model; one that attends by its own means is padded.
PLACED: dict[str, dict[str, int]] = {
    "alibi": {"rms_norm": 4},
    "own attention": {},
    "interface": {"packed_attention": 2},
    "parallel": {"packed_attention": 2, "rms_norm": 4},
    "shared": {"packed_attention": 1, "rms_norm": 2},
    "helped": {"packed_attention": 2, "rms_norm": 4},
    "hand-made": {"rms_norm": 4},
}
REASON = "because the model makes its masks without a look at documents of a row, which may join them"


def documents_of(batch: dict[str, Any]) -> list[tuple[Tensor, Tensor]]:
    """The tokens and labels of each document of a batch, [S] each."""
    tokens, labels = batch["input_ids"], batch["labels"]
    if "cu_seq_lens_q" in batch:
        lengths = batch["cu_seq_lens_q"].diff().tolist()
        return list(zip(tokens[0].split(lengths), labels[0].split(lengths), strict=True))
    masks = batch["attention_mask"].bool()
    return [(t[m], y[m]) for t, y, m in zip(tokens, labels, masks, strict=True)]


def alone(model: Any, batches: list[dict[str, Any]]) -> list[Tensor]:
    """The loss of each batch, and all gradients of the last one, of one document at a time."""
    losses = []
    for batch in batches:
        model.zero_grad()
        documents = documents_of(batch)
        count = sum(int((labels[1:] != -100).sum()) for _, labels in documents)
        logits = (model(input_ids=tokens[None]).logits[0, :-1] for tokens, _ in documents)
        sums = (cross_entropy(x, y[1:], reduction="sum") for x, (_, y) in zip(logits, documents, strict=True))
        loss = torch.stack(list(sums)).sum() / count
        loss.backward()
        losses.append(loss.detach())
    return [*losses, *(p.grad for p in model.parameters())]


def trained(model: Any, folder: Path, **options: Any) -> tuple[list[dict[str, Any]], list[Tensor]]:
    """The batches of two steps that change nothing; the loss of each, and all gradients of the last one."""
    batches, losses, gradients = list[dict[str, Any]](), list[Tensor](), list[Tensor]()

    class Recording(UnslothTrainer):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **options: Any) -> Any:
            batches.append({name: copy.copy(value) for name, value in inputs.items()})
            loss: Any = super().compute_loss(model, inputs, *args, **options)
            losses.append(loss.detach())
            return loss

    class Gradients(TrainerCallback):
        def on_pre_optimizer_step(self, *args: Any, **options: Any) -> None:
            gradients[:] = [p.grad.clone() for p in model.parameters() if p.grad is not None]

    still = {"optim": "sgd", "learning_rate": 0.0, "weight_decay": 0.0, "max_grad_norm": 0.0}
    Recording(
        model=model,
        args=arguments(folder, packing=True, max_length=32, max_steps=2, **still, **options),
        train_dataset=Dataset.from_dict({"text": tiny.texts(18)}),
        processing_class=tiny.tokenizer(),
        callbacks=[Gradients()],
    ).train()
    return batches, [*losses, *gradients]


def error(found: list[Tensor], right: list[Tensor]) -> float:
    """The length of what the results are off by."""
    return sum(float((one - truth).norm()) ** 2 for one, truth in zip(found, right, strict=True)) ** 0.5


@pytest.mark.parametrize("backend", ["reference", "fast"])
@pytest.mark.parametrize("kind", own_layers.LAYERS)
def test_a_model_with_layers_of_its_own(
    kind: str, backend: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The losses and every gradient are those of the untouched model in float64, with one document at a time.

    The fast kernels compute in float32: the error of all together is at most twice that of the untouched model then.
    """
    dtype = torch.float64 if backend == "reference" else torch.float32
    model = own_layers.model(kind, dtype)
    peer = copy.deepcopy(model)
    with caplog.at_level("INFO"):
        batches, results = trained(model, tmp_path, backend=backend)
    said = " ".join(caplog.messages)
    assert (REASON in said) == (kind in own_layers.PADDED) == ("cu_seq_lens_q" not in batches[0])
    assert f"operations placed: {PLACED[kind]}" in said
    of_peer = alone(peer, batches)
    right = alone(peer.double(), batches)
    if dtype == torch.float32:
        assert error(results, right) <= 2 * error(of_peer, right)
        return
    for found, truth in zip(results, right, strict=True):
        assert (found - truth).norm() <= 1e-9 * truth.norm()


def test_a_mask_made_by_hand_for_long_rows_alone_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """No short run shows it; the attention does."""
    own, by_hand = own_layers.HelpedModel.masks_for, own_layers.HandMadeModel.masks_for

    def masks_for(self: Any, states: Tensor, padding: Tensor | None, places: Tensor) -> tuple[Any, Any]:
        long = states.shape[1] > 20
        return by_hand(self, states, None, places) if long else own(self, states, padding, places)

    model = own_layers.model("helped")
    monkeypatch.setattr(own_layers.HelpedModel, "masks_for", masks_for)
    assert place(model, backends.resolve("reference"))["packed_attention"] == 2
    assert model(**tiny.packed([7, 5])).logits.shape[1] == 12
    with pytest.raises(
        ValueError, match=r"^attention_mask: HelpedModel gave HelpedAttention a mask of its own for a pac"
    ):
        model(**tiny.packed([17, 5]))
    assert model(tiny.packed([17, 5])["input_ids"]).logits.shape[1] == 22


def test_a_forward_without_further_keywords(tmp_path: Path) -> None:
    """It takes neither positions nor a cache."""
    model = own_layers.model("alibi", of=own_layers.WithoutKeywords)
    untouched = copy.deepcopy(model)
    batches, results = trained(model, tmp_path)
    for found, right in zip(results, alone(untouched, batches), strict=True):
        assert (found - right).norm() <= 1e-9 * right.norm()


@pytest.mark.parametrize("deep_head", [False, True])
@pytest.mark.parametrize("way", ["script", "folder"])
def test_a_model_whose_code_comes_with_it(
    way: str, deep_head: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Built from the class, or loaded from a folder with `trust_remote_code`: packed, with every gradient.

    Its values are wider than its keys, so one warning says what a mask costs, of a row of the user's.
    """
    config = StrangerConfig(deep_head=deep_head)
    torch.manual_seed(0)
    model: Any = StrangerForCausalLM(config).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    if way == "folder":
        names = {"AutoConfig": "StrangerConfig", "AutoModelForCausalLM": "StrangerForCausalLM"}
        config.auto_map = {kind: f"modeling_stranger.{name}" for kind, name in names.items()}
        model.config.auto_map, weights = config.auto_map, model.state_dict()
        model.save_pretrained(tmp_path / "model")
        tiny.tokenizer().save_pretrained(tmp_path / "model")
        shutil.copy(modeling_stranger.__file__, tmp_path / "model" / "modeling_stranger.py")
        options: dict[str, Any] = {"dtype": torch.float64, "load_in_4bit": False, "backend": "reference"}
        model, _ = FastLanguageModel.from_pretrained(
            str(tmp_path / "model"), trust_remote_code=True, device_map="cpu", **options
        )
        assert type(model) is not StrangerForCausalLM
        assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    untouched = copy.deepcopy(model)
    batches, results = trained(model, tmp_path)
    assert "cu_seq_lens_q" in batches[0]
    for found, right in zip(results, alone(untouched, batches), strict=True):
        assert (found - right).norm() <= 1e-9 * right.norm()
    (warning,) = (message for message in caplog.messages if "attends under a mask" in message)
    tokens = batches[0]["input_ids"].shape[1]
    assert f"a mask of {tokens} x {tokens} (StrangerAttention: heads of 8, 8 and 12 columns)" in warning


def test_a_stack_that_gets_its_mask_by_position(tmp_path: Path) -> None:
    """It is packed, and a mask beside the bounds of documents is refused by name."""
    model = own_layers.model("parallel", of=own_layers.ByPosition)
    untouched = copy.deepcopy(model)
    batches, results = trained(model, tmp_path)
    assert "cu_seq_lens_q" in batches[0]
    for found, right in zip(results, alone(untouched, batches), strict=True):
        assert (found - right).norm() <= 1e-9 * right.norm()
    packed = tiny.packed([4, 3])
    with pytest.raises(ValueError, match=r"^attention_mask: got one together with cu_seq_lens_q"):
        model(**packed, attention_mask=torch.ones_like(packed["input_ids"]))


def test_a_configuration_without_the_size_of_the_vocabulary(tmp_path: Path) -> None:
    """The embedding has it; no row of the data is checked against it."""
    model: Any = own_layers.model("interface")
    model.get_input_embeddings = lambda: model.model.tokens
    del model.config.vocab_size
    untouched = copy.deepcopy(model)
    batches, results = trained(model, tmp_path)
    assert "cu_seq_lens_q" in batches[0]
    for found, right in zip(results, alone(untouched, batches), strict=True):
        assert (found - right).norm() <= 1e-9 * right.norm()


@pytest.mark.parametrize("asked", [None, True])
def test_a_model_that_cannot_be_checkpointed(
    asked: bool | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It is trained without, unless it is asked for."""
    model: Any = own_layers.model("interface", torch.float32)
    settings = {"gradient_checkpointing": asked}
    if asked:
        with pytest.raises(ValueError, match=r"^OwnForCausalLM (does not support|is not compatible with) "):
            trained(model, tmp_path, **settings)
        return
    trained(model, tmp_path, **settings)
    assert "gradient_checkpointing: off, because a OwnForCausalLM has no support for it" in caplog.messages
    model.get_input_embeddings = lambda: model.model.tokens
    adapted = FastLanguageModel.get_peft_model(model, target_modules=["qkv"])
    assert adapted.get_base_model().unsloth_gradient_checkpointing is False


def test_a_forward_that_returns_a_tuple_is_refused_in_one_sentence(tmp_path: Path) -> None:
    model = own_layers.model("alibi", of=own_layers.WithTuples)
    with pytest.raises(TypeError, match=r"^WithTuples\.forward: got a tuple; allowed: an output with the attribute"):
        trained(model, tmp_path)
