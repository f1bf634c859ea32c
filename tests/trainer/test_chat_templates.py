"""Chat templates write the published bytes, and data sets become conversations."""

import logging
from pathlib import Path
from typing import Any

import pytest
import trl
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from tokenizers.decoders import ByteLevel
from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerFast

from tests import tiny
from tests.trainer.chat_formats import BYTES, CHATML, MAPPING, MESSAGES, SHAREGPT
from unsloth_fast.chat_templates import (
    CHAT_TEMPLATES,
    get_chat_template,
)


def tokenizer(*extra: str) -> PreTrainedTokenizerFast:
    """One token per byte, begin and end tokens as Llama 2 names them, and other special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    specials = ["<pad>", "<s>", "</s>", *extra]
    vocabulary = {token: index for index, token in enumerate([*specials, *alphabet])}
    built = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = ByteLevel()
    built.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    made = PreTrainedTokenizerFast(tokenizer_object=built, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    made.add_special_tokens({"additional_special_tokens": list(extra)})
    return made


def written(made: Any, messages: list[dict[str, Any]], **options: Any) -> str:
    if "date_string" not in options:
        options["date_string"] = "26 Jul 2024"
    return made.apply_chat_template(messages, tokenize=False, **options)


def test_every_format_has_its_bytes_here() -> None:
    assert BYTES.keys() == CHAT_TEMPLATES.keys()


@pytest.mark.parametrize("name", BYTES)
@pytest.mark.parametrize("system", [True, False])
def test_the_published_bytes(name: str, system: bool) -> None:
    if system and name in ("gemma", "gemma2"):
        pytest.skip("has no system role")
    with_system, without, first, second, prompt = BYTES[name]
    begin, messages = (with_system, MESSAGES) if system else (without, MESSAGES[1:])
    made = get_chat_template(tokenizer(), name, map_eos_token=False)
    whole = begin + first + second
    assert written(made, messages) == whole
    assert made.decode(made(whole, add_special_tokens=False)["input_ids"]) == whole
    head = prompt.removesuffix("<think>\n") or " [/INST]"  # what precedes an answer
    asked = whole[: whole.rindex(head)] + (prompt or head)
    assert written(made, messages[:-1], add_generation_prompt=True) == asked
    if name in ("qwen3", "qwen3-thinking"):  # the last answer has a place for its reasoning
        first = first.replace("Hello", "<think>\n\n</think>\n\nHello")
    assert written(made, messages[:-2]) == begin + first


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("gemma", "gemma"),
        ("gemma-3", "gemma3"),
        ("llama-3", "llama3"),
        ("llama-3.1", "llama3_1"),
        ("llama-3.2", "llama3_2"),
        ("qwen-2.5", "qwen2_5"),
        ("qwen3", "qwen3"),
        ("qwen3-instruct", "qwen3_instruct_2507"),
    ],
)
def test_the_bytes_of_the_models_own_template(name: str, file: str) -> None:
    """They are as the models' repositories ship them, for tools, reasoning and content with spaces around it."""
    path = Path(trl.__file__).parent / "chat_templates" / f"{file}.jinja"
    if not path.exists():
        pytest.skip("the installed trl does not ship it")
    theirs = tokenizer()
    theirs.chat_template = path.read_text(encoding="utf-8")
    made = get_chat_template(tokenizer(), name, map_eos_token=False)
    tool = {"type": "function", "function": {"name": "add", "parameters": {"a": "int"}}}
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": "x"}}}
    user, answer = {"role": "user", "content": " Hi \n"}, {"role": "assistant", "content": "\nHello "}
    thought = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nFour"}
    called = {"role": "assistant", "content": "", "tool_calls": [call]}
    tools = [user, called, {"role": "tool", "content": "3"}, answer]
    cases: list[tuple[list[dict[str, Any]], dict[str, Any]]] = [
        ([user, answer, user, answer], {}),
        ([user, answer, user], {"add_generation_prompt": True}),
    ]
    if not name.startswith("gemma"):
        cases += [
            (MESSAGES, {}),
            ([user, thought, user, thought], {}),
            ([*MESSAGES, *tools], {"tools": [tool]}),
            (tools, {"tools": [tool], "add_generation_prompt": True}),
            (tools, {"tools": [tool], "tools_in_user_message": False}),
            ([user], {"add_generation_prompt": True, "enable_thinking": False}),
            ([{"role": "user", "content": "a"}, {**thought, "reasoning_content": "so"}], {}),
        ]
    elif name == "gemma-3":
        cases += [(MESSAGES, {}), ([{"role": "user", "content": [{"type": "text", "text": " a "}]}], {})]
    for messages, options in cases:
        if name == "llama-3" and "tools" in options:
            continue  # it has no tools
        assert written(made, messages, **options) == written(theirs, messages, **options)


