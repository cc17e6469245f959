"""Run folders: `Run` reads one, `RunWriter` writes one, `RunStore` is a folder of them, and `load_runs` returns a DataFrame."""

from __future__ import annotations

import difflib
import errno
import hashlib
import math
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from ..config import RunConfig
from ..errors import DataError, StorageError, UsageError
from ..metrics import STEP, TIME, TRAIN_LOSS
from ..quant.layer_specs import mean_bits
from ..quant.storage import artifact_bytes
from ..words import few
from . import index
from .archive import ARCHIVE, NAME, ArchivedPath, is_archive, located, open_archive
from .files import (
    append_line,
    append_lines,
    last_line,
    lines_before,
    now,
    read_json,
    read_lines,
    sha256,
    storage_errors,
    write_bytes,
    write_json,
    write_sealed,
)
from .lease import MANY, STALE_AFTER_S, Lease, LeaseHeld, is_live

if TYPE_CHECKING:
    import pandas as pd

SCHEMA_VERSION = 1
STATES = ("pending", "running", "done", "failed", "diverged", "preempted", "stopped")
STATUS_INTERVAL_S = 5.0  # seconds between writes of the status that only update the step
# Beside more than `MANY` others, a run writes its lines every three minutes, and its status with its checkpoints; otherwise a
# thousand runs would write to one file system all the time. No line that a resumed run needs is lost, since a checkpoint writes
# the lines first.
LINES_TOGETHER_S = 180.0
RESERVE_BYTES = 32_768  # freed when the disk is full, so that a run can still record why it failed

_CONFIG, _ENV, _STATUS, _RESULT = "config.json", "env.json", "status.json", "result.json"
_STEP_FOLDER = re.compile(r"step-(\d{8,})")
_EXTERNAL = ".imported.json"
_START_AGAIN = "remove the run (questctl runs rm) to train it anew"


@dataclass(frozen=True)
class Status:
    """Where a run stands: `status.json`. Times are ISO 8601 in UTC."""

    state: str = "pending"
    step: int = 0
    steps: int = 0
    attempts: int = 0
    message: str = ""
    started_at: str = ""
    updated_at: str = ""
    metrics_bytes: int = 0  # size of metrics.jsonl when it was last forced to the disk
    metrics_sha256: str = ""  # of these bytes
    alone: bool = False  # it ran out of memory beside other runs, and since then shares its device with none


@dataclass(frozen=True)
class Result:
    """The measurements of a finished run: `result.json`, and a row of `load_runs`. Losses in nats/token."""

    run: str
    scheme: str  # short name that groups runs, such as quest-w4a4
    weights: str  # quantizer specs
    activations: str
    w_grid_bits: float  # width of the grid: 4 for INT4, 16 if not quantized; the mean over the weights if layers differ
    a_grid_bits: float
    w_stored_bits: float  # bits per stored entry, with masks and scales of groups; the mean if layers differ
    a_stored_bits: float
    params_non_embedding: int  # N
    tokens: int  # D
    tokens_fp: int  # tokens before anything was quantized: none, all in full precision, or those before quant.start
    tokens_per_param: float
    loss: float  # on the validation text, at the end
    bits_per_byte: float | None  # loss / ln 2 / (bytes per token); None if the bytes per token are unknown
    train_loss: float  # mean over the steps of the last metrics line
    model_bits: float  # storage of the non-embedding parameters
    flops: float  # of the whole training
    tokens_per_s: float  # of the training steps alone, without validation and checkpoints
    seconds: float  # in the training loop, over all attempts, without work that was lost in a kill
    peak_memory_bytes: int  # of the GPU or, on a CPU, of the process
    seed: int
    lr: float
    optimizer: str  # optim.name
    warmup_steps: float
    d_model: int
    n_layer: int
    data_hash: str
    params_total: int
    steps: int
    val_tokens: int
    attempts: int
    device: str
    loss_average: float | None = None  # of the average of the weights, where optim.average keeps one

    def to_dict(self) -> dict[str, Any]:
        """The record for JSON; without `loss_average` where the run keeps no average."""
        return {key: value for key, value in vars(self).items() if (key, value) != ("loss_average", None)}

    @classmethod
    def from_json(cls, values: Any, *, where: Path) -> Result:
        """The result from the content of `result.json`.

        Raises DataError, which names the file `where`, if a field is missing or is not a number where it must be one.
        """
        try:
            result = cls(**{f.name: values[f.name] for f in fields(cls) if f.name in values or f.default is MISSING})
            float(result.loss), float(result.params_non_embedding), float(result.tokens)
        except (KeyError, TypeError, ValueError) as e:
            raise DataError(f"{where}: is damaged ({type(e).__name__}: {e}); {_START_AGAIN}.") from e
        return result


