"""The best training for a budget: for each scheme the best size, tokens and, if the law includes it, time to quantize.

Costs: a model of N parameters at P bits takes N·P bits; training on D tokens 6·N·D FLOP, each inference token 2·N FLOP
(Kaplan et al., arXiv 2001.08361; the inference-aware optimum is Sardana et al., arXiv 2401.00448). Embedding and head count
only in the memory, and only if a vocabulary is given: 2·V·d_model entries, at the bits that the scheme has for them or at 16.
A FLOP costs the same at every width, unless a scheme has a speed, by which its FLOPs are divided.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ..words import few
from .fit_result import Fit
from .formats import FULL_BITS, read_format, read_spec
from .laws import LawError
from .points import Points
from .schemes import Scheme
from .shares import at_best_share, best_share, has_share, outside_shares
from .uncertainty import Bootstrap, extrapolation, prediction_interval

if TYPE_CHECKING:
    from ..quant.spec import QuantSpec

Array = np.ndarray
BEYOND = 1.001  # factor by which an answer may lie outside the data without a warning
FEW = 3  # options of schemes with fewer runs have a warning


def iso_flop(fit: Fit, scheme: str | float, flops: float, N: Array) -> Array:
    """Loss at each N (n,) of models trained with the same 6·N·D `flops`."""
    N = np.asarray(N, float)
    return fit.predict(N, flops / (6 * N), scheme)


def iso_loss(fit: Fit, scheme: str | float, loss: float, N: Array) -> Array:
    """Tokens (n,) that a model of each N needs to reach a loss, by bisection over D; inf if no number of tokens suffices."""
    N = np.asarray(N, float)
    low, high = np.full(N.shape, math.log(1.0)), np.full(N.shape, math.log(1e30))
    reached = fit.predict(N, np.exp(high), scheme) <= loss
    for _ in range(80):
        middle = (low + high) / 2
        enough = fit.predict(N, np.exp(middle), scheme) <= loss
        low, high = np.where(enough, low, middle), np.where(enough, middle, high)
    return np.where(reached, np.exp(high), np.inf)


class SizedRecord:
    """The base of records of models to train: parameters N and tokens D, and their names in JSON."""

    N: float
    D: float

    @property
    def tokens_per_param(self) -> float:
        """D/N."""
        return self.D / self.N

    def to_dict(self) -> dict[str, Any]:
        """The record for JSON, sizes under the names that records of runs have."""
        row = dict(vars(self))
        sizes = {"params_non_embedding": row.pop("N"), "tokens": row.pop("D"), "tokens_per_param": self.tokens_per_param}
        return {"scheme": row.pop("scheme"), **sizes, **row}


@dataclasses.dataclass(frozen=True)
class Option(SizedRecord):
    """The best model of one scheme within a budget. Loss in nats/token; `interval`, `laws` and `tied` are set if they were
    asked for. `share` of the tokens come before quantization, if the law includes it.

    `tied`: over the replicates, the 95 % interval of its loss minus that of the best option reaches zero (for the best: that of
    any other). Errors that two schemes share cancel in this difference, but not in a comparison of their intervals.
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
    share: float | None = None


def optimal_size(
    fit: Fit,
    scheme: int,
    flops: float,
    largest: float = math.inf,
    inference_tokens: float = 0.0,
    unique: float = math.inf,
) -> tuple[float, float, str]:
    """(N, D, the limit on N) of least loss with 6·N·D + 2·N·T = flops and N ≤ largest; `unique` are the distinct tokens. Each
    size is quantized at its best share.

    A bounded search over log N, exact to 1e-9. In practice the loss of every law has one minimum along a budget; the grid that
    precedes the search guards against a second.
    """
    most = flops / (2 * inference_tokens) if inference_tokens else math.inf

    def tokens(N: Array) -> Array:
        return (flops - 2 * N * inference_tokens) / (6 * N)

    def loss(log_N: Array) -> Array:
        N = np.exp(log_N)
        with np.errstate(all="ignore"):
            D = tokens(N)
            at = fit.design.at(N, np.maximum(D, 1e-300), np.full(len(N), scheme), unique)
            L = fit.law.predict(fit.theta, at_best_share(fit, fit.theta, at))[0]
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


ROWS = 31 / 36  # rows of a block's matrices per d weights: 4 + 2·8/3 + 1 of the 12·d², with a feed-forward width of 8·d/3
STEP_BITS = 32  # bits of a row's scale in files
TABLES = ("embedding", "head")
OF_FILES = 4096, 4096  # rows and width of the matrix by which bits of files are counted


class Bits(NamedTuple):
    """What a matrix takes: bits of a value, with scales of groups and masks, and bits of a row."""

    value: float
    row: float = 0.0

    def of(self, values: float, rows: float) -> float:
        """Bits of so many values in so many rows."""
        return self.value * values + self.row * rows


