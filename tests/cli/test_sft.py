"""The command line: `sft` from a configuration file, one line per usage error, and `env`."""

import json
import math
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from datasets import Dataset, DatasetDict

from tests import tiny
from unsloth_fast import cli

pytestmark = pytest.mark.filterwarnings("ignore")
WITHOUT_LIGER, WITHOUT_TORCHAO = (
    pytest.mark.skipif(find_spec(package) is not None, reason=f"{package} is installed")
    for package in ("liger_kernel", "torchao")
)


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A valid configuration: a model, a tokenizer and a data set on disk."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.delenv("UNSLOTH_BACKEND", raising=False)
    tiny.model().save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "data").mkdir()
    for split, count in (("train", 8), ("test", 3)):
        lines = [json.dumps({"text": text}) for text in tiny.texts(count)]
        (tmp_path / "data" / f"{split}.jsonl").write_text("\n".join(lines))
    return {
        "model_name_or_path": str(tmp_path / "model"),
        "dataset_name": str(tmp_path / "data"),
        "output_dir": str(tmp_path / "out"),
        "backend": "reference",
        "max_steps": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "learning_rate": 1e-3,
        "embedding_learning_rate": 1e-4,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "disable_tqdm": True,
    }


def run(folder: Path, config: dict[str, Any] | str, *options: str) -> int:
    """The exit status with this configuration file and these options."""
    path = folder / "run.yaml"
    path.write_text(config if isinstance(config, str) else yaml.safe_dump(config))
    return cli.main(["sft", "--config", str(path), *options])


