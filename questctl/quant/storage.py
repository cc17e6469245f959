"""The size of a model's file: the tensors in which quantized layers are stored, and the bytes of the whole file.

    file = codes + steps + what is not quantized, at 16 bits + tokenizer + names and shapes

The file is the `hf` export in bf16, counted from the config alone. It includes embedding, head, norms and scales, which
`model_bits`, the axis of laws, leaves out. Embedding and head are stored as layers are, if they are quantized. With entropy
coding, each code of a layer takes H(q) bits, where q is a standard normal rounded to the layer's grid; any arithmetic coder
reaches this.

N outputs, K inputs of a layer.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import NamedTuple

from ..config import ModelConfig, QuantConfig
from .layer_specs import layer_shapes, layer_specs
from .spec import QuantSpec

NAME_BYTES = 105  # of one tensor's entry in the header of a safetensors file: name, type, shape and place
SIXTEEN = 2  # bytes of a value in bf16


class Stored(NamedTuple):
    """A stored tensor: uint8 or fp32, and its shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Its size."""
        return math.prod(self.shape) * (1 if self.dtype == "uint8" else 4)


def code_bits(spec: QuantSpec, width: int) -> int:
    """Bits per code: as many as the levels need, up to 4; 8 for more levels and where a row of `width` fills no whole bytes."""
    bits = (len(spec.grid.levels) - 1).bit_length()
    return bits if 1 <= bits <= 4 and width % (8 // (bits & -bits)) == 0 else 8


def tensors_of(spec: QuantSpec, rows: int, width: int, *, keep: bool) -> dict[str, Stored]:
    """The tensors of a quantized weight (N, K): `codes`, `steps`, and `offsets` and `keep` where it has them.

    `steps` are fp32 of shape (N), (N, groups) or (1). `keep` has a bit for each value, for grids without 0 of which some values
    were pruned.
    """
    assert spec.scale is not None
    groups = width // spec.scale.group if spec.scale.group else 0
    one = spec.scale.learned or spec.scale.variant == "t"
    scales = Stored("float32", (1,) if one else (rows, groups) if groups else (rows,))
    tensors = {"codes": Stored("uint8", (rows, width * code_bits(spec, width) // 8)), "steps": scales}
    if spec.scale.centred:
        tensors["offsets"] = scales
    if keep:
        tensors["keep"] = Stored("uint8", (rows, width // 8))
    return tensors


def weight_bytes(spec: QuantSpec, rows: int, width: int, *, coded: bool = False) -> float:
    """Bytes of a quantized weight (N, K); entropy codes (`ec2.5`), and with `coded` all codes, count at their entropy."""
    tensors = tensors_of(spec, rows, width, keep=_keeps(spec))
    sizes = {key: float(tensor.bytes) for key, tensor in tensors.items()}
    if spec.grid.coded:
        sizes["codes"] = rows * width * spec.grid.bits / 8
    elif coded:
        sizes |= {"codes": rows * width * entropy(spec) / 8, "keep": 0.0}
    return sum(sizes.values())


def _keeps(spec: QuantSpec) -> bool:
    """Whether a stored weight has a bit for each value that says whether it was pruned."""
    return bool(spec.sparsity) and 0 not in spec.grid.levels


def artifact_bytes(model: ModelConfig, quant: QuantConfig, tokenizer: str, *, coded: bool = False) -> float:
    """Bytes of the file that a runtime loads of such a model, its tokenizer included; NaN while its vocabulary is not known.

    With `coded`, weights are counted with entropy coding. Grids that are entropy codes (`ec2.5`) always are. Results are
    cached, because thousands of runs share a few models.
    """
    if not model.vocab_size:
        return math.nan
    key = f"{model.model_dump_json()}{quant.model_dump_json()}{tokenizer}{coded}"
    if key not in _COUNTED:
        if len(_COUNTED) == MOST_COUNTED:
            _COUNTED.clear()
        _COUNTED[key] = _count(model, quant, tokenizer, coded)
    return _COUNTED[key]


_COUNTED: dict[str, float] = {}
MOST_COUNTED = 4096


def _count(model: ModelConfig, quant: QuantConfig, tokenizer: str, coded: bool) -> float:
    """`artifact_bytes` of a model whose vocabulary is known."""
    shapes, table = layer_shapes(model), (model.vocab_size, model.d_model)
    specs = layer_specs({name: k for name, (_, k) in shapes.items()}, quant)
    weights = {name: w for name, (w, _) in specs.items() if not w.is_identity}
    plain = model.params_non_embedding - sum(math.prod(shapes[name]) for name in weights)
    wide = [
        name for name, (w, a) in specs.items() if w.is_identity and not a.is_identity
    ]  # kept in fp32 for their quantized inputs
    count = 1 + model.n_layer * (2 + 2 * model.qk_norm + len(model.biased)) + len(shapes) - len(weights)
    for name, spec in (("embed", quant.embedding), *([] if model.tied else [("head", quant.head)])):
        shapes[name] = table
        if spec.is_identity:
            plain, count = plain + math.prod(table), count + 1
        else:
            weights[name] = spec
    total: float = SIXTEEN * (sum(math.prod(shapes[name]) for name in wide) + plain)
    for name, w in weights.items():
        n, k = shapes[name]
        total += weight_bytes(w, n, k, coded=coded)
        count += len(tensors_of(w, n, k, keep=_keeps(w)))
    learned = sum(1 + a.scale.centred for _, a in specs.values() if a.scale is not None and a.scale.learned)
    return total + 4 * learned + NAME_BYTES * (count + learned) + tokenizer_bytes(tokenizer, model.vocab_size)


def tokenizer_bytes(name: str, vocab: int) -> float:
    """Estimated bytes of tokenizer.json: 0 for bytes or an unknown tokenizer, else tokens and merges of about log V letters.

    Measured on `bpe:512` and `bpe:4096` of Python sources: 17.5 and 26.2 bytes an id.
    """
    return 0.0 if name in ("byte", "none") or vocab < 2 else vocab * max(17.5 + 2.9 * math.log2(vocab / 512), 10.0)


def entropy(spec: QuantSpec) -> float:
    """H(q) in bits per weight: the levels of a standard normal, rounded to the grid at its best scale, with the mask's bits."""
    levels = [level * spec.grid.unit for level in spec.grid.levels]
    edges = [-math.inf, *((a + b) / 2 for a, b in pairwise(levels)), math.inf]
    below = [0.5 * (1 + math.erf(edge / math.sqrt(2))) for edge in edges]
    shares = [high - low for low, high in pairwise(below)]
    bits = -sum(p * math.log2(p) for p in shares if p > 0)
    return spec.sparsity.bits(bits) if spec.sparsity else bits
