"""Tables on terminals of any width: no number and no name is broken, nothing is lost; off a terminal they are complete."""

from __future__ import annotations

import fcntl
import io
import logging
import math
import os
import pty
import re
import struct
import subprocess
import sys
import termios

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from questctl import console
from questctl.console import tables

NAME = "30M-quest-w4a4-98.4x-s0-b259d6f8"
LONG = "107K-lloyd3-h64-rms-trust+int8-h64-absmax-ste-20x-s0-1f2e3d4c"
HEALTH = (
    ("run", "state", "step", "spike", "jump"),
    [(NAME, "preempted", 1234567, 0.1235, 3.25), (LONG, "done", 12, 1.5, None)],
)
BENCH = (
    ("op", "shape", "implementation", "µs", "p20–p80", "speed-up", "p20–p80", "GB/s"),
    [
        (
            "packed-gemm",
            "M=1 N=2048 K=2048 bits=4",
            "triton split-k *",
            "1,474.4",
            "1,470.1–1,490.2",
            "1.23",
            "1.21–1.24",
            "12.3",
        ),
        ("", "", "torch", "2,474.4", "2,470.1–2,490.2", None, None, "7.4"),
    ],
)


class Terminal(io.StringIO):
    """A stream that says it is one."""

    def isatty(self) -> bool:
        return True


def shown(width: int | None, *args, monkeypatch: pytest.MonkeyPatch, **more) -> tuple[str, str]:
    """What `print_table` writes to stdout (without styles) and stderr, on a terminal of this width or off one."""
    out, err = (io.StringIO() if width is None else Terminal()), io.StringIO()
    monkeypatch.setenv("COLUMNS", str(width or 33))
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    console.print_table(*args, **more)
    monkeypatch.undo()
    return re.sub(r"\x1b\[[0-9;]*m", "", out.getvalue()), err.getvalue()


def words(rows) -> list[str]:
    return [word for row in rows for cell in row for word in console.number(cell).split() if cell]


@pytest.mark.parametrize("width", [200, 100, 80, 60, 40, 20])
def test_numbers_and_names_stay_whole_and_lines_within_the_width(width, monkeypatch):
    for (columns, rows), left in ((HEALTH, 2), (BENCH, 3)):
        text, err = shown(width, columns, rows, left=left, monkeypatch=monkeypatch)
        for word in words(rows):
            assert re.search(rf"(?<![^\s]){re.escape(word)}(?![^\s])", text), (word, text)
        for line in text.splitlines():  # what is longer is the names of a row, or one value with its header
            assert len(line) <= width or not line.startswith("    ") or len(line.split()) == 2, line
        assert err == ""


def test_spare_columns_go_first_and_are_named(monkeypatch):
    text, err = shown(80, *BENCH, left=3, optional=("p20–p80", "GB/s"), monkeypatch=monkeypatch)
    header = text.splitlines()[0]
    assert "speed-up" in header
    assert "p20–p80" not in header
    assert "GB/s" in header
    assert err == "left out at this width: p20–p80; a wider terminal, a pipe or --json has them\n"
    wide, err = shown(200, *BENCH, left=3, optional=("p20–p80", "GB/s"), monkeypatch=monkeypatch)
    assert wide.splitlines()[0].count("p20–p80") == 2
    assert err == ""


def test_a_row_that_fits_no_table_is_a_paragraph(monkeypatch):
    text, _ = shown(60, *HEALTH, left=2, monkeypatch=monkeypatch)
    assert text.splitlines() == [
        f"{NAME}  preempted",
        "    step 1,234,567  spike 0.1235  jump 3.2500",
        f"{LONG}  done",
        "    step 12  spike 1.5000  jump –",
    ]
    facts = [("folder", "/a/long/path" * 10), ("scheme", "some words that could be broken between them")]
    text, _ = shown(60, ("run", "x"), facts, left=2, monkeypatch=monkeypatch)
    assert f"folder  {'/a/long/path' * 10}\n" in text


def test_sentences_wrap_between_words(monkeypatch):
    facts = [("scheme", "weights int4-h128-rms-trust, activations int4-h128-rms-trust, and more"), ("folder", f"runs/{NAME}")]
    text, _ = shown(50, ("run", "x"), facts, left=2, monkeypatch=monkeypatch)
    assert max(map(len, text.splitlines())) <= 50
    assert f"runs/{NAME}" in text
    assert " ".join(line.removeprefix("scheme").strip() for line in text.splitlines()[2:-1]) == facts[0][1]


