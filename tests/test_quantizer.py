"""The quantizer against formulas written out by hand, against an independent implementation, and against its own definition."""

import re

import numpy as np
import pytest
import scipy.linalg
import torch
import torch._inductor.config as inductor
from hypothesis import given, settings
from hypothesis import strategies as st
from shared_data import DATA, needs

from questctl.errors import UsageError
from questctl.posttraining.probe import mask_of
from questctl.quant import Quantizer, QuantSpec, make_quantizer
from questctl.quant.quantizer import _next_above

GOLDEN = DATA / "golden_quantizers.npz"
GRIDS = ["int1", "int2", "int3", "int4", "int8", "sint4", "ternary", "fp4", "fp8", "lloyd2", "lloyd3", "power3", "olive4"]
CODED = ["ec1.5", "ec2.5", "ec6"]  # entropy-coded: scale rms alone, no sparsity
ESTIMATORS = ["ste", "clip1.3", "clip0.7", "trust", "trust0.5", "trust1.5"]
ALPHA = {1: 0.7978845587, 2: 1.4935346, 3: 2.0510681, 4: 2.5139306, 8: 3.9222044}  # arXiv 2502.05003; 8 bits: derived


def run(
    quantizer: Quantizer, x: torch.Tensor, g: torch.Tensor, *, reference: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output, and gradient of the input for the upstream gradient g."""
    x = x.detach().clone().requires_grad_()
    y = quantizer.reference(x) if reference else quantizer(x)
    y.backward(g.to(y.dtype))
    assert x.grad is not None
    return y.detach(), x.grad


def rows(width: int, n: int = 3, seed: int = 0) -> torch.Tensor:
    """(5 n, width) fp32: ordinary rows, tiny (1e-4) ones, large (1e4) ones, rows with outliers, rows of zeros."""
    x = torch.randn(5, n, width, generator=torch.Generator().manual_seed(seed))
    x *= torch.tensor([1.0, 1e-4, 1e4, 1.0, 0.0])[:, None, None]
    x[3, :, :: max(1, width // 4)] *= 50
    return x.reshape(5 * n, width)


def upstream(x: torch.Tensor) -> torch.Tensor:
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(7))


# --- an independent implementation ------------------------------------------------------------------------------------


def golden_pairs() -> list[str]:
    return [k.removesuffix("/y") for k in np.load(GOLDEN).files if k.endswith("/y")] if GOLDEN.exists() else ["absent"]


@needs("golden_quantizers.npz")
@pytest.mark.parametrize("pair", golden_pairs())
@pytest.mark.parametrize("reference", [False, True])
def test_golden_outputs_and_gradients(pair: str, reference: bool) -> None:
    data = np.load(GOLDEN)
    spec_text, dist = pair.split("/")
    x, g = torch.from_numpy(data[f"x/{dist}"]), torch.from_numpy(data["grad_out"])
    y, grad = run(make_quantizer(spec_text, x.shape[-1]), x, g, reference=reference)
    for ours, theirs in ((y, data[f"{pair}/y"]), (grad, data[f"{pair}/g"])):
        close = np.isclose(ours.numpy(), theirs, rtol=1e-5, atol=1e-6)
        assert (~close).sum() <= 2, f"{(~close).sum()} of {close.size} differ"


# --- formulas by hand, fp64 numpy -------------------------------------------------------------------------------------


def by_hand(x: np.ndarray, g: np.ndarray, bits: int, block: int, estimator: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Output, input gradient, and where an entry lies so near an edge that fp32 may decide otherwise."""
    k = x.shape[-1]
    h = np.kron(np.eye(k // block), scipy.linalg.hadamard(block) / np.sqrt(block)) if block else np.eye(k)
    z = x @ h
    sigma = np.sqrt((z**2).mean(-1, keepdims=True))
    s = ALPHA[bits] * sigma
    levels = np.linspace(-1, 1, 2**bits) * s[..., None]  # (rows, 1, 2^b)
    distance = np.abs(z[..., None] - levels)
    zhat = np.take_along_axis(np.broadcast_to(levels, distance.shape), distance.argmin(-1)[..., None], -1)[..., 0]
    step = 2 * s / (2**bits - 1)
    threshold = ALPHA[bits] / (2**bits - 1) * sigma
    if estimator == "ste":
        mask, margin = np.ones_like(z), np.full_like(z, np.inf)
    elif estimator.startswith("clip"):
        bound = float(estimator.removeprefix("clip")) * s
        mask, margin = np.abs(z) <= bound, np.abs(np.abs(z) - bound)
    else:
        bound = float(estimator.removeprefix("trust") or 1) * threshold
        mask, margin = np.abs(z - zhat) <= bound, np.abs(np.abs(z - zhat) - bound)
        if not estimator.removeprefix("trust"):  # inside the grid errors of half a step are trusted; the edge lies outside
            mask, margin = mask | (np.abs(z) <= s), np.abs(np.abs(z) - s - bound)
    two = np.sort(distance, -1)
    near_tie = (two[..., 1] - two[..., 0] < 1e-4 * step) & (s > 0)
    near_edge = (margin < 1e-4 * step) & (s > 0)
    # a wrong mask at one entry of a block changes the whole block's gradient
    if block:
        near_edge = np.repeat(near_edge.reshape(len(x), -1, block).any(-1), block, -1)
    return zhat, (g * mask) @ h.T, np.stack([near_tie, near_edge])


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("block", [0, 32])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_formula_by_hand_on_every_kind_of_row(bits: int, block: int, estimator: str) -> None:
    x = rows(96)
    g = upstream(x)
    y, grad = run(make_quantizer(f"int{bits}{f'-h{block}' if block else ''}-rms-{estimator}", 96), x, g)
    zhat, expected, near = by_hand(x.double().numpy(), g.double().numpy(), bits, block, estimator)
    if estimator == "trust0.5":  # a row of zeros has no error to distrust; its u = 0 lies between two levels
        y, grad, zhat, expected, near = y[:12], grad[:12], zhat[:12], expected[:12], near[:, :12]
    assert near.mean() < (0.02 if bits < 8 else 0.4)
    assert np.isfinite(grad.numpy()).all()
    np.testing.assert_allclose(np.where(near[0], 0, y.numpy()), np.where(near[0], 0, zhat), rtol=3e-6, atol=0)
    np.testing.assert_allclose(np.where(near[1], 0, grad.numpy()), np.where(near[1], 0, expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("estimator", ["ste", "clip1.3", "trust"])
def test_formula_by_hand_in_bf16(bits: int, estimator: str) -> None:
    x = rows(64).bfloat16()
    g = upstream(x).bfloat16()
    y, grad = run(make_quantizer(f"int{bits}-h32-rms-{estimator}", 64), x, g)
    assert y.dtype == grad.dtype == torch.bfloat16
    zhat, expected, near = by_hand(x.double().numpy(), g.double().numpy(), bits, 32, estimator)
    # statistics and rounding are those of fp32: only the result is rounded to bf16 (half an ulp: 2^-8)
    np.testing.assert_allclose(np.where(near[0], 0, y.double().numpy()), np.where(near[0], 0, zhat), rtol=2**-8, atol=0)
    np.testing.assert_allclose(
        np.where(near[1], 0, grad.double().numpy()), np.where(near[1], 0, expected), rtol=2**-8, atol=1e-6
    )


@pytest.mark.parametrize("shape", [(1, 7), (63, 5), (2, 123, 33), (1, 1)])
def test_odd_shapes(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    g = upstream(x)
    y, grad = run(make_quantizer("int3-rms-trust"), x, g)
    flat = shape[-1]
    zhat, expected, near = by_hand(x.double().numpy().reshape(-1, flat), g.double().numpy().reshape(-1, flat), 3, 0, "trust")
    assert near.mean() < 0.01
    np.testing.assert_allclose(y.numpy().reshape(-1, flat)[~near[0]], zhat[~near[0]], rtol=3e-6)
    np.testing.assert_allclose(grad.numpy().reshape(-1, flat)[~near[1]], expected[~near[1]], rtol=1e-6)


def test_absmax_puts_the_largest_entry_on_the_outermost_level() -> None:
    x = rows(64)
    y, grad = run(make_quantizer("int4-absmax-clip1"), x, torch.ones_like(x))
    peak = x.abs().amax(-1, keepdim=True)
    torch.testing.assert_close(y.abs().amax(-1, keepdim=True), peak)
    assert (grad == 1).all()  # nothing lies outside, the largest entry included
    torch.testing.assert_close(y, (torch.round(x / peak * 7.5 - 0.5) + 0.5).nan_to_num() / 7.5 * peak, rtol=1e-5, atol=0)


def test_pruned_entries_are_zero_and_trusted_only_when_small() -> None:
    """2:4: the formula by hand, with 0 as the level of a pruned entry."""
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y, grad = run(make_quantizer("int4-rms-2of4pairs-trust"), x, torch.ones_like(x))
    norms = x.reshape(5, 2, 4, 2).norm(dim=-1)
    keep = (norms > norms.sort(dim=-1).values[..., 1:2]).repeat_interleave(2, -1).reshape(5, 16)
    sigma = x.square().mean(-1, keepdim=True).sqrt()
    step = 2 * ALPHA[4] * sigma / 15
    dense = (torch.floor(x / step) + 0.5).clamp(-7.5, 7.5) * step
    expected = torch.where(keep, dense, 0.0)
    torch.testing.assert_close(y, expected)
    assert torch.equal(grad, ((x - expected).abs() <= step / 2).double())


# --- the definition ---------------------------------------------------------------------------------------------------


def every_spec() -> list[str]:
    bases = [grid + rotation for grid in GRIDS for rotation in ("", "-h16")]
    spec_texts = [f"{base}-{scale}-{e}" for base in bases for scale in ("rms", "absmax") for e in ESTIMATORS]
    spec_texts += [f"{base}-learned-{e}" for base in bases for e in ("ste", "clip1", "clip1.3")]
    spec_texts += [f"{grid}-rms-{mask}-{e}" for grid in ("int4", "fp4") for mask in MASKS for e in ESTIMATORS]
    spec_texts += [f"{b}-{s}-{e}" for b in ("int2", "int4-h16.s", "fp4") for s in SCALES for e in ("clip1", "trust", "erf")]
    spec_texts += [f"int1{r}-{s}-{e}" for r in ("", "-h16.s") for s in MEANS for e in ESTIMATORS]
    spec_texts += [f"{grid}-{scale}" for grid in ("int1", "int4-h16", "fp4") for scale in LEARNED]
    spec_texts += [f"{grid}-rms{v}-{e}" for grid in ("ternary", "sint4") for v in ("", ".t") for e in ("tanh", "erf0.5")]
    spec_texts += [
        f"{g}{r}-{s}-{e}" for g in CODED for r in ("", "-h16") for s in ("rms", "rms.g16", "rms.t") for e in ESTIMATORS
    ]
    spec_texts += ["int4-rms.g16-2of4-trust", "int4-h16.s-rms.t-sparse0.3-clip1"]
    return [*spec_texts, "fp4-e4m3.g16-2of4pairs-ste", "lloyd2-mse.g16-trust0.5", "bf16"]


MASKS = ["2of4pairs", "2of4", "sparse0.6"]
MEANS = ["absmean", "absmean.g16", "meanstd", "meanstd.t"]
SCALES = ["rms.g16", "rms.t", "absmax.g16", "mse", "mse.t", "e8m0", "e8m0.g16", "e4m3", "e4m3.g16"]
LEARNED = ["learned-pact", "learned-erf", "learned.o-clip1", "learned.o-pact", "learned.o-tanh"]
TENSOR = (".t-", "e4m3")  # words whose rows share a statistic


SQUARES = ["fp4-e4m3.b16-ste", "int4-h16-rms.b16-trust", "int1-meanstd.b32-clip1", "fp4-e4m3x.b16-2of4-ste"]


@pytest.mark.parametrize("word", SQUARES)
def test_forward_equals_the_definition_in_squares(word: str) -> None:
    x = torch.randn(32, 64, generator=torch.Generator().manual_seed(1))
    (y, grad), (expected, slope) = (run(make_quantizer(word, 64), x, upstream(x), reference=r) for r in (False, True))
    torch.testing.assert_close(y, expected, rtol=2e-6, atol=1e-6)
    torch.testing.assert_close(grad, slope, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("grid", [*GRIDS, *CODED, "bf16"])
def test_forward_equals_the_definition(grid: str) -> None:
    """Outputs and every gradient, on every kind of row, for every combination with this grid."""
    x = rows(48)
    g = upstream(x)
    peak = x.abs().amax(-1, keepdim=True).clamp_min(1e-30)  # the definition's sum m·z + (s·q − m·z) rounds at the size of z
    for spec_text in (w for w in every_spec() if w.split("-")[0] == grid):
        for dtype in (torch.float32, torch.bfloat16):
            quantizer = make_quantizer(spec_text, 48)
            if quantizer.offset is not None:
                quantizer.offset.data.fill_(0.3)
            results = []
            for reference in (True, False):
                y, grad = run(quantizer, x.to(dtype), g, reference=reference)
                results.append((y, grad, [p.grad.clone() for p in quantizer.parameters() if p.grad is not None]))
                quantizer.zero_grad()
            (y0, g0, s0), (y1, g1, s1) = results
            assert len(s0) == len(s1) == len(list(quantizer.parameters()))
            # where the two sums round differently in fp32, the result may differ by an ulp of bf16
            rtol = 2e-6 if dtype == torch.float32 else 2**-6.9
            torch.testing.assert_close(y1 / peak, y0 / peak, rtol=rtol, atol=1e-6, msg=lambda m, w=spec_text: f"{w}: {m}")
            assert y1.dtype == g1.dtype == dtype
            torch.testing.assert_close(g1, g0, rtol=rtol, atol=1e-6, msg=lambda m, w=spec_text: f"{w}: {m}")
            assert g1.isfinite().all()
            torch.testing.assert_close(s1, s0, rtol=1e-5, atol=1e-5, msg=lambda m, w=spec_text: f"{w}: {m}")


def test_zero_rows_give_zeros_and_finite_gradients() -> None:
    for spec_text in every_spec():
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.zeros(2, 16, dtype=dtype)
            y, grad = run(make_quantizer(spec_text), x, torch.ones_like(x))
            assert grad.isfinite().all(), spec_text
            # 0 is a level of these; the others have none while their scale is not zero
            if "learned" not in spec_text or spec_text.startswith(("sint4", "ternary", "fp4", "fp8", "power", "olive", "ec")):
                assert (y == 0).all(), spec_text


def test_magnitudes_from_1e_minus_30_to_1e30_stay_finite() -> None:
    x = torch.randn(4, 64)
    for spec_text in ("int4-h64-rms-trust", "int4-absmax-clip1", "fp4-rms-ste", "lloyd4-rms-trust", "int8-absmax-ste"):
        for magnitude in (1e-38, 1e-30, 1e-20, 1e-15, 1e15):
            y, grad = run(make_quantizer(spec_text), x * magnitude, torch.ones_like(x))
            assert y.isfinite().all()
            assert grad.isfinite().all()
        small, grad = run(make_quantizer(spec_text), x * 1e-15, torch.ones_like(x))
        normal, _ = run(make_quantizer(spec_text), x, torch.ones_like(x))
        torch.testing.assert_close(small * 1e15, normal, rtol=1e-4, atol=1e-4)


def test_not_a_number_spreads_over_its_row_alone() -> None:
    x = torch.randn(3, 32)
    x[1, 5] = float("nan")
    for spec_text in ("int4-rms-trust", "int4-h32-rms-trust", "fp4-absmax-ste", "lloyd2-rms-ste"):
        y = make_quantizer(spec_text)(x)
        assert y[1].isnan().all()
        assert y[[0, 2]].isfinite().all()


# --- properties -------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(every_spec()), st.integers(1, 9), st.integers(0, 10**6), st.integers(-20, 20))
def test_odd_equivariant_and_rowwise(spec_text: str, n: int, seed: int, power: int) -> None:
    quantizer = make_quantizer(spec_text)
    x = torch.randn(n, 16, generator=torch.Generator().manual_seed(seed))
    y = quantizer(x)
    if "learned.o" not in spec_text:
        assert torch.equal(quantizer(-x), -y)
    if "learned" not in spec_text:
        assert torch.equal(quantizer(x * 2.0**power), y * 2.0**power)
    rotated = "-h16" in spec_text  # a matrix product may round differently for another number of rows
    for i in range(0 if any(t in spec_text for t in TENSOR) else n):
        torch.testing.assert_close(quantizer(x[i : i + 1]), y[i : i + 1], rtol=1e-5 * rotated, atol=1e-6 * rotated)


@given(st.sampled_from([w for w in every_spec() if "-h" not in w and ("absmax" in w or "e8m0" in w)]), st.integers(0, 10**6))
@settings(max_examples=40, deadline=None)
def test_quantizing_twice_changes_nothing(spec_text: str, seed: int) -> None:
    quantizer = make_quantizer(spec_text)
    y = quantizer(torch.randn(4, 16, generator=torch.Generator().manual_seed(seed)))
    torch.testing.assert_close(quantizer(y), y, rtol=1e-6, atol=0)


@settings(max_examples=30, deadline=None)
@given(st.sampled_from([*GRIDS, *CODED]), st.integers(0, 10**6))
def test_levels_used_are_levels_declared(grid: str, seed: int) -> None:
    quantizer = make_quantizer(f"{grid}-rms-ste")
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(seed))
    s = x.double().square().mean(-1, keepdim=True).sqrt() * quantizer.spec.grid.unit
    levels = torch.tensor(quantizer.spec.grid.levels, dtype=torch.float64)
    assert ((quantizer(x) / s)[..., None] - levels).abs().min(-1).values.max() < 1e-4


# --- learned scale ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spec_text",
    [
        "int4-learned-clip1",
        "int2-learned-ste",
        "fp4-h16-learned-clip1.3",
        "ternary-learned-clip1",
        "fp8-learned-clip1",
        "power3-learned-tanh",
        "lloyd2-h16.s-learned-erf0.7",
        "olive4-learned-clip1",
        "sint4-learned-clip0.7",
    ],
)
def test_learned_scale_gradient_is_that_of_the_surrogate(spec_text: str) -> None:
    """Central differences of s·(m·z/s + const) with the rounded part frozen, and LSQ's factor 1/√(numel·Q)."""
    x = torch.randn(6, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2
    g = upstream(x).double()
    quantizer = Quantizer(QuantSpec.parse(spec_text), numel=x.numel()).double()
    quantizer.calibrate(x)
    scale, spec = quantizer.scale, quantizer.spec
    assert scale is not None
    run(quantizer, x, g)
    s0 = scale.item()
    z = spec.basis.rotate(x) if spec.basis else x
    u = z / s0
    q = spec.grid.quantize(u)
    m = spec.estimator.mask(u, q, spec.grid).double() if spec.estimator else u

    def surrogate(s: float) -> float:
        return float((g * s * (m * z / s + (q - m * u))).sum())

    difference = (surrogate(s0 + 1e-5) - surrogate(s0 - 1e-5)) / 2e-5
    assert scale.grad is not None
    assert scale.grad.item() == pytest.approx(difference / np.sqrt(x.numel() * spec.grid.top), rel=1e-6)


@pytest.mark.parametrize("spec_text", ["int2-learned.o-clip1", "fp4-h16-learned.o-clip0.4", "sint3-learned.o-erf"])
def test_learned_offset_gradient_is_that_of_the_surrogate(spec_text: str) -> None:
    """Central differences in b of s (m (z - b)/s + const) + b with the rounded part and the mask frozen."""
    x = torch.randn(6, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2 + 0.7
    g = upstream(x).double()
    quantizer = Quantizer(QuantSpec.parse(spec_text), numel=x.numel()).double()
    quantizer.calibrate(x)
    offset, scale, spec = quantizer.offset, quantizer.scale, quantizer.spec
    assert offset is not None
    assert scale is not None
    run(quantizer, x, g)
    b0, s = offset.item(), scale.item()
    z = spec.basis.rotate(x) if spec.basis else x
    u = (z - b0) / s
    q = spec.grid.quantize(u)
    assert spec.estimator is not None
    m = spec.estimator.mask(u, q, spec.grid).double()

    def surrogate(b: float) -> float:
        return float((g * (s * (m * (z - b) / s + (q - m * u)) + b)).sum())

    difference = (surrogate(b0 + 1e-5) - surrogate(b0 - 1e-5)) / 2e-5
    assert offset.grad is not None
    assert offset.grad.item() == pytest.approx(difference / np.sqrt(x.numel() * spec.grid.top), rel=1e-6)


def test_lsq_gradient_is_that_of_its_paper() -> None:
    """Esser et al. 2020, eqs. 3 and 5: d/ds = q − x/s inside, ±Q outside; d/dx = 1 inside, 0 outside."""
    x = torch.tensor([[0.3, -0.9, 1.2, 2.6, -7.0]])
    quantizer = make_quantizer("int2-learned-clip1")
    assert quantizer.scale is not None
    with torch.no_grad():
        quantizer.scale.fill_(1.0)
    g = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0]])
    y, grad = run(quantizer, x, g)
    assert y.tolist() == [[0.5, -0.5, 1.5, 1.5, -1.5]]
    assert grad.tolist() == [[1.0, 2.0, 3.0, 0.0, 0.0]]
    expected = 1 * 0.2 + 2 * 0.4 + 3 * 0.3 + 4 * 1.5 + 5 * -1.5
    assert quantizer.scale.grad is not None
    assert quantizer.scale.grad.item() == pytest.approx(expected / np.sqrt(5 * 1.5), rel=1e-5)


def test_lsq_plus_gradient_is_that_of_its_paper() -> None:
    """Bhalgat et al. 2020, arXiv 2004.09576 sec. 3.1: LSQ's of x - b, and d/db = 0 inside, 1 outside."""
    x = torch.tensor([[0.3, -0.9, 1.2, 2.6, -7.0]]) + 10
    quantizer = make_quantizer("int2-learned.o-clip1")
    assert quantizer.scale is not None
    assert quantizer.offset is not None
    assert (quantizer.scale.item(), quantizer.offset.item()) == (pytest.approx(ALPHA[2] / 1.5), 0)
    with torch.no_grad():
        quantizer.scale.fill_(1.0)
        quantizer.offset.fill_(10.0)
    y, grad = run(quantizer, x, torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0]]))
    torch.testing.assert_close(y, torch.tensor([[10.5, 9.5, 11.5, 11.5, 8.5]]))
    assert grad.tolist() == [[1.0, 2.0, 3.0, 0.0, 0.0]]
    assert quantizer.scale.grad is not None
    assert quantizer.offset.grad is not None
    expected = 1 * 0.2 + 2 * 0.4 + 3 * 0.3 + 4 * 1.5 + 5 * -1.5
    assert quantizer.scale.grad.item() == pytest.approx(expected / np.sqrt(5 * 1.5), rel=1e-4)
    assert quantizer.offset.grad.item() == pytest.approx((4 + 5) / np.sqrt(5 * 1.5), rel=1e-5)
    quantizer.calibrate(x)
    assert quantizer.offset.item() == pytest.approx(x.mean().item())
    assert quantizer.scale.item() == pytest.approx(ALPHA[2] / 1.5 * x.std(correction=0).item(), rel=1e-5)


def test_pact_gradient_is_that_of_its_paper() -> None:
    """Choi et al. 2018, arXiv 1805.06085 eq. 3, both signs: y = clip(x, -a, a), so central differences of it for a = s top."""
    x = 2 * torch.randn(6, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    g = upstream(x).double()
    quantizer = make_quantizer("int3-learned-pact").double()
    assert quantizer.scale is not None
    quantizer.scale.data.fill_(0.4)
    _, grad = run(quantizer, x, g)
    top = quantizer.spec.grid.top
    high, low = ((g * x.clamp(-s * top, s * top)).sum() for s in (0.4 + 1e-6, 0.4 - 1e-6))
    assert quantizer.scale.grad is not None
    assert quantizer.scale.grad.item() == pytest.approx((high - low).item() / 2e-6, rel=1e-6)
    assert torch.equal(grad, g * (x.abs() <= 0.4 * top))


# --- outliers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec_text", ["int4-learned-clip1", "int2-learned-clip1", "fp4-learned-clip1", "int3-learned-pact"])
def test_a_clipped_grid_limits_what_an_outlier_does(spec_text: str) -> None:
    """Planted: one entry of a row grows by powers of ten. Its output stays at the outermost level, its gradient at zero."""
    x = rows(64)[:1] / 4
    g = upstream(x)
    quantizer = make_quantizer(spec_text)
    assert quantizer.scale is not None
    quantizer.scale.data.fill_(0.5)
    limit = 0.5 * quantizer.spec.grid.top
    outputs, gradients = [], []
    for outlier in (1e1, 1e3, 1e6):
        x[0, 7] = outlier
        y, grad = run(quantizer, x, g)
        assert y.abs().max() == y[0, 7] == pytest.approx(limit)
        assert grad[0, 7] == 0
        outputs.append(y)
        gradients.append(grad)
    assert torch.equal(outputs[0], outputs[2])  # the other entries do not notice
    assert torch.equal(gradients[0], gradients[2])


def test_without_clipping_an_outlier_drags_its_row_along() -> None:
    """The contrast: absmax follows the outlier, so that every other entry of its row is off by half a step of the outlier's."""
    x = rows(64)[:1] / 4
    errors = []
    for outlier in (1e1, 1e3, 1e6):
        x[0, 7] = outlier
        y = make_quantizer("int4-absmax-ste")(x)
        assert y[0, 7] == pytest.approx(outlier)
        errors.append(float((y - x)[0, :7].abs().mean()))
        assert errors[-1] == pytest.approx(outlier / 15, rel=0.5)
    assert errors[0] < errors[1] < errors[2]


# --- stochastic rounding ----------------------------------------------------------------------------------------------


STOCHASTIC = ["int2.sr-rms-ste", "sint4.sr-h16.s-rms.g16-clip1", "fp4.sr-e8m0.g16-ste", "lloyd2.sr-learned-clip1"]


@pytest.mark.parametrize("spec_text", STOCHASTIC)
def test_stochastic_rounding_follows_its_generator_and_is_unbiased(spec_text: str) -> None:
    def seeded(seed: int) -> torch.Generator:
        return torch.Generator().manual_seed(seed)

    x = torch.randn(7, 48, generator=seeded(0), requires_grad=True)
    quantizer = make_quantizer(spec_text)
    y = quantizer(x, seeded(1))
    assert torch.equal(quantizer(x, seeded(1)), y)
    assert not torch.equal(quantizer(x, seeded(2)), y)
    torch.testing.assert_close(quantizer.reference(x, seeded(1)), y, rtol=1e-6, atol=1e-6)
    torch.manual_seed(5)
    first = quantizer(x)
    torch.manual_seed(5)
    assert torch.equal(quantizer(x), first)  # without a generator torch's own
    with torch.no_grad():  # evaluation rounds to the nearest level
        nearest = make_quantizer(spec_text.replace(".sr", ""))
        assert torch.equal(quantizer(x), nearest(x))
    mean = torch.stack([quantizer(x, seeded(i)).detach() for i in range(2000)]).mean(0)
    basis, scale = quantizer.spec.basis, quantizer.spec.scale
    z = (basis.rotate(x) if basis else x).detach()
    assert scale is not None
    shared = scale.share(z)
    s = scale.of(shared, quantizer.spec.grid) if quantizer.scale is None else quantizer.scale.detach()
    s = s.expand(shared.shape)
    inside = (shared.abs() < s * quantizer.spec.grid.top).view(z.shape)
    assert inside.float().mean() > 0.7
    widest = max(b - a for a, b in zip(quantizer.spec.grid.levels[:-1], quantizer.spec.grid.levels[1:], strict=True))
    assert ((mean - z).abs() <= 5 * s.reshape(z.shape) * widest / 2 / 2000**0.5)[inside].all()


def test_stochastic_rounding_has_the_gradient_of_the_nearest_level_for_masks_of_u() -> None:
    x = torch.randn(7, 32, generator=torch.Generator().manual_seed(0))
    g = upstream(x)
    grads = [run(make_quantizer(f"int2{v}-h32-rms-clip1"), x, g)[1] for v in ("", ".sr")]
    assert torch.equal(*grads)


# --- block formats by hand --------------------------------------------------------------------------------------------


def test_mxfp4_and_nvfp4_by_hand() -> None:
    """Loops over blocks with the nearest of the 15 values, in double precision."""
    x = rows(64)[:12].double()
    values = np.array([-6, -4, -3, -2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2, 3, 4, 6])

    def nearest(row: np.ndarray, s: float) -> np.ndarray:
        return s * values[np.abs(row[:, None] / s - values).argmin(1)]

    blocks = x.numpy().reshape(-1, 32)
    mx = np.stack([nearest(b, 2.0 ** (np.floor(np.log2(np.abs(b).max())) - 2)) for b in blocks]).reshape(x.shape)
    np.testing.assert_allclose(make_quantizer("fp4-e8m0.g32-ste")(x).numpy(), mx, rtol=1e-12)
    tensor = float(x.abs().max()) / 6 / 448
    y = []
    for b in x.numpy().reshape(-1, 16):
        s = tensor * max(2**-9, float(torch.tensor(np.abs(b).max() / 6 / tensor).to(torch.float8_e4m3fn)))
        y.append(nearest(b, s))
    np.testing.assert_allclose(make_quantizer("fp4-e4m3.g16-ste")(x).numpy(), np.stack(y).reshape(x.shape), rtol=1e-12)


def test_scales_per_tensor_and_per_group_are_rows_of_another_shape() -> None:
    x = rows(64)
    g = upstream(x)
    for grid in ("int4", "fp4"):
        for variant, shape in ((".t", (1, -1)), (".g16", (-1, 16)), (".g32", (-1, 32))):
            y, grad = run(make_quantizer(f"{grid}-rms{variant}-trust"), x, g)
            y2, grad2 = run(make_quantizer(f"{grid}-rms-trust"), x.reshape(shape), g.reshape(shape))
            torch.testing.assert_close(y, y2.view(x.shape))
            assert torch.equal(grad, grad2.view(x.shape))
            y3, grad3 = run(make_quantizer(f"{grid}-rms{variant}-trust"), x.T.contiguous().T, g)  # not contiguous
            torch.testing.assert_close(y3, y)
            assert torch.equal(grad3, grad)


def test_learned_scale_starts_explicitly_and_may_change_sign() -> None:
    quantizer = make_quantizer("int4-learned-clip1")
    x = torch.randn(64, 128, generator=torch.Generator().manual_seed(0)) * 3
    scale = quantizer.scale
    assert scale is not None
    assert scale.item() == pytest.approx(ALPHA[4] / 7.5)
    quantizer(x)
    assert scale.item() == pytest.approx(ALPHA[4] / 7.5)  # a forward pass changes nothing
    quantizer.calibrate(x)
    assert scale.item() == pytest.approx(ALPHA[4] / 7.5 * x.square().mean().sqrt().item(), rel=1e-5)
    y = quantizer(x)
    with torch.no_grad():
        scale.neg_()
    assert torch.equal(quantizer(x), y)
    assert make_quantizer("int4-rms-ste").scale is None


# --- autocast, compile, module -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec_text", ["int4-h16-rms-trust", "int4-learned-clip1", "fp4-absmax-ste"])
def test_autocast_changes_no_bit(spec_text: str) -> None:
    x = rows(32)
    quantizer = make_quantizer(spec_text)
    y, grad = run(quantizer, x, upstream(x))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y2, grad2 = run(quantizer, x, upstream(x))
    assert y2.dtype == torch.float32
    assert torch.equal(y, y2)
    assert torch.equal(grad, grad2)


@pytest.mark.slow
@pytest.mark.parametrize(
    "spec_text",
    [
        "int4-h16-rms-trust",
        "int4-learned-clip1",
        "lloyd3-rms-trust0.5",
        "fp4-e8m0.g32-ste",
        "fp4-e4m3.g16-ste",
        "int2-learned.o-pact",
        "sint4-h16.s-rms.g16-2of4-erf",
        "int1-meanstd-clip1",
        "fp8-rms.t-clip1",
        "ternary-absmean.t-sparse0.5-tanh",
        "int4.sr-rms-ste",
        "fp4.sr-h16-absmax-clip1",
        "olive4-rms-ste",
        "power4-rms-trust",
        "ec2.5-h16-rms-trust",
        "int4-mse-ste",
    ],
)
@inductor.patch(fallback_random=True)  # compiled code has another generator of its own
def test_compiled_equals_eager(spec_text: str) -> None:
    torch.compiler.reset()  # it compiles one function for at most 8 words
    x = torch.randn(33, 32, generator=torch.Generator().manual_seed(0))
    quantizer = make_quantizer(spec_text)
    torch.manual_seed(3)
    y, grad = run(quantizer, x, upstream(x))
    torch.manual_seed(3)
    y2, grad2 = run(torch.compile(quantizer, fullgraph=True), x, upstream(x))  # type: ignore[arg-type]
    torch.testing.assert_close(y2, y, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad2, grad, rtol=1e-5, atol=1e-5)


def test_module_shows_its_word_and_passes_bf16_through() -> None:
    assert repr(make_quantizer("int4-h128-rms-trust")) == "Quantizer(int4-h128-rms-trust)"
    x = torch.randn(2, 3)
    assert make_quantizer("bf16")(x) is x
    assert not list(make_quantizer("int4-rms-ste").parameters())


def test_double_precision_is_kept() -> None:
    x = torch.randn(4, 32, dtype=torch.float64)
    assert make_quantizer("int4-h32-rms-trust")(x).dtype == torch.float64


@pytest.mark.parametrize(
    ("spec_text", "width", "says"),
    [
        ("int4-h128-ste", 192, "h128 does not divide the width 192; powers of two up to h64 do"),
        ("int4-h2-ste", 7, "h2 does not divide the width 7; none divides an odd width"),
        ("int4-2of4pairs-ste", 12, "2of4pairs takes groups of 8, which do not divide the width 12"),
        ("int4-h64-x", 64, "component 3"),
        ("int4-rms.g64-ste", 96, "scale rms.g64: the group does not divide the width 96; that do: g16, g32"),
        ("olive4-ste", 7, "olive4 takes groups of 2, which do not divide the width 7"),
        ("int4-2of4-ste", 6, "2of4 takes groups of 4, which do not divide the width 6"),
    ],
)
def test_what_does_not_fit_is_refused(spec_text: str, width: int, says: str) -> None:
    with pytest.raises(UsageError) as caught:
        make_quantizer(spec_text, width)
    assert says in str(caught.value)


@given(st.floats(1e-6, 1e6))
def test_next_above_is_the_next_float(bound: float) -> None:
    single = torch.tensor(bound, dtype=torch.float32)
    assert torch.tensor(_next_above(bound, torch.float32), dtype=torch.float32) == torch.nextafter(single, torch.tensor(1e9))
    assert _next_above(bound, torch.float64) == np.nextafter(bound, 1e9)


# --- shares -----------------------------------------------------------------------------------------------------------


def test_shares_by_hand():
    """int2 at scale 1: levels ±0.5, ±1.5, clamped beyond 2; clip1.3 lets gradient through to 1.95, a tenth of it beyond."""
    quantizer = make_quantizer("int2-learned-clip1.3")
    quantizer.scale.data.fill_(1.0)
    x = torch.tensor([[0.1, -1.94, 1.96, -2.01], [5.0, 0.0, 2.0, -0.7]])
    assert quantizer.shares(x).tolist() == [4 / 8, 2 / 8]


SHARED = [
    "int4-h32-rms-trust",
    "int1-rms-trust",
    "fp4-rms.g16-trust",
    "int4-rms-2of4pairs-trust",
    "ternary-absmean.t-ste",
    "int4-learned.o-clip1",
    "int2-rms-tanh0.5",
]


@pytest.mark.parametrize("spec_text", SHARED)
def test_shares_are_those_of_the_backward_pass(spec_text):
    quantizer, x = make_quantizer(spec_text), rows(64, seed=3)[:9]
    quantizer.calibrate(x)
    trust, clamped = quantizer.shares(x).tolist()
    assert trust == pytest.approx(float(mask_of(quantizer, x).mean()), abs=1e-6)
    assert 0 <= clamped < 0.5


def test_shares_draw_no_random_numbers():
    state = torch.random.get_rng_state()
    make_quantizer("int4.sr-rms-clip1").shares(rows(64))
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize(
    ("spec_text", "width", "part"),
    [
        ("int4-h128-rms-trust", 100, "rotation h128 does not divide the width 100; powers of two up to h4 do"),
        ("int4-absmax.g32-ste", 48, "the group does not divide the width 48; that do: g16"),
        ("int4-rms-2of4-ste", 6, "2of4 takes groups of 4"),
    ],
)
def test_a_width_that_no_part_divides_is_refused_at_the_first_call(spec_text, width, part):
    q = make_quantizer(spec_text)
    for call in (q, q.reference, q.rounded, q.calibrate if q.scale is not None else q):
        with pytest.raises(ValueError, match=f"{re.escape(spec_text)}: .*{re.escape(part)}"):
            call(torch.ones(2, width))
