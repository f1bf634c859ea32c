"""The shape of the project: mirrored modules, a spec for each operation, light imports, small files."""

import ast
import inspect
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROOMS = ("unsloth_ref", "unsloth_fast", "conformance", "examples", "docs", "tests")
FILES = sorted(path for name in ROOMS for path in (ROOT / name).rglob("*.py"))
MODULE_LINES, FUNCTION_LINES, KERNEL_LINES = 350, 60, 100
Function = ast.FunctionDef | ast.AsyncFunctionDef


def first_line(thing: object) -> str:
    """The first line of the docstring."""
    return (inspect.getdoc(thing) or "").partition("\n")[0]


@pytest.mark.parametrize("part", ["kernels", "training"])
def test_both_packages_define_the_same_functions(part: str) -> None:
    """Names, parameters, defaults, annotations and the first line of the docstring are equal."""
    reference, fast = (import_module(f"{package}.{part}") for package in ("unsloth_ref", "unsloth_fast"))
    assert sorted(reference.__all__) == sorted(fast.__all__)
    for name in reference.__all__:
        ours, theirs = getattr(reference, name), getattr(fast, name)
        assert inspect.signature(ours) == inspect.signature(theirs), name
        assert first_line(ours) == first_line(theirs) != "", name


def test_every_operation_has_a_spec_and_every_spec_an_operation() -> None:
    """conformance/specs/<operation>.py declares that operation; files that begin with _ are shared helpers."""
    specs = {path.stem for path in (ROOT / "conformance" / "specs").glob("[!_]*.py")}
    assert specs == set(import_module("unsloth_ref.kernels").__all__)
    for name in specs:
        assert import_module(f"conformance.specs.{name}").spec.op == name


def test_every_training_piece_is_declared_and_every_declaration_a_piece() -> None:
    """conformance/pieces/<piece>.py declares that piece; files that begin with _ are shared helpers."""
    files = {path.stem for path in (ROOT / "conformance" / "pieces").glob("*.py")}
    assert {name for name in files if not name.startswith("_")} == set(import_module("unsloth_ref.training").__all__)
    for name, piece in import_module("conformance.pieces").pieces().items():
        assert piece.op == name
        assert all(first_line(check) for check in piece.checks)


def run_fresh(code: str) -> str:
    """What the code prints in a new interpreter, started in the project's root."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_reference_needs_torch_alone() -> None:
    """With all other libraries blocked it imports, runs, and loads nothing but torch and the standard library."""
    printed = run_fresh("""
import sys
for name in ("triton", "numpy", "pyarrow", "transformers", "trl", "peft", "hypothesis", "unsloth_fast"):
    sys.modules[name] = None
import torch
before = set(sys.modules)
from unsloth_ref import kernels, training
loss = kernels.cross_entropy(torch.zeros(2, 4), torch.tensor([1, 3]))
loaded = {name.partition(".")[0] for name in set(sys.modules) - before}
print(f"{loss.item():.4f}", *(loaded - set(sys.stdlib_module_names) - {"torch", "unsloth_ref"}))
""")
    assert printed.split() == ["1.3863"]  # log 4


def test_importing_the_fast_package_loads_nothing_heavy() -> None:
    """The bare import loads neither Triton nor the Hugging Face libraries."""
    printed = run_fresh("""
import sys
import unsloth_fast
print(*{"triton", "transformers", "trl", "peft", "accelerate", "datasets"} & set(sys.modules))
""")
    assert printed.split() == []


def lines_of(statement: ast.stmt) -> int:
    """How many lines the statement spans; of a function, from `def` to its last line."""
    return (statement.end_lineno or statement.lineno) - statement.lineno + 1


def lines_of_code(function: Function) -> int:
    """Its lines without the docstring: saying more about a function does not make it long."""
    return lines_of(function) - (lines_of(function.body[0]) if ast.get_docstring(function) is not None else 0)


def limit_of(function: Function) -> int:
    """Triton kernels may be longer than other functions."""
    jitted = any(ast.unparse(decorator).startswith(("triton.jit", "kernel(")) for decorator in function.decorator_list)
    return KERNEL_LINES if jitted else FUNCTION_LINES


def catches_everything(handler: ast.ExceptHandler) -> bool:
    """Whether the handler is bare or names Exception or BaseException, alone or in a tuple."""
    names = {node.id for node in ast.walk(handler.type) if isinstance(node, ast.Name)} if handler.type else set()
    return handler.type is None or bool(names & {"Exception", "BaseException"})


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_stay_small_and_catch_what_they_name(path: Path) -> None:
    """A module has at most 350 lines, a function 60, a Triton kernel 100; no handler catches every error."""
    text = path.read_text(encoding="utf-8")
    nodes = list(ast.walk(ast.parse(text)))
    assert len(text.splitlines()) <= MODULE_LINES
    functions = [node for node in nodes if isinstance(node, Function)]
    assert [f"{f.name}: {lines_of_code(f)} lines" for f in functions if lines_of_code(f) > limit_of(f)] == []
    assert [n.lineno for n in nodes if isinstance(n, ast.ExceptHandler) and catches_everything(n)] == []
