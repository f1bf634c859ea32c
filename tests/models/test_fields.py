"""The fields of a configuration that trainers change: kept as they were loaded, and TRL's where its loss needs them."""

from types import SimpleNamespace
from typing import Any

import pytest
from transformers import LlamaConfig

from unsloth_fast.models.fields import kept_fields, with_values


@pytest.mark.parametrize("same", [True, False], ids=["a model", "the name of one"])
def test_what_trls_constructor_changes_is_undone_and_kept_apart(same: bool) -> None:
    """A model that the trainer loads by its name has another configuration, which was loaded as well."""
    config = LlamaConfig(use_cache=True, vocab_size=8)
    built = config if same else LlamaConfig(use_cache=True, vocab_size=8)
    trainer: Any = SimpleNamespace()
    with kept_fields(trainer, config) as changed:
        built.use_cache, built.output_router_logits, built.vocab_size = False, True, 9
        trainer.model = SimpleNamespace(config=built)
    assert built.use_cache and not hasattr(built, "output_router_logits") and built.vocab_size == 9
    with with_values(built, changed):
        assert not built.use_cache and built.output_router_logits
    assert built.use_cache and not hasattr(built, "output_router_logits")
