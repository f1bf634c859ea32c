"""Which models get a load-balancing loss beside the loss of their tokens."""

from pathlib import Path

import pytest
import transformers
from trl import SFTConfig

from tests.trainer.runs import arguments
from unsloth_fast.arguments.load_balancing import prepare_load_balancing


@pytest.mark.parametrize(("experts", "coefficient"), [(0, 0.0), (4, None)])
def test_a_family_without_the_usual_name_of_its_experts_has_a_load_balancing_loss(
    tmp_path: Path, experts: int, coefficient: float | None
) -> None:
    """TRL looks for num_experts; a dense model of such a family has none, and no such loss."""
    args = arguments(tmp_path)
    config = transformers.GraniteMoeConfig(num_local_experts=experts)
    returning = type("Returning", (), {"_can_record_outputs": {"router_logits": None}})
    prepare_load_balancing(config, returning, args)
    assert config.num_experts == experts
    assert getattr(args, "router_aux_loss_coef", coefficient) == coefficient


@pytest.mark.skipif(not hasattr(SFTConfig, "router_aux_loss_coef"), reason="this TRL adds no load-balancing loss")
@pytest.mark.parametrize("asked", [None, 0.1])
def test_a_model_that_does_not_return_what_its_routers_computed_has_no_load_balancing_loss(
    tmp_path: Path, asked: float | None, caplog: pytest.LogCaptureFixture
) -> None:
    """Granite with transformers 5.17 is one. TRL would fail after the first forward pass."""
    args = arguments(tmp_path, router_aux_loss_coef=asked)
    silent = type("Silent", (), {"_can_record_outputs": {"hidden_states": None}})
    prepare_load_balancing(transformers.GraniteMoeConfig(num_local_experts=4), silent, args)
    assert args.router_aux_loss_coef == 0.0
    assert "computes no load-balancing loss for a Silent" in caplog.text
