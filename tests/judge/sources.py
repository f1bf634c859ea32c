"""Modules with edited copies of the project's Triton kernels."""

import re
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from conformance.mutate.sources import imported

KERNELS = Path(__file__).parents[2] / "unsloth_fast" / "kernels"
Edit = tuple[str, str]  # old text, which occurs exactly once in the operation's file and its imports; new text


def changed(op: str, name: str, edits: Sequence[Edit]) -> ModuleType:
    """An edited copy of the module `unsloth_fast.kernels.<op>`; its name is also the namespace of its operators.

    Args:
        op: the operation.
        name: a Python identifier, unique in the process.
        edits: pairs of old and new text.

    Raises:
        ValueError: an edit's old text does not occur exactly once.
    """
    texts = edited(op, name, edits)
    for file, text in texts.items():
        for other in texts:
            text = text.replace(f"unsloth_fast.kernels.{other} ", f"{name}_{other} ")
        module = imported(name if file == op else f"{name}_{file}", text.replace("unsloth_fast", name))
    return module


def edited(op: str, name: str, edits: Sequence[Edit]) -> dict[str, str]:
    """The edited sources by file, which `changed` imports; raises the same ValueError."""
    texts = _with_imports(op)
    for old, new in edits:
        count = sum(text.count(old) for text in texts.values())
        if count != 1:
            raise ValueError(f"edits of {name}: {old!r} occurs {count} times in {', '.join(texts)}; allowed: once")
        texts = {file: text.replace(old, new) for file, text in texts.items()}
    return texts


def _with_imports(op: str) -> dict[str, str]:
    """The sources of an operation and of all kernel files that it imports, each after its own imports."""
    text = (KERNELS / f"{op}.py").read_text()
    found: dict[str, str] = {}
    for other in re.findall(r"^from unsloth_fast\.kernels\.(\w+) import", text, re.MULTILINE):
        found |= _with_imports(other)
    return found | {op: text}
