"""`conformance model`: check whole models, with a backend's operations under them, against the laws of models."""

import argparse
from collections import defaultdict
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from functools import partial
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from conformance import backends
from conformance.case import DTYPES
from conformance.laws import LAWS
from conformance.models.task import ModelTask, tasks_of
from conformance.reporting import report, results_file
from conformance.running.catalogue import UsageError, device_of, known
from conformance.running.runner import run
from conformance.running.search import Result
from conformance.verbs._shared import Verbs, add_device, add_verb, demand_at_least, demand_writable
from unsloth_fast.unsupported import demand_extra

PACKAGES = ("transformers", "peft", "trl")
# Of all laws on one model, if not given. The truth of a large model is computed in float64, several times.
TIMEOUT_SECONDS, TINY_TIMEOUT_SECONDS = 4 * 3600, 900


def add(verbs: Verbs) -> None:
    """Add the verb to the command line."""
    parser = add_verb(verbs, "model", "check whole models against the laws of models")
    add_subject(parser)
    parser.add_argument("--law", nargs="+", action="extend", metavar="L", help=f"{', '.join(LAWS)} (all)")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="worker processes, each with its truths (1)")
    parser.add_argument("--timeout", type=float, metavar="S", help="seconds for all laws on a model (900; loaded 4 h)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results to this file")
    parser.set_defaults(verb=_model)


def add_subject(parser: argparse.ArgumentParser) -> None:
    """Add the options that name models, what is placed under them, and where."""
    parser.add_argument("models", nargs="*", metavar="PATH_OR_NAME", help="models to load")
    parser.add_argument(
        "--config", nargs="+", action="extend", metavar="ARCH", help="architectures to build at tiny size, or all"
    )
    parser.add_argument("--backend", default="fast", help="fast or reference, as in UNSLOTH_BACKEND (fast)")
    parser.add_argument(
        "--data", type=Path, metavar="FILE", help="documents, one per line, or .jsonl with texts (random)"
    )
    parser.add_argument("--documents", type=int, metavar="N", help="how many documents (3)")
    add_device(parser)
    parser.add_argument(
        "--dtype", nargs="+", action="extend", metavar="D", help=f"{', '.join(DTYPES)} (float32; on cuda bfloat16)"
    )


def _model(arguments: argparse.Namespace) -> int:
    if arguments.timeout is not None and not arguments.timeout > 0:
        raise UsageError(f"--timeout: got {arguments.timeout:g}; allowed: above 0")
    tasks = tasks_asked(arguments)
    first, names = tasks[0], list(dict.fromkeys(task.op for task in tasks))
    dtypes = list(dict.fromkeys(task.dtype for task in tasks))
    limit = arguments.timeout or (TIMEOUT_SECONDS if arguments.models else TINY_TIMEOUT_SECONDS)
    print(f"{heading(first)}, at most {limit:g} s for a model", flush=True)
    results: list[Result] = []

    def on_result(task: ModelTask, result: Result) -> None:
        table.add(task, result)
        results.append(result)
        if arguments.json:  # after every result, so that a stopped run leaves what it found
            _write(arguments.json, results, first)

    with Rows(tasks, names, dtypes, "laws") as table:
        results = [result for _, result in run(tasks, on_result, jobs=arguments.jobs, timeout=limit, limit=limit)]
    print()
    failed = any(result.verdict == "fail" for result in results)
    if failed:
        statements = {name: law.statement for name, law in LAWS.items()}
        text = report.failures(results, first.backend, first.device, statements=statements)
        print("", text, sep="\n", end="\n\n")
    print(_counted(results), report.closing(results), sep="\n")
    if arguments.json:
        _write(arguments.json, results, first)
    return 1 if failed else 0 if any(result.verdict == "pass" for result in results) else 2


class Rows(report.Table):
    """One row per model: which laws fail, and which were skipped, with the reason."""

    _last_columns = "what fails or is skipped"

    def _all_skipped(self, results: Sequence[Result]) -> str:
        reasons = _reasons(results)
        return f"not judged: {next(iter(reasons))}" if len(reasons) == 1 else f"not judged: {_listed(reasons)}"

    def _last(self, results: Sequence[Result]) -> str:
        failed = dict.fromkeys(result.property for result in results if result.verdict == "fail")
        return "; ".join(filter(None, (f"FAIL {', '.join(failed)}" if failed else "", _listed(_reasons(results)))))


def _reasons(results: Sequence[Result]) -> dict[str, list[str]]:
    """The laws that were skipped, by their reason."""
    laws: dict[str, list[str]] = defaultdict(list)
    for result in results:
        if result.verdict == "skip":
            laws[(result.message or "").partition("\n")[0]].append(result.property)
    return laws


def _listed(reasons: Mapping[str, Sequence[str]]) -> str:
    return "; ".join(f"skip {', '.join(dict.fromkeys(laws))}: {reason}" for reason, laws in reasons.items())


