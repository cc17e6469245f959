"""`questctl plan [SOURCE…]`: from runs and a budget to bits, size and tokens, or to the runs that would say more."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .. import console
from ..config.amounts import BYTE_UNITS, COUNT_UNITS, parse_amount
from ..errors import UsageError
from ..scaling import plan_files
from . import options as opt
from .fit_scaling import (
    Fix,
    Law,
    Map,
    Objective,
    Sources,
    Where,
    as_number,
    bootstraps,
    check_law,
    chosen,
    fitted,
    load_points,
    pairs,
    user_errors,
)

if TYPE_CHECKING:
    from ..analysis.choice import Choice
    from ..analysis.fit_result import Fit
    from ..analysis.planner import Option
    from ..analysis.points import Points

DEFAULT_REPLICATES = 400
GOAL = re.compile(r"transition@(?P<size>[^:]+?)(?::(?P<many>[^:]+):(?P<few>[^:]+))?")


def command(
    sources: Sources = None,
    memory: Annotated[str | None, typer.Option(help="Memory for the weights: 24GB, 24GiB.", show_default=False)] = None,
    flops: Annotated[str | None, typer.Option(help="Compute of training and inference: 2e21.", show_default=False)] = None,
    inference_tokens: Annotated[
        str | None, typer.Option("--inference-tokens", help="Tokens that will be served: 1e12 or 1T.", show_default=False)
    ] = None,
    bits: Annotated[
        str | None, typer.Option(help="Bits or schemes to compare: 1,2,4,8,16 [all with runs].", show_default=False)
    ] = None,
    kv: Annotated[str | None, typer.Option(help="Memory kept for the KV cache: 2GB.", show_default=False)] = None,
    vocab: Annotated[
        int, typer.Option(min=0, help="Also count embedding and head of N token ids in --memory, at 16 bits.")
    ] = 0,
    speed: Annotated[
        list[str] | None,
        typer.Option(help="FLOPs of a scheme count as that much less: w4a4=2 (repeatable).", show_default=False),
    ] = None,
    next_runs: Annotated[int, typer.Option("--next-runs", min=0, help="Instead: the runs that say most about --goal.")] = 0,
    goal: Annotated[str, typer.Option(help="transition@SIZE, or transition@SIZE:MANY:FEW.")] = "transition@7B:8:4",
    max_flops: Annotated[str | None, typer.Option("--max-flops", help="Most FLOP of one next run.", show_default=False)] = None,
    untrained: Annotated[
        str | None, typer.Option(help="Instead: eff of formats without runs: int5,fp4,int4+bf16.", show_default=False)
    ] = None,
    versus: Annotated[
        Path | None, typer.Option(help="Instead: compute that this other SOURCE saves at --flops.", show_default=False)
    ] = None,
    ratio: Annotated[float, typer.Option("--tokens-per-param", help="Tokens per parameter of --versus.")] = 20.0,
    law: Law = "quest",
    objective: Objective = "lsq",
    fix: Fix = None,
    map_: Map = None,
    where: Where = None,
    replicates: Annotated[int, typer.Option("--bootstrap", min=0, help="Replicates behind intervals.")] = DEFAULT_REPLICATES,
    out: Annotated[
        Path | None, typer.Option(help="TOML file: a config for `train`, or a plan for `sweep`.", show_default=False)
    ] = None,
    sets: Annotated[
        list[str] | None,
        typer.Option("--set", "-s", help="Key of --out: --set data.source=hf:NAME (repeatable).", show_default=False),
    ] = None,
    runs: opt.RunsDir = None,
    as_json: opt.Json = False,
) -> None:
    """Best bits, size and tokens on a budget, with intervals and how far other laws disagree; or the next runs to train."""
    check_law(law)
    limits = Limits(
        amount("--flops", flops, COUNT_UNITS),
        amount("--memory", memory, BYTE_UNITS) - (amount("--kv", kv, BYTE_UNITS) if kv else 0.0),
        amount("--inference-tokens", inference_tokens, COUNT_UNITS) if inference_tokens else 0.0,
        vocab,
        {word: as_number(f"--speed {word}", value) for word, value in pairs("--speed", speed).items()},
    )
    if any(not 0 < factor < math.inf for factor in limits.speed.values()):
        raise UsageError("--speed: a factor is a positive number, such as w4a4=2.")
    size, many, few = _goal(goal)
    most = amount("--max-flops", max_flops, COUNT_UNITS)
    if not (next_runs or untrained) and flops is None:
        if versus is not None:
            raise UsageError("--versus: needs --flops, the compute whose loss the other source is to reach.")
        if memory or inference_tokens:
            raise UsageError(
                f"{'--memory' if memory else '--inference-tokens'}: alone bounds no training: by every law more tokens give "
                "less loss without end; add --flops."
            )
        raise UsageError("plan: give a budget (--flops, and --memory if that is bound too), --next-runs or --untrained.")
    if sets and out is None:
        raise UsageError("--set: its keys are those of the file that --out names; give one.")
    if limits.memory <= 0:
        raise UsageError(f"--kv: {kv} leaves no memory for weights within {memory}.")
    sources = sources or [opt.runs_dir(runs)]
    with user_errors():
        given = plan_files.given(sources, sets or []) if out is not None else {}
        points = load_points(sources, map_, where)
        if untrained:
            _untrained(points, _words(untrained), replicates, as_json)
            return
        _fits(law, points)
        choice = chosen(points, objective) if law == "auto" else None
        held = pairs("--fix", fix)
        fit = fitted(points, choice.best.law.name if choice else law, objective, held)
        if next_runs:
            _next(fit, next_runs, (size, many, few), most, replicates, out, given, as_json)
        elif versus is not None:
            other = fitted(load_points([versus], map_, where), fit.law.name, objective, held)
            _versus(fit, other, versus, (limits.flops, ratio), replicates or DEFAULT_REPLICATES, as_json)
        else:
            _budget(fit, choice, limits, _words(bits), replicates, out, given, as_json)


def _fits(law: str, points: Points) -> None:
    """Raises UsageError for a law that has no answer for these points."""
    from ..analysis.laws import LAWS

    several = len(points.schemes) > 1
    if law == "auto" or (LAWS[law].uses_D and (LAWS[law].uses_scheme or not several)):
        return
    able = ", ".join(name for name, other in LAWS.items() if other.uses_D and (other.uses_scheme or not several))
    if not LAWS[law].uses_D:
        raise UsageError(f"--law: '{law}' knows no tokens, so it plans no budget; choices: {able}, auto.")
    raise UsageError(
        f"--law: '{law}' does not tell schemes apart, and there are {len(points.schemes)}; choices: {able}, auto; "
        "or --where COLUMN=VALUE for the runs of one scheme."
    )


def _about(fit: Fit) -> dict[str, Any]:
    return {
        "law": fit.law.name,
        "status": fit.status,
        "warnings": [w.to_dict() for w in fit.warnings],
        "data_hash": fit.points.hash,
    }


def _words(text: str | None) -> list[str]:
    return [w.strip() for w in text.split(",") if w.strip()] if text else []


def amount(option: str, text: str | None, units: Mapping[str, float]) -> float:
    """`parse_amount`, infinite where the option is absent."""
    return math.inf if text is None else parse_amount(text, option, units)


def _goal(text: str) -> tuple[float, str, str]:
    match = GOAL.fullmatch(text)
    if not match:
        raise UsageError(f"--goal: '{text}' is not transition@SIZE, such as transition@7B or transition@7B:8:4.")
    return amount("--goal", match["size"], COUNT_UNITS), match["many"] or "8", match["few"] or "4"


@dataclass(frozen=True)
class Limits:
    """What a plan may spend: training and serving together (FLOP), memory of the weights (bytes), tokens to be served; and what
    counts: ids of a vocabulary, by how much FLOPs of a scheme count less."""

    flops: float
    memory: float
    served: float
    vocab: int
    speed: dict[str, float]

    def __str__(self) -> str:
        """The cost model in a sentence."""
        table = f"2·{self.vocab}·d_model at 16 bits" if self.vocab else "nothing (--vocab N counts them at 16 bits)"
        memory = "" if math.isinf(self.memory) else f" N·bits of memory, embedding and head {table};"
        served = " and 2·N a served token" if self.served else ""
        faster = ", ".join(f"{word} 1/{factor:g}" for word, factor in self.speed.items())
        same = f"but for {faster}" if faster else "(--speed w4a4=2 counts those of a scheme half)"
        return f"Costs:{memory} 6·N·D training FLOP{served}, the same at every width {same}."


def _budget(
    fit: Fit,
    choice: Choice | None,
    limits: Limits,
    words: Sequence[str],
    replicates: int,
    out: Path | None,
    given: Mapping[str, Any],
    as_json: bool,
) -> None:
    """The best model of each scheme within the limits, lowest loss first."""
    from ..analysis.choice import alternatives
    from ..analysis.planner import outside_by_reason, plan

    boot = bootstraps([fit], replicates).get(fit.law.name)
    rivals = choice.rivals if choice else alternatives(fit)
    named = list(dict.fromkeys(_labels("--bits", fit.points, words))) or fit.points.labels
    speed = dict(zip(_labels("--speed", fit.points, list(limits.speed)), limits.speed.values(), strict=True))
    options = plan(
        fit,
        named,
        limits.flops,
        8 * limits.memory,
        inference_tokens=limits.served,
        vocab=limits.vocab,
        speed=speed,
        boot=boot,
        rivals=rivals,
    )
    if out is not None:
        best = options[0]
        scheme = fit.points.schemes[fit.points.index(best.scheme)]
        plan_files.save(out, plan_files.config(best, scheme, given), "train --config")
    if as_json:
        console.print_json({**_about(fit), **vars(limits), "options": [vars(o) for o in options]})
        return
    rows = []
    for o in options:
        sizes = (f"{o.N:.4g}", f"{o.D:.4g}", o.D / o.N, f"{o.loss:.5f}")
        rows.append((o.scheme, o.w_stored_bits, *sizes, *(o.interval or (None, None)), _spread(o), o.limit))
    console.print_table(("scheme", "bits", "N", "D", "D/N", "loss", "low", "high", "other laws", "limited by"), rows)
    console.say(str(limits))
    for line in _ranking(options):
        console.say(line)
    for line in outside_by_reason(fit.points, options):
        console.warn(line)
    _warn(fit)


def _labels(option: str, points: Points, words: Sequence[str]) -> list[str]:
    """The label of each word's scheme. Raises UsageError naming the option and both vocabularies, labels and bits."""
    from ..analysis.tables import PointError

    try:
        return [points.labels[points.index(word)] for word in words]
    except PointError as e:
        raise UsageError(f"{option}: {e}.") from e


