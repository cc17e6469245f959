"""Figures of a benchmark: speed-up over the baseline against the number of rows M, and shares of the roofline."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .rows import BenchRow, shape_text


def write_plots(rows: Sequence[BenchRow], folder: Path) -> list[Path]:
    """Write `speedup-<op>.png` for each operation whose shape has an M, and `roofline.png`; returns the paths.

    Rows without a time are left out. If nothing was timed, nothing is written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    timed = {row.op: [r for r in rows if r.op == row.op and r.speed_up_p50] for row in rows if "M" in row.shape}
    paths = [_speed_up(op_rows, folder / f"speedup-{op}.png") for op, op_rows in timed.items() if op_rows]
    rated = [row for row in rows if row.roofline_share]
    return [*paths, _roofline(rated, folder / "roofline.png")] if rated else paths


def _speed_up(rows: Sequence[BenchRow], path: Path) -> Path:
    """One line per implementation and layer. A dashed line shows the speed-up at the roofline."""
    from matplotlib.figure import Figure

    axes = (figure := Figure(figsize=(9, 5.5), layout="constrained")).add_subplot()
    base = {_shape(r): r.p50_us for r in rows if r.implementation == r.baseline}
    lines: dict[str, list[tuple[int, float]]] = {}
    floors: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        layer = shape_text({k: v for k, v in row.shape.items() if k not in ("M", "packed")})
        if row.implementation != row.baseline and row.speed_up_p50:
            lines.setdefault(f"{row.implementation}, {layer}", []).append((row.shape["M"], row.speed_up_p50))
        if row.roofline_us and row.verdict == "PASS" and (reference := base.get(_shape(row))):
            floors.setdefault(layer, []).append((row.shape["M"], reference / row.roofline_us))
    for label, points in lines.items():
        axes.plot(*zip(*sorted(points), strict=True), marker="o", markersize=4, linewidth=1.2, label=label)
    for layer, points in floors.items():
        axes.plot(*zip(*sorted(set(points)), strict=True), "k--", linewidth=0.8, label=f"at the roofline, {layer}")
    axes.axhline(1.0, color="grey", linewidth=0.8)
    axes.set(xscale="log", yscale="log", xlabel="M, rows of activations", ylabel=f"speed-up over {rows[0].baseline}")
    ms = sorted({row.shape["M"] for row in rows})
    axes.set_xticks(ms, [str(m) for m in ms])
    axes.set_xticks([], minor=True)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    n = rows[0].threads
    axes.set_title(f"{rows[0].op} on {rows[0].device}, {n} thread{'s' * (n != 1)}" if n else rows[0].op)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=150)
    return path


def _roofline(rows: Sequence[BenchRow], path: Path) -> Path:
    """A heat map of the shares: implementations of operations down, their shapes across.

    A share above 100 % means that the calibrated rates were too low.
    """
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(f"{r.op}, {r.implementation}" for r in rows))
    cells = {name: [r for r in rows if f"{r.op}, {r.implementation}" == name] for name in names}
    width = max(map(len, cells.values()))
    axes = (figure := Figure(figsize=(3 + 1.5 * width, 1 + 0.55 * len(names)), layout="constrained")).add_subplot()
    nan = float("nan")
    grid = [[100 * (r.roofline_share or nan) for r in line] + [nan] * (width - len(line)) for line in cells.values()]
    image = axes.imshow(grid, vmin=0, vmax=100, aspect="auto", cmap="viridis")
    for y, line in enumerate(cells.values()):
        for x, row in enumerate(line):
            text = f"{min(999.0, grid[y][x]):.0f} %\n{shape_text(row.shape)}"
            axes.text(x, y, text, ha="center", va="center", fontsize=5, color="white" if grid[y][x] < 60 else "black")
    axes.set_yticks(range(len(names)), names, fontsize=7)
    axes.set_xticks([])
    axes.set_title(f"share of the roofline measured in this run, {rows[0].device}", fontsize=8)
    figure.colorbar(image, ax=axes, label="%")
    figure.savefig(path, dpi=150)
    return path


def _shape(row: BenchRow) -> tuple[tuple[str, int], ...]:
    return tuple(sorted(row.shape.items()))