@dataclass(frozen=True)
class Facts:
    """Facts of a finished run that lists of many runs show; each field has the value that the method of `Run` returns."""

    result: Result
    status: Status
    artifact_bytes: float | None
    steps: int  # of the config, as is `source`
    source: str
    unique_tokens: int | None
    host: str | None  # of the last attempt, as is `processes`
    processes: int = 1

    def to_list(self) -> list[Any]:
        """The values as a line of the index."""
        return [list(vars(self.result).values()), list(vars(self.status).values()), *list(vars(self).values())[2:]]

    @classmethod
    def from_list(cls, values: list[Any]) -> Facts:
        """The facts from a line of the index."""
        return cls(Result(*values[0]), Status(*values[1]), *values[2:])


COLUMNS = (
    "run",
    "state",
    "scheme",
    "weights",
    "activations",
    "w_grid_bits",
    "a_grid_bits",
    "w_stored_bits",
    "a_stored_bits",
    "params_non_embedding",
    "tokens",
    "tokens_fp",
    "tokens_per_param",
    "loss",
    "bits_per_byte",
    "train_loss",
    "model_bits",
    "artifact_bytes",
    "flops",
    "tokens_per_s",
    "seconds",
    "peak_memory_bytes",
    "seed",
    "lr",
    "optimizer",
    "warmup_steps",
    "d_model",
    "n_layer",
    "data_hash",
    "path",
)


def default_root() -> Path:
    """The default folder of runs: `$QUESTCTL_RUNS`, else `runs` in the working directory."""
    return Path(os.environ.get("QUESTCTL_RUNS") or "runs")


def describe(config: RunConfig) -> dict[str, Any]:
    """The columns of a run that follow from its config alone."""
    w, a = config.quant.weights, config.quant.activations
    n = config.model.params_non_embedding
    if config.quant.overrides:
        bits = mean_bits(config.model, config.quant)
    else:
        bits = {"w_grid_bits": w.grid.bits, "a_grid_bits": a.grid.bits, "w_stored_bits": w.bits, "a_stored_bits": a.bits}
    return {
        "run": config.run_id,
        "scheme": config.scheme,
        "weights": str(w),
        "activations": str(a),
        **bits,
        "params_non_embedding": n,
        "tokens": config.tokens,
        "tokens_fp": config.full_precision_tokens,
        "tokens_per_param": config.tokens_per_param,
        "seed": config.train.seed,
        "lr": config.optim.lr,
        "optimizer": config.optim.name,
        "warmup_steps": config.warmup_steps,
        "d_model": config.model.d_model,
        "n_layer": config.model.n_layer,
    }


def load_runs(path: Path | str | None = None) -> pd.DataFrame:
    """A DataFrame with one row per run, finished or not, and the columns `COLUMNS`.

    Losses are in nats/token, and NaN where there is none yet. Runs that were trained elsewhere have the state `imported`.
    `path` is a folder of runs, an archive or one run folder; the default is `default_root()`. Raises DataError if it does not
    exist or if a file in it is damaged.
    """
    import pandas as pd

    root = located(path) if path is not None else default_root()
    rows = [run.row() for run in runs_in(root, facts=True)]
    if not is_run_folder(root):
        rows += RunStore(root).external_rows()
    return pd.DataFrame(rows, columns=list(COLUMNS))


def runs_in(path: Path, *, facts: bool = False) -> list[Run]:
    """The runs in `path`, by name: those of a folder of runs or of an archive, or the run whose folder it is.

    With `facts`, runs of a folder come with the facts that `RunStore.with_facts` reads.

    Raises DataError if there is no such folder.
    """
    if is_run_folder(path := located(path)):
        return [Run(path)]
    store = RunStore(path)
    store.require()
    return store.with_facts() if facts else store.runs()


def is_run_folder(path: Path) -> bool:
    """Whether `path` is the folder of one run: it holds the config of a run."""
    return (path / _CONFIG).is_file()


def holds_runs(path: Path) -> bool:
    """Whether `path` is a folder (of runs, or of one run) or an archive, and thus not a table."""
    return path.is_dir() or is_archive(path)


def checkpoint_name(step: int) -> str:
    """The name of the folder of the checkpoint after `step` optimizer steps."""
    return f"step-{step:08d}"


def checkpoint_steps(folder: Path) -> list[int]:
    """The steps whose checkpoints are in `folder`, rising; whether the checkpoints are intact is not checked."""
    if not folder.is_dir():
        return []
    return sorted(int(m[1]) for p in folder.iterdir() if (m := _STEP_FOLDER.fullmatch(p.name)))


