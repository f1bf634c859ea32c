"""A chat template written as one example, with {SYSTEM}, {INPUT} and {OUTPUT}, and its use on a data set."""

import re
from functools import partial
from typing import Any

from datasets import Dataset

from unsloth_fast.chat_templates.conversations import conversation_columns, standard_messages
from unsloth_fast.chat_templates.formats import quoted, turns
from unsloth_fast.chat_templates.tokenizer import get_chat_template
from unsloth_fast.data.nulls import renderer
from unsloth_fast.data.types import DataSet, ProcessingClass

ROLES = {"human": "user", "gpt": "assistant"}


def apply_chat_template(
    dataset: DataSet,
    tokenizer: ProcessingClass,
    chat_template: str | None = None,
    default_system_message: str | None = None,
    extra_eos_tokens: list[str] | None = None,
) -> DataSet:
    """Write each conversation of a data set as text, in a column "text".

    Nulls that Arrow adds to tool calls are left out. The text of a conversation without a message is empty.

    Args:
        dataset: a data set or a stream with a column of conversations, in the standard or in ShareGPT's form.
        tokenizer: whose template is used; `chat_template` becomes its template.
        chat_template: an example of a conversation, with {INPUT} for the user's text, {OUTPUT} for the answer and, if
            wanted, {SYSTEM} for the system message before them. It may show a second turn, {INPUT} and {OUTPUT} again;
            otherwise the text before {INPUT}, from the last run of the whitespace that begins the text between
            {INPUT} and {OUTPUT}, is repeated for each turn, and what precedes it is written once. An answer ends with
            the text that follows {OUTPUT}, if that begins with a special token; otherwise the tokenizer's end token is
            written first. None for the tokenizer's own template.
        default_system_message: the {SYSTEM} of conversations without a system message; None for none.
        extra_eos_tokens: not used; tokens that end the generation of an exported model.

    Returns:
        The data set, with a column "text".

    Raises:
        ValueError: a template without {INPUT} or {OUTPUT}, or with them in another order; a default_system_message
            without {SYSTEM}; no column of conversations.
    """
    column = next(iter(conversation_columns(dataset)), None)
    if column is None:
        names = ", ".join(map(repr, next(iter(dataset), {})))
        raise ValueError(
            f"dataset: got no conversation in the columns {names}; allowed: a column of conversations, as "
            "`to_sharegpt` makes them"
        )
    if chat_template is not None:
        built = jinja_of(chat_template, tokenizer)
        if "{SYSTEM}" not in chat_template and default_system_message is not None:
            raise ValueError(
                f"default_system_message: got {default_system_message!r}; allowed: None, or a chat_template with "
                "{SYSTEM}"
            )
        system = default_system_message or ("" if "{SYSTEM}" in chat_template else None)
        get_chat_template(tokenizer, (built, "eos_token"), system_message=system)
    elif default_system_message is not None:
        get_chat_template(tokenizer, system_message=default_system_message)
    options: dict[str, Any] = {"desc": "Applying the chat template"} if isinstance(dataset, Dataset) else {}
    without_nulls = renderer(tokenizer, dataset, "dataset", [column])
    return dataset.map(partial(_text, tokenizer=without_nulls, column=column), **options)


def _text(row: dict[str, Any], tokenizer: Any, column: str) -> dict[str, str]:
    messages = standard_messages(row[column] or [], ROLES)
    return {"text": tokenizer.apply_chat_template(messages, tokenize=False) if messages else ""}


def jinja_of(example: str, tokenizer: ProcessingClass) -> str:
    """The Jinja template of an example conversation, as `apply_chat_template` describes it."""
    fields = re.findall(r"\{(SYSTEM|INPUT|OUTPUT)\}", example)
    turn = ["INPUT", "OUTPUT"]
    if fields not in (turn, turn * 2, ["SYSTEM", *turn], ["SYSTEM", *turn * 2]):
        raise ValueError(
            f"chat_template: got {', '.join(f'{{{field}}}' for field in fields) or 'no field'}; allowed: "
            "{INPUT}, {OUTPUT}, once or twice, after at most one {SYSTEM}"
        )
    opening, *texts = re.split(r"\{(?:SYSTEM|INPUT|OUTPUT)\}", example)
    system = (opening, texts.pop(0)) if fields[0] == "SYSTEM" else None
    before = system[1] if system else opening
    between, after = texts[0], texts[-1]
    if len(texts) == 4:
        header, end = _split_end(texts[1], after)
    else:
        end = after
        header = _header(before, between, after)
    if not before.endswith(header):
        raise ValueError(
            f"chat_template: got {before!r} before the first {{INPUT}}; allowed: text that ends {header!r}"
        )
    once = before.removesuffix(header)
    named: Any = tokenizer
    if not any(end.startswith(token) for token in named.all_special_tokens):
        end = "<EOS>" + end
    bos = named.bos_token or ""
    written = opening.startswith(bos) if bos else True
    template = turns((header, ""), (between, "", end), (system[0], once) if system else None, bos=not written)
    # Without a {SYSTEM} the text before the first turn is written for every conversation.
    return template if system or not once else _after_bos(template, once, written)


def _header(before: str, between: str, after: str) -> str:
    """The part of the text before the first {INPUT} that is repeated for each turn."""
    written = before.rstrip()
    if after and after in written:  # the end of a turn of the system's
        return before[written.rindex(after) + len(after) :]
    space = between[: len(between) - len(between.lstrip())]
    return before[max(written.rfind(space), 0) :] if space else before


def _split_end(joint: str, after: str) -> tuple[str, str]:
    """The text between two turns: the header of the second, and the end of the first."""
    end = after if joint.startswith(after) else ""
    return joint.removeprefix(end), end


def _after_bos(template: str, once: str, written: bool) -> str:
    text = f"{{{{- {quoted(once)} }}}}\n"
    bos = "{{- bos_token }}\n"
    return text + template if written else bos + text + template.removeprefix(bos)
