"""Recognise files by their first bytes: layouts of token files, and formats that are mistaken for text or token ids.

    flat                 ids and nothing else (nanoGPT, QuEST): uint16 unless the source or a meta.json says otherwise
    llm.c                a header of 256 int32 (magic 20240520: uint16 ids; 20240801: uint32 ids), then the ids
    .npy                 an array of uint8, uint16, uint32, int16 or int32, in C order
    Megatron             a flat .bin with the type of its ids in the .idx beside it

A flat file does not say how wide its ids are. If nothing else says it, the assumed width is compared with the look of the
numbers, because ids of a wrong width train without an error.
"""

from __future__ import annotations

import codecs
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import DataError

LLM_C = {20240520: "uint16", 20240801: "uint32"}  # magic → type of the ids
LLM_C_HEADER = 1024  # bytes
MEGATRON = b"MMIDIDX\x00\x00"
MEGATRON_TYPES = {1: "uint8", 3: "uint16", 4: "uint32", 8: "uint16"}  # int16 and int32 of ids, none negative, read alike
NPY = b"\x93NUMPY"
NPY_TYPES = {"|u1": "uint8", "<u2": "uint16", "<u4": "uint32", "<i2": "uint16", "<i4": "uint32"}
MAGIC = {
    b"\x1f\x8b": "gzip data",
    b"\x28\xb5\x2f\xfd": "zstd data",
    b"BZh": "bzip2 data",
    b"\xfd7zXZ": "xz data",
    b"PK\x03\x04": "a zip archive (.npz, .docx, a PyTorch file)",
    b"PAR1": "a Parquet file",
    b"ARROW1": "an Arrow file",
    NPY: "a NumPy array",
    MEGATRON: "the index of Megatron's token files",
    b"%PDF-": "a PDF file",
    b"\x89HDF": "an HDF5 file",
    b"\x80\x02": "a pickle",
    b"\x80\x03": "a pickle",
    b"\x80\x04": "a pickle",
    b"\x80\x05": "a pickle",
}
UTF_8_MARK = codecs.BOM_UTF8
SAMPLE_BYTES = 1 << 18
_FEW = 16  # the upper sixteen bits of an id are below this for every vocabulary of up to a million ids
_LEAST = 64  # bytes, or ids of 64 bits; smaller samples are not judged
_ENOUGH = 4096  # with so many ids, all 256 values of their lower byte occur
_MOST_HIGH = 250  # ids of uint16 have fewer distinct upper bytes


def format_of(head: bytes) -> str | None:
    """The format, in words, whose magic number a file begins with; None for text, ids and unknown formats."""
    return next((name for magic, name in MAGIC.items() if head.startswith(magic)), None)


@dataclass(frozen=True)
class Layout:
    """Where the ids of a token file lie: `tokens` ids of `dtype` after the first `start`; None: not said by the file."""

    dtype: str | None = None
    start: int = 0
    tokens: int | None = None


def index_of(path: Path) -> Path | None:
    """Megatron's .idx beside a flat file of ids, which gives their type; None if there is none."""
    index = path.with_suffix(".idx")
    is_index = index != path and index.is_file() and (raw := _head(index)).startswith(MEGATRON) and len(raw) > 17
    return index if is_index else None


