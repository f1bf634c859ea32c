"""Which loss a run uses: the backend's, or TRL's where it is asked for what the backend's does not do."""

import logging
from dataclasses import replace
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch.distributed.fsdp import MixedPrecisionPolicy
from trl import SFTTrainer

from unsloth_fast.backends import Backend
from unsloth_fast.hooks.load_balancing import weighs_load_balancing
from unsloth_fast.models.head import add_loss, without_adapter
from unsloth_fast.models.own_loss import warn_of_own_loss
from unsloth_fast.models.tuners import own_forward, refuse_bypassed_forward

logger = logging.getLogger(__name__)


def choose_loss(trainer: SFTTrainer, backend: Backend) -> bool:
    """Whether the loss is the backend's, which is then put into the model's forward; otherwise the reason is logged.

    Raises:
        ValueError: TRL's loss is needed, and there is an adapter on the output head, which it does not train; or the
            adapter passes over any loss that is put into the model's forward.
    """
    refuse_bypassed_forward(trainer.model)
    reason = reason_for_trl_loss(trainer)
    model = without_adapter(trainer.model)
    if reason is None:
        warn_of_own_loss(model)
        add_loss(model, backend, label_smoothing=trainer.args.label_smoothing_factor)
        _keep_loss_in_float32(trainer)
        # compute_loss divides by the targets of the whole accumulated batch, so transformers must not divide again.
        trainer.loss_is_scaled_for_ga = True
        trainer.model_accepts_loss_kwargs = True
        return True
    if isinstance(model.get_output_embeddings(), BaseTunerLayer):
        raise ValueError(
            "target_modules: got an adapter on the output head, which TRL's own loss does not train; allowed: "
            f"modules_to_save=['lm_head'] ({reason})"
        )
    logger.warning("loss: TRL's own, not the backend's: %s", reason)
    return False


def reason_for_trl_loss(trainer: SFTTrainer) -> str | None:
    """The reason why this run needs TRL's loss; None if the backend's loss does all that it asks for."""
    args: Any = trainer.args  # a trl.SFTConfig
    if args.loss_type != "nll":
        return f"loss_type={args.loss_type!r}"
    if trainer.compute_loss_func is not None:
        return "compute_loss_func is given"
    if trainer.aux_loss_enabled and not weighs_load_balancing(trainer):
        return "the load-balancing loss is the model's own"
    adapter = getattr(trainer.model, "active_peft_config", None)
    if getattr(adapter, "is_prompt_learning", False):
        return "prompt learning adds positions that have no label"
    if name := own_forward(adapter):
        return f"the adapter has a forward of its own ({name}), which may change the loss"
    return "the sequence is split across devices" if sequence_is_split(trainer) else None


def sequence_is_split(trainer: SFTTrainer) -> bool:
    """Whether each device has a part of a row: then transformers asks for its own attention."""
    parallelism = trainer.accelerator.parallelism_config
    return parallelism is not None and (parallelism.cp_enabled or parallelism.sp_enabled)


def _keep_loss_in_float32(trainer: SFTTrainer) -> None:
    """Under FSDP2 accelerate rounds every output to the computing dtype, and with it the loss, to 3 digits."""
    plugin: Any = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    policy = getattr(plugin, "mixed_precision_policy", None)
    if isinstance(policy, MixedPrecisionPolicy):
        plugin.mixed_precision_policy = replace(policy, output_dtype=None)
