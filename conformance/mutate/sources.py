"""Which source files and functions make up an operation, and how edited copies of them are imported."""

import ast
import importlib.util
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from importlib.abc import ExecutionLoader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

from conformance import calling
from conformance.mutate.mutant import SourceFile
from conformance.trial import BackendError, Function

# Every operation of unsloth_fast uses these: what they do has tests of its own. `--file` mutates them too.
SHARED = tuple(f"unsloth_fast.kernels.{name}" for name in ("_autograd", "_launch", "_replay"))


class Text(ExecutionLoader):
    """Imports source code from memory; Triton reads the source of kernels through this loader."""

    def __init__(self, text: str, path: str) -> None:
        """`path` is the name of no existing file: otherwise Triton would read that file."""
        self._text, self._path = text, path

    def get_source(self, fullname: str) -> str:
        """The source."""
        return self._text

    def get_filename(self, fullname: str) -> str:
        """The path, which distinguishes the modules in tracebacks and caches."""
        return self._path


class _Finder(MetaPathFinder):
    """Finds one module in memory, in place of the one on disk."""

    def __init__(self, module: str, text: str) -> None:
        self._module, self._text = module, text

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self._module:
            return None
        spec = PathFinder.find_spec(fullname, path)
        assert spec is not None and spec.origin is not None
        file = Path(spec.origin)
        spec.origin = str(file.with_name(f"{file.stem}.mutant{file.suffix}"))
        spec.loader, spec.cached = Text(self._text, spec.origin), None
        return spec


def import_edited(module: str, text: str) -> None:
    """Make this process import a module from this text; raises RuntimeError if it is imported already."""
    if module in sys.modules:
        raise RuntimeError(f"{module}: imported already; allowed: a module that this process has not imported")
    sys.meta_path.insert(0, _Finder(module, text))


def imported(name: str, text: str) -> ModuleType:
    """A new module with this name and text."""
    spec = importlib.util.spec_from_loader(name, Text(text, f"{name}.py"))
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class _Module:
    """A module's syntax tree: its top-level statements and imports by name."""

    def __init__(self, module: ModuleType, path: Path) -> None:
        self.name, self.path, self.text = module.__name__, path, path.read_text(encoding="utf-8")
        self._package = module.__package__ or ""

    @cached_property
    def statements(self) -> Mapping[str, list[ast.stmt]]:
        """The top-level statements that define a name."""
        found: dict[str, list[ast.stmt]] = {}
        for statement in ast.parse(self.text).body:
            for name in defined(statement):
                found.setdefault(name, []).append(statement)
        return found

    @cached_property
    def imports(self) -> Mapping[str, tuple[str, str | None]]:
        """For each imported name, the module and the name in it; None for a module itself."""
        found: dict[str, tuple[str, str | None]] = {}
        for node in ast.walk(ast.parse(self.text)):
            if isinstance(node, ast.Import):
                found |= {alias.asname or alias.name.partition(".")[0]: (alias.name, None) for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                origin = importlib.util.resolve_name("." * node.level + (node.module or ""), self._package)
                for alias in node.names:
                    whole = f"{origin}.{alias.name}"
                    found[alias.asname or alias.name] = (whole, None) if whole in sys.modules else (origin, alias.name)
        return found


def defined(statement: ast.stmt) -> list[str]:
    """The names that a top-level statement defines; of an `if` or `try`, those inside."""
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [statement.name]
    if isinstance(statement, ast.Import | ast.ImportFrom):
        return []
    return [n.id for n in ast.walk(statement) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)]


def sources_of(function: Function, files: Sequence[Path] = ()) -> list[SourceFile]:
    """The files that an operation's function comes from, with the names that it uses, directly or not.

    Args:
        function: of a backend.
        files: only these; by default those of the top-level package of the function's module, without SHARED.

    Raises:
        BackendError: the source of the function is not in a file, or a file is not one of them.
    """
    start, name = _home(function)
    package = start.__name__.partition(".")[0]
    modules: dict[str, _Module] = {}
    used: dict[str, set[str]] = {}
    waiting = [(start.__name__, name)]
    while waiting:
        module_name, name = waiting.pop()
        if module_name.partition(".")[0] != package or name in used.get(module_name, ()):
            continue
        if (module := modules.get(module_name) or _parsed(module_name)) is None:
            continue
        modules[module_name] = module
        used.setdefault(module_name, set()).add(name)
        waiting += [(module_name, other) for other in _named_by(module, name)]
        if name not in module.statements and name in module.imports:
            origin, original = module.imports[name]
            waiting += [(origin, original)] if original else [(origin, other) for other in _all_of(origin)]
    found = [
        SourceFile(module.name, module.path, _label(module.path), module.text, frozenset(used[module.name]))
        for module in modules.values()
        if module.name not in SHARED or files
    ]
    if not files:
        return found
    chosen = {path.resolve() for path in files}
    for path in chosen - {source.path for source in found}:
        allowed = ", ".join(source.label for source in found)
        raise BackendError(f"--file: got {_label(path)}; allowed: {allowed}")
    return [source for source in found if source.path in chosen]


def _home(function: Any) -> tuple[ModuleType, str]:
    """The module and the top-level name of the code of a function or class, or of the class of a callable object."""
    function = calling.unadapted(function)
    code = getattr(function, "__code__", None)
    if code is None:
        kind = function if isinstance(function, type) else type(function)
        module, name = sys.modules.get(kind.__module__), kind.__qualname__
    else:  # not __module__, which functools.wraps copies
        named = (m for m in list(sys.modules.values()) if getattr(m, "__file__", None) == code.co_filename)
        module, name = next(named, None), code.co_qualname
    if module is None or not Path(module.__file__ or "").is_file():
        raise BackendError(f"backend: {name} is not defined in a source file: nothing to mutate")
    return module, name.partition(".")[0]


def _parsed(name: str) -> _Module | None:
    file = getattr(sys.modules.get(name), "__file__", None)
    return _Module(sys.modules[name], Path(file).resolve()) if file and file.endswith(".py") else None


def _named_by(module: _Module, name: str) -> Iterator[str]:
    """The names of this module that the definition of a name mentions."""
    for statement in module.statements.get(name, ()):
        for node in ast.walk(statement):
            if isinstance(node, ast.Name) and (node.id in module.statements or node.id in module.imports):
                yield node.id


def _all_of(name: str) -> list[str]:
    module = _parsed(name)
    return list(module.statements) if module else []


def _label(path: Path) -> str:
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)
