"""The optimizer's parameters: something must be trained, and the embeddings have their own learning rate."""

import logging
from typing import Any

import torch
from transformers.trainer_optimizer import is_optimizer_factory

logger = logging.getLogger(__name__)


def check_trainable(model: Any, args: Any) -> None:
    """Refuse a run that trains nothing, or in a precision that its device does not have.

    Raises:
        ValueError: what was found, and what is allowed.
    """
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            "model: got no trainable parameter; allowed: at least one (unfreeze some, add an adapter, or load the "
            "adapter with is_trainable=True)"
        )
    half = args.bf16 or any(parameter.dtype == torch.bfloat16 for parameter in model.parameters())
    if half and args.device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise ValueError(
            f"bf16: got bfloat16 on {torch.cuda.get_device_name(args.device)!r}, which has none; allowed: fp16=True, "
            "with a model loaded in float16 or float32"
        )


def grouped_optimizer(trainer: Any, model: Any) -> tuple[Any, dict[str, Any]] | None:
    """The optimizer's class and options; the key "params" holds its parameter groups by role.

    Args:
        trainer: an `UnslothTrainer`.
        model: the model whose parameters are optimized.

    Returns:
        None where transformers' own groups are kept: there is no embedding learning rate, or it has no effect because
        an optimizer was given or groups the parameters itself; that is logged.
    """
    embedding_lr = getattr(trainer.args, "embedding_learning_rate", None)
    if embedding_lr is None:
        return None
    if trainer.optimizer is not None:
        logger.warning("embedding_learning_rate=%s has no effect: an optimizer was given", embedding_lr)
        return None
    found = trainer.optimizer_cls_and_kwargs or trainer.get_optimizer_cls_and_kwargs(trainer.args, model)
    optimizer_class, options = found
    if is_optimizer_factory(optimizer_class) or options.keys() & {"params", "model", "optimizer_dict"}:
        logger.warning(
            "embedding_learning_rate=%s has no effect: %s makes its own groups", embedding_lr, trainer.args.optim
        )
        return None
    groups = trainer.backend.training.param_groups(
        model,
        lr=options.get("lr", trainer.args.learning_rate),
        embedding_lr=embedding_lr,
        weight_decay=trainer.args.weight_decay,
        decay_names=trainer.get_decay_parameter_names(model),
    )
    if all(group.role != "embedding" for group in groups):
        logger.warning(
            "embedding_learning_rate=%s has no effect: neither the token embedding nor the output head is trained; "
            'with LoRA, modules_to_save=["embed_tokens", "lm_head"] trains both',
            embedding_lr,
        )
    return optimizer_class, {**options, "params": [group.as_dict() for group in groups]}


def embedding_rate(optimizer: Any) -> float | None:
    """The current learning rate of the embeddings; None where they have none of their own."""
    rates = [group["lr"] for group in optimizer.param_groups if group.get("role") == "embedding"]
    return float(rates[0]) if rates else None