FULL = Bits(FULL_BITS)


def bits_in_memory(scheme: Scheme, other: str = "bf16") -> tuple[Bits, ...]:
    """Bits of the blocks' weights, of the embedding and of the head; `other` is the format of the last two where the scheme has
    none for them."""
    formats = [read_format(scheme.by_row.get(key, other)) for key in TABLES]
    return Bits(scheme.w_stored_bits), *(FULL if each is None else Bits(each.stored) for each in formats)


def bits_in_file(scheme: Scheme, other: str = "bf16", *, coded: bool = False) -> tuple[Bits, ...]:
    """The same in a file, as `quant.storage` counts it: codes that fill bytes, or with `coded` at their entropy, and scales of
    rows and groups in fp32. Blocks whose spec is not known count at their stored bits and a scale a row."""
    from ..quant.storage import weight_bytes

    def stored(spec: QuantSpec | None, otherwise: Bits) -> Bits:
        if spec is None or spec.is_identity:
            return FULL if spec else otherwise
        rows, width = OF_FILES
        one, two = (8 * weight_bytes(spec, rows, k, coded=coded) for k in (width, 2 * width))  # linear in the width
        return Bits((two - one) / (rows * width), (2 * one - two) / rows)

    unknown = Bits(scheme.w_stored_bits, STEP_BITS if scheme.w_stored_bits < FULL_BITS else 0.0)
    tables = (stored(read_spec(scheme.by_row.get(key, other)), FULL) for key in TABLES)
    return stored(read_spec(scheme.weights) if scheme.weights else None, unknown), *tables


def largest_size(limit: float, bits: Sequence[Bits], vocab: int = 0) -> float:
    """N of the largest model whose blocks, and embedding and head of `vocab` ids, have at most `limit` bits.

    The width is that of the published shapes: N = 12·d²·n_layer with n_layer = d/128 (QuEST, arXiv 2502.05003), d = (32·N/3)^⅓.
    """
    blocks, *tables = bits
    if math.isinf(limit) or not (vocab or blocks.row):
        return limit / blocks.value

    def taken(N: float) -> float:
        d = (32 * N / 3) ** (1 / 3)
        return blocks.of(N, ROWS * N / d) + sum(table.of(vocab * d, vocab) for table in tables)

    low, high = 0.0, limit / blocks.value
    for _ in range(100):
        N = (low + high) / 2
        low, high = (N, high) if N and taken(N) <= limit else (low, N)
    return low


def plan(
    fit: Fit,
    schemes: Sequence[str | float],
    flops: float,
    memory_bits: float = math.inf,
    *,
    inference_tokens: float = 0.0,
    vocab: int = 0,
    tables: str = "bf16",
    artifact: bool = False,
    coded: bool = False,
    speed: Mapping[str, float] | None = None,
    unique: float = math.inf,
    boot: Bootstrap | None = None,
    rivals: Sequence[Fit] = (),
) -> list[Option]:
    """The best model of each scheme within a memory (bits of weights) and a compute budget (FLOP), lowest loss first.

    `vocab` adds embedding and head to the memory, in the format `tables` where a scheme has none for them. With `artifact` the
    limit is that of a file, and with `coded` its weights count at the entropy of their grid. `speed` (by label) divides a
    scheme's FLOPs, and `unique` are the distinct tokens available. `boot` adds 95 % intervals and ties, `rivals` the losses
    that other laws predict for the same model. Raises PointError for a scheme without runs.
    """
    options = []
    for scheme in schemes:
        g = fit.points.index(scheme)
        s = fit.points.schemes[g]
        pace = (speed or {}).get(s.label, 1.0)
        bits = bits_in_file(s, tables, coded=coded) if artifact else bits_in_memory(s, tables)
        largest = largest_size(memory_bits, bits, vocab)
        N, D, limit = optimal_size(fit, g, flops * pace, largest, inference_tokens, unique)
        limit = "file" if artifact and limit == "memory" else limit
        share, warnings = None, outside(fit.points, N, D, s.label)
        if has_share(fit, s):
            share = best_share(fit, fit.theta, fit.design.at(np.array([N]), np.array([D]), np.array([g]), unique))
            warnings = (*warnings, *filter(None, [outside_shares(fit.points, share)]))
        interval = prediction_interval(boot, N, D, s.label, unique, share) if boot is not None else None
        other = {f.law.name: float(f.predict(N, D, s.label, unique)) for f in rivals if s.label in f.points.labels}
        options.append(
            Option(
                s.label,
                s.w_stored_bits,
                N,
                D,
                float(fit.predict(N, D, s.label, unique, share)),
                limit,
                interval,
                other,
                warnings,
                share=share,
            )
        )
    options.sort(key=lambda o: o.loss)
    return options if boot is None else _ties(boot, options, unique)


