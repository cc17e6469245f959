"""Answers from a fitted law: what to train on a budget, when fewer bits begin to pay, and which run would say more.

Costs: a model of N parameters at P bits takes N·P bits; training on D tokens 6·N·D FLOP, each inference token 2·N FLOP
(Kaplan et al., arXiv 2001.08361; the inference-aware optimum is Sardana et al., arXiv 2401.00448). Embedding and head count
in memory alone, where a vocabulary is given: 2·V·d_model entries at 16 bits. A FLOP costs the same at every width, unless a
scheme is given a speed: its FLOPs count as that much less.

Transition at a size X, iso-memory and iso-FLOP: the model of X parameters at 16 bits and the ones of X·16/P parameters at P
bits take the same memory; trained with the same FLOP, P bits see D·P/16 tokens. The transition from P to Q < P bits is the
D/N (of the 16-bit model) from which Q is better. It may be 0 (always) or infinite (never): both are answers.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np

from .fit import Fit, optimum
from .identify import leave_out, sensitivity
from .laws import Design, LawError
from .points import Points, Scheme
from .uncertainty import Bootstrap, extrapolation, noise, prediction_interval

Array = np.ndarray
LOG_RATIOS = np.log(np.geomspace(1e-3, 1e9, 481))  # tokens per parameter searched for a transition
BEYOND = 1.001  # factor by which an answer may lie outside the data without a warning
FEW = 3  # runs of a scheme, below which there is one; formats, below which what a law of formats misses is not known


# ---------------------------------------------------------------------------------------------------- transitions


def iso_memory_loss(fit: Fit, theta: Array, size: float, log_ratio: Array, scheme: int) -> Array:
    """Loss (m, q) at each log D/N (q,) of the model that takes the memory, and is trained with the FLOP, of `size` 16-bit
    parameters."""
    return fit.law.predict(theta, _iso_memory(fit, size, log_ratio, scheme))


def _iso_memory(fit: Fit, size: float, log_ratio: Array, scheme: int) -> Design:
    factor = 16 / fit.points.schemes[scheme].w_stored_bits
    return fit.design.at(np.array(size * factor), size * np.exp(log_ratio) / factor, np.array(scheme))


def transitions(fit: Fit, theta: Array, size: float, many: int, few: int) -> Array:
    """(m,) D/N of the 16-bit model of `size` parameters from which scheme `few` beats scheme `many` for good; 0 always, inf
    never."""
    with np.errstate(all="ignore"):
        gap = iso_memory_loss(fit, theta, size, LOG_RATIOS, few) - iso_memory_loss(fit, theta, size, LOG_RATIOS, many)
    worse = ~(gap < 0)
    last = worse.shape[1] - 1 - np.argmax(worse[:, ::-1], axis=1)  # the last ratio at which `few` is not better
    out = np.where(worse.any(axis=1), np.inf, 0.0)
    inside = np.flatnonzero(worse.any(axis=1) & (last < len(LOG_RATIOS) - 1))
    low, high = LOG_RATIOS[last[inside]], LOG_RATIOS[np.minimum(last[inside] + 1, len(LOG_RATIOS) - 1)]
    for _ in range(34):
        middle = (low + high) / 2
        better = (_pairwise(fit, theta[inside], size, middle, few) - _pairwise(fit, theta[inside], size, middle, many)) < 0
        low, high = np.where(better, low, middle), np.where(better, middle, high)
    out[inside] = np.exp((low + high) / 2)
    return out


def _pairwise(fit: Fit, theta: Array, size: float, log_ratio: Array, scheme: int) -> Array:
    """Loss (m,) of each θ at its own log D/N: the diagonals of blocks of 100 θ at 100 designs."""
    out = np.empty(len(theta))
    for start in range(0, len(theta), 100):
        part = slice(start, start + 100)
        out[part] = np.diagonal(iso_memory_loss(fit, theta[part], size, log_ratio[part], scheme))
    return out


@dataclasses.dataclass(frozen=True)
class Transition:
    """From `ratio` tokens per parameter of the 16-bit model of `size` on, `few` beats `many`; with a 95 % interval if asked
    for."""

    size: float
    many: str
    few: str
    ratio: float
    interval: tuple[float, float] | None = None

    @property
    def words(self) -> str:
        """The answer in words."""
        return ratio_words(self.ratio) + (
            f" [{ratio_words(self.interval[0])}, {ratio_words(self.interval[1])}]" if self.interval else ""
        )


def ratio_words(ratio: float) -> str:
    """A transition's D/N, `never` or `always`."""
    return "never" if math.isinf(ratio) else "always" if ratio == 0 else f"{ratio:.3g}"


