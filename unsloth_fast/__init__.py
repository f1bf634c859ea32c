"""The contract of `unsloth_ref`, fast: Triton kernels, training pieces, and a trainer over TRL.

Importing this package loads neither triton, transformers nor trl; they are loaded by the names that need them.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from unsloth_fast.config import UnslothTrainingArguments
    from unsloth_fast.language_model import FastLanguageModel
    from unsloth_fast.trainer import UnslothTrainer

__all__ = ["FastLanguageModel", "UnslothTrainer", "UnslothTrainingArguments"]

_MODULES = {
    "FastLanguageModel": "unsloth_fast.language_model",
    "UnslothTrainer": "unsloth_fast.trainer",
    "UnslothTrainingArguments": "unsloth_fast.config",
}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)
