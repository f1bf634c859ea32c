"""Putting a backend's operations under a Hugging Face model, and taking them away again."""

from unsloth_fast.models.placement import place, remove

__all__ = ["place", "remove"]
