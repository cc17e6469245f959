"""`questctl eval`: the loss of a trained run on its own validation text, on its training text, or on another text."""

from __future__ import annotations

from typing import Annotated

import typer

from .. import console
from ..errors import UsageError, unknown
from ..store import RunStore
from . import options as opt

PARTS = ("val", "train")
A_RUN = typer.Argument(metavar="RUN", show_default=False, help="A run: its name, or an end of it that is unique.")
Tokens = Annotated[int | None, typer.Option(min=1, help="Tokens at the most; left out: as the run did.", show_default=False)]


def command(
    name: Annotated[str, A_RUN],
    data: opt.Data = None,
    part: Annotated[str, typer.Option(help="Side of the split: val or train.")] = "val",
    tokens: Tokens = None,
    runs: opt.RunsDir = None,
    as_json: opt.Json = False,
) -> None:
    """Measure the loss of a run's weights. Without options it is the number that the run reported, measured again."""
    if part not in PARTS:
        raise UsageError(unknown("--part", part, PARTS))
    run = RunStore(opt.runs_dir(runs)).find(name)
    config = run.config()
    from ..training.inputs import load_data

    other = config.model_copy(update={"data": config.data.model_copy(update={"source": data})}) if data else None
    text = load_data(other) if other else load_data(config, run)
    from ..training.evaluate import bits_per_byte
    from ..training.loaded import load_model, loss_on
    from ..training.loop import execution, pick_device

    device = pick_device(config.train.device)
    model = load_model(run, device=device)
    if text.meta.vocab_size > model.config.vocab_size:
        ids = f"has {text.meta.vocab_size} ids, {run.name} knows {model.config.vocab_size}"
        raise UsageError(f"--data: {data} {ids}; take a text of the same tokenizer.")
    with execution(int(run.env().get("threads") or 1), device):  # as it was trained: the same bits
        loss = loss_on(model, config, text, part=part, max_tokens=tokens)
    shard = text.meta.val if part == "val" else text.meta.train
    per_byte = bits_per_byte(loss, shard.bytes_per_token)
    if as_json:
        console.print_json({"run": run.name, "data": text.meta.source, "part": part, "data_hash": text.data_hash,
                            "loss": loss, "bits_per_byte": per_byte})  # fmt: skip
    else:
        columns = ("run", "text", "part", "nats/token", "bits/byte")
        console.print_table(columns, [(run.name, text.meta.source, part, loss, per_byte)], left=3)
