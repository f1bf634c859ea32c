"""Saving as scripts for Unsloth call it: merged models, adapters, GGUF files, on disk or on the hub.

`add_methods` gives a model the functions of this module as methods. A deep copy's methods are bound to the copy.
"""

import copy
import functools
import json
import logging
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from unsloth_fast.models import loading
from unsloth_fast.models.fields import changed_by_trainers, restore, with_values
from unsloth_fast.models.generation import TOKENIZER, generate
from unsloth_fast.models.head import without_adapter
from unsloth_fast.models.merging import merged_model
from unsloth_fast.models.quantization import bits_config
from unsloth_fast.save import gguf, hub
from unsloth_fast.save.arguments import SAVE_METHODS, SIXTEEN, check_saving
from unsloth_fast.save.gguf import ALLOWED_QUANTS
from unsloth_ref import checks

__all__ = [
    "ALLOWED_QUANTS",
    "add_methods",
    "patch_saving_functions",
    "push_to_hub_gguf",
    "push_to_hub_merged",
    "save_pretrained_gguf",
    "save_pretrained_merged",
    "unsloth_generic_save_pretrained_merged",
    "unsloth_push_to_hub_gguf",
    "unsloth_push_to_hub_merged",
    "unsloth_save_model",
    "unsloth_save_pretrained_gguf",
    "unsloth_save_pretrained_merged",
]

logger = logging.getLogger(__name__)

Model: TypeAlias = PreTrainedModel | PeftModel
Module = TypeVar("Module", bound=nn.Module)

_LOADED = "unsloth_loaded"  # the attribute of a model with what `changed_by_trainers` found when it was loaded


def save_pretrained_merged(
    model: Model,
    save_directory: str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    save_method: str = "merged_16bit",
    *,
    dtype: torch.dtype | None = None,
    max_shard_size: int | str = "5GB",
    is_main_process: bool = True,
    **kwargs: object,
) -> None:
    """Save a model with its adapters merged, so that plain transformers loads it. The model does not change.

    Args:
        model: the model, with or without adapters, quantised by bitsandbytes or not.
        save_directory: the folder to write to.
        tokenizer: is saved beside the model.
        save_method: "merged_16bit": each weight is merged in float32, 4-bit ones dequantised, and rounded once;
            "merged_4bit": the same, then quantised to bitsandbytes' NF4, which loses accuracy and adds the error of a
            second quantisation to a model that was trained in 4 bits; "merged_4bit_forced": the same without the
            warning; "lora": the adapter alone.
        dtype: of the merged weights, torch.bfloat16 or torch.float16. None for the dtype that the model was loaded in
            if it has 16 bits, or else that of its checkpoint, or else float16 (bfloat16 if a weight is beyond its
            range).
        max_shard_size: of one file, as in transformers.
        is_main_process: whether this process writes.
        **kwargs: Unsloth's other keywords, with values that ask for nothing, such as push_to_hub=False, tags=None; or
            without effect here: maximum_memory_usage, temporary_location, safe_serialization, token, private.

    Raises:
        ValueError: an unknown save_method or dtype; "lora" for a model without adapters; a model that cannot be merged;
            a keyword that asks for what does not exist here.
        TypeError: an unknown keyword.
    """
    options = kwargs | {"dtype": dtype, "max_shard_size": max_shard_size}
    check_saving(save_pretrained_merged, model, save_method, options)
    if not is_main_process:
        return
    folder = Path(save_directory)
    if save_method == "lora":
        model.save_pretrained(str(folder))
    elif save_method == "merged_16bit":
        _merged(model, dtype).save_pretrained(folder, max_shard_size=max_shard_size)
    else:
        if save_method == "merged_4bit":
            logger.warning(
                "save_method: got 'merged_4bit', which loses accuracy: the merged weights are quantised; for a model "
                "to convert, to serve in 16 bits or to train further use 'merged_16bit'"
            )
        _save_in_4bit(model, folder, dtype, max_shard_size)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def push_to_hub_merged(
    model: Model,
    repo_id: str,
    tokenizer: PreTrainedTokenizerBase | None = None,
    save_method: str = "merged_16bit",
    *,
    token: str | bool | None = None,
    private: bool | None = None,
    commit_message: str = "Upload model",
    commit_description: str | None = None,
    create_pr: bool = False,
    revision: str | None = None,
    **kwargs: Any,
) -> str | None:
    """Save a model as `save_pretrained_merged` does, and upload the files to a repository of the hub.

    Args:
        model: the model.
        repo_id: the repository, which is created if it does not exist.
        tokenizer: is uploaded beside the model.
        save_method: as in `save_pretrained_merged`.
        token: for the hub.
        private: whether a new repository is private.
        commit_message: of the upload.
        commit_description: of the upload.
        create_pr: whether to open a pull request instead of a commit.
        revision: the branch to commit to.
        **kwargs: further keywords of `save_pretrained_merged`.

    Returns:
        The address of the commit; None with is_main_process=False, where nothing is uploaded.
    """
    check_saving(push_to_hub_merged, model, save_method, kwargs)
    if not kwargs.get("is_main_process", True):
        return None
    repository = hub.create_repository(repo_id, token, private, "save_pretrained_merged")
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained_merged(model, folder, tokenizer, save_method, **kwargs)
        commit = {"commit_message": commit_message, "commit_description": commit_description, "create_pr": create_pr}
        return hub.upload_folder(repository, folder, revision=revision, **commit)


