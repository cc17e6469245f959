"""Study files: their cells, learning-rate searches and names, what is refused, and the time that a study took."""

from __future__ import annotations

import json
import math

import pytest

from questctl.config import flat_items
from questctl.errors import SweepFailed, UsageError
from questctl.store import RunStore
from questctl.sweep.outcomes import Outcome
from questctl.sweep.study import at_rate, cells_at, comparison, find_rates, training_time
from questctl.sweep.study_file import find_study, load_study, studies
from questctl.sweep.sweep_file import BUILT_IN, load_sweep_file

STUDY = """
name = "small"
[base]
data.source = "synthetic:markov?tokens=5000"
data.seq_len = 16
train.steps = 4
preset = "53K"
[matrix]
train.seed = [0, 1]
scheme = [{ quant.method = "bf16" }, { quant.method = ["quest", "ste"], quant.bits = 2 }]
[[include]]
quant.method = "quest"
quant.bits = 2
optim.lr = 1e-2
[study]
control = "bf16"
names = { ste-w2a2 = "plain" }
reference = { quest-w2a2 = ["plain"] }
search = { base = { train.steps = 3, train.seed = 1000 }, lr = [2e-3, 4e-3, 8e-3] }
[[study.claims]]
kind = "below"
scheme = "quest-w2a2"
against = "plain"
factor = 2
[study.full]
replace = { "53K" = "30M" }
base = { data.seq_len = 512 }
search = { base = { train.steps = 30 }, lr = [1e-3] }
"""


@pytest.fixture
def write(tmp_path):
    def study(text: str = STUDY):
        path = tmp_path / "small.toml"
        path.write_text(text)
        return path

    return study


def outcomes(truth, asked=None):
    """A `run` that trains nothing: `truth` maps (scheme, lr) to a loss, to "pending" or to "failed"; infinite: diverged."""

    def run(sweep_file):
        results = []
        for cell in sweep_file.cells:
            if asked is not None:
                asked.append((cell.config.quant.label, cell.config.optim.lr))
            result = truth(cell.config.quant.label, cell.config.optim.lr)
            if isinstance(result, str):
                results.append(Outcome(cell.run_id, result, message="why."))
            else:
                diverged = math.isinf(result)
                results.append(Outcome(cell.run_id, "diverged" if diverged else "done", loss=None if diverged else result))
        return results

    return run


def valley(places):
    return lambda scheme, lr: math.log2(lr / places[scheme]) ** 2


# --- the built-in ones ------------------------------------------------------------------------------------------------


def test_the_built_in_studies_are_sweep_files():
    assert {"methods", "learned", "ablation", "weight-only", "sparse", "formats", "mixed", "seeds"} <= set(studies())
    for path in studies().values():
        assert load_sweep_file(path).cells


@pytest.mark.parametrize("name", sorted(studies()))
def test_every_study_reads_at_every_scale_it_has(name):
    path = find_study(name)
    study = load_study(path)
    assert study.claims
    assert all(c.config.model.params_non_embedding < 1e6 for c in (*study.sweep_file.cells, *study.search.values()))
    if study.spec.full is not None:
        full = load_study(path, scale="full")
        assert all(c.config.model.params_non_embedding > 3e7 for c in (*full.sweep_file.cells, *full.search.values()))
        assert {c.config.data.seq_len for c in full.sweep_file.cells} == {512}
        assert len(full.sweep_file.cells) == len(study.sweep_file.cells)
        assert list(full.search) == list(study.search)


def test_methods_are_compared_under_identical_conditions():
    """Two cells of one size and seed differ in words and learning rate alone; seeds and sizes are those promised."""
    study = load_study(find_study("methods"))
    assert len(study.search) == 13
    main = [c for c in study.sweep_file.cells if "optim.lr" not in c.values]
    assert {c.config.train.seed for c in main} == {0, 1, 2}
    assert {c.config.model.params_non_embedding for c in main} == {106_816, 213_568}
    same = {
        str({k: v for k, v in flat_items(c.config) if not k.startswith(("quant.", "model.", "train.seed", "train.steps"))})
        for c in main
    }
    assert len(same) == 1
    per_size = {(c.config.model.n_layer, c.config.train.steps) for c in main}
    assert len(per_size) == 2
    fixed = [c for c in study.sweep_file.cells if "optim.lr" in c.values]
    assert {c.config.optim.lr for c in fixed} == {1e-2}
    assert len(fixed) == 10


