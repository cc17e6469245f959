"""Scales: the size of one unit of the grid, against formulas."""

import math
import re

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from questctl.errors import UsageError
from questctl.quant.grids import FP4, FP8, Grid, Int, Lloyd, Olive, SInt, Ternary
from questctl.quant.layer_specs import check_layers
from questctl.quant.methods import method_specs
from questctl.quant.quantizer import Quantizer
from questctl.quant.scales import E4M3, E8M0, SCALES, AbsMax, AbsMean, Learned, MeanStd, Mse, Rms
from questctl.quant.spec import QuantSpec


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_shapes_and_values() -> None:
    z = torch.tensor([[3.0, -4.0], [0.0, 0.0]])
    assert Rms().of(z, Int(2)).squeeze(-1).tolist() == pytest.approx([12.5**0.5 * 1.4935346 / 1.5, 0])
    assert AbsMax().of(z, Int(2)).squeeze(-1).tolist() == pytest.approx([4 / 1.5, 0])
    assert AbsMax().of(z, FP4()).squeeze(-1).tolist() == pytest.approx([4 / 6, 0])
    assert Rms().of(torch.ones(2, 3, 5), Int(4)).shape == AbsMax().of(torch.ones(2, 3, 5), Int(4)).shape == (2, 3, 1)


def test_learned_scale_starts_at_the_optimum_of_the_whole_tensor() -> None:
    z = torch.tensor([[3.0, -4.0], [0.0, 0.0]])
    start = Learned().of(z, Int(2))
    assert start.shape == (1,)
    assert start.item() == pytest.approx(6.25**0.5 * 1.4935346 / 1.5)
    assert Learned.gradient_factor(100, Int(4)) == pytest.approx(1 / 750**0.5)


def test_absmean_is_bitnets() -> None:
    """BitNet b1.58, arXiv 2402.17764 eqs. 1 to 3: W -> RoundClip(W / mean|W|, -1, 1); BitNet: sign(W) mean|W|."""
    z = normal(5, 64)
    gamma = z.abs().mean(-1, keepdim=True)
    s = AbsMean().of(z, Ternary())
    torch.testing.assert_close(s * Ternary().quantize(z / s), gamma * (z / gamma).round().clamp(-1, 1))
    s = AbsMean().of(z, Int(1))
    torch.testing.assert_close(s * Int(1).quantize(z / s), gamma * z.sign())


def test_meanstd_is_adabins_binary_set() -> None:
    """AdaBin, arXiv 2208.08084 sec. 3.2: beta = mean, alpha = standard deviation, levels beta +- alpha."""
    z = normal(5, 64) + 3
    b = MeanStd().centre(z)
    s = MeanStd().of(z - b, Int(1))
    alpha = z.std(-1, correction=0, keepdim=True)
    torch.testing.assert_close(b + s * Int(1).quantize((z - b) / s), z.mean(-1, keepdim=True) + alpha * (z - b).sign())


@pytest.mark.parametrize("grid", [Int(1), Int(2), Int(4), SInt(3), Ternary(), FP4(), Lloyd(2)], ids=lambda g: g.text)
def test_mse_search_finds_the_best_scale_of_every_row(grid: Grid) -> None:
    """Against a scan of 4000 scales, on normal, heavy-tailed and skewed rows and one with an outlier."""
    z = torch.cat([normal(3, 96), normal(3, 96, seed=1) ** 3, normal(3, 96, seed=2).exp(), normal(1, 96, seed=3)])
    z[-1, 5] = 40.0
    z = torch.cat([z, z * 1e-9, normal(40, 96, seed=4)])

    def error(s: torch.Tensor) -> torch.Tensor:
        return (z - s * grid.quantize(z / s)).square().sum(-1, keepdim=True)

    ours, rms = error(Mse().of(z, grid)), error(Rms().of(z, grid))
    assert (ours <= rms).all()
    scan = Rms().of(z, grid) * torch.tensor(np.geomspace(1 / 5, 5, 4000))[:, None, None]
    best = torch.stack([error(s) for s in scan]).min(0).values
    assert (ours / best < 1.03).all()  # a row of 96 has several minima, nearly equally deep
    assert (ours / best).mean() < 1.01


