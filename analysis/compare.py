"""Schemes compared run by run: means over seeds, differences paired by seed, and claims judged from the runs alone.

    Δ = mean over seeds of (loss of a scheme − loss of the other),   Δ ± t(97.5 %, n − 1)·sd/√n

Two runs of one seed saw the same tokens in the same order, so their difference has less noise than either. A *cell* is a size
and a number of tokens (N, D). Only runs of role `main` are compared; those whose learning rate is fixed in
the sweep file, and those of the search, count where the question is whether anything diverged. Each interval is for one
comparison.

A claim is data, one table of a sweep file; `claim_of` reads it, `judge` says in a sentence whether it holds. What a claim asks
of the means, an interval can leave open: such a claim is *not settled*, whichever way the means point. Losses in nats/token.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from fnmatch import fnmatchcase
from functools import cached_property
from statistics import fmean, median, stdev
from typing import Any, ClassVar

CONFIDENCE = 0.95
HOLDS, FAILS, UNSETTLED, UNJUDGED = "holds", "does not hold", "not settled", "cannot be judged"
Cell = tuple[int, int]  # N, D


class ClaimError(ValueError):
    """A claim that cannot be read: an unknown kind, a field missing, unknown, or of another type."""


@dataclass(frozen=True)
class Record:
    """One run. `loss` is None unless it is done; `grad_norm` the median over the logged steps after warm-up."""

    run: str
    scheme: str
    params: int  # N, non-embedding
    tokens: int  # D
    seed: int
    lr: float
    role: str  # main, fixed (the sweep file says its learning rate) or search
    state: str
    loss: float | None = None
    grad_norm: float | None = None
    bits: float | None = None  # stored, per quantized weight
    a_bits: float | None = None  # of activations
    weights: str = ""
    activations: str = ""

    @property
    def cell(self) -> Cell:
        """(N, D)."""
        return self.params, self.tokens


@dataclass(frozen=True)
class Difference:
    """Mean of n paired differences and its 95 % t interval, which is the whole line for one pair."""

    n: int
    mean: float
    low: float
    high: float

    @property
    def resolved(self) -> bool:
        """True where the interval leaves out zero."""
        return not self.contains(0.0)

    def contains(self, value: float) -> bool:
        """Is the value one that the interval does not exclude?"""
        return self.low <= value <= self.high

    def __str__(self) -> str:
        ends = f" [{self.low:+.3f}, {self.high:+.3f}]" if self.n > 1 else ""
        return f"{self.mean:+.3f}{ends} (n = {self.n})"


def difference(values: Sequence[float]) -> Difference | None:
    """The mean of paired differences with its t interval; None of none."""
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
    """One scheme at one cell and learning rate: a line of the table."""

    scheme: str
    params: int
    tokens: int
    lr: float
    role: str
    n: int  # runs that are done
    diverged: int
    missing: int  # failed, or not trained yet
    loss: float | None  # mean over seeds
    spread: float | None  # standard deviation over seeds
    reference: str | None
    difference: Difference | None  # to the reference, paired by seed
    control: Difference | None  # to full precision, paired by seed
    grad_norm: float | None  # median over seeds
    bits: float | None  # stored, per quantized weight
    a_bits: float | None  # of activations
    weights: str
    activations: str

    def to_dict(self) -> dict[str, Any]:
        """Flat, for CSV and JSON."""
        flat = {k: v for k, v in asdict(self).items() if k not in ("difference", "control")}
        for name, found in (("difference", self.difference), ("to_control", self.control)):
            flat |= {
                f"{name}{suffix}": getattr(found, key, None)
                for suffix, key in (("", "mean"), ("_low", "low"), ("_high", "high"), ("_n", "n"))
            }
        return flat


@dataclass(frozen=True)
class Comparison:
    """The runs of a study. `reference` maps a scheme to those that are compared with it; `control` is full precision."""

    records: tuple[Record, ...]
    reference: Mapping[str, Sequence[str]] = field(default_factory=dict)
    control: str = ""

    @cached_property
    def cells(self) -> list[Cell]:
        """The cells of the main runs, smallest first."""
        return sorted({r.cell for r in self.records if r.role == "main"})

    def name(self, cell: Cell) -> str:
        """`107K`; with its tokens where a size was trained on several numbers of them."""
        from .figures import count

        n, d = cell
        return count(n) + (f" on {count(d)} tokens" if sum(c[0] == n for c in self.cells) > 1 else "")

    def seeds(self, scheme: str, cell: Cell, value: str = "loss") -> dict[int, float]:
        """Seed → value of the main runs of a scheme that are done."""
        rows = [r for r in self.records if r.role == "main" and r.scheme == scheme and r.cell == cell and r.state == "done"]
        return {r.seed: x for r in rows if (x := getattr(r, value)) is not None}

    def shared(self, *schemes: str) -> list[Cell]:
        """The cells at which all of these schemes are to be trained."""
        there = {(r.scheme, r.cell) for r in self.records if r.role == "main"}
        return [cell for cell in self.cells if all((name, cell) in there for name in schemes)]

    def difference(self, scheme: str, against: str, cell: Cell) -> Difference | None:
        """Loss of `scheme` less that of `against`, over the seeds that both have; None where there is none."""
        mine, other = self.seeds(scheme, cell), self.seeds(against, cell)
        return difference([mine[s] - other[s] for s in mine if s in other])

    def spread(self, scheme: str, cell: Cell) -> float | None:
        """Standard deviation of the loss over seeds; None for fewer than two."""
        losses = list(self.seeds(scheme, cell).values())
        return stdev(losses) if len(losses) > 1 else None

    def pooled_spread(self, cell: Cell) -> float | None:
        """√(Σ (n−1)s² / Σ (n−1)) over all schemes there: what three seeds of one tell is too vague to compare with."""
        groups = [list(self.seeds(scheme, cell).values()) for scheme in {r.scheme for r in self.records if r.cell == cell}]
        freedom = sum(len(losses) - 1 for losses in groups if losses)
        squares = math.fsum((len(losses) - 1) * stdev(losses) ** 2 for losses in groups if len(losses) > 1)  # in any order
        return math.sqrt(squares / freedom) if freedom else None

    def diverged(self, scheme: str, cell: Cell) -> int:
        """Main runs that diverged."""
        return sum(r.state == "diverged" for r in self.records if r.role == "main" and r.scheme == scheme and r.cell == cell)

    def rows(self) -> list[Row]:
        """A line for each scheme, cell and learning rate, without the search: cells in order, schemes as they come."""
        groups: dict[tuple[Cell, bool, str, float], list[Record]] = {}
        for r in self.records:
            if r.role != "search":
                groups.setdefault((r.cell, r.role == "fixed", r.scheme, r.lr), []).append(r)
        order = sorted(groups, key=lambda g: g[:2])
        return [self._row(groups[g]) for g in order]

    def _row(self, runs: Sequence[Record]) -> Row:
        r, cell = runs[0], runs[0].cell
        losses = [x.loss for x in runs if x.loss is not None]
        norms = [x.grad_norm for x in runs if x.grad_norm is not None and x.state == "done"]
        compared = r.role == "main"
        reference = next((ref for ref, others in self.reference.items() if r.scheme in others), None) if compared else None
        return Row(
            r.scheme,
            r.params,
            r.tokens,
            r.lr,
            r.role,
            len(losses),
            sum(x.state == "diverged" for x in runs),
            sum(x.state not in ("done", "diverged") for x in runs),
            fmean(losses) if losses else None,
            stdev(losses) if len(losses) > 1 else None,
            reference,
            self.difference(r.scheme, reference, cell) if reference else None,
            self.difference(r.scheme, self.control, cell) if compared and self.control and r.scheme != self.control else None,
            median(norms) if norms else None,
            next((x.bits for x in runs if x.bits is not None), None),
            next((x.a_bits for x in runs if x.a_bits is not None), None),
            r.weights,
            r.activations,
        )


@dataclass(frozen=True)
class Finding:
    """What became of a claim: HOLDS, FAILS, UNSETTLED, UNJUDGED (runs are missing), None for a question; a dict a cell."""

    claim: Mapping[str, Any]
    verdict: str | None
    sentence: str
    numbers: list[dict[str, Any]]

    @property
    def holds(self) -> bool | None:
        """None where the runs do not say."""
        return None if self.verdict is None else {HOLDS: True, FAILS: False}.get(self.verdict)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "claim": dict(self.claim),
            "holds": self.holds,
            "verdict": self.verdict,
            "sentence": self.sentence,
            "numbers": self.numbers,
        }


@dataclass(frozen=True)
class Claim(ABC):
    """One kind of claim; its fields are the keys of its table in a sweep file."""

    kind: ClassVar[str]

    @property
    @abstractmethod
    def schemes_named(self) -> tuple[str, ...]:
        """The schemes it speaks of, all of which must be in the study."""

    @abstractmethod
    def judge(self, c: Comparison) -> Finding:
        """Whether it holds for these runs, and the numbers."""

    def _found(self, verdict: str, text: str, numbers: list[dict[str, Any]], details: Iterable[str] = ()) -> Finding:
        more = "; ".join(details)
        sentence = f"{text}: {verdict}" + (f" ({more})." if more else ".")
        return Finding({"kind": self.kind, **asdict(self)}, verdict, sentence, numbers)


@dataclass(frozen=True)
class AtEverySize(Claim):
    """A claim that holds where it holds at every size at which all of its schemes are to be trained."""

    @abstractmethod
    def at(self, c: Comparison, cell: Cell) -> tuple[str, str, dict[str, Any]]:
        """The verdict there, why in a few words, and the numbers, which are empty without runs."""

    def _everywhere(self, c: Comparison) -> tuple[str, list[dict[str, Any]], list[str]]:
        """FAILS where one size says so, else UNJUDGED or UNSETTLED where one is, else HOLDS; numbers; details."""
        found = [(cell, *self.at(c, cell)) for cell in c.shared(*self.schemes_named)]
        verdicts = [verdict for _, verdict, _, _ in found]
        numbers = [{"params": n, "tokens": d, **row} for (n, d), _, _, row in found if row]
        worst = next((v for v in (FAILS, UNJUDGED, UNSETTLED, HOLDS) if v in verdicts), UNJUDGED)
        differ = len(set(verdicts)) > 1
        return worst, numbers, [f"{c.name(cell)}{f' {v}' if differ else ''}: {why}" for cell, v, why, _ in found]


@dataclass(frozen=True)
class Below(AtEverySize):
    """At every size Δ(scheme − against) < −factor·spread, the spread over seeds being that of the size, pooled over schemes.

    It asks this of the means. Where the interval contains zero, it is not settled, unless the interval leaves out
    −factor·spread: then a difference as large as claimed is excluded.
    """

    scheme: str
    against: str
    factor: float = 0.0
    kind: ClassVar[str] = "below"

    @property
    def schemes_named(self) -> tuple[str, ...]:
        """Both."""
        return self.scheme, self.against

    def at(self, c: Comparison, cell: Cell) -> tuple[str, str, dict[str, Any]]:
        """See the class."""
        lost = _losses_lost(c, self.schemes_named, cell)
        found = c.difference(self.scheme, self.against, cell)
        if found is None:
            return UNJUDGED, f"no pair of runs{lost}", {}
        spread, own = c.pooled_spread(cell), {name: c.spread(name, cell) for name in self.schemes_named}
        limit = 0.0 if self.factor == 0 else None if spread is None else -self.factor * spread
        beyond = None if limit is None else found.mean < limit
        verdict = UNJUDGED if limit is None else _verdict(found, limit)
        times = ""
        if self.factor and spread is not None:
            wide = [f", the spread of {name} alone {s:.3f}" for name, s in own.items() if s is not None and s > 2 * spread]
            more = "though more than " if beyond and not found.resolved else ""
            times = f", {more}{self.factor:g} × spread = {self.factor * spread:.3f}{''.join(wide)}"
        diverged = [c.diverged(name, cell) for name in self.schemes_named]
        return (
            verdict,
            f"{found}{_doubt(found)}{times}{lost}",
            {
                **asdict(found),
                "spread": spread,
                "spreads": own,
                "beyond": beyond,
                "verdict": verdict,
                "diverged": diverged,
            },
        )

    def judge(self, c: Comparison) -> Finding:
        """See the class."""
        by = f" by more than {self.factor:g} times the spread over seeds" if self.factor else ""
        verdict, numbers, details = self._everywhere(c)
        return self._found(verdict, f"{self.scheme} is below {self.against}{by}", numbers, details)


@dataclass(frozen=True)
class Compare(Claim):
    """A question, not a claim: which of the two is lower, where an interval that contains zero settles nothing."""

    scheme: str
    against: tuple[str, ...]
    kind: ClassVar[str] = "compare"

    @property
    def schemes_named(self) -> tuple[str, ...]:
        """All."""
        return self.scheme, *self.against

    def judge(self, c: Comparison) -> Finding:
        """See the class."""
        numbers, parts = [], []
        for other in self.against:
            details = []
            for cell in c.shared(self.scheme, other):
                found = c.difference(self.scheme, other, cell)
                if found is None:
                    details.append(f"{c.name(cell)} no pair of runs{_losses_lost(c, (self.scheme, other), cell)}")
                    continue
                verdict = "not settled" if not found.resolved else "lower" if found.mean < 0 else "higher"
                numbers.append({"against": other, "params": cell[0], "tokens": cell[1], **asdict(found), "verdict": verdict})
                details.append(f"{c.name(cell)} {verdict} {found}{_losses_lost(c, (self.scheme, other), cell)}")
            parts.append(f"{other}: {'; '.join(details) or 'trained at no size together'}")
        claim = {"kind": self.kind, **asdict(self)}
        return Finding(claim, None, f"{self.scheme} against {'. Against '.join(parts)}.", numbers)


@dataclass(frozen=True)
class Stable(Claim):
    """No run of the schemes (patterns) diverged at a learning rate up to `lr`, and each was tried at that very rate.

    Whether that is their merit, the runs of the other schemes say, which are counted beside it, with their highest rates.
    """

    schemes: tuple[str, ...]
    lr: float
    kind: ClassVar[str] = "stable"

    @property
    def schemes_named(self) -> tuple[str, ...]:
        """The patterns."""
        return self.schemes

    def judge(self, c: Comparison) -> Finding:
        """See the class."""
        limit = self.lr * (1 + 1e-9)
        named = {r.scheme for r in c.records if any(fnmatchcase(r.scheme, p) for p in self.schemes)}
        mine = [r for r in c.records if r.lr <= limit and r.scheme in named]
        ended, others = (
            [r for r in runs if r.state in ("done", "diverged")]
            for runs in (mine, [r for r in c.records if r.scheme not in named])
        )
        names = sorted({r.scheme for r in mine})
        tried = {r.scheme for r in ended if r.lr >= self.lr * (1 - 1e-9)}
        untried = [name for name in names if name not in tried]
        bad = [r for r in ended if r.state == "diverged"]
        numbers = [
            {
                "runs": len(ended),
                "diverged": [r.run for r in bad],
                "untried": untried,
                "schemes": names,
                "lr": sorted({r.lr for r in ended}),
            }
        ]
        text = f"no run of {', '.join(names) or ' or '.join(self.schemes)} diverges up to a learning rate of {self.lr:g}"
        losses = [r.loss for r in ended if r.loss is not None]
        details = [f"{len(bad)} of {len(ended)} runs diverged"]
        details += [f"losses {min(losses):.3f} to {max(losses):.3f}"] if losses else []
        details += [f"not tried at {self.lr:g}: {', '.join(untried)}"] if untried else []
        if others:
            lost = [r.run for r in others if r.state == "diverged"]
            highest = {name: max(r.lr for r in others if r.scheme == name) for name in sorted({r.scheme for r in others})}
            numbers[0]["others"] = {"runs": len(others), "diverged": lost, "highest_lr": highest}
            rates = [f"{lr:g} ({', '.join(n for n in highest if highest[n] == lr)})" for lr in sorted({*highest.values()})]
            alike = "" if bad or lost else ", so that this tells no method from another"
            details.append(f"of the others {len(lost)} of {len(others)}, tried up to {', '.join(rates)}{alike}")
        return self._found(FAILS if bad else UNJUDGED if untried or not ended else HOLDS, text, numbers, details)


@dataclass(frozen=True)
class GradNorm(AtEverySize):
    """At every size the gradient norm after warm-up is below `below` times that of another scheme, in the mean over seeds.

    Not settled where the 95 % interval of the ratio contains `below`.
    Gradients shrink where the learning rate is high, and each scheme has its own: the runs of the search say what is left of
    the ratio at equal rates.
    """

    scheme: str
    against: str
    below: float
    kind: ClassVar[str] = "grad-norm"

    @property
    def schemes_named(self) -> tuple[str, ...]:
        """Both."""
        return self.scheme, self.against

    def at(self, c: Comparison, cell: Cell) -> tuple[str, str, dict[str, Any]]:
        """See the class."""
        mine, other = (c.seeds(name, cell, "grad_norm") for name in self.schemes_named)
        ratios = [mine[s] / other[s] for s in mine if s in other and other[s] > 0]
        found = difference(ratios)
        if found is None:
            return UNJUDGED, "no pair of runs", {}
        verdict = UNSETTLED if found.contains(self.below) else HOLDS if found.mean < self.below else FAILS
        norms = [fmean(mine.values()), fmean(other.values())]
        ends = f" [{found.low:.3g}, {found.high:.3g}]" if found.n > 1 else ""
        doubt = f", an interval that contains {self.below:.3g}" if verdict == UNSETTLED else ""
        why = f"{found.mean:.3g} times{ends}{doubt}, {norms[0]:.3g} against {norms[1]:.3g}, n = {found.n}"
        return (
            verdict,
            why,
            {
                "n": found.n,
                "ratio": found.mean,
                "low": found.low,
                "high": found.high,
                "ratios": ratios,
                "norms": norms,
                "verdict": verdict,
            },
        )

    def judge(self, c: Comparison) -> Finding:
        """See the class."""
        verdict, numbers, details = self._everywhere(c)
        equal = self._at_equal_rates(c)
        if equal:
            numbers.append({"search": equal})
            each = ", ".join(f"{ratio:.3g} at {lr:g}" for lr, ratio in equal.items())
            details.append(f"in the search, at equal rates: {each}")
        text = (
            f"the gradient norm of {self.scheme} after warm-up is below {self.below:.3g} times that of {self.against}, "
            "each at its own learning rate"
        )
        return self._found(verdict, text, numbers, details)

    def _at_equal_rates(self, c: Comparison) -> dict[float, float]:
        """Learning rate → ratio of the norms of the two schemes' search runs, where both are done."""
        tried = {(r.scheme, r.lr): r.grad_norm for r in c.records if r.role == "search" and r.state == "done" and r.grad_norm}
        return {
            lr: mine / other
            for (name, lr), mine in sorted(tried.items())
            if name == self.scheme and (other := tried.get((self.against, lr)))
        }


