"""Other people's kernels under the signatures of the contract, called as their users call them.

Each module defines operations of the contract with one package: with the package's defaults, and in place where the
package works in place. `operation` gives a wrapper the contract's signature; `refuse` rejects options that the package
lacks with NotImplementedError, which is a failure of the property `one_at_a_time` alone.

A package that is not installed raises Absent. A kernel that the installed version lacks, or that cannot be imported,
raises only when it is called, so that the other kernels can still be judged. Settings of torch.compile that a package
changes when it is imported are restored: they would apply to every other contender too.
"""

import contextlib
import importlib.util
import inspect
import pkgutil
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import unsloth_ref.kernels
from conformance.trial import BackendError, Caught, Function, describe

# The modules of this package, in the order in which they are listed, and the package on PyPI that each needs. None
# means that torch is enough.
PACKAGES: Mapping[str, str | None] = {
    "compile": None,
    "torch": None,
    "varlen": None,
    "transformers": "transformers",
    "liger": "liger-kernel",
    "unsloth": "unsloth",
    "cce": "cut-cross-entropy",
    "bitsandbytes": "bitsandbytes",
    "fla": "fla-core",
    "mamba": "mamba-ssm",
}


class Absent(BackendError):
    """A peer that cannot run here; the message states what is missing."""


class _Missing:
    """Takes the place of a kernel that could not be imported."""

    def __init__(self, why: str) -> None:
        self._why = why

    def __getattr__(self, name: str) -> Any:
        raise ImportError(self._why)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise ImportError(self._why)


def operation(function: Function) -> Function:
    """Give a wrapper the signature of the contract's operation of the same name.

    Only an attribute is set: the bench times peers, and a wrapper around the wrapper would cost every call a
    microsecond. The wrapper itself must accept every argument of the contract, for which `**options` is enough.

    Raises:
        TypeError: the wrapper names a parameter that the contract lacks, or repeats a default differently.
    """
    contract = inspect.signature(getattr(unsloth_ref.kernels, function.__name__))
    for name, own in inspect.signature(function).parameters.items():
        if own.kind is own.VAR_KEYWORD:
            continue
        if name not in contract.parameters or own.default != contract.parameters[name].default:
            raise TypeError(f"{function.__name__}: got {own}; allowed: the parameters of {contract}")
    function.__signature__ = contract  # type: ignore[attr-defined]
    return function


def refuse(package: str, options: Mapping[str, Any], **allowed: Any) -> None:
    """Raise NotImplementedError if an option of a call has a value that the package does not support.

    Args:
        package: for the message.
        options: the options that a wrapper received but does not use.
        allowed: the only supported value of each of them.
    """
    for name, value in options.items():
        if name not in allowed:
            raise TypeError(f"got an unexpected keyword argument {name!r}")
        only = allowed[name]
        if value is not only and (only is None or value != only):
            raise NotImplementedError(f"{name}: got {value!r}; allowed with {package}: {only!r}")


def import_kernels(package: str, *names: str) -> list[Any]:
    """Import kernels of a package; what it prints meanwhile goes to stderr.

    Args:
        package: its name on PyPI.
        names: "module:object"; the first is in the package's own top-level module.

    Raises:
        Absent: the package is not installed, or none of the kernels can be imported.
    """
    if importlib.util.find_spec(names[0].replace(":", ".").partition(".")[0]) is None:
        raise Absent(f"needs the package {package}, which is not installed")
    found: list[Any] = []
    with _compiler_settings_restored(), contextlib.redirect_stdout(sys.stderr):
        for name in names:
            with Caught(SystemExit) as caught:
                found.append(pkgutil.resolve_name(name))
            if caught.error is not None:
                found.append(_Missing(f"{name} cannot be imported: {describe(caught.error)}"))
    if all(isinstance(kernel, _Missing) for kernel in found):
        raise Absent(f"has its package {package}, but {found[0]._why}")
    return found


@contextlib.contextmanager
def _compiler_settings_restored() -> Iterator[None]:
    # Imported here because they take 3 s and load triton; not as `torch._dynamo`, because `torch` is a peer here.
    from torch._dynamo import config as dynamo
    from torch._inductor import config as inductor

    configs: tuple[Any, ...] = (dynamo, inductor)
    before = [config.get_config_copy() for config in configs]
    yield
    for config, old in zip(configs, before, strict=True):
        now = config.get_config_copy()
        config.load_config({name: value for name, value in old.items() if now[name] != value})