def transition(fit: Fit, size: float, many: str | float = 8, few: str | float = 4, boot: Bootstrap | None = None) -> Transition:
    """The transition between two schemes. PointError, not a number, where one of them has no runs; LawError for laws
    without schemes."""
    if not fit.law.uses_scheme:
        raise LawError(f"law {fit.law.name} does not tell schemes apart")
    a, b = fit.points.index(many), fit.points.index(few)
    if fit.points.schemes[b].w_stored_bits >= fit.points.schemes[a].w_stored_bits:
        raise LawError(f"transition: '{few}' does not have fewer bits than '{many}'")
    ratio = float(transitions(fit, fit.theta[None], size, a, b)[0])
    interval = None
    if boot is not None:
        drawn = transitions(fit, boot.theta, size, a, b)
        low, high = np.quantile(drawn, 0.025, method="lower"), np.quantile(drawn, 0.975, method="higher")
        interval = (float(low), float(high))
    return Transition(size, fit.points.labels[a], fit.points.labels[b], ratio, interval)


# ---------------------------------------------------------------------------------------------------- curves


def iso_flop(fit: Fit, scheme: str | float, flops: float, N: Array) -> Array:
    """Loss at each N (n,) of models trained with the same 6·N·D `flops`."""
    N = np.asarray(N, float)
    return fit.predict(N, flops / (6 * N), scheme)


def iso_loss(fit: Fit, scheme: str | float, loss: float, N: Array) -> Array:
    """Tokens (n,) that a model of each N needs to reach a loss; inf where no number of tokens will, by bisection over D."""
    N = np.asarray(N, float)
    low, high = np.full(N.shape, math.log(1.0)), np.full(N.shape, math.log(1e30))
    reached = fit.predict(N, np.exp(high), scheme) <= loss
    for _ in range(80):
        middle = (low + high) / 2
        enough = fit.predict(N, np.exp(middle), scheme) <= loss
        low, high = np.where(enough, low, middle), np.where(enough, middle, high)
    return np.where(reached, np.exp(high), np.inf)


# ---------------------------------------------------------------------------------------------------- formats


def best_per_bit(boot: Bootstrap, schemes: Sequence[str | float]) -> dict[str, float]:
    """Share of the replicates in which each scheme maximises eff/bits."""
    index = [boot.fit.points.index(s) for s in schemes]
    eff = boot.eff()
    if eff is None:
        raise LawError(f"law {boot.fit.law.name} has no eff")
    bits = np.array([boot.fit.points.schemes[i].w_stored_bits for i in index])
    winner = np.argmax(eff[:, index] / bits, axis=1)
    return {boot.fit.points.labels[i]: float(np.mean(winner == k)) for k, i in enumerate(index)}


def best_format(boot: Bootstrap, schemes: Sequence[str | float], size: float, ratio: float) -> dict[str, float]:
    """Probability that each scheme has the lowest loss at the memory of `size` 16-bit parameters and the FLOP of `ratio`
    tokens per parameter of that model.
    """
    index = [boot.fit.points.index(s) for s in schemes]
    loss = np.concatenate([iso_memory_loss(boot.fit, boot.theta, size, np.array([math.log(ratio)]), i) for i in index], axis=1)
    winner = np.argmin(loss, axis=1)
    return {boot.fit.points.labels[i]: float(np.mean(winner == k)) for k, i in enumerate(index)}


def format_error(fit: Fit) -> tuple[float, int] | None:
    """(root mean square over formats of log eff as law `quest` measures it less log eff as law `unified` predicts it from the
    other formats, how many formats); None where fewer than FEW could be left out.

    `fit` is one of law unified. What it misses of a format's own, no bootstrap of it shows.
    """
    count = len(fit.points.schemes) - 1
    if count < FEW:
        return None
    measured = optimum(fit.points, "quest", objective=fit.objective)[0]
    without = leave_out(fit, [fit.points.group == g for g in range(1, count + 1)])
    said, seen = fit.law.log_eff(without, fit.design), measured.law.log_eff(measured.theta[None], measured.design)
    assert said is not None
    assert seen is not None
    return float(np.sqrt(np.mean((seen[0, 1:] - said[:, 1:].diagonal()) ** 2))), count