# --- search -----------------------------------------------------------------------------------------------------------


def test_every_scheme_gets_its_own_rate_and_fixed_cells_keep_theirs(write):
    study, asked = load_study(write()), []
    assert list(study.search) == ["bf16", "quest-w2a2", "plain"]
    assert {(c.config.train.steps, c.config.train.seed) for c in study.search.values()} == {(3, 1000)}
    assert study.search["bf16"].values == {"train.seed": 1000, "quant.method": "bf16", "train.steps": 3}
    places = {"bf16": 4e-3, "quest-w2a2": 3.2e-2, "ste-w2a2": 2e-3}
    rates, losses, cells = find_rates(study, outcomes(valley(places), asked))
    assert rates == {"bf16": 4e-3, "quest-w2a2": 3.2e-2, "plain": 2e-3}
    assert sorted(losses["quest-w2a2"]) == [2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2]
    assert sorted(losses["plain"]) == [1e-3, 2e-3, 4e-3, 8e-3]
    assert len(asked) == len(set(asked)) == len({c.run_id for c in cells}) == 3 + 5 + 4
    labels = [(c.config.quant.label, c.config.train.seed, c.config.optim.lr) for c in cells_at(study, rates)]
    assert labels == [
        *((label, seed, places[label]) for seed in (0, 1) for label in ("bf16", "quest-w2a2", "ste-w2a2")),
        ("quest-w2a2", 0, 1e-2),
    ]


def test_a_cell_at_a_rate_is_the_cell_that_a_sweep_file_with_that_rate_has(write, tmp_path):
    study = load_study(write())
    other = tmp_path / "plain.toml"
    other.write_text(STUDY[: STUDY.index("[[include]]")].replace("[matrix]", "optim.lr = 4e-3\n[matrix]"))
    rates = dict.fromkeys(study.search, 4e-3)
    assert [c.run_id for c in cells_at(study, rates)][:-1] == [c.run_id for c in load_sweep_file(other).cells]


def test_divergence_is_the_worst_loss_and_failure_ends_the_search(write):
    study = load_study(write())
    rates, losses, _ = find_rates(study, outcomes(lambda scheme, lr: math.inf if lr > 3e-3 else 2.0))
    assert rates["bf16"] == 5e-4  # equal losses: the smaller value, twice
    assert losses["bf16"][8e-3] == math.inf
    with pytest.raises(SweepFailed, match=r"failed: why\. --retry failed"):
        find_rates(study, outcomes(lambda scheme, lr: "failed" if lr > 4e-3 else 1.0))


def test_a_dry_run_leaves_rates_open_that_rest_on_pending_runs(write):
    study, asked = load_study(write()), []
    truth = valley({"bf16": 4e-3, "ste-w2a2": 1e-3})
    rates, _, _ = find_rates(study, outcomes(lambda s, lr: "pending" if s == "quest-w2a2" else truth(s, lr), asked))
    assert rates == {"bf16": 4e-3, "plain": 1e-3}
    assert sum(s == "quest-w2a2" for s, _ in asked) == 3
    middle = [c.config.optim.lr for c in cells_at(study, rates) if c.config.quant.label == "quest-w2a2"]
    assert middle == [4e-3, 4e-3, 1e-2]
    pending_later = {"bf16": 4e-3, "quest-w2a2": 4e-3, "ste-w2a2": 1e-3}
    late = valley(pending_later)
    rates, _, _ = find_rates(study, outcomes(lambda s, lr: "pending" if lr < 2e-3 else late(s, lr)))
    assert set(rates) == {"bf16", "quest-w2a2"}


def test_an_experiment_that_two_parts_ask_for_is_one_cell(write):
    study = load_study(write())
    cells = cells_at(study, dict.fromkeys(study.search, 1e-2))
    assert len(cells) == 6
    assert at_rate(cells[0], 1e-2).run_id == cells[0].run_id


def test_without_a_search_the_sweep_file_is_trained_as_it_is(write):
    text = "\n".join(line for line in STUDY.splitlines() if not line.startswith("search"))
    study = load_study(write(text))
    assert find_rates(study, outcomes(lambda *_: 1 / 0)) == ({}, {}, [])
    assert cells_at(study, {}) == study.sweep_file.cells
    study = load_study(write(text.replace("optim.lr = 1e-2", "train.seed = 7")), ["optim.lr=1e-3"])
    assert {c.config.optim.lr for c in study.sweep_file.cells} == {1e-3}


def test_the_full_scale_replaces_and_merges(write):
    full = load_study(write(), scale="full")
    assert {c.config.model.d_model for c in full.sweep_file.cells} == {640}
    assert {c.config.data.seq_len for c in full.sweep_file.cells} == {512}
    assert full.spec.search.lr == [1e-3]
    assert {(c.config.train.steps, c.config.train.seed) for c in full.search.values()} == {(30, 1000)}


def test_a_search_begins_at_the_rate_of_a_law(write, tmp_path):
    """Three rates about lr* = 40·N^-1 of each scheme's own config, ascending."""
    law = {"factor": 40.0, "exponents": {"N": -1.0}, "offsets": {}, "p_value": None}
    (tmp_path / "knobs.json").write_text(json.dumps({"kind": "knobs", "laws": {"lr": law}}))
    study = load_study(write(STUDY.replace("lr = [2e-3, 4e-3, 8e-3]", f'lr = "law:{tmp_path / "knobs.json"}"')))
    middles = {name: float(f"{40 / cell.config.model.params_non_embedding:.4g}") for name, cell in study.search.items()}
    asked: list[tuple[str, float]] = []
    rates, losses, _ = find_rates(study, outcomes(lambda _, lr: abs(lr - next(iter(middles.values()))), asked))
    assert {name: sorted(tried) for name, tried in losses.items()} == {n: [m / 2, m, 2 * m] for n, m in middles.items()}
    assert rates == middles
    assert {lr for _, lr in asked} == {m * f for m in middles.values() for f in (0.5, 1, 2)}


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("[study]", "[study]\ncontorl = 1", ["study.contorl"]),
        ('control = "bf16"', 'control = "bf61"', ["study.control", "did you mean 'bf16'"]),
        ("quest-w2a2 = [", "quest-w3a3 = [", ["study.reference", "quest-w3a3"]),
        ('names = { ste-w2a2 = "plain" }', 'names = { ste-w1a1 = "plain" }', ["study.names", "ste-w1a1"]),
        ('names = { ste-w2a2 = "plain" }', 'names = { ste-w2a2 = "bf16" }', ["one name"]),
        ('against = "plain"', 'against = "ste-w2a2"', ["study.claims", "ste-w2a2", "plain"]),
        ('kind = "below"', 'kind = "belw"', ["study.claims", "belw"]),
        ("lr = [2e-3, 4e-3, 8e-3]", "lr = []", ["study.search.lr"]),
        ("lr = [2e-3, 4e-3, 8e-3]", 'lr = "knobs.json"', ["study.search.lr", "law:FILE"]),
        ('names = { ste-w2a2 = "plain" }', "names = 3", ["study.names: 3: must be a table."]),
        ('names = { ste-w2a2 = "plain" }', "nmaes = 3", ["study.nmaes: is not a key that is known here."]),
        ("train.seed = 1000", "train.sede = 1000", ["study.search.base", "train.sede"]),
    ],
)
def test_mistakes_are_named(write, old, new, words):
    assert old in STUDY
    with pytest.raises(UsageError) as e:
        load_study(write(STUDY.replace(old, new)))
    assert "small.toml" in str(e.value)
    assert [w for w in words if w not in str(e.value)] == []


def test_what_cannot_be_meant_is_refused(write, tmp_path):
    with pytest.raises(UsageError, match="did you mean 'methods'"):
        find_study("method")
    with pytest.raises(UsageError, match=r"optim\.lr: small\.toml searches it"):
        load_study(write(), ["optim.lr=1e-3"])
    with pytest.raises(UsageError, match="unknown value 'huge'"):
        load_study(write(), scale="huge")
    with pytest.raises(UsageError, match=r"no table \[study\.full\]"):
        load_study(write(STUDY[: STUDY.index("[study.full]")]), scale="full")
    with pytest.raises(UsageError, match="questctl sweep"):
        load_study(BUILT_IN / "laptop.toml")


# --- records ----------------------------------------------------------------------------------------------------------


def test_the_gradient_norm_of_a_trunk_leaves_its_warm_up_out(write, tmp_path):
    """A trunk has its warm-up in steps, that of the shortest length: 10 % of 40 steps, and not 0 % of 80."""
    text = STUDY.replace("train.steps = 4\n", "", 1).replace("[matrix]", "[trunk]\n[matrix]\ntrain.steps = [40, 80]")
    study = load_study(write("\n".join(line for line in text.splitlines() if not line.startswith("search"))))
    store = RunStore(tmp_path / "runs")
    trunk = next(cell.config for cell in study.sweep_file.cells if cell.config.branch is None)
    assert (trunk.optim.warmup_frac, trunk.warmup_steps, trunk.train.steps) == (0.0, 4.0, 80)
    with store.run(trunk.run_id).open_for_training(trunk) as writer:
        writer.begin(step=0, steps=80, env={"threads": 1, "data_hash": "0", "attempt": {}})
        for step in range(1, 9):
            writer.log({"step": step, "grad_norm": 100.0 if step <= 4 else 1.0}, {"step": step})
    runs = {run.run: run for run in comparison(study, store, {}, {}).runs}
    assert runs[trunk.run_id].grad_norm == 1.0


# --- time -------------------------------------------------------------------------------------------------------------


def test_wall_time_is_the_union_of_the_runs_intervals_and_run_time_their_sum(write, tmp_path, monkeypatch):
    """Run 0: two lines from 0 to 10 s; run 1: an attempt lost at 8 s, the next from 20 to 30 s."""
    store, cells = RunStore(tmp_path / "runs"), load_study(write()).sweep_file.cells
    clock = {"now": 0.0}
    monkeypatch.setattr("questctl.store.runs.now", lambda: f"2026-01-01T00:00:{clock['now']:06.3f}+00:00")

    def attempt(cell, start, *ends):
        run = store.run(cell.run_id)
        with run.open_for_training(cell.config) as writer:
            clock["now"] = start
            writer.begin(step=0, steps=4, env={"threads": 2, "data_hash": "0", "attempt": {}})
            for step, end in enumerate(ends):
                clock["now"] = end
                writer.log({"step": step}, {"step": step})
        return run

    first = attempt(cells[0], 0, 4, 10)
    attempt(cells[1], 5, 8)
    second = attempt(cells[1], 20, 30)
    assert training_time([first]) == (10, 10)
    assert training_time([first, second]) == (20, 10 + 10)
    overlapping = attempt(cells[2], 5, 12)
    assert training_time([first, overlapping]) == (12, 17)
    assert training_time([]) == (0, 0)


def test_the_study_of_the_switch_shares_a_trunk_for_every_share_and_names_shares_alike() -> None:
    """At toy sizes: each share of a length leaves one run in full precision, whatever its whole steps are."""
    sets = ["data.source=synthetic:markov?tokens=5000", "data.seq_len=16", "train.batch_size=8", "train.eval_tokens=64"]
    study = load_study(find_study("switch"), sets)
    cells = study.sweep_file.cells
    names = {study.name_of(cell.config) for cell in cells}
    of_w2a2 = {name.removeprefix("quest-w2a2") for name in names if name.startswith("quest-w2a2")}
    assert of_w2a2 == {"", "+s0.25", "+s0.5", "+s0.75", "+s0.8", "+s0.9"}
    late = [cell.config for cell in cells if cell.config.quant.start]
    trunks = {cell.run_id for cell in cells if study.name_of(cell.config) == "bf16"}
    assert {config.branch.source for config in late if config.branch} == trunks
    assert all(config.branch for config in late)
    assert len({(c.model.params_non_embedding, c.train.steps) for c in (cell.config for cell in cells)}) == 5
    assert [claim.kind for claim in study.claims] == ["best-share"] * 4 + ["below"]
