"""A model with its adapters merged, or its adapter alone, on disk or on the hub."""

import copy
import logging
import tempfile
from pathlib import Path
from typing import Any, TypeAlias

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from unsloth_fast.models import loading
from unsloth_fast.models.fields import loaded_fields, restore
from unsloth_fast.models.head import without_adapter
from unsloth_fast.models.merging import merged_model
from unsloth_fast.models.quantization import bits_config
from unsloth_fast.save import hub
from unsloth_fast.save.arguments import SIXTEEN, check_saving

logger = logging.getLogger(__name__)

Model: TypeAlias = PreTrainedModel | PeftModel


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


def _merged(model: Any, asked: torch.dtype | None) -> Any:
    """The plain merged model, with the configuration that was loaded."""
    base: Any = without_adapter(model)
    candidates = (asked, base.config.dtype, getattr(base, "unsloth_checkpoint_dtype", None))
    dtype = next((one for one in candidates if one in SIXTEEN), None)
    try:
        merged = merged_model(model, dtype or torch.float16)
    except OverflowError:
        if dtype is not None:
            raise
        merged = merged_model(model, torch.bfloat16)
    restore(merged.config, loaded_fields(base))
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
