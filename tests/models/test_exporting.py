"""Models for the hub and for llama.cpp, both played by stand-ins."""

import stat
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.errors import HfHubHTTPError

import unsloth_fast.save
import unsloth_fast.save.hub
import unsloth_fast.save.merged
from tests import tiny
from tests.models.adapted import adapted, load


class Hub:
    """Records what is uploaded."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, dict[str, Any], set[str]]] = []

    def __call__(self, token: str | None = None) -> "Hub":
        self.token = token
        return self

    def create_repo(self, repo_id: str, **options: Any) -> Any:
        self.calls.append(("create", {"repo_id": repo_id, **options}, set()))
        return type("Repository", (), {"repo_id": f"me/{repo_id}"})

    def upload_folder(self, folder_path: str, **options: Any) -> str:
        self.calls.append(("upload", options, {path.name for path in Path(folder_path).iterdir()}))
        return "https://hub/commit"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    made = Hub()
    monkeypatch.setattr(unsloth_fast.save.hub, "HfApi", made)
    return made


@pytest.mark.parametrize("method", ["merged_16bit", "lora"])
def test_a_model_is_pushed_to_the_hub(tmp_path: Path, hub: Hub, method: str) -> None:
    model, tokenizer = adapted(tiny.folder(tmp_path))
    address = model.push_to_hub_merged("repo", tokenizer, save_method=method, token="secret", private=True)
    (_, repository, _), (_, upload, files) = hub.calls
    assert (address, hub.token) == ("https://hub/commit", "secret")
    assert repository == {"repo_id": "repo", "private": True, "exist_ok": True} and upload["repo_id"] == "me/repo"
    assert {"model.safetensors" if method == "merged_16bit" else "adapter_model.safetensors", "tokenizer.json"} <= files


def test_other_processes_write_and_upload_nothing(
    tmp_path: Path, hub: Hub, llama_cpp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = adapted(tiny.folder(tmp_path / "base"))
    monkeypatch.setattr(unsloth_fast.save.merged, "merged_model", None)
    for push in (model.push_to_hub_merged, model.push_to_hub_gguf):
        assert push("me/name", tokenizer, is_main_process=False) is None
    assert model.save_pretrained_gguf(tmp_path / "out", tokenizer, is_main_process=False) == []
    assert not hub.calls and not (tmp_path / "out").exists()


def test_nothing_is_merged_for_a_hub_out_of_reach(
    tmp_path: Path, hub: Hub, llama_cpp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The message names the commands that do it by hand."""
    model, tokenizer = adapted(tiny.folder(tmp_path / "base"))

    def fail(repo_id: str, **options: Any) -> Any:
        raise HfHubHTTPError.__bases__[0]("no route")

    monkeypatch.setattr(hub, "create_repo", fail)
    monkeypatch.setattr(unsloth_fast.save.merged, "merged_model", None)
    message = r"repo_id: got 'me/name', and the hub cannot be reached \(no route\); .*hf upload me/name folder$"
    with pytest.raises(ConnectionError, match=message):
        model.push_to_hub_merged("me/name", tokenizer)
    with pytest.raises(ConnectionError, match=r"save_pretrained_gguf\('folder', tokenizer\)"):
        model.push_to_hub_gguf("me/name", tokenizer, "q8_0")


