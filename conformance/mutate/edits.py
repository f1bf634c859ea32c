"""All mutants of a source file, found in its syntax tree; `kinds.py` lists the kinds."""

import ast
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from conformance.mutate.kinds import (
    ALLOCATIONS,
    AXES,
    COMPARISONS,
    CONVERSIONS,
    OPERATORS,
    REDUCTIONS,
    SWAPPED,
    TRITON_OPTIONS,
)
from conformance.mutate.mutant import Mutant, Region, Replacement, SourceFile
from conformance.mutate.sources import defined


@dataclass(frozen=True)
class _Place:
    """Where a node stands: the function around it, and the smallest expression or statement that runs it."""

    function: str = ""
    node: ast.AST | None = None
    assigned: set[str] = field(default_factory=set)  # names of the function that have a value already


def mutants(source: SourceFile) -> list[Mutant]:
    """All mutants of the parts of a file that an operation uses, from top to bottom."""
    tree = ast.parse(source.text)
    finder = _Finder(source, tree)
    for statement in tree.body:
        names = defined(statement)
        if names and "__all__" not in names and (source.names is None or source.names & set(names)):
            finder.statements([statement], _Place())
    found: dict[tuple[Replacement, ...], Mutant] = {}
    for mutant in finder.found:
        if mutant.text != source.text:
            found.setdefault(mutant.edits, mutant)
    counts: dict[tuple[int, str], int] = {}
    numbered = []
    for mutant in sorted(found.values(), key=lambda one: (one.line, one.edits)):
        key = mutant.line, mutant.kind
        counts[key] = counts.get(key, -1) + 1
        numbered.append(replace(mutant, index=counts[key]))
    return numbered


