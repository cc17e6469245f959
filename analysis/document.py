"""The fit document: all results of a fit as a typed record, which `fit-scaling --json` prints and `fit.json` holds.

    document = FitDocument.read("results/fit.json");  document.eff["w4a4"], document.verdict[0].sentence

Schema 2 is written. Files of the version before have no schema; they are read, too, with their sentences as findings without
numbers. `points` are the rows that the fit used, so that a document is a source of points like any table.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from ..words import few
from .findings import Finding
from .tables import PointError

SCHEMA = 2
MOST_FINDINGS = 5  # of a verdict, as many as a reader takes in at once; the rest are details

Record = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows behind a finding, for a terminal or a page; None is a cell without a value."""

    key: str
    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]


@dataclasses.dataclass(frozen=True)
class FitDocument:
    """A fitted law with its caveats. Losses in nats/token, bits per stored weight, errors relative (log residuals).

    `findings` stand in order of weight, the answer first; the first five are the `verdict`.
    """

    law: str
    equation: str
    source: str  # of the law: paper and equation
    objective: str
    delta: float | None  # of the Huber loss; None: least squares
    cost: float  # the minimum of the objective
    n: int  # points
    rms: float  # root mean square of the log residuals
    params: dict[str, float | None]  # in natural units; None: the points do not determine it
    eff: dict[str, float | None]  # scheme → share of the parameters that count; None: no runs
    fixed: dict[str, float]  # parameters that were held
    units: dict[str, str]
    status: str
    warnings: tuple[Finding, ...]
    intervals: dict[str, Sequence[float]]  # parameter → ends of its 95 % interval
    intervals_method: str
    data_hash: str  # of the points, not of the text
    optima: int
    starts_at_best: float  # share of the starts that reached the optimum
    condition: float | None  # of the scaled Jacobian
    findings: tuple[Finding, ...]
    frontier: tuple[Record, ...]
    points: tuple[Record, ...]
    trends: tuple[Record, ...] = ()
    noise_floor: Record | None = None
    lack_of_fit: Record | None = None
    influence: Mapping[str, Sequence[Record]] = dataclasses.field(default_factory=dict)
    choice: Record | None = None  # errors of other laws on held-out runs
    bootstrap: Mapping[str, Record] = dataclasses.field(default_factory=dict)
    transitions: tuple[Record, ...] = ()
    transitions_of_other_laws: tuple[Record, ...] = ()
    eff_per_bit: Mapping[str, Sequence[float | None]] = dataclasses.field(
        default_factory=dict
    )  # `summary.eff_per_bit`, its interval
    best_per_bit: Mapping[str, float] | None = None  # scheme → share of the replicates in which its eff/bits is the largest
    isoflop: tuple[Record, ...] = ()  # by scheme: sizes of least loss at equal FLOP by parabolas, and how they grow
    residuals: str = "log"  # the objective sums residuals of log losses, or of raw ones
    options: Record = dataclasses.field(default_factory=dict)
    versions: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def verdict(self) -> tuple[Finding, ...]:
        """The answer and its weightiest caveats: at most five findings."""
        return self.findings[:MOST_FINDINGS]

    @property
    def details(self) -> tuple[Finding, ...]:
        """The findings beyond the verdict."""
        return self.findings[MOST_FINDINGS:]

    def to_json(self) -> dict[str, Any]:
        """The document as JSON values, `schema` first; numbers that are not finite stay floats."""
        out: dict[str, Any] = {"schema": SCHEMA}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name in ("warnings", "findings"):
                value = [finding.to_dict() for finding in value]
            out[field.name] = list(value) if isinstance(value, tuple) else value
        return out

    @classmethod
    def from_json(cls, content: Mapping[str, Any], *, where: str = "the fit") -> Self:
        """Read back `to_json`, or a document of the version before. Raises PointError, which names `where`, for any other."""
        schema = content.get("schema", 1)
        if schema not in (1, SCHEMA):
            raise PointError(f"{where}: has schema {schema!r}, and this version reads 1 and {SCHEMA}; fit its runs again")
        values = _from_schema_1(content) if schema == 1 else dict(content)
        for name in ("warnings", "findings"):
            values[name] = [
                Finding("", entry) if isinstance(entry, str) else Finding(entry["kind"], entry["sentence"], entry["numbers"])
                for entry in values.get(name, ())
            ]
        declared = {field.name: field for field in dataclasses.fields(cls)}
        missing = [name for name, f in declared.items() if name not in values and _required(f)]
        if missing:
            raise PointError(f"{where}: is no whole fit, it lacks {few(missing)}; fit its runs again")
        kept: dict[str, Any] = {
            name: tuple(v) if isinstance(v, list) and name not in ("influence",) else v for name, v in values.items()
        }
        return cls(**{name: value for name, value in kept.items() if name in declared})

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """The document in a `fit.json`. Raises PointError for a file that holds none, OSError where it cannot be read."""
        try:
            content = json.loads(Path(path).read_bytes())
        except ValueError as error:
            raise PointError(f"{path}: is not JSON: {error}") from error
        if not isinstance(content, dict) or not holds_fit(content):
            raise PointError(f"{path}: holds no fit; questctl fit-scaling --out FOLDER writes one as FOLDER/fit.json")
        return cls.from_json(content, where=str(path))

    @property
    def _isoflop_tables(self) -> tuple[Table, Table]:
        """How the size of least loss grows with the compute, and that size at each; empty if no budget has three sizes."""
        none, shown = (
            (None, None),
            [r for r in self.isoflop if r["clear"] or r["a_interval"]],
        )  # else the budgets agree by chance
        growth = [
            (
                r["scheme"],
                len(r["budgets"]),
                r["a"],
                *(r["a_interval"] or none),
                r["b"],
                *(r["b_interval"] or none),
                r["a_of_law"],
            )
            for r in shown
        ]
        minima = [
            (
                r["scheme"],
                f"{b['flops']:.3g}",
                b["runs"],
                b["sizes"],
                *[b[x] and f"{b[x]:.4g}" for x in ("N", "D", "loss")],
                b["edge"],
            )
            for r in shown
            for b in r["budgets"]
        ]
        return (
            Table(
                "isoflop",
                "Least loss at equal training compute C, by parabolas: N ∝ C^a and D ∝ C^b",
                ("scheme", "budgets", "a", "low", "high", "b", "low", "high", "a of the law"),
                tuple(growth),
            ),
            Table(
                "isoflop_minima",
                "The minima of these parabolas",
                ("scheme", "FLOP", "runs", "sizes", "N", "D", "loss", ""),
                tuple(minima),
            ),
        )

    @property
    def shown_tables(self) -> tuple[Table, ...]:
        """The tables that are part of the answer: only if the runs were designed for them."""
        return self._isoflop_tables if any(record["clear"] for record in self.isoflop) else ()

    @property
    def tables(self) -> tuple[Table, ...]:
        """The lists behind the findings that are too long for a sentence; empty ones are left out."""
        made = [
            Table(
                "transitions",
                "Tokens per 16-bit parameter from which fewer bits pay, at equal memory and FLOP",
                ("law", "16-bit size", "more bits", "fewer bits", "from", "low", "high"),
                tuple(
                    (r["law"], r["size"], r["many"], r["few"], r["tokens_per_param"], *(r["interval"] or (None, None)))
                    for r in (*self.transitions, *self.transitions_of_other_laws)
                ),
            ),
            Table(
                "best_per_bit",
                "Share of the bootstrap replicates in which a scheme has the largest eff per bit",
                ("scheme", "share"),
                tuple((label, share) for label, share in (self.best_per_bit or {}).items() if share > 0),
            ),
        ]
        made += self._isoflop_tables
        made += [
            Table(f.kind, f.sentence, tuple(f.numbers["rows"][0]), tuple(tuple(r.values()) for r in f.numbers["rows"]))
            for f in self.findings
            if f.numbers.get("rows")
        ]
        return tuple(table for table in made if table.rows)


def holds_fit(content: Mapping[str, Any]) -> bool:
    """Whether the object of a JSON file is a fit document, of this version or the one before."""
    return "law" in content and "points" in content and "params" in content


def _required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _from_schema_1(content: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a document of the version before, which had three lists of sentences and no schema."""
    sentences = [*content.get("findings", ()), *content.get("answers", ()), *content.get("doubts", ())]
    return {**content, "findings": sentences}
