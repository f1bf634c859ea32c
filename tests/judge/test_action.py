"""The comment that the action posts to a pull request; tests/judge/test_gate.py runs its other steps."""

import json
import os
import subprocess
import sys
from pathlib import Path

import yaml

ACTION = yaml.safe_load((Path(__file__).parents[2] / ".github/actions/judge/action.yml").read_text(encoding="utf-8"))


GH = """#!{python}
import json, re, sys
from pathlib import Path

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
    """GitHub's program is replaced by one that keeps the comments in a file."""
    (step,) = (step for step in ACTION["runs"]["steps"] if step["name"] == "comment")
    comments, program, text = tmp_path / "comments.json", tmp_path / "gh", tmp_path / "comment.md"
    program.write_text(GH.format(python=sys.executable, comments=str(comments)))
    program.chmod(0o755)
    others = [["User", "<!-- conformance gate of mine on cpu -->"], ["Bot", "coverage 90 %"]]
    comments.write_text(json.dumps(others))

    def post(body: str, backend: str = "mine", number: str = "7") -> str:
        text.write_text(body)
        names = {"COMMENT": str(text), "NUMBER": number, "GITHUB_REPOSITORY": "me/kernels"}
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
    assert json.loads(comments.read_text()) == others + posted
    assert sorted(path.name for path in tmp_path.iterdir()) == ["comment.md", "comments.json", "gh"]
