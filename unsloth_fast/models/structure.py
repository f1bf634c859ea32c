"""What is a module? A norm, with a gate or not, an MLP, or experts, recognised by parameters and a numeric check.

The check compares it with its own forward: that of the module's class, called on a copy on the CPU, with random weights
and a few random rows, so the module's weights may be sharded, in 4 bits or without memory. Classes and their names play
no part.
"""

import copy
import inspect
import itertools
import warnings
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from unsloth_fast.failures import FAILURES
from unsloth_fast.models.experts import WEIGHTS, Experts, experts_forward
from unsloth_fast.models.methods import hooks_of
from unsloth_fast.models.mlp import Gated, mlp_forward
from unsloth_fast.models.norm import GatedNorm, LayerNorm, Norm, gated_norm_forward, layer_norm_forward, norm_forward
from unsloth_ref import kernels as reference

_EPS_NAMES = ("variance_epsilon", "eps", "epsilon", "norm_eps", "rms_norm_eps")
_GATES = (("swiglu", None), ("geglu", "none"), ("geglu", "tanh"))
_BIASES = ("gate_up_proj_bias", "down_proj_bias")
_ALPHAS = ("alpha", "swiglu_alpha")
_LIMITS = ("limit", "swiglu_limit")
_SCALES = (0.1, 1.0, 10.0, 100.0)  # of an MLP's rows, so that a clamp or a cap shows
_WIDTH = 24  # of the rows of a norm without a weight
_OTHER_ROUNDING = 1 / 32  # of 16-bit results, a norm that rounds once more changes about a third
_BY_MODE = "differs between training and evaluation"
_AnyNorm = TypeVar("_AnyNorm", Norm, LayerNorm, GatedNorm)
_OF_EVERY_MODULE = vars(nn.Module())

Found = Norm | LayerNorm | GatedNorm | Gated | Experts | str | None


def recognise(module: nn.Module, known: dict[Hashable, Found]) -> Found:
    """What a module is; why it is none of these although its parameters are those of one, as text; None for others.

    Args:
        module: a module whose forward is its class's.
        known: what was found before in the same model, by class, attributes and sizes; extended in place.
    """
    parameters, children = dict(module.named_parameters(recurse=False)), dict(module.named_children())
    sizes = {name: size for name, child in children.items() if (size := sizes_of(child))}
    others = [child for name, child in children.items() if name not in sizes]
    dimensions = {name: weight.dim() for name, weight in parameters.items()}
    is_norm = not children and dimensions in ({"weight": 1}, {})
    is_gated = not parameters and len(sizes) in (2, 3) and len(others) <= 1
    is_experts = set(parameters) in ({*WEIGHTS}, {*WEIGHTS, *_BIASES})
    is_experts = is_experts and all(parameters[name].dim() == 3 for name in WEIGHTS)
    taken = _taken(type(module).forward)
    if not (is_norm or is_gated or is_experts) or _has_state(module, others):
        return None
    if taken not in ((1, 2) if is_norm and parameters else (3,) if is_experts else (1,)):
        return None
    if any(map(hooks_of, others)):
        return "hooks on its activation"
    shapes = tuple(tuple(tensor.shape) for tensor in parameters.values())
    attributes = tuple(plain(each) for each in (module, *others))
    key = type(module), type(module).forward, shapes, tuple(sizes.items()), attributes
    if key not in known:
        try:
            with warnings.catch_warnings(action="ignore"), torch.device("cpu"), torch.no_grad():
                if is_norm:
                    size = shapes[0][0] if shapes else _WIDTH
                    known[key] = (_norm if taken == 1 else _gated_norm)(module, size)
                else:
                    known[key] = _experts(module) if is_experts else _gated(module, sizes)
        except FAILURES as failure:
            known[key] = f"its check failed: {type(failure).__name__}"
    return known[key]


def _has_state(module: nn.Module, others: list[nn.Module]) -> bool:
    """Whether there are tensors beside a norm's weight and linear layers."""
    tensors = itertools.chain(*((*child.parameters(), *child.buffers()) for child in others))
    return next(itertools.chain(module.buffers(recurse=False), tensors), None) is not None


def _taken(forward: Callable[..., object]) -> int | None:
    """How many inputs a forward takes, all by position; a gated norm takes two, experts take three."""
    kinds = [parameter.kind for parameter in inspect.signature(forward).parameters.values()]
    return len(kinds) - 1 if set(kinds) == {inspect.Parameter.POSITIONAL_OR_KEYWORD} else None


