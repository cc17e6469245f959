"""Groups of processes end as one: by the first that fails, by a signal, and with whoever watches them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from helpers import until

from questctl.training import group
from questctl.training.group import Rendezvous, end, forwarding, run_command, watch

SLEEP = "import time; time.sleep(60)"


def start(*programs: str) -> list[subprocess.Popen]:
    return [subprocess.Popen([sys.executable, "-S", "-c", program], stdin=subprocess.PIPE) for program in programs]


@pytest.fixture(autouse=True)
def short_grace(monkeypatch):
    monkeypatch.setattr(group, "GRACE_S", 0.3)
    monkeypatch.setattr(group, "LOST_GRACE_S", 0.1)


def test_the_variables_are_those_of_torchrun():
    first, second = (Rendezvous("10.0.0.1", 29500, 2, node).environments(2) for node in range(2))
    assert [(v["RANK"], v["LOCAL_RANK"], v["GROUP_RANK"]) for v in (*first, *second)] == [
        ("0", "0", "0"),
        ("1", "1", "0"),
        ("2", "0", "1"),
        ("3", "1", "1"),
    ]
    shared = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}
    assert all(shared.items() <= variables.items() for variables in (*first, *second))


@pytest.mark.parametrize(
    ("programs", "first", "codes"),
    [
        ((SLEEP, "raise SystemExit(4)"), 1, [-signal.SIGKILL, 4]),
        (("pass", SLEEP), 0, [0, -signal.SIGKILL]),
        (("import time; time.sleep(0.2)", "pass"), 0, [0, 0]),
        ((SLEEP, "import os; os.kill(os.getpid(), 9)", SLEEP), 1, [-signal.SIGKILL] * 3),
    ],
)
def test_the_first_that_fails_or_rank_0_ends_the_group(programs, first, codes):
    members = start(*programs)
    assert watch(members) == first
    assert [member.poll() for member in members] == codes


def test_a_signal_reaches_all_members():
    members, told = start(SLEEP, SLEEP), []
    with forwarding(members, lambda: told.append(1)):
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
        watch(members)
    assert told
    assert [member.poll() for member in members] == [-signal.SIGTERM] * 2
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.parametrize(("grace", "code"), [("0", -signal.SIGKILL), ("5", 75), ("0.2", -signal.SIGKILL)])
def test_a_process_follows_whoever_holds_its_pipe(grace, code):
    """At once; with time for a checkpoint; or killed when it takes too long."""
    answer = "sys.exit(75)" if code == 75 else "None"
    program = f"""
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: {answer})
from questctl.training.group import follow
follow(0, {grace})
print("follows", flush=True)
while True: time.sleep(1)
"""
    words = [sys.executable, "-c", program]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"follows\n"
        assert process.poll() is None
        process.stdin.close()
        until(lambda: process.poll() is not None)
        assert process.returncode == code


@pytest.mark.parametrize(
    ("program", "code", "said"),
    [
        ("print('rank', os.environ['RANK'])", 0, ""),
        ("sys.exit(4 if os.environ['RANK'] == '0' else 0)", 4, ""),
        ("os.environ['RANK'] == '1' and sys.exit('no such device'); time.sleep(60)", 1, "process 1 of 2 ended with 1. no such"),
        ("os.environ['RANK'] == '1' and os.kill(os.getpid(), 9); time.sleep(60)", 137, "process 1 of 2 was killed by SIGKILL."),
        (
            "os.kill(os.getpid(), 9) if os.environ['RANK'] == '0' else time.sleep(60)",
            137,
            "process 0 of 2 was killed by SIGKILL.",
        ),
    ],
)
def test_a_command_in_several_processes_ends_as_its_first_rank(monkeypatch, capfd, program, code, said):
    monkeypatch.setattr(group, "PYTHON", f"import os, sys, time; {program}")
    begin = time.monotonic()
    got, told = run_command(2, ["ignored"])
    assert (got, told[: len(said)]) == (code, said)
    assert capfd.readouterr().out == ("rank 0\n" if "print" in program else "")
    assert time.monotonic() - begin < 50


def test_nothing_is_left_when_a_group_is_ended():
    members = start(SLEEP, "pass")
    end(members)
    assert all(member.returncode is not None for member in members)