def program(folder: Path, name: str, lines: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(lines)
    (folder / name).chmod(stat.S_IRWXU)


CONVERTER = """
import json, pathlib, sys
source, _, target, _, kind = sys.argv[1:]
assert (pathlib.Path(source) / "model.safetensors").exists() and (pathlib.Path(source) / "tokenizer.json").exists()
if kind == "f32": sys.exit("no such type")
pathlib.Path(target).write_text(kind)
"""
QUANTIZER = """#!/bin/sh
echo "$3 of $(cat $1)" > $2
"""


@pytest.fixture
def llama_cpp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with programs that write what they were asked for."""
    folder = tmp_path / "llama.cpp"
    program(folder, "convert_hf_to_gguf.py", CONVERTER)
    program(folder / "build" / "bin", "llama-quantize", QUANTIZER)
    monkeypatch.setenv("LLAMA_CPP_DIR", str(folder))
    return folder


def test_gguf_files_are_written_by_llama_cpp(tmp_path: Path, llama_cpp: Path) -> None:
    """Each method runs once, whatever its names; llama-quantize starts from the 16 bits that were saved."""
    model, tokenizer = adapted(tiny.folder(tmp_path / "base"))
    paths = model.save_pretrained_gguf(str(tmp_path / "out"), tokenizer, quantization_method="q8_0")
    assert paths == [str(tmp_path / "out" / "out.Q8_0.gguf")] and Path(paths[0]).read_text() == "q8_0"
    methods = ["q4_k_m", "quantized", "not_quantized"]
    paths = model.save_pretrained_gguf(str(tmp_path / "two"), None, quantization_method=methods)
    assert [Path(path).name for path in paths] == ["two.Q4_K_M.gguf", "two.F16.gguf"]
    assert Path(paths[0]).read_text().strip() == "Q4_K_M of f16"
    assert len(list((tmp_path / "two").glob("*.gguf"))) == 2
    with pytest.raises(RuntimeError, match=r"llama.cpp: .* ended with status 1:\nno such type"):
        model.save_pretrained_gguf(str(tmp_path / "three"), tokenizer, quantization_method="f32")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"push": True},
            "METHOD: got keyword 'push'; allowed: dtype, max_shard_size.*, token, private, .*, datasets$",
        ),
        ({"save_method": "q9"}, "save_method: got 'q9'; allowed: 'merged_16bit'"),
        ({"dtype": "float64"}, "dtype: got 'float64'; allowed: None, torch.bfloat16"),
        ({"max_shard_size": "5 lots"}, "max_shard_size: got '5 lots'; allowed: a number of bytes from 1, or a text"),
        ({"max_shard_size": 0}, "max_shard_size: got 0; allowed"),
        ({"tags": ["mine"]}, r"tags: got \['mine'\]; allowed: None, \[\], \(\), as no model card is written"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
@pytest.mark.parametrize("method", ["push_to_hub_merged", "push_to_hub_gguf"])
def test_wrong_keywords_create_no_repository(
    hub: Hub, llama_cpp: Path, method: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises((TypeError, ValueError), match="^" + message.replace("METHOD", method)):
        getattr(unsloth_fast.save, method)(tiny.model(), "me/name", tiny.tokenizer(), **options)
    assert not hub.calls


def test_what_a_gguf_file_needs_is_checked_before_a_repository_is_created(hub: Hub, llama_cpp: Path) -> None:
    """A file needs 16 bits and a tokenizer; llama.cpp reads neither adapters nor bitsandbytes' weights."""
    push = unsloth_fast.save.push_to_hub_gguf
    for save_method in ("merged_4bit_forced", "lora"):
        with pytest.raises(ValueError, match=f"save_method: got '{save_method}'; allowed: 'merged_16bit'$"):
            push(tiny.model(), "me/name", tiny.tokenizer(), save_method=save_method)
    with pytest.raises(ValueError, match="tokenizer: got None; allowed: a tokenizer, which a GGUF file holds"):
        push(tiny.model(), "me/name")
    assert not hub.calls


def test_gguf_files_are_pushed_to_the_hub(tmp_path: Path, hub: Hub, llama_cpp: Path) -> None:
    """The file that llama-quantize started from is not pushed, as it was not asked for."""
    model, tokenizer = adapted(tiny.folder(tmp_path / "base"))
    model.push_to_hub_gguf("me/name", tokenizer, quantization_method="q5_k_m", token="secret", create_pr=True)
    (_, upload, files) = hub.calls[1]
    assert {name for name in files if name.endswith(".gguf")} == {"name.Q5_K_M.gguf"}
    assert (upload["allow_patterns"], upload["create_pr"]) == ("*.gguf", True)


def test_without_llama_cpp_the_commands_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error is raised before anything is merged."""
    monkeypatch.delenv("LLAMA_CPP_DIR", raising=False)
    monkeypatch.setenv("PATH", "")
    model, tokenizer = load(tiny.folder(tmp_path / "base"))
    direct = r"python convert_hf_to_gguf.py model --outfile model.q8_0.gguf --outtype q8_0"
    with pytest.raises(RuntimeError, match=rf"save_pretrained_merged\('model', tokenizer\) and run: {direct}$"):
        model.save_pretrained_gguf(tmp_path / "out", tokenizer)
    program(tmp_path / "bin", "convert_hf_to_gguf.py", CONVERTER)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    with pytest.raises(RuntimeError, match=r"llama-quantize is neither .*llama-quantize model.bf16.gguf .* Q4_K_M$"):
        model.save_pretrained_gguf(tmp_path / "out", tokenizer, "q4_k_m")
    with pytest.raises(ValueError, match="quantization_method: got 'q9'; allowed: f32, f16"):
        model.save_pretrained_gguf(tmp_path / "out", tokenizer, ["q8_0", "q9"])
    assert not (tmp_path / "out").exists()
