"""Named methods as presets of words, and the short labels that group runs.

A method is nothing but the two words it stands for; whatever a method does is in the parts that its words name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from ..errors import UsageError, unknown
from .spec import QuantSpec


@dataclass(frozen=True)
class Method:
    """One line on what it does, its source, and its word for a grid and a rotation block."""

    summary: str
    source: str
    word: Callable[[str, int], str]


METHODS: dict[str, Method] = {
    "quest": Method(
        "Hadamard rotation, Gaussian-optimal scale, gradient only where the rounding error is trusted (1 bit: clip at 1.3)",
        "Panferov et al. 2025, arXiv 2502.05003",
        lambda grid, block: f"{grid}-h{block}-rms-{'clip1.3' if grid == 'int1' else 'trust'}",
    ),
    "ste": Method(
        "Gaussian-optimal scale, gradient straight through: the plain baseline",
        "Bengio et al. 2013, arXiv 1308.3432",
        lambda grid, block: f"{grid}-rms-ste",
    ),
    "quarot": Method(
        "Hadamard rotation with a straight-through gradient",
        "Ashkboos et al. 2024, arXiv 2404.00456, trained as in arXiv 2502.05003",
        lambda grid, block: f"{grid}-h{block}-rms-ste",
    ),
    "lsq": Method(
        "one learned step per tensor, gradient only inside the grid",
        "Esser et al. 2020, arXiv 1902.08153",
        lambda grid, block: f"{grid}-learned-clip1",  # eq. 5 of the paper: the input's gradient is 1 inside the grid, 0 outside
    ),
    "bf16": Method("no quantization", "", lambda grid, block: "bf16"),
}

GRID_OF_BITS = {**{str(b): f"int{b}" for b in range(1, 9)}, "ternary": "ternary", "fp4": "fp4", "16": "bf16"}


def method_words(method: str, bits: int | float | str, *, block: int = 128, weight_only: bool = False) -> tuple[str, str]:
    """(weights word, activations word) of a method.

    `bits`: 1 … 8, 'ternary', 'fp4', or 16 for no quantization; `block`: rotation block, a power of two; `weight_only`
    leaves the activations in full precision. Raises UsageError naming quant.method, quant.bits or quant.block, the value
    and the choices.
    """
    if method not in METHODS:
        raise UsageError(unknown("quant.method", method, METHODS, what="method"))
    number = isinstance(bits, int | float) and not isinstance(bits, bool)
    text = f"{bits:g}" if number else str(bits)
    if text not in GRID_OF_BITS:
        raise UsageError(unknown("quant.bits", bits, GRID_OF_BITS))
    if not isinstance(block, int) or block < 2 or block & (block - 1):
        raise UsageError(f"quant.block: {block!r} is not a power of two from 2 on, such as 32, 64 or 128.")
    grid = GRID_OF_BITS[text]
    word = "bf16" if grid == "bf16" else METHODS[method].word(grid, block)
    return word, "bf16" if weight_only else word


def scheme_label(weights: QuantSpec, activations: QuantSpec) -> str:
    """Short name of a pair of specs, which groups runs: 'bf16', 'quest-w4a4', 'ste-w2a16', 'quest-fp4', 'quest-w4a4-2of4pairs'.

    A preset keeps its label with every rotation block. Pairs that are no preset are called by their words, so that two
    different pairs never share a label.
    """
    if weights.is_identity and activations.is_identity:
        return "bf16"
    sparsity = f"-{weights.sparsity.word}" if weights.sparsity else ""
    dense = replace(weights, sparsity=None)
    for name in METHODS:
        w, a = _bits_in(name, dense), _bits_in(name, activations)
        if w and a:
            return f"{name}-{w if w == a and not w.isdigit() else f'w{w}a{a}'}{sparsity}"
    words = str(weights), str(activations)
    return words[0] if words[0] == words[1] else "+".join(words)


def _bits_in(method: str, spec: QuantSpec) -> str | None:
    """The `bits` for which a method has this spec, at whatever block; None if it has none."""
    if spec.is_identity:
        return "16"
    bits = next((bits for bits, grid in GRID_OF_BITS.items() if grid == spec.grid.word), None)
    return bits if bits and METHODS[method].word(spec.grid.word, spec.rotation or 128) == str(spec) else None
