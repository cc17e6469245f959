"""AdamW and Muon with weight decay on linear layers only.

`questctl.config.rates` has the learning rate of a step, and factors of it for embedding, hidden layers and head.

Learned scales s and offsets b of quantizers have a learning rate of their own, and no weight decay:

    relative  η = lr·scale_lr/√Q     s ← s·exp(−η·Δ(s·∂L/∂s))     b ← b − s·η·Δ(s·∂L/∂b)
    absolute  η = lr·scale_lr        s ← s − η·Δ(∂L/∂s)           b ← b − η·Δ(∂L/∂b)

where Δ(g) is AdamW's quotient of moments for the gradient g, about ±1, and Q the outermost level of the grid. With Muon, too,
AdamW updates them. `relative` is AdamW on log s, as for the thresholds of TQT (arXiv 1903.08066 §3.2), and on the offset in
units of s. A scale then stays positive, and moves by the same share per step whether it is 0.004 or 4. With `absolute` a step
has the same size for both: large enough to carry a small scale below zero, and too small for a large one. 1/√Q is the part of
LSQ's gradient factor that depends on the grid (arXiv 1902.08153 §2.2): a change of the scale moves the outermost level by Q
times as much. AdamW divides any constant factor of the gradient out again, so here the factor multiplies the step.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import nn
from torch.optim.adamw import adamw

from ..config import NEWTON_SCHULZ_STEPS, OptimConfig, RunConfig
from ..config.rates import ALL_ALIKE, GroupRates
from ..errors import DataError
from ..quant.layer_specs import SCOPE
from ..quant.quantizer import Quantizer
from .corrections import Average, Correction, corrections
from .distributed import gathered, is_sharded, like, local, share


def calibration_steps(config: RunConfig, first: int = 0) -> frozenset[int]:
    """The steps before which learned scales are set from data: `first`, and `scale_calibrations` more until the warm-up ends.

    They lie evenly over the warm-up, or over as many steps as there are calibrations if that is longer. They depend on the
    warm-up alone, so a branch calibrates at the same steps as its trunk. If quantization begins late, at a step `first` > 0,
    they are the steps right after it: the network is trained by then, but the inputs of its layers change as the layers before
    them are quantized.
    """
    n = config.optim.scale_calibrations
    window = n if first else max(config.warmup_steps, n)
    return frozenset({first, *(first + round(window * k / n) for k in range(1, n + 1))})


MOMENTUM = 0.95
QUINTIC = (3.4445, -4.7750, 2.0315)  # Keller Jordan's: the largest slope at 0 for which singular values stay near 1
MUON_RMS = 0.2  # RMS of an update's entries, about that of AdamW
MOST_TOGETHER = 2**24  # most weights orthogonalized together; limits the memory of intermediate values


def freeze(model: nn.Module, names: Collection[str]) -> None:
    """Stop training the parameters of these modules, including the scales of their quantizers."""
    for name in names:
        model.get_submodule(name).requires_grad_(False)


class Optimizer:
    """AdamW for all parameters, or Muon for the weights of the blocks' linear layers and AdamW for the others (`optim.name`).

    Weight decay applies to the weights of linear layers (head included), but not to the embedding, norms and learned quantizer
    scales, as in the code of the paper's authors (github.com/epfml/llm-baselines, `get_parameter_group_specs`).
    """

    def __init__(self, model: nn.Module, config: OptimConfig, rates: GroupRates = ALL_ALIKE) -> None:
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        linear = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)}
        scales = {name: p for name, p in learned_scales(model).items() if p.requires_grad}
        outermost = {name: q.spec.grid.top for name, q in _learning(model)}
        decayed = {name: p for name, p in named.items() if id(p) in linear}
        others = {name: p for name, p in named.items() if name not in decayed and name not in scales}
        hidden = {name: p for name, p in decayed.items() if name.startswith(SCOPE) and config.name == "muon"}
        by_shape: dict[torch.Size, dict[str, nn.Parameter]] = {}
        for name, p in hidden.items():
            by_shape.setdefault(p.shape, {})[name] = p
        self.config = config
        self.groups: list[Group] = [
            *(MuonGroup(config.weight_decay, parameters, rates.hidden) for parameters in by_shape.values()),
            *_adamw_by_rate(config.weight_decay, {name: p for name, p in decayed.items() if name not in hidden}, rates),
            *_adamw_by_rate(0.0, others, rates),
        ]
        if scales and config.scale_update == "relative":
            self.groups.append(RelativeGroup(scales, config.scale_lr, outermost))
        elif scales:
            self.groups.append(AdamWGroup(0.0, scales, config.scale_lr))
        self.corrections = corrections(model, config)

    @torch.no_grad()
    def step(self, lr: float, skip: torch.Tensor | None = None, *, step: int = 0, of: int = 1) -> None:
        """Update every parameter from its gradient at learning rate `lr`, unless `skip` () is 1; then correct the weights.

        Schedules of corrections depend on `step` (from 0) and on the length `of` the run, in steps.
        `skip` is read on the parameters' device, so that the host need not wait for it. If the parameters are sharded, all
        processes must call this.
        """
        for correction in self.corrections:
            correction.before()
        for group in self.groups:
            group.step(lr, self.config, skip)
        if self.corrections:
            keep = torch.ones((), device=self.groups[0].parameters[0].device) if skip is None else 1 - skip
            for correction in self.corrections:
                correction.after(lr, step, of, keep)

    @property
    def average(self) -> Average | None:
        """The average of the weights that is kept beside them, if any."""
        return next((c for c in self.corrections if isinstance(c, Average)), None)

    def tensors(self) -> dict[str, torch.Tensor]:
        """The state of every parameter, with its shape and sharding: `{"blocks.0.q.weight/exp_avg": …, …}`."""
        rules: list[Group | Correction] = [*self.groups, *self.corrections]
        return {
            f"{name}/{buffer}": like(value, p)
            for group in rules
            for buffer, values in group.state.items()
            for name, p, value in zip(group.names, group.parameters, values, strict=True)
        }

    @torch.no_grad()
    def load(self, tensors: Mapping[str, torch.Tensor], step: int) -> None:
        """Restore the state `tensors` of step `step`. Raises DataError if it does not fit the model."""
        state = self.tensors()
        if {k: v.shape for k, v in state.items()} != {k: v.shape for k, v in tensors.items()}:
            differences = sorted(state.keys() ^ tensors.keys()) or ["other shapes"]
            raise DataError(f"checkpoint: the optimizer's state does not fit the model ({differences[0]}).")
        for name, value in state.items():
            value.copy_(tensors[name])
        self.set_step(step)

    def set_step(self, step: int) -> None:
        """Set the number of steps that the state has taken."""
        for group in self.groups:
            group.set_step(step)


def _adamw_by_rate(decay: float, parameters: Mapping[str, nn.Parameter], rates: GroupRates) -> list[AdamWGroup]:
    """AdamW for parameters of each rate. A step decays them by the learning rate itself, whatever their factor of it."""
    of_module = {"embed": rates.embedding, SCOPE.removesuffix("."): rates.hidden, "head": rates.head}
    by_rate: dict[float, dict[str, nn.Parameter]] = {}
    for name, p in parameters.items():
        rate = of_module.get(name.partition(".")[0], 1.0) if p.ndim == 2 else 1.0
        by_rate.setdefault(rate, {})[name] = p
    return [AdamWGroup(decay / rate, group, rate) for rate, group in by_rate.items()]


def learned_scales(model: nn.Module) -> dict[str, nn.Parameter]:
    """The learned scales and offsets of a model's quantizers by name: `{"blocks.0.q.input_quantizer.scale": …, …}`."""
    return {f"{name}.{own}": p for name, q in _learning(model) for own, p in q.named_parameters()}


