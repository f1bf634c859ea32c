"""FastLanguageModel: loading, adapters, checkpointing; what it saves is loaded by transformers and peft alone."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
import transformers
from datasets import Dataset
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments
from trl import SFTConfig

from tests import tiny
from tests.runs import arguments
from unsloth_fast import FastLanguageModel, UnslothTrainer, UnslothTrainingArguments, compat
from unsloth_fast.models import checkpointing, loading
from unsloth_fast.models.head import without_adapter

TOKENS = torch.arange(3, 43).reshape(2, 20)
# Where there is a GPU, a model would be loaded onto it.
PLAIN: dict[str, Any] = {"load_in_4bit": False, "backend": "reference", "device_map": "cpu", "dtype": torch.float32}


@pytest.fixture(autouse=True)
def unpatched() -> Iterator[None]:
    yield
    compat.unpatch_trl()


def load(folder: str, **options: Any) -> tuple[Any, Any]:
    return FastLanguageModel.from_pretrained(folder, **PLAIN | options)


def loss_and_gradients(model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss = model(input_ids=TOKENS, labels=TOKENS).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def stepped(model: Any) -> Any:
    """After one step that moves every trained parameter by much."""
    loss_and_gradients(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= parameter.grad.sign() * 0.05
    return model.eval()


def trained_names(model: nn.Module) -> set[str]:
    return {name.removeprefix("base_model.model.") for name, p in model.named_parameters() if p.requires_grad}


def test_a_model_is_loaded_placed_and_ready_for_training(tmp_path: Path) -> None:
    """The weights of the folder, the backend under them, and TRL patched."""
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


def test_by_default_it_is_as_long_as_the_model(tmp_path: Path) -> None:
    model, tokenizer = load(tiny.folder(tmp_path))
    assert model.max_seq_length == 64
    assert tokenizer.model_max_length > 10**9  # the folder says nothing


@pytest.mark.parametrize(
    ("asked", "sixteen", "expected"),
    [(True, False, True), (None, False, True), (False, False, False), (None, True, False)],
)
def test_4_bits(tmp_path: Path, asked: bool | None, sixteen: bool, expected: bool) -> None:
    """Linear layers in NF4 with nested scales, but for the head; None is True where bitsandbytes is installed."""
    model, _ = load(tiny.folder(tmp_path), load_in_4bit=asked, load_in_16bit=sixteen)
    layers = [module for module in model.modules() if isinstance(module, bitsandbytes.nn.Linear4bit)]
    assert len(layers) == (14 if expected else 0)
    assert type(model.lm_head) is nn.Linear
    for layer in layers:
        state = layer.weight.quant_state
        assert (state.quant_type, state.nested, layer.compute_dtype) == ("nf4", True, torch.float32)


def test_without_bitsandbytes_4_bits_are_refused_or_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "find_spec", lambda name: None)
    config = transformers.LlamaConfig()
    assert not loading.wants_4bit(None, False, False, config)
    with pytest.raises(RuntimeError, match="bitsandbytes is not installed"):
        loading.wants_4bit(True, False, False, config)


def test_a_model_that_is_stored_in_4_bits_is_not_in_16() -> None:
    config = transformers.LlamaConfig(quantization_config={"load_in_4bit": True})
    assert not loading.wants_4bit(True, False, False, config)
    with pytest.raises(ValueError, match="load_in_16bit: got True and a quantised model"):
        loading.wants_4bit(None, True, False, config)


def test_a_cap_on_the_scores_is_kept(tmp_path: Path) -> None:
    """Transformers' sdpa has none, and before 5.23 Gemma 2 took it all the same."""
    model, _ = load(tiny.folder(tmp_path, "gemma2"))
    assert model.config.attn_logit_softcapping and model.config._attn_implementation == "eager"


