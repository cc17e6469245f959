"""One table of 32 runs in every form that tables have, with what each has to give; for tests and for the table in the docs."""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from questctl.analysis.tables import TableOptions

RUNS: list[dict[str, Any]] = [
    {"N": n, "D": n * ratio, "loss": round(1.7 + 400 / (n * eff) ** 0.34 + 410 / (n * ratio) ** 0.28, 5), "scheme": scheme}
    for n in (30_000_000, 60_000_000, 120_000_000, 240_000_000)
    for ratio in (25, 50, 100, 200)
    for scheme, eff in (("bf16", 1.0), ("w4a4", 0.7))
]
BYTES_PER_TOKEN = 4.4


@dataclass(frozen=True)
class Form:
    """A way to write RUNS. `refused` are parts of the sentence where it cannot be read, `notes` the kinds of findings else.

    `about` and `example` are what the docs show; `bits` are those of the second scheme; `rtol` is lost by the form's rounding;
    rows share their errors in `clusters`, and runs read their text again up to `repeats` times.
    """

    name: str
    about: str
    content: str | bytes
    suffix: str = ".csv"
    columns: Mapping[str, str] = field(default_factory=dict)
    where: Mapping[str, str] = field(default_factory=dict)
    options: TableOptions = field(default_factory=TableOptions)
    cli: str = ""
    refused: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    bits: float = 4.0
    rtol: float = 1e-7
    clusters: int = 0
    repeats: float = 0.0


def write(form: Form, folder: Path) -> Path:
    path = folder / f"{form.name}{form.suffix}"
    path.write_bytes(form.content.encode() if isinstance(form.content, str) else form.content)
    return path


def text(
    rows: Sequence[Mapping[str, Any]] = RUNS, delimiter: str = ",", header: str | None = None, shown: Callable[[Any], str] = str
) -> str:
    names = list(rows[0])
    lines = [header if header is not None else delimiter.join(names)]
    lines += [delimiter.join(shown(row[name]) for name in names) for row in rows]
    return "\n".join(lines) + "\n"


def with_(**columns: Callable[[dict[str, Any], int], Any]) -> list[dict[str, Any]]:
    """RUNS with columns added or replaced, by functions of a row and its number from 0."""
    return [{**row, **{name: make(row, i) for name, make in columns.items()}} for i, row in enumerate(RUNS)]


def renamed(names: Mapping[str, str], rows: Sequence[Mapping[str, Any]] = RUNS) -> list[dict[str, Any]]:
    return [{names.get(key, key): value for key, value in row.items()} for row in rows]


def decimal_comma(value: Any) -> str:
    return f"{value:.5f}".replace(".", ",") if isinstance(value, float) else str(value)


def thousands(separator: str, quote: str = "") -> Callable[[Any], str]:
    def shown(value: Any) -> str:
        return f"{quote}{value:,}{quote}".replace(",", separator) if isinstance(value, int) else str(value)

    return shown


def european(value: Any) -> str:
    return f"{value:,}".replace(",", ".") if isinstance(value, int) else decimal_comma(value)


def suffixed(value: Any) -> str:
    if not isinstance(value, int):
        return str(value)
    return f"{value / 1e9:g}B" if value >= 1e9 else f"{value / 1e6:g}M"


def label(name: str) -> str:
    return text([{**row, "scheme": row["scheme"] if row["scheme"] == "bf16" else name} for row in RUNS])


def nested(row: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "config": {"model": {"n_params": row["N"]}, "data": {"tokens": row["D"]}, "quant": row["scheme"]},
        "summary": {"val": {"loss": row["loss"]}},
    }


