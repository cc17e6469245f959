"""Sweeps that stop early: when a cell is judged, how it ends, and when it goes on after all.

    metric lines → judge, at shares of the steps → a line in the run's stopping.jsonl → the worker ends the run: `stopped`

The judge (scaling/stopping.py) compares and forecasts in a process of its own, so that a training process imports and computes
nothing for it. The worker that trains a cell asks for the verdict and carries it out; launchers and other workers take no part.
A stopped run has a checkpoint, and goes on bit for bit: with `--retry stopped`, or in a sweep without [stop].

At its first look a cell cannot be compared if its alternatives have not begun. It therefore gives way to them, and goes on from
its checkpoint, the best cell first, when each alternative has had its first look. The saving then does not depend on which cell
comes first in the sweep file.

A stopped run that a user lets go on is never stopped again. A verdict names the run that is ahead. If that run diverges or
fails, or if verdicts form a circle, `reopen` withdraws the verdict. So if two workers stop two cells at the same moment, each
because of the other, both cells go on.

Two kinds of runs are never stopped: runs whose checkpoints others need (a trunk, or `train.keep_steps`), and runs that are
quantized late, because the loss before quantization says little about the loss after it.
"""

from __future__ import annotations

import json
import multiprocessing
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from multiprocessing.process import BaseProcess

from ..config import RunConfig
from ..errors import DataError, UsageError
from ..metrics import STEP
from ..store import Run, RunStore, describe
from ..system import watched_signals
from .manifest import Sweep
from .outcomes import Outcome
from .stop_rule import StopRule
from .sweep_file import Cell

JUDGE = "questctl.scaling.stopping:judge"
GO_ON, STOP, WITHDRAWN, RELEASED = "go on", "stop", "withdrawn", "released"


@dataclass(frozen=True)
class Stopping:
    """The rule of a sweep, and all its cells, which are compared with each other."""

    rule: StopRule
    cells: tuple[Cell, ...]

    def exempt(self, cell: Cell, run: Run) -> str:
        """Why a cell is never stopped; empty if it may be."""
        if any(c.config.branch is not None and c.config.branch.source == cell.run_id for c in self.cells):
            return "it is the trunk of others"
        if cell.config.train.keep_steps or (run.exists() and run.config().train.keep_steps):
            return "it keeps checkpoints for others"
        if len(cell.config.stages) > 1:
            return "it is quantized late"
        try:
            return "it was told to go on" if any(line["verdict"] == RELEASED for line in run.verdicts()) else ""
        except DataError as e:
            return str(e)

    def due(self, cell: Cell, run: Run) -> int | None:
        """The last mark that the run has reached, if it was not judged there; else None."""
        step, judged = run.last_metrics().get(STEP, 0), self.judged(run)
        return max((mark for mark in self.rule.marks(cell.config.train.steps) if judged < mark <= step), default=None)

    def judged(self, run: Run) -> int:
        """The last mark that a run was judged at; 0 before its first look."""
        return max((line[STEP] for line in run.verdicts() if line["verdict"] in (GO_ON, STOP)), default=0)

    @cached_property
    def groups(self) -> dict[str, str]:
        """Run id → `group_key` of each cell."""
        return {cell.run_id: group_key(cell.config) for cell in self.cells}

    def waits(self, cell: Cell, outcomes: Sequence[Outcome]) -> bool:
        """Whether an alternative of a cell is free to be trained and has not had its first look."""
        first = {c.run_id: self.rule.marks(c.config.train.steps)[0] for c in self.cells}
        mine = self.groups[cell.run_id]
        return any(
            o.claimable and o.step < first[o.run_id] and self.groups[o.run_id] == mine and o.run_id != cell.run_id
            for o in outcomes
        )


def stopping_of(sweep: Sweep) -> Stopping | None:
    """The rule of an open sweep with its cells; None without [stop]."""
    return Stopping(sweep.file.stop, sweep.cells) if sweep.file.stop else None


Judging = Callable[["Stopping", Cell, Run, int], None]  # appends a verdict on a cell at a mark to its run


