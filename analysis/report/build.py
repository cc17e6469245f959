"""The sections of a report in reading order: charts, tables and sentences; a section without content is left out.

Each number shown is a `Cell` with its source: `run` and `key` (runs/<run>/result.json, metrics.jsonl), or `fit`, a JSON pointer
(RFC 6901) into the fit document, which the page carries; a median names its runs.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ...metrics import GRAD_NORM, TOKENS, TRAIN_LOSS
from ...words import few
from .. import charts
from ..charts import Chart
from ..collapse import chart as collapse_chart
from ..document import FitDocument
from ..document import Table as Rows
from ..fit_result import UNTRUSTED, Fit
from ..forecasts import LEVEL
from ..forecasts import chart as forecast_chart
from ..health import SATURATION, SPIKE
from ..isoflop import isoflop_optima
from ..style import Style, count, styles
from ..summary import is_doubt, is_loose, leader, per_bit_formula, second
from . import tables
from .tables import Material

if TYPE_CHECKING:
    import pandas as pd

DASH = "–"
FILE = "memory: memory of the stored model (bytes)"


@dataclasses.dataclass(frozen=True)
class Cell:
    """A text with its number (to sort by) and the source of the number as data attributes."""

    text: str
    value: float | str | None = None
    source: Mapping[str, str] = dataclasses.field(default_factory=dict)
    code: bool = False

    @property
    def numeric(self) -> bool:
        """Whether the cell holds a number."""
        return isinstance(self.value, float | int)


@dataclasses.dataclass(frozen=True)
class Table:
    """Columns (name, hint) and rows of cells; `row_runs` are the runs that a row was made of."""

    key: str
    columns: tuple[tuple[str, str], ...]
    rows: tuple[tuple[Cell, ...], ...]
    row_runs: tuple[tuple[str, ...], ...] = ()
    caption: str = ""
    filter: bool = False

    @property
    def numeric(self) -> tuple[bool, ...]:
        """For each column, whether it holds numbers, which are aligned right."""
        return tuple(any(row[i].numeric for row in self.rows) for i in range(len(self.columns)))


@dataclasses.dataclass(frozen=True)
class Tile:
    """One headline number: what it is, the number, its interval or context."""

    label: str
    value: Cell
    note: Cell


@dataclasses.dataclass(frozen=True)
class Section:
    """A part of the page. `lead` is its point in a sentence; `verdict` and `details` are findings, the latter shown on demand,
    with `detail_tables`; they are cells because they hold numbers of the fit.
    """

    key: str
    title: str
    lead: str = ""
    charts: tuple[Chart, ...] = ()
    tables: tuple[Table, ...] = ()
    tiles: tuple[Tile, ...] = ()
    verdict: tuple[Cell, ...] = ()
    details: tuple[Cell, ...] = ()
    doubts: tuple[Cell, ...] = ()
    detail_tables: tuple[Table, ...] = ()
    facts: tuple[tuple[str, str], ...] = ()


@dataclasses.dataclass(frozen=True)
class Report:
    """All that the page shows, and the style of each scheme."""

    title: str
    summary: str
    sections: tuple[Section, ...]
    looks: Mapping[str, Style]
    run_names: tuple[str, ...]
    document: Mapping[str, Any]
    everything: pd.DataFrame | None = None  # one row a run, if the page shows only some of them

    @property
    def charts(self) -> list[Chart]:
        """The charts of all sections in order."""
        return [chart for section in self.sections for chart in section.charts]


def build(m: Material) -> Report:
    """Build the report from the material."""
    runs = tables.run_table(m)
    metrics = tables.over_layers(m.metrics)
    place = {name: i for i, name in enumerate(runs["run"])}
    metrics["row"] = metrics["run"].map(place) if len(metrics) else []
    row = np.array([place[name] for name in tables.point_names(m.points)], int) if m.points is not None else np.zeros(0, int)
    sections = [
        _verdict(m, runs),
        _frontier(m, runs, row),
        _law(m, row),
        _doubt(m, row),
        _curves(m, metrics, runs),
        _forecasts(m),
        _health(m, metrics, runs),
        _families(m),
        _kernels(m.bench),
        _cost(runs),
        _runs(m, runs),
        _left_out(m, runs),
        Section("about", "Versions and data", facts=m.about),
    ]
    looks = {**styles(charts.schemes_of(runs, m.points)), **_OTHER_LOOKS, **{f.run: _FORECAST_LOOK for f in m.forecasts}}
    shown = tuple(s for s in sections if s is not None)
    states = runs["state"].value_counts()
    order = [s for s in ("done", "running", "pending", "preempted", "stopped", "diverged", "failed") if s in states]
    summary = f"{len(runs)} runs: " + ", ".join(f"{states[s]} {s}" for s in order) if len(runs) else "No runs."
    document = m.document.to_json() if m.document is not None else {}
    everything = _everything(m, runs) if m.shown_words else None
    return Report(m.title, summary, shown, looks, tuple(runs["run"]), document, everything)


def _everything(m: Material, runs: pd.DataFrame) -> pd.DataFrame:
    """All runs with all columns, and why a run is not in the law; damaged runs have only their name and the reason."""
    reasons = m.left_out.drop_duplicates("run").rename(columns={"reason": "left_out"})
    return runs.drop(columns="command").merge(reasons, on="run", how="outer", sort=False)


_FORECAST_LOOK = Style("#0072B2", "o", "-")
_OTHER_LOOKS = {
    charts.PUBLISHED: Style("#444444", "|", "-"),
    "in sample": Style("#777777", "o", "-"),
    "each size left out": Style("#0072B2", "s", "-"),
    "largest from smaller": Style("#D55E00", "D", "-"),
}


# ---------------------------------------------------------------------------------------------------------------- cells


def number(value: Any, digits: int = 4) -> str:
    """Significant digits, thousands separated, a dash for nothing; an infinite end of an interval is ∞."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return DASH
    value = float(value)
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    if value == 0:
        return "0"
    if abs(value) >= 10 ** (digits - 1):
        return f"{value:,.0f}" if abs(value) < 1e7 else f"{value:.{digits - 1}g}"
    if abs(value) < 1e-3:
        return f"{value:.{digits - 1}g}"
    return f"{value:.{max(digits - 1 - math.floor(math.log10(abs(value))), 0)}f}"


