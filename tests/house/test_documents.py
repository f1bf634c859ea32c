"""The documents are true: their code runs, their commands parse, their links exist, their tables are complete."""

import contextlib
import dataclasses
import inspect
import io
import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml

from conformance import backends
from conformance import cli as judge_cli
from conformance.profiles import PROFILES
from conformance.properties import PROPERTIES
from tests import tiny
from unsloth_fast import FastLanguageModel, UnslothTrainingArguments, cli
from unsloth_ref import batch_checks, kernels

ROOT = Path(__file__).parents[2]
NAMES = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "examples/README.md"]
NAMES += sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))
README_WORDS = 1200
VERBS = ("run", "model", "bisect", "list", "repro", "write", "coverage", "bench", "fingerprint", "mutate", "gate")
VERBS += ("ledger", "report")
OURS = (
    "python -m conformance",
    "python examples/",
    "make ",
    "pytest ",
    "pip install",
    "unsloth-fast",
    "accelerate launch -m",
)
NUMBER = re.compile(r"[-+]?\d[\d.,]*(?:e[-+]?\d+)?")


class Block(NamedTuple):
    """A fenced block of a document."""

    name: str
    line: int
    language: str
    text: str


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(name: str, *languages: str) -> list[Block]:
    """The fenced blocks in these languages, in order."""
    found = []
    for match in re.finditer(r"^```(\w*)\n(.*?)^```$", text_of(name), re.MULTILINE | re.DOTALL):
        line = text_of(name)[: match.start(2)].count("\n")
        found.append(Block(name, line, match[1], match[2]))
    return [block for block in found if block.language in languages]


