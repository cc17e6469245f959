"""`questctl eval`: the loss of trained runs on their own validation or training text or on another, and accuracies on tasks."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .. import console
from ..errors import UsageError, unknown
from ..store import Run, RunStore
from . import options as opt

if TYPE_CHECKING:
    from ..quant.packed import PackedSize

PARTS = ("val", "train")
PRODUCTS = ("values", "integers", "bytes")
WATCH_S = 5.0
A_RUN = typer.Argument(metavar="RUN", show_default=False, help="A run: its name, or an end of it that is unique.")
SOME_RUNS = typer.Argument(metavar="RUN…", show_default=False, help="Runs: their names, or ends of them that are unique.")
Tasks = Annotated[
    list[str] | None,
    typer.Option("--tasks", help="Questions (.jsonl, .json), an lm-eval .yaml, or hf:NAME (repeatable).", show_default=False),
]
Tokens = Annotated[int | None, typer.Option(min=1, help="Tokens at the most; left out: as the run did.", show_default=False)]
Packed = Annotated[bool, typer.Option("--packed", help="From packed weights: codes of the trained bits, and scales.")]
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
    names: Annotated[list[str] | None, SOME_RUNS] = None,
    data: opt.Data = None,
    part: Annotated[str, typer.Option(help="Side of the split: val or train.")] = "val",
    tokens: Tokens = None,
    tasks: Tasks = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Questions of each task at the most.", show_default=False)] = None,
    shots: Annotated[int, typer.Option(min=0, help="Solved examples before each question.")] = 0,
    packed: Packed = False,
    product: ProductBy = None,
    watch: Annotated[bool, typer.Option("--watch", help="All runs of the folder, each when it is finished.")] = False,
    runs: opt.RunsDir = None,
    as_json: opt.Json = False,
) -> None:
    """Measure the loss of runs, or their accuracy on tasks. Without options: the number that a run reported, measured again.

    What was measured is kept in the run's evaluations.jsonl. One run gives one JSON object, several give a list.
    """
    if part not in PARTS:
        raise UsageError(unknown("--part", part, PARTS))
    if watch == bool(names):
        raise UsageError("eval: names runs, or --watch for all runs of the folder; one of the two.")
    store = RunStore(opt.runs_dir(runs))
    chosen = _as_they_finish(store) if watch else iter([store.find(name) for name in names or ()])
    text: dict[str, Any] = {"data": data, "part": part, "tokens": tokens}
    questions: dict[str, Any] = {"tasks": tasks or (), "limit": limit, "shots": shots}
    found = []
    for run in chosen:
        found.append(measure(run, **text, **questions, packed=packed, product=product))
        run.add_evaluation(found[-1])
        if (partial := found[-1].get("unfinished")) is not None:
            warn_unfinished(run.name, **partial)
        if not as_json:
            show(found[-1])
    if as_json:
        console.print_json(found if watch or len(found) != 1 else found[0])


def _as_they_finish(store: RunStore) -> Iterator[Run]:
    """Every finished run once; returns when no run of the folder can finish any more."""
    seen: set[str] = set()
    while True:
        runs = store.runs()
        done = [run for run in runs if run.name not in seen and run.result() is not None]
        for run in done:
            seen.add(run.name)
            yield run
        if not done and not any(run.state() in ("pending", "running") for run in runs):
            return
        if not done:
            time.sleep(WATCH_S)


def measure(
    run: Run,
    *,
    data: str | None,
    part: str,
    tokens: int | None,
    tasks: Sequence[str],
    packed: bool,
    product: str | None,
    limit: int | None,
    shots: int,
) -> dict[str, Any]:
    """Loss of a run on a text, or with `tasks` its accuracies; one JSON document."""
    config = run.config()
    from ..training.loading import load_model, loss_on, unfinished
    from ..training.loop import execution, pick_device

    if tasks:
        from ..evaluate.tasks import require

        require()
    device, partial = pick_device(config.train.device), unfinished(run)
    threads = int(run.env().get("threads") or 1)
    if tasks:
        from ..evaluate.tasks import evaluate
        from ..training.preflight import run_tokenizer

        if (tokenizer := run_tokenizer(config, run)) is None:
            raise UsageError(f"--tasks: {run.name} was trained on token ids, not on text; tasks are text.")
        model = load_model(run, device=device)
        size = pack(model, run.name, packed, product)
        with execution(threads, device):
            found = evaluate(model, tokenizer, tasks, max_length=config.data.seq_len, limit=limit, shots=shots)
        how: dict[str, Any] = {"tasks": found, "limit": limit, "shots": shots}
    else:
        from ..evaluate.loss import bits_per_byte
        from ..training.preflight import load_data, load_other

        text = load_other(config, run, data) if data else load_data(config, run)
        model = load_model(run, device=device)
        if text.meta.vocab_size > model.config.vocab_size:
            ids = f"has {text.meta.vocab_size} ids, {run.name} knows {model.config.vocab_size}"
            raise UsageError(f"--data: {data} {ids}; take a text of the same tokenizer.")
        size = pack(model, run.name, packed, product)
        with execution(threads, device):  # as it was trained: the same bits
            loss = loss_on(model, config, text, part=part, max_tokens=tokens)
        shard = text.meta.val if part == "val" else text.meta.train
        how = {
            "data": text.meta.source,
            "part": part,
            "data_hash": text.data_hash,
            "loss": loss,
            "bits_per_byte": bits_per_byte(loss, shard.bytes_per_token),
        }
    more = {"unfinished": partial._asdict() if partial else None, "packed": size._asdict() if size else None}
    return {"run": run.name, **how, **{key: value for key, value in more.items() if value}}


def show(found: dict[str, Any]) -> None:
    """One evaluation as a table."""
    if "tasks" in found:
        rows = [(found["run"], task, *metric) for task, values in found["tasks"].items() for metric in values.items()]
        console.print_table(("run", "task", "metric", "value"), rows, left=3)
    else:
        columns = ("run", "text", "part", "nats/token", "bits/byte")
        console.print_table(columns, [tuple(found[k] for k in ("run", "data", "part", "loss", "bits_per_byte"))], left=3)
    if "packed" in found:
        from ..quant.packed import PackedSize

        console.note(packed_note(PackedSize(**found["packed"])))


def warn_unfinished(name: str, *, state: str, step: int, steps: int) -> None:
    """Say whose weights these are, where they are not a finished run's."""
    from ..training.loading import PartialWeights

    console.warn(PartialWeights(state, step, steps).sentence(name))