def plain(module: nn.Module) -> tuple[object, ...]:
    """The class of a module, and its attributes: numbers and text by value, all others by identity."""
    own = {name: value for name, value in vars(module).items() if name not in _OF_EVERY_MODULE}
    return type(module), *((name, _value(value)) for name, value in own.items())


def _value(value: object) -> object:
    """Hashable; equal for the partial functions that each GELU of transformers makes for itself."""
    if isinstance(value, partial):
        keywords = ((name, _value(given)) for name, given in value.keywords.items())
        return partial, id(value.func), *map(_value, value.args), *keywords
    return value if isinstance(value, int | float | str | None) else id(value)


def _norm(module: nn.Module, size: int) -> Norm | LayerNorm | str | None:
    """How a norm works: the offset is found in float32, then the casting in 16 bits, where alone it matters.

    Without a weight there is one candidate. A norm that is no RMSNorm may be a layer norm without a bias.
    """
    eps = _eps(module)
    if eps is None:
        return None
    candidates = [Norm(eps, offset, casting) for offset in (0.0, 1.0) for casting in ("llama", "gemma")]
    if not _is_weighted(module):
        candidates = [Norm(eps, 0.0, "gemma", weighted=False)]
    calls = {norm: norm_forward(norm, reference.rms_norm) for norm in candidates}
    found = _agreeing_norm(module, size, calls, "rms_norm", 1)
    if isinstance(found, Norm) or not _is_weighted(module):
        return found
    centred = {LayerNorm(eps): layer_norm_forward(LayerNorm(eps), reference.layer_norm)}
    layer_norm = _agreeing_norm(module, size, centred, "layer_norm", 1)
    return layer_norm if isinstance(layer_norm, LayerNorm) else found


def _gated_norm(module: nn.Module, size: int) -> GatedNorm | str | None:
    """The order and the groups from float32, then the casting from 16 bits."""
    eps, count = _eps(module), getattr(module, "n_groups", None)
    group = size // count if isinstance(count, int) and count > 0 else getattr(module, "group_size", size)
    if eps is None or not isinstance(group, int) or group < 1 or size % group:
        return None
    candidates = [GatedNorm(eps, group, before, casting) for before in (True, False) for casting in ("llama", "gemma")]
    calls = {norm: gated_norm_forward(norm, reference.gated_rms_norm) for norm in candidates}
    return _agreeing_norm(module, size, calls, "gated_rms_norm", 2)


def _is_weighted(module: nn.Module) -> bool:
    return next(module.parameters(recurse=False), None) is not None


def _eps(module: nn.Module) -> str | None:
    """The name of the attribute with eps."""
    return next((name for name in _EPS_NAMES if isinstance(getattr(module, name, None), float)), None)


def _agreeing_norm(
    module: nn.Module, size: int, calls: Mapping[_AnyNorm, Callable[..., object]], operation: str, inputs: int
) -> _AnyNorm | str:
    """The one norm whose forward, of those in calls, agrees with the module's own; why there is none, as text."""
    generator = torch.Generator().manual_seed(0)
    # The first rows are as small as eps is.
    sizes = torch.tensor([getattr(module, _eps(module) or "") ** 0.5, 1.0, 30.0], dtype=torch.float32)[:, None, None]
    rows = [torch.randn((3, 2, size), generator=generator, dtype=torch.float32) for _ in range(inputs)]
    rows[0] = sizes * rows[0]
    weight = torch.randn(size, generator=generator, dtype=torch.float32)
    found = list(calls)
    for weights, dtype, agree in (
        (torch.float32, torch.float32, _agree_in_float32),
        (torch.bfloat16, torch.bfloat16, _agree_in_16_bits),
        (torch.float32, torch.bfloat16, _agree_in_kind),
    ):
        random = {"weight": nn.Parameter(weight.to(weights), requires_grad=False)} if _is_weighted(module) else {}
        copied = copy_with(module, parameters=random)
        given = [tensor.to(dtype) for tensor in rows]
        own = in_both_modes(copied, *given)
        if own is None:
            return _BY_MODE
        results = {norm: cast(Tensor, calls[norm](copied, *given)) for norm in found}
        found = [norm for norm, result in results.items() if agree(result, own)]
        if not found:
            return _refusal(operation, 0, min(float((result - own).abs().max()) for result in results.values()))
    return found[0] if len(found) == 1 else _refusal(operation, len(found))