class _Finder:
    """Walks a syntax tree and collects mutants."""

    def __init__(self, source: SourceFile, tree: ast.Module) -> None:
        self.found: list[Mutant] = []
        self._source, self._bytes = source, source.text.encode()
        self._starts = [0]
        for line in self._bytes.splitlines(keepends=True):
            self._starts.append(self._starts[-1] + len(line))
        tests = [node.test for node in ast.walk(tree) if isinstance(node, ast.If | ast.IfExp)]
        self._flags = {n.id for test in tests for n in _operands(test) if isinstance(n, ast.Name)}

    def statements(self, body: Sequence[ast.stmt], place: _Place) -> None:
        """Collect the mutants of these statements."""
        for statement in body:
            self._statement(statement, replace(place, node=statement))

    def _statement(self, node: ast.stmt, place: _Place) -> None:
        if isinstance(node, ast.Raise | ast.Assert | ast.Import | ast.ImportFrom | ast.Pass):
            return
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            inner = _Place(f"{place.function}.{node.name}".lstrip("."))
            if not isinstance(node, ast.ClassDef):
                for default in (*node.args.defaults, *node.args.kw_defaults):
                    if default is not None:
                        self._expression(default, _Place(inner.function))
            self.statements(node.body, inner)
            return
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            return  # a docstring
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            self._add("call-dropped", node, place, self._instead(node, "pass"))
        elif isinstance(node, ast.AugAssign):
            self._updated(node, place)
        elif isinstance(node, ast.Assign):
            names = {n.id for target in node.targets for n in ast.walk(target) if isinstance(n, ast.Name)}
            if names and names <= place.assigned and place.function:
                self._add("update-dropped", node, place, self._instead(node, "pass"))
            place.assigned.update(names)
        elif isinstance(node, ast.If) and not all(isinstance(inner, ast.Raise) for inner in node.body):
            test = replace(place, node=node.test)
            self._add("condition", node.test, test, self._instead(node.test, f"not ({self._text(node.test)})"))
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.stmt):
                self._statement(child, replace(place, node=child))
            elif isinstance(child, ast.expr) and child is not getattr(node, "annotation", None):
                self._expression(child, replace(place, node=child if isinstance(node, ast.If | ast.For) else node))
            elif isinstance(child, ast.withitem):
                self._expression(child.context_expr, replace(place, node=child.context_expr))
            elif isinstance(child, ast.ExceptHandler):
                self.statements(child.body, place)

    def _updated(self, node: ast.AugAssign, place: _Place) -> None:
        self._add("update-dropped", node, place, self._instead(node, "pass"))
        if isinstance(node.op, ast.Add | ast.Sub):
            other = "-" if isinstance(node.op, ast.Add) else "+"
            self._add("arithmetic", node, place, self._between(node.target, f"{_sign(node.op)}=", f"{other}="))
        if isinstance(node.op, ast.Add):
            self._add("update-replaced", node, place, self._between(node.target, "+=", "="))

    def _expression(self, node: ast.expr, place: _Place) -> None:
        if isinstance(node, ast.JoinedStr | ast.Lambda) or (isinstance(node, ast.Constant) and node.kind):
            return
        here = place if isinstance(node, ast.Constant | ast.Name) else replace(place, node=node)
        if isinstance(node, ast.BinOp):
            self._operation(node, here)
        elif isinstance(node, ast.BoolOp):
            for operand in node.values if len(node.values) == 2 else ():
                self._add("and-dropped", node, here, self._instead(node, f"({self._text(operand)})"))
        elif isinstance(node, ast.Compare) and len(node.ops) == 1:
            self._comparison(node, here)
        elif isinstance(node, ast.UnaryOp) and not isinstance(node.operand, ast.Constant):
            kind = "condition" if isinstance(node.op, ast.Not) else "arithmetic"
            self._add(kind, node, here, self._instead(node, f"({self._text(node.operand)})"))
        elif isinstance(node, ast.IfExp):
            for branch in (node.body, node.orelse):
                self._add("branch", node, replace(here, node=node.test), self._instead(node, self._grouped(branch)))
        elif isinstance(node, ast.Constant):
            self._constant(node, here)
        elif isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                if isinstance(key, ast.Constant) and isinstance(key.value, str):
                    self._option(key.value, value, here)
        elif isinstance(node, ast.Call):
            self._call(node, here)
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.keyword):
                self._expression(child.value, here)
            elif isinstance(child, ast.comprehension):
                for part in (child.iter, *child.ifs):
                    self._expression(part, replace(here, node=part))
            elif isinstance(child, ast.expr):
                self._expression(child, here)

    def _operation(self, node: ast.BinOp, place: _Place) -> None:
        texts = (ast.JoinedStr, ast.Constant)
        if any(isinstance(s, texts) and not _is_number(s) for s in (node.left, node.right)):
            return
        if isinstance(node.op, ast.BitAnd | ast.BitOr):
            for operand in (node.left, node.right):
                self._add("and-dropped", node, place, self._instead(node, f"({self._text(operand)})"))
        elif type(node.op) in OPERATORS:
            self._add("arithmetic", node, place, self._between(node.left, *OPERATORS[type(node.op)]))

    def _comparison(self, node: ast.Compare, place: _Place) -> None:
        sign, opposite, beside = COMPARISONS[type(node.ops[0])]
        operator, bound = self._between(node.left, sign, opposite), node.comparators[0]
        self._add("flipped", node, place, operator)
        for kind, other, offset in beside:
            moved = [self._instead(bound, f"({self._text(bound)}){offset}")] if offset else []
            self._add(kind, node, place, (*operator[:2], other), *moved)

    def _constant(self, node: ast.Constant, place: _Place) -> None:
        value = node.value
        if isinstance(value, bool):
            self._add("constant", node, place, self._instead(node, str(not value)))
        elif isinstance(value, int):
            self._add("constant", node, place, self._instead(node, str(value + 1)))
        elif isinstance(value, float):
            self._add("constant", node, place, self._instead(node, repr(value * 1.01 if value else 1.0)))

    def _call(self, node: ast.Call, place: _Place) -> None:
        function = node.func
        name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
        owner = function.value if isinstance(function, ast.Attribute) else None
        of_triton = isinstance(owner, ast.Name) and owner.id in ("tl", "language")
        if name in CONVERSIONS and owner is not None and not isinstance(owner, ast.Name | ast.Constant):
            self._add("cast-dropped", node, place, self._instead(node, self._grouped(owner)))
        elif name in CONVERSIONS and isinstance(owner, ast.Name) and not of_triton and owner.id != "torch":
            self._add("cast-dropped", node, place, self._instead(node, owner.id))
        elif of_triton and name == "cast":
            self._add("cast-dropped", node, place, self._instead(node, self._grouped(node.args[0])))
        elif of_triton and (name in ("load", "store") or name.startswith("atomic_")):
            self._access(node, 1 if name == "load" else 2, place)
        elif name in REDUCTIONS:
            self._reduction(node, place, 1 if of_triton or owner is None else 0)
        elif name in ("range", "static_range") and node.args:
            stop = node.args[min(1, len(node.args) - 1)]
            self._add("range", stop, place, self._instead(stop, f"({self._text(stop)}) - 1"))
        if name in ALLOCATIONS and not of_triton:
            self._allocation(node, name, place)
        if name in SWAPPED and (of_triton or owner is None) and len(node.args) > 1:
            at = self._end(function) - len(name)
            self._add("minmax", node, place, (at, at + len(name), SWAPPED[name]))
        if name in ("save_for_backward", "launch") or isinstance(function, ast.Subscript):
            self._exchanged(node, place)
        for keyword in node.keywords:
            self._option(keyword.arg or "", keyword.value, place)

    def _access(self, node: ast.Call, at: int, place: _Place) -> None:
        """A load, store or atomic; `at` is the position of its mask."""
        named = {keyword.arg: keyword for keyword in node.keywords}
        mask = named.get("mask") or next(iter(node.args[at : at + 1]), None)
        other = named["other"].value if "other" in named else next(iter(node.args[at + 1 : at + 2]), None)
        if other is not None:
            new = "1.0" if self._text(other) in ("0", "0.0") else "0.0"
            self._add("other-changed", node, place, self._instead(other, new))
        if mask is None:
            return
        dropped = [mask, *node.args[at + 1 : at + 2], *(k for k in (named.get("other"),) if k)]
        edits = []
        for part in dropped:
            end = self._end(part)
            begin = self._bytes.rfind(b",", 0, self._begin(part))
            edits.append((begin, end, ""))
        self._add("mask-dropped", node, place, *self._closed(edits))

    def _closed(self, edits: Sequence[Replacement]) -> Iterator[Replacement]:
        """Dropped arguments with the closing parentheses that belong to them."""
        for begin, end, new in edits:
            text = self._bytes[begin:end]
            missing = text.count(b"(") - text.count(b")")
            while missing > 0 and self._bytes[end : end + 1] == b")":
                end, missing = end + 1, missing - 1
            yield begin, end, new

    def _reduction(self, node: ast.Call, place: _Place, at: int) -> None:
        axes = [k.value for k in node.keywords if k.arg in ("axis", "dim")] or node.args[at : at + 1]
        for axis in axes:
            if (text := self._text(axis)) in AXES:
                self._add("axis", axis, place, self._instead(axis, AXES[text]))

    def _allocation(self, node: ast.Call, name: str, place: _Place) -> None:
        if name in ("new_zeros", "zeros", "zeros_like"):
            at = self._end(node.func) - len(name)
            self._add("zeros-dropped", node, place, (at, at + len(name), name.replace("zeros", "empty")))
        if not node.args or name.endswith("_like"):
            return
        shape = node.args[0].body if isinstance(node.args[0], ast.IfExp) else node.args[0]
        if isinstance(shape, ast.Tuple | ast.List):
            sizes = [one for one in shape.elts if not isinstance(one, ast.Starred)]
        else:
            sizes = [shape] if isinstance(shape, ast.Name | ast.BinOp | ast.Call) else []
        if sizes:
            self._add("scratch-halved", node, place, self._instead(sizes[0], f"({self._text(sizes[0])}) // 2"))

    def _exchanged(self, node: ast.Call, place: _Place) -> None:
        movable = ast.Name | ast.Attribute | ast.Starred
        for left, right in zip(node.args, node.args[1:], strict=False):
            if isinstance(left, movable) and isinstance(right, movable):
                swap = self._instead(left, self._text(right)), self._instead(right, self._text(left))
                self._add("exchanged", left, place, *swap)

    def _option(self, name: str, value: ast.expr, place: _Place) -> None:
        """A launch parameter: a keyword in capitals, or one of Triton's own."""
        if isinstance(value, ast.Constant) or not (name in TRITON_OPTIONS or (name.isupper() and len(name) > 1)):
            if name in TRITON_OPTIONS and isinstance(value, ast.Constant):
                self._add("option", value, place, self._instead(value, f"2 * {self._text(value)}"), choice=True)
            return
        text = self._text(value)
        if name in self._flags or isinstance(value, ast.Compare | ast.BoolOp):
            self._add("flag", value, place, self._instead(value, f"not ({text})"), choice=True)
        else:
            self._add("option", value, place, self._instead(value, f"2 * ({text})"), choice=True)
            self._add("option", value, place, self._instead(value, f"({text}) // 2"), choice=True)

    def _add(self, kind: str, node: ast.AST, place: _Place, *edits: Replacement, choice: bool = False) -> None:
        region = _region(place.node) if place.node is not None and place.function else None
        line = node.lineno  # type: ignore[attr-defined]
        self.found.append(Mutant(self._source, kind, line, 0, place.function, tuple(sorted(edits)), region, choice))

    def _begin(self, node: ast.AST) -> int:
        return self._starts[node.lineno - 1] + node.col_offset  # type: ignore[attr-defined]

    def _end(self, node: ast.AST) -> int:
        return self._starts[node.end_lineno - 1] + node.end_col_offset  # type: ignore[attr-defined]

    def _text(self, node: ast.AST) -> str:
        return self._bytes[self._begin(node) : self._end(node)].decode()

    def _grouped(self, node: ast.expr) -> str:
        plain = isinstance(node, ast.Name | ast.Call | ast.Attribute | ast.Subscript | ast.Constant)
        return self._text(node) if plain else f"({self._text(node)})"

    def _instead(self, node: ast.AST, new: str) -> Replacement:
        return self._begin(node), self._end(node), new

    def _between(self, left: ast.AST, sign: str, new: str) -> Replacement:
        """Replace the first sign after a node."""
        at = self._bytes.index(sign.encode(), self._end(left))
        return at, at + len(sign), new


def _operands(test: ast.expr) -> Iterator[ast.expr]:
    """The parts of a condition that are conditions themselves."""
    if isinstance(test, ast.BoolOp):
        for value in test.values:
            yield from _operands(value)
    elif isinstance(test, ast.UnaryOp):
        yield from _operands(test.operand)
    else:
        yield test


def _is_number(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, int | float)


def _sign(operator: ast.operator) -> str:
    return OPERATORS[type(operator)][0]


def _region(node: ast.AST) -> Region:
    return node.lineno, node.col_offset, node.end_lineno, node.end_col_offset  # type: ignore[attr-defined]
