"""`questctl train`: train one run and show its result. However it ended, the same command continues it."""

from __future__ import annotations

import os
import shutil
import sys
from typing import Annotated

import typer

from .. import console
from ..config import Resolved, RunConfig, human_bytes, human_count
from ..data.size_estimate import CorpusEstimate
from ..store import Result, Run, RunStore
from ..sweep import costs
from ..sweep.estimate import RunEstimate, estimate_run
from ..sweep.slots import threads_warning
from ..system import OtherWork
from ..training.branch import branch, parse_cooldown, parse_source, with_execution
from ..training.group import run_command
from . import options as opt


@opt.takes_config
def command(
    resolved: Resolved,
    runs: opt.RunsDir = None,
    track: opt.Track = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the run and what it costs; write nothing.")] = False,
    as_json: opt.Json = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress.")] = False,
    nproc: Annotated[int, typer.Option(min=1, help="Processes on this machine that train it together.")] = 1,
    branch_from: Annotated[
        str | None,
        typer.Option("--branch-from", metavar="RUN@STEP", help="Begin at that checkpoint and cool down.", show_default=False),
    ] = None,
    cooldown: Annotated[str, typer.Option(help="Length of that cooldown: a share of the whole run, or steps.")] = "20%",
) -> None:
    """Train one model. Without options: 53 thousand parameters on Python's own library, in under a minute.

    For example: questctl train --preset 214K --quant quest --bits 4

    The run's name says what it is and ends in a hash of everything that changes its result: the same options continue the same
    run, or show its result if it is finished. Exit code 4: diverged; after a checkpoint 75: stopped by SIGTERM, 130: by Ctrl-C.
    """
    config, store = resolved.config, RunStore(runs)
    opt.track(track)
    if branch_from is not None:
        trunk, step = parse_source(branch_from, store)
        config = with_execution(branch(trunk.config(), step, parse_cooldown(cooldown, step)), config, resolved.origins)
    run = store.run(config.run_id)
    if dry_run:
        with console.warnings_shown():
            estimate = estimate_run(config, runs, processes=nproc)
        show_estimate(estimate, as_json=as_json)
        return
    finished = run.result()
    is_worker = "RANK" in os.environ  # started by --nproc or torchrun
    if nproc > 1 and not is_worker and finished is None:
        from ..training.preflight import check

        check(config, run, None if quiet else console.DataProgress(config.data.source), processes=nproc)
        code, reason = run_command(nproc, sys.argv[1:])
        if reason:
            console.error(reason)
        raise typer.Exit(code)
    speaks = os.environ.get("RANK", "0") == "0"
    result = (None if is_worker else finished) or _train(config, run, quiet=quiet or not speaks, warn=speaks)
    if speaks and as_json:
        console.print_json({**result.to_dict(), "path": str(run.path)})
    elif speaks:
        show(result, run, again=finished is not None)


def _train(config: RunConfig, run: Run, *, quiet: bool, warn: bool) -> Result:
    """Check the input before torch is loaded, announce the run, and train it."""
    from ..training.preflight import check

    others = OtherWork()
    with console.warnings_shown(), console.TrainProgress(run.name, quiet=quiet) as progress:
        text = CorpusEstimate.of(check(config, run, None if quiet else console.DataProgress(config.data.source)))
        if not quiet:
            _announce(config, run, text)
        for warning in (*text.warnings(config), config.warmup_warning):
            if warn and warning:
                console.warn(warning)
        from ..training import train

        if warn and (slow := threads_warning(config, run, others.cpus())):
            console.warn(slow)
        try:
            return train(config, runs=run.path.parent, progress=progress)
        except KeyboardInterrupt:
            console.note(f"{run.name}: {run.status().message}")
            raise