def test_full_finetuning_trains_every_weight_as_it_is(tmp_path: Path) -> None:
    model, _ = load(tiny.folder(tmp_path), load_in_4bit=None, full_finetuning=True)
    assert all(parameter.requires_grad and parameter.is_floating_point() for parameter in model.parameters())
    _, gradients = loss_and_gradients(model)
    assert gradients.keys() == dict(model.named_parameters()).keys()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"max_seq_length": 65}, ValueError, "max_seq_length: got 65; allowed: 1 to 64"),
        ({"max_seq_length": 0}, ValueError, "max_seq_length: got 0"),
        ({"load_in_4bit": True, "full_finetuning": True}, ValueError, "full_finetuning: got True and load_in_4bit"),
        ({"dtype": torch.int8}, ValueError, "dtype: got torch.int8"),
        ({"backend": "slow"}, ValueError, "backend: got 'slow'"),
        ({"load_in_4bit": True, "load_in_16bit": True}, ValueError, "load_in_16bit: got True and load_in_4bit"),
        ({"load_in_8bit": True}, ValueError, "load_in_8bit: got True; allowed: False, None, as there is no such"),
        (
            {"offload_embedding": True},
            ValueError,
            "offload_embedding: got True; allowed: False, None, 'auto', as there",
        ),
        ({"qat_scheme": "int4"}, ValueError, "qat_scheme: got 'int4'; allowed: None, as there is no such feature"),
        ({"rope_scaling": {"factor": 2}}, ValueError, "rope_scaling: got .*; allowed: None, as rope_parameters is its"),
        ({"max_sequence_length": 32}, TypeError, "from_pretrained: got keyword 'max_sequence_length'"),
    ],
)
def test_wrong_loading_is_refused(tmp_path: Path, options: dict[str, Any], error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        load(tiny.folder(tmp_path), **options)


def test_fields_of_the_config_are_taken(tmp_path: Path) -> None:
    model, _ = load(tiny.folder(tmp_path), max_position_embeddings=128, max_seq_length=100)
    assert model.config.max_position_embeddings == 128


# What Unsloth's own parameters are by default, but for those that are parameters here.
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
}


def test_code_for_unsloth_loads(tmp_path: Path) -> None:
    """Four arguments by position, and all keywords that ask for nothing; they leave the config as it is."""
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
def test_the_dtype_is_the_best_that_the_card_has(
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
    ("words", "rows", "expected"),
    [(("<unk>", "[PAD]"), 3, "[PAD]"), (("<unk>",), 2, "<unk>"), ((), 1, "<eos>"), ((), 8, "<pad>")],
)
def test_a_missing_pad_token_is_chosen_and_said(
    caplog: pytest.LogCaptureFixture, words: tuple[str, ...], rows: int, expected: str
) -> None:
    """One that is there, else one that fits into the embedding, else the end of a text."""
    vocabulary = {word: index for index, word in enumerate(("<eos>", *words))}
    unknown = {"unk_token": "<unk>"} if "<unk>" in words else {}
    words_only = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tiny.Tokenizer(tiny.models.WordLevel(vocabulary, **unknown)), eos_token="<eos>", **unknown
    )
    model = tiny.model()
    model.set_input_embeddings(nn.Embedding(rows, 32))
    loading.prepare_tokenizer(words_only, model, None)
    assert words_only.pad_token == expected
    assert words_only.pad_token_id < rows
    assert f"it has no pad token; {expected!r} is taken" in caplog.text


def test_an_adapter_goes_on_the_seven_linear_layers(tmp_path: Path) -> None:
    """Nothing else trains; the seed decides the weights, and leaves the global generator alone."""
    folder = tiny.folder(tmp_path)
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    models = [FastLanguageModel.get_peft_model(load(folder)[0], random_state=seed) for seed in (1, 1, 2)]
    assert torch.equal(torch.rand(1), expected)
    names = trained_names(models[0])
    assert len(names) == 2 * 7 * 2
    assert {name.split(".")[4] for name in names} == {
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    }
    weights = [dict(model.named_parameters())[f"base_model.model.{min(names)}"] for model in models]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    assert weights[0].shape[0] == 16 and models[0].training and not models[0].config.use_cache
    assert models[0].max_seq_length == 64


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gemma3"])
def test_embeddings_among_the_targets_are_trained_in_full_and_stay_tied(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, family: str, tied: bool
) -> None:
    """And what is saved loads in plain peft, and merges: to float64's rounding."""
    caplog.set_level(logging.INFO)
    folder = tiny.folder(tmp_path / "base", family, torch.float64, tie_word_embeddings=tied)
    names = ["q_proj", "down_proj", "embed_tokens", "lm_head"]
    model, _ = load(folder, dtype=torch.float64)
    options = {"target_modules": names, "use_gradient_checkpointing": False}
    model = FastLanguageModel.get_peft_model(model.double(), **options)  # buffers too
    assert "embed_tokens, lm_head: trained in full" in caplog.text
    whole = {name for name in trained_names(model) if "lora" not in name}
    head = set() if tied else {"lm_head.modules_to_save.default.weight"}
    assert whole == {"model.embed_tokens.modules_to_save.default.weight"} | head
    with tiny.KeepFloat64():
        logits = stepped(model)(TOKENS).logits
        model.save_pretrained(tmp_path / "adapter")
        same = {"dtype": torch.float64, "attn_implementation": model.config._attn_implementation}
        base = AutoModelForCausalLM.from_pretrained(folder, **same).double()
        before = base(TOKENS).logits
        loaded = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
        assert (logits - before).abs().max() > 1e-2
        torch.testing.assert_close(loaded(TOKENS).logits, logits, rtol=1e-12, atol=1e-13)
        merged = loaded.merge_and_unload()
        torch.testing.assert_close(merged(TOKENS).logits, logits, rtol=1e-12, atol=1e-13)
        own = model.merge_and_unload()
        torch.testing.assert_close(own(TOKENS).logits, logits, rtol=1e-12, atol=1e-13)
    if tied:
        assert merged.lm_head.weight is merged.get_input_embeddings().weight


