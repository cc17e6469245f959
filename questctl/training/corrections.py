"""Corrections of the weights after an optimizer step: CAGE, resets of oscillating weights; and weight averages (EMA, LAWA).

| class       | after a step at learning rate η                                    | source                       |
|-------------|--------------------------------------------------------------------|------------------------------|
| `Cage`      | w ← w − η·λ_t·(w − Q(w))                                           | arXiv 2510.18784, decoupled  |
| `OsciReset` | w ← Q(w) where, over a window of steps, Σ|ΔQ(w)| / Σ|Δw| ≥ ratio   | arXiv 2510.27527, simplified |
| `Ema`       | a ← d·a + (1 − d)·w, of all parameters                             | Polyak and Juditsky 1992     |
| `Lawa`      | a = the mean of the last k snapshots, `every` steps apart          | arXiv 2209.14981             |

Q is the nearest quantized value of a weight in its own basis: rotated, rounded, rotated back. The first two change weights that
are quantized and leave all others. Averages leave every weight as it is. They are averages of the full-precision weights,
rounded only afterwards, and they are evaluated beside the weights.

λ_t is 0 for the share `cage_from` of the run and then rises linearly to λ at the last step. On a quadratic with curvatures h
and minimum w*, gradient descent with this correction contracts towards the level q by (1 − ηh)(1 − ηλ) a step in each
direction, and comes to rest at

    w = (ηλ·q + (1 − ηλ)·ηh·w*) / (1 − (1 − ηλ)(1 − ηh))   →   (λ·q + h·w*)/(λ + h) for small η.

Their state is part of the optimizer's: checkpoints contain it, it is sharded as its parameter is, and a resumed run goes on
with the same bits. A step that is skipped changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from ..config import OptimConfig
from ..config.averages import AverageSpec
from ..quant.layer_specs import SCOPE
from ..quant.linear import QuantLinear
from .distributed import gathered, is_sharded, local, share


class Correction:
    """A rule for some parameters; `state` maps a buffer to this process's part of it for each of `parameters`."""

    names: list[str]
    parameters: Sequence[torch.Tensor]
    state: dict[str, Sequence[torch.Tensor]]

    def before(self) -> None:
        """Keep what the rule needs to know of the weights before a step."""

    def after(self, lr: float, step: int, of: int, keep: torch.Tensor) -> None:
        """Apply the rule after step `step` (from 0) of `of`; `keep` () is 0 if the step was skipped, else 1."""
        raise NotImplementedError


def corrections(model: nn.Module, config: OptimConfig) -> list[Correction]:
    """The corrections that the config asks for, in the order in which they act."""
    out: list[Correction] = []
    if config.cage:
        out.append(Cage(model, config.cage, config.cage_from))
    if config.reset_ratio:
        out.append(OsciReset(model, config.reset_ratio, config.reset_window))
    if config.average:
        average = AverageSpec.parse(config.average)
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        out.append(Ema(named, average.decay) if average.kind == "ema" else Lawa(named, average.count, average.every))
    return out


# --- levels -----------------------------------------------------------------------------------------------------------


def _layers(model: nn.Module) -> dict[str, QuantLinear]:
    """The layers of blocks whose weights are quantized, by the names of these weights."""
    named = ((name, m) for name, m in model.named_modules() if name.startswith(SCOPE))
    layers = {f"{name}.weight": m for name, m in named if isinstance(m, QuantLinear)}
    return {name: m for name, m in layers.items() if not m.weight_quantizer.spec.is_identity}


def _hidden(model: nn.Module) -> dict[str, torch.Tensor]:
    """The weights (N, K) of the blocks' linear layers, quantized or not."""
    linears = ((f"{name}.weight", m) for name, m in model.named_modules() if name.startswith(SCOPE))
    return {name: m.weight for name, m in linears if isinstance(m, nn.Linear)}


@torch.no_grad()
def nearest(layers: Sequence[QuantLinear]) -> list[torch.Tensor]:
    """This process's part of Q(w) of each layer, shaped as its weight is stored.

    Weights whose rows are rounded independently are rounded together with others of the same spec and width, because small
    models on a CPU are bound by the number of operations.
    """
    out: list[torch.Tensor | None] = [None] * len(layers)
    together: dict[tuple[int, int], list[int]] = {}  # by the identity of the spec: to hash it takes longer than to round
    for i, layer in enumerate(layers):
        spec = layer.weight_quantizer.spec
        if layer.transposed or is_sharded(layer.weight) or spec.scale is None or not spec.scale.by_row:
            whole = gathered(layer.weight.detach())
            q = layer.weight_quantizer.nearest(whole.T if layer.transposed else whole)
            out[i] = share(q.T.contiguous() if layer.transposed else q, layer.weight)
        else:
            together.setdefault((id(spec), layer.in_features), []).append(i)
    for places in together.values():
        weights = [layers[i].weight.detach() for i in places]
        rows = layers[places[0]].weight_quantizer.nearest(torch.cat(weights))
        for i, part in zip(places, rows.split([len(w) for w in weights]), strict=True):
            out[i] = part
    return [q for q in out if q is not None]


