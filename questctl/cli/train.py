"""`questctl train`: one run, from its options to a table. However it ended, the same command goes on where it was."""

from __future__ import annotations

import os
import shutil
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Annotated

import typer

from .. import console
from ..config import Resolved, RunConfig, human_count
from ..data.size_estimate import CorpusEstimate, estimate_corpus
from ..errors import QuestError
from ..store import Result, Run, RunStore, describe
from ..sweep import costs
from ..training.branch import branch, parse_cooldown, parse_source, with_execution
from . import options as opt
from . import processes


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
        typer.Option("--branch-from", metavar="RUN@STEP", help="Leave that run there and cool down.", show_default=False),
    ] = None,
    cooldown: Annotated[str, typer.Option(help="Length of that cooldown: a share of the whole run, or steps.")] = "20%",
) -> None:
    """Train one model. Without options: 53 thousand parameters on Python's own library, in under a minute.

    For example: questctl train --preset 214K --quant quest --bits 4

    The run's name says what it is and ends in a hash of everything that changes its result: the same options continue the same
    run, or show its result if it is finished. Exit code 4: diverged; after a checkpoint 75: stopped by SIGTERM, 130: by Ctrl-C.
    """
    config, store = resolved.config, RunStore(opt.runs_dir(runs))
    opt.track(track)
    if branch_from is not None:
        trunk, step = parse_source(branch_from, store)
        config = with_execution(branch(trunk.config(), step, parse_cooldown(cooldown, step)), config, resolved.origins)
    run = store.run(config.run_id)
    if dry_run:
        with _warnings_shown():
            known = _foreseen(config, run, nproc)
        show_cost(config, store, known, as_json=as_json)
        return
    done = run.result()
    together = "RANK" in os.environ  # started by --nproc or torchrun
    if nproc > 1 and not together and done is None:
        from ..training.preflight import check

        check(config, run, None if quiet else console.DataProgress(config.data.source), processes=nproc)
        raise typer.Exit(processes.run(nproc, sys.argv[1:]))
    first = os.environ.get("RANK", "0") == "0"
    result = (None if together else done) or _train(config, run, quiet=quiet or not first)
    if not first:
        return
    if as_json:
        console.print_json({**asdict(result), "path": str(run.path)})
    else:
        show(result, run, again=done is not None)


def _train(config: RunConfig, run: Run, *, quiet: bool) -> Result:
    """Check everything that can be checked at once, then load torch and train."""
    from ..training.preflight import check

    with _warnings_shown():
        text = CorpusEstimate.of(check(config, run, None if quiet else console.DataProgress(config.data.source)))
        progress = console.TrainProgress(run.name, quiet=quiet)
        if not quiet:
            n, d, steps = config.model.non_embedding_parameters, config.tokens, f"{config.train.steps:,}"
            if config.branch:
                steps += f" (from step {config.branch.step:,} of {config.branch.source})"
            size = f"{human_count(n)} parameters, {human_count(d)} tokens ({text.said(config)}), {steps} steps"
            console.note(f"{run.name}: {size} → {run.path}")
            _tell_disk(costs.with_vocabulary(config, text.vocab_size), run)
        if (often := text.repeated(config)) and os.environ.get("RANK", "0") == "0":
            console.warn(often)
        from ..training import train

        try:
            return train(config, runs=run.path.parent, progress=progress)
        except KeyboardInterrupt:
            console.note(f"{run.name}: {run.status().message}")
            raise
        finally:
            progress.close()


def _tell_disk(config: RunConfig, run: Run) -> None:
    most, done = costs.disk_bytes(config)
    room = next(p for p in (run.path.absolute(), *run.path.absolute().parents) if p.exists())
    free = shutil.disk_usage(room).free
    said, after, there = (f"{n / 2**20:,.1f} MiB" for n in (most, done, free))
    console.note(f"disk: at most {said} while it trains, {after} after; {there} free")
    if most > free:
        console.warn(f"{run.path}: may need {said} of disk, and {there} are free there.")


@contextmanager
def _warnings_shown() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = lambda message, *_, **__: console.warn(str(message))
        yield


