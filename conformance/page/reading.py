"""Is this a file of results? Reads it and checks every field, so that the formats can rely on them."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from conformance.bench.table import Row
from conformance.page import benchmarks
from conformance.page.model import Check, Compared, Kind, Meta, Mutant, Results
from conformance.reporting import results_file

T = TypeVar("T")
FORBIDDEN = re.compile(r"[^\t\n\r\x20-\uD7FF\uE000-\uFFFD\U00010000-\U0010FFFF]")  # in XML 1.0, and useless in HTML


class FileError(Exception):
    """A file that cannot be shown; the message gives its name, the value seen and the values allowed."""


KINDS: dict[Kind, tuple[str, str, type]] = {  # the field of a result and the field of meta that only this kind has
    "gate": ("regressions", "regressions", Compared),
    "mutate": ("mutant", "kill_rate", Mutant),
    "bench": ("shape", "copy_bytes_per_second", Row),
    "coverage": ("missed", "missed", Check),
    "run": ("property", "not_defined", Check),
}
ALLOWED = f"allowed: a file that --json of {', '.join(sorted(KINDS))} wrote, or one of pytest-benchmark"
LISTS = {Check: "checks", Row: "rows", Mutant: "mutants", Compared: "compared"}


def read(path: Path) -> Results:
    """The results of a file.

    Raises:
        FileError: it cannot be read, or is no file of results.
    """
    try:
        found = results_file.parsed(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise FileError(f"{path}: it cannot be read: {error.strerror}; {ALLOWED}") from error
    except ValueError as error:
        raise FileError(f"{path}: got no JSON ({_one_line(error)}); {ALLOWED}") from error
    if benchmarks.is_one(found):
        try:
            found = benchmarks.as_bench(found)
        except ValueError as error:
            raise FileError(f"{path}: {error}; {ALLOWED}") from error
    meta, results = (found.get("meta"), found.get("results")) if isinstance(found, dict) else (None, None)
    if not isinstance(meta, dict) or not isinstance(results, list):
        raise FileError(f'{path}: got JSON without "meta" and "results"; {ALLOWED}')
    if "environments" in meta:
        raise FileError(f"{path}: got a ledger; allowed: after --history")
    kind = _kind(meta, results)
    if kind is None:
        raise FileError(f"{path}: got {'results of no known kind' if results else 'no results'}; {ALLOWED}")
    kept = KINDS[kind][2]
    try:
        rows = tuple(_made(kept, one, f"result {place}") for place, one in enumerate(results, 1))
        return Results(_text(path.name), kind, _made(Meta, meta, "meta"), **{LISTS[kept]: rows})
    except (ValueError, RecursionError) as error:
        raise FileError(f"{path}: {_one_line(error)}; {ALLOWED}") from error


def _kind(meta: dict[str, Any], results: list[Any]) -> Kind | None:
    """The verb that wrote the file, by a field of its first result, or of meta if it has none."""
    names: Any = meta if not results else results[0] if isinstance(results[0], dict) else ()
    for kind, (of_result, of_meta, _) in KINDS.items():
        if (of_result if results else of_meta) in names:
            return kind
    return None


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _text(text: str) -> str:
    return FORBIDDEN.sub("\N{REPLACEMENT CHARACTER}", text)


def _made(cls: type[T], found: Any, where: str) -> T:
    """Make an object of the dataclass from JSON; unknown keys, which later versions write, are left out."""
    if not isinstance(found, dict):
        raise ValueError(f"{where}: got {_shown(found)}, no object")
    hints, values = get_type_hints(cls), {}
    for one in fields(cls):  # type: ignore[arg-type]
        if one.name in found:
            values[one.name] = _value(hints[one.name], found[one.name], f"{where}, {one.name}")
        elif one.default is MISSING and one.default_factory is MISSING:
            raise ValueError(f'{where}: got no "{one.name}"')
    return cls(**values)


def _value(hint: Any, found: Any, where: str) -> Any:
    """The value if it has the hinted type, lists converted to tuples; else raises ValueError."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is UnionType or (origin is not None and NoneType in inner):
        if found is None:
            return None
        (hint,) = (one for one in inner if one is not NoneType)
        return _value(hint, found, where)
    if isinstance(hint, type) and is_dataclass(hint):
        return _made(hint, found, where)
    if origin is tuple and isinstance(found, list):
        hints: Iterable[Any] = inner[:1] * len(found) if Ellipsis in inner else inner
        if Ellipsis in inner or len(inner) == len(found):
            return tuple(_value(one, value, where) for one, value in zip(hints, found, strict=True))
    if origin is dict and isinstance(found, dict):
        return {_text(key): _value(inner[1], value, where) for key, value in found.items()}
    if origin is Literal and found in inner:
        return found
    if hint is float and isinstance(found, (int, float)) and not isinstance(found, bool):
        return _finite(found, where)
    if isinstance(hint, type) and origin is None and type(found) is hint:
        return _text(found) if isinstance(found, str) else found
    raise ValueError(f"{where}: got {_shown(found)}")


def _finite(found: float, where: str) -> float:
    if abs(found) > sys.float_info.max:
        raise ValueError(
            f"{where}: got {found:.5g}" if isinstance(found, float) else f"{where}: got a number too large"
        )
    return float(found)


def _shown(found: Any) -> str:
    text = json.dumps(found)
    return text if len(text) < 60 else f"{text[:56]} ..."