def eff_from_mse(
    fit: Fit, w_mse: float, a_mse: float, boot: Bootstrap | None = None, error: tuple[float, int] | None = None
) -> tuple[float, tuple[float, float] | None]:
    """eff of a format that was never trained, from its Gaussian errors, by a fit of law `unified`; with `boot` and a 95 %
    interval.

    The interval is that of the parameters, by the bootstrap, and of the law itself, by Student's t of `format_error(fit)`
    (computed where `error` does not have it); None where that does not exist.
    """
    if fit.law.name != "unified":
        raise LawError("the eff of an untrained format needs a fit of law unified")
    row = dataclasses.replace(fit.points.schemes[0], label="new", w_grid_bits=1.0, a_grid_bits=1.0, w_mse=w_mse, a_mse=a_mse)
    value = float(_log_eff(fit, fit.theta[None], row)[0])
    error = error or (format_error(fit) if boot is not None else None)
    if boot is None or error is None:
        return math.exp(value), None
    from scipy.special import stdtrit

    low, high = np.quantile(_log_eff(fit, boot.theta, row), [0.025, 0.975])
    reach = math.hypot((high - low) / 2, stdtrit(error[1], 0.975) * error[0])
    return math.exp(value), (math.exp(value - reach), math.exp(value + reach))


def _log_eff(fit: Fit, theta: Array, scheme: Scheme) -> Array:
    """(m,) log eff of a scheme, with or without runs, by a law in which it follows from the format."""
    drawn = fit.law.log_eff(theta, dataclasses.replace(fit.design, schemes=(fit.points.schemes[0], scheme)))
    assert drawn is not None
    return drawn[:, 1]


# ---------------------------------------------------------------------------------------------------- budgets


@dataclasses.dataclass(frozen=True)
class Option:
    """The best model of one scheme within a budget. Loss in nats/token; `interval`, `laws` and `tied` are filled where they
    were asked for.

    `tied`: over the replicates, the 95 % interval of its loss less that of the best option reaches zero (of the best:
    of any other). The errors that two schemes share cancel in that difference, which overlapping intervals do not show.
    """

    scheme: str
    w_stored_bits: float
    N: float
    D: float
    loss: float
    limit: str
    interval: tuple[float, float] | None = None
    laws: dict[str, float] = dataclasses.field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    tied: bool | None = None


def optimal_size(
    fit: Fit, scheme: int, flops: float, largest: float = math.inf, inference_tokens: float = 0.0
) -> tuple[float, float, str]:
    """(N, D, what limits N) of least loss with 6·N·D + 2·N·T = flops and N ≤ largest.

    A bounded search over log N, exact to 1e-9: every law's loss along a budget has one minimum in practice; the grid that
    precedes it guards against a second.
    """
    most = flops / (2 * inference_tokens) if inference_tokens else math.inf

    def tokens(N: Array) -> Array:
        return (flops - 2 * N * inference_tokens) / (6 * N)

    def loss(log_N: Array) -> Array:
        N = np.exp(log_N)
        with np.errstate(all="ignore"):
            D = tokens(N)
            L = fit.law.predict(fit.theta, fit.design.at(N, np.maximum(D, 1e-300), np.full(len(N), scheme)))[0]
        return np.where((D > 1) & np.isfinite(L), L, np.inf)

    top = min(largest, most * (1 - 1e-12), flops / 6)
    low, high = math.log(1e3), math.log(top)
    if high <= low:
        raise LawError("the budget is too small for a model of a thousand parameters")
    for _ in range(12):
        grid = np.linspace(low, high, 60)
        k = int(np.argmin(loss(grid)))
        low, high = grid[max(k - 1, 0)], grid[min(k + 1, 59)]
    N = math.exp((low + high) / 2)
    N = top if top * (1 - 1e-9) < N else N
    if N < 1.001e3:
        return N, float(tokens(np.array([N]))[0]), "smallest size tried"
    return N, float(tokens(np.array([N]))[0]), "memory" if largest * (1 - 1e-6) <= N else "FLOP"


