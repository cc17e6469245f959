"""Lists of values in the sentences of messages and findings: few of them by name, the others by their number."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

MOST = 5  # values that a sentence names
WHOLE = 20  # choices that a message names in full
CHOICES = 8  # choices that it names of more: the nearest to what was asked for


def few(values: Iterable[object], most: int | None = MOST, *, last: str = ", ") -> str:
    """`a, b, c`, or `a, b, c, d, e and 12 more` where there are more than `most`; `last` precedes the last of a whole list.

    >>> few(["w8a8", "w4a4", "w2a2"], last=" and ")
    'w8a8, w4a4 and w2a2'
    >>> few(range(9), 2)
    '0, 1 and 7 more'
    """
    names = [str(value) for value in values]
    if most is not None and len(names) > most:
        return f"{', '.join(names[:most])} and {len(names) - most} more"
    return last.join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else "".join(names)


def choices(values: Iterable[object], *wanted: str) -> str:
    """The choices that a message names: all, or of more than WHOLE the CHOICES most like one of the `wanted`, these first.

    >>> choices(["N", "D", "loss"], "los")
    'N, D, loss'
    >>> choices([f"c{i}" for i in range(20)] + ["los"], "loss").split(" and ")
    ['los, c0, c1, c2, c3, c4, c5, c6', '13 more']
    """
    names = [str(value) for value in values]
    if len(names) <= WHOLE:
        return ", ".join(names)
    names.sort(key=lambda name: -max((likeness(word, name) for word in wanted), default=0.0))
    return few(names, CHOICES)


def likeness(a: str, b: str) -> float:
    """From 0 to 1, whatever the case; a dotted key is also known by its last part: `lr` and `train.lr` are like `optim.lr`."""
    a, b = a.lower(), b.lower()
    whole, *lasts = (difflib.SequenceMatcher(None, x, y).ratio() for x, y in ((a, b), (a.split(".")[-1], b.split(".")[-1])))
    return max(whole, 0.95 * lasts[0]) if "." in b else whole
