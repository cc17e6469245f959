"""Lists of values in the sentences of messages and findings: few of them by name, the others by their number."""

from __future__ import annotations

from collections.abc import Iterable

MOST = 5  # values that a sentence names


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