@pytest.mark.parametrize("grid", [Int(2), SInt(4), FP4(), Lloyd(3), Olive()], ids=lambda g: g.text)
def test_mse_search_rounds_few_times_and_finds_what_a_fine_scan_finds(grid: Grid, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside 65 scales 2^(1/16) apart, each made good for by the best scale of its levels thrice."""
    z = torch.cat([normal(40, 64), normal(40, 64, seed=1) ** 3])
    calls = []
    quantize = type(grid).quantize
    monkeypatch.setattr(type(grid), "quantize", lambda self, u: calls.append(1) or quantize(self, u))
    found = Mse().of(z, grid)
    assert len(calls) <= 27

    def error(s: torch.Tensor) -> torch.Tensor:
        return (z - s * grid.quantize(z / s)).square().sum(-1, keepdim=True)

    best = Rms().of(z, grid)
    for k in range(-32, 33):
        s = Rms().of(z, grid) * 2 ** (k / 16)
        best = torch.where(error(s) < error(best), s, best)
    for _ in range(3):
        q = grid.quantize(z / best)
        s = (z * q).sum(-1, keepdim=True) / q.square().sum(-1, keepdim=True)
        best = torch.where(error(s) < error(best), s, best)
    ratio = error(found) / error(best)
    assert ratio.mean() < 1.002
    assert ratio.max() < 1.04


def test_mse_search_stays_zero_on_zero_rows() -> None:
    assert Mse().of(torch.zeros(2, 8), Ternary()).tolist() == [[0.0], [0.0]]


def test_e8m0_is_the_shared_exponent_of_microscaling() -> None:
    """OCP MX v1.0 sec. 6.3: 2^(floor(log2 max) - emax), emax 2 for E2M1, 8 for E4M3; MXFP4 by hand."""
    z = torch.tensor([[1.0], [1.99], [2.0], [6.5], [1e-3], [0.0], [7e9]])
    expected = [2.0 ** (math.floor(math.log2(x)) - 2) if x else 0.0 for x in z.flatten().tolist()]
    assert E8M0().of(z, FP4()).flatten().tolist() == expected
    assert E8M0().of(z, FP8()).flatten().tolist() == [x / 64 for x in expected]
    row = torch.tensor([[7.9, 5.1, -2.6, 0.2, 0.0, -0.3]])
    s = E8M0().of(row, FP4())
    assert (s * FP4().quantize(row / s)).tolist() == [[6.0, 6.0, -3.0, 0.0, 0.0, -0.5]]


def test_e4m3_is_nvfp4() -> None:
    """NVIDIA 2025, arXiv 2509.25149: a group's scale is an E4M3 number times one of the tensor; the largest group's is 448."""
    z = normal(6, 16).float() * torch.tensor([1.0, 3.0, 10.0, 0.1, 0.001, 1e-9])[:, None]
    tensor = z.abs().max() / (6 * 448)
    codes = E4M3().of(z, FP4()) / tensor
    torch.testing.assert_close(codes, codes.to(torch.float8_e4m3fn).float(), rtol=1e-6, atol=0)
    assert codes.max().item() == pytest.approx(448)
    ideal = z.abs().amax(-1, keepdim=True) / 6 / tensor
    assert ((codes / ideal - 1).abs() <= 1 / 16 + 1e-6)[:4].all()  # three bits of mantissa
    assert codes[5].item() == pytest.approx(2**-9)


@pytest.mark.parametrize("cls", [c for c in SCALES if not c.learned], ids=lambda c: c.stem)
def test_variants_are_rows_of_another_view(cls: type) -> None:
    z = normal(3, 5, 128)
    for variant, shape in (("g16", (3, 5, 8, 16)), ("g32", (3, 5, 4, 32)), ("g128", (3, 5, 1, 128)), ("t", (1, 1920))):
        view = cls(variant=variant).share(z)
        assert torch.equal(view, z.reshape(shape))
        assert torch.equal(cls(variant=variant).of(view, Int(1)), cls().of(z.reshape(shape), Int(1)))
    assert cls().share(z) is z
    assert (cls().group, cls(variant="t").group, cls(variant="g64").group) == (0, 0, 64)


def quantized_by_hand(w: torch.Tensor, block: int) -> torch.Tensor:
    """NVFP4 in squares: in each, the largest entry is 6 in units of an E4M3 number times a scale of the matrix."""
    tensor = w.abs().max().item() / (6 * 448)
    out = torch.empty_like(w)
    for i in range(0, w.shape[0], block):
        for j in range(0, w.shape[1], block):
            square = w[i : i + block, j : j + block]
            ideal = torch.tensor(square.abs().max().item() / 6 / tensor)
            s = tensor * max(ideal.to(torch.float8_e4m3fn).item(), 2**-9)
            levels = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
            nearest = (square.abs().unsqueeze(-1) / s - levels).abs().argmin(-1)
            out[i : i + block, j : j + block] = square.sign() * levels[nearest] * s
    return out


@pytest.mark.parametrize("block", [16, 32])
def test_squares_share_a_scale(block: int) -> None:
    w = (normal(96, 64) * normal(96, 1).exp()).float()
    spec = QuantSpec.parse(f"fp4-e4m3.b{block}-ste")
    torch.testing.assert_close(Quantizer(spec)(w), quantized_by_hand(w, block), rtol=1e-6, atol=0)
    assert (spec.scale.group, spec.scale.rows, spec.bits) == (block, block, 4 + 8 / block**2)
    s = Quantizer(spec).rounded(w).s
    assert s.shape == (96, 64 // block, 1)
    assert torch.equal(s, s[::block].repeat_interleave(block, 0))


@settings(deadline=None, max_examples=30)
@given(
    word=st.sampled_from(["fp4-e4m3.b16", "fp4-e8m0.b32", "int4-absmax.b16", "fp4-ue4m3.b16", "int1-absmax.b32"]),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    spread=st.floats(0, 20),
    seed=st.integers(0, 10**6),
)
def test_the_codes_of_a_transposed_weight_are_the_transposed_codes(
    word: str, shape: tuple[int, int], spread: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(32 * shape[0], 32 * shape[1], generator=generator)
    w = w * (spread * torch.rand(w.shape, generator=generator)).exp()
    quantizer = Quantizer(QuantSpec.parse(f"{word}-ste"))
    there, back = quantizer.rounded(w), quantizer.rounded(w.T.contiguous())
    assert torch.equal(back.q.reshape(w.T.shape), there.q.reshape(w.shape).T)
    assert torch.equal(quantizer(w.T.contiguous()), quantizer(w).T)


def test_groups_of_a_row_are_not_those_of_a_column() -> None:
    """The property above distinguishes: with scales of single rows, transposing changes codes."""
    w, quantizer = normal(32, 32).float(), Quantizer(QuantSpec.parse("fp4-e4m3.g16-ste"))
    assert not torch.equal(quantizer(w.T.contiguous()), quantizer(w).T)


@pytest.mark.parametrize("cls", [Rms, Mse, AbsMax, MeanStd, E4M3], ids=lambda c: c.stem)
def test_the_scale_and_centre_of_a_square_are_those_of_its_values_in_one_row(cls: type) -> None:
    w, squares = normal(64, 32), cls(variant="b32")
    shared = squares.share(w)
    rows = torch.stack([w[:32].flatten(), w[32:].flatten()])
    grid = Int(1 if cls is MeanStd else 3)
    torch.testing.assert_close(squares.sizes(shared, grid)[::32, 0], cls().of(rows, grid))
    if squares.centred:
        torch.testing.assert_close(squares.centres(shared)[::32, 0], cls().centre(rows))


def checked(**keys: object) -> None:
    config = tiny.config(**keys)
    check_layers(config.model, config.quant)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: Quantizer(QuantSpec.parse("int4-rms.b16-ste"))(torch.zeros(24, 32)), "16 does not divide the 24 rows"),
        (lambda: checked(quant__weights="int4-rms.b32-ste", model__n_kv_head=1), "layer blocks.0.k: scale rms.b32: 32 does"),
        (lambda: tiny.config(quant__activations="fp4-e4m3.b16-ste"), "squares of a layer's weight, which activations have not"),
        (lambda: tiny.config(quant__head="fp4-e8m0.b32-ste"), "which head have not; use rms or e8m0.g32"),
    ],
)
def test_squares_that_do_not_fit_are_refused(call, says: str) -> None:
    with pytest.raises(UsageError, match=re.escape(says)):
        call()


def test_powers_of_two_scale_exactly() -> None:
    z = normal(4, 64).float()
    for cls in SCALES:
        for power in (-30, -3, 7, 30):
            assert torch.equal(cls().of(z * 2.0**power, Int(1)), cls().of(z, Int(1)) * 2.0**power), cls.stem


def test_learned_offset_starts_at_the_mean() -> None:
    assert Learned(variant="o").centred
    assert not Learned().centred
    assert Learned(variant="o").centre(torch.tensor([[1.0, 2.0], [3.0, 6.0]])).tolist() == [3.0]


# --- a learned scale per row ------------------------------------------------------------------------------------------


def seq(w: torch.Tensor, alpha: torch.Tensor, n: float, shift: float) -> torch.Tensor:
    """ParetoQ's stretched levels as its paper writes them, with the gradient of LSQ: the rounding passes straight through."""
    inside = (w / alpha).clamp(-0.99, 0.99)
    levels = inside * n - shift
    rounded = levels + (levels.round() - levels).detach()
    return alpha * (rounded + shift) / n


@pytest.mark.parametrize(("bits", "n", "shift"), [("2", 2.0, 0.5), ("ternary", 1.5, 0.0)])
def test_stretched_levels_are_those_of_the_paper_with_a_scale_per_row(bits: str, n: float, shift: float) -> None:
    spec_text = method_specs("paretoq", bits)[0]
    w = torch.randn(5, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    q = Quantizer(QuantSpec.parse(spec_text), numel=w.numel(), rows=5)
    q.calibrate(w)
    assert q.scale is not None
    assert q.scale.shape == (5, 1)
    alpha = (q.scale.detach() * n).requires_grad_()  # one unit of the grid is α/n
    g = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))
    ours, theirs = q(w), seq(w, alpha, n, shift)
    torch.testing.assert_close(ours, theirs)
    into_w, into_s = torch.autograd.grad(ours, (w, q.scale), g)
    expected_w, expected_alpha = torch.autograd.grad(theirs, (w, alpha), g)
    torch.testing.assert_close(into_w, expected_w)
    factor = (64 * q.spec.grid.top) ** -0.5  # of LSQ, for the K weights of a row
    torch.testing.assert_close(into_s, expected_alpha * n * factor, rtol=1e-4, atol=1e-5)


