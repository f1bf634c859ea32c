"""Chat templates write the published bytes, and data sets become conversations."""

import logging
from pathlib import Path
from typing import Any

import pytest
import trl
from datasets import Dataset, DatasetDict, IterableDataset
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from tokenizers.decoders import ByteLevel
from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerFast

from tests import tiny
from unsloth_fast.chat_templates import (
    CHAT_TEMPLATES,
    apply_chat_template,
    get_chat_template,
    standardize_data_formats,
    standardize_sharegpt,
    to_sharegpt,
)

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": "4"},
]
MAPPING = {"role": "from", "content": "value", "user": "human", "assistant": "gpt"}
SHAREGPT = [
    {"from": {"user": "human", "assistant": "gpt"}.get(entry["role"], "system"), "value": entry["content"]}
    for entry in MESSAGES
]
DATE = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
QWEN = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions."
)
VICUNA_OLD = VICUNA.replace("curious user", "curious human").replace("the user's", "the human's")
ALPACA = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
UNSLOTH = "You are a helpful assistant to the user"

# Per format: the system's turn, that of a conversation without one, both turns of user and assistant, and the
# generation prompt; <s> and </s> are the tokenizer's begin and end tokens.
CHATML = (
    "<|im_start|>system\nBe brief.<|im_end|>\n",
    "",
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n",
    "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n4<|im_end|>\n",
    "<|im_start|>assistant\n",
)
LLAMA_3_TURNS = (
    "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    "Hello<|eot_id|>",
    "<|start_header_id|>user<|end_header_id|>\n\n2+2?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    "4<|eot_id|>",
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
)
LLAMA_3_1 = (
    f"<s><|start_header_id|>system<|end_header_id|>\n\n{DATE}Be brief.<|eot_id|>",
    f"<s><|start_header_id|>system<|end_header_id|>\n\n{DATE}<|eot_id|>",
    *LLAMA_3_TURNS,
)
PHI_3 = (
    "<|system|>\nBe brief.<|end|>\n",
    "",
    "<|user|>\nHi<|end|>\n<|assistant|>\nHello<|end|>\n",
    "<|user|>\n2+2?<|end|>\n<|assistant|>\n4<|end|>\n",
    "<|assistant|>\n",
)
GEMMA_TURNS = (
    "Hi<end_of_turn>\n<start_of_turn>model\nHello<end_of_turn>\n",
    "<start_of_turn>user\n2+2?<end_of_turn>\n<start_of_turn>model\n4<end_of_turn>\n",
    "<start_of_turn>model\n",
)
GEMMA_3 = ("<s><start_of_turn>user\nBe brief.\n\n", "<s><start_of_turn>user\n", *GEMMA_TURNS)
BYTES: dict[str, tuple[str, str, str, str, str]] = {
    "chatml": CHATML,
    "yi-chat": CHATML,
    "qwen3-instruct": CHATML,
    "qwen3": (*CHATML[:3], CHATML[3].replace("4", "<think>\n\n</think>\n\n4"), CHATML[4]),
    "qwen3-thinking": (*CHATML[:3], CHATML[3].replace("4", "<think>\n\n</think>\n\n4"), CHATML[4] + "<think>\n"),
    "qwen-2.5": (CHATML[0], CHATML[0].replace("Be brief.", QWEN), *CHATML[2:]),
    "llama-3": ("<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>", "<s>", *LLAMA_3_TURNS),
    "llama-3.1": LLAMA_3_1,
    "llama-3.2": LLAMA_3_1,
    "llama-3.3": LLAMA_3_1,
    "llama": (
        "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\n",
        "<s>[INST] ",
        "Hi [/INST] Hello </s>",
        "<s>[INST] 2+2? [/INST] 4 </s>",
        "",
    ),
    "mistral": ("<s>[INST] Be brief.\n\n", "<s>[INST] ", "Hi [/INST]Hello</s>", "[INST] 2+2? [/INST]4</s>", ""),
    "gemma": GEMMA_3,
    "gemma2": GEMMA_3,
    "gemma-3": GEMMA_3,
    "gemma-3n": GEMMA_3,
    "phi-3": PHI_3,
    "phi-3.5": PHI_3,
    "phi-4": (
        "<|im_start|>system<|im_sep|>Be brief.<|im_end|>",
        "",
        "<|im_start|>user<|im_sep|>Hi<|im_end|><|im_start|>assistant<|im_sep|>Hello<|im_end|>",
        "<|im_start|>user<|im_sep|>2+2?<|im_end|><|im_start|>assistant<|im_sep|>4<|im_end|>",
        "<|im_start|>assistant<|im_sep|>",
    ),
    "zephyr": (
        "<|system|>\nBe brief.</s>\n",
        "",
        "<|user|>\nHi</s>\n<|assistant|>\nHello</s>\n",
        "<|user|>\n2+2?</s>\n<|assistant|>\n4</s>\n",
        "<|assistant|>\n",
    ),
    "vicuna": (
        "<s>Be brief. ",
        f"<s>{VICUNA} ",
        "USER: Hi ASSISTANT: Hello</s>",
        "USER: 2+2? ASSISTANT: 4</s>",
        "ASSISTANT:",
    ),
    "vicuna_old": (
        "<s>Be brief.",
        f"<s>{VICUNA_OLD}",
        "\n### Human: Hi\n### Assistant: Hello</s>",
        "\n### Human: 2+2?\n### Assistant: 4</s>",
        "\n### Assistant:",
    ),
    "alpaca": (
        "<s>Be brief.",
        f"<s>{ALPACA}",
        "\n\n### Instruction:\nHi\n\n### Response:\nHello</s>",
        "\n\n### Instruction:\n2+2?\n\n### Response:\n4</s>",
        "\n\n### Response:\n",
    ),
    "unsloth": (
        "<s>Be brief.\n",
        f"<s>{UNSLOTH}\n",
        ">>> User: Hi\n>>> Assistant: Hello</s>\n",
        ">>> User: 2+2?\n>>> Assistant: 4</s>\n",
        ">>> Assistant: ",
    ),
    "starling": (
        "<s>GPT4 Correct System: Be brief.<|end_of_turn|>",
        "<s>",
        "GPT4 Correct User: Hi<|end_of_turn|>GPT4 Correct Assistant: Hello<|end_of_turn|>",
        "GPT4 Correct User: 2+2?<|end_of_turn|>GPT4 Correct Assistant: 4<|end_of_turn|>",
        "GPT4 Correct Assistant:",
    ),
}
BYTES["llama-2"] = BYTES["llama"]


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
    """As the models' repositories ship them, for tools, reasoning and content with spaces around it."""
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
    with pytest.raises(
        ValueError, match=r"chat_template: got 'lama'; allowed: alpaca, chatml, .*zephyr, a template of"
    ):
        get_chat_template(tokenizer(), "lama")
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
    assert "'<|im_end|>' is no token of this tokenizer and is read as 10 tokens" in caplog.text