def _refusal(operation: str, agreeing: int, difference: float = 0.0) -> str:
    if agreeing:
        return f"{agreeing} ways to compute it by {operation} agree"
    return f"differs from every {operation} by {difference:.2g} at least"


def _agree_in_float32(result: Tensor, own: Tensor) -> bool:
    """Up to roundings of a mean over H, a root and three products, each of at most half an ulp."""
    roundings = 4 + max(own.shape[-1], 2).bit_length()
    return result.dtype == own.dtype and bool(((result - own).abs() <= roundings * 2.0**-24 * own.abs()).all())


def _agree_in_16_bits(result: Tensor, own: Tensor) -> bool:
    """In nearly all bits: float32 sums in another order rarely fall on the other side of a rounding."""
    return _agree_in_kind(result, own) and float((result != own).float().mean()) <= _OTHER_ROUNDING


def _agree_in_kind(result: Tensor, own: Tensor) -> bool:
    """In dtype, and up to the two roundings to bfloat16 that either may make."""
    error = (result.float() - own.float()).abs()
    return result.dtype == own.dtype and bool((error <= 2 * torch.finfo(torch.bfloat16).eps * own.float().abs()).all())


def _gated(module: nn.Module, sizes: dict[str, tuple[int, int]]) -> Gated | str | None:
    """The roles of its linear layers and its activation, in float64 with sparse linear layers of the same sizes."""
    candidates = list(_roles(sizes))
    if not candidates:
        return None
    generator = torch.Generator().manual_seed(0)
    others = {name: copy.deepcopy(child) for name, child in module.named_children() if name not in sizes}
    copied = copy_with(module, children=others | {name: Sparse(size, generator) for name, size in sizes.items()})
    scales = torch.tensor(_SCALES, dtype=torch.float64)[:, None]
    rows = scales * torch.randn((len(_SCALES), sizes[candidates[0].gate][0]), generator=generator, dtype=torch.float64)
    own = in_both_modes(copied, rows)
    if own is None:
        return _BY_MODE
    agreeing, differences = [], []
    for gated in candidates:
        result = cast(Tensor, mlp_forward(gated, reference)(copied, rows))
        differences.append(float(((result - own).abs() / own.abs().amax(-1, keepdim=True)).max()))
        if result.dtype == own.dtype and differences[-1] <= 64 * torch.finfo(torch.float64).eps:
            agreeing.append(gated)
    if len(agreeing) == 1:
        return agreeing[0]
    if all(gated.operation == "relu_squared" for gated in candidates):  # two layers and another activation
        return None
    return _refusal("swiglu and geglu", len(agreeing), min(differences))


def _experts(module: Any) -> Experts | str:
    """How experts are stored and gated, in float64 with few and small ones; all weights of a model take gigabytes."""
    stored = _stored(module)
    if stored is None:
        return "its weights are stored otherwise"
    transposed, biased = stored
    experts, columns, inner, per_token = 3, 5, 4, 2
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    shapes = (experts, 2 * inner, columns), (experts, columns, inner)
    tensors = [randn(*shape).mT.contiguous() if transposed else randn(*shape) for shape in shapes]
    tensors += [randn(*shape[:2]) for shape in shapes if biased]
    frozen = (nn.Parameter(tensor, requires_grad=False) for tensor in tensors)
    copied = copy_with(module, dict(zip((*WEIGHTS, *_BIASES), frozen, strict=False)))
    sizes = {"num_experts": experts, "hidden_dim": columns, "intermediate_dim": inner}
    for name, size in (sizes | {"hidden_size": columns, "intermediate_size": inner}).items():
        if hasattr(module, name):
            setattr(copied, name, size)
    if hasattr(module, "config"):
        copied.config = SimpleNamespace(_experts_implementation="eager")
    rows = torch.tensor(_SCALES, dtype=torch.float64)[:, None] * randn(len(_SCALES), columns)
    indices = torch.tensor([[0, 2], [2, 0], [1, 1], [0, 1]])
    inputs = rows, indices, randn(len(_SCALES), per_token)
    own = in_both_modes(copied, *inputs)
    if own is None:
        return _BY_MODE
    agreeing, differences = [], []
    for found in _gates_of(module, transposed, biased):
        result = cast(Tensor, experts_forward(found, reference)(copied, *inputs))
        differences.append(float(((result - own).abs() / own.abs().amax(-1, keepdim=True)).max()))
        if result.dtype == own.dtype and differences[-1] <= 64 * torch.finfo(torch.float64).eps:
            agreeing.append(found)
    return agreeing[0] if len(agreeing) == 1 else _refusal("moe_mlp", len(agreeing), min(differences))


