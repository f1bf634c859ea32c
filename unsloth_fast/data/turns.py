"""What a tokenizer's chat template writes around the messages of a short conversation."""

from collections.abc import Callable
from typing import Any

from jinja2 import TemplateError

from unsloth_fast.data.types import ProcessingClass

TEXTS = ("Alpha1", "Bravo2", "Charlie3", "Delta4")
_ROLES = ("user", "assistant", "user", "assistant")


def written(tokenizer: ProcessingClass, count: int, prompt: bool = False) -> str:
    """The first messages of a conversation with the contents `TEXTS`, as the template writes them.

    Args:
        tokenizer: a tokenizer or a processor with a chat template.
        count: how many messages, at most 4: of a user and the assistant in turn.
        prompt: whether the generation prompt follows.

    Raises:
        TemplateError, TypeError or ValueError: the template does not take such messages.
    """
    messages: list[dict[str, Any]] = [
        {"role": role, "content": text} for role, text in zip(_ROLES[:count], TEXTS[:count], strict=True)
    ]
    options: dict[str, Any] = {"tokenize": False, "add_generation_prompt": prompt}
    template: Callable[..., Any] = tokenizer.apply_chat_template
    try:
        return template(messages, **options)
    except (TemplateError, TypeError):  # some templates take only lists of parts as content
        for message in messages:
            message["content"] = [{"type": "text", "text": message["content"]}]
        return template(messages, **options)


def ends_of_turns(tokenizer: ProcessingClass) -> tuple[str, ...]:
    """The parts that the template writes after an answer, after a question, and as the generation prompt.

    Without the whitespace that follows; an end that is whitespace alone is left out. () without a template, or where
    the template does not take such messages.
    """
    ends: list[str] = []
    for count, prompt in ((2, False), (1, False), (1, True)):
        try:
            text = written(tokenizer, count, prompt) if getattr(tokenizer, "chat_template", None) else ""
        except (TemplateError, TypeError, ValueError):
            continue
        _, found, end = text.rpartition(TEXTS[count - 1])
        if found and end.strip():
            ends.append(end.strip())
    return tuple(dict.fromkeys(ends))