def test_off_a_terminal_a_table_is_whole_and_the_same_whatever_columns_says(monkeypatch):
    rows = [(NAME, "x" * 150, "a sentence of many words " * 10, 1.5)]
    text, err = shown(None, ("run", "word", "sentence", "loss"), rows, left=3, optional=("loss",), monkeypatch=monkeypatch)
    assert text.splitlines()[2].rstrip() == f"{NAME}   {'x' * 150}   {rows[0][2].ljust(250)}   1.5000"
    assert err == ""


@pytest.mark.parametrize("width", [120, 80, 60, 45])
def test_a_live_table_cuts_names_alone_and_keeps_their_ends(width, monkeypatch):
    err = Terminal()
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", err)
    live = console.LiveTable(("run", "state", "step", "loss", "tok/s"), left=2, optional=("tok/s",))
    live.update([(NAME, "running", "12/11444", 3.3377, 14606), (LONG, "done", "11444/11444", 2.1663, None)], "a sweep")
    live.close()
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", err.getvalue())
    for word in ("running", "12/11444", "3.3377", "done", "11444/11444", "2.1663"):
        assert word in text.split()
    assert f"{NAME[-8:]} " in text
    assert f"{LONG[-8:]} " in text
    assert max(map(len, text.replace("\r", "\n").splitlines())) <= width


def test_a_real_terminal_of_eighty_columns(tmp_path):
    """Through a pseudo-terminal, whose width is its own."""
    code = f"from questctl import console; console.print_table({HEALTH[0]!r}, {HEALTH[1]!r}, left=2)"
    main, end = pty.openpty()
    fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    env = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "LINES")} | {"TERM": "xterm"}
    subprocess.run([sys.executable, "-c", code], stdout=end, stdin=end, env=env, check=True, timeout=60)
    text = os.read(main, 65536).decode().replace("\r", "")
    assert text.splitlines()[0] == f"{NAME}  preempted"
    assert "step 1,234,567  spike 0.1235" in text


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.text("ab- ", max_size=30), st.floats(allow_nan=False), st.integers()), min_size=1, max_size=3),
    st.integers(8, 120),
)
def test_every_cell_is_found_again_at_any_width(rows, width):
    with pytest.MonkeyPatch.context() as monkeypatch:
        text, _ = shown(width, ("a name", "b", "two words"), rows, monkeypatch=monkeypatch)
    for word in words([(float(x), n) for _, x, n in rows]):
        assert word in text.split(), (word, text)


@pytest.mark.parametrize(
    ("cell", "text"),
    [
        (None, "–"),
        (float("nan"), "–"),
        (True, "yes"),
        (12345, "12,345"),
        (2.16634, "2.1663"),
        (12.34567, "12.35"),
        (123.4567, "123.5"),
        (34290.4, "34,290"),
        (9.9e6, "9,900,000"),
        (2.5e7, "2.5e+07"),
        (0.001234567, "0.001235"),
        ("word", "word"),
    ],
)
def test_numbers_have_the_digits_that_mean_something(cell, text):
    assert console.number(cell) == text


@pytest.mark.parametrize(("value", "text"), [(None, None), (0.98765, "0.988"), (12.345, "12.3"), (1234.5, "1,234")])
def test_rough_numbers_have_three(value, text):
    assert console.rough(value) == text


def test_the_log_of_the_package_is_shown_on_stderr_with_its_labels(capsys):
    logger = logging.getLogger("questctl.sweep.run")
    console.show_log()
    console.show_log()  # a second call adds no second handler
    logger.info("%d cells are tried again", 3)
    logger.warning("too often")
    logger.error("in vain")
    logger.debug("not shown")
    assert capsys.readouterr().err.splitlines() == ["3 cells are tried again", "warning: too often", "error: in vain"]


