"""`trl.SFTTrainer` on a backend of operations: documents packed, losses exact, the embeddings at their own rate."""

from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainingArguments
from transformers.trainer_utils import EvalLoopOutput, TrainOutput, has_length
from trl import SFTTrainer

from unsloth_fast.arguments import resolve_arguments
from unsloth_fast.config import UnslothTrainingArguments
from unsloth_fast.data.collator import EXAMPLE_ENDS, check_batch, collators, has_labels, without_ends
from unsloth_fast.hooks import evaluation
from unsloth_fast.hooks.checkpoints import passes_of_stream, resolve_checkpoint
from unsloth_fast.hooks.counting import Counter, logged_tokens, scaled_by_devices
from unsloth_fast.hooks.cuda_graphs import recorded_layers
from unsloth_fast.hooks.evaluation import Evaluated, Scores
from unsloth_fast.hooks.load_balancing import LoadBalancing
from unsloth_fast.hooks.logged_loss import FiniteLosses
from unsloth_fast.hooks.loss_choice import choose_loss, sequence_is_split
from unsloth_fast.hooks.module_lists import ModuleLists
from unsloth_fast.hooks.noise import noise_of_documents
from unsloth_fast.hooks.optimizer import check_trainable, embedding_rate, grouped_optimizer, kept_dtypes
from unsloth_fast.hooks.verification import verification_of
from unsloth_fast.models import place
from unsloth_fast.models.checkpointing import follow_arguments
from unsloth_fast.models.fields import kept_fields, with_values
from unsloth_fast.models.graphs import Recordings
from unsloth_fast.models.head import forward_with_loss, head_without_adapter
from unsloth_fast.seams import overrides
from unsloth_fast.unsupported import missing
from unsloth_ref.types import IGNORE_INDEX

__all__ = ["UnslothTrainer", "UnslothTrainingArguments", "unsloth_train"]
Count = Tensor | int | None  # of the targets of a step; None if they are not counted


