"""The backend flag: which implementation of the operations and of the training pieces a run uses.

A specification is "auto", "fast" or "reference", followed by exceptions for single operations, such as
"fast,rms_norm=reference". It is resolved once, when a trainer is built, not in each call: a switch that is read at run
time would break torch.compile.
"""

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace

import torch

from unsloth_ref import checks
from unsloth_ref import kernels as reference_kernels

logger = logging.getLogger(__name__)

_PACKAGES = {"fast": "unsloth_fast", "reference": "unsloth_ref"}


@dataclass(frozen=True, eq=False)
class Backend:
    """A resolved backend.

    Attributes:
        name: "fast" or "reference", followed by the exceptions, such as "fast,rms_norm=reference".
        kernels: the operations by name: `backend.kernels.rms_norm`.
        training: the module of training pieces, `unsloth_fast.training` or `unsloth_ref.training`.
        reason: why it was chosen.
    """

    name: str
    kernels: SimpleNamespace
    training: ModuleType
    reason: str

    def fuses(self, fused: str, *parts: str) -> bool:
        """Whether models call a fused operation: it and its parts come from the same package.

        A setting for one of them, such as "fast,rope=reference", thus separates qk_norm_rope into rms_norm and rope,
        each from the package of its own setting.
        """
        base, _, settings = self.name.partition(",")
        chosen = dict(setting.split("=") for setting in settings.split(",") if setting)
        return len({chosen.get(operation, base) for operation in (fused, *parts)}) == 1

    def __reduce__(self) -> tuple[Callable[[str, str], "Backend"], tuple[str, str]]:
        """Pickle the name: older releases of TRL send the trainer with its backend to processes that prepare data."""
        return _backend_named, (self.name, self.reason)


def resolve(spec: str | None = None, *, on_cpu: bool = False) -> Backend:
    """The backend that a specification means on this machine.

    Args:
        spec: "auto", "fast" or "reference", optionally followed by exceptions for single operations, such as
            "fast,rms_norm=reference". None for the environment variable UNSLOTH_BACKEND, or "auto" if it is not set.
            "auto" means fast if there is a CUDA device and triton is installed, else reference, and logs its choice
            once.
        on_cpu: whether the run uses a CPU although there may be a CUDA device; "auto" then means reference.

    Raises:
        ValueError: an unknown backend or operation.
        RuntimeError: "fast" was asked for by name and cannot run here; the message names what is missing.
    """
    if spec is None:
        spec = os.environ.get("UNSLOTH_BACKEND") or "auto"
    base, overrides = parse(spec)
    reason = f"asked for as {spec!r}"
    if base == "auto":
        missing = _missing_for_auto() or ("the run is on a CPU" if on_cpu else "")
        base = "reference" if missing else "fast"
        reason = f"auto: {missing or 'CUDA and triton are available'}"
        _log_choice(base, reason)
    if "fast" in (base, *overrides.values()):
        missing = _missing_for_fast()
        if missing:
            raise RuntimeError(f"backend: {spec!r} cannot run here: {missing}")
    return _backend_named(",".join([base, *(f"{operation}={name}" for operation, name in overrides.items())]), reason)


def _backend_named(name: str, reason: str) -> Backend:
    """The backend of that name, even if it cannot run here: a process that prepares data may not see the GPU."""
    base, overrides = parse(name)
    chosen = {operation: overrides.get(operation, base) for operation in reference_kernels.__all__}
    modules = {name: import_module(f"{_PACKAGES[name]}.kernels") for name in set(chosen.values())}
    return Backend(
        name=name,
        kernels=SimpleNamespace(**{operation: getattr(modules[name], operation) for operation, name in chosen.items()}),
        training=import_module(f"{_PACKAGES[base]}.training"),
        reason=reason,
    )


def parse(spec: str) -> tuple[str, dict[str, str]]:
    """The backend that a specification names, and its exceptions by operation; does not check the hardware.

    Raises:
        ValueError: the specification is not a string, or names an unknown backend or operation.
    """
    if not isinstance(spec, str):
        raise ValueError(f"backend: got {spec!r}; allowed: a string such as 'auto' or 'fast,rms_norm=reference'")
    base, *settings = [part.strip() for part in spec.split(",")]
    checks.one_of("backend", base, ("auto", "fast", "reference"))
    overrides = {}
    for setting in settings:
        operation, _, name = setting.partition("=")
        checks.one_of(f"backend {spec!r}, operation", operation, reference_kernels.__all__)
        checks.one_of(f"backend {spec!r}, {operation}", name, ("fast", "reference"))
        overrides[operation] = name
    return base, overrides


def _missing_for_auto() -> str:
    """Why "auto" does not mean fast here; empty if it does."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    return "" if find_spec("triton") else "triton is not installed"


def _missing_for_fast() -> str:
    """Why the fast kernels run neither on a GPU nor in Triton's interpreter; empty if they do."""
    if not find_spec("triton"):
        return "triton is not installed"
    if torch.cuda.is_available():
        return ""
    from triton import JITFunction, knobs, language

    if not knobs.runtime.interpret:
        return "no CUDA device (to run the kernels on a CPU, slowly, set TRITON_INTERPRET=1 before triton is imported)"
    # Triton reads the variable when a kernel is defined; those of its own library are defined on import.
    if isinstance(language.sum, JITFunction):
        return "no CUDA device, and TRITON_INTERPRET=1 was set after triton was imported; set it before"
    return ""


@cache
def _log_choice(base: str, reason: str) -> None:
    level = logging.INFO if base == "fast" else logging.WARNING
    logger.log(level, "backend %s (%s)", base, reason)