class Cage(Correction):
    """A pull of quantized weights to their levels, beside the optimizer's step (curvature-aware gradient estimation)."""

    def __init__(self, model: nn.Module, strength: float, begins: float) -> None:
        self.strength, self.begins = strength, begins
        self.layers = _layers(model)
        self.names, self.parameters = list(self.layers), [m.weight for m in self.layers.values()]
        self.state = {}

    def strength_at(self, step: int, of: int) -> float:
        """λ_t: 0 until the share `begins` of the steps are done, then in equal steps up to λ."""
        return self.strength * max(0.0, (step + 1 - self.begins * of) / max(of - self.begins * of, 1.0))

    def after(self, lr: float, step: int, of: int, keep: torch.Tensor) -> None:
        """w ← w − min(η·λ_t, 1)·(w − Q(w)): at most as far as the level."""
        pull = min(lr * self.strength_at(step, of), 1.0)
        if pull > 0 and self.layers:
            weights = [local(p.detach()) for p in self.parameters]
            torch._foreach_lerp_(weights, nearest(list(self.layers.values())), [keep * pull] * len(weights))


class OsciReset(Correction):
    """Set a weight to its level if its level moves far more than the weight itself.

    Each weight has two sums, of |Δw| and of |ΔQ(w)|, over windows that begin at multiples of `window` steps. Weights that are
    not quantized (yet) have sums, too. Theirs are equal, so these weights are never reset.
    """

    def __init__(self, model: nn.Module, ratio: float, window: int) -> None:
        self.ratio, self.window = ratio, window
        hidden, self.layers = _hidden(model), _layers(model)
        self.names, self.parameters = list(hidden), list(hidden.values())
        self.local = [local(p.detach()) for p in self.parameters]
        self.travel = [torch.zeros_like(p) for p in self.local]
        self.flips = [torch.zeros_like(p) for p in self.local]
        self.state = {"travel": self.travel, "flips": self.flips}
        self._was: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])

    def _levels(self) -> list[torch.Tensor]:
        """Q(w) of each parameter, w itself where it is not quantized."""
        levels = dict(zip(self.layers, nearest(list(self.layers.values())), strict=True))
        return [levels.get(name, w) for name, w in zip(self.names, self.local, strict=True)]

    def before(self) -> None:
        """Keep weights and levels. Levels are computed anew at every step, so that a resumed run has the same."""
        self._was = [w.clone() for w in self.local], [q.clone() for q in self._levels()]

    def after(self, lr: float, step: int, of: int, keep: torch.Tensor) -> None:
        """Add to the sums, and at the end of a window reset the weights that oscillate."""
        levels = self._levels()
        for sums, now, was in ((self.travel, self.local, self._was[0]), (self.flips, levels, self._was[1])):
            torch._foreach_add_(sums, torch._foreach_abs(torch._foreach_sub(now, was)))
        self._was = [], []
        if (step + 1) % self.window:
            return
        for name, w, q, travel, flips in zip(self.names, self.local, levels, self.travel, self.flips, strict=True):
            if name in self.layers:
                oscillates = (flips >= self.ratio * travel) & (flips > 0) & (keep > 0)
                w.copy_(torch.where(oscillates, q, w))
            travel.mul_(1 - keep)
            flips.mul_(1 - keep)


# --- averages ---------------------------------------------------------------------------------------------------------


class Average(Correction):
    """An average of all trained parameters, which `swapped` puts in their place for a while."""

    def __init__(self, named: Mapping[str, nn.Parameter]) -> None:
        self.names, self.parameters = list(named), list(named.values())
        self.local = [local(p.detach()) for p in self.parameters]

    def values(self, steps: int) -> list[torch.Tensor]:
        """This process's part of the average after `steps` steps."""
        raise NotImplementedError

    @contextmanager
    def swapped(self, steps: int) -> Iterator[None]:
        """The model with the average after `steps` steps as its weights inside a `with` block."""
        own = [p.clone() for p in self.local]
        torch._foreach_copy_(self.local, self.values(steps))
        try:
            yield
        finally:
            torch._foreach_copy_(self.local, own)


class Ema(Average):
    """The exponential average, with a decay of at most (1 + t)/(10 + t) at step t: the first weights are soon forgotten."""

    def __init__(self, named: Mapping[str, nn.Parameter], decay: float) -> None:
        super().__init__(named)
        self.decay = decay
        self.average = [p.clone() for p in self.local]
        self.state = {"ema": self.average}

    def after(self, lr: float, step: int, of: int, keep: torch.Tensor) -> None:
        """a ← d·a + (1 − d)·w."""
        share = keep * (1 - min(self.decay, (1 + step) / (10 + step)))
        torch._foreach_lerp_(self.average, self.local, [share] * len(self.local))

    def values(self, steps: int) -> list[torch.Tensor]:
        """The average."""
        return self.average


class Lawa(Average):
    """The mean of the last `count` snapshots, one after every `every` steps; the weights themselves before the first."""

    def __init__(self, named: Mapping[str, nn.Parameter], count: int, every: int) -> None:
        super().__init__(named)
        self.count, self.every = count, every
        self.snapshots = [[p.clone() for p in self.local] for _ in range(count)]
        self.state = {f"lawa{i}": kept for i, kept in enumerate(self.snapshots)}

    def after(self, lr: float, step: int, of: int, keep: torch.Tensor) -> None:
        """Take a snapshot in place of the oldest, if one is due."""
        number, rest = divmod(step + 1, self.every)
        if not rest:
            torch._foreach_lerp_(self.snapshots[(number - 1) % self.count], self.local, [keep] * len(self.local))

    def values(self, steps: int) -> list[torch.Tensor]:
        """The mean of the snapshots taken so far, at most `count`."""
        kept = self.snapshots[: min(steps // self.every, self.count)]
        return [torch.stack(values).mean(0) for values in zip(*kept, strict=True)] if kept else self.local
