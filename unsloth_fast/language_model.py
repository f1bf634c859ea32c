"""FastLanguageModel: a Hugging Face model and its tokenizer, ready for training, and LoRA adapters on it.

Loading, quantised storage and adapters are those of transformers, bitsandbytes and peft; what comes out are their
classes, so that what is saved loads without this package.
"""

import logging
import os
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft import get_peft_model as peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from unsloth_fast import backends
from unsloth_fast.models import checkpointing, loading, place
from unsloth_ref import checks

logger = logging.getLogger(__name__)

_LINEAR_NAMES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_CHECKPOINTING = (None, True, False, "unsloth")
_EMBEDDING_NAMES = ("embed_tokens", "lm_head")


class FastLanguageModel:
    """Loads models and puts adapters on them; has no instances."""

    @staticmethod
    def from_pretrained(
        model_name: str,
        max_seq_length: int | None = None,
        dtype: torch.dtype | None = None,
        load_in_4bit: bool | None = None,
        *,
        load_in_16bit: bool = False,
        full_finetuning: bool = False,
        use_gradient_checkpointing: bool | str | None = None,
        backend: str | None = None,
        device_map: Any = None,
        token: str | None = None,
        trust_remote_code: bool = False,
        **kwargs: Any,
    ) -> tuple[Any, Any]:
        """Load a causal language model and its tokenizer, and put the backend's operations under the model.

        Args:
            model_name: the name of a model or of an adapter on the hub, or the path of a folder with one. With an
                adapter its base model is loaded too, and the adapter can be trained on.
            max_seq_length: the most tokens that a text may have; becomes the tokenizer's `model_max_length` and the
                model's `max_seq_length`. None for the model's `max_position_embeddings`, the tokenizer left as it is.
            dtype: of the weights, and with 4 bits of the products. None for bfloat16 on a GPU that has it, float16 on
                any other, float32 on a CPU.
            load_in_4bit: whether to keep the weights of linear layers in 4 bits (bitsandbytes' NF4, nested scales).
                None for True where bitsandbytes is installed, unless load_in_16bit or full_finetuning.
            load_in_16bit: True is load_in_4bit=False: weights that are not quantised, of `dtype`.
            full_finetuning: whether all weights are to be trained, which 4-bit ones cannot be.
            use_gradient_checkpointing: as in `get_peft_model`; None to leave it to that, or to the trainer's arguments.
            backend: "auto", "fast" or "reference", as in `unsloth_fast.backends.resolve`; its name is kept as the
                model's `unsloth_backend`. A trainer puts its own under the model.
            device_map: as transformers takes it; None for this process's GPU (by LOCAL_RANK) where there is one.
            token: for the hub.
            trust_remote_code: whether code from the model's repository may run.
            **kwargs: revision, cache_dir, local_files_only, force_download, subfolder; attn_implementation, max_memory,
                offload_folder, quantization_config, use_safetensors, variant; and fields of the model's config, which
                they replace. Unsloth's further keywords may be there where they ask for nothing, as load_in_8bit=False.

        Returns:
            The model, in training mode, and the tokenizer, which pads on the right and has a pad token.

        Raises:
            TypeError: an unknown keyword.
            ValueError: an unknown backend; max_seq_length beyond the model's positions; a dtype that the GPU does not
                have; 4 bits beside load_in_16bit or full_finetuning; a feature that does not exist here.
            RuntimeError: the fast backend was asked for by name and cannot run here, or 4 bits without bitsandbytes.
        """
        from unsloth_fast.compat import patch_trl  # loads trl

        checks.one_of("use_gradient_checkpointing", use_gradient_checkpointing, _CHECKPOINTING)
        chosen = backends.resolve(backend)
        hub = {name: kwargs.pop(name) for name in loading.HUB_KEYWORDS if name in kwargs}
        hub |= {"token": token, "trust_remote_code": trust_remote_code}
        adapter_base = loading.adapter_base(model_name, hub)
        base_name, base_hub = adapter_base or model_name, hub
        if adapter_base:
            base_hub = {name: value for name, value in hub.items() if name not in ("revision", "subfolder")}
        config = AutoConfig.from_pretrained(base_name, **base_hub)
        kwargs = loading.known_keywords(kwargs, config)
        limit = loading.position_limit(config, kwargs)
        loading.check_length(max_seq_length, limit)
        dtype = loading.supported_dtype(dtype)
        if "quantization_config" not in kwargs and loading.wants_4bit(
            load_in_4bit, load_in_16bit, full_finetuning, config
        ):
            kwargs["quantization_config"] = BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=dtype,
            )
        if getattr(config, "attn_logit_softcapping", None):
            kwargs.setdefault("attn_implementation", "eager")  # before transformers 5.23, sdpa leaves the cap out
        if device_map is None and torch.cuda.is_available():
            device_map = {"": f"cuda:{os.environ.get('LOCAL_RANK', 0)}"}
        kwargs |= base_hub | {"dtype": dtype, "device_map": device_map}
        model: Any = AutoModelForCausalLM.from_pretrained(base_name, **kwargs)
        tokenizer = AutoTokenizer.from_pretrained(loading.tokenizer_name(model_name, base_name, hub), **hub)
        loading.prepare_tokenizer(tokenizer, model, max_seq_length)
        model.max_seq_length = max_seq_length or limit
        model.unsloth_backend = chosen.name
        if adapter_base:
            adapter_hub = {name: value for name, value in hub.items() if name != "trust_remote_code"}
            model = PeftModel.from_pretrained(model, model_name, is_trainable=True, **adapter_hub)
        place(model, chosen)
        patch_trl()
        if use_gradient_checkpointing is None:
            return model.train(), tokenizer
        return FastLanguageModel.for_training(model, use_gradient_checkpointing), tokenizer

    @staticmethod
    def get_peft_model(
        model: Any,
        r: int = 16,
        target_modules: list[str] | str | None = None,
        lora_alpha: float = 16,
        lora_dropout: float = 0.0,
        bias: str = "none",
        layers_to_transform: list[int] | int | None = None,
        layers_pattern: list[str] | str | None = None,
        use_gradient_checkpointing: bool | str | None = None,
        random_state: int = 3407,
        max_seq_length: int | None = None,
        use_rslora: bool = False,
        modules_to_save: list[str] | None = None,
        init_lora_weights: bool | str = True,
        loftq_config: dict[str, Any] | None = None,
        temporary_location: str | None = None,
        qat_scheme: None = None,
        **kwargs: Any,
    ) -> PeftModel:
        """Put a LoRA adapter on a model, whose own weights no longer train; all but the named ones stay as they are.

        Args:
            model: what `from_pretrained` returned, or any other causal language model of transformers; changed in
                place.
            r: the adapter's rank.
            target_modules: the names of linear layers, "all-linear", or a regular expression for whole names; None for
                q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj and down_proj. Where the list names embed_tokens or
                lm_head, those are trained in full, as modules_to_save; if the model ties the two, they stay tied.
            lora_alpha: the adapter is scaled by lora_alpha / r, or with use_rslora by lora_alpha / sqrt(r).
            lora_dropout: the share of the adapter's inputs that is dropped, at least 0 and below 1.
            bias: "none", "all" or "lora_only": the biases that are trained.
            layers_to_transform: the indices of the layers that get the adapter; None for all.
            layers_pattern: the name of the list of layers, where peft does not know it.
            use_gradient_checkpointing: False, True, or "unsloth", with which the layers' inputs wait in pinned host
                memory for the backward pass. None for what was said to `from_pretrained`, or True. A trainer's
                `gradient_checkpointing` wins over this only where it is not the default of its arguments' class.
            random_state: the seed of the adapter's first weights; the global generators stay as they are.
            max_seq_length: replaces the model's `max_seq_length`.
            use_rslora: see lora_alpha.
            modules_to_save: names of further modules that are trained in full.
            init_lora_weights: as in `peft.LoraConfig`.
            loftq_config: as in `peft.LoraConfig`.
            temporary_location: ignored, as nothing is written to disk; code for Unsloth may name a folder.
            qat_scheme: None, as there is no quantisation-aware training.
            **kwargs: further fields of `peft.LoraConfig`.

        Returns:
            The model in `peft.PeftModel`, in training mode.

        Raises:
            TypeError: an unknown keyword.
            ValueError: a value that is not allowed, a name that the model does not have, or a model with an adapter.
        """
        _check_adapter(r, lora_dropout, bias, use_gradient_checkpointing, kwargs)
        checks.one_of("qat_scheme", qat_scheme, (None,))
        if isinstance(model, PeftModel):
            names = list(model.peft_config)
            raise ValueError(
                f"model: got one with the adapter {names}; allowed: one without; it can be trained as it is"
            )
        target_modules, modules_to_save = _trained_modules(model, target_modules, modules_to_save)
        if modules_to_save and _is_tied(model) and not set(modules_to_save).isdisjoint(_EMBEDDING_NAMES):
            kwargs.setdefault("ensure_weight_tying", True)
        length = max_seq_length or getattr(model, "max_seq_length", None)
        loading.check_length(length, loading.position_limit(model.config, {}))
        model.max_seq_length = length
        config = LoraConfig(
            task_type="CAUSAL_LM",
            r=r,
            target_modules=target_modules,
            lora_alpha=lora_alpha,  # type: ignore[arg-type]  # peft says int and divides
            lora_dropout=lora_dropout,
            bias=bias,  # type: ignore[arg-type]  # checked above
            layers_to_transform=layers_to_transform,
            layers_pattern=layers_pattern,
            use_rslora=use_rslora,
            modules_to_save=modules_to_save,
            init_lora_weights=init_lora_weights,  # type: ignore[arg-type]  # peft checks it
            loftq_config=loftq_config or {},
            **kwargs,
        )
        with torch.random.fork_rng():
            torch.manual_seed(random_state)
            adapted: Any = peft_model(model, config)
        _widen_float16(adapted, quantized=getattr(model, "is_loaded_in_4bit", False))
        if use_gradient_checkpointing is None:
            use_gradient_checkpointing = getattr(model, "unsloth_gradient_checkpointing", True)
        return FastLanguageModel.for_training(adapted, use_gradient_checkpointing)

    @staticmethod
    def for_inference(model: Any) -> Any:
        """Turn a model, in place, to generating: evaluation mode, key-value cache, no gradient checkpointing.

        Returns:
            The model.
        """
        base = _base(model)
        checkpointing.enable_checkpointing(base, False)
        base.config.use_cache = True
        return model.eval()

    @staticmethod
    def for_training(model: Any, use_gradient_checkpointing: bool | str | None = None) -> Any:
        """Turn a model, in place, to training: training mode, no key-value cache, gradient checkpointing.

        Args:
            model: the model, with an adapter or without.
            use_gradient_checkpointing: as in `get_peft_model`; None for what was said there, or last here, else False.

        Returns:
            The model.

        Raises:
            ValueError: use_gradient_checkpointing is not one of those allowed.
        """
        base = _base(model)
        if use_gradient_checkpointing is None:
            use_gradient_checkpointing = getattr(base, "unsloth_gradient_checkpointing", False)
        checks.one_of("use_gradient_checkpointing", use_gradient_checkpointing, _CHECKPOINTING[1:])
        base.unsloth_gradient_checkpointing = use_gradient_checkpointing
        (checkpointing.offload if use_gradient_checkpointing == "unsloth" else checkpointing.keep)(base)
        checkpointing.enable_checkpointing(base, bool(use_gradient_checkpointing))
        base.config.use_cache = False
        return model.train()


