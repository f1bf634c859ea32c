"""How does the attention of any family get the backend's rope?

The attentions of transformers call a function of their own file, such as apply_rotary_pos_emb(q, k, cos, sin). Gemma
4's function rotates one tensor, and Llama 4's multiplies complex numbers. Where it rotates as the contract does, up to
the layout of cos and sin and the dimension of the heads, it can be replaced: under one module, by a forward that is
compiled again from the source of the class's own, with the function's name as a variable of an enclosing function. All
other names stay globals of the family's file, so torch.compile finds them there. In the same way layers with LoRA that
read the same tensor become one operation (see `unsloth_fast.models.projections`). What differs between families, such
as norms on the heads, fused projections and layers without positions, stays the model's own code.
"""

import inspect
from collections.abc import Callable, Hashable, Sequence
from functools import cache, wraps
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from unsloth_fast.backends import Backend
from unsloth_fast.failures import FAILURES
from unsloth_fast.models.dtypes import promoted
from unsloth_fast.models.head_norms import are_learned, norms_of, rotation_with_norms
from unsloth_fast.models.lora import together
from unsloth_fast.models.projections import shared_layers
from unsloth_fast.models.protocols import Placement
from unsloth_fast.models.recompiled import recompiled
from unsloth_fast.models.recomputed import recomputed
from unsloth_fast.models.structure import Found
from unsloth_ref import kernels as reference

# The first parameters of functions that may be rotations.
_FORMS: tuple[tuple[str, ...], ...] = (("q", "k", "cos", "sin"), ("x", "cos", "sin"), ("xq", "xk", "freqs_cis"))
_WIDTH = 16  # of a head in the numeric check

Rope = Callable[..., Any]


class Rotation(NamedTuple):
    """How to call `rope` in place of a family's function.

    Attributes:
        interleaved: whether neighbouring columns are pairs.
        angles: makes the contract's cos from the family's: the first columns of all pairs, then the second ones.
        columns: the order of q and k before they are rotated.
        heads: the dimension of the heads; -2 if heads and angles may also be without a batch, as in vision towers; None
            if an argument of the function says it: unsqueeze_dim, 1 by default.
        last: whether the last columns of a head are rotated, not the first ones, in float32 at least.
    """

    interleaved: bool
    angles: Callable[[Tensor], Tensor]
    columns: Callable[[Tensor], Tensor]
    heads: int | None = None
    last: bool = False


def _same(x: Tensor) -> Tensor:
    return x


def _twice(angle: Tensor) -> Tensor:
    return torch.cat([angle, angle], -1)


def _half_twice(angle: Tensor) -> Tensor:
    """The angles for a function that does not read the second half."""
    return _twice(angle.chunk(2, -1)[0])


def _even_first(x: Tensor) -> Tensor:
    return torch.cat([x[..., 0::2], x[..., 1::2]], -1)


_ROTATIONS = (
    Rotation(False, _same, _same),
    Rotation(False, _same, _even_first),  # neighbours become halves, as in DeepSeek V3
    Rotation(False, _half_twice, _even_first),  # the same since transformers 5.24
    Rotation(False, _twice, _same),  # one angle per pair, as in gpt-oss
    Rotation(True, _half_twice, _same),  # as in GLM-4
    Rotation(True, _even_first, _same),  # an angle per column, as in Cohere
    Rotation(True, _twice, _same),  # one angle per pair, as the complex numbers of Llama 4
)
_ROTATIONS_OF_LAST = (Rotation(True, _twice, _same, last=True),)  # as in DeepSeek V4


