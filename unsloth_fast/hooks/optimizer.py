"""The optimizer's parameters: something must be trained, and the embeddings have their own learning rate."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers import Trainer, TrainingArguments
from transformers.trainer_optimizer import is_optimizer_factory

from unsloth_fast.models.beside_experts import warn_of_layers_left

logger = logging.getLogger(__name__)


def check_trainable(model: nn.Module, args: TrainingArguments, optimizer: Any = None) -> None:
    """Refuse a run that trains nothing, or in a precision that its device does not have; warn of layers without LoRA.

    Args:
        model: the trainer's, with the adapter that it has made, if any.
        args: the run's arguments.
        optimizer: the user's own; None if there is none.

    Raises:
        ValueError: what was found, and what is allowed.
    """
    trained = {parameter for parameter in model.parameters() if parameter.requires_grad}
    if not trained:
        raise ValueError(
            "model: got no trainable parameter; allowed: at least one (unfreeze some, add an adapter, or load the "
            "adapter with is_trainable=True)"
        )
    warn_of_layers_left(model)
    groups = optimizer.param_groups if isinstance(optimizer, torch.optim.Optimizer) else []
    if groups and trained.isdisjoint(parameter for group in groups for parameter in group["params"]):
        raise ValueError(
            "optimizers: got an optimizer of none of the parameters that the model trains; allowed: one that is made "
            "from them, after the model has its adapter"
        )
    half = args.bf16 or any(parameter.dtype == torch.bfloat16 for parameter in model.parameters())
    if half and args.device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise ValueError(
            f"bf16: got bfloat16 on {torch.cuda.get_device_name(args.device)!r}, which has none; allowed: fp16=True, "
            "with a model loaded in float16 or float32"
        )


@contextmanager
def kept_dtypes(trainer: Trainer, model: nn.Module | str) -> Iterator[None]:
    """Call TRL's constructor within the context: the weights that are trained keep their dtype.

    TRL converts those of a quantised model to bfloat16, which loses small updates: in a small run 45 % of the entries
    of lora_A never moved at a learning rate of 2e-4, 95 % at 2e-5, and none of them in float32.

    Weights that TRL made itself, from a `peft_config`, get the dtype that peft made them in: float32 for adapters, and
    for modules_to_save bfloat16 if the module has it, else float32, as loss scaling refuses gradients in float16.
    FSDP and DeepSpeed need one dtype for all weights that they shard together: there TRL's conversion stays.

    Args:
        trainer: the trainer that is built within the context.
        model: the model, or the name or path of one.
    """
    given: dict[nn.Parameter, torch.Tensor] = {}
    if isinstance(model, nn.Module) and _is_quantised(model):
        given = {parameter: parameter.data for parameter in model.parameters() if parameter.is_floating_point()}
    yield
    if not _is_quantised(trainer.model):
        return
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        logger.warning("dtype: TRL converts the trained weights of a quantised model to bfloat16")
        return
    trained: Any = trainer.model
    originals = _originals(trained)
    for parameter in trained.parameters():
        if not parameter.requires_grad or parameter.dtype not in (torch.bfloat16, torch.float16):
            continue
        if parameter in given:
            parameter.data = given[parameter].to(parameter.device)
        elif parameter not in originals:
            parameter.data = parameter.data.float()
        elif originals[parameter].dtype != torch.bfloat16:
            parameter.data = originals[parameter].to(parameter.device, torch.float32, copy=True)


def _is_quantised(model: Any) -> bool:
    return getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False)


def _originals(model: nn.Module) -> dict[nn.Parameter, torch.Tensor]:
    """The weight that each parameter of peft's modules_to_save was copied from."""
    wrappers = [module for module in model.modules() if isinstance(module, ModulesToSaveWrapper)]
    copies = [(copied, wrapper.original_module) for wrapper in wrappers for copied in wrapper.modules_to_save.values()]
    return {
        parameter: original.get_parameter(name).detach()
        for copied, original in copies
        for name, parameter in copied.named_parameters()
    }


def grouped_optimizer(trainer: Any, model: nn.Module) -> tuple[type[torch.optim.Optimizer], dict[str, object]] | None:
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
        if not any("role" in group for group in trainer.optimizer.param_groups):  # else that of an earlier `train`
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


def embedding_rate(optimizer: torch.optim.Optimizer) -> float | None:
    """The current learning rate of the embeddings; None where they have none of their own."""
    rates = [group["lr"] for group in optimizer.param_groups if group.get("role") == "embedding"]
    return float(rates[0]) if rates else None