def _learning(model: nn.Module) -> list[tuple[str, Quantizer]]:
    return [(name, m) for name, m in model.named_modules() if isinstance(m, Quantizer) and m.scale is not None]


class Group:
    """Parameters that one rule updates with the same weight decay, and the rule's state."""

    def __init__(self, decay: float, parameters: Mapping[str, nn.Parameter]) -> None:
        self.decay, self.names = decay, list(parameters)
        self.parameters: list[torch.Tensor] = list(parameters.values())
        self.local = [local(p.detach()) for p in self.parameters]  # the parts that this process updates
        self.state: dict[str, Sequence[torch.Tensor]] = {}  # buffer → this process's part of it for each parameter

    def gradients(self) -> list[torch.Tensor]:
        """This process's part of the gradient of each parameter."""
        return [local(_gradient(p)) for p in self.parameters]

    def step(self, lr: float, config: OptimConfig, skip: torch.Tensor | None) -> None:
        """Update parameters and state from the gradients, unless `skip` () is 1."""
        raise NotImplementedError

    def set_step(self, step: int) -> None:
        """Set the number of steps that the state has taken, for a rule that depends on it."""


class AdamWGroup(Group):
    """AdamW (arXiv 1711.05101) through torch's fused functional form; the state is both moments.

    `rate` is a factor of the learning rate. The class `torch.optim.AdamW` is not used, because creating one imports the
    compiler, which takes a second or two in every process.
    """

    def __init__(self, decay: float, parameters: Mapping[str, nn.Parameter], rate: float = 1.0) -> None:
        super().__init__(decay, parameters)
        self.rate = rate
        self.moved: list[torch.Tensor] = self.local  # what AdamW updates: the parameters themselves
        self.exp_avg = [torch.zeros_like(p) for p in self.local]
        self.exp_avg_sq = [torch.zeros_like(p) for p in self.local]
        self.state = {"exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq}
        self.steps = [torch.zeros((), device=p.device) for p in self.parameters]

    def step(self, lr: float, config: OptimConfig, skip: torch.Tensor | None) -> None:
        """One step of AdamW."""
        adamw(
            self.moved,
            self.gradients(),
            self.exp_avg,
            self.exp_avg_sq,
            [],
            self.steps,
            fused=True,
            found_inf=skip,
            amsgrad=False,
            maximize=False,
            lr=lr * self.rate,
            beta1=config.beta1,
            beta2=config.beta2,
            eps=config.eps,
            weight_decay=self.decay,
        )

    def set_step(self, step: int) -> None:
        """Set the number of steps, on which the bias correction depends."""
        for count in self.steps:
            count.fill_(step)


class RelativeGroup(AdamWGroup):
    """Scales and offsets of quantizers, which move in units of their scale (`relative` above).

    For each of them AdamW moves an auxiliary value from 0 to p; then s ← s·exp(p/√Q) and b ← b + s·p/√Q. A step that is skipped
    leaves p at 0, so every bit of s and b stays. `outermost` has the Q of each quantizer by name.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], rate: float, outermost: Mapping[str, float]) -> None:
        super().__init__(0.0, parameters, rate)
        place, owners = {name: i for i, name in enumerate(self.names)}, [name.rpartition(".")[0] for name in self.names]
        self.unit = [place[f"{owner}.scale"] for owner in owners]  # the scale of each parameter
        self.share = [outermost[owner] ** -0.5 for owner in owners]
        self.moved = [torch.zeros_like(p) for p in self.local]

    def gradients(self) -> list[torch.Tensor]:
        """s·∂L/∂s and s·∂L/∂b."""
        return list(torch._foreach_mul(super().gradients(), [self.local[i] for i in self.unit]))

    def step(self, lr: float, config: OptimConfig, skip: torch.Tensor | None) -> None:
        """One AdamW step from zero, applied first to the offsets, in units of the old scales, and then to the scales."""
        torch._foreach_zero_(self.moved)
        super().step(lr, config, skip)
        shift = torch._foreach_mul(self.moved, self.share)
        for i, unit in enumerate(self.unit):
            if i != unit:
                self.local[i].addcmul_(shift[i], self.local[unit])
        scales = sorted(set(self.unit))
        torch._foreach_mul_([self.local[i] for i in scales], torch._foreach_exp([shift[i] for i in scales]))


class MuonGroup(Group):
    """Muon (kellerjordan.github.io/posts/muon) for matrices (n, m) of one shape; the state is the momentum.

        M ← μM + G,   W ← (1 − lr·decay)·W − lr·rate·.2·√max(n, m)·NS(G + μM)

    NS moves every singular value towards 1 (`newton_schulz`). The factor .2·√max(n, m) gives updates the size of AdamW's, so
    that learning rate and weight decay mean the same for both (arXiv 2502.16982).
    """

    def __init__(self, decay: float, parameters: Mapping[str, nn.Parameter], rate: float = 1.0) -> None:
        super().__init__(decay, parameters)
        self.momentum = torch.stack([torch.zeros_like(p) for p in self.local])
        self.state = {"momentum": self.momentum.unbind()}  # views
        self.scale = rate * MUON_RMS * math.sqrt(max(self.parameters[0].shape))

    def step(self, lr: float, config: OptimConfig, skip: torch.Tensor | None) -> None:
        """One step of Muon. If it is skipped, the momentum stays as it is, and the update is multiplied by 0."""
        keep = torch.ones((), device=self.momentum.device) if skip is None else 1 - skip
        g = torch.stack(self.gradients()).masked_fill_(keep == 0, 0.0)
        self.momentum.mul_(1 - (1 - MOMENTUM) * keep).add_(g)
        updates = g.add_(self.momentum, alpha=MOMENTUM)
        torch._foreach_mul_(self.local, 1 - lr * self.decay * keep)
        together = max(1, MOST_TOGETHER // self.parameters[0].numel())
        for i in range(0, len(updates), together):
            some, whole = self.parameters[i : i + together], updates[i : i + together]
            if is_sharded(some[0]):
                whole = torch.stack([gathered(like(u, p)) for u, p in zip(whole, some, strict=True)])
            moves = newton_schulz(whole).mul_(lr * self.scale * keep)
            torch._foreach_sub_(self.local[i : i + together], [share(move, p) for move, p in zip(moves, some, strict=True)])


def newton_schulz(g: torch.Tensor) -> torch.Tensor:
    """g (B, n, m) → about U·Vᵀ of each matrix U·Σ·Vᵀ, fp32: its singular values divided by its norm, and moved towards 1.

    Each of five steps maps a singular value s to as + bs³ + cs⁵, so that those above about .005 of the norm end between .7 and
    1.2. It is done in bf16 on a GPU, which is fast and precise enough there, and in fp32 elsewhere.
    """
    a, b, c = QUINTIC
    x = g / (torch.linalg.matrix_norm(g, keepdim=True) + 1e-7)
    x = x.bfloat16() if x.device.type == "cuda" else x
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    for _ in range(NEWTON_SCHULZ_STEPS):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).float()


def _gradient(p: torch.Tensor) -> torch.Tensor:
    assert p.grad is not None
    return p.grad
