"""Scripts in the shape of Unsloth's public text notebooks train as plain TRL does on the texts that they print."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from torch import nn
from transformers import AutoModelForCausalLM, MixtralForCausalLM, Qwen3MoeForCausalLM
from trl import SFTConfig

from tests import tiny
from tests.trainer.notebooks import SETTINGS, by_hand, losses, run, save_model, train_with_trl
from tests.trainer.runs import arguments

pytestmark = pytest.mark.filterwarnings("ignore")

NAMES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

ALPACA = """
from unsloth import FastLanguageModel, is_bfloat16_supported
import torch
from trl import SFTTrainer
from transformers import TrainingArguments

model, tokenizer = FastLanguageModel.from_pretrained(
    model_name=FOLDER, max_seq_length=256, dtype=torch.float32, load_in_4bit=False
)
model = FastLanguageModel.get_peft_model(
    model,
    r=4,
    target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    lora_alpha=8,
    lora_dropout=0,
    bias="none",
    use_gradient_checkpointing="unsloth",
    random_state=3407,
    use_rslora=False,
    loftq_config=None,
)
prompt = "Do the task.\\n\\n### Task:\\n{}\\n\\n### Input:\\n{}\\n\\n### Answer:\\n{}"

def write(rows):
    columns = zip(rows["instruction"], rows["input"], rows["output"])
    return {"text": [prompt.format(*row) + tokenizer.eos_token for row in columns]}

dataset = dataset.map(write, batched=True)
trainer = SFTTrainer(
    model=model,
    tokenizer=tokenizer,
    train_dataset=dataset,
    dataset_text_field="text",
    max_seq_length=256,
    dataset_num_proc=1,
    packing=False,
    args=TrainingArguments(
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        warmup_steps=1,
        max_steps=4,
        learning_rate=1e-2,
        fp16=False,
        bf16=False,
        logging_steps=1,
        optim="adamw_8bit",
        weight_decay=0.01,
        lr_scheduler_type="linear",
        seed=3407,
        output_dir=OUT,
        report_to="none",
        use_cpu=True,
    ),
)
"""

CONTINUED = """
from unsloth import FastLanguageModel, UnslothTrainer, UnslothTrainingArguments

model, tokenizer = FastLanguageModel.from_pretrained(
    model_name=FOLDER, max_seq_length=256, dtype="float32", load_in_4bit=False
)
model = FastLanguageModel.get_peft_model(
    model,
    r=4,
    target_modules=[
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "embed_tokens", "lm_head"
    ],
    lora_alpha=8,
    lora_dropout=0,
    use_gradient_checkpointing="unsloth",
    use_rslora=True,
)
dataset = dataset.map(lambda rows: {"text": [text + tokenizer.eos_token for text in rows["text"]]}, batched=True)
trainer = UnslothTrainer(
    model=model,
    tokenizer=tokenizer,
    train_dataset=dataset,
    dataset_text_field="text",
    max_seq_length=256,
    args=UnslothTrainingArguments(
        per_device_train_batch_size=2,
        max_steps=4,
        learning_rate=1e-2,
        embedding_learning_rate=1e-3,
        bf16=False,
        logging_steps=1,
        optim="adamw_torch",
        weight_decay=0.0,
        lr_scheduler_type="constant",
        output_dir=OUT,
        report_to="none",
        use_cpu=True,
    ),
)
"""

# The texts are in `dataset`; PACKING, SETTINGS and the loader's OPTIONS are given.
TEXTS = """
from unsloth import FastModel
from trl import SFTConfig, SFTTrainer

