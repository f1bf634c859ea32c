"""The functions by which families rotate queries and keys: which are recognised, and the forward that calls rope."""

import inspect
from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests import tiny
from tests.models.families import assert_same, batch, build, step
from unsloth_fast import backends
from unsloth_fast.models import place, remove
from unsloth_fast.models.attention import attention_placement
from unsloth_fast.models.recompiled import recompiled

REFERENCE = backends.resolve("reference")
# Modules of transformers, the function that their attentions call, and the columns of cos for heads of 16 columns.
ROTATIONS = {
    "llama": ("apply_rotary_pos_emb", 16),
    "phi3": ("apply_rotary_pos_emb", 6),
    "glm4": ("apply_rotary_pos_emb", 8),
    "ernie4_5": ("apply_rotary_pos_emb", 16),
    "cohere": ("apply_rotary_pos_emb", 16),
    "gpt_oss": ("apply_rotary_pos_emb", 8),
    "deepseek_v3": ("apply_rotary_pos_emb_interleave", 16),
}


class Turning(nn.Module):
    """An attention's forward, as far as rotations go."""

    def forward(self, hidden_states: Tensor, q: Tensor, k: Tensor, *angles: Tensor, **options: Any) -> Any:
        return apply_rotary(q, k, *angles, **options)


apply_rotary: Any = None  # set by `forward_with`


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def forward_with(rotation: Callable[..., tuple[Tensor, Tensor]], monkeypatch: pytest.MonkeyPatch) -> Any:
    """The forward of a `Turning` in whose file the rotation is this one; None if it keeps its own."""
    monkeypatch.setitem(globals(), "apply_rotary", rotation)
    attention = import_module("unsloth_fast.models.attention")
    attention._rotations.cache_clear()
    recompiled.cache_clear()
    placement = attention_placement(Turning(), REFERENCE, {})
    return None if placement is None else placement[1]


