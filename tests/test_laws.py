"""Laws: values against formulas by hand, Jacobians against central differences, exact recovery of planted truths."""

import ast
import math
from pathlib import Path

import numpy as np
import pytest
from planted import SHARED, planted, truth

from questctl.analysis import laws
from questctl.analysis.fit import fit_law
from questctl.analysis.laws import LAWS, Design, LawError, get_law
from questctl.analysis.points import make_points
from questctl.analysis.tables import PointError

N, D = 1e8, 5e9


def by_hand(name: str, eff: float, effD: float, k: float, delta: float) -> float:
    """Loss at N, D for a quantized scheme, from SHARED's natural values."""
    v = SHARED[name]
    if name == "overtrain":
        M, C = D / N, 6 * N * D
        return v["E"] + (v["a"] * M ** v["eta"] + v["b"] * M ** -v["eta"]) * C ** -v["eta"]
    if name == "coverage":
        return math.exp(-v["a"] * N ** -v["b"])
    n_term = lambda e: v["A"] / (N * e) ** v["alpha"]  # noqa: E731
    d_term = v["B"] / D ** v["beta"]
    plain = n_term(1) + d_term + v["E"]
    # D tokens in 8 passes over D/8, and N beyond the best size for D/8
    D_8 = D / 8 * (1 + 15.4 * (1 - math.exp(-7 / 15.4)))
    G = (v["alpha"] * v["A"] / v["beta"] / v["B"]) ** (1 / (v["alpha"] + v["beta"]))
    best = G * (G * D / 8) ** (v["beta"] / v["alpha"])
    assert best < N * eff
    N_8 = best * (1 + 5.3 * (1 - math.exp(-(N * eff / best - 1) / 5.3)))
    # a quarter of the tokens before quantization, 2 bits
    S_fp, S_qat = 0.25 * D / (N * 2 / 8), 0.75 * D / (N * 2 / 8)
    w = SHARED["switch"]
    late = w["theta"] * 2 ** (-2 * w["kappa"]) + w["phi"] * 2 ** (-2 * w["chi"]) / (N ** w["psi"] * S_qat ** w["omega"])
    late += w["lambda"] * 2 ** (-2 * w["mu"]) / (N ** w["nu"] * S_fp ** w["xi"] * S_qat ** w["rho"])
    s = SHARED["switch-eff"]
    m = 0.75 ** s["tau"] + s["c"] * S_fp ** s["xi"] / S_qat ** s["omega"]
    # log₄(1/MSE) of the 2-bit grid on both operands
    capacity = -math.log(0.1188460504) / math.log(4)
    return {
        "quest": n_term(eff) + d_term + v["E"],
        "eff-nd": n_term(eff) + v["B"] / (D * effD) ** v["beta"] + v["E"],
        "quartet": (n_term(eff) + d_term) ** v.get("gamma", 1) + v["E"],
        "qat": plain + k * D ** v.get("gamma_D", 0) / N ** v.get("gamma_N", 0),
        "offset": plain + delta,
        "unified": n_term(math.tanh(v.get("F", 1) * capacity) ** (2 * v.get("C", 1))) + d_term + v["E"],
        "kumar": n_term((1 - math.exp(-2 / v.get("gamma_w", 1))) * (1 - math.exp(-2 / v.get("gamma_a", 1)))) + d_term + v["E"],
        "kumar-offset": n_term((1 - math.exp(-1.42 / 2.6)) * (1 - math.exp(-1.45 / 2.2))) + d_term + v["E"],
        "switch": plain + late,
        "switch-eff": n_term(eff**m) + d_term + v["E"],
        "chinchilla": plain,
        "repeated": n_term(eff) + v["B"] / D_8 ** v["beta"] + v["E"],
        "repeated-nd": v["A"] / N_8 ** v["alpha"] + v["B"] / D_8 ** v["beta"] + v["E"],
    }[name]


