"""A job of GitHub that runs the composite action: its expressions, conditions, outputs and files."""

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
ACTION = yaml.safe_load((ROOT / ".github/actions/judge/action.yml").read_text(encoding="utf-8"))
WORD = re.compile(r"'([^']*)'|(always)\(\)|([A-Za-z_][\w.-]*)|(&&|\|\||==)")
SIGNS = {"&&": "and", "||": "or", "==": "=="}


@dataclass
class Job:
    """What is left of a job.

    Attributes:
        status: "success" or "failure".
        summary: of the job, as Markdown.
        printed: stdout of all steps; annotations are in it.
        kept: the files of the artifact, by name, and the name of the artifact.
    """

    status: str = "success"
    summary: str = ""
    printed: str = ""
    artifact: str = ""
    kept: dict[str, str] = field(default_factory=dict)


def run(workspace: Path, folder: Path, inputs: dict[str, str], event: dict[str, Any], programs: Path) -> Job:
    """Run every step but the installation.

    Args:
        workspace: the checked out repository.
        folder: for the runner's own files.
        inputs: of the action, as a workflow states them.
        event: what GitHub tells about the push or the pull request.
        programs: a folder that comes first on the path.
    """
    github = {"event": event, "job": "judge", "token": "secret"}
    context: dict[str, Any] = {"github": github, "strategy": {"job-index": 0}, "steps": {}}
    context["inputs"] = {
        name: inputs.get(name, filled(str(one.get("default", "")), context)) for name, one in ACTION["inputs"].items()
    }
    job, summary, output = Job(), folder / "summary.md", folder / "output"
    summary.write_text("")
    path = os.pathsep.join((str(programs), str(Path(sys.executable).parent), os.environ["PATH"]))
    for step in ACTION["runs"]["steps"]:
        failed, condition = job.status == "failure", step.get("if", "True")
        if step["name"] == "install" or (failed and "always()" not in condition) or not value(condition, context):
            continue
        if "uses" in step:
            keep(job, {name: filled(str(text), context) for name, text in step["with"].items()}, workspace)
            continue
        output.write_text("")
        names = {name: filled(text, context) for name, text in step.get("env", {}).items()}
        names |= {"GITHUB_OUTPUT": str(output), "GITHUB_STEP_SUMMARY": str(summary), "PATH": path}
        names |= {"GITHUB_REPOSITORY": "me/kernels"}
        command = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", step["run"]]
        done = subprocess.run(
            command, cwd=workspace, env=os.environ | names, capture_output=True, text=True, check=False
        )
        job.printed += done.stdout
        job.status = "failure" if failed or done.returncode else "success"
        lines = [line.partition("=") for line in output.read_text().splitlines()]
        context["steps"] |= {step["id"]: {"outputs": {name: text for name, _, text in lines}}} if "id" in step else {}
    job.summary = summary.read_text()
    return job


def keep(job: Job, options: dict[str, str], workspace: Path) -> None:
    """The action that uploads an artifact."""
    job.artifact = options["name"]
    for path in map(str.strip, options["path"].splitlines()):
        if path and (workspace / path).is_file():
            job.kept[path] = (workspace / path).read_text(encoding="utf-8")


def filled(text: str, context: dict[str, Any]) -> str:
    """A text with its expressions replaced by their values."""
    return re.sub(r"\$\{\{ (.*?) \}\}", lambda match: shown(value(match[1], context)), text)


def shown(found: Any) -> str:
    return "" if found is None else str(found)


def value(expression: str, context: dict[str, Any]) -> Any:
    """The value of an expression of names, texts, &&, || and ==."""

    def python(match: re.Match[str]) -> str:
        text, always, name, sign = match.groups()
        if sign:
            return f" {SIGNS[sign]} "
        return "True" if always or name == "True" else f"look({name!r})" if name else repr(text)

    def look(name: str) -> Any:
        found: Any = context
        for part in name.split("."):
            found = found.get(part) if isinstance(found, dict) else None
        return found

    return eval(WORD.sub(python, expression), {"look": look})


def workspace_of(repository: Path, folder: Path) -> Path:
    """A shallow clone, as actions/checkout makes it."""
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run(["git", "clone", "-q", "--depth=1", repository.as_uri(), str(folder)], check=True)
    return folder
