"""The report as one HTML file that needs no network: template, style, script, plotly.js and data are inlined.

Every text from outside is escaped by Jinja2, and data is JSON without any `<`. A content security policy allows only the two
scripts of the page, by their hashes, so that no name of a run can ever be executed.
"""

from __future__ import annotations

import base64
import colorsys
import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..charts import Axis, Chart, Series, View
from ..style import Style
from .build import Cell, Report

FOLDER = Path(__file__).parent
DIGITS = 6  # significant, of the numbers in charts
PLOTLY_SYMBOLS = {
    "o": "circle",
    "s": "square",
    "D": "diamond",
    "^": "triangle-up",
    "v": "triangle-down",
    "P": "cross",
    "X": "x",
    "*": "star",
    "<": "triangle-left",
    ">": "triangle-right",
    "h": "hexagon",
    "d": "diamond-tall",
    "|": "line-ns",
}
DARK, WHITE, LIGHT_ENOUGH = "#16181c", 0.91, 5.0  # the lightest grey; the least contrast there (WCAG 2: 4.5 for text)


def render(report: Report) -> str:
    """The page; without charts it carries no plotly.js. Raises ImportError without jinja2 or plotly (the extra `report`)."""
    import jinja2
    from plotly.offline import get_plotlyjs

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"source": _attributes, "chart_json": chart_json}
    script, library = (FOLDER / "page.js").read_text(encoding="utf-8"), get_plotlyjs() if report.charts else ""
    assert "</script" not in (script + library).lower()
    looks = {name: look_json(look) for name, look in report.looks.items()}
    return environment.get_template("page.html.j2").render(
        report=report,
        style=(FOLDER / "page.css").read_text(encoding="utf-8"),
        script=script,
        library=library,
        policy=" ".join(f"'sha256-{_hash(text)}'" for text in (script, library) if text),
        looks=to_json(looks),
        names=to_json(list(report.run_names)),
        document=to_json(report.document),
    )


def _hash(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def to_json(value: Any) -> str:
    """JSON for a script element: without `<`, and with null for numbers that are not finite."""
    import markupsafe

    form: dict[str, Any] = {"ensure_ascii": False, "separators": (",", ":"), "allow_nan": False}
    try:
        text = json.dumps(value, **form)
    except (TypeError, ValueError):  # numbers of numpy, or not finite
        text = json.dumps(_plain(value), **form)
    for letter in ("<", ">", "&", "\u2028", "\u2029"):
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    return markupsafe.Markup(text)


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return _plain(value.item()) if isinstance(value, np.generic) else value


def _attributes(cell: Cell) -> str:
    """` data-run="…" data-key="…" data-value="…"` of a cell, escaped."""
    import markupsafe

    attributes = {**cell.source, **({} if cell.value is None else {"value": repr(cell.value)})}
    return markupsafe.Markup("").join(markupsafe.Markup(' data-{}="{}"').format(k, v) for k, v in attributes.items())


def chart_json(chart: Chart) -> str:
    """The JSON of a chart that page.js draws."""
    return to_json([_view(view) for view in chart.views])


def _view(view: View) -> dict[str, Any]:
    series = [_series(s) for s in view.series]
    return {"choice": dict(view.choice), "note": view.note, "x": _axis(view.x), "y": _axis(view.y), "series": series}


def _axis(axis: Axis) -> dict[str, Any]:
    return {
        "label": axis.label,
        "log": axis.log,
        "words": list(axis.words),
        "ticks": [list(t) for t in axis.ticks],
        "shown": axis.shown and list(axis.shown),
        "mark": axis.mark,
    }


def _series(s: Series) -> dict[str, Any]:
    fields: dict[str, Any] = {"name": s.name, "kind": s.kind, "scheme": s.scheme, "hollow": s.hollow, "listed": s.listed}
    ends = {"low": s.low, "high": s.high} if s.low is not None else {}
    fields |= {key: _numbers(value) for key, value in {"x": s.x, "y": s.y, **ends}.items() if value is not None}
    if s.run is not None:
        starts = np.flatnonzero(np.concatenate([[True], s.run[1:] != s.run[:-1]]))
        fields["run"] = [[int(a), int(s.run[a])] for a in starts] if s.kind == "line" else [int(r) for r in s.run]
    return fields


def _numbers(values: np.ndarray) -> list[float | int | None]:
    """The values, rounded to DIGITS; whole numbers as integers."""
    out: list[float | int | None] = []
    for v in np.asarray(values, float).tolist():
        if not math.isfinite(v):
            out.append(None)
        else:
            rounded = float(f"{v:.{DIGITS}g}")
            out.append(int(rounded) if rounded.is_integer() and abs(rounded) < 1e15 else rounded)
    return out


# ---------------------------------------------------------------------------------------------------------------- looks


def look_json(look: Style) -> dict[str, str]:
    """A style in plotly's words, with a colour that can be read on the dark page."""
    if isinstance(look.dash, str):
        dash = "solid"
    else:
        dash = ",".join(f"{2 * part:g}px" for part in look.dash[1])
    symbol = PLOTLY_SYMBOLS[look.marker]
    return {"light": look.color, "dark": on_dark(look.color), "symbol": symbol, "marker": look.marker, "dash": dash}


def on_dark(color: str) -> str:
    """The colour, made light enough for the dark page; hue and saturation stay, and grey is inverted."""
    hue, light, saturation = colorsys.rgb_to_hls(*_rgb(color))
    if saturation == 0:
        light = max(0.62, WHITE - light)
    for level in np.linspace(light, 1, 41):
        mixed = colorsys.hls_to_rgb(hue, float(level), saturation)
        if (_luminance(mixed) + 0.05) / (_luminance(_rgb(DARK)) + 0.05) >= LIGHT_ENOUGH:
            break
    return "#" + "".join(f"{round(255 * c):02x}" for c in mixed)


def _rgb(color: str) -> tuple[float, ...]:
    return tuple(int(color[i : i + 2], 16) / 255 for i in (1, 3, 5))


def _luminance(rgb: tuple[float, ...]) -> float:
    """Relative luminance of sRGB, WCAG 2."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in rgb]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