def table(name: str, heading: str) -> list[list[str]]:
    """The cells of the first table whose header row begins with this."""
    lines = iter(text_of(name).splitlines())
    assert any(line.startswith(f"| {heading} |") for line in lines), f"{name} has no table {heading!r}"
    next(lines)  # the line of dashes
    rows = []
    for line in lines:
        if not line.startswith("|"):
            break
        rows.append([cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
    return rows


def first_column(name: str, heading: str) -> list[str]:
    """The code spans in the first column of a table."""
    return [span for row in table(name, heading) for span in re.findall(r"`([^`]+)`", row[0])]


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder with what the documents name: a model and a data set."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.delenv("UNSLOTH_BACKEND", raising=False)
    monkeypatch.chdir(tmp_path)
    tiny.folder(tmp_path / "path" / "or" / "name", max_position_embeddings=2048)
    lines = [json.dumps({"text": text}) for text in tiny.texts(12)]
    (tmp_path / "documents.jsonl").write_text("\n".join(lines))
    return tmp_path


def shortened(code: str) -> str:
    """The code with two steps instead of a hundred, and without a GPU with what the documents say to add."""
    code = code.replace("max_steps=100", "max_steps=2")
    if torch.cuda.is_available():
        return code
    return code.replace('output_dir="out"', 'output_dir="out", use_cpu=True, bf16=False')


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("desk")
@pytest.mark.parametrize("name", [name for name in NAMES if blocks(name, "python")])
def test_python_runs(name: str) -> None:
    """All blocks of a document run, one after the other, as a reader would run them; README.md makes what it names."""
    for block in blocks(name, "sh"):
        if block.text.startswith("python examples/random_model.py"):
            made = block.text.replace("python examples", f"{sys.executable} {ROOT}/examples")
            subprocess.run(["sh", "-ec", made], check=True)
    names: dict[str, Any] = {"__name__": "document"}
    for block in blocks(name, "python"):
        code = "\n" * block.line + shortened(block.text)
        exec(compile(code, str(ROOT / name), "exec"), names)


@pytest.mark.filterwarnings("ignore")
def test_the_configuration_file_trains(desk: Path) -> None:
    """`unsloth-fast sft` takes the file of docs/training.md."""
    (block,) = blocks("docs/training.md", "yaml")
    (desk / "run.yaml").write_text(block.text)
    options = ["--max_steps", "1", "--backend", "reference", "--report_to", "none"]
    options += [] if torch.cuda.is_available() else ["--use_cpu", "true", "--bf16", "false"]
    assert cli.main(["sft", "--config", "run.yaml", *options]) == 0
    assert (desk / yaml.safe_load(block.text)["output_dir"] / "adapter_model.safetensors").exists()


def test_the_judge_prints_what_the_readme_shows(tmp_path: Path) -> None:
    """Every line agrees, up to numbers and spaces."""
    (shown,) = (block.text for block in blocks("README.md", "text") if block.text.startswith("$ python -m conformance"))
    command, *expected = shown.splitlines()
    (backend,) = (block.text for block in blocks("README.md", "python") if block.text.startswith("# mine.py\n"))
    (tmp_path / "mine.py").write_text(backend)
    arguments = [sys.executable, *shlex.split(command)[2:]]
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(arguments, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr

    def form(line: str) -> str:
        return " ".join(NUMBER.sub("N", line).split())

    assert [form(line) for line in done.stdout.splitlines()] == [form(line) for line in expected]


def commands(name: str) -> list[str]:
    """The lines of shell blocks, what follows a prompt in other blocks, and code spans, where they are our commands."""
    lines = [line for block in blocks(name, "sh") for line in block.text.splitlines()]
    lines += [line[2:] for block in blocks(name, "text") for line in block.text.splitlines() if line.startswith("$ ")]
    outside = re.sub(r"^```.*?^```$", "", text_of(name), flags=re.MULTILINE | re.DOTALL)
    lines += [span for span in re.findall(r"`([^`\n]+)`", outside) if " " in span]
    return [line for line in lines if line.startswith(OURS)]


COMMANDS = [(name, line) for name in NAMES for line in commands(name)]


@pytest.mark.parametrize(
    ("name", "line"), COMMANDS, ids=[f"{name}-{index}" for index, (name, _) in enumerate(COMMANDS)]
)
def test_commands_parse(name: str, line: str) -> None:
    """Every command that a document names takes the options that it is given there."""
    program, *words = shlex.split(line, comments=True)
    assignments = [word for word in words if re.match(r"[A-Z]+=", word)]
    if program == "make":
        if shutil.which("make") is None:
            pytest.skip("make is not installed")
        targets = [word for word in words if word not in assignments]
        done = subprocess.run(
            ["make", "-n", *targets, *assignments], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
    elif program == "pip":
        extras = tomllib.loads(text_of("pyproject.toml"))["project"]["optional-dependencies"]
        asked = {extra for word in words for extra in re.findall(r"^\.\[(\w+)\]$", word)}
        assert asked <= extras.keys()
    elif program == "pytest":
        assert words[0].startswith("-") or (ROOT / words[0]).exists()
        plugin = (ROOT / "conformance" / "pytest_plugin.py").read_text(encoding="utf-8")
        assert all(f'"{flag}"' in plugin for flag in flags(words) if flag.startswith("--conformance"))
    elif words[:2] == ["-m", "conformance"]:
        check_judge(*words[2:3] or ["list"], words[3:])
    elif program == "python":
        check_example(words[0], words[1:])
    else:
        check_trainer(words[words.index("unsloth_fast.cli") + 1 :] if program == "accelerate" else words)


def help_of(main: Any, *arguments: str) -> set[str]:
    """The words of a help text."""
    with contextlib.redirect_stdout(io.StringIO()) as printed, contextlib.suppress(SystemExit):
        main([*arguments, "--help"])
    return set(re.findall(r"(?<![\w-])--?[\w-]+", printed.getvalue()))


@cache
def judge_options(verb: str) -> set[str]:
    return help_of(judge_cli.main, verb)


@cache
def trainer_options() -> set[str]:
    return help_of(cli.main, "sft")


def flags(words: list[str]) -> set[str]:
    return {word for word in words if word.startswith("-")}


def check_judge(verb: str, words: list[str]) -> None:
    assert verb in VERBS
    assert flags(words) <= judge_options(verb)
    options = [index for index, word in enumerate(words) if word.startswith("-")]
    positional = words[: min(options, default=len(words))]
    if verb not in ("repro", "write", "ledger", "report", "model"):
        assert set(positional) - {"OP"} <= {*backends.OPERATIONS, *backends.PIECES}
    for index in options:
        if words[index] == "--backend":
            assert ":" in words[index + 1] or set(words[index + 1].split(",")) - {"mine"} <= set(backends.NAMES)


def check_example(path: str, words: list[str]) -> None:
    assert (ROOT / path).is_file()
    if flags(words):
        helped = subprocess.run([sys.executable, path, "--help"], cwd=ROOT, capture_output=True, text=True, check=True)
        assert flags(words) <= set(re.findall(r"--[\w-]+", helped.stdout))


def check_trainer(words: list[str]) -> None:
    if words != ["env"]:
        assert words[0] == "sft"
        assert flags(words) <= trainer_options() | {"--config"}


def slug(heading: str) -> str:
    """The anchor of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name: str) -> None:
    """Every relative link names a file that exists, and a heading in it."""
    for target in re.findall(r"\]\(([^)\s]+)\)", text_of(name)):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        found = (ROOT / name).parent / path if path else ROOT / name
        assert found.exists(), target
        if anchor:
            assert anchor in {slug(heading) for heading in re.findall(r"^#+ (.*)$", found.read_text(), re.MULTILINE)}


@pytest.mark.parametrize("name", NAMES)
def test_paths_exist(name: str) -> None:
    """Every path of this project in a code span exists; `<op>` stands for every operation, other names for some."""
    rooms = ("unsloth_ref/", "unsloth_fast/", "conformance/", "tests/", "examples/", "docs/")
    spans = [span for span in re.findall(r"`([^`\s]+)`", text_of(name)) if span.startswith(rooms)]
    paths = {span.replace("<op>", op).rstrip("/") for span in spans for op in kernels.__all__}
    assert [path for path in sorted(paths) if not list(ROOT.glob(re.sub(r"<\w+>", "*", path)))] == []


def test_no_document_repeats_another() -> None:
    """No line of 60 characters or more is in two documents; code and tables are left out."""
    seen: dict[str, str] = {}
    for name in NAMES:
        prose = re.sub(r"^```.*?^```$", "", text_of(name), flags=re.MULTILINE | re.DOTALL)
        for line in {line for line in prose.splitlines() if len(line) >= 60 and line[0] != "|"}:
            assert seen.setdefault(line, name) == name, line


def test_the_list_of_files_for_an_operation() -> None:
    """docs/adding.md names every file of the packages that names an operation.

    Files that kernel files share and those of operations that are made of it are left out.
    """
    others = {*kernels.__all__} - {"geglu"}
    section = text_of("docs/adding.md").partition("## An operation")[2].partition("## A model family")[0]
    listed = [span.replace("<op>", "geglu") for span in re.findall(r"`([^`\s]+)`", section)]
    for package in ("unsloth_ref", "unsloth_fast", "conformance"):
        for path in (ROOT / package).rglob("*.py"):
            name = path.relative_to(ROOT).as_posix()
            if path.name.startswith("_") or path.stem in others:
                continue
            if re.search(r"\bgeglu\b", path.read_text(encoding="utf-8")):
                assert name in listed or any(name.startswith(one) for one in listed if one.endswith("/")), name


def test_the_readme_is_short() -> None:
    assert len(text_of("README.md").split()) <= README_WORDS


def test_the_table_of_operations() -> None:
    """README.md names every operation."""
    assert sorted(first_column("README.md", "operation")) == sorted(kernels.__all__)


def test_the_tables_of_the_judge() -> None:
    """docs/judge.md names every property, backend, profile and option of `run`."""
    assert first_column("docs/judge.md", "property") == list(PROPERTIES)
    assert first_column("docs/judge.md", "backend") == list(backends.NAMES)
    short = {"--help", "-h", "--stop"}
    assert flags([word for span in first_column("docs/judge.md", "option of `run`") for word in span.split()]) == (
        judge_options("run") - short
    )
    for name, examples, elements, repeats in table("docs/judge.md", "profile"):
        profile = PROFILES[name.strip("`")]
        assert int(examples.replace(" ", "")) == profile.examples
        assert 2 ** int(re.findall(r"2\^(\d+)", elements)[0]) == profile.elements
        assert (repeats == "yes") == profile.derandomize
    assert len(table("docs/judge.md", "profile")) == len(PROFILES)
    assert f"with {len(PROPERTIES)} properties" in text_of("CHANGELOG.md")


def test_the_tables_of_training() -> None:
    """docs/training.md names arguments that exist, with their defaults, and every packing strategy."""
    loading = inspect.signature(FastLanguageModel.from_pretrained).parameters
    assert set(first_column("docs/training.md", "argument of `from_pretrained`")) <= loading.keys()
    defaults = {entry.name: entry.default for entry in dataclasses.fields(UnslothTrainingArguments)}
    for field, default, _ in table("docs/training.md", "field"):
        assert repr(defaults[field.strip("`")]) == default.strip("`")
    assert [span.strip('"') for span in first_column("docs/training.md", "`packing_strategy`")] == list(
        batch_checks.STRATEGIES
    )
