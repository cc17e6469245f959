"""Points with a planted truth: a law, its parameters, and a grid of runs drawn from it."""

import dataclasses

import numpy as np

from questctl.analysis.laws import Design, Law, get_law
from questctl.analysis.points import Points, make_points

SIZES = (30e6, 50e6, 100e6, 200e6, 430e6, 800e6)
RATIOS = (25, 50, 100, 200)
PASSES = (1, 8, 40)  # over their text, of the runs of laws that know of repeated tokens
SHARES = (0, 0.25, 0.5, 0.75, 0.9)  # before quantization, of the runs of laws that know of it
SCHEMES = ("bf16", "w8a8", "w4a4", "w3a3", "w2a2", "w4a16")
# of law quest, as published with the runs in quest_runs.csv
PUBLISHED_EFF = {"w1a1": 0.0205046859, "w2a2": 0.151870911, "w3a3": 0.433126203, "w4a4": 0.691831718, "w8a8": 1.01619263}
PUBLISHED = {
    "A": np.exp(2.09605662),
    "alpha": 0.062726522,
    "B": np.exp(4.45912547),
    "beta": 0.241288351,
    "E": np.exp(-6.55478434),
    **{f"eff.{scheme}": eff for scheme, eff in PUBLISHED_EFF.items()},
}


def grid(sizes=SIZES, ratios=RATIOS, schemes=SCHEMES) -> Points:
    """The full grid, with a loss of 1 everywhere plus a trace that keeps rows distinct."""
    cells = [(n, n * r, s) for s in schemes for n in sizes for r in ratios]
    return make_points([c[0] for c in cells], [c[1] for c in cells], 1 + 1e-9 * np.arange(len(cells)), [c[2] for c in cells])


# natural values; per-scheme ones are made from the scheme's bits by `truth`
SHARED = {
    "quest": {"A": 406.4, "alpha": 0.34, "B": 410.7, "beta": 0.28, "E": 1.69},
    "eff-nd": {"A": 406.4, "alpha": 0.34, "B": 410.7, "beta": 0.28, "E": 1.69},
    "quartet": {"A": 1.52e5, "alpha": 0.589, "B": 5.25e5, "beta": 0.544, "E": 1.35, "gamma": 0.274},
    "qat": {"A": 406.4, "alpha": 0.34, "B": 410.7, "beta": 0.28, "E": 1.69, "gamma_D": 0.08, "gamma_N": 0.22},
    "offset": {"A": 406.4, "alpha": 0.34, "B": 410.7, "beta": 0.28, "E": 1.69},
    "unified": {"A": 406.4, "alpha": 0.34, "B": 410.7, "beta": 0.28, "E": 1.69, "F": 0.4, "C": 1.6},
    "kumar": {"A": 406.4, "alpha": 0.34, "B": 410.7, "beta": 0.28, "E": 1.69, "gamma_w": 2.6, "gamma_a": 2.2},
    "kumar-offset": {
        **{"A": 406.4, "alpha": 0.34, "B": 410.7, "beta": 0.28, "E": 1.69},
        **{"gamma_w": 2.6, "gamma_a": 2.2, "offset_w": 0.58, "offset_a": 0.55},
    },
    "chinchilla": {"A": 406.4, "alpha": 0.34, "B": 410.7, "beta": 0.28, "E": 1.69},
    "repeated": {"A": 406.4, "alpha": 0.34, "B": 410.7, "beta": 0.28, "E": 1.69, "R_D": 15.4},
    "repeated-nd": {"A": 406.4, "alpha": 0.34, "B": 410.7, "beta": 0.28, "E": 1.69, "R_D": 15.4, "R_N": 5.3},
    "switch": {
        **{"A": 406.4, "alpha": 0.34, "B": 410.7, "beta": 0.28, "E": 1.69, "theta": 0.4, "kappa": 0.9},
        **{"phi": 20.0, "chi": 0.5, "psi": 0.12, "omega": 0.6},
        **{"lambda": 3.0, "mu": 0.35, "nu": 0.15, "xi": -0.3, "rho": 0.25},
    },
    "switch-eff": {
        **{"A": 406.4, "alpha": 0.34, "B": 410.7, "beta": 0.28, "E": 1.69},
        **{"tau": 0.8, "c": 0.03, "xi": 0.9, "omega": 0.5},
    },
    "overtrain": {"a": 60.0, "b": 80.0, "eta": 0.12, "E": 1.7},
    "coverage": {"a": 3.0, "b": 0.4},
}
OWN = {
    "eff": lambda bits: 1 - np.exp(-bits / 3),
    "effD": lambda bits: 1 - 0.5 * np.exp(-bits / 3),
    "k": lambda bits: 0.3 * np.exp(-bits / 2),
    "delta": lambda bits: 0.3 * np.exp(-bits / 2),
}


def truth(law: Law, points: Points) -> np.ndarray:
    """θ of the planted law, (p,)."""
    bits = {s.label: (s.w_grid_bits * s.a_grid_bits) ** 0.5 for s in points.schemes}
    values = []
    for p in law.params(points.schemes):
        block, _, label = p.name.partition(".")
        values.append(p.internal(OWN[block](bits[label]) if label else SHARED[law.name][block]))
    return np.array(values)


def planted(name: str, noise: float = 0.0, seed: int = 0, **grid_options) -> tuple[Points, np.ndarray]:
    """Points drawn from a law with log-normal noise, and the true θ."""
    law = get_law(name)
    if name in ("chinchilla", "overtrain", "coverage"):
        grid_options.setdefault("schemes", ("bf16",))
    points = grid(**grid_options)
    if law.uses_repeats:
        points = dataclasses.replace(points, unique=points.D / np.array(PASSES)[np.arange(len(points)) % len(PASSES)])
    if law.uses_share:
        cell = np.arange(len(points))
        quantized = np.array([not s.full for s in points.schemes])[points.group]
        points = dataclasses.replace(points, share=np.where(quantized, np.array(SHARES)[(cell + cell // 4) % len(SHARES)], 0.0))
    theta = truth(law, points)
    loss = law.predict(theta, Design.of(points))[0]
    return points.with_loss(loss * np.exp(noise * np.random.default_rng(seed).standard_normal(len(points)))), theta