def _ranking(options: Sequence[Option]) -> list[str]:
    """What keeps the first scheme from being the best: ties over the replicates, and other laws."""
    best, out = options[0].scheme, []
    tied = [o.scheme for o in options[1:] if o.tied]
    if tied:
        out.append(f"{best} is tied with {', '.join(tied)}: the 95 % interval of the difference reaches zero.")
    laws = {name: min(options, key=lambda o: o.laws[name]).scheme for name in options[0].laws}
    other = [f"{name} {scheme}" for name, scheme in laws.items() if scheme != best]
    if other:
        out.append(f"Other laws that fit about as well put another scheme first: {', '.join(other)}.")
    return out


def _warn(fit: Fit) -> None:
    if fit.status != "converged":
        reasons = [w.sentence for w in fit.warnings if w not in fit.points.notes]
        console.warn(" ".join([f"law {fit.law.name}: {fit.status}" + (":" if reasons else ""), *reasons]))


def _spread(option: Option) -> str | None:
    """Lowest and highest loss among the laws that are not clearly worse."""
    if len(option.laws) < 2:
        return None
    low, high = min(option.laws, key=lambda k: option.laws[k]), max(option.laws, key=lambda k: option.laws[k])
    return f"{option.laws[low]:.4f} {low} … {option.laws[high]:.4f} {high}"