def show(result: Result, run: Run, *, again: bool = False) -> None:
    """The result as a table, and what to do next."""
    per_byte = f", {result.bits_per_byte:.4f} bits/byte" if result.bits_per_byte is not None else ""
    often = run.passes(result.tokens)
    passes = f", {often:.3g} passes over the text" if often is not None else ""
    kib, per_parameter = result.model_bits / 8 / 1024, result.model_bits / result.params_non_embedding
    rows = [
        ("validation loss", f"{result.loss:.4f} nats/token{per_byte}"),
        ("training loss", f"{result.train_loss:.4f} nats/token"),
        ("scheme", f"{result.scheme}: weights {result.weights}, activations {result.activations}"),
        ("parameters", f"{result.params_non_embedding:,} non-embedding, {result.params_total:,} in all"),
        ("could be stored in", f"{kib:,.1f} KiB, {per_parameter:.2f} bits per non-embedding parameter"),
        ("tokens", f"{result.tokens:,}, {result.tokens_per_param:.3g} per parameter{passes}, {result.flops:.2e} FLOPs"),
        ("speed", f"{result.tokens_per_s:,.0f} tokens/s, {console.duration(result.seconds)} on {result.device}"),
        ("folder", str(run.path)),
    ]
    console.print_table(("run", result.run), rows, left=2)
    digits = result.run.rpartition("-")[2]
    here = "" if str(run.path.parent) == "runs" else f" --runs {run.path.parent}"
    if again:
        console.note(f"it was finished before; questctl runs rm {digits}{here} removes it")
    elif result.scheme == "bf16":
        console.note(f"next: the same with --quant quest --bits 4, then questctl runs ls{here}")
    else:
        console.note(f"next: questctl runs show {digits}{here}")


def _foreseen(config: RunConfig, run: Run, processes: int) -> CorpusEstimate:
    """What is known of the text. Raises what the run would; of a finished one nothing is checked, as nothing is trained."""
    from ..training.preflight import check_dry

    if run.result() is None:
        return check_dry(config, run, processes=processes)
    try:
        return estimate_corpus(config.data)
    except QuestError:
        return CorpusEstimate(None, None)


def show_cost(config: RunConfig, store: RunStore, text: CorpusEstimate, *, as_json: bool) -> None:
    """What the run would be and take, without torch, tokens or a folder."""
    known, run = costs.speeds(store), store.run(config.run_id)
    sized = costs.with_vocabulary(config, text.vocab_size)
    total = costs.parameters(sized)
    cost = {
        **describe(config),
        "state": run.state(),
        "steps": config.train.steps,
        "params_total": total,
        "vocab_size": sized.model.vocab_size or None,
        "flops": config.new_tokens * costs.flops_per_token(sized),
        "seconds": costs.seconds(sized, known or [costs.guess()]),
        "disk_bytes": costs.disk_bytes(sized)[0],
        "memory_bytes": costs.memory_bytes(sized),
        "passes": text.passes(config),
        "passes_exact": text.exact,
        "path": str(run.path),
    }
    if often := text.repeated(config):
        console.warn(often)
    if as_json:
        console.print_json(cost)
        return
    ids = f"{config.model.vocab_size:,} ids" if config.model.vocab_size else text.ids
    basis = f"estimated from {len(known)} finished runs" if known else "a rough guess"
    rows = [
        ("state", cost["state"]),
        ("scheme", f"{cost['scheme']}: weights {cost['weights']}, activations {cost['activations']}"),
        ("parameters", f"{cost['params_non_embedding']:,} non-embedding, {total:,} in all"),
        ("vocabulary", ids),
        ("tokens", f"{config.tokens:,}, {cost['tokens_per_param']:.3g} per parameter, in {config.train.steps:,} steps"),
        ("text", text.said(config) or "its length is not known before it is prepared"),
        ("FLOPs", f"{cost['flops']:.3g}"),
        ("time", f"about {console.duration(cost['seconds'])}, {basis}"),
        ("disk", f"{cost['disk_bytes'] / 2**20:,.1f} MiB at the most"),
        ("folder", cost["path"]),
    ]
    console.print_table(("run", cost["run"]), rows, left=2)
