"""`questctl fit-scaling` and `questctl plan` from the outside: what they print and write, and how they refuse."""

import json
import re
import tomllib
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import report_runs
from command_line import invoke, output
from helpers import empty_figures
from planted import PUBLISHED, PUBLISHED_EFF, planted
from shared_data import DATA, needs

import questctl
from questctl.analysis.document import FitDocument
from questctl.analysis.schemes import read_scheme
from questctl.config import Layer, ModelConfig, file_layer, flatten, resolve
from questctl.config.presets import PRESETS
from questctl.errors import DataError, UsageError
from questctl.quant.storage import artifact_bytes
from questctl.scaling.fit import fit_sources
from questctl.scaling.plan_files import learning_rate, quant_keys, recipe, shape
from questctl.scaling.report import gather
from questctl.scaling.sources import load_sources
from questctl.sweep.sweep_file import load_sweep_file

pytestmark = pytest.mark.usefixtures("each_fit_once")
TABLE = ("N", "D", "loss", "scheme")


def table(path: Path, **changes: object) -> Path:
    points, _ = planted("quest", noise=3e-3)
    frame = pd.DataFrame(
        {"N": points.N, "D": points.D, "loss": points.loss, "scheme": [points.labels[g] for g in points.group]}
    )
    frame.assign(**changes).to_csv(path, index=False)
    return path


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    return table(tmp_path_factory.mktemp("points") / "runs.csv")


def test_json_has_what_scripts_rely_on(runs: Path) -> None:
    out = json.loads(output("fit-scaling", runs, "--json", "--schemes", "1.585", "--bootstrap", 20))
    for key in ("law", "objective", "cost", "n", "params", "eff", "status", "warnings", "intervals", "data_hash"):
        assert key in out
    assert (out["law"], out["n"], out["status"], out["eff"]["1.585"]) == ("quest", 144, "converged", None)
    assert out["intervals"]["E"][0] < out["params"]["E"] < out["intervals"]["E"][1]
    assert out["bootstrap"]["quest"]["replicates"] == 20
    assert {"questctl", "numpy", "scipy"} <= set(out["versions"])
    assert out["options"]["schemes"] == "1.585"
    assert [t["scheme"] for t in out["trends"]] == [k for k in out["eff"] if k != "1.585"]


def test_a_saved_fit_is_a_source(runs: Path, tmp_path: Path) -> None:
    with empty_figures():
        first = json.loads(output("fit-scaling", runs, "--out", tmp_path / "out", "--json"))
    saved = json.loads((tmp_path / "out" / "fit.json").read_text())
    assert saved == first
    assert {p.name for p in (tmp_path / "out").iterdir()} > {
        "fit.json",
        "eff.png",
        "eff.svg",
        "loss_vs_bits.svg",
        "residuals.png",
    }
    again = json.loads(output("fit-scaling", tmp_path / "out" / "fit.json", "--json"))
    assert (again["cost"], again["data_hash"], again["params"]) == (first["cost"], first["data_hash"], first["params"])


def test_evaluating_a_fit_gives_its_cost(runs: Path, tmp_path: Path) -> None:
    first = json.loads(output("fit-scaling", runs, "--json"))
    (tmp_path / "fit.json").write_text(json.dumps(first))
    seen = json.loads(output("fit-scaling", runs, "--evaluate", tmp_path / "fit.json", "--json"))
    assert seen["cost"] == pytest.approx(first["cost"], rel=1e-9)
    assert seen["status"] == "evaluated"
    (tmp_path / "flat.json").write_text(json.dumps({**first["params"], "eff": first["eff"]}))
    assert json.loads(output("fit-scaling", runs, "--evaluate", tmp_path / "flat.json", "--json"))["cost"] == pytest.approx(
        first["cost"]
    )
    for content, message in (("{", "is not JSON"), ("[1]", "no object of parameters"), ("{}", "needs a value for A, alpha")):
        (tmp_path / "bad.json").write_text(content)
        assert message in output("fit-scaling", runs, "--evaluate", tmp_path / "bad.json", code=2)


def test_several_sources_and_a_mapping(runs: Path, tmp_path: Path) -> None:
    frame = pd.read_csv(runs)
    frame[frame.N < 1.5e8].rename(columns={"N": "params"}).to_csv(tmp_path / "small.csv", index=False)
    frame[frame.N > 1.5e8].rename(columns={"N": "params"}).to_csv(tmp_path / "large.csv", index=False)
    whole = json.loads(output("fit-scaling", runs, "--json"))
    both = json.loads(output("fit-scaling", tmp_path / "small.csv", tmp_path / "large.csv", "--map", "N=params", "--json"))
    assert (both["cost"], both["n"], both["data_hash"]) == (whole["cost"], whole["n"], whole["data_hash"])
    some = json.loads(output("fit-scaling", runs, "--where", "scheme=bf16", "--law", "chinchilla", "--json"))
    assert some["n"] == 24