def _next(
    fit: Fit,
    count: int,
    goal: tuple[float, str, str],
    most: float,
    replicates: int,
    out: Path | None,
    given: Mapping[str, Any],
    as_json: bool,
) -> None:
    """The runs that say most about a transition per FLOP."""
    from ..analysis.design import next_runs, transition_error
    from ..analysis.transitions import transition

    _labels("--goal", fit.points, goal[1:])
    picked = next_runs(fit, goal[0], count, goal[1], goal[2], flops=most)
    boot = bootstraps([fit], replicates).get(fit.law.name)
    now, error = transition(fit, *goal, boot), transition_error(fit, *goal)
    if out is not None:
        plan_files.save(out, plan_files.sweep(fit, picked, goal, given), "sweep")
    if as_json:
        console.print_json(
            {**_about(fit), "goal": {**vars(now), "standard_error_log": error}, "runs": [vars(r) for r in picked]}
        )
        return
    answer = f"{now.many} → {now.few} at {now.size:.3g}: {now.words} tokens per 16-bit parameter"
    console.say(f"{answer}; standard error of its logarithm {'unknown' if math.isinf(error) else f'{error:.3g}'}")
    rows = [(r.scheme, f"{r.N:.4g}", f"{r.D:.4g}", r.D / r.N, r.seed, f"{r.flops:.3g}", 100 * r.variance) for r in picked]
    console.print_table(("next run", "N", "D", "D/N", "seed", "FLOP", "variance left %"), rows)
    if len(picked) < count:
        console.warn(f"--next-runs: there are {len(picked)} candidates, not {count}")
    _warn(fit)


