"""Curves of runs: from folders of runs (their metric lines and the schedule of their config) and from files of curves.

    load_curves(["runs", "curves.csv"]).curves

A metric line holds the mean training loss of the steps since the line before, so it is a point in the middle of them. A
validation loss is that of its step.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from ..errors import DataError, UsageError
from ..metrics import STEP, TRAIN_LOSS, VAL_LOSS
from ..store import Run, holds_runs, runs_in
from .sources import LeftOut, Paths, analysis_errors, as_paths, require_sources

if TYPE_CHECKING:
    from ..analysis.curves import Curve, Rates
    from ..config import OptimConfig

LONG_RUN = 4096  # above this, a schedule is not sampled at every step
PHASE_POINTS = 128  # steps sampled in each of its phases then
SCHEDULE_KEYS = ("lr", "steps", "warmup", "decay", "final")


@dataclass(frozen=True)
class Curves:
    """Curves, by name, and the runs that have none, each with the reason."""

    curves: tuple[Curve, ...]
    left_out: tuple[LeftOut, ...]


def load_curves(
    sources: Paths = None, *, columns: Mapping[str, str] | None = None, schedule: str | None = None, loss: str = "training"
) -> Curves:
    """The curves of folders of runs, run folders and files; default: `$QUESTCTL_RUNS`, else `runs`.

    `columns` maps our names (step, lr, loss, run, N, tokens, scheme) to those of files. `schedule`, such as
    `cosine:lr=3e-4,steps=24000,warmup=2000`, is that of files without a column of rates. `loss` chooses the logged loss of
    runs, training or validation; a file has the loss in its column. A run with too few lines is left out. Raises DataError for
    a file with an unreadable row, which it names, and for a source without any curve.
    """
    from ..analysis.curves import LOSSES, read_curves

    if loss not in LOSSES:
        raise UsageError(f"loss {loss!r} is unknown; choices: {', '.join(LOSSES)}.")
    paths = as_paths(sources)
    require_sources(paths)
    rates = parse_schedule(schedule) if schedule else None
    curves: list[Curve] = []
    left_out: list[LeftOut] = []
    for path in paths:
        if not holds_runs(path):
            with analysis_errors():
                curves += [dataclasses.replace(c, of=loss) for c in read_curves(path, columns, rates=rates)]
            continue
        runs = runs_in(path)
        for run in runs:
            try:
                with analysis_errors():
                    curves.append(run_curve(run, loss=loss))
            except DataError as e:
                if len(runs) == 1:
                    raise
                left_out.append(LeftOut(run.name, str(e).removeprefix(f"{run.name}: ")))
        if not runs:
            raise DataError(f"{path}: holds no runs.")
    if not curves:
        raise DataError(f"{paths[0]}: no run has a curve; {left_out[0].run}: {left_out[0].reason}")
    names = [curve.name for curve in curves]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise DataError(f"two sources hold the curve {twice}; name one of them.")
    return Curves(tuple(sorted(curves, key=lambda c: c.name)), tuple(left_out))


def run_curve(run: Run, lines: Sequence[Mapping[str, Any]] | None = None, *, loss: str = "training") -> Curve:
    """The curve of a run, finished or not, with the whole schedule of its config; `lines` are its metrics, if already read.

    Raises PointError for too few lines, and DataError for too few with a validation loss.
    """
    import numpy as np

    from ..analysis.curves import LEAST_POINTS, VALIDATION, make_curve

    config = run.config()
    rates = run_rates(config.optim, config.train.steps)
    key = VAL_LOSS if loss == VALIDATION else TRAIN_LOSS
    numbered = enumerate(run.metrics() if lines is None else lines, 1)
    known = [(i, line) for i, line in numbered if line.get(key) is not None and line[STEP] > 0]
    at = [float(line[STEP]) for _, line in known]
    if loss == VALIDATION:
        if len(at) < LEAST_POINTS:
            raise DataError(
                f"{run.name}: {len(at)} of its lines hold a validation loss, and a law of curves needs {LEAST_POINTS} after "
                f"the warm-up: train with train.eval_every={max(1, config.train.steps // 50)}, or forecast the training loss."
            )
    else:
        at = [(end + before + 1) / 2 for before, end in zip([0.0, *at], at, strict=False)]
    return make_curve(
        run.name,
        at,
        rates.rate_at(np.array(at)),
        [line[key] for _, line in known],
        rows=[f"{run.name}/metrics.jsonl line {i}" for i, _ in known],
        rates=rates,
        N=float(config.model.params_non_embedding),
        tokens_per_step=config.tokens / config.train.steps,
        scheme=config.quant.label,
        of=loss,
    )


def run_rates(optim: OptimConfig, steps: int) -> Rates:
    """The schedule of a run of `steps` steps: the learning rate of each step, placed at the end of the step.

    For a LONG_RUN only PHASE_POINTS steps of each of warm-up, stable phase and cool-down are sampled.
    """
    import numpy as np

    from ..analysis.curves import Rates
    from ..config.rates import learning_rate

    ends = np.arange(1, steps + 1)
    if steps > LONG_RUN:
        corners = sorted([1.0, optim.warmup_of(steps), steps - optim.cooldown_of(steps), float(steps)])
        phases = [np.linspace(a, b, PHASE_POINTS) for a, b in pairwise(corners)]
        ends = np.unique(np.concatenate(phases).round().clip(1, steps)).astype(int)
    lr = np.array([learning_rate(end - 1, steps, optim) for end in ends.tolist()])
    return Rates(np.append(0.0, ends), np.append(lr[:1], lr))


def parse_schedule(text: str, like: Any = None, steps: int | None = None) -> Rates:
    """A schedule by name and parameters: `wsd:decay=.2`, `cosine:lr=3e-4,steps=24000,warmup=.1,final=.1`, `knots:.7:1,1:.1`.

    The keys are lr; steps; warmup and decay, each a share of the steps if below 1, else a number of steps; and final, the share
    of lr that is left at the end. Missing keys come from the `OptimConfig` `like` and from `steps`. Raises UsageError.
    """
    from ..config import OptimConfig

    name, _, rest = text.partition(":")
    values: dict[str, float] = {}
    knots = []
    for item in filter(None, (part.strip() for part in rest.split(","))):
        if name == "knots" and "=" not in item:
            knots.append(item)
            continue
        key, _, value = item.partition("=")
        if key not in SCHEDULE_KEYS:
            raise UsageError(f"schedule '{text}': unknown key '{key}'; choices: {', '.join(SCHEDULE_KEYS)}.")
        try:
            values[key] = float(value)
        except ValueError:
            raise UsageError(f"schedule '{text}': {key} = '{value}' is not a number.") from None
    if name not in ("cosine", "wsd", "constant", "knots"):
        raise UsageError(f"schedule '{text}': unknown name '{name}'; choices: cosine, wsd, constant, knots.")
    length = values.get("steps", steps or 0)
    if length < 1 or length != math.floor(length):
        raise UsageError(f"schedule '{text}': steps = {length:g} must be a whole number of at least 1, such as steps=24000.")
    if like is None and "lr" not in values:
        raise UsageError(f"schedule '{text}': lr is missing, such as lr=3e-4.")
    changes: dict[str, Any] = {"schedule": name, "knots": ", ".join(knots)}
    for key, share, count in (("warmup", "warmup_frac", "warmup_steps"), ("decay", "decay_frac", "decay_steps")):
        if key in values:
            whole = values[key] >= 1
            changes |= {share: 0.0 if whole else values[key], count: int(values[key]) if whole else 0}
    changes |= {field: values[key] for key, field in (("lr", "lr"), ("final", "final_factor")) if key in values}
    settings = like.model_dump() if like is not None else {}
    try:
        return run_rates(OptimConfig(**{**settings, **changes}), int(length))
    except ValueError as e:
        raise UsageError(f"schedule '{text}': {str(e).splitlines()[-1].strip()}") from e