@pytest.mark.parametrize("name", LAWS)
def test_value_by_hand(name: str) -> None:
    points = make_points([N, N], [D, D], [3, 2], ["bf16", "w2a2"])
    law = get_law(name)
    theta = truth(law, points)
    # repeats and share are seen only by laws that know of them
    at = Design.of(points).at(N, D, np.array([1]), D / 8, 0.25)
    eff, effD = 1 - math.exp(-2 / 3), 1 - 0.5 * math.exp(-2 / 3)
    expected = by_hand(name, eff, effD, 0.3 * math.exp(-1), 0.3 * math.exp(-1))
    assert law.predict(theta, at)[0, 0] == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("name", LAWS)
def test_jacobian_against_central_differences(name: str) -> None:
    points, theta = planted(name, sizes=(3e7, 2e8), ratios=(20, 300))
    law, x = get_law(name), Design.of(points)
    many = theta * (1 + 0.01 * np.random.default_rng(3).standard_normal((3, len(theta))))
    J = law.jacobian(many, x)
    assert J.shape == (3, len(points), len(theta))
    for i in range(len(theta)):
        h = 1e-5 * max(1, abs(theta[i]))
        up, down = many.copy(), many.copy()
        up[:, i] += h
        down[:, i] -= h
        slope = (law.predict(up, x) - law.predict(down, x)) / (2 * h)
        assert J[:, :, i] == pytest.approx(slope, rel=2e-6, abs=1e-8 * abs(slope).max() + 1e-12), law.params(points.schemes)[
            i
        ].name


@pytest.mark.parametrize("name", LAWS)
def test_exact_points_give_back_the_truth(name: str) -> None:
    points, theta = planted(name)
    fit = fit_law(points, name)
    # amplitudes of `quartet` are e-folds away from 1: compare θ, where they are logarithms
    assert fit.theta == pytest.approx(theta, rel=1e-6, abs=1e-6)
    assert fit.cost < 1e-18
    assert fit.status == "converged"


def test_unknown_names_and_missing_columns() -> None:
    with pytest.raises(LawError, match=r"unknown law 'qest'; choices: quest, unified"):
        get_law("qest")
    import pandas as pd

    from questctl.analysis.points import points_from_frame

    table = pd.DataFrame({"N": np.arange(1.0, 9), "loss": np.linspace(3, 2, 8)})
    with pytest.raises(PointError, match="law chinchilla needs the training tokens"):
        fit_law(points_from_frame(table), "chinchilla")
    with pytest.raises(PointError, match=r"column 'loss': 2.28571 is no coverage"):
        fit_law(points_from_frame(table[5:]), "coverage")
    sparse, _ = planted("quest", schemes=("bf16", "w4sparse-a4"))
    with pytest.raises(PointError, match="Gaussian MSE of scheme 'w4sparse-a4'"):
        fit_law(sparse, "unified")


def test_every_law_says_what_it_is() -> None:
    for law in LAWS.values():
        assert law.equation
        assert law.source
        assert len(law.exponents(np.array([2.0, 3.0]))) <= 4000
        assert all(p.unit == "nats/token" for p in (*law.shared, *law.own) if p.name in ("E", "delta"))


def test_laws_say_themselves_what_is_special_about_them() -> None:
    """No module but `laws` asks a law for its name to treat it differently."""
    for path in sorted(Path(laws.__file__).parent.glob("*.py")):
        if path.name == "laws.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Compare):
                texts = {n.value for n in ast.walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, str)}
                names = {n.attr for n in ast.walk(node) if isinstance(n, ast.Attribute)}
                assert not (texts & set(LAWS) and "name" in names), f"{path.name}:{node.lineno}"
    assert {name for name, law in LAWS.items() if not law.in_auto} == {"coverage"}
    assert {name for name, law in LAWS.items() if law.sign_free} == {"offset"}
    assert {name for name, law in LAWS.items() if law.uses_mse} == {"unified"}
    assert all(law.counterpart in ("", *LAWS) for law in LAWS.values())
    near = LAWS["quartet"].limit_exponents(np.array([[0.5, 0.5, 0.4, 9.0]]), np.array([2.0, 3.0]))
    assert near[0, 3] == 0.95 * 2