@pytest.mark.parametrize(
    "alias", ["Llama3.1", "llama_31", "qwen25", "qwen-3", "gemma3", "phi35", "ChatML", "vicuna-old"]
)
def test_spellings(alias: str) -> None:
    assert get_chat_template(tokenizer(), alias, map_eos_token=False).chat_template


def test_a_template_that_trl_ships() -> None:
    path = Path(trl.__file__).parent / "chat_templates" / "gptoss.jinja"
    if not path.exists():
        pytest.skip("the installed trl does not ship it")
    assert get_chat_template(tokenizer(), "gpt-oss").chat_template == path.read_text(encoding="utf-8")


def test_an_unknown_name() -> None:
    """The message lists all names, those of the installed trl too, and the nearest."""
    for name, near in (("lama", "llama"), ("gpt-os", "gptoss"), ("qwen", "qwen3"), ("nothing like it", None)):
        with pytest.raises(ValueError, match=f"^chat_template: got '{name}'; allowed: alpaca, chatml, .*zephyr, ") as e:
            get_chat_template(tokenizer(), name)
        of_trl = (Path(trl.__file__).parent / "chat_templates" / "gptoss.jinja").exists()
        assert ("those of the installed trl (" in str(e.value) and "gptoss, " in str(e.value)) == of_trl
        assert "a template of your own as (template, end token), or None for the tokenizer's own" in str(e.value)
        assert str(e.value).endswith(f"(the nearest name is '{near}')" if near else "own") or not of_trl
    with pytest.raises(ValueError, match=r"chat_template: got 3; allowed: a name, or \(template, end token\)"):
        get_chat_template(tokenizer(), 3)  # type: ignore[arg-type]


def test_a_role_that_the_format_lacks() -> None:
    made = get_chat_template(tokenizer(), "gemma")
    with pytest.raises(
        Exception, match="got 'system' as message 1; allowed: user and assistant in turn, after no system"
    ):
        written(made, MESSAGES)
    made = get_chat_template(tokenizer(), "vicuna")
    with pytest.raises(Exception, match="role: got 'tool'; allowed: user, assistant, system"):
        written(made, [{"role": "tool", "content": "x"}])


def test_the_tokenizers_own_template_is_kept() -> None:
    made = tokenizer()
    made.chat_template = "{{ messages[0]['content'] }}"
    assert get_chat_template(made) is made
    assert made.chat_template == "{{ messages[0]['content'] }}"
    assert made.eos_token == "</s>"
    assert get_chat_template(tokenizer()).chat_template == CHAT_TEMPLATES["chatml"][0]


def test_a_template_of_the_users() -> None:
    template = "{% for message in messages %}{{ message['content'] + eos_token }}{% endfor %}"
    made = get_chat_template(tokenizer(), (template, "eos_token"), mapping=MAPPING)
    assert written(made, SHAREGPT) == "Be brief.</s>Hi</s>Hello</s>2+2?</s>4</s>"
    made = get_chat_template(tokenizer("<turn>"), (template, "<turn>"))
    assert written(made, MESSAGES[:1]) == "Be brief.<turn>"
    made = get_chat_template(tokenizer(), ("\n \n" + template, "eos_token"), system_message="S")
    assert written(made, MESSAGES[1:2]) == "\n \nS</s>Hi</s>"


@pytest.mark.parametrize("name", BYTES)
def test_messages_in_the_users_keys(name: str) -> None:
    plain = get_chat_template(tokenizer(), name)
    mapped = get_chat_template(tokenizer(), name, mapping=MAPPING)
    start = 1 if name in ("gemma", "gemma2") else 0
    expected = written(plain, MESSAGES[start:])
    assert written(mapped, SHAREGPT[start:]) == expected == written(mapped, MESSAGES[start:])


def test_an_unknown_key_of_the_mapping() -> None:
    with pytest.raises(ValueError, match="mapping: got 'human'; allowed: 'role', 'content', 'user', 'assistant'"):
        get_chat_template(tokenizer(), "chatml", mapping={"human": "user"})


