"""Read one table of runs in every form of tests/table_forms.py, and write what came of it to docs/reference/table-forms.md.

    python benchmarks/table_forms.py [--check]

With --check nothing is written, and the exit status says whether the page is what the forms give now.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "reference" / "table-forms.md"
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from table_forms import FORMS, RUNS, Form, write  # noqa: E402

from questctl.analysis.points import read_points  # noqa: E402
from questctl.analysis.tables import PointError  # noqa: E402

HEAD = """# What tables may look like

One table of {runs} runs was written in {forms} forms, and `fit-scaling`, `plan`, `report` and `runs import` read each. "The
same" means the same points as those of the plain CSV. Where a form needs an option, the table names it; where it is refused,
the table quotes the message. `python benchmarks/table_forms.py` makes this page, and tests hold it.

[Tables of points](file-formats.md#tables-of-points) lists the columns and their other names. A column is found by its name;
else without regard to case, spaces, and the prefixes `config/` and `summary/`; `N`, `D`, `loss` and `scheme` else by the end
of a dotted name. `--map` takes a formula of numbers, columns, `+ - * / **`, parentheses, `exp`, `log`, `log2`, `log10` and
`sqrt`; names with spaces or slashes stand in backticks. `--where` takes `COLUMN=VALUE`, `COLUMN=A|B`, and `!=`, `<`, `<=`,
`>`, `>=`.

| form | option | result |
|---|---|---|
"""


def row(form: Form, folder: Path) -> str:
    """A line of the table: what the form gives."""
    try:
        points = read_points(write(form, folder), columns=form.columns, where=form.where, options=form.options)
    except PointError as error:
        result = f"refused: {error}"
    else:
        assert len(points) == len(RUNS), form.name
        said = [note.sentence.rstrip(".") for note in points.notes]
        if points.cluster:
            said.append(f"errors shared within {len(set(points.cluster))} clusters")
        if again := int((points.repeats > 0).sum()):
            said.append(f"{again} runs read their text again, up to {points.repeats.max():g} times")
        result = " ".join(["the same", *(f"({text})" for text in said)])
    option = "`` " + form.cli + " ``" if "`" in form.cli else f"`{form.cli}`" if form.cli else ""
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in (form.about, option, result)) + " |"


def page() -> str:
    """The page as the forms give it now."""
    with tempfile.TemporaryDirectory() as folder:
        rows = [row(form, Path(folder)) for form in FORMS]
    return HEAD.format(runs=len(RUNS), forms=len(FORMS)) + "\n".join(rows) + "\n"


if __name__ == "__main__":
    if "--check" in sys.argv:
        sys.exit(PAGE.read_text() != page())
    PAGE.write_text(page())
