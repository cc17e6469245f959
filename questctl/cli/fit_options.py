"""Options of the commands that read sources and fit laws, and how their `NAME=VALUE` texts are read."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from .. import console
from ..errors import UsageError

if TYPE_CHECKING:
    from ..analysis.document import Table
    from ..analysis.findings import Finding
    from ..analysis.points import Points
    from ..analysis.tables import TableOptions
    from ..scaling.imports import ImportedRuns

OF_FIT, OF_TABLES = "Law and fit", "Rows of tables"  # panels of the help
Sources = Annotated[
    list[Path] | None,
    typer.Argument(metavar="SOURCE", show_default=False, help="Folders of runs, or .csv .json .parquet (default: --runs)."),
]
Map = Annotated[
    list[str] | None,
    typer.Option("--map", help="Our column = yours, or a formula: N=params, 'D=flops/(6*N)' (repeatable).", show_default=False),
]
Where = Annotated[
    list[str] | None,
    typer.Option(help="Only rows with COLUMN=VALUE, 'COLUMN=A|B', 'COLUMN<=VALUE', … (repeatable).", show_default=False),
]
KeepFailed = Annotated[bool, typer.Option("--keep-failed", help="Keep runs that did not finish, if they have a loss.")]
SkipBad = Annotated[bool, typer.Option("--skip-bad", help="Leave out rows that cannot be read, and repeated ones.")]
BestOf = Annotated[
    str | None, typer.Option("--best-of", help="Keep each cell's best run over these columns: lr,wd.", show_default=False)
]
Last = Annotated[bool, typer.Option("--last", help="Keep the last checkpoint of each run.")]
Cluster = Annotated[
    str | None,
    typer.Option("--cluster", help="Column whose equal values share an error: run, for checkpoints.", show_default=False),
]
Weights = Annotated[
    str | None, typer.Option(help="Column of weights, or none (default: weight, where there is one).", show_default=False)
]
BitsOf = Annotated[
    list[str] | None,
    typer.Option(
        "--bits-of",
        help="Bits of a label: nf4-qlora=4, or of weights and activations: mine=4/8 (repeatable).",
        show_default=False,
    ),
]
LossUnit = Annotated[str, typer.Option("--loss-unit", help="nats or bits per token, bpb:BYTES_PER_TOKEN, ppl.")]
Fix = Annotated[
    list[str] | None,
    typer.Option(help="Hold a parameter: E=1.69, eff.w4a4=.7 (repeatable).", show_default=False, rich_help_panel=OF_FIT),
]
Objective = Annotated[str, typer.Option(help="lsq, or huber:DELTA.", rich_help_panel=OF_FIT)]
SavedObjective = Annotated[
    str | None,
    typer.Option(
        "--objective",
        help="lsq, or huber:DELTA (default: lsq, or that of a saved fit).",
        show_default=False,
        rich_help_panel=OF_FIT,
    ),
]
Residuals = Annotated[
    str | None,
    typer.Option(
        help="log: of log losses; raw: of losses in nats/token (default: log, or those of a saved fit).",
        show_default=False,
        rich_help_panel=OF_FIT,
    ),
]
Law = Annotated[
    str,
    typer.Option(
        help="quest, chinchilla, quartet, qat, repeated, …, or auto: the best on held-out runs.", rich_help_panel=OF_FIT
    ),
]
SavedLaw = Annotated[
    str | None,
    typer.Option(
        "--law",
        help="As for fit-scaling (default: quest, or that of a saved fit).",
        show_default=False,
        rich_help_panel=OF_FIT,
    ),
]
Intervals = Annotated[
    str | None,
    typer.Option(
        help="profile, or cluster: errors shared within a scheme and size, or --cluster, by bootstrap (default: profile; "
        "cluster with --cluster).",
        show_default=False,
        rich_help_panel=OF_FIT,
    ),
]
UniqueTokens = Annotated[
    str | None,
    typer.Option("--unique-tokens", help="Distinct tokens of the text, for --law repeated (default: all).", show_default=False),
]
Details = Annotated[bool, typer.Option("--details", help="Also show all other findings and the lists behind them.")]


def pairs(option: str, items: Sequence[str] | None) -> dict[str, str]:
    """`["N=params,D=tokens"]` → {"N": "params", "D": "tokens"}. Raises UsageError.

    A comma that no `name=` follows belongs to the value.
    """
    out = {}
    for item in (part for text in items or [] for part in re.split(r",(?=\w+=)", text)):
        key, sign, value = item.partition("=")
        if not sign or not key or not value:
            raise UsageError(f"{option}: '{item}' is not NAME=VALUE.")
        out[key.strip()] = value.strip()
    return out


def mappings(items: Sequence[str] | None, weights: str | None = None) -> dict[str, str]:
    """`--map`, and `--weights` as the column of our name weight. Raises UsageError."""
    return pairs("--map", items) | ({"weight": weights} if weights else {})


def conditions(items: Sequence[str] | None) -> dict[str, str]:
    """`--where`: `["scheme=w4a4", "N<=1e8", "N>1e7"]` → {"scheme": "w4a4", "N": "<=1e8&>1e7"}. Raises UsageError."""
    out: dict[str, str] = {}
    for item in (part for text in items or [] for part in re.split(r"\s*[,&]\s*(?=[\w./]+\s*(?:[<>]|!?=))", text)):
        match = re.fullmatch(
            r"(?P<column>[^<>=!]+?)\s*(?P<sign><=|>=|=<|=>|<>|!=|==|=|<|>)\s*(?P<value>[^=<>].*|)", item.strip()
        )
        if match is not None and not match["value"]:
            raise UsageError(f"--where: '{item}' has no value after {match['sign']}; write {item.strip()}VALUE.")
        if match is None:
            raise UsageError(f"--where: '{item}' is not COLUMN=VALUE, nor with one of != < <= > >=.")
        column, sign, value = match["column"], match["sign"], match["value"].strip()
        condition = value if sign in ("=", "==") else f"{sign}{value}"
        if column in out:
            condition = "&".join(c if c[0] in "<>!=" else f"={c}" for c in (out[column], condition))
        out[column] = condition
    return out


class Rows(NamedTuple):
    """What the flags of a command say about the rows of tables: names of columns, conditions, and how rows are read."""

    columns: dict[str, str]
    where: dict[str, str]
    options: TableOptions


def with_table_flags(command: Callable[..., None]) -> Callable[..., None]:
    """Add the flags of tables to a command, which gets them as one argument, `rows: Rows`. Five commands share them.

    Typer reads the flags from the signature, so the signature is what this extends.
    """
    own, flags = inspect.signature(command, eval_str=True), inspect.signature(_rows, eval_str=True)

    @functools.wraps(command)
    def call(**values: Any) -> None:
        read = _rows(**{name: values.pop(name) for name in flags.parameters})
        command(**values, rows=read)

    for flag in flags.parameters.values():
        flag.annotation.__metadata__[0].rich_help_panel = OF_TABLES
    kept = [p for p in own.parameters.values() if p.name != "rows"]
    signature = own.replace(parameters=[*kept, *flags.parameters.values()])
    call.__signature__ = signature  # type: ignore[attr-defined]
    call.__annotations__ = {p.name: p.annotation for p in signature.parameters.values()}
    return call


def _rows(
    *,
    map_: Map = None,
    where: Where = None,
    keep_failed: KeepFailed = False,
    skip_bad: SkipBad = False,
    best_of: BestOf = None,
    last: Last = False,
    cluster: Cluster = None,
    weights: Weights = None,
    bits_of: BitsOf = None,
    loss_unit: LossUnit = "nats",
) -> Rows:
    """The flags as one record. Raises UsageError."""
    from ..analysis.tables import TableOptions

    labels = {}
    for item in bits_of or ():
        label, sign, bits = item.rpartition("=")
        if not sign or not label or not bits:
            raise UsageError(f"--bits-of: '{item}' is not LABEL=BITS.")
        labels[label] = bits
    options = TableOptions(keep_failed, skip_bad, tuple(names(best_of)), last, labels, loss_unit, cluster)
    return Rows(mappings(map_, weights), conditions(where), options)


def numbers(option: str, items: Sequence[str] | None) -> dict[str, float]:
    """`["E=1.69"]` → {"E": 1.69}. Raises UsageError."""
    out = {}
    for name, text in pairs(option, items).items():
        try:
            out[name] = float(text)
        except ValueError:
            raise UsageError(f"{option} {name}: '{text}' is not a number.") from None
    return out


def names(text: str | None) -> list[str]:
    """`"1,2, w4a4"` → ["1", "2", "w4a4"]."""
    return [word.strip() for word in text.split(",") if word.strip()] if text else []


def say_findings(findings: Sequence[Finding], *, most: int = 5, details: bool = False) -> None:
    """The first findings, a line each; the others with `details`, else how many there are."""
    for finding in findings if details else findings[:most]:
        console.say(finding.sentence)
    if len(findings) > most and not details:
        console.note(f"{len(findings) - most} more findings: --details")


def note_points(points: Points | ImportedRuns) -> None:
    """What was left out or read otherwise than it stands, a line each on stderr: no row is passed over in silence."""
    for finding in points.notes:
        console.note(finding.sentence)


def print_models(columns: Sequence[str], rows: Sequence[Sequence[Any]], shares: Sequence[float | None]) -> None:
    """A table of models, with a column after D/N for their shares before quantization, where a law knows of these."""
    if any(share is not None for share in shares):
        at = columns.index("D/N") + 1
        columns = (*columns[:at], "share", *columns[at:])
        rows = [(*row[:at], share, *row[at:]) for row, share in zip(rows, shares, strict=True)]
    console.print_table(columns, rows)


def say_tables(tables: Sequence[Table]) -> None:
    """The lists behind findings."""
    for table in tables:
        console.say()
        console.say(table.title)
        console.print_table(table.columns, table.rows)
