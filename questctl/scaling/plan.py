"""Plans from a fitted law: the best model for a budget, the next runs to train, compute saved, formats without runs.

fit = questctl.fit_sources("runs")
questctl.plan_budget(fit, flops=1e20, memory_bytes=1e9).options[0]
questctl.plan_next_runs(fit, 3, goal="transition@7B:8:4").runs
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

from ..config.amounts import parse_amount
from ..errors import UsageError
from ..quant.spec import QuantSpec
from ..quant.storage import tokenizer_bytes
from ..words import CHOICES, few
from .fit import FitResult, bootstraps, fit_points, saved_fit
from .run_times import seconds_of_runs
from .sources import Paths, analysis_errors, load_sources

if TYPE_CHECKING:
    import numpy as np

    from ..analysis.design import NextRun
    from ..analysis.findings import Finding
    from ..analysis.fit_result import Fit
    from ..analysis.planner import Option
    from ..analysis.points import Points
    from ..analysis.tables import TableOptions
    from ..analysis.uncertainty import Bootstrap

    Array = np.ndarray

REPLICATES = 400  # behind the intervals of a plan
Fitted = FitResult | Paths
FORMATS = "int1 … int8, sint4, ternary, fp4, fp8, lloyd3, power4, olive4, ec2.5, int4+bf16"
_LOSS = re.compile(r"loss@(?P<size>[^:]+):(?P<tokens>[^:]+)(?::(?P<schemes>.+))?")
_GOAL = re.compile(r"transition@(?P<size>[^:]+?)(?::(?P<many>[^:]+):(?P<few>[^:]+))?")


def check_plans(law: str, points: Points) -> None:
    """Raises UsageError if the law cannot plan a budget for these points: one without tokens, or without their schemes."""
    from ..analysis.laws import LAWS

    several = len(points.schemes) > 1
    if law == "auto" or (LAWS[law].uses_D and (LAWS[law].uses_scheme or not several)):
        return
    first, *others = (name for name, other in LAWS.items() if other.uses_D and (other.uses_scheme or not several))
    able = few([first, "auto", *others], CHOICES)
    if not LAWS[law].uses_D:
        raise UsageError(f"--law: '{law}' does not depend on tokens, so it plans no budget; choices: {able}.")
    raise UsageError(
        f"--law: '{law}' does not tell schemes apart, and there are {len(points.schemes)}; choices: {able}; "
        "or --where COLUMN=VALUE for the runs of one scheme."
    )


def check_unique(fit: Fit, unique_tokens: float) -> None:
    """Raises UsageError if a number of distinct tokens is given and the fit does not know the value of repeated tokens."""
    if math.isinf(unique_tokens):
        return
    if not unique_tokens > 0:
        raise UsageError(f"--unique-tokens: {unique_tokens:g} is not a positive number.")
    if not fit.law.uses_repeats:
        raise UsageError(f"--unique-tokens: law {fit.law.name} takes every token as new; --law repeated knows repeated ones.")
    if fit.undetermined:
        raise UsageError("--unique-tokens: no run read a token twice, so what repeated tokens are worth is not known.")


def check_share(fit: Fit, share: float | None) -> None:
    """Raises UsageError for a number that is not a share, and if the fit does not know the effect of a share."""
    from ..analysis.shares import knows_shares

    if share is None:
        return
    if not 0 <= share < 1:
        raise UsageError(f"--share: {share:g} is not a part of the tokens, from 0 to below 1.")
    if not fit.law.uses_share:
        raise UsageError(f"--share: law {fit.law.name} does not know when a run is quantized; --law switch-eff does.")
    if not knows_shares(fit):
        raise UsageError(
            "--share: every quantized run is quantized from its first step, so what a share is worth is not known."
        )


def comparable(fits: Sequence[Fit], unique_tokens: float, share: float | None = None) -> list[Fit]:
    """The fits whose laws can answer: if tokens are repeated or a share is given, only those whose laws include it."""
    from ..analysis.shares import knows_shares

    fits = [fit for fit in fits if math.isinf(unique_tokens) or (fit.law.uses_repeats and not fit.undetermined)]
    return [fit for fit in fits if share is None or knows_shares(fit)]


def repeats(fit: Fit, unique_tokens: float = math.inf, most: float = 0.0) -> list[Finding]:
    """The assumption of a prediction by a law of repeated tokens: that all are new, or how often they are read."""
    from ..analysis.findings import Finding
    from ..analysis.style import count

    if not fit.law.uses_repeats:
        return []
    if math.isinf(unique_tokens):
        return [Finding("all_unique", "All tokens are taken as new: budgets and predictions take --unique-tokens.")]
    passes, measured = max(most / unique_tokens, 1.0), 1 + float(fit.points.repeats.max())
    beyond = f", where runs read theirs up to {measured:.3g} times" if passes > 1.001 * measured else ""
    numbers = {"unique_tokens": unique_tokens, "passes": passes, "measured": measured}
    return [
        Finding("repeats", f"The {count(unique_tokens)} distinct tokens are read up to {passes:.3g} times{beyond}.", numbers)
    ]


def fit_of(fitted: Fitted) -> FitResult:
    """The fit itself, a saved fit repeated as it was made, or law quest fitted to sources."""
    if not isinstance(fitted, FitResult):
        return fit_or_saved(fitted)
    check_plans(fitted.fit.law.name, fitted.points)
    return fitted


def fit_or_saved(
    sources: Paths,
    law: str | None = None,
    *,
    objective: str | None = None,
    residuals: str | None = None,
    fix: Mapping[str, float] | None = None,
    columns: Mapping[str, str] | None = None,
    where: Mapping[str, str] | None = None,
    table: TableOptions | None = None,
) -> FitResult:
    """A saved fit as it was made, or a law fitted as by `fit_sources`, without the parts that only a document needs.

    Raises UsageError for a law that cannot plan a budget, and if an option contradicts a saved fit.
    """
    how: dict[str, Any] = {"objective": objective, "residuals": residuals, "fix": fix}
    saved = saved_fit(sources, law, **how, columns=columns, where=where, table=table)
    if saved is not None:
        check_plans(saved.fit.law.name, saved.points)
        return saved
    points = load_sources(sources, columns=columns, where=where, options=table).points
    check_plans(law or "quest", points)
    chosen = {name: value for name, value in how.items() if value is not None}
    return fit_points(points, law or "quest", **chosen, bootstrap=0, alternatives=False)


def _about(fit: Fit) -> dict[str, Any]:
    """The facts that a plan reports about the fit behind it."""
    warnings = [warning.to_dict() for warning in fit.warnings]
    return {"law": fit.law.name, "status": fit.status, "warnings": warnings, "data_hash": fit.points.hash}


def labels_of(option: str, points: Points, schemes: Sequence[str]) -> list[str]:
    """Labels of schemes named by label or bits. Raises UsageError, which names the option, for one without runs."""
    from ..analysis.tables import PointError

    try:
        return [points.labels[points.index(scheme)] for scheme in schemes]
    except PointError as e:
        raise UsageError(f"{option}: {e}.") from e


def fit_status(fit: Fit) -> list[Finding]:
    """A finding with the status and the first reason if the fit did not simply converge; else empty."""
    from ..analysis.findings import Finding

    if fit.status == "converged":
        return []
    reasons = [warning for warning in fit.warnings if warning not in fit.points.notes]
    return [Finding("status", f"The fit of law {fit.law.name} is {fit.status}.", {"status": fit.status}), *reasons]


# --- budget -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Limits:
    """What a plan may spend, and how costs are counted.

    `flops` bounds training and serving together, `memory_bytes` the weights; `inference_tokens` will be served; `vocab` token
    ids add embedding and head to the memory, in the format `embedding` where a scheme has none for them; `speed` maps a scheme
    to the factor by which its FLOPs count less; `unique_tokens` are the distinct tokens available for training, None:
    unlimited. `artifact_bytes` bounds the file instead of the memory: scales of rows and tokenizer count too, and `compressed`
    counts weights at the entropy of their grid.
    """

    flops: float
    memory_bytes: float
    inference_tokens: float
    vocab: int
    speed: Mapping[str, float]
    unique_tokens: float | None = None
    artifact_bytes: float = math.inf
    compressed: bool = False
    embedding: str = "bf16"

    @property
    def weights_bytes(self) -> float:
        """The bytes available for weights, embedding and head: the memory, or the file without its tokenizer."""
        if math.isinf(self.artifact_bytes):
            return self.memory_bytes
        return self.artifact_bytes - tokenizer_bytes("byte" if self.vocab <= 256 else "bpe", self.vocab)

    def __str__(self) -> str:
        """The cost model in a sentence."""
        at = "16 bits" if self.embedding == "bf16" else self.embedding
        of_rows = f"and embedding and head of {self.vocab} ids, at {at} unless the scheme has bits for them"
        table = of_rows if self.vocab else "without embedding and head"
        memory = "" if math.isinf(self.memory_bytes) else f"N·bits of memory {table}; "
        if not math.isinf(self.artifact_bytes):
            bits = "N·entropy" if self.compressed else "N·bits"
            memory = f"{bits} of the file, scales of rows and tokenizer {table}; "
        served = " and 2·N a served token" if self.inference_tokens else ""
        faster = ", ".join(f"{scheme} 1/{factor:g}" for scheme, factor in self.speed.items())
        pace = f"but {faster}" if faster else "the same at every width"
        return f"Costs: {memory}6·N·D training FLOP{served}, {pace}."


@dataclass(frozen=True)
class BudgetPlan:
    """The best model of each scheme within the limits, lowest loss first."""

    fit: Fit
    limits: Limits
    options: tuple[Option, ...]

    @cached_property
    def findings(self) -> tuple[Finding, ...]:
        """The answer, then its caveats (the fit, ties, other laws, extrapolation), and last what is counted."""
        from ..analysis.findings import Finding
        from ..analysis.planner import outside_by_reason
        from ..analysis.shares import share_words
        from ..analysis.style import count, with_interval

        best = self.options[0]
        size = f"{best.scheme} with {count(best.N)} parameters on {count(best.D)} tokens{share_words(best.share)}"
        answer = f"Best within the budget: {size}, predicted loss {with_interval(best.loss, best.interval)} nats/token."
        out = [Finding("answer", answer, best.to_dict()), *fit_status(self.fit)]
        if tied := [o.scheme for o in self.options[1:] if o.tied]:
            reach = "the 95 % interval of the difference reaches zero"
            out.append(Finding("tied", f"{best.scheme} is tied with {few(tied, 3)}: {reach}.", {"schemes": tied}))
        first = {law: min(self.options, key=lambda o: o.laws[law]).scheme for law in best.laws}
        if other := {law: scheme for law, scheme in first.items() if scheme != best.scheme}:
            named = few([f"{law} {scheme}" for law, scheme in other.items()], 3)
            out.append(Finding("other_laws", f"Other laws that fit about as well put another scheme first: {named}.", other))
        out += [
            Finding("outside", f"{line[0].upper()}{line[1:]}.") for line in outside_by_reason(self.fit.points, self.options)
        ]
        out += repeats(self.fit, self.limits.unique_tokens or math.inf, max(o.D for o in self.options))
        if self.limits.embedding != "bf16":
            text = f"What embedding and head in {self.limits.embedding} cost is not in the losses; questctl probe measures it."
            out.append(Finding("embedding", text, {"embedding": self.limits.embedding}))
        return (*out, Finding("costs", str(self.limits)))

    def to_json(self) -> dict[str, Any]:
        """What `plan --json` prints."""
        findings = [finding.to_dict() for finding in self.findings]
        options = [option.to_dict() for option in self.options]
        limits = {key: None if value == math.inf else value for key, value in asdict(self.limits).items()}
        return {**_about(self.fit), **limits, "options": options, "findings": findings}


def plan_budget(
    fitted: Fitted,
    *,
    flops: float,
    memory_bytes: float = math.inf,
    artifact_bytes: float = math.inf,
    compressed: bool = False,
    inference_tokens: float = 0.0,
    schemes: Sequence[str] = (),
    vocab: int = 0,
    embedding: str = "bf16",
    speed: Mapping[str, float] | None = None,
    unique_tokens: float = math.inf,
    bootstrap: int = REPLICATES,
) -> BudgetPlan:
    """The best bits, size and tokens for a compute budget (FLOP) and, if it is limited, for the memory of the weights (bytes).

    `artifact_bytes` limits the whole file instead, with embedding and head of `vocab` token ids, scales and tokenizer; then
    `compressed` counts the weights at the entropy of their grid, as after lossless coding. If the law includes when runs are
    quantized, each option also has the best share of its tokens before quantization.

    `fitted` is a FitResult, or sources that law quest is fitted to. `inference_tokens` will be served out of the same FLOP;
    `schemes` are labels or bits to compare, all with runs by default; `vocab` counts embedding and head of so many token ids in
    the memory, in the format `embedding` ("int4") where a scheme has none for them; `speed` maps a scheme to the factor by
    which its FLOPs count less; `unique_tokens` are the distinct tokens available, for a law of repeated tokens; `bootstrap`
    replicates give the intervals.

    Raises UsageError for a scheme without runs, a law that cannot plan, or a budget too small for any model.
    """
    from ..analysis.choice import alternatives
    from ..analysis.planner import plan

    distinct = None if math.isinf(unique_tokens) else unique_tokens
    limits = Limits(
        flops, memory_bytes, inference_tokens, vocab, dict(speed or {}), distinct, artifact_bytes, compressed, embedding
    )
    if memory_bytes <= 0 or flops <= 0:
        raise UsageError("plan: the budget must be positive, in FLOP and in bytes.")
    _check_artifact(limits)
    _check_embedding(limits)
    if any(not 0 < factor < math.inf for factor in limits.speed.values()):
        raise UsageError("--speed: a factor is a positive number, such as w4a4=2.")
    result = fit_of(fitted)
    fit, points = result.fit, result.points
    check_unique(fit, unique_tokens)
    named = list(dict.fromkeys(labels_of("--bits", points, schemes))) or points.labels
    labels = labels_of("--speed", points, list(limits.speed))
    with analysis_errors():
        options = plan(
            fit,
            named,
            flops,
            8 * limits.weights_bytes,
            inference_tokens=inference_tokens,
            vocab=vocab,
            tables=embedding,
            artifact=not math.isinf(artifact_bytes),
            coded=compressed,
            speed=dict(zip(labels, limits.speed.values(), strict=True)),
            unique=unique_tokens,
            boot=bootstraps([fit], bootstrap).get(fit.law.name),
            rivals=comparable(result.choice.rivals if result.choice else alternatives(fit), unique_tokens),
        )
    return BudgetPlan(fit, limits, tuple(options))


def _check_embedding(limits: Limits) -> None:
    """Raises UsageError for a format of embedding and head that is not known, or that nothing counts."""
    from ..analysis.formats import read_spec

    if limits.embedding == "bf16":
        return
    if not limits.vocab:
        raise UsageError("--embedding: embedding and head count only with --vocab, the number of token ids.")
    if (spec := read_spec(limits.embedding)) is None:
        raise UsageError(f"--embedding: '{limits.embedding}' is not a format; choices: int1 … int8, sint4, ternary, fp4, fp8.")
    QuantSpec.parse(str(spec), key="--embedding", operand="embedding")


def _check_artifact(limits: Limits) -> None:
    """Raises UsageError if a file is not the only limit in bytes, or if its parts are not known."""
    if math.isinf(limits.artifact_bytes):
        if limits.compressed:
            raise UsageError("--compressed: is the size of a file; give --artifact.")
        return
    if not math.isinf(limits.memory_bytes):
        raise UsageError("--artifact: bounds the file, --memory the weights; give one of them.")
    if not limits.vocab:
        raise UsageError("--artifact: a file holds embedding and head too; give --vocab, the number of token ids.")
    if limits.weights_bytes <= 0:
        raise UsageError(f"--artifact: {limits.artifact_bytes:g} bytes hold no more than a tokenizer of {limits.vocab} ids.")


# --- next runs --------------------------------------------------------------------------------------------------------


class TransitionGoal(NamedTuple):
    """Goal: a more precise transition at `size` 16-bit parameters, from scheme `many` to scheme `few`."""

    size: float
    many: str
    few: str

    @property
    def schemes(self) -> tuple[str, ...]:
        """Both schemes."""
        return self.many, self.few

    def gradient(self, fit: Fit) -> Array:
        """(p,) ∂ log D/N of the transition / ∂θ."""
        from ..analysis.design import transition_gradient

        return transition_gradient(fit, self.size, fit.points.index(self.many), fit.points.index(self.few))

    def known(self, fit: Fit, boot: Bootstrap | None) -> tuple[str, dict[str, Any]]:
        """The transition in words, and its numbers."""
        from ..analysis.transitions import transition

        now = transition(fit, *self, boot)
        return f"{now.many} → {now.few} at {now.size:.3g}: {now.words} tokens per 16-bit parameter", dict(vars(now))

    def __str__(self) -> str:
        return f"the transition from {self.many} to {self.few} bits at {self.size:.3g} parameters"


class EffGoal(NamedTuple):
    """Goal: a more precise eff of these schemes; if none is named, of all but the reference."""

    schemes: tuple[str, ...]

    def gradient(self, fit: Fit) -> Array:
        """(k, p) ∂ log eff / ∂θ."""
        from ..analysis.design import eff_gradient

        return eff_gradient(fit, self.schemes)

    def known(self, fit: Fit, boot: Bootstrap | None) -> tuple[str, dict[str, Any]]:
        """eff of each scheme in words, and the numbers."""
        reference = fit.points.labels[fit.design.reference]
        named = self.schemes or tuple(label for label in fit.points.labels if label != reference)
        eff = {label: fit.eff[label] for label in labels_of("--goal", fit.points, named)}
        return "eff of " + few([f"{scheme} {value:.3g}" for scheme, value in eff.items()], 3), {"eff": eff}

    def __str__(self) -> str:
        return "eff of " + (", ".join(self.schemes) or "every scheme")


class LossGoal(NamedTuple):
    """Goal: a more precise loss of these schemes (all if none is named) at `size` parameters and `tokens` tokens."""

    size: float
    tokens: float
    schemes: tuple[str, ...]

    def gradient(self, fit: Fit) -> Array:
        """(k, p) ∂ log loss / ∂θ."""
        from ..analysis.design import loss_gradient

        return loss_gradient(fit, self.size, self.tokens, self.schemes)

    def known(self, fit: Fit, boot: Bootstrap | None) -> tuple[str, dict[str, Any]]:
        """The predicted loss of each scheme in words, and the numbers."""
        from ..analysis.design import loss_at

        named = labels_of("--goal", fit.points, self.schemes or tuple(fit.points.labels))
        loss = dict(zip(named, loss_at(fit, self.size, self.tokens, named).tolist(), strict=True))
        listed = few([f"{scheme} {value:.4g}" for scheme, value in loss.items()], 3)
        numbers = {"N": self.size, "D": self.tokens, "loss": loss}
        return f"loss of {self.size:.3g} parameters on {self.tokens:.3g} tokens: {listed}", numbers

    def __str__(self) -> str:
        whose = ", ".join(self.schemes) or "every scheme"
        return f"the loss of {whose} at {self.size:.3g} parameters and {self.tokens:.3g} tokens"


Goal = TransitionGoal | EffGoal | LossGoal


def parse_goal(text: str) -> Goal:
    """`transition@7B`, `transition@7B:8:4`, `eff`, `eff:w4a4,w2a2`, `loss@1B:20B`, or `loss@1B:20B:w4a4`. Raises UsageError."""
    name, _, schemes = text.partition(":")
    if name == "eff":
        return EffGoal(_listed(schemes))
    if at := _LOSS.fullmatch(text):
        size, tokens = (parse_amount(at[key], "--goal") for key in ("size", "tokens"))
        return LossGoal(size, tokens, _listed(at["schemes"] or ""))
    match = _GOAL.fullmatch(text)
    if not match:
        raise UsageError(
            f"--goal: '{text}' is none of transition@SIZE, such as transition@7B or transition@7B:8:4, eff or eff:w4a4, and "
            "loss@SIZE:TOKENS, such as loss@1B:20B or loss@1B:20B:w4a4."
        )
    return TransitionGoal(parse_amount(match["size"], "--goal"), match["many"] or "8", match["few"] or "4")


def _listed(schemes: str) -> tuple[str, ...]:
    return tuple(scheme for scheme in schemes.split(",") if scheme)


@dataclass(frozen=True)
class NextRuns:
    """Runs worth training, the most informative first, and the present knowledge of the goal, in words and numbers.

    `standard_error_log` is the standard error of the goal's logarithm; of several goals, the root mean square.
    """

    fit: Fit
    goal: Goal
    words: str
    numbers: Mapping[str, Any]
    standard_error_log: float
    runs: tuple[NextRun, ...]
    wanted: int

    @property
    def findings(self) -> tuple[Finding, ...]:
        """The present knowledge of the goal, then the status of the fit."""
        from ..analysis.findings import Finding

        error = self.standard_error_log
        spread = "unknown" if math.isinf(error) else f"{error:.3g}"
        which = "its logarithm" if isinstance(self.goal, TransitionGoal) else "the logarithms (root mean square)"
        text = f"{self.words}; standard error of {which} {spread}."
        out = [Finding("goal", text, self.numbers), *fit_status(self.fit), *repeats(self.fit)]
        if len(self.runs) < self.wanted:
            text = f"There are {len(self.runs)} candidates, not {self.wanted}."
            out.append(Finding("few_candidates", text, {"candidates": len(self.runs), "wanted": self.wanted}))
        return tuple(out)

    def to_json(self) -> dict[str, Any]:
        """What `plan --next-runs --json` prints."""
        goal = {**self.numbers, "standard_error_log": self.standard_error_log}
        findings = [finding.to_dict() for finding in self.findings]
        return {**_about(self.fit), "goal": goal, "runs": [run.to_dict() for run in self.runs], "findings": findings}


def plan_next_runs(
    fitted: Fitted,
    count: int = 3,
    *,
    goal: str = "transition@7B:8:4",
    sizes: Sequence[float] = (),
    lengths: Sequence[float] = (),
    max_flops: float = math.inf,
    timed_by: Paths = None,
    bootstrap: int = REPLICATES,
) -> NextRuns:
    """The runs that are most informative about a goal for their cost.

    The goal is one of three: from how many tokens on fewer bits pay at one size (transition@SIZE:MANY:FEW), the eff of schemes
    (eff, eff:SCHEME,…), or their loss at one size and length (loss@SIZE:TOKENS:SCHEME,…). The design assumes that the law is
    right. If it may be wrong, keep `sizes` and `lengths` near those of the question. `fitted` is a FitResult, or sources that
    law quest is fitted to; `sizes` are non-embedding parameters to choose from, by default those of the data; `lengths` are
    tokens to choose from, by default 1 to 800 for each parameter; `max_flops` bounds a single run. The cost is in FLOP, or in
    seconds if `timed_by` names folders of finished runs. Raises UsageError for a scheme without runs, and if no candidate is
    cheap enough; DataError if the runs of `timed_by` have no times.
    """
    from ..analysis.design import candidates, goal_error, next_runs

    aim, result = parse_goal(goal), fit_of(fitted)
    fit = result.fit
    labels_of("--goal", result.points, aim.schemes)
    seconds = None if timed_by is None else seconds_of_runs(load_sources(timed_by), result.points)
    with analysis_errors():
        gradient = aim.gradient(fit)
        pool = candidates(fit.points, sizes=sizes, lengths=lengths)
        runs = next_runs(fit, gradient, count, runs=pool, seconds=seconds, flops=max_flops)
        words, numbers = aim.known(fit, bootstraps([fit], bootstrap).get(fit.law.name))
        return NextRuns(fit, aim, words, numbers, goal_error(fit, gradient), tuple(runs), count)


# --- compute saved ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ComputeMultiplier:
    """How many times less compute `other` needs for the loss that `fit` reaches with `flops`; 0: it never reaches it."""

    fit: Fit
    other: Fit
    name: str
    multiplier: float
    interval: tuple[float, float] | None  # None if the runs do not determine the fit
    flops: float
    tokens_per_param: float

    @property
    def findings(self) -> tuple[Finding, ...]:
        """The answer, then the status of each fit."""
        from ..analysis.findings import Finding

        loss = f"the loss of {self.flops:.3g} FLOP"
        reach = (
            f"reaches {loss} with {1 / self.multiplier:.3g} times the compute" if self.multiplier else f"never reaches {loss}"
        )
        numbers = f"compute multiplier {self.multiplier:.3g}"
        if self.interval is not None:
            low, high = self.interval
            numbers += f" [{low:.3g}, {high:.3g}]" + ("" if low else "; 0: never")
        answer = f"{self.name} {reach}, both at {self.tokens_per_param:g} tokens per parameter ({numbers})."
        doubts = [*fit_status(self.fit), *fit_status(self.other), *repeats(self.fit)]
        return (Finding("answer", answer, self._numbers()), *doubts)

    def _numbers(self) -> dict[str, Any]:
        return {
            "multiplier": self.multiplier,
            "interval": None if self.interval is None else list(self.interval),
            "flops": self.flops,
            "tokens_per_param": self.tokens_per_param,
        }

    def to_json(self) -> dict[str, Any]:
        """What `plan --versus --json` prints."""
        return {**_about(self.fit), **self._numbers(), "findings": [finding.to_dict() for finding in self.findings]}


def compute_multiplier(
    fitted: Fitted,
    versus: Fitted,
    *,
    flops: float,
    tokens_per_param: float = 20.0,
    bootstrap: int = REPLICATES,
    name: str = "",
) -> ComputeMultiplier:
    """How many times less compute the runs of `versus` need for the loss that those of `fitted` reach with `flops`.

    Both are FitResults, or sources that law quest is fitted to, and both are evaluated at the same tokens per parameter. `name`
    is the second's name in the answer. Raises UsageError if a fit has no residuals to draw replicates from.
    """
    from ..analysis import planner
    from ..analysis.uncertainty import allows_intervals
    from ..analysis.uncertainty import bootstrap as draw

    fit, other = fit_of(fitted).fit, fit_of(versus).fit
    with analysis_errors():
        first, second = (draw(each, bootstrap or REPLICATES) for each in (fit, other))
        times, spread = planner.compute_multiplier(first, second, flops, tokens_per_param)
    ends = spread if allows_intervals(fit) and allows_intervals(other) else None
    label = name or ("the other source" if isinstance(versus, FitResult) or versus is None else str(versus))
    return ComputeMultiplier(fit, other, label, times, ends, flops, tokens_per_param)


# --- untrained formats ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FormatEff:
    """eff of a format, from the mean squared errors of its grids on a standard normal; with a 95 % interval if there is one."""

    format: str
    eff: float
    interval: tuple[float, float] | None
    w_mse: float
    a_mse: float


@dataclass(frozen=True)
class UntrainedFormats:
    """eff of formats without runs. `error` is the law's error for formats left out in turn, and their number."""

    fit: Fit
    formats: tuple[FormatEff, ...]
    error: tuple[float, int] | None
    bootstrap: int

    @property
    def findings(self) -> tuple[Finding, ...]:
        """How far off predictions of left-out formats are, then the status of the fit."""
        from ..analysis.findings import Finding

        if self.error is None:
            text = "No intervals: what the law misses of a format shows only where three or more can be left out."
            return (Finding("no_format_error", text), *fit_status(self.fit))
        rms, count = self.error
        held = "; the intervals include that" if self.bootstrap else ""
        text = f"Each of {count} formats, predicted from the others, is off by {100 * rms:.2g} %{held}."
        return (Finding("format_error", text, {"rms_log_eff": rms, "formats": count}), *fit_status(self.fit))

    def to_json(self) -> dict[str, Any]:
        """What `plan --untrained --json` prints."""
        error = None if self.error is None else {"rms_log_eff": self.error[0], "formats": self.error[1]}
        findings = [finding.to_dict() for finding in self.findings]
        return {**_about(self.fit), "format_error": error, "formats": [asdict(f) for f in self.formats], "findings": findings}


