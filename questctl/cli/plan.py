"""`questctl plan [SOURCE…]`: from runs and a budget to bits, size and tokens, or to the runs that would say more."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .. import console
from ..config.amounts import BYTE_UNITS, COUNT_UNITS, parse_amount
from ..errors import UsageError
from ..scaling import plan as plans
from ..scaling import plan_files
from ..scaling.fit import check_law, saved_fit
from ..scaling.plan import REPLICATES, parse_goal
from ..scaling.sources import require_sources
from ..store import default_root
from . import fit_options as fo
from . import options as opt

if TYPE_CHECKING:
    from ..analysis.planner import Option
    from ..scaling.plan import BudgetPlan, NextRuns, UntrainedFormats


@fo.with_table_flags
def command(
    sources: fo.Sources = None,
    memory: Annotated[str | None, typer.Option(help="Memory for the weights: 24GB, 24GiB.", show_default=False)] = None,
    artifact: Annotated[str | None, typer.Option(help="Instead: size of the whole file: 16MB.", show_default=False)] = None,
    compressed: Annotated[bool, typer.Option("--compressed", help="Count --artifact after lossless compression.")] = False,
    flops: Annotated[str | None, typer.Option(help="Compute of training and inference: 2e21.", show_default=False)] = None,
    inference_tokens: Annotated[
        str | None, typer.Option("--inference-tokens", help="Tokens that will be served: 1e12 or 1T.", show_default=False)
    ] = None,
    unique_tokens: fo.UniqueTokens = None,
    bits: Annotated[
        str | None, typer.Option(help="Bits or schemes to compare: 1,2,4,8,16 (default: all with runs).", show_default=False)
    ] = None,
    kv: Annotated[str | None, typer.Option(help="Memory kept for the KV cache: 2GB.", show_default=False)] = None,
    vocab: Annotated[int, typer.Option(min=0, help="Also count embedding and head of N token ids.")] = 0,
    embedding: Annotated[str, typer.Option(help="Their bits where schemes have none for them: int4.")] = "bf16",
    speed: Annotated[
        list[str] | None,
        typer.Option(help="Speed-up of a scheme, which divides its FLOPs: w4a4=2 (repeatable).", show_default=False),
    ] = None,
    next_runs: Annotated[int, typer.Option("--next-runs", min=0, help="Instead: this many runs that sharpen --goal most.")] = 0,
    goal: Annotated[
        str, typer.Option(help="transition@SIZE:MANY:FEW, eff:SCHEME,SCHEME, eff, or loss@SIZE:TOKENS.")
    ] = "transition@7B:8:4",
    max_flops: Annotated[str | None, typer.Option("--max-flops", help="Most FLOP of one next run.", show_default=False)] = None,
    sizes: Annotated[
        str | None, typer.Option(help="Sizes of next runs: 27K,107K (default: those of the data).", show_default=False)
    ] = None,
    lengths: Annotated[
        str | None, typer.Option(help="Tokens of next runs: 500K,1M (default: 1 to 800 per parameter).", show_default=False)
    ] = None,
    seconds: Annotated[
        bool, typer.Option("--seconds", help="Choose next runs by seconds, estimated from SOURCE's runs, not by FLOP.")
    ] = False,
    untrained: Annotated[
        str | None, typer.Option(help="Instead: eff of formats without runs: int5,fp4,int4+bf16.", show_default=False)
    ] = None,
    versus: Annotated[
        Path | None, typer.Option(help="Instead: compute that this other SOURCE saves at --flops.", show_default=False)
    ] = None,
    ratio: Annotated[float, typer.Option("--tokens-per-param", help="With --versus: tokens per parameter.")] = 20.0,
    law: fo.SavedLaw = None,
    objective: fo.SavedObjective = None,
    residuals: fo.Residuals = None,
    fix: fo.Fix = None,
    replicates: Annotated[int, typer.Option("--bootstrap", min=0, help="Replicates behind intervals.")] = REPLICATES,
    out: Annotated[
        Path | None, typer.Option(help="TOML file: a config for `train`, or a sweep file for `sweep`.", show_default=False)
    ] = None,
    sets: Annotated[
        list[str] | None,
        typer.Option("--set", "-s", help="Config key for --out: --set data.source=hf:NAME (repeatable).", show_default=False),
    ] = None,
    details: fo.Details = False,
    runs: opt.RunsDir = None,
    as_json: opt.Json = False,
    *,
    rows: fo.Rows,
) -> None:
    """Best bits, size and tokens on a budget, with intervals and how far other laws disagree; or the next runs to train."""
    check_law(law or "quest")
    budget = _amount("--flops", flops), _amount("--memory", memory, BYTE_UNITS)
    kept = _amount("--kv", kv, BYTE_UNITS) if kv else 0.0
    served = _amount("--inference-tokens", inference_tokens) if inference_tokens else 0.0
    pace, largest = fo.numbers("--speed", speed), _amount("--max-flops", max_flops)
    parse_goal(goal)
    from_sizes, from_lengths = (
        [parse_amount(amount, option) for amount in fo.names(text)] if text else []
        for option, text in (("--sizes", sizes), ("--lengths", lengths))
    )
    unique = _amount("--unique-tokens", unique_tokens)
    if unique_tokens and (next_runs or untrained or versus):
        raise UsageError("--unique-tokens: is part of a budget; leave it out with --next-runs, --untrained and --versus.")
    if not (next_runs or untrained) and flops is None:
        _refuse({"--memory": memory, "--artifact": artifact, "--inference-tokens": inference_tokens}, versus)
    if sets and out is None:
        raise UsageError("--set: its keys are those of the file that --out names; give one.")
    if budget[1] - kept <= 0:
        raise UsageError(f"--kv: {kv} leaves no memory for weights within {memory}.")
    sources = sources or [runs or default_root()]
    require_sources([*sources, *([versus] if versus else [])])
    keys = plan_files.keys_of_runs(sources, sets or []) if out is not None else {}
    if untrained:
        formats = plans.untrained_formats(
            sources, fo.names(untrained), columns=rows.columns, where=rows.where, table=rows.options, bootstrap=replicates
        )
        _show(formats, _formats, as_json, details)
        return
    how: dict[str, Any] = {"objective": objective, "residuals": residuals, "fix": fo.numbers("--fix", fix)}
    how |= {"columns": rows.columns, "where": rows.where, "table": rows.options}
    fitted = plans.fit_or_saved(sources, law, **how)
    if next_runs:
        timed = sources if seconds else None
        more = plans.plan_next_runs(
            fitted,
            next_runs,
            goal=goal,
            sizes=from_sizes,
            lengths=from_lengths,
            max_flops=largest,
            timed_by=timed,
            bootstrap=replicates,
        )
        if out is not None:
            _save(out, plan_files.sweep_file(more, keys), "sweep")
        _show(more, _next_runs, as_json, details)
    elif versus is not None:
        other = saved_fit([versus]) or plans.fit_or_saved([versus], fitted.fit.law.name, **how)
        saved = plans.compute_multiplier(
            fitted, other, flops=budget[0], tokens_per_param=ratio, bootstrap=replicates, name=str(versus)
        )
        _show(saved, None, as_json, details)
    else:
        best = plans.plan_budget(
            fitted,
            flops=budget[0],
            memory_bytes=budget[1] - kept,
            artifact_bytes=_amount("--artifact", artifact, BYTE_UNITS),
            compressed=compressed,
            inference_tokens=served,
            schemes=fo.names(bits),
            vocab=vocab,
            embedding=embedding,
            speed=pace,
            unique_tokens=unique,
            bootstrap=replicates,
        )
        if out is not None:
            _save(out, plan_files.config_file(best, keys), "train --config")
        _show(best, _options, as_json, details)


def _amount(option: str, text: str | None, units: Mapping[str, float] = COUNT_UNITS) -> float:
    """`parse_amount`, infinite where the option is absent."""
    return math.inf if text is None else parse_amount(text, option, units)


def _refuse(bounds: Mapping[str, str | None], versus: Path | None) -> None:
    """Raises UsageError, which says what a budget without FLOP lacks."""
    if versus is not None:
        raise UsageError("--versus: needs --flops, the compute whose loss the other source is to reach.")
    if limits := [option for option, amount in bounds.items() if amount]:
        raise UsageError(
            f"{limits[0]}: alone bounds no training: by every law more tokens give less loss without end; add --flops."
        )
    raise UsageError(
        "plan: give a budget (--flops, and --memory or --artifact if that is bound too), --next-runs or --untrained."
    )


def _save(path: Path, text: str, command: str) -> None:
    """Write a file of a plan, and say how to run it and what it lacks. Raises StorageError."""
    plan_files.save(path, text)
    console.note(f"wrote {path}: questctl {command} {path}")
    if plan_files.WHICH_DATA in text:
        console.warn(f"{path}: {plan_files.WHICH_DATA}; name it by --set data.source=… --set data.tokenizer=…")


def _show(plan: Any, table: Any, as_json: bool, details: bool) -> None:
    """A plan as JSON, or its findings and its table."""
    if as_json:
        console.print_json(plan.to_json())
        return
    fo.note_points(plan.fit.points)
    fo.say_findings(plan.findings, details=details)
    if table is not None:
        console.say()
        table(plan)


def _options(plan: BudgetPlan) -> None:
    rows = []
    for o in plan.options:
        sizes = (f"{o.N:.4g}", f"{o.D:.4g}", o.tokens_per_param, f"{o.loss:.5f}")
        rows.append((o.scheme, o.w_stored_bits, *sizes, *(o.interval or (None, None)), _spread(o), o.limit))
    columns = ("scheme", "bits", "N", "D", "D/N", "loss", "low", "high", "other laws", "limited by")
    fo.print_models(columns, rows, [o.share for o in plan.options])


def _spread(option: Option) -> str | None:
    """Lowest and highest loss among the laws that are not clearly worse."""
    if len(option.laws) < 2:
        return None
    low, high = min(option.laws, key=lambda k: option.laws[k]), max(option.laws, key=lambda k: option.laws[k])
    return f"{option.laws[low]:.4f} {low} … {option.laws[high]:.4f} {high}"


def _next_runs(plan: NextRuns) -> None:
    rows = [
        (r.scheme, f"{r.N:.4g}", f"{r.D:.4g}", r.tokens_per_param, r.seed, f"{r.flops:.3g}", r.seconds, 100 * r.variance)
        for r in plan.runs
    ]
    columns = ("next run", "N", "D", "D/N", "seed", "FLOP", "seconds", "variance left %")
    fo.print_models(columns, rows, [r.share for r in plan.runs])


def _formats(plan: UntrainedFormats) -> None:
    rows = [(f.format, f.eff, *(f.interval or (None, None)), f.w_mse, f.a_mse) for f in plan.formats]
    console.print_table(("format", "eff", "low", "high", "weight MSE", "activation MSE"), rows)
