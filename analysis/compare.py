"""Schemes compared run by run: means over seeds, and differences paired by seed with their t intervals.

    Δ = mean over seeds of (loss of a scheme − loss of the other),   Δ ± t(97.5 %, n − 1)·sd/√n

Two runs with the same seed saw the same tokens in the same order, so their difference has less noise than either loss. A *size*
is a number of non-embedding parameters and a number of tokens (N, D). Only runs of role `main` are compared. Runs whose
learning rate is fixed in the sweep file, and those of the search, count only for the question whether anything diverged. Each
interval is for one comparison, without correction for multiple comparisons. `claims.py` judges claims about these runs. Losses
are in nats/token.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from statistics import fmean, median, stdev
from typing import Any

CONFIDENCE = 0.95
Size = tuple[int, int]  # N, D
# Keys of study.json files that earlier versions wrote.
_OLD_KEYS = {
    "params": "params_non_embedding",
    "bits": "w_stored_bits",
    "a_bits": "a_stored_bits",
}


@dataclass(frozen=True)
class StudyRun:
    """One run of a study.

    Attributes:
        role: main, fixed (the sweep file sets its learning rate) or search.
        state: As in `sweep.outcomes`; a loss is there only if it is "done".
        grad_norm: Median gradient norm over the logged steps after warm-up.
        w_stored_bits, a_stored_bits: Stored bits per quantized weight, and per activation.
        weights, activations: The quantizers' specs.
    """

    run: str
    scheme: str
    params_non_embedding: int
    tokens: int
    seed: int
    lr: float
    role: str
    state: str
    loss: float | None = None
    grad_norm: float | None = None
    w_stored_bits: float | None = None
    a_stored_bits: float | None = None
    weights: str = ""
    activations: str = ""

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> StudyRun:
        """A run as study.json holds it, also with the keys of earlier versions."""
        return cls(**{_OLD_KEYS.get(key, key): value for key, value in values.items()})

    @property
    def size(self) -> Size:
        """(N, D)."""
        return self.params_non_embedding, self.tokens


@dataclass(frozen=True)
class Difference:
    """Mean of n paired differences and its 95 % t interval, which is unbounded for one pair."""

    n: int
    mean: float
    low: float
    high: float

    @property
    def resolved(self) -> bool:
        """Whether the interval excludes zero."""
        return not self.contains(0.0)

    def contains(self, value: float) -> bool:
        """Whether the interval includes this value."""
        return self.low <= value <= self.high

    def __str__(self) -> str:
        ends = f" [{self.low:+.3f}, {self.high:+.3f}]" if self.n > 1 else ""
        return f"{self.mean:+.3f}{ends} (n = {self.n})"


def difference(values: Sequence[float]) -> Difference | None:
    """The mean of paired differences with its t interval; None if there are no values."""
    if not values:
        return None
    n, mean = len(values), fmean(values)
    if n == 1:
        return Difference(1, mean, -math.inf, math.inf)
    from scipy.stats import t

    half = float(t.ppf(0.5 + CONFIDENCE / 2, n - 1)) * stdev(values) / math.sqrt(n)
    return Difference(n, mean, mean - half, mean + half)


@dataclass(frozen=True)
class Row:
    """One line of a study's table: a scheme at one size and learning rate.

    Attributes:
        n: Number of runs that are done; `diverged` and `missing` (failed, or not trained yet) count the others.
        loss, spread: Mean and standard deviation over seeds.
        difference: To `reference`, paired by seed; `control` is the difference to full precision.
        grad_norm: Median over seeds.
    """

    scheme: str
    params_non_embedding: int
    tokens: int
    lr: float
    role: str
    n: int
    diverged: int
    missing: int
    loss: float | None
    spread: float | None
    reference: str | None
    difference: Difference | None
    control: Difference | None
    grad_norm: float | None
    w_stored_bits: float | None
    a_stored_bits: float | None
    weights: str
    activations: str

    @property
    def size(self) -> Size:
        """(N, D)."""
        return self.params_non_embedding, self.tokens

    def to_dict(self) -> dict[str, Any]:
        """A flat record for CSV and JSON."""
        flat = {k: v for k, v in asdict(self).items() if k not in ("difference", "control")}
        for name, delta in (("difference", self.difference), ("to_control", self.control)):
            flat |= {
                f"{name}{suffix}": getattr(delta, key, None)
                for suffix, key in (("", "mean"), ("_low", "low"), ("_high", "high"), ("_n", "n"))
            }
        return flat


@dataclass(frozen=True)
class Comparison:
    """The runs of a study. `reference` maps a scheme to those that are compared with it; `control` is full precision."""

    runs: tuple[StudyRun, ...]
    reference: Mapping[str, Sequence[str]] = field(default_factory=dict)
    control: str = ""

    @cached_property
    def sizes(self) -> list[Size]:
        """The sizes of the main runs, smallest first."""
        return sorted({r.size for r in self.runs if r.role == "main"})

    def size_name(self, size: Size) -> str:
        """`107K`; with its tokens if models of that size were trained on several numbers of tokens."""
        from .style import count

        n, d = size
        return count(n) + (f" on {count(d)} tokens" if sum(other[0] == n for other in self.sizes) > 1 else "")

    def by_seed(self, scheme: str, size: Size, value: str = "loss") -> dict[int, float]:
        """Seed → value of the main runs of a scheme that are done."""
        rows = [r for r in self.runs if r.role == "main" and r.scheme == scheme and r.size == size and r.state == "done"]
        return {r.seed: x for r in rows if (x := getattr(r, value)) is not None}

    def shared_sizes(self, *schemes: str) -> list[Size]:
        """The sizes at which all of these schemes have main runs, finished or not."""
        trained = {(r.scheme, r.size) for r in self.runs if r.role == "main"}
        return [size for size in self.sizes if all((name, size) in trained for name in schemes)]

    def difference(self, scheme: str, against: str, size: Size) -> Difference | None:
        """Loss of `scheme` minus that of `against`, over the seeds that both have; None if there is no such seed."""
        losses, others = self.by_seed(scheme, size), self.by_seed(against, size)
        return difference([losses[seed] - others[seed] for seed in losses if seed in others])

    def spread(self, scheme: str, size: Size) -> float | None:
        """Standard deviation of the loss over seeds; None for fewer than two."""
        losses = list(self.by_seed(scheme, size).values())
        return stdev(losses) if len(losses) > 1 else None

    def pooled_spread(self, size: Size) -> float | None:
        """√(Σ (n−1)s² / Σ (n−1)) over all schemes of a size, because three seeds of one scheme give too vague an estimate."""
        groups = [list(self.by_seed(scheme, size).values()) for scheme in {r.scheme for r in self.runs if r.size == size}]
        freedom = sum(len(losses) - 1 for losses in groups if losses)
        # fsum gives the same sum in any order of the schemes
        squares = math.fsum((len(losses) - 1) * stdev(losses) ** 2 for losses in groups if len(losses) > 1)
        return math.sqrt(squares / freedom) if freedom else None

    def diverged(self, scheme: str, size: Size) -> int:
        """The number of main runs that diverged."""
        return sum(r.state == "diverged" for r in self.runs if r.role == "main" and r.scheme == scheme and r.size == size)

    def rows(self) -> list[Row]:
        """A row for each scheme, size and learning rate, without the search: sizes in order, schemes in order of the runs."""
        groups: dict[tuple[Size, bool, str, float], list[StudyRun]] = {}
        for r in self.runs:
            if r.role != "search":
                groups.setdefault((r.size, r.role == "fixed", r.scheme, r.lr), []).append(r)
        return [self._row(groups[key]) for key in sorted(groups, key=lambda key: key[:2])]

    def _row(self, runs: Sequence[StudyRun]) -> Row:
        r, size = runs[0], runs[0].size
        losses = [x.loss for x in runs if x.loss is not None]
        norms = [x.grad_norm for x in runs if x.grad_norm is not None and x.state == "done"]
        compared = r.role == "main"
        reference = next((ref for ref, others in self.reference.items() if r.scheme in others), None) if compared else None
        return Row(
            scheme=r.scheme,
            params_non_embedding=r.params_non_embedding,
            tokens=r.tokens,
            lr=r.lr,
            role=r.role,
            n=len(losses),
            diverged=sum(x.state == "diverged" for x in runs),
            missing=sum(x.state not in ("done", "diverged") for x in runs),
            loss=fmean(losses) if losses else None,
            spread=stdev(losses) if len(losses) > 1 else None,
            reference=reference,
            difference=self.difference(r.scheme, reference, size) if reference else None,
            control=self.difference(r.scheme, self.control, size)
            if compared and self.control and r.scheme != self.control
            else None,
            grad_norm=median(norms) if norms else None,
            w_stored_bits=next((x.w_stored_bits for x in runs if x.w_stored_bits is not None), None),
            a_stored_bits=next((x.a_stored_bits for x in runs if x.a_stored_bits is not None), None),
            weights=r.weights,
            activations=r.activations,
        )
