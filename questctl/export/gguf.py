"""The format `gguf`: one file for llama.cpp, written and read back with the `gguf` package.

    dense      f32, f16: every weight dequantized, in the basis of x; q8_0: the linear layers rounded once more, to 8 bits
    codes      block = d·k, whole k: TQ1_0, TQ2_0, Q4_0, Q5_0, Q8_0 hold the levels of the run exactly (check.py says which);
               only d, the scale in fp16, is rounded, by a relative error of at most 2⁻¹¹

Blocks are written here from integers, since the package's own quantization would search for other scales. Rows of q and k are
reordered: llama.cpp rotates the pairs (2i, 2i + 1), the training the pairs (i, i + W/2).

N outputs, K inputs of a layer, H heads, W the width of one.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from numpy.typing import NDArray

from ..config import ModelConfig, RunConfig
from ..data.tokens import Meta
from ..errors import UsageError
from ..models.llama import Llama
from ..models.pretrained import halves, interleaved
from ..pretrained import gguf_name
from . import check
from .tokenizer import byte_characters
from .weights import Weight, whole_numbers

FILE = "model.gguf"
NEVER_IN_TEXT = "þ ÿ"  # a list of merges is required; this one, of the bytes FE and FF, never applies to UTF-8
FILE_TYPES = {
    "f32": "ALL_F32",
    "f16": "MOSTLY_F16",
    "q8_0": "MOSTLY_Q8_0",
    "q4_0": "MOSTLY_Q4_0",
    "q5_0": "MOSTLY_Q5_0",
    "tq1_0": "MOSTLY_TQ1_0",
    "tq2_0": "MOSTLY_TQ2_0",
}
Bytes = NDArray[np.uint8]


def write(folder: Path, model: Llama, config: RunConfig, weights: Mapping[str, Weight], dtype: str, meta: Meta) -> None:
    """Write model.gguf. `model` has the dense weights; `dtype` comes from `check.check`.

    Raises UsageError for a layer whose rounded weights are on no grid, and for scales beyond the range of fp16.
    """
    c = model.config
    family = gguf_family(c)
    writer = gguf.GGUFWriter(folder / FILE, family)
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
    kinds = {}
    for name, parameter in model.state_dict().items():
        layer, value = name.removesuffix(".weight"), parameter.detach().float()
        weight = weights.get(layer)
        turned = partial(interleaved, heads=heads) if (heads := permuted_heads(c, name)) else (lambda x: x)
        if weight is not None and dtype not in ("f32", "f16", "q8_0") and not weight.layer.weights.is_identity:
            kind = check.gguf_type(layer, weight.layer, dtype)
            k, d = whole_numbers(layer, weight)
            data, raw = blocks(turned(k), turned(d), kind), Kind[kind.upper()]
        else:
            kind = dtype if dtype in ("f16", "q8_0") and value.ndim > 1 else "f32"
            kind = "f16" if kind == "q8_0" and weight is None else kind  # embedding and head
            raw = Kind[kind.upper()]
            data = gguf.quants.quantize(turned(value).numpy(), raw)
        kinds[layer] = kind
        writer.add_tensor(gguf_name(name), data, raw_dtype=raw)
    most = max({kinds[n] for n in weights}, key=lambda kind: sum(kinds[n] == kind for n in weights))
    writer.add_file_type(gguf.LlamaFileType[FILE_TYPES[most]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    add_tokenizer(writer, meta, c.vocab_size)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


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
    size, rows = check.GGUF_TYPES[kind].block, len(k)
    numbers = k.reshape(-1, size).numpy().astype(np.int16)
    scales = d.repeat_interleave(k.shape[1] // size // d.shape[1], dim=1).reshape(-1, 1)
    half = scales.to(torch.float16)
    if not torch.allclose(half.float(), scales, rtol=2**-10, atol=0.0):
        raise UsageError(f"gguf: {kind} keeps scales in fp16, which some of this run's leave; take f32.")
    head = half.numpy().view(np.uint8)
    if kind == "q8_0":
        parts = [head, numbers.astype(np.int8).view(np.uint8)]
    elif kind == "q4_0":
        parts = [head, _nibbles(numbers + 8)]
    elif kind == "q5_0":
        stored = numbers + 16
        parts = [head, np.packbits((stored >> 4).astype(np.uint8), axis=-1, bitorder="little"), _nibbles(stored & 15)]
    else:  # ternary: the package takes the largest magnitude, 1 here, as the scale, which is then replaced by the true one
        data = gguf.quants.quantize(numbers.astype(np.float32), Kind[kind.upper()])
        parts = [data[:, :-2], head]
    return np.concatenate(parts, axis=-1).reshape(rows, -1)


def _nibbles(numbers: NDArray[np.int16]) -> Bytes:
    """Pack numbers 0 … 15, (n, 32) → (n, 16) bytes: the first half in the low bits, the second half in the high bits."""
    low, high = np.split(numbers.astype(np.uint8), 2, axis=-1)
    return np.asarray(low | high << 4, dtype=np.uint8)


def add_tokenizer(writer: gguf.GGUFWriter, meta: Meta, vocabulary: int) -> None:
    """Add the byte tokenizer as a byte-level BPE without merges. Other tokenizers cannot be expressed here (`no_vocab`)."""
    if meta.tokenizer != "byte":
        writer.add_tokenizer_model("no_vocab")
        return
    assert vocabulary == 256
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(byte_characters())
    writer.add_token_types([gguf.TokenType.CONTROL, *[gguf.TokenType.NORMAL] * 255])
    writer.add_token_merges([NEVER_IN_TEXT])
    writer.add_eos_token_id(0)
    writer.add_add_bos_token(False)


def read(folder: Path, model: Llama) -> Llama:
    """Read model.gguf into a network of plain linear layers like `model`, dequantized by the gguf package."""
    state: dict[str, torch.Tensor] = {}
    tensors = {t.name: t for t in gguf.GGUFReader(folder / FILE).tensors}
    for name in model.state_dict():
        tensor = tensors[gguf_name(name)]
        value: Any = torch.from_numpy(np.array(gguf.quants.dequantize(tensor.data, tensor.tensor_type), dtype=np.float32))
        heads = permuted_heads(model.config, name)
        state[name] = halves(value, heads) if heads else value
    with torch.device("meta"):
        plain = Llama(model.config)
    plain.load_state_dict(state, assign=True)
    return plain


def sizes(folder: Path) -> dict[str, int]:
    """The size in bytes of each tensor."""
    return {t.name: int(t.n_bytes) for t in gguf.GGUFReader(folder / FILE).tensors}
