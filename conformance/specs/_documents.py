"""What operations on packed documents share: bounds, calls of some documents, mistakes in bounds, kept results."""

from collections.abc import Callable, Sequence
from math import nan
from typing import NamedTuple, TypeVar

import torch
from torch import Generator, Tensor

from conformance.case import Draw
from conformance.promises import Parts
from conformance.spec import Call, Change, ErrorCase, Inputs, Options, change_inputs, mistake
from unsloth_ref import document_checks

MANY = 40  # documents, more than random cases have
Found = TypeVar("Found")


def bounds_of(tokens: int, documents: int, seed: int) -> list[int]:
    """The start of each document, then the number of tokens. With few tokens, some documents are empty.

    Lengths are log-normal like those of web pages: half of the tokens are in a sixth of the documents.
    """
    weights = torch.exp(1.1 * torch.randn(documents, generator=Generator().manual_seed(seed), dtype=torch.float64))
    ends = (weights.cumsum(0) / weights.sum() * tokens).round().long().tolist()
    return [0, *ends[:-1], tokens]


def laid_out(draw: Draw, tokens: int, documents: int) -> Tensor:
    """cu_seqlens of a case; expanding would change the bounds."""
    cu_seqlens = torch.tensor(bounds_of(tokens, documents, draw.case.seed), dtype=torch.int32)
    return cu_seqlens.to(draw.device) if draw.case.layout == "expanded" else draw.lay_out(cu_seqlens)


class Shifts(NamedTuple):
    """Tokens before and behind others within their documents, [T, 1] each.

    Attributes:
        place: the number of tokens of the same document before a token.
        left: the number of tokens of the same document behind it.
    """

    place: Tensor
    left: Tensor

    @classmethod
    def of(cls, cu_seqlens: Tensor, tokens: int) -> "Shifts":
        """The shifts within these documents."""
        token = torch.arange(tokens, device=cu_seqlens.device)
        document = document_checks.document_of(cu_seqlens, token)
        begin, end = cu_seqlens[document], cu_seqlens[document + 1]
        return cls((token - begin)[:, None], (end - 1 - token)[:, None])

    def before(self, values: Tensor, back: int) -> Tensor:
        """For each token the values of the one `back` places before it, 0 outside of its document."""
        return values.roll(back, 0).where(self.place >= back, 0.0)

    def behind(self, values: Tensor, ahead: int) -> Tensor:
        """For each token the values of the one `ahead` places behind it, 0 outside of its document."""
        return values.roll(-ahead, 0).where(self.left >= ahead, 0.0)


def documents_as_parts(tensors: Sequence[str], grads: Sequence[str]) -> Parts:
    """The documents of these tensors, which have an entry per token."""

    def pick(inputs: Inputs, chosen: Sequence[int]) -> tuple[Inputs, Options, Tensor]:
        bounds = inputs["cu_seqlens"].tolist()
        rows = torch.cat([torch.arange(bounds[i], bounds[i + 1]) for i in chosen]).to(inputs["cu_seqlens"].device)
        starts = [0]
        for i in chosen:
            starts.append(starts[-1] + bounds[i + 1] - bounds[i])
        picked = {name: inputs[name][rows] if name in tensors else inputs[name] for name in inputs}
        return picked | {"cu_seqlens": torch.tensor(starts, dtype=torch.int32, device=rows.device)}, {}, rows

    return Parts(lambda inputs: len(inputs["cu_seqlens"]) - 1, pick, grads)


def _cut(cut: Callable[[int], list[int]], first: str) -> Change:
    """Other document bounds; `cut` computes them from the number of tokens."""
    return change_inputs(lambda i: {"cu_seqlens": i["cu_seqlens"].new_tensor(cut(len(i[first])))})


def _nan_in(document: int, tensors: Sequence[str]) -> Change:
    """Three documents, one filled with NaN: a tile that reads into its neighbour is found."""

    def change(inputs: Inputs) -> Inputs:
        tokens = len(inputs[tensors[0]])
        bounds = [0, tokens // 3, tokens // 2, tokens]
        changed = {name: inputs[name].clone() for name in tensors}
        for tensor in changed.values():
            tensor[bounds[document] : bounds[document + 1]] = nan
        return changed | {"cu_seqlens": inputs["cu_seqlens"].new_tensor(bounds)}

    return change_inputs(change)


def document_kinds(tensors: Sequence[str]) -> dict[str, Change]:
    """Documents of several kinds; these tensors have an entry per token."""
    first = tensors[0]
    return {
        "one document": _cut(lambda tokens: [0, tokens], first),
        "documents of a token": _cut(lambda tokens: [*range(min(tokens, 4)), tokens], first),
        "empty documents on both sides": _cut(lambda tokens: [0, 0, tokens // 2, tokens // 2, tokens, tokens], first),
        "many documents, empty ones, then of a token": _cut(
            lambda tokens: [0, *(max(0, tokens - left) for left in reversed(range(MANY)))], first
        ),
        "NaN before": _nan_in(0, tensors),
        "NaN in between": _nan_in(1, tensors),
        "NaN behind": _nan_in(2, tensors),
    }


def bounds_errors(first: str) -> list[ErrorCase]:
    """Mistakes in cu_seqlens; `first` has an entry per token."""

    def wrong(what: str, change: Callable[[Tensor, int], Tensor]) -> ErrorCase:
        def made(inputs: Inputs) -> Inputs:
            return {"cu_seqlens": change(inputs["cu_seqlens"], len(inputs[first]))}

        return mistake(what, ValueError, "cu_seqlens", made, undefined=True, device="cpu")

    def kind(what: str, raises: type[Exception], change: Callable[[Tensor], Tensor]) -> ErrorCase:
        return mistake(what, raises, "cu_seqlens", lambda i: {"cu_seqlens": change(i["cu_seqlens"])})

    return [
        kind("cu_seqlens is a matrix", ValueError, lambda bounds: bounds[None]),
        kind("cu_seqlens are floats", TypeError, lambda bounds: bounds.float()),
        kind("cu_seqlens is of 64 bits", TypeError, lambda bounds: bounds.long()),
        kind("cu_seqlens is empty", ValueError, lambda bounds: bounds[:0]),
        wrong("cu_seqlens ends early", lambda bounds, tokens: bounds.clamp(max=tokens - 1)),
        wrong("cu_seqlens ends late", lambda bounds, tokens: bounds + (bounds == tokens).int()),
        wrong("cu_seqlens begins late", lambda bounds, tokens: bounds.clamp(min=1)),
        wrong("cu_seqlens falls", lambda bounds, tokens: bounds.new_tensor([0, 2, 1, tokens])),
    ]


def kept(compute: Callable[[Call], Found]) -> Callable[[Call], Found]:
    """The function with its last result kept, because the terms of all results of a call are asked for in turn."""
    last: list[tuple[tuple[object, ...], Found]] = []  # at most one entry

    def computed(call: Call) -> Found:
        asked = call.inputs, call.options, call.grad_outputs
        if not last or any(one is not other for one, other in zip(last[0][0], asked, strict=True)):
            last[:] = [(asked, compute(call))]
        return last[0][1]

    return computed