ROWS = ["int4-learned.r-clip1", "int2-learned.r-clip1.32", "ternary-learned.r-clip1.485", "int3-learned.r-pact"]


@pytest.mark.parametrize("spec_text", ROWS)
def test_a_row_with_its_own_scale_is_a_tensor_by_itself(spec_text: str) -> None:
    """Values, gradients, calibration: each row as `learned` has it for a tensor of one row."""
    w = torch.randn(4, 48, generator=torch.Generator().manual_seed(2)) * torch.tensor([[1.0], [1e-3], [7.0], [0.2]])
    g = torch.randn(4, 48, generator=torch.Generator().manual_seed(3))
    spec = QuantSpec.parse(spec_text)
    whole = Quantizer(spec, numel=w.numel(), rows=4)
    whole.calibrate(w)
    x = w.clone().requires_grad_()
    y = whole(x)
    torch.testing.assert_close(y, whole.reference(x))
    grads = torch.autograd.grad(y, (x, whole.scale), g)
    for i in range(4):
        one = Quantizer(QuantSpec.parse(spec_text.replace("learned.r", "learned")), numel=48)
        one.calibrate(w[i : i + 1])
        row = w[i : i + 1].clone().requires_grad_()
        torch.testing.assert_close(one(row), y[i : i + 1])
        for ours, theirs in zip(torch.autograd.grad(one(row), (row, one.scale), g[i : i + 1]), grads, strict=True):
            torch.testing.assert_close(theirs[i : i + 1].flatten(), ours.flatten())
    by_reference = torch.autograd.grad(whole.reference(x), (x, whole.scale), g)
    for ours, theirs in zip(grads, by_reference, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_rows_of_activations_are_tokens() -> None:
    with pytest.raises(UsageError, match=r"'learned\.r' has a scale for each row of a weight, and rows of activations are"):
        QuantSpec.parse("int4-learned.r-clip1", operand="activations")
    assert Quantizer(QuantSpec.parse("int4-learned.r-clip1")).scale.shape == (1,)


def test_scales_that_need_more_than_their_row_say_so() -> None:
    alone = ("int4-rms-ste", "int4-mse-ste", "fp4-e8m0.g32-ste", "int4-h16-absmax-ste")
    together = ("int4-rms.t-ste", "fp4-e4m3.g16-ste", "int4-learned-ste", "int4-learned.r-ste")
    assert [QuantSpec.parse(spec_text).scale.by_row for spec_text in (*alone, *together)] == [True] * 4 + [False] * 4
