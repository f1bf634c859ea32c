"""Configurations of expert models as TRL's load-balancing loss reads them."""

import logging
from typing import Any

from transformers import PreTrainedConfig
from trl import SFTConfig

logger = logging.getLogger(__name__)


def prepare_load_balancing(config: PreTrainedConfig, model_class: type, args: SFTConfig) -> None:
    """Let TRL find the number of experts of a model, and compute no load-balancing loss for a model that gives none.

    TRL reads `num_experts`. Some families call it `num_local_experts`, without the alias that transformers has in
    others. Granite 4's dense models are expert models with 0 of them. Some releases of transformers (5.17 for Granite)
    do not return what the routers computed, and TRL's loss then fails.

    Args:
        config: the model's configuration; its class gets the alias.
        model_class: the model's class.
        args: the trainer's own copy of the arguments.
    """
    text: Any = config.get_text_config()
    experts = getattr(text, "num_local_experts", None)
    if experts is None:
        return
    if not hasattr(text, "num_experts"):
        type(text).attribute_map = {**type(text).attribute_map, "num_experts": "num_local_experts"}
    if not hasattr(args, "router_aux_loss_coef") or args.router_aux_loss_coef == 0.0:  # TRL before it had such a loss
        return
    if experts == 0:
        args.router_aux_loss_coef = 0.0
    elif hasattr(config, "output_router_logits") and _hides_routers(model_class):
        logger.warning(
            "router_aux_loss_coef: 0, as the installed transformers computes no load-balancing loss for a %s",
            model_class.__name__,
        )
        args.router_aux_loss_coef = 0.0


def _hides_routers(model_class: type) -> bool:
    """Whether a class states which outputs it can return, and the routers' are not among them."""
    recorded = getattr(model_class, "_can_record_outputs", None)
    return bool(recorded) and "router_logits" not in recorded
