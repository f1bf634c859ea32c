"""The published chat formats as Jinja templates, by the names that Unsloth's scripts use.

Each template is written from the format that the model's card, or the template in the model's repository, documents.
Answers of the assistant are marked with `{% generation %}`, from the end of the generation prompt to the end of the
turn, so that `assistant_only_loss=True` of TRL trains on the same tokens as `train_on_responses_only`.
"""

import json
import re
from typing import NamedTuple

from unsloth_fast.chat_templates import tools


class Format(NamedTuple):
    """A chat format.

    Attributes:
        template: Jinja, for messages with `role` and `content`.
        end: the token that ends a turn; empty where that is the tokenizer's own `eos_token`.
        system: the system message of a conversation that has none; None if the format has no default.
    """

    template: str
    end: str = ""
    system: str | None = None


def quoted(text: str) -> str:
    """A Jinja expression of the text, in which <EOS> is the tokenizer's end token."""
    strings = (json.dumps(piece, ensure_ascii=False) if piece else "" for piece in text.split("<EOS>"))
    terms = [term for string in strings for term in ("eos_token", string)][1:]
    return " + ".join(filter(None, terms)) or '""'


def turns(
    user: tuple[str, str],
    assistant: tuple[str, str, str],
    system: tuple[str, str] | None,
    *,
    bos: bool = True,
) -> str:
    """A template in which every role has fixed text before and after its content.

    Args:
        user: the text before and after the content of a user.
        assistant: the generation prompt, what separates it from an answer, and the text after an answer.
        system: as `user`; None where the format has no system role.
        bos: whether the text begins with the tokenizer's begin token.
    """
    prompt, lead, end = assistant
    roles = [("user", f"{{{{- {_content(*user)} }}}}")]
    answer = f"{{{{- {_content(lead, end)} }}}}"
    roles.append(
        ("assistant", f"{{{{- {quoted(prompt)} }}}}{{%- generation %}}{answer}{{%- endgeneration %}}"),
    )
    if system is not None:
        roles.append(("system", f"{{{{- {_content(*system)} }}}}"))
    branches = "{%- el".join(f"if message['role'] == '{role}' %}}\n        {text}\n    " for role, text in roles)
    begin = "{{- bos_token }}\n" if bos else ""
    return f"""{begin}{{%- for message in messages %}}
    {{%- {branches}{{%- else %}}
        {refusal(*(role for role, _ in roles))}
    {{%- endif %}}
{{%- endfor %}}
{{%- if add_generation_prompt %}}
    {{{{- {quoted(prompt)} }}}}
{{%- endif %}}"""


def refusal(*roles: str) -> str:
    """The Jinja statement that raises for a message of another role than these."""
    return f"{{{{- raise_exception(\"role: got '\" ~ message['role'] ~ \"'; allowed: {', '.join(roles)}\") }}}}"


def _content(before: str, after: str) -> str:
    """The Jinja expression of a message's content between fixed text."""
    return " + ".join(filter(None, (before and quoted(before), "message['content']", after and quoted(after))))


TRIMMED = "message['content'] | trim"

# Roles are written as they are, so that a turn of a tool has a place. https://github.com/openai/openai-python chatml.md
CHATML = """{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' }}
    {%- if message['role'] == 'assistant' %}
        {%- generation %}{{- message['content'] + '<|im_end|>\\n' }}{%- endgeneration %}
    {%- else %}
        {{- message['content'] + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}"""

# llama.com, "Meta Llama 3": header, blank line, text, <|eot_id|>; the begin token once.
LLAMA_3 = """{{- bos_token }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {%- if message['role'] == 'assistant' %}
        {%- generation %}{{- message['content'] | trim + '<|eot_id|>' }}{%- endgeneration %}
    {%- else %}
        {{- message['content'] | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}"""

