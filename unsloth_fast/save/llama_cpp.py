"""llama.cpp's own programs: where they are, the methods of quantisation that they know, and how they are run."""

import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

logger = logging.getLogger(__name__)

_CONVERTER = "convert_hf_to_gguf.py"
_QUANTIZER = "llama-quantize"
_FOLDER = "LLAMA_CPP_DIR"

_ALIASES = {
    "not_quantized": "f16",
    "fast_quantized": "q8_0",
    "quantized": "q4_k_m",
    "q4_k": "q4_k_m",
    "q5_k": "q5_k_m",
    "q3_k": "q3_k_m",
}
_BY_CONVERTER = ("f32", "f16", "bf16", "q8_0")
_BY_QUANTIZER = (
    *("q2_k", "q2_k_l", "q2_k_s", "q3_k_s", "q3_k_m", "q3_k_l", "q4_0", "q4_1", "q4_k_s", "q4_k_m"),
    *("q5_0", "q5_1", "q5_k_s", "q5_k_m", "q6_k", "iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq2_m"),
    *("iq3_xxs", "iq3_xs", "iq3_s", "iq3_m", "iq4_nl", "iq4_xs", "tq1_0", "tq2_0"),
)
ALLOWED_QUANTS = (*_BY_CONVERTER, *_BY_QUANTIZER, *_ALIASES)


def resolve_methods(asked: str | Iterable[str] | None) -> list[str]:
    """llama.cpp's names of the quantisation methods asked for, each once.

    Raises:
        ValueError: an unknown method.
    """
    given = [asked or "fast_quantized"] if asked is None or isinstance(asked, str) else list(asked)
    methods = [str(method).lower() for method in given]
    for method in methods:
        if method not in ALLOWED_QUANTS:
            raise ValueError(f"quantization_method: got {method!r}; allowed: {', '.join(ALLOWED_QUANTS)}")
    return list(dict.fromkeys(_ALIASES.get(method, method) for method in methods))


def find_programs(methods: Iterable[str]) -> dict[str, list[str]]:
    """The commands of llama.cpp that these methods need, by the names of its programs.

    Searched are the folder in LLAMA_CPP_DIR, with its build/bin, and PATH.

    Raises:
        RuntimeError: one is missing.
    """
    methods = list(methods)
    needed = [_CONVERTER] if set(methods) <= set(_BY_CONVERTER) else [_CONVERTER, _QUANTIZER]
    found = {}
    for name in needed:
        path = _find(name)
        if path is None:
            raise RuntimeError(
                f"quantization_method: got {', '.join(methods)}, and llama.cpp's {name} is neither in {_FOLDER} nor on "
                f"PATH; allowed: any method, once {_FOLDER} names the folder of llama.cpp "
                f"(https://github.com/ggml-org/llama.cpp). Or save the model with save_pretrained_merged('model', "
                f"tokenizer) and run: {_by_hand(methods)}"
            )
        found[name] = [sys.executable, path] if path.endswith(".py") else [path]
    return found


def _find(name: str) -> str | None:
    folder = os.environ.get(_FOLDER)
    if folder:
        for path in (Path(folder) / name, Path(folder) / "build" / "bin" / name):
            if path.is_file():
                return str(path)
    on_path = [Path(entry) / name for entry in os.environ.get("PATH", "").split(os.pathsep) if entry]
    return shutil.which(name) or next((str(path) for path in on_path if path.is_file()), None)


def _by_hand(methods: list[str]) -> str:
    """The commands to type that write these files."""
    direct = [method for method in methods if method in _BY_CONVERTER]
    others = [method for method in methods if method not in _BY_CONVERTER]
    commands = [f"python {_CONVERTER} model --outfile model.{m}.gguf --outtype {m}" for m in direct]
    if others and "bf16" not in direct:
        commands.append(f"python {_CONVERTER} model --outfile model.bf16.gguf --outtype bf16")
    commands += [f"{_QUANTIZER} model.bf16.gguf model.{m}.gguf {m.upper()}" for m in others]
    return " && ".join(commands)


def convert(folder: Path, target: Path, name: str, methods: list[str], wide: str) -> list[str]:
    """Write GGUF files of a saved model.

    Args:
        folder: the folder of the model, with its tokenizer.
        target: the folder for the files.
        name: what the files' names begin with; name.Q8_0.gguf is that of method q8_0.
        methods: the result of `resolve_methods`.
        wide: the method without loss, "bf16" or "f16", from which llama-quantize starts.

    Returns:
        The paths of the files, one per method.

    Raises:
        RuntimeError: a program is missing or failed; the message holds the end of its output.
    """
    programs = find_programs(methods)
    paths = {method: target / f"{name}.{method.upper()}.gguf" for method in methods}
    by_quantizer = [method for method in methods if method not in _BY_CONVERTER]
    start = paths.get(wide, target / f"{name}.{wide.upper()}.gguf")
    direct = {method: path for method, path in paths.items() if method in _BY_CONVERTER}
    if by_quantizer:
        direct[wide] = start
    for method, path in direct.items():
        _run([*programs[_CONVERTER], str(folder), "--outfile", str(path), "--outtype", method])
    for method in by_quantizer:
        _run([*programs[_QUANTIZER], str(start), str(paths[method]), method.upper()])
    if wide not in methods:
        start.unlink(missing_ok=True)
    return [str(path) for path in paths.values()]


def _run(command: list[str]) -> None:
    logger.info("running: %s", " ".join(command))
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        output = "\n".join(f"{done.stdout}\n{done.stderr}".strip().splitlines()[-20:])
        raise RuntimeError(f"llama.cpp: {' '.join(command)} ended with status {done.returncode}:\n{output}")