def largest_size(memory_bits: float, bits: float, vocab: int = 0) -> float:
    """N of the largest model whose weights, at `bits`, and embedding and head, at 16, take no more than a memory (bits).

    The width is that of the published shapes: N = 12·d²·n_layer with n_layer = d/128 (QuEST, arXiv 2502.05003), d = (32·N/3)^⅓.
    """
    if not vocab or math.isinf(memory_bits):
        return memory_bits / bits
    low, high = 0.0, memory_bits / bits
    for _ in range(100):
        N = (low + high) / 2
        low, high = (N, high) if N * bits + 32 * vocab * (32 * N / 3) ** (1 / 3) <= memory_bits else (low, N)
    return low


def plan(
    fit: Fit,
    schemes: Sequence[str | float],
    flops: float,
    memory_bits: float = math.inf,
    *,
    inference_tokens: float = 0.0,
    vocab: int = 0,
    speed: Mapping[str, float] | None = None,
    boot: Bootstrap | None = None,
    rivals: Sequence[Fit] = (),
) -> list[Option]:
    """The best model of each scheme within a memory (bits of weights) and a compute budget (FLOP), lowest loss first.

    `vocab` adds embedding and head to the memory, `speed` (by label) divides what a scheme's FLOPs count. `boot` adds 95 %
    intervals and ties, `rivals` what other laws say of the same model. PointError for a scheme without runs.
    """
    options = []
    for word in schemes:
        g = fit.points.index(word)
        s = fit.points.schemes[g]
        pace = (speed or {}).get(s.label, 1.0)
        N, D, limit = optimal_size(fit, g, flops * pace, largest_size(memory_bits, s.w_stored_bits, vocab), inference_tokens)
        interval = prediction_interval(boot, N, D, s.label) if boot is not None else None
        other = {f.law.name: float(f.predict(N, D, s.label)) for f in rivals if s.label in f.points.labels}
        options.append(
            Option(
                s.label,
                s.w_stored_bits,
                N,
                D,
                float(fit.predict(N, D, s.label)),
                limit,
                interval,
                other,
                outside(fit.points, N, D, s.label),
            )
        )
    options.sort(key=lambda o: o.loss)
    return options if boot is None else _ties(boot, options)


def _ties(boot: Bootstrap, options: Sequence[Option]) -> list[Option]:
    """The options, the best first, with what the replicates say of each against the best."""
    fit = boot.fit
    group = np.array([fit.points.index(o.scheme) for o in options])
    at = fit.design.at(np.array([o.N for o in options]), np.array([o.D for o in options]), group)
    with np.errstate(all="ignore"):
        loss = fit.law.predict(boot.theta, at)
    tied = np.quantile(loss - loss[:, :1], 0.025, axis=0) <= 0
    tied[0] = tied[1:].any()
    return [dataclasses.replace(o, tied=bool(each)) for o, each in zip(options, tied, strict=True)]


def outside(points: Points, N: float, D: float, scheme: str) -> tuple[str, ...]:
    """Warnings for what lies outside the data, with the factor."""
    out, factors = [], extrapolation(points, N, D)
    for (name, seen), value in zip(_ranges(points).items(), (N, D, D / N), strict=True):
        if factors[name] > BEYOND:
            out.append(f"{name} = {value:.3g} lies outside the data ({seen}) by a factor of {factors[name]:.3g}")
    runs = _runs(points, scheme)
    if runs < FEW:
        out.append(f"{scheme} has {runs} run{'s' if runs > 1 else ''}")
    return tuple(out)


def outside_by_reason(points: Points, options: Sequence[Option]) -> list[str]:
    """The warnings of all options in a line for each reason, which names the schemes."""
    factors = {o.scheme: extrapolation(points, o.N, o.D) for o in options}

    def named(schemes: Sequence[str]) -> str:
        return f"all {len(options)} schemes" if len(schemes) == len(options) > 1 else ", ".join(schemes)

    out = []
    for name, seen in _ranges(points).items():
        far = {scheme: each[name] for scheme, each in factors.items() if each[name] > BEYOND}
        if far:
            most = max(far.values())
            out.append(f"{name} lies outside the data ({seen}) by a factor of up to {most:.3g}: {named(list(far))}")
    few = [scheme for scheme in factors if _runs(points, scheme) < FEW]
    return [*out, f"fewer than {FEW} runs: {named(few)}"] if few else out