def _ties(boot: Bootstrap, options: Sequence[Option], unique: float) -> list[Option]:
    """The options, the best first, marked as tied if the replicates do not tell them from the best."""
    fit = boot.fit
    group = np.array([fit.points.index(o.scheme) for o in options])
    share = np.array([o.share or 0.0 for o in options])
    at = fit.design.at(np.array([o.N for o in options]), np.array([o.D for o in options]), group, unique, share)
    with np.errstate(all="ignore"):
        loss = fit.law.predict(boot.theta, at)
    tied = np.quantile(loss - loss[:, :1], 0.025, axis=0) <= 0
    tied[0] = tied[1:].any()
    return [dataclasses.replace(o, tied=bool(each)) for o, each in zip(options, tied, strict=True)]


def outside(points: Points, N: float, D: float, scheme: str) -> tuple[str, ...]:
    """Warnings if N, D or D/N of an option lies outside the data, with the factor, and if its scheme has few runs."""
    out, factors = [], extrapolation(points, N, D)
    for (name, span), value in zip(_ranges(points).items(), (N, D, D / N), strict=True):
        if factors[name] > BEYOND:
            out.append(f"{name} = {value:.3g} lies outside the data ({span}) by a factor of {factors[name]:.3g}")
    runs = _runs(points, scheme)
    if runs < FEW:
        out.append(f"{scheme} has {runs} run{'s' if runs > 1 else ''}")
    return tuple(out)


def outside_by_reason(points: Points, options: Sequence[Option]) -> list[str]:
    """The warnings of all options in a line for each reason, which names the schemes."""
    factors = {o.scheme: extrapolation(points, o.N, o.D) for o in options}

    def named(schemes: Sequence[str]) -> str:
        if len(schemes) == len(options) > 1:
            return f"all {len(options)} schemes"
        return few(schemes, 3)

    out = []
    for name, span in _ranges(points).items():
        beyond = {scheme: each[name] for scheme, each in factors.items() if each[name] > BEYOND}
        if beyond:
            most = max(beyond.values())
            out.append(f"{name} lies outside the data ({span}) by a factor of up to {most:.3g}: {named(list(beyond))}")
    out += [line for o in options if o.share is not None and (line := outside_shares(points, o.share))][:1]
    sparse = [scheme for scheme in factors if _runs(points, scheme) < FEW]
    return [*out, f"fewer than {FEW} runs: {named(sparse)}"] if sparse else out


def _ranges(points: Points) -> dict[str, str]:
    """The ranges of the data, in words."""
    columns = {"N": points.N, "D": points.D, "D/N": points.tokens_per_param}
    return {name: f"{x.min():.3g} to {x.max():.3g}" for name, x in columns.items()}


def _runs(points: Points, scheme: str) -> int:
    return int(np.sum(points.group == points.index(scheme)))


def compute_multiplier(
    a: Bootstrap, b: Bootstrap, flops: float, ratio: float, scheme: str | float | None = None
) -> tuple[float, tuple[float, float]]:
    """How many times less compute b needs for the loss that a reaches with `flops` at `ratio` tokens per parameter, with a 95 %
    interval.

    a and b are fits of two recipes or data sets, both evaluated at the same tokens per parameter. 0 if b does not reach that
    loss with 10¹² times the compute; inf if it reaches it with 10⁻¹² of it.
    """
    log_C = np.log(flops) + np.linspace(-12, 12, 721) * math.log(10)

    def losses(boot: Bootstrap, theta: Array, at: Array) -> Array:
        g = boot.fit.design.reference if scheme is None else boot.fit.points.index(scheme)
        N = np.sqrt(np.exp(at) / 6 / ratio)
        x = boot.fit.design.at(N, N * ratio, np.full(len(N), g))
        return boot.fit.law.predict(theta, at_best_share(boot.fit, theta, x, steps=14))

    def multiplier(ta: Array, tb: Array) -> Array:
        target = losses(a, ta, np.array([np.log(flops)]))[:, 0]
        path = losses(b, tb, log_C)
        # the loss falls with compute, so each path passes its target once
        passed = [np.interp(-y, -row, log_C, left=-np.inf, right=np.inf) for y, row in zip(target, path, strict=True)]
        return math.log(flops) - np.array(passed)

    m = min(len(a), len(b))
    centre = multiplier(a.fit.theta[None], b.fit.theta[None])[0]
    drawn = np.exp(multiplier(a.theta[:m], b.theta[:m]))
    low, high = np.quantile(drawn, 0.025, method="lower"), np.quantile(drawn, 0.975, method="higher")
    return float(np.exp(centre)), (float(low), float(high))