# Takes a leading system message off `messages`, and puts it into `first`, which the next user's text follows.
_SYSTEM_FIRST = """{%- set first = '' %}
{%- if messages and messages[0]['role'] == 'system' %}
    {%- set first = FIRST %}
    {%- set messages = messages[1:] %}
{%- endif %}
"""
_ALTERNATE = """{%- for message in messages %}
    {%- if message['role'] not in ('user', 'assistant') or (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception("role: got '" ~ message['role'] ~ "' as message " ~ loop.index ~ "; allowed: user and \
assistant in turn, after NOTE") }}
    {%- endif %}
"""


def _alternating(body: str, *, note: str, first: str = "", begin: str = "{{- bos_token }}\n") -> str:
    """A template for users and assistants in turn; `first` is the expression of what a system message becomes."""
    head = _SYSTEM_FIRST.replace("FIRST", first) if first else ""
    return begin + head + _ALTERNATE.replace("NOTE", note) + body


_ONE_SYSTEM = "at most one system message"

# Llama 2: github.com/meta-llama/llama, generation.py: every pair of turns has its own begin and end tokens.
LLAMA_2 = _alternating(
    """    {%- if message['role'] == 'user' %}
        {{- bos_token }}{{- '[INST] ' + (first if loop.first else '') + message['content'] | trim + ' [/INST]' }}
    {%- else %}
        {{- ' ' }}{%- generation %}{{- message['content'] | trim + ' ' + eos_token }}{%- endgeneration %}
    {%- endif %}
{%- endfor %}""",
    first="'<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n'",
    begin="",
    note=_ONE_SYSTEM,
)

# Mistral-7B-Instruct-v0.2's template; as it has no system role, a system message begins the first user's text.
MISTRAL = _alternating(
    """    {%- if message['role'] == 'user' %}
        {{- '[INST] ' + (first if loop.first else '') + message['content'] + ' [/INST]' }}
    {%- else %}
        {%- generation %}{{- message['content'] + eos_token }}{%- endgeneration %}
    {%- endif %}
{%- endfor %}""",
    first="messages[0]['content'] + '\\n\\n'",
    note=_ONE_SYSTEM,
)

_GEMMA_TURNS = """    {{- '<start_of_turn>' + ('model' if message['role'] == 'assistant' else 'user') + '\\n' }}
    {%- if message['role'] == 'assistant' %}
        {%- generation %}{{- TEXT + '<end_of_turn>\\n' }}{%- endgeneration %}
    {%- else %}
        {{- FIRST + TEXT + '<end_of_turn>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<start_of_turn>model\\n' }}
{%- endif %}"""

# ai.google.dev/gemma/docs/formatting: no system role in Gemma and Gemma 2; it begins the first user's text in Gemma 3.
GEMMA = _alternating(
    _GEMMA_TURNS.replace("TEXT", TRIMMED).replace("FIRST + ", ""),
    note="no system message (put its text into the first user's message)",
)
_PARTS = """    {%- set found = namespace(text=message['content'] if message['content'] is string else '') %}
    {%- if message['content'] is not string %}
        {%- for part in message['content'] %}
            {%- if part['type'] == 'image' %}
                {%- set found.text = found.text + '<start_of_image>' %}
            {%- elif part['type'] == 'text' %}
                {%- set found.text = found.text + part['text'] | trim %}
            {%- endif %}
        {%- endfor %}
    {%- endif %}
"""
GEMMA_3 = _alternating(
    _PARTS + _GEMMA_TURNS.replace("TEXT", "found.text | trim").replace("FIRST", "(first if loop.first else '')"),
    first=(
        "(messages[0]['content'] if messages[0]['content'] is string else messages[0]['content'][0]['text']) + '\\n\\n'"
    ),
    note=_ONE_SYSTEM,
)

VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions."
)
VICUNA_OLD_SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the human's questions."
)
ALPACA_SYSTEM = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
)

