"""The command line: `unsloth-fast sft --config run.yaml [--backend fast] [...]`.

Every field of the arguments is an option, as in `trl sft`; a configuration file gives defaults, options override them.
"""

import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

logger = logging.getLogger(__name__)

USAGE = """usage: unsloth-fast sft --model_name_or_path MODEL --dataset_name DATASET [--config FILE] [--backend B] [...]

Fine-tunes a language model. `unsloth-fast sft --help` lists every option."""


class UsageError(Exception):
    """What the user asked for cannot be done as asked; the message says it in one line."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand.

    Args:
        argv: the arguments after the program's name; None for the process's own.

    Returns:
        0 when done, 2 for a usage error, which is told in one line on stderr.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] in (["-h"], ["--help"]):
        print(USAGE)
        return 0
    try:
        if arguments[:1] != ["sft"]:
            raise UsageError(f"subcommand: got {arguments[0] if arguments else 'nothing'}; allowed: sft")
        sft(arguments[1:])
    except UsageError as error:
        print(f"unsloth-fast: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def sft(arguments: Sequence[str]) -> None:
    """Fine-tune, save, and push where that is asked for.

    Raises:
        UsageError: an argument, the configuration file, the data set or the model is not as it must be.
    """
    logging.basicConfig(format="%(message)s")
    logging.getLogger("unsloth_fast").setLevel(logging.INFO)  # which backend runs, and under what
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


def _build_trainer(training_args: Any, model_args: Any, train_dataset: Any, eval_dataset: Any = None) -> Any:
    """The trainer, with its model loaded and its data tokenized."""
    from trl import get_peft_config, get_quantization_config

    from unsloth_fast.trainer import UnslothTrainer

    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "trust_remote_code": training_args.trust_remote_code,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(training_args.model_init_kwargs or {}),
    }
    try:
        return UnslothTrainer(
            model=model_args.model_name_or_path,
            args=training_args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            quantization_config=get_quantization_config(model_args),
            peft_config=get_peft_config(model_args),
        )
    except KeyError as error:  # TRL reads the data set's columns without looking whether they are there
        column, columns, text = error.args[0], list(next(iter(train_dataset))), training_args.dataset_text_field
        if column in columns or column not in (text, "messages", "completion"):
            raise
        raise UsageError(
            f"data set: got no column {column!r}, only {', '.join(map(repr, columns))}; allowed: {text!r} (the name is "
            "dataset_text_field), 'messages', 'prompt' and 'completion', or 'input_ids'"
        ) from error
    except (OSError, ValueError, ImportError) as error:  # ImportError: an option needs a package that is not installed
        # transformers raises a bare OSError for files of a model; offline, its message does not name the model.
        of_model = type(error) is OSError and error.errno is None
        prefix = f"model_name_or_path {model_args.model_name_or_path!r}: " if of_model else ""
        raise UsageError(f"{prefix}{error}") from error


def _parse(arguments: Sequence[str]) -> tuple[Any, ...]:
    """ScriptArguments, UnslothTrainingArguments, ModelConfig and DatasetMixtureConfig, from file and options."""
    from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, TrlParser
    from yaml import YAMLError

    from unsloth_fast import backends
    from unsloth_fast.config import UnslothTrainingArguments

    class Parser(TrlParser):
        def error(self, message: str) -> NoReturn:  # argparse's own prints the usage, here some 400 lines of options
            raise UsageError(message)

    if list(arguments[-1:]) == ["--config"]:
        raise UsageError("--config: got nothing; allowed: the path of a YAML file")
    kinds: Any = (ScriptArguments, UnslothTrainingArguments, ModelConfig, DatasetMixtureConfig)
    parser = Parser(kinds, prog="unsloth-fast sft")
    try:
        parsed = parser.parse_args_and_config(arguments)
        backends.resolve(parsed[1].backend)
        _check_numbers_and_checkpoint(parsed[1])
    except (ValueError, TypeError, OSError, RuntimeError, YAMLError) as error:
        raise UsageError(str(error)) from error
    if not parsed[2].model_name_or_path:
        raise UsageError("model_name_or_path: got nothing; allowed: the name or path of a model")
    return parsed


def _check_numbers_and_checkpoint(training_args: Any) -> None:
    """Raise ValueError for what transformers notices only when training starts."""
    from transformers.trainer_utils import get_last_checkpoint

    for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
        value = getattr(training_args, name)
        if not (isinstance(value, int) and value >= 1):
            raise ValueError(f"{name}: got {value!r}; allowed: an integer from 1")

    checkpoint, folder = training_args.resume_from_checkpoint, training_args.output_dir
    if checkpoint is True:
        checkpoint = get_last_checkpoint(folder) if Path(folder).is_dir() else None
        if checkpoint is None:
            raise ValueError(f"resume_from_checkpoint: got True; allowed: False, as {folder!r} holds no checkpoint")
    if checkpoint and not Path(checkpoint, "trainer_state.json").is_file():
        raise ValueError(f"resume_from_checkpoint: got {checkpoint!r}; allowed: a folder with a trainer_state.json")


def _load_dataset(script_args: Any, mixture: Any) -> Any:
    """The data set by split."""
    from datasets import load_dataset
    from trl import get_dataset

    if not mixture.datasets and not script_args.dataset_name:
        raise UsageError("dataset_name: got nothing; allowed: the name or path of a data set, or `datasets` in a file")
    if mixture.datasets and script_args.dataset_name:
        logger.warning("dataset_name %r is ignored: `datasets` is given", script_args.dataset_name)
    try:
        if mixture.datasets:
            return get_dataset(mixture)
        return load_dataset(
            script_args.dataset_name, name=script_args.dataset_config, streaming=script_args.dataset_streaming
        )
    except (ValueError, OSError) as error:
        raise UsageError(f"data set: {error}") from error


if __name__ == "__main__":
    sys.exit(main())
