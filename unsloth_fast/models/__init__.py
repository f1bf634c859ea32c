"""A backend's operations under a Hugging Face model: `place` puts them there, `remove` takes them away."""

from unsloth_fast.models.placement import place, remove
from unsloth_fast.unsupported import missing

__all__ = ["place", "remove"]


def __getattr__(name: str) -> object:
    """A loader by one of Unsloth's names, which some scripts import from here."""
    if name.startswith("__"):
        raise missing(__name__, name)
    import unsloth_fast

    if name in unsloth_fast.__all__:
        return getattr(unsloth_fast, name)
    raise missing(__name__, name)
