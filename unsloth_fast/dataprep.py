"""Unsloth's module of this name generates data with vLLM, which is not used here."""

from unsloth_fast.unsupported import missing


def __getattr__(name: str) -> object:
    raise missing(__name__, name)
