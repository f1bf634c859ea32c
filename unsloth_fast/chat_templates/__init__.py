"""Chat templates, conversations and training on responses only, under the names that Unsloth's scripts import."""

from unsloth_fast.chat_templates.conversations import standardize_data_formats, standardize_sharegpt, to_sharegpt
from unsloth_fast.chat_templates.custom import apply_chat_template
from unsloth_fast.chat_templates.formats import FORMATS
from unsloth_fast.chat_templates.responses import train_on_responses_only
from unsloth_fast.chat_templates.tokenizer import get_chat_template
from unsloth_fast.unsupported import missing

CHAT_TEMPLATES = {name: (entry.template, entry.end or "eos_token") for name, entry in FORMATS.items()}

__all__ = [
    "CHAT_TEMPLATES",
    "apply_chat_template",
    "get_chat_template",
    "standardize_data_formats",
    "standardize_sharegpt",
    "to_sharegpt",
    "train_on_responses_only",
]


def __getattr__(name: str) -> object:
    raise missing(__name__, name)
