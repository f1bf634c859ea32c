"""Loads the modules that declare operations and training pieces, and checks that they match the contract."""

import importlib
import pkgutil
from types import ModuleType
from typing import Protocol, TypeVar


class SpecError(Exception):
    """Declarations and contract do not match; the message names them."""


class Declaration(Protocol):
    """The members that specs and pieces share."""

    @property
    def op(self) -> str:
        """The name in the contract."""
        ...


Declared = TypeVar("Declared", bound=Declaration)


def load(folder: ModuleType, variable: str, declared: type[Declared], contract: ModuleType) -> dict[str, Declared]:
    """Import the declaration of every name of the contract.

    Args:
        folder: the package with one module per name; modules whose names start with _ are shared code.
        variable: the name of the declaration in each module.
        declared: its type.
        contract: the package whose `__all__` lists the names.

    Raises:
        SpecError: a name has no module, a module has no name, or its declaration is missing or has another name.
    """
    path = folder.__name__.replace(".", "/")
    for info in pkgutil.iter_modules(folder.__path__):
        if info.name not in contract.__all__ and not info.name.startswith("_"):
            raise SpecError(f"{path}/{info.name}.py: {contract.__name__} has no {info.name}")
    found: dict[str, Declared] = {}
    for name in contract.__all__:
        file = f"{path}/{name}.py"
        try:
            module = importlib.import_module(f"{folder.__name__}.{name}")
        except ModuleNotFoundError as missing:
            if missing.name != f"{folder.__name__}.{name}":
                raise
            raise SpecError(f"{name} has no {variable}: {file} is missing") from missing
        declaration = getattr(module, variable, None)
        if not isinstance(declaration, declared):
            raise SpecError(f"{file}: got {variable} = {declaration!r}; allowed: a {declared.__name__}")
        if declaration.op != name:
            raise SpecError(f"{file}: got a {variable} named {declaration.op}; allowed: {name}")
        found[name] = declaration
    return found
