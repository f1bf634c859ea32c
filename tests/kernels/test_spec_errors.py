"""Both backends refuse every mistake of every spec, with the contract's type and a message that names the argument."""

import pytest
import torch

import unsloth_fast.kernels
import unsloth_ref.kernels
from conformance.spec import ErrorCase, Spec, specs

MISTAKES = [(spec, mistake) for spec in specs().values() for mistake in spec.errors]


@pytest.mark.parametrize("kernels", [unsloth_ref.kernels, unsloth_fast.kernels], ids=["reference", "fast"])
@pytest.mark.parametrize(("spec", "mistake"), MISTAKES, ids=[f"{spec.op}-{mistake.what}" for spec, mistake in MISTAKES])
def test_a_mistake_is_refused_by_name(spec: Spec, mistake: ErrorCase, kernels: object) -> None:
    case = spec.case(3, 8)
    inputs, options = mistake.change(spec.inputs(case, torch.float32, "cpu"), {})
    with pytest.raises(mistake.raises, match=rf"^{mistake.names}: got .*; allowed: "):
        getattr(kernels, spec.op)(*inputs.values(), **options)
