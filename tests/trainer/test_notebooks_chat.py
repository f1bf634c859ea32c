"""Scripts in the shape of conversational notebooks train as TRL does on text and labels that are made by hand."""

from pathlib import Path

import pytest
from datasets import Dataset
from peft import LoraConfig
from transformers import DataCollatorForSeq2Seq
from trl import SFTConfig

from tests.trainer.notebooks import SETTINGS, by_hand, losses, run, save_model, train_with_trl
from tests.trainer.runs import TRL_DROPS_LABELS, arguments

pytestmark = pytest.mark.filterwarnings("ignore")

SHAREGPT = [
    [("human", "Why is the sky blue?"), ("gpt", "Because of the air.")],
    [("system", "Be brief."), ("human", "Add 1 and 2."), ("gpt", "3"), ("human", "And 4?"), ("gpt", "7.\n\nYes.")],
    [("human", "Who are you?"), ("gpt", "A model."), ("human", "The user said: assistant"), ("gpt", "user")],
    [("human", "Count to 3\n"), ("gpt", "1\n2\n3")],
] * 3
ALPACA = {
    "instruction": ["Add", "Count", "Say hi", "Spell"] * 3,
    "input": ["1 and 2", "", "", "sky"] * 3,
    "output": ["3", "1 2 3", "Hi", "s k y"] * 3,
}

CONVERSATIONAL = """
from unsloth import FastLanguageModel
from unsloth.chat_templates import get_chat_template, standardize_sharegpt, train_on_responses_only
from trl import SFTConfig, SFTTrainer

model, tokenizer = FastLanguageModel.from_pretrained(FOLDER, max_seq_length=256, dtype="float32", load_in_4bit=False)
model = FastLanguageModel.get_peft_model(
    model, r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"], use_gradient_checkpointing=False
)
tokenizer = get_chat_template(tokenizer, chat_template="llama-3.1")
dataset = standardize_sharegpt(dataset)

def write(rows):
    return {"text": [tokenizer.apply_chat_template(chat, tokenize=False) for chat in rows["conversations"]]}

dataset = dataset.map(write, batched=True, remove_columns=["conversations"])
trainer = SFTTrainer(
    model=model,
    tokenizer=tokenizer,
    train_dataset=dataset,
    dataset_text_field="text",
    max_seq_length=256,
    packing=PACKING,
    args=SETTINGS,
    **collator(tokenizer),
)
trainer = train_on_responses_only(
    trainer,
    instruction_part="<|start_header_id|>user<|end_header_id|>\\n\\n",
    response_part="<|start_header_id|>assistant<|end_header_id|>\\n\\n",
)
"""
MERGED_COLUMNS = """
from unsloth import FastLanguageModel
from unsloth.chat_templates import apply_chat_template, standardize_sharegpt, to_sharegpt, train_on_responses_only
from trl import SFTConfig, SFTTrainer

model, tokenizer = FastLanguageModel.from_pretrained(FOLDER, max_seq_length=256, dtype="float32", load_in_4bit=False)
model = FastLanguageModel.get_peft_model(
    model, r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"], use_gradient_checkpointing=False
)
dataset = to_sharegpt(
    dataset, merged_prompt="{instruction}[[: {input}]]", output_column_name="output", conversation_extension=1
)
dataset = standardize_sharegpt(dataset)
dataset = apply_chat_template(
    dataset, tokenizer=tokenizer, chat_template="Do it.\\n\\n### Instruction:\\n{INPUT}\\n\\n### Response:\\n{OUTPUT}"
)
dataset = dataset.remove_columns("conversations")
trainer = SFTTrainer(
    model=model, tokenizer=tokenizer, train_dataset=dataset, dataset_text_field="text", packing=PACKING, args=SETTINGS
)
trainer = train_on_responses_only(trainer)
"""
LORA = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"])


@pytest.fixture
def folder(tmp_path: Path) -> str:
    return save_model(tmp_path / "model")


def llama(chat: list[tuple[str, str]]) -> str:
    """The text of a conversation in the format of Llama 3.1."""
    roles = {"human": "user", "gpt": "assistant"}
    system = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
    if chat[0][0] == "system":
        system, chat = system + chat[0][1], chat[1:]
    turns = [("system", system), *((roles[role], text.strip()) for role, text in chat)]
    return "<s>" + "".join(f"<|start_header_id|>{role}<|end_header_id|>\n\n{text}<|eot_id|>" for role, text in turns)


@pytest.mark.parametrize("variant", ["padded", "packed", "collator"])
def test_conversations(variant: str, folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chats = [[{"from": role, "value": text} for role, text in chat] for chat in SHAREGPT]
    packed = variant == "packed"
    if packed and TRL_DROPS_LABELS:
        pytest.skip("the installed trl packs tokens without their labels")
    options = {"packing": True, "max_length": 256} if packed else {}
    ours = run(
        CONVERSATIONAL,
        monkeypatch,
        FOLDER=folder,
        PACKING=packed,
        SETTINGS=arguments(tmp_path / "ours", SFTConfig, **SETTINGS),
        dataset=Dataset.from_dict({"conversations": chats}),
        collator=lambda tokenizer: (
            {"data_collator": DataCollatorForSeq2Seq(tokenizer)} if variant == "collator" else {}
        ),
    )["trainer"]
    data = by_hand(
        ours.processing_class,
        [llama(chat) for chat in SHAREGPT],
        r"<\|start_header_id\|>assistant<\|end_header_id\|>\n\n(.*?<\|eot_id\|>)",
    )
    assert ours.processing_class.eos_token == "<|eot_id|>"
    if not packed:
        assert ours.train_dataset["input_ids"][:] == data["input_ids"][:]
        assert ours.train_dataset["labels"][:] == data["labels"][:]
    theirs = train_with_trl(folder, data, ours, tmp_path / "theirs", LORA, **options)
    ours.train()
    assert len(losses(theirs)) == 4
    assert losses(ours) == pytest.approx(losses(theirs), rel=2e-5)


@pytest.mark.parametrize("packed", [False, True])
def test_columns_of_instructions(packed: bool, folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if packed and TRL_DROPS_LABELS:
        pytest.skip("the installed trl packs tokens without their labels")
    options = {"packing": True, "max_length": 256} if packed else {}
    ours = run(
        MERGED_COLUMNS,
        monkeypatch,
        FOLDER=folder,
        PACKING=packed,
        SETTINGS=arguments(tmp_path / "ours", SFTConfig, **SETTINGS, **options),
        dataset=Dataset.from_dict(ALPACA),
    )["trainer"]
    rows = zip(*ALPACA.values(), strict=True)
    texts = [
        f"<s>Do it.\n\n### Instruction:\n{asked}{f': {more}' if more else ''}\n\n### Response:\n{answer}</s>"
        for asked, more, answer in rows
    ]
    data = by_hand(ours.processing_class, texts, r"### Response:\n(.*?</s>)")
    theirs = train_with_trl(folder, data, ours, tmp_path / "theirs", LORA, **options)
    ours.train()
    assert losses(ours) == pytest.approx(losses(theirs), rel=2e-5)
