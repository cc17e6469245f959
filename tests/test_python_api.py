"""Every public name of `questctl` is used from a script, in an interpreter that never loads the command line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import questctl

# Names that each case may use: a folder of finished runs (`RUNS`: bf16, 4 and 2 bits), their configs, a scratch folder (`OUT`).
PRELUDE = '''
import shutil
from pathlib import Path
from matplotlib.figure import Figure
import questctl
from questctl import doctor
from questctl.posttraining import probe
from questctl.sweep import estimate
from questctl.sweep.calibrate import Calibration

estimate.calibrate = lambda *_, **__: Calibration()  # times models in other processes: tested in test_calibrate
doctor.SIZE = 16  # of the products that it times
probe.NORMAL_SAMPLES = 2**8  # for the errors to expect of normal values
Figure.draw_without_rendering = lambda self: None  # what figures show is tested with them
Figure.savefig = lambda self, path, **_: Path(path).touch()
MARKOV = "synthetic:markov?vocab=16&tokens=20000"
TINY = dict(
    model=dict(n_layer=1, d_model=32, n_head=2, d_ff=64),
    data=dict(source=MARKOV, seq_len=16),
    train=dict(batch_size=8, steps=8, log_every=2, eval_tokens=256, threads=1),
)
RUNS, OUT = Path("runs"), Path("out")
QUANT = [dict(method="bf16"), dict(method="quest", bits=4, block=32), dict(method="quest", bits=2, block=32)]
CONFIGS = [questctl.make_config(**TINY, quant=quant) for quant in QUANT]
RESULTS = [questctl.train(config, runs=RUNS) for config in CONFIGS]
OUT.mkdir()
SWEEP = OUT / "sweep.toml"
SWEEP.write_text(f"""
[base]
model = {{ n_layer = 1, d_model = 32, n_head = 2, d_ff = 64 }}
data = {{ source = "{MARKOV}", seq_len = 16 }}
train = {{ batch_size = 8, steps = 4, eval_tokens = 256, threads = 1 }}
[matrix]
scheme = [{{ quant.method = "bf16" }}, {{ quant.method = "quest", quant.bits = 4, quant.block = 32 }}]
[study]
claims = [{{ kind = "compare", scheme = "quest-w4a4", against = ["bf16"] }}]
""")

POINTS = OUT / "points.csv"
losses = lambda n, d, eff: 406.4 / (n * eff) ** 0.34 + 410.7 / d**0.28 + 1.69
EFF = {"bf16": 1.0, "w8a8": 0.97, "w4a4": 0.7}
rows = [(n, n * r, s, losses(n, n * r, EFF[s]) * (1 + 1e-3 * (-1) ** i))
        for i, n in enumerate((3e7, 1e8, 3e8)) for r in (20, 60, 180) for s in EFF]
POINTS.write_text("N,D,scheme,loss\\n" + "".join(f"{n},{d},{s},{y}\\n" for n, d, s, y in rows))

def bf16_run(name):
    "A copy of the first run, in a folder to which other runs may be added."
    return Path(shutil.copytree(RUNS / RESULTS[0].run, OUT / name / RESULTS[0].run))
'''

# public name → what a user would write; each runs after PRELUDE in names of its own
CASES: dict[str, str] = {
    "__version__": """
assert questctl.__version__.split(".")[0].isdigit()
""",
    "allocate_bits": """
import json
run = bf16_run("allocated")
found = questctl.allocate_bits(run, 2.5, ["int2-rms-ste", "int4-rms-ste"], sensitivity="gaussian", tokens=256)
assert found.bits <= 2.5 and {str(layer.spec) for layer in found.layers} == {"int2-rms-ste", "int4-rms-ste"}
found.write_toml(OUT / "mixed.toml")
assert json.loads(json.dumps(found.to_dict()))["run_id"] == found.config().run_id
by_file, by_config = (questctl.quantize_run(run, q, method="rtn").result for q in (OUT / "mixed.toml", found.quant()))
assert by_file == by_config
""",
    "archive_runs": """
extra = questctl.train(questctl.make_config(**TINY, optim={"lr": 3e-2}), runs=OUT / "archived")
assert questctl.archive_runs(runs=OUT / "archived").runs == (extra.run,)
run = questctl.store.RunStore(OUT / "archived").run(extra.run)
assert run.is_archived and questctl.evaluate_run(run)["loss"] == extra.loss
assert questctl.train(questctl.make_config(**TINY, optim={"lr": 3e-2}), runs=OUT / "archived") == extra
""",
    "benchmark": """
measured = questctl.benchmark(["pack"], check_only=True)
assert measured.rows and not measured.failures
""",
    "best_schedule": """
table = OUT / "falling.csv"
table.write_text("step,lr,loss\\n" + "".join(f"{i},{.01 * (1 - i / 300)},{3 + i**-0.5}\\n" for i in range(10, 300, 10)))
best = questctl.best_schedule(table, steps=600)
assert best.settings["optim.schedule"] == "knots" and best.gains["constant"][0] > 0
""",
    "calibrate_": """
import torch
model = questctl.quantize_(torch.nn.Sequential(torch.nn.Linear(32, 8)), "lsq", bits=4)
questctl.calibrate_(model, [5 * torch.randn(100, 32)])
assert 1 < model[0].input_quantizer.scale < 3
""",
    "check_collapse": """
assert questctl.check_collapse(OUT / "falling.csv") == []
""",
    "check_machine": """
assert {check.state for check in questctl.check_machine(RUNS)} <= {"ok", "limited", "missing"}
""",
    "check_training": """
from questctl.errors import UsageError
try:
    questctl.check_training(device="cuda:7")
except UsageError as e:
    assert "cuda:7" in str(e)
""",
    "compare_runs": """
comparison = questctl.compare_runs([config.run_id for config in CONFIGS], RUNS)
assert comparison.config["quant.weights"] == [str(config.quant.weights) for config in CONFIGS]
assert comparison.minus_first["loss"][1] == RESULTS[1].loss - RESULTS[0].loss
""",
    "compile_kernels": """
from questctl.errors import UsageError
try:
    questctl.compile_kernels(["no such op"])
except UsageError as e:
    assert "no such op" in str(e)
""",
    "compute_multiplier": """
fit = questctl.fit_sources(POINTS, bootstrap=0)
answer = questctl.compute_multiplier(fit, fit, flops=1e20, bootstrap=10)
assert abs(answer.multiplier - 1) < 0.05
""",
    "data_info": """
info = questctl.data_info(MARKOV)
assert info.dataset.meta.vocab_size == 16 and info.sample.split()[0].isdigit()
""",
    "describe": """
import torch
assert [layer.state for layer in questctl.describe(torch.nn.Sequential(torch.nn.Linear(32, 8))).layers] == ["plain"]
""",
    "diagnose_health": """
assert [h.state for h in questctl.diagnose_health(RUNS)] == ["done"] * 3
""",
    "estimate_demo": """
assert questctl.estimate_demo(OUT / "demo").cells
""",
    "estimate_run": """
estimate = questctl.estimate_run(questctl.make_config(**TINY, optim={"lr": 1e-2}), RUNS)
assert estimate.finished_runs == 3 and estimate.seconds > 0 and not estimate.path.exists()
""",
    "estimate_study": """
estimate = questctl.estimate_study(SWEEP, runs=RUNS)
assert len(estimate.sweep.remaining) == 2 and estimate.unsearched == ()
""",
    "estimate_sweep": """
estimate = questctl.estimate_sweep(SWEEP, runs=RUNS)  # its finished runs say how long the cells take
assert len(estimate.remaining) == 2 and estimate.flops > 0 and len(list(RUNS.iterdir())) == 3
""",
    "evaluate_run": """
measured = questctl.evaluate_run(bf16_run("evaluated"))
assert abs(measured["loss"] - RESULTS[0].loss) < 1e-5 and measured["part"] == "val"
""",
    "explain_config": """
from questctl.config import Layer, resolve
rows = {row.key: row for row in questctl.explain_config(resolve([Layer("my file", {("optim", "lr"): 0.01})]))}
assert (rows["optim.lr"].value, rows["optim.lr"].origin) == (0.01, "my file")
""",
    "export_run": """
card = questctl.export_run(RUNS / RESULTS[0].run, OUT / "model", format="gguf", dtype="f32", tokens=128)
assert card.agreement.kl < 1e-6 and card.agreement.argmax_agreement > 0.99 and card.warnings() == []
assert (OUT / "model" / "export_report.json").exists()
""",
    "fit_knobs": """
table = OUT / "knobs.csv"
best = lambda n, d: (2 * n**-0.7 * d**0.3).real
rows = [(n, d, best(n, d) * 2**k, 3 + 0.05 * k * k) for n in (1e7, 1e8) for d in (1e9, 4e9) for k in range(-2, 3)]
table.write_text("N,D,lr,loss\\n" + "".join(f"{n},{d},{lr},{y}\\n" for n, d, lr, y in rows))
assert abs(questctl.fit_knobs(table).laws["lr"].exponents["N"] + 0.7) < 0.01
""",
    "fit_sources": """
fit = questctl.fit_sources(POINTS, bootstrap=10)
assert abs(fit.fit.eff["w4a4"] - 0.7) < 0.1
assert fit.document.to_json()["schema"] >= 2 and fit.document.verdict
""",
    "forecast": """
table = OUT / "curve.csv"
table.write_text("step,lr,loss\\n" + "".join(f"{i},.01,{3 + i**-0.5}\\n" for i in range(10, 300, 10)))
(run,) = questctl.forecast(table, schedule="wsd:decay=.2", steps=600).runs
assert run.interval[0] < run.loss < run.interval[1] < 3.2
""",
    "freeze_": """
import torch
model = questctl.quantize_(torch.nn.Sequential(torch.nn.Linear(32, 8)), "int4-h32-rms-trust")
assert "packed" in str(questctl.describe(questctl.freeze_(model)))
""",
    "generate_text": """
written = questctl.generate_text(RUNS / RESULTS[0].run, "3 1 4", max_tokens=5)
assert len(written.text.split()) == 5
""",
    "import_runs": """
lines = ["scheme,N,D,loss"] + [f"w4a4,{n}e6,{d}e8,{4 - n / 10 - d / 20}" for n in (1, 2, 3) for d in (1, 2)]
(OUT / "theirs.csv").write_text("\\n".join(lines))
imported = questctl.import_runs(OUT / "theirs.csv", OUT / "imported", data_hash="abc")
assert (imported.runs, imported.schemes[0].scheme, imported.unknown_data) == (6, "w4a4", 0)
assert len(questctl.load_runs(OUT / "imported")) == 6
""",
    "launch_commands": """
assert questctl.launch_commands(SWEEP, runs=OUT / "emitted", launcher="slurm").startswith("#!/bin/bash")
""",
    "list_runs": """
assert [row["loss"] for row in questctl.list_runs(RUNS, state="done")] == sorted(
    (result.loss for result in RESULTS), key=lambda loss: next(r.run for r in RESULTS if r.loss == loss))
""",
    "load_runs": """
table = questctl.load_runs(RUNS)
assert list(table.state) == ["done"] * 3 and table.loss.between(1, 4).all()
""",
    "make_config": """
config = questctl.make_config(preset="107K", quant={"method": "quest", "bits": 4}, train={"steps": 200})
assert config.train.steps == 200 and config.quant.label == "quest-w4a4"
""",
    "plan_budget": """
plan = questctl.plan_budget(POINTS, flops=1e20, memory_bytes=1e9, bootstrap=5)
assert {option.scheme for option in plan.options} == {"bf16", "w8a8", "w4a4"}
""",
    "plan_next_runs": """
runs = questctl.plan_next_runs(POINTS, 2, goal="transition@1B:8:4", bootstrap=0).runs
assert len(runs) == 2
""",
    "predict": """
(cell,) = questctl.predict(POINTS, N=7e9, D=140e9, scheme="w4a4", bootstrap=10).cells
assert cell.interval[0] < cell.loss < cell.interval[1] and cell.outside["N"] > 1
""",
    "prepare_data": """
tokens = questctl.prepare_data(MARKOV)
assert len(tokens.train) + len(tokens.val) == 20_000
""",
    "probe_run": """
probe = questctl.probe_run(RUNS / RESULTS[0].run, ["int4-h32-rms-trust", "int4-rms-trust"], batches=2, steps=0)
assert [s.name for s in probe.settings] == ["int4-h32-rms-trust", "int4-rms-trust"]
assert probe.contributions[0].part == "rotation" and probe.warnings == ()
probe.write(OUT / "probe")
assert (OUT / "probe" / "probe.json").exists()
""",
    "push_runs": """
from questctl.errors import MissingDependency
try:
    assert questctl.push_runs([RESULTS[0].run], ["tensorboard"], RUNS) == {RESULTS[0].run: 4}
except MissingDependency as e:
    assert "pip install 'questctl[tensorboard]'" in str(e)
""",
    "quantize_": """
import torch
model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.GELU(), torch.nn.Linear(64, 8))
questctl.quantize_(model, "quest", bits=2, block=32, overrides={"2": "quest-w8a8"}, exclude="0")
assert [layer.bits for layer in questctl.describe(model).layers] == [32, 8]
""",
    "quantize_run": """
run = bf16_run("quantized")
done = questctl.quantize_run(run, "int4-h32-rms-ste", method="rtn")
assert done.result.scheme == "ptq-rtn-w4a4" and done.source == RESULTS[0] and done.run.result() == done.result
assert questctl.quantize_run(run, "quest", bits=4, method="rtn").result == done.result
""",
    "read_benchmark": """
questctl.benchmark(["pack"], check_only=True).write_json(OUT / "rows.json")
assert {row.op for row in questctl.read_benchmark(OUT / "rows.json")} == {"pack"}
""",
    "remove_runs": """
extra = questctl.train(questctl.make_config(**TINY, optim={"lr": 2e-2}), runs=OUT / "removed")
assert questctl.remove_runs([extra.run[-8:]], OUT / "removed") == [extra.run]
assert questctl.list_runs(OUT / "removed") == []
""",
    "restore_runs": """
extra = questctl.train(questctl.make_config(**TINY, optim={"lr": 4e-2}), runs=OUT / "restored")
questctl.archive_runs(runs=OUT / "restored")
assert questctl.restore_runs(runs=OUT / "restored") == [extra.run]
""",
    "run_demo": """
from questctl import demo
demo.SWEEP = str(SWEEP)  # two cells, too few for a law
try:
    questctl.run_demo(OUT / "demo")
except questctl.errors.DataError as e:
    assert "points" in str(e), e
else:
    raise AssertionError("a law fitted to two runs")
assert len(questctl.load_runs(OUT / "demo")) == 2
""",
    "run_details": """
details = questctl.run_details(RESULTS[1].run, RUNS)
assert details.summary["loss"] == RESULTS[1].loss and dict(details.changed)["quant.weights"]
assert details.lines[-1]["step"] == 8 and "config.json" in details.files
""",
    "run_study": """
result = questctl.run_study(SWEEP, runs=OUT / "studied", jobs=1)
assert [row.n for row in result.rows] == [1, 1] and not result.failed
assert result.judgements[0].sentence == "quest-w4a4 is not told apart from bf16."
""",
    "run_sweep": """
from questctl.sweep import LauncherOptions
outcomes = questctl.run_sweep(SWEEP, runs=OUT / "swept", launcher=LauncherOptions(jobs=1))
assert [o.state for o in outcomes] == ["done", "done"] and all(1 < o.loss < 4 for o in outcomes)
""",
    "simulate_sweep": """
found = questctl.simulate_sweep(SWEEP, "2x8xH100", price=2, failures=0.1)
assert found.cells == 2 and found.cost.likely == 2 * found.device_hours.likely and found.to_json()["bound"] == "chain"
assert all(file.exists() for file in found.plot(OUT / "gantt"))
""",
    "sync_runs": """
import shutil
extra = questctl.train(questctl.make_config(**TINY, optim={"lr": 5e-2}), runs=OUT / "synced")
if shutil.which("rsync"):
    assert questctl.sync_runs(OUT / "synced", OUT / "copies").pulled.runs == [extra.run]
    assert questctl.load_runs(OUT / "copies")["loss"].tolist() == [extra.loss]
""",
    "train": """
assert questctl.train(CONFIGS[0], runs=RUNS) == RESULTS[0]
""",
    "train_command": """
command = questctl.train_command(questctl.make_config(preset="107K", train={"steps": 200}))
assert command == "questctl train --preset 107K -q bf16 --steps 200"
""",
    "untrained_formats": """
answer = questctl.untrained_formats(POINTS, ["int5"], bootstrap=0)
assert 0.7 < answer.formats[0].eff < 1
""",
    "write_report": """
written = questctl.write_report(RUNS, page=None, figures=OUT / "figures", bootstrap=0)
assert list((OUT / "figures").glob("*.svg"))
""",
}

RUNNER = """
import contextlib, json, sys, traceback
sys.path[:] = [p for p in sys.path if not p.endswith("tests")]
prelude, cases = json.load(sys.stdin)
names, errors = {}, {}
with contextlib.redirect_stdout(sys.stderr):
    exec(compile(prelude, "prelude", "exec"), names)
    for name, code in cases.items():
        try:
            exec(compile(code, name, "exec"), dict(names))
        except Exception:
            errors[name] = traceback.format_exc()
json.dump({"errors": errors, "modules": sorted(sys.modules)}, sys.stdout)
"""


def test_every_public_name_works_in_a_script(tmp_path):
    """All in one script, because its imports and runs take longer than the calls."""
    script = subprocess.run(
        [sys.executable, "-c", RUNNER],
        input=json.dumps([PRELUDE, CASES]),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert script.returncode == 0, script.stderr
    outcome = json.loads(script.stdout)
    assert outcome["errors"] == {}, "\n".join(outcome["errors"].values())
    assert [module for module in outcome["modules"] if module.startswith("questctl.cli")] == []


@pytest.mark.parametrize("name", questctl.__all__)
def test_every_public_name_has_a_call(name):
    assert name in CASES, f"questctl.{name} is public: add a call to CASES"
    assert f"questctl.{name}" in CASES[name]


def test_names_are_listed_once_each_and_described():
    assert list(questctl.__all__) == list(CASES) == sorted([*questctl._MODULES, "__version__"])
    undescribed = [name for name in questctl._MODULES if name not in questctl.__doc__ or not getattr(questctl, name).__doc__]
    assert undescribed == []


def test_the_package_says_that_it_is_typed():
    assert (Path(questctl.__file__).parent / "py.typed").exists()
