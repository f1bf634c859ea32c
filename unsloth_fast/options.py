"""The options of `unsloth-fast sft`: TRL's parser, with the words that people write in YAML and on a command line."""

import argparse
import re
from collections.abc import Iterable, Sequence
from dataclasses import fields
from typing import Any, NoReturn

from trl import TrlParser

from unsloth_fast.keywords import CONVERTED, RENAMED, WITHOUT_EFFECT, current_names
from unsloth_fast.seams import overrides

_EXPONENT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")  # a number, but text for YAML 1.1 without dot and sign
_OFF = {"report_to": "none"}  # what `no` means, where it is not "no"
_NO = ("no", "off", "false")  # which YAML reads as False


class Parser(TrlParser):
    """TRL's parser. A bool needs no value, `--no_NAME` turns it off, and names of older releases are accepted."""

    def __init__(self, dataclass_types: Iterable[Any], **keywords: Any) -> None:
        types: Any = list(dataclass_types)
        super().__init__(types, **keywords)
        switches = {entry.name for kind in types for entry in fields(kind) if entry.type in (bool, bool | None)}
        for name in sorted(switches):
            option = self._option_string_actions[f"--{name}"]
            option.nargs, option.const = "?", True
            off = [f"--no_{name}", f"--no-{name.replace('_', '-')}"]
            if off[0] not in self._option_string_actions:
                names = list(dict.fromkeys(off))
                self.add_argument(*names, action="store_false", dest=name, default=None, help=argparse.SUPPRESS)

    @overrides(TrlParser)
    def error(self, message: str) -> NoReturn:  # argparse's own prints the usage: about 400 lines
        """Raise ValueError for a mistake on the command line."""
        raise ValueError(message)

    @overrides(TrlParser)
    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """argparse's, with names of older releases under their names today."""
        return super().parse_known_args(list(self._in_current_names(args or ())), namespace)

    @overrides(TrlParser)
    def set_defaults_with_config(self, **kwargs: Any) -> list[str]:
        """Take the values of a configuration file as defaults."""
        options = {action.dest: action for action in self._actions}
        values = current_names([*options, "env"], kwargs)
        for name, value in values.items():
            if name in options:
                values[name] = _as_meant(value, options[name])
        return super().set_defaults_with_config(**values)

    def _in_current_names(self, args: Iterable[str]) -> Iterable[str]:
        known, rest = {action.dest for action in self._actions}, list(args)
        while rest:
            option, is_joined, value = rest.pop(0).partition("=")
            name = option.removeprefix("--").replace("-", "_")
            if option.startswith("--") and name in _OFF:
                if is_joined and value.lower() in _NO:
                    value = _OFF[name]
                elif not is_joined and rest and rest[0].lower() in _NO:
                    rest[0] = _OFF[name]
            if not option.startswith("--") or name in known or name not in (*RENAMED, *CONVERTED, *WITHOUT_EFFECT):
                yield option + is_joined + value
                continue
            if not is_joined:
                value = rest.pop(0) if rest and not rest[0].startswith("--") else "true"
            for today, converted in current_names(known, {name: _literal(value)}).items():
                yield from (f"--{today}", *(map(str, converted) if isinstance(converted, list) else [str(converted)]))


def _literal(text: str) -> Any:
    words = {"true": True, "false": False, "none": None, "null": None}
    if text.lower() in words:
        return words[text.lower()]
    try:
        return float(text) if "." in text or _EXPONENT.fullmatch(text) else int(text)
    except ValueError:
        return text


def _as_meant(value: Any, option: argparse.Action) -> Any:
    """A value of a YAML file, as its author meant it.

    YAML 1.1 reads `no` as False, and a number such as 1e-6 as text. A list of one word may be written without brackets.
    """
    is_switch = option.nargs == "?"
    if value is False and not is_switch:
        return _OFF.get(option.dest, "no")
    if isinstance(value, str) and option.nargs == "+":
        return re.split(r"[,\s]+", value.strip())
    return _numbers(value) if isinstance(value, dict) else value


def _numbers(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _numbers(entry) for name, entry in value.items()}
    return float(value) if isinstance(value, str) and _EXPONENT.fullmatch(value) else value


def target_modules(target: Any) -> Any:
    """The target modules of an adapter, where TRL made text of a list of one name: peft reads text as a pattern."""
    is_name = isinstance(target, str) and re.fullmatch(r"[\w.]+", target)
    return [target] if is_name else target
