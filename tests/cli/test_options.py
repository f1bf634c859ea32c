"""The options of the command line: switches, older names, and the words that people write in YAML."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, DatasetDict
from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments

from tests import tiny
from unsloth_fast import UnslothTrainingArguments, cli
from unsloth_fast.options import Parser, target_modules

pytestmark = pytest.mark.filterwarnings("ignore")

NEEDED = ["--model_name_or_path", "m", "--dataset_name", "d", "--use_cpu", "--bf16", "false", "--report_to", "none"]


@pytest.fixture(scope="module")
def parser() -> Parser:
    """One for all: it takes a second to make, and parsing a command line does not change it."""
    return Parser((ScriptArguments, UnslothTrainingArguments, ModelConfig, DatasetMixtureConfig))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--gradient_checkpointing"], {"gradient_checkpointing": True}),
        (["--gradient_checkpointing", "false"], {"gradient_checkpointing": False}),
        (["--no_gradient_checkpointing"], {"gradient_checkpointing": False}),
        (["--no-gradient-checkpointing"], {"gradient_checkpointing": False}),
        (["--padding_free"], {"padding_free": True, "gradient_checkpointing": None}),
        (["--no_padding_free", "--packing"], {"padding_free": False, "packing": True}),
        (["--eval-packing", "--no_packing"], {"eval_packing": True, "packing": False}),
        ([], {"padding_free": None, "gradient_checkpointing": None, "eval_packing": None}),
        (["--max_seq_length", "17"], {"max_length": 17}),
        (["--max-seq-length=17"], {"max_length": 17}),
        (["--warmup_ratio", "0.1", "--seed", "5"], {"warmup_steps": 0.1, "seed": 5}),
        (["--warmup_ratio=1e-1"], {"warmup_steps": 0.1}),
        (["--evaluation_strategy", "steps"], {"eval_strategy": "steps"}),
        (["--group_by_length", "--overwrite_output_dir"], {"train_sampling_strategy": "group_by_length"}),
        (["--group_by_length", "False"], {"train_sampling_strategy": "random"}),
        (["--report_to", "no"], {"report_to": []}),
        (["--seed", "5", "--report-to", "No", "--packing"], {"report_to": [], "packing": True, "seed": 5}),
        (["--report_to=false"], {"report_to": []}),
        (
            ["--report_to", "tensorboard", "--eval_strategy", "no"],
            {"report_to": ["tensorboard"], "eval_strategy": "no"},
        ),
        (["--save_safetensors", "true", "--optim", "adamw_8bit"], {"optim": "adamw_8bit"}),
    ],
)
def test_switches_and_older_names(parser: Parser, options: list[str], expected: dict[str, Any]) -> None:
    args = parser.parse_args_and_config([*NEEDED, *options])[1]
    assert {name: getattr(args, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--warmup_ratio", "2"], "warmup_ratio: got 2; allowed: a number from 0 to 1"),
        (["--padding_free", "perhaps"], "Truthy value expected"),
        (["--max_seq_len", "2"], "max_seq_len"),
    ],
)
def test_a_wrong_option_is_a_value_error(parser: Parser, options: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parser.parse_args_and_config([*NEEDED, *options])


YAML = """
save_strategy: no
eval_strategy: off
logging_strategy: no
report_to: no
packing: no
gradient_checkpointing: on
padding_free: null
learning_rate: 1e-4
lr_scheduler_type: cosine_with_min_lr
lr_scheduler_kwargs: {min_lr: 1e-6}
max_seq_length: 19
warmup_ratio: .1
group_by_length: yes
lora_target_modules: q_proj
lora_modules_to_save: embed_tokens, lm_head
env: {UNSLOTH_A_TEST: no}
"""


def test_words_of_yaml_have_the_meaning_of_their_author(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`no` stays a word where the option is no switch, 1e-6 is a number, and a word is a list of one."""
    monkeypatch.setenv("UNSLOTH_A_TEST", "")
    monkeypatch.setattr(cli, "_check_template", lambda path: None)
    (tmp_path / "run.yaml").write_text(YAML)
    _, args, model, _ = cli._parse([*NEEDED[:-2], "--config", str(tmp_path / "run.yaml")])
    assert {args.save_strategy, args.eval_strategy, args.logging_strategy} == {"no"} and args.report_to == []
    assert (args.packing, args.gradient_checkpointing, args.padding_free) == (False, True, None)
    assert (args.learning_rate, args.lr_scheduler_kwargs) == (1e-4, {"min_lr": 1e-6})
    assert (args.max_length, args.warmup_steps) == (19, 0.1)
    assert args.train_sampling_strategy == "group_by_length"
    assert model.lora_target_modules == ["q_proj"] and model.lora_modules_to_save == ["embed_tokens", "lm_head"]


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("q_proj", ["q_proj"]),
        ("layers.0.self_attn", ["layers.0.self_attn"]),
        ("all-linear", "all-linear"),
        (r".*\.q_proj", r".*\.q_proj"),
        (["q_proj", "v_proj"], ["q_proj", "v_proj"]),
        (None, None),
    ],
)
def test_a_single_target_module_is_a_name(target: Any, expected: Any) -> None:
    """peft reads text as a pattern, which no module's whole name would match."""
    assert target_modules(target) == expected