@dataclass(frozen=True)
class Between(AtEverySize):
    """The loss of a scheme is below the line between two neighbours over stored bits, paired by seed, at every size.

        Δ = loss − ((b₂ − b)·loss₁ + (b − b₁)·loss₂) / (b₂ − b₁),   b₁ ≤ b ≤ b₂ bits per weight

    Not settled where the interval of Δ contains zero.
    """

    scheme: str
    neighbours: tuple[str, ...]
    kind: ClassVar[str] = "between"

    @property
    def schemes_named(self) -> tuple[str, ...]:
        """All three."""
        return self.scheme, *self.neighbours

    def at(self, c: Comparison, cell: Cell) -> tuple[str, str, dict[str, Any]]:
        """See the class."""
        bits = [next(iter(c.seeds(name, cell, "bits").values()), None) for name in self.schemes_named]
        b, b1, b2 = bits
        losses = [c.seeds(name, cell) for name in self.schemes_named]
        shared = [s for s in losses[0] if all(s in other for other in losses)]
        if b is None or b1 is None or b2 is None or b1 == b2 or not shared:
            return UNJUDGED, "no runs of one seed, or neighbours of the same bits", {}
        w = (b - b1) / (b2 - b1)
        found = difference([losses[0][s] - (1 - w) * losses[1][s] - w * losses[2][s] for s in shared])
        assert found is not None
        why = f"{found}{_doubt(found)}; {b:.3g} bits between {b1:.3g} and {b2:.3g}"
        verdict = _verdict(found, 0.0) if 0 <= w <= 1 else UNJUDGED
        return verdict, why, {**asdict(found), "bits": bits, "resolved": found.resolved, "verdict": verdict}

    def judge(self, c: Comparison) -> Finding:
        """See the class."""
        verdict, numbers, details = self._everywhere(c)
        text = f"{self.scheme} is below the line between {' and '.join(self.neighbours)}"
        return self._found(verdict, text, numbers, details)


