"""Weights and activations of different dtypes under a model, compared with the untouched model."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from tests import tiny
from unsloth_fast import backends
from unsloth_fast.models import place
from unsloth_fast.models.head import add_loss, without_adapter

LENGTHS = [7, 1, 9, 6]
FLOAT16, BFLOAT16, FLOAT32 = torch.float16, torch.bfloat16, torch.float32
on_a_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="runs the kernels in the interpreter")
LORA = {"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM"}


def labels_of(tokens: Tensor) -> Tensor:
    """The tokens, without those that begin a document."""
    labels = tokens.clone()
    labels[0, torch.tensor([0, *LENGTHS[:-1]]).cumsum(0)] = -100
    return labels


def batches() -> dict[str, dict[str, Tensor]]:
    """The same documents, packed and padded."""
    row = tiny.packed(LENGTHS)
    row["labels"] = labels_of(row["input_ids"])
    tokens, labels = (row[name][0].split(LENGTHS) for name in ("input_ids", "labels"))
    padded = {
        "input_ids": nn.utils.rnn.pad_sequence(list(tokens), batch_first=True),
        "labels": nn.utils.rnn.pad_sequence(list(labels), batch_first=True, padding_value=-100),
        "attention_mask": nn.utils.rnn.pad_sequence([torch.ones_like(one) for one in tokens], batch_first=True),
    }
    return {"packed": row, "padded": padded}


def of_hugging_face(model: Any) -> Tensor:
    """The mean loss of the documents, by the untouched model and torch."""
    tokens = tiny.packed(LENGTHS)["input_ids"][0].split(LENGTHS)
    logits = [model(input_ids=one[None], use_cache=False).logits[0, :-1] for one in tokens]
    return cross_entropy(torch.cat(logits).float(), torch.cat([one[1:] for one in tokens]))


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_as_untouched(
    model: Any,
    backend: str,
    autocast: AbstractContextManager[object],
    share: float,
    rows: tuple[str, ...] = ("packed", "padded"),
) -> None:
    """The loss and the gradients are those of the untouched model.

    Args:
        model: as it is before anything is placed under it.
        backend: its name.
        autocast: the context of forward passes.
        share: the largest error, relative to the largest entry.
        rows: the names of the batches.
    """
    model.train()
    with autocast:
        loss = of_hugging_face(model)
    expected = gradients(model, loss)
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    chosen = backends.resolve(backend)
    place(model, chosen)
    add_loss(without_adapter(model), chosen)
    for name in rows:
        batch = batches()[name]
        with autocast:
            found = model(**batch, use_cache=False, backend_loss=True).loss
        assert found.dtype == FLOAT32
        assert found.item() == pytest.approx(loss.item(), rel=share / 10), name
        after = gradients(model, found)
        assert after.keys() == expected.keys()
        for parameter, gradient in expected.items():
            most = share * gradient.abs().max().item() + 1e-6
            torch.testing.assert_close(after[parameter], gradient, rtol=0, atol=most, msg=f"{name}: {parameter}")
    assert {name: parameter.dtype for name, parameter in model.named_parameters()} == dtypes


def widened(*words: str, dtype: torch.dtype = FLOAT32) -> Callable[[nn.Module], None]:
    """Convert the parameters with one of these words in their names."""

    def change(model: nn.Module) -> None:
        for name, parameter in model.named_parameters():
            if any(word in name for word in words):
                parameter.data = parameter.data.to(dtype)

    return change


# Of a model in the first dtype under autocast to the second: what is converted to float32.
MIXTURES: dict[str, Callable[[nn.Module], None]] = {
    "nothing": widened(),
    "head": widened("lm_head"),
    "embedding": widened("embed_tokens"),
    "head and embedding": widened("lm_head", "embed_tokens"),
    "final norm": widened("model.norm"),
    "all norms": widened("norm"),
    "norms, head and embedding": widened("norm", "lm_head", "embed_tokens"),
    "a projection": widened("q_proj", "up_proj"),
    "head in the other dtype": widened("lm_head", dtype=FLOAT16),
}


@pytest.mark.parametrize("dtypes", [(BFLOAT16, BFLOAT16), (FLOAT16, BFLOAT16), (FLOAT16, FLOAT16), (FLOAT32, BFLOAT16)])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
@pytest.mark.parametrize("mixture", MIXTURES)
def test_mixtures_under_autocast(mixture: str, family: str, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    """Norms promote or do not, heads have norms, scores and logits have a cap; all weights are trained."""
    weights, autocast = dtypes
    model = tiny.model(family, weights, **tiny.FAMILIES[family].limits)
    MIXTURES[mixture](model)
    share = 0.1 if BFLOAT16 in dtypes else 0.02
    assert_as_untouched(model, "reference", torch.autocast("cpu", autocast), share)


@on_a_cpu
@pytest.mark.parametrize("mixture", ["head", "norms, head and embedding", "a projection"])
def test_mixtures_on_the_fast_kernels(mixture: str) -> None:
    """Both backends pass the same checks; the kernels run on what they are given."""
    model = tiny.model("qwen3", BFLOAT16, num_hidden_layers=1)
    MIXTURES[mixture](model)
    assert_as_untouched(model, "fast", torch.autocast("cpu", BFLOAT16), 0.2, ("packed",))  # the interpreter truncates


def test_what_autocast_does_not_touch() -> None:
    """Without autocast a float32 norm before a float32 head is exact; autocast leaves float64 as it is."""
    model = tiny.model(dtype=BFLOAT16)
    widened("model.norm", "lm_head")(model)
    assert_as_untouched(model, "reference", nullcontext(), 0.1)
    with tiny.KeepFloat64():
        model = tiny.model(dtype=torch.float64)
        with torch.autocast("cpu", BFLOAT16):
            loss = of_hugging_face(model)
            place(model, backends.resolve("reference"))
            assert of_hugging_face(model).item() == pytest.approx(loss.item(), rel=1e-6)


def test_a_head_in_float32_without_autocast() -> None:
    """transformers' own forward refuses it; the loss is that of the hidden states in float32."""
    model = tiny.model(dtype=BFLOAT16)
    widened("lm_head")(model)
    batch = batches()["padded"]
    hidden = model.model(batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    expected = cross_entropy(model.lm_head(hidden.float())[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    add_loss(model, backends.resolve("reference"))
    assert model(**batch, backend_loss=True).loss.item() == pytest.approx(expected.item(), rel=1e-5)


def four_bits(folder: Path, dtype: torch.dtype, compute: torch.dtype) -> Any:
    """A model in 4 bits: the dtype of what is not quantised, and that of the products."""
    pytest.importorskip("bitsandbytes")
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute)
    path = tiny.folder(folder, num_hidden_layers=1)
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, quantization_config=config, device_map="cpu")


def adapted(model: Any, **options: Any) -> Any:
    """The model with an adapter of random weights."""
    model = get_peft_model(model, LoraConfig(**LORA | options))
    torch.manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn_like(parameter) / 10)
    return model