def _stored(module: Any) -> tuple[bool, bool] | None:
    """Whether the weights of experts are transposed, and whether they have biases; None if their shapes are others."""
    (count, first, second), narrow = module.gate_up_proj.shape, module.down_proj.shape
    biases = [bias.shape for name in _BIASES if (bias := getattr(module, name, None)) is not None]
    for transposed, wide, hidden in ((False, first, second), (True, second, first)):
        shape = (count, wide // 2, hidden) if transposed else (count, hidden, wide // 2)
        if wide % 2 == 0 and narrow == shape and biases in ([], [(count, wide), (count, hidden)]):
            return transposed, bool(biases)
    return None


def _gates_of(module: Any, transposed: bool, biased: bool) -> Iterator[Experts]:
    """Every gate that experts with weights of this kind may have."""
    alphas, limits = ({default, *_numbers(module, names)} for default, names in ((1.0, _ALPHAS), (None, _LIMITS)))
    for interleaved, alpha, limit, offset in itertools.product((False, True), alphas, limits, (0.0, 1.0)):
        yield Experts("silu", interleaved, alpha, limit, offset, transposed, biased)
    yield Experts("gelu_tanh", transposed=transposed, biased=biased)


def _numbers(module: nn.Module, names: Sequence[str]) -> list[float]:
    """The attributes with these names that are numbers."""
    return [float(number) for name in names if isinstance(number := getattr(module, name, None), int | float)]


def _roles(sizes: dict[str, tuple[int, int]]) -> Iterator[Gated]:
    """Every way in which linear layers, inputs and outputs by name, can be an MLP, with or without a gate."""
    for names in itertools.permutations(sizes):
        *first, down = names
        hidden, inner = sizes[down][1], sizes[down][0]
        for operation, approximate in _GATES:
            if len(first) == 2 and all(sizes[name] == (hidden, inner) for name in first):
                yield Gated(operation, approximate, first[0], first[1], down)
            elif len(first) == 1 and sizes[first[0]] == (hidden, 2 * inner):
                for gate_first in (True, False):
                    yield Gated(operation, approximate, first[0], first[0], down, gate_first)
        # The other order has fitting sizes too; layers are declared in the order of their use.
        if len(first) == 1 and sizes[first[0]] == (hidden, inner) and names == tuple(sizes):
            yield Gated("relu_squared", None, first[0], first[0], down)


def sizes_of(layer: nn.Module) -> tuple[int, int] | None:
    """Inputs and outputs of a linear layer, under peft's wrappers and in 4 bits too; None for any other module."""
    sizes = getattr(layer, "in_features", None), getattr(layer, "out_features", None)
    return cast(tuple[int, int], sizes) if all(isinstance(size, int) for size in sizes) else None


def copy_with(module: nn.Module, parameters: Mapping[str, Any] = {}, children: Mapping[str, Any] = {}) -> Any:
    """A copy with other parameters or children, which shares all else with the module."""
    copied: Any = copy.copy(module)
    copied._parameters = {**module._parameters, **parameters}
    copied._modules = {**module._modules, **children}
    return copied


def in_both_modes(module: Any, *inputs: Tensor, **options: Tensor) -> Tensor | None:
    """What the forward of its class computes; None if training changes it, as a layer of dropout does."""
    results: list[Tensor] = []
    for training in (False, True):
        module.train(training)
        with torch.random.fork_rng([]):
            results.append(type(module).forward(module, *inputs, **options))
    return results[0] if torch.equal(*results) else None


class Sparse(nn.Module):
    """A linear map with at most ceil(I / O) weights in each row: whole layers of the widest models take gigabytes."""

    weight = bias = None  # Mamba's mixers hand them to a function that computes nothing without its library

    def __init__(self, sizes: tuple[int, int], generator: torch.Generator) -> None:
        super().__init__()
        inputs, outputs = sizes
        each = -(-inputs // outputs)
        self.taken = torch.randperm(each * outputs, generator=generator).view(outputs, each) % inputs
        self.weights = torch.randn(self.taken.shape, generator=generator, dtype=torch.float64)

    def __call__(self, x: Tensor) -> Tensor:
        """The products."""
        return (x[..., self.taken] * self.weights).sum(-1)