SCHEMES = ("bf16", "w4a4")
STATES = ("finished", "done", "completed", "Finished")
UNFINISHED = ("running", "failed", "crashed", "killed")
CRASHED = [{**RUNS[0], "N": 7_000_000 + i, "loss": 7.5, "state": state} for i, state in enumerate(UNFINISHED)]
CURVES = (
    "Step,a - val/loss,a - val/loss__MIN,a - val/loss__MAX,b - val/loss,b - val/loss__MIN,b - val/loss__MAX\n1,3,3,3,4,4,4\n"
)
MIXED = [{**row, "scheme": "INT4+BF16" if row["scheme"] == "w4a4" else "bf16"} for row in RUNS]
LRS = [{**row, "lr": lr, "loss": row["loss"] + (0.01 if lr != 1e-3 else 0)} for row in RUNS for lr in (5e-4, 1e-3, 2e-3)]
CHECKPOINTS = [
    {"run": f"r{i}", **row, "D": row["D"] * part // 10, "loss": row["loss"] + (1 - part / 10)}
    for i, row in enumerate(RUNS)
    for part in (5, 8, 10)
]

SHORT_CURVES = "\n".join(line for line in ("Step,Name: a - val/loss,Name: b - val/loss", "1,3,4", "2,2.9,3.9"))
MARKDOWN = text(delimiter=" | ").replace("\n", " |\n| ").removesuffix("| ")
IN_SCHEMES = [{"scheme": s, "runs": [{k: r[k] for k in ("N", "D", "loss")} for r in RUNS if r["scheme"] == s]} for s in SCHEMES]
BY_EXPERIMENT = [{"exp": r["run"], **{k: v for k, v in r.items() if k != "run"}} for r in CHECKPOINTS]

FORMS: list[Form] = [
    Form("plain", "CSV", text()),
    Form("semicolon", "semicolons", text(delimiter=";")),
    Form("tab", "tabs (`.csv`, `.tsv`, `.txt`)", text(delimiter="\t"), ".tsv"),
    Form("pipe", "vertical bars", text(delimiter="|")),
    Form("sep", "Excel's first line `sep=;`", "sep=;\n" + text(delimiter=";")),
    Form("words_apart", "one or more spaces (numpy's `savetxt`)", text(delimiter="  ")),
    Form("markdown", "Markdown", "| " + MARKDOWN.replace("\n", "\n|---|---|---|:-:|\n", 1)),
    Form("decimal_comma", "decimal commas", text(delimiter=";", shown=decimal_comma)),
    Form("decimal_comma_tab", "decimal commas, tabs", text(delimiter="\t", shown=decimal_comma)),
    Form("decimal_comma_quoted", "decimal commas in quotes", text(shown=lambda v: f'"{decimal_comma(v)}"')),
    Form("thousands", 'thousands in quotes: `"30,000,000"`', text(shown=thousands(",", '"'))),
    Form("thousands_space", "thousands with spaces: `30 000 000`", text(shown=thousands(" "))),
    Form("thousands_nbsp", "thousands with narrow spaces", text(shown=thousands("\u202f"))),
    Form("thousands_underscore", "thousands with underscores: `30_000_000`", text(shown=thousands("_"))),
    Form("thousands_apostrophe", "thousands with apostrophes: `30'000'000`", text(shown=thousands("'"))),
    Form("european", "`30.000.000;4,21`", text(delimiter=";", shown=european)),
    Form("suffix", "`30M`, `0.75B`", text(shown=suffixed)),
    Form("suffix_comma", "`0,75B`", text(delimiter=";", shown=lambda v: suffixed(v).replace(".", ","))),
    Form("suffix_space", "`30 M`", text(shown=lambda v: suffixed(v).replace("M", " m").replace("B", " bn"))),
    Form("scientific", "`3.0e+07`", text(shown=lambda v: f"{v:.7E}" if isinstance(v, int | float) else v)),
    Form("percent", "a percent sign in a column that is not used", text(with_(decay=lambda r, i: "10%"))),
    Form(
        "percent_loss",
        "a percent sign in N, D or loss",
        text(shown=lambda v: f"{v}%" if isinstance(v, float) else str(v)),
        refused=("row 1, column 'loss'", "is a share"),
    ),
    Form("spaces", "spaces around names and cells", text(delimiter=" , ", header=" N , D,loss ,scheme ")),
    Form("lower", "names in another case: `n,d,Loss`", text(header="n,d,Loss,SCHEME")),
    Form(
        "named", "names with spaces: `Non-embedding Params`", text(header="Non-embedding params,Train Tokens,Val Loss,Scheme")
    ),
    Form("comment", "comment lines", "# exported 2025-01-01\n#\n" + text().replace("\n", "\n# middle\n", 1)),
    Form("savetxt", "the header in a comment (numpy)", "# " + text()),
    Form("blank_lines", "blank lines", "\n" + text().replace("\n", "\n\n")),
    Form("crlf", "Windows line ends", text().replace("\n", "\r\n")),
    Form("bom", "byte order mark", b"\xef\xbb\xbf" + text().encode()),
    Form("utf16", "UTF-16", text().encode("utf-16")),
    Form("utf16_be", "UTF-16 without a mark", text(delimiter="\t").encode("utf-16-be")),
    Form(
        "latin1",
        "Latin-1 with other than ASCII",
        text(with_(note=lambda r, i: "größe")).encode("latin-1"),
        refused=("line 2", "0xf6", "iconv -f WINDOWS-1252 -t UTF-8"),
    ),
    Form("index", "a column of row numbers (pandas)", text([{"": i, **row} for i, row in enumerate(RUNS)])),
    Form("unnamed", "`Unnamed: 0`", text([{"Unnamed: 0": i, **row} for i, row in enumerate(RUNS)])),
    Form(
        "row_names", "row names without a header (R)", text([{"": f"r{i}", **r} for i, r in enumerate(RUNS)]).removeprefix(",")
    ),
    Form("header_again", "a header that comes again (`cat a.csv b.csv`)", text(RUNS[:16]) + text(RUNS[16:])),
    Form(
        "other_order",
        "two tables below each other, the columns in another order",
        text(RUNS[:16]) + "\n" + text([dict(reversed(r.items())) for r in RUNS[16:]]),
    ),
    Form(
        "other_table",
        "another table below",
        text() + "\nlr,seed\n1e-3,1\n",
        refused=("line 35 looks like the header of another table (lr, seed)", "a file of its own"),
    ),
    Form(
        "brackets",
        "units in names: `Params (M)`, `Tokens [B]`, `Loss (nats)`",
        text(
            [
                {"Params (M)": r["N"] / 1e6, "Tokens [B]": r["D"] / 1e9, "Loss (nats/token)": r["loss"], "scheme": r["scheme"]}
                for r in RUNS
            ]
        ),
    ),
    Form("words", "`2e10 tokens`", text(shown=lambda v: f"{v:.6g} tokens" if isinstance(v, int) else str(v))),
    Form("slashes", "`model/n_params`, `train/tokens`, `val/loss`", text(header="model/n_params,train/tokens,val/loss,quant")),
    Form("trailing", "a trailing delimiter", text().replace("\n", ",\n")),
    Form("total", "a last row of totals", text() + "Total,,137.2,\n", notes=("total_row",)),
    Form("mean", "a last row of means", text() + "112500000,,3.1,Mean\n", notes=("total_row",)),
    Form("statistics", "last rows of means and deviations", text() + "Mean,,3.1,\nStd,,0.2,\n", notes=("total_row",)),
    Form("no_total", "`mean` as the setting of all runs, which is no total", text(with_(pooling=lambda r, i: "mean"))),
    Form("note", "a line of words below", text() + "\nTrained on C4\n", refused=("line 35 is no run", "begin it with #")),
    Form("title", "a title above", "My runs\n" + text(), refused=("line 2 has 4 cells", "if a title stands above")),
    Form("open_quote", "a quotation mark that is not closed", text() + '1,2,3,"w4a4\n', refused=("line 34", "not be closed")),
    Form("gzip", "a compressed file", gzip.compress(text().encode(), mtime=0), refused=("compressed by gzip", "gunzip")),
    Form(
        "no_header",
        "numbers without a header",
        text([{k: r[k] for k in ("N", "D", "loss")} for r in RUNS]).partition("\n")[2],
        refused=("first line holds numbers", "add a header"),
    ),
    Form("twice", "a column twice", text(header="N,N,loss,scheme"), refused=("two columns", "'N'")),
    Form("ambiguous", "`4,211`, which is 4.211 or 4211", "N\tD\tloss\n1\t2\t4,211\n", refused=("may mean 4.211 or 4211",)),
    # --- JSON
    Form("records", "JSON: a list of runs", json.dumps(RUNS), ".json"),
    Form("columns", "JSON: columns", json.dumps({k: [r[k] for r in RUNS] for k in RUNS[0]}), ".json"),
    Form(
        "by_row", "JSON: pandas' `to_json()`", json.dumps({k: {i: r[k] for i, r in enumerate(RUNS)} for k in RUNS[0]}), ".json"
    ),
    Form(
        "split",
        'JSON: pandas\' `orient="split"`',
        json.dumps({"columns": list(RUNS[0]), "index": list(range(32)), "data": [list(r.values()) for r in RUNS]}),
        ".json",
    ),
    Form("lists", "JSON: lists below a header", json.dumps([list(RUNS[0]), *[list(r.values()) for r in RUNS]]), ".json"),
    Form("by_run", "JSON: runs by name", json.dumps({f"r{i}": r for i, r in enumerate(RUNS)}), ".json"),
    Form("under", "JSON: under a key", json.dumps({"project": "p", "results": RUNS}), ".json"),
    Form(
        "groups_of_lists",
        "JSON: groups of runs",
        json.dumps({s: [{k: r[k] for k in ("N", "D", "loss")} for r in RUNS if r["scheme"] == s] for s in ("bf16", "w4a4")}),
        ".json",
    ),
    Form(
        "groups_of_runs",
        "JSON: groups of runs by name",
        json.dumps({f"g{g}": {f"r{i}": r for i, r in enumerate(RUNS) if i % 2 == g} for g in (0, 1)}),
        ".json",
    ),
    Form("lines", "JSON lines", "\n".join(map(json.dumps, RUNS)), ".jsonl"),
    Form("lines_json", "JSON lines in a `.json` file", "\n".join(map(json.dumps, RUNS)), ".json"),
    Form("list_jsonl", "a list in a `.jsonl` file", json.dumps(RUNS, indent=1), ".jsonl"),
    Form("in_schemes", "JSON: runs below what they share", json.dumps(IN_SCHEMES), ".json"),
    Form("described", "JSON: beside facts about all runs", json.dumps({"about": {"by": "me"}, "table": RUNS}), ".json"),
    Form(
        "named_loss",
        "a `loss` in words beside `val/loss`",
        json.dumps([{**{k: r[k] for k in ("N", "D", "scheme")}, "loss": "ce", "val/loss": r["loss"]} for r in RUNS]),
        ".json",
    ),
    Form(
        "summary_min",
        "W&B's `val/loss.min`",
        json.dumps([{**{k: r[k] for k in ("N", "D", "scheme")}, "val/loss": {"min": r["loss"]}} for r in RUNS]),
        ".json",
        refused=("column 'loss': missing", "--map loss=val/loss.min"),
    ),
    Form(
        "losses_of_schemes",
        "a column of losses for each scheme",
        text(
            [
                {"N": a["N"], "D": a["D"], "bf16": a["loss"], "w4a4": b["loss"]}
                for a, b in zip(RUNS[::2], RUNS[1::2], strict=True)
            ]
        ),
        refused=("named like schemes (bf16, w4a4)", "a row for each run"),
    ),
    Form("nested", "nested runs, found by the ends of their names", json.dumps([nested(r) for r in RUNS]), ".json"),
    Form(
        "nested_map",
        "nested runs, mapped by dotted names",
        json.dumps(
            [{"a": {"b": {"size": r["N"]}, "seen": r["D"]}, "out": {"c4": {"y": r["loss"]}}, "P": r["scheme"]} for r in RUNS]
        ),
        ".json",
        columns={"N": "a.b.size", "D": "a.seen", "loss": "out.c4.y"},
        cli="--map N=a.b.size,D=a.seen,loss=out.c4.y",
    ),
    Form(
        "nested_full",
        "nested runs, mapped with the part W&B keeps them in",
        json.dumps(
            [
                {"config": {"m": {"size": r["N"]}, "D": r["D"], "scheme": r["scheme"]}, "summary": {"loss": r["loss"]}}
                for r in RUNS
            ]
        ),
        ".json",
        columns={"N": "config.m.size"},
        cli="--map N=config.m.size",
    ),
    Form(
        "two_losses",
        "two columns that may be the loss",
        json.dumps(
            [{"N": r["N"], "D": r["D"], "scheme": r["scheme"], "eval": {"c4": {"loss": 3}, "pile": {"loss": 3}}} for r in RUNS]
        ),
        ".json",
        refused=("column 'loss'", "eval.c4.loss, eval.pile.loss", "--map loss=eval.c4.loss"),
    ),
    Form(
        "wandb",
        "W&B's API: `config`, `summary`",
        json.dumps(
            [
                {
                    "name": f"r{i}",
                    "state": "finished",
                    "config": {k: {"value": r[k], "desc": None} for k in ("N", "D", "scheme")},
                    "summary_metrics": {"val/loss": r["loss"]},
                }
                for i, r in enumerate(RUNS)
            ]
        ),
        ".json",
    ),
    Form(
        "wandb_csv",
        "W&B's table of runs: `Name`, `State`",
        text([{"Name": f"r{i}", "State": STATES[i % 4], **r} for i, r in enumerate(RUNS)]),
    ),
    Form("wandb_prefix", "`config/N`, `summary/val_loss`", text(header="config/N,config/D,summary/val_loss,config/scheme")),
    Form(
        "trainer_state",
        "`trainer_state.json` of Hugging Face's Trainer",
        json.dumps({"global_step": 2, "log_history": [{"step": 1, "loss": 4.0}, {"step": 2, "eval_loss": 3.1}]}),
        ".json",
        refused=("is the log of one run", "one row per run"),
    ),
    Form("curves", "W&B's export of a chart", CURVES, refused=("export of a chart", "one row per run")),
    Form(
        "curves_short",
        "the same as `Name: RUN - METRIC`",
        SHORT_CURVES,
        refused=("curves of 2 runs", "questctl forecast reads"),
    ),
    # --- states, bad rows, duplicates
    Form("states", "unfinished runs", text([{**r, "state": "done"} for r in RUNS] + CRASHED), notes=("unfinished_runs",)),
    Form(
        "nan_crashed",
        "crashed runs with NaN losses",
        text([{**r, "Status": "completed"} for r in RUNS] + [{**RUNS[0], "N": 5, "loss": "nan", "Status": "crashed"}]),
        notes=("unfinished_runs",),
    ),
    Form("nan", "losses that are missing or NaN", text() + "1000,2000,nan,w4a4\n1000,3000,,w4a4\n", notes=("no_loss",)),
    Form("inf", "a loss that is infinite", text() + "1000,2000,inf,w4a4\n", refused=("row 33, column 'loss'", "--skip-bad")),
    Form(
        "bad_rows",
        "bad rows, left out",
        text() + "1000,2000,inf,w4a4\n-5,2000,3,w4a4\n1000,2000,3,what\n1000,,3,w4a4\nx,y,3,w4a4\n",
        options=TableOptions(skip_bad=True),
        cli="--skip-bad",
        notes=("bad_rows",),
    ),
    Form(
        "repeated",
        "rows that repeat others exactly",
        text([*RUNS, RUNS[0], RUNS[5]]),
        refused=("row 33, column 'loss': repeats repeated.csv row 1", "row 34 = repeated.csv row 6", "--skip-bad"),
    ),
    Form(
        "repeated_units",
        "a row that repeats another in other units",
        text(shown=suffixed) + f"0.03B,750000000,{RUNS[0]['loss']}0,bf16\n",
        refused=("row 33", "repeats repeated_units.csv row 1", "--skip-bad"),
    ),
    Form(
        "repeated_skipped",
        "repeated rows, left out",
        text([*RUNS, RUNS[0], RUNS[5]]),
        options=TableOptions(skip_bad=True),
        cli="--skip-bad",
        notes=("repeated_rows",),
    ),
    Form(
        "best_of",
        "a grid of learning rates",
        text(LRS),
        options=TableOptions(best_of=("lr",)),
        cli="--best-of lr",
        notes=("not_best",),
    ),
    Form("last", "checkpoints of runs", text(CHECKPOINTS), options=TableOptions(last=True), cli="--last", notes=("not_last",)),
    Form(
        "last_mapped",
        "checkpoints of runs that another column names",
        text(BY_EXPERIMENT),
        columns={"run": "exp"},
        options=TableOptions(last=True),
        cli="--last --map run=exp",
        notes=("not_last",),
    ),
    Form(
        "last_of_one_name",
        "checkpoints where one name is that of all runs",
        text([{**r, "run": "x"} for r in CHECKPOINTS]),
        options=TableOptions(last=True),
        cli="--last",
        refused=("run x (row 4)", "several sizes or schemes", "--map run=COLUMN"),
    ),
    Form(
        "cluster_of_none",
        "`--cluster run` without names of runs",
        text(),
        options=TableOptions(cluster="run"),
        cli="--cluster run",
        refused=("--cluster run needs a column that names the run", "--map run=COLUMN"),
    ),
    # --- units and formulas
    Form(
        "flops",
        "FLOP instead of tokens",
        text([{"N": r["N"], "flops": 6 * r["N"] * r["D"], "loss": r["loss"], "scheme": r["scheme"]} for r in RUNS]),
        columns={"D": "flops/(6*N)"},
        cli="--map 'D=flops/(6*N)'",
    ),
    Form(
        "flops_unmapped",
        "FLOP instead of tokens, not mapped",
        text([{"N": r["N"], "flops": 6 * r["N"] * r["D"], "loss": r["loss"], "scheme": r["scheme"]} for r in RUNS]),
        refused=("column 'D'", "--map 'D=flops/(6*N)'"),
    ),
    Form(
        "ratio",
        "`tokens_per_param` instead of tokens",
        text(renamed({"D": "tokens_per_param"}, with_(D=lambda r, i: r["D"] // r["N"]))),
    ),
    Form(
        "millions",
        "N in millions",
        text(renamed({"N": "params_M"}, with_(N=lambda r, i: r["N"] // 1_000_000))),
        columns={"N": "params_M*1e6"},
        cli="--map 'N=params_M*1e6'",
    ),
    Form(
        "chained",
        "tokens by a formula over a formula",
        text([{"size M": r["N"] / 1e6, "flops": 6 * r["N"] * r["D"], "loss": r["loss"], "scheme": r["scheme"]} for r in RUNS]),
        columns={"N": "`size M`*1e6", "D": "flops/(6*N)"},
        cli="--map 'N=`size M`*1e6' --map 'D=flops/(6*N)'",
    ),
    Form(
        "billions",
        "D in billions",
        text(with_(D=lambda r, i: r["D"] / 1e9)),
        columns={"D": "D*1e9"},
        cli="--map 'D=D*1e9'",
    ),
    Form(
        "spaced",
        "a name with spaces in `--map`",
        text(renamed({"loss": "my final value"})),
        columns={"loss": "my final value"},
        cli="--map 'loss=my final value'",
    ),
    Form(
        "plus",
        "a name with `+` in `--map`",
        text(renamed({"loss": "loss+z"})),
        columns={"loss": "loss+z"},
        cli="--map loss=loss+z",
    ),
    Form(
        "no_name",
        "a name in `--map` that questctl does not know",
        text(),
        columns={"los": "loss"},
        cli="--map los=loss",
        refused=("unknown name 'los'", "did you mean 'loss'?"),
    ),
    Form(
        "where_formula",
        "a condition on a formula",
        text(renamed({"N": "size"}, [*RUNS, {**RUNS[0], "N": 1}])),
        columns={"N": "size*1"},
        where={"N": "=>30M"},
        cli="--map 'N=size*1' --where 'N>=30M'",
    ),
    Form(
        "no_formula",
        "a formula that is none",
        text(),
        columns={"D": "__import__('os')*N"},
        refused=("--map D", "a formula takes"),
    ),
    Form(
        "bits_unit",
        "bits a token",
        text(with_(loss=lambda r, i: r["loss"] / math.log(2))),
        options=TableOptions(loss_unit="bits"),
        cli="--loss-unit bits",
        rtol=1e-4,
    ),
    Form(
        "bpb",
        "bits a byte",
        text(renamed({"loss": "val_bpb"}, with_(loss=lambda r, i: r["loss"] / math.log(2) / BYTES_PER_TOKEN))),
        options=TableOptions(loss_unit=f"bpb:{BYTES_PER_TOKEN}"),
        cli=f"--loss-unit bpb:{BYTES_PER_TOKEN}",
        rtol=1e-4,
    ),
    Form(
        "ppl",
        "perplexity",
        text(renamed({"loss": "perplexity"}, with_(loss=lambda r, i: math.exp(r["loss"])))),
        options=TableOptions(loss_unit="ppl"),
        cli="--loss-unit ppl",
        rtol=1e-4,
    ),
    Form(
        "ppl_unnamed",
        "perplexity without its unit",
        text(renamed({"loss": "ppl"})),
        refused=("column 'loss'", "--map loss=ppl --loss-unit ppl"),
    ),
    # --- schemes
    Form(
        "bits_column",
        "`bits`: 16, 4",
        text(renamed({"scheme": "bits"}, with_(scheme=lambda r, i: 4 if "w" in r["scheme"] else 16))),
    ),
    Form(
        "w_bits",
        "`w_bits`, `a_bits`",
        text(
            [
                {
                    **{k: r[k] for k in ("N", "D", "loss")},
                    **dict.fromkeys(("w_bits", "a_bits"), 4 if "w" in r["scheme"] else 16),
                }
                for r in RUNS
            ]
        ),
    ),
    Form("fp8", "`FP8`, `fp8`, `e4m3`, `mxfp8`", label("FP8"), bits=8),
    Form("mxfp8", "`mxfp8`", label("mxfp8"), bits=8),
    Form("nvfp4", "`nvfp4`, `mxfp4`, `fp4`", label("nvfp4")),
    Form("b158", "`b1.58`, `1.58`, `ternary`", label("b1.58"), bits=math.log2(3)),
    Form("kv", "`W4A8KV4`, `W4A16-g128`", label("W4A8KV4")),
    Form("int4", "`INT4`, `int4`, `W4A4`", label("INT4")),
    Form(
        "joined",
        "forward and backward in two columns, bits by `--bits-of`",
        text(
            [
                {"N": r["N"], "D": r["D"], "loss": r["loss"], "fwd": "INT4" if "w" in r["scheme"] else "BF16", "bwd": "BF16"}
                for r in RUNS
            ]
        ),
        columns={"scheme": "fwd+bwd"},
        options=TableOptions(bits_of={"INT4+BF16": "4"}),
        cli="--map scheme=fwd+bwd --bits-of INT4+BF16=4",
    ),
    Form(
        "unused_label",
        "`--bits-of` for a label that no row has",
        text(),
        options=TableOptions(bits_of={"w4a5": "4"}),
        cli="--bits-of w4a5=4",
        refused=("no row has this label", "bf16, w4a4"),
    ),
    Form(
        "unknown_label", "a label of unknown bits", text(MIXED), refused=("row 2, column 'scheme'", "--bits-of 'INT4+BF16=4'")
    ),
    Form(
        "weights",
        "a column `weight`, which is used and said",
        text(with_(weight=lambda r, i: 1 + i % 3)),
        notes=("weighted",),
    ),
    Form(
        "no_weights",
        "a column `weight`, not used",
        text(with_(weight=lambda r, i: 1 + i % 3)),
        columns={"weight": "none"},
        cli="--weights none",
    ),
    Form(
        "where",
        "some rows of more",
        text([{**r, "dataset": "c4", "step": 9} for r in RUNS] + [{**r, "dataset": "pile", "step": 8} for r in RUNS[:3]]),
        where={"dataset": "c4|fineweb", "step": ">8&<=9"},
        cli="--where 'dataset=c4|fineweb' --where 'step>8' --where 'step<=9'",
    ),
    Form(
        "many_epochs",
        "repeated data, which is said",
        text(with_(epochs=lambda r, i: 1 + i)),
        notes=("many_epochs",),
    ),
    Form(
        "unique",
        "a column `unique_tokens` (or `U`), which `--law repeated` and `--unique-tokens` know",
        text(with_(U=lambda r, i: r["D"] // (2 if i % 4 == 0 else 1))),
        repeats=1.0,
    ),
    Form(
        "unique_by_epochs",
        "distinct tokens by a formula",
        text(with_(epochs=lambda r, i: 1 + i % 4)),
        columns={"unique_tokens": "D/epochs"},
        cli="--map 'unique_tokens=D/epochs'",
        repeats=3.0,
    ),
    Form(
        "clusters",
        "a column that says which rows share an error",
        text(with_(batch=lambda r, i: f"night {i // 4}")),
        options=TableOptions(cluster="batch"),
        cli="--cluster batch",
        clusters=8,
    ),
    Form(
        "runs_as_clusters",
        "several checkpoints of a run, which share an error",
        text([{"run": f"r{i // 8}-{r['scheme']}", **r} for i, r in enumerate(RUNS)]),
        options=TableOptions(cluster="run"),
        cli="--cluster run",
        clusters=8,
    ),
]
