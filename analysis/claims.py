"""Claims about the runs of a study, read from its sweep file and judged by the runs alone.

A claim is one table of a sweep file. `claim_of` reads it, and `judge` says whether it holds for a `Comparison`. A claim is
about means. If the interval of a difference leaves the answer open, the claim is *not settled*, whichever way the means point.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from fnmatch import fnmatchcase
from statistics import fmean
from typing import Any, ClassVar

from ..words import choices, few
from .compare import Comparison, Difference, Size, StudyRun, difference

HOLDS, FAILS, UNSETTLED, UNJUDGED = "holds", "does not hold", "not settled", "cannot be judged"


class ClaimError(ValueError):
    """A claim that cannot be read: an unknown kind, or a field that is missing, unknown or of a wrong type."""


@dataclass(frozen=True)
class Judgement:
    """What the runs say about a claim.

    Attributes:
        claim: The claim's table.
        verdict: HOLDS, FAILS, UNSETTLED, UNJUDGED (runs are missing), or None for a question.
        statement: What is claimed, or the answer to a question, in words.
        details: The differences behind the verdict in words, one for each size.
        numbers: The same as numbers, one record for each size.
    """

    claim: Mapping[str, Any]
    verdict: str | None
    statement: str
    details: tuple[str, ...]
    numbers: list[dict[str, Any]]

    @property
    def holds(self) -> bool | None:
        """Whether the claim holds; None if the runs do not settle it."""
        return None if self.verdict is None else {HOLDS: True, FAILS: False}.get(self.verdict)

    @property
    def sentence(self) -> str:
        """The verdict and its statement."""
        return f"{self.verdict.capitalize()}: {self.statement}." if self.verdict else f"{self.statement}."

    def to_dict(self) -> dict[str, Any]:
        """The record for JSON."""
        return {
            "claim": dict(self.claim),
            "holds": self.holds,
            "verdict": self.verdict,
            "sentence": self.sentence,
            "details": list(self.details),
            "numbers": self.numbers,
        }


@dataclass(frozen=True)
class Claim(ABC):
    """One kind of claim; its fields are the keys of its table in a sweep file."""

    kind: ClassVar[str]

    @property
    @abstractmethod
    def schemes_named(self) -> tuple[str, ...]:
        """The schemes, or patterns of schemes, that the claim is about; all of them must be in the study."""

    @abstractmethod
    def judge(self, c: Comparison) -> Judgement:
        """Whether the claim holds for these runs, and the numbers."""

    def _judged(
        self, verdict: str | None, statement: str, numbers: list[dict[str, Any]], details: Iterable[str] = ()
    ) -> Judgement:
        return Judgement({"kind": self.kind, **asdict(self)}, verdict, statement, tuple(details), numbers)


@dataclass(frozen=True)
class AtEverySize(Claim):
    """A claim that holds if it holds at every size at which all of its schemes are trained."""

    @property
    @abstractmethod
    def statement(self) -> str:
        """What is claimed, in words."""

    @abstractmethod
    def at(self, c: Comparison, size: Size) -> tuple[str, str, dict[str, Any]]:
        """The verdict at one size, the reason in a few words, and the numbers, which are empty without runs."""

    def judge(self, c: Comparison) -> Judgement:
        """FAILS if it fails at one size, else UNJUDGED or UNSETTLED if one size is, else HOLDS."""
        sizes = [(size, *self.at(c, size)) for size in c.shared_sizes(*self.schemes_named)]
        verdicts = [verdict for _, verdict, _, _ in sizes]
        numbers = [{"params_non_embedding": n, "tokens": d, **row} for (n, d), _, _, row in sizes if row]
        worst = next((v for v in (FAILS, UNJUDGED, UNSETTLED, HOLDS) if v in verdicts), UNJUDGED)
        differ = len(set(verdicts)) > 1
        details = [f"{c.size_name(size)}{f' {v}' if differ else ''}: {reason}" for size, v, reason, _ in sizes]
        return self._judged(worst, self.statement, numbers, details)


@dataclass(frozen=True)
class Below(AtEverySize):
    """At every size Δ(scheme − against) < −factor·spread, where the spread over seeds is pooled over the schemes of the size.

    The claim is about means. If the interval contains zero, it is not settled, unless the interval excludes −factor·spread. In
    that case a difference as large as claimed is excluded, and the claim fails.
    """

    scheme: str
    against: str
    factor: float = 0.0
    kind: ClassVar[str] = "below"

    @property
    def schemes_named(self) -> tuple[str, ...]:
        """Both."""
        return self.scheme, self.against

    @property
    def statement(self) -> str:
        """In words."""
        margin = f" by more than {self.factor:g} times the spread over seeds" if self.factor else ""
        return f"{self.scheme} is below {self.against}{margin}"

    def at(self, c: Comparison, size: Size) -> tuple[str, str, dict[str, Any]]:
        """See the class."""
        diverged = _diverged_in_words(c, self.schemes_named, size)
        delta = c.difference(self.scheme, self.against, size)
        if delta is None:
            return UNJUDGED, f"no pair of runs{diverged}", {}
        spread, own = c.pooled_spread(size), {name: c.spread(name, size) for name in self.schemes_named}
        limit = 0.0 if self.factor == 0 else None if spread is None else -self.factor * spread
        beyond = None if limit is None else delta.mean < limit
        verdict = UNJUDGED if limit is None else _verdict(delta, limit)
        margin = ""
        if self.factor and spread is not None:
            wide = [f", the spread of {name} alone {s:.3f}" for name, s in own.items() if s is not None and s > 2 * spread]
            more = "though more than " if beyond and not delta.resolved else ""
            margin = f", {more}{self.factor:g} × spread = {self.factor * spread:.3f}{''.join(wide)}"
        numbers = {
            **asdict(delta),
            "spread": spread,
            "spreads": own,
            "beyond": beyond,
            "verdict": verdict,
            "diverged": [c.diverged(name, size) for name in self.schemes_named],
        }
        return verdict, f"{delta}{_doubt(delta)}{margin}{diverged}", numbers


@dataclass(frozen=True)
class Compare(Claim):
    """A question rather than a claim: which of two schemes has the lower loss. An interval with zero settles nothing."""

    scheme: str
    against: tuple[str, ...]
    kind: ClassVar[str] = "compare"

    @property
    def schemes_named(self) -> tuple[str, ...]:
        """All."""
        return self.scheme, *self.against

    def judge(self, c: Comparison) -> Judgement:
        """See the class."""
        numbers, details = [], []
        answers: dict[tuple[str, str], list[str]] = {}  # words around a scheme's name → the schemes for which they hold
        for other in self.against:
            parts: list[str] = []
            settled: dict[str, list[str]] = {}  # "lower" or "higher" → the sizes at which this is settled
            sizes = c.shared_sizes(self.scheme, other)
            for size in sizes:
                diverged = _diverged_in_words(c, (self.scheme, other), size)
                delta = c.difference(self.scheme, other, size)
                if delta is None:
                    parts.append(f"{c.size_name(size)} no pair of runs{diverged}")
                    continue
                verdict = UNSETTLED if not delta.resolved else "lower" if delta.mean < 0 else "higher"
                if delta.resolved:
                    settled.setdefault(verdict, []).append(c.size_name(size))
                row = {"against": other, "params_non_embedding": size[0], "tokens": size[1], **asdict(delta)}
                numbers.append({**row, "verdict": verdict})
                parts.append(f"{c.size_name(size)} {verdict} {delta}{diverged}")
            details.append(f"{other}: {'; '.join(parts) or 'trained at no size together'}")
            for verdict, names in settled.items():
                place = f" at {' and '.join(names)}" if len(names) < len(sizes) else ""
                answers.setdefault((f"{verdict} than", place), []).append(other)
            if not settled:
                compared = any(row["against"] == other for row in numbers)
                answers.setdefault(("not told apart from" if compared else "not compared with", ""), []).append(other)
        statement = ", ".join(f"{words} {_listed(others)}{place}" for (words, place), others in answers.items())
        return self._judged(None, f"{self.scheme} is {statement}", numbers, details)


@dataclass(frozen=True)
class Stable(Claim):
    """No run of the schemes (patterns) diverged at a learning rate up to `lr`, and each scheme was tried at exactly that rate.

    Runs of the other schemes are counted as well, with their highest rates: they show whether stability is special to these.
    """

    schemes: tuple[str, ...]
    lr: float
    kind: ClassVar[str] = "stable"

    @property
    def schemes_named(self) -> tuple[str, ...]:
        """The patterns."""
        return self.schemes

    def judge(self, c: Comparison) -> Judgement:
        """See the class."""
        limit = self.lr * (1 + 1e-9)
        named = {r.scheme for r in c.runs if any(fnmatchcase(r.scheme, p) for p in self.schemes)}
        runs = [r for r in c.runs if r.lr <= limit and r.scheme in named]
        ended = _ended(runs)
        others = _ended(r for r in c.runs if r.scheme not in named)
        names = sorted({r.scheme for r in runs})
        tried = {r.scheme for r in ended if r.lr >= self.lr * (1 - 1e-9)}
        untried = [name for name in names if name not in tried]
        diverged = [r for r in ended if r.state == "diverged"]
        numbers: dict[str, Any] = {
            "runs": len(ended),
            "diverged": [r.run for r in diverged],
            "untried": untried,
            "schemes": names,
            "lr": sorted({r.lr for r in ended}),
        }
        losses = [r.loss for r in ended if r.loss is not None]
        details = [f"{len(diverged)} of {len(ended)} runs diverged, of {', '.join(names) or 'no scheme'}"]
        details += [f"losses {min(losses):.3f} to {max(losses):.3f}"] if losses else []
        details += [f"not tried at {self.lr:g}: {', '.join(untried)}"] if untried else []
        if others:
            also_diverged = [r.run for r in others if r.state == "diverged"]
            highest = {name: max(r.lr for r in others if r.scheme == name) for name in sorted({r.scheme for r in others})}
            numbers["others"] = {"runs": len(others), "diverged": also_diverged, "highest_lr": highest}
            rates = [f"{lr:g} ({', '.join(n for n in highest if highest[n] == lr)})" for lr in sorted({*highest.values()})]
            alike = "" if diverged or also_diverged else ", so that this tells no method from another"
            details.append(f"of the others {len(also_diverged)} of {len(others)}, tried up to {', '.join(rates)}{alike}")
        verdict = FAILS if diverged else UNJUDGED if untried or not ended else HOLDS
        statement = f"no run of {' or '.join(self.schemes)} diverges up to a learning rate of {self.lr:g}"
        return self._judged(verdict, statement, [numbers], details)


@dataclass(frozen=True)
class GradNorm(AtEverySize):
    """At every size the gradient norm after warm-up is below `below` times that of another scheme, in the mean over seeds.

    Not settled if the 95 % interval of the ratio contains `below`. Gradients shrink at high learning rates, and each scheme has
    its own rate. The runs of the search therefore show the ratio at equal rates.
    """

    scheme: str
    against: str
    below: float
    kind: ClassVar[str] = "grad-norm"

    @property
    def schemes_named(self) -> tuple[str, ...]:
        """Both."""
        return self.scheme, self.against

    @property
    def statement(self) -> str:
        """In words."""
        return (
            f"the gradient norm of {self.scheme} after warm-up is below {self.below:.3g} times that of {self.against}, "
            "each at its own learning rate"
        )

    def at(self, c: Comparison, size: Size) -> tuple[str, str, dict[str, Any]]:
        """See the class."""
        norms, others = (c.by_seed(name, size, "grad_norm") for name in self.schemes_named)
        ratios = [norms[seed] / others[seed] for seed in norms if seed in others and others[seed] > 0]
        ratio = difference(ratios)
        if ratio is None:
            return UNJUDGED, "no pair of runs", {}
        verdict = UNSETTLED if ratio.contains(self.below) else HOLDS if ratio.mean < self.below else FAILS
        means = [fmean(norms.values()), fmean(others.values())]
        ends = f" [{ratio.low:.3g}, {ratio.high:.3g}]" if ratio.n > 1 else ""
        doubt = f", an interval that contains {self.below:.3g}" if verdict == UNSETTLED else ""
        reason = f"{ratio.mean:.3g} times{ends}{doubt}, {means[0]:.3g} against {means[1]:.3g}, n = {ratio.n}"
        numbers = {
            "n": ratio.n,
            "ratio": ratio.mean,
            "low": ratio.low,
            "high": ratio.high,
            "ratios": ratios,
            "norms": means,
            "verdict": verdict,
        }
        return verdict, reason, numbers

    def judge(self, c: Comparison) -> Judgement:
        """As at every size, with the ratios of the search added."""
        judged = super().judge(c)
        equal = self._at_equal_rates(c)
        if not equal:
            return judged
        each = ", ".join(f"{ratio:.3g} at {lr:g}" for lr, ratio in equal.items())
        details = [*judged.details, f"in the search, at equal rates: {each}"]
        return self._judged(judged.verdict, self.statement, [*judged.numbers, {"search": equal}], details)

    def _at_equal_rates(self, c: Comparison) -> dict[float, float]:
        """Learning rate → ratio of the norms of the two schemes' search runs, where both are done."""
        norms = {(r.scheme, r.lr): r.grad_norm for r in c.runs if r.role == "search" and r.state == "done" and r.grad_norm}
        return {
            lr: norm / other
            for (name, lr), norm in sorted(norms.items())
            if name == self.scheme and (other := norms.get((self.against, lr)))
        }