@pytest.mark.slow
def test_auto_shows_all_laws(tmp_path: Path) -> None:
    points, _ = planted("quest", noise=2e-3, ratios=(20, 100), schemes=("bf16", "w4a4", "w2a2"), sizes=(3e7, 5e7, 1e8, 2e8))
    frame = pd.DataFrame(
        {"N": points.N, "D": points.D, "loss": points.loss, "scheme": [points.labels[g] for g in points.group]}
    )
    frame.to_csv(tmp_path / "a.csv", index=False)
    out = json.loads(output("fit-scaling", tmp_path / "a.csv", "--law", "auto", "--json"))
    assert out["law"] == out["choice"]["laws"][0]["law"]
    assert {"quest", "offset", "qat", "kumar"} <= {row["law"] for row in out["choice"]["laws"]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss": np.where(np.arange(144) == 3, -1.0, 3.0 + np.arange(144) / 1e3)}, "row 4, column 'loss'"),
        ({"loss": 3.0, "N": 1e6, "D": 1e7}, "row 2, column 'loss': repeats"),
        ({"scheme": "mystery"}, "row 1, column 'scheme': the bits of 'mystery' are unknown"),
        ({"data_hash": ["a"] * 143 + ["b"]}, "row 144, column 'data_hash'"),
    ],
)
def test_bad_tables_end_with_row_and_column(tmp_path: Path, changes: dict, message: str) -> None:
    assert message in output("fit-scaling", table(tmp_path / "bad.csv", **changes), code=2)


def test_a_run_without_a_loss_is_left_out_and_named(tmp_path: Path) -> None:
    losses = np.where(np.arange(144) == 3, np.nan, planted("quest", noise=3e-3)[0].loss)
    out = json.loads(output("fit-scaling", table(tmp_path / "nan.csv", loss=losses), "--bootstrap", 0, "--json"))
    assert out["n"] == 143
    assert [w["numbers"] for w in out["warnings"] if w["kind"] == "no_loss"] == [{"runs": ["nan.csv row 4"]}]


