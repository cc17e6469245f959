"""The run folder: the only module that knows its file names. Files are the truth; a reader never sees half of one.

    runs/<id>/  config.json    the resolved config and its schema version
                env.json       data hash, threads, and for each attempt: versions, machine, commit, command
                status.json    state, step, attempts, message, times
                metrics.jsonl  one line a log step, nothing in it that differs between two executions of the same bits
                timing.jsonl   one line a log step: tokens/s, step_time(ms), time
                checkpoints/   step-00000123/ (training/checkpoint.py)
                kept/          the same, of the steps that branches may leave at
                model.safetensors
                result.json    written last: its existence means finished
                evaluations.jsonl  what questctl eval measured since
                log.txt        what a sweep's run said beyond this: warnings, a traceback
                lease          who may write (lease.py)
                reserve.tmp    while it trains: room to say why it failed, should the disk be full

    runs/<name>.imported.json    runs that were trained elsewhere (imported.py): rows, their source and its hash

Small files are written to a neighbour, synced, renamed, and the folder synced; each holds its own SHA-256. That of the weights
stands in the result, and is verified when they are loaded; that of the metric lines stands in the status whenever they were
synced, and is verified before a run goes on. Lines are appended in one write each and cut back to the checkpoint when a run
goes on, so that a run that was killed ends with the same `metrics.jsonl`, byte for byte, as an undisturbed one: speeds and
times live in a file of their own.

States: pending → running → done | failed | diverged | preempted. A run whose process is gone without a word is `preempted`.
"""

from __future__ import annotations

import difflib
import errno
import hashlib
import json
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from ..config import RunConfig
from ..errors import DataError, StorageError, UsageError
from ..metrics import STEP, TIME, TRAIN_LOSS
from ..quant.layer_specs import mean_bits
from ..quant.spec import QuantSpec
from .lease import STALE_AFTER_S, Lease, LeaseHeld, is_live

if TYPE_CHECKING:
    import pandas as pd

SCHEMA_VERSION = 1
STATES = ("pending", "running", "done", "failed", "diverged", "preempted")
STATUS_INTERVAL_S = 5.0  # between status writes that only report progress
RESERVE_BYTES = 32_768  # kept back, so that a run on a full disk can still say why it failed

_IMPORTED = ".imported.json"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+=-]{0,199}")
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
    metrics_bytes: int = 0  # of metrics.jsonl when it was last forced to the disk, and their hash
    metrics_sha256: str = ""
    alone: bool = False  # it ran out of memory beside others, and has its device to itself from now on


@dataclass(frozen=True)
class Result:
    """What a finished run found: `result.json`, and a row of `load_runs`. Losses in nats/token."""

    run: str
    scheme: str  # short name that groups runs, such as quest-w4a4
    weights: str  # quantizer words
    activations: str
    w_bits: float  # stored bits per entry, scales of groups included; where layers differ the mean; 16: not quantized
    a_bits: float
    params_non_embedding: int  # N
    tokens: int  # D
    tokens_per_param: float
    loss: float  # of the validation text, at the end
    bits_per_byte: float | None  # loss / ln 2 / (bytes per token); None where tokens stand for no text
    train_loss: float  # mean over the steps of the last metrics line
    model_bits: float  # storage of the non-embedding parameters
    flops: float  # of the whole training
    tokens_per_s: float  # of the training steps alone
    seconds: float  # in the training loop, over all attempts; work that a kill undid is not counted
    peak_memory_bytes: int  # of the GPU, or of the process where there is none
    seed: int
    lr: float
    d_model: int
    n_layer: int
    data_hash: str
    params_total: int
    steps: int
    val_tokens: int
    attempts: int
    device: str

    @classmethod
    def from_json(cls, values: Any, *, where: Path) -> Result:
        """Read back `asdict`. Raises DataError naming the file if fields are missing or are not numbers where they must be."""
        try:
            result = cls(**{f.name: values[f.name] for f in fields(cls)})
            float(result.loss), float(result.params_non_embedding), float(result.tokens)
        except (KeyError, TypeError, ValueError) as e:
            raise DataError(f"{where}: is damaged ({type(e).__name__}: {e}); {_START_AGAIN}.") from e
        return result