@dataclass(frozen=True)
class Between(AtEverySize):
    """At every size the loss of a scheme is below the line between two neighbours over stored bits, paired by seed.

        Δ = loss − ((b₂ − b)·loss₁ + (b − b₁)·loss₂) / (b₂ − b₁),   b₁ ≤ b ≤ b₂ bits per weight

    Not settled if the interval of Δ contains zero.
    """

    scheme: str
    neighbours: tuple[str, ...]
    kind: ClassVar[str] = "between"

    @property
    def schemes_named(self) -> tuple[str, ...]:
        """All three."""
        return self.scheme, *self.neighbours

    @property
    def statement(self) -> str:
        """In words."""
        return f"{self.scheme} is below the line between {' and '.join(self.neighbours)}"

    def at(self, c: Comparison, size: Size) -> tuple[str, str, dict[str, Any]]:
        """See the class."""
        bits = [next(iter(c.by_seed(name, size, "w_stored_bits").values()), None) for name in self.schemes_named]
        b, b1, b2 = bits
        losses = [c.by_seed(name, size) for name in self.schemes_named]
        shared = [seed for seed in losses[0] if all(seed in other for other in losses)]
        if b is None or b1 is None or b2 is None or b1 == b2 or not shared:
            return UNJUDGED, "no runs of one seed, or neighbours of the same bits", {}
        w = (b - b1) / (b2 - b1)
        delta = difference([losses[0][s] - (1 - w) * losses[1][s] - w * losses[2][s] for s in shared])
        assert delta is not None
        reason = f"{delta}{_doubt(delta)}; {b:.3g} bits between {b1:.3g} and {b2:.3g}"
        verdict = _verdict(delta, 0.0) if 0 <= w <= 1 else UNJUDGED
        return verdict, reason, {**asdict(delta), "bits": bits, "resolved": delta.resolved, "verdict": verdict}


