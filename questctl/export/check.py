"""The parts of a run that each format can carry, from the config alone; other runs are refused before torch is imported.

The stored values of a layer are s·q (+ b), with q on the grid of its spec. Integer formats hold d·k with whole k in a range. A
grid therefore fits if some multiple of it is whole: for half-integer levels (`int<b>`) k = 2q is odd and d = s/2, which takes
one more bit.

| grid       | multiple | k                     | compressed-tensors | gguf, whole blocks of 32 | of 256                  |
|------------|----------|-----------------------|--------------------|--------------------------|-------------------------|
| `int1`     | 2        | ±1                    | 2 bits             | Q4_0                     | TQ2_0, TQ1_0, Q1_0      |
| `int2`     | 2        | odd, to ±3            | 3 bits             | Q4_0                     | Q2_K; pruned Q3_K       |
| `int3`     | 2        | odd, to ±7            | 4 bits             | Q4_0                     | Q4_0                    |
| `int4`     | 2        | odd, to ±15           | 5 bits             | Q4_1; pruned Q5_0        | Q4_K; pruned Q5_0       |
| `int5`     | 2        | odd, to ±31           | 6 bits             | Q5_1; pruned Q8_0        | Q5_K; pruned Q6_K       |
| `int<b>`   | 2        | odd, to ±(2^b − 1)    | b + 1 ≤ 8 bits     | Q8_0 to b = 7            | Q8_0 to b = 7           |
| `ternary`  | 1        | −1, 0, 1              | 2 bits             | Q4_0                     | TQ2_0, TQ1_0            |
| `sint<b>`  | 1        | to ±(2^(b−1) − 1)     | b bits             | Q4_0, Q5_0, Q8_0         | Q3_K to b = 3, Q6_K     |

A pruned value is k = 0, which formats of odd k lack: they store d·(2q − top), q ≥ 0, as a step and a smallest value. A value
with an offset is no whole multiple of a step.

FP4 has formats of its own if its scales are of their kinds: `fp4-e4m3.g16` is NVFP4 and `fp4-e8m0.g32` MXFP4 in
compressed-tensors, the latter also in gguf.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from ..config import ModelConfig, RunConfig
from ..errors import UsageError, unknown
from ..quant.grids import FP4, Int, SInt, Ternary
from ..quant.layer_specs import layer_specs, layer_widths
from ..quant.rotations import Hadamard
from ..quant.scales import E4M3, E8M0
from ..quant.spec import QuantSpec
from .formats import FORMATS


@dataclass(frozen=True)
class Layer:
    """One linear layer as it is stored: y = Q(x)·storedᵀ, where x is rotated first if `rotates` says so."""

    weights: QuantSpec
    activations: QuantSpec
    width: int  # K
    rotates: Hadamard | None  # the basis of the stored weight, into which x has to be rotated; None: the basis of x


@dataclass(frozen=True)
class GGUFType:
    """A block format of whole numbers: `block` neighbours share one scale, and |k| ≤ top is stored exactly, or only odd k."""

    block: int
    size: int  # bytes of a block
    top: int
    odd: bool = False

    @property
    def bits(self) -> float:
        """Bits per value, scales included."""
        return 8 * self.size / self.block


GGUF_TYPES = {  # ggml-common.h of llama.cpp
    "q1_0": GGUFType(128, 18, 1, odd=True),
    "tq1_0": GGUFType(256, 54, 1),
    "tq2_0": GGUFType(256, 66, 1),
    "q2_k": GGUFType(256, 84, 3, odd=True),
    "q3_k": GGUFType(256, 110, 3),
    "q4_0": GGUFType(32, 18, 7),
    "q4_k": GGUFType(256, 144, 15, odd=True),
    "q4_1": GGUFType(32, 20, 15, odd=True),
    "q5_0": GGUFType(32, 22, 15),
    "q5_k": GGUFType(256, 176, 31, odd=True),
    "q5_1": GGUFType(32, 24, 31, odd=True),
    "q6_k": GGUFType(256, 210, 31),
    "q8_0": GGUFType(32, 34, 127),
}
MXFP4 = "mxfp4"  # blocks of 32 FP4 with an exponent, 4.25 bits
# Candidates of `exact`. Left out: q1_0, which older runtimes and the package gguf cannot read, and tq1_0, slow to unpack.
EXACT = sorted(GGUF_TYPES.keys() - {"q1_0", "tq1_0"}, key=lambda kind: (GGUF_TYPES[kind].bits, GGUF_TYPES[kind].block))


def layers(config: RunConfig) -> dict[str, Layer]:
    """Every linear layer by its name, as the run's weights are stored or can be recovered.

    Weights that were rounded after training are rounded in the basis of their spec, whether or not the inputs are rotated; so
    are those of a model that began with a checkpoint. In other training, a rotated weight with inputs in full precision is a
    rotated parametrisation: x is not rotated for it.
    """
    widths = layer_widths(config.model)
    return {
        name: Layer(w, a, widths[name], a.basis or (w.basis if config.ptq or config.rotate_back else None))
        for name, (w, a) in layer_specs(widths, config.quant).items()
    }


ARCHITECTURES = {  # model.family → class in transformers, the biases, q/k norms and windows that it can have
    "llama": ("LlamaForCausalLM", ("none", "qkvo"), False, False),
    "mistral": ("MistralForCausalLM", ("none",), False, True),
    "qwen2": ("Qwen2ForCausalLM", ("qkv",), False, True),
    "qwen3": ("Qwen3ForCausalLM", ("none", "qkvo"), True, True),
}


def architecture_of(model: ModelConfig) -> tuple[str, str]:
    """The family and the class of transformers under which a model is written: its own, or the first with all its features.

    Raises UsageError if there is none.
    """
    for family in dict.fromkeys((model.family, *ARCHITECTURES)):
        name, biases, norm, window = ARCHITECTURES[family]
        if model.bias in biases and model.qk_norm == norm and (window or not model.window):
            return family, name
    has = f"model.bias={model.bias}, model.qk_norm={str(model.qk_norm).lower()}, model.window={model.window}"
    raise UsageError(f"export: no architecture of {', '.join(ARCHITECTURES)} has {has} together.")


def _check_model(model: ModelConfig, format: str) -> None:
    """Raises UsageError for a model that the format does not carry."""
    family, name = architecture_of(model)
    if format == "hf" and (model.bias != "none" or model.qk_norm or model.window):
        raise UsageError(f"hf: carries no biases, q/k norms and windows, as {name} has; take hf-dense or compressed-tensors.")
    if format == "gguf" and (model.bias == "qkvo" or model.window or model.rope_scaling):
        what = "a bias of o" if model.bias == "qkvo" else "a window" if model.window else f"rope_scaling {model.rope_scaling}"
        raise UsageError(f"gguf: {what} is not written for {family}; take hf-dense.")


def whole(spec: QuantSpec) -> tuple[int, int] | None:
    """(multiple, top) such that multiple·q are whole numbers up to ±top; None if there is no such multiple."""
    if spec.scale is None or spec.scale.centred:
        return None
    if isinstance(spec.grid, Int):
        return 2, 2**spec.grid.b - 1
    return (1, int(spec.grid.top)) if isinstance(spec.grid, SInt | Ternary) else None


BLOCK_FLOATS = {"nvfp4": (E4M3, 16), "mxfp4": (E8M0, 32)}  # the scales of FP4, and how many neighbours share one


def block_float(spec: QuantSpec) -> str:
    """The format of blocks of FP4 that this spec is: nvfp4, mxfp4, or "" for any other."""
    if not isinstance(spec.grid, FP4) or spec.sparsity or spec.scale is None:
        return ""
    names = (name for name, (scale, group) in BLOCK_FLOATS.items() if (type(spec.scale), spec.scale.group) == (scale, group))
    return next(names, "")


def signed_bits(top: int) -> int:
    """The smallest width of a two's complement integer that holds ±top."""
    return top.bit_length() + 1