def _current_names(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of external runs with the present names: version 0.1 called the widths of the grids `w_bits` and `a_bits`."""
    names = {"w_bits": "w_grid_bits", "a_bits": "a_grid_bits"}
    return {names.get(key, key): value for key, value in row.items()}


def open_run(run: Run | Path | str) -> Run:
    """The run that is named by a Run, by its folder, or by a name in the default folder of runs (see `RunStore.find`).

    Raises DataError or UsageError if there is no such run.
    """
    if isinstance(run, Run):
        return run
    if is_run_folder(path := located(run)):
        return Run(path)
    return RunStore().find(str(run))


class RunStore:
    """A folder of runs, with the archive in it, or an archive alone; by default `default_root()`.

    The folder is created with its first run. A run that is both in a folder and in the archive counts once. It is read from the
    folder if it is finished there, else from the archive, where all runs are finished.
    """

    def __init__(self, root: Path | str | None = None) -> None:
        self.root = Path(root) if root is not None else default_root()

    def require(self) -> None:
        """Raise DataError if there is neither such a folder nor such an archive."""
        if not self.root.is_dir() and not is_archive(self.root):
            raise DataError(f"{self.root}: there is no such folder of runs.")

    @property
    def archive(self) -> Path | None:
        """The archive; None if there is none."""
        path = self.root if is_archive(self.root) else self.root / ARCHIVE
        return path if path.is_file() else None

    def run(self, name: str) -> Run:
        """The run of this exact name, whether or not it exists.

        Raises UsageError if the name is not that of a plain folder, DataError if the archive is damaged.
        """
        if not NAME.fullmatch(name):
            raise UsageError(f"run: {name!r} is not the name of a run: letters, digits and . _ + = - only, no path.")
        path = self.root / name
        if path.is_symlink() and path.resolve().parent != self.root.resolve():
            raise UsageError(f"run: {path} is a link that leads out of {self.root}.")
        return self._one(path, self.archive)

    def _one(self, path: Path, archive: Path | None) -> Run:
        """The run in the folder `path`, or that in the archive if the archive has it and the folder's is not finished."""
        if archive is None or path.name not in open_archive(archive).runs or (path / _RESULT).exists():
            return Run(path)
        return Run(ArchivedPath(archive) / path.name)

    def runs(self) -> list[Run]:
        """The existing runs, by name. Folders without a config are not runs, nor are links.

        Raises DataError if the archive is damaged.
        """
        root = str(self.root)
        while True:
            archive = self.archive
            contents = open_archive(archive) if archive else None
            names = {e.name for e in self._entries() if e.is_dir(follow_symlinks=False) and NAME.fullmatch(e.name)}
            folders = {name for name in names if os.path.isfile(f"{root}/{name}/{_CONFIG}")}
            if archive == self.archive and (archive is None or open_archive(archive) is contents):
                break  # else runs have moved between folders and archive meanwhile: look again
        return [self._one(self.root / name, archive) for name in sorted(folders | (contents.runs if contents else set()))]

    def names(self) -> set[str]:
        """The names of all entries of the folder and of the archived runs. A run that is not among them does not exist yet."""
        contents = open_archive(self.archive).runs if self.archive else ()
        return {entry.name for entry in self._entries()}.union(contents)

    @property
    def index_path(self) -> Path:
        """The index of finished runs, which is a cache."""
        return self.root / index.NAME

    def with_facts(self) -> list[Run]:
        """`runs`, the finished ones with their facts: from their files or, where these have not changed, from the index.

        Runs that are damaged or not finished have no facts.
        """
        runs = self.runs()
        if not self.root.is_dir():
            return runs
        known, root = index.Index(self.root), str(self.root)
        packed = index.looks_of(root, [ARCHIVE])
        for run in runs:
            looks = packed if run.is_archived else index.looks_of(f"{root}/{run.name}", (_RESULT, _CONFIG, _ENV, _STATUS))
            if not looks[0]:
                continue  # no result
            if (values := known.get(run.name, looks)) is not None:
                run.facts = Facts.from_list(values)
                continue
            with suppress(DataError, UsageError):
                run.facts = run.read_facts()
                known.put(run.name, looks, run.facts.to_list())
        known.write()
        return runs

    def _entries(self) -> list[os.DirEntry[str]]:
        if not self.root.is_dir():
            return []
        with os.scandir(self.root) as entries:
            return list(entries)

    def as_they_finish(self, *, interval_s: float = 5.0) -> Iterator[Run]:
        """Every finished run once, waiting for those that are pending or running; ends when none of them is left."""
        yielded: set[str] = set()
        while True:
            runs = self.runs()
            finished = [run for run in runs if run.name not in yielded and run.result() is not None]
            for run in finished:
                yielded.add(run.name)
                yield run
            if not finished and not any(run.state() in ("pending", "running") for run in runs):
                return
            if not finished:
                time.sleep(interval_s)

    def external(self) -> list[Path]:
        """The tables of runs that were trained elsewhere, by name."""
        return sorted(self.root.glob(f"*{_EXTERNAL}"))

    def external_path(self, name: str) -> Path:
        """The path of the external runs of this name. Raises UsageError if the name is not that of a plain file."""
        if not NAME.fullmatch(name):
            raise UsageError(f"--name: {name!r} is no name: letters, digits and . _ + = - only.")
        return self.root / f"{name}{_EXTERNAL}"

    def write_external(self, path: Path, source: Path, digest: str, rows: list[dict[str, Any]]) -> None:
        """Store the rows of external runs in `path`, with the table `source` and its SHA-256. Raises StorageError."""
        with storage_errors(self.root, "created"):
            self.root.mkdir(parents=True, exist_ok=True)
        about = {"schema": SCHEMA_VERSION, "source": str(source.resolve()), "sha256": digest, "imported_at": now()}
        write_json(path, {**about, "runs": rows})

    def external_rows(self) -> list[dict[str, Any]]:
        """External runs as rows of `load_runs`, with the state `imported`. Raises DataError if a table is damaged."""
        rows: list[dict[str, Any]] = []
        for path in self.external():
            stored = read_json(path, "import it again").get("runs")
            if not isinstance(stored, list) or not all(isinstance(row, dict) for row in stored):
                raise DataError(f"{path}: is damaged (holds no list of runs); import it again.")
            rows += [{**_current_names(row), "state": "imported", "path": str(path)} for row in stored]
        return rows

    def find(self, name: str) -> Run:
        """The existing run of this name, or the only one whose name begins or ends with it.

        Raises DataError if there is none, UsageError if there are several.
        """
        exact = self.run(name)
        if exact.exists():
            return exact
        matches = [r for r in self.runs() if r.name.startswith(name) or r.name.endswith(name)]
        if len(matches) == 1:
            return matches[0]
        if matches:
            raise UsageError(f"run: '{name}' fits {len(matches)} runs: {few(r.name for r in matches)}.")
        similar = difflib.get_close_matches(name, [r.name for r in self.runs()], n=1, cutoff=0.4)
        hint = f"did you mean '{similar[0]}'?" if similar else "see questctl runs ls."
        raise DataError(f"run: there is no run '{name}' in {self.root}; {hint}")


class _File:
    """The path of a file of a run, made on access, because a list of thousands of runs uses few of them."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, run: Run, owner: type[Run]) -> Path:
        return run.path / self.name


class Run:
    """One run, for reading, in its folder or in an archive. `open_for_training` returns the only writer of its folder.

    `facts` is set for runs that were listed with their facts (`RunStore.with_facts`), and None for others.
    """

    config_path, env_path = _File(_CONFIG), _File(_ENV)
    status_path, result_path = _File(_STATUS), _File(_RESULT)
    metrics_path, timing_path = _File("metrics.jsonl"), _File("timing.jsonl")
    evaluations_path, verdicts_path = _File("evaluations.jsonl"), _File("stopping.jsonl")
    checkpoints_path, model_path = _File("checkpoints"), _File("model.safetensors")
    average_path = _File("average.safetensors")
    kept_path = _File("kept")
    lease_path, log_path = _File("lease"), _File("log.txt")
    reserve_path = _File("reserve.tmp")

    def __init__(self, path: Path, facts: Facts | None = None) -> None:
        self.path, self.name, self.facts = path, path.name, facts

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r})"

    @property
    def is_archived(self) -> bool:
        """Whether the run is read from an archive."""
        return isinstance(self.path, ArchivedPath)

    @property
    def root(self) -> Path:
        """The folder of runs that it is in, or that its archive is in."""
        return self.path.archive.parent if isinstance(self.path, ArchivedPath) else self.path.parent

    def require_folder(self, command: str) -> Path:
        """The folder of the run. Raises UsageError, which names `command`, if it is in an archive."""
        if self.is_archived:
            raise UsageError(
                f"{command}: {self.name} is in {self.path.parent}; questctl runs restore {self.name} takes it out."
            )
        return self.path

    def sibling(self, name: str) -> Run:
        """The run of this name in the same folder of runs."""
        return RunStore(self.root).run(name)

    def checkpoint_steps(self) -> list[int]:
        """The steps that the run has checkpoints of, rising: its newest ones and those that it keeps for branches."""
        return sorted({*checkpoint_steps(self.checkpoints_path), *checkpoint_steps(self.kept_path)})

    def checkpoint_path(self, step: int) -> Path | None:
        """The folder of the checkpoint of this step, kept for branches or among the newest; None if there is none."""
        paths = (folder / checkpoint_name(step) for folder in (self.kept_path, self.checkpoints_path))
        return next((path for path in paths if path.is_dir()), None)

    def exists(self) -> bool:
        """Whether the run has a config, which is written first."""
        return self.config_path.exists()

    def config(self) -> RunConfig:
        """The stored config. Raises DataError, which names the file, if it is missing, damaged, or of another schema."""
        values = read_json(self.config_path, _START_AGAIN)
        try:
            return RunConfig.from_json(values, where=str(self.config_path))
        except UsageError as e:
            raise DataError(str(e)) from e

    def status(self) -> Status:
        """The stored status; that of a pending run if there is none. Raises DataError if the file is damaged."""
        if not self.status_path.exists():
            return Status()
        remedy = "delete this file; the run then resumes from its last checkpoint"
        values = read_json(self.status_path, remedy)
        try:
            status = Status(**values)
        except TypeError as e:
            raise DataError(f"{self.status_path}: is damaged ({e}); {remedy}.") from e
        if status.state not in STATES:
            raise DataError(f"{self.status_path}: is damaged (state {status.state!r}); {remedy}.")
        return status

    def env(self) -> dict[str, Any]:
        """The content of env.json: data hash, threads, attempts; empty before the first attempt.

        Raises DataError if the file is damaged.
        """
        return read_json(self.env_path, _START_AGAIN) if self.env_path.exists() else {}

    def result(self) -> Result | None:
        """The result, or None if the run is not finished. Raises DataError if the file is damaged."""
        if not self.result_path.exists():
            return None
        values = read_json(self.result_path, _START_AGAIN)
        if "tokens_fp" not in values:
            values = {**self._missing_in_early_result(values), **values}
        return Result.from_json(values, where=self.result_path)

    def _missing_in_early_result(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Values that a result of an early version lacks, from the config.

        The `w_bits` and `a_bits` of version 0.1 are stored bits; it does not have the widths of the grids.
        """
        of_config = describe(self.config())
        missing = {key: of_config[key] for key in ("w_grid_bits", "a_grid_bits", "optimizer", "warmup_steps", "tokens_fp")}
        stored = {f"{operand}_stored_bits": values[f"{operand}_bits"] for operand in "wa" if f"{operand}_bits" in values}
        return missing | stored

    def require_result(self, command: str) -> Result:
        """The result of a finished run. Raises DataError, which names `command`, if it is not finished, or damaged."""
        if (result := self.result()) is None:
            raise DataError(f"{command}: {self.name} is not finished ({self.state()}); questctl train continues it.")
        return result

    def model_sha256(self) -> str | None:
        """SHA-256 of model.safetensors as the finished run wrote it; None before, and for early runs that did not record it."""
        if not self.result_path.exists():
            return None
        digest: str | None = read_json(self.result_path, _START_AGAIN).get("model_sha256")
        return digest

    def state(self) -> str:
        """One of STATES, from result, status and lease together."""
        if self.result_path.exists():
            return "done"
        state = self.status().state
        if state in ("running", "done"):  # done without a result: the process ended between the two writes
            return "running" if is_live(self.lease_path) else "preempted"
        return state

    def metrics(self) -> list[dict[str, Any]]:
        """The metric lines, oldest first, without an unfinished last one. Raises DataError if another line is damaged."""
        return read_lines(self.metrics_path, _START_AGAIN)

    def timing(self) -> list[dict[str, Any]]:
        """The timing lines, oldest first: one for each metric line."""
        return read_lines(self.timing_path, _START_AGAIN)

    def last_metrics(self) -> dict[str, Any]:
        """The newest whole metric line; empty if there is none."""
        return last_line(self.metrics_path)

    def last_timing(self) -> dict[str, Any]:
        """The newest whole timing line; empty if there is none."""
        return last_line(self.timing_path)

    def row(self) -> dict[str, Any]:
        """This run as one row of `load_runs`."""
        if (result := self.facts.result if self.facts else self.result()) is not None:
            size = self.facts.artifact_bytes if self.facts else self.artifact_bytes()
            return {**vars(result), "artifact_bytes": size, "state": "done", "path": str(self.path)}
        last = self.last_metrics()
        return {
            **describe(self.config()),
            "artifact_bytes": self.artifact_bytes(),
            "state": self.state(),
            "path": str(self.path),
            "train_loss": last.get(TRAIN_LOSS),
            "data_hash": self.env().get("data_hash"),
        }

    def artifact_bytes(self, *, coded: bool = False) -> float | None:
        """Bytes of the file that a runtime loads of this run, as `quant.storage.artifact_bytes` counts them.

        None if the config cannot be read by this version, or if the vocabulary of its text is not known yet. The parameters of
        a finished run give the vocabulary.
        """
        try:
            return self._artifact_bytes(self.config(), self.result(), coded)
        except (DataError, UsageError):
            return None

    def _artifact_bytes(self, config: RunConfig, result: Result | None, coded: bool = False) -> float | None:
        model = config.model
        if result is not None and not model.vocab_size:
            tables = result.params_total - result.params_non_embedding
            vocab = tables // ((1 if model.tied else 2) * model.d_model)
            model = model.model_copy(update={"vocab_size": vocab})
        size = artifact_bytes(model, config.quant, config.data.tokenizer, coded=coded)
        return None if math.isnan(size) else size

    def read_facts(self) -> Facts:
        """The facts of a finished run, each of its files read once. Raises DataError if one is damaged, or UsageError."""
        config, status, env, result = self.config(), self.status(), self.env(), self.require_result("list")
        length, attempts = env.get("train_tokens"), env.get("attempts")
        unique = min(config.tokens, length) if length else None
        size = self._artifact_bytes(config, result)
        host = attempts[-1].get("host") if attempts else None
        return Facts(result, status, size, config.train.steps, config.data.source, unique, host, self.processes(env))

    def processes(self, env: Mapping[str, Any] | None = None) -> int:
        """The number of processes of the last attempt; `env` is the content of env.json, if it has been read already."""
        attempts = (self.env() if env is None else env).get("attempts")
        return int(attempts[-1].get("processes", 1)) if attempts else 1

    def passes(self, tokens: int) -> float | None:
        """How many times training on `tokens` tokens reads the run's training text.

        None before the first attempt, and for runs of early versions, which did not record the length of their text.
        """
        length = self.env().get("train_tokens")
        return tokens / length if length else None

    def unique_tokens(self, tokens: int) -> int | None:
        """The distinct tokens among `tokens` tokens of training, all of the training text at most; None as for `passes`."""
        length = self.env().get("train_tokens")
        return min(tokens, length) if length else None

    def evaluations(self) -> list[dict[str, Any]]:
        """The measurements of `questctl eval`, oldest first. Raises DataError if a line is damaged."""
        return read_lines(self.evaluations_path, _START_AGAIN, key=TIME)

    def verdicts(self) -> list[dict[str, Any]]:
        """What a sweep with [stop] decided about this run, oldest first: lines with `step`, `verdict`, `reason` and a forecast.

        Verdicts are `go on`, `stop`, `withdrawn` (the run that was ahead failed or was itself stopped) and `released` (told to
        go on for good). Raises DataError if a line is damaged.
        """
        return read_lines(self.verdicts_path, "delete this file, and the run goes on", key="verdict")

    def last_verdict(self) -> dict[str, Any]:
        """The newest whole line of `verdicts`; empty if there is none."""
        return last_line(self.verdicts_path)

    def add_verdict(self, verdict: Mapping[str, Any]) -> None:
        """Append a line to `verdicts`, with the present time. Raises StorageError."""
        append_line(self.verdicts_path, {**verdict, TIME: now()})

    def add_evaluation(self, measured: Mapping[str, Any]) -> None:
        """Append one measurement, with the present time. Raises StorageError."""
        append_line(self.evaluations_path, {**measured, TIME: now()})

    def check_writable(self) -> None:
        """Raise StorageError if the run's folder cannot be created or written, judging by the nearest existing parent."""
        nearest = next(p for p in (self.path.absolute(), *self.path.absolute().parents) if p.exists())
        if not nearest.is_dir():
            raise StorageError(f"{nearest}: is not a folder, so no run can be written there.")
        if not os.access(nearest, os.W_OK | os.X_OK):
            raise StorageError(f"{nearest}: cannot be written: {os.strerror(errno.EACCES)}.")

    def create(self, config: RunConfig) -> None:
        """Create the folder and its config, unless they exist. Where other processes may write, the caller holds the lease.

        Raises StorageError, or UsageError if the folder holds another experiment (a config that was edited by hand).
        """
        if self.exists():
            if self.config().identity != config.identity:
                raise UsageError(f"{self.config_path}: describes another experiment than {self.name}; {_START_AGAIN}.")
            return
        with storage_errors(self.path, "created"):
            self.path.mkdir(parents=True, exist_ok=True)
        write_sealed(self.config_path, config.to_json())

    def open_for_training(self, config: RunConfig, *, lease: Lease | None = None) -> RunWriter:
        """The run's only writer, as a context manager.

        On entry it claims the lease (unless the caller already holds `lease`), creates the folder, and removes files that a
        killed process left half-written. Entering raises LeaseHeld if another live process trains this run, StorageError if the
        folder cannot be written, UsageError if it holds another experiment, DataError if its config or status is damaged.
        """
        return RunWriter(self, config, lease)

    def tidy(self) -> None:
        """Remove checkpoints and reserve of a finished run whose process was killed right after it had written the result."""
        if self.checkpoints_path.exists() or self.reserve_path.exists():
            with suppress(LeaseHeld, OSError), Lease(self.lease_path):
                shutil.rmtree(self.checkpoints_path, ignore_errors=True)
                self.reserve_path.unlink(missing_ok=True)

    def remove(self) -> None:
        """Delete the run's folder. Raises LeaseHeld if a live process works on it, StorageError if the file system refuses."""
        with storage_errors(self.path, "removed"):
            with Lease(self.lease_path):
                hidden = self.path.with_name(f".{self.name}.{os.getpid()}.tmp")  # half a folder must not look like a run
                os.rename(self.path, hidden)
            shutil.rmtree(hidden)


class RunWriter:
    """Writes one run folder. It checks its lease before every write and raises only StorageError or LeaseLost."""

    def __init__(self, run: Run, config: RunConfig, lease: Lease | None) -> None:
        self.run, self.config = run, config
        self._borrowed, self._lease = lease is not None, lease or Lease(run.lease_path)
        self._last_status = 0.0
        self._last_lines = time.monotonic()
        self._waiting: list[tuple[Mapping[str, Any], Mapping[str, Any]]] = []  # lines that are not written yet
        self._lines_hash = hashlib.sha256()  # of the metric lines, from `begin` on
        self._lines_bytes = 0
        self._model_sha256 = ""
        self.listeners: list[Callable[[Mapping[str, Any], Mapping[str, Any]], None]] = []  # called with every logged line

    def __enter__(self) -> Self:
        fresh = [p for p in (self.run.path, self.run.path.parent) if not p.exists()]
        try:
            self._open()
        except BaseException:
            for folder in fresh:  # a run that could not begin leaves no folder; `rmdir` keeps one that another run uses
                with suppress(OSError):
                    folder.rmdir()
            raise
        return self

    def _open(self) -> None:
        with storage_errors(self.run.path, "created"):
            self.run.path.mkdir(parents=True, exist_ok=True)
        if not self._borrowed:
            with storage_errors(self.run.path, "written"):
                self._lease.claim()
        try:
            if RunStore(self.run.root).run(self.run.name).is_archived:  # finished and archived since the last look
                raise LeaseHeld(f"{self.run.name}: is finished, and in {self.run.root / ARCHIVE}.")
            with storage_errors(self.run.path, "written"):
                for leftover in self.run.path.glob("*.tmp"):
                    with suppress(FileNotFoundError):  # another process that tries to claim the lease removes its own file
                        if leftover.name.startswith("lease") and time.time() - leftover.stat().st_mtime < STALE_AFTER_S:
                            continue
                        leftover.unlink()
                self.run.reserve_path.write_bytes(os.urandom(RESERVE_BYTES))  # random, so that no file system compresses it
            self.run.create(self.config)
            self.status = self.run.status()
        except BaseException:
            self._release()
            raise

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self._release()

    def _release(self) -> None:
        with suppress(OSError):
            if self._lease.is_mine():
                self.run.reserve_path.unlink(missing_ok=True)
            if not self._borrowed:
                self._lease.release()

    def check(self) -> None:
        """Raise LeaseLost if another process has taken this run over."""
        with storage_errors(self.run.lease_path, "read"):
            self._lease.check()

    def begin(self, *, step: int, steps: int, env: Mapping[str, Any], trunk: Run | None = None) -> None:
        """Begin an attempt that resumes after `step` steps.

        This counts the attempt, writes env.json, and cuts metrics and timing back to the lines before `step`. In env.json,
        `env["attempt"]` is appended to the attempts, and other keys replace the stored ones. A branch that leaves its `trunk`
        begins with the trunk's lines.
        """
        self.check()
        attempts = [*self.run.env().get("attempts", []), {"started_at": now(), **env["attempt"]}]
        write_sealed(self.run.env_path, {**{k: v for k, v in env.items() if k != "attempt"}, "attempts": attempts})
        source = trunk or self.run
        if trunk is None:
            self._verify_metrics()
        timing, metrics = (lines_before(path, step, _START_AGAIN) for path in (source.timing_path, source.metrics_path))
        self._lines_hash, self._lines_bytes = hashlib.sha256(metrics), len(metrics)
        self.release()
        before = self.status
        self.status = replace(before, attempts=before.attempts + 1, started_at=before.started_at or now(), steps=steps)
        self._record_lines()
        self.set_state("running", step)  # before the files are cut, while they still begin with the hashed lines
        for path, lines in ((self.run.timing_path, timing), (self.run.metrics_path, metrics)):
            if lines or path.exists():
                write_bytes(path, lines)

    def record(self, env: Mapping[str, Any]) -> None:
        """Replace keys of env.json."""
        self.check()
        write_sealed(self.run.env_path, {**self.run.env(), **env})

    def release(self) -> None:
        """Let a run that its sweep stopped go on; the sweep will not stop it again."""
        if self.run.last_verdict().get("verdict") == "stop":
            self.run.add_verdict({STEP: self.status.step, "verdict": "released", "reason": "it was told to go on"})

    def set_state(self, state: str, step: int, message: str = "", *, alone: bool = False) -> None:
        """Write the status; once `alone` is true, it stays true.

        For the state `failed` the reserve is removed first, which makes room for the status on a full disk.
        """
        assert state in STATES
        if state == "failed":
            with suppress(StorageError):  # the disk may be what failed
                self.write_lines()
        else:
            self.write_lines()
        self.check()
        self._last_status = time.monotonic()
        alone = alone or self.status.alone
        self.status = replace(self.status, state=state, step=step, message=message, updated_at=now(), alone=alone)
        if state == "failed":
            self.run.reserve_path.unlink(missing_ok=True)
        write_sealed(self.run.status_path, asdict(self.status))

    def _verify_metrics(self) -> None:
        """Raise DataError if metric lines have changed since they were forced to the disk."""
        path, n = self.run.metrics_path, self.status.metrics_bytes
        if n and sha256((path.read_bytes() if path.exists() else b"")[:n]) != self.status.metrics_sha256:
            raise DataError(f"{path}: is damaged (its hash differs); {_START_AGAIN}.")

    def _record_lines(self) -> None:
        """Put the size and the hash of the current metric lines into the next status, so that they can be verified."""
        digest = self._lines_hash.hexdigest() if self._lines_bytes else ""
        self.status = replace(self.status, metrics_bytes=self._lines_bytes, metrics_sha256=digest)

    def log(self, metrics: Mapping[str, Any], timing: Mapping[str, Any]) -> None:
        """Append a line to metrics.jsonl and one to timing.jsonl, each with the step; every few seconds update the status.

        Beside many others (`MANY`), lines are written together, and the status with the checkpoints.
        """
        self._waiting.append((metrics, {**timing, TIME: now()}))
        many = self._lease.beside > MANY
        if not many or time.monotonic() - self._last_lines >= LINES_TOGETHER_S:
            self.write_lines()
        if not many and time.monotonic() - self._last_status > STATUS_INTERVAL_S:
            self.set_state("running", metrics[STEP])
        for listener in self.listeners:
            listener(metrics, timing)

    def write_lines(self) -> None:
        """Append the lines that wait to their files."""
        if not self._waiting:
            return
        self.check()
        waiting, self._waiting, self._last_lines = self._waiting, [], time.monotonic()
        lines = append_lines(self.run.metrics_path, [metrics for metrics, _ in waiting])
        self._lines_hash.update(lines)
        self._lines_bytes += len(lines)
        append_lines(self.run.timing_path, [timing for _, timing in waiting])

    def sync(self) -> None:
        """Force the lines to the disk. A checkpoint requires it, because a resumed run relies on the lines before its step."""
        self.write_lines()
        with storage_errors(self.run.metrics_path, "written"):
            for path in (self.run.metrics_path, self.run.timing_path):
                with suppress(FileNotFoundError), path.open("ab") as f:
                    os.fsync(f.fileno())
        self._record_lines()

    def write_model(self, data: bytes) -> None:
        """Write model.safetensors, whose hash becomes part of the result."""
        self.check()
        write_bytes(self.run.model_path, data)
        self._model_sha256 = sha256(data)

    def write_average(self, data: bytes) -> None:
        """Write average.safetensors, the average of the weights."""
        self.check()
        write_bytes(self.run.average_path, data)

    def finish(self, result: Result) -> None:
        """Write the state `done` and then result.json, and remove the checkpoints, which are no longer needed."""
        self.set_state("done", result.steps)
        model = {"model_sha256": self._model_sha256} if self._model_sha256 else {}
        write_sealed(self.run.result_path, {"schema": SCHEMA_VERSION, **result.to_dict(), **model})
        shutil.rmtree(self.run.checkpoints_path, ignore_errors=True)
