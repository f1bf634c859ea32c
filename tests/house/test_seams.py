"""The seams with other libraries: each row exists in the installed releases, every private name has a row."""

import ast
import inspect
import pkgutil
import re
from collections.abc import Iterator
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.requirements import Requirement

from conformance import seams as of_judge
from unsloth_fast import seams as of_fast
from unsloth_fast.seams import Seam, overrides

ROOT = Path(__file__).parents[2]
# The table of each folder. The examples use public names alone.
TABLES = {
    "unsloth_fast": of_fast.SEAMS,
    "conformance": of_judge.SEAMS,
    "tests/judge/power": of_judge.SEAMS,
    "examples": (),
}
FILES = [(folder, path) for folder in TABLES for path in sorted((ROOT / folder).rglob("*.py"))]
NAMED_TUPLE = {"_make", "_fields", "_replace", "_asdict"}  # public in spite of the underscore
OURS = ("unsloth_ref", "unsloth_fast", "conformance", "tests")
BY_NAME = ("getattr", "hasattr", "setattr", "patch.object")  # the second argument is a name


def exists(path: str) -> bool:
    """Whether the dotted path leads from a module through attributes; one that `__init__` sets counts as well."""
    module, found = path, None
    while found is None:
        module = module.rpartition(".")[0]
        try:
            found = import_module(module)
        except ImportError:
            continue
    for name in path.removeprefix(f"{module}.").split("."):
        if not hasattr(found, name):
            return any(defines(one, name) for one in (found.__mro__[:-1] if inspect.isclass(found) else [found]))
        found = getattr(found, name)
    return True


def defines(kind: Any, name: str) -> bool:
    """Whether a class has the attribute, or its source, or that of a decorator of classes, assigns it to instances."""
    if name in vars(kind):
        return True
    try:
        source = inspect.getsource(kind)
    except (OSError, TypeError):  # of a class that is not written in Python
        return False
    return f"self.{name} = " in source or f"self.{name}: " in source or f'"{name}"' in source


def is_there(needs: str) -> bool:
    """Whether what a row needs is there."""
    if ">" in needs:
        wanted = Requirement(needs)
        return wanted.specifier.contains(version(wanted.name))
    return torch.cuda.is_available() if needs == "CUDA" else find_spec(needs) is not None


@pytest.mark.parametrize("seam", dict.fromkeys((*of_fast.SEAMS, *of_judge.SEAMS)), ids=lambda seam: seam.path)
def test_the_installed_release_has_the_name(seam: Seam) -> None:
    if seam.needs and not is_there(seam.needs):
        pytest.skip(f"needs {seam.needs}")
    assert exists(seam.path), f"{seam.path} is gone: {seam.why}"
    assert seam.why


def test_a_name_that_is_gone_is_found() -> None:
    assert not exists("transformers.Trainer._get_num_items_in_the_batch")
    assert not exists("trl.SFTTrainer._metrics_of_old")


def private_names(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and name of every attribute, import, getattr and patch of something that is not `self`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) not in ("self", "cls"):
            yield node.lineno, node.attr
        elif isinstance(node, ast.ImportFrom) and not (node.module or "").startswith(OURS):
            yield from ((node.lineno, part) for part in (node.module or "").split("."))
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from ((node.lineno, part) for alias in node.names for part in alias.name.split("."))
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in BY_NAME:
            name = node.args[1]
            if isinstance(name, ast.Constant):
                yield node.lineno, str(name.value)


def own_names(tree: ast.AST) -> set[str]:
    """The private names that a module defines: functions, classes, variables, attributes of its own instances."""
    names = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    stored = [node for node in ast.walk(tree) if isinstance(getattr(node, "ctx", None), ast.Store)]
    names |= {node.id for node in stored if isinstance(node, ast.Name)}
    return names | {
        node.attr for node in stored if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "self"
    }


def names_in(rows: tuple[Seam, ...]) -> set[str]:
    """Every name on the way to those of the rows."""
    return {part for seam in rows for part in seam.path.split(".")}