class Judge:
    """Judges one cell while it trains: runs the function `judge` in a process of its own at each mark."""

    def __init__(self, stopping: Stopping, cell: Cell, run: Run, judge: Judging) -> None:
        self.stopping, self.cell, self.run, self._judge = stopping, cell, run, judge
        self._exempt = bool(stopping.exempt(cell, run))
        self._process: BaseProcess | None = None
        self._asked = 0  # the mark that the last process judges; it may have died

    @property
    def begun(self) -> bool:
        """Whether the cell has had its first look."""
        return not self._exempt and self.stopping.judged(self.run) > 0

    def again(self) -> bool:
        """Judge a cell again, since other cells may have been judged meanwhile; waits for the answer whether to stop it."""
        if self.begun:
            self._start(self.stopping.judged(self.run))
            assert self._process is not None
            self._process.join()
            self.close()
            return self.run.last_verdict().get("verdict") == STOP
        return False

    def verdict(self) -> str:
        """A verdict that has just been reached, else empty. To be called repeatedly; starts a process at each mark."""
        if self._exempt or (self._process is not None and self._process.is_alive()):
            return ""
        if self._process is not None:
            self.close()
            last = self.run.last_verdict()
            return str(last["verdict"]) if last.get(STEP) == self._asked else ""
        mark = self.stopping.due(self.cell, self.run)
        if mark is not None and mark > self._asked:
            self._start(mark)
        return ""

    def _start(self, mark: int) -> None:
        self._asked = mark
        arguments = (self._judge, self.stopping, self.cell, self.run, mark)
        self._process = multiprocessing.get_context("fork").Process(target=_judge, args=arguments, daemon=True)
        self._process.start()

    def close(self) -> None:
        """End the process, if there is one."""
        if self._process is not None:
            self._process.terminate()
            self._process.join()
            self._process = None


def _judge(judge: Judging, stopping: Stopping, cell: Cell, run: Run, mark: int) -> None:
    for s in watched_signals():
        signal.signal(s, signal.SIG_DFL)
    judge(stopping, cell, run, mark)


def group_key(config: RunConfig) -> str:
    """Equal for cells that are alternatives: all but the optimizer's settings, batch, steps and seed; and the tokens.

    Runs that differ only in their seed are no alternatives: see `replicas`.
    """
    fields = config.identity
    train = {k: v for k, v in fields["train"].items() if k not in ("steps", "batch_size", "seed")}
    rest = {k: v for k, v in fields.items() if k not in ("optim", "train", "branch")}
    return json.dumps({**rest, "train": train, "tokens": config.tokens}, sort_keys=True)


def replicas(a: RunConfig, b: RunConfig) -> bool:
    """Whether two runs differ only in their seed. Neither may stop the other, or the mean over seeds would be too low."""
    one, other = (c.model_copy(update={"train": c.train.model_copy(update={"seed": 0})}).identity for c in (a, b))
    for fields in (one, other):
        fields.pop("branch", None)  # branches of two seeds leave different trunks
    return one == other


def model_bits(config: RunConfig) -> float:
    """Bits that store the non-embedding parameters, as `models.llama.model_bits` counts them of a built model."""
    m = config.model
    return m.linear_weights * float(describe(config)["w_stored_bits"]) + 16.0 * (m.params_non_embedding - m.linear_weights)


def reopen(cells: Sequence[Cell], outcomes: Sequence[Outcome], store: RunStore) -> list[str]:
    """Make stopped cells whose verdict no longer holds pending; returns their names.

    A verdict holds if the run ahead is done or has not ended, or is itself stopped by a verdict that holds. Raises
    StorageError.
    """
    state = {outcome.run_id: outcome.state for outcome in outcomes}

    def holds(name: str, visited: tuple[str, ...] = ()) -> bool:
        verdict = store.run(name).last_verdict()
        if verdict.get("verdict") != STOP:
            return False
        by = verdict["by"]
        ahead = store.run(by)
        now = state.get(by) or (ahead.state() if ahead.exists() else "failed")
        if now == "stopped":
            return by not in (*visited, name) and holds(by, (*visited, name))
        return now not in ("failed", "diverged")

    opened = []
    for cell in cells:
        name = cell.run_id
        if state.get(name) != "stopped" or holds(name):
            continue
        run = store.run(name)
        try:
            with run.open_for_training(cell.config) as writer:
                if writer.status.state == "stopped":
                    why = f"{run.last_verdict().get('by')}, which was ahead of it, was not trained to its end"
                    run.add_verdict({STEP: writer.status.step, "verdict": WITHDRAWN, "reason": why})
                    writer.set_state("pending", writer.status.step)
                    opened.append(name)
        except (UsageError, DataError):  # another worker is doing the same
            continue
    return opened
