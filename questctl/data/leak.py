"""The leak: how much of the validation text is also in the training text, where a loss measures memory, not prediction.

The measure is the share of windows of the validation tokens, one starting at each token, that also occur, token for token, in
the training tokens. A window has as many tokens as `WINDOW_BYTES` of text: about two lines of code or twenty words. Shares are
therefore comparable between tokenizers, and quotations, tables, licences and repeated records count, but idioms do not.

If there are more than `MOST_WINDOWS` windows, that many, evenly spaced, are looked for, and the share has an interval (Wilson
1927, 95 %). The training tokens are read once, as a stream.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from .passages import Runs, Search, id_hashes

WINDOW_BYTES = 128
BYTES_PER_TOKEN = 4.0  # assumed for tokens without a text
LEAST_WINDOW = 8  # tokens
MOST_WINDOWS = 1 << 16  # so many fit into the processor's cache; the interval is ±.3 % at a share of 20 %
WARN_ABOVE = 0.05
_CHUNK = 1 << 17  # tokens hashed at a time: their hashes stay in the processor's cache
_Z = 1.959963985  # 97.5 % of a normal distribution lie below

Ids = NDArray[np.unsignedinteger]


class Leak(BaseModel):
    """The share of validation windows that also occur in the training text."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    share: float = Field(ge=0, le=1)
    window: int = Field(ge=1, description="tokens of a window")
    windows: int = Field(ge=1, description="windows that were looked for")
    low: float | None = Field(None, description="95 % interval of the share; null: all windows were looked for")
    high: float | None = None

    def __str__(self) -> str:
        interval = "" if self.low is None or self.high is None else f" [{100 * self.low:.3g}, {100 * self.high:.3g}]"
        return f"{100 * self.share:.3g} %{interval} of its windows of {self.window} tokens"


def window_tokens(bytes_per_token: float | None) -> int:
    """The tokens of a window."""
    return max(LEAST_WINDOW, round(WINDOW_BYTES / (bytes_per_token or BYTES_PER_TOKEN)))


def measure(
    train: Ids, val: Ids, bytes_per_token: float | None, report: Callable[[float], None] = lambda share: None
) -> Leak | None:
    """The leak between token ids (n,) and (m,); None if the validation side is shorter than a window.

    `report` is called with the share of the work that is done.
    """
    window = window_tokens(bytes_per_token)
    available = len(val) - window + 1
    if available < 1:
        return None
    n = min(available, MOST_WINDOWS)
    starts = np.arange(n) * available // n
    wanted = np.empty(n, np.uint64)
    for at in range(0, available, _CHUNK):
        first, last = np.searchsorted(starts, (at, at + _CHUNK))
        wanted[first:last] = Runs(id_hashes(val[at : at + _CHUNK + window - 1])).at(starts[first:last] - at, window)
    search = Search(wanted)
    for at in range(0, len(train), _CHUNK):
        search.look(Runs(id_hashes(train[at : at + _CHUNK + window - 1])).all(window))
        report(min(1.0, (at + _CHUNK) / len(train)))
    share = float(search.found(wanted).mean())
    low, high = (None, None) if n == available else _wilson(share, n)
    return Leak(share=share, window=window, windows=n, low=low, high=high)


def _wilson(share: float, n: int) -> tuple[float, float]:
    middle, spread = share + _Z**2 / (2 * n), _Z * math.sqrt(share * (1 - share) / n + _Z**2 / (4 * n**2))
    return (middle - spread) / (1 + _Z**2 / n), (middle + spread) / (1 + _Z**2 / n)