def duration(seconds: float) -> str:
    """Seconds as s, min or h with three digits."""
    if math.isnan(seconds):
        return DASH
    for unit, size in (("h", 3600.0), ("min", 60.0)):
        if seconds >= size:
            return f"{number(seconds / size, 3)} {unit}"
    return f"{number(seconds, 3)} s"


def size_of(amount: float) -> str:
    """Bytes with their decimal unit."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if amount >= size:
            return f"{number(amount / size, 3)} {unit}"
    return DASH if math.isnan(amount) else f"{amount:.0f} B"


def _cell(value: Any, text: str | None = None, digits: int = 4, **source: str) -> Cell:
    known = value is not None and not (isinstance(value, float) and math.isnan(value))
    return Cell(number(value, digits) if text is None else text, float(value) if known else None, source)


def pointer(*path: str | int) -> str:
    """RFC 6901: `/eff/w4a4`."""
    return "".join("/" + str(part).replace("~", "~0").replace("/", "~1") for part in path)


def _interval(ends: Sequence[float] | None, *path: str, digits: int = 3) -> Cell:
    """[low, high] of a fitted number; an interval that spans a factor of thirty is marked as undetermined."""
    if ends is None or any(math.isnan(e) for e in ends):
        return Cell("")
    loose = not np.isfinite(ends[1]) or (ends[0] > 0 and is_loose(ends))
    words = "not pinned down" if loose else f"[{number(ends[0], digits)}, {number(ends[1], digits)}]"
    return Cell(words, None, {"fit": pointer(*path)})


# ------------------------------------------------------------------------------------------------------------- sections


def _verdict(m: Material, runs: pd.DataFrame) -> Section:
    """Headline numbers, the verdict, and on demand the other findings with the lists behind them."""
    if m.fit is None or m.document is None:
        return Section("verdict", "Verdict", m.problem, tiles=tuple(_best_loss(runs)))
    d = m.document
    tiles = []
    tiles += _most_per_bit(m.fit, d)
    on = list(dict.fromkeys(r["scheme"] for r in d.frontier))
    count_on = _cell(len(d.frontier), f"{len(d.frontier)} runs", fit="/frontier")
    tiles.append(Tile("on the frontier of bits and loss", count_on, Cell(few(on))))
    tiles += _best_loss(runs)
    if d.choice and d.choice["laws"]:
        held = d.choice["laws"][0]["leave_one_size_out"]
        note = (
            Cell("no size could be held out")
            if held is None or math.isnan(held)
            else Cell(f"{100 * held:.2g} % on sizes held out", None, {"fit": "/choice/laws/0/leave_one_size_out"})
        )
        tiles.append(Tile("error of the law", _cell(d.rms, f"{100 * d.rms:.2g} %", fit="/rms"), note))
    cells = [(finding, Cell(finding.sentence, None, {"fit": pointer("findings", i)})) for i, finding in enumerate(d.findings)]
    shown_first, rest = cells[: len(d.verdict)], cells[len(d.verdict) :]
    doubts = [cell for finding, cell in rest if is_doubt(finding)]
    if searched := tables.repeats(runs):
        doubts.append(Cell(f"{searched} cells hold several learning rates; the fit takes their runs as repeats, tuned or not."))
    return Section(
        "verdict",
        "Verdict",
        tiles=tuple(tiles),
        verdict=tuple(cell for _, cell in shown_first),
        details=tuple(cell for finding, cell in rest if not is_doubt(finding)),
        doubts=tuple(doubts),
        detail_tables=tuple(_rows(table) for table in d.tables),
    )


def _most_per_bit(fit: Fit, d: FitDocument) -> list[Tile]:
    """The scheme that makes the most of a stored bit, beside the reference or, if it is the reference, beside the next."""
    per_bit = {k: [math.nan if e is None else e for e in v] for k, v in d.eff_per_bit.items() if v[0] is not None}
    if len(per_bit) < 2 or fit.status in UNTRUSTED:
        return []
    best, _, loose = leader(per_bit)
    where = {"fit": pointer("eff_per_bit", best)}
    if loose:
        return [Tile("most from each stored bit", Cell("open", None, where), Cell("eff is not pinned down", None, where))]
    value, *ends = per_bit[best]
    shown, of = f"{best} {number(value, 3)}×", f"of {fit.reference.label}’s parameters"
    if best == fit.reference.label:  # its value is 1 by definition
        after = second(per_bit)
        share, *ends = per_bit[after]
        shown, of = best, f"{after} has {number(share, 3)}× as much"
    interval = _interval(ends, "eff_per_bit", best).text
    note = Cell(of + (f", {interval}" if interval else ""), None, where)
    return [Tile("most from each stored bit", _cell(value, shown, fit=pointer("eff_per_bit", best, 0)), note)]


def _rows(table: Rows) -> Table:
    """A list behind a finding as a table of the page."""
    rows = tuple(tuple(Cell(v, v) if isinstance(v, str) else _cell(v) for v in row) for row in table.rows)
    return Table(f"details-{table.key}", tuple((name, "") for name in table.columns), rows, caption=table.title)


def _best_loss(runs: pd.DataFrame) -> list[Tile]:
    done = runs[(runs["state"] == "done") & runs["loss"].notna()]
    if not len(done):
        return []
    best = done.sort_values("loss").iloc[0]
    value = _cell(best["loss"], f"{best['loss']:.4f}", run=best["run"], key="loss")
    return [
        Tile("lowest loss (nats/token)", value, Cell(f"{best['scheme']}, {count(best['params_non_embedding'])} parameters"))
    ]


def _frontier(m: Material, runs: pd.DataFrame, row: np.ndarray) -> Section | None:
    if m.points is None:
        return None
    at = runs.loc[row]
    estimated = " (6·N·D)" if at["estimated_flops"].all() else ""
    costs = {
        charts.MODEL_BITS: m.points.memory_bits,
        FILE: at["memory"].to_numpy(float),
        f"training FLOPs: training compute{estimated} (FLOP)": at["flops"].to_numpy(float),
    }
    if at["params_total"].isna().all() and at["artifact_bytes"].isna().all():
        del costs[FILE]  # it would be the bits divided by eight
    return Section("frontier", "Frontier", charts=(charts.frontier(m.points, costs, row, m.fit),))


def _law(m: Material, row: np.ndarray) -> Section | None:
    if m.fit is None:
        return None
    known = tables.published(m.fit)
    shown = [charts.size(m.fit, row, m.boot)]
    if made_for_it := [one for one in isoflop_optima(m.fit.points) if one.clear]:
        shown.append(charts.isoflop(m.fit.points, made_for_it, row))
    made = [_parameters(m)]
    if len([v for v in m.fit.eff.values() if v is not None]) > 1:
        if m.fit.status not in UNTRUSTED:
            shown.append(charts.eff(m.fit, known))
        made.insert(0, _eff(m, known))
    lead = f"{m.fit.law.equation} ({m.fit.law.source}), {m.fit.n} runs, fit {m.fit.status}."
    return Section("law", "The law", lead, charts=tuple(shown), tables=tuple(made))


def _eff(m: Material, known: Mapping[str, float]) -> Table:
    fit, d = m.fit, m.document
    assert fit is not None
    assert d is not None
    bits = {s.label: s.w_stored_bits for s in fit.points.schemes}
    rows = []
    for g, (label, value) in enumerate(fit.eff.items()):
        name = f"eff.{label}"
        ends = d.intervals.get(name)
        runs = int((fit.points.group == g).sum()) if label in bits else 0
        per_bit = d.eff_per_bit.get(label, [None])[0]
        rows.append(
            (
                Cell(label),
                _cell(bits.get(label), DASH if label not in bits else f"{bits[label]:g}"),
                _cell(runs, f"{runs}"),
                Cell("no runs") if value is None else _cell(value, digits=3, fit=pointer("eff", label)),
                _interval(ends, "intervals", name),
                _cell(per_bit, digits=3, fit=pointer("eff_per_bit", label, 0)),
                _cell(known.get(label), f"{known[label]:g}" if label in known else DASH),
            )
        )
    columns = (
        ("scheme", ""),
        ("bits", "stored bits of a weight"),
        ("runs", ""),
        ("eff", "share of the parameters that count"),
        ("95 % interval", fit.intervals_method),
        (per_bit_formula(fit), f"effective parameters per stored bit, 1: {fit.reference.label}"),
        ("published eff", tables.PUBLISHED_SOURCE),
    )
    used = [label for label in fit.eff if label in known]
    note = f"Published: {tables.PUBLISHED_SOURCE}, 30M to 800M parameters on C4." if used else ""
    return Table("eff", columns, tuple(rows), caption=note)


def _parameters(m: Material) -> Table:
    fit, d = m.fit, m.document
    assert fit is not None
    assert d is not None
    units = {"A": "", "B": "", **d.units}
    rows = [
        (
            Cell(name),
            Cell("no number") if value is None else _cell(value, fit=pointer("params", name)),
            _interval(d.intervals.get(name), "intervals", name),
            Cell(units.get(name, "")),
            Cell("fixed" if name in fit.fixed else ""),
        )
        for name, value in fit.params.items()
    ]
    columns = (("parameter", ""), ("value", ""), ("95 % interval", fit.intervals_method), ("unit", ""), ("", ""))
    return Table("parameters", columns, tuple(rows), caption=f"Objective: {d.objective}; data {fit.points.hash}.")


def _doubt(m: Material, row: np.ndarray) -> Section | None:
    if m.fit is None or m.document is None:
        return None
    score = m.choice.scores[0] if m.choice is not None else None
    unseen = score.held_out if score is not None and score.law == m.fit.law.name else None
    shown = [charts.predicted(m.fit, row), charts.residuals(m.fit, row, unseen)]
    laws = m.document.choice["laws"] if m.document.choice else []
    made = []
    if laws:
        percent = [
            ("in_sample", "in sample"),
            ("leave_one_size_out", "each size left out"),
            ("forward", "largest from smaller"),
        ]
        rows = [
            (
                Cell(law["law"]),
                *(
                    _cell(100 * law[key] if law[key] is not None else None, digits=3, fit=pointer("choice", "laws", i, key))
                    for key, _ in percent
                ),
                _cell(law["aicc"], f"{law['aicc']:.1f}", fit=pointer("choice", "laws", i, "aicc")),
                Cell("clearly worse" if law["clearly_worse"] else ""),
            )
            for i, law in enumerate(laws)
        ]
        columns = (
            ("law", ""),
            *((f"{words} (%)", "root mean square of log residuals") for _, words in percent),
            ("AICc", "corrected information criterion"),
            ("", ""),
        )
        caption = "Largest from smaller: the largest third of the sizes, predicted from fits to the others."
        made.append(Table("laws", columns, tuple(rows), caption=caption))
        if len(laws) > 1:
            shown.append(charts.held_out(laws))
    return Section("doubt", "How far to trust it", charts=tuple(shown), tables=tuple(made))


def _curves(m: Material, metrics: pd.DataFrame, runs: pd.DataFrame) -> Section | None:
    if TOKENS not in metrics or TRAIN_LOSS not in metrics:
        return None
    chart = charts.curves(metrics, runs)
    return Section("curves", "Loss curves", m.shown_words, charts=(chart,)) if chart.views else None


def _forecasts(m: Material) -> Section | None:
    if not m.forecasts:
        return None
    rows = [
        (
            Cell(f.run, source={"run": f.run}),
            _cell(100 * f.seen, f"{100 * f.seen:.0f}"),
            _cell(f.steps, f"{f.steps:,.0f}"),
            _cell(f.loss),
            Cell(_ends(number(f.interval[0]), number(f.interval[1]))),
            Cell("" if f.falls else "no fall of a rate seen"),
        )
        for f in m.forecasts
    ]
    columns = (
        ("run", ""),
        ("seen (%)", "share of its steps"),
        ("steps", ""),
        ("training loss", "at its last step, nats/token"),
        (f"{LEVEL:.0%} interval", "of the training loss as it is logged"),
        ("", ""),
    )
    lead = "Forecasts of runs that are not finished, from their curves and those of the same size and scheme."
    table = Table("forecasts", columns, tuple(rows), tuple((f.run,) for f in m.forecasts))
    return Section("forecast", "Where they will end", lead, (forecast_chart(m.forecasts, apart=True),), (table,))


def _families(m: Material) -> Section | None:
    if not m.families:
        return None
    lead = " ".join(family.sentence for family in m.families)
    return Section("collapse", "Whether families coincide", lead, (collapse_chart(m.families),))


def _health(m: Material, metrics: pd.DataFrame, runs: pd.DataFrame) -> Section | None:
    if not len(metrics):
        return None
    named = tables.signals(metrics)
    table = tables.health(metrics, runs)
    chart = charts.health(metrics, runs, named)
    rows, made_of = [], []
    for r in table.to_dict("records"):
        rows.append(
            (
                Cell(r["scheme"]),
                _cell(r["runs"], f"{r['runs']}"),
                _cell(r["diverged"], f"{r['diverged']}"),
                _cell(r["failed"], f"{r['failed']}"),
                Cell(DASH) if r["spikes"] is None or math.isnan(r["spikes"]) else _cell(r["spikes"], f"{r['spikes']:.0f}"),
                _cell(r["grad_norm"], digits=3, key=GRAD_NORM, of="max"),
                *(_cell(r[f"last {name}"], digits=3, key=name, of="median of last") for name in named),
            )
        )
        made_of.append(tuple(r["names"]))
    columns = (
        ("scheme", ""),
        ("runs", ""),
        ("diverged", ""),
        ("failed", ""),
        ("spikes", f"logged windows with a loss {SPIKE:g} nats/token or more above the level before them"),
        (f"largest {GRAD_NORM}", ""),
        *((f"last {name}", "median over the runs") for name in named),
    )
    absent = [
        words
        for words, key in (("trust fraction", "trust"), ("gradient norm", GRAD_NORM))
        if not any(key in name for name in named)
    ]
    lead = f"Not logged by these runs: {', '.join(absent)}." if absent else ""
    spiky = [name for names in table["spiky"] for name in names]
    clamped = [name for names in table["clamped"] for name in names]
    diverged = list(runs.loc[runs["state"] == "diverged", "run"])
    stopped = list(runs.loc[runs["state"] == "stopped", "run"])
    sentences = [
        f"Signals, spikes and clamping are of {m.shown_words}" if m.shown_words else "",
        f"Diverged: {few(diverged)}." if diverged else "No run diverged.",
        f"Stopped early by their sweep, so not in any fit: {few(stopped)}." if stopped else "",
        f"With spikes: {few(spiky)}." if spiky else "",
        f"With more than {SATURATION:.0%} of an operand clamped at the end: {few(clamped)}." if clamped else "",
    ]
    return Section(
        "health",
        "Health of the runs",
        " ".join(s for s in (*sentences, lead) if s),
        (chart,) if chart.views else (),
        (Table("health", columns, tuple(rows), tuple(made_of)),),
    )


def _count(n: float) -> str:
    """A count in words, or a dash where it is not known."""
    return DASH if math.isnan(n) else count(n)


def _kernels(bench: pd.DataFrame) -> Section | None:
    if not len(bench):
        return None
    rows = [
        (
            Cell(r["op"]),
            Cell(r["implementation"]),
            Cell(r["shape"]),
            Cell(r["verdict"]),
            _cell(r["p50_us"], digits=3),
            _cell(r["speed_up_p50"], digits=3),
            Cell(_ends(r["speed_up_p20"], r["speed_up_p80"])),
            _cell(None if _nothing(r["roofline_share"]) else 100 * r["roofline_share"], digits=3),
            Cell(r["bound"]),
            Cell(r["reason"]),
            Cell(r["file"]),
        )
        for r in bench.to_dict("records")
    ]
    columns = (
        ("op", ""),
        ("implementation", ""),
        ("shape", ""),
        ("verdict", "PASS: equal to its definition; floor: a bound"),
        ("median (µs)", ""),
        ("speed-up", "over the baseline, round by round"),
        ("20 % to 80 %", ""),
        ("% of roofline", ""),
        ("bound by", ""),
        ("note", ""),
        ("file", ""),
    )
    chart = charts.kernels(bench)
    devices = ", ".join(dict.fromkeys(bench["device"]))
    return Section(
        "kernels",
        "Kernels",
        f"Measured on {devices}.",
        (chart,) if chart.views else (),
        (Table("kernels", columns, tuple(rows), filter=len(rows) > 12),),
    )


def _ends(a: Any, b: Any) -> str:
    return "" if _nothing(a) or _nothing(b) else f"[{number(min(a, b), 3)}, {number(max(a, b), 3)}]"


def _nothing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _cost(runs: pd.DataFrame) -> Section | None:
    table = tables.cost(runs)
    if not len(table):
        return None
    rows, made_of = [], []
    for r in table.to_dict("records"):
        overhead = r["overhead"]
        rows.append(
            (
                Cell(r["scheme"]),
                _cell(r["params_non_embedding"], count(r["params_non_embedding"])),
                _cell(r["runs"], f"{r['runs']}"),
                _cell(r["tokens_per_s"], key="tokens_per_s", of="median"),
                _cell(
                    overhead, DASH if math.isnan(overhead) else f"{100 * overhead:+.0f} %", key="tokens_per_s", of="overhead"
                ),
                _cell(r["seconds"], duration(r["seconds"]), key="seconds", of="median"),
                _cell(r["total_seconds"], duration(r["total_seconds"]), key="seconds", of="sum"),
                _cell(r["peak_memory_bytes"], size_of(r["peak_memory_bytes"]), key="peak_memory_bytes", of="median"),
                _cell(r["memory"], size_of(r["memory"]), key="memory", of="median"),
                Cell(r["device"]),
            )
        )
        made_of.append(tuple(r["names"]))
    columns = (
        ("scheme", ""),
        ("N", charts.SIZE),
        ("runs", ""),
        ("tokens/s", "median of training alone"),
        ("overhead", "training time beside unquantized runs of the same size and device"),
        ("a run", "median time"),
        ("all runs", ""),
        ("peak memory", "of the GPU, or of the process"),
        ("stored", "the file with its tokenizer; of tables without artifact_bytes: weights, embedding and head"),
        ("device", ""),
    )
    total = duration(float(table["total_seconds"].sum()))
    return Section(
        "cost",
        "Cost",
        f"{total} of training in all.",
        (charts.speed(table),),
        (Table("cost", columns, tuple(rows), tuple(made_of), filter=len(rows) > 12),),
    )


def _runs(m: Material, runs: pd.DataFrame) -> Section | None:
    if not len(runs):
        return None
    shown = [c for c in ("bits_per_byte", "lr", "seed", "tokens_per_s", "seconds") if runs[c].notna().any()]
    hints = {
        "bits_per_byte": ("bits/byte", ""),
        "lr": ("lr", "peak learning rate"),
        "seed": ("seed", ""),
        "tokens_per_s": ("tokens/s", ""),
        "seconds": ("time", "in the training loop"),
    }
    commands = bool((runs["command"] != "").any())
    fitted = m.fit is not None
    rows = []
    rows_shown = runs if m.shown is None else runs[runs["run"].isin(m.shown)]
    for r in rows_shown.to_dict("records"):
        name = r["run"]

        def of(key: str, value: Any, text: str | None = None, name: str = name, digits: int = 4) -> Cell:
            return _cell(value, text, digits, run=name, key=key)

        miss = 100 * (r["predicted"] / r["loss"] - 1) if fitted else math.nan
        texts = {"seconds": duration(r["seconds"]), "lr": f"{r['lr']:.3g}", "seed": f"{r['seed']:.0f}"}
        rows.append(
            (
                Cell(name),
                Cell(r["state"]),
                Cell(r["scheme"]),
                of("params_non_embedding", r["params_non_embedding"], _count(r["params_non_embedding"])),
                of("tokens", r["tokens"], _count(r["tokens"])),
                of("tokens_per_param", r["tokens_per_param"], digits=3),
                of("loss", r["loss"], None if _nothing(r["loss"]) else f"{r['loss']:.4f}"),
                *([Cell(DASH if math.isnan(miss) else f"{miss:+.2f}", None if math.isnan(miss) else miss)] if fitted else []),
                *(of(c, r[c], DASH if _nothing(r[c]) else texts.get(c)) for c in shown),
                *([Cell(r["command"], None, code=True)] if commands else []),
            )
        )
    columns = (
        ("run", ""),
        ("state", ""),
        ("scheme", ""),
        ("N", charts.SIZE),
        ("D", "training tokens"),
        ("D/N", "tokens per parameter"),
        ("loss", charts.LOSS),
        *([("law %", "predicted over measured - 1")] if fitted else []),
        *(hints[c] for c in shown),
        *([("command", "trains this run again")] if commands else []),
    )
    table = Table("runs", columns, tuple(rows), tuple((name,) for name in rows_shown["run"]), filter=True)
    lead = "Click a column to sort, a command to copy it." if commands else "Click a column to sort."
    if m.shown_words:
        return Section("runs", "Runs", f"{m.shown_words} {lead}", tables=(table,))
    return Section("runs", "Every run", lead, tables=(table,))


def _left_out(m: Material, runs: pd.DataFrame) -> Section:
    notes = m.points.notes if m.points is not None else ()
    facts = tuple(("note", note.sentence) for note in notes if note.kind not in ("unfinished_runs", "damaged_runs"))
    if not len(m.left_out):
        return Section("left_out", "Left out", "No run was left out.", facts=facts)
    some = m.left_out[: len(m.shown)] if m.shown_words and m.shown is not None else m.left_out
    rows = tuple((Cell(r["run"]), Cell(r["reason"])) for r in some.to_dict("records"))
    total = len(set(runs["run"]) | set(m.left_out["run"]))
    are = "run is" if len(m.left_out) == 1 else "runs are"
    more = f" The first {len(rows):,} are below." if len(rows) < len(m.left_out) else ""
    return Section(
        "left_out",
        "Left out",
        f"{len(m.left_out)} of {total} {are} not in the law and the frontier.{more}",
        facts=facts,
        tables=(Table("left_out", (("run", ""), ("why", "")), rows, filter=len(rows) > 12),),
    )
