"""Other people's kernels behind the contract's signatures, each as its users call it: its own defaults, in place where
it is in place.

What a peer cannot express raises NotImplementedError, and shows as a failure of the law that asked for it. A package
that is not installed raises Absent; a kernel that the installed version lacks, or that does not import, raises when it
is called, so that the others can still be judged. What a package sets for torch.compile when it is imported is put
back, or it would be set for all other contenders too.
"""

import contextlib
import importlib.util
import pkgutil
import sys
from collections.abc import Iterator
from typing import Any

from conformance.trial import BackendError, Raised, describe


class Absent(BackendError):
    """A peer that cannot run here; its text says what is missing."""


class _Missing:
    """Stands for a kernel that could not be imported."""

    def __init__(self, why: str) -> None:
        self._why = why

    def __getattr__(self, name: str) -> Any:
        raise ImportError(self._why)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise ImportError(self._why)


def kernels(package: str, *names: str) -> list[Any]:
    """Import kernels of a package; what it prints meanwhile goes to stderr.

    Args:
        package: as pip knows it.
        names: "module:object".

    Raises:
        Absent: the package is not installed, or none of the kernels can be imported.
    """
    module = package.replace("-", "_")
    if importlib.util.find_spec(module) is None:
        raise Absent(f"needs the package {package}, which is not installed")
    found: list[Any] = []
    with _compiler_settings_kept(), contextlib.redirect_stdout(sys.stderr):
        for name in names:
            with Raised(SystemExit) as raised:
                found.append(pkgutil.resolve_name(name))
            if raised.error is not None:
                found.append(_Missing(f"{name} cannot be imported: {describe(raised.error)}"))
    if all(isinstance(kernel, _Missing) for kernel in found):
        raise Absent(f"has its package {package}, but {found[0]._why}")
    return found


@contextlib.contextmanager
def _compiler_settings_kept() -> Iterator[None]:
    # Here, for they take 3 s and load triton; not as `torch._dynamo`, for `torch` is the peer in this package.
    from torch._dynamo import config as dynamo
    from torch._inductor import config as inductor

    configs: tuple[Any, ...] = (dynamo, inductor)
    before = [config.get_config_copy() for config in configs]
    yield
    for config, old in zip(configs, before, strict=True):
        now = config.get_config_copy()
        config.load_config({name: value for name, value in old.items() if now[name] != value})
