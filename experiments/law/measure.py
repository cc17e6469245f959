"""A law measured here, in rounds: each is designed and predicted before it is trained, and compared with what was predicted.

    .venv/bin/python experiments/law/measure.py --minutes 60        # goes on where the last sitting stopped

    round-1.toml                  written by hand
    round-k.toml, round-k.json    next runs of the law of the rounds before, with predictions and, once trained, outcomes
    held-out.toml, held-out.json  a model twice the largest, trained after round 4
    held-out-2.toml, …            the same model on half the tokens, trained after round 5
    held-out-LAW.json             what two other laws predict of it, whose fit to the rounds is better
    points.csv                    every finished run; the folder of runs itself is not kept
    fit.json, README.md           the law of all rounds, and the page

A prediction is written before its run starts, and never again: the outcome is put beside it. The planner sees points.csv alone,
so a sitting without the runs of an earlier one continues all the same.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd

import questctl
from questctl.scaling.fit import FitResult
from questctl.scaling.plan_files import sweep_file
from questctl.store import RunStore
from questctl.sweep.manifest import Sweep
from questctl.sweep.sweep_file import Cell, load_sweep_file

HERE = Path(__file__).resolve().parent
ROUNDS = ("1", "2", "3", "4", "5")
RUNS_A_ROUND = {"5": 8}  # else 12
# Rounds 2 to 4 sharpen eff for their cost, and took the cheapest runs. Round 5 looks at sizes next to what is to be predicted.
GOALS = {"5": "loss@1829408:1048576"}
LARGE = (402_048, 635_680, 885_696)
HELD_OUT = {"held-out": ROUNDS[:4], "held-out-2": ROUNDS}  # name → rounds whose law predicts it
OTHER_LAWS = ("offset", "qat")
SIZES = (26_784, 106_816, 221_664, 402_048, 635_680, 885_696)  # two layers of widths 32 to 192
LENGTHS = tuple(2**19 * 2**k for k in (0, 0.5, 1, 1.5, 2, 2.5, 3))  # tokens: 512 to 4096 steps
COLUMNS = (
    *("round", "run", "scheme", "N", "D", "loss", "seed", "seconds", "model_bits", "weights", "activations"),
    *("lr", "optimizer", "warmup_steps", "data_hash"),
)
BASE = {"data.source": "pystdlib:clean", "train.eval_tokens": 131_072, "optim.schedule": "wsd", "optim.warmup_steps": 20}


class Law:
    """The files of the law in `folder`, and the runs that are being trained in `runs`."""

    def __init__(self, folder: Path, runs: Path) -> None:
        self.folder, self.store = folder, RunStore(runs)

    @property
    def points(self) -> pd.DataFrame:
        """The finished runs of all rounds."""
        path = self.folder / "points.csv"
        return pd.read_csv(path) if path.exists() else pd.DataFrame(columns=list(COLUMNS))

    def fit(self, rounds: Sequence[str], law: str = "quest") -> FitResult:
        """The law of these rounds."""
        table = self.points
        path = self.folder / ".points-of-rounds.csv"
        table[table["round"].astype(str).isin(rounds)].to_csv(path, index=False)
        try:
            return questctl.fit_sources(path, law=law, bootstrap=0)
        finally:
            path.unlink()

    def design(self, label: str) -> Path:
        """The sweep file of a round; of all but the first, the next runs of the rounds before it."""
        path = self.folder / f"round-{label}.toml"
        if not path.exists():
            fit = self.fit(ROUNDS[: ROUNDS.index(label)])
            timed = self.folder / ".timed.csv"
            self.points.assign(state="done").rename(columns={"N": "params_non_embedding", "D": "tokens"}).to_csv(
                timed, index=False
            )
            plan = questctl.plan_next_runs(
                fit,
                RUNS_A_ROUND.get(label, 12),
                goal=GOALS.get(label, "eff"),
                sizes=LARGE if label in GOALS else SIZES,
                lengths=LENGTHS[:3] if label in GOALS else LENGTHS,
                timed_by=timed,
                bootstrap=0,
            )
            timed.unlink()
            path.write_text(sweep_file(plan, BASE).replace("next-runs", f"law-{label}", 1), encoding="utf-8")
        return path

    def predicted(self, name: str, cells: Sequence[Cell], rounds: Sequence[str], law: str = "quest") -> list[dict[str, Any]]:
        """The predictions of a round by the law of `rounds`, which are written the first time and only read later."""
        path = self.folder / f"{name}.json"
        if not path.exists():
            wanted = [(float(c.config.model.params_non_embedding), float(c.config.tokens), c.config.scheme) for c in cells]
            predictions = questctl.predict(self.fit(rounds, law), cells=wanted)
            rows = [
                {
                    "run": cell.run_id,
                    "scheme": p.scheme,
                    "N": p.params_non_embedding,
                    "D": p.tokens,
                    "predicted": p.loss,
                    "interval": p.interval,
                }
                for cell, p in zip(cells, predictions.cells, strict=True)
            ]
            self._write(path, {"law": law, "law_of_rounds": list(rounds), "runs": rows})
        rows = json.loads(path.read_text(encoding="utf-8"))["runs"]
        assert [row["run"] for row in rows] == [cell.run_id for cell in cells], f"{path}: is of another design"
        return rows

    def record(self, name: str, label: str, cells: Sequence[Cell]) -> None:
        """Put finished runs into points.csv and beside their predictions."""
        table, known = self.points, set(self.points["run"])
        new = [self._row(label, cell) for cell in cells if cell.run_id not in known and self.store.run(cell.run_id).result()]
        if new:
            table = pd.DataFrame([*table.to_dict("records"), *new], columns=list(COLUMNS))
            table.to_csv(self.folder / "points.csv", index=False)
        path = self.folder / f"{name}.json"
        if path.exists():
            losses = dict(zip(table["run"], table["loss"], strict=True))
            content = json.loads(path.read_text(encoding="utf-8"))
            for row in content["runs"]:
                if (loss := losses.get(row["run"])) is not None:
                    low, high = row["interval"] or (float("nan"),) * 2
                    row |= {"loss": loss, "within": bool(low <= loss <= high)}
            self._write(path, content)

    def _row(self, label: str, cell: Cell) -> dict[str, Any]:
        result = dataclasses.asdict(self.store.run(cell.run_id).require_result("law"))
        return {"round": label, "N": result["params_non_embedding"], "D": result["tokens"]} | {
            key: result[key] for key in COLUMNS if key in result
        }

    def train(self, file: Path, name: str, label: str) -> bool:
        """Train the cells of a sweep file that points.csv lacks; True if all of them are finished."""
        whole = load_sweep_file(file)
        known = set(self.points["run"])
        left = tuple(cell for cell in whole.cells if cell.run_id not in known)
        if left:
            sweep = Sweep(dataclasses.replace(whole, cells=left), self.store)
            questctl.run_sweep(sweep, record=False, watch=lambda outcomes: self.record(name, label, whole.cells))
            self.record(name, label, whole.cells)
        return set(self.points["run"]) >= {cell.run_id for cell in whole.cells}

    @staticmethod
    def _write(path: Path, content: Any) -> None:
        path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


@contextmanager
def stopping_after(minutes: float) -> Iterator[None]:
    """Interrupt this process, as Ctrl-C does, after so many minutes: runs in training are checkpointed."""
    timer = threading.Timer(60 * minutes, os.kill, (os.getpid(), signal.SIGINT))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def measure(law: Law) -> bool:
    """Go through the rounds, and through what is predicted after them; True when all is trained."""
    for label in ROUNDS:
        file, name, before = law.design(label), f"round-{label}", ROUNDS[: ROUNDS.index(label)]
        if before:
            law.predicted(name, load_sweep_file(file).cells, before)
        if not law.train(file, name, label):
            return False
        for held_out, rounds in HELD_OUT.items():
            if rounds[-1] == label and not predict_and_train(law, held_out, rounds):
                return False
    return True


def predict_and_train(law: Law, name: str, rounds: Sequence[str]) -> bool:
    """Predict the cells of a sweep file by the laws of `rounds`, then train them; True when all are trained."""
    file = law.folder / f"{name}.toml"
    cells = load_sweep_file(file).cells
    law.predicted(name, cells, rounds)
    for other in OTHER_LAWS:
        law.predicted(f"{name}-{other}", cells, rounds, other)
    complete = law.train(file, name, name)
    for other in OTHER_LAWS:
        law.record(f"{name}-{other}", name, cells)
    return complete


def draw(law: Law, stem: Path) -> None:
    """eff of each scheme with its interval, and what three laws predicted of models twice the largest beside their losses."""
    from questctl.analysis.draw import axes_grid, plain_log_axis, save

    figure, (left, *others) = axes_grid(13, 3.6, 3)
    fit = law.fit(ROUNDS)
    schemes = [label for label in fit.fit.points.labels if f"eff.{label}" in fit.fit.intervals]
    for y, scheme in enumerate(schemes):
        left.plot(fit.fit.intervals[f"eff.{scheme}"], [y, y], color="#0072b2", linewidth=2)
        eff = fit.fit.eff[scheme]
        assert eff is not None  # it has runs
        left.plot(eff, y, "o", color="#0072b2")
    left.set_yticks(range(len(schemes)), schemes)
    left.invert_yaxis()
    left.set_xlim(0.015, 1)
    plain_log_axis(left)
    left.set_xlabel("eff, with 95 % intervals")
    left.set_title(f"share of the parameters that count: law quest of {len(fit.points)} runs", fontsize=9, loc="left")
    for right, held_out, tokens in zip(others, HELD_OUT, ("1.05M", "0.52M"), strict=True):
        draw_held_out(law, right, held_out)
        right.set_title(f"1.83M on {tokens} tokens: predicted, then trained", fontsize=9, loc="left")
    others[0].legend(frameon=False, fontsize=8)
    save(figure, stem, ("png",))


def draw_held_out(law: Law, right: Any, held_out: str) -> None:
    """The intervals of three laws for the schemes of one model, and its losses."""
    for k, (name, color) in enumerate((("", "#0072b2"), ("-offset", "#d55e00"), ("-qat", "#999999"))):
        content = json.loads((law.folder / f"{held_out}{name}.json").read_text(encoding="utf-8"))
        for x, row in enumerate(content["runs"]):
            place = x + 0.22 * (k - 1)
            right.plot([place, place], row["interval"], color=color, linewidth=2)
            right.plot(
                place, row["predicted"], "_", color=color, label=f"law {content.get('law', 'quest')}" if x == 0 else None
            )
    for x, row in enumerate(content["runs"]):
        right.plot([x - 0.35, x + 0.35], [row["loss"]] * 2, color="black", linewidth=1, label="measured" if x == 0 else None)
    right.set_xticks(range(len(content["runs"])), [row["scheme"].removeprefix("quest-") for row in content["runs"]])
    right.set_ylabel("validation loss (nats/token)")


def main() -> None:
    """Measure for so many minutes, and write the fit when everything is there."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=240.0)
    parser.add_argument("--folder", type=Path, default=HERE)
    parser.add_argument("--runs", type=Path, default=Path("runs/law"))
    parser.add_argument("--draw", type=Path, help="draw eff and what was predicted of the model held out, and train nothing")
    words = parser.parse_args()
    law = Law(words.folder, words.runs)
    if words.draw:
        draw(law, words.draw)
        return
    with stopping_after(words.minutes):
        complete = measure(law)
    if complete:
        law.fit(ROUNDS).save(law.folder)


if __name__ == "__main__":
    main()
