"""Mixed bits: one spec per layer, so that the modelled loss is least within a budget of bits per weight.

    minimise Σ_l c(l, s_l)    subject to    Σ_l n_l·bits(s_l) ≤ B·Σ_l n_l          n_l weights of layer l, s_l its spec

This is a mixed-integer program with one 0/1 variable for each layer and spec, and it is solved exactly. Layers of different
bit-widths meet any fractional budget (after the fractional-bit allocation of Q-Palette, arXiv 2509.20214). The cost c, in
nats/token, follows one of two models:

    gaussian   c = e(s) · ½ Σ_n σ_n² Σ_k F_nk. The spec adds noise of relative size e(s) to a row of normal values with variance
               σ_n². The curvature turns it into loss; it is the diagonal of the empirical Fisher matrix, F = E[g²] of a token.
    measured   c = L(only this layer rounded by s) − L, on text; rounded to nearest, or with errors compensated (quantize.py)

F of a token is approximated by T·(squared gradient of a sequence of T tokens), as if the tokens were independent. Σ_k F_nk is
the same in every basis. Both models add costs over layers, which holds only for small errors. The program is therefore solved
twice: with all specs, and with only the two nearest the budget, whose errors are more alike. All layers are rounded by each
solution, and the solution of lower loss is taken; `Allocation` holds that loss beside the modelled sum.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from ..config import LayerQuant, QuantConfig, RunConfig
from ..errors import StorageError
from ..models.llama import Llama
from ..quant.linear import calibrate_inputs
from ..quant.model import quantize_model
from ..quant.quantizer import Quantizer
from ..quant.spec import QuantSpec
from ..store import Run
from ..training.loading import LoadedRun, load, loss_on
from ..training.loop import execution, pick_device
from .preflight import CALIBRATION_TOKENS, SENSITIVITY_TOKENS, check_candidates, check_sensitivity, require_full_precision
from .probe import NormalErrors
from .quantize import calibration, compensate_model, compensated, in_basis, input_hessians, linear_of, round_model, rounded

FISHER_SEQUENCES = 64

S = TypeVar("S", bound=Hashable)  # a spec; the solver only needs to tell specs apart


@dataclass(frozen=True)
class LayerAllocation:
    """The spec of one layer; its cost in nats/token is that of the model."""

    layer: str
    weights: int
    spec: QuantSpec
    bits: float
    cost: float


@dataclass(frozen=True)
class Allocation:
    """A spec for each layer, and the expected cost; losses in nats/token on the text used for sensitivities."""

    run: str
    sensitivity: str
    method: str  # how weights were rounded to measure losses: rtn or gptq
    budget: float  # bits per weight of the quantized layers; scales of rows are not counted
    bits: float  # mean bits per weight that the allocation uses
    activations: QuantSpec
    layers: tuple[LayerAllocation, ...]
    modelled: float  # increase of the loss over full precision, by the model
    interpolated: float | None  # the same between the two uniform specs beside the budget; None without such specs
    neighbours: tuple[QuantSpec, ...]  # these two specs
    loss: float  # with weights in full precision and quantized inputs
    rounded: float  # loss with all layers rounded
    source: RunConfig

    def quant(self) -> QuantConfig:
        """The specs as a config section: that of most weights for all layers, the others as overrides by name."""
        weight: dict[QuantSpec, int] = {}
        for layer in self.layers:
            weight[layer.spec] = weight.get(layer.spec, 0) + layer.weights
        base = max(weight, key=lambda spec: weight[spec])
        overrides = {layer.layer: LayerQuant(weights=layer.spec) for layer in self.layers if layer.spec != base}
        return QuantConfig(weights=base, activations=self.activations, overrides=overrides)

    def config(self) -> RunConfig:
        """The config of the source with this allocation, for training from scratch."""
        return self.source.model_copy(update={"quant": self.quant()})

    def summary(self) -> str:
        """One line: bits per weight, and where they come from."""
        by = self.sensitivity + (f" ({self.method})" if self.sensitivity == "measured" else "")
        return f"{self.bits:.4g} bits per weight, allocated on {self.run} by {by} sensitivities"

    def to_toml(self) -> str:
        """`config()` as TOML, which `questctl train --config` and `questctl quantize --config` read."""
        from ..config.describe import to_toml

        return f"# {self.summary()}\n{to_toml(self.config())}\n"

    def write_toml(self, path: Path | str) -> None:
        """Write `to_toml()`. Raises StorageError naming the file."""
        try:
            Path(path).write_text(self.to_toml(), encoding="utf-8")
        except OSError as e:
            raise StorageError(f"{path}: cannot be written: {e.strerror}.") from e

    def to_dict(self) -> dict[str, Any]:
        """As JSON values, with the config and the run id of a training with it."""
        config = self.config()
        specs = {"activations": str(self.activations), "neighbours": [str(spec) for spec in self.neighbours]}
        layers = [{**vars(layer), "spec": str(layer.spec)} for layer in self.layers]
        fields = {name: value for name, value in vars(self).items() if name != "source"}
        return {**fields, **specs, "layers": layers, "run_id": config.run_id, "config": config.to_json()}


def allocate(
    run: Run,
    bits: float,
    specs: Sequence[QuantSpec],
    *,
    activations: QuantSpec | None = None,
    sensitivity: str = "measured",
    method: str = "rtn",
    tokens: int = SENSITIVITY_TOKENS,
    device: str = "auto",
) -> Allocation:
    """Choose among `specs` for the weights of each layer of the full-precision `run`, at most `bits` per weight on average.

    `activations` is the spec of all inputs; None leaves them in full precision. Sensitivities use `tokens` tokens of the
    training text, gaussian ones at most `FISHER_SEQUENCES` sequences. `method` is how weights are rounded for measured
    sensitivities. See `allocate_bits` for the errors.
    """
    source, inputs = require_full_precision(run, "allocate"), activations or QuantSpec.parse("bf16")
    check_candidates(source.model, specs, inputs, bits)
    check_sensitivity(sensitivity, method)
    place = pick_device(device)
    with execution(int(run.env().get("threads") or torch.get_num_threads()), place):
        loaded = load(run, device=place)
        model, config = loaded.model, loaded.config
        quantize_model(model, QuantConfig(activations=inputs)).to(place)
        batch = calibration(config, loaded.data, config.train.batch_size * config.data.seq_len).to(place)
        calibrate_inputs(model, batch[:, :-1])
        layers = {n: m.weight for n, m in model.named_modules() if n.startswith("blocks.") and isinstance(m, torch.nn.Linear)}
        loss = loss_on(model, config, loaded.data, part="train", max_tokens=tokens)
        if sensitivity == "measured":
            costs = measured(loaded, layers, specs, tokens, loss, _roundings(loaded, layers, method))
        else:
            few = min(tokens, FISHER_SEQUENCES * config.data.seq_len)
            costs = gaussian(model, layers, specs, calibration(config, loaded.data, few).to(place))
        sizes = {name: w.numel() for name, w in layers.items()}
        spec_bits = {spec: spec.bits for spec in specs}
        interpolated, neighbours = between_uniform(spec_bits, costs, bits)
        solutions = [solve(sizes, spec_bits, costs, bits)]
        if neighbours:
            solutions.append(solve(sizes, {spec: spec_bits[spec] for spec in neighbours}, costs, bits))
        losses = [_rounded_loss(loaded, solution, layers, method, tokens) for solution in solutions]
    rounded_loss, chosen = min(zip(losses, solutions, strict=True), key=lambda pair: pair[0])
    allocated = tuple(LayerAllocation(n, sizes[n], spec, spec.bits, costs[n][spec]) for n, spec in chosen.items())
    return Allocation(
        run=run.name,
        sensitivity=sensitivity,
        method=method,
        budget=bits,
        bits=sum(layer.weights * layer.bits for layer in allocated) / sum(sizes.values()),
        activations=inputs,
        layers=allocated,
        modelled=sum(layer.cost for layer in allocated),
        interpolated=interpolated,
        neighbours=neighbours,
        loss=loss,
        rounded=rounded_loss,
        source=source,
    )


def solve(
    sizes: Mapping[str, int], bits: Mapping[S, float], costs: Mapping[str, Mapping[S, float]], budget: float
) -> dict[str, S]:
    """The spec of each layer: least Σ cost with Σ size·bits ≤ budget·Σ size, to proven optimality (HiGHS).

    `sizes`: weights of each layer; `bits`: of each spec, at least one of them within the budget; `costs`: layer → spec → cost.
    """
    import numpy as np
    from scipy.optimize import Bounds, LinearConstraint, milp

    layers, specs = list(sizes), list(bits)
    share = np.array([sizes[name] for name in layers]) / sum(sizes.values())
    cost = np.array([[costs[name][spec] for spec in specs] for name in layers])
    scale = float(np.abs(cost).max()) or 1.0
    used = np.outer(share, [bits[spec] for spec in specs]).ravel()
    one_each = np.kron(np.eye(len(layers)), np.ones(len(specs)))
    constraints = [LinearConstraint(one_each, 1, 1), LinearConstraint(used[None, :], -np.inf, budget + 1e-9)]
    solution = milp(
        cost.ravel() / scale,
        integrality=np.ones(cost.size, dtype=int),
        bounds=Bounds(0, 1),
        constraints=constraints,
        options={"mip_rel_gap": 0.0},
    )
    assert solution.success, solution.message
    picked = solution.x.reshape(cost.shape).argmax(axis=1)
    assert share @ np.array([bits[specs[i]] for i in picked]) <= budget + 1e-6
    return {name: specs[i] for name, i in zip(layers, picked, strict=True)}


def between_uniform(
    bits: Mapping[S, float], costs: Mapping[str, Mapping[S, float]], budget: float
) -> tuple[float | None, tuple[S, ...]]:
    """The modelled cost of uniform bits at the budget, and the two specs whose bits enclose the budget.

    The cost is interpolated linearly between those of the two specs, each used for all layers. (None, ()) if the budget lies
    outside the bits of all specs.
    """
    below = max((s for s in bits if bits[s] <= budget), key=lambda s: bits[s], default=None)
    above = min((s for s in bits if bits[s] >= budget), key=lambda s: bits[s], default=None)
    if below is None or above is None:
        return None, ()
    low, high = (sum(cost[spec] for cost in costs.values()) for spec in (below, above))
    t = (budget - bits[below]) / (bits[above] - bits[below]) if bits[above] > bits[below] else 0.0
    return low + t * (high - low), tuple(dict.fromkeys((below, above)))


@torch.no_grad()
def _rounded_loss(
    loaded: LoadedRun, specs: Mapping[str, QuantSpec], layers: Mapping[str, torch.Tensor], method: str, tokens: int
) -> float:
    """Loss on the training text with all layers rounded by `specs`. The weights are restored afterwards."""
    model, config = loaded.model, loaded.config
    originals = {name: weight.clone() for name, weight in layers.items()}
    if method == "gptq":
        sequences = calibration(config, loaded.data, CALIBRATION_TOKENS)[:, :-1].to(model.head.weight.device)
        compensate_model(model, specs, sequences, rows=config.train.batch_size)
    else:
        round_model(model, specs)
    loss = loss_on(model, config, loaded.data, part="train", max_tokens=tokens)
    for name, weight in layers.items():
        weight.copy_(originals[name])
    return loss


# --- sensitivities ----------------------------------------------------------------------------------------------------


Rounding = Callable[[torch.Tensor, QuantSpec], torch.Tensor]  # weight (N, K), spec → its rounded values
Costs = dict[str, dict[QuantSpec, float]]  # layer → spec → nats/token


def _roundings(loaded: LoadedRun, names: Iterable[str], method: str) -> dict[str, Rounding]:
    """For each layer, the function that rounds it alone. With gptq its inputs are those of the otherwise unquantized model."""
    if method == "rtn":
        return dict.fromkeys(names, rounded)
    config, model = loaded.config, loaded.model
    layers = {name: linear_of(model, name) for name in names}
    sequences = calibration(config, loaded.data, CALIBRATION_TOKENS)[:, :-1].to(model.head.weight.device)
    with torch.no_grad(), input_hessians(layers) as hessians:
        for part in sequences.split(config.train.batch_size):
            model(part)

    def compensate(name: str, weight: torch.Tensor, spec: QuantSpec) -> torch.Tensor:
        return compensated(weight, in_basis(hessians[name], layers[name], spec), spec)

    return {name: partial(compensate, name) for name in layers}


@torch.no_grad()
def measured(
    loaded: LoadedRun,
    layers: Mapping[str, torch.Tensor],
    specs: Sequence[QuantSpec],
    tokens: int,
    loss: float,
    roundings: Mapping[str, Rounding],
) -> Costs:
    """layer → spec → the increase over `loss` when that layer alone is rounded. The weights (N, K) are restored afterwards."""
    costs: Costs = {}
    for name, weight in layers.items():
        original = weight.clone()
        costs[name] = {}
        for spec in specs:
            weight.copy_(roundings[name](original, spec))
            costs[name][spec] = loss_on(loaded.model, loaded.config, loaded.data, part="train", max_tokens=tokens) - loss
        weight.copy_(original)
    return costs


def gaussian(model: Llama, layers: Mapping[str, torch.Tensor], specs: Sequence[QuantSpec], tokens: torch.Tensor) -> Costs:
    """layer → spec → e(spec)·½ Σ_n σ_n² Σ_k F_nk; tokens (n, T + 1)."""
    curvature = fisher_weights(model, layers, tokens)
    expected = NormalErrors(tokens.device)

    def error(weight: torch.Tensor, spec: QuantSpec) -> float:
        if spec.is_identity:
            return 0.0
        quantizer = Quantizer(spec, numel=weight.numel(), rows=len(weight)).to(weight.device)
        quantizer.calibrate(weight)
        return expected(quantizer, weight)

    return {name: {spec: curvature[name] * error(w, spec) for spec in specs} for name, w in layers.items()}


def fisher_weights(model: Llama, layers: Mapping[str, torch.Tensor], tokens: torch.Tensor) -> dict[str, float]:
    """layer → ½ Σ_n σ_n² Σ_k F_nk, with σ_n² the mean square of row n and F = T·(mean squared gradient of a sequence).

    tokens (n, T + 1); each sequence takes one backward pass.
    """
    sums = {name: torch.zeros(len(w), dtype=torch.float64, device=w.device) for name, w in layers.items()}
    for row in tokens:
        model.zero_grad()
        model(row[None, :-1], row[None, 1:]).backward()
        for name, weight in layers.items():
            assert weight.grad is not None
            sums[name] += weight.grad.double().square().sum(1)
    model.zero_grad()
    length, n = tokens.shape[1] - 1, len(tokens)
    return {
        name: 0.5 * length / n * float((weight.detach().double().square().mean(1) * sums[name]).sum())
        for name, weight in layers.items()
    }