model, tokenizer = FastModel.from_pretrained(FOLDER, max_seq_length=256, **OPTIONS)
model = FastModel.get_peft_model(model, r=4, lora_alpha=8, target_modules=TARGETS, use_gradient_checkpointing=False)
trainer = SFTTrainer(
    model=model,
    tokenizer=tokenizer,
    train_dataset=make(dataset, tokenizer),
    eval_dataset=None,
    packing=PACKING,
    args=SFTConfig(dataset_text_field="text", **SETTINGS),
)
"""

STORIES = [f"Once upon a time there were {count} words.\nThe end of tale {count}." for count in range(2, 14)]
TASKS = {
    "instruction": ["Add", "Count", "Say hi", "Spell"] * 4,
    "input": ["1 and 2", "", "", "sky"] * 4,
    "output": ["3", "1 2 3", "Hi", "s k y"] * 4,
}
# ChatML, with the calls that an assistant makes in JSON, as Qwen writes them.
TEMPLATE = (
    "{% if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content or '' }}"
    "{% for call in message.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}"
    "<|im_end|>\n{% endfor %}"
)


def settings(folder: Path, **options: Any) -> dict[str, Any]:
    """The fields of the arguments that `arguments` gives, for a script that makes them itself."""
    made = arguments(folder, SFTConfig, **SETTINGS | options).to_dict()
    names = ["output_dir", "per_device_train_batch_size", "logging_steps", "bf16", "use_cpu", "report_to", "packing"]
    return {name: made[name] for name in [*names, "disable_tqdm", "save_strategy", "max_length", *SETTINGS]}


def test_instructions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_model(tmp_path / "model")
    ours = run(ALPACA, monkeypatch, FOLDER=path, OUT=str(tmp_path / "ours"), dataset=Dataset.from_dict(TASKS))
    trainer = ours["trainer"]
    rows = zip(*TASKS.values(), strict=True)
    texts = [f"Do the task.\n\n### Task:\n{a}\n\n### Input:\n{b}\n\n### Answer:\n{c}</s>" for a, b, c in rows]
    data = by_hand(trainer.processing_class, texts)
    assert trainer.train_dataset["input_ids"][:] == data["input_ids"][:]
    options = {"gradient_accumulation_steps": 2, "warmup_steps": 1, "optim": "adamw_8bit", "weight_decay": 0.01}
    options |= {"lr_scheduler_type": "linear", "seed": 3407}
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=NAMES)
    theirs = train_with_trl(path, data, trainer, tmp_path / "theirs", lora, **options)
    trainer.train()
    assert losses(trainer) == pytest.approx(losses(theirs), rel=2e-5)


def test_continued_pretraining(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_model(tmp_path / "model")
    ours = run(CONTINUED, monkeypatch, FOLDER=path, OUT=str(tmp_path), dataset=Dataset.from_dict({"text": STORIES}))
    trainer = ours["trainer"]
    data = by_hand(trainer.processing_class, [f"{text}</s>" for text in STORIES])
    both = ["embed_tokens", "lm_head"]
    lora = LoraConfig(r=4, lora_alpha=8, use_rslora=True, target_modules=NAMES, modules_to_save=both)

    def optimizer(model: nn.Module) -> torch.optim.Optimizer:
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        saved = [p for name, p in named if "modules_to_save" in name]
        others = [p for name, p in named if "modules_to_save" not in name]
        return torch.optim.AdamW([{"params": others, "lr": 1e-2}, {"params": saved, "lr": 1e-3}], weight_decay=0.0)

    theirs = train_with_trl(path, data, trainer, tmp_path / "theirs", lora, optimizer)
    trainer.train()
    assert losses(trainer) == pytest.approx(losses(theirs), rel=2e-5)


@pytest.mark.parametrize("packing", [False, True])
def test_text_completion(packing: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def make(data: Dataset, tokenizer: Any) -> Dataset:
        return data.map(lambda row: {"text": row["text"] + tokenizer.eos_token})

    texts = [f"{text}</s>" for text in STORIES]
    compare(texts, make, {"text": STORIES}, tmp_path, monkeypatch, packing=packing)


def test_reasoning_mixed_with_chats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two data sets, one with thoughts, become texts by the tokenizer's template, and are shuffled together."""
    thoughts = [("Add 1 and 2.", "<think>\n1 + 2\n</think>\n\n3"), ("And 4?", "<think>\n3 + 4\n</think>\n\n7")] * 4
    chats = [("Hi", "Hello."), ("Who are you?", "A model.")] * 2

    def make(_: Dataset, tokenizer: Any) -> Dataset:
        tokenizer.chat_template = TEMPLATE
        rows = []
        for asked, answer in [*thoughts, *chats]:
            messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
            rows.append({"text": tokenizer.apply_chat_template(messages, tokenize=False)})
        return Dataset.from_list(rows).shuffle(seed=3407)

    made = [
        f"<|im_start|>user\n{asked}<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>\n"
        for asked, answer in [*thoughts, *chats]
    ]
    texts = Dataset.from_dict({"text": made}).shuffle(seed=3407)["text"][:]
    compare(texts, make, {"text": [""]}, tmp_path, monkeypatch)


