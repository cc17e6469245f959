"""The errors that users can cause, and the exit codes that the command line ends with.

Each class is also a standard exception (`ValueError`, `OSError`, …), which scripts can catch. A message is one sentence that
names the key, the value and the choices; `unknown()` writes the most common kind.

    0 ok · 1 error · 2 usage, config, bad input · 3 sweep finished with failed cells · 4 diverged
    5 something is not installed, or no network · 75 preempted and checkpointed (EX_TEMPFAIL) · 130 Ctrl-C
    141 the reader of stdout has closed it (as a program that SIGPIPE ends)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from .words import CHOICES, WHOLE, few, likeness


class QuestError(Exception):
    """The base of all errors that the user can fix; the command line ends with `exit_code`."""

    exit_code = 1


class UsageError(QuestError, ValueError):
    """A flag, key, value or file of the user is wrong; nothing was written."""

    exit_code = 2


class DataError(QuestError, ValueError):
    """A corpus, token file, table or run folder is missing, damaged or too small."""

    exit_code = 2


class StorageError(QuestError, OSError):
    """The file system refused: it is not writable or full, or an input/output error occurred."""

    exit_code = 2


class RunFailed(QuestError, RuntimeError):
    """A run stopped for a reason other than its numbers; its last checkpoint is intact."""

    exit_code = 1


class RankLost(RunFailed):
    """One of the processes that train a run together has ended; the run goes on from its last checkpoint."""


class OutOfMemory(RunFailed):
    """A run did not fit into memory. It may fit with fewer runs beside it."""


class SweepFailed(QuestError, RuntimeError):
    """A sweep finished, but some of its cells failed."""

    exit_code = 3


class Diverged(QuestError, ArithmeticError):
    """A loss, gradient or weight is no longer finite, or above the limits of `train.diverged_*`."""

    exit_code = 4


class MissingDependency(QuestError, ImportError):
    """A command needs an optional package or program; the message holds the line that installs it."""

    exit_code = 5


class Unreachable(QuestError, ConnectionError):
    """A data source or tokenizer that begins with `hf:` needs the hub, and the hub does not answer."""

    exit_code = 5


class NotSent(QuestError, RuntimeError):
    """Runs could not be sent to a tracker: `failures` has a sentence for each, `sent` the log steps of those that were."""

    exit_code = 1

    def __init__(self, failures: Sequence[str], sent: Mapping[str, int]) -> None:
        super().__init__("\n".join(failures))
        self.failures, self.sent = tuple(failures), dict(sent)


class Preempted(QuestError, InterruptedError):
    """A signal asked the run to stop. It wrote a checkpoint and can be continued."""

    exit_code = 75


NEAREST = 3  # choices named beside the command that lists all


def unknown(
    key: str, value: object, choices: Iterable[str] | Mapping[str, str], *, what: str = "value", all_by: str = ""
) -> str:
    """One sentence for a value that is not among `choices`; it suggests the most similar choice.

    Of more than WHOLE it names the nearest CHOICES; `all_by` is the command that lists all, of which it then names NEAREST. A
    mapping gives the meaning of each choice, by which a choice may be found, too.

    >>> unknown("quant.method", "qest", ["quest", "ste"], what="method")
    "quant.method: unknown method 'qest'; did you mean 'quest'? Choices: quest, ste."
    """
    names = [str(c) for c in choices]
    meanings = choices if all_by and isinstance(choices, Mapping) else {}
    like = {name: max(likeness(str(value), name), _meant(str(value), meanings.get(name, ""))) for name in names}
    ranked = sorted(names, key=lambda name: -like[name])
    near = bool(ranked) and like[ranked[0]] >= 0.6
    hint = f"; did you mean '{ranked[0]}'? " if near else "; "
    if len(names) > WHOLE and all_by:
        rest = f"the nearest {what}s are {', '.join(ranked[:NEAREST])}; {all_by} lists all."
    else:
        rest = f"choices: {few(ranked, CHOICES) if len(names) > WHOLE else ', '.join(names)}."
    return f"{key}: unknown {what} '{value}'{hint}{rest[0].upper() + rest[1:] if near else rest}"


def _meant(value: str, meaning: str) -> float:
    """How well a value, such as `learning_rate`, matches the meaning of a key in words; shorter meanings match better."""
    words, said = value.lower().split(".")[-1].split("_"), meaning.lower().split()
    return 0.8 + 0.1 / len(said) if len(words) > 1 and set(words) <= set(said) else 0.0
