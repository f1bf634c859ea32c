"""The nouns that the reference, the fast package and the judge share."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor
from torch.nn import Parameter

Approximate = Literal["none", "tanh"]
Casting = Literal["llama", "gemma"]
Reduction = Literal["mean", "sum", "none"]
Role = Literal["base", "embedding"]


@dataclass(frozen=True, eq=False)  # tensors have no ==
class ParamGroup:
    """Parameters that one optimizer treats alike.

    Attributes:
        role: "embedding" for whatever trains the token embedding or the output head, "base" for all else.
        params: the parameters, in the order of the model.
        lr: learning rate, per step.
        weight_decay: decoupled weight decay, per step and unit of learning rate.
    """

    role: Role
    params: tuple[Parameter, ...]
    lr: float
    weight_decay: float

    def as_dict(self) -> dict[str, Any]:
        """The group as torch.optim optimizers take it, its role under the key "role"."""
        return {"role": self.role, "params": list(self.params), "lr": self.lr, "weight_decay": self.weight_decay}


Microbatches = Iterable[Tensor]
