"""Run `questctl` in the process of the tests and look at its exit code and its output."""

from __future__ import annotations

from click.testing import Result
from typer.testing import CliRunner

from questctl.cli.app import app


def invoke(*words: object, columns: int = 80) -> Result:
    """`questctl WORDS…` on a terminal of that width, however it ends."""
    return CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": str(columns)})


def run_cli(*words: object, code: int = 0, columns: int = 80) -> Result:
    """As `invoke`; asserts that the command ends with `code`."""
    result = invoke(*words, columns=columns)
    assert result.exit_code == code, result.output + repr(result.exception)
    return result


def output(*words: object, code: int = 0, columns: int = 80) -> str:
    """What `questctl WORDS…` writes to stdout, or to stderr where it is to fail with `code`."""
    result = run_cli(*words, code=code, columns=columns)
    return result.stderr if code else result.stdout


def outcome(*words: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `questctl WORDS…`."""
    result = invoke(*words)
    return result.exit_code, result.stdout, result.stderr