def test_a_tokenizer_without_an_end_token() -> None:
    made = tokenizer()
    made.eos_token = None
    with pytest.raises(ValueError, match="tokenizer: got one without eos_token; allowed: one with the eos_token"):
        get_chat_template(made, "zephyr")


@pytest.mark.parametrize("name", BYTES)
def test_marks_of_the_assistants_tokens(name: str) -> None:
    """From after the generation prompt to the end of the turn, so that TRL's assistant_only_loss can be used."""
    made = get_chat_template(tokenizer(), name, map_eos_token=False)
    messages = MESSAGES[1:]
    options: dict[str, Any] = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
    encoded = made.apply_chat_template(messages, date_string="26 Jul 2024", **options)
    ids, mask = encoded["input_ids"], encoded["assistant_masks"]
    marked = "".join(made.decode([token]) for token, marked in zip(ids, mask, strict=True) if marked)
    _, _, first, second, prompt = BYTES[name]
    head = prompt.removesuffix("<think>\n") or (" [/INST] " if "llama" in name else " [/INST]")
    assert marked == first.rpartition(head)[2] + second.rpartition(head)[2]


# Data sets


def data(conversations: Any, column: str = "conversations", streamed: bool = False) -> Any:
    rows = Dataset.from_list([{column: entry, "id": index} for index, entry in enumerate(conversations)])
    return rows.to_iterable_dataset() if streamed else rows


@pytest.mark.parametrize("standardize", [standardize_sharegpt, standardize_data_formats])
@pytest.mark.parametrize("column", ["conversations", "messages", "chat"])
@pytest.mark.parametrize("streamed", [False, True])
def test_sharegpt_becomes_standard(standardize: Any, column: str, streamed: bool) -> None:
    found = standardize(data([SHAREGPT, [], SHAREGPT[1:3]], column, streamed))
    assert isinstance(found, IterableDataset) == streamed
    rows = list(found)
    assert [row[column] for row in rows] == [MESSAGES, [], MESSAGES[1:3]]
    assert [row["id"] for row in rows] == [0, 1, 2]


