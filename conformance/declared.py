"""Reads what is declared for each operation and each training piece, one file per name."""

import importlib
import pkgutil
from types import ModuleType
from typing import Any


class SpecError(Exception):
    """A declaration is missing, has no operation or piece, or names another one than its file."""


def declarations(package: ModuleType, attribute: str, kind: type, owner: ModuleType) -> dict[str, Any]:
    """The declaration of every public name of a module, from the file of that name in a package.

    Args:
        package: whose modules declare; files that begin with an underscore are shared by several.
        attribute: the variable that holds the declaration, such as "spec".
        kind: its type, with a field `op`, the name that it declares.
        owner: the module whose `__all__` lists the names.

    Raises:
        SpecError: a name has no file, a file has no name, or a file declares something else.
    """
    folder = package.__name__.replace(".", "/")
    for info in pkgutil.iter_modules(package.__path__):
        if info.name not in owner.__all__ and not info.name.startswith("_"):
            raise SpecError(f"{folder}/{info.name}.py: {owner.__name__} has no {info.name}")
    found: dict[str, Any] = {}
    for name in owner.__all__:
        path = f"{folder}/{name}.py"
        try:
            module = importlib.import_module(f"{package.__name__}.{name}")
        except ModuleNotFoundError as missing:
            if missing.name != f"{package.__name__}.{name}":
                raise
            raise SpecError(f"{owner.__name__}.{name} has no {attribute}: {path} is missing") from missing
        declared: Any = getattr(module, attribute, None)
        if not isinstance(declared, kind):
            raise SpecError(f"{path}: got {attribute} = {declared!r}; allowed: a {kind.__name__}")
        if declared.op != name:
            raise SpecError(f"{path}: its {attribute} names {declared.op}")
        found[name] = declared
    return found
