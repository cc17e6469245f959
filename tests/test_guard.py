"""Closed, full and narrow streams: the command finishes its work, and the exit code tells that output was lost."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from command_line import outcome, run_cli

from questctl import console
from questctl.cli.app import app
from questctl.console.letters import PLAIN, legible
from questctl.store import RunStore

ROOT = Path(__file__).resolve().parent.parent
TINY = [f"--set={key}={json.dumps(value)}" for key, value in tiny.BASE.items()]
ENCODINGS = ("ascii", "latin-1", "cp437", "cp1252")


def full() -> io.TextIOWrapper:
    return open("/dev/full", "w", encoding="utf-8")


def without_reader() -> io.TextIOWrapper:
    read, write = os.pipe()
    os.close(read)
    return os.fdopen(write, "w", encoding="utf-8")


def closed() -> io.StringIO:
    stream = io.StringIO()
    stream.close()
    return stream


class Terminal(io.StringIO):
    """A terminal that was hung up: it is one, and refuses every write."""

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        raise OSError(5, "Input/output error")


BROKEN = {"full": full, "without reader": without_reader, "closed": closed, "hung up": Terminal, "none": lambda: None}
CODES = {"full": 1, "without reader": 141, "closed": 1, "hung up": 1, "none": 1}


def end_of(words, monkeypatch, **streams) -> int:
    """The exit code of `questctl WORDS…` with these streams."""
    for name, stream in streams.items():
        monkeypatch.setattr(sys, name, stream)
    try:
        with pytest.raises(SystemExit) as e:
            app(words, prog_name="questctl")
    finally:
        monkeypatch.undo()
    return int(e.value.code or 0)


@pytest.mark.parametrize("name", BROKEN)
def test_training_goes_on_without_stderr(name, tmp_path, monkeypatch):
    monkeypatch.setattr(console.progress, "PLAIN_INTERVAL_S", 0.0)
    out = io.StringIO()
    assert end_of(["train", *TINY, "--runs", str(tmp_path)], monkeypatch, stdout=out, stderr=BROKEN[name]()) == 0
    assert "validation loss" in out.getvalue()
    assert RunStore(tmp_path).run(tiny.config().run_id).state() == "done"


@pytest.mark.parametrize("more", [(), ("--json",)])
@pytest.mark.parametrize("name", BROKEN)
def test_a_result_that_is_not_printed_is_an_error_at_the_end(name, more, tmp_path, monkeypatch):
    err = io.StringIO()
    words = ["train", *TINY, "--quiet", "--runs", str(tmp_path), *more]
    assert end_of(words, monkeypatch, stdout=BROKEN[name](), stderr=err) == CODES[name]
    assert RunStore(tmp_path).run(tiny.config().run_id).state() == "done"
    told = "error: stdout: the result could not be written: No space left on device; the work itself is done.\n"
    assert err.getvalue().endswith(told) == (name == "full")


@pytest.mark.parametrize("words", [["--help"], ["runs", "ls", "--help"], ["config", "show"], ["--version"], ["doctor"]])
def test_whatever_is_printed(words, monkeypatch):
    monkeypatch.setattr("questctl.doctor.check_machine", lambda runs: [])
    assert end_of(words, monkeypatch, stdout=without_reader(), stderr=io.StringIO()) == 141
    assert end_of(words, monkeypatch, stdout=full(), stderr=io.StringIO()) == 1


def test_the_code_of_a_failure_is_kept(monkeypatch):
    words = ["config", "show", "--set", "train.seed=x"]
    assert end_of(words, monkeypatch, stdout=full(), stderr=full()) == 2
    assert end_of(["--nosuch"], monkeypatch, stdout=full(), stderr=without_reader()) == 2


@pytest.mark.parametrize("shut", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_numbers_of_closed_streams_are_not_given_to_files(shut, tmp_path):
    code = (
        "import os, sys; from questctl.cli.app import main; from questctl.console import open_missing_streams\n"
        "open_missing_streams(); number = os.open(sys.argv.pop(), os.O_CREAT | os.O_WRONLY); os.write(2, b'noise')\n"
        "assert number > 2, number; main()"
    )
    command = f'exec "$0" -c "$1" config presets "$2" {shut}'
    words = ["sh", "-c", command, sys.executable, code, tmp_path / "file"]
    done = subprocess.run(words, check=False, capture_output=True, timeout=60)
    assert done.returncode == (1 if ">&-" in shut.split() else 0)
    assert (tmp_path / "file").read_bytes() == b""


@pytest.mark.slow
@pytest.mark.parametrize("shut", ["2>/dev/full", "2>&-", ">&- 2>&- <&-", "2>&1 | true"])
def test_a_training_program(shut, tmp_path):
    command = f'"$0" -m questctl train "$@" {shut}'
    subprocess.run(["sh", "-c", command, sys.executable, *TINY, "--runs", tmp_path], timeout=120, check=False)
    assert RunStore(tmp_path).run(tiny.config().run_id).state() == "done"


# --- encodings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "ascii"),
    [
        ("3–4 · 2 × 10³ … α → β", "3-4 * 2 x 10^3 ... alpha -> beta"),
        ("Δ ± 5 µs ≤ ∞", "Delta +- 5 us <= inf"),
        ("λ Π ẑ x₂ é ŵ", "lambda Pi z x2 e w"),
        ("─┼│ ▁█", "-+| _#"),
        ("日", "?"),
        ("\udcff", "?"),
        ("plain", "plain"),
    ],
)
def test_letters_that_ascii_lacks(text, ascii):
    assert legible(text, "ascii") == ascii


def test_letters_that_an_encoding_has_are_kept():
    assert legible("α·×–", "cp437") == "α·x-"
    assert legible("α·×–", "latin-1") == "alpha·×-"
    assert legible("α·×–\udcff", "utf-8") == "α·×–?"


def test_every_letter_of_the_package_has_a_plain_form():
    text = "".join(p.read_text("utf-8") for room in ("questctl", "analysis", "kernels") for p in (ROOT / room).rglob("*.py"))
    assert {c for c in set(text) if legible(c, "ascii") == "?"} - {"?"} == set()
    assert [c for c, plain in PLAIN.items() if not plain.isascii()] == []


def bytes_of(words, encoding, monkeypatch) -> tuple[str, str]:
    """What `questctl WORDS…` writes to strict streams of this encoding."""
    streams = {name: io.TextIOWrapper(io.BytesIO(), encoding=encoding) for name in ("stdout", "stderr")}
    assert end_of(words, monkeypatch, **streams) == 0
    out, err = (stream.buffer.getvalue().decode(encoding) for stream in streams.values())
    return out, err


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_narrow_stream_shows_all_words(encoding, tmp_path, monkeypatch):
    words = ["train", *TINY, "--runs", str(tmp_path / "läufe")]
    out, err = bytes_of(words, encoding, monkeypatch)
    assert legible(f"{tmp_path}/läufe", encoding) in out
    assert "→" not in err
    assert " -> " in err
    assert json.loads(bytes_of([*words, "--json"], encoding, monkeypatch)[0])["path"].startswith(f"{tmp_path}/läufe/")
    lines = bytes_of(["runs", "ls", "--runs", str(tmp_path / "läufe")], encoding, monkeypatch)[0].splitlines()
    assert len({len(line) for line in lines}) == 1  # a table whose columns are aligned
    assert set(lines[1]) == ({"─"} if encoding == "cp437" else {"-"})


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("words", [["--help"], ["train", "--help"], ["plan", "--help"], ["config", "explain"]])
def test_help_in_every_encoding(words, encoding, monkeypatch):
    assert "?" not in bytes_of(words, encoding, monkeypatch)[0].replace("'?'", "")


def test_files_are_utf_8_whatever_the_locale():
    calls = re.compile(r"""write_text\(|read_text\(|\bopen\(.*"[wa]\"""")
    of_the_system = re.compile(r"encoding=|proc/|/sys|cpuinfo|cpu\.|devnull|paths\[0\]")
    of_bytes = re.compile(r"def read_text|\bfile\.open\((info|fresh), \"w\"\)")  # members of archives
    paths = [path for room in ("questctl", "analysis", "kernels") for path in (ROOT / room).rglob("*.py")]
    lines = [(path.name, line) for path in paths for line in path.read_text("utf-8").splitlines() if calls.search(line)]
    assert [line for line in lines if not (of_the_system.search(line[1]) or of_bytes.search(line[1]))] == []


def test_an_answer_is_shown_even_if_its_folder_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("a file where the folder would be")
    table = tmp_path / "points.csv"
    lines = [f"{n},{20 * n},16,{8.0 / n**0.1 + 80 / (20 * n) ** 0.24}" for n in (3e7, 5e7, 1e8, 2e8, 4e8)]
    table.write_text("\n".join(["N,D,w_bits,loss", *lines]))
    for more in ((), ("--json",)):
        code, out, err = outcome("fit-scaling", table, "--law", "chinchilla", "--out", tmp_path / "file" / "fit", *more)
        assert code == 2
        assert "alpha" in out
        assert f"error: {tmp_path}/file/fit: cannot be written: Not a directory.\n" in err


def test_square_brackets_and_colons_are_no_markup(capsys):
    for show in (console.say, console.note, console.warn, console.error):
        show("file:x:text [a/b] :x: [bold]")
    out, err = capsys.readouterr()
    assert [line.partition(": ")[2] or line for line in err.splitlines()[1:]] == ["file:x:text [a/b] :x: [bold]"] * 2
    assert out == err.splitlines()[0] + "\n" == "file:x:text [a/b] :x: [bold]\n"


def test_a_screen_of_text_stays_as_it_is(capsys):
    console.say("a\tb\r\n\x1b[0m", as_is=True)
    assert capsys.readouterr().out == "a\tb\r\n\x1b[0m\n"


def test_help_by_a_pipe(tmp_path):
    assert "Usage" in run_cli("train", "--help").stdout
