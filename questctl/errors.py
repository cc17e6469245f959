"""Every error a user can cause, one sentence each, and the exit code it ends with.

Each class is also a standard exception (`ValueError`, `OSError`, ...), so that scripts can catch what they know.
A message names the key, the value and the choices; `unknown()` writes the commonest kind.

    0 ok · 1 error · 2 usage, config, bad input · 3 sweep finished with failed cells · 4 diverged
    5 something is not installed, or no network · 75 preempted and checkpointed (EX_TEMPFAIL) · 130 Ctrl-C
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class QuestError(Exception):
    """Base of all errors that are the user's to fix; `exit_code` is what the command line ends with."""

    exit_code = 1


class UsageError(QuestError, ValueError):
    """A flag, key, spec or sweep file that cannot be meant; nothing was written."""

    exit_code = 2


class DataError(QuestError, ValueError):
    """A corpus, token file, table or run folder that is missing, damaged or too small."""

    exit_code = 2


class StorageError(QuestError, OSError):
    """The file system refused: not writable, full, or an input/output error."""

    exit_code = 2


class RunFailed(QuestError, RuntimeError):
    """A run that had started stopped for a reason outside its mathematics; its last checkpoint is intact."""

    exit_code = 1


class OutOfMemory(RunFailed):
    """A run that did not fit; beside fewer others it might."""


class SweepFailed(QuestError, RuntimeError):
    """A sweep that finished, with cells that did not."""

    exit_code = 3


class Diverged(QuestError, ArithmeticError):
    """A loss, gradient or weight that is no longer finite."""

    exit_code = 4


class MissingDependency(QuestError, ImportError):
    """An optional package or program that this command needs; the message holds the line that installs it."""

    exit_code = 5


class Unreachable(QuestError, ConnectionError):
    """A word that begins with `hf:` needs the hub, and the hub does not answer."""

    exit_code = 5


class Preempted(QuestError, InterruptedError):
    """A signal asked the run to stop; it wrote a checkpoint and can be continued."""

    exit_code = 75


def unknown(key: str, value: object, choices: Iterable[str], *, what: str = "value") -> str:
    """One sentence for a word that is not among `choices`, with the nearest choice suggested.

    >>> unknown("quant.method", "qest", ["quest", "ste"], what="method")
    "quant.method: unknown method 'qest'; did you mean 'quest'? Choices: quest, ste."
    """
    words = [str(c) for c in choices]
    near = difflib.get_close_matches(str(value), words, n=1, cutoff=0.6)
    hint = f"; did you mean '{near[0]}'?" if near else ";"
    return f"{key}: unknown {what} '{value}'{hint} {'Choices' if near else 'choices'}: {', '.join(words)}."
