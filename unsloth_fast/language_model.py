"""FastLanguageModel: a Hugging Face model and its tokenizer, ready for training, and LoRA adapters on it.

transformers loads, bitsandbytes quantises and peft adapts. The results are objects of their classes, so anything they
save can be loaded without this package.
"""

import logging
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from peft import LoraConfig, PeftModel
from peft import get_peft_model as peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from unsloth_fast import backends
from unsloth_fast.models import checkpointing, loading, place
from unsloth_fast.models.auto import accept_bits
from unsloth_fast.models.generation import pad_left, restore_padding
from unsloth_fast.models.head import without_adapter
from unsloth_fast.save import add_methods
from unsloth_ref import checks

logger = logging.getLogger(__name__)

Model = TypeVar("Model", bound=nn.Module)

_LINEAR_NAMES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_CHECKPOINTING = (None, True, False, "unsloth")
_EMBEDDING_NAMES = ("embed_tokens", "lm_head")


class FastLanguageModel:
    """Loads models and adds adapters to them. It has no instances."""

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
        resize_model_vocab: int | None = None,
        backend: str | None = None,
        device_map: str | int | torch.device | dict[str, int | str | torch.device] | None = None,
        token: str | None = None,
        trust_remote_code: bool = False,
        **kwargs: object,
    ) -> tuple[Any, PreTrainedTokenizerBase]:
        """Load a causal language model and its tokenizer, and place the backend's operations under the model.

        Args:
            model_name: a model or an adapter: its name on the hub, or the path of its folder. With an adapter its base
                model is loaded too, and the adapter's training can be continued.
            max_seq_length: the maximum number of tokens per text. It becomes the tokenizer's `model_max_length` and the
                model's `max_seq_length`. None for the model's `max_position_embeddings`, with the tokenizer unchanged.
            dtype: of the weights, and with 4 bits of the products. None for bfloat16 on a GPU that supports it, float16
                on any other GPU, float32 on a CPU.
            load_in_4bit: whether to store the weights of linear layers in 4 bits (bitsandbytes' NF4, nested scales).
                None for True if bitsandbytes is installed, unless load_in_16bit or full_finetuning is set.
            load_in_16bit: the opposite of load_in_4bit: weights of `dtype`, not quantised.
            full_finetuning: whether all weights will be trained; excludes 4 bits.
            use_gradient_checkpointing: as in `get_peft_model`; None to leave it to that method, or to the trainer's
                arguments.
            resize_model_vocab: the number of tokens to resize the model's embeddings to, before an adapter is loaded.
                None to leave them, or with an adapter for the number that it was trained with.
            backend: "auto", "fast" or "reference", as in `unsloth_fast.backends.resolve`. Its name becomes the model's
                `unsloth_backend`, which a trainer uses unless its arguments name a backend.
            device_map: as in transformers; None for this process's GPU (by LOCAL_RANK) if there is one.
            token: for the hub.
            trust_remote_code: whether code from the model's repository may run.
            **kwargs: revision, cache_dir, local_files_only, force_download, subfolder; attn_implementation, max_memory,
                offload_folder, quantization_config, use_safetensors, variant; and fields of the model's config, whose
                values they replace. Unsloth's other keywords are accepted with values that ask for nothing, such as
                load_in_8bit=False.

        Returns:
            The model, in training mode, and the tokenizer, which pads on the right and has a pad token.

        Raises:
            TypeError: an unknown keyword.
            ValueError: an unknown backend; max_seq_length beyond the model's positions; a dtype that the GPU does not
                support; 4 bits together with load_in_16bit or full_finetuning; a feature that does not exist here.
            RuntimeError: the fast backend was asked for by name and cannot run here, or 4 bits without bitsandbytes.
        """
        from unsloth_fast.compat import patch_trl  # imports trl

        checks.one_of("use_gradient_checkpointing", use_gradient_checkpointing, _CHECKPOINTING)
        chosen = backends.resolve(backend)
        hub = {name: kwargs.pop(name) for name in loading.HUB_KEYWORDS if name in kwargs}
        source = loading.find_source(model_name, hub | {"token": token, "trust_remote_code": trust_remote_code})

        config = AutoConfig.from_pretrained(source.base, **source.base_hub)
        options = loading.known_keywords(kwargs, config)
        limit = loading.position_limit(config, options)
        loading.check_length(max_seq_length, limit)
        options["dtype"] = dtype = loading.supported_dtype(dtype)
        own_quantization = "quantization_config" in options
        if not own_quantization and loading.wants_4bit(load_in_4bit, load_in_16bit, full_finetuning, config):
            options["quantization_config"] = loading.nf4_config(dtype)
        if getattr(config, "attn_logit_softcapping", None):
            options.setdefault("attn_implementation", "eager")  # before transformers 5.23 sdpa ignores the cap
        options["device_map"] = loading.default_device_map() if device_map is None else device_map

        model: Any = AutoModelForCausalLM.from_pretrained(source.base, **options, **source.base_hub)
        tokenizer = AutoTokenizer.from_pretrained(source.find_tokenizer(), **source.hub)
        loading.resize_vocabulary(model, tokenizer, source, resize_model_vocab)
        loading.prepare_tokenizer(tokenizer, model, max_seq_length)
        model.max_seq_length = max_seq_length or limit
        model.unsloth_backend = chosen.name
        model.unsloth_checkpoint_dtype, model.unsloth_tokenizer = config.dtype, tokenizer
        if source.is_adapter:
            model = PeftModel.from_pretrained(model, model_name, is_trainable=True, **source.adapter_hub)
        _add_methods(model)
        place(model, chosen)
        patch_trl()
        accept_bits()
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
        loftq_config: dict[str, object] | None = None,
        temporary_location: str | None = None,
        qat_scheme: None = None,
        **kwargs: object,
    ) -> PeftModel:
        """Add a LoRA adapter to a model and freeze the model's own weights, except for the modules that you name.

        Args:
            model: the result of `from_pretrained`, or any other causal language model of transformers; changed in
                place.
            r: the adapter's rank.
            target_modules: the names of linear layers, "all-linear", or a regular expression for full names; None for
                q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj and down_proj. If the list names embed_tokens or
                lm_head, these are trained in full, as modules_to_save; if the model ties the two, they stay tied.
            lora_alpha: the adapter is scaled by lora_alpha / r, or with use_rslora by lora_alpha / sqrt(r).
            lora_dropout: the probability of dropping an input of the adapter, at least 0 and below 1.
            bias: "none", "all" or "lora_only": which biases are trained.
            layers_to_transform: the indices of the layers that get the adapter; None for all.
            layers_pattern: the name of the list of layers, if peft does not know it.
            use_gradient_checkpointing: False, True, or "unsloth", which keeps the layers' inputs in pinned host memory
                until the backward pass. None for the value given to `from_pretrained`, or else True. A trainer's
                `gradient_checkpointing` overrides this only if it is not the default of its arguments' class.
            random_state: the seed of the adapter's initial weights; the global generators do not change.
            max_seq_length: replaces the model's `max_seq_length`.
            use_rslora: see lora_alpha.
            modules_to_save: names of further modules that are trained in full.
            init_lora_weights: as in `peft.LoraConfig`.
            loftq_config: as in `peft.LoraConfig`.
            temporary_location: ignored, as nothing is written to disk; scripts for Unsloth may pass it.
            qat_scheme: only None, as there is no quantisation-aware training.
            **kwargs: further fields of `peft.LoraConfig`.

        Returns:
            The model in a `peft.PeftModel`, in training mode.

        Raises:
            TypeError: an unknown keyword.
            ValueError: a value that is not allowed, a module that the model does not have, or a model that has an
                adapter already.
        """
        checks.one_of("qat_scheme", qat_scheme, (None,))
        _check_adapter(model, r, lora_dropout, bias, use_gradient_checkpointing, kwargs)
        target_modules, modules_to_save = _trained_modules(model, target_modules, modules_to_save)
        if modules_to_save and _is_tied(model) and not set(modules_to_save).isdisjoint(_EMBEDDING_NAMES):
            kwargs.setdefault("ensure_weight_tying", True)
        length = max_seq_length or getattr(model, "max_seq_length", None)
        loading.check_length(length, loading.position_limit(model.config, {}))
        model.max_seq_length = length
        fields: dict[str, Any] = {
            "r": r,
            "target_modules": target_modules,
            "lora_alpha": lora_alpha,
            "lora_dropout": lora_dropout,
            "bias": bias,
            "layers_to_transform": layers_to_transform,
            "layers_pattern": layers_pattern,
            "use_rslora": use_rslora,
            "modules_to_save": modules_to_save,
            "init_lora_weights": init_lora_weights,
            "loftq_config": loftq_config or {},
        }
        fields.update(kwargs)
        config = LoraConfig(task_type="CAUSAL_LM", **fields)
        with torch.random.fork_rng():
            torch.manual_seed(random_state)
            adapted: Any = peft_model(model, config)
        _add_methods(adapted)
        _widen_float16(adapted, quantized=getattr(model, "is_loaded_in_4bit", False))
        if use_gradient_checkpointing is None:
            use_gradient_checkpointing = getattr(model, "unsloth_gradient_checkpointing", True)
        return FastLanguageModel.for_training(adapted, use_gradient_checkpointing)

    @staticmethod
    def for_inference(model: Model) -> Model:
        """Prepare a model, in place, for generation: evaluation mode, key-value cache, no gradient checkpointing.

        The tokenizer that was loaded with the model pads on the left until `for_training` is called.

        Returns:
            The model.
        """
        base = without_adapter(model)
        checkpointing.enable_checkpointing(base, False)
        base.config.use_cache = True
        pad_left(base)
        return model.eval()

    @staticmethod
    def for_training(model: Model, use_gradient_checkpointing: bool | str | None = None) -> Model:
        """Prepare a model, in place, for training: training mode, no key-value cache, gradient checkpointing.

        Args:
            model: the model, with or without an adapter.
            use_gradient_checkpointing: as in `get_peft_model`; None for the value given there, or in the last call of
                this method, or else False.

        Returns:
            The model.

        Raises:
            ValueError: use_gradient_checkpointing is not one of the values allowed.
        """
        base = without_adapter(model)
        if use_gradient_checkpointing is None:
            use_gradient_checkpointing = getattr(base, "unsloth_gradient_checkpointing", False)
        checks.one_of("use_gradient_checkpointing", use_gradient_checkpointing, _CHECKPOINTING[1:])
        base.unsloth_gradient_checkpointing = use_gradient_checkpointing
        if use_gradient_checkpointing == "unsloth":
            checkpointing.enable_offloading(base)
        else:
            checkpointing.disable_offloading(base)
        checkpointing.enable_checkpointing(base, bool(use_gradient_checkpointing))
        base.config.use_cache = False
        restore_padding(base)
        return model.train()


