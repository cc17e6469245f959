"""Schemes: how a run was quantized, as far as a law needs to know, read from specs, labels and columns of bits."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from ..quant.methods import label_specs, split_rows
from ..words import few
from .findings import Finding
from .formats import FULL_BITS, grid_mse, read_format
from .tables import ALL, PointError


@dataclasses.dataclass(frozen=True)
class Scheme:
    """How a run was quantized, as far as a law needs to know.

    `w_grid_bits`, `a_grid_bits` are the widths of the grids; `w_stored_bits` is the bits of a stored weight (2.5 for INT4 with
    half of its pairs pruned); `w_mse`, `a_mse` are the mean squared errors of the grids on a standard normal (nan where
    unknown); `rotated` says whether the low-bit grid sees Hadamard-rotated values. `specs` are the quantizer specs (weights,
    activations) of its runs, if the table has them. There are several pairs if runs of different kinds share the label; pairs
    that differ only in the rotation's block size count as one.
    """

    label: str
    w_grid_bits: float
    a_grid_bits: float
    w_stored_bits: float
    w_mse: float
    a_mse: float
    rotated: bool = True
    specs: tuple[tuple[str, str], ...] = ()

    @cached_property
    def by_row(self) -> dict[str, str]:
        """The specs of embedding, head and kv, those that are quantized, as the label has them."""
        return split_rows(self.label)[1]

    @property
    def mixed(self) -> bool:
        """Whether its layers have specs of their own."""
        return bool(_MIXED.search(self.label))

    @property
    def weights(self) -> str | None:
        """The spec of the blocks' weights, from the runs or as the label means it; None if it is not one, or not known."""
        if self.mixed or len(self.specs) > 1:
            return None
        pair = self.specs[0] if self.specs else label_specs(split_rows(self.label)[0], BLOCK)
        return pair and pair[0]

    @property
    def full(self) -> bool:
        """Whether nothing is quantized."""
        return self.w_grid_bits >= FULL_BITS and self.a_grid_bits >= FULL_BITS and not self.by_row

    @property
    def order(self) -> tuple[float, float, float, int, str]:
        """Sort key: most bits first."""
        return (-self.w_stored_bits, -self.w_grid_bits, -self.a_grid_bits, len(self.by_row), self.label)


BLOCK = 32  # of a rotation, where bits are counted, to which it adds none
_OPERANDS = re.compile(r"w-?(?P<w>fp4|\d+(?:\.\d+)?)(?P<sparse>sparse)?[-/_ ]?a-?(?P<a>fp4|\d+(?:\.\d+)?)")
_PLAIN = re.compile(r"norot|\b(?:ste|lsq|pact|adabin)\b")  # methods without a rotation
_BLOCK = re.compile(r"-h\d+")  # of a rotation, in a spec
_SPARSE = re.compile(r"sparse|2:4|2of4")
_GRADIENTS = re.compile(r"\+g\..*")  # in the label of a run with quantized gradients
_MIXED = re.compile(r"\+(?!bf16$)[0-9a-f]{4}$")  # in the label of a run whose layers have specs of their own


def read_scheme(label: str, weights: str | None = None, activations: str | None = None) -> Scheme | None:
    """The scheme of specs (`int4-h128-rms-trust`) or, without them, of a label; None if neither can be read.

    Labels: `w4a4`, `w4a16`, `w4sparse-a4`, `w-fp4-a-fp4`, `bf16`, `4`, `1.585`, `quest-w2a2`, `w4a4-norot`, `BF16+BF16`.
    """
    low = _GRADIENTS.sub("", split_rows(label.lower())[0])
    if weights and activations:
        w, a = read_format(weights), read_format(activations)
        if w is None or a is None:
            return None
        mse = math.nan if _SPARSE.search(weights) else w.mse
        return Scheme(label, w.bits, a.bits, w.stored, mse, a.mse, w.rotated or w.bits >= FULL_BITS)
    if match := _OPERANDS.search(low):
        w, a = read_format(match["w"]), read_format(match["a"])
    else:
        parts = [read_format(part) for part in re.split(r"[+/ ]", low.replace("2:4", "").strip())]
        w, a = parts[0], parts[-1]
        if any(part != w for part in parts):
            return None
    if w is None or a is None:
        return None
    sparse = bool(_SPARSE.search(low))
    bits, mse = (w.bits / 2 + 0.5, math.nan) if sparse else (w.bits, w.mse)
    return Scheme(label, w.bits, a.bits, bits, mse, a.mse, not _PLAIN.search(low))