@pytest.mark.parametrize("tied", [False, True])
def test_what_is_trained_on_4_bits_and_float16_is_float32(tmp_path: Path, tied: bool) -> None:
    """Else loss scaling refuses its gradients. The model runs under autocast and without."""
    folder = tiny.folder(tmp_path, tie_word_embeddings=tied)
    model, _ = load(folder, load_in_4bit=True, dtype=torch.float16)
    model = FastLanguageModel.get_peft_model(model, modules_to_save=["embed_tokens", "lm_head"])
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    with torch.autocast("cpu", torch.float16):
        _, gradients = loss_and_gradients(model)
    assert gradients.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    assert FastLanguageModel.for_inference(model)(TOKENS).logits.isfinite().all()


def test_float16_that_is_trained_as_it_is_is_said(caplog: pytest.LogCaptureFixture) -> None:
    FastLanguageModel.get_peft_model(tiny.model(dtype=torch.float16), modules_to_save=["lm_head"])
    assert "allowed: dtype=torch.float32; base_model.model.lm_head.modules_to_save" in caplog.text


def test_an_adapter_is_loaded_with_its_base_and_can_be_trained_on(tmp_path: Path) -> None:
    folder = tiny.folder(tmp_path / "base")
    model = stepped(FastLanguageModel.get_peft_model(load(folder)[0], modules_to_save=["lm_head"]))
    model.save_pretrained(tmp_path / "adapter")
    loaded, tokenizer = load(str(tmp_path / "adapter"))
    assert torch.equal(loaded.eval()(TOKENS).logits, model(TOKENS).logits)
    assert trained_names(loaded) == trained_names(model)
    assert "forward" in vars(loaded.get_base_model().model.layers[0].self_attn)
    assert tokenizer.get_vocab() == AutoTokenizer.from_pretrained(folder).get_vocab()


def test_an_adapter_on_4_bits_is_the_same_when_loaded_here_and_in_plain_peft(tmp_path: Path) -> None:
    """To float32's rounding, in training mode: in evaluation mode bitsandbytes may repack the weights on a CPU."""
    folder = tiny.folder(tmp_path / "base")
    model, _ = load(folder, load_in_4bit=True)
    before, quantization = model(TOKENS).logits, model.config.quantization_config
    model = stepped(FastLanguageModel.get_peft_model(model)).train()
    model.save_pretrained(tmp_path / "adapter")
    options = {"quantization_config": quantization, "dtype": torch.float32, "device_map": "cpu"}
    plain = AutoModelForCausalLM.from_pretrained(folder, **options)
    plain = PeftModel.from_pretrained(plain, str(tmp_path / "adapter"))
    own, _ = load(str(tmp_path / "adapter"), load_in_4bit=True)
    logits = model(TOKENS).logits
    assert (logits - before).abs().max() > 1e-2
    for loaded in (plain, own):
        torch.testing.assert_close(loaded.train()(TOKENS).logits, logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"r": 0}, ValueError, "r: got 0"),
        ({"lora_dropout": 1.0}, ValueError, "lora_dropout: got 1.0"),
        ({"bias": "some"}, ValueError, "bias: got 'some'"),
        ({"use_gradient_checkpointing": "yes"}, ValueError, "use_gradient_checkpointing: got 'yes'"),
        ({"target_modules": ["q_proj", "c_attn"]}, ValueError, r"target_modules: got 'c_attn'; allowed: .*q_proj"),
        ({"target_modules": ["lm_head"]}, ValueError, r"target_modules: got \['lm_head'\] alone; allowed: .*q_proj"),
        ({"modules_to_save": ["score"]}, ValueError, "modules_to_save: got 'score'"),
        ({"max_seq_length": 100}, ValueError, "max_seq_length: got 100; allowed: 1 to 64"),
        ({"qat_scheme": "int4"}, ValueError, "qat_scheme: got 'int4'; allowed: None"),
        ({"rank": 8}, TypeError, "get_peft_model: got keyword 'rank'"),
        ({"peft_type": "PREFIX_TUNING"}, TypeError, "get_peft_model: got keyword 'peft_type'"),
    ],
)
def test_wrong_adapters_are_refused(options: dict[str, Any], error: type, message: str) -> None:
    model = tiny.model()
    before = [name for name, _ in model.named_modules()]
    with pytest.raises(error, match=message):
        FastLanguageModel.get_peft_model(model, **options)
    assert [name for name, _ in model.named_modules()] == before