def untrained_formats(
    sources: Points | Paths,
    formats: Sequence[str],
    *,
    columns: Mapping[str, str] | None = None,
    where: Mapping[str, str] | None = None,
    table: TableOptions | None = None,
    bootstrap: int = REPLICATES,
) -> UntrainedFormats:
    """eff of formats without runs, such as "int5", "fp4" or "int4+bf16" (weights + activations).

    It follows from the format's errors on a standard normal by law `unified`, fitted to rotated schemes with known errors.
    Raises UsageError for a format whose error is not known, DataError for points that cannot be read or fitted.
    """
    import numpy as np

    from ..analysis import fit_law
    from ..analysis.formats import format_mse
    from ..analysis.points import Points
    from ..analysis.untrained import eff_from_mse, format_error

    points = (
        sources if isinstance(sources, Points) else load_sources(sources, columns=columns, where=where, options=table).points
    )
    usable = [i for i, s in enumerate(points.schemes) if not math.isnan(s.w_mse + s.a_mse) and s.rotated]
    with analysis_errors():
        fit = fit_law(points.subset(np.isin(points.group, usable)), "unified")
        boot = bootstraps([fit], bootstrap).get("unified")
        error = format_error(fit)
        out = []
        for name in formats:
            w, _, a = name.partition("+")
            w_mse, a_mse = format_mse(w), format_mse(a or w)
            if math.isnan(w_mse + a_mse):
                raise UsageError(f"--untrained: no Gaussian error is known for '{name}'; choices: {FORMATS}.")
            out.append(FormatEff(name, *eff_from_mse(fit, w_mse, a_mse, boot, error), w_mse, a_mse))
    return UntrainedFormats(fit, tuple(out), error, bootstrap if boot else 0)