def test_a_system_message() -> None:
    made = get_chat_template(tokenizer(), "chatml", system_message='Say "it\'s" {{ x }}\nü')
    head = '<|im_start|>system\nSay "it\'s" {{ x }}\nü<|im_end|>\n'
    assert written(made, MESSAGES[1:]) == head + CHATML[2] + CHATML[3]
    assert written(made, MESSAGES) == "".join(CHATML[:4])
    made = get_chat_template(tokenizer(), "vicuna", system_message="S.")
    assert written(made, MESSAGES[1:3]) == "<s>S. USER: Hi ASSISTANT: Hello</s>"


def test_the_end_of_a_turn_is_the_eos_token_where_it_is_a_token(caplog: pytest.LogCaptureFixture) -> None:
    made = tokenizer("<|im_end|>")
    size = len(made)
    with caplog.at_level(logging.INFO):
        get_chat_template(made, "chatml")
    assert (made.eos_token, made.eos_token_id, len(made)) == ("<|im_end|>", 3, size)
    assert made.convert_tokens_to_ids("</s>") == 2
    assert "eos_token: '<|im_end|>', index 3, which ends a turn, instead of '</s>'" in caplog.text
    assert made("a<|im_end|>", add_special_tokens=False)["input_ids"][-1] == 3


def unigram() -> PreTrainedTokenizerFast:
    """Pieces with scores, as T5 and its kin have them."""
    pieces = [(token, 0.0) for token in ("<pad>", "<s>", "</s>", "<unk>")]
    built = Tokenizer(models.Unigram([*pieces, *((character, -1.0) for character in "▁w12")], unk_id=3))
    built.pre_tokenizer = pre_tokenizers.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=built, eos_token="</s>", pad_token="<pad>", unk_token="<unk>")


def llama() -> LlamaTokenizer:
    """The tokenizer's class of Llama 2, which builds its parts itself."""
    vocabulary = {token: index for index, token in enumerate(["<unk>", "<s>", "</s>", *"▁w12"])}
    return LlamaTokenizer(vocab=vocabulary, merges=[], pad_token="<unk>")


ENDS = {"bytes": tokenizer, "words": tiny.tokenizer, "unigram": unigram, "llama": llama}


@pytest.mark.parametrize("kind", ENDS)
def test_the_eos_token_takes_the_spelling_where_it_is_none(
    kind: str, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    """Its index stays, the vocabulary does not grow, and the tokenizer can be saved."""
    made: Any = ENDS[kind]()
    end = made.eos_token
    index, size, pad = made.eos_token_id, len(made), made.pad_token_id
    text = "w1 w2"
    before = made(text)["input_ids"]
    get_chat_template(made, "chatml")
    assert f"eos_token: '{end}', index {index}, is written '<|im_end|>' now" in caplog.text
    for one in (made, save_and_load(made, tmp_path)):
        assert (one.eos_token, one.eos_token_id, len(one), one.pad_token_id) == ("<|im_end|>", index, size, pad)
        assert one(text)["input_ids"] == before
        assert end not in one.get_vocab()
        assert one.apply_chat_template(MESSAGES[1:2], tokenize=True, return_dict=False).count(index) == 1


def save_and_load(made: Any, path: Path) -> Any:
    made.save_pretrained(path)
    return AutoTokenizer.from_pretrained(path)


def test_the_eos_token_stays_where_that_is_asked(caplog: pytest.LogCaptureFixture) -> None:
    made = get_chat_template(tokenizer(), "chatml", map_eos_token=False)
    assert (made.eos_token, made.eos_token_id) == ("</s>", 2)
    assert "'<|im_end|>' is no token of this tokenizer, which reads it as 10 tokens" in caplog.text


def test_a_tokenizer_without_an_end_token() -> None:
    made = tokenizer()
    made.eos_token = None
    with pytest.raises(ValueError, match="tokenizer: got one without eos_token; allowed: one with the eos_token"):
        get_chat_template(made, "zephyr")


@pytest.mark.parametrize("name", BYTES)
def test_marks_of_the_assistants_tokens(name: str) -> None:
    """They mark from after the generation prompt to the end of the turn, so TRL's assistant_only_loss can be used."""
    made = get_chat_template(tokenizer(), name, map_eos_token=False)
    messages = MESSAGES[1:]
    options: dict[str, Any] = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
    encoded = made.apply_chat_template(messages, date_string="26 Jul 2024", **options)
    ids, mask = encoded["input_ids"], encoded["assistant_masks"]
    marked = "".join(made.decode([token]) for token, marked in zip(ids, mask, strict=True) if marked)
    _, _, first, second, prompt = BYTES[name]
    head = prompt.removesuffix("<think>\n") or (" [/INST] " if "llama" in name else " [/INST]")
    assert marked == first.rpartition(head)[2] + second.rpartition(head)[2]
