"""Wrong kernels: the project's own with one change, in most cases a mistake that published kernels have had.

Each is a backend, such as `tests.judge.mutants.rms_norm_eps_hard_coded`. One file per operation has a TABLE of them.
"""

from importlib import import_module
from types import ModuleType

from tests.judge.sources import changed
from unsloth_ref import kernels as reference

MUTANTS = {
    f"{op}_{name}": (op, mutant)
    for op in reference.__all__
    for name, mutant in import_module(f"{__name__}.{op}").TABLE.items()
}


def __getattr__(name: str) -> ModuleType:
    if name not in MUTANTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    op, mutant = MUTANTS[name]
    module = globals()[name] = changed(op, name, mutant.edits)
    return module
