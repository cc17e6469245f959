"""What one run would take: time, disk, memory and operations, estimated from its config, its text and finished runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import RunConfig
from ..data.size_estimate import CorpusEstimate, estimate_corpus
from ..errors import QuestError
from ..store import Run, RunStore, describe
from . import costs


@dataclass(frozen=True)
class RunEstimate:
    """What a run would take; `seconds` is estimated from `finished_runs` runs, or guessed where there are none."""

    config: RunConfig
    state: str
    params_total: int
    vocab_size: int | None
    flops: float  # of the run's own steps: a branch starts with those of its trunk
    seconds: float
    finished_runs: int
    disk_bytes: int  # at most, while it trains
    memory_bytes: int  # at least, of one device
    text: CorpusEstimate
    path: Path

    def to_json(self) -> dict[str, Any]:
        """One flat record, beginning with the columns that follow from the config alone."""
        return {
            **describe(self.config),
            "state": self.state,
            "steps": self.config.train.steps,
            "params_total": self.params_total,
            "vocab_size": self.vocab_size,
            "flops": self.flops,
            "seconds": self.seconds,
            "disk_bytes": self.disk_bytes,
            "memory_bytes": self.memory_bytes,
            "passes": self.text.passes(self.config),
            "passes_exact": self.text.exact,
            "path": str(self.path),
        }


def estimate_run(config: RunConfig, runs: Path | str | None = None, *, processes: int = 1) -> RunEstimate:
    """What training `config` in the folder `runs` with so many processes would take; nothing is trained, prepared or written.

    Raises what training would raise about its input: UsageError, DataError, StorageError.
    """
    store = RunStore(runs)
    run = store.run(config.run_id)
    text = _text(config, run, processes)
    speeds = costs.measured_speeds(store)
    sized = config.with_vocabulary(text.vocab_size)
    return RunEstimate(
        config=config,
        state=run.state(),
        params_total=costs.params_total(sized),
        vocab_size=sized.model.vocab_size or None,
        flops=config.new_tokens * costs.flops_per_token(sized),
        seconds=costs.seconds(sized, speeds or [costs.guess_speed()]),
        finished_runs=len(speeds),
        disk_bytes=costs.disk_bytes(sized)[0],
        memory_bytes=costs.memory_bytes(sized),
        text=text,
        path=run.path,
    )


def _text(config: RunConfig, run: Run, processes: int) -> CorpusEstimate:
    """The estimated size of the text; the input of a finished run is not checked, because nothing is trained again."""
    from ..training.preflight import check_dry

    if run.result() is None:
        return check_dry(config, run, processes=processes)
    try:
        return estimate_corpus(config.data)
    except QuestError:
        return CorpusEstimate(None, None)