@dataclass(frozen=True)
class BestShare(Claim):
    """A question: how much the best share before quantization gains over none, and whether it grows with tokens per parameter.

    The runs are those of `scheme`, quantized from the first step, and of `scheme+s0.5` and the like. Each seed is judged at the
    share that is best in the mean of the *other* seeds, because a choice from the same runs would gain by chance alone. The
    gain is the mean over sizes, with an interval over seeds. The growth is the slope of each seed's best share over log D/N,
    the same as over log tokens per parameter-byte for one scheme.
    """

    scheme: str
    kind: ClassVar[str] = "best-share"

    @property
    def schemes_named(self) -> tuple[str, ...]:
        """The scheme, and the pattern of those that begin in full precision."""
        return self.scheme, f"{self.scheme}+s*"

    def judge(self, c: Comparison) -> Judgement:
        """See the class."""
        numbers, details = [], []
        gains: dict[int, list[float]] = {}  # seed → its gain at each size
        places: dict[int, list[tuple[float, float]]] = {}  # seed → (log D/N, best share) of each size
        for size in c.shared_sizes(self.scheme):
            losses = self._losses(c, size)
            seeds = sorted(set.intersection(*(set(by_seed) for by_seed in losses.values())))
            if len(seeds) < 2 or len(losses) < 2:
                details.append(f"{c.size_name(size)}: fewer than two seeds that all shares have")
                continue
            best = min(losses, key=lambda share: fmean(losses[share][seed] for seed in seeds))
            for seed in seeds:
                others = [other for other in seeds if other != seed]
                chosen = min(losses, key=lambda share: fmean(losses[share][other] for other in others))
                gains.setdefault(seed, []).append(losses[0.0][seed] - losses[chosen][seed])
                own = min(losses, key=lambda share: losses[share][seed])
                places.setdefault(seed, []).append((math.log(size[1] / size[0]), own))
            here = difference([gains[seed][-1] for seed in seeds])
            details.append(f"{c.size_name(size)}: {best:g} of the tokens, gain {here}")
            row: dict[str, Any] = {"params_non_embedding": size[0], "tokens": size[1], "share": best}
            numbers.append(row | (asdict(here) if here else {}))
        total = difference([fmean(values) for values in gains.values()])
        if total is None:
            return self._judged(UNJUDGED, f"what the best share of {self.scheme} gains", numbers, details)
        growth = difference([slope for points in places.values() if (slope := _slope(points)) is not None])
        numbers.append({"gain": asdict(total), "growth": None if growth is None else asdict(growth)})
        if growth is not None:
            details.append(f"slope of the best share over log tokens per parameter {growth}")
        shares = sorted({row["share"] for row in numbers[:-1]})
        reach = f"{shares[0]:g}" if len(shares) == 1 else f"{shares[0]:g} to {shares[-1]:g}"
        ends = f" [{total.low:.3f}, {total.high:.3f}]" if total.n > 1 else ""
        gain = f"the best share of {self.scheme} ({reach} of the tokens) gains {total.mean:.3f}{ends} nats/token"
        moves = "whether it moves with tokens per parameter-byte is not settled"
        if growth is not None and growth.resolved:
            moves = f"it {'grows' if growth.mean > 0 else 'falls'} with tokens per parameter-byte"
        doubt = "" if total.resolved else ", an interval that contains zero"
        return self._judged(None, f"{gain}{doubt}, and {moves}", numbers, details)

    def _losses(self, c: Comparison, size: Size) -> dict[float, dict[int, float]]:
        """Share → seed → loss, 0 for quantization from the first step."""
        late = re.compile(re.escape(self.scheme) + r"\+s([\d.]+)")
        names = {self.scheme: 0.0}
        for name in {r.scheme for r in c.runs if r.role == "main" and r.size == size}:
            if match := late.fullmatch(name):
                names[name] = float(match[1])
        return {share: c.by_seed(name, size) for name, share in sorted(names.items(), key=lambda item: item[1])}


