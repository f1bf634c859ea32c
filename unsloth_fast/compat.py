"""Plain `trl.SFTTrainer` on this package: its `__init__` is wrapped, and can be put back.

No source is rewritten and no method of TRL's is replaced but that one. `SFTTrainer(...)` itself builds an
`UnslothTrainer`, which is one; a subclass of somebody else's keeps its class, and only takes the older call styles.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

from trl import SFTTrainer

from unsloth_fast.config import migrated, settle_checkpointing, settled
from unsloth_fast.trainer import UnslothTrainer


def patch_trl() -> None:
    """Make `trl.SFTTrainer(...)` build an `UnslothTrainer`, older call styles included.

    Packing and padding-free, the backend's operations under the model, the loss and the errors are then those of
    `UnslothTrainer`; the backend comes from UNSLOTH_BACKEND where the arguments name none. A class that somebody
    derived from `trl.SFTTrainer` keeps its own ways, and takes `tokenizer=`, `dataset_text_field=`, `max_seq_length=`
    and the like. Patching again changes nothing; trainers that exist already stay as they are.
    """
    if not is_patched():
        SFTTrainer.__init__ = _wrapped(SFTTrainer.__init__)


def unpatch_trl() -> None:
    """Give `trl.SFTTrainer` its own `__init__` back; without effect where it has it."""
    if is_patched():
        SFTTrainer.__init__ = SFTTrainer.__init__.__wrapped__  # type: ignore[attr-defined]


def is_patched() -> bool:
    """Whether `patch_trl` is in effect."""
    return hasattr(SFTTrainer.__init__, "unsloth_fast")


def _wrapped(original: Callable[..., None]) -> Callable[..., None]:
    names = [name for name in inspect.signature(original).parameters if name != "self"]

    @functools.wraps(original)
    def __init__(self: Any, *positional: Any, **keywords: Any) -> None:
        if type(self) is SFTTrainer:
            self.__class__ = UnslothTrainer
            self.__init__(*positional, **keywords)
            return
        given = dict(zip(names, positional, strict=False)) | keywords
        if set(given) - set(names):
            args = given.pop("args", None)
            settings = settled(args, given["model"])
            given, updates = migrated(settings, given, names)
            settle_checkpointing(settings, args, given["model"], updates)
            given["args"] = settings
        original(self, **given)

    __init__.unsloth_fast = True  # type: ignore[attr-defined]  # what `is_patched` knows it by
    return __init__
