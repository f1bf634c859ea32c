"""The command line: `unsloth-fast sft --config run.yaml [--backend fast] [...]`, and `unsloth-fast env`.

Every field of the arguments is an option, as in `trl sft`. Options override the values of a configuration file.
"""

import logging
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from hashlib import sha256
from importlib import metadata
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

USAGE = """usage: unsloth-fast sft --model_name_or_path MODEL --dataset_name DATASET [--config FILE] [--backend B] [...]
       unsloth-fast env

sft: fine-tune a language model. DATASET is the name of a hub data set, a .jsonl, .json, .parquet or .csv file, or
     a folder of such files, with a column "text", a column "messages", or the columns "prompt" and "completion".
     FILE is a YAML file with values for any options. `unsloth-fast sft --help` lists all options.
env: print the installed versions, the GPUs, and the backend that would run and why."""

FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
PACKAGES = ("unsloth-fast", "torch", "triton", "transformers", "trl", "peft", "accelerate", "datasets", "bitsandbytes")


class UsageError(Exception):
    """A mistake in the user's input; its message is printed as one line, without a traceback."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand.

    Args:
        argv: the arguments after the program's name; None for the process's own.

    Returns:
        0 on success; 2 for a usage error, after one line on stderr.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] in (["-h"], ["--help"]):
        print(USAGE)
        return 0
    try:
        if arguments[:1] == ["sft"]:
            sft(arguments[1:])
        elif arguments == ["env"]:
            env()
        elif arguments[:1] == ["env"]:
            raise UsageError(f"env: got {arguments[1]!r}; allowed: no argument")
        else:
            raise UsageError(f"subcommand: got {arguments[0] if arguments else 'nothing'}; allowed: sft, env")
    except UsageError as error:
        print(f"unsloth-fast: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def sft(arguments: Sequence[str]) -> None:
    """Fine-tune a model, save it, and push it to the hub if asked to.

    Raises:
        UsageError: a mistake in an option, the configuration file, the data set or the model.
    """
    logging.basicConfig(format="%(message)s")
    logging.getLogger("unsloth_fast").setLevel(logging.INFO)  # logs the backend and where it is placed
    script_args, training_args, model_args, mixture = _parse(arguments)
    dataset = _load_dataset(script_args, mixture)
    splits = [script_args.dataset_train_split]
    if training_args.eval_strategy != "no":
        splits.append(script_args.dataset_test_split)
    for split in splits:
        if split not in dataset:
            raise UsageError(f"data set: got no split {split!r}; allowed: {', '.join(map(repr, dataset))}")

    trainer = _build_trainer(training_args, model_args, *(dataset[split] for split in splits))
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model(training_args.output_dir)
    trainer.accelerator.print(f"Model saved to {training_args.output_dir}.")
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)
    if hasattr(trainer, "end"):  # since transformers 5.18: finishes the trackers and the process group
        trainer.end()


def env() -> None:
    """Print the versions of the packages in use, the GPUs, and the backend that a run would use by default."""
    import torch

    from unsloth_fast import backends

    logging.disable(logging.WARNING)  # the choice of "auto" is printed below
    lines = [("python", platform.python_version()), *((package, _version(package)) for package in PACKAGES)]
    lines.append(("CUDA", torch.version.cuda or "not in this build of torch"))
    lines.append(("driver", _driver()))
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        size = f"{gpu.total_memory / 2**30:.1f} GiB"
        lines.append((f"GPU {index}", f"{gpu.name}, {size}, compute capability {gpu.major}.{gpu.minor}"))
    if not torch.cuda.device_count():
        lines.append(("GPU", "none"))
    try:
        chosen = backends.resolve()
        lines.append(("backend", f"{chosen.name} ({chosen.reason})"))
    except (RuntimeError, ValueError) as error:  # a mistake in UNSLOTH_BACKEND
        lines.append(("backend", f"none: {error}"))
    finally:
        logging.disable(logging.NOTSET)
    width = max(len(name) for name, _ in lines)
    for name, value in lines:
        print(f"{name:<{width}}  {value}")


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _driver() -> str:
    """The version of NVIDIA's driver, as nvidia-smi reports it."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return "no nvidia-smi"
    query = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, timeout=30, check=False)
    return (done.stdout if done.returncode == 0 else done.stderr or done.stdout).strip().split("\n")[0] or "unknown"