def attention_placement(module: nn.Module, backend: Backend, known: dict[Hashable, Found]) -> Placement | None:
    """The backend's rope and the forward with it; None for a module whose forward does not rotate as `rope` does.

    Where the norms of the heads stand directly before the rotation, qk_norm_rope computes both, and lora_linears the
    layers with LoRA that read the same tensor, unless the backend separates them.

    Args:
        module: any module.
        backend: its operations are called.
        known: as in `recognise`.
    """
    own = inspect.unwrap(type(module).forward)
    found = _rotations(own) if isinstance(own, FunctionType) else {}
    if not found:
        return None
    functions = {name: _replacement(backend.kernels.rope, how, own.__globals__[name]) for name, how in found.items()}
    shared = shared_layers(module, backend)
    layers = tuple(layer.name for layer in shared)
    project = (together(shared, backend.kernels.lora_linears),) if shared else ()
    rotation = _with_norms(module, backend, found, functions, known)
    make = recompiled(own, tuple(found), norms=True, shared=layers) if rotation else None
    operation = "rope" if make is None else "qk_norm_rope"
    if make is None:
        make = recompiled(own, tuple(found), shared=layers)
        if make is None:
            return None
        made = make(*functions.values(), *project)
    else:
        made = make(rotation, *project)

    @wraps(made)
    def forward(self: nn.Module, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        with recomputed(hidden_states):  # by the projections of queries, keys and values
            return made(self, hidden_states, *args, **kwargs)

    return (operation, "lora_linears") if shared else (operation,), forward


def shared_placement(module: nn.Module, backend: Backend) -> Placement | None:
    """lora_linears and the forward with it, for a module whose forward calls layers with LoRA with the same tensor.

    None for any other module.
    """
    shared = shared_layers(module, backend)
    own: Any = inspect.unwrap(type(module).forward)
    make = recompiled(own, (), shared=tuple(layer.name for layer in shared)) if shared else None
    return None if make is None else (("lora_linears",), make(together(shared, backend.kernels.lora_linears)))


def _with_norms(
    module: nn.Module,
    backend: Backend,
    found: dict[str, Rotation],
    functions: dict[str, Rope],
    known: dict[Hashable, Found],
) -> Rope | None:
    """The rotation that calls qk_norm_rope; None unless there is one, of halves, and the heads' norms are alike."""
    if len(found) != 1 or not backend.fuses("qk_norm_rope", "rms_norm", "rope"):
        return None
    ((name, rotation),) = found.items()
    if rotation.interleaved or rotation.columns is not _same:
        return None
    norm = norms_of(module, known)
    return rotation_with_norms(norm, backend.kernels.qk_norm_rope, functions[name]) if norm else None


def _replacement(operation: Rope, rotation: Rotation, own: Rope) -> Rope:
    """A function that replaces a family's own: it calls the operation, or the own one where that does not fit."""

    def rotated(
        q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, rope: Rope, options: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        if q.ndim == 3:
            q, k = rotated(q[None], k[None], cos, sin, rope, options)
            return q.squeeze(0), k.squeeze(0)
        cos, sin = (angle[None] if angle.ndim == 2 else angle for angle in (cos, sin))
        if q.dtype != k.dtype:  # one of their projections has an adapter, or is in 4 bits
            q, k = promoted(q, k)
        # Under autocast the dtype of the angles can differ from that of the projections.
        wide = rotation.last or cos.dtype != q.dtype
        cos, sin = (rotation.angles(angle.float() if wide else angle) for angle in (cos, sin))
        if rotation.last:
            cos, sin = _behind(cos, q.shape[-1], 1.0), _behind(sin, q.shape[-1], 0.0)
        q, k = (rotation.columns(x.transpose(1, heads_of(options))) for x in (q, k))
        q, k = rope(q, k, cos, sin, interleaved=rotation.interleaved)
        return q.transpose(1, heads_of(options)), k.transpose(1, heads_of(options))

    def heads_of(options: dict[str, Any]) -> Any:
        return options.get("unsqueeze_dim", 1) if rotation.heads is None else rotation.heads

    def fits(heads: Tensor, angles: Tensor, *args: Any, **options: Any) -> bool:
        allowed = {"unsqueeze_dim"} if rotation.heads is None else set()
        known = not args and options.keys() <= allowed and heads_of(options) in (1, 2, -2)
        sizes = ((4, 3), (4, 2), (3, 2)) if rotation.heads == -2 else ((4, 3),)
        pairs = not rotation.last or (heads.shape[-1] % 2 == 0 and 2 * angles.shape[-1] <= heads.shape[-1])
        return known and pairs and (heads.ndim, angles.ndim) in sizes and not are_learned(angles)

    def both(
        q: Tensor, k: Any = None, cos: Any = None, sin: Any = None, *args: Any, rope: Rope = operation, **options: Any
    ) -> Any:
        if k is None or not fits(q, cos, *args, **options):  # q alone, other positions, or learned ones
            return own(q, k, cos, sin, *args, **options)
        return rotated(q, k, cos, sin, rope, options)

    def one(x: Tensor, cos: Tensor, sin: Tensor, *args: Any, rope: Rope = operation, **options: Any) -> Any:
        if not fits(x, cos, *args, **options):
            return own(x, cos, sin, *args, **options)
        nothing = x.detach().narrow(heads_of(options), 0, 0)
        return rotated(x, nothing, cos, sin, rope, options)[0]

    def both_by_complex(xq: Tensor, xk: Tensor, freqs_cis: Tensor, *args: Any, **options: Any) -> Any:
        if not fits(xq, freqs_cis, *args, **options):
            return own(xq, xk, freqs_cis, *args, **options)
        return rotated(xq, xk, freqs_cis.real, freqs_cis.imag, operation, options)

    return dict(zip(_FORMS, (both, one, both_by_complex), strict=True))[_form(own)]


def _behind(angles: Tensor, columns: int, value: float) -> Tensor:
    """Angles for all columns of a head, of which the last ones have those given, in the layout of the contract."""
    pairs = angles.unflatten(-1, (2, -1))
    return pad(pairs, (columns // 2 - pairs.shape[-1], 0), value=value).flatten(-2)


def _form(function: Rope) -> tuple[str, ...]:
    """The first parameters of a function that may be a rotation; empty for any other."""
    names = tuple(inspect.signature(function).parameters)
    return next((form for form in _FORMS if names[: len(form)] == form), ())


@cache
def _rotations(forward: FunctionType) -> dict[str, Rotation]:
    """The functions of its file that a forward calls and that rotate as `rope` does, by name."""
    parameters = list(inspect.signature(forward).parameters)
    functions = {name: forward.__globals__.get(name) for name in forward.__code__.co_names}
    found = {
        name: rotation
        for name, function in functions.items()
        if isinstance(function, FunctionType) and _form(function) and (rotation := _rotation(function)) is not None
    }
    return found if parameters[1:2] == ["hidden_states"] else {}


def _rotation(function: Rope) -> Rotation | None:
    """The one way of calling `rope` that agrees with a function, with the dimension of its heads; None without one."""
    if "unsqueeze_dim" not in inspect.signature(function).parameters:
        found = [rotation for heads in (1, 2, -2) if (rotation := _agreeing(function, heads)) is not None]
        return found[-1] if len({rotation.heads == 1 for rotation in found}) == 1 else None
    found = [_agreeing(function, None), _agreeing(function, None, unsqueeze_dim=2)]
    return found[0] if found[0] == found[1] else None


def _agreeing(function: Rope, heads: int | None, *, last: bool = False, **options: int) -> Rotation | None:
    """The one way of calling `rope` that agrees with a function in float32, for rotations of a head and of a part.

    The last columns of a head are tried where no rotation of the first ones agrees: a whole head is both.
    All numbers are between -1 and 1, so that each side has an error of at most 2^-22: two products and their sum.
    """
    generator = torch.Generator().manual_seed(0)
    dimension = options.get("unsqueeze_dim", heads or 1)

    def uniform(*shape: int) -> Tensor:
        return 2 * torch.rand(shape, generator=generator, device="cpu", dtype=torch.float32) - 1

    candidates = _ROTATIONS_OF_LAST if last else _ROTATIONS
    agreeing = {rotation._replace(heads=heads) for rotation in candidates}
    computed = False
    for columns in (_WIDTH, _WIDTH // 2, _WIDTH // 4):
        q, k = (uniform(2, count, 5, _WIDTH).transpose(1, dimension) for count in (3, 1))
        cos, sin = uniform(2, 5, columns), uniform(2, 5, columns)
        given = [(q, k, cos, sin), *([(q, k, cos[0], sin[0]), (q[0], k[0], cos[0], sin[0])] if heads == -2 else [])]
        expected = _results(function, given, options)
        if expected is not None:
            computed = True
            calls = {each: _replacement(reference.rope, each, function) for each in agreeing}
            results = {each: _results(call, given, options) for each, call in calls.items()}
            agreeing = {each for each, result in results.items() if result is not None and _agree(result, expected)}
    if computed and not agreeing and not last:
        return _agreeing(function, heads, last=True, **options)
    return agreeing.pop() if computed and len(agreeing) == 1 else None


def _results(function: Rope, given: Sequence[tuple[Tensor, ...]], options: dict[str, int]) -> list[Tensor] | None:
    """What a function returns for each q, k, cos and sin, with or without keys; None if it raises."""
    form, results = _form(function), []
    try:
        with torch.no_grad():
            for q, k, cos, sin in given:
                values = {"q": q, "k": k, "x": q, "xq": q, "xk": k, "cos": cos, "sin": sin}
                values["freqs_cis"] = torch.complex(cos, sin)
                result = function(*(values[name] for name in form), **options)
                results += [result] if isinstance(result, Tensor) else result
    except FAILURES:
        return None
    return results


def _agree(found: list[Tensor], expected: list[Tensor]) -> bool:
    shapes = [one.shape for one in found] == [one.shape for one in expected]
    return shapes and all(bool(((x - y).abs() <= 2.0**-21).all()) for x, y in zip(found, expected, strict=True))