COLUMNS = (
    "run",
    "state",
    "scheme",
    "weights",
    "activations",
    "w_bits",
    "a_bits",
    "params_non_embedding",
    "tokens",
    "tokens_per_param",
    "loss",
    "bits_per_byte",
    "train_loss",
    "model_bits",
    "flops",
    "tokens_per_s",
    "seconds",
    "peak_memory_bytes",
    "seed",
    "lr",
    "d_model",
    "n_layer",
    "data_hash",
    "path",
)


def default_root() -> Path:
    """`$QUESTCTL_RUNS`, else `runs/` here."""
    return Path(os.environ.get("QUESTCTL_RUNS") or "runs")


def describe(config: RunConfig) -> dict[str, Any]:
    """The columns of a run that follow from its config alone."""
    w, a = QuantSpec.parse(config.quant.weights), QuantSpec.parse(config.quant.activations)
    n = config.model.non_embedding_parameters
    w_bits, a_bits = mean_bits(config.model, config.quant) if config.quant.overrides else (w.bits, a.bits)
    return {
        "run": config.run_id,
        "scheme": config.scheme,
        "weights": str(w),
        "activations": str(a),
        "w_bits": w_bits,
        "a_bits": a_bits,
        "params_non_embedding": n,
        "tokens": config.tokens,
        "tokens_per_param": config.tokens / n,
        "seed": config.train.seed,
        "lr": config.optim.lr,
        "d_model": config.model.d_model,
        "n_layer": config.model.n_layer,
    }


def load_runs(path: Path | str | None = None) -> pd.DataFrame:
    """One row a run, finished or not, with the columns `COLUMNS`; losses in nats/token, NaN where there is none yet. Runs that
    were imported have the state `imported`.

    `path` is a folder of runs, or one run folder; left out: `$QUESTCTL_RUNS` or `runs/`. Raises DataError if it does not exist
    or a file in it is damaged.
    """
    import pandas as pd

    root = Path(path) if path is not None else default_root()
    if (root / "config.json").is_file():
        runs = [Run(root)]
    elif root.is_dir():
        runs = RunStore(root).runs()
    else:
        raise DataError(f"{root}: there is no such folder of runs.")
    elsewhere = RunStore(root).imported_rows() if not (root / "config.json").is_file() else []
    return pd.DataFrame([*(run.row() for run in runs), *elsewhere], columns=list(COLUMNS))


class RunStore:
    """A folder of runs. Nothing is created before the first run is."""

    def __init__(self, root: Path | str | None = None) -> None:
        self.root = Path(root) if root is not None else default_root()

    def run(self, name: str) -> Run:
        """The run of this exact name, whether or not it exists. Raises UsageError for a name that is not one plain folder's."""
        if not _NAME.fullmatch(name):
            raise UsageError(f"run: {name!r} is not the name of a run: letters, digits and . _ + = - only, no path.")
        path = self.root / name
        if path.resolve().parent != self.root.resolve():
            raise UsageError(f"run: {path} is a link that leads out of {self.root}.")
        return Run(path)

    def runs(self) -> list[Run]:
        """All run folders, by name; folders without a config and links are not runs."""
        if not self.root.is_dir():
            return []
        with os.scandir(self.root) as entries:
            names = sorted(e.name for e in entries if e.is_dir(follow_symlinks=False) and _NAME.fullmatch(e.name))
        return [Run(self.root / name) for name in names if (self.root / name / "config.json").exists()]

    def imported(self) -> list[Path]:
        """The tables of imported runs, by name."""
        return sorted(self.root.glob(f"*{_IMPORTED}"))

    def imported_path(self, name: str) -> Path:
        """Where the imported runs of this name are kept. Raises UsageError for a name that is not one plain file's."""
        if not _NAME.fullmatch(name):
            raise UsageError(f"--name: {name!r} is no name: letters, digits and . _ + = - only.")
        return self.root / f"{name}{_IMPORTED}"

    def write_imported(self, path: Path, source: Path, sha256: str, rows: list[dict[str, Any]]) -> None:
        """Keep imported runs. Raises StorageError."""
        with _storage(self.root, "created"):
            self.root.mkdir(parents=True, exist_ok=True)
        about = {"schema": SCHEMA_VERSION, "source": str(source.resolve()), "sha256": sha256, "imported_at": _now()}
        write_json(path, {**about, "runs": rows})

    def imported_rows(self) -> list[dict[str, Any]]:
        """Imported runs as rows of `load_runs`. Raises DataError if a table is damaged."""
        rows: list[dict[str, Any]] = []
        for path in self.imported():
            found = read_json(path, "import it again").get("runs")
            if not isinstance(found, list) or not all(isinstance(row, dict) for row in found):
                raise DataError(f"{path}: is damaged (holds no list of runs); import it again.")
            rows += [{**row, "state": "imported", "path": str(path)} for row in found]
        return rows

    def find(self, name: str) -> Run:
        """The existing run of this name, or the only one whose name begins or ends with it. Raises DataError or UsageError."""
        exact = self.run(name)
        if exact.exists():
            return exact
        near = [r for r in self.runs() if r.name.startswith(name) or r.name.endswith(name)]
        if len(near) == 1:
            return near[0]
        if near:
            some = ", ".join([r.name for r in near[:5]] + ["…"] * (len(near) > 5))
            raise UsageError(f"run: '{name}' fits {len(near)} runs: {some}.")
        like = difflib.get_close_matches(name, [r.name for r in self.runs()], n=1, cutoff=0.4)
        hint = f"did you mean '{like[0]}'?" if like else "see questctl runs ls."
        raise DataError(f"run: there is no run '{name}' in {self.root}; {hint}")


