"""Plans: transitions, budgets and next runs against closed forms, brute force and published numbers."""

import dataclasses
import math
import warnings
from itertools import pairwise

import numpy as np
import pytest
from planted import PUBLISHED, planted
from shared_data import DATA, needs

from questctl.analysis.design import (
    eff_gradient,
    goal_error,
    loss_at,
    loss_gradient,
    next_runs,
    transition_gradient,
    variance_left,
)
from questctl.analysis.fit import evaluate, fit_law
from questctl.analysis.fit_result import Fit
from questctl.analysis.formats import format_mse
from questctl.analysis.identify import sensitivity
from questctl.analysis.laws import LawError
from questctl.analysis.planner import (
    Option,
    bits_in_file,
    bits_in_memory,
    compute_multiplier,
    iso_flop,
    iso_loss,
    largest_size,
    optimal_size,
    outside,
    outside_by_reason,
    plan,
)
from questctl.analysis.points import make_points, read_points
from questctl.analysis.schemes import read_scheme
from questctl.analysis.tables import PointError
from questctl.analysis.transitions import best_format, best_per_bit, transition, transitions
from questctl.analysis.uncertainty import bootstrap, noise, unit_covariance
from questctl.analysis.untrained import eff_from_mse, format_error
from questctl.config import Layer, resolve
from questctl.quant.storage import artifact_bytes


@pytest.fixture(scope="module")
def fitted():
    return fit_law(planted("quest", noise=3e-3)[0])


@pytest.fixture(scope="module")
def boot(fitted):
    return bootstrap(fitted, 200)


def test_transition_against_its_equation(fitted) -> None:
    """At the transition, the two models of equal memory and equal FLOP have equal loss; beyond it fewer bits win."""
    found = transition(fitted, 1e9, 8, 4)

    def gap(ratio: float) -> float:
        return float(fitted.predict(4e9, 1e9 * ratio / 4, "w4a4") - fitted.predict(2e9, 1e9 * ratio / 2, "w8a8"))

    assert gap(found.ratio) == pytest.approx(0, abs=1e-9)
    assert gap(found.ratio * 1.1) < 0 < gap(found.ratio / 1.1)
    assert (found.many, found.few) == ("w8a8", "w4a4")


def test_never_and_always(fitted) -> None:
    theta = np.tile(fitted.theta, (2, 1))
    w4 = fitted.index("eff.w4a4")
    theta[:, w4] = np.log([1e-4, 1e15])
    theta[1, fitted.index("B")] = -9  # tokens matter to no one: the model with more parameters is better at once
    assert transitions(fitted, theta, 1e9, fitted.points.index(8), fitted.points.index(4)).tolist() == [math.inf, 0.0]
    worse = dataclasses.replace(fitted, theta=theta[0])
    assert transition(worse, 1e9).words == "never"


def test_refusals(fitted) -> None:
    without = fit_law(planted("quest", noise=3e-3, schemes=("bf16", "w4a4", "w2a2"))[0])
    with pytest.raises(PointError, match="no runs of scheme '8'"):
        transition(without, 7e9, 8, 4)
    with pytest.raises(LawError, match="does not have fewer bits"):
        transition(fitted, 7e9, 4, 8)
    with pytest.raises(LawError, match="does not tell schemes apart"):
        transition(fit_law(planted("chinchilla", noise=1e-3)[0], "chinchilla"), 7e9)
    with pytest.raises(PointError, match=r"no runs of scheme '1\.585'"):
        plan(fitted, [1.585], 1e20)


def test_compute_optimum_against_the_closed_form(fitted) -> None:
    """dL/dN = 0 at 6ND = C: N = (αA_g/βB)^(1/(α+β))·(C/6)^(β/(α+β)) (Hoffmann et al., arXiv 2203.15556, equation 4)."""
    p, C = fitted.params, 1e21
    for g, label in enumerate(fitted.points.labels):
        A = p["A"] / fitted.eff[label] ** p["alpha"]
        expected = (p["alpha"] * A / (p["beta"] * p["B"])) ** (1 / (p["alpha"] + p["beta"])) * (C / 6) ** (
            p["beta"] / (p["alpha"] + p["beta"])
        )
        N, D, limit = optimal_size(fitted, g, C)
        assert pytest.approx(expected, rel=1e-5) == N
        assert pytest.approx(C, rel=1e-9) == 6 * N * D
        assert limit == "FLOP"