def _slope(points: Sequence[tuple[float, float]]) -> float | None:
    """The slope of the least-squares line through (x, y); None if x does not vary."""
    x, y = fmean(p[0] for p in points), fmean(p[1] for p in points)
    square = sum((p[0] - x) ** 2 for p in points)
    return sum((p[0] - x) * (p[1] - y) for p in points) / square if square > 1e-6 else None


CLAIMS: dict[str, type[Claim]] = {cls.kind: cls for cls in (Below, Compare, Stable, GradNorm, Between, BestShare)}


def claim_of(table: Mapping[str, Any]) -> Claim:
    """The claim that a table of a sweep file makes. Raises ClaimError."""
    kind = table.get("kind")
    if kind not in CLAIMS:
        raise ClaimError(f"kind: unknown claim {kind!r}; choices: {choices(CLAIMS, str(kind))}")
    keys = {f.name: f for f in fields(CLAIMS[kind])}
    values = {k: v for k, v in table.items() if k != "kind"}
    for key, value in values.items():
        if key not in keys:
            raise ClaimError(f"{kind}: unknown key '{key}'; choices: {choices(keys, key)}")
        _check(f"{kind}: {key}", value, str(keys[key].type))
    missing = [name for name, f in keys.items() if name not in values and f.default is MISSING]
    if missing:
        raise ClaimError(f"{kind}: {missing[0]} is missing")
    if kind == "between" and len(values["neighbours"]) != 2:
        raise ClaimError("between: neighbours must be two schemes")
    return CLAIMS[kind](**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def _check(where: str, value: Any, kind: str) -> None:
    """Raises ClaimError unless `value` fits a field of this type."""
    if kind == "float" and not (isinstance(value, int | float) and not isinstance(value, bool) and value >= 0):
        raise ClaimError(f"{where}: {value!r} is not a number of at least 0")
    if kind == "str" and not isinstance(value, str):
        raise ClaimError(f"{where}: {value!r} is not the name of a scheme")
    if kind.startswith("tuple") and not (isinstance(value, list) and value and all(isinstance(v, str) for v in value)):
        raise ClaimError(f"{where}: {value!r} is not a list of names of schemes")


def _ended(runs: Iterable[StudyRun]) -> list[StudyRun]:
    return [r for r in runs if r.state in ("done", "diverged")]


def _verdict(delta: Difference, limit: float) -> str:
    """Whether Δ < limit ≤ 0 holds for the mean; settled if the interval excludes zero, or lies above `limit`."""
    if not delta.resolved and delta.low <= limit:
        return UNSETTLED
    return HOLDS if delta.mean < limit else FAILS


def _doubt(delta: Difference) -> str:
    return "" if delta.resolved else ", an interval that contains zero"


def _diverged_in_words(c: Comparison, schemes: Sequence[str], size: Size) -> str:
    """How many runs of each scheme diverged, in words; their seeds are in no pair."""
    return "".join(f", {n} of {name} diverged" for name in schemes if (n := c.diverged(name, size)))


def _listed(names: Sequence[str]) -> str:
    return few(names, None, last=" and ")