@pytest.mark.parametrize("prepared", [False, True], ids=["", "prepared"])
@pytest.mark.parametrize("compute", [BFLOAT16, FLOAT16, FLOAT32], ids=str)
@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT16, FLOAT32], ids=str)
@pytest.mark.parametrize("targets", ["q_proj v_proj", "k_proj up_proj", "gate_proj down_proj", "all-linear"])
def test_four_bits_under_autocast(
    tmp_path: Path, targets: str, dtype: torch.dtype, compute: torch.dtype, prepared: bool
) -> None:
    """Layers in 4 bits return the dtype of their input, adapters that of autocast; some or all layers have adapters.

    float16 that is not prepared goes with float16: under the other autocast transformers' rotary embedding raises.
    """
    model = four_bits(tmp_path, dtype, compute)
    if prepared:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    model = adapted(model, target_modules=targets if targets == "all-linear" else targets.split())
    autocast = FLOAT16 if dtype == FLOAT16 and not prepared else BFLOAT16
    assert_as_untouched(model, "reference", torch.autocast("cpu", autocast), 0.1)


@pytest.mark.parametrize("saved", [["lm_head"], ["embed_tokens"], ["lm_head", "embed_tokens"]], ids=str)
@pytest.mark.parametrize("four", [False, True], ids=["16 bits", "4 bits"])
@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT16], ids=str)
def test_modules_to_save_in_float32(tmp_path: Path, dtype: torch.dtype, four: bool, saved: list[str]) -> None:
    """Those who train the head keep it in float32."""
    model = four_bits(tmp_path, dtype, dtype) if four else tiny.model(dtype=dtype)
    model = adapted(model, target_modules=["q_proj"], modules_to_save=saved)
    widened("modules_to_save")(model)
    assert_as_untouched(model, "reference", torch.autocast("cpu", dtype), 0.1)


@on_a_cpu
def test_the_recipe_on_the_fast_kernels(tmp_path: Path) -> None:
    """The recipe is 4 bits, prepared, with adapters on q_proj and v_proj, in bfloat16."""
    model = prepare_model_for_kbit_training(four_bits(tmp_path, BFLOAT16, BFLOAT16), use_gradient_checkpointing=False)
    model = adapted(model, target_modules=["q_proj", "v_proj"])
    assert_as_untouched(model, "fast", torch.autocast("cpu", BFLOAT16), 0.2, ("packed",))