def test_trains_and_saves(tmp_path: Path, config: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    """Options override the file; both splits are used; the saved model loads, and every weight has changed."""
    assert run(tmp_path, config, "--max_steps", "1", "--eval_strategy", "steps", "--eval_steps", "1") == 0
    printed = capsys.readouterr().out
    assert "'embedding_learning_rate': '0.0001'" in printed
    assert "eval_loss" in printed
    assert f"Model saved to {config['output_dir']}." in printed
    start = tiny.model().state_dict()
    saved = type(tiny.model()).from_pretrained(tmp_path / "out").state_dict()
    assert saved.keys() == start.keys()
    assert not any(torch.equal(saved[name], start[name]) for name in start)


def test_trains_lora_on_a_mixture(tmp_path: Path, config: dict[str, Any]) -> None:
    """`datasets` in the file names the data, the model's options ask for LoRA, and the adapter is saved."""
    del config["dataset_name"]
    mixture = [{"path": "json", "data_files": str(tmp_path / "data" / "train.jsonl"), "split": "train"}]
    status = run(tmp_path, config | {"datasets": mixture, "use_peft": True, "lora_r": 2, "max_steps": 1})
    assert status == 0
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({"model_name_or_path": None}, [], "model_name_or_path: got nothing"),
        ({"model_name_or_path": "/no/such/model"}, [], "error: model_name_or_path '/no/such/model': "),
        ({"dataset_name": None}, [], "dataset_name: got nothing"),
        ({"dataset_name": "/no/such/data"}, [], "dataset_name: got '/no/such/data'; allowed: an existing file"),
        ({"dataset_name": __file__}, [], "allowed: a file whose name ends in .jsonl, .json, .parquet, .csv"),
        ({"datasets": ["a.jsonl"]}, [], "datasets: got 'a.jsonl'; allowed: a list of entries with a path"),
        ({"datasets": [{"path": 3}]}, [], "datasets: got 3; allowed: a list of entries with a path"),
        ({"datasets": {"path": "a.jsonl"}}, [], "datasets: got 'path'; allowed: a list of entries with a path"),
        ({"dataset_kwargs": {"skip_prepare_dataset": True}}, [], "train_dataset: got no column 'input_ids', only"),
        ({"dataset_train_split": "trian"}, [], "data set: got no split 'trian'; allowed: 'train', 'test'"),
        ({"eval_strategy": "epoch", "dataset_test_split": "val"}, [], "data set: got no split 'val'"),
        ({"backend": "quick"}, [], "backend: got 'quick'; allowed: 'auto', 'fast', 'reference'"),
        ({}, ["--backend", "fast,rop=fast"], "operation: got 'rop'; allowed"),
        ({"embedding_learning_rate": -1.0}, [], "embedding_learning_rate: got -1.0; allowed"),
        ({"no_such_option": 1}, [], "no_such_option"),
        ({}, ["--no_such_option", "1"], "no_such_option"),
        ({}, ["--learning_rate", "much"], "invalid float value: 'much'"),
        ({}, ["--max_steps"], "expected one argument"),
        ({"loss_type": "foo"}, [], "`loss_type` foo"),
        ({"dtype": "float99"}, [], "float99"),
        ({"attn_implementation": "foo"}, [], '`attn_implementation="foo"`'),
        ({"use_peft": True, "lora_target_modules": ["nosuch"]}, [], "Target modules {'nosuch'}"),
        ({"output_dir": "/dev/null/out"}, [], "error: [Errno 20] Not a directory: '/dev/null/out'"),
        ({"per_device_train_batch_size": 0}, [], "per_device_train_batch_size: got 0; allowed: an integer from 1"),
        ({"per_device_eval_batch_size": 2.5}, [], "per_device_eval_batch_size: got 2.5; allowed"),
        ({"gradient_accumulation_steps": 0}, [], "gradient_accumulation_steps: got 0; allowed"),
        ({"dataset_text_field": "body"}, [], "train_dataset: got no column 'body', only 'text'; allowed: 'body'"),
        ({"resume_from_checkpoint": True}, [], "resume_from_checkpoint: got True; allowed"),
        ({"resume_from_checkpoint": "/no/such"}, [], "resume_from_checkpoint: got '/no/such'; allowed"),
        ({}, ["--resume_from_checkpoint", "True"], "resume_from_checkpoint: got True; allowed"),
        ({"learning_rate": math.nan}, [], "learning_rate: got nan; allowed: a finite number from 0"),
        ({}, ["--learning_rate", "inf"], "learning_rate: got inf; allowed"),
        ({}, ["--adam_beta1", "2"], "adam_beta1: got 2.0; allowed: a number from 0 to less than 1"),
        ({"label_smoothing_factor": 2.0}, [], "label_smoothing_factor: got 2.0; allowed: a number from 0 to 1"),
        ({"dataloader_num_workers": -1}, [], "dataloader_num_workers: got -1; allowed: an integer from 0"),
        ({}, ["--deepspeed", "/no/such.json"], "deepspeed"),
        pytest.param(
            {"use_liger_kernel": True},
            [],
            "use_liger_kernel: got True; allowed: False, as the package liger-kernel",
            marks=WITHOUT_LIGER,
        ),
        (
            {"optim": "galore_adamw", "optim_target_modules": ["q_proj"]},
            [],
            "optim: got 'galore_adamw' with optim_args=None: ",
        ),
        pytest.param(
            {},
            ["--optim", "adamw_torch_8bit"],
            "optim: got 'adamw_torch_8bit' with optim_args=None: ",
            marks=WITHOUT_TORCHAO,
        ),
        ({"optim_args": "nonsense"}, [], " with optim_args='nonsense': "),
        ({"torch_compile_mode": "banana"}, [], "torch_compile_mode: got 'banana': Unrecognized mode=banana, should be"),
        ({"report_to": "wandb"}, [], "report_to: WandbCallback requires wandb to be installed"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, [], "lr_scheduler_kwargs: got None: "),
        ({"lr_scheduler_kwargs": {"no_such": 1}}, [], "lr_scheduler_kwargs: got {'no_such': 1}: "),
        ({"activation_offloading": True}, [], "activation_offloading: got True on a CPU; allowed: False"),
        ({"chat_template_path": "/no/such/template"}, [], "chat_template_path: got '/no/such/template'; allowed: a "),
        ({"chat_template_path": "/no/such.jinja"}, [], "chat_template_path: got '/no/such.jinja'; allowed: a .jinja"),
    ],
)
def test_a_usage_error_is_one_line(
    tmp_path: Path,
    config: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
    change: dict[str, Any],
    options: list[str],
    message: str,
) -> None:
    """The exit status is 2, the last line of stderr names the mistake, and there is no traceback."""
    changed = {name: value for name, value in (config | change).items() if value is not None}
    assert run(tmp_path, changed, *options) == 2
    printed = capsys.readouterr().err
    assert "Traceback" not in printed
    errors = [line for line in printed.splitlines() if line.startswith("unsloth-fast: error: ")]
    assert len(errors) == 1
    assert errors == printed.splitlines()[-1:]
    assert message in errors[0]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("empty.jsonl", "", "data set: got an empty file; allowed: one with at least one row"),
        ("empty.csv", "", "No columns to parse from file"),
        ("blank.jsonl", "\n", None),
        ("half.jsonl", '{"text": "w1"}\n{"text": \n', "JSON parse error: Invalid value. in row 1"),
        ("half.parquet", "PAR1", "Parquet file size is 4 bytes"),
        ("mixed.jsonl", '{"text": "w1"}\n{"text": 3}\n', "in row 1"),
        (
            "ids.jsonl",
            '{"input_ids": [3, 48]}\n',
            "train data set: got 48 in row 0 of column 'input_ids'; allowed: 0 to",
        ),
    ],
)
@pytest.mark.parametrize("way", ["file", "stream", "mixture"])
def test_a_file_without_valid_data(
    tmp_path: Path,
    config: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
    name: str,
    text: str,
    message: str | None,
    way: str,
) -> None:
    """The exit status is 2 and one line states the cause, whichever library reports it."""
    if (name, way) == ("mixed.jsonl", "stream"):
        pytest.skip("only the first row of a stream is checked")
    path = tmp_path / name
    path.write_text(text)
    data: dict[str, Any] = {"dataset_name": str(path), "dataset_streaming": way == "stream"}
    if way == "mixture":
        kind = cli.FORMATS[path.suffix]
        data = {"dataset_name": None, "datasets": [{"path": kind, "data_files": str(path), "split": "train"}]}
    changed = {key: value for key, value in (config | data).items() if value is not None}
    assert run(tmp_path, changed) == 2
    *_, last = capsys.readouterr().err.splitlines()
    assert last.startswith("unsloth-fast: error: ") and (message or "error: ") in last


