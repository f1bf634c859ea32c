"""A backend's operations under a Hugging Face model: `place` puts them there, `remove` takes them away."""

from importlib import import_module

from unsloth_fast.unsupported import demand_extra, missing

try:
    from unsloth_fast.models.placement import place, remove
except ModuleNotFoundError as lacking:
    demand_extra(__name__, lacking)
    raise

__all__ = ["place", "remove"]


def __getattr__(name: str) -> object:
    """A loader by one of Unsloth's names, which some scripts import from here."""
    package = import_module("unsloth_fast")
    if name in package.__all__:
        return getattr(package, name)
    raise missing(__name__, name)
