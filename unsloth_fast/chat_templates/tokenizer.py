"""A tokenizer's chat template: one of the published formats, or the user's own, for messages in the user's keys."""

import json
import logging
from collections.abc import Mapping
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

from tokenizers import Tokenizer
from transformers import ProcessorMixin

from unsloth_fast.chat_templates.formats import FORMATS, FORMATS_BY_PLAIN_NAME, Format, plain_name
from unsloth_fast.data.types import ProcessingClass
from unsloth_ref.checks import counted

Processing = TypeVar("Processing", bound=ProcessingClass)

logger = logging.getLogger(__name__)

STANDARD_MAPPING = {"role": "role", "content": "content", "user": "user", "assistant": "assistant"}


def get_chat_template(
    tokenizer: Processing,
    chat_template: str | tuple[str, str] | None = None,
    mapping: Mapping[str, str] = STANDARD_MAPPING,
    map_eos_token: bool = True,
    system_message: str | None = None,
) -> Processing:
    """Set a tokenizer's chat template.

    Args:
        tokenizer: a tokenizer, or a processor that has one; it is changed.
        chat_template: the name of a format, in any spelling ("llama-3.1", "llama31"), also of one that the installed
            trl ships ("gpt-oss"); or a Jinja template of your own and the token that ends its turns ("eos_token" for
            the tokenizer's own). None keeps the tokenizer's template, and sets ChatML where it has none.
        mapping: how your messages name the keys "role" and "content" and the roles "user" and "assistant", such as
            {"role": "from", "content": "value", "user": "human", "assistant": "gpt"} for ShareGPT. Standard messages
            are read as well.
        map_eos_token: whether the token that ends a turn becomes the tokenizer's `eos_token`. If the vocabulary has no
            such token, the `eos_token` takes its spelling and keeps its index. The vocabulary never grows.
        system_message: the system message of conversations that have none; None for the format's own, if it has one.

    Returns:
        The tokenizer or processor that was given.

    Raises:
        ValueError: an unknown name or mapping; a format that ends turns with `eos_token`, for a tokenizer without one.
    """
    inner = tokenizer.tokenizer if isinstance(tokenizer, ProcessorMixin) else tokenizer
    chosen = _choose(inner, chat_template)
    if chosen is None:
        template: Any = tokenizer.chat_template or inner.chat_template
    else:
        template = chosen.template
        if "eos_token" in template and not inner.eos_token:
            raise ValueError(
                "tokenizer: got one without eos_token; allowed: one with the eos_token that ends its turns"
            )
        _end_turns(inner, chosen.end, map_eos_token)
    default = chosen.system if system_message is None and chosen is not None else system_message
    if head := _head(mapping, default):
        if not isinstance(template, str):
            raise ValueError(
                f"chat_template: got None for a tokenizer with the templates {', '.join(map(repr, template))}; "
                "allowed: a name, or a template and its end token, to use with mapping or system_message"
            )
        template = head + template
    inner.chat_template = template
    if tokenizer is not inner:
        tokenizer.chat_template = template
    return tokenizer


def _choose(tokenizer: Any, asked: Any) -> Format | None:
    """The format that was asked for; None to keep the tokenizer's own template."""
    if asked is None and tokenizer.chat_template:
        return None
    if asked is None:
        logger.info("chat_template: the tokenizer has none, ChatML is used")
        return FORMATS["chatml"]
    if isinstance(asked, tuple | list) and len(asked) == 2 and all(isinstance(part, str) for part in asked):
        template, end = asked
        return Format(template, "" if end == "eos_token" else end)
    if not isinstance(asked, str):
        raise ValueError(f"chat_template: got {asked!r}; allowed: a name, or (template, end token)")
    if "{%" in asked or "{{" in asked:
        return Format(asked)
    if found := FORMATS_BY_PLAIN_NAME.get(plain_name(asked)):
        return found
    of_trl = _files_of_trl()
    if path := of_trl.get(plain_name(asked)):
        return Format(path.read_text(encoding="utf-8"))
    others = [path.stem for name, path in of_trl.items() if name not in FORMATS_BY_PLAIN_NAME]
    others = [name for name in others if not name.endswith("_training")]  # variants of the others
    near = get_close_matches(asked, [*FORMATS, *others], n=1)
    raise ValueError(
        f"chat_template: got {asked!r}; allowed: {', '.join(sorted(FORMATS))}, "
        + (f"those of the installed trl ({', '.join(others)}), " if others else "")
        + "a template of your own as (template, end token), or None for the tokenizer's own"
        + (f" (the nearest name is {near[0]!r})" if near else "")
    )


