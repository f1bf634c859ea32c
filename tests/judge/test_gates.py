"""Each gate passes an error just below its bound and fails one just above; the tests compute the bounds themselves."""

import math

import pytest
import torch
from torch import Tensor

from conformance.case import DTYPES
from conformance.tolerances.bounds import Bound, Terms
from conformance.tolerances.gates import (
    G3_BIAS,
    G3_ELEMENTS,
    ErrorModel,
    Failure,
    judge,
)
from conformance.tolerances.ties import TIES
from unsloth_ref.accuracy import G2_ELEMENTS, G2_MAX, G2_RMS, unit_roundoff

HALF = torch.float16
MARGIN = 0.01  # relative to a bound: much larger than the float64 rounding error of the bound


def model(r: Tensor, *, terms: Tensor | None = None, roundings: int = 0, truncates: bool = False) -> ErrorModel:
    """The error model of a truth whose elements do not cancel."""
    return ErrorModel(Terms(r.abs() if terms is None else terms), r.numel(), roundings, truncates=truncates)


def bound(dtype: torch.dtype, roundings: int = 0, units: int = 1) -> float:
    """The bound of G1 relative to |r|, for two elements with S = |r|."""
    unit = units * torch.finfo(dtype).eps / 2
    return unit + roundings * unit * (1 + unit) + 2 * 2.0**-24


def off_by(error: float, dtype: torch.dtype, roundings: int = 0, truncates: bool = False) -> float:
    """The budget used by two results: an exact one, and one with this relative error."""
    y = torch.tensor([2.0, 1.5], dtype=dtype)
    r = y.double() / torch.tensor([1.0, 1 + error], dtype=torch.float64)
    return judge("output y", y, r, y, model(r, roundings=roundings, truncates=truncates))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("roundings", [0, 2])
def test_g1_just_below_and_just_above(dtype: torch.dtype, roundings: int) -> None:
    most = bound(dtype, roundings)
    # `tiny`, 6e-8 in float16, is below 1e-4 of the bound here.
    assert off_by(most * (1 - MARGIN), dtype, roundings) == pytest.approx(1 - MARGIN, rel=1e-4)
    with pytest.raises(Failure, match=r"gate G1 used 1\.01 of the budget in output y at index \(1,\)"):
        off_by(most * (1 + MARGIN), dtype, roundings)


def test_g1_requires_the_exact_value_where_s_is_0() -> None:
    y, nothing = torch.tensor([0.0, 1.0]), torch.tensor([0.0, 1.0], dtype=torch.float64)
    judge("loss", y, nothing, y, model(nothing))
    least = torch.tensor([torch.finfo(torch.float32).tiny, 1.0])
    with pytest.raises(Failure, match=r"gate G1 used 1\.8e\+308 .* at index \(0,\)"):
        judge("loss", least, nothing, y, model(nothing))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_g1_allows_the_last_rounding_to_0_where_s_is_lost_in_float64_too(dtype: torch.dtype) -> None:
    r, y = torch.tensor([-1.1e-321, 1e-45, 1.0], dtype=torch.float64), torch.tensor([0.0, 0.0, 1.0], dtype=dtype)
    assert judge("gradient", y, r, y, model(r, terms=torch.zeros_like(r))) < 1


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("truncates", [False, True])
def test_truncation_is_allowed_only_in_bfloat16_in_the_interpreter(dtype: torch.dtype, truncates: bool) -> None:
    error = bound(dtype, units=2) * (1 - MARGIN)
    if truncates and dtype == torch.bfloat16:
        assert off_by(error, dtype, truncates=truncates) <= 1
    else:
        with pytest.raises(Failure, match="gate G1"):
            off_by(error, dtype, truncates=truncates)