class Run:
    """One run folder, for reading; `open_for_training` gives the one writer."""

    def __init__(self, path: Path) -> None:
        self.path, self.name = path, path.name
        self.config_path, self.env_path = path / "config.json", path / "env.json"
        self.status_path, self.result_path = path / "status.json", path / "result.json"
        self.metrics_path, self.timing_path = path / "metrics.jsonl", path / "timing.jsonl"
        self.evaluations_path = path / "evaluations.jsonl"
        self.checkpoints_path, self.model_path = path / "checkpoints", path / "model.safetensors"
        self.kept_path = path / "kept"
        self.lease_path, self.log_path = path / "lease", path / "log.txt"
        self.reserve_path = path / "reserve.tmp"

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r})"

    def sibling(self, name: str) -> Run:
        """The run of this name in the same folder of runs."""
        return Run(self.path.with_name(name))

    def exists(self) -> bool:
        """True once the run has a config."""
        return self.config_path.exists()

    def config(self) -> RunConfig:
        """The stored config. Raises DataError naming the file if it is missing, damaged, or of another schema."""
        values = read_json(self.config_path, _START_AGAIN)
        try:
            return RunConfig.from_json(values, where=str(self.config_path))
        except UsageError as e:
            raise DataError(str(e)) from e

    def status(self) -> Status:
        """The stored status; `pending` if there is none. Raises DataError if it is damaged."""
        if not self.status_path.exists():
            return Status()
        remedy = "delete this file; the run goes on from its last checkpoint"
        values = read_json(self.status_path, remedy)
        try:
            status = Status(**values)
        except TypeError as e:
            raise DataError(f"{self.status_path}: is damaged ({e}); {remedy}.") from e
        if status.state not in STATES:
            raise DataError(f"{self.status_path}: is damaged (state {status.state!r}); {remedy}.")
        return status

    def env(self) -> dict[str, Any]:
        """Where and with what the run was trained; empty before its first attempt. Raises DataError if it is damaged."""
        return read_json(self.env_path, _START_AGAIN) if self.env_path.exists() else {}

    def result(self) -> Result | None:
        """The result, or None if the run is not finished. Raises DataError if it is damaged."""
        if not self.result_path.exists():
            return None
        return Result.from_json(read_json(self.result_path, _START_AGAIN), where=self.result_path)

    def model_sha256(self) -> str | None:
        """That of model.safetensors as the finished run wrote it; None before, and of runs that did not record it."""
        if not self.result_path.exists():
            return None
        digest: str | None = read_json(self.result_path, _START_AGAIN).get("model_sha256")
        return digest

    def state(self) -> str:
        """One of STATES, judged from result, status and lease together."""
        if self.result_path.exists():
            return "done"
        state = self.status().state
        if state in ("running", "done"):  # done without a result: the process died between the two
            return "running" if is_live(self.lease_path) else "preempted"
        return state

    def metrics(self) -> list[dict[str, Any]]:
        """The metric lines; a torn last one is left out. Raises DataError for any other line that is damaged."""
        return _read_lines(self.metrics_path)

    def timing(self) -> list[dict[str, Any]]:
        """The timing lines, beside the metric lines."""
        return _read_lines(self.timing_path)

    def last_metrics(self) -> dict[str, Any]:
        """The newest whole metric line; empty if there is none."""
        return _last_line(self.metrics_path)

    def last_timing(self) -> dict[str, Any]:
        """The newest whole timing line; empty if there is none."""
        return _last_line(self.timing_path)

    def row(self) -> dict[str, Any]:
        """This run as one row of `load_runs`."""
        if (result := self.result()) is not None:
            return {**asdict(result), "state": "done", "path": str(self.path)}
        last = self.last_metrics()
        return {
            **describe(self.config()),
            "state": self.state(),
            "path": str(self.path),
            "train_loss": last.get(TRAIN_LOSS),
            "data_hash": self.env().get("data_hash"),
        }

    def passes(self, tokens: int) -> float | None:
        """How often training on `tokens` tokens reads the run's text; None before its first attempt, and where an earlier
        version trained it."""
        there = self.env().get("train_tokens")
        return tokens / there if there else None

    def evaluations(self) -> list[dict[str, Any]]:
        """What was measured since, oldest first."""
        return _read_lines(self.evaluations_path, TIME)

    def add_evaluation(self, found: Mapping[str, Any]) -> None:
        """Append one measurement. Raises StorageError."""
        _append(self.evaluations_path, {**found, TIME: _now()})

    def check_writable(self) -> None:
        """Raises StorageError if the folder, or the nearest one above it that exists, is none or may not be written to."""
        there = next(p for p in (self.path.absolute(), *self.path.absolute().parents) if p.exists())
        if not there.is_dir():
            raise StorageError(f"{there}: is not a folder, so that no run can be written there.")
        if not os.access(there, os.W_OK | os.X_OK):
            raise StorageError(f"{there}: cannot be written: {os.strerror(errno.EACCES)}.")

    def create(self, config: RunConfig) -> None:
        """Make the folder with its config; does nothing if both are there. Where others may write: under the lease.

        Raises StorageError, or UsageError if the folder holds another experiment (a config edited by hand).
        """
        if self.exists():
            if self.config().identity != config.identity:
                raise UsageError(f"{self.config_path}: describes another experiment than {self.name}; {_START_AGAIN}.")
            return
        with _storage(self.path, "created"):
            self.path.mkdir(parents=True, exist_ok=True)
        write_sealed(self.config_path, config.to_json())

    def open_for_training(self, config: RunConfig, *, lease: Lease | None = None) -> RunWriter:
        """The run's only writer, as a context manager: claims the lease (unless the caller already holds `lease`), creates the
        folder, and clears what a killed predecessor left half-written.

        Raises LeaseHeld if another live process trains this run, StorageError if the folder cannot be written, UsageError if it
        holds another experiment, DataError if its config or status is damaged.
        """
        return RunWriter(self, config, lease)

    def tidy(self) -> None:
        """Give back the space that a process held which was killed after it had written the result."""
        if self.checkpoints_path.exists() or self.reserve_path.exists():
            with suppress(LeaseHeld, OSError), Lease(self.lease_path):
                shutil.rmtree(self.checkpoints_path, ignore_errors=True)
                self.reserve_path.unlink(missing_ok=True)

    def remove(self) -> None:
        """Delete the folder. Raises LeaseHeld if a live process works on it, StorageError if the file system refuses."""
        with _storage(self.path, "removed"):
            with Lease(self.lease_path):
                doomed = self.path.with_name(f".{self.name}.{os.getpid()}.tmp")  # half a folder must not look like a run
                os.rename(self.path, doomed)
            shutil.rmtree(doomed)


