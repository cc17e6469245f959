"""Several lengths for the price of one: a trunk at a constant learning rate, and branches that cool down from its checkpoints.

    trunk     warm-up │ lr ──────── s₁ ──────── s₂ ─────── …
    branch                          ╲ C₁        ╲ C₂             steps Sᵢ = sᵢ + Cᵢ,   Cᵢ = cooldown · Sᵢ

(warm-up, stable, decay: arXiv 2405.18392, whose cooldowns of 20 % of a run match a cosine tuned to its length.) A branch is the
run of S steps whose first s were taken by its trunk, bit for bit; trunk and step are part of its identity. It needs no torch
to say which runs these are.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..config import BranchConfig, RunConfig, execution_keys, flat_items
from ..errors import DataError, UsageError
from ..store import Run, RunStore, checkpoint_steps

COOLDOWN = 0.2  # share of a branch; arXiv 2405.18392 §4 finds 10 to 20 % enough


def branch(trunk: RunConfig, step: int, cooldown: int) -> RunConfig:
    """The run that leaves `trunk` after `step` steps and cools down over `cooldown` more. Raises UsageError where it cannot."""
    o, steps = trunk.optim, trunk.train.steps
    last = steps - trunk.cooldown_steps if o.schedule == "wsd" else steps
    if o.schedule == "cosine":
        raise UsageError(f"branch: {trunk.run_id} has a cosine schedule; a trunk has optim.schedule wsd or constant.")
    if not trunk.warmup_steps <= step <= last or step < 1:
        raise UsageError(
            f"branch: step {step} is not where {trunk.run_id} runs at its full learning rate, which is from step "
            f"{max(1, -int(-trunk.warmup_steps // 1))} to {last:g}."
        )
    if cooldown < 1:
        raise UsageError(f"branch: a cooldown of {cooldown} steps is none.")
    if trunk.branch is not None:
        raise UsageError(f"branch: {trunk.run_id} is a branch itself; branch from {trunk.branch.source}.")
    optim = _wsd(trunk.warmup_steps, cooldown)
    return trunk.model_copy(
        update={
            "optim": o.model_copy(update=optim),
            "train": trunk.train.model_copy(update={"steps": step + cooldown, "keep_steps": ""}),
            "branch": BranchConfig(source=trunk.run_id, step=step),
        }
    )


def parse_source(word: str, store: RunStore) -> tuple[Run, int]:
    """`RUN@STEP` → the trunk and the step. Raises UsageError (which tells the steps that there are) or DataError."""
    name, at, step = word.rpartition("@")
    if not at or not step.isdecimal():
        run = store.find(word if not at else name)
        raise UsageError(f"--branch-from {word}: is not of the form RUN@STEP; {_kept(run)}.")
    return store.find(name), int(step)


def parse_cooldown(word: str, step: int) -> int:
    """`20%` of the whole branch, or a number of steps → steps that follow `step`. Raises UsageError."""
    try:
        share = float(word.removesuffix("%")) / 100 if word.endswith("%") else 0.0
        steps = round(step * share / (1 - share)) if word.endswith("%") else int(word)
    except (ValueError, ZeroDivisionError):
        steps = 0
    if steps < 1 or not (0 <= share < 1):
        raise UsageError(f"--cooldown: '{word}' is neither a share such as 20% nor a number of steps.")
    return steps


def with_execution(config: RunConfig, asked: RunConfig, origins: Mapping[str, str]) -> RunConfig:
    """`config` with what the user asks of its execution. Raises UsageError for a key that would make it another experiment."""
    was, values = dict(flat_items(config)), dict(flat_items(asked))
    chosen = {key: values[key] for key, origin in origins.items() if origin != "default" and not origin.startswith("preset")}
    execution = execution_keys()
    for key, value in chosen.items():
        if key not in execution and was.get(key, value) != value:
            raise UsageError(f"{key}: a branch has that of its trunk, {was[key]}; only how it is executed can be chosen.")
    update = {key.partition(".")[2]: value for key, value in chosen.items() if key in execution and key != "train.keep_steps"}
    return config.model_copy(update={"train": config.train.model_copy(update=update)})


def branch_checkpoint(config: RunConfig, run: Run) -> Path | None:
    """The checkpoint of its trunk that a branch begins from; None for other runs, and for a branch that has one of its own.

    Raises DataError if there is none.
    """
    if config.branch is None or checkpoint_steps(run.checkpoints_path):
        return None
    trunk = run.sibling(config.branch.source)
    path = trunk.checkpoint_path(config.branch.step)
    if path is None:
        raise DataError(f"branch: {trunk.path} has no checkpoint of step {config.branch.step}; {_kept(trunk)}.")
    return path


def share_trunks(configs: Sequence[RunConfig], cooldown: float) -> list[RunConfig]:
    """Runs of which some differ in their length alone → the same lengths; only the longest of each is trained in full.

    The longest is the trunk: warm-up, full learning rate, and a cooldown of its own over its last `cooldown` share; it keeps
    the checkpoints that the shorter ones leave it at. All have the warm-up of the shortest. Raises UsageError where that is too
    long.
    """
    lengths: dict[str, list[int]] = {}
    for config in configs:
        lengths.setdefault(_without_length(config), []).append(config.train.steps)
    shared = []
    for config in configs:
        found = sorted(set(lengths[_without_length(config)]))
        cools = {steps: max(1, round(steps * cooldown)) for steps in found}
        longest = found[-1]
        warm = config.optim.warmup_of(found[0])
        if warm + cools[found[0]] > found[0]:
            raise UsageError(f"trunk: a warm-up of {warm:g} steps and a cooldown of {cools[found[0]]} exceed {found[0]} steps.")
        optim = _wsd(warm, cools[longest])
        leaves = {steps: steps - cools[steps] for steps in found[:-1]}
        train = {"steps": longest, "keep_steps": ",".join(map(str, leaves.values()))}
        trunk = config.model_copy(
            update={"optim": config.optim.model_copy(update=optim), "train": config.train.model_copy(update=train)}
        )
        steps = config.train.steps
        shared.append(trunk if steps == longest else branch(trunk, leaves[steps], cools[steps]))
    return shared


def _wsd(warmup: float, cooldown: int) -> dict[str, Any]:
    return {"schedule": "wsd", "warmup_steps": warmup, "decay_steps": cooldown, "warmup_frac": 0.0, "decay_frac": 0.0}


def _without_length(config: RunConfig) -> str:
    train = config.train.model_copy(update={"steps": 1})
    return json.dumps(config.model_copy(update={"train": train}).identity, sort_keys=True)


def _kept(run: Run) -> str:
    steps = run.checkpoint_steps()
    has = f"it has those of steps {', '.join(map(str, steps))}" if steps else "it has none"
    return f"{has} (train.keep_steps says which a run keeps)"