TWO = 2 * unit_roundoff(HALF)
ROWS = (1 + torch.arange(2 * G2_ELEMENTS, dtype=torch.float64) / 1024).view(2, -1)  # exact in HALF, all different
BOTH = TWO * torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(G2_ELEMENTS // 2)


def g2(error: Tensor, peer_error: Tensor) -> float:
    """The budget used by these errors compared with a peer's; the truth is about 1, and G1 allows any of them."""
    r = 1 + torch.arange(len(error), dtype=torch.float64) * 2**-20
    float32_alone = ErrorModel(Terms(1000 * r), 2**30, roundings=0)
    return judge("output y", (r + error).float(), r, (r + peer_error).float(), float32_alone)


def test_g2_root_mean_square() -> None:
    peer = torch.full((G2_ELEMENTS + 1,), 2.0**-10, dtype=torch.float64)  # 8 times its floor, 2000 float32 roundings
    assert 0.95 < g2(peer * G2_RMS * (1 - MARGIN), peer) <= 1
    with pytest.raises(Failure, match=r"gate G2 used 1\.0.* root mean square"):
        g2(peer * G2_RMS * (1 + MARGIN), peer)


def test_g2_largest() -> None:
    peer = torch.full((G2_ELEMENTS + 1,), 2.0**-10, dtype=torch.float64)
    one = torch.zeros_like(peer)
    one[7] = peer[7] * G2_MAX
    assert 0.95 < g2(one * (1 - MARGIN), peer) <= 1
    with pytest.raises(Failure, match=r"gate G2 used 1\.0.* largest"):
        g2(one * (1 + MARGIN), peer)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_g2_allows_the_roundings_of_terms_that_the_peer_does_not_make(dtype: torch.dtype) -> None:
    """Autograd rounds factors and products of a sum of products; the peer rounds the sum alone."""
    x, scale = torch.randn(2, 40, 4096, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scale = scale.to(dtype).double()
    terms, r = x * scale, (x * scale).sum(0)
    y = (x.to(dtype).double() * scale).to(dtype).double().sum(0).to(dtype)

    def used(y: Tensor, of: Terms) -> float:
        return judge("sum", y, r, r.to(dtype), ErrorModel(of, terms.numel(), roundings=2))

    allowed = Terms(terms.abs()).over_rows()
    assert 0.6 < used(y, allowed) < 0.75  # all roundings that the floor holds, of 1.5
    with pytest.raises(Failure, match=r"gate G2 used 1\.1.* root mean square"):
        used(y, Terms(allowed.size, root=torch.zeros_like(r)))
    partial = torch.zeros(4096, dtype=dtype)
    for row in terms:
        partial = (partial + row).to(dtype)  # adding up in the dtype rounds more than terms
    with pytest.raises(Failure, match="gate G2"):
        used(partial, Terms(2 * allowed.size, allowed.root))  # G1 finds some of them


def test_g1_allows_a_bound_and_the_last_rounding() -> None:
    y = torch.tensor([2.0, 1.5], dtype=HALF)
    for share, holds in ((1 - MARGIN, True), (1 + MARGIN, False)):
        r = y.double() / torch.tensor([1.0, 1 + share * 1e-2], dtype=torch.float64)
        rounding = torch.tensor([0.0, unit_roundoff(HALF) * float(r[1])])
        bound = Bound(r, torch.tensor([0.0, 1e-2]) * r - rounding, torch.zeros(2))
        if holds:
            assert judge("y", y, r, y, ErrorModel(bound, 2, roundings=0)) == pytest.approx(share, rel=1e-3)
        else:
            with pytest.raises(Failure, match="gate G1"):
                judge("y", y, r, y, ErrorModel(bound, 2, roundings=0))


def test_g2_needs_enough_elements() -> None:
    peer = torch.full((G2_ELEMENTS - 1,), 2.0**-10, dtype=torch.float64)
    assert g2(peer * 2 * G2_RMS, peer) <= 1


def test_g2_allows_a_row_the_factor_that_roundings_explain() -> None:
    def shared(roundings: int) -> ErrorModel:
        """Roundings of whole rows, not of elements."""
        return ErrorModel(Terms(ROWS, root=torch.zeros_like(ROWS)), ROWS.numel(), roundings)

    moved = torch.stack([ROWS[0] + TWO, ROWS[1] - TWO]).to(HALF)
    judge("output y", moved, ROWS, ROWS.to(HALF), shared(2))
    for y, roundings in ((moved, 1), ((ROWS + BOTH).to(HALF), 2)):  # too large a factor; both signs in each row
        with pytest.raises(Failure, match="gate G2"):
            judge("output y", y, ROWS, ROWS.to(HALF), shared(roundings))


def test_g2_allows_a_row_the_factor_that_a_bound_explains() -> None:
    def used(y: Tensor, share: float) -> float:
        """Of a bound whose errors may be large, and are about `share` u r at the root of their mean square."""
        unit = share * unit_roundoff(HALF)
        bound = Bound(ROWS, ROWS.abs() / 8, (unit * ROWS).square())
        return judge("output y", y, ROWS, ROWS.to(HALF), ErrorModel(bound, ROWS.numel(), roundings=0))

    moved = torch.stack([ROWS[0] + TWO, ROWS[1] - TWO]).to(HALF)
    assert used(moved, 1.0) <= 1
    for y, share in ((moved, 0.25), ((ROWS + BOTH).to(HALF), 1.0)):
        with pytest.raises(Failure, match="gate G2"):
            used(y, share)


def test_g2_subnormal_numbers_have_the_roundings_of_the_smallest_normal_one() -> None:
    """Two numbers are rounded, then their sum is; the peer rounds the sum alone."""
    generator = torch.Generator().manual_seed(0)
    one, other = 4e-7 * torch.randn(2, 4096, generator=generator, dtype=torch.float64)
    step = torch.finfo(HALF).smallest_normal * torch.finfo(HALF).eps
    y, r = (one.to(HALF) + other.to(HALF)).to(HALF), one + other
    size = step * torch.ones_like(r)

    def used(y: Tensor) -> float:
        bound = Bound(r, size, 2 * size.square() / 12)
        return judge("y", y, r, r.to(HALF), ErrorModel(bound, 2, roundings=0))

    assert used(y) <= 1
    with pytest.raises(Failure, match="gate G2"):
        used(y + torch.full_like(y, step) * r.sign().to(HALF))  # each one step too large


def test_g2_compares_with_a_peer_that_has_a_factor_of_its_own() -> None:
    y = (ROWS + BOTH).to(HALF)
    assert judge("output y", y, ROWS, (ROWS + TWO).to(HALF), model(ROWS, roundings=2)) <= 1
    with pytest.raises(Failure, match="gate G2"):
        judge("output y", y, ROWS, ROWS.to(HALF), model(ROWS, roundings=2))


@pytest.mark.parametrize(("different", "judged"), [(G2_ELEMENTS, True), (G2_ELEMENTS - 1, False)])
def test_g2_needs_elements_that_differ(different: int, judged: bool) -> None:
    """A value that repeats has one rounding error, however often it repeats."""
    r = (1 + torch.arange(different, dtype=torch.float64) / 1024).repeat(G2_ELEMENTS)
    off = (r + 2.0**-10).float()
    if judged:
        with pytest.raises(Failure, match="gate G2"):
            judge("output y", off, r, r.float(), ErrorModel(Terms(1000 * r), 2**30, roundings=0))
    else:
        judge("output y", off, r, r.float(), ErrorModel(Terms(1000 * r), 2**30, roundings=0))
    noisy = off + 1e-4 * torch.rand(r.shape, generator=torch.Generator().manual_seed(0))
    with pytest.raises(Failure, match="gate G2"):
        judge("output y", noisy, r, r.float(), ErrorModel(Terms(1000 * r), 2**30, roundings=0))


def rounded_up(count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Results, truth and peer: truths halfway between float16 numbers, the first `count` of each binade rounded up.

    All others are rounded down; the peer rounds up and down in turn. All results differ.
    """
    steps = torch.arange(0, 1024, 2, dtype=torch.float64)
    up = torch.arange(512) < count
    y, r, p = ((1024 + steps + part) / 1024 for part in (up, 0.5, torch.arange(512) % 2))
    y, r, p = (torch.cat([values, 2 * values]) for values in (y, r, p))
    assert r.numel() >= G3_ELEMENTS
    return y.to(HALF), r, p.to(HALF)


def test_g3_biased_results() -> None:
    def bias(y: Tensor, r: Tensor) -> float:
        return float(((y.double() - r) / (unit_roundoff(HALF) * r)).mean().abs())

    def holds(count: int) -> bool:
        y, r, p = rounded_up(count)
        return bias(y, r) <= G3_BIAS + bias(p, r)

    half = int(512 * (math.sqrt(2) - 1))  # where the errors of those rounded up and down cancel, weighted by 1 / r
    last = max(count for count in range(half, 512) if holds(count))
    y, r, p = rounded_up(last)
    assert judge("y", y, r, p, model(r)) <= 1
    y, r, p = rounded_up(last + 1)
    with pytest.raises(Failure, match=r"gate G3 .*biased to one side"):
        judge("y", y, r, p, model(r))
    judge("y", y, r, p, ErrorModel(Terms(r), r.numel(), 0, random=False))  # elements that are not random may be biased


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rule", ["away from 0", "towards 0", "up", "down", "to the odd number"])
def test_g3_another_rule_at_ties(dtype: torch.dtype, rule: str) -> None:
    steps = torch.arange(40) * torch.finfo(dtype).eps
    below = torch.cat([1 + steps, 2 + 2 * steps])
    above = torch.cat([1 + steps + steps[1], 2 + 2 * (steps + steps[1])])
    sign = torch.tensor([1.0, 1.0, -1.0, -1.0]).repeat(20)  # no matter which of two numbers is even
    r = sign * (below.double() + above) / 2
    numbers = {
        "away from 0": above * sign,
        "towards 0": below * sign,
        "up": torch.where(r > 0, above, -below),
        "down": torch.where(r > 0, below, -above),
    }
    numbers["to the odd number"] = (above + below) * sign - r.to(dtype).float()
    peer = r.to(dtype)
    assert judge("y", peer, r, peer, model(r)) <= 1
    with pytest.raises(Failure, match=f"gate G3: y rounds numbers half-way between two {rule}, should"):
        judge("y", numbers[rule].to(dtype), r, peer, model(r))
    few = slice(TIES - 1)
    judge("y", numbers[rule].to(dtype)[few], r[few], peer[few], model(r[few]))
    mixed = torch.where(torch.arange(80) % 7 == 0, peer, numbers[rule].to(dtype))
    assert judge("y", mixed, r, peer, model(r)) <= 1  # moved by roundings before the last one


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_g0_special_values_are_where_the_truth_has_them(value: float) -> None:
    y, r = torch.tensor([1.0, value]), torch.tensor([1.0, value], dtype=torch.float64)
    assert judge("y", y, r, y, model(r.nan_to_num())) == 0
    for wrong, truth in ((y, r.new_ones(2)), (torch.ones(2), r)):
        with pytest.raises(Failure, match=r"gate G0: y is (nan|inf|-inf|1.0) at index \(1,\), should be"):
            judge("y", wrong, truth, truth.float(), model(truth.nan_to_num()))


def test_g0_allows_the_special_values_of_plain_pytorch_in_the_same_dtype() -> None:
    r, p = torch.tensor([1.0, -math.inf], dtype=torch.float64), torch.tensor([1.0, math.nan])
    for y in (p, r.float()):
        assert judge("y", y, r, p, model(r.nan_to_num(neginf=0.0))) == 0
    with pytest.raises(Failure, match="gate G0"):
        judge("y", torch.tensor([1.0, math.inf]), r, p, model(r.nan_to_num(neginf=0.0)))


def test_g0_overflow_of_the_dtype_is_infinite_in_the_truth_too() -> None:
    r = torch.tensor([1e6], dtype=torch.float64)
    assert judge("y", torch.tensor([math.inf], dtype=HALF), r, r.to(HALF), model(r)) == 0
    with pytest.raises(Failure, match="gate G"):
        judge("y", torch.tensor([65504.0], dtype=HALF), r, r.to(HALF), model(r))


@pytest.mark.parametrize(("seen", "truth"), [(-math.inf, math.inf), (math.nan, 1e6), (-math.inf, 1e6)])
def test_g0_distinguishes_infinities_and_nan(seen: float, truth: float) -> None:
    y, r = torch.tensor([1.0, seen], dtype=HALF), torch.tensor([1.0, truth], dtype=torch.float64)
    with pytest.raises(Failure, match="gate G0"):
        judge("y", y, r, r.to(HALF), model(r.nan_to_num(posinf=0.0)))


@pytest.mark.parametrize(("seen", "peer"), [(-math.inf, math.nan), (math.nan, math.inf), (math.inf, -math.inf)])
def test_g0_an_intermediate_that_overflows_may_become_any_infinity_or_nan(seen: float, peer: float) -> None:
    """As 700 = (70000 - 69300) in float16, where each of the two is infinite."""
    y, p = torch.tensor([1.0, seen], dtype=HALF), torch.tensor([1.0, peer], dtype=HALF)
    r = torch.tensor([1.0, 700.0], dtype=torch.float64)
    assert judge("y", y, r, p, model(r)) == 0
    for wrong, other in ((y, r.to(HALF)), (torch.tensor([1.0, 600.0], dtype=HALF), p)):  # the peer's does not; a number
        with pytest.raises(Failure, match="gate G"):
            judge("y", wrong, r, other, model(r))


def test_g0_shape_and_dtype() -> None:
    r = torch.ones(2, dtype=torch.float64)
    with pytest.raises(Failure, match=r"gate G0: y has shape \[2, 1\], should be \[2\]"):
        judge("y", torch.ones(2, 1), r, torch.ones(2), model(r))
    with pytest.raises(Failure, match=r"gate G0: y has dtype torch.float32, should be torch.float16"):
        judge("y", torch.ones(2), r, torch.ones(2, dtype=HALF), model(r))


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
def test_g0_a_float32_result_has_the_digits_of_float32(narrow: torch.dtype) -> None:
    r = torch.randn(64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    loose = ErrorModel(Terms(100 * r.abs()), r.numel(), roundings=2**16)
    few = r.float()
    few[16:] = few[16:].to(narrow).float()
    for y, peer in ((r.float(), r.float()), (few.to(narrow).float(), few.to(narrow).float()), (few, few)):
        judge("gradient of lora_a", y, r, peer, loose)
    judge("gradient of lora_a", r.to(narrow), r, r.to(narrow), loose)
    with pytest.raises(Failure, match=f"gate G0: gradient of lora_a was rounded to {narrow}, should be torch.float32"):
        judge("gradient of lora_a", r.to(narrow).float(), r, r.float(), loose)
    exact = r.to(narrow).double()
    judge("gradient of lora_a", exact.float(), exact, exact.float() * (1 + 2**-23), model(exact))


def test_g0_few_values_that_repeat_have_16_bits_by_chance() -> None:
    r = torch.tensor([0.28296], dtype=torch.float64).expand(64)
    y = torch.tensor([0.16796875]).expand(64)
    assert judge("gradient of lora_b", y, r, r.float(), ErrorModel(Terms(r.abs()), 64, roundings=2**23)) <= 1


def test_g0_terms_that_cancel_to_zero_have_no_digits() -> None:
    """The gradient of a softmax of equal numbers is 0 in one formula, noise far below its terms in another."""
    noise = 1e-17 * torch.randn(64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y, peer = torch.zeros(64), noise.float() * 1e9
    assert judge("gradient of x", y, noise, peer, model(noise, terms=torch.ones_like(noise), roundings=1)) <= 1
