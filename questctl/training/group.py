"""The group of processes that train one run: the environment of each, who watches them, and how they end together.

    rank = node · n + local rank,  n processes on a node     RANK, WORLD_SIZE, LOCAL_RANK, …, MASTER_ADDR, MASTER_PORT

The variables are those of torchrun. torchrun itself is not used, for three reasons. When a process fails it always ends with
exit code 1, but a preempted run must end with 75 and a diverged one with 4. It passes Ctrl-C on a second time, which would end
a run without its checkpoint. And it imports torch once more.

The first process that fails ends the group: the others, which would wait for it, have a moment to say why, and are killed.
The process that started a group holds a pipe open that every member reads. When the pipe closes, the members know that nobody
watches them any more.

A group is started in one of two ways. `run_command` starts interpreters, for the command line. sweep/attempt.py forks, which
takes 20 ms, whereas a new interpreter needs 2 s to import torch.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Protocol

from ..system import cpu_count, watched_signals

GRACE_S = 20.0  # time for the other processes to end after the first one has ended
LOST_GRACE_S = 2.0  # the same if the first one was killed: the others cannot go on without it
ORPHAN_S = 300.0  # for a checkpoint of a process that nobody watches any more
PYTHON = "from questctl.training.group import follow; follow(0); from questctl.cli.app import main; main()"


@dataclass(frozen=True)
class Rendezvous:
    """The address where the processes of a run meet, and the number of this node among its nodes."""

    address: str
    port: int
    nodes: int = 1
    node: int = 0

    @classmethod
    def here(cls) -> Rendezvous:
        """A free port of this machine, for processes that are all here."""
        return cls("127.0.0.1", free_port("127.0.0.1"))

    def environments(self, count: int) -> list[dict[str, str]]:
        """The variables of each of the `count` processes on this node."""
        shared = {"MASTER_ADDR": self.address, "MASTER_PORT": str(self.port), "WORLD_SIZE": str(count * self.nodes)}
        shared |= {"LOCAL_WORLD_SIZE": str(count), "GROUP_RANK": str(self.node)}
        return [{**shared, "RANK": str(self.node * count + i), "LOCAL_RANK": str(i)} for i in range(count)]


def free_port(address: str = "") -> int:
    """A port that no process listens on now."""
    with socket.socket() as s:
        s.bind((address, 0))
        port: int = s.getsockname()[1]
        return port


class Member(Protocol):
    """A process of a group: what `subprocess.Popen` and `sweep.attempt.Forked` have in common."""

    def poll(self) -> int | None:
        """Its exit code, negative for a signal; None while it runs."""

    def send_signal(self, sig: int, /) -> None:
        """Send a signal, if it still runs."""

    def kill(self) -> None:
        """Send SIGKILL, if it still runs."""

    def wait(self) -> object:
        """Wait for its end."""


def watch(members: Sequence[Member]) -> int:
    """Wait until rank 0 here ends or another member fails; then end the rest. Returns the number of the one that ended."""
    first = _first_to_end(members)
    code = members[first].poll() or 0
    deadline = time.monotonic() + (LOST_GRACE_S if code < 0 else GRACE_S)
    while time.monotonic() < deadline and any(member.poll() is None for member in members):
        time.sleep(0.05)
    end(members)
    return first


def end(members: Sequence[Member]) -> None:
    """Kill the members that still run, and wait for their end."""
    for member in members:
        member.kill()
    for member in members:
        member.wait()


def _first_to_end(members: Sequence[Member]) -> int:
    while True:
        for number, member in enumerate(members):
            code = member.poll()
            if code is not None and (code or not number):
                return number
        time.sleep(0.05)


@contextmanager
def forwarding(members: Sequence[Member], then: Callable[[], object] = lambda: None) -> Iterator[None]:
    """Within a `with` block, pass signals to stop on to all members, after a call of `then`."""

    def handler(number: int, frame: FrameType | None) -> None:
        then()
        for member in members:
            member.send_signal(number)

    before = {number: signal.signal(number, handler) for number in watched_signals()}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


def follow(pipe: int, grace_s: float = ORPHAN_S) -> None:
    """From now on, end this process when the other end of `pipe` is closed; nothing is ever written into it.

    SIGTERM lets it write a checkpoint, for which it has `grace_s` seconds: a process of a group may wait for one that is gone.
    With 0 it is killed at once.
    """

    def wait() -> None:
        os.read(pipe, 1)
        if grace_s:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(grace_s)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=wait, daemon=True).start()


def in_words(code: int) -> str:
    """How a process ended, by its exit code."""
    return f"ended with {code}" if code >= 0 else f"was killed by {signal.Signals(-code).name}"


def run_command(count: int, arguments: Sequence[str]) -> tuple[int, str]:
    """Run `questctl ARGUMENTS…` in `count` processes of this machine, and show the output of rank 0.

    Returns the exit code, as a shell would give it, of rank 0 or of a rank that failed before it; and a message about that
    rank, which is empty if rank 0 has reported the error itself.
    """
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, cpu_count() // count))
    with tempfile.TemporaryFile() as output:
        children = [
            subprocess.Popen(
                [sys.executable, "-c", PYTHON, *arguments],
                env={**os.environ, **variables, "OMP_NUM_THREADS": threads},
                start_new_session=True,
                stdin=subprocess.PIPE,  # the pipe that it follows
                stdout=output if rank else None,
                stderr=output if rank else None,
            )
            for rank, variables in enumerate(Rendezvous.here().environments(count))
        ]
        try:
            with forwarding(children):
                first = watch(children)
        finally:
            end(children)
        own, code = children[0].returncode, children[first].returncode
        reason = ""
        if code and (first or code < 0):
            output.seek(0)
            tail = output.read().decode(errors="replace")[-2000:].strip()
            reason = f"process {first} of {count} {in_words(code)}. {tail}"
        code = own if own not in (0, -signal.SIGKILL) else code
        return (code if code >= 0 else 128 - code), reason
