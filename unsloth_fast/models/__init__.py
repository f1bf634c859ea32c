"""A backend's operations under a Hugging Face model: `place` puts them there, `remove` takes them away."""

from unsloth_fast.models.placement import place, remove

__all__ = ["place", "remove"]