@pytest.mark.parametrize(
    ("low", "high", "text"),
    [
        (340, 530, "5 to 9 minutes"),
        (360, 540, "6 to 9 minutes"),
        (361, 541, "6 to 10 minutes"),
        (18.2, 49, "18 to 50 seconds"),
        (50, 200, "50 seconds to 4 minutes"),
        (0.2, 0.7, "0 to 1 second"),
        (0.2, 300, "up to 5 minutes"),
        (60, 60, "about 60 seconds"),
        (120, 120, "about 2 minutes"),
        (5300, 5500, "85 minutes to 2 hours"),
        (163_000, 164_000, "45 to 50 hours"),
        (5e5, 9e6, "5 to 110 days"),
        (8e7, 9e7, "920 days to 3 years"),
        (6.6e10, 7.5e10, "2,000 to 2,400 years"),
        (1e6, 1e99, "11 days to 1,000,000 years"),
        (1e99, math.inf, "over a million years"),
    ],
)
def test_ranges_of_time_are_rounded_away_from_each_other(low, high, text):
    assert console.duration_range(low, high) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0s"),
        (95, "1m35s"),
        (3599.7, "1h00m"),
        (5400, "1h30m"),
        (47 * 3600 + 59 * 60, "47h59m"),
        (541_800, "6d06h"),
        (86_399_999, "999d23h"),
        (1.2e8, "3.8 years"),
        (75_306_988_560, "2,386 years"),  # was 20918608h56m
        (1e30, "over a million years"),
        (math.inf, "over a million years"),
        (math.nan, "unknown"),
    ],
)
def test_durations_of_any_length_are_read_at_a_glance(seconds, text):
    assert console.duration(seconds) == text


TEXT = (
    "warning: a sentence that is longer than the terminal is wide, with 2.01 ± 0.02 nats/token and 95 % of the runs, "
    "about 53K-quest-w4a4-20x-s0-b259d6f8 in runs/53K-quest-w4a4-20x-s0-b259d6f8"
)


@pytest.mark.parametrize("width", [40, 80, 120])
@pytest.mark.parametrize("show", [console.say, console.note])
def test_prose_breaks_between_words(width, show, monkeypatch):
    streams = {name: Terminal() for name in ("stdout", "stderr")}
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("TERM", "xterm")
    for name, stream in streams.items():
        monkeypatch.setattr(sys, name, stream)
    show(f"* {TEXT}")
    console.warn(TEXT.removeprefix("warning: "))
    monkeypatch.undo()
    lines = (streams["stdout"].getvalue() + streams["stderr"].getvalue()).splitlines()
    texts = [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in lines]
    assert max(map(len, texts)) <= max(width, 2 + len("runs/53K-quest-w4a4-20x-s0-b259d6f8"))
    split = next(i for i, text in enumerate(texts) if text.startswith("warning:"))
    assert " ".join(text.strip() for text in texts[:split]) == f"* {TEXT}"
    assert {text[:2] for text in texts[1:split]} == {"  "}
    assert " ".join(texts[split:]) == TEXT
    assert not any(text.endswith(("95", "2.01", "±")) for text in texts)


def test_off_a_terminal_a_sentence_is_one_line(capsys):
    console.say(TEXT)
    console.warn(TEXT)
    out, err = capsys.readouterr()
    assert (out, err) == (TEXT + "\n", f"warning: {TEXT}\n")


@pytest.mark.parametrize(("width", "bar"), [(120, True), (80, False), (60, False), (40, False)])
def test_the_line_of_progress_fits_and_keeps_step_and_remaining_time(width, bar, monkeypatch):
    err = Terminal()
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", err)
    with console.TrainProgress(NAME) as progress:
        progress(step=12, steps=11444, loss=3.33771, tokens_per_s=14606.2, eta_s=math.nan)
        progress(step=24, steps=11444, loss=3.30001, tokens_per_s=14606.2, eta_s=5400)
    monkeypatch.undo()
    lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", err.getvalue()).replace("\r", "\n").splitlines()
    assert max(map(len, lines)) <= width
    last = [line for line in lines if line.strip()][-1]
    assert "step 24/11444" in last
    assert last.rstrip().endswith("ETA 1h30m")
    assert ("━" in last) == bar
    assert (NAME in last) == bar
    assert NAME[-8:] in last
    assert any("ETA unknown" in line for line in lines) == (width > 40)


@given(st.data())
@settings(max_examples=30)
def test_a_plain_table_is_the_one_that_rich_draws(data):
    words = st.text(st.sampled_from("ab é中─[]/:.-0 "), max_size=8)
    columns = data.draw(st.lists(words, min_size=1, max_size=4))
    rows = data.draw(st.lists(st.lists(words, max_size=len(columns)), max_size=4))
    table = tables._Table(columns, rows, data.draw(st.integers(0, len(columns))))
    title, layout = data.draw(words), table.fitting(None)
    assert layout is not None
    drawn = io.StringIO()
    Console(file=drawn, width=200, highlight=False, emoji=False).print(table.drawn(layout, title, "utf-8"))
    if lines := table.lines(layout, title, "utf-8"):
        assert [line.rstrip() for line in drawn.getvalue().splitlines()] == [line.rstrip() for line in lines]
