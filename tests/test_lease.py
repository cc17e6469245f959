"""The lease: one holder, one successor per holder, and a holder that came back too late stops."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import asdict
from datetime import UTC, datetime

import pytest

from questctl.store.lease import Holder, Lease, LeaseHeld, LeaseLost, _start_of, is_live, read_holder

HOLD = """
import sys, time
from pathlib import Path
from questctl.store.lease import Lease
Lease(Path(sys.argv[1])).claim()
print("held", flush=True)
time.sleep(60)
"""


def hold_elsewhere(path):
    child = subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "held\n"
    return child


def age(path, seconds):
    os.utime(path, (time.time() - seconds,) * 2)


def test_one_holder_at_a_time(tmp_path):
    path = tmp_path / "lease"
    with Lease(path) as lease:
        lease.check()
        assert is_live(path)
        with pytest.raises(LeaseHeld, match=f"process {os.getpid()} on .* is working on this run"):
            Lease(path).claim()
    assert not path.exists()
    assert not is_live(path)
    assert list(tmp_path.iterdir()) == []


def test_sigkilled_holder_is_succeeded_at_once_and_a_live_one_is_not(tmp_path):
    path = tmp_path / "lease"
    child = hold_elsewhere(path)
    with pytest.raises(LeaseHeld, match=f"process {child.pid} "):
        Lease(path).claim()
    child.kill()
    while _start_of(child.pid) is not None:  # a zombie counts as dead: nobody has waited for it here
        time.sleep(0.01)
    assert not is_live(path)
    with Lease(path) as lease:
        lease.check()
    child.wait()
    assert list(tmp_path.iterdir()) == []


def test_stopped_holder_loses_the_lease_and_learns_it(tmp_path):
    path = tmp_path / "lease"
    slow = Lease(path, stale_after=3600).claim()
    age(path, 100)
    fast = Lease(path, stale_after=60).claim()
    fast.check()
    with pytest.raises(LeaseLost, match="took this run over"):
        slow.check()
    slow.release()  # must not remove its successor's
    fast.check()
    fast.release()


def test_another_machine_counts_only_by_age(tmp_path):
    path = tmp_path / "lease"
    path.write_text('{"token": "t", "host": "node7", "machine": "node7 boot pid", "pid": 1, "started": "5"}')
    assert is_live(path)
    with pytest.raises(LeaseHeld, match="process 1 on node7"):
        Lease(path).claim()
    age(path, 61)
    assert not is_live(path)
    with Lease(path) as lease:
        assert read_holder(path) == lease.holder


def test_a_reused_pid_is_not_the_holder(tmp_path):
    me = Holder.me()
    assert not me.is_dead()
    assert Holder(me.token, me.host, me.machine, me.pid, "another start").is_dead()


@pytest.mark.parametrize("content", ["", "{", '{"pid": 1}', "[]"])
def test_unreadable_lease_counts_only_by_age(tmp_path, content):
    path = tmp_path / "lease"
    path.write_text(content)
    with pytest.raises(LeaseHeld):
        Lease(path).claim()
    age(path, 61)
    Lease(path).claim().release()


def race(path, contenders, stale_after=60.0):
    """Let many claim at once; how many believe that they hold it after all have tried."""
    start, leases = threading.Barrier(contenders), [Lease(path, stale_after=stale_after) for _ in range(contenders)]
    won = []

    def claim(lease):
        start.wait()
        with suppress(LeaseHeld):
            won.append(lease.claim())

    threads = [threading.Thread(target=claim, args=(lease,)) for lease in leases]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    return won


def test_race_for_a_free_lease_has_one_winner(tmp_path):
    for i in range(20):
        won = race(tmp_path / f"lease{i}", 8)
        assert len(won) == 1
        won[0].check()


def test_race_to_take_over_has_one_winner(tmp_path):
    for i in range(20):
        path = tmp_path / f"lease{i}"
        Lease(path, stale_after=3600).claim()
        age(path, 1000)
        won = race(path, 8)
        assert len(won) == 1
        won[0].check()
        assert not list(tmp_path.glob("*.after.*"))


def test_successor_that_died_in_the_takeover_is_succeeded(tmp_path, monkeypatch):
    path = tmp_path / "lease"
    Lease(path, stale_after=3600).claim()
    age(path, 1000)
    with monkeypatch.context() as m:
        m.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            Lease(path).claim()
    (marker,) = tmp_path.glob("lease.after.*")
    with pytest.raises(LeaseHeld):  # its process lives: it may still be at work
        Lease(path).claim()
    age(marker, 1000)
    with Lease(path) as lease:
        lease.check()
    assert list(tmp_path.iterdir()) == []


def test_heartbeat_keeps_it_alive(tmp_path):
    path = tmp_path / "lease"
    with Lease(path, stale_after=0.4):
        for _ in range(6):
            time.sleep(0.2)
            with pytest.raises(LeaseHeld):
                Lease(path, stale_after=0.4).claim()


def test_a_holder_that_was_succeeded_renews_its_own_file_alone(tmp_path):
    path = tmp_path / "lease"
    slow = Lease(path, stale_after=0.2).claim()
    os.utime(path, (0, 0))
    fast = Lease(path, stale_after=3600)
    while True:  # the heartbeat of the slow one may come first
        try:
            fast.claim()
            break
        except LeaseHeld:
            os.utime(path, (0, 0))
    os.utime(path, (1000, 1000))
    time.sleep(0.3)
    assert path.stat().st_mtime == 1000
    slow.release()
    assert fast.is_mine()
    fast.release()
    assert not path.exists()


def test_a_released_lease_leaves_no_open_file(tmp_path):
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        Lease(tmp_path / "lease").claim().release()
    assert len(os.listdir("/proc/self/fd")) == before


def test_sigstopped_holder(tmp_path):
    path = tmp_path / "lease"
    child = hold_elsewhere(path)
    os.kill(child.pid, signal.SIGSTOP)
    try:
        age(path, 61)
        with Lease(path) as lease:
            os.kill(child.pid, signal.SIGCONT)
            lease.check()
    finally:
        child.kill()
        child.wait()


def test_without_hard_links(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError(errno.EPERM, "Operation not permitted")))
    won = race(tmp_path / "lease", 8)
    assert len(won) == 1
    won[0].check()


def test_a_folder_that_is_full(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        Lease(tmp_path / "lease").claim()
    assert list(tmp_path.iterdir()) == []


def test_the_holder_on_another_machine_is_named_with_the_times_that_are_known(tmp_path):
    path = tmp_path / "a-run" / "lease"
    path.parent.mkdir()
    holder = Holder("0123", "node7", "node7 another-boot", 4321, "99", "2026-11-30T04:13:17+00:00")
    path.write_text(json.dumps(asdict(holder)))
    beat = time.time() - 20
    os.utime(path, (beat, beat))
    with pytest.raises(LeaseHeld) as e:
        Lease(path).claim()
    until = datetime.fromtimestamp(beat + 60, UTC)
    assert re.fullmatch(
        f"{path.parent}: process 4321 on node7 is working on this run since 2026-11-30 04:13 UTC; its last sign of life is "
        rf"(20|21|22) s old, and without another until {until:%H:%M:%S} UTC the run is free. Wait for it, or stop it first\.",
        str(e.value),
    )


def test_a_lease_of_an_earlier_version_has_no_beginning(tmp_path):
    path = tmp_path / "lease"
    record = {k: v for k, v in asdict(Holder.me()).items() if k != "since"}
    path.write_text(json.dumps(record))
    with pytest.raises(LeaseHeld, match=f"process {os.getpid()} on .* is working on this run; wait for it, or stop it first"):
        Lease(path).claim()