def _announce(config: RunConfig, run: Run, text: CorpusEstimate) -> None:
    steps = f"{config.train.steps:,} steps"
    if config.branch:
        steps += f" (from step {config.branch.step:,} of {config.branch.source})"
    n, d = human_count(config.model.params_non_embedding), human_count(config.tokens)
    console.note(f"{run.name}: {n} parameters, {d} tokens ({text.passes_text(config)}), {steps} → {run.path}")
    most, after = costs.disk_bytes(config.with_vocabulary(text.vocab_size))
    existing = next(p for p in (run.path.absolute(), *run.path.absolute().parents) if p.exists())
    free = shutil.disk_usage(existing).free
    needed, kept, left = map(human_bytes, (most, after, free))
    console.note(f"disk: at most {needed} while it trains, {kept} after; {left} free")
    if most > free:
        console.warn(f"{run.path}: may need {needed} of disk, but {left} are free.")


def show(result: Result, run: Run, *, again: bool = False) -> None:
    """The result as a table, and what to do next."""
    per_byte = f", {result.bits_per_byte:.4f} bits/byte" if result.bits_per_byte is not None else ""
    passes = run.passes(result.tokens)
    repeated = f", {passes:.3g} passes over the text" if passes is not None else ""
    kib, per_parameter = result.model_bits / 8 / 1024, result.model_bits / result.params_non_embedding
    rows = [
        ("validation loss", f"{result.loss:.4f} nats/token{per_byte}"),
        ("training loss", f"{result.train_loss:.4f} nats/token"),
        ("scheme", f"{result.scheme}: weights {result.weights}, activations {result.activations}"),
        ("parameters", f"{result.params_non_embedding:,} non-embedding, {result.params_total:,} in all"),
        ("could be stored in", f"{kib:,.1f} KiB, {per_parameter:.2f} bits per non-embedding parameter"),
        ("tokens", f"{result.tokens:,}, {result.tokens_per_param:.3g} per parameter{repeated}, {result.flops:.2e} FLOPs"),
        ("speed", f"{result.tokens_per_s:,.0f} tokens/s, {console.duration(result.seconds)} on {result.device}"),
        ("folder", str(run.path)),
    ]
    console.print_table(("run", result.run), rows, left=2)
    digits = result.run.rpartition("-")[2]
    where = "" if str(run.path.parent) == "runs" else f" --runs {run.path.parent}"
    if again:
        console.note(f"it was finished before; questctl runs rm {digits}{where} removes it")
    elif result.scheme == "bf16":
        console.note(f"next: the same with --quant quest --bits 4, then questctl runs ls{where}")
    else:
        console.note(f"next: questctl runs show {digits}{where}")


def show_estimate(estimate: RunEstimate, *, as_json: bool) -> None:
    """What the run would be and take."""
    config, text, values = estimate.config, estimate.text, estimate.to_json()
    for warning in filter(None, (*text.warnings(config), config.warmup_warning)):
        console.warn(warning)
    if as_json:
        console.print_json(values)
        return
    time = f"{console.duration_range(estimate.time.low, estimate.time.high)}, " if estimate.time else ""
    rows = [
        ("state", estimate.state),
        ("scheme", f"{values['scheme']}: weights {values['weights']}, activations {values['activations']}"),
        ("parameters", f"{values['params_non_embedding']:,} non-embedding, {estimate.params_total:,} in all"),
        ("vocabulary", f"{config.model.vocab_size:,} ids" if config.model.vocab_size else text.ids),
        ("tokens", f"{config.tokens:,}, {values['tokens_per_param']:.3g} per parameter, in {config.train.steps:,} steps"),
        ("text", text.passes_text(config) or "its length is not known before it is prepared"),
        ("FLOPs", f"{estimate.flops:.3g}"),
        *([("teacher", estimate.of_teacher)] if estimate.of_teacher else []),
        ("memory", f"{human_bytes(estimate.memory_bytes)} at least"),
        ("time", time + estimate.basis),
        ("disk", f"{human_bytes(estimate.disk_bytes)} at the most"),
        ("folder", values["path"]),
    ]
    console.print_table(("run", values["run"]), rows, left=2)