class RunWriter:
    """Writes one run folder, asking the lease before every write; everything it raises is a StorageError or LeaseLost."""

    def __init__(self, run: Run, config: RunConfig, lease: Lease | None) -> None:
        self.run, self.config = run, config
        self._borrowed, self._lease = lease is not None, lease or Lease(run.lease_path)
        self._last_status = 0.0
        self._lines = hashlib.sha256()  # of the metric lines so far, from `begin` on
        self._bytes = 0
        self._model_sha256 = ""
        self.listeners: list[Callable[[Mapping[str, Any], Mapping[str, Any]], None]] = []  # told of every line that was logged

    def __enter__(self) -> Self:
        fresh = [p for p in (self.run.path, self.run.path.parent) if not p.exists()]
        try:
            self._open()
        except BaseException:
            for folder in fresh:  # a run that could not begin leaves nothing; a folder that another one uses is not empty
                with suppress(OSError):
                    folder.rmdir()
            raise
        return self

    def _open(self) -> None:
        with _storage(self.run.path, "created"):
            self.run.path.mkdir(parents=True, exist_ok=True)
        if not self._borrowed:
            with _storage(self.run.path, "written"):
                self._lease.claim()
        try:
            with _storage(self.run.path, "written"):
                for leftover in self.run.path.glob("*.tmp"):
                    with suppress(FileNotFoundError):  # somebody who would like to have the lease comes and goes
                        if leftover.name.startswith("lease") and time.time() - leftover.stat().st_mtime < STALE_AFTER_S:
                            continue
                        leftover.unlink()
                self.run.reserve_path.write_bytes(os.urandom(RESERVE_BYTES))  # random: a compressing file system keeps room too
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
        """Raises LeaseLost if another process has taken this run over."""
        with _storage(self.run.lease_path, "read"):
            self._lease.check()

    def begin(self, *, step: int, steps: int, env: Mapping[str, Any], trunk: Run | None = None) -> None:
        """A new attempt, going on from `step`: counts it, appends `env["attempt"]` to the attempts in env.json beside its other
        keys, cuts metrics and timing back to lines before `step`: its own, or those of the `trunk` that it now leaves."""
        self.check()
        attempts = [*self.run.env().get("attempts", []), {"started_at": _now(), **env["attempt"]}]
        write_sealed(self.run.env_path, {**{k: v for k, v in env.items() if k != "attempt"}, "attempts": attempts})
        source = trunk or self.run
        if trunk is None:
            self._verify_metrics()
        timing, metrics = (_cut_back(path, step) for path in (source.timing_path, source.metrics_path))
        self._lines, self._bytes = hashlib.sha256(metrics), len(metrics)
        before = self.status
        self.status = replace(before, attempts=before.attempts + 1, started_at=before.started_at or _now(), steps=steps)
        self._synced()
        self.set_state("running", step)  # before the files: their longer state still begins with what it says of them
        for path, lines in ((self.run.timing_path, timing), (self.run.metrics_path, metrics)):
            if lines or path.exists():
                write_bytes(path, lines)

    def set_state(self, state: str, step: int, message: str = "", *, alone: bool = False) -> None:
        """Write the status; `alone` stays true once it was. Where the disk is full, the reserve makes room for it."""
        assert state in STATES
        self.check()
        self._last_status = time.monotonic()
        alone = alone or self.status.alone
        self.status = replace(self.status, state=state, step=step, message=message, updated_at=_now(), alone=alone)
        if state == "failed":
            self.run.reserve_path.unlink(missing_ok=True)
        write_sealed(self.run.status_path, asdict(self.status))

    def _verify_metrics(self) -> None:
        """Raises DataError if the lines that were forced to the disk are no longer the same."""
        path, n = self.run.metrics_path, self.status.metrics_bytes
        if n and _sha256((path.read_bytes() if path.exists() else b"")[:n]) != self.status.metrics_sha256:
            raise DataError(f"{path}: is damaged (its hash differs); {_START_AGAIN}.")

    def _synced(self) -> None:
        """From the next status on, the lines that are there now can be verified."""
        digest = self._lines.hexdigest() if self._bytes else ""
        self.status = replace(self.status, metrics_bytes=self._bytes, metrics_sha256=digest)

    def log(self, metrics: Mapping[str, Any], timing: Mapping[str, Any]) -> None:
        """Append one line to each file; both hold the step. The status follows at most every few seconds."""
        self.check()
        line = _append(self.run.metrics_path, metrics)
        self._lines.update(line)
        self._bytes += len(line)
        _append(self.run.timing_path, {**timing, TIME: _now()})
        if time.monotonic() - self._last_status > STATUS_INTERVAL_S:
            self.set_state("running", metrics[STEP])
        for listener in self.listeners:
            listener(metrics, timing)

    def sync(self) -> None:
        """Force the lines to the disk: before a checkpoint that relies on them."""
        with _storage(self.run.metrics_path, "written"):
            for path in (self.run.metrics_path, self.run.timing_path):
                with suppress(FileNotFoundError), path.open("ab") as f:
                    os.fsync(f.fileno())
        self._synced()

    def write_model(self, data: bytes) -> None:
        """Write model.safetensors; its hash goes into the result."""
        self.check()
        write_bytes(self.run.model_path, data)
        self._model_sha256 = _sha256(data)

    def finish(self, result: Result) -> None:
        """State done, then result.json; after it the checkpoints are of no more use, and their space is given back."""
        self.set_state("done", result.steps)
        model = {"model_sha256": self._model_sha256} if self._model_sha256 else {}
        write_sealed(self.run.result_path, {"schema": SCHEMA_VERSION, **asdict(result), **model})
        shutil.rmtree(self.run.checkpoints_path, ignore_errors=True)


