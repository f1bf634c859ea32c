"""The action on a repository made for the test, step by step as GitHub runs it, and the comment that it posts."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.judge import hosted
from tests.judge.hosted import ACTION, ROOT

RIGHT = """
from torch.nn import functional


def layer_norm(x, weight, bias, eps=1e-5):
    return functional.layer_norm(x, x.shape[-1:], weight, bias, eps)
"""
WRONG = RIGHT.replace("eps)", "10 * eps)")
SWIGLU = """

def swiglu(gate, up):
    return functional.silu(gate) * up
"""
GH = """#!{python}
import json, os, re, sys
from pathlib import Path

if os.environ["GH_TOKEN"] != "secret":
    sys.exit("HTTP 403: Resource not accessible by integration")
_, kind, *words = sys.argv
comments = Path({comments!r})
said = json.loads(comments.read_text())
options = dict(zip(words, words[1:]))
assert kind == "api"
if "--jq" in options:
    assert "repos/me/kernels/issues/7/comments" in words
    wanted = re.fullmatch(r'.* == "Bot" .*startswith\\("(.*)"\\)\\)\\) \\| .id', options["--jq"])[1]
    ids = [number for number, (user, body) in enumerate(said) if user == "Bot" and body.startswith(wanted)]
    print(*ids, sep="\\n")
else:
    body = Path(options["--field"].removeprefix("body=@")).read_text()
    if options.get("--method") == "PATCH":
        said[int(re.fullmatch(r"repos/me/kernels/issues/comments/(.*)", options["PATCH"])[1])] = ["Bot", body]
    else:
        said.append(["Bot", body])
    comments.write_text(json.dumps(said))
"""


def test_the_action_edits_its_own_comment_and_no_other(tmp_path: Path) -> None:
    """GitHub's program is replaced by one that keeps the comments in a file; a fork's token may not write them."""
    (step,) = (step for step in ACTION["runs"]["steps"] if step["name"] == "comment")
    comments, program, text = tmp_path / "comments.json", tmp_path / "gh", tmp_path / "comment.md"
    program.write_text(GH.format(python=sys.executable, comments=str(comments)))
    program.chmod(0o755)
    others = [["User", "<!-- conformance gate of mine on cpu -->"], ["Bot", "coverage 90 %"]]
    comments.write_text(json.dumps(others))

    def post(body: str, backend: str = "mine", number: str = "7", token: str = "secret") -> str:
        text.write_text(body)
        names = {"COMMENT": str(text), "NUMBER": number, "GITHUB_REPOSITORY": "me/kernels", "GH_TOKEN": token}
        environment = os.environ | names | {"BACKEND": backend, "DEVICE": "cpu"}
        environment |= {"PATH": f"{tmp_path}:{os.environ['PATH']}", "TMPDIR": str(tmp_path)}
        done = subprocess.run(
            ["bash", "-eo", "pipefail", "-c", step["run"]], env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    for body, backend in (("first", "mine"), ("others", "theirs"), ("second", "mine")):
        assert post(f"{body}\n", backend) == ""
    posted = [["Bot", f"<!-- conformance gate of {name} on cpu -->\n{body}\n"] for name, body in
              (("mine", "second"), ("theirs", "others"))]  # fmt: skip
    assert json.loads(comments.read_text()) == others + posted
    assert post("third", number="8").startswith("::warning::the comment was not posted")
    assert post("of a fork", token="may only read").startswith("::warning::the comment was not posted")
    assert json.loads(comments.read_text()) == others + posted
    assert sorted(path.name for path in tmp_path.iterdir()) == ["comment.md", "comments.json", "gh"]


def git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), "-c", "user.name=toy", "-c", "user.email=toy@example.com", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_pull_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong kernel and a lost operation fail the job, with a comment and a page all the same.

    The next push edits that comment. A gate that cannot run says why in the summary, and neither posts nor keeps the
    results of the run before it.
    """
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    origin, programs, comments = tmp_path / "origin", tmp_path / "programs", tmp_path / "comments.json"
    programs.mkdir()
    (programs / "gh").write_text(GH.format(python=sys.executable, comments=str(comments)))
    (programs / "gh").chmod(0o755)
    comments.write_text("[]")
    origin.mkdir()
    git(origin, "init", "-q", "-b", "main")
    git(origin, "config", "uploadpack.allowAnySHA1InWant", "true")  # as GitHub

    def push(kernels: str) -> str:
        (origin / "toy_kernels.py").write_text(kernels)
        git(origin, "add", "-A")
        git(origin, "commit", "-qm", "kernels")
        return git(origin, "rev-parse", "HEAD")

    pull = {"number": 7, "base": {"sha": push(RIGHT + SWIGLU)}}
    arguments = "--dtype float32 --property 'value' --jobs 1"
    inputs = {"backend": "toy_kernels", "operations": "layer_norm swiglu", "arguments": arguments, "comment": "true"}
    inputs["json"] = "results/gate.json"

    def job(**changes: str) -> hosted.Job:
        clone = hosted.workspace_of(origin, tmp_path / "clone")
        (clone / "results").mkdir()
        (clone / "results/gate.json").write_text('{"meta": "of a run before this one"}')
        event = {"pull_request": pull, "repository": {"default_branch": "main"}}
        return hosted.run(clone, tmp_path, inputs | changes, event, programs)

    head = push(WRONG)
    done = job()
    failure = "passed before, and fails now: gate G1"
    assert done.status == "failure"
    assert f"\nFAIL layer_norm / value / float32: {failure}" in done.summary
    assert "\nFAIL swiglu: is lost: it was defined before\n" in done.summary
    assert "## Conformance: ❌ 2 failed" in done.summary
    assert done.artifact == "conformance-gate-judge-0-toy_kernels-cpu"
    assert json.loads(done.kept["results/gate.json"])["meta"]["head"] == "working tree"
    assert failure in done.kept["results/gate.html"]
    ((user, body),) = json.loads(comments.read_text())
    assert (user, body.partition("\n")[0]) == ("Bot", "<!-- conformance gate of toy_kernels on cpu -->")
    assert failure in body

    unable = job(backend="no_such_kernels")
    assert unable.status == "failure" and unable.kept == {"results/gate.json": ""}
    assert "\nconformance: head: backend: got 'no_such_kernels', which cannot be imported" in unable.summary
    assert json.loads(comments.read_text()) == [["Bot", body]]

    assert push(RIGHT + SWIGLU) != head
    done = job()
    assert done.status == "success", done.printed
    ((_, body),) = json.loads(comments.read_text())
    assert "## Conformance: ✅ nothing failed" in body and failure not in body


@pytest.mark.parametrize("base", ["no-such-branch", ""])
def test_a_base_that_is_nowhere_is_one_line(tmp_path: Path, base: str) -> None:
    origin = tmp_path / "origin"
    origin.mkdir()
    git(origin, "init", "-q")
    git(origin, "commit", "-q", "--allow-empty", "-m", "first")
    job = hosted.run(
        hosted.workspace_of(origin, tmp_path / "clone"), tmp_path, {"backend": "a", "base": base}, {}, tmp_path
    )
    assert job.status == "failure"
    said = f"::error::base: got '{base}'; allowed: a commit, branch or tag that is here or at the origin"
    assert job.printed.splitlines()[0] == said


def test_the_installation_is_that_of_the_repository_of_the_action() -> None:
    (step,) = (step for step in ACTION["runs"]["steps"] if step["name"] == "install")
    assert step["run"] == 'python -m pip install "$GITHUB_ACTION_PATH/../../.."'
    assert (ROOT / ".github/actions/judge/../../.." / "pyproject.toml").is_file()