def test_curves_against_the_law(fitted) -> None:
    N = np.geomspace(1e7, 1e10, 7)
    assert iso_flop(fitted, 4, 1e20, N) == pytest.approx([float(fitted.predict(n, 1e20 / 6 / n, 4)) for n in N])
    p = fitted.params
    goal = 2.6
    room = goal - p["E"] - p["A"] / (N * fitted.eff["w4a4"]) ** p["alpha"]
    expected = np.where(room > 0, (p["B"] / np.maximum(room, 1e-9)) ** (1 / p["beta"]), np.inf)
    assert np.isinf(expected[0])  # too small to get there on any data
    assert np.isfinite(expected[-1])
    assert iso_loss(fitted, 4, goal, N) == pytest.approx(expected, rel=1e-6)


def test_budgets_bind(fitted) -> None:
    free, bound = plan(fitted, [4], 1e22)[0], plan(fitted, [4], 1e22, 4 * 1e9)[0]
    assert (bound.N, bound.limit) == (1e9, "memory")
    assert bound.loss > free.loss
    serving = plan(fitted, [4], 1e22, inference_tokens=1e12)[0]
    assert serving.N < free.N
    assert pytest.approx(1e22, rel=1e-9) == 6 * serving.N * serving.D + 2 * serving.N * 1e12
    nearby = [float(fitted.predict(n, (1e22 - 2 * n * 1e12) / (6 * n), 4)) for n in serving.N * np.array([0.97, 1.03])]
    assert serving.loss < min(nearby)
    assert [o.loss for o in plan(fitted, [2, 4, 8, 16], 1e22)] == sorted(o.loss for o in plan(fitted, [2, 4, 8, 16], 1e22))


FILE = {"artifact": True}


def test_embedding_and_head_take_memory() -> None:
    """Of a shape of the presets: 2·V·d_model entries, the rest at the scheme's width."""
    plain, e, eh = (
        bits_in_memory(read_scheme(f"quest-w4a4{rows}")) for rows in ("", "+e.int2-rms-ste", "+eh.fp4-e8m0.g32-ste")
    )
    assert (plain, e, eh) == (((4, 0), (16, 0), (16, 0)), ((4, 0), (2, 0), (16, 0)), ((4, 0), (4.25, 0), (4.25, 0)))
    assert bits_in_memory(read_scheme("bf16+kv.int4-rms-ste")) == ((16, 0),) * 3
    assert bits_in_memory(read_scheme("quest-w4a4+e.int2-rms-ste"), "int8") == ((4, 0), (2, 0), (8, 0))
    for N, d in ((102_777_856, 1024), (822_151_168, 2048)):
        for bits, table in ((plain, 32), (e, 18), (eh, 8.5)):
            assert largest_size(4 * N + table * 50_304 * d, bits, 50_304) == pytest.approx(N, rel=0.03)
    assert largest_size(8e9, plain) == 2e9
    assert largest_size(math.inf, plain, 50_304) == math.inf
    assert largest_size(1e6, plain, 50_304) < 1e3


FILES = {  # scheme → keys of a config that trains it
    "w4a4": {"quant.weights": "int4-h128-rms-trust", "quant.activations": "int4-h128-rms-trust"},
    "w6a6-norot": {"quant.weights": "int6-rms-trust", "quant.activations": "int6-rms-trust"},  # codes take whole bytes
    "nvfp4": {"quant.weights": "fp4-e4m3.g16-ste", "quant.activations": "fp4-e4m3.g16-ste"},
    "quest-sparse": {"quant.weights": "int4-h128-rms-2of4pairs-ste", "quant.activations": "bf16"},
    "ternary": {"quant.weights": "ternary-rms.t-ste", "quant.activations": "bf16"},
    "bf16+eh.int4-rms-ste": {"quant.embedding": "int4-rms-ste", "quant.head": "int4-rms-ste"},
    "quest-w2a16+e.int3-rms-ste+h.fp4-e8m0.g32-ste": {
        "quant.weights": "int2-h128-rms-trust",
        "quant.embedding": "int3-rms-ste",
        "quant.head": "fp4-e8m0.g32-ste",
    },
}


@pytest.mark.parametrize("coded", [False, True])
@pytest.mark.parametrize("label", FILES)
def test_a_file_of_the_planned_size_is_what_the_model_takes(label, coded) -> None:
    """The largest model for the counted size of a model in the presets' proportions is that model, but for names and shapes."""
    shape = {"model.d_model": 1024, "model.n_layer": 8, "model.n_head": 8, "model.d_ff": 2816, "model.vocab_size": 32_000}
    config = resolve([Layer("test", {tuple(key.split(".")): value for key, value in {**shape, **FILES[label]}.items()})]).config
    pair = FILES[label].get("quant.weights", "bf16"), FILES[label].get("quant.activations", "bf16")
    scheme = dataclasses.replace(read_scheme(label, *pair), specs=(pair,))
    size = 8 * artifact_bytes(config.model, config.quant, "none", coded=coded)
    N = largest_size(size, bits_in_file(scheme, coded=coded), 32_000)
    assert pytest.approx(config.model.params_non_embedding, rel=0.06) == N


def test_a_file_has_scales_of_rows_too(fitted) -> None:
    V = 32_000
    assert bits_in_file(read_scheme("w4a4")) == ((4, 32), (16, 0), (16, 0))
    assert bits_in_file(read_scheme("w4a4+eh.int4-rms-ste")) == ((4, 32),) * 3
    assert bits_in_file(read_scheme("bf16")) == bits_in_memory(read_scheme("bf16"))  # not quantized: no scales
    plain, packed, coded = (plan(fitted, [4], 1e22, 8e9, vocab=V, **more)[0] for more in ({}, FILE, {**FILE, "coded": True}))
    assert plain.N > packed.N
    assert pytest.approx(packed.N * 4 / 3.602, rel=0.02) == coded.N  # INT4 of a Gaussian has 3.602 bits of entropy
    assert (plain.limit, packed.limit) == ("memory", "file")
    rows = plan(fitted, [4], 1e22, 8e9, vocab=V, tables="int4", **FILE)[0]
    assert rows.N > packed.N
    assert rows.loss < packed.loss


def test_a_faster_scheme_has_more_flops(fitted) -> None:
    slow, fast = (plan(fitted, [4], flops, speed=speed)[0] for flops, speed in ((2e20, None), (1e20, {"w4a4": 2.0})))
    assert fast == slow
    assert plan(fitted, [4], 1e20, speed={"w8a8": 2.0}) == plan(fitted, [4], 1e20)
    small, large = plan(fitted, [4], 1e22, 8e9, vocab=50_304)[0], plan(fitted, [4], 1e22, 8e9)[0]
    assert small.N < large.N
    assert small.limit == "memory"


def test_warnings_say_how_far_outside(fitted, boot) -> None:
    option = plan(fitted, [8], 2e26, 8 * 24e9, boot=boot, rivals=[fitted])[0]
    assert any(w.startswith("N = 2.4e+10 lies outside the data (3e+07 to 8e+08) by a factor of 30") for w in option.warnings)
    assert option.interval[0] < option.loss < option.interval[1]
    assert option.laws == {"quest": option.loss}
    assert outside(fitted.points, 1e8, 5e9, "w4a4") == ()


def test_warnings_together_take_a_line_for_each_reason(fitted) -> None:
    inside = [Option(s, 4, 1e8, 5e9, 3.0, "FLOP") for s in ("w4a4", "w3a3")]
    assert outside_by_reason(fitted.points, inside) == []
    far = [Option("w8a8", 8, 2.4e10, 5e11, 2.0, "memory"), Option("w3a3", 3, 4.8e10, 1e12, 2.0, "memory")]
    n, d, ratio = outside_by_reason(fitted.points, [*far, *inside[:1]])
    assert n == "N lies outside the data (3e+07 to 8e+08) by a factor of up to 60: w8a8, w3a3"
    for line, name in ((d, "D"), (ratio, "D/N")):
        assert line.startswith(f"{name} lies outside the data")
        assert line.endswith(": w8a8, w3a3")
    assert outside_by_reason(fitted.points, far)[0].endswith(" by a factor of up to 60: all 2 schemes")
    rows = np.flatnonzero(fitted.points.group == fitted.points.index("w3a3"))
    rare = fitted.points.subset(~np.isin(np.arange(len(fitted.points)), rows[2:]))
    assert outside_by_reason(rare, inside) == ["fewer than 3 runs: w3a3"]


def test_ties_are_those_of_paired_differences(fitted, boot) -> None:
    """Schemes whose losses share their errors are apart although their intervals overlap; equal ones are tied."""
    options = plan(fitted, ["bf16", "w8a8", "w4a4", "w2a2"], 1e20, boot=boot)
    assert options[1].interval[0] < options[0].interval[1]
    assert [o.tied for o in options][-1] is False
    p, rows = fitted.points, np.flatnonzero(fitted.points.group == fitted.points.index("w4a4"))
    both = np.concatenate([np.arange(len(p)), rows])
    loss = p.loss[both] * np.exp(1e-3 * np.random.default_rng(0).standard_normal(len(both)) * (np.arange(len(both)) >= len(p)))
    names = [*(p.labels[g] for g in p.group), *["w4a4-norot"] * len(rows)]
    twin = fit_law(make_points(p.N[both], p.D[both], loss, names))
    best, second = plan(twin, ["w4a4", "w4a4-norot"], 1e20, boot=bootstrap(twin, 100))
    assert best.tied
    assert second.tied
    assert plan(fitted, ["w4a4"], 1e20)[0].tied is None
    assert plan(fitted, ["w4a4"], 1e20, boot=boot)[0].tied is False


def test_formats_by_bootstrap(fitted, boot) -> None:
    share = best_per_bit(boot, [2, 3, 4, 8, 16])
    assert sum(share.values()) == pytest.approx(1)
    value = {
        label: fitted.eff[label] / bits for label, bits in (("w2a2", 2), ("w3a3", 3), ("w4a4", 4), ("w8a8", 8), ("bf16", 16))
    }
    assert max(share, key=share.get) == max(value, key=value.get)
    at = best_format(boot, [2, 4, 8, 16], 7e9, 100)
    assert sum(at.values()) == pytest.approx(1)


def test_multiplier_of_a_recipe_that_needs_half_the_compute() -> None:
    """Losses of b at C equal those of a at 2C: the multiplier is 2."""
    a, _ = planted("chinchilla", noise=1e-3)
    b = fit_law(a.with_loss(1.69 + (a.loss - 1.69) * 2 ** -(0.31 / 2)), "chinchilla")
    exact_a, exact_b = bootstrap(fit_law(a, "chinchilla"), 60), bootstrap(b, 60)
    same, interval = compute_multiplier(exact_a, exact_a, 1e20, 50)
    assert same == pytest.approx(1, rel=1e-3)
    assert interval == pytest.approx((1, 1), rel=1e-3)
    value, (low, high) = compute_multiplier(exact_a, exact_b, 1e20, 50)
    assert low < value < high
    assert value == pytest.approx(2, rel=0.12)


def test_a_loss_that_the_other_recipe_never_reaches() -> None:
    """Its floor lies above: 0 times less compute, in the interval too, and without a warning of numpy."""
    a, _ = planted("chinchilla", noise=1e-3)
    first = bootstrap(fit_law(a, "chinchilla"), 40)
    second = bootstrap(fit_law(a.with_loss(a.loss + 0.5), "chinchilla"), 40)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert compute_multiplier(first, second, 1e24, 50) == (0.0, (0.0, 0.0))
        value, (low, high) = compute_multiplier(second, first, 1e24, 50)
    assert 1 < low < value < high < math.inf
    reached = second.theta.copy()
    reached[:4] = first.theta[:4]  # a tenth of the replicates reach it
    value, (low, high) = compute_multiplier(first, dataclasses.replace(second, theta=reached), 1e24, 50)
    assert (value, low) == (0, 0)
    assert high == pytest.approx(1, rel=0.3)


def test_eff_of_an_untrained_format() -> None:
    points, _ = planted("unified", noise=5e-4)
    fit = fit_law(points.subset(points.group != points.index("w3a3")), "unified")
    truth = fit_law(points, "unified").eff["w3a3"]
    value, interval = eff_from_mse(fit, format_mse("int3"), format_mse("int3"), bootstrap(fit, 200))
    assert value == pytest.approx(truth, rel=0.02)
    assert interval[0] < truth < interval[1]
    with pytest.raises(LawError, match="law unified"):
        eff_from_mse(fit_law(points), 0.1, 0.1)


def held_out_coverage(points) -> list[bool]:
    """Of each scheme in turn: is the eff that law quest measures inside the interval from the other schemes?"""
    measured, inside = fit_law(points), []
    for g, scheme in enumerate(points.schemes[1:], 1):
        fit = fit_law(points.subset(points.group != g), "unified")
        _, (low, high) = eff_from_mse(fit, scheme.w_mse, scheme.a_mse, bootstrap(fit, 40))
        inside.append(low < measured.eff[scheme.label] < high)
    return inside


@pytest.mark.slow
def test_intervals_of_untrained_formats_hold_what_a_format_has_of_its_own() -> None:
    """eff of each format is off the law by a tenth at random: the intervals hold it as often as they say."""
    inside = []
    for seed in range(3):
        points, theta = planted(
            "unified", noise=1e-3, seed=seed, schemes=("bf16", "w8a8", "w6a6", "w4a4", "w3a3", "w2a2", "w4a16")
        )
        fit = fit_law(points, "unified")
        own = np.exp(0.1 * np.random.default_rng(seed).standard_normal(7) * (np.arange(7) > 0))
        moved = fit.law.predict(theta, fit.design.at(points.N * own[points.group], points.D, points.group))[0]
        inside += held_out_coverage(points.with_loss(points.loss * moved / fit.law.predict(theta, fit.design)[0]))
    assert 0.88 <= np.mean(inside) <= 1


def test_two_formats_do_not_say_what_the_law_misses() -> None:
    points, _ = planted("unified", noise=5e-4, schemes=("bf16", "w4a4", "w2a2"))
    fit = fit_law(points, "unified")
    assert format_error(fit) is None
    assert eff_from_mse(fit, 0.03, 0.03, bootstrap(fit, 20))[1] is None


@pytest.mark.slow
@needs("quest_runs.csv")
def test_published_formats_lie_in_the_intervals_from_the_others() -> None:
    points = read_points(DATA / "quest_runs.csv")
    known = [i for i, s in enumerate(points.schemes) if s.rotated and not math.isnan(s.w_mse + s.a_mse)]
    inside = held_out_coverage(points.subset(np.isin(points.group, known)))
    assert len(inside) == 10
    assert sum(inside) >= 9


def sharper(fit: Fit) -> np.ndarray:
    """The gradient of the transition from 8 to 4 bits at 7B."""
    return transition_gradient(fit, 7e9, fit.points.index(8), fit.points.index(4))


@pytest.mark.slow
def test_transition_error_is_the_spread_of_refits(fitted) -> None:
    """The delta method against the transitions of fits to new noise."""
    truth, _ = planted("quest")
    drawn = []
    for seed in range(60):
        f = fit_law(planted("quest", noise=3e-3, seed=100 + seed)[0], n_starts=1)
        drawn.append(math.log(transition(f, 7e9).ratio))
    exact = fit_law(truth)
    scaled = goal_error(fitted, sharper(fitted)) / noise(fitted) * 3e-3
    assert np.std(drawn) == pytest.approx(scaled, rel=0.25)
    assert np.mean(drawn) == pytest.approx(math.log(transition(exact, 7e9).ratio), abs=0.5 * np.std(drawn))


def test_variance_left_is_that_of_the_larger_design(fitted) -> None:
    """Sherman–Morrison against the covariance of a design that has the run."""
    gradient = sharper(fitted)
    J = sensitivity(fitted)
    C = unit_covariance(J)
    run = (fitted.points.index(8), 30e6, 24e9)
    at = fitted.design.at(np.array([run[1]]), np.array([run[2]]), np.array([run[0]]))
    row = fitted.law.jacobian(fitted.theta, at)[0] / fitted.law.predict(fitted.theta, at)[0][:, None]
    larger = unit_covariance(np.concatenate([J, row]))
    expected = (gradient @ larger @ gradient) / (gradient @ C @ gradient)
    assert variance_left(fitted, gradient, C, [run])[0] == pytest.approx(expected, rel=1e-6)


def test_next_runs(fitted) -> None:
    runs = next_runs(fitted, sharper(fitted), 3)
    assert all(b.variance < a.variance < 1 for a, b in pairwise(runs))
    cells = [(r.scheme, r.N, r.D) for r in next_runs(fitted, sharper(fitted), 12)]
    assert len(set(cells)) == 12
    assert len(next_runs(fitted, sharper(fitted), 5, runs=[(0, 3e7, 3e9), (1, 3e7, 3e9)])) == 2
    measured, new = next_runs(fitted, sharper(fitted), 2, runs=[(1, 3e7, 3e9 * 1.01), (1, 3e7, 3e10)])
    assert {r.D: r.seed for r in (measured, new)} == {3e9 * 1.01: 1, 3e10: 0}  # the first has a run in the points
    capped = next_runs(fitted, sharper(fitted), 2, flops=2e18)
    assert all(r.flops <= 2e18 for r in capped)
    with pytest.raises(LawError, match="no candidate run costs"):
        next_runs(fitted, sharper(fitted), 1, flops=1)


def test_eff_gradient_is_that_of_the_log_of_eff(fitted) -> None:
    gradient = eff_gradient(fitted, ["w4a4", "w2a2"])
    for row, scheme in zip(gradient, ("w4a4", "w2a2"), strict=True):
        expected = np.zeros(len(fitted.theta))
        expected[fitted.index(f"eff.{scheme}")] = 1.0  # the coordinate is log eff
        np.testing.assert_allclose(row, expected, atol=1e-6)
    assert len(eff_gradient(fitted)) == len(fitted.points.labels) - 1


def test_next_runs_for_eff_leave_the_variance_that_they_promise() -> None:
    """Against the spread of fits to new noise, of a small design with and without the runs."""
    truth, rng = fit_law(planted("quest", noise=0)[0]), np.random.default_rng(0)
    design = [(s, n, n * r) for s in ("bf16", "w4a4", "w2a2") for n in (3e7, 1e8, 3e8) for r in (25, 100)]

    def fits(cells: list[tuple[str, float, float]], count: int) -> list[Fit]:
        scheme, N, D = zip(*cells, strict=True)
        loss = np.array([float(truth.predict(n, d, s)) for s, n, d in cells])
        noisy = (loss * np.exp(3e-3 * rng.standard_normal(len(loss))) for _ in range(count))
        return [fit_law(make_points(N, D, each, scheme), n_starts=1) for each in noisy]

    def spread(cells: list[tuple[str, float, float]]) -> float:
        draws = [[math.log(fit.eff[s]) for s in ("w4a4", "w2a2")] for fit in fits(cells, 80)]
        return float(np.var(draws, axis=0).sum())

    fit = fits(design, 1)[0]
    runs = next_runs(fit, eff_gradient(fit), 6)
    assert runs[-1].variance < 0.7
    after = spread(design + [(r.scheme, r.N, r.D) for r in runs])
    assert after / spread(design) == pytest.approx(runs[-1].variance, rel=0.4)


def test_loss_gradient_is_that_of_the_log_of_the_prediction(fitted) -> None:
    gradient = loss_gradient(fitted, 3e9, 6e10, ["w4a4", "bf16"])
    for row, scheme in zip(gradient, ("w4a4", "bf16"), strict=True):
        for i in range(len(fitted.theta)):
            step = np.zeros(len(fitted.theta))
            step[i] = 1e-5
            moved = [
                dataclasses.replace(fitted, theta=fitted.theta + sign * step).predict(3e9, 6e10, scheme) for sign in (1, -1)
            ]
            assert row[i] == pytest.approx((math.log(moved[0]) - math.log(moved[1])) / 2e-5, abs=1e-6), fitted.law.name
    assert loss_at(fitted, 3e9, 6e10).tolist() == [float(fitted.predict(3e9, 6e10, s)) for s in fitted.points.labels]


def test_next_runs_by_the_second_prefer_what_is_quick(fitted) -> None:
    gradient = eff_gradient(fitted)
    slow = next_runs(fitted, gradient, 3, seconds=lambda group, N, D: 1e3 if N > 6e7 else 1.0)
    assert all(r.N <= 6e7 and r.seconds == 1.0 for r in slow)
    assert next_runs(fitted, gradient, 1)[0].seconds is None


# ------------------------------------------------------------------------------------------ published numbers


@pytest.fixture(scope="module")
def published():
    """The published parameter vector on the published runs."""
    return evaluate(read_points(DATA / "quest_runs.csv"), "quest", PUBLISHED)


@needs("quest_runs.csv")
def test_published_transitions(published) -> None:
    expected = [124.93547, 44.78579, 25.09382, 4.565957]
    assert [transition(published, s).ratio for s in (0.8e9, 3.2e9, 7e9, 70e9)] == pytest.approx(expected, rel=3e-7)


@needs("quest_runs.csv")
def test_who_makes_the_most_of_a_stored_bit_may_be_open() -> None:
    from questctl.analysis.summary import leader

    nan = math.nan
    assert leader({"bf16": (1, nan, nan), "a": (2, 1.5, 2.5), "b": (1.5, 1.2, 1.9)}) == ("a", (), False)
    assert leader({"bf16": (1, nan, nan), "a": (2, 1.5, 2.5), "b": (1.9, 1.2, 2.2)}) == ("a", ("b",), False)
    assert leader({"bf16": (1, nan, nan), "a": (1e-9, 1e-17, 1e6)}) == ("bf16", ("a",), True)
    assert leader({"bf16": (1, nan, nan), "a": (4, 1e-3, 1e3), "b": (2, 1.9, 2.1)}) == ("a", (), True)
    assert leader({"bf16": (1, nan, nan), "a": (2, 1.5, 2.5), "b": (1e-9, 1e-17, 0.5)}) == ("a", (), False)


def test_published_eff_per_bit(published) -> None:
    from questctl.analysis.summary import eff_per_bit

    value = eff_per_bit(published)
    assert [value[k] for k in ("w1a1", "w2a2", "w3a3", "w4a4", "w8a8")] == pytest.approx(
        [0.32807, 1.21497, 2.31001, 2.76733, 2.03239], abs=6e-6
    )


@needs("quest_runs.csv")
def test_published_budget(published) -> None:
    """24 GB of weights, 6ND = 2e21: 8 bits, filled; D/N far outside the data."""
    options = plan(published, [4, 8, 16], 2e21, 8 * 24e9)
    assert [(o.w_stored_bits, o.N) for o in options] == [(8, 24e9), (4, 48e9), (16, 12e9)]
    assert [o.loss for o in options] == pytest.approx([2.12441733, 2.14578650, 2.15944603], abs=6e-9)
    assert any(w.startswith("D/N = 0.579 lies outside the data") for w in options[0].warnings)


@pytest.mark.slow
@needs("quest_runs.csv")
def test_published_laws_disagree_about_the_transition() -> None:
    points = read_points(DATA / "quest_runs.csv")
    core = points.subset(
        np.isin(
            points.group,
            [
                i
                for i, s in enumerate(points.schemes)
                if s.rotated and s.w_stored_bits == s.w_grid_bits and "fp4" not in s.label
            ],
        )
    )
    expected = {"unified": 37, "quartet": 85, "kumar": 1.4, "qat": math.inf}
    assert {k: transition(fit_law(core, k), 7e9).ratio for k in expected} == pytest.approx(expected, rel=0.03)
    fit = fit_law(points)
    boot = bootstrap(fit, 1000)
    found = transition(fit, 7e9, boot=boot)
    assert found.ratio == pytest.approx(25, rel=0.02)
    assert found.interval[1] / found.interval[0] > 10  # an order of magnitude and more
    assert found.interval[0] < 12
    assert found.interval[1] > 200
    assert boot.interval("eff.w4a4") == pytest.approx((0.655, 0.726), rel=0.02)
    assert best_per_bit(boot, [1, 2, 3, 4, 8, 16])["w4a4"] == 1.0
    cases = bootstrap(fit, 300, kind="cases")
    assert np.mean(cases.values("E") < 1e-3) > 0.94  # redrawing cases hides that E could be more than 0 …
    assert boot.interval("E")[1] > 0.1  # … which the wild bootstrap shows
    with pytest.raises(PointError, match="no runs of scheme '8'"):
        transition(fit_law(points.subset(points.group != points.index("w8a8"))), 7e9)


@needs("quest_runs.csv")
def test_published_next_run() -> None:
    fit = fit_law(read_points(DATA / "quest_runs.csv"))
    assert goal_error(fit, sharper(fit)) == pytest.approx(0.870, abs=5e-4)
    gradient = sharper(fit)
    N = 30482560.0
    left = variance_left(fit, gradient, unit_covariance(sensitivity(fit)), [(fit.points.index(8), N, 800 * N)])[0]
    assert 1 - left == pytest.approx(0.35, abs=0.005)
    assert pytest.approx(4.5e18, rel=0.01) == 6 * N * 800 * N
