"""Learning-rate schedules as pure functions of the step.

    warm-up   lr_start → lr   by half a cosine over the first `warmup_frac` of the steps
    cosine    lr → lr_final   by half a cosine over the rest             (both together: torch's OneCycleLR, arXiv 2502.05003)
    wsd       lr, then over the last `decay_frac` lr → lr_final by 1 − √x                              (arXiv 2405.18392)
    constant  lr
    knots     lr·f, f a line through the points of `knots` (share of the steps after the warm-up : f), from f = 1 at share 0

with lr_start = lr·start_factor and lr_final = lr·final_factor. Warm-up and decay may be set in steps instead (`warmup_steps`,
`decay_steps`). The rate depends on the step alone, so a checkpoint does not store it.

Groups of parameters have factors of that rate, which `group_rates` returns. With `model.base_width` d₀ they also depend on the
width d (`model.d_model`), so that the best rate of a narrow model is the best one of a wide model. r = d₀/d:

| group                          | rate with AdamW | rate with Muon | standard deviation of initial weights |
|--------------------------------|-----------------|----------------|---------------------------------------|
| embedding                      | lr              | lr             | init_std                              |
| linear layers of the blocks    | lr·r            | lr·√r          | init_std·√r                           |
| head                           | lr·r            | lr·r           | init_std·r                            |
| norms, biases, learned scales  | lr              | lr             |                                       |

This is µP for Adam (Tensor Programs V, arXiv 2203.03466, table 3). A matrix maps d inputs, so aligned updates of d entries add
up to d times as much. Muon's updates have the spectral norm .2·√max(n, m), which grows as √d by itself (spectral condition,
arXiv 2310.17813). Raise `n_head` with the width, so that the width of a head, by whose root attention divides, stays the same.
Weight decay and CAGE go by `lr` itself: a step shrinks weights by lr·weight_decay at every width.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from typing import NamedTuple

from .knots import parse_knots
from .sections import OptimConfig, RunConfig


class GroupRates(NamedTuple):
    """Learning rates of groups of parameters, as factors of that of the step. All others have 1."""

    embedding: float = 1.0
    hidden: float = 1.0
    head: float = 1.0


ALL_ALIKE = GroupRates()


def group_rates(config: RunConfig) -> GroupRates:
    """The factors that the keys of the config and its width give (table above)."""
    o, r = config.optim, config.model.narrower
    return GroupRates(o.embedding_lr, o.hidden_lr * (math.sqrt(r) if o.name == "muon" else r), o.head_lr * r)


def learning_rate(step: int, steps: int, config: OptimConfig) -> float:
    """The learning rate of optimizer step `step` (0 … steps − 1) of a run of `steps` steps.

    As in torch's OneCycleLR, the warm-up ends at warmup_frac·steps − 1, which need not be a whole number.
    """
    peak, last = config.lr, steps - 1
    start, final = peak * config.start_factor, peak * config.final_factor
    warm = config.warmup_of(steps) - 1
    if step <= warm:
        return _half_cosine(start, peak, step / warm if warm else 1.0)
    if config.schedule == "cosine":
        return _half_cosine(peak, final, (step - warm) / (last - warm))
    if config.schedule == "wsd":
        # Not steps − cooldown_of(steps) − 1: it rounds differently, which would change the last digits of losses.
        cool = steps - config.decay_steps - 1 if config.decay_steps else (1 - config.decay_frac) * steps - 1
        return peak if step <= cool else final + (peak - final) * (1 - math.sqrt((step - cool) / (last - cool)))
    if config.schedule == "knots":
        return peak * _through(parse_knots(config.knots), (step - warm) / (last - warm))
    return peak


def _through(knots: tuple[tuple[float, float], ...], share: float) -> float:
    """The value at `share` of the line through (0, 1) and the knots, constant after the last."""
    right = bisect_left(knots, (share, 0.0))
    if right == len(knots):
        return knots[-1][1]
    (a, left), (b, value) = knots[right - 1] if right else (0.0, 1.0), knots[right]
    return left + (value - left) * (share - a) / (b - a)


def _half_cosine(a: float, b: float, x: float) -> float:
    return b + (a - b) * (1 + math.cos(math.pi * x)) / 2
