"""The file of results that a verb writes: {"meta": its schema and what they depend on, "results": one object each}."""

import json
import os
import platform
import subprocess
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

SCHEMA = 2  # counts up when a field changes its meaning or goes; new fields do not change it


def write(path: Path, meta: Mapping[str, Any], results: Sequence[Mapping[str, Any]]) -> None:
    """Write the file; a process that is stopped meanwhile leaves the old one.

    Raises:
        ValueError: a number is NaN or infinite, which JSON does not have.
    """
    content = {"meta": {"schema": SCHEMA, **meta}, "results": results}
    write_text(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write the file in UTF-8; a process that is stopped meanwhile leaves the old one."""
    if path.exists() and not path.is_file():  # such as /dev/stdout
        path.write_text(text, encoding="utf-8")
        return
    path = path.resolve()  # a link remains one
    part = path.with_name(f".{path.name}.{os.getpid()}.part")  # another process may be writing the same file
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def parsed(text: str) -> Any:
    """What a text of JSON holds.

    Raises:
        ValueError: it is none: it has NaN or an infinite number, an object with a key twice, or too many levels.
    """
    try:
        return json.loads(text, parse_constant=_no_number, object_pairs_hook=_object)
    except RecursionError as error:
        raise ValueError("got too many levels of arrays and objects") from error


def _no_number(word: str) -> Any:
    raise ValueError(f"got {word}; allowed: finite numbers")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    for key, count in Counter(key for key, _ in pairs).items() if len(found) < len(pairs) else ():
        if count > 1:
            raise ValueError(f"got {key!r} {count} times in an object; allowed: once")
    return found


def versions() -> dict[str, Any]:
    """Versions of the software that a result depends on."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": version("triton") if find_spec("triton") else None,
        "cuda": torch.version.cuda,
    }


def commit() -> str | None:
    """The commit of the current folder, or None if it is not in a repository."""
    try:
        found = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return found.stdout.strip() if found.returncode == 0 else None