def pack(model: Any, name: str, packed: bool, product: str | None) -> PackedSize | None:
    """Freeze `model` if `packed` asks for it. Raises UsageError if none of its layers can be, or `product` is for nothing."""
    if product is not None and product not in PRODUCTS:
        raise UsageError(unknown("--product", product, PRODUCTS))
    if not packed:
        if product is not None:
            raise UsageError(f"--product {product}: is how packed weights are multiplied; add --packed.")
        return None
    from ..quant.packed import freeze, packed_size

    default = "integers" if next(model.parameters()).is_cuda else "values"
    chosen: Any = product or default
    size = packed_size(freeze(model, chosen))
    if not size.layers:
        raise UsageError(f"--packed: {name} has no layer whose weights are trained to be quantized; there is nothing to pack.")
    return size


def packed_note(size: PackedSize) -> str:
    """What was packed, how small it is, and which implementation ran."""
    how = f"{size.by_integers} multiplied by integers, {size.layers - size.by_integers} by values"
    share = f"{size.bytes / size.bf16_bytes:.3f} of bf16"
    more = f"; {size.expanded_bytes / 1024:,.1f} KiB more as a byte a weight" if size.expanded_bytes else ""
    return f"{size.layers} layers packed in {size.bytes / 1024:,.1f} KiB, {share}; {how}{more}"