def _counted(results: Sequence[Result]) -> str:
    """One line: how many models pass, and of these with laws that say nothing about them, fail, and are not judged."""
    verdicts: dict[str, set[str]] = defaultdict(set)
    for result in results:
        verdicts[result.op].add(result.verdict)
    failed = sum("fail" in found for found in verdicts.values())
    idle = sum(found == {"skip"} for found in verdicts.values())
    some = sum(found == {"pass", "skip"} for found in verdicts.values())
    passed = f"{len(verdicts) - failed - idle} pass" + (f" ({some} of them with laws skipped)" if some else "")
    return f"{len(verdicts)} models: {passed}, {failed} fail, {idle} not judged"


def tasks_asked(arguments: argparse.Namespace) -> list[ModelTask]:
    """What the command line asks for; raises UsageError."""
    device = device_of(arguments.device)
    dtypes = known("dtype", arguments.dtype or ["bfloat16" if device == "cuda" else "float32"], list(DTYPES))
    laws = known("law", arguments.law, list(LAWS))
    if not arguments.law and arguments.backend == "reference":
        laws = [law for law in laws if law != "reference"]  # it compares with what that backend is
    demand_at_least(arguments, jobs=1, documents=2)
    if not arguments.models and not arguments.config:
        raise UsageError("model: got none; allowed: PATH_OR_NAME, --config ARCH, or both")
    if arguments.data and not arguments.data.is_file():
        raise UsageError(f"--data: got {arguments.data}, which is no file; allowed: a text file or .jsonl")
    if arguments.data and arguments.config:
        raise UsageError(f"--data: got {arguments.data} with --config; allowed: with a model that has a tokenizer")
    _check_backend(arguments.backend, device)
    _demand_packages()
    for model in arguments.models:
        _check_model(model)
    demand_writable(arguments.json)
    options = {"backend": arguments.backend, "device": device, "data": arguments.data}
    made = partial(tasks_of, laws=laws, dtypes=dtypes, documents=arguments.documents, **options)
    return [*made(arguments.models, random=False), *made(_architectures(arguments.config or []), random=True)]


def _check_backend(name: str, device: str) -> None:
    """Raise UsageError for a backend that is unknown, or that cannot run here."""
    backends.load("fast" if "fast" in name else "reference", device)  # chooses Triton's interpreter before its import
    from unsloth_fast.backends import resolve

    try:
        resolve(name)
    except (RuntimeError, ValueError) as error:
        raise UsageError(str(error)) from error


def _demand_packages() -> None:
    """Raise UsageError if a package of the trainer is not installed."""
    try:
        for name in PACKAGES:
            import_module(name)
    except ModuleNotFoundError as lacking:
        try:
            demand_extra("model", lacking)
        except ImportError as error:
            raise UsageError(str(error)) from error
        raise


def _check_model(name: str) -> None:
    """Raise UsageError for a model that cannot be loaded, or that does not generate text from text."""
    from transformers import AutoConfig

    from unsloth_fast.models.loading import model_class
    from unsloth_fast.models.source import find_source

    try:
        source = find_source(name, {})
        if source.is_adapter:
            raise UsageError(f"model: got {name}, an adapter; allowed: a whole model")
        model_class(AutoConfig.from_pretrained(name))
    except (OSError, ValueError) as error:
        message = " ".join(str(error).split())
        named = message.startswith("model_name: got ")
        raise UsageError(message if named else f"model: got {name}: {message}") from error


def _architectures(asked: Sequence[str]) -> list[str]:
    from conformance.models.building import architectures, image_text_architectures

    if "all" in asked:
        return architectures()
    allowed = [*architectures(), *image_text_architectures()]
    for name in asked:
        if name not in allowed:
            near = get_close_matches(name, allowed) or allowed[:3]
            few = f"all, or one of transformers' {len(allowed)}, such as {', '.join(near)}"
            raise UsageError(f"--config: got {name!r}; allowed: {few}")
    return list(dict.fromkeys(asked))


def heading(task: ModelTask) -> str:
    """One line: the backend, what it is compared with, and where."""
    where = f", {torch.cuda.get_device_name()}" if task.device == "cuda" else ""
    judged = backends.load("fast" if "fast" in task.backend else "reference", task.device)
    description = judged.description.replace(judged.name, task.backend, 1)
    release = torch.__version__.split("+")[0]
    return f"backend {description} against transformers {version('transformers')}, torch {release}{where}"


def _write(path: Path, results: Sequence[Result], task: ModelTask) -> None:
    results_file.write(path, meta_of(task), [result.as_dict() for result in results])


def meta_of(task: ModelTask) -> dict[str, Any]:
    """What results of a task depend on."""
    return {
        "versions": results_file.versions() | {name: version(name) for name in PACKAGES},
        "device": task.device,
        "gpu": torch.cuda.get_device_name() if task.device == "cuda" else None,
        "backend": task.backend,
        "commit": results_file.commit(),
        "not_defined": [],
    }