def _base(model: Any) -> Any:
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _check_adapter(r: int, dropout: float, bias: str, checkpoint: bool | str | None, kwargs: dict[str, Any]) -> None:
    checks.in_range("r", r, 1)
    if not 0 <= dropout < 1:
        raise ValueError(f"lora_dropout: got {dropout!r}; allowed: at least 0 and below 1")
    checks.one_of("bias", bias, ("none", "all", "lora_only"))
    checks.one_of("use_gradient_checkpointing", checkpoint, _CHECKPOINTING)
    for name in kwargs:
        if name not in LoraConfig.__dataclass_fields__ or name in ("peft_type", "task_type"):
            raise TypeError(f"get_peft_model: got keyword {name!r}; allowed: its own and the fields of peft.LoraConfig")


def _trained_modules(
    model: nn.Module, targets: list[str] | str | None, saved: list[str] | None
) -> tuple[list[str] | str, list[str] | None]:
    """What LoRA is put on and what is trained in full; raises ValueError for names that the model does not have."""
    modules = dict(model.named_modules())
    linear = sorted({name.rpartition(".")[2] for name, module in modules.items() if isinstance(module, nn.Linear)})
    for name in saved or []:
        if not any(path.endswith(name) for path in modules):  # as peft looks for them
            raise ValueError(
                f"modules_to_save: got {name!r}; allowed: {', '.join(linear)}, embed_tokens, norm and so on"
            )
    if targets is None:
        targets = [name for name in _LINEAR_NAMES if name in linear]
        if not targets:
            raise ValueError(f"target_modules: got None, and there is none of {_LINEAR_NAMES}; allowed: {linear}")
    if isinstance(targets, str):
        return targets, saved
    for name in targets:
        if not any(path == name or path.endswith(f".{name}") for path in modules):
            raise ValueError(
                f"target_modules: got {name!r}; allowed: {', '.join(linear)}, embed_tokens, or 'all-linear'"
            )
    whole = [name for name in targets if name in _EMBEDDING_NAMES]
    if whole:
        logger.info("target_modules: %s: trained in full, as modules_to_save, not through LoRA", ", ".join(whole))
    targets = [name for name in targets if name not in whole]
    if not targets:
        raise ValueError(f"target_modules: got {whole} alone; allowed: at least one of {', '.join(linear)} beside them")
    return targets, list(dict.fromkeys([*(saved or []), *whole])) or None


def _widen_float16(model: nn.Module, quantized: bool) -> None:
    """Make float16 weights that are trained float32, or say that they are not: loss scaling refuses their gradients.

    4-bit layers take inputs of any dtype; float16 ones take no float32 from a wider embedding, but under autocast.
    """
    half = [name for name, p in model.named_parameters() if p.requires_grad and p.dtype == torch.float16]
    if half and not quantized:
        logger.warning("float16 is trained, which fp16=True refuses; allowed: dtype=torch.float32; %s", ", ".join(half))
    elif half:
        logger.info("trained in float32, not float16, as loss scaling demands: %s", ", ".join(half))
        for name in half:
            parameter = model.get_parameter(name)
            parameter.data = parameter.data.float()


def _is_tied(model: Any) -> bool:
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight
