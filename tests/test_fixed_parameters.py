"""A fit that holds parameters reaches the optimum of the rest, as 60 random restarts find it."""

import itertools
import random

import numpy as np
import pytest
from helpers import slow_but
from planted import OWN, RATIOS, SHARED, SIZES, planted
from shared_data import DATA, needs

from questctl.analysis.fit import Fit, fit_law, optimum
from questctl.analysis.laws import LAWS
from questctl.analysis.points import Points, read_points
from questctl.analysis.solver import solve, starts

LAWS_OF_LOSS = [name for name, law in LAWS.items() if law.in_auto]
MANY = 8  # shared parameters: the sets of a law with more are too many to try


def restarted(fit: Fit, count: int = 60) -> float:
    """The least cost of `count` random starts of the same problem with the same parameters held."""
    rng, problem = np.random.default_rng(1), fit.problem
    theta = starts(problem, {}, count=count, seed=1)
    theta = theta[rng.integers(len(theta), size=count)]
    theta = np.clip(theta + rng.normal(0, 0.5, theta.shape), problem.lower, problem.upper)
    for name, value in fit.fixed.items():
        theta[:, fit.index(name)] = fit.coordinates[fit.index(name)].internal(value)
    for name in fit.undetermined:
        theta[:, fit.index(name)] = 0.0
    return float(solve(problem, theta, fit.free).cost.min())


def noisy(law: str) -> Points:
    """Runs of a planted law with 1 % of noise, so that no law fits them exactly."""
    schemes = {"schemes": ("bf16", "w4a4", "w2a2")} if LAWS[law].uses_scheme else {}
    every = 1 if len(SHARED[law]) > MANY else 2
    return planted(law, 0.01, seed=5, sizes=SIZES[::every], ratios=RATIOS[::every], **schemes)[0]


def sets_of_shared(law: str) -> list[tuple[str, ...]]:
    """All sets of shared parameters but the whole; of a law of many, those of one or two and a sample of the others."""
    sizes = range(1, len(SHARED[law]))
    sets = [names for size in sizes for names in itertools.combinations(SHARED[law], size)]
    if len(SHARED[law]) <= MANY:
        return sets
    small = [names for names in sets if len(names) <= 2]
    return small + random.Random(0).sample(sets[len(small) :], 60)


def moved(fit: Fit, names, step: float) -> dict[str, float]:
    """Values for these parameters that are off their optimum by half of an e-fold, or by a fifth."""
    fix = {}
    for i in map(fit.index, names):
        p = fit.coordinates[i]
        theta = fit.theta[i] + step * (0.5 if p.log else 0.2 * abs(fit.theta[i]) + 0.02)
        fix[fit.names[i]] = float(p.natural(float(np.clip(theta, max(p.lower, -1e6) + 1e-6, min(p.upper, 1e6) - 1e-6))))
    return fix


def assert_optimal(points, law: str, names, step: float) -> None:
    """The fit with these parameters held is no worse than its restarts, and holds them."""
    free, _ = optimum(points, law)
    fix = moved(free, names, step)
    fit, _ = optimum(points, law, fix=fix)
    assert fit.fixed == pytest.approx(fix)
    # in a flat valley the solver stops where a step gains a millionth of the cost, a hundredth of what an interval would show
    assert fit.cost <= restarted(fit) * (1 + 1e-5) + 1e-15, (law, fix)


@pytest.mark.parametrize(
    ("law", "name"),
    slow_but(
        [(law, "B" if "B" in SHARED[law] else "b") for law in LAWS_OF_LOSS], ("chinchilla", "quest", "qat", "kumar", "eff-nd")
    ),
)
def test_an_amplitude_may_be_held(law, name):
    """An amplitude and its exponent are correlated: the start must not keep the exponent that another amplitude had."""
    assert_optimal(noisy(law), law, [name], 1.0)


@pytest.mark.parametrize("law", ["qat", "unified"])
def test_exponents_may_be_held(law):
    assert_optimal(noisy(law), law, ["alpha", "beta"], -1.0)


def test_parameters_of_a_scheme_may_be_held():
    assert_optimal(noisy("eff-nd"), "eff-nd", ["eff.w4a4", "effD.w4a4", "A"], -1.0)


@pytest.mark.slow
@pytest.mark.parametrize("law", LAWS_OF_LOSS)
def test_every_set_of_shared_parameters_may_be_held(law):
    points = noisy(law)
    for k, names in enumerate(sets_of_shared(law)):
        assert_optimal(points, law, names, 1.0 if k % 2 else -1.0)


@pytest.mark.slow
@pytest.mark.parametrize("law", [name for name in LAWS_OF_LOSS if LAWS[name].own])
def test_every_parameter_of_a_scheme_may_be_held_with_others(law):
    points = noisy(law)
    own = [f"{p.name}.w4a4" for p in LAWS[law].own]
    assert set(OWN) >= {p.name for p in LAWS[law].own}
    assert_optimal(points, law, own, 1.0)
    assert_optimal(points, law, [*own, next(iter(SHARED[law]))], -1.0)


@needs("quest_runs.csv")
@pytest.mark.parametrize(("alpha", "cost"), [(0.2, 4.5476e-4), (0.3, 5.7421e-4), (0.34, 6.4459e-4)])
def test_the_published_runs_with_alpha_held(alpha, cost):
    fit = fit_law(read_points(DATA / "quest_runs.csv"), "qat", fix={"alpha": alpha})
    assert fit.cost == pytest.approx(cost, rel=1e-4)


@needs("cases/tables/plain.csv")
def test_a_table_with_both_exponents_held():
    fit = fit_law(read_points(DATA / "cases/tables/plain.csv"), "qat", fix={"alpha": 0.517, "beta": 0.292})
    assert fit.cost == pytest.approx(2.5159e-4, rel=1e-3)
