"""The CPUs that this process may use, by its affinity, its control groups and SLURM; temporary environment variables."""

from __future__ import annotations

import os
import runpy
import shutil
import subprocess
import sys
import sysconfig
import venv
from contextlib import suppress
from pathlib import Path

import pytest
from command_line import run_cli

import questctl
from questctl import system
from questctl.system import OtherWork, cpu_count, package_version, temporary_environment, wait_passively


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A file system with no control groups yet, on a machine that gives this process 16 CPUs."""
    monkeypatch.setattr(system.os, "sched_getaffinity", lambda _: set(range(16)), raising=False)
    monkeypatch.delenv("SLURM_CPUS_PER_TASK", raising=False)
    (tmp_path / "proc/self").mkdir(parents=True)
    return tmp_path


def write(root, name, text):
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def v1(root, group, quota, period=100_000):
    write(root, f"sys/fs/cgroup/{group}/cpu.cfs_quota_us", f"{quota}\n")
    write(root, f"sys/fs/cgroup/{group}/cpu.cfs_period_us", f"{period}\n")


def test_without_control_groups_the_affinity_counts(root):
    assert cpu_count(root) == 16
    write(root, "proc/self/cgroup", "0::/user.slice\n")
    assert cpu_count(root) == 16


def test_where_the_system_has_no_affinity_all_cpus_count(root, monkeypatch):
    monkeypatch.delattr(system.os, "sched_getaffinity")
    monkeypatch.setattr(system.os, "cpu_count", lambda: 3)
    assert cpu_count(root) == 3
    monkeypatch.setattr(system.os, "cpu_count", lambda: None)
    assert cpu_count(root) == 1


@pytest.mark.parametrize(
    ("limit", "count"),
    [("max 100000", 16), ("400000 100000", 4), ("150000 100000", 2), ("5000 100000", 1), ("9900000 100000", 16), ("", 16)],
)
def test_a_quota_of_version_2_is_rounded_up(root, limit, count):
    write(root, "proc/self/cgroup", "0::/user.slice/job\n")
    write(root, "sys/fs/cgroup/user.slice/job/cpu.max", limit + "\n")
    assert cpu_count(root) == count


def test_a_quota_of_a_group_above_binds_too(root):
    write(root, "proc/self/cgroup", "0::/user.slice/job\n")
    write(root, "sys/fs/cgroup/user.slice/cpu.max", "200000 100000\n")
    write(root, "sys/fs/cgroup/user.slice/job/cpu.max", "800000 100000\n")
    assert cpu_count(root) == 2


@pytest.mark.parametrize("path", ["/", "/docker/0123abcd", "/../../elsewhere"])
def test_in_a_container_the_top_of_the_tree_is_its_own_group(root, path):
    write(root, "proc/self/cgroup", f"0::{path}\n")
    write(root, "sys/fs/cgroup/cpu.max", "300000 100000\n")
    assert cpu_count(root) == 3


@pytest.mark.parametrize("tree", ["cpu,cpuacct", "cpu"])
@pytest.mark.parametrize(("quota", "count"), [(-1, 16), (250_000, 3), (100, 1)])
def test_a_quota_of_version_1(root, tree, quota, count):
    write(root, "proc/self/cgroup", "9:memory:/job\n4:cpu,cpuacct:/job\n0::/other\n")
    v1(root, f"{tree}/job", quota)
    v1(root, "memory/job", 100_000)  # of another controller: says nothing
    assert cpu_count(root) == count


def test_slurm_gives_a_task_its_share(root, monkeypatch):
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "5")
    assert cpu_count(root) == 5
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "32")
    assert cpu_count(root) == 16
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "0")
    assert cpu_count(root) == 16


def test_this_machine_has_a_cpu():
    assert 1 <= cpu_count() <= (os.cpu_count() or 1)


def test_a_temporary_environment_is_undone(monkeypatch):
    monkeypatch.setenv("QUESTCTL_A", "before")
    monkeypatch.delenv("QUESTCTL_B", raising=False)
    with suppress(KeyError), temporary_environment({"QUESTCTL_A": "1", "QUESTCTL_B": "2"}):
        assert (os.environ["QUESTCTL_A"], os.environ["QUESTCTL_B"]) == ("1", "2")
        raise KeyError
    assert os.environ["QUESTCTL_A"] == "before"
    assert "QUESTCTL_B" not in os.environ


def test_a_source_tree_that_is_not_installed_has_a_version(monkeypatch, tmp_path):
    import importlib.metadata

    def not_installed(name):
        raise importlib.metadata.PackageNotFoundError(name)

    installed = package_version()
    monkeypatch.setattr(importlib.metadata, "version", not_installed)
    assert package_version() == installed
    monkeypatch.setattr(system, "PACKAGE", tmp_path / "questctl")
    assert package_version() == "0+unknown"
    (tmp_path / "pyproject.toml").write_text('[project]\nversion = "7.8"\n')
    assert package_version() == "7.8"


def test_threads_wait_passively_unless_the_user_decided(monkeypatch):
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    wait_passively()
    assert os.environ["OMP_WAIT_POLICY"] == "active"
    monkeypatch.delenv("OMP_WAIT_POLICY")
    wait_passively()
    assert os.environ["OMP_WAIT_POLICY"] == "passive"


def test_work_of_other_programs_is_told_from_ones_own():
    """Where another program computes, it is counted; what this one does itself is not."""
    script = "import time; print(flush=True); end = time.time() + 60\nwhile time.time() < end: pass"
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        beside, before = OtherWork(), os.times()
        while (used := sum(os.times()[:2]) - sum(before[:2])) < 0.2:  # on a machine of any load
            pass
        cpus = beside.cpus()
        other.kill()
    assert used > 0.15
    assert 0.2 < cpus < cpu_count() + 0.2


def test_every_command_and_call_that_loads_torch_waits_passively(monkeypatch):
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")  # so that it is restored
    monkeypatch.delenv("OMP_WAIT_POLICY")
    assert run_cli("eval", "--help").exit_code == 0
    assert os.environ["OMP_WAIT_POLICY"] == "passive"
    for name, policy in (("evaluate_run", "passive"), ("quantize_run", "passive"), ("benchmark", None)):
        monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
        assert callable(getattr(questctl, name))
        assert os.environ.get("OMP_WAIT_POLICY") == policy


# --- a clone without symbolic links, as git makes it on Windows -------------------------------------------------------

ROOT = Path(questctl.__file__).resolve().parent.parent
LINKS = ("analysis", "experiments", "kernels")


@pytest.fixture
def clone(tmp_path):
    """The repository with `core.symlinks=false`: where the links should be are files with the text of their targets."""
    package = tmp_path / "questctl"
    package.mkdir()
    for entry in (ROOT / "questctl").iterdir():
        if entry.name in LINKS:
            (package / entry.name).write_text(f"../{entry.name}")
            (tmp_path / entry.name).symlink_to(ROOT / entry.name)
        else:
            (package / entry.name).symlink_to(entry)
    return tmp_path


def test_a_clone_without_links_has_all_packages(clone):
    packages_of = runpy.run_path(str(ROOT / "setup.py"))["packages_of"]
    whole, moved = packages_of(ROOT)
    assert moved == {}
    assert {"questctl.analysis.report", "questctl.kernels", "questctl.experiments.studies", "questctl.cli"} <= set(whole)
    found, folders = packages_of(clone)
    assert sorted(found) == sorted(whole)
    assert folders == {f"questctl.{name}": name for name in LINKS}


def test_folders_of_the_package_are_found_without_links(clone, monkeypatch):
    from questctl.export import bundle

    text = bundle.bundle(ROOT / "questctl" / "export" / "modeling.py", "Title.")
    for module in (system, bundle):
        monkeypatch.setattr(module, "PACKAGE", clone / "questctl")
    assert system.package_folder("quant") == clone / "questctl" / "quant"
    assert system.package_folder("experiments") == clone / "experiments"
    monkeypatch.setattr(Path, "resolve", lambda path: path)  # the files of this clone are links into the repository
    there = bundle.bundle(clone / "questctl" / "export" / "modeling.py", "Title.")
    assert there == text.replace("# --- questctl/kernels/", "# --- kernels/")


@pytest.mark.slow
@pytest.mark.parametrize("how", [[], ["--editable"]])
def test_a_clone_without_links_is_installed(tmp_path, how):
    clone, site = tmp_path / "clone", tmp_path / "site"
    leave = shutil.ignore_patterns("__pycache__", "law", "results", *LINKS)
    shutil.copytree(ROOT / "questctl", clone / "questctl", ignore=leave)
    for name in LINKS:
        (clone / "questctl" / name).write_text(f"../{name}")
        shutil.copytree(ROOT / name, clone / name, ignore=leave)
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, clone)
    venv.create(site)
    python = Path(sys.prefix, "bin", "python")
    words = ["-m", "pip", f"--python={site}", "install", "--quiet", "--no-index", "--no-deps", "--no-build-isolation"]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    own = sysconfig.get_path("purelib")
    target = Path(sysconfig.get_path("purelib", vars={"base": str(site), "platbase": str(site)}))
    (target / "dependencies.pth").write_text(f"{own}\n")  # and setuptools
    done = subprocess.run([python, *words, *how, clone], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    check = (
        "import questctl; from questctl.analysis import LAWS; from questctl.kernels.pack import pack; print(questctl.__file__)"
    )
    for line in (["-c", check], ["-m", "questctl", "study", "methods", "--dry-run"]):
        ran = subprocess.run(
            [site / "bin" / "python", *line], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert ran.returncode == 0, ran.stderr[-3000:]
        assert str(clone if how else site) in ran.stdout or "quest-w2a2" in ran.stdout
