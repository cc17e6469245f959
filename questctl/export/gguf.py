"""The format `gguf`: one file for llama.cpp, written and read back with the `gguf` package.

    dense      f32, f16: every weight dequantized, in the basis of x; q8_0: the linear layers rounded once more, to 8 bits
    codes      block = d·k, whole k: the block formats hold the levels of the run exactly (check.py says which); only d, the
               scale in fp16, is rounded, by a relative error of at most 2⁻¹¹
    odd k      Q2_K, Q4_K, Q5_K store D·c·q − M·m with small whole c and m: c = 2, m = top and D = M = d give d·(2q − top).
               Q4_1 and Q5_1 store D·q + M in fp16, which is so up to the rounding of M

Blocks are written here from integers, since the package's own quantization would search for other scales. Rows of q and k are
reordered: llama.cpp rotates the pairs (2i, 2i + 1), the training the pairs (i, i + W/2).

N outputs, K inputs of a layer, H heads, W the width of one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from numpy.typing import NDArray

from ..config import ModelConfig, RunConfig
from ..data.tokenizers import Tokenizer
from ..errors import UsageError
from ..models.llama import Llama
from ..models.pretrained import halves, interleaved
from ..pretrained import gguf_name
from . import check
from .tokenizer import Vocabulary, chat_template, vocabulary
from .weights import Weight, block_floats, whole_numbers

FILE = "model.gguf"
FILE_TYPES = {  # all others are MOSTLY_ and their name
    "f32": "ALL_F32",
    "q3_k": "MOSTLY_Q3_K_S",
    "q4_k": "MOSTLY_Q4_K_S",
    "q5_k": "MOSTLY_Q5_K_S",
    "mxfp4": "MOSTLY_MXFP4_MOE",
}
Bytes = NDArray[np.uint8]


def write(
    folder: Path,
    model: Llama,
    config: RunConfig,
    weights: Mapping[str, Weight],
    dtype: str,
    tokenizer: Tokenizer | None,
    tables: Mapping[str, Weight] | None = None,
) -> None:
    """Write model.gguf. `model` has the dense weights; `dtype` comes from `check.check`.

    `tables` are the quantized embedding and head (`weights.tables`), which are written in the smallest block format that holds
    them exactly, and dense if none does.

    Raises UsageError for a layer whose rounded weights are on no grid, for scales beyond the range of fp16, and for a tokenizer
    that llama.cpp would not reproduce.
    """
    c = model.config
    family, words = gguf_family(c), vocabulary(tokenizer, c.vocab_size)
    writer = Writer(folder / FILE, family)
    writer.add_name(config.run_id)
    writer.add_description(f"questctl run {config.run_id}: weights {config.quant.weights}")
    writer.add_context_length(config.data.seq_len)
    writer.add_embedding_length(c.d_model)
    writer.add_block_count(c.n_layer)
    writer.add_feed_forward_length(c.d_ff)
    writer.add_head_count(c.n_head)
    writer.add_head_count_kv(c.kv_heads)
    if c.head_width:
        writer.add_key_length(c.head_width)
        writer.add_value_length(c.head_width)
    writer.add_layer_norm_rms_eps(c.norm_eps)
    writer.add_rope_dimension_count(c.width_of_head)
    writer.add_rope_freq_base(c.rope_theta)
    writer.add_vocab_size(c.vocab_size)
    kinds, coded = {}, {} if dtype in ("f32", "f16", "q8_0") else block_formats(weights, tables or {}, dtype)
    for name, parameter in model.state_dict().items():
        layer, value = name.removesuffix(".weight"), parameter.detach().float()
        turned = partial(interleaved, heads=heads) if (heads := permuted_heads(c, name)) else (lambda x: x)
        if layer in coded:
            stored, kind = coded[layer]
            raw = Kind[kind.upper()]
            if kind == check.MXFP4:
                codes, scales, _ = block_floats(layer, stored)
                data = mxfp4(turned(codes), turned(scales))
            else:
                k, d = whole_numbers(layer, stored)
                data = blocks(turned(k), turned(d), kind)
        else:
            kind = dtype if dtype in ("f16", "q8_0") and value.ndim > 1 else "f32"
            kind = "f16" if kind == "q8_0" and layer not in weights else kind  # embedding and head
            raw = Kind[kind.upper()]
            data = gguf.quants.quantize(turned(value).numpy(), raw)
        kinds[layer] = kind
        writer.add_tensor(gguf_name(name), data, raw_dtype=raw)
    most = max({kinds[n] for n in weights}, key=lambda kind: sum(kinds[n] == kind for n in weights))
    writer.add_file_type(gguf.LlamaFileType[FILE_TYPES.get(most, f"MOSTLY_{most.upper()}")])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    add_tokenizer(writer, words, chat_template(config))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def block_formats(weights: Mapping[str, Weight], tables: Mapping[str, Weight], dtype: str) -> dict[str, tuple[Weight, str]]:
    """The layers that are written as codes, each with its block format; embedding and head in the smallest that fits."""
    quantized = {layer: weight for layer, weight in weights.items() if not weight.layer.weights.is_identity}
    linear = {layer: (weight, check.gguf_type(layer, weight.layer, dtype)) for layer, weight in quantized.items()}
    fitting = {layer: (table, check.gguf_table(layer, table.layer)) for layer, table in tables.items()}
    return linear | {layer: (table, kind) for layer, (table, kind) in fitting.items() if kind is not None}


def gguf_family(model: ModelConfig) -> str:
    """The architecture in GGUF: a Mistral is a llama there."""
    family, _ = check.architecture_of(model)
    return "llama" if family == "mistral" else family


def permuted_heads(model: ModelConfig, name: str) -> int:
    """The heads whose rows are reordered in this tensor of ours: those of q and k of the architecture llama; else 0."""
    if gguf_family(model) != "llama" or not name.startswith("blocks.") or name.split(".")[2] not in ("q", "k"):
        return 0
    return model.n_head if name.split(".")[2] == "q" else model.kv_heads


def blocks(k: torch.Tensor, d: torch.Tensor, kind: str) -> Bytes:
    """k (N, K) and its scales d (N, G) → the bytes of a block format, (N, bytes of a row).

    Layouts: ggml-common.h of llama.cpp. Raises UsageError if a scale is beyond the range of fp16.
    """
    form, rows = check.GGUF_TYPES[kind], len(k)
    numbers = k.reshape(-1, form.block).numpy().astype(np.int16)
    scales = d.repeat_interleave(k.shape[1] // form.block // d.shape[1], dim=1).reshape(-1, 1)
    step = 2 * scales if kind in LINES else scales  # what is stored in fp16
    if not torch.allclose(step.to(torch.float16).float(), step, rtol=2**-10, atol=0.0):
        raise UsageError(f"gguf: {kind} keeps scales in fp16, which some of this run's leave; take f32.")
    if kind in LINES:
        parts = _line(step, form.top / 2, (numbers + form.top) // 2, kind)
    else:
        head = step.to(torch.float16).numpy().view(np.uint8)
        parts = LAYOUTS[kind](head, (numbers + form.top) // 2 if form.odd else numbers)
    return np.concatenate(parts, axis=-1).reshape(rows, -1)


def mxfp4(codes: torch.Tensor, scales: torch.Tensor) -> Bytes:
    """Codes of E2M1 (N, K) and their powers of two (N, K/32) → the bytes of MXFP4, (N, bytes of a row)."""
    exponent = (scales.log2() + 127).clamp(0, 254).to(torch.uint8).reshape(-1, 1)  # a block of zeros has the scale 0
    data = [exponent.numpy(), _fold(codes.reshape(-1, 32).numpy().astype(np.int16), 1, 2)]
    return np.concatenate(data, axis=-1).reshape(len(codes), -1)


def _fold(x: NDArray[np.int16], chunks: int, parts: int) -> Bytes:
    """Numbers of 8/parts bits, (n, m) → (n, m/parts) bytes: in each chunk, one part after the other from the low bits up."""
    pieces = x.reshape(len(x), chunks, parts, -1).astype(np.uint8)
    shifts = np.arange(parts, dtype=np.uint8).reshape(1, 1, parts, 1) * (8 // parts)
    return np.asarray(np.bitwise_or.reduce(pieces << shifts, axis=2).reshape(len(x), -1), dtype=np.uint8)


def _same(head: Bytes, *values: int) -> Bytes:
    """The same bytes for every block."""
    return np.tile(np.array(values, dtype=np.uint8), (len(head), 1))


# Blocks of odd k get q = (k + top)/2 ≥ 0, others k itself. Layouts: ggml-common.h and ggml-quants.c of llama.cpp.


def _q1_0(head: Bytes, q: NDArray[np.int16]) -> list[Bytes]:
    return [head, np.packbits(q.astype(np.uint8), axis=-1, bitorder="little")]


def _ternary(kind: str, head: Bytes, k: NDArray[np.int16]) -> list[Bytes]:
    """The package takes the largest magnitude, 1 here, as the scale, which is then replaced by the true one."""
    return [gguf.quants.quantize(k.astype(np.float32), Kind[kind.upper()])[:, :-2], head]


def _q2_k(head: Bytes, q: NDArray[np.int16]) -> list[Bytes]:
    return [_same(head, *[2 | 3 << 4] * 16), _fold(q, 2, 4), head, head]  # c = 2, m = 3


def _q3_k(head: Bytes, k: NDArray[np.int16]) -> list[Bytes]:
    q = k + 4  # 0 … 7; the scales 1 + 32 of 6 bits are split into low and high bits, too
    return [_fold(q >> 2, 1, 8), _fold(q & 3, 2, 4), _same(head, *[0x11] * 8, *[0xAA] * 4), head]


def _q4_0(head: Bytes, k: NDArray[np.int16]) -> list[Bytes]:
    return [head, _fold(k + 8, 1, 2)]


def _q4_k(head: Bytes, q: NDArray[np.int16]) -> list[Bytes]:
    return [head, head, _same(head, *[2] * 4, *[15] * 4, *[2 | 15 << 4] * 4), _fold(q, 4, 2)]  # c = 2, m = 15


def _q5_0(head: Bytes, k: NDArray[np.int16]) -> list[Bytes]:
    q = k + 16
    return [head, np.packbits((q >> 4).astype(np.uint8), axis=-1, bitorder="little"), _fold(q & 15, 1, 2)]


def _q5_k(head: Bytes, q: NDArray[np.int16]) -> list[Bytes]:
    scales = _same(head, *[2] * 4, *[31 | 1 << 6] * 4, *[2 | 15 << 4] * 4)  # c = 2, m = 31, of 6 bits each
    return [head, head, scales, _fold(q >> 4, 1, 8), _fold(q & 15, 4, 2)]


def _q6_k(head: Bytes, k: NDArray[np.int16]) -> list[Bytes]:
    q = k + 32
    return [_fold(q & 15, 2, 2), _fold(q >> 4, 2, 4), _same(head, *[1] * 16), head]


def _q8_0(head: Bytes, k: NDArray[np.int16]) -> list[Bytes]:
    return [head, k.astype(np.int8).view(np.uint8)]


LAYOUTS: dict[str, Callable[[Bytes, NDArray[np.int16]], list[Bytes]]] = {
    "q1_0": _q1_0,
    "tq1_0": partial(_ternary, "tq1_0"),
    "tq2_0": partial(_ternary, "tq2_0"),
    "q2_k": _q2_k,
    "q3_k": _q3_k,
    "q4_0": _q4_0,
    "q4_k": _q4_k,
    "q5_0": _q5_0,
    "q5_k": _q5_k,
    "q6_k": _q6_k,
    "q8_0": _q8_0,
}
LINES = ("q4_1", "q5_1")  # D·q + M


def _line(step: torch.Tensor, middle: float, q: NDArray[np.int16], kind: str) -> list[Bytes]:
    """The block D·q + M, D and M in fp16, that is nearest to step·(q − middle) over all q.

    The squared error of δD = D − step and δM = M + step·middle, a mean over the levels, is v·δD² + (middle·δD + δM)², v the
    variance of q. M = −middle·D, rounded, is best for each D, of which the nearest numbers are tried.
    """
    near = step.to(torch.float16)
    largest = torch.finfo(torch.float16).max
    choices = torch.cat([torch.nextafter(near, torch.full_like(near, to)) for to in (0.0, largest)] + [near], dim=1)
    least = (-middle * choices.double()).to(torch.float16)
    slope, rest = choices.double() - step, least.double() + middle * choices.double()
    error = ((2 * middle + 1) ** 2 - 1) / 12 * slope.square() + rest.square()
    best = error.argmin(dim=1, keepdim=True)
    pair = torch.cat([choices.gather(1, best), least.gather(1, best)], dim=1).numpy().view(np.uint8)
    high = [np.packbits((q >> 4).astype(np.uint8), axis=-1, bitorder="little")] if kind == "q5_1" else []
    return [pair, *high, _fold(q & 15, 1, 2)]


def add_tokenizer(writer: gguf.GGUFWriter, words: Vocabulary | None, template: str | None = None) -> None:
    """Add a vocabulary and its chat template, or the note `no_vocab` without a vocabulary."""
    if words is None:
        writer.add_tokenizer_model("no_vocab")
        return
    kinds = gguf.TokenType
    types = [kinds.NORMAL] * len(words.tokens)
    for ids, kind in ((words.unused, kinds.UNUSED), (words.added, kinds.USER_DEFINED), (words.special, kinds.CONTROL)):
        for i in ids:
            types[i] = kind
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(words.pre)
    writer.add_token_list(words.tokens)
    writer.add_token_types(types)
    writer.add_key_value(gguf.Keys.Tokenizer.MERGES, words.merges, gguf.GGUFValueType.ARRAY)
    writer.add_eos_token_id(words.end)
    writer.add_add_bos_token(False)
    if template:
        writer.add_chat_template(template)


class Writer(gguf.GGUFWriter):
    """The package's writer, which also writes an array without strings: a byte tokenizer has no merges."""

    def _pack_val(self, val: Any, vtype: Any, add_vtype: bool, *more: Any, **named: Any) -> bytes:
        if vtype != gguf.GGUFValueType.ARRAY or len(val):
            packed: bytes = super()._pack_val(val, vtype, add_vtype, *more, **named)
            return packed
        head = self._pack("I", vtype) if add_vtype else b""
        return bytes(head + self._pack("I", gguf.GGUFValueType.STRING) + self._pack("Q", 0))


