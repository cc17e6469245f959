"""A branch is the run of its own length, bit for bit, and costs its cooldown alone."""

import json

import pytest
import tiny
from command_line import output, run_cli
from helpers import slow_but, write_file

from questctl.config import RunConfig, resolve
from questctl.config.layers import file_layer, set_layer
from questctl.config.rates import learning_rate
from questctl.errors import DataError, Preempted, UsageError
from questctl.store import RunStore, load_runs
from questctl.sweep.sweep_file import load_sweep_file
from questctl.training import checkpoint
from questctl.training.branch import branch, parse_cooldown, share_trunks
from questctl.training.loop import train

WSD = {"optim.schedule": "wsd", "train.health_every": 4}
TRUNK = tiny.config({**tiny.QUEST, **WSD, "train.keep_steps": "5,6"})


@pytest.fixture(scope="module")
def trunk(tmp_path_factory):
    root = tmp_path_factory.mktemp("trunk")
    train(TRUNK, runs=root)
    return root


def outcome(root, config):
    """Weights and metric lines; without what the weights' file says of the run."""
    run = RunStore(root).run(config.run_id)
    weights = {name: t.numpy().tobytes() for name, t in checkpoint.load_tensors(run.model_path).items()}
    return weights, run.metrics_path.read_bytes()


def single(config):
    """The run of the same schedule that never branched."""
    return config.model_copy(update={"branch": None})


# --- the runs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("step", "cooldown"), [(5, 3), (6, 2)])
def test_a_branch_is_the_single_run_bit_for_bit(tmp_path, trunk, step, cooldown):
    """Left in the middle of a metric line's window, and at its end."""
    config = branch(TRUNK, step, cooldown)
    result, alone = train(config, runs=trunk), train(single(config), runs=tmp_path)
    assert outcome(trunk, config) == outcome(tmp_path, single(config))
    assert (result.loss, result.steps, result.tokens) == (alone.loss, step + cooldown, alone.tokens)
    assert result.run != alone.run
    assert [p.name for p in RunStore(trunk).run(TRUNK.run_id).kept_path.iterdir()] == ["step-00000005", "step-00000006"]


def test_a_branch_that_is_stopped_and_killed_goes_on(tmp_path, trunk):
    config = branch(TRUNK, 6, 4)
    train(single(config), runs=tmp_path)
    asked = iter(range(100))
    with pytest.raises(Preempted, match="step 6/10"):
        train(config, runs=trunk, stop=lambda: next(asked) >= 0)
    assert tiny.in_child(_killed, trunk, config) < 0
    train(config, runs=trunk)
    assert outcome(trunk, config) == outcome(tmp_path, single(config))


def _killed(root, config):
    train(config, runs=root, progress=lambda *, step, **_: tiny.die() if step == 8 else None)


@pytest.mark.parametrize(("method", "step"), [({}, 12), (tiny.LSQ, 4)], ids=["bf16", "lsq"])
def test_trunk_and_branch_at_a_constant_rate(tmp_path, method, step):
    """With learned scales the branch leaves while they are still being set from data."""
    trunk = tiny.config({**method, "optim.schedule": "constant", "train.keep_steps": f"{step}"})
    train(trunk, runs=tmp_path)
    config = branch(trunk, step, 3)
    train(config, runs=tmp_path)
    train(single(config), runs=tmp_path / "alone")
    assert outcome(tmp_path, config)[0] == outcome(tmp_path / "alone", single(config))[0]
    assert sorted(load_runs(tmp_path).tokens) == sorted([12 * 128, (step + 3) * 128])


def test_phases_in_steps_are_phases_in_shares():
    by_share = tiny.config({"optim.schedule": "wsd", "optim.warmup_frac": 0.25, "optim.decay_frac": 0.5}).optim
    by_steps = by_share.model_copy(update={"warmup_frac": 0.0, "decay_frac": 0.0, "warmup_steps": 3.0, "decay_steps": 6})
    assert [learning_rate(i, 12, by_share) for i in range(12)] == [learning_rate(i, 12, by_steps) for i in range(12)]


# --- what it is called ------------------------------------------------------------------------------------------------


def test_trunk_and_step_are_part_of_its_identity():
    config = branch(TRUNK, 6, 3)
    assert config.identity["branch"] == {"source": TRUNK.run_id, "step": 6}
    assert RunConfig.from_json(json.loads(json.dumps(config.to_json()))) == config
    assert len({c.run_id for c in (TRUNK, config, single(config), branch(TRUNK, 5, 4), branch(TRUNK, 6, 4))}) == 5
    assert "branch" not in TRUNK.to_json()
    assert config.new_tokens == 3 * 128
    kept_other = tiny.config({**tiny.QUEST, **WSD, "train.keep_steps": "7"})
    assert kept_other.run_id == TRUNK.run_id  # what is kept does not change the result