def _ranges(points: Points) -> dict[str, str]:
    """What the data span."""
    seen = {"N": points.N, "D": points.D, "D/N": points.D / points.N}
    return {name: f"{x.min():.3g} to {x.max():.3g}" for name, x in seen.items()}


def _runs(points: Points, scheme: str) -> int:
    return int(np.sum(points.group == points.index(scheme)))


def compute_multiplier(
    a: Bootstrap, b: Bootstrap, flops: float, ratio: float, scheme: str | float | None = None
) -> tuple[float, tuple[float, float]]:
    """How many times less compute b needs to reach the loss that a reaches with `flops` at `ratio` tokens per parameter,
    with a 95 % interval.

    a and b are fits of two recipes or data sets, both followed at the same tokens per parameter. 0 where b never reaches that
    loss, with 10¹² times the compute; inf where it is there with 10⁻¹² of it.
    """
    log_C = np.log(flops) + np.linspace(-12, 12, 721) * math.log(10)

    def losses(boot: Bootstrap, theta: Array, at: Array) -> Array:
        g = boot.fit.design.reference if scheme is None else boot.fit.points.index(scheme)
        N = np.sqrt(np.exp(at) / 6 / ratio)
        return boot.fit.law.predict(theta, boot.fit.design.at(N, N * ratio, np.full(len(N), g)))

    def multiplier(ta: Array, tb: Array) -> Array:
        goal = losses(a, ta, np.array([np.log(flops)]))[:, 0]
        path = losses(b, tb, log_C)
        # the path falls with compute: where does it pass the goal?
        passed = [np.interp(-y, -row, log_C, left=-np.inf, right=np.inf) for y, row in zip(goal, path, strict=True)]
        return math.log(flops) - np.array(passed)

    m = min(len(a), len(b))
    centre = multiplier(a.fit.theta[None], b.fit.theta[None])[0]
    drawn = np.exp(multiplier(a.theta[:m], b.theta[:m]))
    low, high = np.quantile(drawn, 0.025, method="lower"), np.quantile(drawn, 0.975, method="higher")
    return float(np.exp(centre)), (float(low), float(high))


# ---------------------------------------------------------------------------------------------------- the next run


@dataclasses.dataclass(frozen=True)
class NextRun:
    """A run worth training: it would leave `variance` of the goal's variance (1 = no gain), at 6·N·D `flops`.

    `seed` is the number of runs that its cell (scheme, N, D within 5 %) has already, so that it repeats none of them.
    """

    scheme: str
    N: float
    D: float
    flops: float
    variance: float
    seed: int = 0


def transition_error(fit: Fit, size: float, many: str | float = 8, few: str | float = 4) -> float:
    """Standard error of log D/N of the transition, by the delta method; inf without residual freedom."""
    if fit.residual_dof < 1:
        return math.inf
    gradient = _transition_gradient(fit, size, fit.points.index(many), fit.points.index(few))
    C = _unit_covariance(sensitivity(fit))
    return float(math.sqrt(gradient @ C @ gradient) * noise(fit))


def _transition_gradient(fit: Fit, size: float, many: int, few: int) -> Array:
    """(p,) ∂ log transition / ∂θ by implicit differentiation of L_few - L_many = 0; zero for fixed parameters."""
    ratio = float(transitions(fit, fit.theta[None], size, many, few)[0])
    if not 0 < ratio < math.inf:
        raise LawError(f"the transition at {size:g} is {ratio_words(ratio)}: there is no number to sharpen")
    t = math.log(ratio)

    def gap(log_ratio: float) -> float:
        return float(
            _pairwise(fit, fit.theta[None], size, np.array([log_ratio]), few)[0]
            - _pairwise(fit, fit.theta[None], size, np.array([log_ratio]), many)[0]
        )

    by_few, by_many = (fit.law.jacobian(fit.theta, _iso_memory(fit, size, np.array([t]), g))[0, 0] for g in (few, many))
    h = 1e-5
    return np.where(fit.free, (by_many - by_few) / ((gap(t + h) - gap(t - h)) / (2 * h)), 0.0)


