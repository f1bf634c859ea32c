"""The text that a chat template writes before what a user says, and before a response."""

import re
from typing import Any

from jinja2 import TemplateError

from unsloth_fast.data.turns import TEXTS, written
from unsloth_fast.data.types import ProcessingClass


def find_parts(tokenizer: ProcessingClass) -> tuple[str, str]:
    """The text before the content of a user, and before that of the assistant, in a tokenizer's chat template.

    The token that ends the previous turn is in neither: it belongs to the response that it ends.

    Args:
        tokenizer: a tokenizer or a processor with a chat template.

    Returns:
        The instruction part and the response part.

    Raises:
        ValueError: there is no template, or it writes such a conversation in another way.
    """
    if not tokenizer.chat_template:
        raise ValueError(
            "instruction_part, response_part: got None, and the tokenizer has no chat template; allowed: both texts, "
            "or a tokenizer with a template (see `get_chat_template`)"
        )
    try:
        return _parts(tokenizer)
    except (TemplateError, TypeError, ValueError) as error:
        raise ValueError(
            "instruction_part, response_part: got None, and they could not be found in the tokenizer's chat template "
            f"({error}); allowed: the text before what a user says, and before a response"
        ) from error


def _parts(tokenizer: Any) -> tuple[str, str]:
    whole = written(tokenizer, 4)
    # An answer may be written otherwise where it is the last, such as with a place for its reasoning.
    before_answer = _common(tokenizer, _between(whole, 0), _between(whole, 2))
    after_answer = _between(whole, 1)
    asked = written(tokenizer, 1)
    prompt = _without(tokenizer, written(tokenizer, 1, prompt=True), asked)
    if prompt and prompt in before_answer:
        response = prompt
    elif prompt:
        response = _without(tokenizer, before_answer, asked.rpartition(TEXTS[0])[2])
    else:
        response = before_answer
    end = written(tokenizer, 2, prompt=True).rpartition(TEXTS[1])[2].removesuffix(prompt)
    instruction = _without(tokenizer, after_answer, end)
    if not instruction.strip() or not response.strip():
        raise ValueError("it writes no text there")
    return instruction, response


def _between(whole: str, index: int) -> str:
    """The text between two of the contents."""
    first, second = (whole.find(text) for text in TEXTS[index : index + 2])
    if first < 0 or second < 0:
        raise ValueError("it does not write every message")
    return whole[first + len(TEXTS[index]) : second]


def _without(tokenizer: Any, text: str, beginning: str) -> str:
    """The text after what it has in common with a beginning."""
    return text[len(_common(tokenizer, text, beginning)) :]


def _common(tokenizer: Any, first: str, second: str) -> str:
    """The common beginning of two texts, no special token of either cut apart."""
    tokens = sorted(map(re.escape, getattr(tokenizer, "tokenizer", tokenizer).get_added_vocab()), key=len, reverse=True)
    pieces = re.compile("|".join([*tokens, r"<[^<>\s]*>", "."]), re.DOTALL)
    common = ""
    for one, other in zip(pieces.findall(first), pieces.findall(second), strict=False):
        if one != other:
            break
        common += one
    return common
