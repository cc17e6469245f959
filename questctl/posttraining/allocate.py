"""Bits where they matter: for each layer a word, so that the modelled loss is least within a budget of bits per weight.

    minimise Σ_l c(l, w_l)    subject to    Σ_l n_l·bits(w_l) ≤ B·Σ_l n_l          n_l weights of layer l, w_l one of the words

solved exactly, as a mixed-integer program with one 0/1 variable for each layer and word. So layers of different bit-widths make
any fractional budget (after the fractional-bit allocation of Q-Palette, arXiv 2509.20214). Two models of c, nats/token:

    gaussian   c = e(w) · ½ Σ_n σ_n² Σ_k F_nk: the noise that the word adds to a normal row of that variance, of relative size
               e(w), through the curvature, here the diagonal of the empirical Fisher matrix F = E[g²] of a token
    measured   c = L(only this layer rounded by w) − L, on text; rounded to nearest, or with the errors compensated (ptq.py)

F of a token is taken as T·(squared gradient of a sequence of T tokens), as if its tokens were independent; Σ_k F_nk is the same
in every basis. Both models add up over layers, which holds where errors are small. So the program is solved twice, over all
words and over the two beside the budget alone, whose errors are more alike; all layers are rounded by each solution together,
and the one of lower loss is taken. `Allocation` carries that loss beside the sum.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from ..config import LayerQuant, QuantConfig
from ..models.llama import Llama
from ..quant.linear import calibrate_inputs, quantize_model
from ..quant.quantizer import Quantizer
from ..quant.spec import QuantSpec
from ..store import Run
from ..training.loading import LoadedRun, load, loss_on
from ..training.loop import execution, pick_device
from .preflight import CALIBRATION_TOKENS, check_sensitivity, check_words, require_full_precision
from .probe import NormalErrors
from .quantize import calibration, compensate_model, compensated, in_basis, input_hessians, linear_of, round_model, rounded

TOKENS = 16_384  # of the training text behind a sensitivity
FISHER_SEQUENCES = 64


@dataclass(frozen=True)
class Choice:
    """What was decided for one layer; cost in nats/token, by the model."""

    layer: str
    weights: int
    word: str
    bits: float
    cost: float


@dataclass(frozen=True)
class Allocation:
    """A word for each layer, and what it is expected to cost; losses in nats/token on the text that was measured."""

    run: str
    sensitivity: str
    method: str  # how weights were rounded where a loss was measured: rtn or gptq
    budget: float  # bits per weight of the quantized layers, scales of rows not counted
    bits: float  # of these used
    activations: str
    choices: tuple[Choice, ...]
    modelled: float  # loss more than in full precision, by the model
    interpolated: float | None  # the same, between the two uniform words beside the budget; None where there is none
    neighbours: tuple[str, ...]
    loss: float  # in full precision, but for the inputs
    rounded: float  # loss with all layers rounded

    def quant(self) -> QuantConfig:
        """The words as a config: that of most weights for all layers, the others by name."""
        weight: dict[str, int] = {}
        for c in self.choices:
            weight[c.word] = weight.get(c.word, 0) + c.weights
        base = max(weight, key=lambda word: weight[word])
        overrides = {c.layer: LayerQuant(weights=QuantSpec.parse(c.word)) for c in self.choices if c.word != base}
        inputs = QuantSpec.parse(self.activations, operand="activations")
        return QuantConfig(weights=QuantSpec.parse(base), activations=inputs, overrides=overrides)

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)


def allocate(
    run: Run,
    bits: float,
    words: Sequence[str],
    *,
    activations: str = "bf16",
    sensitivity: str = "measured",
    method: str = "rtn",
    tokens: int = TOKENS,
    device: str = "auto",
) -> Allocation:
    """Choose among `words` for the weights of each layer of the full-precision `run`, at most `bits` per weight on average.

    `activations` is the word of all inputs. Sensitivities are taken on `tokens` of the training text, gaussian ones on at most
    `FISHER_SEQUENCES` sequences of it. `method` is how weights are rounded for them: rtn, to nearest, as training does, or
    gptq, with compensation, as `quantize` does unless told otherwise. Raises UsageError or DataError.
    """
    check_words(require_full_precision(run, "allocate").model, words, activations, bits)
    check_sensitivity(sensitivity, method)
    specs = {word: QuantSpec.parse(word, key="--words") for word in words}
    inputs = QuantSpec.parse(activations, key="--activations", operand="activations")
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
        each = {word: spec.bits for word, spec in specs.items()}
        interpolated, neighbours = between_uniform(each, costs, bits)
        solutions = [solve(sizes, each, costs, bits)]
        if neighbours:
            solutions.append(solve(sizes, {word: each[word] for word in neighbours}, costs, bits))
        losses = [_together(loaded, {n: specs[w] for n, w in s.items()}, layers, method, tokens) for s in solutions]
        together, chosen = min(zip(losses, solutions, strict=True), key=lambda found: found[0])
    choices = tuple(Choice(n, sizes[n], word, specs[word].bits, costs[n][word]) for n, word in chosen.items())
    return Allocation(
        run=run.name,
        sensitivity=sensitivity,
        method=method,
        budget=bits,
        bits=sum(c.weights * c.bits for c in choices) / sum(sizes.values()),
        activations=activations,
        choices=choices,
        modelled=sum(c.cost for c in choices),
        interpolated=interpolated,
        neighbours=neighbours,
        loss=loss,
        rounded=together,
    )


def solve(
    sizes: Mapping[str, int], bits: Mapping[str, float], costs: Mapping[str, Mapping[str, float]], budget: float
) -> dict[str, str]:
    """The word of each layer: least Σ cost with Σ size·bits ≤ budget·Σ size, to proven optimality (HiGHS).

    `sizes`: weights of each layer; `bits`: of each word, one of them within the budget; `costs`: layer → word → cost.
    """
    import numpy as np
    from scipy.optimize import Bounds, LinearConstraint, milp

    layers, words = list(sizes), list(bits)
    share = np.array([sizes[name] for name in layers]) / sum(sizes.values())
    cost = np.array([[costs[name][word] for word in words] for name in layers])
    scale = float(np.abs(cost).max()) or 1.0
    used = np.outer(share, [bits[word] for word in words]).ravel()
    one_each = np.kron(np.eye(len(layers)), np.ones(len(words)))
    constraints = [LinearConstraint(one_each, 1, 1), LinearConstraint(used[None, :], -np.inf, budget + 1e-9)]
    found = milp(
        cost.ravel() / scale,
        integrality=np.ones(cost.size, dtype=int),
        bounds=Bounds(0, 1),
        constraints=constraints,
        options={"mip_rel_gap": 0.0},
    )
    assert found.success, found.message
    picked = found.x.reshape(cost.shape).argmax(axis=1)
    assert share @ np.array([bits[words[i]] for i in picked]) <= budget + 1e-6
    return {name: words[i] for name, i in zip(layers, picked, strict=True)}


def between_uniform(
    bits: Mapping[str, float], costs: Mapping[str, Mapping[str, float]], budget: float
) -> tuple[float | None, tuple[str, ...]]:
    """Modelled cost on the line between the words for all layers whose bits enclose the budget, and these words."""
    below = max((w for w in bits if bits[w] <= budget), key=lambda w: bits[w], default=None)
    above = min((w for w in bits if bits[w] >= budget), key=lambda w: bits[w], default=None)
    if below is None or above is None:
        return None, ()
    low, high = (sum(c[word] for c in costs.values()) for word in (below, above))
    t = (budget - bits[below]) / (bits[above] - bits[below]) if bits[above] > bits[below] else 0.0
    return low + t * (high - low), tuple(dict.fromkeys((below, above)))


@torch.no_grad()
def _together(
    loaded: LoadedRun, specs: Mapping[str, QuantSpec], layers: Mapping[str, torch.Tensor], method: str, tokens: int
) -> float:
    """Loss on the training text with all layers rounded; their weights are as before."""
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


def _roundings(loaded: LoadedRun, names: Iterable[str], method: str) -> dict[str, Rounding]:
    """How each layer is rounded; with compensation, by the inputs that it has while all others are as they were."""
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
    specs: Mapping[str, QuantSpec],
    tokens: int,
    loss: float,
    how: Mapping[str, Rounding],
) -> dict[str, dict[str, float]]:
    """layer → word → loss more than `loss` when that layer alone is rounded; weights (N, K) of `layers` are as before."""
    costs: dict[str, dict[str, float]] = {}
    for name, weight in layers.items():
        original = weight.clone()
        costs[name] = {}
        for word, spec in specs.items():
            weight.copy_(how[name](original, spec))
            there = loss_on(loaded.model, loaded.config, loaded.data, part="train", max_tokens=tokens)
            costs[name][word] = there - loss
        weight.copy_(original)
    return costs


def gaussian(
    model: Llama, layers: Mapping[str, torch.Tensor], specs: Mapping[str, QuantSpec], tokens: torch.Tensor
) -> dict[str, dict[str, float]]:
    """layer → word → e(word)·½ Σ_n σ_n² Σ_k F_nk; tokens (n, T + 1)."""
    curvature = fisher_weights(model, layers, tokens)
    expected = NormalErrors(tokens.device)

    def error(weight: torch.Tensor, spec: QuantSpec) -> float:
        if spec.is_identity:
            return 0.0
        quantizer = Quantizer(spec, numel=weight.numel()).to(weight.device)
        quantizer.calibrate(weight)
        return expected(quantizer, weight)

    return {name: {word: curvature[name] * error(w, spec) for word, spec in specs.items()} for name, w in layers.items()}


def fisher_weights(model: Llama, layers: Mapping[str, torch.Tensor], tokens: torch.Tensor) -> dict[str, float]:
    """layer → ½ Σ_n σ_n² Σ_k F_nk with σ_n² the mean square of row n and F = T·mean of squared gradients of sequences.

    tokens (n, T + 1), one backward pass each.
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
