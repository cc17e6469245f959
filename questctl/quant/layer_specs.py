"""The quantizer specs of each layer of a model, and whether they fit its shape, without torch and before a model is built.

In a run's model, the linear layers below `blocks.` are quantized; embedding, head and cache have specs of their own
(`quant.embedding`, `quant.head`, `quant.kv`), and norms are never quantized. An override applies to the layers whose dotted
name its pattern matches (`blocks.*.down`, `blocks.3.q`); an exact name wins over patterns.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import NamedTuple

from ..config import ModelConfig, QuantConfig
from ..errors import UsageError, unknown
from .rotations import Hadamard
from .spec import QuantSpec

SCOPE = "blocks."
STAGES = (("q", "k", "v"), ("o",), ("gate", "up"), ("down",))  # of a block, in order; the layers of a stage share an input


class LayerSpecs(NamedTuple):
    """The quantizer specs of one linear layer."""

    weights: QuantSpec
    activations: QuantSpec


def layer_shapes(model: ModelConfig) -> dict[str, tuple[int, int]]:
    """The linear layers of all blocks by their module names, each with the shape (N, K) of its weight: outputs, inputs."""
    return {f"{SCOPE}{i}.{kind}": shape for i in range(model.n_layer) for kind, shape in model.block_shapes.items()}


def layer_widths(model: ModelConfig) -> dict[str, int]:
    """The linear layers of all blocks by their module names, each with its input width K."""
    return {name: k for name, (_, k) in layer_shapes(model).items()}


def rotated_weights(model: ModelConfig, quant: QuantConfig) -> dict[str, Hadamard]:
    """The layers whose weight is rotated and whose input is not, each with its rotation.

    Such a layer is a rotated parametrisation: the stored W is multiplied by the input only after its rotation. Models that
    begin with a checkpoint have none: their quantized weights are rotated back.
    """
    if model.init_sha256:
        return {}
    specs = layer_specs(layer_widths(model), quant)
    return {name: w.basis for name, (w, a) in specs.items() if w.basis and a.is_identity}


def check_layers(model: ModelConfig, quant: QuantConfig) -> None:
    """Raises UsageError if a spec does not fit its operand in the model; for layers as `layer_specs` does."""
    shapes = layer_shapes(model)
    specs = layer_specs(layer_widths(model), quant)
    for name, (n, _) in shapes.items():
        check_outputs(specs[name].weights, quant.gradients, n, backward=quant.backward, name=name)
    for key, spec in quant.by_row.items():
        check_width(spec, model.width_of_row(key), where=f"quant.{key}")


def mean_bits(model: ModelConfig, quant: QuantConfig) -> dict[str, float]:
    """Mean bits of the linear layers, weighted by the number of their weights; 16 in bf16.

    `w_grid_bits`, `a_grid_bits`: width of the grids of weights and of inputs. `w_stored_bits`, `a_stored_bits`: bits per stored
    entry of each.
    """
    shapes = layer_shapes(model)
    size = {name: n * k for name, (n, k) in shapes.items()}
    specs = layer_specs(layer_widths(model), quant)

    def mean(side: int, bits: Callable[[QuantSpec], float]) -> float:
        return sum(size[name] * bits(specs[name][side]) for name in size) / sum(size.values())

    return {
        "w_grid_bits": mean(0, lambda spec: spec.grid.bits),
        "a_grid_bits": mean(1, lambda spec: spec.grid.bits),
        "w_stored_bits": mean(0, lambda spec: spec.bits),
        "a_stored_bits": mean(1, lambda spec: spec.bits),
    }


def layer_specs(widths: Mapping[str, int], quant: QuantConfig) -> dict[str, LayerSpecs]:
    """The specs of every layer in `widths` (module name → input width K).

    Raises UsageError for a pattern that matches no layer, for two patterns that give one layer different specs, and for a spec
    that does not fit its layer.
    """
    specs = specs_by_name(widths, quant)
    for name, width in widths.items():
        check_fit(*specs[name], width, name=name)
    return specs


def specs_by_name(names: Iterable[str], quant: QuantConfig) -> dict[str, LayerSpecs]:
    """The specs that the patterns of `quant` give to each layer, whether they fit or not.

    Raises UsageError for a pattern that matches no layer, and for two patterns that give one layer different specs.
    """
    names = list(names)
    for pattern in quant.overrides:
        matching(names, pattern, key="quant.overrides")
    return {name: LayerSpecs(_spec_of(quant, name, "weights"), _spec_of(quant, name, "activations")) for name in names}


def matching(names: Iterable[str], pattern: str, *, key: str) -> list[str]:
    """The layers whose dotted name the pattern matches. Raises UsageError, which begins with `key`, if there are none."""
    names = list(names)
    matches = [name for name in names if fnmatchcase(name, pattern)]
    if not matches:
        kinds = sorted({re.sub(r"(?<=\.)\d+(?=\.)|^\d+(?=\.)", "*", name) for name in names})
        exact = f" An exact name is {names[0]}." if names else ""
        raise UsageError(unknown(key, pattern, kinds, what="layer") + exact)
    return matches


LEAST_BLOCK = 16  # a smaller rotation hardly makes a row look normal


def with_block_that_fits(spec: QuantSpec, width: int) -> QuantSpec:
    """The spec with the largest rotation block, at most its own, that divides `width`; without rotation if it is below 16."""
    block = min(spec.rotation, width & -width)
    if spec.basis is None or block == spec.rotation:
        return spec
    return replace(spec, basis=replace(spec.basis, block=block) if block >= LEAST_BLOCK else None)


def check_fit(weights: QuantSpec, activations: QuantSpec, width: int, *, name: str) -> None:
    """Raises UsageError naming the layer if a spec does not fit its input width, or if the two specs rotate differently."""
    for side, spec in (("weights", weights), ("activations", activations)):
        check_width(spec, width, where=f"quant.{side}: layer {name}")
    if weights.basis != activations.basis and not (weights.is_identity or activations.is_identity):
        raise UsageError(
            f"quant: layer {name}: weights '{weights}' and activations '{activations}' are rotated differently, "
            "so that their product would be wrong; give both the same rotation or none."
        )


def check_outputs(weights: QuantSpec, gradients: QuantSpec, outputs: int, *, backward: str, name: str) -> None:
    """Raises UsageError naming the layer if a spec does not fit its number of outputs, or the two do not fit together."""
    check_rows(weights, outputs, where=f"quant.weights: layer {name}")
    check_width(gradients, outputs, where=f"quant.gradients: outputs of layer {name}")
    w, g = weights.scale, gradients.scale
    if backward == "both" and w and w.rows > 1 and g and g.corrected:
        raise UsageError(
            f"quant.gradients: layer {name}: '{g.text}' is unbiased only where both operands of a product are rotated, and "
            f"weights in squares ({w.text}) are multiplied as they are; use stochastic rounding, such as fp4.sr-ue4m3.g16-ste."
        )


def check_rows(spec: QuantSpec, rows: int, *, where: object) -> None:
    """Raises UsageError, which begins with `where`, if the squares of a scale do not divide the `rows` of a weight."""
    if spec.scale and rows % spec.scale.rows:
        groups = f"use g{spec.scale.group}, whose scales are those of single rows"
        raise UsageError(f"{where}: scale {spec.scale.text}: {spec.scale.rows} does not divide the {rows} rows; {groups}.")


def check_width(spec: QuantSpec, width: int, *, where: object) -> None:
    """Raises UsageError, which begins with `where`, if a rotation block or a group of a component does not divide `width`."""
    if spec.rotation and width % spec.rotation:
        choices = f"powers of two up to h{width & -width} do" if width % 2 == 0 else "none divides an odd width"
        raise UsageError(f"{where}: rotation h{spec.rotation} does not divide the width {width}; {choices}.")
    if width % spec.grid.group:
        raise UsageError(f"{where}: {spec.grid.text} takes groups of {spec.grid.group}, which do not divide the width {width}.")
    if spec.scale and spec.scale.group and width % spec.scale.group:
        fit = ", ".join(f"g{g}" for g in (16, 32, 64, 128) if width % g == 0) or "none"
        raise UsageError(f"{where}: scale {spec.scale.text}: the group does not divide the width {width}; that do: {fit}.")
    if spec.sparsity and width % spec.sparsity.group:
        group = spec.sparsity.group
        raise UsageError(f"{where}: {spec.sparsity.text} takes groups of {group}, which do not divide the width {width}.")


def _spec_of(quant: QuantConfig, name: str, side: str) -> QuantSpec:
    """The spec of one side of one layer: its own override, else that of the patterns that match it, else that of all layers."""
    by_pattern: dict[str, QuantSpec] = {p: spec for p, layer in quant.overrides.items() if (spec := getattr(layer, side))}
    if name in by_pattern:
        return by_pattern[name]
    matching = {p: spec for p, spec in by_pattern.items() if fnmatchcase(name, p)}
    if len(set(matching.values())) > 1:
        both = " and ".join(f"'{p}' ({spec})" for p, spec in sorted(matching.items()))
        raise UsageError(f"quant.overrides: {both} give layer {name} different {side}; name the layer exactly to decide.")
    default: QuantSpec = getattr(quant, side)
    return next(iter(matching.values()), default)
