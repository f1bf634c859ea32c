"""FastLanguageModel: a Hugging Face model and its tokenizer, ready for training, and LoRA adapters on it.

transformers loads, bitsandbytes quantises and peft adapts. The results are objects of their classes, so anything they
save can be loaded without this package.
"""

from functools import partial
from typing import Any, TypeVar

import torch
from peft import LoraConfig, PeftModel
from torch import nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from unsloth_fast import adapters, backends
from unsloth_fast.models import checkpointing, float8, loading, place, positions, quantization, targets, tokenizers
from unsloth_fast.models.auto import accept_bits
from unsloth_fast.models.generation import pad_left, restore_padding
from unsloth_fast.models.head import without_adapter
from unsloth_fast.models.source import HUB_KEYWORDS, find_source
from unsloth_fast.save import add_methods
from unsloth_ref import checks

Model = TypeVar("Model", bound=nn.Module)

_CHECKPOINTING = (None, True, False, "unsloth")


class FastLanguageModel:
    """Loads models and adds adapters to them. It has no instances."""

    @staticmethod
    def from_pretrained(
        model_name: str,
        max_seq_length: int | None = None,
        dtype: torch.dtype | str | None = None,
        load_in_4bit: bool | None = None,
        *,
        load_in_8bit: bool | None = None,
        load_in_fp8: bool | str | None = None,
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

        An image-text model is loaded for its text: its tokenizer is returned, not its processor.

        Args:
            model_name: a model or an adapter: its name on the hub, or the path of its folder. With an adapter its base
                model is loaded too, and the adapter's training can be continued.
            max_seq_length: the maximum number of tokens per text. It becomes the tokenizer's `model_max_length` and the
                model's `max_seq_length`. None for the model's `max_position_embeddings`, with the tokenizer unchanged.
                Beyond these, RoPE is scaled linearly, which is logged.
            dtype: of the weights, and with 4 bits of the products; also by name, "bfloat16". "auto" for the
                checkpoint's, None for bfloat16 on a GPU that supports it, float16 on any other GPU, float32 on a CPU.
            load_in_4bit: whether to store the weights of linear layers in 4 bits (bitsandbytes' NF4, nested scales).
                None for True if bitsandbytes is installed, unless load_in_8bit, load_in_16bit or full_finetuning is
                set. Vision towers, routers of experts and the projections of Mamba layers are not quantised.
            load_in_8bit: the same in bitsandbytes' 8 bits.
            load_in_fp8: the same in float8 (e4m3) with a scale per block of 128 x 128, without bitsandbytes; True and
                "block" mean the same. Activations are quantised to float8 as well. A model that is stored in float8 is
                loaded in float8, whatever this says.
            load_in_16bit: the opposite of load_in_4bit: weights of `dtype`, not quantised.
            full_finetuning: whether all weights will be trained; excludes 4 bits, 8 bits and adapters.
                `get_peft_model` then adds none.
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
                values they replace. Unsloth's other keywords are accepted with values that change no result, such as
                fast_inference=False.

        Returns:
            The model, in training mode, and the tokenizer, which pads on the right and has a pad token.

        Raises:
            TypeError: an unknown keyword.
            ValueError: an unknown backend; max_seq_length beyond positions that cannot be scaled; a dtype that the GPU
                does not support; two of 4 bits, 8 bits, float8, load_in_16bit and full_finetuning; float8 on several
                devices; a model that does not generate text; a feature that does not exist here.
            FileNotFoundError: a folder that does not exist, or that holds no model.
            RuntimeError: the fast backend was asked for by name and cannot run here, or 4 or 8 bits without
                bitsandbytes.
        """
        from unsloth_fast.compat import patch_trl  # imports trl

        checks.one_of("use_gradient_checkpointing", use_gradient_checkpointing, _CHECKPOINTING)
        chosen = backends.resolve(backend)
        hub = {name: kwargs.pop(name) for name in HUB_KEYWORDS if name in kwargs}
        source = find_source(model_name, hub | {"token": token, "trust_remote_code": trust_remote_code})
        adapters.check_full_finetuning(full_finetuning, source)
        config = AutoConfig.from_pretrained(source.base, **source.base_hub)
        options = loading.known_keywords(kwargs, config)
        config = loading.with_fields(config, source, options)
        auto_class, stored_dtype = loading.model_class(config), loading.stored_dtype(config)
        positions.scale_positions(config, max_seq_length)
        options["dtype"] = loading.supported_dtype(dtype, stored_dtype)
        asked = load_in_4bit, load_in_8bit, load_in_16bit, full_finetuning
        empty = partial(loading.empty_model, auto_class, config, trust_remote_code)
        in_float8 = float8.is_wanted(load_in_fp8, asked, config, options.get("quantization_config"))
        if not in_float8:
            quantization.add_bits(options, asked, config, empty)
        if getattr(config, "attn_logit_softcapping", None):
            options.setdefault("attn_implementation", "eager")  # before transformers 5.23 sdpa ignores the cap
        options["device_map"] = loading.default_device_map() if device_map is None else device_map

        model = float8.load(auto_class, source, options | {"config": config}, empty() if in_float8 else None, chosen)
        tokenizer = AutoTokenizer.from_pretrained(source.find_tokenizer(), **source.hub)
        tokenizers.find_template(tokenizer, source)
        if source.is_adapter and max_seq_length is None:
            positions.warn_of_longer_texts(tokenizer, positions.position_limit(config))
        tokenizers.resize_vocabulary(model, tokenizer, source, resize_model_vocab)
        tokenizers.prepare_tokenizer(tokenizer, model, max_seq_length)
        model.max_seq_length = max_seq_length or positions.position_limit(config)
        model.unsloth_length_asked = max_seq_length is not None
        model.unsloth_backend, model.unsloth_full_finetuning = chosen.name, bool(full_finetuning)
        model.unsloth_checkpoint_dtype, model.unsloth_tokenizer = stored_dtype, tokenizer
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
        *,
        finetune_vision_layers: bool | None = None,
        finetune_language_layers: bool | None = None,
        finetune_attention_modules: bool | None = None,
        finetune_mlp_modules: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Add a LoRA adapter to a model and freeze the model's own weights, except for the modules that you name.

        A model that has an adapter with these values already is returned for further training. A model that was loaded
        with full_finetuning=True gets no adapter, which is logged, and all its weights are trained; of the other
        arguments only max_seq_length and use_gradient_checkpointing then count.

        Args:
            model: the result of `from_pretrained`, or any other causal language model of transformers; changed in
                place.
            r: the adapter's rank.
            target_modules: the names of linear layers, "all-linear", or a regular expression for full names; None for
                q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj and down_proj. Names that the model does not have are
                left out, which is logged; gate_proj, up_proj and down_proj also mean the weights of experts. With these
                seven, linear layers that none of them means, such as those of mixers, are logged. If the list names
                embed_tokens or lm_head, these are trained in full, as modules_to_save; if the model ties the two, they
                stay tied.
            lora_alpha: the adapter is scaled by lora_alpha / r, or with use_rslora by lora_alpha / sqrt(r).
            lora_dropout: the probability of dropping an input of the adapter, at least 0 and below 1.
            bias: "none", "all" or "lora_only": which biases are trained.
            layers_to_transform: the indices of the layers that get the adapter; None for all.
            layers_pattern: the name of the list of layers, if peft does not know it.
            use_gradient_checkpointing: False, True, or "unsloth", which keeps the layers' inputs in pinned host memory
                until the backward pass. None for the value given to `from_pretrained`, or else True if the model
                supports it. A trainer's `gradient_checkpointing` overrides this only if it is not the default of its
                arguments' class.
            random_state: the seed of the adapter's initial weights; the global generators do not change.
            max_seq_length: replaces the model's `max_seq_length`.
            use_rslora: see lora_alpha.
            modules_to_save: names of further modules that are trained in full.
            init_lora_weights: as in `peft.LoraConfig`.
            loftq_config: as in `peft.LoraConfig`.
            temporary_location: ignored, as nothing is written to disk; scripts for Unsloth may pass it.
            qat_scheme: only None, as there is no quantisation-aware training.
            finetune_vision_layers: only False or None: the vision tower of an image-text model gets no adapter.
            finetune_language_layers: False for no adapter in the text model, which leaves nothing to train.
            finetune_attention_modules: False for no adapter in attention. If this or one of its neighbours is given and
                target_modules is not, the adapter goes on all linear layers of the parts that are not False.
            finetune_mlp_modules: False for no adapter in MLPs and experts.
            **kwargs: further fields of `peft.LoraConfig`; of task_type only "CAUSAL_LM".

        Returns:
            The model in a `peft.PeftModel`, or with full_finetuning=True the model itself; in training mode.

        Raises:
            TypeError: an unknown keyword.
            ValueError: a value that is not allowed, only modules that the model does not have, or a model that has an
                adapter with other values.
        """
        checks.one_of("qat_scheme", qat_scheme, (None,))
        checks.one_of("use_gradient_checkpointing", use_gradient_checkpointing, _CHECKPOINTING)
        base = without_adapter(model)
        fields: dict[str, Any] = {
            "r": r,
            "lora_alpha": lora_alpha,
            "lora_dropout": lora_dropout,
            "bias": bias,
            "layers_to_transform": layers_to_transform,
            "layers_pattern": layers_pattern,
            "use_rslora": use_rslora,
            "init_lora_weights": init_lora_weights,
            "loftq_config": loftq_config or {},
        }
        further = {"target_modules": target_modules, "modules_to_save": modules_to_save, "random_state": random_state}
        adapters.check_arguments(base, fields | kwargs | further, finetune_vision_layers, kwargs)
        positions.set_length(base, max_seq_length)
        if use_gradient_checkpointing is None:
            asked = getattr(base, "unsloth_gradient_checkpointing", None)
            use_gradient_checkpointing = checkpointing.is_usual(base) if asked is None else asked
        if adapters.is_fully_trained(model):
            return FastLanguageModel.for_training(model, use_gradient_checkpointing)
        parts = targets.Parts(finetune_language_layers, finetune_attention_modules, finetune_mlp_modules)
        chosen = targets.choose_targets(base, target_modules, modules_to_save, parts, fields | kwargs)
        if adapters.is_tied(base) and not set(chosen.saved or ()).isdisjoint(targets.EMBEDDING_NAMES):
            kwargs.setdefault("ensure_weight_tying", True)
        fields.update(kwargs | chosen.fields())
        config = LoraConfig(task_type="CAUSAL_LM", **fields)
        adapted = adapters.adapt(model, config, chosen, kwargs, random_state)
        _add_methods(adapted)
        adapters.widen_float16(adapted)
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
        base: Any = without_adapter(model)
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


FastModel = FastTextModel = FastLanguageModel
"""Unsloth's names of the same loader: the class of a model follows from its configuration."""
FastLlamaModel = FastMistralModel = FastQwen2Model = FastQwen3Model = FastQwen3MoeModel = FastLanguageModel
FastGemmaModel = FastGemma2Model = FastGemma3Model = FastPhi3Model = FastLanguageModel
FastCohereModel = FastGraniteModel = FastFalconH1Model = FastLanguageModel


def PatchDPOTrainer() -> None:
    """Do nothing: trl's other trainers take the models of `FastLanguageModel` as they are."""


PatchKTOTrainer = PatchDPOTrainer
