"""`questctl eval`: the loss of a trained run on its own validation text, on its training text, or on another text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from .. import console
from ..errors import UsageError, unknown
from ..store import RunStore
from . import options as opt

if TYPE_CHECKING:
    from ..quant.packed import PackedSize

PARTS = ("val", "train")
PRODUCTS = ("values", "integers")
A_RUN = typer.Argument(metavar="RUN", show_default=False, help="A run: its name, or an end of it that is unique.")
Tokens = Annotated[int | None, typer.Option(min=1, help="Tokens at the most; left out: as the run did.", show_default=False)]
Packed = Annotated[bool, typer.Option("--packed", help="From packed weights: codes of the trained bits, and scales.")]
ProductBy = Annotated[
    str | None,
    typer.Option(
        "--product", show_default=False,
        help="With --packed: values (the unpacked loss to the last bit; default on a CPU) or integers (default on a GPU).",
    ),
]  # fmt: skip


def command(
    name: Annotated[str, A_RUN],
    data: opt.Data = None,
    part: Annotated[str, typer.Option(help="Side of the split: val or train.")] = "val",
    tokens: Tokens = None,
    packed: Packed = False,
    product: ProductBy = None,
    runs: opt.RunsDir = None,
    as_json: opt.Json = False,
) -> None:
    """Measure the loss of a run's weights. Without options it is the number that the run reported, measured again."""
    if part not in PARTS:
        raise UsageError(unknown("--part", part, PARTS))
    run = RunStore(opt.runs_dir(runs)).find(name)
    config = run.config()
    from ..training.inputs import load_data, load_other

    text = load_other(config, run, data) if data else load_data(config, run)
    from ..training.evaluate import bits_per_byte
    from ..training.loaded import load_model, loss_on
    from ..training.loop import execution, pick_device

    device = pick_device(config.train.device)
    model = load_model(run, device=device)
    if text.meta.vocab_size > model.config.vocab_size:
        ids = f"has {text.meta.vocab_size} ids, {run.name} knows {model.config.vocab_size}"
        raise UsageError(f"--data: {data} {ids}; take a text of the same tokenizer.")
    size = pack(model, run.name, packed, product)
    with execution(int(run.env().get("threads") or 1), device):  # as it was trained: the same bits
        loss = loss_on(model, config, text, part=part, max_tokens=tokens)
    shard = text.meta.val if part == "val" else text.meta.train
    per_byte = bits_per_byte(loss, shard.bytes_per_token)
    if as_json:
        more = {"packed": size._asdict()} if size else {}
        console.print_json({"run": run.name, "data": text.meta.source, "part": part, "data_hash": text.data_hash,
                            "loss": loss, "bits_per_byte": per_byte, **more})  # fmt: skip
    else:
        columns = ("run", "text", "part", "nats/token", "bits/byte")
        console.print_table(columns, [(run.name, text.meta.source, part, loss, per_byte)], left=3)
        if size:
            console.note(packed_note(size))


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
    return f"{size.layers} layers packed in {size.bytes / 1024:,.1f} KiB, {share}; {how}"
