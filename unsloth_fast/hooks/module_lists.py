"""Which modules and parameters does a model have? Listed once per training, not several times per step.

In every step transformers walks through all modules to set their mode, to count operations, to find the parameters of
the gradient norm, and to drop the gradients. A Llama with 16 layers and LoRA has 1337 modules; the walks take the host
16 ms, while a GPU needs 55 for the passes over 2 rows of 2048 tokens. With the lists, the same takes 2 ms.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

from accelerate.utils import DistributedType, has_offloaded_params
from torch.distributed.tensor import DTensor
from torch.nn import Module, Parameter
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

from unsloth_fast.models.methods import replaced_method

UNSHARDED = (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU)  # each process has all weights


class ModuleLists:
    """The lists of the models of one training, as a context.

    They are made again after one of the modules has got a new module or parameter.
    """

    def __init__(self) -> None:
        self._stack, self._entered = ExitStack(), False
        self._models: dict[int, _Lists | None] = {}

    def __enter__(self) -> "ModuleLists":
        """Watch for new modules and parameters."""
        for register in (register_module_module_registration_hook, register_module_parameter_registration_hook):
            self._stack.callback(register(self._forget).remove)
        self._entered = True
        return self

    def __exit__(self, *_: object) -> None:
        """Give the models their own methods back."""
        self._entered = False
        self._stack.close()
        self._models.clear()

    def use(self, model: Module, distributed: DistributedType) -> None:
        """Let the model's `parameters()`, `train()` and `num_parameters()` use the lists, until the context ends.

        A model whose parameters are exchanged while it runs, because it is sharded or offloaded, keeps its own.

        Args:
            model: as accelerate prepared it, or the one inside; the same one again costs nothing, and outside of the
                context nothing happens.
            distributed: how accelerate distributes it.
        """
        if not self._entered or id(model) in self._models:
            return
        lists = _Lists(model) if distributed in UNSHARDED and not _is_exchanged(model) else None
        self._models[id(model)] = lists
        if lists is not None:
            for method in (lists.parameters, lists.train, lists.num_parameters):
                if hasattr(model, method.__name__):
                    guarded = self._guarded(model, method)
                    self._stack.enter_context(replaced_method(model, method.__name__, guarded, "lists"))

    def _guarded(self, model: Module, method: Callable[..., Any]) -> Callable[..., Any]:
        """The method for this model within the context.

        A deep copy of the model has this function too, and then calls the method of its class. A function that others
        put over it may call it after the context.
        """
        name = method.__name__
        own = getattr(model, name)

        def guarded(called: Module, *args: Any, **kwargs: Any) -> Any:
            if called is model:
                return method(own, *args, **kwargs) if self._entered else own(*args, **kwargs)
            taken = vars(called).pop(name)
            try:
                return getattr(called, name)(*args, **kwargs)
            finally:
                vars(called)[name] = taken

        guarded.__name__ = name  # under which a pickled model finds the method of its class
        return guarded

    def _forget(self, changed: Module, *_: object) -> None:
        for lists in self._models.values():
            if lists is not None:
                lists.forget(changed)


class _Lists:
    """The lists of one model, and the methods that use them; `own` is what the model would call without them."""

    def __init__(self, model: Module) -> None:
        self._model = model
        self._modules: dict[int, Module] = {}  # by id
        self._parameters: list[Parameter] = []
        self._count: int | None = None

    def forget(self, changed: Module) -> None:
        """Make all lists again when they are asked for next, if this is one of the modules."""
        if id(changed) in self._modules:
            self._modules, self._parameters, self._count = {}, [], None

    def _list_modules(self) -> None:
        self._modules = self._modules or {id(module): module for module in self._model.modules()}

    def parameters(self, own: Callable[..., Iterator[Parameter]], recurse: bool = True) -> Iterator[Parameter]:
        if not recurse:
            return own(recurse)
        self._list_modules()
        self._parameters = self._parameters or list(own())
        return iter(self._parameters)

    def train(self, own: Callable[..., Module], mode: bool = True) -> Module:
        self._list_modules()
        done = mode and all(module.training for module in self._modules.values())
        return self._model if done else own(mode)

    def num_parameters(self, own: Callable[..., int], *args: Any, **kwargs: Any) -> int:
        if args or kwargs != {"exclude_embeddings": True}:
            return own(*args, **kwargs)
        self._list_modules()
        self._count = own(**kwargs) if self._count is None else self._count
        return self._count


def _is_exchanged(model: Module) -> bool:
    offloaded = any(has_offloaded_params(module) for module in model.modules())
    return offloaded or any(isinstance(one, DTensor) or one.is_meta for one in model.parameters())
