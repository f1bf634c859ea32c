"""Plain `trl.SFTTrainer` on this package: `patch_trl` wraps its `__init__`, `unpatch_trl` restores it.

No source is rewritten and no other method of TRL is replaced. `SFTTrainer(...)` then builds an `UnslothTrainer`, which
is a subclass. A class that somebody else derived keeps its class; it only accepts the older call styles. The `__init__`
of the arguments is wrapped as well: it accepts older names.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

from transformers import TrainingArguments
from trl import SFTConfig, SFTTrainer

from unsloth_fast.arguments.sft_config import rename_arguments
from unsloth_fast.keywords import accept_older_names
from unsloth_fast.models.checkpointing import follow_arguments
from unsloth_fast.trainer import UnslothTrainer

_CONFIGS = (SFTConfig, TrainingArguments)


def patch_trl() -> None:
    """Make `trl.SFTTrainer(...)` build an `UnslothTrainer`, older call styles included.

    Packing, padding-free batches, the operations under the model, the loss and the errors are then those of
    `UnslothTrainer`; the backend is UNSLOTH_BACKEND unless the arguments name one. A class that somebody else derived
    from `trl.SFTTrainer` behaves as before, and also accepts `tokenizer=`, `dataset_text_field=`, `max_seq_length=` and
    the like. `trl.SFTConfig` and `transformers.TrainingArguments` accept the names that older releases had for their
    fields. Patching again has no effect; existing trainers do not change.

    `from unsloth_fast import FastLanguageModel`, or any other loader's name, calls it the first time, and so does each
    model that is loaded.
    """
    if not is_patched():
        SFTTrainer.__init__ = _wrapped(SFTTrainer.__init__)
        for config in _CONFIGS:
            config.__init__ = accept_older_names(config.__init__)


def unpatch_trl() -> None:
    """Restore the `__init__` of `trl.SFTTrainer` and of the arguments; no effect if they are not patched."""
    if is_patched():
        for patched in (SFTTrainer, *_CONFIGS):
            patched.__init__ = patched.__init__.__wrapped__  # type: ignore[attr-defined]


def is_patched() -> bool:
    """Whether `patch_trl` is in effect."""
    return hasattr(SFTTrainer.__init__, "unsloth_fast")


def _wrapped(original: Callable[..., None]) -> Callable[..., None]:
    names = [name for name in inspect.signature(original).parameters if name != "self"]

    @functools.wraps(original)
    def __init__(self: SFTTrainer, *positional: object, **keywords: object) -> None:
        if type(self) is SFTTrainer:
            trainer: Any = self
            trainer.__class__, trainer.called_as_trls = UnslothTrainer, True
            trainer.__init__(*positional, **keywords)
            return
        given: dict[str, Any] = dict(zip(names, positional, strict=False)) | keywords
        if set(given) - set(names):
            model, args = given["model"], given.pop("args", None)
            settings, given, _ = rename_arguments(model, args, given, names)
            follow_arguments(model, settings)
            given["args"] = settings
        original(self, **given)

    __init__.unsloth_fast = True  # type: ignore[attr-defined]  # recognised by `is_patched`
    return __init__