PHI_3 = turns(
    ("<|user|>\n", "<|end|>\n"), ("<|assistant|>\n", "", "<|end|>\n"), ("<|system|>\n", "<|end|>\n"), bos=False
)
PHI_4 = turns(
    ("<|im_start|>user<|im_sep|>", "<|im_end|>"),
    ("<|im_start|>assistant<|im_sep|>", "", "<|im_end|>"),
    ("<|im_start|>system<|im_sep|>", "<|im_end|>"),
    bos=False,
)
ZEPHYR = turns(("<|user|>\n", "<EOS>\n"), ("<|assistant|>\n", "", "<EOS>\n"), ("<|system|>\n", "<EOS>\n"), bos=False)
# github.com/lm-sys/FastChat, conversation.py, "vicuna_v1.1".
VICUNA = turns(("USER: ", " "), ("ASSISTANT:", " ", "<EOS>"), ("", " "))
# The same, "zero_shot". That format has no end token, without which a model does not learn to stop: answers have one.
VICUNA_OLD = turns(("\n### Human: ", ""), ("\n### Assistant:", " ", "<EOS>"), ("", ""))
# github.com/tatsu-lab/stanford_alpaca, with the answer on a line of its own, as Unsloth's scripts write it.
ALPACA = turns(("\n\n### Instruction:\n", ""), ("\n\n### Response:\n", "", "<EOS>"), ("", ""))
UNSLOTH = turns((">>> User: ", "\n"), (">>> Assistant: ", "", "<EOS>\n"), ("", "\n"))
STARLING = turns(
    ("GPT4 Correct User: ", "<|end_of_turn|>"),
    ("GPT4 Correct Assistant:", " ", "<|end_of_turn|>"),
    ("GPT4 Correct System: ", "<|end_of_turn|>"),
)

FORMATS: dict[str, Format] = {
    "alpaca": Format(ALPACA, system=ALPACA_SYSTEM),
    "chatml": Format(CHATML, "<|im_end|>"),
    "gemma": Format(GEMMA, "<end_of_turn>"),
    "gemma2": Format(GEMMA, "<end_of_turn>"),
    "gemma-3": Format(GEMMA_3, "<end_of_turn>"),
    "gemma-3n": Format(GEMMA_3, "<end_of_turn>"),
    "llama": Format(LLAMA_2),
    "llama-2": Format(LLAMA_2),
    "llama-3": Format(LLAMA_3, "<|eot_id|>"),
    "llama-3.1": Format(tools.LLAMA_3_1, "<|eot_id|>"),
    "llama-3.2": Format(tools.LLAMA_3_2, "<|eot_id|>"),
    "llama-3.3": Format(tools.LLAMA_3_1, "<|eot_id|>"),
    "mistral": Format(MISTRAL),
    "phi-3": Format(PHI_3, "<|end|>"),
    "phi-3.5": Format(PHI_3, "<|end|>"),
    "phi-4": Format(PHI_4, "<|im_end|>"),
    "qwen-2.5": Format(tools.QWEN_2_5, "<|im_end|>"),
    "qwen3": Format(tools.QWEN_3, "<|im_end|>"),
    "qwen3-instruct": Format(tools.QWEN_3_INSTRUCT, "<|im_end|>"),
    "qwen3-thinking": Format(tools.QWEN_3_THINKING, "<|im_end|>"),
    "starling": Format(STARLING, "<|end_of_turn|>"),
    "unsloth": Format(UNSLOTH, system="You are a helpful assistant to the user"),
    "vicuna": Format(VICUNA, system=VICUNA_SYSTEM),
    "vicuna_old": Format(VICUNA_OLD, system=VICUNA_OLD_SYSTEM),
    "yi-chat": Format(CHATML, "<|im_end|>"),
    "zephyr": Format(ZEPHYR),
}


def plain_name(name: str) -> str:
    """The name without case, hyphens, dots and underscores, as users vary them: "Qwen-2.5" and "qwen25" are one."""
    return re.sub(r"[-_. ]", "", name.lower())


FORMATS_BY_PLAIN_NAME = {plain_name(name): entry for name, entry in FORMATS.items()}
