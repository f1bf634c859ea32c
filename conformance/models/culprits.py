"""What a bisection finds: a call with an error of its own, or a smallest set that breaks a gate of the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from unsloth_fast.shadow import Finding


@dataclass(frozen=True)
class Culprit:
    """A call, or a smallest set.

    Attributes:
        kind: what it is; a "call" is beyond its own budget, a set of the other kinds breaks a gate of the model.
        members: "operation@module" of a call or of calls, names of operations, or names of modules, with what stands
            for the loss and for packing among them.
        message: the error of the call, or the gate that the model breaks with this set.
        used: the budget use; None where none was measured.
        call: the fields of a call's finding; empty for a set.
    """

    kind: Literal["call", "operations", "calls", "modules"]
    members: tuple[str, ...]
    message: str
    used: float | None
    call: Mapping[str, Any] = field(default_factory=dict[str, Any])

    @classmethod
    def of_call(cls, finding: Finding) -> Culprit:
        """The call whose error the finding tells."""
        return cls("call", (f"{finding.operation}@{finding.module}",), str(finding), finding.used, asdict(finding))

    @property
    def operations(self) -> list[str]:
        """The wrong operations; none for modules."""
        return [] if self.kind == "modules" else [member.partition("@")[0] for member in self.members]

    def __str__(self) -> str:
        """What it is, its members and the message."""
        named = "" if self.kind == "call" else f"{', '.join(self.members)}\n"
        return f"{self.kind}: {named}{self.message}"

    def as_dict(self) -> dict[str, Any]:
        """The fields of a file of results: those of the call, or members and message of the set."""
        own = {name: value for name, value in self.call.items() if name != "used"}
        own = own or {"members": self.members, "message": self.message}
        return {"kind": self.kind} | own | {"budget_use": self.used}