def _build_trainer(training_args: Any, model_args: Any, train_dataset: Any, eval_dataset: Any = None) -> Any:
    """The trainer, with its model loaded, its data tokenized, and everything checked that its training needs."""
    from jinja2 import TemplateError
    from trl import get_peft_config, get_quantization_config

    from unsloth_fast.trainer import UnslothTrainer

    where = training_args if hasattr(training_args, "trust_remote_code") else model_args  # the former since TRL 1.6
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "trust_remote_code": where.trust_remote_code,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        "quantization_config": get_quantization_config(model_args),
        **(training_args.model_init_kwargs or {}),
    }
    try:
        trainer = UnslothTrainer(
            model=model_args.model_name_or_path,
            args=training_args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            peft_config=get_peft_config(model_args),
        )
        _check_start(trainer)
        return trainer
    except TemplateError as error:
        raise UsageError(f"chat template: {error}") from error
    except RuntimeError as error:
        if "to be installed" not in str(error):  # transformers' message for a tracker whose package is missing
            raise
        raise UsageError(f"report_to: {error}") from error
    except (OSError, ValueError, ImportError) as error:  # ImportError: an option needs a package that is not installed
        # transformers raises OSError without errno for files of a model; offline, the message does not name the model.
        of_model = type(error) is OSError and error.errno is None
        prefix = f"model_name_or_path {model_args.model_name_or_path!r}: " if of_model else ""
        raise UsageError(f"{prefix}{error}") from error


def _check_start(trainer: Any) -> None:
    """Raise for mistakes that `train` would only report after it has begun.

    Raises:
        UsageError: a package that is not installed, a mode that torch.compile does not know, or options of the
            optimizer or of the learning rate's schedule that contradict each other.
    """
    import torch
    from transformers import get_scheduler
    from transformers.utils import is_liger_kernel_available

    args = trainer.args
    try:
        trainer.get_optimizer_cls_and_kwargs(args, trainer.model)
    except (ImportError, ValueError) as error:
        raise UsageError(f"optim: got {args.optim.value!r} with optim_args={args.optim_args!r}: {error}") from error
    if args.use_liger_kernel and not is_liger_kernel_available():
        raise UsageError("use_liger_kernel: got True; allowed: False, as the package liger-kernel is not installed")
    if args.torch_compile_mode is not None:
        try:  # compiles nothing yet
            torch.compile(trainer.model, backend=args.torch_compile_backend or "inductor", mode=args.torch_compile_mode)
        except RuntimeError as error:
            raise UsageError(f"torch_compile_mode: got {args.torch_compile_mode!r}: {error}") from error
    some = torch.optim.SGD([torch.zeros(1)], lr=args.learning_rate)
    try:
        get_scheduler(args.lr_scheduler_type, some, 0, 1, scheduler_specific_kwargs=args.lr_scheduler_kwargs)
    except (TypeError, ValueError) as error:
        raise UsageError(f"lr_scheduler_kwargs: got {args.lr_scheduler_kwargs}: {error}") from error


def _check_template(path: str | None) -> None:
    """Raise for a chat template that TRL will not find: neither a file nor a model with a template.

    Raises:
        UsageError: the error of loading it, with the name of the option, which that error does not give.
    """
    from transformers import AutoTokenizer

    if not path or (path.endswith((".jinja", ".j2")) and Path(path).is_file()):
        return
    try:
        AutoTokenizer.from_pretrained(path).get_chat_template()
    except (OSError, ValueError) as error:
        raise UsageError(f"chat_template_path: got {path!r}; allowed: a .jinja file, or a model ({error})") from error


def _parse(arguments: Sequence[str]) -> tuple[Any, ...]:
    """ScriptArguments, UnslothTrainingArguments, ModelConfig and DatasetMixtureConfig from the file and the options."""
    try:
        from unsloth_fast import UnslothTrainingArguments
    except ImportError as error:
        raise UsageError(str(error)) from error
    from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments
    from yaml import YAMLError

    from unsloth_fast import backends
    from unsloth_fast.hooks.checkpoints import resolve_checkpoint
    from unsloth_fast.options import Parser, target_modules

    if list(arguments[-1:]) == ["--config"]:
        raise UsageError("--config: got nothing; allowed: the path of a YAML file")
    dataclasses: Any = (ScriptArguments, UnslothTrainingArguments, ModelConfig, DatasetMixtureConfig)
    parser = Parser(dataclasses, prog="unsloth-fast sft")
    try:
        parsed = parser.parse_args_and_config(arguments)
        backends.resolve(parsed[1].backend)
        asked = parsed[1].resume_from_checkpoint  # a path or a bool; options are text
        parsed[1].resume_from_checkpoint = {"true": True, "false": False}.get(str(asked).lower(), asked)
        resolve_checkpoint(parsed[1].resume_from_checkpoint, parsed[1].output_dir)
        parsed[2].lora_target_modules = target_modules(parsed[2].lora_target_modules)
    except (ValueError, TypeError, OSError, RuntimeError, ImportError, YAMLError) as error:
        raise UsageError(str(error)) from error
    if not parsed[2].model_name_or_path:
        raise UsageError("model_name_or_path: got nothing; allowed: the name or path of a model")
    _check_template(parsed[1].chat_template_path)
    return parsed