def read(folder: Path, model: Llama) -> Llama:
    """Read model.gguf into a network of plain linear layers like `model`, dequantized by the gguf package."""
    state: dict[str, torch.Tensor] = {}
    tensors = {t.name: t for t in gguf.GGUFReader(folder / FILE).tensors}
    for name in model.state_dict():
        tensor = tensors[gguf_name(name)]
        value: Any = torch.from_numpy(_values(tensor))
        heads = permuted_heads(model.config, name)
        state[name] = halves(value, heads) if heads else value
    with torch.device("meta"):
        plain = Llama(model.config)
    plain.load_state_dict(state, assign=True)
    return plain


def _values(tensor: Any) -> NDArray[np.float32]:
    """The values of a tensor by the package; of Q1_0 the package knows only the size."""
    if tensor.tensor_type != Kind.Q1_0:
        return np.array(gguf.quants.dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
    form = check.GGUF_TYPES["q1_0"]
    data = tensor.data.reshape(-1, form.size)
    signs = 2.0 * np.unpackbits(data[:, 2:], axis=-1, bitorder="little") - 1
    values = signs * np.ascontiguousarray(data[:, :2]).view(np.float16).astype(np.float32)
    return np.asarray(values.reshape(len(tensor.data), -1), dtype=np.float32)


def sizes(folder: Path) -> dict[str, int]:
    """The size in bytes of each tensor."""
    return {t.name: int(t.n_bytes) for t in gguf.GGUFReader(folder / FILE).tensors}