def test_a_data_set_by_name(tmp_path: Path, config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The name and its configuration are passed to `datasets`; the splits are trained on and evaluated."""
    asked: list[Any] = []

    def load_dataset(*positional: Any, **keywords: Any) -> DatasetDict:
        asked.append((positional, keywords))
        return DatasetDict({split: Dataset.from_dict({"text": tiny.texts(4)}) for split in ("train", "validation")})

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    named = {"dataset_name": "someone/texts", "dataset_config": "en", "dataset_test_split": "validation"}
    assert run(tmp_path, config | named | {"eval_strategy": "steps", "eval_steps": 2}) == 0
    assert asked == [(("someone/texts",), {"name": "en", "streaming": False})]
    assert (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "subcommand: got nothing; allowed: sft, env"),
        (["train"], "subcommand: got train; allowed: sft, env"),
        (["env", "--all"], "env: got '--all'; allowed: no argument"),
        (["sft", "--config"], "--config: got nothing"),
        (["sft", "--config", "/no/such.yaml"], "/no/such.yaml"),
    ],
)
def test_an_invalid_command(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The command is refused before any configuration is read."""
    assert cli.main(arguments) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("unsloth-fast: error: ") and message in printed and printed.count("\n") == 1


def test_resumes_from_the_last_checkpoint(tmp_path: Path, config: dict[str, Any]) -> None:
    """The second run does the one remaining step and continues the log of the first."""
    config = config | {"save_strategy": "steps", "save_steps": 1}
    assert run(tmp_path, config, "--max_steps", "1", "--learning_rate", "0.5") == 0
    assert run(tmp_path, config, "--resume_from_checkpoint", "True") == 0
    state = json.loads((tmp_path / "out" / "checkpoint-2" / "trainer_state.json").read_text())
    logs = [log for log in state["log_history"] if "loss" in log]
    assert [log["step"] for log in logs] == [1, 2]
    assert logs[0]["learning_rate"] == 0.5  # logged by the first run; the second uses 1e-3


def test_errors_of_the_training_keep_their_traceback(
    tmp_path: Path, config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are not usage errors, even with the same type."""

    def train(*_: Any, **__: Any) -> None:
        raise ValueError("in training")

    monkeypatch.setattr("unsloth_fast.UnslothTrainer.train", train)
    with pytest.raises(ValueError, match="in training"):
        run(tmp_path, config)


def test_a_broken_chat_template(tmp_path: Path, config: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    """The error names a broken template; a valid one trains."""
    (tmp_path / "chats.jsonl").write_text("\n".join(json.dumps({"messages": chat}) for chat in CHATS))
    path = tmp_path / "chat.jinja"
    config = config | {"dataset_name": str(tmp_path / "chats.jsonl"), "chat_template_path": str(path)}
    path.write_text("{% for %}")
    assert run(tmp_path, config) == 2
    assert "error: chat template: Expected an expression" in capsys.readouterr().err
    path.write_text("{% for m in messages %}{{ m['content'] }} {% endfor %}")
    assert run(tmp_path, config) == 0


@pytest.mark.parametrize("text", ["a: [", "- a list"])
def test_a_broken_configuration_file(tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Invalid YAML is a usage error, and so is YAML that is not a mapping."""
    assert run(tmp_path, text) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("unsloth-fast: error: ")


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    """The exit status is 0; the usage is printed, and for the subcommand every option."""
    assert cli.main(["--help"]) == 0
    assert capsys.readouterr().out.startswith("usage: unsloth-fast sft")
    with pytest.raises(SystemExit) as stop:
        cli.main(["sft", "--help"])
    assert stop.value.code == 0
    assert "--embedding_learning_rate" in capsys.readouterr().out


CHATS = [
    [{"role": "user", "content": "w1 w2"}, {"role": "assistant", "content": "w3"}],
    [{"role": "user", "content": "w4"}, {"role": "assistant", "content": "w5 w6 w7"}],
] * 2
COLUMNS: dict[str, dict[str, Any]] = {
    "text": {"text": ["w1 w2 w3", "w4 w5", "w6", "w7 w8"]},
    "prompt-completion": {"prompt": ["w1 ", "w2 w3 ", "w4 ", "w5 "], "completion": ["w6 w7", "w8", "w9", "w1 w2"]},
    "messages": {"messages": CHATS},
}


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("ending", ["jsonl", "json", "parquet", "csv"])
def test_trains_on_a_file(tmp_path: Path, config: dict[str, Any], ending: str, columns: str) -> None:
    """A file of each format trains, in each layout that the format can store."""
    if (ending, columns) == ("csv", "messages"):
        pytest.skip("CSV stores no lists")
    data = Dataset.from_dict(COLUMNS[columns])
    path = tmp_path / f"data.{ending}"
    if ending in ("jsonl", "json"):
        data.to_json(path, lines=ending == "jsonl")
    else:
        getattr(data, f"to_{ending}")(path)
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    tokenizer.save_pretrained(tmp_path / "model")
    assert run(tmp_path, config | {"dataset_name": str(path), "packing": True, "max_length": 16}) == 0
    assert (tmp_path / "out" / "model.safetensors").exists()
