"""A merged model as GGUF files, which llama.cpp and Ollama read, on disk or on the hub."""

import json
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from unsloth_fast.models.generation import TOKENIZER
from unsloth_fast.models.head import without_adapter
from unsloth_fast.save import hub, llama_cpp
from unsloth_fast.save.arguments import SAVE_METHODS, check_saving
from unsloth_fast.save.merged import Model, save_pretrained_merged
from unsloth_ref import checks


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
    return llama_cpp.convert(folder, folder, folder.resolve().name, methods, wide)


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


def _check_converting(
    method: Callable[..., Any],
    model: Model,
    tokenizer: PreTrainedTokenizerBase | None,
    asked: str | Iterable[str] | None,
    options: dict[str, Any],
) -> tuple[list[str], Any]:
    """Check the arguments of a method that writes GGUF files; return llama.cpp's methods and the tokenizer."""
    methods = llama_cpp.resolve_methods(asked)
    checks.one_of("save_method", options.get("save_method", SAVE_METHODS[0]), SAVE_METHODS[:1])
    check_saving(method, model, SAVE_METHODS[0], {name: options[name] for name in options if name != "save_method"})
    tokenizer = tokenizer or getattr(without_adapter(model), TOKENIZER, None)
    if tokenizer is None:
        raise ValueError("tokenizer: got None; allowed: a tokenizer, which a GGUF file holds")
    llama_cpp.find_programs(methods)
    return methods, tokenizer
