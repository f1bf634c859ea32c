"""Which operations or modules make a model's results leave the budget? The smallest set that does.

    1. Each call of a fast operation is also computed by the reference, on the fast model's own inputs: a call whose own
       error breaks its gate is named with its shapes (unsloth_fast/shadow.py).
    2. The model with all operations placed is compared by the gates of whole models (conformance/models/trial.py).
    3. If it breaks them with the reference's operations too, what is placed is wrong: the smallest set of modules is
       sought whose placement breaks a gate, all others being transformers' own.
    4. Otherwise operations are wrong: the smallest set that breaks a gate while all others are the reference's, and
       then the smallest set of their calls, by module.
    5. What remains without a set is tried again, until it breaks no gate: errors that have nothing to do with each
       other are sets of their own.

Sets are made smaller by delta debugging (Zeller 2002, IEEE TSE 28, 2): no element of what remains can be left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import cached_property, wraps
from types import SimpleNamespace
from typing import Any, Literal, TypeVar

import torch

from conformance.models.culprits import Culprit
from conformance.models.running import GRADIENT, sums_of_bits
from conformance.models.situations import SITUATIONS
from conformance.models.trial import Computed, ModelTrial
from conformance.tolerances.gates import Failure, Unchecked
from unsloth_fast import FastLanguageModel
from unsloth_fast.backends import Backend, resolve
from unsloth_fast.models import place
from unsloth_fast.models.head import add_loss, without_adapter
from unsloth_fast.models.interface import stacks_of
from unsloth_fast.models.methods import has_own_method
from unsloth_fast.shadow import Finding, Watch, caller, calling_module, fast_operations, shadowed
from unsloth_ref import kernels as reference

MOST = 4  # sets of a kind
LOSS, PACKED = "loss", "packed"  # placed beside modules: the loss without whole logits, documents in one row
Element = TypeVar("Element")
Call = tuple[str, str]  # operation, module
Kind = Literal["operations", "calls", "modules"]
NOTHING: frozenset[Any] = frozenset()
EVERYTHING = "the model with everything placed"
SHOWN = 3  # of the members of a set, while it is tried


def smallest(elements: Sequence[Element], breaks: Callable[[Sequence[Element]], bool]) -> list[Element]:
    """A subset that breaks, of which no element can be left out; all elements must break, and none must not."""
    rest, parts = list(elements), 2
    while len(rest) > 1:
        size = -(-len(rest) // parts)
        pieces = [rest[start : start + size] for start in range(0, len(rest), size)]
        others = [[one for one in rest if one not in piece] for piece in pieces] if len(pieces) > 2 else []
        piece = next(filter(breaks, pieces), None)
        found = piece if piece is not None else next(filter(breaks, others), None)
        if found is not None:
            rest, parts = found, 2 if piece is not None else max(parts - 1, 2)
        elif size == 1:
            break
        else:
            parts = min(2 * parts, len(rest))
    return rest


class Switch:
    """A backend whose calls are the fast operations' or the reference's, by operation and module.

    Attributes:
        backend: to be placed.
        chosen: the calls that are fast; None for all.
        calls: all that were made, in order.
        names: of modules, by id.
    """

    def __init__(self, fast: Backend) -> None:
        """Switch a backend, all of whose calls are fast at first."""
        own = vars(fast.kernels)
        kernels = {name: self._switched(name, own[name]) for name in fast_operations(fast)}
        self.backend = replace(fast, kernels=SimpleNamespace(**own | kernels))
        self.chosen: frozenset[Call] | None = None
        self.calls: dict[Call, None] = {}
        self.names: dict[int, str] = {}

    def _switched(self, name: str, fast: Callable[..., Any]) -> Callable[..., Any]:
        slow = getattr(reference, name)

        @wraps(fast)
        def call(*args: Any, **kwargs: Any) -> Any:
            key = name, caller(self.names, calling_module())
            self.calls[key] = None
            return (fast if self.chosen is None or key in self.chosen else slow)(*args, **kwargs)

        return call


class Bisection:
    """The search for what breaks one model in one situation.

    Args:
        trial: the model, backend, dtype and device.
        say: called with one line about each set that was tried.
        law: one of SITUATIONS; None for the first that a trainer makes with this model.
        backend: another than the trial's.

    Raises:
        Unchecked: the law says nothing about the model.
    """

    def __init__(
        self, trial: ModelTrial, say: Callable[[str], None], law: str | None = None, backend: str | None = None
    ) -> None:
        self._trial, self._say = trial, say
        self._situation = SITUATIONS[law or ("gradients" if trial.obstacles else "padding_free")]
        if law == "padding_free":
            trial.demand_packing()
        self._backend = resolve(backend or trial.backend)
        self._switch = Switch(self._backend)
        self._results: dict[Any, Failure | None] = {}

    @cached_property
    def packed(self) -> bool:
        """Whether the documents are in one row: where a trainer would pack them."""
        return self._situation.rows == "packed" and not self._trial.obstacles

    @property
    def operations(self) -> frozenset[str]:
        """Those that the model called until now."""
        return frozenset(operation for operation, _ in self._switch.calls)

    @cached_property
    def _model(self) -> Any:
        model = self._placed(self._switch.backend)
        self._switch.names = {id(module): name for name, module in model.named_modules()}
        return model

    @cached_property
    def _bits(self) -> dict[str, int]:
        return sums_of_bits(self._model, [])

    def _placed(self, backend: Backend) -> Any:
        model = self._trial.untouched(adapted=self._situation.adapted)
        place(model, backend)
        add_loss(without_adapter(model), backend)
        if self._situation.checkpointed and not model.supports_gradient_checkpointing:
            raise Unchecked("transformers has no gradient checkpointing for this model")
        if self._situation.checkpointed:
            FastLanguageModel.for_training(model, "unsloth")
        return model.train(not self._situation.evaluated)

    @cached_property
    def _forwards(self) -> dict[str, tuple[Any, Any]]:
        """The modules whose forward is ours, and that forward; LOSS and PACKED stand for the model and its stacks."""
        others = {id(self._model), id(without_adapter(self._model)), *(id(stack) for stack in stacks_of(self._model))}
        own = {name: module for name, module in self._model.named_modules() if has_own_method(module, "forward")}
        return {name: (module, vars(module)["forward"]) for name, module in own.items() if id(module) not in others}

    @property
    def _names(self) -> list[str]:
        """What can be left out: the modules, the loss, and packing where documents are packed."""
        return [*self._forwards, LOSS, *([PACKED] if self.packed else [])]

    def _batches(self, packed: bool) -> Sequence[Mapping[str, Any]]:
        documents = self._trial.documents
        if packed:
            return [documents.packed()]
        alone = self._situation.rows == "alone" or (self.packed and not self._situation.adapted)
        return documents.alone() if alone else [documents.padded()]

    def _run(self, model: Any, packed: bool, own_loss: bool = True) -> Computed:
        """What a model computes; raises Failure if it raises."""
        adapted = self._situation.adapted  # experts under adapters have a load-balancing loss, as in the law
        targets, balanced = None if adapted else self._trial.documents.targets, adapted and self._trial.balances
        with torch.set_grad_enabled(not self._situation.evaluated):
            return self._trial.run(
                self._batches(packed), model=model, targets=targets, own_loss=own_loss, balanced=balanced
            )

    def _judge(self, computed: Computed) -> None:
        """Raise Failure if a gate is broken."""
        truth = self._trial.truth_of_adapter if self._situation.adapted else self._trial.truth
        gradients = not self._situation.evaluated
        self._trial.judge(computed, truth, names=lambda name: gradients or not name.startswith(GRADIENT))

    def calls(self) -> list[Finding]:
        """The calls whose own error breaks their gate: the worst result of each operation, module and shape."""
        watch = Watch()
        model = self._placed(shadowed(self._backend, watch))
        with suppress(Failure):
            self._run(model, self.packed)  # the first call of a loss also checks the head on tokens of its own
        try:
            with watch.watching(model):
                self._run(model, self.packed)
        except Failure as failure:
            self._say(f"each call beside the reference: {failure}")
        self._say(f"each call beside the reference, on its own inputs: {len(watch.findings)} results")
        for name, reason in watch.unverified.items():
            self._say(f"{name} was not compared: {reason}")
        worst: dict[tuple[str, str, str], Finding] = {}
        for one in sorted(watch.findings, key=lambda finding: -finding.used):
            if one.used > 1:
                worst.setdefault((one.operation, one.module, one.inputs), one)
        return list(worst.values())

    def search(self) -> list[Culprit]:
        """The smallest sets that break a gate; empty if the model breaks none.

        Raises:
            Unchecked: the untouched model breaks a gate itself.
        """
        if not self.breaks():
            return []
        self._demand_untouched()
        if self._fails("the model with everything placed, on the reference's operations", NOTHING) is not None:
            return [self._found("modules", members) for members in self._sets("modules", self._names)]
        found: list[Culprit] = []
        for operations in self._sets(
            "operations", list(dict.fromkeys(operation for operation, _ in self._switch.calls))
        ):
            calls = ["@".join(call) for call in self._switch.calls if call[0] in operations]
            one = smallest(calls, lambda some: self._breaks("calls", some))
            found += [self._found("operations", operations), self._found("calls", one)]
        return found

    def _demand_untouched(self) -> None:
        untouched = self._fails("the untouched model", NOTHING, NOTHING)
        if untouched is not None:
            raise Unchecked(f"the untouched model breaks a gate too: {untouched}")

    def breaks(self) -> bool:
        """Whether the model with everything placed breaks a gate."""
        return self._fails(EVERYTHING, None) is not None

    def _sets(self, kind: Kind, names: Sequence[str]) -> Iterator[list[str]]:
        """Smallest sets that break a gate, without a common member, until the rest breaks none; at most MOST."""
        rest = list(names)
        for _ in range(MOST):
            members = smallest(rest, lambda some: self._breaks(kind, some))
            yield members
            rest = [name for name in rest if name not in members]
            if not rest or not self._breaks(kind, rest):
                return
        self._say(f"{kind} beside these {MOST} sets break a gate too, which were not searched for")

    def only(self, members: Sequence[str]) -> Culprit | None:
        """The set of these members, as `Culprit.members` names them; None if the model holds with it.

        Raises:
            KeyError: a member that the model has not.
            Unchecked: the untouched model breaks a gate itself.
        """
        self.breaks()  # shows the calls
        kinds: dict[Kind, Sequence[str]] = {
            "operations": [operation for operation, _ in self._switch.calls],
            "calls": ["@".join(call) for call in self._switch.calls],
            "modules": self._names,
        }
        kind: Kind | None = next((kind for kind, known in kinds.items() if set(members) <= set(known)), None)
        if kind is None:
            raise KeyError("; ".join(f"{kind} such as {' '.join(known[:1])}" for kind, known in kinds.items() if known))
        if not self._breaks(kind, members):
            return None
        self._demand_untouched()
        return self._found(kind, members)

    def _breaks(self, kind: Kind, members: Sequence[str]) -> bool:
        return self._failure(kind, members) is not None

    def _found(self, kind: Kind, members: Sequence[str]) -> Culprit:
        failure = self._failure(kind, members)
        message = f"{failure or f'not in each run: {self._results[None, None]}'}"
        return Culprit(kind, tuple(members), message, failure.used if failure else None)

    def _failure(self, kind: Kind, members: Sequence[str]) -> Failure | None:
        others = f" and {len(members) - SHOWN} more" if len(members) > SHOWN else ""
        what = f"{kind} {', '.join(members[:SHOWN])}{others}"
        if kind == "modules":
            return self._fails(what, NOTHING, frozenset(members))
        part = 0 if kind == "operations" else slice(None)
        chosen = (call for call in self._switch.calls if (call[part] if part == 0 else "@".join(call)) in members)
        return self._fails(what, frozenset(chosen))

    def _fails(self, what: str, fast: frozenset[Call] | None, modules: frozenset[str] | None = None) -> Failure | None:
        """How the model breaks a gate; None if it does not.

        Args:
            what: is tried, in words.
            fast: the calls that are fast; None for all.
            modules: what is placed; None for everything.
        """
        key = fast, modules
        if key not in self._results:
            model, self._switch.chosen, self._results[key] = self._model, fast, None
            packed, own = (modules is None or name in modules for name in (PACKED, LOSS))
            bits = self._bits
            try:
                with self._without(modules):
                    computed = self._run(model, packed and self.packed, own)
                self._judge(computed)
            except Failure as failure:
                self._results[key] = failure
                if sums_of_bits(model, []) != bits:  # the next set gets the weights as they were
                    del self._model, self._forwards
            self._say(f"{what}: {'holds' if self._results[key] is None else 'breaks a gate'}")
        return self._results[key]

    @contextmanager
    def _without(self, modules: frozenset[str] | None) -> Iterator[None]:
        """All modules but these have their class's forward."""
        off = [pair for name, pair in self._forwards.items() if modules is not None and name not in modules]
        for module, _ in off:
            del module.forward
        try:
            yield
        finally:
            for module, forward in off:
                module.forward = forward
