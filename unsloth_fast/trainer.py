"""`trl.SFTTrainer` on a backend of operations, with exact loss normalisation and a learning rate for the embeddings."""

import logging
from typing import Any

import torch
from torch import Tensor, nn
from transformers.trainer_optimizer import is_optimizer_factory
from trl import SFTTrainer

from unsloth_fast import backends
from unsloth_fast.models import place

logger = logging.getLogger(__name__)


class UnslothTrainer(SFTTrainer):
    """`trl.SFTTrainer` on a backend's operations, with `UnslothTrainingArguments`' embedding learning rate.

    The backend is resolved once, here, and put under the model. The loss is the backend's cross entropy of the model's
    logits, summed and divided once by the number of targets of the whole batch: gradient accumulation and data
    parallelism change nothing but rounding. Logged beside the loss: `mean_token_accuracy` over the targets since the
    last log, `num_tokens` since the start, and `embedding_learning_rate`; not TRL's `entropy`, which costs another pass
    over the logits.

    Args:
        model: a model, or the name or path of one.
        args: `UnslothTrainingArguments`, or the `trl.SFTConfig` or `transformers.TrainingArguments` that TRL takes;
            with those the backend comes from UNSLOTH_BACKEND.
        *positional: the further arguments of `trl.SFTTrainer`.
        **keywords: the further arguments of `trl.SFTTrainer`.

    Raises:
        ValueError: an unknown backend, or what `trl.SFTTrainer` raises.
        RuntimeError: the fast backend was asked for by name and cannot run here.
    """

    # transformers types these as unions that include what they are before and outside of training.
    model: Any
    args: Any
    optimizer: Any
    accelerator: Any

    def __init__(self, model: Any, args: Any = None, *positional: Any, **keywords: Any) -> None:
        """Build TRL's trainer and put the backend under its model."""
        self.backend = backends.resolve(getattr(args, "backend", None))
        super().__init__(model, args, *positional, **keywords)
        place(self.model, self.backend)
        reason = self._needs_trl_loss()
        self._own_loss = reason is None
        if self._own_loss:
            # compute_loss divides by the targets of the whole accumulated batch, so transformers must not divide again.
            self.loss_is_scaled_for_ga = True
            self.model_accepts_loss_kwargs = True
        else:
            logger.warning("loss: TRL's own, not the backend's: %s", reason)
        self._counts = {  # by mode: correct predictions, targets, tokens since the last log
            mode: torch.zeros(3, dtype=torch.int64, device=self.args.device) for mode in ("train", "eval")
        }
        self._embedding_rate: float | None = None

    def _needs_trl_loss(self) -> str | None:
        """What this run asks of the loss that the backend's does not do; None if nothing."""
        if self.args.loss_type != "nll":
            return f"loss_type={self.args.loss_type!r}"
        if self.compute_loss_func is not None:
            return "compute_loss_func is given"
        if self.aux_loss_enabled:
            return "the model has a load-balancing loss"
        if getattr(getattr(self.model, "active_peft_config", None), "is_prompt_learning", False):
            return "prompt learning adds positions that have no label"
        parallelism = self.accelerator.parallelism_config
        if parallelism is not None and (parallelism.cp_enabled or parallelism.sp_enabled):
            return "the sequence is split across devices"
        return None

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss of one microbatch: its share of the mean over the whole batch, or its own mean without a count.

        Args:
            model: the model as accelerate prepared it.
            inputs: what the collator made: input_ids and labels [B, S] and whatever else the model takes.
            return_outputs: whether to return the model's outputs too.
            num_items_in_batch: the targets of all microbatches of the step on all devices.

        Returns:
            The loss, 0-dim, or (loss, outputs).
        """
        if not self._own_loss:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        # Without `fused_lm_head=True` the forward that TRL installs is the model's own and returns logits.
        outputs = model(**{name: value for name, value in inputs.items() if name != "labels"}, use_cache=False)
        labels = inputs["labels"].to(outputs.logits.device)  # the last device of a model that is split over several
        loss = self.backend.training.next_token_loss(
            outputs.logits,
            labels,
            cross_entropy=self.backend.kernels.cross_entropy,
            num_items=num_items_in_batch,
            label_smoothing=self.args.label_smoothing_factor,
        )
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            # The count is of all devices, and data parallelism averages the gradients over them.
            loss = loss * (self.accelerator.num_processes // self.get_tp_size())
        self._count(outputs.logits, labels, inputs)
        return (loss, outputs) if return_outputs else loss

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device: torch.device) -> Tensor | int | None:
        """The targets of all microbatches on all devices, as 0-dim int64."""
        if not self._own_loss or not batch_samples or "labels" not in batch_samples[0]:
            return super()._get_num_items_in_batch(batch_samples, device)
        count = self.backend.training.count_targets(batch["labels"] for batch in batch_samples).to(device)
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            count = self.accelerator.gather(count).sum() // self.get_tp_size()  # tensor-parallel ranks share a batch
        return count

    @torch.no_grad()
    def _count(self, logits: Tensor, labels: Tensor, inputs: dict[str, Any]) -> None:
        """Add up on the device what `log` reports: reading numbers back in each microbatch would wait for it."""
        targets = labels[:, 1:]
        valid = targets != -100
        correct = (logits[:, :-1].argmax(-1) == targets) & valid
        tokens = inputs.get("attention_mask", torch.ones_like(labels))
        counts = torch.stack([correct.sum(), valid.sum(), tokens.sum()]).to(self.args.device)
        mode = "train" if self.model.training else "eval"
        self._counts[mode] += self.accelerator.reduce(counts, "sum") // self._tp_size

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with the accuracy since the last log, the tokens since the start, and the embeddings' learning rate."""
        mode = "train" if self.model.training else "eval"
        correct, targets, tokens = self._counts[mode].tolist()
        if tokens:
            self._counts[mode].zero_()
            self._total_train_tokens += tokens if mode == "train" else 0
            self._metrics[mode]["mean_token_accuracy"] = [correct / max(targets, 1)]
            self._metrics[mode]["num_tokens"] = [self._total_train_tokens]
        if "learning_rate" in logs and self._embedding_rate is not None:
            logs["embedding_learning_rate"] = self._embedding_rate
        super().log(logs, start_time)

    def _get_learning_rate(self) -> float:
        # transformers asks just before the scheduler moves on, and logs the answer after it.
        rates = [group["lr"] for group in self.optimizer.param_groups if group.get("role") == "embedding"]
        self._embedding_rate = float(rates[0]) if rates else None
        return super()._get_learning_rate()

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The optimizer that the arguments ask for, the embeddings at their own learning rate.

        An optimizer that was given to the trainer is kept as it is. Optimizers that group the parameters themselves
        (GaLore, Apollo, LOMO, layer-wise ones, Muon, Dion) do so, at one learning rate.

        Args:
            model: the model whose parameters are optimized; None for the trainer's.

        Returns:
            The optimizer, which is also kept as `self.optimizer`.
        """
        embedding_lr = getattr(self.args, "embedding_learning_rate", None)
        if embedding_lr is None:
            return super().create_optimizer(model)
        if self.optimizer is not None:
            logger.warning("embedding_learning_rate=%s has no effect: an optimizer was given", embedding_lr)
            return super().create_optimizer(model)
        trained: Any = self.model if model is None else model
        given = self.optimizer_cls_and_kwargs
        optimizer_class, options = given or self.get_optimizer_cls_and_kwargs(self.args, trained)
        if is_optimizer_factory(optimizer_class) or options.keys() & {"params", "model", "optimizer_dict"}:
            logger.warning("embedding_learning_rate=%s has no effect: %s groups itself", embedding_lr, self.args.optim)
            return super().create_optimizer(model)
        groups = self.backend.training.param_groups(
            trained,
            lr=options.get("lr", self.args.learning_rate),
            embedding_lr=embedding_lr,
            weight_decay=self.args.weight_decay,
            decay_names=self.get_decay_parameter_names(trained),
        )
        if all(group.role != "embedding" for group in groups):
            logger.warning(
                "embedding_learning_rate=%s has no effect: neither the token embedding nor the output head is trained; "
                'with LoRA, modules_to_save=["embed_tokens", "lm_head"] trains both',
                embedding_lr,
            )
        # transformers takes the groups from "params" and does the rest, such as bitsandbytes' 32-bit embeddings.
        self.optimizer_cls_and_kwargs = optimizer_class, {**options, "params": [group.as_dict() for group in groups]}
        try:
            return super().create_optimizer(model)
        finally:
            self.optimizer_cls_and_kwargs = given