def _load_dataset(script_args: Any, mixture: Any) -> Any:
    """The splits of the data set, by name."""
    from datasets.exceptions import DatasetGenerationError, DatasetsError
    from trl import get_dataset

    if not mixture.datasets and not script_args.dataset_name:
        raise UsageError(
            "dataset_name: got nothing; allowed: a data set's name or path, or `datasets` in the --config file"
        )
    if mixture.datasets and script_args.dataset_name:
        logger.warning("dataset_name: got %r and `datasets`; only `datasets` is used", script_args.dataset_name)
    try:
        if mixture.datasets:
            for part in mixture.datasets:
                if not isinstance(getattr(part, "path", None), str):
                    raise UsageError(
                        f"datasets: got {getattr(part, 'path', part)!r}; allowed: a list of entries with a path, as in "
                        "`- {path: json, data_files: train.jsonl}`; dataset_name takes a single file"
                    )
                part.path, part.data_files = _existing(part.path), _existing(part.data_files)
            return get_dataset(mixture)
        return _load_named(script_args.dataset_name, script_args.dataset_config, script_args.dataset_streaming)
    except StopIteration as error:  # the JSON reader of datasets found only empty files
        raise UsageError("data set: got an empty file; allowed: one with at least one row") from error
    except DatasetGenerationError as error:
        raise UsageError(f"data set: {error}: {error.__cause__}") from error
    except (ValueError, OSError, DatasetsError) as error:
        raise UsageError(f"data set: {error}") from error


def _load_named(name: str, config: str | None, streaming: bool) -> Any:
    """The splits of a file, of a folder, or of a data set on the hub."""
    from datasets import load_dataset

    path, kind = Path(name).expanduser(), FORMATS.get(Path(name).suffix.lower())
    if path.is_file():
        if kind is None:
            raise UsageError(f"dataset_name: got {name!r}; allowed: a file whose name ends in {', '.join(FORMATS)}")
        return load_dataset(kind, data_files=_without_patterns(path), streaming=streaming)
    if path.is_dir():
        return load_dataset(_without_patterns(path), name=config, streaming=streaming)
    if kind is not None or name.startswith(("/", "./", "../", "~")):
        raise UsageError(f"dataset_name: got {name!r}; allowed: an existing file or folder, or the name of a data set")
    return load_dataset(name, name=config, streaming=streaming)


def _existing(paths: Any) -> Any:
    """The paths of a mixture; those that exist are read as they are, the others as patterns."""
    if isinstance(paths, dict):
        return {split: _existing(part) for split, part in paths.items()}
    if isinstance(paths, list):
        return [_existing(part) for part in paths]
    return _without_patterns(Path(paths)) if isinstance(paths, str) and Path(paths).exists() else paths


def _without_patterns(path: Path) -> str:
    """The path, or that of links to its files where `datasets` would read the path as a pattern or a chain of URLs.

    The links are in the cache of `datasets`. Another version of a file has another link, because `datasets` recognises
    a file by its path and the time of the link.
    """
    from datasets import config

    if not any(mark in str(path) for mark in ("*", "?", "[", "]", "::", "://")):
        return str(path)
    path = path.resolve()
    files = sorted(entry for entry in path.rglob("*") if entry.is_file()) if path.is_dir() else [path]
    states = [(str(file), file.stat().st_mtime_ns, file.stat().st_size) for file in files]
    folder = Path(config.HF_DATASETS_CACHE) / "links" / sha256(repr(states).encode()).hexdigest()[:16]
    for file in files:
        link = folder / file.relative_to(path) if path.is_dir() else folder / f"data{path.suffix.lower()}"
        link.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileExistsError):  # of an earlier run, or of another process of this one
            link.symlink_to(file)
    return str(folder if path.is_dir() else link)


if __name__ == "__main__":
    sys.exit(main())