def test_unsloths_parameters_of_adapters_are_taken_in_its_order(tmp_path: Path) -> None:
    rest = (0.0, "none", None, None, "unsloth", 3407, 64, False, None, True, {}, str(tmp_path / "temporary"), None)
    model = FastLanguageModel.get_peft_model(tiny.model(), 8, ["q_proj"], 16, *rest)
    assert {parameter.shape[0] for name, parameter in model.named_parameters() if "lora_A" in name} == {8}
    assert not list(tmp_path.iterdir())


def test_a_second_adapter_is_refused() -> None:
    model = FastLanguageModel.get_peft_model(tiny.model())
    with pytest.raises(ValueError, match=r"model: got one with the adapter \['default'\]"):
        FastLanguageModel.get_peft_model(model)


def layers_of(model: Any) -> Any:
    return without_adapter(model).model.layers


@pytest.mark.parametrize("how", [True, "unsloth"])
@pytest.mark.parametrize("load_in_4bit", [False, True])
def test_gradient_checkpointing_changes_no_bit(tmp_path: Path, how: bool | str, load_in_4bit: bool) -> None:
    """Of the loss and the gradients, with embeddings trained and without."""
    folder = tiny.folder(tmp_path)
    for saved in (None, ["embed_tokens", "lm_head"]):
        results = []
        for checkpointed in (False, how):
            model, _ = load(folder, load_in_4bit=load_in_4bit)
            options = {"modules_to_save": saved, "use_gradient_checkpointing": checkpointed}
            model = FastLanguageModel.get_peft_model(model, **options)
            assert all(layer.gradient_checkpointing == bool(checkpointed) for layer in layers_of(model))
            results.append(loss_and_gradients(model))
        (loss, gradients), (expected_loss, expected) = results
        assert torch.equal(loss, expected_loss) and gradients.keys() == expected.keys()
        assert all(torch.equal(gradient, expected[name]) for name, gradient in gradients.items())


def test_offloading_keeps_the_inputs_of_the_layers_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """One tensor a layer goes to the host, and comes back; also after the trainer enables checkpointing again."""
    sent: list[tuple[int, ...]] = []
    fetched: list[tuple[int, ...]] = []

    def to_host(tensor: Tensor) -> Tensor:
        sent.append(tuple(tensor.shape))
        return tensor.clone()

    def from_host(packed: Tensor) -> Tensor:
        fetched.append(tuple(packed.shape))
        return packed

    monkeypatch.setattr(checkpointing, "to_host", to_host)
    monkeypatch.setattr(checkpointing, "from_host", from_host)
    model = FastLanguageModel.get_peft_model(tiny.model(), use_gradient_checkpointing="unsloth")
    loss, gradients = loss_and_gradients(model)
    assert sent == fetched == [(2, 20, 32)] * 2
    model.gradient_checkpointing_enable({"use_reentrant": False})
    again, gradients_again = loss_and_gradients(model)
    assert len(sent) == 4 and torch.equal(again, loss)
    assert all(torch.equal(gradient, gradients[name]) for name, gradient in gradients_again.items())
    FastLanguageModel.for_training(model, use_gradient_checkpointing=True)
    loss_and_gradients(model)
    assert len(sent) == 4


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_offloading_on_a_gpu_changes_no_bit_and_saves_the_inputs() -> None:
    """Sixteen layers: what they keep for the backward pass is not on the card."""
    model = tiny.model(num_hidden_layers=16, hidden_size=256).cuda()
    tokens = torch.randint(3, 48, (1, 4096), device="cuda")
    results, kept = [], []
    for how in (True, "unsloth"):
        FastLanguageModel.for_training(model, use_gradient_checkpointing=how)
        model.zero_grad()
        hidden = model.model(tokens).last_hidden_state
        torch.cuda.synchronize()
        kept.append(torch.cuda.memory_allocated())
        hidden.square().sum().backward()
        results.append([p.grad.clone() for p in model.model.parameters()])
        del hidden
    assert all(map(torch.equal, *results))
    assert kept[0] - kept[1] > 14 * 4096 * 256 * 4 - len(results[0]) * 2**20


