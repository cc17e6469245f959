"""Copies of finished runs to and from another folder, on this or another machine, by rsync. Conflicts are never overwritten.

    finished here, absent there             copied
    finished here, unfinished there         copied in its place, if both are one experiment and nobody trains it there
    unfinished here                         stays here: it goes on where its checkpoints are
    finished on both sides, equal numbers   nothing to do
    finished on both sides, other numbers   a conflict: both stay, and the two losses are named

On this machine a run folder is renamed into place as a whole, after its hashes have been checked. On another machine only rsync
is needed, so the files are copied in the order in which a run writes them: first files that do not make a folder a run, then
config and status, then the result. An interrupted copy is thus an unfinished run, or none, and the same command completes it.
Runs in an archive are copied as folders.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import DataError, MissingDependency, StorageError, UsageError
from .archive import ARCHIVE, ArchivedPath, open_archive
from .files import storage_errors
from .lease import LeaseHeld
from .packing import changing, install, model_is_intact, unpack
from .runs import Result, Run, RunStore

STAGE = ".sync"  # runs on their way into a folder
HOST = re.compile(r"[^/]+:|rsync://")
OF_EXECUTION = ("tokens_per_s", "seconds", "peak_memory_bytes", "attempts", "device")  # fields of a result that may differ
LATE = ("config.json", "status.json", "result.json")  # the files that make a folder a run, and a finished one
NEVER = ("lease*", "*.tmp", "/*/checkpoints/")


@dataclass
class Copied:
    """What one direction of `sync_runs` did: runs copied, the number that both had, and the others with the reason."""

    runs: list[str] = field(default_factory=list)
    equal: int = 0
    left: dict[str, str] = field(default_factory=dict)
    conflicts: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Synced:
    """What `sync_runs` did in each direction; None for a direction that was not asked for."""

    pulled: Copied | None
    pushed: Copied | None

    @property
    def conflicts(self) -> dict[str, str]:
        """The runs that are finished on both sides with different numbers, with the reason."""
        return {name: why for side in (self.pulled, self.pushed) if side for name, why in side.conflicts.items()}


def sync_runs(place: str | Path, runs: Path | str | None = None, *, pull: bool = True, push: bool = True) -> Synced:
    """Copy finished runs from `place` (pull) and to it (push): a folder, or HOST:PATH as rsync takes it.

    Raises MissingDependency without rsync, DataError if there is nothing to copy from, UsageError while another process copies,
    and StorageError if rsync or the file system fails; runs that were copied before that are complete.
    """
    if shutil.which("rsync") is None:
        raise MissingDependency("sync: needs rsync, which is not installed here (apt install rsync).")
    store, remote = RunStore(runs), bool(HOST.match(str(place))) and not Path(place).exists()
    if not remote and Path(place).resolve() == store.root.resolve():
        raise UsageError(f"sync: {place} is the folder of runs itself; name another one.")
    if not pull:
        store.require()
    elif not remote:
        RunStore(place).require()
    pulled = pushed = None
    with _stage(store.root) as stage:
        target = _look(str(place), stage / "there") if remote else RunStore(place)
        if pull:
            pulled = _copy(target, store, stage, str(place))
        if push and remote:
            pushed = _send(store, target, stage, str(place))
        elif push:
            with _stage(target.root) as beside:
                pushed = _copy(store, target, beside, str(store.root))
    return Synced(pulled, pushed)


@contextmanager
def _stage(root: Path) -> Iterator[Path]:
    """A hidden folder in a folder of runs, for one process at a time. rsync uses what a killed process left in it."""
    with storage_errors(root, "created"):
        root.mkdir(parents=True, exist_ok=True)
    with changing(root / STAGE, "copying runs to or from this folder"):
        yield root / STAGE
        shutil.rmtree(root / STAGE, ignore_errors=True)


def _rsync(place: str, words: Sequence[str], names: Sequence[str] | None = None) -> None:
    """Run rsync; `names` is the list of files to copy. Raises StorageError with rsync's message."""
    listed = ["-r", "--files-from=-"] if names is not None else []
    command = ["rsync", "-a", *listed, *words]
    done = subprocess.run(command, input="".join(f"{n}\n" for n in names or ()), text=True, capture_output=True, check=False)
    if done.returncode:
        messages = [line for line in done.stderr.splitlines() if line.strip()] or [f"exit code {done.returncode}"]
        raise StorageError(f"{place}: rsync cannot copy: {messages[0].removeprefix('rsync: ').rstrip('.')}.")