@pytest.mark.parametrize("module", ROTATIONS)
def test_the_rotation_of_a_family_is_recognised(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It holds on other sizes than the check's, with cos and sin as the family's rotary embedding makes them."""
    name, columns = ROTATIONS[module]
    own = getattr(import_module(f"transformers.models.{module}.modeling_{module}"), name)
    forward = forward_with(own, monkeypatch)
    q, k, angles = random(2, 3, 5, 16), random(2, 1, 5, 16, seed=1), random(2, 5, columns // 2, seed=2)
    if module == "cohere":
        angles = angles.repeat_interleave(2, -1)
    elif module == "gpt_oss":
        angles = random(2, 5, columns, seed=2)
    else:
        angles = torch.cat([angles, angles], -1)
    expected = own(q, k, angles.cos(), angles.sin())
    found = forward(Turning(), q, q, k, angles.cos(), angles.sin())
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert found[0].grad_fn is None
    assert forward(Turning(), q, q, k, *(angles.cos(), angles.sin()), unsqueeze_dim=1)[0].equal(expected[0])


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("alone", [False, True])
def test_heads_are_where_unsqueeze_dim_says(alone: bool, heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """So it is of queries and keys, and of one of them, as Gemma 4 rotates them; gradients are the function's own."""
    own = import_module(f"transformers.models.{'gemma4.modeling_gemma4' if alone else 'llama.modeling_llama'}")
    forward = forward_with(own.apply_rotary_pos_emb, monkeypatch)
    q, k = (random(2, count, 5, 16, seed=count).transpose(1, heads).requires_grad_() for count in (3, 1))
    angles = random(2, 5, 8, seed=2).repeat(1, 1, 2)
    given = (q, *(() if alone else (k,)), angles.cos(), angles.sin())
    expected, found = (
        own.apply_rotary_pos_emb(*given, unsqueeze_dim=heads),
        forward(Turning(), q, *given, unsqueeze_dim=heads),
    )
    for one, other in zip(*((x,) if alone else x for x in (found, expected)), strict=True):
        assert torch.equal(one, other)
        (gradient,) = torch.autograd.grad(other.sin().sum(), q if other.shape == q.shape else k)
        torch.testing.assert_close(*torch.autograd.grad(one.sin().sum(), q if one.shape == q.shape else k), gradient)


@pytest.mark.parametrize("module", ["qwen2_5_vl", "inkling2"])
def test_heads_of_vision_towers_need_no_batch(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They stand before the columns, and the products are those of float32 for patches in bfloat16."""
    modeling = pytest.importorskip(f"transformers.models.{module}.modeling_{module}")
    own = modeling.apply_rotary_pos_emb_vision
    forward = forward_with(own, monkeypatch)
    q, k, angles = random(1, 5, 3, 16), random(1, 5, 3, 16, seed=1), random(5, 8, seed=2)
    angles = angles.repeat_interleave(2, -1) if module == "inkling2" else angles.repeat(1, 2)
    for heads in (slice(None), 0):
        for dtype in (torch.float32, torch.bfloat16):
            given = q[heads].to(dtype), k[heads].to(dtype), angles.cos(), angles.sin()
            found, expected = forward(Turning(), q, *given), own(*given)
            assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize(("module", "heads"), [("llama4", 2), ("deepseek_v2", 1)])
def test_a_rotation_by_complex_numbers_is_recognised(module: str, heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Angles are in float32 for heads of any dtype; no number is rounded in between."""
    own = import_module(f"transformers.models.{module}.modeling_{module}").apply_rotary_emb
    forward = forward_with(own, monkeypatch)
    angles = random(2, 5, 8, seed=2)
    for dtype in (torch.float32, torch.bfloat16):
        q, k = (random(2, count, 5, 16, seed=count).transpose(1, heads).to(dtype) for count in (3, 1))
        given = q, k, torch.polar(torch.full_like(angles, 1.5), angles)
        found, expected = forward(Turning(), q, *given), own(*given)
        torch.testing.assert_close(found, expected, rtol=torch.finfo(dtype).eps, atol=2**-22)
        assert [x.dtype for x in found] == [dtype, dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("columns", "turned"), [(16, 4), (16, 16), (15, 4)])
def test_the_last_columns_of_a_head_are_rotated(
    columns: int, turned: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DeepSeek V4 rotates those, in float32 for any dtype; heads of odd width are left to its own code."""
    own = import_module("transformers.models.deepseek_v4.modeling_deepseek_v4").apply_rotary_pos_emb
    forward = forward_with(own, monkeypatch)
    x, angles = random(2, 3, 5, columns).to(dtype).requires_grad_(), random(2, 5, turned // 2, seed=2)
    given = x, angles.cos().to(dtype), angles.sin().to(dtype)
    found, expected = forward(Turning(), *given[:1], *given), own(*given)
    assert torch.equal(found, expected) and torch.equal(found[..., :-turned], x[..., :-turned])
    gradients = [torch.autograd.grad(out.float().sin().sum(), x)[0] for out in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=2 * torch.finfo(dtype).eps, atol=2 * torch.finfo(dtype).eps)


def turned_back(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return REFERENCE.kernels.rope(q, k, cos, -sin)


def turned_twice_as_long(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return REFERENCE.kernels.rope(2 * q, k, cos, sin)


def turned_in_eight_bits(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    turned = REFERENCE.kernels.rope(q, k, cos, sin)
    return turned[0].to(torch.float8_e4m3fn).to(q.dtype), turned[1]


def raising(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    raise ValueError("no")


def renamed(queries: Tensor, keys: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return REFERENCE.kernels.rope(queries, keys, cos, sin)


@pytest.mark.parametrize("rotation", [turned_back, turned_twice_as_long, turned_in_eight_bits, raising, renamed])
def test_another_rotation_stays_as_it_is(rotation: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert forward_with(rotation, monkeypatch) is None


def test_queries_alone_are_left_to_a_function_that_takes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """The indexer of Qwen4-Exp calls the function of its attention with queries only."""
    q, cos, sin = random(2, 3, 5, 16), random(2, 5, 16, seed=1), random(2, 5, 16, seed=2)

    def optional(q: Tensor, k: Any = None, cos: Any = None, sin: Any = None) -> Any:
        turned = REFERENCE.kernels.rope(q, q if k is None else k, cos, sin)
        return turned[0] if k is None else turned

    forward = forward_with(optional, monkeypatch)
    assert forward(Turning(), q, q, None, cos=cos, sin=sin).equal(optional(q, cos=cos, sin=sin))
    assert forward(Turning(), q, q, q, cos, sin)[1].equal(optional(q, q, cos, sin)[1])


@pytest.mark.parametrize("name", ["llama", "qwen3_moe", "gemma4", "llama4"])
def test_angles_that_are_learned_get_their_gradient(name: str) -> None:
    """As the frequencies of Mistral Large 4: of q and k together or each, with norms or without, complex ones too."""
    model = tiny.model("llama").double() if name == "llama" else build(name)
    for part in [part for part in model.modules() if type(part).__name__.endswith("RotaryEmbedding")]:
        part.factor = nn.Parameter(torch.tensor(0.5, dtype=torch.float64))
        part.register_forward_hook(
            lambda part, _, angles: (
                angles * part.factor if isinstance(angles, Tensor) else tuple(angle * part.factor for angle in angles)
            )
        )
    with tiny.KeepFloat64():
        tokens, labels = batch()
        expected = step(model, tokens, labels)
        operations = place(model, REFERENCE)
        assert {"rope", "qk_norm_rope"} & operations.keys()
        assert_same(step(model, tokens, labels), expected)
    assert any(name.endswith("rotary_emb.factor") for name in expected[1])


def test_a_forward_without_a_source_stays_as_it_is() -> None:
    """A forward that was written in another process is one."""
    made: dict[str, Any] = {}
    module = ModuleType("written")
    module.__dict__["apply"] = import_module("transformers.models.llama.modeling_llama").apply_rotary_pos_emb
    exec(
        "class Made(Base):\n    def forward(self, hidden_states, q, cos): return apply(q, q, cos, cos)",
        module.__dict__ | {"Base": nn.Module},
        made,
    )
    assert attention_placement(made["Made"](), REFERENCE, {}) is None


def test_a_placed_forward_is_the_classs_in_all_but_the_rotation() -> None:
    """Errors in it name the lines of its file, and `remove` gives it back."""
    model = tiny.model("qwen3")
    attention = model.model.layers[0].self_attn
    own = inspect.unwrap(type(attention).forward)
    place(model, REFERENCE)
    placed = inspect.unwrap(attention.forward)
    assert placed.__code__.co_firstlineno == own.__code__.co_firstlineno
    assert placed.__code__.co_filename == own.__code__.co_filename
    assert placed.__globals__ is own.__globals__ and inspect.getsource(placed) == inspect.getsource(own)
    remove(model)
    assert "forward" not in vars(attention)