def check(config: RunConfig, format: str, dtype: str | None = None) -> str:
    """The `dtype` to write. Raises UsageError for an unknown format or dtype, and for a run that the format cannot carry."""
    if format not in FORMATS:
        raise UsageError(unknown("--format", format, FORMATS, what="format"))
    choices = FORMATS[format].dtypes
    floats = format == "compressed-tensors" and any(block_float(layer.weights) for layer in layers(config).values())
    dtype = dtype or ("bf16" if floats else choices[0])
    if floats and dtype == "fp32":
        raise UsageError("compressed-tensors: the package unpacks blocks of FP4 to bf16 alone; take --dtype bf16.")
    if dtype not in choices:
        raise UsageError(unknown("--dtype", dtype, choices, what=f"number format of {format}"))
    _check_model(config.model, format)
    if format == "compressed-tensors":
        _check_compressed_tensors(config)
    if format == "gguf" and dtype not in ("f32", "f16"):
        _check_gguf(config, dtype)
    return dtype


def lost_inputs(config: RunConfig) -> str | None:
    """A sentence on quantized inputs and cache, which formats of only weights leave out; None if the run has none."""
    counts = Counter(str(layer.activations) for layer in layers(config).values() if not layer.activations.is_identity)
    listed = ", ".join(f"{spec} in {n} layers" for spec, n in counts.items())
    lost = [f"the inputs of its layers ({listed})"] if counts else []
    lost += [] if config.quant.kv.is_identity else [f"keys and values ({config.quant.kv})"]
    if not lost:
        return None
    return f"The run quantizes {' and '.join(lost)}; this format does not: there they stay in full precision."


VLLM_BITS = {"a CPU": (4,), "CUDA": (4, 8)}  # device → the widths of packed integers that vLLM 0.32 has kernels for


def _kernels() -> str:
    return "kernels for " + " and ".join(f"{' and '.join(map(str, n))} bits on {device}" for device, n in VLLM_BITS.items())