def save_pretrained_gguf(
    model: Model,
    save_directory: str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    quantization_method: str | Iterable[str] | None = "fast_quantized",
    **kwargs: Any,
) -> list[str]:
    """Merge a model, save it, and convert it to GGUF files by llama.cpp's own programs.

    `convert_hf_to_gguf.py`, and for other methods than f32, f16, bf16 and q8_0 also `llama-quantize`, must be in the
    folder that LLAMA_CPP_DIR names, or on PATH.

    Args:
        model: the model.
        save_directory: the folder for the merged model and the GGUF files.
        tokenizer: becomes part of the files. None for the one that was loaded with the model.
        quantization_method: one of llama.cpp's methods, such as "q8_0" or "q4_k_m", or several. "not_quantized",
            "fast_quantized" and "quantized" stand for f16, q8_0 and q4_k_m.
        **kwargs: further keywords of `save_pretrained_merged`; of save_method only "merged_16bit".

    Returns:
        The paths of the GGUF files, one per method; none with is_main_process=False, where nothing is written.

    Raises:
        ValueError: an unknown method or another save_method, or no tokenizer.
        TypeError: an unknown keyword.
        RuntimeError: a program of llama.cpp is missing or failed.
    """
    methods, tokenizer = _check_converting(save_pretrained_gguf, model, tokenizer, quantization_method, kwargs)
    if not kwargs.get("is_main_process", True):
        return []
    folder = Path(save_directory)
    save_pretrained_merged(model, folder, tokenizer, **kwargs)
    stored = json.loads((folder / "config.json").read_text(encoding="utf-8"))["dtype"]
    wide = "f16" if stored == "float16" else "bf16"
    return gguf.convert(folder, folder, folder.resolve().name, methods, wide)


def push_to_hub_gguf(
    model: Model,
    repo_id: str,
    tokenizer: PreTrainedTokenizerBase | None = None,
    quantization_method: str | Iterable[str] | None = "fast_quantized",
    *,
    token: str | bool | None = None,
    private: bool | None = None,
    commit_message: str = "Upload GGUF files",
    commit_description: str | None = None,
    create_pr: bool = False,
    revision: str | None = None,
    **kwargs: Any,
) -> str | None:
    """Convert a model as `save_pretrained_gguf` does, and upload the GGUF files to a repository of the hub.

    Args:
        model: the model.
        repo_id: the repository, which is created if it does not exist; its name begins the files' names.
        tokenizer: as in `save_pretrained_gguf`.
        quantization_method: as in `save_pretrained_gguf`.
        token: for the hub.
        private: whether a new repository is private.
        commit_message: of the upload.
        commit_description: of the upload.
        create_pr: whether to open a pull request instead of a commit.
        revision: the branch to commit to.
        **kwargs: as in `save_pretrained_gguf`.

    Returns:
        The address of the commit; None with is_main_process=False, where nothing is uploaded.
    """
    _check_converting(push_to_hub_gguf, model, tokenizer, quantization_method, kwargs)
    if not kwargs.get("is_main_process", True):
        return None
    repository = hub.create_repository(repo_id, token, private, "save_pretrained_gguf")
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / repo_id.rpartition("/")[2]
        save_pretrained_gguf(model, folder, tokenizer, quantization_method, **kwargs)
        commit = {"commit_message": commit_message, "commit_description": commit_description, "create_pr": create_pr}
        return hub.upload_folder(repository, str(folder), revision=revision, allow_patterns="*.gguf", **commit)


