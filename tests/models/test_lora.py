"""Linear layers with LoRA, compared with peft's own forward, and tensors that the backward pass recomputes."""

import weakref
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from tests import tiny
from tests.models.with_lora import CHANGES, TOKENS, adapted, disabled, merged, run, second
from unsloth_fast import FastLanguageModel, backends
from unsloth_fast.models import nf4, place
from unsloth_fast.models.recomputed import recomputable, recomputed
from unsloth_ref.types import NF4Weight

REFERENCE = backends.resolve("reference")


def assert_as_before(model: torch.nn.Module, rtol: float, dtype: torch.dtype = torch.float64) -> None:
    """Placing the reference changes only rounding."""
    with tiny.KeepFloat64() if dtype == torch.float64 else nullcontext():
        logits, gradients = run(model)
        place(model, REFERENCE)
        after, found = run(model)
    torch.testing.assert_close(after, logits, rtol=rtol, atol=rtol * logits.abs().max().item())
    assert found.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(found[name], gradient, rtol=rtol, atol=rtol * gradient.abs().max().item())


def test_layer_and_adapter_in_one_operation() -> None:
    """Seven layers in each of two blocks agree with peft in float64 up to rounding; q, k, v are one, and the MLP."""
    placed = place(adapted(), REFERENCE)
    assert (placed["lora_linear"], placed["lora_linears"], placed["lora_mlp"]) == (2, 2, 2) and "swiglu" not in placed
    assert_as_before(adapted(), 1e-12)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", ["base_layer", "lora_A.default", "lora_B.default"])
def test_a_layer_that_does_more_than_its_class_is_called(name: str, change: str) -> None:
    model = adapted()
    layer: Any = model.get_submodule("base_model.model.model.layers.1.self_attn.q_proj")
    CHANGES[change](layer.get_submodule(name))
    assert_as_before(model, 1e-12)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_weights_that_accelerate_loads_when_a_layer_is_called(family: str) -> None:
    """Norms of heads too; the weights have no memory before."""
    model = adapted(base=tiny.model(family, torch.float64))
    with torch.no_grad():
        expected = model(TOKENS).logits
        place(model, REFERENCE)
        cpu_offload(model, execution_device=torch.device("cpu"))
        assert all(parameter.is_meta for parameter in model.parameters())
        torch.testing.assert_close(model(TOKENS).logits, expected)


@pytest.mark.parametrize("change", [disabled, merged, second], ids=lambda change: change.__name__)
def test_other_states_are_left_to_peft(change: Callable[[PeftModel], None]) -> None:
    """The states are no active adapter, a merged one, and two active ones."""
    model = adapted()
    change(model)
    if change is second:
        return assert_as_before(model, 1e-12)
    with torch.no_grad(), tiny.KeepFloat64():
        expected = model(TOKENS).logits
        place(model, REFERENCE)
        torch.testing.assert_close(model(TOKENS).logits, expected, rtol=1e-12, atol=1e-12)
    return None


@pytest.mark.parametrize("options", [{"lora_dropout": 0.3}, {"use_dora": True}, {"lora_bias": True}], ids=str)
def test_other_adapters_are_left_to_peft(options: dict[str, Any]) -> None:
    """The result is peft's with the same random numbers."""
    assert_as_before(adapted(**options).train(), 1e-12)


def test_autocast_computes_in_its_dtype_from_float32_adapters() -> None:
    """As in peft, products are bfloat16, and gradients of float32 weights float32, except for rounding."""
    model = adapted(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        logits, gradients = run(model)
        place(model, REFERENCE)
        after, found = run(model)
    assert after.dtype == torch.bfloat16
    assert {gradient.dtype for gradient in found.values()} == {torch.float32}
    # About ten roundings to eight bits: a few percent of the largest entry, and twice as much in the backward pass.
    torch.testing.assert_close(after, logits, rtol=0, atol=0.05 * logits.abs().max().item())
    for name, gradient in gradients.items():
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=0.1 * gradient.abs().max().item(), msg=name)


@pytest.mark.parametrize("training", [True, False])
def test_four_bits(tmp_path: Any, training: bool) -> None:
    """In evaluation bitsandbytes computes the layer; the adapter is added without casting the sum."""
    assert_as_before(four_bits(tmp_path).train(training), 1e-5, torch.float32)


