"""`questctl eval`: the loss of trained runs on their own validation or training text or on another, and accuracies on tasks."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from .. import console
from ..errors import UsageError, unknown
from ..evaluate.runs import PARTS, evaluate_run
from ..store import RunStore
from . import options as opt

TASKS = typer.Option(help="Questions (.jsonl, .json), an lm-eval .yaml, or hf:NAME (repeatable).", show_default=False)
Tokens = Annotated[int | None, typer.Option(min=1, help="Most tokens (default: as many as the run).", show_default=False)]
Packed = Annotated[bool, typer.Option("--packed", help="From packed weights: codes of the trained bits, and scales.")]
Average = Annotated[bool, typer.Option("--average", help="The average of the weights that optim.average kept.")]
Reference = Annotated[str | None, typer.Option(help="Compare predictions with: a run, folder, FILE.gguf.", show_default=False)]
ProductBy = Annotated[
    str | None,
    typer.Option(
        "--product",
        show_default=False,
        help="With --packed: values (the unpacked loss to the last bit; default on a CPU), integers (default on a GPU), or "
        "bytes (the same sums from a byte a weight: faster, for more memory).",
    ),
]


def command(
    names: opt.SomeRuns = None,
    data: opt.Data = None,
    part: Annotated[str, typer.Option(help="Side of the split: val or train.")] = "val",
    tokens: Tokens = None,
    tasks: Annotated[list[str] | None, TASKS] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Questions of each task at the most.", show_default=False)] = None,
    shots: Annotated[int, typer.Option(min=0, help="Solved examples before each question.")] = 0,
    packed: Packed = False,
    product: ProductBy = None,
    average: Average = False,
    reference: Reference = None,
    watch: Annotated[bool, typer.Option("--watch", help="Evaluate every run of the folder as soon as it finishes.")] = False,
    runs: opt.RunsDir = None,
    as_json: opt.Json = False,
) -> None:
    """Measure the loss of runs, or their accuracy on tasks. Without options: the loss that a run reported, measured again.

    Measurements are kept in the run's evaluations.jsonl. One run gives one JSON object, several give a list.
    """
    if part not in PARTS:
        raise UsageError(unknown("--part", part, PARTS))
    if watch == bool(names):
        raise UsageError("eval: name runs, or give --watch for all runs of the folder; one of the two.")
    store = RunStore(runs)
    measurements = []
    for run in store.as_they_finish() if watch else [store.find(name) for name in names or ()]:
        measured = evaluate_run(
            run,
            data=data,
            part=part,
            max_tokens=tokens,
            tasks=tasks or (),
            limit=limit,
            shots=shots,
            packed=packed,
            product=product,
            average=average,
            reference=reference,
        )
        measurements.append(measured)
        if "unfinished" in measured:
            from ..training.loading import PartialWeights

            console.warn(PartialWeights(**measured["unfinished"]).sentence(run.name))
        if not as_json:
            show(measured)
    if as_json:
        console.print_json(measurements if watch or len(measurements) != 1 else measurements[0])


def show(measured: dict[str, Any]) -> None:
    """Print one evaluation as a table."""
    if "tasks" in measured:
        rows = [(measured["run"], task, *metric) for task, values in measured["tasks"].items() for metric in values.items()]
        console.print_table(("run", "task", "metric", "value"), rows, left=3)
    else:
        columns = ("run", "text", "part", "nats/token", "bits/byte")
        row = tuple(measured[key] for key in ("run", "data", "part", "loss", "bits_per_byte"))
        console.print_table(columns, [row], left=3)
    if against := measured.get("reference"):
        same = f"the same likeliest token in {against['agreement']:.1%} of positions"
        console.note(f"KL from {against['name']}: {against['kl']:.4f} nats/token; {same}.")
    if "packed" in measured:
        from ..quant.packed import PackedSize

        console.note(PackedSize(**measured["packed"]).sentence())