def load(name: str, **options: Any) -> Any:
    """The splits of a data set, as `sft` loads it."""
    script = ScriptArguments(dataset_name=name, **{"dataset_streaming": False} | options)
    return cli._load_dataset(script, DatasetMixtureConfig())


NAMES = ["data[1].jsonl", "data*.jsonl", "what?.jsonl", "a::b.jsonl", "a b#%{1,2} 文.jsonl", "train.JSONL", "x[.json"]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of `datasets` of this test."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path


@pytest.mark.parametrize("streaming", [False, True], ids=["file", "stream"])
@pytest.mark.parametrize("name", NAMES)
def test_a_file_of_any_name(cache: Path, name: str, streaming: bool) -> None:
    """The file's own rows are read, not those of files that its name would match as a pattern."""
    (cache / "data1.jsonl").write_text('{"text": "another"}\n')
    (cache / name).write_text('{"text": "first"}\n')
    assert [row["text"] for row in load(str(cache / name), dataset_streaming=streaming)["train"]] == ["first"]


def test_a_file_that_has_changed_is_read_again(cache: Path) -> None:
    for text in ("first", "second one"):
        (cache / "data[1].jsonl").write_text(f'{{"text": "{text}"}}\n')
        assert load(str(cache / "data[1].jsonl"))["train"]["text"] == [text]


@pytest.mark.parametrize("name", ["set[1]", "set *", "a::b"])
def test_a_folder_of_any_name(cache: Path, name: str) -> None:
    """The names of the files in the folder give the splits."""
    (cache / name / "deeper").mkdir(parents=True)
    for file in ("train.jsonl", "deeper/test.jsonl"):
        (cache / name / file).write_text(f'{{"text": "{file}"}}\n')
    found = load(str(cache / name))
    assert isinstance(found, DatasetDict)
    assert {split: part["text"] for split, part in found.items()} == {
        "train": ["train.jsonl"],
        "test": ["deeper/test.jsonl"],
    }


def test_a_mixture_of_files_of_any_name(cache: Path) -> None:
    """A path that exists is not read as a pattern; any other path may be one."""
    for name in ("data[1].jsonl", "data1.jsonl", "more1.jsonl", "more2.jsonl"):
        (cache / name).write_text(f'{{"text": "{name}"}}\n')
    files = [str(cache / "data[1].jsonl"), [str(cache / "more*.jsonl")]]
    parts: list[Any] = [{"path": "json", "data_files": name, "split": "train"} for name in files]
    found = cli._load_dataset(ScriptArguments(), DatasetMixtureConfig(datasets=parts))
    assert sorted(found["train"]["text"]) == ["data[1].jsonl", "more1.jsonl", "more2.jsonl"]


@pytest.mark.parametrize(
    "name", ["/no/such/data", "missing.jsonl", "./missing", "../missing", "no/such.CSV", "~/missing"]
)
def test_a_missing_file_is_no_question_to_the_hub(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: pytest.fail("asked"))
    with pytest.raises(
        cli.UsageError, match=f"^dataset_name: got '{name}'; allowed: an existing file or folder, or the name"
    ):
        load(name)


def test_the_home_folder(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(cache))
    Dataset.from_dict({"text": tiny.texts(2)}).to_json(cache / "data.jsonl")
    assert len(load("~/data.jsonl")["train"]) == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without CUDA")
@pytest.mark.parametrize(
    ("backend", "message"),
    [
        ("fast", "backend: 'fast' cannot run here: no CUDA device (to run the kernels on a CPU, slowly, set TRITON_IN"),
        ("reference", "bf16: got True (TRL's default), and torch finds no GPU with bfloat16; allowed: use_cpu=True"),
    ],
)
def test_a_machine_without_a_gpu_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], backend: str, message: str
) -> None:
    """The backend, or the fields to set, and not only TRL's default precision, which the user did not set."""
    monkeypatch.setattr("triton.knobs.runtime.interpret", False)
    assert cli.main(["sft", "--model_name_or_path", "m", "--dataset_name", "d", "--backend", backend]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"unsloth-fast: error: {message}")
