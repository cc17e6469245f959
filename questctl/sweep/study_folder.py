"""The folder of a study: its table (table.csv), every run and judgement (study.json), a page (README.md) and a figure."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..analysis.claims import Judgement
from ..analysis.compare import Comparison, Difference, Row
from ..config import human_count
from ..console import duration, json_text
from ..errors import StorageError

VERSIONS = {"questctl": "questctl", "torch": "torch", "Python": "python"}
FILES = ("table.csv", "study.json", "losses.png", "losses.svg", "README.md")


def write_study(folder: Path, document: Mapping[str, Any], c: Comparison, judgements: Sequence[Judgement]) -> None:
    """Write `FILES` to `folder`; `document` is `StudyResult.to_dict()`. Raises StorageError."""
    from ..analysis.compare_figure import losses_by_seed
    from ..analysis.draw import save

    rows = c.rows()
    table = io.StringIO()
    records = [row.to_dict() for row in rows]
    writer = csv.DictWriter(table, list(records[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "table.csv").write_text(table.getvalue(), encoding="utf-8")
        (folder / "study.json").write_text(json_text(document), encoding="utf-8")
        (folder / "README.md").write_text("\n".join(_readme(document, c, rows, judgements)), encoding="utf-8")
        save(losses_by_seed(c), folder / "losses")
    except OSError as e:
        raise StorageError(f"{e.filename or folder}: cannot be written: {e.strerror}.") from e


def training_cost(about: Mapping[str, Any]) -> str:
    """How many runs a study has and how long they took, in words."""
    wall, summed = (duration(about[key]) for key in ("wall_seconds", "run_seconds"))
    return f"{about['runs']} runs, those of the search among them: {wall} wall time, {summed} summed run time."


def row_in_words(row: Row) -> dict[str, str | int | None]:
    """The cells of a row as the tables show them; losses have three decimals, and None means nothing to show."""
    bits = (row.w_stored_bits, row.a_stored_bits)
    return {
        "scheme": row.scheme + ("*" if row.role == "fixed" else ""),
        "bits": None if None in bits else f"{bits[0]:.3g} / {bits[1]:.3g}",
        "lr": f"{row.lr:g}",
        "n": row.n,
        "diverged": row.diverged,
        "loss": _three_decimals(row.loss),
        "sd": _three_decimals(row.spread),
        "reference": row.reference,
        "difference": _mean(row.difference),
        "interval": _interval(row.difference),
        "to_control": _mean(row.control),
        "grad_norm": None if row.grad_norm is None else f"{row.grad_norm:.3g}",
    }


def _three_decimals(x: float | None) -> str | None:
    return None if x is None else f"{x:.3f}"


def _mean(delta: Difference | None) -> str | None:
    return None if delta is None else f"{delta.mean:+.3f}"


def _interval(delta: Difference | None) -> str | None:
    return f"{delta.low:+.3f} to {delta.high:+.3f}" if delta is not None and delta.n > 1 else None


def _readme(document: Mapping[str, Any], c: Comparison, rows: Sequence[Row], judgements: Sequence[Judgement]) -> Iterator[str]:
    about = document["about"]
    when = about["first"] if about["first"] == about["last"] else f"{about['first']} to {about['last']}"
    machine = ", ".join((*about["cpu"], *(f"{n} cores" for n in about["cores"]), *about["gpu"]))
    versions = ", ".join(f"{name} {', '.join(about[key])}" for name, key in VERSIONS.items())
    scale = "" if document["scale"] == "laptop" else f" --scale {document['scale']}"
    yield from (
        f"# {document['study']}: {document['description']}",
        "",
        f"`questctl study {document['study']}{scale}`, trained on {when}: {machine}; {versions}, "
        f"{', '.join(about['platform'])}. {training_cost(about)} Threads per run: {', '.join(map(str, about['threads']))}. "
        f"Data {', '.join(digest[:12] for digest in about['data_hash'])}.",
        "",
        "## What holds here",
        "",
    )
    for judgement in judgements:
        yield f"* {judgement.sentence}"
        yield from (f"  * {detail}" for detail in judgement.details)
    yield from (
        "",
        "Intervals are 95 % t intervals of differences paired by seed, each for one comparison; three seeds make them wide. "
        "A claim whose interval contains zero is not settled, unless the interval excludes the margin that is claimed. "
        "The spread is the standard deviation over seeds, pooled over the schemes of a size; the table has each scheme's own.",
        "",
        "## The runs",
        "",
        "Bits are stored bits per weight / per activation. Losses are validation losses in nats/token, sd is their standard "
        "deviation over seeds, and Δ is the difference to the reference, paired by seed. The gradient norm is the median over "
        "the logged steps after warm-up. * marks a learning rate that the sweep file fixes, beside the comparison.",
        "",
    )
    yield from _run_tables(c, rows)
    yield from ("![Loss of every run by scheme](losses.png)", "")
    yield from _search_table([entry for entry in document["search"] if entry["losses"]])


def _run_tables(c: Comparison, rows: Sequence[Row]) -> Iterator[str]:
    """One table for each size."""
    columns = {
        "scheme": "scheme",
        "bits": "bits",
        "lr": "learning rate",
        "n": "n",
        "diverged": "diverged",
        "loss": "loss",
        "sd": "sd",
        "reference": "reference",
        "difference": "Δ",
        "interval": "95 %",
        **({"to_control": f"Δ to {c.control}"} if c.control else {}),
        "grad_norm": "gradient norm",
    }
    for size in dict.fromkeys(row.size for row in rows):
        yield from (f"**{human_count(size[0])} parameters, {human_count(size[1])} tokens**", "")
        yield from (f"| {' | '.join(columns.values())} |", f"|{'---|' * len(columns)}")
        for words in (row_in_words(row) for row in rows if row.size == size):
            yield f"| {' | '.join('–' if words[key] is None else str(words[key]) for key in columns)} |"
        yield ""


def _search_table(search: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """The loss of each trial of the search, and the learning rate that it led to."""
    if not search:
        return
    grid = sorted({trial["lr"] for entry in search for trial in entry["losses"]})
    yield from (
        "## Learning rates",
        "",
        "One rule for all schemes (questctl/sweep/lr_search.py): the best of a grid, extended by a factor of two where "
        "the best lies at its edge. Loss of each trial:",
        "",
        f"| scheme | {' | '.join(f'{lr:g}' for lr in grid)} | chosen |",
        f"|---|{'---|' * (len(grid) + 1)}",
    )
    for entry in search:
        losses = {trial["lr"]: trial["loss"] for trial in entry["losses"]}
        trials = ("" if lr not in losses else _loss_or_diverged(losses[lr]) for lr in grid)
        yield f"| {entry['scheme']} | {' | '.join(trials)} | {entry['lr']:g} |"
    yield ""


def _loss_or_diverged(loss: float | None) -> str:
    return f"{loss:.3f}" if loss is not None and math.isfinite(loss) else "diverged"  # study.json holds null for infinity