def test_inference_and_training_are_turned_to_and_back(tmp_path: Path) -> None:
    """Twice is as once; the checkpointing of before comes back; generation gives the tokens of the plain model."""
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


@pytest.mark.parametrize(
    ("asked", "kind", "said", "expected"),
    [
        (False, UnslothTrainingArguments, {}, False),
        (True, UnslothTrainingArguments, {}, True),
        ("unsloth", UnslothTrainingArguments, {}, True),
        (None, UnslothTrainingArguments, {}, True),
        (False, UnslothTrainingArguments, {"gradient_checkpointing": True}, True),
        ("unsloth", UnslothTrainingArguments, {"gradient_checkpointing": False}, False),
        ("unsloth", UnslothTrainingArguments, {"activation_checkpointing": False}, False),
        (None, UnslothTrainingArguments, {"gradient_checkpointing": False}, False),
        (False, SFTConfig, {}, False),
        (None, SFTConfig, {}, True),
        ("unsloth", SFTConfig, {"gradient_checkpointing": False}, False),
        ("unsloth", TrainingArguments, {}, True),
        (False, TrainingArguments, {"gradient_checkpointing": True}, True),
        (None, TrainingArguments, {}, False),
    ],
)
@pytest.mark.parametrize("adapted", [False, True])
def test_checkpointing_is_as_the_arguments_say_or_else_the_model(
    tmp_path: Path, asked: bool | str | None, kind: type, said: dict[str, bool], expected: bool, adapted: bool
) -> None:
    """Where training has begun; the user's arguments stay as they are."""
    if "activation_checkpointing" in said and not hasattr(TrainingArguments, "activation_checkpointing"):
        pytest.skip("an older transformers")
    folder = tiny.folder(tmp_path)
    model, tokenizer = load(folder, **({} if asked is None else {"use_gradient_checkpointing": asked}))
    if adapted and asked is not None:
        model = FastLanguageModel.get_peft_model(model)
    plain = {"use_cpu": True, "bf16": False, "report_to": "none", "save_strategy": "no", "max_steps": 1}
    args = kind(str(tmp_path), **plain | said)
    before = args.to_dict()
    texts = Dataset.from_dict({"text": tiny.texts(4)})
    trainer = UnslothTrainer(model, args, train_dataset=texts, processing_class=tokenizer)
    trainer.train()
    assert {layer.gradient_checkpointing for layer in layers_of(trainer.model)} == {expected}
    assert args.to_dict() == before
    assert ("_set_gradient_checkpointing" in vars(without_adapter(model))) == (asked == "unsloth")


def test_checkpointing_said_to_the_trainer_itself(tmp_path: Path) -> None:
    """As older trainers took their arguments."""
    model, tokenizer = load(tiny.folder(tmp_path))
    args = SFTConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none", save_strategy="no", max_steps=1)
    texts = Dataset.from_dict({"text": tiny.texts(4)})
    options = {"train_dataset": texts, "processing_class": tokenizer, "gradient_checkpointing": False}
    trainer = UnslothTrainer(model, args, **options)
    trainer.train()
    assert not any(layer.gradient_checkpointing for layer in layers_of(trainer.model))


def test_what_is_left_is_named_once_from_loading_to_training(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Though the adapter has a second copy of it trained."""
    caplog.set_level(logging.INFO)
    model, tokenizer = load(tiny.folder(tmp_path, hidden_act="relu"))
    model = FastLanguageModel.get_peft_model(model, target_modules=["q_proj"], modules_to_save=["mlp"])
    texts = Dataset.from_dict({"text": tiny.texts(4)})
    UnslothTrainer(model, arguments(tmp_path), train_dataset=texts, processing_class=tokenizer)
    loaded, trained = (line for line in caplog.messages if "placed under" in line)
    assert loaded.endswith("; left as they are: {'LlamaMLP': 2}")
    assert "'lora_linear': 2" in trained and "left as they are" not in trained