def layout_of(path: Path) -> Layout:
    """The layout of a token file. Raises DataError, with a remedy, for a file that holds something else."""
    head = _head(path)
    if head.startswith(NPY):
        return _npy(path)
    numbers = np.frombuffer(head[: len(head) // 4 * 4], "<i4")
    if len(head) == LLM_C_HEADER and int(numbers[0]) in LLM_C:
        dtype = LLM_C[int(numbers[0])]
        width, n = np.dtype(dtype).itemsize, int(numbers[2])
        if n < 1 or LLM_C_HEADER + n * width != (size := path.stat().st_size):
            raise DataError(
                f"data.source: {path} is damaged or cut off: its header says {n:,} ids of {dtype}, and it has {size:,} bytes."
            )
        return Layout(dtype, LLM_C_HEADER // width, n)
    if (index := index_of(path)) is not None:
        raw = _head(index)
        if raw[17] not in MEGATRON_TYPES:
            raise DataError(
                f"data.source: {path} holds numbers of type {raw[17]} of Megatron, not ids of uint8, uint16 or int32."
            )
        return Layout(MEGATRON_TYPES[raw[17]])
    if name := format_of(head):
        raise DataError(f"data.source: {path} is {name}, not a file of token ids; {_way_out(head, path)}.")
    return Layout()


def _way_out(head: bytes, path: Path) -> str:
    if head.startswith(MEGATRON):
        return f"name {path.with_suffix('.bin').name} instead"
    if head.startswith((b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"PAR1")):
        return "unpack it, or write file: if it holds text"
    return "write its ids flat: numpy.asarray(ids, 'uint16').tofile(PATH)"


def _npy(path: Path) -> Layout:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as e:
        raise DataError(f"data.source: {path} is no readable array: {str(e).splitlines()[0]}.") from e
    if array.dtype.str not in NPY_TYPES or not array.flags.c_contiguous:
        raise DataError(
            f"data.source: {path} is an array of {array.dtype}, not of uint8, uint16 or uint32 ids in C order; convert it: "
            "numpy.save(PATH, ids.astype('uint32'))."
        )
    return Layout(NPY_TYPES[array.dtype.str], array.offset // array.itemsize, array.size)


def check_width(path: Path, dtype: str) -> None:
    """Raise DataError if the numbers of a flat file without a description do not look like little-endian ids of `dtype`."""
    if likely := _looks_like(_head(path, SAMPLE_BYTES), dtype, path.stat().st_size):
        what, way_out = likely
        raise DataError(f"data.source: {path} looks like {what}, not like {dtype} ids; {way_out}, or ?dtype={dtype} if it is.")


def _looks_like(raw: bytes, dtype: str, size: int) -> tuple[str, str] | None:
    """What the first bytes of a file of `size` bytes look like, and a remedy; None if they look like `dtype`."""
    if len(raw) >= _LEAST and all(32 <= b < 127 or 9 <= b <= 13 for b in raw):
        return "text", "write file: instead of bin:"
    if dtype != "uint16" or len(raw) < 8 * _LEAST:
        return None
    words = np.frombuffer(raw[: len(raw) // 8 * 8], "<u2").reshape(-1, 4)
    for order, w in (("", words), ("big-endian ", words.byteswap()[:, ::-1])):
        if len(np.unique(w[:, 0])) < _FEW:  # the sixteen bits of lowest value of a number come first
            continue
        few = [bool(column.max() < _FEW) for column in w.T]
        if size % 8 == 0 and few == [False, True, True, True]:
            return f"{order}64-bit ids", _convert("<i8" if not order else ">i8")
        if size % 4 == 0 and few == [False, True, False, True]:
            return f"{order}32-bit ids", _convert(">u4") if order else "write ?dtype=uint32"
    if words.size < _ENOUGH:
        return None
    low, high = np.bincount(words.ravel() & 255, minlength=256), np.bincount(words.ravel() >> 8, minlength=256)
    if high.all() and np.count_nonzero(low) < _MOST_HIGH:
        return "big-endian uint16 ids", _convert(">u2")
    if not (low + high)[_MOST_HIGH:].any() and np.abs(low - high).sum() < words.size / 10:
        return "uint8 ids", "write ?dtype=uint8"
    return None


def _convert(dtype: str) -> str:
    return f"convert them: numpy.fromfile(PATH, '{dtype}').astype('uint32').tofile(NEW), and read NEW with ?dtype=uint32"


def _head(path: Path, size: int = LLM_C_HEADER) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(size)
    except OSError as e:
        raise DataError(f"data.source: {path} cannot be read: {e.strerror}.") from e
