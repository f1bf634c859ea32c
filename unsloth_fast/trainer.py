"""`trl.SFTTrainer` on a backend of operations: documents packed, losses exact, the embeddings at their own rate."""

import copy
import inspect
import logging
from dataclasses import replace
from typing import Any

import torch
from datasets import Dataset
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers.trainer_utils import has_length
from trl import SFTTrainer

from unsloth_fast import backends, batches, packed_dataset
from unsloth_fast.checkpoints import passes_of_stream, resolve_checkpoint
from unsloth_fast.config import UnslothTrainingArguments, check_device, migrated, settle_checkpointing, settled
from unsloth_fast.evaluation import EvaluatingTrainer
from unsloth_fast.models import place
from unsloth_fast.models.head import add_loss, head_without_adapter, without_adapter
from unsloth_fast.optimizer import check_what_is_trained, grouped_optimizer

__all__ = ["UnslothTrainer", "UnslothTrainingArguments", "unsloth_train"]

logger = logging.getLogger(__name__)


class UnslothTrainer(EvaluatingTrainer):
    """`trl.SFTTrainer` on a backend's operations, with `UnslothTrainingArguments`' embedding learning rate.

    The backend is resolved once, here, and put under the model.

    Batches: where the model and the data allow it, and unless `padding_free=False` says otherwise, the documents of a
    batch are laid end to end in one row; with `packing=True` they are first packed to rows of `max_length` tokens, over
    the whole data set at once (a stream is packed by TRL). What was decided and why is logged. A plain `trl.SFTConfig`
    is taken at its word, which is `padding_free=False` without packing. A data collator of your own makes the batches
    itself: then neither happens.

    Loss: the backend's cross entropy, of the hidden states and the output head in one operation where the head is a
    plain linear layer, summed and divided once by the number of targets of the whole batch: gradient accumulation and
    data parallelism change nothing but rounding (unless average_tokens_across_devices=False asks for it). So is that of
    an evaluation or a prediction, by the targets of all its batches; but a stream on several processes, whose end no
    process knows, counts again the documents with which accelerate fills up the last batch. Logged beside the loss:
    `num_tokens` since training began, `learning_rate`, and `embedding_learning_rate` where there is one; not TRL's
    `entropy` and `mean_token_accuracy`, which cost another pass over logits that are never made. An evaluation with
    `compute_metrics` needs the logits, and logs the accuracy.

    Args:
        model: a model, or the name or path of one.
        args: `UnslothTrainingArguments`, or the `trl.SFTConfig` or `transformers.TrainingArguments` that TRL takes;
            the trainer keeps a copy and never changes yours. Where they name no backend it is that which
            `FastLanguageModel` put under the model, or else of UNSLOTH_BACKEND; where max_length is TRL's default and
            the model was loaded with a `max_seq_length`, that is taken; where gradient_checkpointing is the default of
            their class, what was said to `FastLanguageModel` as `use_gradient_checkpointing`.
        *positional: the further arguments of `trl.SFTTrainer`.
        **keywords: the further arguments of `trl.SFTTrainer`, and what older releases took: `tokenizer`,
            `max_seq_length`, and any field of the arguments, such as `packing` and `dataset_text_field`.

    Raises:
        ValueError: an unknown backend; a data set that is empty, has no known column, a row without text or a token
            outside the vocabulary, or in which no token is a target; a packed row longer than `max_length`; nothing to
            train; bfloat16 on a card without it, activation_offloading on a CPU; or what `trl.SFTTrainer` raises.
        TypeError: an unknown keyword.
        RuntimeError: the fast backend was asked for by name and cannot run here.
    """

    def __init__(self, model: Any, args: Any = None, *positional: Any, **keywords: Any) -> None:
        """Build TRL's trainer and put the backend under its model."""
        _, _, *names = (name for name in inspect.signature(SFTTrainer.__init__).parameters if name != "self")
        settings = settled(args, model)
        self.backend = backends.resolve(getattr(settings, "backend", None) or getattr(model, "unsloth_backend", None))
        keywords, updates = migrated(settings, keywords, names, self.backend.training.migrate_keywords)
        given = dict(zip(names, positional, strict=False)) | keywords
        settle_checkpointing(settings, args, model, updates)
        batches.take_length(settings, model, asked="max_length" in updates)
        check_device(settings)
        self._vocabulary = batches.vocabulary(model, settings, given)
        batches.check_columns(given, settings, self._vocabulary)
        plan = batches.plan(model, settings, given, self.backend.training.batching_plan)
        asked = settings.packing or settings.padding_free
        logger.log(
            logging.WARNING if asked and plan.reasons else logging.INFO,
            "batching: packing %s, padding-free %s%s",
            *("on" if on else "off" for on in (plan.packing, plan.padding_free)),
            f", because {'; '.join(plan.reasons)}" if plan.reasons else "",
        )
        # TRL refuses padding-free rows with a maximum length, which it would not enforce on them. Prepared as for
        # padding they are cut, and only then laid end to end.
        settings.packing, settings.padding_free = plan.packing, False
        if plan.padding_free or batches.has_stream(given):
            batches.let_each_process_read(settings)
        first = next(iter(given["train_dataset"])) if given.get("train_dataset") is not None else {}
        only = settings.completion_only_loss
        self._completion_only = {"prompt", "completion"} <= first.keys() if only is None else only  # as TRL decides
        with head_without_adapter(model):
            super().__init__(model, settings, *positional, **keywords)
        self.padding_free = self.args.padding_free = plan.padding_free
        self._padding_collator = self.data_collator
        if plan.padding_free:
            self._padding_collator = copy.copy(self.data_collator)
            self._padding_collator.padding_free = False  # with packing TRL's is padding-free
            self.data_collator = batches.PackedCollator(
                pad_token_id=self._padding_collator.pad_token_id,
                padding_free=True,
                pad_to_multiple_of=self.args.pad_to_multiple_of,
                collate=self.backend.training.collate,
                vocab_size=self.model.config.get_text_config().vocab_size,
                completion_only=self._completion_only,
            )
        check_what_is_trained(self.model, self.args)
        place(self.model, self.backend)
        self._choose_loss()
        self._tokens = torch.zeros((), dtype=torch.int64, device=self.args.device)  # since the last log
        self._right = torch.zeros(2, dtype=torch.int64, device=self.args.device)  # predictions, of how many targets
        self._looked_for_targets = False
        self._evaluated = []
        self._embedding_rate: float | None = None

    def _choose_loss(self) -> None:
        reason = self._needs_trl_loss()
        self._own_loss = reason is None
        inner = without_adapter(self.model)
        if reason is not None:
            if isinstance(inner.get_output_embeddings(), BaseTunerLayer):
                raise ValueError(
                    "target_modules: got an adapter on the output head, which TRL's own loss does not train; allowed: "
                    f"modules_to_save=['lm_head'] ({reason})"
                )
            logger.warning("loss: TRL's own, not the backend's: %s", reason)
            return
        add_loss(inner, self.backend, label_smoothing=self.args.label_smoothing_factor)
        plugin: Any = getattr(self.accelerator.state, "fsdp_plugin", None)
        policy = getattr(plugin, "mixed_precision_policy", None)
        if isinstance(policy, MixedPrecisionPolicy):
            # Under FSDP2 accelerate has every output rounded to the computing dtype: the loss, too, to 3 digits.
            plugin.mixed_precision_policy = replace(policy, output_dtype=None)
        # compute_loss divides by the targets of the whole accumulated batch, so transformers must not divide again.
        self.loss_is_scaled_for_ga = True
        self.model_accepts_loss_kwargs = True

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

    def _prepare_dataset(
        self, dataset: Any, processing_class: Any, args: Any, packing: bool, formatting_func: Any, dataset_name: str
    ) -> Any:
        """Tokens and labels by TRL; cut, checked and packed here, a map-style data set as a whole."""

        def prepare(dataset: Any, args: Any, packing: bool = False, function: Any = None) -> Any:
            rest = (processing_class, args, packing, function, dataset_name)
            return super(UnslothTrainer, self)._prepare_dataset(dataset, *rest)

        name, has_lists = f"{dataset_name} data set", packed_dataset.has_lists
        if has_lists(dataset, "seq_lengths"):  # packed before: neither cut nor packed again
            packed_dataset.check_packed_rows(dataset, name, args.max_length)
            dataset = prepare(dataset, batches.uncut(args))
            packed_dataset.check_vocabulary(dataset, name, self._vocabulary)
            return packed_dataset.with_targets(dataset, name) if has_lists(dataset, "labels") else dataset
        if packing and args.max_length is None:
            raise ValueError("max_length: got None with packing=True; allowed: an integer from 1, the size of a row")
        dataset = prepare(dataset, batches.uncut(args), function=formatting_func)
        strategy = args.packing_strategy if packing else None
        keep_end = not packing and getattr(args, "truncation_mode", "keep_start") == "keep_end"  # TRL asks since 1.0
        cut = args.max_length if strategy in (None, "bfd") else None
        if not isinstance(dataset, Dataset):
            cuts = {"max_length": cut, "keep_end": keep_end}
            dataset = packed_dataset.check_as_read(dataset, name, self._vocabulary)
            packed_dataset.check_stream(dataset, name, completion_only=self._completion_only, **cuts)
            prepared = prepare(dataset, args, packing)
            packed_dataset.check_kept(dataset, prepared, name)
            return prepared
        dataset = packed_dataset.labelled(dataset, self._completion_only)
        packed_dataset.check_vocabulary(dataset, name, self._vocabulary)
        if has_lists(dataset, "labels"):
            apart = strategy in ("bfd", "bfd_split")
            dataset = packed_dataset.with_targets(dataset, name, max_length=cut, keep_end=keep_end, drop=apart)
        if strategy is None:
            return prepare(dataset, args)
        dataset = dataset.select_columns(["input_ids", "labels"])
        shuffled = getattr(args, "shuffle_dataset", False)  # TRL asks since 0.26
        if shuffled:
            dataset = dataset.shuffle(seed=args.seed)
        packed = packed_dataset.pack_dataset(dataset, args.max_length, strategy, self.backend.training)
        packed_dataset.log_packing(dataset, packed, name, args.max_length)
        return packed.shuffle(seed=args.seed) if shuffled else packed

    def train(self, resume_from_checkpoint: str | bool | None = None, *positional: Any, **keywords: Any) -> Any:
        """Train; True resumes from the last checkpoint in the output folder that was written to its end."""
        self._checkpoint = resolve_checkpoint(resume_from_checkpoint, self.args.output_dir)
        return super().train(self._checkpoint, *positional, **keywords)

    def _init_training_state(self, *positional: Any, **keywords: Any) -> tuple[int, int]:
        """The pass over the data to go on with, and how many of its batches are done."""
        found = super()._init_training_state(*positional, **keywords)
        if self._checkpoint is None or self.args.ignore_data_skip or has_length(self.train_dataset):
            return found
        passes, steps = passes_of_stream(self._checkpoint)  # transformers takes max_steps for the length of a pass
        return passes, steps * self.args.gradient_accumulation_steps

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list[Any], Any]:
        """The microbatches of a step, and their targets on all devices.

        A stream that ends within a step is filled up with batches without targets: transformers, which cannot foresee
        its end, would take no step and leave the gradients to the next one.
        """
        samples, targets = super().get_batch_samples(epoch_iterator, num_batches, device)
        if samples and self._own_loss and "labels" in samples[-1] and not has_length(self.train_dataset):
            blank = {**samples[-1], "labels": torch.full_like(samples[-1]["labels"], -100)}
            samples += [blank] * (num_batches - len(samples))
        return samples, targets

    def training_step(self, *positional: Any, **keywords: Any) -> Tensor:
        """Forward and backward of one microbatch."""
        if len(set((getattr(self.model, "hf_device_map", None) or {}).values())) > 1:
            return super().training_step(*positional, **keywords)
        # With one device autograd's worker thread is of no use, and costs some 100 us for each operation of ours.
        with torch.autograd.set_multithreading_enabled(False):
            return super().training_step(*positional, **keywords)

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
            return_outputs: whether to return the model's outputs, with its logits, too.
            num_items_in_batch: the targets of all microbatches of the step on all devices.

        Returns:
            The loss, 0-dim, or (loss, outputs).
        """
        if not self._own_loss:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        outputs = None
        if return_outputs:
            # Without a keyword of TRL's or ours the forward is the model's own and returns logits.
            outputs = model(**{name: value for name, value in inputs.items() if name != "labels"}, use_cache=False)
            labels = inputs["labels"].to(outputs.logits.device)  # the last device of a model that is split over several
            loss = self.backend.training.next_token_loss(
                outputs.logits,
                labels,
                cross_entropy=self.backend.kernels.cross_entropy,
                num_items=num_items_in_batch,
                label_smoothing=self.args.label_smoothing_factor,
            )
            self._count_right(outputs.logits, labels)
        else:
            loss = model(**inputs, use_cache=False, backend_loss=True, num_items=num_items_in_batch)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            # The count is of all devices, and data parallelism averages the gradients over them.
            loss = loss * (self.accelerator.num_processes // self.get_tp_size())
        return (loss, outputs) if return_outputs else loss

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device: torch.device) -> Tensor | int | None:
        """The targets of all microbatches on all devices, as 0-dim int64."""
        if not self._own_loss or not batch_samples or "labels" not in batch_samples[0]:
            return super()._get_num_items_in_batch(batch_samples, device)
        targets = self.backend.training.count_targets(batch["labels"] for batch in batch_samples).to(device)
        masks = (batch.get("attention_mask", torch.ones_like(batch["input_ids"])) for batch in batch_samples)
        tokens = torch.stack([mask.sum() for mask in masks]).sum().to(device)
        own = torch.stack([targets, tokens])
        # Tensor-parallel ranks share a batch.
        total = self.accelerator.reduce(own, "sum") // self.get_tp_size() if self.args.world_size > 1 else own
        self._tokens += total[1]
        if not self._looked_for_targets:  # in the first step only: reading the number waits for the device
            self._looked_for_targets = True
            if not total[0]:
                logger.warning(
                    "the first step's batches have no target: their loss is 0 and trains nothing; look at labels, "
                    "completion_mask and assistant_masks, and at what the data collator does to them"
                )
        return (total if self.args.average_tokens_across_devices else own)[0]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with the tokens since training began, the embeddings' learning rate, and the accuracy where known."""
        mode = "train" if self.model.training else "eval"
        if self._own_loss:
            self._metrics[mode]["num_tokens"] = [self._tokens_so_far()]
            correct, targets = self._right.tolist()
            if targets:
                self._right.zero_()
                self._metrics[mode]["mean_token_accuracy"] = [correct / targets]
        if "learning_rate" in logs and self._embedding_rate is not None:
            logs["embedding_learning_rate"] = self._embedding_rate
        super().log(logs, start_time)

    def _tokens_so_far(self) -> int:
        """The tokens since training began, of a resumed run too: they are kept in the state that checkpoints hold."""
        if self.args.include_num_input_tokens_seen == "no":  # else transformers counts there itself
            self.state.num_input_tokens_seen += int(self._tokens)
        self._tokens.zero_()
        return self.state.num_input_tokens_seen

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self._tokens_so_far()
        super()._save_checkpoint(model, trial)

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
        grouped = grouped_optimizer(self, self.model if model is None else model)
        if grouped is None:
            return super().create_optimizer(model)
        # transformers takes the groups from "params" and does the rest, such as bitsandbytes' 32-bit embeddings.
        given, self.optimizer_cls_and_kwargs = self.optimizer_cls_and_kwargs, grouped
        try:
            return super().create_optimizer(model)
        finally:
            self.optimizer_cls_and_kwargs = given


def unsloth_train(trainer: Any, *positional: Any, **keywords: Any) -> Any:
    """Train: `trainer.train(...)`, whose gradient accumulation is exact, for scripts that call it by this name."""
    return trainer.train(*positional, **keywords)