def counted_weights(model: PeftModel) -> list[type]:
    """Place the reference; the types of the weights that lora_linear, lora_linears and lora_mlp get from now on."""
    seen: list[type] = []

    def counted(name: str) -> Callable[..., Any]:
        def call(x: Tensor, weight: Any, *others: Any, **options: Any) -> Any:
            seen.extend([type(weight)] if name == "lora_linear" else map(type, weight))
            return getattr(REFERENCE.kernels, name)(x, weight, *others, **options)

        return call

    operations = {name: counted(name) for name in ("lora_linear", "lora_linears", "lora_mlp")}
    kernels = SimpleNamespace(**vars(REFERENCE.kernels) | operations)
    place(model, replace(REFERENCE, kernels=kernels))
    return seen


def test_a_trained_layer_in_4_bits_is_one_operation_which_keeps_no_wide_weight(tmp_path: Path) -> None:
    model = four_bits(tmp_path)
    names, seen, kept = list(model.state_dict()), counted_weights(model), list[Tensor]()
    model.eval()(TOKENS)
    assert not seen
    with saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        loss = model.train()(TOKENS, labels=TOKENS).loss
    assert seen == [NF4Weight] * 14
    shapes = {tuple(module.weight.quant_state.shape) for module in model.modules() if isinstance(module, Linear4bit)}
    assert not shapes & {tuple(tensor.shape) for tensor in kept if tensor.is_floating_point()}
    loss.backward()
    assert list(model.state_dict()) == names


def fp4(layer: Any) -> None:
    layer.weight.quant_state.quant_type = "fp4"


def another_code(layer: Any) -> None:
    layer.weight.quant_state.state2.blocksize = 128


def in_another_order(layer: Any) -> None:
    layer.weight.quant_state.packing_format_for_cpu = True


def hooked(layer: Any) -> None:
    layer.register_forward_hook(lambda *_: None)


def without_memory(layer: Any) -> None:
    state = layer.weight.quant_state
    layer.weight = torch.nn.Parameter(layer.weight.data.to("meta"), requires_grad=False)
    layer.weight.quant_state = state


DEQUANTIZE = REFERENCE.kernels.nf4_dequantize


@pytest.mark.parametrize("change", [fp4, another_code, in_another_order, hooked, without_memory])
def test_a_weight_in_another_form_is_left_to_bitsandbytes(change: Callable[[Any], None]) -> None:
    layer = Linear4bit(64, 32, quant_type="nf4").to("cpu")
    assert nf4.is_known(layer, DEQUANTIZE) and nf4.weight_of(layer) is not None
    change(layer)
    assert not nf4.is_known(layer, DEQUANTIZE) or change is hooked
    assert nf4.weight_of(layer) is None


@pytest.mark.parametrize("nested", [True, False])
def test_a_known_weight_has_the_bits_of_bitsandbytes(nested: bool) -> None:
    """A dequantisation that differs or fails, as of a kernel that is compiled wrong, is not used."""
    layer = Linear4bit(300, 70, compress_statistics=nested, quant_type="nf4").to("cpu")
    assert nf4.is_known(layer, DEQUANTIZE)
    weight = nf4.weight_of(layer)
    assert weight is not None
    found = REFERENCE.kernels.nf4_dequantize(*weight[:5], shape=weight.shape, dtype=torch.float32)
    assert torch.equal(found, dequantize_4bit(layer.weight.data, layer.weight.quant_state))

    def differs(*arguments: Any, **options: Any) -> Tensor:
        return REFERENCE.kernels.nf4_dequantize(*arguments, **options) * (1 + 2**-22)

    def does_not_run(*arguments: Any, **options: Any) -> Tensor:
        raise RuntimeError("PassManager::run failed")

    for wrong in (differs, does_not_run):
        assert not nf4.is_known(layer, wrong)
        assert nf4.weight_of(layer) is None


def four_bits(folder: Path) -> PeftModel:
    """A tiny model in 4 bits with LoRA on every linear layer."""
    model, _ = FastLanguageModel.from_pretrained(
        tiny.folder(folder), load_in_4bit=True, dtype=torch.float32, device_map="cpu", backend="reference"
    )
    return adapted(base=model)


@pytest.mark.parametrize("bits", [32, 4])
def test_every_lora_layer_is_placed(tmp_path: Path, bits: int) -> None:
    """All 14 have peft's class for the layer below; a class that peft moves or renames would be slow, not wrong."""
    model = adapted(torch.float32) if bits == 32 else four_bits(tmp_path)
    place(model, REFERENCE)
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    assert len(layers) == 14
    assert {type(layer).__name__ for layer in layers} == {"Linear" if bits == 32 else "Linear4bit"}
    assert all("forward" in vars(layer) for layer in layers)