def _look(place: str, folder: Path) -> RunStore:
    """The small files and the archive of the runs at `place`, copied into a folder of runs on this machine."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    wanted = [f"--include=/{ARCHIVE}", "--exclude=/.*", "--include=/*/", *(f"--include=/*/{n}" for n in (*LATE, "lease"))]
    _rsync(place, [*wanted, "--exclude=*", "--prune-empty-dirs", f"{place.rstrip('/')}/", f"{folder}/"])
    return RunStore(folder)


def _chosen(source: RunStore, target: RunStore, done: Copied) -> list[Run]:
    """The runs of `source` to copy to `target`; for the others, the reason is added to `done`."""
    chosen = []
    for run in source.with_facts():
        try:
            result = run.facts.result if run.facts else run.result()
            if result is None:
                done.left[run.name] = f"is not finished ({run.state()})"
            elif not (other := target.run(run.name)).exists():
                chosen.append(run)
            elif (theirs := other.result()) is not None:
                if _numbers(result) == _numbers(theirs):
                    done.equal += 1
                else:
                    done.conflicts[run.name] = (
                        f"is finished on both sides with other numbers (loss {result.loss:.6f} and {theirs.loss:.6f}); "
                        "remove one of them (questctl runs rm)"
                    )
            elif other.config().identity != run.config().identity:
                done.conflicts[run.name] = f"is another experiment in {other.root}"
            elif other.state() == "running":
                done.left[run.name] = f"is being trained in {other.root}"
            else:
                chosen.append(run)
        except DataError as e:
            done.left[run.name] = f"is damaged: {str(e).removesuffix('.')}"
    return chosen


def _numbers(result: Result) -> Mapping[str, object]:
    """The fields that are equal, to the last digit, in all executions of one experiment."""
    return {key: value for key, value in vars(result).items() if key not in OF_EXECUTION}


def _gather(runs: Sequence[Run], place: str, stage: Path) -> None:
    """Copy runs into the hidden folder `stage`: folders by rsync from `place`, archived runs from the archive."""
    stage.mkdir(parents=True, exist_ok=True)
    if folders := [run.name for run in runs if not run.is_archived]:
        _rsync(place, [*(f"--exclude={name}" for name in NEVER), f"{place.rstrip('/')}/", f"{stage}/"], folders)
    for run in runs:
        if isinstance(run.path, ArchivedPath):
            shutil.rmtree(stage / run.name, ignore_errors=True)
            unpack(open_archive(run.path.archive), run.name, stage / run.name)


def _copy(source: RunStore, target: RunStore, stage: Path, place: str) -> Copied:
    """Copy finished runs from `source`, whose folder rsync finds at `place`, into a folder of this machine."""
    done = Copied()
    chosen = _chosen(source, target, done)
    _gather(chosen, place, stage / "runs")
    for run in chosen:
        staged = Run(stage / "runs" / run.name)
        try:
            if _numbers(staged.require_result("sync")) != _numbers(run.require_result("sync")) or not model_is_intact(staged):
                done.left[run.name] = "changed while it was copied; repeat the command"
                continue
            install(staged.path, target.root / run.name)
            done.runs.append(run.name)
        except LeaseHeld:
            done.left[run.name] = f"is being trained in {target.root}"
        except DataError as e:
            done.left[run.name] = f"did not arrive whole: {str(e).removesuffix('.')}"
    return done


def _send(source: RunStore, there: RunStore, stage: Path, place: str) -> Copied:
    """Copy finished runs to another machine; `there` has the small files of its runs."""
    done = Copied()
    chosen = _chosen(source, there, done)
    packed = [run for run in chosen if run.is_archived]
    _gather(packed, place, stage / "out")
    sides = [(source.root, [run.name for run in chosen if not run.is_archived]), (stage / "out", [run.name for run in packed])]
    for root, names in sides:
        if names:
            early = [f"--exclude={name}" for name in (*NEVER, *(f"/*/{late}" for late in LATE))]
            _rsync(place, [*early, f"{root}/", f"{place.rstrip('/')}/"], names)
    again = _look(place, stage / "again") if chosen else there
    for root, names in sides:
        begun = {name for name in names if again.run(name).state() == "running"}
        done.left |= dict.fromkeys(begun, "is being trained there")
        arriving = [name for name in names if name not in begun]
        for late in (LATE[:2], LATE[2:]):
            if arriving:
                _rsync(place, [f"{root}/", f"{place.rstrip('/')}/"], [f"{name}/{file}" for name in arriving for file in late])
        done.runs += arriving
    with suppress(OSError):
        shutil.rmtree(stage / "out")
    return done
