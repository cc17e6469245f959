"""Three quantized products: unbiased roundings over 10⁵ draws, both products of the backward pass, batches in parts, runs."""

from __future__ import annotations

import pytest
import tiny
import torch
from helpers import drawn_sums, slow_but

from questctl.analysis.schemes import read_scheme
from questctl.config import QuantConfig, RunConfig
from questctl.errors import UsageError
from questctl.quant.grids import FP4, FP8
from questctl.quant.layer_specs import check_layers
from questctl.quant.linear import QuantLinear, as_part
from questctl.quant.products import over_outputs, over_tokens
from questctl.quant.quantizer import Quantizer
from questctl.quant.scales import FourOverSix, UpE4M3, UpE8M0
from questctl.quant.spec import QuantSpec
from questctl.scaling.plan_files import quant_keys
from questctl.store import RunStore
from questctl.training.loop import train

STOCHASTIC = ["fp4.sr-ue4m3.g16-ste", "fp4.sr-ue8m0.g32-ste", "fp4.sr-h32.f-ue8m0.g32-ste", "fp4.sr-h128.f-ue4m3.g16-ste"]
EDEN = "fp4-h128.ff-eden.g16-ste"
UNBIASED = [*STOCHASTIC, EDEN]


def normal(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def of(spec_text: str) -> Quantizer:
    return Quantizer(QuantSpec.parse(spec_text, operand="gradients"))


def moments(spec_text: str, x: torch.Tensor, draws: int = 100_000, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and mean square of the error of each element of x (K,) over so many roundings, each with signs of its own."""
    q, generator = of(spec_text), torch.Generator().manual_seed(seed)
    basis = q.spec.basis
    total, squares = torch.zeros(len(x), dtype=torch.float64), torch.zeros(len(x), dtype=torch.float64)
    for _ in range(10):
        rows = x.expand(draws // 10, len(x))
        drawn = q.draws(rows, generator)
        signs = tuple((2 * torch.randint(0, 2, rows.shape, generator=generator) - 1).float() for _ in drawn.signs)
        y = q.turned(rows, drawn._replace(signs=signs))
        y = basis.unrotate(y) if basis else y
        for i, sign in enumerate(reversed(signs)):
            y = (basis.rotate(y) if i else y) * sign
        error = (y - x).double()
        total += error.sum(0)
        squares += error.square().sum(0)
    return total / draws, squares / draws


@pytest.mark.parametrize(
    "x", [pytest.param(normal(128), marks=pytest.mark.slow), normal(128, seed=2) ** 3], ids=["normal", "heavy"]
)
@pytest.mark.parametrize("spec_text", UNBIASED)
def test_the_mean_of_1e5_draws_is_the_value(spec_text: str, x: torch.Tensor) -> None:
    mean, square = moments(spec_text, x)
    error = ((square - mean.square()).clamp_min(0) / 100_000).sqrt()
    unseen = 1e-5 * x.abs().max()  # what a level that is drawn once in 10⁵ times would add: a third of a step
    assert (mean.abs() <= 4 * error + unseen).all()


def test_what_is_not_unbiased_is_found_out() -> None:
    """The test above has the power: one rotation instead of two, scales that clip, rounding to nearest."""
    x = normal(128, seed=2) ** 3
    for spec_text in ("fp4-h128.f-eden.g16-ste", "fp4.sr-e4m3.g16-ste", "fp4.sr-e8m0.g32-ste", "fp4-h128.f-e4m3.g16-ste"):
        mean, square = moments(spec_text, x)
        error = ((square - mean.square()).clamp_min(0) / 100_000).sqrt()
        assert (mean.abs() > 4 * error + 1e-5 * x.abs().max()).any(), spec_text


def test_a_corrected_scale_has_less_than_55_percent_of_the_error_of_stochastic_rounding() -> None:
    for x in (normal(128), normal(128, seed=2) ** 3, normal(256, seed=3)):
        eden, stochastic = (moments(spec_text, x, 10_000)[1].sum() for spec_text in (EDEN, "fp4.sr-h128.f-ue4m3.g16-ste"))
        assert eden < 0.55 * stochastic


# --- scales -----------------------------------------------------------------------------------------------------------


def test_scales_that_are_rounded_up_clip_nothing_and_are_the_smallest_that_do() -> None:
    z = normal(500, 16) * normal(500, 1, seed=3).exp()
    z[0] = 0
    s = UpE8M0().of(z, FP4())
    peak = z.abs().amax(-1, keepdim=True)
    assert s[0] == 0
    assert (peak[1:] <= 6 * s[1:]).all()
    assert (peak[1:] > 3 * s[1:]).all()
    assert UpE8M0().of(torch.tensor([[6.0, 1.0], [6.1, 0.0], [12.0, 0.0]]), FP4()).flatten().tolist() == [1.0, 2.0, 2.0]
    s, tensor = UpE4M3().of(z, FP4()), peak.max() / (6 * 256)
    assert (peak <= 6 * s * (1 + 1e-6)).all()
    levels = torch.tensor([x for x in FP8().levels if x > 0])
    place = (s / tensor - levels).abs().argmin(-1)
    torch.testing.assert_close(levels[place] * tensor, s.squeeze(-1))
    smaller = levels[(place - 1).clamp_min(0)] * tensor
    assert ((6 * smaller < peak.squeeze(-1) * (1 + 1e-6)) | (place == 0)).all()


def test_four_over_six_takes_the_better_of_two_scales_for_each_group() -> None:
    z = normal(400, 16)
    s, tensor = FourOverSix().of(z, FP4()), z.abs().max() / (6 * 256)
    peak = z.abs().amax(-1, keepdim=True)
    tried = [tensor * FP8().quantize(peak / top / tensor) for top in (6.0, 4.0)]
    errors = [(z - t * FP4().quantize(z / t)).square().sum(-1, keepdim=True) for t in tried]
    ours = (z - s * FP4().quantize(z / s)).square().sum(-1, keepdim=True)
    torch.testing.assert_close(ours, torch.minimum(*errors), rtol=1e-4, atol=1e-6)
    assert 0.2 < (errors[1] < errors[0]).float().mean() < 0.8
    assert ours.sum() < 0.95 * errors[0].sum()


# --- products ---------------------------------------------------------------------------------------------------------


def layer(
    spec_text: str, k: int = 128, n: int = 128, specs: tuple[str, str] = ("bf16", "bf16"), backward: str = "both"
) -> QuantLinear:
    torch.manual_seed(0)
    weights, activations = (QuantSpec.parse(s) for s in specs)
    gradients = QuantSpec.parse(spec_text, operand="gradients")
    return QuantLinear(k, n, weights, activations, gradients, backward=backward, name="blocks.0.q")


@pytest.mark.parametrize("shape", [(1,), (63,), (3, 5), (2, 128)])
@pytest.mark.parametrize("spec_text", ["int8-absmax-ste", "int8-h32.ff-rms.g32-ste", "fp8-eden.g16-ste"])
def test_both_products_are_those_of_the_operands_up_to_a_fine_grid(spec_text: str, shape: tuple[int, ...]) -> None:
    """Whatever the number of tokens: padding adds nothing, and rotations cancel."""
    m, x, g = layer(spec_text), normal(*shape, 128).requires_grad_(), normal(*shape, 128, seed=2)
    y = m(x)
    torch.testing.assert_close(y, x @ m.weight.T)
    into_x, into_w = torch.autograd.grad(y, (x, m.weight), g)
    for ours, exact in ((into_x, g @ m.weight), (into_w, g.reshape(-1, 128).T @ x.detach().reshape(-1, 128))):
        assert (ours - exact).norm() < 0.06 * exact.norm()
    assert not torch.equal(into_x, g @ m.weight)


def test_each_operand_is_rounded_along_what_its_product_sums_over() -> None:
    """By hand, without rotation: rows of g and columns of W for the input, columns of g and of x for the weight."""
    spec_text = "int4-absmax-ste"
    q = of(spec_text)
    g, w, x = normal(2, 16, 48), normal(48, 64, seed=2), normal(2, 16, 64, seed=3)
    near = Quantizer(QuantSpec.parse(spec_text))
    torch.testing.assert_close(over_outputs(g, w, q), near(g) @ near(w.T.contiguous()).T)
    flat = lambda t: t.reshape(32, -1).T.contiguous()  # noqa: E731
    torch.testing.assert_close(over_tokens(g, x, q), near(flat(g)) @ near(flat(x)).T)


@pytest.mark.parametrize("spec_text", ["int4-absmax-ste", "int4-h32-absmax-ste", "int4-h16.ff-absmax-ste"])
@pytest.mark.parametrize("weights", ["fp4-e4m3.b16-ste", "int4-h32-rms.b32-trust"])
def test_a_weight_in_squares_is_multiplied_as_it_is_in_both_passes(spec_text: str, weights: str) -> None:
    """By hand: ∂x = Q(g)·W with g along its outputs, not rotated, and the very W of the forward pass."""
    activations = "bf16" if "h32" not in weights else "int8-h32-absmax-ste"
    m, x, g = layer(spec_text, specs=(weights, activations)), normal(3, 16, 128).requires_grad_(), normal(3, 16, 128, seed=2)
    y = m(x)
    (into_x,) = torch.autograd.grad(y, x, g)
    w, near = m.weight_quantizer(m.weight).detach(), Quantizer(QuantSpec.parse("int4-absmax-ste"))
    by_hand = near(g) @ w
    if "h32" in weights:
        basis = m.input_quantizer.spec.basis
        torch.testing.assert_close(y, m.input_quantizer(x) @ w.T)
        by_hand = basis.unrotate(by_hand)
    torch.testing.assert_close(into_x, by_hand)


def test_stochastic_gradients_with_a_weight_in_squares_are_unbiased() -> None:
    """Quantized forward products, and the mean of 300 gradients of the input: those that flow through the same weight."""
    m = layer("fp4.sr-h16.f-ue4m3.g16-ste", specs=("fp4-e4m3.b16-ste", "fp4-e4m3.g16-ste"))
    x, g, draws = normal(1, 64, 128).requires_grad_(), normal(1, 64, 128, seed=2), 300
    w = m.weight_quantizer(m.weight).detach()
    wanted = (g @ w, torch.einsum("btn,btk->nk", g, m.input_quantizer(x).detach()))
    sums, squares = drawn_sums(m, x, g, wanted, draws)
    for total, square, true in zip(sums, squares, wanted, strict=True):
        t = (total / draws - true) / ((square / draws / draws).sqrt() + 1e-9)
        assert t.abs().max() < 6
        assert t.square().mean() == pytest.approx(1, abs=0.15)


def test_a_corrected_scale_needs_weights_that_are_rotated_along() -> None:
    words = {"quant.method": "nvfp4-2d", "quant.gradients": "fp4-h32.ff-eden.g16-ste"}
    once, both = tiny.config(words), tiny.config(words, quant__backward="both")
    check_layers(once.model, once.quant)
    assert once.scheme == "nvfp4-2d+g.fp4-h32.ff-eden.g16"
    with pytest.raises(UsageError, match=r"layer blocks\.0\.q: 'eden\.g16' is unbiased only where both operands"):
        check_layers(both.model, both.quant)


@pytest.mark.parametrize("spec_text", slow_but(["fp4.sr-ue4m3.g16-ste", EDEN], [EDEN]))
def test_the_mean_of_both_gradients_is_that_of_exact_products(spec_text: str) -> None:
    specs = ("fp4-e4m3x.g16-ste", "fp4-e4m3x.g16-ste")
    m, exact = layer(spec_text, specs=specs), layer("bf16", specs=specs)
    x, g, draws = normal(1, 128, 128).requires_grad_(), normal(1, 128, 128, seed=2), 300
    wanted = torch.autograd.grad(exact(x), (x, exact.weight), g)
    sums, squares = drawn_sums(m, x, g, wanted, draws)
    for total, square, true in zip(sums, squares, wanted, strict=True):
        error = (square / draws / draws).sqrt()
        t = (total / draws - true) / (error + 1e-9)
        assert t.abs().max() < 6  # of 16,384 elements
        assert t.square().mean() == pytest.approx(1, abs=0.15)


@pytest.mark.parametrize("spec_text", ["fp4.sr-ue8m0.g32-ste", "int4.sr-h32.ff-absmax-ste"])
def test_a_batch_in_parts_draws_as_a_whole_one(spec_text: str) -> None:
    m, x, g = layer(spec_text), normal(4, 32, 128).requires_grad_(), normal(4, 32, 128, seed=2)

    def gradients(rows: slice) -> tuple[torch.Tensor, ...]:
        torch.manual_seed(7)
        return torch.autograd.grad(m(x[rows]), (x, m.weight), g[rows])

    whole = gradients(slice(None))
    parts = []
    for first in (0, 2):
        with as_part(m, first, 4):
            parts.append(gradients(slice(first, first + 2)))
    torch.testing.assert_close(parts[0][0] + parts[1][0], whole[0])
    if "g32" in spec_text:  # scales of tokens' blocks; one per row would be that of the part
        torch.testing.assert_close(parts[0][1] + parts[1][1], whole[1])


# --- configs and runs -------------------------------------------------------------------------------------------------


def test_the_scheme_of_the_backward_pass_is_part_of_the_run() -> None:
    keys = {"quant.gradients": "fp4.sr-ue4m3.g16-ste"}
    once, both = tiny.config(tiny.QUEST | keys), tiny.config(tiny.QUEST | keys | {"quant.backward": "both"})
    assert once.run_id == tiny.config(tiny.QUEST | keys, quant__backward="once").run_id != both.run_id
    assert "backward" not in once.to_json()["quant"]
    assert RunConfig.from_json(both.to_json()) == both
    assert both.scheme == "quest-w4a4+g.fp4.sr-ue4m3.g16-both"
    scheme = read_scheme(both.scheme)
    assert scheme is not None
    assert scheme.w_grid_bits == 4
    assert quant_keys(scheme, 64) | keys == {**quant_keys(scheme, 64), "quant.backward": "both"} | keys
    with pytest.raises(UsageError, match=r"quant\.backward: both needs quant\.gradients"):
        tiny.config(tiny.QUEST, quant__backward="both")
    assert QuantConfig(gradients="fp4-h32.ff-eden.g16-ste", backward="both").label == "bf16+g.fp4-h32.ff-eden.g16-both"


@pytest.mark.parametrize(
    ("spec_text", "says"),
    [
        ("fp4-h32.f-rms-ste", "has fresh signs at each use"),
        ("fp4-eden.g16-ste", "corrects the shrinking of unbiased gradients"),
    ],
)
@pytest.mark.parametrize("operand", ["weights", "activations"])
def test_what_only_gradients_may_have_is_refused_elsewhere(spec_text: str, says: str, operand: str) -> None:
    with pytest.raises(UsageError, match=says):
        QuantSpec.parse(spec_text, operand=operand)


@pytest.mark.parametrize(
    ("method", "spec_text"),
    [
        pytest.param("nvfp4", "fp4.sr-ue8m0.g16-ste", marks=pytest.mark.slow),
        pytest.param("nvfp4", "fp4-h32.ff-eden.g16-ste", marks=pytest.mark.slow),
        ("nvfp4-2d", "fp4.sr-h16.f-ue4m3.g16-ste"),
    ],
)
def test_a_run_with_three_quantized_products_learns_and_resumes_with_the_same_bits(
    tmp_path, method: str, spec_text: str
) -> None:
    keys = {"quant.method": method, "quant.gradients": spec_text, "quant.backward": "both", "train.steps": 14}
    config = tiny.config(keys)
    result = train(config, runs=tmp_path / "whole")
    exact = train(tiny.config(keys | {"quant.gradients": "bf16", "quant.backward": "once"}), runs=tmp_path / "whole")
    assert result.loss != exact.loss
    assert abs(result.loss - exact.loss) < 0.15
    seen: list[int] = []
    with pytest.raises(Exception, match="stopped by"):
        train(config, runs=tmp_path / "parts", stop=lambda: seen.append(1) or len(seen) > 6)
    assert train(config, runs=tmp_path / "parts").loss == result.loss
    a, b = (RunStore(tmp_path / folder).run(config.run_id).model_path.read_bytes() for folder in ("whole", "parts"))
    assert a == b
