"""Does a file follow its published JSON Schema? The part of the language that conformance/gate/ledger.schema.json uses.

Keywords: type, const, minimum, required, properties, additionalProperties, items, anyOf, and $ref within the file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import isfinite
from pathlib import Path
from typing import Any

TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "number": (int, float),
    "integer": (int,),
    "null": (type(None),),
}
LEDGER: dict[str, Any] = json.loads(Path(__file__).with_name("ledger.schema.json").read_text(encoding="utf-8"))


def problem(value: Any, schema: Mapping[str, Any], root: Mapping[str, Any], where: str = "file") -> str | None:
    """What is wrong with a value, in one line; None if nothing is.

    Args:
        value: as `json.loads` returns it.
        schema: what it must follow.
        root: the whole schema, in which references are looked up.
        where: the place of the value, for the message.
    """
    if "$ref" in schema:
        schema = root["$defs"][schema["$ref"].rpartition("/")[2]]
    if "const" in schema and value != schema["const"]:
        return f"{where}: got {value!r}; allowed: {schema['const']!r}"
    if "type" in schema and not _is(value, schema["type"]):
        return f"{where}: got {value!r}; allowed: {schema['type']}"
    if "minimum" in schema and value is not None and value < schema["minimum"]:
        return f"{where}: got {value!r}; allowed: {schema['minimum']} or more"
    if "anyOf" in schema:
        problems = [problem(value, one, root, where) for one in schema["anyOf"]]
        return None if None in problems else _of_same_kind([one for one in problems if one])
    if isinstance(value, list) and "items" in schema:
        found = (problem(one, schema["items"], root, f"{where}[{index}]") for index, one in enumerate(value))
        return next((one for one in found if one), None)
    return _of_object(value, schema, root, where) if isinstance(value, dict) else None


def _of_object(value: Mapping[str, Any], schema: Mapping[str, Any], root: Mapping[str, Any], where: str) -> str | None:
    for name in schema.get("required", ()):
        if name not in value:
            return f"{where}: has no {name}"
    known, others = schema.get("properties", {}), schema.get("additionalProperties", True)
    for name, one in value.items():
        if name not in known and others is False:
            return f"{where}: got {name!r}; allowed: {', '.join(known)}"
        rule = known.get(name, others if isinstance(others, dict) else {})
        if found := problem(one, rule, root, f"{where}.{name}"):
            return found
    return None


def _of_same_kind(problems: list[str]) -> str:
    """The problem of the alternative that was meant: any but one whose kind is another."""
    return next((one for one in problems if ".kind:" not in one and "has no" not in one), problems[0])


def _is(value: Any, types: str | list[str]) -> bool:
    names = [types] if isinstance(types, str) else types
    if isinstance(value, float) and not isfinite(value):  # JSON has 1e999, which Python reads as infinite
        return False
    return not isinstance(value, bool) and any(isinstance(value, TYPES[name]) for name in names)
