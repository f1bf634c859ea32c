"""An example that does not fit its reference, or a reference that cannot be judged, is refused in one line."""

import pytest

from conformance.declarations import SpecError
from conformance.operations import Source, specs

HERE = "tests.judge.strangers"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (Source(f"{HERE}.references:tempered_softmax"), "needs --example"),
        (
            Source(f"{HERE}.references:tempered_softmax", "temperature=2.0"),
            "x is missing, which tempered_softmax needs",
        ),
        (
            Source(f"{HERE}.references:tempered_softmax", "x=randn(3,4) heat=2.0"),
            "has no argument heat; it has x, temp",
        ),
        (
            Source(f"{HERE}.references:group_norm", "x=randn(2,8) groups=3 weight=randn(8)"),
            "raised RuntimeError: Expected",
        ),
        (Source(f"{HERE}.references:group_norms", "x=randn(2,8)"), "cannot be imported"),
        (Source("torch.nn.functional:gelu", "input=randn(2,8)"), "unknown (ValueError: no signature"),
        (Source("torch.nn:Linear", "input=randn(2,8)"), "unknown (TypeError"),
        (
            Source(f"{HERE}.references:means_of_parts", "x=randn(T=16,H=8) starts=randint(T,S=5)"),
            "starts are not sorted, on the example's sizes and options with drawn elements",
        ),
        (Source(f"{HERE}.references:kl_divergence", "log_p=randn(2,8) q=randn(2,8)", rows=("q",)), "has no such rows"),
        (
            Source(f"{HERE}.references:scaled_add_", "x=randn(2) y=randn(2)", in_place=("z",)),
            "--in-place: got z; allowed",
        ),
        (Source(f"{HERE}.references:top_k_gate", "logits=randn(4,8) k=2", grads=("k",)), "--grads: got k; allowed"),
        (Source(f"{HERE}.references:scaled_add_", "x=randn(2) y=randn(2)"), "changes x; allowed: only what --in-place"),
        (Source(f"{HERE}.references:noisy", "x=randn(2,8)"), "gives other results in a second call"),
        (Source(f"{HERE}.references:spectrum", "x=randn(2,8)"), "returned a tensor of torch.complex64; allowed: dense"),
        (Source(f"{HERE}.references:heads", "x=randn(2,3,4) count=[1]|[2]"), "got several values of count; allowed"),
        (Source(f"{HERE}.references:tempered_softmax", "x=randn(0,4)"), "got no tensor with an element; allowed"),
        (Source(f"{HERE}.references:tempered_softmax", "x=randn(2000000000,2000000)"), "its tensors cannot be made"),
    ],
)
def test_an_example_that_does_not_fit_is_refused(source: Source, message: str) -> None:
    with pytest.raises(SpecError) as refused:
        specs(source)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)
