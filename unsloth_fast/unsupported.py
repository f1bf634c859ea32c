"""What is missing: names of Unsloth's API that do not exist here, and packages that only the trainer needs.

Vision, audio, vLLM and GRPO are left out, other names are replaced.
"""

_VISION = "images are not trained on here"
_REINFORCEMENT = "there is no GRPO or other reinforcement learning here; use trl's own trainer"
_VLLM = "vLLM is not used here"

_REASONS = {
    "FastVisionModel": f"{_VISION}; FastModel trains the text part of an image-text model",
    "UnslothVisionDataCollator": _VISION,
    "FastSentenceTransformer": "sentence embeddings are not trained here",
    "FastDiffusionModel": "diffusion models are not trained here",
    "PatchFastRL": _REINFORCEMENT,
    "PatchRL": _REINFORCEMENT,
    "PatchRLStatistics": _REINFORCEMENT,
    "UnslothGRPOConfig": _REINFORCEMENT,
    "UnslothGRPOTrainer": _REINFORCEMENT,
    "vLLMSamplingParams": _VLLM,
    "SyntheticDataKit": f"{_VLLM}, which generates its data",
}
_INSTEAD = {
    "construct_chat_template": "a template is made and set in one call here; allowed: apply_chat_template(dataset, "
    "tokenizer, chat_template=...) for one with {INPUT} and {OUTPUT}, or get_chat_template(tokenizer, (template, end "
    "token)) for one in Jinja",
    "create_ollama_modelfile": "no files for Ollama are written here; allowed: save_pretrained_gguf, whose files hold "
    "the chat template",
}
ALLOWED = "allowed: training on text with FastLanguageModel"
_TRAIN = ("transformers", "trl", "peft", "accelerate", "datasets", "pyarrow", "dill", "bitsandbytes")


def missing(module: str, name: str) -> Exception:
    """The error for a name that a module does not have: with the reason if Unsloth has it."""
    if name in _INSTEAD:
        sentence = _INSTEAD[name]
    elif name in _REASONS:
        sentence = f"{_REASONS[name]}; {ALLOWED}"
    else:
        return AttributeError(f"module {module!r} has no attribute {name!r}")
    # Python replaces the text of an AttributeError by its own in `from module import name`, but not an ImportError's.
    return ImportError(f"{name}: {sentence}")


def demand_extra(what: str, error: ModuleNotFoundError) -> None:
    """Return if the module that was not found is not one of the extra `train`.

    Raises:
        ImportError: it is one; the message names the extra.
    """
    package = (error.name or "").partition(".")[0]
    if package in _TRAIN:
        extra = "install the packages of the trainer: pip install 'unsloth-fast[train]'"
        raise ImportError(f"{what}: needs {package}, which is not installed; {extra}") from error
