"""One model with one backend's operations, in one dtype on one device: the object that a law works with."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor

from conformance.interpreter import Interpreted
from conformance.models.adapting import AdapterKind, with_adapter
from conformance.models.building import Documents, NotBuilt, Subject, documents_of, lengths_of
from conformance.models.running import GRADIENT, LOGITS, LOSS, Results, copied, excuse, run, sums_of_bits, without_cache
from conformance.tolerances import condition
from conformance.tolerances.bounds import Arithmetic
from conformance.tolerances.condition import JUMP, Response
from conformance.tolerances.gates import ErrorModel, Failure, Unchecked, judge
from conformance.trial import Caught, describe
from unsloth_fast import backends
from unsloth_fast.models import place
from unsloth_fast.models.head import add_loss, without_adapter
from unsloth_fast.models.load_balancing import has_usual_load_balancing
from unsloth_fast.save import patch_saving_functions


@dataclass(frozen=True)
class Computed:
    """What a model with placed operations computed.

    Attributes:
        results: as `running.run` returns them.
        interpreted: whether Triton's interpreter ran a kernel.
    """

    results: Results
    interpreted: bool


@dataclass(frozen=True)
class Truth:
    """What the untouched model computes for each document alone.

    Attributes:
        responses: in float64, with their response to roundings.
        peer: in the dtype under test.
    """

    responses: Mapping[str, Response]
    peer: Results


@dataclass(frozen=True, eq=False)
class ModelTrial:
    """One model, backend, dtype and device.

    Attributes:
        subject: the model.
        backend: as `unsloth_fast.backends.resolve` takes it.
        dtype: of the weights.
        device: "cpu" or "cuda".
        data: a file of documents; None for random ones.
        adapters: the kind of the adapter, as in `with_adapter`.
        count: of documents; None for the usual one.
    """

    subject: Subject
    backend: str
    dtype: torch.dtype
    device: str
    data: Path | None = None
    adapters: AdapterKind = "usual"
    count: int | None = None

    @cached_property
    def documents(self) -> Documents:
        """What the model is judged on; raises Unchecked if the untouched model does not run on it."""
        try:
            documents = documents_of(self.subject, self.device, self.data, lengths=lengths_of(self.count))
        except NotBuilt as why:
            raise Unchecked(str(why)) from why
        with excuse(), torch.no_grad():
            self.logits(self.untouched(), documents.alone()[0])
        return documents

    def untouched(self, *, wide: bool = False, adapted: bool = False, merged: bool = False) -> Any:
        """The model as transformers and peft compute it.

        Args:
            wide: in float64, with the weights of the dtype under test.
            adapted: with the adapter of `adapter`.
            merged: with that adapter merged into the weights.
        """
        try:
            model = self.subject.model(self.dtype, self.device, experts="eager" if wide else None)
        except NotBuilt as why:
            raise Unchecked(str(why)) from why
        if adapted:
            config, weights = self.adapter
            model = get_peft_model(model, copy.deepcopy(config))
            model.load_state_dict(weights, strict=False)
        if merged:
            model.merge_adapter()
        return model.double() if wide else model

    def placed(self, *, adapted: bool = False, backend: str | None = None, model: Any = None) -> Any:
        """The model with the backend's operations, and the loss without logits, as a trainer places them.

        Args:
            adapted: with the adapter of `adapter`.
            backend: another than the trial's.
            model: an untouched one, changed in place; None for a new one.
        """
        model = self.untouched() if model is None else model
        if adapted:
            model = with_adapter(model, kind=self.adapters)
            model.load_state_dict(self.adapter[1], strict=False)
        else:
            patch_saving_functions(model)
        chosen = backends.resolve(backend or self.backend)
        place(model, chosen)
        add_loss(without_adapter(model), chosen)
        return model

    @cached_property
    def adapter(self) -> tuple[Any, dict[str, Tensor]]:
        """peft's configuration and the weights of LoRA, B included."""
        model = with_adapter(self.untouched(), kind=self.adapters)
        weights = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
        return model.peft_config["default"], weights

    @cached_property
    def truth(self) -> Truth:
        """Of the model whose weights are all trained, without a load-balancing loss."""
        return self._truth(adapted=False, balanced=False)

    @cached_property
    def truth_of_batch(self) -> Truth:
        """Of the same model, with the load-balancing loss of experts where it has one."""
        return self._truth(adapted=False, balanced=True) if self.balances else self.truth

    @cached_property
    def truth_of_adapter(self) -> Truth:
        """Of the model with the adapter, with the load-balancing loss of experts where it has one."""
        return self._truth(adapted=True, balanced=self.balances)

    @cached_property
    def truth_of_merged(self) -> Truth:
        """Of the model with the adapter merged into its weights."""
        return self._truth(adapted=True, merged=True)

    @cached_property
    def balances(self) -> bool:
        """Whether the untouched model returns a load-balancing loss, which a trainer adds to that of the tokens."""
        model = self.untouched()
        if not hasattr(model.config.get_text_config(), "output_router_logits") or not has_usual_load_balancing(model):
            return False
        options = without_cache(model) | {"output_router_logits": True}
        with Caught(), torch.no_grad():
            return isinstance(model(self.documents.tokens[0][None], **options).aux_loss, Tensor)
        return False  # some releases of transformers have the option for a model without such a loss

    def _truth(self, *, adapted: bool, balanced: bool = False, merged: bool = False) -> Truth:
        batches, targets = self.documents.alone(), self.documents.targets
        models = {
            dtype: self.untouched(wide=dtype == torch.float64, adapted=adapted, merged=merged)
            for dtype in (torch.float64, self.dtype)
        }

        def again(inputs: Mapping[str, Tensor], gradients: Sequence[Tensor]) -> Results:
            return run(models[inputs["in the dtype"].dtype], batches, targets=targets, balanced=balanced)

        with excuse():
            peer = run(models[self.dtype], batches, targets=targets, balanced=balanced)
            one = torch.ones(1, dtype=self.dtype, device=self.device)
            key = self, adapted, balanced, merged
            responses = condition.measured(again, {"in the dtype": one}, (), self.dtype, key, work=0)
            twice = run(models[self.dtype], batches, targets=targets, balanced=balanced)
        if (why := _cannot_judge(responses, peer, twice, torch.finfo(self.dtype).eps / 2)) is not None:
            raise Unchecked(f"the untouched model {why}")
        return Truth({name: _raised(response) for name, response in responses.items()}, peer)

    def run(
        self,
        batches: Sequence[Mapping[str, Any]],
        *,
        model: Any = None,
        targets: int | None = None,
        own_loss: bool = True,
        balanced: bool = False,
    ) -> Computed:
        """Run the model with placed operations; raises Failure if it raises. See `running.run`."""
        model = self.placed() if model is None else model
        batches = copied(batches)
        before = sums_of_bits(model, batches)
        with Interpreted() as interpreted, Caught() as caught:
            found = run(model, batches, targets=targets, own_loss=own_loss, balanced=balanced)
        if caught.error is not None:
            raise Failure(f"raised {describe(caught.error)}") from caught.error
        after = sums_of_bits(model, batches)
        if changed := [name for name, bits in before.items() if after.get(name) != bits]:
            raise Failure(f"{changed[0]} has other bits after a step without an optimizer\n{len(changed)} in all")
        return Computed(found, bool(interpreted))

    def compare(
        self,
        batches: Sequence[Mapping[str, Any]],
        *,
        own: Sequence[Mapping[str, Any]] | None = None,
        model: Any = None,
        targets: int | None = None,
        labels: bool = True,
        names: Callable[[str], bool] = lambda name: True,
        adapted: bool = False,
    ) -> float:
        """Compare the model's results on batches with the truth; returns the budget use.

        The load-balancing loss of experts is one of the results of a single batch, and its gradients are added.

        Args:
            batches: of the documents, in their order.
            own: what the untouched model gets, if transformers does not take these; None for the same.
            model: with placed operations; None for a new one.
            targets: as in `running.run`.
            labels: whether there is a loss; else there are logits.
            names: which results are judged.
            adapted: whether the truth is that of the model with the adapter.

        Raises:
            Failure: a gate is broken.
            Unchecked: the untouched model, in the same dtype, breaks one too.
        """
        if not labels:
            batches = [{name: value for name, value in batch.items() if name != "labels"} for batch in batches]
            wanted, names = names, lambda name: _no_gradient(name) and wanted(name)
        whole = labels and targets is None
        truth = self.truth_of_adapter if adapted else self.truth_of_batch if whole else self.truth
        balanced = whole and self.balances
        model = self.placed() if model is None else model
        try:
            computed = self.run(batches, model=model, targets=targets, own_loss=labels, balanced=balanced)
            return self.judge(computed, truth, names=names)
        except Failure as failure:
            untouched = self.untouched(adapted=adapted).train(model.training)
            try:
                same = self.run(own or batches, model=untouched, targets=targets, own_loss=False, balanced=balanced)
                self.judge(same, truth, names=names)
            except Failure as likewise:
                raise Unchecked(f"the untouched model breaks a gate too: {likewise}") from failure
            raise

    def compare_adapted(self, names: Callable[[str], bool]) -> float:
        """`compare` the model with the adapter on a padded batch; of the gradients only these."""
        if all(_no_gradient(name) or not names(name) for name in self.truth_of_adapter.responses):
            raise Unchecked("no parameter of this kind is trained")
        model, batches = self.placed(adapted=True), [self.documents.padded()]
        return self.compare(batches, model=model, adapted=True, names=lambda name: _no_gradient(name) or names(name))

    @cached_property
    def obstacles(self) -> tuple[str, ...]:
        """Why a trainer does not pack documents for this model; empty if it does."""
        from unsloth_fast.config import UnslothTrainingArguments
        from unsloth_fast.data.facts import decide_batching

        with tempfile.TemporaryDirectory() as folder:
            options: dict[str, Any] = {"report_to": "none", "bf16": False, "use_cpu": True}
            arguments = UnslothTrainingArguments(folder, packing=True, **options)
        plan = decide_batching(self.placed(), arguments, {"processing_class": object()})
        return () if plan.packing else plan.reasons

    def demand_packing(self) -> None:
        """Raise Unchecked if a trainer does not pack documents for this model."""
        if self.obstacles:
            raise Unchecked(f"packing is refused: {'; '.join(self.obstacles)}")

    def logits(self, model: Any, batch: Mapping[str, Any]) -> Tensor:
        """The logits of a batch, [B, S, V]."""
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        return model(**inputs, **without_cache(model)).logits

    def judge(self, computed: Computed, truth: Truth, *, names: Callable[[str], bool] = lambda name: True) -> float:
        """Compare results with the truth, in the order in which they are computed; returns the budget use.

        Args:
            computed: what was computed.
            truth: one of this trial's.
            names: which results are judged.

        Raises:
            Failure: a gate is broken, a gradient is missing, or one is there that should not be.
        """
        elements = max(response.truth.numel() for response in truth.responses.values())
        used = 0.0
        for name, response in truth.responses.items():
            if not names(name):
                continue
            found = computed.results.get(name)
            if found is None and name.startswith(GRADIENT):
                if response.truth.any():
                    raise Failure(f"{name} is missing (None)")
            elif found is None and name not in (LOGITS, LOSS):
                raise Failure(f"{name} are missing: the layer is not called")
            elif found is not None:
                model = ErrorModel(
                    error=response,
                    elements=elements,
                    roundings=1,
                    truncates=computed.interpreted,
                    jumps=response.jumps,
                )
                used = max(used, judge(name, found, response.truth, truth.peer[name], model))
        frozen = [name for name in computed.results if name.startswith(GRADIENT) and name not in truth.responses]
        if name := next((name for name in frozen if names(name) and computed.results[name].any()), None):
            raise Failure(f"{name} is not 0, and the parameter is not trained")
        return used


def _cannot_judge(responses: Mapping[str, Response], once: Results, twice: Results, unit: float) -> str | None:
    """Why nothing can be compared with a truth; None if it can."""
    if not all(response.truth.isfinite().all() for response in responses.values()):
        return "computes what is not finite"
    if any((once[name] - twice[name]).norm() > JUMP * unit * once[name].norm() for name in once):
        return "computes something else in each run"
    for name, response in responses.items():  # a gradient may be 0 but for roundings
        allowed = response.largest(Arithmetic(unit, 1, response.truth.numel()))
        if _no_gradient(name) and allowed.norm() > response.truth.norm():
            return f"jumps: roundings change {name} by as much as these are"
    return None


def _raised(response: Response) -> Response:
    """The response, where there is one, raised to the root mean square of its tensor.

    Few probes underestimate the response of some of a model's many elements. Elements without any stay exact.
    """

    def raised(part: Tensor) -> Tensor:
        return torch.where(part > 0, part.clamp(min=float(part.square().mean().sqrt())), part)

    return replace(response, terms=raised(response.terms), extra=raised(response.extra))


def _no_gradient(name: str) -> bool:
    return not name.startswith(GRADIENT)