def find_scheme(schemes: Sequence[Scheme], name: str | float) -> int:
    """Index of the scheme meant by a label or by a number of bits.

    A number of bits means the scheme with both operands at that width that is otherwise the default (rotated, dense).
    """
    text = str(name).strip()
    for i, s in enumerate(schemes):
        if s.label == text or s.label.lower() == text.lower():
            return i
    meant = read_scheme(text)
    if meant is not None:
        same = [
            i
            for i, s in enumerate(schemes)
            if (s.w_grid_bits, s.a_grid_bits, s.w_stored_bits) == (meant.w_grid_bits, meant.a_grid_bits, meant.w_stored_bits)
            and (s.full or (s.rotated and s.w_mse == meant.w_mse))
        ]
        if same:
            return min(same, key=lambda i: (len(schemes[i].label), schemes[i].label))
    labels = few(s.label for s in schemes)
    raise PointError(f"no runs of scheme '{name}'; schemes with runs: {labels}; by bits: {_widths(schemes)}")


def _widths(schemes: Sequence[Scheme]) -> str:
    """The numbers of bits by which `find_scheme` finds one of these, most first."""
    square = [s for s in schemes if s.w_grid_bits == s.a_grid_bits == s.w_stored_bits]
    plain = [s for s in square if s.full or (s.rotated and s.w_mse == grid_mse(s.w_grid_bits))]
    return few(dict.fromkeys(f"{s.w_stored_bits:.4g}" for s in plain)) or "none"


DECIDING = ("scheme", "weights", "activations", "w_grid_bits", "a_grid_bits", "w_stored_bits", "a_stored_bits")


def schemes_of(
    rows: Sequence[Mapping[str, Any]],
    names: Sequence[str],
    columns: Mapping[str, str],
    notes: list[Finding],
    bad: dict[int, tuple[str, str]] | None = None,
) -> dict[str, Scheme]:
    """One Scheme per label of `rows` (as `rows.read_rows` gives them), from their specs, labels and columns of bits.

    The columns have to agree with specs and labels. Under their old names w_bits and a_bits they hold the bits of the grids or
    possibly the stored bits. If layers have specs of their own (marked in the label), only the columns hold the mean.
    Reinterpretations are added to `notes`. Raises PointError, or with `bad` puts the row's index and the reason there instead.
    """
    out: dict[str, Scheme] = {}
    pairs: dict[str, dict[tuple[str, ...], tuple[str, str]]] = {}  # label → specs without the size of blocks → specs
    read: set[tuple[Any, ...]] = set()  # what decides the scheme of a row, of the rows read so far without an error
    for i, (row, name) in enumerate(zip(rows, names, strict=True)):
        label, deciding = row["scheme"], tuple(row[key] for key in DECIDING)
        if deciding in read:
            continue
        mixed = bool(_MIXED.search(label)) and _mean_bits(row) is not None
        try:
            scheme = _mixed_scheme(row) if mixed else _plain_scheme(row, name)
            if not mixed:
                _check_bits(row, name, scheme, columns, notes)
            if row["w_stored_bits"] is not None:
                scheme = dataclasses.replace(scheme, w_stored_bits=float(row["w_stored_bits"]))
            bits = (scheme.w_grid_bits, scheme.a_grid_bits, scheme.w_stored_bits)
            first = out.get(label, scheme)
            if not mixed and (first.w_grid_bits, first.a_grid_bits, first.w_stored_bits) != bits:
                raise PointError(f"scheme '{label}' has other bits here than in earlier rows", row=name, column="scheme")
        except PointError as error:
            if bad is None:
                raise
            bad[i] = ("bad_rows", str(error))
            continue
        read.add(deciding)
        out.setdefault(label, scheme)
        if (specs := _specs(row)) is not None:
            pairs.setdefault(label, {}).setdefault(tuple(_BLOCK.sub("-h", spec) for spec in specs), specs)
    return {label: dataclasses.replace(s, specs=tuple(pairs.get(label, {}).values())) for label, s in out.items()}