def without_a_row(source: str, rows: tuple[Seam, ...]) -> set[str]:
    """Names with a leading underscore that neither the source defines nor a row lists."""
    tree = ast.parse(source)
    known = names_in(rows) | own_names(tree) | NAMED_TUPLE
    return {
        f"line {line}: {name}"
        for line, name in private_names(tree)
        if name.startswith("_") and not name.startswith("__") and name not in known
    }


@pytest.mark.parametrize(("folder", "path"), FILES, ids=[str(path.relative_to(ROOT)) for _, path in FILES])
def test_no_private_name_without_a_row(folder: str, path: Path) -> None:
    """A name with a leading underscore that belongs to another library has a row in the table of its folder."""
    assert without_a_row(path.read_text(encoding="utf-8"), TABLES[folder]) == set()


@pytest.mark.parametrize(
    "source",
    [
        "torch.cuda._snooze(1)",
        "import torch._snooze",
        "from torch._snooze import wake",
        "from torch import _snooze",
        "getattr(torch, '_snooze')",
        "patch.object(torch, '_snooze', None)",
    ],
)
def test_a_private_name_without_a_row_is_found(source: str) -> None:
    assert without_a_row(source, of_judge.SEAMS) == {"line 1: _snooze"}


@pytest.mark.parametrize("folder", ["unsloth_fast", "conformance"])
def test_every_row_is_used(folder: str) -> None:
    """The name of each row stands in a module of the folder other than the table."""
    texts = [path.read_text(encoding="utf-8") for _, path in FILES if path.parts[len(ROOT.parts)] == folder]
    text = "\n".join(text for text in texts if "\nSEAMS = (" not in text)
    used = set(re.findall(r"\w+", text))
    assert {seam.path for seam in TABLES[folder]} == {
        seam.path for seam in TABLES[folder] if seam.path.rpartition(".")[2] in used
    }


def classes() -> Iterator[type]:
    """Every class that a module of the package defines."""
    for entry in pkgutil.walk_packages([str(ROOT / "unsloth_fast")], "unsloth_fast."):
        module = import_module(entry.name)
        for value in vars(module).values():
            if inspect.isclass(value) and value.__module__ == entry.name:
                yield value


def is_ours_or_abstract(base: type) -> bool:
    """Whether the class is ours, or one whose documented use is to override its methods."""
    abstract = base.__module__ in ("typing", "builtins", "abc") or issubclass(torch.autograd.Function, base)
    return abstract or base.__module__.startswith("unsloth")


def test_every_override_is_marked() -> None:
    """A method that replaces one of another library's class carries `@overrides`."""
    unmarked = []
    for kind in classes():
        foreign = [base for base in kind.__mro__[1:] if not is_ours_or_abstract(base)]
        for name, value in vars(kind).items():
            replaces = inspect.isfunction(value) and any(name in vars(base) for base in foreign)
            if replaces and not name.startswith("__") and not hasattr(value, "overrides"):
                unmarked.append(f"{kind.__module__}.{kind.__name__}.{name}")
    assert unmarked == []


class Base:
    def method(self, first: int, second: int = 0) -> int:
        return first + second

    def open_to_all(self, **options: Any) -> None: ...


def test_an_override_of_nothing_raises() -> None:
    def methods(self: Any) -> None: ...

    with pytest.raises(ImportError, match=r"Base of the installed release has no method 'methods', which"):
        overrides(Base)(methods)


def test_an_override_with_an_unknown_parameter_raises() -> None:
    def method(self: Any, first: int, third: int) -> int:
        return first + third

    with pytest.raises(ImportError, match=r"Base\.method of the installed release takes no third, which"):
        overrides(Base)(method)


def test_an_override_that_fits_is_returned_as_it_is() -> None:
    def method(self: Any, *positional: Any, **keywords: Any) -> int:
        return 0

    def open_to_all(self: Any, anything: int) -> None: ...

    assert overrides(Base)(method) is method
    assert overrides(Base)(open_to_all) is open_to_all
