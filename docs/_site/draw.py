"""Draw the pictures of the documentation: `python docs/_site/draw.py`. They are committed in docs/images.

The curves of the quantizer are computed by the quantizers, the arrows between rooms by reading the imports.
"""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl

mpl.use("svg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import FancyBboxPatch

ROOT = Path(__file__).resolve().parent.parent.parent
IMAGES = ROOT / "docs" / "images"
BLUE, ORANGE, GREEN, GREY = "#3f51b5", "#e07b00", "#2e7d32", "#7a7f8a"
STYLE = {
    "svg.hashsalt": "questctl",
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "xtick.color": GREY,
    "ytick.color": GREY,
}


def save(figure: plt.Figure, name: str) -> None:
    """Write one SVG that depends on nothing but what is drawn."""
    figure.savefig(IMAGES / name, metadata={"Date": None, "Creator": None}, bbox_inches="tight", facecolor="white")
    plt.close(figure)


def response(spec: str, n: int = 1001) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x, y and dy/dx of a quantizer on one row of normal quantiles, whose root mean square is 1."""
    import torch
    from scipy.stats import norm

    from questctl.quant import make_quantizer

    x = norm.ppf((np.arange(n) + 0.5) / n)
    row = torch.tensor(x / np.sqrt(np.mean(x**2)), dtype=torch.float64)[None].requires_grad_()
    y = make_quantizer(spec)(row)
    y.sum().backward()
    return row.detach()[0].numpy(), y.detach()[0].numpy(), row.grad[0].numpy()


def quantizer() -> None:
    """The rounding of int2 beside the masks of three estimators."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.4), gridspec_kw={"wspace": 0.25})
    x, y, _ = response("int2-rms-trust")
    levels = np.unique(y.round(9))
    step = levels[1] - levels[0]
    left.axvspan(levels[0] - step / 2, levels[-1] + step / 2, color=BLUE, alpha=0.08, lw=0)
    left.fill_between(x, -2.6, -2.6 + 2.2 * np.exp(-(x**2) / 2), color=GREY, alpha=0.25, lw=0)
    left.plot(x, x, color=GREY, lw=0.8, ls="--")
    left.plot(x, y, color=BLUE, lw=2)
    left.set(xlim=(-3, 3), ylim=(-2.6, 2.6), xlabel="value z, in standard deviations of the row", ylabel="quantized value s·q")
    left.set_yticks(levels, [f"{v:+.2f}" for v in levels])
    left.set_title("grid int2, scale rms", fontsize=10, loc="left")
    left.text(0, levels[-1] + 0.55, "trusted: at most half a step of error", ha="center", color=BLUE, fontsize=9)
    for spec, colour, shift in (("int2-rms-ste", GREY, 0.02), ("int2-rms-clip1", GREEN, -0.02), ("int2-rms-trust", BLUE, 0.0)):
        x, _, slope = response(spec)
        right.plot(x, slope + shift, color=colour, lw=2, label=spec.rpartition("-")[2])
    right.set(xlim=(-3, 3), ylim=(-0.1, 1.35), yticks=(0, 1))
    right.set(xlabel="value z, in standard deviations of the row", ylabel="mask m")
    right.set_title("gradient that the estimator passes", fontsize=10, loc="left")
    right.legend(frameon=False, ncols=4, loc="upper center", fontsize=9, handlelength=1.4, columnspacing=1.2)
    save(figure, "quantizer.svg")


SPECS = {"spec", "methods", "components", "grids", "rotations", "scales", "masks", "estimators"}


def room(parts: Sequence[str]) -> str:
    """The room of a module, from its path below questctl/; `quant` is two rooms, its torch-free specs and its modules."""
    if parts[0] == "quant" and len(parts) > 1:
        return "quant specs" if parts[1] in SPECS else "quant modules"
    return parts[0]


def imports() -> dict[str, set[str]]:
    """Room → the rooms that its files import, inside functions too."""
    edges: dict[str, set[str]] = defaultdict(set)
    for path in all_files():
        parts = path.relative_to(ROOT / "questctl").with_suffix("").parts
        package = ["questctl", *parts[:-1]]
        source = room(parts)
        edges[source] |= set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            for name in imported(node, package):
                target = name.split(".")[1:]
                if name.startswith("questctl.") and room(target) != source:
                    edges[source].add(room(target))
    return {name: {t for t in edges[name] if t in edges} for name in sorted(edges)}


def all_files() -> list[Path]:
    """Every file of the package, also behind the links."""
    package = ROOT / "questctl"
    folders = [package, *(p for p in package.iterdir() if p.is_dir() and p.name not in {"__pycache__", "experiments"})]
    files = {f for p in folders for f in (p.rglob("*.py") if p != package else p.glob("*.py"))}
    return sorted(f for f in files if not f.name.startswith("__main__") and f != package / "__init__.py")


def imported(node: ast.AST, package: list[str]) -> list[str]:
    """Full names of what an import statement names; [] for other statements."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    base = package[: len(package) - node.level + 1] if node.level else []
    module = [*base, *(node.module.split(".") if node.module else [])]
    return [".".join([*module, alias.name]) for alias in node.names]


ROWS = (  # the rooms from top to bottom, in the order of the import contracts, and where each stands from left to right
    (("cli", 5.0),),
    (("scaling", 2.6), ("bench", 8.6)),
    (("sweep", 2.6), ("export", 5.4)),
    (("posttraining", 7.0),),
    (("training", 3.4), ("evaluate", 7.4)),
    (("models", 7.2),),
    (("data", 4.4), ("quant modules", 7.6)),
    (("store", 4.4),),
    (("config", 5.4),),
    (("pretrained", 3.0), ("quant specs", 6.6)),
)
SIDE = {"analysis": (0.4, 2.2), "kernels": (10.4, 3.0)}
SINGLE = {"demo", "doctor"}  # files beside the rooms, not drawn
BASE = ("errors", "system", "console", "metrics")


def rooms() -> None:
    """The rooms as boxes, with an arrow for each import that no path of other arrows implies."""
    places = {name: (x, 10.0 - row) for row, names in enumerate(ROWS) for name, x in names} | SIDE
    missing = imports().keys() - places.keys() - set(BASE) - SINGLE - {"quant"}
    assert not missing, f"rooms without a place in the picture: {missing}"
    edges = {source: targets & places.keys() for source, targets in imports().items() if source in places}
    down = {source: {t for t in targets if places[t][1] < places[source][1]} for source, targets in edges.items()}
    figure, axes = plt.subplots(figsize=(9.2, 8.6))
    axes.set(xlim=(-1.6, 11.8), ylim=(-0.7, 10.4))
    axes.axis("off")
    boxes = {}
    for name, (x, y) in places.items():
        colour = ORANGE if name in SIDE else BLUE
        boxes[name] = FancyBboxPatch((x - 1.15, y - 0.2), 2.3, 0.4, boxstyle="round,pad=0.05", fc="white", ec=colour, lw=1.6)
        axes.add_patch(boxes[name])
        folder, _, part = name.partition(" ")
        axes.text(x, y, f"{folder}/ {part}".strip(), ha="center", va="center", fontsize=10.5, color="#20242c")
    for source, targets in edges.items():
        for target in sorted(targets):
            if target in down[source] and implied(down, source, target):
                continue
            ends = {"patchA": boxes[source], "patchB": boxes[target], "shrinkA": 1, "shrinkB": 2}
            arrow = {"arrowstyle": "-|>", "color": GREY, "lw": 1.2, "mutation_scale": 12, **ends}
            if target not in down[source]:
                arrow |= {"ls": (0, (3, 2)), "connectionstyle": "arc3,rad=0.12"}
            axes.annotate("", places[target], places[source], arrowprops=arrow)
    axes.add_patch(FancyBboxPatch((1.0, -0.25), 8.8, 0.5, boxstyle="round,pad=0.05", fc="#f2f3f7", ec=GREY, lw=1.2))
    axes.text(5.4, 0.0, ", ".join(BASE) + ": every room may import these", ha="center", va="center", fontsize=9.5)
    axes.text(0.4, 1.75, "no torch", ha="center", color=ORANGE, fontsize=9)
    axes.text(10.4, 2.55, "no other room", ha="center", color=ORANGE, fontsize=9)
    save(figure, "rooms.svg")


def implied(edges: dict[str, set[str]], source: str, target: str) -> bool:
    """True if `target` is reached from `source` through another room."""
    waiting, visited = [name for name in edges[source] if name != target], set()
    while waiting:
        name = waiting.pop()
        if name == target:
            return True
        if name not in visited:
            visited.add(name)
            waiting += edges.get(name, ())
    return False


if __name__ == "__main__":
    with mpl.rc_context(STYLE):
        quantizer()
        rooms()