@pytest.fixture
def sources() -> list[Tensor]:
    """x, and two weights that tensors made from x are multiplied with."""
    torch.manual_seed(0)
    return [torch.randn(shape, requires_grad=True) for shape in ((3, 5), (5, 4), (5, 4))]


def doubled(x: Tensor, calls: list[None] | None = None) -> Tensor:
    """A recomputable function of x; recomputing it appends to `calls`."""

    def recompute() -> Tensor:
        (calls if calls is not None else []).append(None)
        return x.detach().sigmoid() * 2

    return recomputable(x.sigmoid() * 2, recompute)


def test_a_recomputable_tensor_is_not_saved(sources: list[Tensor]) -> None:
    """Two products save only its shape and their other factors; one recomputation serves both, to the same bits."""
    x, left, right = sources
    made = doubled(x)
    expected = torch.autograd.grad((made @ left + made @ right).sum(), sources)
    calls: list[None] = []
    made = doubled(x, calls)
    with recomputed(made):
        products = made.view(3, 5) @ left, made @ right
    assert all(isinstance(product.grad_fn._raw_saved_self.data, torch.Size) for product in products)  # type: ignore
    for passes in (1, 2):
        found = torch.autograd.grad(sum(products).sum(), sources, retain_graph=True)  # type: ignore
        assert len(calls) == passes
        assert all(map(torch.equal, found, expected))


def test_other_hooks_on_saved_tensors_get_the_tensors(sources: list[Tensor]) -> None:
    """A checkpoint or offloading decides what to keep."""
    x, left, _ = sources
    made = doubled(x)
    seen: list[Tensor] = []
    with saved_tensors_hooks(lambda tensor: seen.append(tensor) or tensor, lambda tensor: tensor), recomputed(made):
        (made @ left).sum().backward()
    assert any(tensor.data_ptr() == made.data_ptr() for tensor in seen)


@pytest.mark.parametrize("modified", [False, True])
def test_a_tensor_that_cannot_be_recomputed_is_saved(sources: list[Tensor], modified: bool) -> None:
    """It is not recomputable, or was modified afterwards: recomputing would undo the change."""
    x, left, _ = sources
    made = doubled(x).mul_(3) if modified else x.sigmoid() * 2
    with recomputed(made):
        product = made @ left
    assert torch.equal(product.grad_fn._saved_self, made)  # type: ignore


def test_a_saved_result_is_freed_with_its_operation(sources: list[Tensor]) -> None:
    """Without a backward pass, too; its gradients are those without the context."""
    x, left, _ = sources
    made = doubled(x)
    with recomputed(made):
        result = (made @ left).exp()  # saves its own result
    (found,) = torch.autograd.grad(result.sum(), left, retain_graph=True)
    assert torch.equal(found, torch.autograd.grad((doubled(x) @ left).exp().sum(), left)[0])
    saved = weakref.ref(result)
    del result
    assert saved() is None


def test_a_sparse_tensor_is_saved(sources: list[Tensor]) -> None:
    """Some adapters of peft, such as SHiRA, make a sparse tensor, which has no address."""
    x, left, right = sources
    made = doubled(x)
    with recomputed(made):
        product = made @ torch.sparse.mm(left.detach().to_sparse(), right.T)
    found = torch.autograd.grad(product.sum(), [x, right])
    expected = torch.autograd.grad((doubled(x) @ (left.detach() @ right.T)).sum(), [x, right])
    torch.testing.assert_close(found, expected)


def test_norms_and_activations_are_recomputed() -> None:
    """One recomputation per backward pass serves all projections; the first norm, with a frozen input, needs none.

    An MLP with a layer without LoRA calls its activation.
    """
    calls: Counter[str] = Counter()

    def counted(name: str) -> Callable[..., Tensor]:
        def call(*arguments: Any, **options: Any) -> Tensor:
            calls[name] += 1
            return getattr(REFERENCE.kernels, name)(*arguments, **options)

        return call

    names = ("rms_norm", "swiglu")
    kernels = SimpleNamespace(**vars(REFERENCE.kernels) | {name: counted(name) for name in names})
    model = adapted(exclude_modules=["up_proj"])
    place(model, replace(REFERENCE, kernels=kernels))
    layers = model.config.num_hidden_layers
    loss = model(TOKENS).logits.sum()
    assert calls == {"rms_norm": 2 * layers + 1, "swiglu": layers}
    loss.backward()
    assert calls == {"rms_norm": 4 * layers, "swiglu": 2 * layers}