def _files_of_trl() -> dict[str, Path]:
    """The templates of further families of models that the installed trl ships, by their plain names."""
    spec = find_spec("trl")
    folder = Path(spec.origin).parent / "chat_templates" if spec and spec.origin else Path()
    paths = sorted(folder.glob("*.jinja")) if folder.name == "chat_templates" else []
    return {plain_name(path.stem): path for path in paths}


def _head(mapping: Mapping[str, str], system_message: str | None) -> str:
    """Jinja that puts the messages into the standard form, and a system message before them."""
    if not isinstance(mapping, Mapping) or not mapping.keys() <= STANDARD_MAPPING.keys():
        keys = ", ".join(map(repr, mapping))
        raise ValueError(f"mapping: got {keys}; allowed: {', '.join(map(repr, STANDARD_MAPPING))}")
    names = STANDARD_MAPPING | dict(mapping)
    head = ""
    if names != STANDARD_MAPPING:
        role, content = json.dumps(names["role"]), json.dumps(names["content"])
        roles = json.dumps({names["user"]: "user", names["assistant"]: "assistant"}, ensure_ascii=False)
        head += (
            "{%- set mapped = namespace(messages=[]) %}{%- for message in messages %}"
            f"{{%- set role = message[{role}] if {role} in message else message['role'] %}}"
            f"{{%- set content = message[{content}] if {content} in message else message['content'] %}}"
            f"{{%- set role = {roles}.get(role, role) %}}"
            "{%- set mapped.messages = mapped.messages + [dict(message, role=role, content=content)] %}"
            "{%- endfor %}{%- set messages = mapped.messages %}"
        )
    if system_message is not None:
        text = json.dumps(system_message, ensure_ascii=False)
        head += (
            "{%- if not messages or messages[0]['role'] != 'system' %}"
            f"{{%- set messages = [{{'role': 'system', 'content': {text}}}] + messages %}}"
            "{%- endif %}"
        )
    return head + "\n" if head else ""  # Jinja drops the newline after a block: this one, not the template's


def _end_turns(tokenizer: Any, end: str, map_eos_token: bool) -> None:
    """Make the token that ends a turn the tokenizer's eos_token, by its index or by its spelling."""
    if not end or end == tokenizer.eos_token:
        return
    known = end in tokenizer.get_vocab()
    if not map_eos_token:
        if not known:
            logger.warning(
                "%r is no token of this tokenizer, which reads it as %s",
                end,
                counted(len(tokenizer.tokenize(end)), "token"),
            )
        return
    before = tokenizer.eos_token
    if known:
        size = len(tokenizer)
        tokenizer.add_special_tokens({"eos_token": end})
        assert len(tokenizer) == size
        logger.info("eos_token: %r, index %d, which ends a turn, instead of %r", end, tokenizer.eos_token_id, before)
    elif before and getattr(tokenizer, "is_fast", False):
        _respell(tokenizer, before, end)
        logger.warning(
            "eos_token: %r, index %d, is written %r now, as the vocabulary has no such token; its size is unchanged",
            *(before, tokenizer.eos_token_id, end),
        )
    else:
        logger.warning("eos_token: stays %r, as %r is no token of this tokenizer", before, end)


def _respell(tokenizer: Any, before: str, after: str) -> None:
    """Give a token another spelling, in the vocabulary, the added tokens and the special tokens."""

    def renamed(value: Any) -> Any:
        if isinstance(value, dict):
            return {renamed(key): renamed(entry) for key, entry in value.items()}
        if isinstance(value, list):
            return [renamed(entry) for entry in value]
        return after if value == before else value

    state = json.loads(tokenizer.backend_tokenizer.to_str())
    model = state["model"]
    vocabulary = model["vocab"]
    if isinstance(vocabulary, dict):
        model["vocab"] = {after if token == before else token: index for token, index in vocabulary.items()}
    else:  # of a unigram model: [token, score]
        model["vocab"] = [[after if token == before else token, score] for token, score in vocabulary]
    model["unk_token"] = renamed(model.get("unk_token"))
    state["added_tokens"] = renamed(state["added_tokens"])
    state["post_processor"] = renamed(state["post_processor"])
    names = [name for name, token in tokenizer.special_tokens_map.items() if token == before]
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(state, ensure_ascii=False))
    for name in names:
        setattr(tokenizer, name, after)
