"""`--nproc N`: run this command again in N processes on this machine, with the environment that torchrun would give them.

torchrun itself does not do, for three reasons. It always ends with exit code 1 when a process fails, where a preempted run must
end with 75 and a diverged one with 4. It passes Ctrl-C on a second time, which would end a run without its checkpoint. And it
imports torch once more. The output of rank 0 is shown; that of another rank only if that rank fails first.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from types import FrameType

from .. import console
from ..system import cpu_count, watched_signals

GRACE_S = 20.0  # time for the other processes to end after the first one has ended


def run_processes(count: int, arguments: Sequence[str]) -> int:
    """Run `questctl ARGUMENTS…` in `count` processes; returns the exit code of rank 0, or of a rank that failed before it."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    shared |= {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or str(max(1, cpu_count() // count))}
    command = [sys.executable, "-c", "from questctl.cli.app import main; main()", *arguments]
    with tempfile.TemporaryFile() as output:
        children = [
            subprocess.Popen(
                command,
                env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                start_new_session=True,
                stdout=output if rank else None,
                stderr=output if rank else None,
            )
            for rank in range(count)
        ]
        before = {number: signal.signal(number, _forward(children)) for number in watched_signals()}
        try:
            first = _first_to_end(children)
            code = _end(children, first)
        finally:
            for number, previous in before.items():
                signal.signal(number, previous)
            for child in children:
                child.kill()
        ended = children[first].returncode
        if ended and (first or ended < 0):  # rank 0 has reported its own errors
            output.seek(0)
            how = f"ended with {ended}" if ended >= 0 else f"was killed by {signal.Signals(-ended).name}"
            console.error(f"process {first} of {count} {how}. " + output.read().decode(errors="replace")[-2000:].strip())
    return code


def _forward(children: Sequence[subprocess.Popen[bytes]]) -> Callable[[int, FrameType | None], None]:
    def handler(number: int, frame: FrameType | None) -> None:
        for child in children:
            child.send_signal(number)

    return handler


def _first_to_end(children: Sequence[subprocess.Popen[bytes]]) -> int:
    """Wait until rank 0 ends or another rank fails; returns that rank."""
    while True:
        for rank, child in enumerate(children):
            code = child.poll()
            if code is not None and (code or not rank):
                return rank
        time.sleep(0.05)


def _end(children: Sequence[subprocess.Popen[bytes]], first: int) -> int:
    """Give the other ranks time to end, because rank 0 may still say why; returns the exit code as a shell would give it."""
    deadline = time.monotonic() + GRACE_S
    while time.monotonic() < deadline and any(child.poll() is None for child in children):
        time.sleep(0.05)
    for child in children:
        child.kill()
        child.wait()
    own = children[0].returncode
    code = own if own not in (0, -signal.SIGKILL) else children[first].returncode
    return code if code >= 0 else 128 - code
