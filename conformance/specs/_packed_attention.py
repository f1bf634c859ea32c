"""Calls of packed attention that the contract refuses."""

from itertools import pairwise
from typing import Any

from conformance.spec import Change, ErrorCase, Inputs, Options


def longest(bounds: list[int]) -> int:
    return max(end - begin for begin, end in pairwise(bounds))


def _change(**changes: Any) -> Change:
    """A change of these inputs and options, each computed from the valid inputs."""

    def change(inputs: Inputs, options: Options) -> tuple[Inputs, Options]:
        options = {"max_seqlen": longest(inputs["cu_seqlens"].tolist()), **options}
        made = {name: make(inputs) for name, make in changes.items()}
        wrong = {name: value for name, value in made.items() if name in inputs}
        return {**inputs, **wrong}, {**options, **{name: v for name, v in made.items() if name not in inputs}}

    return change


ERRORS = (
    ErrorCase("q is a matrix", _change(q=lambda i: i["q"][0]), ValueError, "q", undefined=True),
    ErrorCase("k has another length", _change(k=lambda i: i["k"][:-1]), ValueError, "k", undefined=True),
    ErrorCase("k has another width", _change(k=lambda i: i["k"][..., :-1]), ValueError, "k", undefined=True),
    ErrorCase("v has another length", _change(v=lambda i: i["v"][:-1]), ValueError, "v", undefined=True),
    ErrorCase(
        "heads of k do not divide those of q",
        _change(**{n: lambda i: i["k"].repeat(1, 2 + i["q"].shape[1], 1) for n in ("k", "v")}),
        ValueError,
        "k",
        undefined=True,
    ),
    ErrorCase("k has another dtype", _change(k=lambda i: i["k"].double()), TypeError, "k"),
    ErrorCase("v has another dtype", _change(v=lambda i: i["v"].double()), TypeError, "v"),
    ErrorCase("q is integer", _change(**{n: lambda i, n=n: i[n].long() for n in "qkv"}), TypeError, "q"),
    ErrorCase("cu_seqlens is a matrix", _change(cu_seqlens=lambda i: i["cu_seqlens"][None]), ValueError, "cu_seqlens"),
    ErrorCase("cu_seqlens are floats", _change(cu_seqlens=lambda i: i["cu_seqlens"].float()), TypeError, "cu_seqlens"),
    ErrorCase(
        "cu_seqlens is of 64 bits", _change(cu_seqlens=lambda i: i["cu_seqlens"].long()), TypeError, "cu_seqlens"
    ),
    ErrorCase("cu_seqlens is empty", _change(cu_seqlens=lambda i: i["cu_seqlens"][:0]), ValueError, "cu_seqlens"),
    ErrorCase(
        "cu_seqlens ends early",
        _change(cu_seqlens=lambda i: i["cu_seqlens"].clamp(max=len(i["q"]) - 1)),
        ValueError,
        "cu_seqlens",
        undefined=True,
        device="cpu",
    ),
    ErrorCase(
        "cu_seqlens ends late",
        _change(cu_seqlens=lambda i: i["cu_seqlens"] + (i["cu_seqlens"] == len(i["q"])).int()),
        ValueError,
        "cu_seqlens",
        undefined=True,
        device="cpu",
    ),
    ErrorCase(
        "cu_seqlens begins late",
        _change(cu_seqlens=lambda i: i["cu_seqlens"].clamp(min=1)),
        ValueError,
        "cu_seqlens",
        undefined=True,
        device="cpu",
    ),
    ErrorCase(
        "cu_seqlens falls",
        _change(cu_seqlens=lambda i: i["cu_seqlens"].new_tensor([0, 2, 1, len(i["q"])])),
        ValueError,
        "cu_seqlens",
        undefined=True,
        device="cpu",
    ),
    ErrorCase(
        "max_seqlen is short of the longest document",
        _change(max_seqlen=lambda i: longest(i["cu_seqlens"].tolist()) - 1),
        ValueError,
        "max_seqlen",
        device="cpu",
    ),
    ErrorCase("max_seqlen is negative", _change(max_seqlen=lambda i: -1), ValueError, "max_seqlen"),
    ErrorCase("a window of nothing", _change(window=lambda i: 0), ValueError, "window"),
    ErrorCase("softcap is negative", _change(softcap=lambda i: -1.0), ValueError, "softcap"),
    ErrorCase("sinks are one short", _change(sinks=lambda i: i["q"][0, 1:, 0]), ValueError, "sinks", undefined=True),
    ErrorCase("sinks are integer", _change(sinks=lambda i: i["q"][0, :, 0].long()), TypeError, "sinks"),
    ErrorCase("scale is infinite", _change(scale=lambda i: float("inf")), ValueError, "scale"),
)