@pytest.mark.parametrize(
    ("trunk", "step", "cooldown", "message"),
    [
        (TRUNK, 11, 3, "branch: step 11 is not where .* from step 2 to 9.6"),
        (TRUNK, 1, 3, "branch: step 1 is not where"),
        (TRUNK, 6, 0, "a cooldown must have at least one step, got 0"),
        (tiny.config(), 6, 3, "has optim.schedule=cosine; a trunk has wsd or constant"),
        (branch(TRUNK, 6, 3), 5, 3, "is a branch itself; branch from "),
    ],
)
def test_where_no_branch_can_be(trunk, step, cooldown, message):
    with pytest.raises(UsageError, match=message):
        branch(trunk, step, cooldown)


def test_cooldowns():
    assert (parse_cooldown("20%", 80), parse_cooldown("50%", 80), parse_cooldown("7", 80)) == (20, 80, 7)
    for word in ("0%", "100%", "-3", "0", "x", "nan%", "1.5"):
        with pytest.raises(UsageError, match="neither a share such as 20% nor a number of steps"):
            parse_cooldown(word, 80)


def test_a_trunk_without_that_checkpoint(tmp_path, trunk):
    with pytest.raises(DataError, match=r"has no checkpoint of step 4; it has those of steps 5, 6"):
        train(branch(TRUNK, 4, 2), runs=trunk)
    with pytest.raises(DataError, match="it has none"):
        train(branch(TRUNK, 4, 2), runs=tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_other_text_than_the_trunk_saw(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog\n" * 200)
    trunk = tiny.config({**WSD, "data.source": f"file:{text}", "train.keep_steps": "6"})
    train(trunk, runs=tmp_path / "runs")
    text.write_text("lorem ipsum dolor sit amet\n" * 300)
    with pytest.raises(UsageError, match="is not the text that the run began with"):
        train(branch(trunk, 6, 3), runs=tmp_path / "runs")


def test_the_steps_to_keep_are_steps_of_the_run():
    for steps, message in (("13", "step 13 is beyond the end"), *((word, "takes steps") for word in ("6,", "0", "a"))):
        with pytest.raises(UsageError, match=f"train.keep_steps: .*{message}"):
            tiny.config({"train.keep_steps": steps})


@pytest.mark.parametrize("written", ["6", "[6]", "[4, 6]", "4,6", "4, 6", '"4,6"'])
def test_the_steps_to_keep_as_people_write_them(written, tmp_path):
    """Numbers and lists of TOML are the same config, and have the same run id, as the text."""
    config = resolve([set_layer([f"train.keep_steps={written}"])]).config
    assert config == resolve([set_layer([f"train.keep_steps='{written.strip('[]').strip(chr(34))}'"])]).config
    assert config.train.keep_steps == ("6" if "4" not in written else "4,6")
    if written not in ("4,6", "4, 6"):  # are no TOML
        assert resolve([file_layer(write_file(tmp_path / "a.toml", f"train.keep_steps = {written}"))]).config == config


# --- the command line -------------------------------------------------------------------------------------------------


def test_train_branch_from(trunk):
    digits = TRUNK.run_id[-8:]
    shown = json.loads(
        run_cli(
            "train",
            "--branch-from",
            f"{digits}@6",
            "--cooldown",
            "25%",
            "--runs",
            trunk,
            "--json",
            "--set",
            "train.log_every=1",
            "--quiet",
        ).stdout
    )
    assert shown["run"] == branch(TRUNK, 6, 2).run_id
    assert RunStore(trunk).run(shown["run"]).metrics()[-1]["step"] == 8
    for words, message in (
        ([digits], "is not of the form RUN@STEP; it has those of steps 5, 6"),
        ([f"{digits}@3"], "has no checkpoint of step 3"),
        ([f"{digits}@6", "--seed", "3"], "train.seed: a branch has that of its trunk, 0"),
    ):
        assert message in output("train", "--branch-from", *words, "--runs", trunk, "--quiet", code=2).replace("\n", " ")


# --- sweep files ------------------------------------------------------------------------------------------------------

SWEEP = """
[base]
model = { d_model = 32, n_head = 2, d_ff = 64, n_layer = 1 }
data = { seq_len = 16, source = "synthetic:markov?vocab=16&tokens=20000" }
train = { batch_size = 8, eval_tokens = 256, threads = 1, log_every = 5 }
[matrix]
train.seed = [0, 1]
train.steps = [20, 40, 10]
[trunk]
cooldown = 0.25
"""


@pytest.fixture
def sweep_file(tmp_path):
    (tmp_path / "lengths.toml").write_text(SWEEP)
    return tmp_path / "lengths.toml"


def test_a_sweep_file_with_trunks(sweep_file):
    cells = load_sweep_file(sweep_file).cells
    assert [(c.config.train.seed, c.config.train.steps) for c in cells] == [(s, n) for s in (0, 1) for n in (20, 40, 10)]
    for seed, (middle, trunk, short) in enumerate((cells[:3], cells[3:])):
        assert trunk.config.branch is None
        assert (trunk.config.train.keep_steps, trunk.config.optim.decay_steps, trunk.config.warmup_steps) == ("8,15", 10, 1.0)
        for cell, step in ((middle, 15), (short, 8)):
            assert cell.config.branch.model_dump() == {"source": trunk.run_id, "step": step}
            assert cell.config.train.seed == seed
    shared = sum(c.config.new_tokens for c in cells)
    assert shared == 2 * (40 + 5 + 2) * 128 < sum(c.config.tokens for c in cells)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("cooldown = 0.25", "cooldown = 1"), "trunk: cooldown: 1 is not a share between 0 and 1"),
        (("cooldown = 0.25", "cooldwn = 0.25"), "did you mean 'cooldown'"),
        (("cooldown = 0.25", "cooldown = 0.95"), "a cooldown of 10 exceed the shortest length, 10 steps"),
        (("cooldown = 0.25", "warmup = 9"), "a warm-up of 9 steps and a cooldown of 2 exceed the shortest length, 10 steps"),
        (
            ("cooldown = 0.25", "warmup = 0.25"),
            "a warm-up of 10 steps and a cooldown of 2 exceed the shortest length, 10 steps",
        ),
        *((("cooldown = 0.25", f"warmup = {x}"), "trunk: warmup: .* is neither") for x in ("0", "1.5", "-1", "true", "'5%'")),
        (("[matrix]", "optim.schedule = 'constant'\n[matrix]"), "has the schedule wsd, not constant"),
    ],
)
def test_sweep_files_that_cannot_be(sweep_file, change, message):
    sweep_file.write_text(SWEEP.replace(*change))
    with pytest.raises(UsageError, match=message):
        load_sweep_file(sweep_file)


@pytest.mark.parametrize(("asked", "steps"), [("", 1.0), ("warmup = 5", 5.0), ("warmup = 0.1", 4.0)])
def test_the_warm_up_of_a_trunk(sweep_file, asked, steps):
    """All lengths have it: by default what the shortest would have alone, else steps or a share of the longest."""
    sweep_file.write_text(f"{SWEEP}{asked}\n")
    cells = load_sweep_file(sweep_file).cells
    assert {cell.config.warmup_steps for cell in cells} == {steps}
    rates = [[learning_rate(i, c.config.train.steps, c.config.optim) for i in range(7)] for c in cells]
    assert all(rate == rates[0] for rate in rates)
    assert (rates[0][int(steps) - 1], rates[0][0] < rates[0][-1]) == (cells[0].config.optim.lr, steps > 1)


def test_the_ids_of_trunks_are_those_of_version_0_1(sweep_file):
    assert [cell.run_id for cell in load_sweep_file(sweep_file).cells[:3]] == [
        "10K-bf16-0.248x-s0-4c537923",
        "10K-bf16-0.495x-s0-61aa14b2",
        "10K-bf16-0.124x-s0-3a6fccde",
    ]


def test_one_length_has_no_branches():
    (alone,) = share_trunks([tiny.config()], 0.25)
    assert (alone.branch, alone.train.keep_steps, alone.optim.decay_steps) == (None, "", 3)


def test_a_sweep_with_trunks_trains_each_step_once(tmp_path, sweep_file):
    cells = load_sweep_file(sweep_file).cells[:3]
    sweep_file.write_text(SWEEP.replace("[0, 1]", "[0]"))
    run_cli("sweep", sweep_file, "--runs", tmp_path / "runs", "--jobs", 2, "--quiet")
    for cell in cells:
        run = RunStore(tmp_path / "runs").run(cell.run_id)
        assert run.state() == "done"
        assert [m["step"] for m in run.metrics()] == list(range(5, cell.config.train.steps + 1, 5))
    short = cells[2].config
    alone = train(single(short), runs=tmp_path / "alone")
    assert RunStore(tmp_path / "runs").run(short.run_id).result().loss == alone.loss


def test_a_branch_whose_trunk_failed_fails_and_says_why(tmp_path, sweep_file):
    sweep_file.write_text(SWEEP.replace("[0, 1]", "[0]"))
    cells, store = load_sweep_file(sweep_file).cells, RunStore(tmp_path / "runs")
    trunk = next(c for c in cells if c.config.branch is None)
    with store.run(trunk.run_id).open_for_training(trunk.config) as writer:
        writer.set_state("failed", 0, "planted")
    result = run_cli("sweep", sweep_file, "--runs", tmp_path / "runs", "--quiet", code=3)
    assert "has no checkpoint of step 8" in result.output.replace("\n", " ")
    assert "3 failed of 3 cells" in result.output.replace("\n", " ")


# --- runs that are quantized late -------------------------------------------------------------------------------------

LATE = """
[base]
model = { d_model = 32, n_head = 2, d_ff = 64, n_layer = 1 }
data = { seq_len = 16, source = "synthetic:markov?vocab=16&tokens=20000" }
optim = { lr = 1e-2, warmup_frac = 0.1 }
train = { batch_size = 4, threads = 1, eval_tokens = 256, log_every = 2 }
quant.block = 32
[matrix]
train.steps = [10, 20]
scheme = [{ quant.method = "bf16" }, { quant.method = "quest", quant.bits = [4, 2], quant.start = [0, 0.5, 0.9] }]
[trunk]
share = "SHARE"
"""


def late_cells(tmp_path, share):
    return [c.config for c in load_sweep_file(write_file(tmp_path / "s.toml", LATE.replace("SHARE", share))).cells]


def test_one_run_in_full_precision_serves_every_scheme_and_share(tmp_path):
    alone, shared = late_cells(tmp_path, "lengths"), late_cells(tmp_path, "precision")
    assert [c.optim.schedule for c in shared] == ["cosine"] * 14
    plain = {c.train.steps: c for c in shared if not c.quant.quantizes}
    assert [plain[steps].train.keep_steps for steps in (10, 20)] == ["5,9", "10,18"]
    for config in shared:
        if config.quant.start:
            assert config.branch.source == plain[config.train.steps].run_id
            assert config.branch.step == config.quant.start * config.train.steps
        else:
            assert config.branch is None
    assert sum(c.new_tokens for c in shared) < 0.67 * sum(c.tokens for c in alone)


def test_lengths_and_precisions_share_one_trunk(tmp_path):
    """Bits that begin before the cool-down of their length leave the longest run itself, later ones the run of their length."""
    shared = late_cells(tmp_path, "both")
    assert {c.optim.schedule for c in shared} == {"wsd"}
    plain = {c.train.steps: c for c in shared if not c.quant.quantizes}
    long, short = plain[20], plain[10]
    assert (short.branch.source, short.branch.step, short.train.keep_steps) == (long.run_id, 8, "9")
    assert long.train.keep_steps == "5,8,10,18"
    leaves = {(c.train.steps, c.quant.start): (c.branch.source, c.branch.step) for c in shared if c.quant.start}
    assert leaves == {
        (10, 0.5): (long.run_id, 5),
        (10, 0.9): (short.run_id, 9),
        (20, 0.5): (long.run_id, 10),
        (20, 0.9): (long.run_id, 18),
    }


@pytest.mark.parametrize("share", slow_but(["precision", "both"], ["both"]))
def test_a_late_branch_is_the_single_run_bit_for_bit(tmp_path, share):
    configs = [c for c in late_cells(tmp_path, share) if c.quant.label in ("bf16", "quest-w2a2")]
    root, alone = tmp_path / "root", tmp_path / "alone"
    for config in sorted(configs, key=lambda c: (c.quant.start, -c.train.steps)):
        train(config, runs=root)
        if config.quant.start and config.train.steps == 10:
            train(single(config), runs=alone)
            assert outcome(root, config) == outcome(alone, single(config))


def test_lengths_of_runs_that_are_quantized_late_share_no_steps(tmp_path):
    """Half of another length is another step."""
    shared = [c for c in late_cells(tmp_path, "lengths") if c.quant.start]
    assert all(c.branch is None for c in shared)


def test_a_branch_of_a_late_run_keeps_its_steps():
    late = tiny.config({**tiny.QUEST, **WSD, "quant.start": 0.25, "quant.stages": "0.1:quest-w8a8"})
    config = branch(late, 6, 2)
    assert [step for step, _ in config.stages] == [0, 1, 3]
    assert config.stages == late.stages


@pytest.mark.parametrize(
    ("table", "message"),
    [("share = 'all'", "trunk: share: unknown"), ("share = 'precision'\ncooldown = 0.2", "trunk: cooldown: is of lengths")],
)
def test_mistakes_in_what_trunks_share_are_named(tmp_path, table, message):
    text = LATE.replace('share = "SHARE"', table)
    with pytest.raises(UsageError, match=message):
        load_sweep_file(write_file(tmp_path / "s.toml", text))