def add_methods(model: nn.Module, further: Mapping[str, Callable[..., object]] | None = None) -> None:
    """Give a model the methods of this module, and the plain model inside it those that keep what was loaded.

    The inner model's `save_pretrained` writes what trainers change in the configuration, such as `use_cache`, as it was
    when this function was first called. Its `generate` accepts what a tokenizer returns.

    Args:
        model: the model, with or without adapters; changed in place.
        further: further functions to become methods, by their names.
    """
    base = without_adapter(model)
    if _LOADED not in vars(base):
        setattr(base, _LOADED, changed_by_trainers(base.config))
    _bind(base, {"save_pretrained": _save_as_loaded, "generate": generate})
    for owner in {id(base): base, id(model): model}.values():
        _bind(owner, _METHODS | dict(further or {}))


def patch_saving_functions(model: Module) -> Module:
    """Give any model the methods of this module; return it."""
    add_methods(model)
    return model


def unsloth_save_model(
    model: Model,
    tokenizer: PreTrainedTokenizerBase | None,
    save_directory: str | Path,
    save_method: str = "lora",
    **kwargs: Any,
) -> None:
    """`save_pretrained_merged` with the arguments in another order and another default."""
    save_pretrained_merged(model, save_directory, tokenizer, save_method, **kwargs)


# The names of Unsloth's own functions, which some scripts import.
unsloth_generic_save_pretrained_merged = save_pretrained_merged
unsloth_save_pretrained_merged = save_pretrained_merged
unsloth_push_to_hub_merged = push_to_hub_merged
unsloth_save_pretrained_gguf = save_pretrained_gguf
unsloth_push_to_hub_gguf = push_to_hub_gguf

_METHODS: dict[str, Callable[..., Any]] = {
    "save_pretrained_merged": save_pretrained_merged,
    "push_to_hub_merged": push_to_hub_merged,
    "save_pretrained_gguf": save_pretrained_gguf,
    "push_to_hub_gguf": push_to_hub_gguf,
}


def _bind(owner: object, functions: dict[str, Callable[..., Any]]) -> None:
    # A partial, unlike a bound method, can be pickled under a name that the class does not have.
    for name, function in functions.items():
        method = functools.partial(function, owner)
        method.__doc__ = function.__doc__
        vars(owner)[name] = method


def _save_as_loaded(model: Any, *positional: Any, **keywords: Any) -> Any:
    """`PreTrainedModel.save_pretrained`, with the values of the configuration that was loaded."""
    with with_values(model.config, getattr(model, _LOADED)):
        return type(model).save_pretrained(model, *positional, **keywords)


def _check_converting(
    method: Callable[..., Any],
    model: Model,
    tokenizer: PreTrainedTokenizerBase | None,
    asked: str | Iterable[str] | None,
    options: dict[str, Any],
) -> tuple[list[str], Any]:
    """Check the arguments of a method that writes GGUF files; return llama.cpp's methods and the tokenizer."""
    methods = gguf.resolve_methods(asked)
    checks.one_of("save_method", options.get("save_method", SAVE_METHODS[0]), SAVE_METHODS[:1])
    check_saving(method, model, SAVE_METHODS[0], {name: options[name] for name in options if name != "save_method"})
    tokenizer = tokenizer or getattr(without_adapter(model), TOKENIZER, None)
    if tokenizer is None:
        raise ValueError("tokenizer: got None; allowed: a tokenizer, which a GGUF file holds")
    gguf.find_programs(methods)
    return methods, tokenizer


def _dtype_of(model: Any, asked: torch.dtype | None) -> torch.dtype | None:
    """The dtype of merged weights; None for float16 if they fit."""
    base = without_adapter(model)
    candidates = (asked, base.config.dtype, getattr(base, "unsloth_checkpoint_dtype", None))
    return next((dtype for dtype in candidates if dtype in SIXTEEN), None)


def _merged(model: Any, asked: torch.dtype | None) -> Any:
    """The plain merged model, with the configuration that was loaded."""
    dtype = _dtype_of(model, asked)
    try:
        merged = merged_model(model, dtype or torch.float16)
    except OverflowError:
        if dtype is not None:
            raise
        merged = merged_model(model, torch.bfloat16)
    restore(merged.config, getattr(without_adapter(model), _LOADED, changed_by_trainers(merged.config)))
    return merged


def _save_in_4bit(model: Any, folder: Path, dtype: torch.dtype | None, max_shard_size: int | str) -> None:
    merged, base = _merged(model, dtype), without_adapter(model)
    stored = getattr(base.config, "quantization_config", None)
    config = copy.deepcopy(stored) if getattr(stored, "load_in_4bit", False) else bits_config(4, merged.dtype, merged)
    with tempfile.TemporaryDirectory() as temporary:
        merged.save_pretrained(temporary)
        model_class = type(merged)
        del merged
        options = {"quantization_config": config, "device_map": loading.default_device_map()}
        quantised: Any = model_class.from_pretrained(temporary, **options)
    quantised.save_pretrained(folder, max_shard_size=max_shard_size)