def _add_methods(model: nn.Module) -> None:
    own = {"for_inference": FastLanguageModel.for_inference, "for_training": FastLanguageModel.for_training}
    add_methods(model, own)


def _check_adapter(
    model: nn.Module,
    r: int,
    dropout: float,
    bias: str,
    use_gradient_checkpointing: bool | str | None,
    kwargs: Mapping[str, object],
) -> None:
    """Raise for an argument of `get_peft_model` that is not allowed."""
    checks.in_range("r", r, 1)
    if not 0 <= dropout < 1:
        raise ValueError(f"lora_dropout: got {dropout!r}; allowed: at least 0 and below 1")
    checks.one_of("bias", bias, ("none", "all", "lora_only"))
    checks.one_of("use_gradient_checkpointing", use_gradient_checkpointing, _CHECKPOINTING)
    for name in kwargs:
        if name not in LoraConfig.__dataclass_fields__ or name in ("peft_type", "task_type"):
            raise TypeError(f"get_peft_model: got keyword {name!r}; allowed: its own and the fields of peft.LoraConfig")
    if isinstance(model, PeftModel):
        raise ValueError(
            f"model: got one with the adapter {list(model.peft_config)}; allowed: a model without an adapter (to train "
            "the one it has, pass the model to the trainer)"
        )