CLAIMS: dict[str, type[Claim]] = {cls.kind: cls for cls in (Below, Compare, Stable, GradNorm, Between)}


def claim_of(table: Mapping[str, Any]) -> Claim:
    """The claim that a table of a sweep file makes. Raises ClaimError."""
    kind = table.get("kind")
    if kind not in CLAIMS:
        raise ClaimError(f"kind: unknown claim {kind!r}; choices: {', '.join(CLAIMS)}")
    known = {f.name: f for f in fields(CLAIMS[kind])}
    given = {k: v for k, v in table.items() if k != "kind"}
    for key, value in given.items():
        if key not in known:
            raise ClaimError(f"{kind}: unknown key '{key}'; choices: {', '.join(known)}")
        _check(f"{kind}: {key}", value, str(known[key].type))
    missing = [name for name, f in known.items() if name not in given and f.default is MISSING]
    if missing:
        raise ClaimError(f"{kind}: {missing[0]} is missing")
    if kind == "between" and len(given["neighbours"]) != 2:
        raise ClaimError("between: neighbours are two schemes")
    return CLAIMS[kind](**{k: tuple(v) if isinstance(v, list) else v for k, v in given.items()})


def _check(where: str, value: Any, kind: str) -> None:
    if kind == "float" and not (isinstance(value, int | float) and not isinstance(value, bool) and value >= 0):
        raise ClaimError(f"{where}: {value!r} is not a number from 0 on")
    if kind == "str" and not isinstance(value, str):
        raise ClaimError(f"{where}: {value!r} is not the name of a scheme")
    if kind.startswith("tuple") and not (isinstance(value, list) and value and all(isinstance(v, str) for v in value)):
        raise ClaimError(f"{where}: {value!r} is not a list of names of schemes")


def _verdict(found: Difference, limit: float) -> str:
    """Of the claim Δ < limit ≤ 0, asked of the mean: it stands where the interval leaves out zero, or is above limit."""
    if not found.resolved and found.low <= limit:
        return UNSETTLED
    return HOLDS if found.mean < limit else FAILS


def _doubt(found: Difference) -> str:
    return "" if found.resolved else ", an interval that contains zero"


def _losses_lost(c: Comparison, schemes: Sequence[str], cell: Cell) -> str:
    """Names those that diverged: their seeds are in no pair."""
    return "".join(f", {n} of {name} diverged" for name in schemes if (n := c.diverged(name, cell)))
