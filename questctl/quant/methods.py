"""Named methods (quest, lsq, …) as pairs of quantizer specs, and the short labels that group runs, such as quest-w4a4.

A method is only a name for the specs of weights and activations; everything that it does is in the components of its specs.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

from ..errors import UsageError, unknown
from .spec import QuantSpec

GRID_OF_BITS = {**{str(b): f"int{b}" for b in range(1, 9)}, "ternary": "ternary", "fp4": "fp4", "16": "bf16"}
LOW_BITS = tuple(bits for bits in GRID_OF_BITS if bits != "16")
SpecText = Callable[[str, int], str]  # grid, rotation block → spec


@dataclass(frozen=True)
class Method:
    """A method: what it does in one line, its source, its specs by grid and rotation block, and the `bits` it is made for."""

    summary: str
    source: str
    weights: SpecText
    activations: SpecText | None = None  # None: as the weights
    bits: tuple[str, ...] = LOW_BITS

    def specs(self, bits: str, block: int) -> tuple[str, str]:
        """The specs of weights and activations as text; `bits` is a key of GRID_OF_BITS."""
        grid = GRID_OF_BITS[bits]
        if grid == "bf16":
            return "bf16", "bf16"
        return self.weights(grid, block), (self.activations or self.weights)(grid, block)


def _quest(grid: str, block: int) -> str:
    return f"{grid}-h{block}-rms-{'clip1.3' if grid == 'int1' else 'trust'}"


def _paretoq(grid: str, block: int) -> str:
    """SEQ, α·(round(clip(w/α, ±.99)·n − s) + s)/n, in units of one level: n/α levels, clipped at .99·n of them.

    At 2 bits n = 2 and s = ½, and .99·n is 1.32 times the outermost level 1.5; for ternary weights n = 1.5 and s = 0. At 3 and
    4 bits the levels are those of LSQ, and at one bit they are α·sign(w).
    """
    clip = {"int2": "clip1.32", "ternary": "clip1.485"}.get(grid, "clip1")
    return f"{grid}-learned.r-{clip}"


METHODS: dict[str, Method] = {
    "quest": Method(
        "Hadamard rotation, Gaussian-optimal scale, gradient only where the rounding error is trusted (1 bit: clip at 1.3)",
        "Panferov et al. 2025, arXiv 2502.05003",
        _quest,
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
    "paretoq": Method(
        "weights alone, a learned step for each row: stretched levels (SEQ) at 2 bits and ternary, LSQ at 3 and 4, sign at 1",
        "Liu et al. 2025, arXiv 2502.02631",
        _paretoq,
        activations=lambda grid, block: "bf16",
        bits=("1", "2", "ternary", "3", "4"),
    ),
    "lsq-row": Method(
        "lsq with a learned step for each row of a weight; activations as lsq",
        "Esser et al. 2020, arXiv 1902.08153; rows as in arXiv 2502.02631",
        lambda grid, block: f"{grid}-learned.r-clip1",
        activations=lambda grid, block: f"{grid}-learned-clip1",
    ),
    "lsq+": Method(
        "learned steps as lsq; activations also have a learned offset",
        "Bhalgat et al. 2020, arXiv 2004.09576",
        lambda grid, block: f"{grid}-learned-clip1",
        activations=lambda grid, block: f"{grid}-learned.o-clip1",
    ),
    "pact": Method(
        "learned clipping value, moved by clipped inputs alone; here for weights too, as in the comparison of arXiv 2502.05003",
        "Choi et al. 2018, arXiv 1805.06085",
        lambda grid, block: f"{grid}-learned-pact",
    ),
    "adabin": Method(
        "two levels: weights at mean ± deviation of the row, activations around a learned centre",
        "Tu et al. 2022, arXiv 2208.08084",
        lambda grid, block: f"{grid}-meanstd-ste",
        activations=lambda grid, block: f"{grid}-learned.o-clip1",
        bits=("1",),
    ),
    "bitnet": Method(
        "BitNet b1.58: ternary weights scaled by the tensor's mean magnitude, 8-bit activations by the token's largest entry",
        "Ma et al. 2024, arXiv 2402.17764",
        lambda grid, block: f"{grid}-absmean.t-ste",
        activations=lambda grid, block: "sint8-absmax-ste",
        bits=("ternary",),
    ),
    "nupes": Method(
        "levels of a power, sign(x)·|x|^a, with the exponent that suits a normal row",
        "after Yvinec et al. 2023, arXiv 2308.05600, who learn the exponent of each layer",
        lambda grid, block: f"{grid.replace('int', 'power')}-rms-ste",
        bits=tuple(str(b) for b in range(3, 9)),
    ),
    "olive": Method(
        "an outlier takes the place of its neighbour; scale by search for the least error of each row",
        "Guo et al. 2023, arXiv 2304.07493",
        lambda grid, block: "olive4-mse-ste",
        bits=("4",),
    ),
    "quest-fp4": Method("quest on the FP4 grid", "Panferov et al. 2025, arXiv 2502.05003", _quest, bits=("fp4",)),
    "quest-sparse": Method(
        "quest with 2:4-sparse weights, by pairs; activations dense",
        "Panferov et al. 2025, arXiv 2502.05003",
        lambda grid, block: _quest(grid, block).replace("-rms-", "-rms-2of4pairs-"),
        activations=_quest,
    ),
    "mxfp4": Method(
        "FP4 with a power-of-two scale for 32 neighbours, gradient straight through",
        "OCP Microscaling Formats v1.0, 2023",
        lambda grid, block: f"{grid}-e8m0.g32-ste",
        bits=("fp4",),
    ),
    "nvfp4": Method(
        "FP4 with an E4M3 scale for 16 neighbours below one of the tensor, gradient straight through",
        "NVIDIA 2025, arXiv 2509.25149",
        lambda grid, block: f"{grid}-e4m3.g16-ste",
        bits=("fp4",),
    ),
    "nvfp4-2d": Method(
        "nvfp4 whose weights share scales in squares of 16 by 16, so that both passes of training multiply by the same weight",
        "NVIDIA 2025, arXiv 2509.25149",
        lambda grid, block: f"{grid}-e4m3.b16-ste",
        activations=lambda grid, block: f"{grid}-e4m3.g16-ste",
        bits=("fp4",),
    ),
    "bf16": Method("no quantization", "", lambda grid, block: "bf16"),
}


def method_specs(
    method: str, bits: int | float | str | None, *, block: int = 128, weight_only: bool = False
) -> tuple[str, str]:
    """The specs of weights and activations that a method stands for, as text.

    `bits` is 1 … 8, 'ternary', 'fp4', or 16 for no quantization; it may be None for a method that is made for one number of
    bits. `block` is the rotation block, a power of two; `weight_only` leaves the activations in full precision. Raises
    UsageError naming quant.method, quant.bits or quant.block, the value and the choices.
    """
    if not isinstance(method, str) or method not in METHODS:
        raise UsageError(_way_out_of_method(str(method)) or unknown("quant.method", method, METHODS, what="method"))
    made_for = METHODS[method].bits
    if bits is None and method != "bf16" and len(made_for) > 1:
        raise UsageError(f"quant.method: '{method}' needs quant.bits (--bits), such as {made_for[min(3, len(made_for) - 1)]}.")
    if bits is None:
        bits = made_for[0]
    number = isinstance(bits, int | float) and not isinstance(bits, bool)
    text = f"{bits:g}" if number else str(bits)
    if text not in GRID_OF_BITS:
        raise UsageError(_way_out_of_bits(METHODS[method], text, block) or unknown("quant.bits", bits, GRID_OF_BITS))
    if text not in (*made_for, "16"):
        raise UsageError(f"quant.bits: {text} is not what '{method}' is made for; choices: {', '.join((*made_for, '16'))}.")
    if not isinstance(block, int) or block < 2 or block & (block - 1):
        raise UsageError(f"quant.block: {block!r} is not a power of two from 2 on, such as 32, 64 or 128.")
    weights, activations = METHODS[method].specs(text, block)
    return weights, "bf16" if weight_only else activations


def _way_out_of_method(text: str) -> str:
    """A sentence for a text that is no method but a scheme, such as quest-w4a4, or a spec; '' for any other."""
    name, _, scheme = text.lower().rpartition("-")
    if match := _SCHEME.fullmatch(scheme):
        bits = match["w"] if match["w"] == match["a"] else scheme
        return f"quant.method: '{text}' is a scheme; write --quant {name if name in METHODS else 'quest'} --bits {bits}."
    try:
        QuantSpec.parse(text)
    except UsageError:
        return ""
    return f"quant.method: '{text}' is a spec; write --set quant.weights={text} --set quant.activations={text}."


def _way_out_of_bits(method: Method, text: str, block: int) -> str:
    """A sentence for bits that are written as a scheme (w4a4, w4a8) or with a word (int4, 4bit); '' for any other."""
    match, words = _SCHEME.fullmatch(text.lower()), ""
    if match and match["w"] == match["a"]:
        words = f"--bits {match['w']}"
    elif match and match["a"] == "16":
        words = f"--bits {match['w']} --set quant.weight_only=true"
    elif match and {match["w"], match["a"]} <= set(method.bits):
        w, a = method.specs(match["w"], block)[0], method.specs(match["a"], block)[1]
        words = f"--set quant.weights={w} --set quant.activations={a} without --quant and --bits"
    elif not text.startswith("-") and (worded := _WORDED_BITS.fullmatch(text.lower())):
        words = f"--bits {worded['bits']}"
    return f"quant.bits: '{text}' is not a number of bits; write {words}." if words else ""


_SCHEME = re.compile(r"w(?P<w>\d+)a(?P<a>\d+)")
_WORDED_BITS = re.compile(r"(?:int|w)?-?(?P<bits>[1-8]|16)(?:[- ]?bits?)?")


def scheme_label(weights: QuantSpec, activations: QuantSpec) -> str:
    """Short name of a pair of specs, which groups runs: 'bf16', 'quest-w4a4', 'ste-w2a16', 'quest-fp4', 'quest-w4a4-2of4pairs'.

    A method has the same label with every rotation block. The label of a method for a single number of bits leaves the bits
    out. Pairs that belong to no method are labelled by their text, so that two of them never share a label.
    """
    if weights.is_identity and activations.is_identity:
        return "bf16"
    sparsity = f"-{weights.sparsity.text}" if weights.sparsity else ""
    dense = replace(weights, sparsity=None)
    for name, method in METHODS.items():
        w, a = _bits_in(method, dense, 0), _bits_in(method, activations, 1)
        if w and a and w == a and len(method.bits) == 1:
            return name + sparsity
        if w and a:
            return f"{name}-{w if w == a and not w.isdigit() else f'w{w}a{a}'}{sparsity}"
    texts = str(weights), str(activations)
    return texts[0] if texts[0] == texts[1] else "+".join(texts)


_ROWS = re.compile(r"\+(?=[ehk])(?P<keys>e?h?(?:kv)?)\.(?P<spec>[^+]+)")  # of a label: `+eh.int4-h-rms-trust`


def rows_label(by_row: Mapping[str, QuantSpec]) -> str:
    """The part of a scheme's label on embedding, head and cache (e, h, kv), whatever the rotation's block; '' without any."""
    of_spec: dict[str, str] = {}
    for key, spec in by_row.items():
        text = re.sub(r"-h[0-9]+", "-h", str(spec))
        of_spec[text] = of_spec.get(text, "") + (key if key == "kv" else key[0])
    return "".join(f"+{keys}.{text}" for text, keys in of_spec.items())


def split_rows(label: str, blocks: Mapping[str, int] | None = None) -> tuple[str, dict[str, str]]:
    """A label without its part on embedding, head and cache, and their specs by key; the inverse of `rows_label`.

    `blocks` has the rotation block of each key; without it, the specs have no rotation, which takes no bits.
    """
    specs: dict[str, str] = {}
    for match in _ROWS.finditer(label):
        named = {"embedding": "e" in match["keys"], "head": "h" in match["keys"], "kv": "kv" in match["keys"]}
        for key in (key for key, has in named.items() if has):
            rotation = f"-h{blocks[key]}\\1" if blocks else ""
            specs[key] = re.sub(r"-h(\.\w+)?(?=-|$)", rotation, match["spec"])
    return _ROWS.sub("", label), specs


_BITS = r"int[1-8]|fp4|ternary|1\.58\d*|\d+"
_NAMES = "|".join(re.escape(name) for name in sorted(METHODS, key=len, reverse=True))
_LABEL = re.compile(
    rf"(?:(?P<method>{_NAMES})(?:-|$))?"
    rf"(?:(?P<both>{_BITS})|w-?(?P<w>{_BITS})(?P<sparse>sparse)?-?a-?(?P<a>{_BITS}))?"
    rf"(?:-(?P<suffix>{_NAMES}))?(?:-?(?P<mask>2of4\w*|sparse[\d.]+))?(?P<norot>-norot)?"
)


def label_specs(label: str, block: int) -> tuple[str, str] | None:
    """The specs of weights and activations that a label stands for, with rotation blocks of `block`; None if it is no label.

    This is the inverse of `scheme_label`. It also reads labels of other tables. Labels without a method mean quest: `4`, `fp4`,
    `w4a16`, `w-fp4-a-fp4`. `-norot` leaves the rotation out, and `w4sparse-a4` is `quest-sparse`, as in the published runs of
    arXiv 2502.05003.
    """
    low = label.lower()
    try:
        if match := _LABEL.fullmatch(low):
            specs = _specs_of_match(match, block)
        else:
            pair = low.split("+")
            specs = pair[0], pair[-1]
            if len(pair) > 2:
                return None
        return at_block(specs, block)
    except UsageError:
        return None


def _specs_of_match(match: re.Match[str], block: int) -> tuple[str, str]:
    method = match["method"] or match["suffix"] or ("quest-sparse" if match["sparse"] else "quest")
    w, a = (_bits_key(match[side] or match["both"]) for side in "wa")
    weights = method_specs(method, w, block=block)[0]
    activations = method_specs(method, a, block=block)[1]
    if match["mask"]:
        head, _, estimator = weights.rpartition("-")
        weights = f"{head}-{match['mask']}-{estimator}"
    if match["norot"]:  # without rotation the published one-bit runs clip at 1.25
        weights, activations = (re.sub(r"-h\d+", "", spec).replace("clip1.3", "clip1.25") for spec in (weights, activations))
    return weights, activations


def _bits_key(text: str | None) -> str | None:
    """The key of GRID_OF_BITS for the bits in a label: `int4` → 4, `1.585` → ternary."""
    return "ternary" if text and text.startswith("1.58") else text and text.removeprefix("int")


def at_block(specs: tuple[str, str], block: int) -> tuple[str, str]:
    """The specs of weights and activations in canonical form, with rotation blocks of `block`. Raises UsageError for others."""
    weights, activations = (re.sub(r"-h\d+", f"-h{block}", spec) for spec in specs)
    return str(QuantSpec.parse(weights)), str(QuantSpec.parse(activations, operand="activations"))


@lru_cache(maxsize=4096)
def _bits_in(method: Method, spec: QuantSpec, side: int) -> str | None:
    """The `bits` for which a method has this spec for weights (side 0) or activations (1), at any block; None without such."""
    if spec.is_identity:
        return "16"
    text, block = str(spec), spec.rotation or 128
    return next((bits for bits in method.bits if method.specs(bits, block)[side] == text), None)