class UnslothTrainer(SFTTrainer):
    """`trl.SFTTrainer` on a backend's operations, with `UnslothTrainingArguments`' embedding learning rate.

    One training step, from documents to the optimizer:

        documents -> rows       tokenized, labelled, checked, packed                     data/preparation.py
        rows -> batch           documents concatenated, positions restart                data/collator.py
        batch -> targets        counted over all microbatches and processes              hooks/counting.py
        batch -> loss           operations under the model; one division by the targets  models/placement.py, head.py
        gradients -> weights    the embeddings at their own learning rate                hooks/optimizer.py

    The backend is resolved once, when the trainer is built, and placed under the model.

    Batches: where the model and the data allow it, and unless `padding_free=False` is given, the documents of a batch
    are concatenated in one row. With `packing=True` they are first packed into rows of `max_length` tokens, over the
    whole data set at once (a stream is packed by TRL). The decision and its reasons are logged. A plain
    `trl.SFTConfig` means `padding_free=False` where it does not pack, and so does a loss of your own that sees the
    batches. A data collator of your own makes the batches itself: then neither happens.

    Loss: the backend's cross entropy, with the output head in one operation where the head is a plain linear layer. It
    is summed and divided once by the number of targets of the whole batch, so that gradient accumulation and data
    parallelism change nothing but rounding (unless average_tokens_across_devices=False asks for it). The loss of an
    evaluation or a prediction is divided by the targets of all its batches. Only for a stream on several processes,
    whose end no process knows, accelerate's repeated documents are counted twice. Mixtures of experts have a
    load-balancing loss beside it, as in TRL (`router_aux_loss_coef`). NEFTune scales by a document's own length.

    Logs: `num_tokens` since training began, `learning_rate`, and `embedding_learning_rate` where there is one; not
    TRL's `entropy` and `mean_token_accuracy`, which would need the logits. An evaluation logs them with
    `compute_metrics`, for which it computes the logits, or if `metric_for_best_model` is one of them.

    CUDA graphs: on a GPU the layers of small concatenated batches are recorded and replayed (`cuda_graphs`).

    Args:
        model: a model, or the name or path of one.
        args: `UnslothTrainingArguments`, or the `trl.SFTConfig` or `transformers.TrainingArguments` that TRL takes;
            the trainer keeps a copy and never changes yours. Three fields have further defaults: without a backend it
            is the one that `FastLanguageModel` placed under the model, else UNSLOTH_BACKEND's; where max_length is
            TRL's default, it is the model's `max_seq_length`; where gradient_checkpointing is the default of the
            arguments' class, it is the `use_gradient_checkpointing` that was given to `FastLanguageModel`.
        *positional: the further arguments of `trl.SFTTrainer`.
        **keywords: the further arguments of `trl.SFTTrainer`, and those of older releases: `tokenizer`,
            `max_seq_length`, and any field of the arguments, such as `packing` and `dataset_text_field`.

    Raises:
        ValueError: an unknown backend; a data set that is empty, has no known column, a row without text or a token
            outside the vocabulary, or in which no token is a target; a packed row longer than `max_length`; nothing to
            train; bfloat16 on a card without it, activation_offloading on a CPU; or what `trl.SFTTrainer` raises.
        TypeError: an unknown keyword, or an argument of a type that no run can use.
        RuntimeError: the fast backend was asked for by name and cannot run here.
    """

    # transformers annotates these as unions with their types before and outside of training.
    model: Any
    args: Any
    data_collator: Any
    eval_dataset: Any
    optimizer: Any
    accelerator: Any
    called_as_trls = False  # as `trl.SFTTrainer`, under `patch_trl`
    _embedding_rate: float | None = None
    _lists: ModuleLists | None = None

    def __init__(self, model: Any, args: TrainingArguments | None = None, *positional: Any, **keywords: Any) -> None:
        """Build TRL's trainer and place the backend under its model."""
        resolved = resolve_arguments(model, args, positional, keywords, kind=type(self), as_trl=self.called_as_trls)
        self.backend, self._preparation = resolved.backend, resolved.preparation()
        self._verification = verification_of(resolved.args, self.backend)
        if self._verification is not None:
            self.backend = self._verification.backend
        follow_arguments(model, resolved.args)
        with kept_fields(self, resolved.config) as self._fields, head_without_adapter(model), kept_dtypes(self, model):
            super().__init__(model, resolved.args, **resolved.keywords)
        self.padding_free = self.args.padding_free = resolved.batching.padding_free
        self.data_collator, self._padding = collators(self, resolved.completion_only, own=resolved.own_collator)
        check_trainable(self.model, self.args, self.optimizer)
        place(self.model, self.backend, documents=not sequence_is_split(self))
        self._own_loss = choose_loss(self, self.backend)
        self._counter, self._scores, self._evaluated = Counter(self.args.device), Scores(), Evaluated()
        self._graphs, self._load_balancing = Recordings(), LoadBalancing()
        self._noise, self._finite_losses = noise_of_documents(self), FiniteLosses()

    # Documents to batches

    @overrides(SFTTrainer)
    def _prepare_dataset(
        self, dataset: Any, processing_class: Any, args: Any, packing: bool, formatting_func: Any, dataset_name: str
    ) -> Any:
        by_trl = partial(super()._prepare_dataset, packing=False, formatting_func=None, dataset_name=dataset_name)
        prepare = self._preparation(by_trl)
        return prepare(dataset, f"{dataset_name} data set", processing_class, args, packing, formatting_func)

    @overrides(SFTTrainer)
    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list[Any], Any]:
        """The microbatches of a step, and their targets on all devices.

        A stream that ends within a step is filled up with batches without targets: transformers, which does not know
        where it ends, would take no step and leave the gradients to the next one.
        """
        samples, targets = super().get_batch_samples(epoch_iterator, num_batches, device)
        samples = [without_ends(sample)[0] if EXAMPLE_ENDS in sample else sample for sample in samples]
        if samples and self._own_loss and has_labels(samples[-1]) and not has_length(self.train_dataset):
            blank = {**samples[-1], "labels": torch.full_like(samples[-1]["labels"], IGNORE_INDEX)}
            samples += [blank] * (num_batches - len(samples))
        return samples, targets

    # One step

    @overrides(SFTTrainer)
    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device: torch.device) -> Count:
        """The targets of all microbatches on all devices, 0-dim int64."""
        if not self._own_loss or not batch_samples or not has_labels(batch_samples[0]):
            return super()._get_num_items_in_batch(batch_samples, device)
        count_targets = self.backend.training.count_targets
        everywhere, here = self._counter.step(batch_samples, count_targets, self._sum_over_processes)
        return everywhere if self.args.average_tokens_across_devices else here

    @overrides(SFTTrainer)
    def training_step(self, model: nn.Module, *positional: Any, **keywords: Any) -> Tensor:
        """Forward and backward of one microbatch."""
        if self._lists is not None:
            for each in (model, self.model):
                self._lists.use(each, self.accelerator.distributed_type)
        devices = set((getattr(self.model, "hf_device_map", None) or {}).values())
        verified = nullcontext()
        if self._verification is not None:
            verified = self._verification.microbatch(self.model, self.state.global_step + 1)
        # With one device autograd's worker thread is of no use, and costs some 100 us for each operation of ours.
        with verified, torch.autograd.set_multithreading_enabled(len(devices) > 1):
            loss = self._graphs.with_room(partial(super().training_step, model, *positional, **keywords), self.model)
        self._finite_losses.begin(self)
        return loss

    @overrides(SFTTrainer)
    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """transformers' count. It is called right after the loss of a microbatch was added to the others."""
        self._finite_losses.end(self)
        return super().floating_point_ops(inputs)

    @overrides(SFTTrainer)
    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Count = None
    ) -> Any:
        """The loss of one microbatch: its share of the mean over the whole batch, or its own mean without a count.

        Args:
            model: the model as accelerate prepared it.
            inputs: the collator's batch: input_ids and labels [B, S], and what else the model takes.
            return_outputs: whether to return the model's outputs with its logits as well.
            num_items_in_batch: the targets of all microbatches of the step on all devices.

        Returns:
            The loss, 0-dim, or (loss, outputs).
        """
        self._noise.positions = check_batch(inputs, with_labels=self._own_loss).get("position_ids")
        with with_values(self.model.config, self._fields):
            if not self._own_loss:
                return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            evaluation.warn_of_logits(self.args, asked=return_outputs)
            wanted = {"with_outputs": return_outputs, "with_scores": evaluation.wants_scores(self, return_outputs)}
            wanted["with_load_balancing"] = self.aux_loss_enabled
            forward = partial(forward_with_loss, model, inputs, num_items_in_batch, **wanted)
            loss, outputs, scores, load_balancing = self._graphs.with_room(forward)
        (self._scores if self.model.training else self._evaluated.scores).add(scores)
        loss = scaled_by_devices(loss, num_items_in_batch, self)
        loss = self._load_balancing.added(loss, load_balancing, num_items_in_batch, self)
        return (loss, outputs) if return_outputs else loss

    @overrides(SFTTrainer)
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

    # Evaluation

    @overrides(SFTTrainer)
    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """The batches of an evaluation; with `compute_metrics`, which takes rows, one row per document."""
        chosen = self.eval_dataset if eval_dataset is None else eval_dataset
        chosen = self.eval_dataset[chosen] if isinstance(chosen, str) else chosen
        return self._loader(super().get_eval_dataloader, eval_dataset, chosen, self.compute_metrics is not None)

    @overrides(SFTTrainer)
    def get_test_dataloader(self, test_dataset: Any) -> Any:
        """The batches of `predict`, one row per document, as its result has them."""
        return self._loader(super().get_test_dataloader, test_dataset, test_dataset, True)

    def _loader(self, make: Any, given: Any, dataset: Any, row_per_document: bool) -> Any:
        usual, padding = self.data_collator, self._padding
        self.data_collator = evaluation.collator_for(dataset, usual, padding, row_per_document=row_per_document)
        try:
            return make(given)
        finally:
            self.data_collator = usual

    @overrides(SFTTrainer)
    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """transformers' loop; the loss is the mean over all targets, not over the batches' means."""
        self._evaluated = Evaluated(finite_only=self.args.logging_nan_inf_filter)
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        self._evaluated.write_to(output.metrics, metric_key_prefix, self._sum_over_processes)
        return output

    @overrides(SFTTrainer)
    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Loss of one batch of an evaluation, and its logits and labels unless only the loss is wanted."""
        inputs, ends = without_ends(inputs)
        if not self._own_loss or inputs.get("labels") is None:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        inputs = self._prepare_inputs(inputs)
        labels = evaluation.labels_counted_once(inputs["labels"], ends, self.accelerator, self.get_tp_size())
        with torch.no_grad(), self.compute_loss_context_manager():
            found = self.compute_loss(model, inputs | {"labels": labels}, return_outputs=not prediction_loss_only)
        prediction = evaluation.prediction_of(found, inputs["labels"], loss_only=prediction_loss_only)
        self._evaluated.add(prediction[0], self.backend.training.count_targets([labels]))
        return prediction

    # Logs and checkpoints

    @overrides(SFTTrainer)
    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with the tokens since training began, the embeddings' learning rate, and the scores where known."""
        metrics = self._metrics["train" if self.model.training else "eval"]
        tokens = self._tokens_so_far()
        if self._own_loss and (self.model.training or "train_runtime" not in logs):  # a run's summary is no evaluation
            metrics["num_tokens"] = [tokens]
            metrics |= self._load_balancing.take(self.model.training, self._sum_over_processes)
            if self.model.training:
                metrics |= {name: [value] for name, value in self._scores.take(self._sum_over_processes).items()}
        if self._verification is not None and self.model.training:
            metrics |= {name: [value] for name, value in self._verification.take().items()}
        if "learning_rate" in logs and self._embedding_rate is not None:
            logs["embedding_learning_rate"] = self._embedding_rate
        super().log(logs, start_time)

    @overrides(SFTTrainer)
    def _get_learning_rate(self) -> float:
        # transformers asks just before the scheduler moves on, and logs the answer after it.
        self._embedding_rate = embedding_rate(self.optimizer)
        return super()._get_learning_rate()

    @overrides(SFTTrainer)
    def train(self, resume_from_checkpoint: str | bool | None = None, *positional: Any, **keywords: Any) -> TrainOutput:
        """Train; True resumes from the last checkpoint in the output folder that was written completely."""
        self._checkpoint = resolve_checkpoint(resume_from_checkpoint, self.args.output_dir)
        if type(self) is UnslothTrainer and self._own_loss:
            evaluation.check_best_metric(self)
        noise, lists = self._noise.added_to(self.model), ModuleLists()
        with noise, recorded_layers(self) as self._graphs, lists as self._lists:
            return super().train(self._checkpoint, *positional, **keywords)

    @overrides(SFTTrainer)
    def _init_training_state(self, *positional: Any, **keywords: Any) -> tuple[int, int]:
        """The pass over the data to go on with, and how many of its batches are done."""
        found = super()._init_training_state(*positional, **keywords)
        if self._checkpoint is None or self.args.ignore_data_skip or has_length(self.train_dataset):
            return found
        passes, steps = passes_of_stream(self._checkpoint)  # transformers takes max_steps for the length of a pass
        return passes, steps * self.args.gradient_accumulation_steps

    @overrides(SFTTrainer)
    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self._tokens_so_far()
        super()._save_checkpoint(model, trial)

    def _tokens_so_far(self) -> int:
        return logged_tokens(self.state, self._counter, self.args.include_num_input_tokens_seen)

    def _sum_over_processes(self, values: Tensor) -> Tensor:
        """The sum over all data-parallel processes; tensor-parallel ones share a batch and count once."""
        if self.args.world_size == 1:
            return values
        total = self.accelerator.reduce(values.to(self.args.device), "sum")
        return total / self.get_tp_size() if total.is_floating_point() else total // self.get_tp_size()


def unsloth_train(trainer: Any, *positional: Any, **keywords: Any) -> Any:
    """Train: `trainer.train(...)`, whose gradient accumulation is exact, for scripts that call it by this name."""
    return trainer.train(*positional, **keywords)


def __getattr__(name: str) -> object:
    raise missing(__name__, name)
