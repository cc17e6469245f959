"""The folder of runs: what a run writes, who may write it, and how it is read back.

    runs/<id>/  config.json    the resolved config and its schema version
                env.json       data hash, threads, and for each attempt: versions, machine, commit, command
                status.json    state, step, attempts, message, times
                metrics.jsonl  one line per log step; the same in every execution that computes the same bits
                timing.jsonl   one line per log step: tokens/s, step_time(ms), time
                checkpoints/   step-00000123/ (training/checkpoint.py)
                kept/          likewise, the steps that branches may start from
                model.safetensors
                result.json    written last: where it exists, the run is finished
                evaluations.jsonl  what `questctl eval` measured afterwards
                stopping.jsonl  what a sweep with [stop] forecast and decided, one line per look
                log.txt        what a run of a sweep printed besides: warnings, a traceback
                lease          which process may write (lease.py)
                reserve.tmp    while the run trains: space that is given up to record a failure on a full disk

    runs/archive.zip             finished runs in one file (archive.py, packing.py)
    runs/.index                  what lists show of finished runs: a cache (index.py)
    runs/<name>.imported.json    runs that were trained elsewhere (external.py): rows, their source and its hash

Only this package names these files. The files are the truth, and anything kept elsewhere is a cache. No reader ever sees half
of a file.

Every JSON file holds its own SHA-256. The hash of the weights is in the result and is verified when they are loaded. The hash
of the metric lines, as of their last sync, is in the status and is verified before a run resumes. When a run resumes, its lines
are cut back to the checkpoint, so that a run that was killed ends with the same `metrics.jsonl`, byte for byte, as an
undisturbed one. Speeds and times differ between executions and therefore have a file of their own.

States: pending → running → done | failed | diverged | preempted | stopped. A run whose process ended without recording a state
is `preempted`; a sweep with [stop] ends runs as `stopped`, with a checkpoint from which they may go on.

files.py: atomic and sealed files, JSON lines · lease.py: one writer per run · runs.py: Run, RunWriter, RunStore, Result ·
listing.py: lists, facts and removal of runs · index.py: the cache of lists · archive.py, packing.py: runs in one file ·
sync.py: copies by rsync · external.py: runs trained elsewhere, read from tables.
"""

from .archive import located
from .files import read_json, sync_folder, write_bytes, write_json, write_sealed
from .lease import Lease, LeaseHeld, LeaseLost, is_live
from .runs import (
    COLUMNS,
    RESERVE_BYTES,
    SCHEMA_VERSION,
    STATES,
    Result,
    Run,
    RunStore,
    RunWriter,
    Status,
    checkpoint_name,
    checkpoint_steps,
    default_root,
    describe,
    holds_runs,
    is_run_folder,
    load_runs,
    open_run,
    runs_in,
)

__all__ = [
    "COLUMNS",
    "RESERVE_BYTES",
    "SCHEMA_VERSION",
    "STATES",
    "Lease",
    "LeaseHeld",
    "LeaseLost",
    "Result",
    "Run",
    "RunStore",
    "RunWriter",
    "Status",
    "checkpoint_name",
    "checkpoint_steps",
    "default_root",
    "describe",
    "holds_runs",
    "is_live",
    "is_run_folder",
    "load_runs",
    "located",
    "open_run",
    "read_json",
    "runs_in",
    "sync_folder",
    "write_bytes",
    "write_json",
    "write_sealed",
]
