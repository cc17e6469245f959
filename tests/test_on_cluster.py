"""What a sweep takes on a stated cluster: hours by hand, money, chains, and every way to state one wrongly."""

import json

import pytest
from command_line import output

from questctl.errors import UsageError
from questctl.store import RunStore
from questctl.sweep import costs
from questctl.sweep.costs import PARALLEL, tokens_of_work
from questctl.sweep.on_cluster import GPUS, SHARES, StatedCluster, simulate_sweep
from questctl.sweep.simulation import START_S
from questctl.sweep.sweep_file import load_sweep_file

FILE = """
[base]
data = { source = "synthetic:markov?vocab=16&tokens=20000", seq_len = 16 }
model = { n_layer = 1, d_model = 32, n_head = 2, d_ff = 64, vocab_size = 16 }
train = { batch_size = 8, eval_tokens = 256 }
[matrix]
train.steps = [1000000000, 2000000000, 4000000000]
"""


@pytest.fixture
def grid(tmp_path):
    path = tmp_path / "grid.toml"
    path.write_text(FILE)
    return path


def seconds(path, kind, share):
    """By hand: the operations of each cell over a share of the peak, and the start of each."""
    configs = [cell.config for cell in load_sweep_file(path).cells]
    return [START_S + tokens_of_work(c) * costs.flops_per_token(c) / (share * GPUS[kind][0]) for c in configs]


@pytest.mark.parametrize(
    ("text", "said"),
    [("8x8xH100", "8x8xH100"), ("64xh100", "8x8xH100"), ("4xA100", "1x4xA100"), ("2xcpu", "1x2xcpu"), ("3x2xCPU", "3x2xcpu")],
)
def test_clusters_are_read_as_they_are_written(text, said):
    assert str(StatedCluster.parse(text)) == said
    assert StatedCluster.parse(said) == StatedCluster.parse(text)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("H100", "not of the form"),
        ("8H100", "not of the form"),
        ("0xH100", "has no devices"),
        ("8x0xH100", "has no devices"),
        ("8xH1000", "did you mean 'H100'"),
        ("12xH100", "no nodes of 8"),
        ("-1xcpu", "not of the form"),
    ],
)
def test_what_is_no_cluster_is_refused_with_the_form_or_the_choices(text, says):
    with pytest.raises(UsageError, match=f"--cluster: .*{says}"):
        StatedCluster.parse(text)


def test_hours_and_money_are_operations_over_a_share_of_the_peak(grid):
    low, likely, high = (seconds(grid, "H100", share) for share in reversed(SHARES))
    found = simulate_sweep(grid, "2xH100", price=3.0)
    assert found.time.likely == pytest.approx(likely[2])  # the longest, beside the two others
    assert (found.time.low, found.time.high) == pytest.approx((low[2], high[2]))
    assert found.device_hours.likely == pytest.approx(sum(likely) / 3600)
    assert found.cost.likely == pytest.approx(3 * sum(likely) / 3600)
    assert (found.bound, len(found.chain)) == ("chain", 1)
    assert "10 % to 45 % of the 989 TFLOP/s" in found.basis
    one = simulate_sweep(grid, "1xH100")
    assert (one.bound, one.cost) == ("work", None)
    assert one.time.likely == pytest.approx(sum(likely))


def test_processes_share_a_cell_at_the_stated_loss(grid):
    likely = seconds(grid, "A100", SHARES[1])
    grid.write_text(FILE + "[resources]\nnproc = 4\n")
    found = simulate_sweep(grid, "4xA100")
    assert found.time.likely == pytest.approx(3 * START_S + (sum(likely) - 3 * START_S) / (4 * PARALLEL))
    assert "3 of 4 processes" in found.resources
    with pytest.raises(UsageError, match=r"takes 4 processes on a node, and 1x2xA100 has 2 devices there; set nproc or nodes"):
        simulate_sweep(grid, "2xA100")
    grid.write_text(FILE + "[resources]\nnproc = 4\nnodes = 2\n")
    with pytest.raises(UsageError, match="takes 2 nodes, and 1x8xA100 has 1"):
        simulate_sweep(grid, "8xA100")
    assert simulate_sweep(grid, "2x2xA100").time.likely == pytest.approx(found.time.likely)


def test_a_branch_waits_for_its_trunk(grid):
    plain = simulate_sweep(grid, "4xH100")
    grid.write_text(FILE.replace("[matrix]", "optim.schedule = 'wsd'\n[matrix]") + "[trunk]\ncooldown = 0.2\nwarmup = 100\n")
    found = simulate_sweep(grid, "4xH100")
    assert found.flops < 0.75 * plain.flops
    assert found.course.makespan >= found.chain_s * (1 - 1e-9)


def test_cells_that_are_done_cost_nothing_and_those_too_large_are_refused(grid, tmp_path):
    grid.write_text(FILE.replace("[1000000000, 2000000000, 4000000000]", "[2, 1000000]"))
    from questctl.training.loop import train

    small = load_sweep_file(grid).cells[0].config
    train(small, runs=tmp_path / "runs")
    assert simulate_sweep(grid, "2xH100", runs=tmp_path / "runs").cells == 1
    assert RunStore(tmp_path / "runs").run(small.run_id).result() is not None
    grid.write_text(FILE.replace("d_model = 32", "d_model = 65536").replace("d_ff = 64", "d_ff = 262144"))
    with pytest.raises(UsageError, match=r"needs at least .*largest device has .*\(L4\)"):
        simulate_sweep(grid, "2xL4")
    assert simulate_sweep(grid, "2xL4", force=True).cells == 3


@pytest.mark.parametrize(("option", "value"), [("price", -1), ("failures", -0.1), ("slow", 1.5), ("preemptions", float("inf"))])
def test_rates_out_of_range_are_refused_by_their_option(grid, option, value):
    with pytest.raises(UsageError, match=f"--{option}: "):
        simulate_sweep(grid, "2xH100", **{option: value})


def test_a_cluster_that_fails_too_often_is_refused_and_not_simulated_for_ever(grid):
    with pytest.raises(UsageError, match="does not come to its next checkpoint"):
        simulate_sweep(grid, "2xH100", failures=1e5)


def test_the_command_prints_a_table_json_and_a_picture(grid, tmp_path):
    said = output("simulate", grid, "--cluster", "2xH100", "--price", 2, "--failures", 0.2, "--plot", tmp_path / "course")
    assert "bound by" in said
    assert "cost" in said
    assert {p.name for p in (tmp_path / "course").iterdir()} == {"gantt.png", "gantt.svg"}
    record = json.loads(output("simulate", grid, "--cluster", "2xH100", "--json"))
    assert record["cells"] == 3
    assert record["seconds"] == pytest.approx(simulate_sweep(grid, "2xH100").time.likely)
    assert "--cluster" in output("simulate", grid, "--cluster", "2xH1", code=2)