def test_other_mistakes(runs: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    few = tmp_path / "few.csv"
    pd.read_csv(runs).head(4).to_csv(few, index=False)
    for args, message in (
        ((tmp_path / "none",), "there is no such folder of runs or table"),
        ((tmp_path / "empty",), "holds no runs"),
        ((few,), "4 points cannot fit the 5 parameters"),
        ((runs, "--law", "qest"), "did you mean 'quest'?"),
        ((runs, "--fix", "E"), "--fix: 'E' is not NAME=VALUE"),
        ((runs, "--fix", "E=low"), "--fix E: 'low' is not a number"),
        ((runs, "--objective", "l1"), "unknown objective 'l1'"),
        ((runs, "--law", "auto", "--fix", "E=1"), "name a law"),
        ((runs, "--map", "N=size"), "column 'size'"),
        ((runs, "--where", "N=="), "--where: 'N==' has no value after ==; write N==VALUE"),
        ((runs, "--where", "scheme=bf16,N<"), "--where: 'N<' has no value after <"),
        ((runs, "--cluster", "machine"), "column 'machine': no such column (of --cluster)"),
    ):
        assert message in output("fit-scaling", *args, code=2)


def test_one_size_is_fitted_with_a_warning(runs: Path, tmp_path: Path) -> None:
    frame = pd.read_csv(runs)
    frame[frame.N.min() == frame.N].to_csv(tmp_path / "one.csv", index=False)
    out = json.loads(output("fit-scaling", tmp_path / "one.csv", "--json"))
    assert out["status"] == "not identifiable"
    assert "few_sizes" in [w["kind"] for w in out["warnings"]]
    assert out["intervals"] == {}
    assert (out["transitions"], out["best_per_bit"]) == ([], None)  # nothing that the fit is not to be used for


# ------------------------------------------------------------------------------------------ plan


def test_plan_answers_and_writes_a_config(runs: Path, tmp_path: Path) -> None:
    config = tmp_path / "p.toml"
    out = json.loads(
        output(
            "plan", runs, "--memory", "1GB", "--flops", "1e20", "--bits", "2,4,16", "--bootstrap", 20, "--out", config, "--json"
        )
    )
    best = out["options"][0]
    assert [o["loss"] for o in out["options"]] == sorted(o["loss"] for o in out["options"])
    assert all(o["params_non_embedding"] * o["w_stored_bits"] <= 8e9 * (1 + 1e-9) for o in out["options"])
    assert all(o["interval"][0] < o["loss"] < o["interval"][1] for o in out["options"])
    ready = resolve([file_layer(config)]).config
    assert ready.model.params_non_embedding == pytest.approx(best["params_non_embedding"], rel=0.1)
    assert ready.tokens == pytest.approx(best["tokens"], rel=1e-3)
    assert ready.quant.label.endswith(best["scheme"])
    served = json.loads(
        output("plan", runs, "--flops", "1e20", "--inference-tokens", "1T", "--bits", "4", "--bootstrap", 0, "--json")
    )
    free = json.loads(output("plan", runs, "--flops", "1e20", "--bits", "4", "--bootstrap", 0, "--json"))
    assert served["options"][0]["params_non_embedding"] < free["options"][0]["params_non_embedding"]
    assert "lies outside the data" in output("plan", runs, "--flops", "1e25", "--bootstrap", "0")


def test_plan_next_runs_as_a_sweep(runs: Path, tmp_path: Path) -> None:
    plan = tmp_path / "n.toml"
    out = json.loads(output("plan", runs, "--next-runs", 2, "--goal", "transition@1B:8:4", "--out", plan, "--json"))
    assert len(out["runs"]) == 2
    assert out["goal"]["standard_error_log"] > 0
    cells = load_sweep_file(plan).cells
    assert [c.config.tokens for c in cells] == pytest.approx(
        [
            r["tokens"] * c.config.model.params_non_embedding / r["params_non_embedding"]
            for r, c in zip(out["runs"], cells, strict=True)
        ],
        rel=0.01,
    )
    assert [c.config.quant.label.split("-")[-1] for c in cells] == [r["scheme"] for r in out["runs"]]


def test_sweep_takes_next_runs_as_they_are_written(runs: Path, tmp_path: Path) -> None:
    """Also where two sizes of the points have one model, and in a folder that has runs of the same cells."""
    frame = pd.read_csv(runs)
    frame.loc[frame.scheme == "w8a8", "N"] *= 1.002
    frame.to_csv(tmp_path / "near.csv", index=False)
    for source in (runs, tmp_path / "near.csv"):
        output("plan", source, "--next-runs", 24, "--max-flops", "1e19", "--out", tmp_path / "n.toml")
        assert len(load_sweep_file(tmp_path / "n.toml").cells) == 24
    assert "24 cells, 24 to train" in output("sweep", tmp_path / "n.toml", "--dry-run", "--runs", tmp_path / "runs")


def test_next_runs_of_given_sizes_and_lengths(runs: Path) -> None:
    words = ("--next-runs", 8, "--goal", "eff", "--sizes", "40M,160M", "--lengths", "1B,4B")
    chosen = json.loads(output("plan", runs, *words, "--json"))["runs"]
    assert {(r["params_non_embedding"], r["tokens"]) for r in chosen} <= {(n, d) for n in (4e7, 1.6e8) for d in (1e9, 4e9)}
    assert "--lengths: 'x'" in output("plan", runs, *words[:6], "--lengths", "x", code=2)


def test_plan_other_questions(runs: Path, tmp_path: Path) -> None:
    out = json.loads(output("plan", runs, "--untrained", "int5,fp4,int4+bf16", "--bootstrap", 20, "--json"))
    eff = {f["format"]: f["eff"] for f in out["formats"]}
    assert eff["fp4"] < eff["int4+bf16"] < 1
    same = json.loads(output("plan", runs, "--versus", runs, "--flops", "1e20", "--bootstrap", 20, "--json"))
    assert same["multiplier"] == pytest.approx(1, rel=1e-3)
    frame = pd.read_csv(runs)
    frame.assign(loss=frame.loss + 0.5).to_csv(tmp_path / "worse.csv", index=False)
    never = invoke("plan", runs, "--versus", tmp_path / "worse.csv", "--flops", "1e22")
    assert "worse.csv never reaches the loss of 1e+22 FLOP" in " ".join(never.stdout.split())
    assert "nan" not in never.output
    assert "RuntimeWarning" not in never.output


def test_a_plan_from_as_many_points_as_parameters_has_no_interval(tmp_path: Path) -> None:
    points, _ = planted("quest", noise=1e-3, sizes=(3e7, 5e7, 1e8, 2e8), schemes=("bf16", "w4a4"))
    frame = pd.DataFrame(points.to_records())[list(TABLE)].iloc[[0, 3, 5, 12, 14, 25]]
    frame.to_csv(tmp_path / "six.csv", index=False)
    result = invoke("plan", tmp_path / "six.csv", "--flops", "1e20")
    assert (result.exit_code, "leave no residual degrees of freedom" in " ".join(result.stdout.split())) == (0, True)
    out = json.loads(output("plan", tmp_path / "six.csv", "--flops", "1e20", "--json"))
    assert [o["interval"] for o in out["options"]] == [None, None]
    assert out["status"] == "exactly determined"
    said = " ".join(output("fit-scaling", tmp_path / "six.csv").split())
    assert "The fit is exactly determined: do not use its parameters or its eff." in said
    assert "6 points for 6 parameters leave no residual degrees of freedom" in said
    budget = ("--versus", tmp_path / "six.csv", "--flops", "1e20")
    assert "leave no residuals" in output("plan", tmp_path / "six.csv", *budget, code=2)


def test_a_transition_comes_with_its_doubt(runs: Path) -> None:
    """An interval without asking, and what other laws say; or where to get them."""
    said = " ".join(output("fit-scaling", runs).split())
    sentence = re.search(r"w4a4 beats w8a8 from (\S+) \[(\S+), (\S+)\] tokens per 16-bit parameter on\. By other laws", said)
    value, low, high = (float(number.replace(",", "")) for number in sentence.groups())
    assert low < value < high
    assert "no interval without bootstrap" in " ".join(output("fit-scaling", runs, "--bootstrap", 0).split())
    out = json.loads(output("fit-scaling", runs, "--json"))
    assert {"quartet", "eff-nd"} <= {row["law"] for row in out["transitions_of_other_laws"]}
    assert {row["law"] for row in out["transitions"]} == {"quest"}


def test_a_plan_says_ties_and_other_laws(runs: Path, tmp_path: Path) -> None:
    out = json.loads(output("plan", runs, "--flops", "1e20", "--json"))
    assert all({"quest", "quartet"} <= set(o["laws"]) for o in out["options"])
    assert [o["scheme"] for o in out["options"] if o["tied"]] == []
    frame = pd.read_csv(runs)
    twin = frame[frame.scheme == "w4a4"].assign(scheme="w4a4-norot")
    twin["loss"] *= np.exp(1e-3 * np.random.default_rng(0).standard_normal(len(twin)))
    pd.concat([frame, twin]).to_csv(tmp_path / "twin.csv", index=False)
    said = output("plan", tmp_path / "twin.csv", "--flops", "1e20", "--bits", "w4a4,w4a4-norot,2")
    assert "is tied with w4a4" in said
    assert re.search(r"is tied with [^:]*w2a2", said) is None


def test_a_plan_says_what_it_counts(runs: Path) -> None:
    said = " ".join(output("plan", runs, "--flops", "1e20", "--bootstrap", 0, "--details").split())
    assert "Costs: 6·N·D training FLOP, the same at every width." in said
    options = ("--memory", "1GB", "--flops", "1e20", "--vocab", 50304, "--speed", "4=2,w8a8=1.5", "--inference-tokens", "1B")
    said = " ".join(output("plan", runs, *options, "--bootstrap", 0, "--details").split())
    assert "N·bits of memory and embedding and head of 50304 ids, at 16 bits unless the scheme has bits for them; " in said
    assert "6·N·D training FLOP and 2·N a served token" in said
    assert "but 4 1/2, w8a8 1/1.5." in said
    for bad, message in (
        ("w4a4=0", "a positive number"),
        ("x=2", "--speed: no runs of scheme 'x'"),
        ("w4a4", "not NAME=VALUE"),
    ):
        assert message in output("plan", runs, "--flops", "1e20", "--speed", bad, code=2)


def test_plan_refusals(runs: Path, tmp_path: Path) -> None:
    for args, message in (
        ((), "give a budget"),
        (("--artifact", "16MB"), "--artifact: alone bounds no training"),
        (("--memory", "1GB"), "--memory: alone bounds no training"),
        (("--inference-tokens", "1T"), "--inference-tokens: alone bounds no training"),
        (("--versus", runs), "--versus: needs --flops"),
        (("--flops", "many"), "--flops: 'many' is not a positive amount"),
        (("--flops", "1e20", "--memory", "1GB", "--kv", "2GB"), "leaves no memory"),
        (("--flops", "1e20", "--embedding", "int4"), "--embedding: embedding and head count only with --vocab"),
        (("--flops", "1e20", "--vocab", 256, "--embedding", "x4"), "--embedding: 'x4' is not a format; choices: int1 "),
        (("--flops", "1e20", "--vocab", 256, "--embedding", "ec2.5"), "--embedding: 'ec2.5-rms-ste'"),
        (
            ("--flops", "1e20", "--bits", "4,x"),
            "no runs of scheme 'x'; schemes with runs: bf16, w8a8, w4a16, w4a4, w3a3 and 1 more; by bits: 16, 8, 4, 3, 2",
        ),
        (("--next-runs", 1, "--goal", "transition@7B:8:1"), "--goal: no runs of scheme '1'"),
        (
            ("--flops", "1e20", "--law", "chinchilla"),
            "'chinchilla' does not tell schemes apart, and there are 6; choices: quest, ",
        ),
        (("--flops", "1e20", "--law", "coverage"), "'coverage' does not depend on tokens"),
        (("--next-runs", 1, "--goal", "best"), "--goal: 'best'"),
        (("--next-runs", 1, "--goal", "loss@1B:lots"), "--goal: 'lots'"),
        (("--next-runs", 1, "--goal", "loss@1B:2B:w5a5"), "--goal: no runs of scheme 'w5a5'"),
        (("--next-runs", 1, "--max-flops", "1"), "no candidate run costs"),
        (("--untrained", "weird"), "no Gaussian error is known for 'weird'"),
    ):
        assert message in output("plan", runs, *args, code=2)
    twice = json.loads(output("plan", runs, "--flops", "1e20", "--bits", "4,w4a4", "--bootstrap", 0, "--json"))
    assert [o["scheme"] for o in twice["options"]] == ["w4a4"]
    one = ("--law", "chinchilla", "--where", "scheme=bf16", "--flops", "1e20", "--json")
    assert [o["scheme"] for o in json.loads(output("plan", runs, *one))["options"]] == ["bf16"]
    pooled = json.loads(output("fit-scaling", runs, "--law", "chinchilla", "--json"))
    assert [w["numbers"] for w in pooled["warnings"] if w["kind"] == "schemes_merged"] == [{"schemes": 6}]
    frame = pd.read_csv(runs)
    frame[frame.scheme != "w8a8"].to_csv(tmp_path / "no8.csv", index=False)
    assert "no runs of scheme '8'" in output("plan", tmp_path / "no8.csv", "--next-runs", 1, code=2)


@pytest.mark.parametrize("name", ["30M", "100M", "430M", "1600M", "107K", "640K"])
def test_shapes_come_near_the_presets(name: str) -> None:
    wanted = resolve([file_layer_of(name)]).config
    dims = shape(wanted.model.params_non_embedding)
    assert ModelConfig(**dims).params_non_embedding == pytest.approx(wanted.model.params_non_embedding, rel=0.08)
    if name.endswith("M"):
        assert learning_rate(wanted.model.params_non_embedding) == pytest.approx(wanted.optim.lr, rel=0.12)


@pytest.mark.parametrize("N", np.geomspace(2.6e4, 4.9e6, 12))
def test_small_plans_are_of_the_laptop_family(N: float) -> None:
    dims = shape(N)
    assert ModelConfig(**dims).params_non_embedding == pytest.approx(N, rel=0.45)
    assert dims["n_layer"] >= 2
    keys = recipe(N)
    assert (keys["optim.name"], keys["train.batch_size"], keys["data.seq_len"]) == ("muon", 8, 128)
    assert recipe(1e9)["optim.name"] == "adamw"


def file_layer_of(name: str):
    return Layer("preset", flatten(PRESETS[name], where=name))


def test_schemes_become_config_keys() -> None:
    points, _ = planted("quest", schemes=("bf16", "w4a4", "w4a16", "fp4", "1.585", "ste-w2a2", "quest-w4a4+g.int8-absmax"))
    lines = {s.label: {k.removeprefix("quant."): v for k, v in quant_keys(s, 64).items()} for s in points.schemes}
    word = "int4-h64-rms-trust"
    assert lines == {
        "bf16": {"method": "bf16"},
        "w4a4": {"weights": word, "activations": word},
        "w4a16": {"weights": word, "activations": "bf16"},
        "fp4": dict.fromkeys(("weights", "activations"), "fp4-h64-rms-trust"),
        "1.585": dict.fromkeys(("weights", "activations"), "ternary-h64-rms-trust"),
        "ste-w2a2": dict.fromkeys(("weights", "activations"), "int2-rms-ste"),
        "quest-w4a4+g.int8-absmax": {"weights": word, "activations": word, "gradients": "int8-absmax-ste"},
    }
    ends = "+eh.int4-h-rms-trust+kv.int8-h.s-rms-ste"
    known = read_scheme(f"quest-w4a4+g.int8-absmax{ends}"), read_scheme(f"bf16{ends}")
    both, alone = ({k.removeprefix("quant."): v for k, v in quant_keys(s, 64, 32).items()} for s in known)
    rows = {"embedding": word, "head": word, "kv": "int8-h32.s-rms-ste"}
    assert both == {**lines["quest-w4a4+g.int8-absmax"], **rows}
    assert alone == {"weights": "bf16", "activations": "bf16", **rows}


def test_a_plan_for_a_file_counts_embedding_and_head_at_their_bits(tmp_path: Path) -> None:
    """By the scheme's name, or by --embedding; its config then trains them so."""
    points, _ = planted("quest", schemes=("bf16", "w4a4", "w4a4+eh.int4-h-rms-trust"), noise=3e-3)
    table = tmp_path / "rows.csv"
    pd.DataFrame(points.to_records()).to_csv(table, index=False)
    budget = ("--flops", "1e19", "--artifact", "16MB", "--vocab", 4096, "--bootstrap", 0)
    sizes = {o["scheme"]: o for o in json.loads(output("plan", table, *budget, "--json"))["options"]}
    assert [o["limit"] for o in sizes.values()] == ["file"] * 3
    assert sizes["w4a4+eh.int4-h-rms-trust"]["params_non_embedding"] > 1.2 * sizes["w4a4"]["params_non_embedding"]
    wanted = ("--bits", "4", "--embedding", "int4", "--out", tmp_path / "best.toml", "--set", "data.tokenizer=bpe.llama3:4096")
    said = output("plan", table, *budget, *wanted, "--details")
    assert "What embedding and head in int4 cost is not in the losses" in said
    assert "at int4 unless the scheme has bits for them" in " ".join(said.split())
    keys = tomllib.loads((tmp_path / "best.toml").read_text())
    assert keys["quant"]["embedding"] == keys["quant"]["head"] == "int4-rms-ste"
    config = resolve([Layer("plan", flatten(keys, where="plan"))]).config.with_vocabulary(4096)
    assert artifact_bytes(config.model, config.quant, config.data.tokenizer) == pytest.approx(16e6, rel=0.1)


def test_a_plan_writes_the_words_of_the_runs(tmp_path: Path) -> None:
    """Whatever a scheme is called, its config trains as its runs were trained, also by way of a saved fit."""
    points, _ = planted("quest", noise=1e-3, schemes=("bf16", "w4a4"))
    frame = pd.DataFrame(
        {"N": points.N, "D": points.D, "loss": points.loss, "scheme": ["mine" if g else "bf16" for g in points.group]}
    )
    words = {"bf16": "bf16", "mine": "int4-h64-absmax-clip2"}
    frame["weights"] = frame["activations"] = frame.scheme.map(words)
    frame.to_csv(tmp_path / "a.csv", index=False)
    (tmp_path / "fit.json").write_text(output("fit-scaling", tmp_path / "a.csv", "--json"))
    budget = ("--flops", "1e20", "--bits", "mine", "--bootstrap", 0, "--out", tmp_path / "p.toml")
    for source in (tmp_path / "a.csv", tmp_path / "fit.json"):
        output("plan", source, *budget)
        ready = resolve([file_layer(tmp_path / "p.toml")]).config
        assert (str(ready.quant.weights), str(ready.quant.activations)) == (
            "int4-h128-absmax-clip2",
        ) * 2  # the largest block that fits
    (tmp_path / "p.toml").unlink()
    frame.loc[frame.scheme.eq("mine") & (frame.N > 1e8), ["weights", "activations"]] = "int4-rms-ste"
    for changed, message in (
        (frame, "were quantized in several ways (int4-h64-absmax-clip2+int4-h64-absmax-clip2, int4-rms-ste+int4-rms-ste)"),
        (frame.drop(columns=["weights", "activations"]).assign(w_bits=frame.scheme.map({"bf16": 16, "mine": 4})), "is unknown"),
    ):
        changed.to_csv(tmp_path / "b.csv", index=False)
        assert message in output("plan", tmp_path / "b.csv", *budget, code=2)
        assert not (tmp_path / "p.toml").exists()


def test_a_plan_is_to_be_run_as_it_is(runs: Path, tmp_path: Path) -> None:
    """The recipe is that of the nearest published size, and the text is named, or said to be missing in file and terminal."""
    out = tmp_path / "p.toml"
    budget = ("plan", str(runs), "--memory", "1GB", "--flops", "1e21", "--bits", "4,8", "--bootstrap", "0", "--out", str(out))
    result = invoke(*budget)
    assert "data.source and data.tokenizer are left to you" in " ".join(result.stderr.split())
    assert "# data.source and data.tokenizer are left to you" in out.read_text()
    ready, near = (resolve([layer]).config for layer in (file_layer(out), file_layer_of("1600M")))
    for key in ("batch_size", "precision", "eval_tokens"):
        assert getattr(ready.train, key) == getattr(near.train, key)
    assert ready.data.seq_len == near.data.seq_len
    assert ready.train.steps == round(ready.tokens / 2**18) < 1e6
    assert 0 < ready.train.micro_batch < 64
    assert f"{ready.train.steps:,} steps" in output("train", "--config", out, "--dry-run")
    result = invoke(*budget, "--set", "data.source=hf:x/y", "--set", "train.batch_size=64")
    assert "left to you" not in result.stderr + out.read_text()
    ready = resolve([file_layer(out)]).config
    assert (ready.data.source, ready.train.batch_size) == ("hf:x/y", 64)
    assert "--set: its keys are those of the file" in output(*budget[:-2], "--set", "train.seed=1", code=2)
    assert "train.sed" in output(*budget, "--set", "train.sed=1", code=2)


def test_a_plan_takes_text_and_recipe_of_the_runs_behind_it(tmp_path: Path) -> None:
    for config in report_runs.configs(ratios=(8, 16, 32)):
        report_runs.write(tmp_path / "runs", config)
    for question in (("--flops", "1e15", "--bits", "quest-w4a4"), ("--next-runs", 4, "--goal", "transition@100M:16:4")):
        result = invoke("plan", tmp_path / "runs", *question, "--bootstrap", "0", "--out", tmp_path / "p.toml")
        assert result.exit_code == 0, result.output
        assert "left to you" not in result.stderr
        ready = (
            load_sweep_file(tmp_path / "p.toml").cells[0].config
            if "next" in question[0]
            else resolve([file_layer(tmp_path / "p.toml")]).config
        )
        assert (ready.data, ready.train.batch_size) == (config.data, 16)
        assert (ready.optim.name, ready.optim.lr) == ("adamw", 3e-3)  # unlike the laptop family
        assert ready.warmup_steps == 0.1 * ready.train.steps
    assert not {c.run_id for c in load_sweep_file(tmp_path / "p.toml").cells} & {p.name for p in (tmp_path / "runs").iterdir()}


@pytest.mark.slow
@needs("quest_runs.csv")
def test_published_schemes_are_written_as_they_were_trained(tmp_path: Path) -> None:
    for label, words in {
        "w4a4-norot": ("int4-rms-trust", "int4-rms-trust"),
        "w4sparse-a4": ("int4-h128-rms-2of4pairs-trust", "int4-h128-rms-trust"),
        "w4a16": ("int4-h128-rms-trust", "bf16"),
    }.items():
        options = ("--flops", "1e21", "--bits", label, "--bootstrap", 0, "--out", tmp_path / "p.toml")
        output("plan", DATA / "quest_runs.csv", *options)
        ready = resolve([file_layer(tmp_path / "p.toml")]).config
        assert (str(ready.quant.weights), str(ready.quant.activations)) == words


@needs("quest_runs.csv")
def test_published_runs_from_the_command_line(tmp_path: Path) -> None:
    source = DATA / "quest_runs.csv"
    out = json.loads(output("fit-scaling", source, "--schemes", "1.585", "--bootstrap", 0, "--json"))
    assert 7.38053e-4 <= out["cost"] <= 7.38054e-4
    assert out["status"] == "at bound"
    assert (out["params"]["E"], out["eff"]["1.585"]) == (0, None)
    assert [row["tokens_per_param"] for row in out["transitions"] if row["size"] == 7e9] == pytest.approx([25], rel=0.02)
    vector = {k: v for k, v in PUBLISHED.items() if not k.startswith("eff.")} | {"eff": PUBLISHED_EFF}
    (tmp_path / "published.json").write_text(json.dumps(vector))
    seen = json.loads(output("fit-scaling", source, "--evaluate", tmp_path / "published.json", "--json"))
    assert seen["cost"] == pytest.approx(7.384314e-4, rel=1e-6)
    frame = pd.read_csv(source)
    frame[frame.scheme != "w8a8"].to_csv(tmp_path / "no8.csv", index=False)
    assert json.loads(output("fit-scaling", tmp_path / "no8.csv", "--bootstrap", 0, "--json"))["transitions"] == []
    budget = json.loads(
        output("plan", source, "--memory", "24GB", "--flops", "2e21", "--bits", "1,2,3,4,8,16", "--bootstrap", 0, "--json")
    )
    assert (budget["options"][0]["w_stored_bits"], budget["options"][0]["params_non_embedding"]) == (8, 24e9)


# --- sources ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """A folder with runs on two texts, an external run of one of them, an unfinished run, and a damaged one."""
    folder = tmp_path / "runs"
    report_runs.write_all(folder, report_runs.configs())
    report_runs.write(folder, report_runs.config(seed=6, bits=4), state="preempted")
    report_runs.write(folder, report_runs.config(seed=7, bits=4), data="cd" * 32)
    damaged = report_runs.write(folder, report_runs.config(seed=8, bits=4))
    (damaged / "result.json").write_text("{")
    external = {"scheme": "quest-w4a4", "N": 3e6, "D": 6e7, "loss": 3.21, "data_hash": "ab" * 32}
    pd.DataFrame([{"run": "mine", **external}]).to_csv(tmp_path / "elsewhere.csv", index=False)
    output("runs", "import", tmp_path / "elsewhere.csv", "--runs", folder)
    return folder


def test_all_commands_refuse_mixed_data_alike(mixed: Path) -> None:
    """Losses on two texts share no law: the sentence names both hashes and the way out, and the report leaves the law out."""
    advice = "select it with --where data_hash=HASH."
    for command in (("fit-scaling",), ("plan", "--flops", "1e15")):
        words = " ".join(output(command[0], mixed, *command[1:], code=2).split())
        assert all(word in words for word in ("ab" * 32, "cd" * 32, advice)), words
    material, _, fit = gather(mixed, bootstrap=0)
    assert fit is None
    assert all(word in material.problem for word in ("No law was fitted", "ab" * 32, "cd" * 32, advice))
    chosen = {"data_hash": "ab" * 32}
    fits = fit_sources(mixed, where=chosen, bootstrap=0).document, gather(mixed, where=chosen, bootstrap=0)[2].document
    assert [fit.n for fit in fits] == [25, 25]
    assert fits[0].params == fits[1].params


def test_external_runs_count_everywhere(mixed: Path) -> None:
    chosen = {"data_hash": "ab" * 32}
    material, sources, fit = gather(mixed, where=chosen, bootstrap=0)
    for document in (fit_sources(mixed, where=chosen, bootstrap=0).document, fit.document):
        assert "elsewhere/mine" in {row["run"] for row in document.points}
    assert "elsewhere/mine" in set(material.runs["run"])
    left_out = {each.run: each.reason for each in sources.left_out}
    assert left_out.pop(report_runs.config(seed=6, bits=4).run_id) == "preempted"
    assert left_out.pop(report_runs.config(seed=8, bits=4).run_id).startswith("damaged: ")
    assert left_out.pop(report_runs.config(seed=7, bits=4).run_id) == f"not selected: data_hash is {'cd' * 32}"
    assert left_out == {}


def test_damaged_and_unfinished_runs_are_named_by_the_fit(mixed: Path) -> None:
    sources = load_sources(mixed, where={"data_hash": "ab" * 32})
    kinds = {note.kind: note.numbers for note in sources.points.notes}
    assert list(kinds["damaged_runs"]["runs"]) == [report_runs.config(seed=8, bits=4).run_id]
    assert kinds.keys() == {"damaged_runs", "unfinished_runs"}


def test_sources_are_refused_in_a_sentence(runs: Path, mixed: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty: holds no runs\.$"):
        _ = load_sources(tmp_path / "empty").points
    with pytest.raises(DataError, match="there is no such folder of runs or table"):
        load_sources(tmp_path / "nothing")
    with pytest.raises(DataError, match="two sources hold the run"):
        load_sources([mixed, mixed])
    with pytest.raises(UsageError, match=r"--where: unknown column 'sede'; did you mean 'seed'\?"):
        _ = load_sources(mixed, where={"sede": "1"}).selected


def test_compare_says_when_runs_saw_different_data(mixed: Path) -> None:
    first, other = (report_runs.config(seed=seed, bits=4).run_id for seed in (0, 7))
    (same,) = [c.run_id for c in report_runs.configs() if c.quant.label == "bf16" and c.run_id.startswith("107K-bf16-8x")]
    warning = f"{other} was trained on other data than {first}: their losses do not compare"
    assert warning in " ".join(invoke("runs", "compare", first, other, "--runs", mixed).stderr.split())
    assert "other data" not in invoke("runs", "compare", first, same, "--runs", mixed).stderr


def test_fits_of_the_version_before_are_read(tmp_path: Path) -> None:
    """A fit.json without a schema, made by the last version: its points, its parameters, and its sentences as findings."""
    old = Path(__file__).parent / "data" / "v0.1" / "fitted" / "fit.json"
    content = json.loads(old.read_text())
    assert "schema" not in content
    document = FitDocument.read(old)
    assert (document.params, document.eff) == (content["params"], content["eff"])
    assert [f.sentence for f in document.findings][: len(content["findings"])] == content["findings"]
    again = json.loads(output("fit-scaling", old, "--bootstrap", 0, "--json"))
    assert again["schema"] == 2
    assert (again["cost"], again["params"], again["data_hash"]) == (
        pytest.approx(content["cost"], rel=1e-9),
        pytest.approx(content["params"], rel=1e-6),
        content["data_hash"],
    )
    assert json.loads(output("plan", old, "--flops", "1e18", "--bootstrap", 0, "--json"))["status"] == content["status"]
    assert gather(old, bootstrap=0)[2].document.n == content["n"]
    for changes, message in (({"schema": 3}, "has schema 3, and this version reads 1 and 2"), ({"eff": ...}, "it lacks eff")):
        broken = {k: changes.get(k, v) for k, v in {**content, **changes}.items() if changes.get(k, v) is not ...}
        (tmp_path / "fit.json").write_text(json.dumps(broken))
        assert message in " ".join(output("fit-scaling", tmp_path / "fit.json", code=2).split())


# --- from a script ----------------------------------------------------------------------------------------------------


def test_every_question_is_one_call_from_a_script(runs: Path, tmp_path: Path) -> None:
    fit = questctl.fit_sources(runs, bootstrap=20)
    said = json.loads(output("fit-scaling", runs, "--bootstrap", 20, "--json"))
    assert fit.document.params == said["params"]
    assert [f.sentence for f in fit.verdict] == [f["sentence"] for f in said["findings"][:5]]
    with empty_figures():
        assert {path.name for path in fit.save(tmp_path / "out")} >= {"fit.json", "eff.png"}
    plan = questctl.plan_budget(fit, flops=1e20, memory_bytes=1e9, schemes=["2", "4", "16"], bootstrap=20)
    words = ("--memory", "1GB", "--flops", "1e20", "--bits", "2,4,16", "--bootstrap", 20, "--json")
    assert json.loads(json.dumps(plan.to_json())) == json.loads(output("plan", runs, *words))
    more = questctl.plan_next_runs(fit, 2, goal="transition@1B:8:4", bootstrap=20)
    to_come = questctl.plan_next_runs(fit, 1, goal="loss@1B:20B:4", bootstrap=0).to_json()["goal"]
    (cell,) = questctl.predict(fit, cells=[(1e9, 2e10, next(iter(to_come["loss"])))]).cells
    assert to_come["loss"] == {cell.scheme: pytest.approx(cell.loss)}
    assert [run.scheme for run in more.runs] == [
        run["scheme"]
        for run in json.loads(
            output("plan", runs, "--next-runs", 2, "--goal", "transition@1B:8:4", "--bootstrap", 20, "--json")
        )["runs"]
    ]
    assert questctl.compute_multiplier(fit, runs, flops=1e20, bootstrap=20).multiplier == pytest.approx(1, rel=1e-3)
    (fp4,) = questctl.untrained_formats(runs, ["fp4"], bootstrap=0).formats
    assert 0 < fp4.eff < 1
    pd.read_csv(runs).query("N < 1e8 and D < 40 * N and scheme in ('bf16', 'w4a4')").to_csv(tmp_path / "four.csv", index=False)
    with empty_figures():
        written = questctl.write_report(tmp_path / "four.csv", page=None, figures=tmp_path / "figures", bootstrap=0)
    assert (written.runs, written.left_out, written.problem[:18]) == (4, (), "No law was fitted:")
    assert {path.suffix for path in written.figures} == {".pdf", ".svg", ".png"}
    for wrong in ({"law": "qest"}, {"objective": "l1"}, {"law": "auto", "fix": {"E": 1.0}}):
        with pytest.raises(UsageError):
            questctl.fit_sources(runs, **wrong)


def test_health_is_one_call_from_a_script(mixed: Path) -> None:
    (one,) = questctl.diagnose_health(mixed, [report_runs.config(seed=6, bits=4).run_id])
    assert (one.state, one.spikes) == ("preempted", 0)
    damaged = {h.run: h for h in questctl.diagnose_health(mixed)}[report_runs.config(seed=8, bits=4).run_id]
    assert len(damaged.findings) == (damaged.state == "failed")


def test_rows_that_are_left_out_are_named_beside_the_answer(tmp_path: Path) -> None:
    points, _ = planted("quest", noise=1e-3, sizes=(3e7, 1e8, 3e8), ratios=(20, 100), schemes=("bf16", "w4a4"))
    table = pd.DataFrame(points.to_records())[["run", "scheme", "N", "D", "loss"]].assign(state="finished")
    table.loc[len(table)] = ["lost", "w4a4", 5e7, 1e9, 3.0, "crashed"]
    table.to_csv(tmp_path / "t.csv", index=False)
    for command in (["fit-scaling"], ["plan", "--flops", "1e20"], ["predict", "--N", "1B", "--D", "20B", "--scheme", "w4a4"]):
        done = invoke(command[0], tmp_path / "t.csv", *command[1:], "--bootstrap", 0)
        assert "Rows left out (1, unfinished): run lost (crashed)." in " ".join(done.stderr.split())
