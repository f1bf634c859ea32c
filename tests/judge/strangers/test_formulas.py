"""A right kernel may have another formula than the definition; where the two differ most, wrong ones still fail."""

import pytest
import torch

from conformance import backends
from conformance.case import DTYPES
from conformance.operations import Source, specs
from conformance.properties import PROPERTIES
from conformance.running.search import reproduce
from conformance.trial import Trial

HERE = "tests.judge.strangers.formulas"
EXAMPLES = {
    "log_sum_exp": "x=randn(64,128)",
    "softmax": "x=randn(R=64,C=128)",
    "highest": "x=randn(64,128)",
    "layer": "x=randn(64,128)",
    "policy_loss": "logp=randn(B=8,T=16) old=randn(B,T) advantage=randn(B)",
    "rows_of": "weight=randn(V=50,H=32) index=randint(V,T=20)",
    "squared_sums": "logits=randn(64,128)",
    "contrast": "a=randn(N=8,D=16) b=randn(N,D)",
    "decayed": "x=randn(T=9,H=6) rate=randn(H)",
    "sums_in_float64": "x=randn(R=16,C=12,dtype=float64) y=randn(C,dtype=float64)",
    "attention": "q=randn(B=2,N=2,S=16,D=8) k=randn(B,N,S,D) v=randn(B,N,S,D)",
    "distance": "x=randn(R=16,C=32) y=randn(R,C)",
    "enlarged": "x=randn(B=2,C=3,L=9) scale=3",
}
FAR = ("special_values", "", "float32 float16 bfloat16")
NAN = ("special_values", "B=1 T=33 fill=tiny", "float32 bfloat16")
LARGE = ("checkpoint", "B=8 T=191 fill=outlier seed=3", "float32")
CASES = {  # by operation: property, case and dtypes; right kernels and wrong ones
    "log_sum_exp": [(FAR, ["from_the_lowest", "in_powers_of_2"], ["from_1e4"])],
    "softmax": [
        (FAR, ["by_the_logarithm"], []),
        (("special_values", "", "float32 bfloat16"), [], ["from_1e9"]),
        (("value", "R=10 C=200 fill=outlier seed=1", "float32"), ["by_the_logarithm"], []),
    ],
    "highest": [(FAR, ["by_sorting"], ["of_a_padded_row"])],
    "layer": [(FAR, ["by_moments"], [])],
    "policy_loss": [
        (NAN, ["by_comparing"], ["of_numbers"]),
        (LARGE, ["by_comparing"], ["of_small_ratios"]),
        (("one_at_a_time", "B=5 T=130 fill=outlier seed=1", "float32 bfloat16"), ["by_comparing"], ["of_small_ratios"]),
    ],
    "rows_of": [
        (("gradients", "V=1 H=3 T=4097 fill=lowest", "float16 bfloat16"), ["in_reverse"], []),
        (("gradients", "V=5 H=3 T=130", "float32 float16 bfloat16"), ["in_reverse"], ["but_a_gradient"]),
    ],
    "squared_sums": [((*FAR[:2], "float32 bfloat16"), ["in_powers_of_2"], ["from_1e4"])],
    "contrast": [(("value", "N=1 D=160 fill=ones seed=3", "float32"), ["of_pairs"], ["in_bfloat16"])],
    "decayed": [(("special_values", "T=5 H=7", "float32"), ["in_one_product"], [])],
    "sums_in_float64": [(("value", "R=40 C=9", "float32"), ["by_a_product"], ["by_float32"])],
    "attention": [
        (("layouts", "B=1 N=1 S=1 D=2048 fill=ones seed=1", "float32"), ["of_torch"], ["without_a_mean"]),
        (("extents", "B=1 N=3 S=3 D=8191", "float32"), ["of_torch"], ["without_a_mean"]),
    ],
    "distance": [
        (("one_at_a_time", f"R={rows} C={columns} fill=zeros", "float32 bfloat16"), ["by_comparing"], ["by_a_root"])
        for rows, columns in ((5, 130), (1, 1))
    ],
    "enlarged": [(("gradients", "B=3 C=2 L=511 scale=3", "float32"), ["by_places"], ["from_the_corner"])],
}  # fmt: skip
ALL = [
    (op, kernel, verdict, *how)
    for op, rows in CASES.items()
    for how, right, wrong in rows
    for verdict, kernels in (("pass", right), ("fail", wrong))
    for kernel in kernels
] + [("log_sum_exp", "from_1e30", "fail", "special_values", "", "float32 bfloat16")]


@pytest.mark.skipif(torch.cuda.is_available(), reason="judges on the CPU, in this process")
@pytest.mark.parametrize(("op", "kernel", "verdict", "name", "sizes", "dtypes"), ALL)
def test_another_formula(op: str, kernel: str, verdict: str, name: str, sizes: str, dtypes: str) -> None:
    source = Source(f"{HERE}:{op}", EXAMPLES[op])
    (spec,) = specs(source).values()
    function = backends.load(f"{HERE}:{op}_{kernel}", "cpu", source).functions[op]
    case = spec.parse(sizes) if sizes else spec.case(5, 33)
    for dtype in dtypes.split():
        found = reproduce(Trial(spec, function, DTYPES[dtype], "cpu"), PROPERTIES[name], case, dtype)
        assert found.verdict == verdict, f"{dtype}: {found.message}"
