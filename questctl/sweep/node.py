"""One node's part in a cell of several nodes; srun (worker.py) and Ray (launchers/ray.py) start it on each of them.

    python -m questctl.sweep.node FOLDER RUN        MASTER_ADDR, MASTER_PORT; NODE_RANK, or SLURM_NODEID

FOLDER is that of the sweep, whose manifest says how many processes the cell takes. Node 0 claims the run and writes its folder.
The others only train; if one of their ranks is lost they end with LOST, so that srun ends the whole step.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from ..errors import QuestError, RankLost
from ..system import STOP_SIGNALS, cpu_count, wait_passively, watched_signals
from ..training.group import Rendezvous, free_port
from .attempt import LOST, TRAINER, Ranks, begin, follow_parent
from .manifest import open_sweep
from .slots import Slot, useful_threads
from .sweep_file import Cell


def _environment() -> dict[str, str]:
    """Environment variables, for the processes of all nodes, by which the ranks of a cell meet on this node, its first."""
    return {"MASTER_ADDR": os.environ.get("SLURMD_NODENAME") or socket.gethostname(), "MASTER_PORT": str(free_port())}


def command(folder: Path, run_id: str, nodes: int) -> list[str]:
    """The command that runs this module on each node of the SLURM job in which it is called."""
    cpus = os.environ.get("SLURM_CPUS_PER_TASK")
    options = [f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1", "--kill-on-bad-exit=1"]
    options += [f"--cpus-per-task={cpus}"] if cpus else []
    return ["srun", *options, sys.executable, "-m", "questctl.sweep.node", str(folder), run_id]


def nodes_of_job() -> int:
    """The nodes of the SLURM job that this process is in; 1 outside."""
    return int(os.environ.get("SLURM_JOB_NUM_NODES") or 1)


class Step:
    """An srun that trains one cell on all nodes of this SLURM job, with the methods of a process that a worker uses."""

    def __init__(self, folder: Path, cell: Cell) -> None:
        self._process = subprocess.Popen(
            command(folder, cell.run_id, cell.nodes),
            env={**os.environ, **_environment()},
            stdin=subprocess.PIPE,  # its tasks end with this process
            start_new_session=True,
            preexec_fn=lambda: signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS),  # noqa: PLW1509 (one thread)
        )
        self.sentinel = os.pidfd_open(self._process.pid)

    def is_alive(self) -> bool:
        """Whether it still runs."""
        return self._process.poll() is None

    def terminate(self) -> None:
        """Let it checkpoint and end: srun passes the signal on."""
        self._process.terminate()

    @property
    def exitcode(self) -> int | None:
        """The exit code as of a child process; also closes the descriptor."""
        code = self._process.poll()
        if code is not None and self.sentinel >= 0:
            os.close(self.sentinel)
            self.sentinel = -1
        return code


def train_part(folder: str | Path, run_id: str, variables: Mapping[str, str], trainer: str = TRAINER, cpus: int = 0) -> None:
    """Train this node's part of a cell of the sweep in `folder`, on `cpus` CPUs (0: those of the machine).

    It ends the process with attempt.LOST after the loss of a rank, and with attempt.HELD if another process has the run.
    """
    wait_passively()
    sweep = open_sweep(folder)
    cell = next(cell for cell in sweep.cells if cell.run_id == run_id)
    node = int(variables.get("NODE_RANK") or variables["SLURM_NODEID"])
    meeting = Rendezvous(variables["MASTER_ADDR"], int(variables["MASTER_PORT"]), cell.nodes, node)
    run, count = sweep.store.run(run_id), cell.nproc // cell.nodes
    cpus = max(1, (cpus or cpu_count()) // count)
    if node == 0:
        begin(cell.config, run, 0, Slot(cpus=cpus), trainer, nproc=count, rendezvous=meeting)
        return
    for s in watched_signals():
        signal.signal(s, signal.SIG_DFL)
    threads = useful_threads(cell.config, cpus)
    config = cell.config.model_copy(update={"train": cell.config.train.model_copy(update={"threads": threads})})
    ranks = Ranks(config, run, None, trainer, count, meeting)
    follow_parent()
    try:
        ranks.train()
    except RankLost as e:
        print(e, file=sys.stderr)
        sys.exit(LOST)
    except QuestError as e:
        print(e, file=sys.stderr)  # all ranks raise the same error, and node 0 records it
    finally:
        ranks.close()


if __name__ == "__main__":
    train_part(sys.argv[1], sys.argv[2], os.environ)