def test_an_empty_conversation_first() -> None:
    assert list(standardize_sharegpt(data([[], SHAREGPT])))[1]["conversations"] == MESSAGES


def test_a_standard_data_set_is_returned_as_it_is() -> None:
    given = data([MESSAGES, MESSAGES[:2]])
    assert standardize_sharegpt(given) is given
    other = Dataset.from_dict({"text": ["a"], "numbers": [[1, 2]]})
    assert standardize_sharegpt(other) is other


def test_roles_of_other_names_in_standard_keys() -> None:
    rows = [
        [{"role": "human", "content": "a"}, {"role": "bot", "content": "b"}, {"role": "observation", "content": "c"}]
    ]
    found = standardize_sharegpt(data(rows), aliases_for_assistant=["bot"])
    assert [entry["role"] for entry in found[0]["conversations"]] == ["user", "assistant", "tool"]


def test_further_keys_of_a_message_are_kept() -> None:
    found = standardize_sharegpt(data([[{"from": "human", "value": "a", "name": "x"}, {"from": "gpt", "value": "b"}]]))
    first, second = found[0]["conversations"]
    assert first == {"role": "user", "content": "a", "name": "x"}
    assert (second["role"], second["content"]) == ("assistant", "b")


def test_several_splits() -> None:
    found = standardize_sharegpt(DatasetDict({"train": data([SHAREGPT]), "test": data([SHAREGPT])}))
    assert isinstance(found, DatasetDict)
    assert found["test"][0]["conversations"] == MESSAGES


def test_no_row() -> None:
    with pytest.raises(ValueError, match="dataset: got no row; allowed: at least one"):
        standardize_sharegpt(Dataset.from_dict({"conversations": []}))


ALPACA_ROWS = {
    "instruction": ["Add", "Sing", "Count", "Name"],
    "input": ["1 and 2", "", None, "a dog"],
    "output": ["3", "la", "1 2 3", "Rex"],
}


@pytest.mark.parametrize("streamed", [False, True])
def test_columns_become_conversations(streamed: bool) -> None:
    rows = Dataset.from_dict(ALPACA_ROWS)
    found = to_sharegpt(
        rows.to_iterable_dataset() if streamed else rows, merged_prompt="{instruction}:[[\nWith: {input}.]]"
    )
    asked = ["Add:\nWith: 1 and 2.", "Sing:", "Count:", "Name:\nWith: a dog."]
    expected = [
        {"conversations": [{"from": "human", "value": text}, {"from": "gpt", "value": answer}]}
        for text, answer in zip(asked, ALPACA_ROWS["output"], strict=True)
    ]
    assert list(found) == expected


def test_longer_conversations() -> None:
    """Each begins with its own row; the further ones are drawn, each row as often as any other."""
    rows = Dataset.from_dict(ALPACA_ROWS)
    longer = to_sharegpt(rows, conversation_extension=3)
    assert longer.column_names == ["conversations"]
    answers = [[turn["value"] for turn in row["conversations"][1::2]] for row in longer]
    assert [entry[0] for entry in answers] == ALPACA_ROWS["output"]
    for place in range(3):
        assert sorted(entry[place] for entry in answers) == sorted(ALPACA_ROWS["output"])
    assert list(to_sharegpt(rows, conversation_extension=3)) == list(longer)
    wide = to_sharegpt(rows, conversation_extension=3, remove_unused_columns=False)
    assert (wide["conversations"][:], wide["input"][:]) == (longer["conversations"][:], ALPACA_ROWS["input"])
    assert list(to_sharegpt(rows, conversation_extension=3, random_state=1)) != list(longer)