def _unit_covariance(J: Array) -> Array:
    live = np.linalg.norm(J, axis=0) > 1e-10
    scale = np.linalg.norm(J[:, live], axis=0)
    out = np.zeros((J.shape[1], J.shape[1]))
    out[np.ix_(live, live)] = np.linalg.pinv(
        (J[:, live] / scale).T @ (J[:, live] / scale), rcond=1e-13, hermitian=True
    ) / np.outer(scale, scale)
    return out


def candidates(
    points: Points, ratios: Sequence[float] = (10, 25, 50, 100, 200, 400, 800), sizes: Sequence[float] = ()
) -> list[tuple[int, float, float]]:
    """(scheme, N, D) that could be trained next: every scheme, every size of the data, a range of tokens per parameter."""
    return [(g, float(n), float(n * r)) for g in range(len(points.schemes)) for n in (sizes or points.sizes) for r in ratios]


def _measured(points: Points, group: int, N: float, D: float) -> int:
    """How many runs a cell has, N and D within 5 %."""
    near = [np.abs(np.log(values / value)) < math.log(1.05) for values, value in ((points.N, N), (points.D, D))]
    return int(np.sum((points.group == group) & near[0] & near[1]))


def variance_left(fit: Fit, gradient: Array, C: Array, runs: Sequence[tuple[int, float, float]]) -> Array:
    """(q,) share of the goal's variance gᵀCg that one more run at each candidate would leave (Sherman–Morrison)."""
    group, N, D = (np.array(v) for v in zip(*runs, strict=True))
    at = fit.design.at(N, D, group)
    L, J = fit.law.evaluate(fit.theta[None], at, True)
    assert J is not None
    rows = np.where(fit.free, J[0] / L[0][:, None], 0.0)
    gain = (rows @ C @ gradient) ** 2 / (1 + np.einsum("qp,pr,qr->q", rows, C, rows))
    return 1 - gain / (gradient @ C @ gradient)


def next_runs(
    fit: Fit,
    size: float,
    count: int = 3,
    many: str | float = 8,
    few: str | float = 4,
    *,
    runs: Sequence[tuple[int, float, float]] = (),
    flops: float = math.inf,
    least_gain: float = 0.1,
) -> list[NextRun]:
    """The runs that most reduce the variance of the log transition per FLOP, one after the other.

    Each pick is the candidate with the largest fall in log variance per FLOP among those that remove at least `least_gain` of
    what is left (all, where none does), so that the answer is not a heap of runs too small to matter. A candidate is picked
    once: to a law that is taken as true a repeat says as much as a new cell, to one that is not it says less. `flops` caps a
    single run; fewer runs than `count` come back where there are fewer candidates.
    """
    gradient = _transition_gradient(fit, size, fit.points.index(many), fit.points.index(few))
    J = sensitivity(fit)
    pool = [c for c in (runs or candidates(fit.points)) if 6 * c[1] * c[2] <= flops]
    if not pool:
        raise LawError(f"no candidate run costs {flops:g} FLOP or less")
    cost = np.array([6 * n * d for _, n, d in pool])
    out, first = [], None
    open_ = np.ones(len(pool), bool)
    for _ in range(min(count, len(pool))):
        C = _unit_covariance(J)
        first = first if first is not None else float(gradient @ C @ gradient)
        now = float(gradient @ C @ gradient)
        left = variance_left(fit, gradient, C, pool)
        worth = open_ & (1 - left >= least_gain)
        pay = np.where(worth if worth.any() else open_, -np.log(np.maximum(left, 1e-12)) / cost, -np.inf)
        k = int(np.argmax(pay))
        open_[k] = False
        g, n, d = pool[k]
        seed = _measured(fit.points, g, n, d)
        out.append(NextRun(fit.points.labels[g], n, d, float(cost[k]), float(left[k] * now / first), seed))
        at = fit.design.at(np.array([n]), np.array([d]), np.array([g]))
        L, row = fit.law.evaluate(fit.theta[None], at, True)
        assert row is not None
        J = np.concatenate([J, np.where(fit.free, row[0] / L[0][:, None], 0.0)])
    return out