def _specs(row: Mapping[str, Any]) -> tuple[str, str] | None:
    """The specs of weights and activations, if a row has both."""
    w, a = row["weights"], row["activations"]
    return (w, a) if isinstance(w, str) and isinstance(a, str) else None


def _mean_bits(row: Mapping[str, Any]) -> tuple[float, float] | None:
    """Bits of weights and activations from the columns: of the grids if these exist, else stored."""
    for kind in ("grid", "stored"):
        w, a = row[f"w_{kind}_bits"], row[f"a_{kind}_bits"]
        if w is not None and a is not None:
            return float(w), float(a)
    return None


def _mixed_scheme(row: Mapping[str, Any]) -> Scheme:
    """The scheme of a run whose layers differ: the means from its columns, with unknown MSE."""
    specs, bits = _specs(row), _mean_bits(row)
    assert bits is not None
    like = read_scheme(row["scheme"], *(specs or ())) or (read_scheme("", *specs) if specs else None)
    return Scheme(row["scheme"], *bits, bits[0], math.nan, math.nan, like.rotated if like else True)


def _plain_scheme(row: Mapping[str, Any], name: str) -> Scheme:
    """The scheme from the specs, else from the label, else from the columns of bits."""
    label, specs, w, a = row["scheme"], _specs(row), row["w_grid_bits"], row["a_grid_bits"]
    scheme = read_scheme(label, *(specs or ())) or (read_scheme("", *specs) if specs else None)
    if scheme is None and w is not None:
        bits = float(w), float(w if a is None else a)
        scheme = Scheme(label, *bits, bits[0], grid_mse(bits[0]), grid_mse(bits[1]))
    if scheme is None and label == ALL:
        scheme = Scheme(label, FULL_BITS, FULL_BITS, FULL_BITS, 0.0, 0.0)
    if scheme is None:
        raise PointError(
            f"the bits of '{label}' are unknown; name it like w4a4, bf16, fp4 or 4, add columns w_grid_bits and a_grid_bits, "
            f"or give them by --bits-of '{label}=4' ('{label}=4/8' for activations of 8 bits)",
            row=name,
            column="scheme",
        )
    return dataclasses.replace(scheme, label=label)


def _check_bits(row: Mapping[str, Any], name: str, scheme: Scheme, columns: Mapping[str, str], notes: list[Finding]) -> None:
    """Refuse columns of bits that contradict the specs or a label below 16 bits; note columns that a label overrides."""
    specs = _specs(row)
    inputs = read_format(specs[1]) if specs else None
    a_stored = math.nan if inputs is None else inputs.stored
    for ours, meant, stored in (
        ("w_grid_bits", scheme.w_grid_bits, scheme.w_stored_bits),
        ("a_grid_bits", scheme.a_grid_bits, a_stored),
    ):
        if row[ours] is None:
            continue
        bits, column = float(row[ours]), columns.get(ours, ours)
        if abs(bits - stored) <= 0.02 or abs(bits - meant) <= 0.02 or (bits >= FULL_BITS and meant >= FULL_BITS):
            continue
        if bits < FULL_BITS or specs:
            raise PointError(f"{bits:g} contradicts scheme '{scheme.label}' ({meant:g} bits)", row=name, column=column)
        text = f"Scheme {scheme.label} is read as {meant:g} bits, from its name; column {column} says {bits:g}."
        numbers = {"scheme": scheme.label, "column": column, "bits": float(meant), "column_bits": bits}
        note = Finding("bits_column", text, numbers)
        if note not in notes:
            notes.append(note)