def _trained_modules(
    model: nn.Module, targets: list[str] | str | None, saved: list[str] | None
) -> tuple[list[str] | str, list[str] | None]:
    """The modules that get LoRA and those trained in full; raise ValueError for names that the model does not have."""
    modules = dict(model.named_modules())
    linear = sorted({name.rpartition(".")[2] for name, module in modules.items() if isinstance(module, nn.Linear)})
    for name in saved or []:
        if not any(path.endswith(name) for path in modules):  # peft's own test
            raise ValueError(
                f"modules_to_save: got {name!r}; allowed: {', '.join(linear)}, embed_tokens, norm and so on"
            )
    if targets is None:
        targets = [name for name in _LINEAR_NAMES if name in linear]
        if not targets:
            raise ValueError(f"target_modules: got None, and the model has none of {_LINEAR_NAMES}; allowed: {linear}")
    if isinstance(targets, str):
        return targets, saved
    for name in targets:
        if not any(path == name or path.endswith(f".{name}") for path in modules):
            raise ValueError(
                f"target_modules: got {name!r}; allowed: {', '.join(linear)}, embed_tokens, or 'all-linear'"
            )
    whole = [name for name in targets if name in _EMBEDDING_NAMES]
    if whole:
        logger.info("target_modules: %s: trained in full, as modules_to_save, not with LoRA", ", ".join(whole))
    targets = [name for name in targets if name not in whole]
    if not targets:
        raise ValueError(
            f"target_modules: got only {whole}; allowed: together with at least one of {', '.join(linear)}"
        )
    return targets, list(dict.fromkeys([*(saved or []), *whole])) or None


def _widen_float16(model: nn.Module, quantized: bool) -> None:
    """Convert trained float16 weights of a 4-bit model to float32; warn about them in any other model.

    Loss scaling refuses float16 gradients. 4-bit layers accept inputs of any dtype, but float16 layers accept the
    output of a float32 embedding only under autocast.
    """
    half = [name for name, p in model.named_parameters() if p.requires_grad and p.dtype == torch.float16]
    if half and not quantized:
        logger.warning(
            "dtype: got trained weights in float16, which fp16=True refuses; allowed: dtype=torch.float32; %s",
            ", ".join(half),
        )
    elif half:
        logger.info("trained in float32 instead of float16, as loss scaling requires: %s", ", ".join(half))
        for name in half:
            parameter = model.get_parameter(name)
            parameter.data = parameter.data.float()


def _is_tied(model: Any) -> bool:
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight
