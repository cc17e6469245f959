"""Imports do nothing: the layers point one way, help and mistakes answer at once, and nothing heavy is loaded for them."""

from __future__ import annotations

import ast
import inspect
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from questctl import metrics
from questctl.cli.app import PANELS, load, summary

ROOT = Path(__file__).resolve().parent.parent
HEAVY = ("torch", "pandas", "scipy", "matplotlib", "triton")
HELP_LIMIT_S = 0.6


REFERENCE = "import typer, rich.table, numpy; from pydantic import BaseModel"
REFERENCE_S = 0.27  # what that takes on the machine the limit was set on, when it is idle


def processor_seconds(*args: str, cwd: Path | None = None) -> tuple[subprocess.CompletedProcess[str], float]:
    """A fresh interpreter and its processor time: on an idle machine what the clock would show."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = subprocess.run([sys.executable, "-c", *args], capture_output=True, text=True, cwd=cwd, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return result, after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def run(*args: str, cwd: Path | None = None) -> tuple[subprocess.CompletedProcess[str], set[str], float]:
    """The command line in a fresh interpreter: its result, the heavy modules that it loaded, its processor seconds.

    A machine that is shared or hot may be half as fast as a minute ago; where the limit is missed, the imports that every
    command needs are timed beside it and the seconds scaled to those of the machine that the limit is for. Best of up to 6.
    """
    code = (
        "import sys, atexit\n"
        f"atexit.register(lambda: sys.stderr.write('LOADED ' + ' '.join(m for m in {HEAVY!r} if m in sys.modules)))\n"
        "from questctl.cli.app import main\nmain()"
    )
    best = float("inf")
    for _ in range(6):
        result, seconds = processor_seconds(code, *args, cwd=cwd)
        if seconds >= HELP_LIMIT_S:
            seconds /= max(1.0, processor_seconds(REFERENCE)[1] / REFERENCE_S)
        best = min(best, seconds)
        if best < HELP_LIMIT_S:
            break
    head, _, loaded = result.stderr.rpartition("LOADED ")
    result.stderr = head
    return result, set(loaded.split()), best


COMMANDS = [*PANELS, "runs ls", "data info", "config show"]


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_is_quick_and_light(command):
    result, loaded, seconds = run(*command.split(), "--help")
    assert result.returncode == 0
    assert "Usage" in result.stdout
    assert loaded == set()
    assert seconds < HELP_LIMIT_S


@pytest.mark.parametrize("name", PANELS)
def test_the_list_of_commands_says_what_each_says_of_itself(name):
    assert inspect.cleandoc(load(name).help) == inspect.cleandoc(summary(name))


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("trian", ["trian", "train"]),
        ("train --bitz 4", ["--bitz"]),
        ("train --preset 35M", ["preset", "35M", "30M"]),
        ("train --quant qest --bits 4", ["quant.method", "qest", "quest"]),
        ("train --quant quest --bits 99", ["99", "8"]),
        ("train --bits four", ["quant.bits", "four"]),
        ("train --set optim.lrr=1", ["optim.lrr", "optim.lr"]),
        ("train --steps 0", ["train.steps", "0"]),
        ("train --config nowhere.toml", ["nowhere.toml"]),
        ("train --set quant.weights=int4-h128-rms-trust --preset 53K", ["128", "64"]),
        ("train --data nosuch:thing", ["nosuch"]),
        ("train --set data.tokenizer=bite", ["bite", "byte"]),
        ("sweep nowhere.toml", ["nowhere.toml"]),
        ("bench nosuchop", ["nosuchop"]),
        ("runs show nosuchrun", ["nosuchrun"]),
        ("config show --set model.n_head=3", ["model.n_head", "3"]),
        ("fit-scaling nowhere", ["nowhere"]),
        ("fit-scaling nowhere --law qest", ["qest", "quest"]),
        ("data info nosuch:thing", ["nosuch"]),
    ],
)
def test_a_mistake_is_one_quick_sentence_with_exit_code_2(command, words, tmp_path):
    result, loaded, seconds = run(*command.split(), cwd=tmp_path)
    assert result.returncode == 2, result.stderr
    assert [w for w in words if w not in result.stderr] == []
    assert "Traceback" not in result.stderr
    assert loaded == set()
    assert seconds < HELP_LIMIT_S
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "module",
    [
        "questctl",
        "questctl.config",
        "questctl.config.presets",
        "questctl.store",
        "questctl.console",
        "questctl.quant",
        "questctl.data",
        "questctl.kernels",
        "questctl.analysis",
        "questctl.sweep",
        "questctl.training",
        "questctl.cli.app",
    ],
)
def test_importing_needs_no_torch(module):
    code = f"import sys, {module}; sys.exit(bool({{'torch', 'triton', 'pandas', 'matplotlib'}} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_layers_point_one_way():
    result = subprocess.run(
        [sys.executable, "-c", "from importlinter.cli import lint_imports_command; lint_imports_command()"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-2000:]


# --- every file ------------------------------------------------------------------------------------------------------


def source_files() -> dict[str, Path]:
    """Dotted name of every module of the package, and its file; the folders that are links are followed."""
    found = {}
    for folder, _, names in os.walk(ROOT / "questctl", followlinks=True):
        for path in (Path(folder, name) for name in names if name.endswith(".py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


FILES = source_files()
TREES = {module: ast.parse(path.read_text(encoding="utf-8")) for module, path in FILES.items()}


def imported(module: str) -> set[str]:
    """The modules of the package that this one imports, at the top or in a function, but not for type checkers alone."""
    package = module if FILES[module].name == "__init__.py" else module.rpartition(".")[0]
    tests = (node for node in ast.walk(TREES[module]) if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    unused = {id(inner) for test in tests for statement in test.body for inner in ast.walk(statement)}
    names: set[str] = set()
    for node in ast.walk(TREES[module]):
        if id(node) in unused:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            names |= {name if (name := f"{base}.{alias.name}") in FILES else base for alias in node.names}
    return names & set(FILES) - {module}


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules that reach each other."""
    reached = {module: set(targets) for module, targets in graph.items()}
    for middle in graph:  # Warshall's closure
        for module in graph:
            if middle in reached[module]:
                reached[module] |= reached[middle]
    groups = {frozenset(b for b in reached[a] if a in reached[b]) for a in graph if a in reached[a]}
    return sorted(sorted(group) for group in groups)


def test_circles_are_found():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == [["b", "c"]]


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    return {module: imported(module) for module in FILES}


def test_no_two_files_import_each_other(graph):
    assert circles(graph) == []


def test_only_the_command_line_knows_the_command_line(graph):
    users = {module for module, targets in graph.items() if any(target.startswith("questctl.cli") for target in targets)}
    assert {module for module in users if not module.startswith("questctl.cli")} == {"questctl.__main__"}


def test_the_first_line_of_every_file_says_what_is_in_it():
    firsts = {module: (ast.get_docstring(tree) or "").split("\n")[0] for module, tree in TREES.items()}
    bad = {module: line for module, line in firsts.items() if not line.endswith((".", ":")) or len(line.split()) < 4}
    assert bad == {}


def test_metric_keys_are_written_in_one_file():
    """A key with its unit in parentheses is spelled in metrics.py alone."""
    with_unit = re.compile(r"\w+\((nats/token|ms|fraction|ratio)\)")
    keys = [value for value in vars(metrics).values() if isinstance(value, str) and with_unit.fullmatch(value)]
    assert len(keys) >= 4
    spelled = {
        (module, node.value)
        for module, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and with_unit.fullmatch(node.value)
    }
    assert {module for module, _ in spelled} == {"questctl.metrics"}


# --- installation ----------------------------------------------------------------------------------------------------


def test_nothing_installs_the_bare_names():
    """`kernels` is another project's name on the package index, which transformers looks for: ours is questctl.kernels only."""
    code = "import importlib.util as u, sys; sys.exit(any(u.find_spec(n) for n in ('kernels', 'analysis')))"
    assert subprocess.run([sys.executable, "-I", "-c", code], cwd=ROOT, check=False).returncode == 0


def test_the_command_line_stays_thin():
    """A file of cli/ parses, calls one function and prints; what it grows beyond that belongs into a room."""
    files = list((ROOT / "questctl" / "cli").glob("*.py"))
    assert sum(len(path.read_text().splitlines()) for path in files) <= 3000
