"""Configurations of expert models as TRL's load-balancing loss reads them."""

from typing import Any

from transformers import PreTrainedConfig
from trl import SFTConfig


def prepare_experts(config: PreTrainedConfig, args: SFTConfig) -> None:
    """Let TRL find the number of experts of a model, and compute no load-balancing loss for a model without any.

    TRL reads `num_experts`. Some families call it `num_local_experts`, without the alias that transformers has in
    others; and Granite 4's dense models are expert models with 0 of them.

    Args:
        config: the model's configuration; its class gets the alias.
        args: the trainer's own copy of the arguments.
    """
    text: Any = config.get_text_config()
    experts = getattr(text, "num_local_experts", None)
    if experts is None or hasattr(text, "num_experts"):
        return
    type(text).attribute_map = {**type(text).attribute_map, "num_experts": "num_local_experts"}
    if experts == 0 and hasattr(args, "router_aux_loss_coef"):  # a field of recent releases
        args.router_aux_loss_coef = 0.0
