"""Branches: runs of several lengths, or of several precisions, that share the steps of a trunk and leave it at a checkpoint.

    trunk     warm-up │ lr ──────── s₁ ──────── s₂ ─────── …
    branch                          ╲ C₁        ╲ C₂             steps Sᵢ = sᵢ + Cᵢ,   Cᵢ = cooldown · Sᵢ

Runs of several lengths share a trunk at constant learning rate and cool down from its checkpoints. Together they cost little
more than the longest run. The schedule is warm-up, stable, decay (arXiv 2405.18392, where cooldowns of 20 % of a run match a
cosine tuned to its length). Runs that are quantized late (`quant.start`) share the steps before that with the run in full
precision, whatever its schedule. The first s steps of a branch are those of its trunk, bit for bit; trunk and step are part of
its identity. This module does not import torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Any

from ..config import BranchConfig, QuantConfig, RunConfig, execution_keys, flat_items
from ..errors import DataError, UsageError
from ..store import Run, RunStore, checkpoint_steps
from ..words import few

COOLDOWN = 0.2  # share of a branch; arXiv 2405.18392 §4 finds 10 to 20 % enough


def branch(trunk: RunConfig, step: int, cooldown: int) -> RunConfig:
    """The run that leaves `trunk` after `step` steps and cools down over `cooldown` more.

    Raises UsageError if the trunk has a cosine schedule or is a branch itself, if it does not run at its full learning rate at
    `step`, or if `cooldown` is not positive.
    """
    o, steps = trunk.optim, trunk.train.steps
    last = steps - trunk.cooldown_steps if o.schedule == "wsd" else steps
    if o.schedule in ("cosine", "knots"):
        raise UsageError(f"branch: {trunk.run_id} has optim.schedule={o.schedule}; a trunk has wsd or constant.")
    if not trunk.warmup_steps <= step <= last or step < 1:
        raise UsageError(
            f"branch: step {step} is not where {trunk.run_id} runs at its full learning rate, which is from step "
            f"{max(1, -int(-trunk.warmup_steps // 1))} to {last:g}."
        )
    if cooldown < 1:
        raise UsageError(f"branch: a cooldown must have at least one step, got {cooldown}.")
    pull = (trunk.optim.cage_from * trunk.train.steps, trunk.optim.cage_from * (step + cooldown))
    if trunk.optim.cage and trunk.quant.quantizes and min(pull) < step:
        raise UsageError(
            f"branch: {trunk.run_id} has optim.cage, whose pull begins before step {step} of the trunk or of the branch; "
            'share one in full precision instead ([trunk] share = "precision").'
        )
    if trunk.branch is not None:
        raise UsageError(f"branch: {trunk.run_id} is a branch itself; branch from {trunk.branch.source}.")
    optim = _wsd(trunk.warmup_steps, cooldown)
    return trunk.model_copy(
        update={
            "quant": trunk.quant_in_steps,
            "optim": o.model_copy(update=optim),
            "train": trunk.train.model_copy(update={"steps": step + cooldown, "keep_steps": ""}),
            "branch": BranchConfig(source=trunk.run_id, step=step),
        }
    )


def parse_source(text: str, store: RunStore) -> tuple[Run, int]:
    """`RUN@STEP` → the trunk and the step.

    Raises UsageError, which lists the steps with checkpoints, for another form, and DataError if there is no such run.
    """
    name, at, step = text.rpartition("@")
    if not at or not step.isdecimal():
        run = store.find(text if not at else name)
        raise UsageError(f"--branch-from {text}: is not of the form RUN@STEP; {_kept(run)}.")
    return store.find(name), int(step)


def parse_cooldown(text: str, step: int) -> int:
    """The steps of a cooldown that begins after `step`: `20%` is a share of the whole branch, other text a number of steps.

    Raises UsageError if `text` is neither.
    """
    try:
        share = float(text.removesuffix("%")) / 100 if text.endswith("%") else 0.0
        steps = round(step * share / (1 - share)) if text.endswith("%") else int(text)
    except (ValueError, ZeroDivisionError):
        steps = 0
    if steps < 1 or not (0 <= share < 1):
        raise UsageError(f"--cooldown: '{text}' is neither a share such as 20% nor a number of steps.")
    return steps


def with_execution(config: RunConfig, asked: RunConfig, origins: Mapping[str, str]) -> RunConfig:
    """`config` with the execution settings that the user chose in `asked`.

    Raises UsageError for a key that is not about execution, because it would make the branch another experiment.
    """
    current, values = dict(flat_items(config)), dict(flat_items(asked))
    chosen = {key: values[key] for key, origin in origins.items() if origin != "default" and not origin.startswith("preset")}
    execution = execution_keys()
    for key, value in chosen.items():
        if key not in execution and current.get(key, value) != value:
            raise UsageError(f"{key}: a branch has that of its trunk, {current[key]}; only how it is executed can be chosen.")
    update = {key.partition(".")[2]: value for key, value in chosen.items() if key in execution and key != "train.keep_steps"}
    return config.model_copy(update={"train": config.train.model_copy(update=update)})


def branch_checkpoint(config: RunConfig, run: Run) -> Path | None:
    """The checkpoint of the trunk from which a branch starts; None for other runs, and for a branch with its own checkpoints.

    Raises DataError if the trunk has no checkpoint of that step.
    """
    if config.branch is None or checkpoint_steps(run.checkpoints_path):
        return None
    trunk = run.sibling(config.branch.source)
    path = trunk.checkpoint_path(config.branch.step)
    if path is None:
        raise DataError(f"branch: {trunk.path} has no checkpoint of step {config.branch.step}; {_kept(trunk)}.")
    return path


def share_trunks(configs: Sequence[RunConfig], cooldown: float, warmup: float = 0.0) -> list[RunConfig]:
    """Replace runs that differ only in their length by a trunk and its branches of the same lengths.

    The longest run is the trunk, and only it is trained in full. It has a warm-up, the full learning rate, and a cooldown over
    its last `cooldown` share, and it keeps the checkpoints from which the shorter runs branch. All runs have one warm-up:
    `warmup` steps or, below 1, that share of the longest run; 0 stands for the warm-up that the shortest would have alone.
    Raises UsageError if warm-up and cooldown do not fit into the shortest run.
    """
    lengths: dict[str, list[int]] = {}
    for config in configs:
        lengths.setdefault(_without_length(config), []).append(config.train.steps)
    shared = []
    for config in configs:
        sorted_lengths = sorted(set(lengths[_without_length(config)]))
        cooldowns = {steps: max(1, round(steps * cooldown)) for steps in sorted_lengths}
        shortest, longest = sorted_lengths[0], sorted_lengths[-1]
        steps_of_warmup = warmup * longest if 0 < warmup < 1 else warmup or config.optim.warmup_of(shortest)
        if steps_of_warmup + cooldowns[shortest] > shortest:
            phases = f"a warm-up of {steps_of_warmup:g} steps and a cooldown of {cooldowns[shortest]} exceed"
            raise UsageError(f"trunk: {phases} the shortest length, {shortest} steps; shorten one of them, or leave it out.")
        optim = _wsd(steps_of_warmup, cooldowns[longest])
        branch_steps = {steps: steps - cooldowns[steps] for steps in sorted_lengths[:-1]}
        train = {"steps": longest, "keep_steps": ",".join(map(str, branch_steps.values()))}
        trunk = config.model_copy(
            update={"optim": config.optim.model_copy(update=optim), "train": config.train.model_copy(update=train)}
        )
        steps = config.train.steps
        shared.append(trunk if steps == longest else branch(trunk, branch_steps[steps], cooldowns[steps]))
    return shared


def share_full_precision(configs: Sequence[RunConfig], cooldown: float = 0.0, warmup: float = 0.0) -> list[RunConfig]:
    """Let each run that is quantized late branch from the run among `configs` that equals it but stays in full precision.

    With a `cooldown`, runs that are not quantized late share trunks as `share_trunks` says. If the counterpart of a late run is
    then a branch, and quantization begins before its cooldown, the late run leaves the trunk itself. A late run without a
    counterpart is trained by itself. Raises UsageError as `share_trunks` does.
    """
    late = [config.quant.start != 0 for config in configs]
    place = {_in_full_precision(config): i for i, config in enumerate(configs) if not config.quant.quantizes}
    at_once = [i for i in range(len(configs)) if not late[i]]
    shared = list(configs)
    if cooldown:
        for i, config in zip(at_once, share_trunks([configs[i] for i in at_once], cooldown, warmup), strict=True):
            shared[i] = config
    kept: dict[str, set[int]] = {}
    for i, config in enumerate(configs):
        like = shared[place[_in_full_precision(config)]] if late[i] and _in_full_precision(config) in place else None
        if late[i] and like is None and cooldown:
            (shared[i],) = share_trunks([config], cooldown, warmup)
        if like is None:
            continue
        run = like.model_copy(update={"quant": config.quant, "branch": None})
        step = run.full_precision_tokens // (run.train.batch_size * run.data.seq_len)
        source = like.branch.source if like.branch and step <= like.branch.step else like.run_id
        train = run.train.model_copy(update={"keep_steps": ""})
        branches = BranchConfig(source=source, step=step) if step else None
        shared[i] = run.model_copy(update={"branch": branches, "train": train})
        kept.setdefault(source, set()).update([step] if step else [])
    return [_keeping(config, kept.get(config.run_id, set())) for config in shared]


def _in_full_precision(config: RunConfig) -> str:
    return json.dumps(config.model_copy(update={"quant": QuantConfig()}).identity, sort_keys=True)


def _keeping(config: RunConfig, steps: Set[int]) -> RunConfig:
    """The same run, which also keeps the checkpoints of these steps."""
    if not steps:
        return config
    every = sorted(steps | {int(step) for step in config.train.keep_steps.split(",") if step})
    return config.model_copy(update={"train": config.train.model_copy(update={"keep_steps": ",".join(map(str, every))})})


def _wsd(warmup: float, cooldown: int) -> dict[str, Any]:
    return {"schedule": "wsd", "warmup_steps": warmup, "decay_steps": cooldown, "warmup_frac": 0.0, "decay_frac": 0.0}


def _without_length(config: RunConfig) -> str:
    """Equal for runs that can share a trunk. Runs that are quantized late cannot: their start moves with their length."""
    train = config.train.model_copy(update={} if config.quant.start else {"steps": 1})
    return json.dumps(config.model_copy(update={"train": train}).identity, sort_keys=True)


def _kept(run: Run) -> str:
    steps = run.checkpoint_steps()
    has = f"it has those of steps {few(steps)}" if steps else "it has none"
    return f"{has} (train.keep_steps sets which a run keeps)"