# --- files ------------------------------------------------------------------------------------------------------------


def write_bytes(path: Path, data: bytes) -> None:
    """Replace `path` atomically and durably. Raises StorageError; the old content is then intact."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    with _storage(path, "written"):
        try:
            with temporary.open("wb") as f:
                f.write(data)
                f.flush()
                os.fsync(f.fileno())
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Replace `path` atomically by indented JSON."""
    write_bytes(path, (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode())


def write_sealed(path: Path, value: Mapping[str, Any]) -> None:
    """As `write_json`, with the object's SHA-256 in it as `seal`, which `read_json` verifies and takes away."""
    write_json(path, {**value, "seal": _seal(value)})


def _seal(value: Mapping[str, Any]) -> str:
    return _sha256(json.dumps(value, sort_keys=True).encode())


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def sync_folder(folder: Path) -> None:
    """Make renames in `folder` durable."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def _storage(path: Path, verb: str) -> Iterator[None]:
    """OSError → StorageError with one sentence that names the path."""
    try:
        yield
    except StorageError:
        raise
    except OSError as e:
        raise StorageError(f"{path}: cannot be {verb}: {e.strerror or e}.") from e


def read_json(path: Path, remedy: str) -> dict[str, Any]:
    """The object in a JSON file, its seal verified. Raises DataError naming the file, and `remedy`, if there is none."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError as e:
        raise DataError(f"{path}: is missing; {remedy}.") from e
    except OSError as e:
        raise DataError(f"{path}: cannot be read: {e.strerror}.") from e
    except ValueError as e:  # not JSON, or not UTF-8
        raise DataError(f"{path}: is damaged ({e}); {remedy}.") from e
    if not isinstance(value, dict):
        raise DataError(f"{path}: is damaged (holds no object); {remedy}.")
    seal = value.pop("seal", None)  # absent from files of earlier versions
    if seal is not None and seal != _seal(value):
        raise DataError(f"{path}: is damaged, or was edited (its hash differs); {remedy}.")
    return value


def _read_lines(path: Path, needs: str = STEP) -> list[dict[str, Any]]:
    return [v for _, v in _lines(path, path.read_bytes().split(b"\n"), needs)] if path.exists() else []


def _lines(path: Path, lines: list[bytes], needs: str = STEP) -> Iterator[tuple[bytes, dict[str, Any]]]:
    for i, line in enumerate(lines[:-1], start=1):  # what follows the last newline is a line that was never finished
        try:
            value = json.loads(line)
            value[needs]
        except (ValueError, KeyError, TypeError) as e:
            raise DataError(f"{path}: line {i} is damaged; {_START_AGAIN}.") from e
        yield line, value


def _last_line(path: Path) -> dict[str, Any]:
    """The last whole line, read from the end of the file."""
    with suppress(FileNotFoundError), path.open("rb") as f:
        end, room = f.seek(0, os.SEEK_END), 8192
        while True:
            f.seek(max(0, end - room))
            for line in reversed(f.read().split(b"\n")):
                with suppress(ValueError):
                    value = json.loads(line)
                    if isinstance(value, dict):
                        return value
            if room >= end:
                break
            room *= 8  # a model of many layers has long lines
    return {}


def _append(path: Path, value: Mapping[str, Any]) -> bytes:
    """Add one line in one write; the line."""
    line = json.dumps(value, ensure_ascii=False, allow_nan=False).encode() + b"\n"
    with _storage(path, "written"):
        fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            if os.write(fd, line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # the disk took a part
        finally:
            os.close(fd)
    return line


def _cut_back(path: Path, step: int) -> bytes:
    """The lines of earlier steps; the rest will be written again."""
    lines = path.read_bytes().split(b"\n") if path.exists() else []
    return b"".join(line + b"\n" for line, value in _lines(path, lines) if value[STEP] < step)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
