"""FastLanguageModel: loading, preparing for training and inference, and refused arguments."""

import logging
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
import transformers
from datasets import Dataset
from torch import nn
from transformers import AutoModelForCausalLM

from tests import tiny
from tests.models.adapted import PLAIN, TOKENS, layers_of, load, loss_and_gradients
from tests.trainer.runs import arguments
from unsloth_fast import FastLanguageModel, UnslothTrainer, compat
from unsloth_fast.models import loading, quantization
from unsloth_fast.models.tokenizers import prepare_tokenizer


def test_a_model_is_loaded_with_the_backend_and_ready_for_training(tmp_path: Path) -> None:
    """Weights and logits are the folder's; the backend is placed, and TRL is patched."""
    folder = tiny.folder(tmp_path)
    model, tokenizer = load(folder, max_seq_length=32)
    assert type(model) is transformers.LlamaForCausalLM and model.training
    plain = AutoModelForCausalLM.from_pretrained(folder)
    assert all(torch.equal(plain.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
    assert torch.equal(model(TOKENS).logits, plain(TOKENS).logits)
    assert "forward" in vars(model.model.layers[0].self_attn)
    assert (model.dtype, model.max_seq_length, model.unsloth_backend) == (torch.float32, 32, "reference")
    assert (tokenizer.model_max_length, tokenizer.padding_side, tokenizer.pad_token) == (32, "right", "<pad>")
    assert compat.is_patched()


def test_the_default_length_is_the_models(tmp_path: Path) -> None:
    model, tokenizer = load(tiny.folder(tmp_path))
    assert model.max_seq_length == 64
    assert tokenizer.model_max_length > 10**9  # the folder sets no length


@pytest.mark.parametrize(
    ("asked", "sixteen", "expected"),
    [(True, False, True), (None, False, True), (False, False, False), (None, True, False)],
)
def test_4_bits(tmp_path: Path, asked: bool | None, sixteen: bool, expected: bool) -> None:
    """Linear layers except the head are NF4 with nested scales; None means True if bitsandbytes is installed."""
    model, _ = load(tiny.folder(tmp_path), load_in_4bit=asked, load_in_16bit=sixteen)
    layers = [module for module in model.modules() if isinstance(module, bitsandbytes.nn.Linear4bit)]
    assert len(layers) == (14 if expected else 0)
    assert type(model.lm_head) is nn.Linear
    for layer in layers:
        state = layer.weight.quant_state
        assert (state.quant_type, state.nested, layer.compute_dtype) == ("nf4", True, torch.float32)


def test_without_bitsandbytes_4_bits_are_refused_or_not_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantization, "find_spec", lambda name: None)
    config = transformers.LlamaConfig()
    assert quantization.wanted_bits(None, None, False, False, config) is None
    for four, eight in ((True, None), (None, True)):
        with pytest.raises(RuntimeError, match="bitsandbytes is not installed"):
            quantization.wanted_bits(four, eight, False, False, config)


def test_a_model_stored_in_4_bits_is_not_loaded_in_16() -> None:
    config = transformers.LlamaConfig(quantization_config={"load_in_4bit": True})
    assert quantization.wanted_bits(True, None, False, False, config) is None
    with pytest.raises(ValueError, match="load_in_16bit: got True and a quantised model"):
        quantization.wanted_bits(None, None, True, False, config)
    with pytest.raises(ValueError, match="load_in_8bit: got True and a model that is stored quantised otherwise"):
        quantization.wanted_bits(None, True, False, False, config)


def test_a_cap_on_the_scores_is_applied(tmp_path: Path) -> None:
    """The sdpa of transformers ignores it, and before 5.23 Gemma 2 used sdpa by default."""
    model, _ = load(tiny.folder(tmp_path, "gemma2"))
    assert model.config.attn_logit_softcapping and model.config._attn_implementation == "packed_eager"


def test_full_finetuning_trains_every_weight_unquantised(tmp_path: Path) -> None:
    model, _ = load(tiny.folder(tmp_path), load_in_4bit=None, full_finetuning=True)
    assert all(parameter.requires_grad and parameter.is_floating_point() for parameter in model.parameters())
    _, gradients = loss_and_gradients(model)
    assert gradients.keys() == dict(model.named_parameters()).keys()


def test_full_finetuning_leaves_an_adapter_nothing_to_do(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """One line says so, and all weights stay trained; the gradients are those of the model as it was loaded."""
    model, _ = load(tiny.folder(tmp_path / "base"), full_finetuning=True)
    expected = loss_and_gradients(model)
    caplog.clear()
    same = FastLanguageModel.get_peft_model(model, r=4, target_modules=["q_proj"], max_seq_length=32)
    (line,) = caplog.messages
    assert line.startswith("full_finetuning: got True in from_pretrained, so get_peft_model has no effect")
    assert same is model and model.max_seq_length == 32 and model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    torch.testing.assert_close(loss_and_gradients(model), expected)
    with pytest.raises(ValueError, match="r: got 0"):
        FastLanguageModel.get_peft_model(model, r=0)
    other, _ = load(tiny.folder(tmp_path / "base"))
    FastLanguageModel.get_peft_model(other, r=4).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"full_finetuning: got True and model_name=.*, an adapter, whose base model"):
        load(str(tmp_path / "adapter"), full_finetuning=True)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"max_seq_length": 0}, ValueError, "max_seq_length: got 0"),
        ({"max_seq_length": "32"}, ValueError, "max_seq_length: got '32'; allowed: a whole number from 1"),
        ({"max_seq_length": 32.0}, ValueError, "max_seq_length: got 32.0; allowed: a whole number from 1"),
        ({"resize_model_vocab": 50.0}, ValueError, "resize_model_vocab: got 50.0; allowed: a whole number from 1"),
        ({"load_in_4bit": "False"}, ValueError, "load_in_4bit: got 'False'; allowed: True, False, None"),
        (
            {"quantization_config": {"load_in_4bit": True}, "full_finetuning": True},
            ValueError,
            "full_finetuning: got True and a quantization_config; allowed: one of the two",
        ),
        ({"load_in_4bit": True, "full_finetuning": True}, ValueError, "full_finetuning: got True and load_in_4bit"),
        ({"dtype": torch.int8}, ValueError, "dtype: got torch.int8"),
        ({"backend": "slow"}, ValueError, "backend: got 'slow'"),
        ({"load_in_4bit": True, "load_in_16bit": True}, ValueError, "load_in_16bit: got True and load_in_4bit"),
        ({"load_in_8bit": True, "load_in_4bit": True}, ValueError, "load_in_8bit: got True and load_in_4bit=True"),
        ({"load_in_8bit": True, "load_in_16bit": True}, ValueError, "load_in_16bit: got True and load_in_8bit=True"),
        ({"load_in_8bit": True, "full_finetuning": True}, ValueError, "full_finetuning: got True and load_in_8bit"),
        ({"dtype": "bfloat17"}, ValueError, "dtype: got 'bfloat17'; allowed: None, torch.bfloat16"),
        ({"fast_inference": True}, ValueError, "fast_inference: got True; allowed: False, None, as vLLM is not used"),
        ({"load_in_fp8": "row"}, ValueError, "load_in_fp8: got 'row'; allowed: True, False, None, 'block'"),
        ({"load_in_fp8": True, "load_in_4bit": True}, ValueError, "load_in_fp8: got True and load_in_4bit=True"),
        ({"load_in_fp8": "block", "full_finetuning": True}, ValueError, "load_in_fp8: got 'block' and full_finetuning"),
        (
            {"load_in_fp8": True, "device_map": "auto"},
            ValueError,
            "device_map: got 'auto' with load_in_fp8=True; allowed: one device",
        ),
        (
            {"qat_scheme": "int4"},
            ValueError,
            "qat_scheme: got 'int4'; allowed: None, as there is no quant",
        ),
        ({"whisper_task": "transcribe"}, ValueError, "whisper_task: got 'transcribe'; allowed: None, as speech is not"),
        ({"rope_scaling": {"factor": 2}}, ValueError, "rope_scaling: got .*; allowed: None, as its name here is rope"),
        ({"max_sequence_length": 32}, TypeError, "from_pretrained: got keyword 'max_sequence_length'"),
    ],
)
def test_invalid_arguments_are_refused(tmp_path: Path, options: dict[str, Any], error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        load(tiny.folder(tmp_path), **options)


def test_a_model_needs_a_name() -> None:
    with pytest.raises(ValueError, match="model_name: got None; allowed: a name on the hub, or the path"):
        FastLanguageModel.from_pretrained(None)  # type: ignore[arg-type]


def test_fields_of_the_config_are_accepted(tmp_path: Path) -> None:
    model, _ = load(tiny.folder(tmp_path), max_position_embeddings=128, max_seq_length=100)
    assert model.config.max_position_embeddings == 128


# The defaults of Unsloth's own parameters, except for those that are parameters here.
UNSLOTH_DEFAULTS = {
    "load_in_8bit": False,
    "device_map_planner_kwargs": None,
    "rope_scaling": None,
    "fix_tokenizer": True,
    "resize_model_vocab": None,
    "revision": None,
    "use_exact_model_name": False,
    "offload_embedding": "auto",
    "float32_mixed_precision": None,
    "fast_inference": False,
    "gpu_memory_utilization": 0.5,
    "float8_kv_cache": False,
    "random_state": 3407,
    "max_lora_rank": 64,
    "disable_log_stats": True,
    "qat_scheme": None,
    "load_in_fp8": False,
    "unsloth_tiled_mlp": False,
    "unsloth_vllm_standby": False,
    "text_only": False,
    "return_logits": False,
    "fullgraph": True,
    "auto_model": None,
    "whisper_language": None,
    "whisper_task": None,
    "unsloth_force_compile": False,
}


def test_code_for_unsloth_loads(tmp_path: Path) -> None:
    """Four positional arguments are taken, and all keywords that ask for nothing, which do not change the config."""
    folder = tiny.folder(tmp_path)
    options = {name: PLAIN[name] for name in ("backend", "device_map")} | UNSLOTH_DEFAULTS
    model, _ = FastLanguageModel.from_pretrained(folder, 32, torch.float64, False, **options)
    assert (model.max_seq_length, model.dtype, type(model.model.layers[0].mlp.up_proj)) == (
        32,
        torch.float64,
        nn.Linear,
    )
    plain, _ = load(folder, dtype=torch.float64)
    assert model.config.to_dict() == plain.config.to_dict()


def test_the_dtype_on_a_cpu_is_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert loading.supported_dtype(None) is torch.float32
    assert loading.supported_dtype(torch.bfloat16) is torch.bfloat16


@pytest.mark.parametrize(("has", "expected"), [(True, torch.bfloat16), (False, torch.float16)])
def test_the_default_dtype_is_the_best_that_the_gpu_supports(
    monkeypatch: pytest.MonkeyPatch, has: bool, expected: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    assert loading.supported_dtype(None) is expected
    assert loading.supported_dtype(torch.float32) is torch.float32
    if not has:
        with pytest.raises(ValueError, match=r"dtype: got torch\.bfloat16; .*float16.* Tesla T4 has no bfloat16"):
            loading.supported_dtype(torch.bfloat16)


@pytest.mark.parametrize(
    ("asked", "stored", "expected"),
    [
        ("bfloat16", None, torch.bfloat16),
        ("torch.float16", None, torch.float16),
        ("float32", torch.bfloat16, torch.float32),
        ("auto", torch.bfloat16, torch.bfloat16),
        ("auto", None, torch.float32),
    ],
)
def test_a_dtype_may_be_named(
    monkeypatch: pytest.MonkeyPatch, asked: str, stored: torch.dtype | None, expected: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert loading.supported_dtype(asked, stored) is expected


def test_the_checkpoints_dtype_is_replaced_on_a_gpu_without_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    assert loading.supported_dtype("auto", torch.bfloat16) is torch.float16
    assert "dtype: torch.float16 in place of torch.bfloat16, the checkpoint's, as Tesla T4" in caplog.text


def test_the_dtype_of_the_checkpoint_is_loaded(tmp_path: Path) -> None:
    folder = tiny.folder(tmp_path, dtype=torch.float16)
    assert [load(folder, dtype=name)[0].dtype for name in ("auto", "float32")] == [torch.float16, torch.float32]


def test_what_only_saves_memory_is_accepted_and_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    load(tiny.folder(tmp_path), unsloth_tiled_mlp=True, offload_embedding=True, text_only=True)
    for name in ("unsloth_tiled_mlp", "offload_embedding"):
        assert f"{name}: got True, which saves no memory here; the results are the same" in caplog.text


@pytest.mark.parametrize(
    ("words", "rows", "expected"),
    [(("<unk>", "[PAD]"), 3, "[PAD]"), (("<unk>",), 2, "<unk>"), ((), 1, "<eos>"), ((), 8, "<pad>")],
)
def test_a_missing_pad_token_is_chosen_and_logged(
    caplog: pytest.LogCaptureFixture, words: tuple[str, ...], rows: int, expected: str
) -> None:
    """It is one of the vocabulary, else a new one that fits into the embedding, else the one that ends a text."""
    vocabulary = {word: index for index, word in enumerate(("<eos>", *words))}
    unknown = {"unk_token": "<unk>"} if "<unk>" in words else {}
    words_only = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tiny.Tokenizer(tiny.models.WordLevel(vocabulary, **unknown)), eos_token="<eos>", **unknown
    )
    model = tiny.model()
    model.set_input_embeddings(nn.Embedding(rows, 32))
    prepare_tokenizer(words_only, model, None)
    assert words_only.pad_token == expected
    assert words_only.pad_token_id < rows
    assert f"it has no pad token; using {expected!r}" in caplog.text


def test_a_model_is_switched_between_inference_and_training(tmp_path: Path) -> None:
    """Checkpointing is restored, a second call has no effect, and the plain model generates the same tokens."""
    folder = tiny.folder(tmp_path)
    model = FastLanguageModel.get_peft_model(load(folder)[0], use_gradient_checkpointing="unsloth")
    for _ in range(2):
        assert FastLanguageModel.for_inference(model) is model
        assert not model.training and model.config.use_cache
        assert not any(layer.gradient_checkpointing for layer in layers_of(model))
    plain = AutoModelForCausalLM.from_pretrained(folder)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    prompt = TOKENS[:1, :5]
    assert torch.equal(model.generate(input_ids=prompt, **options), plain.generate(prompt, **options))
    for _ in range(2):
        assert FastLanguageModel.for_training(model) is model
        assert model.training and not model.config.use_cache
        assert all(layer.gradient_checkpointing for layer in layers_of(model))
    assert "_set_gradient_checkpointing" in vars(model.get_base_model())


def test_unchanged_modules_are_logged_once_from_loading_to_training(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """They are logged once even if the adapter trains a second copy of them."""
    caplog.set_level(logging.INFO)
    model, tokenizer = load(tiny.folder(tmp_path, hidden_act="relu"))
    model = FastLanguageModel.get_peft_model(model, target_modules=["q_proj"], modules_to_save=["mlp"])
    texts = Dataset.from_dict({"text": tiny.texts(4)})
    UnslothTrainer(model, arguments(tmp_path), train_dataset=texts, processing_class=tokenizer)
    loaded, trained = (line for line in caplog.messages if "operations placed" in line)
    assert "; modules left unchanged: {'LlamaMLP (differs from every swiglu and geglu by " in loaded
    assert loaded.endswith(" at least)': 2}")
    assert "'lora_linear': 2" in trained and "left unchanged" not in trained