def _check_compressed_tensors(config: RunConfig) -> None:
    quantized = {name: layer for name, layer in layers(config).items() if not layer.weights.is_identity}
    if not quantized:
        raise UsageError("compressed-tensors: the run's weights are not quantized in its blocks; take hf-dense.")
    instead = "take hf or hf-dense"
    for name, layer in quantized.items():
        where = f"compressed-tensors: layer {name}: '{layer.weights}'"
        fits = (1, 1) if block_float(layer.weights) else whole(layer.weights)
        if fits is None:
            raise UsageError(f"{where} is no multiple of whole numbers, nor NVFP4 or MXFP4: no such format; {instead}.")
        if signed_bits(fits[1]) > 8:
            bits = f"integers of {signed_bits(fits[1])} bits"
            raise UsageError(f"{where} takes {bits}; the format ends at 8, and vLLM has {_kernels()}; {instead}.")
        if layer.rotates is not None and layer.rotates.variant:
            raise UsageError(f"{where} is rotated with random signs, which the format's Hadamard transform lacks; {instead}.")


def in_vllm(config: RunConfig, dtype: str) -> list[str]:
    """What vLLM does with a compressed-tensors export, as sentences by width and device."""
    quantized = [layer for layer in layers(config).values() if not layer.weights.is_identity]
    if any(block_float(layer.weights) for layer in quantized):
        return ["Blocks of FP4 have been read back by compressed-tensors alone, in bf16, and not been tried in vLLM."]
    grids = [whole(layer.weights) for layer in quantized]
    widths = sorted({signed_bits(fits[1]) for fits in grids if fits})
    runs = [device for device, bits in VLLM_BITS.items() if set(widths) <= set(bits)]
    stored = f"integers of {' and '.join(map(str, widths))} bits"
    if not runs:
        return [f"vLLM refuses these {stored}, since it has {_kernels()}; transformers unpacks them."]
    rotated = any(layer.rotates for layer in quantized)
    devices = [device for device in runs if not (rotated and device == "a CPU")]
    lines = [f"vLLM runs these {stored} on {' and '.join(devices)}." if devices else f"vLLM runs these {stored} nowhere."]
    if rotated:
        lines.append("vLLM rotates inputs by the package hadacore: on CUDA alone, in bf16 or fp16, without tensor parallelism.")
    if dtype == "fp32":
        lines.append("Its kernels multiply in bf16 or fp16, and on a CPU it stops at fp32: export with --dtype bf16 for it.")
    return lines


def _check_gguf(config: RunConfig, dtype: str) -> None:
    for name, layer in layers(config).items():
        block = GGUF_TYPES["q8_0"].block
        if dtype == "q8_0" and layer.width % block:
            raise UsageError(f"gguf: layer {name}: the width {layer.width} is no multiple of {block}; take f16 or f32.")
        if dtype != "q8_0" and not layer.weights.is_identity:
            gguf_type(name, layer, dtype)
    if dtype != "q8_0" and all(layer.weights.is_identity for layer in layers(config).values()):
        raise UsageError(
            f"gguf: the run's weights are not quantized in its blocks: nothing is left for {dtype}; take f32, f16 or q8_0."
        )


def gguf_table(name: str, layer: Layer) -> str | None:
    """The block format that holds a quantized embedding or head exactly, the smallest that fits; None if none does."""
    try:
        return gguf_type(name, layer, "exact")
    except UsageError:
        return None


def gguf_type(name: str, layer: Layer, dtype: str) -> str:
    """The block format that holds the layer's quantized weight exactly, except for the scale, which is rounded to fp16.

    `dtype` names the format, or `exact` the smallest that fits. Raises UsageError if none does.
    """
    spec, where = layer.weights, f"gguf: layer {name}: '{layer.weights}'"
    if spec.basis is not None:
        raise UsageError(
            f"{where} was trained with a rotation, which {dtype} cannot carry: llama.cpp rotates nothing; take f32, f16 or "
            "q8_0, which hold dequantized weights."
        )
    fits, float_format = whole(spec), block_float(spec)
    if MXFP4 in (float_format, dtype):
        if float_format == MXFP4 and dtype in ("exact", MXFP4):
            return MXFP4
        raise UsageError(f"{where} does not fit into {dtype}: mxfp4 and fp4-e8m0.g32 hold each other alone; take f32 or f16.")
    if fits is None or spec.scale is None:
        raise UsageError(f"{where} is no multiple of whole numbers, which is all that {dtype} can hold; take f32, f16 or q8_0.")

    def holds(kind: str) -> bool:
        t, group = GGUF_TYPES[kind], spec.scale.group if spec.scale else 0
        values = fits[1] <= t.top and not (t.odd and (fits[0] != 2 or spec.sparsity))
        return values and layer.width % t.block == 0 and group % t.block == 0

    exact = [kind for kind in EXACT if holds(kind)]
    if dtype == "exact" and exact:
        return exact[0]
    if dtype != "exact" and holds(dtype):
        return dtype
    shared = f", scales of {spec.scale.group} neighbours" if spec.scale.group else ""
    instead = f"--dtype exact takes {exact[0]}" if exact else "take f32 or f16"
    raise UsageError(f"{where} (integers to ±{fits[1]}, width {layer.width}{shared}) does not fit into {dtype}; {instead}.")