def _versus(fit: Fit, other: Fit, name: Path, at: tuple[float, float], replicates: int, as_json: bool) -> None:
    """How much less compute the runs of `name` need for the same loss, at a FLOP budget and tokens per parameter."""
    from ..analysis.planner import compute_multiplier
    from ..analysis.uncertainty import bootstrap

    first, second = (bootstrap(f, replicates) for f in (fit, other))
    times, ends = compute_multiplier(first, second, *at)
    if as_json:
        answer = {"multiplier": times, "interval": ends, "flops": at[0], "tokens_per_param": at[1]}
        console.print_json({**_about(fit), **answer})
        return
    loss = f"the loss of {at[0]:.3g} FLOP"
    with_ = f"reaches {loss} with {1 / times:.3g} times the compute" if times else f"never reaches {loss}"
    console.say(f"{name} {with_}")
    never = "" if ends[0] else "; 0: never"
    interval = f"[{ends[0]:.3g}, {ends[1]:.3g}]"
    console.say(f"(compute multiplier {times:.3g} {interval}, both at {at[1]:g} tokens per parameter{never})")
    for each in (fit, other):
        _warn(each)


def _untrained(points: Points, words: Sequence[str], replicates: int, as_json: bool) -> None:
    """eff of formats without runs, from their Gaussian errors, by law `unified` on the schemes whose errors are known."""
    import numpy as np

    from ..analysis import fit_law
    from ..analysis.formats import format_mse
    from ..analysis.untrained import eff_from_mse, format_error

    known = [i for i, s in enumerate(points.schemes) if not math.isnan(s.w_mse + s.a_mse) and s.rotated]
    fit = fit_law(points.subset(np.isin(points.group, known)), "unified")
    boot = bootstraps([fit], replicates).get("unified")
    error = format_error(fit)
    formats: list[dict[str, Any]] = []
    for word in words:
        w, _, a = word.partition("+")
        w_mse, a_mse = format_mse(w), format_mse(a or w)
        if math.isnan(w_mse + a_mse):
            choices = "int1 … int8, sint4, ternary, fp4, fp8, lloyd3, power4, olive4, ec2.5, int4+bf16"
            raise UsageError(f"--untrained: no Gaussian error is known for '{word}'; choices: {choices}.")
        eff, ends = eff_from_mse(fit, w_mse, a_mse, boot, error)
        formats.append({"format": word, "eff": eff, "interval": ends, "w_mse": w_mse, "a_mse": a_mse})
    if as_json:
        left_out = None if error is None else {"rms_log_eff": error[0], "formats": error[1]}
        console.print_json({**_about(fit), "format_error": left_out, "formats": formats})
        return
    rows = [(f["format"], f["eff"], *(f["interval"] or (None, None)), f["w_mse"], f["a_mse"]) for f in formats]
    console.print_table(("format", "eff", "low", "high", "weight MSE", "activation MSE"), rows)
    if error is None:
        console.warn("no interval: what the law misses of a format shows only where three or more can be left out in turn")
    else:
        held = ", which the intervals hold" if boot else ""
        console.say(f"Each of {error[1]} formats, predicted from the others: off by {100 * error[0]:.2g} %{held}.")
    _warn(fit)