def test_tool_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls of tools have different arguments, between which Arrow puts nulls."""
    calls = [{"name": "weather", "arguments": {"city": "Rome"}}, {"name": "sum", "arguments": {"a": 1, "b": 2}}] * 4
    tools = [{"type": "function", "function": {"name": "weather"}}, {"type": "function", "function": {"name": "sum"}}]
    rows = [
        {
            "messages": [
                {"role": "user", "content": "Go."},
                {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call}]},
                {"role": "tool", "name": call["name"], "content": "3"},
                {"role": "assistant", "content": "It is 3."},
            ],
            "tools": tools,
        }
        for call in calls
    ]

    def make(_: Dataset, tokenizer: Any) -> Dataset:
        tokenizer.chat_template = TEMPLATE
        return Dataset.from_list(rows)

    head = "".join(f"{json.dumps(tool)}\n" for tool in tools)
    texts = [
        f"<|im_start|>system\n{head}<|im_end|>\n<|im_start|>user\nGo.<|im_end|>\n"
        f"<|im_start|>assistant\n<tool_call>{json.dumps(call)}</tool_call><|im_end|>\n"
        "<|im_start|>tool\n3<|im_end|>\n<|im_start|>assistant\nIt is 3.<|im_end|>\n"
        for call in calls
    ]
    compare(texts, make, {"text": [""]}, tmp_path, monkeypatch)


@pytest.mark.parametrize("model_class", [Qwen3MoeForCausalLM, MixtralForCausalLM])
def test_an_expert_model(model_class: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The script names gate_proj, up_proj and down_proj, which are parameters of the experts in such a model."""
    sizes = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
    experts = {"num_key_value_heads": 2, "moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2}
    experts |= {"num_local_experts": 4, "head_dim": 8}
    texts = [f"{text}</s>" for text in STORIES]
    model = {"model_class": model_class, **sizes, **experts}
    lora = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    )
    compare(texts, lambda data, _: data, {"text": texts}, tmp_path, monkeypatch, model=model, lora=lora)


def compare(
    texts: list[str],
    make: Any,
    columns: dict[str, Any],
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    packing: bool = False,
    model: dict[str, Any] | None = None,
    lora: LoraConfig | None = None,
) -> None:
    """Check the tokens and the losses of the script `TEXTS` against TRL's on these texts."""
    path = save_model(folder / "model", **model or {})
    options = {"packing": packing, "max_length": 256}
    ours = run(
        TEXTS,
        monkeypatch,
        FOLDER=path,
        OPTIONS={"load_in_4bit": False, "dtype": "float32"},
        TARGETS=NAMES,
        PACKING=packing,
        SETTINGS=settings(folder / "ours", **options),
        dataset=Dataset.from_dict(columns),
        make=make,
    )["trainer"]
    data = by_hand(ours.processing_class, texts)
    if not packing:
        assert ours.train_dataset["input_ids"][:] == data["input_ids"][:]
    own_loss = lora is not None  # of experts
    lora = lora or LoraConfig(r=4, lora_alpha=8, target_modules=NAMES)
    theirs = train_with_trl(path, data, ours, folder / "theirs", lora, own_loss=own_loss, **options)
    ours.train()
    assert len(losses(ours)) == 4
    assert losses(ours) == pytest.approx(losses(theirs), rel=2e-5)


def test_a_merge_of_4_bits_to_16(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The merged model, loaded by plain transformers, gives the logits of the trained one."""
    path = tiny.folder(tmp_path / "model", max_position_embeddings=256)
    settings_of = settings(tmp_path / "ours")
    names = run(
        TEXTS,
        monkeypatch,
        FOLDER=path,
        OPTIONS={"load_in_4bit": True, "dtype": torch.float32},
        TARGETS=NAMES,
        PACKING=False,
        SETTINGS=settings_of | {"max_length": 64},
        dataset=Dataset.from_dict({"text": tiny.texts(8)}),
        make=lambda data, _: data,
    )
    trainer, model = names["trainer"], names["model"]
    trainer.train()
    model.save_pretrained_merged(tmp_path / "merged", names["tokenizer"], save_method="merged_16bit")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    tokens = torch.arange(3, 13)[None]
    with torch.no_grad():
        expected, got = model.eval()(tokens).logits, plain(tokens).logits
    # Each merged weight is rounded once, to float16.
    assert (got - expected).abs().max() < 4 * 2.0**-11 * expected.abs().max()