def test_other_columns_are_kept_where_that_is_asked() -> None:
    rows = Dataset.from_dict(ALPACA_ROWS)
    found = to_sharegpt(rows, merged_prompt="{input}!", merged_column_name="merged", remove_unused_columns=False)
    assert set(found.column_names) == {"instruction", "input", "output", "merged", "conversations"}
    assert found["merged"][:2] == ["1 and 2!", "!"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"merged_prompt": "{instructions}"},
            r"merged_prompt: got \{instructions\}; allowed: \{instruction\}, \{input\}",
        ),
        ({"merged_prompt": "Hello"}, r"merged_prompt: got no \{column\}"),
        (
            {"output_column_name": "answer"},
            "output_column_name: got 'answer'; allowed: 'instruction', 'input', 'output'",
        ),
        ({"conversation_extension": 0}, "conversation_extension: got 0; allowed: an integer from 1"),
    ],
)
def test_columns_that_cannot_be_merged(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        to_sharegpt(Dataset.from_dict(ALPACA_ROWS), **options)


def test_a_stream_is_not_extended() -> None:
    with pytest.raises(ValueError, match="conversation_extension: got 2; allowed: 1 for a stream"):
        to_sharegpt(Dataset.from_dict(ALPACA_ROWS).to_iterable_dataset(), conversation_extension=2)


EXAMPLES = {
    "alpaca": (
        "Solve it.\n\n### Instruction:\n{INPUT}\n\n### Response:\n{OUTPUT}",
        "<s>Solve it.\n\n### Instruction:\nHi\n\n### Response:\nHello</s>"
        "\n\n### Instruction:\n2+2?\n\n### Response:\n4</s>",
    ),
    "two turns": (
        "Solve it.\n\n### Q:\n{INPUT}\n\n### A:\n{OUTPUT}\n\n### Q:\n{INPUT}\n\n### A:\n{OUTPUT}",
        "<s>Solve it.\n\n### Q:\nHi\n\n### A:\nHello</s>\n\n### Q:\n2+2?\n\n### A:\n4</s>",
    ),
    "system": (
        "{SYSTEM}\nUSER: {INPUT}\nASSISTANT: {OUTPUT}",
        "<s>Be kind.\nUSER: Hi\nASSISTANT: Hello</s>\nUSER: 2+2?\nASSISTANT: 4</s>",
    ),
    "headers": (
        "<s><h>system</h>{SYSTEM}<end><h>user</h>{INPUT}<end><h>assistant</h>{OUTPUT}<end>",
        "<s><h>system</h>Be kind.<end><h>user</h>Hi<end><h>assistant</h>Hello<end>"
        "<h>user</h>2+2?<end><h>assistant</h>4<end>",
    ),
    "lines": (
        ">>> Q: {INPUT}\n>>> A: {OUTPUT}\n",
        "<s>>>> Q: Hi\n>>> A: Hello</s>\n>>> Q: 2+2?\n>>> A: 4</s>\n",
    ),
}


@pytest.mark.parametrize("name", EXAMPLES)
@pytest.mark.parametrize("streamed", [False, True])
def test_a_template_by_example(name: str, streamed: bool) -> None:
    example, expected = EXAMPLES[name]
    made = tokenizer("<end>")
    system = "Be kind." if "{SYSTEM}" in example else None
    for rows in (SHAREGPT[1:], MESSAGES[1:]):
        found = apply_chat_template(data([rows], streamed=streamed), made, example, default_system_message=system)
        assert next(iter(found))["text"] == expected
    prompt = written(made, MESSAGES[1:2], add_generation_prompt=True)
    assert expected.startswith(prompt)
    assert expected[len(prompt) :].startswith("Hello")


def test_the_tokenizers_own_template_on_a_data_set() -> None:
    made = get_chat_template(tokenizer(), "chatml")
    found = apply_chat_template(data([SHAREGPT]), made)
    assert found["text"][0] == "".join(CHATML[:4])
    assert found.column_names == ["conversations", "id", "text"]


@pytest.mark.parametrize(
    ("example", "options", "message"),
    [
        ("Hello {INPUT}", {}, r"chat_template: got \{INPUT\}; allowed: \{INPUT\}, \{OUTPUT\}, once or twice, after"),
        ("Hello", {}, "chat_template: got no field"),
        ("{OUTPUT}{INPUT}", {}, r"chat_template: got \{OUTPUT\}, \{INPUT\}"),
        ("Q{INPUT}A{OUTPUT}", {"default_system_message": "S"}, "default_system_message: got 'S'; allowed: None, or a"),
    ],
)
def test_an_example_that_is_none(example: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        apply_chat_template(data([SHAREGPT]), tokenizer(), example, **options)


def test_a_data_set_without_conversations() -> None:
    with pytest.raises(ValueError, match="dataset: got the columns 'text'; allowed: one of conversations"):
        apply_chat_template(Dataset.from_dict({"text": ["a"]}), tokenizer(), EXAMPLES["alpaca"][0])
