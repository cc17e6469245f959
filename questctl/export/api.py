"""Export a finished run for other programs: the public call, which checks a request before torch is imported."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UsageError
from ..store import Run, open_run
from .check import check

if TYPE_CHECKING:
    from .accuracy import AccuracyCard

COMPARED_TOKENS = 4096  # of the validation text


def export_run(
    run: Run | Path | str,
    out: Path | str,
    *,
    format: str,
    dtype: str | None = None,
    tokens: int = COMPARED_TOKENS,
    average: bool = False,
) -> AccuracyCard:
    """Write a finished run for other programs, read it back, and measure how far it is from the run.

    The folder `out` gets the model in this format, `export_report.json` (the returned record) and a model card, README.md.

    Args:
        run: A finished run, its folder, or its name in the default folder of runs.
        out: The folder to make; it must not exist, or be empty.
        format: "hf", "hf-dense", "compressed-tensors" or "gguf" (`questctl.export.FORMATS`).
        dtype: Number format of unquantized tensors. Default: the first that the format lists.
        tokens: Number of validation tokens to compare on.
        average: Export the average of the weights that `optim.average` kept instead of the last weights.

    Raises:
        UsageError: The format or dtype is unknown or cannot carry the run's quantizers, or `out` is not free.
        DataError: The run is not finished, has no average, or is damaged.
        MissingDependency: A package that writes or reads the format is not installed.
        StorageError: `out` cannot be written.
        RunFailed: The files, read back, do not compute what the run computes; nothing is kept.
    """
    source, folder = open_run(run), Path(out)
    config = source.config()
    source.require_result("export")
    dtype = check(config, format, dtype)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UsageError(f"--out: {folder} exists and is not an empty folder; name another one, or remove it.")
    Run(folder).check_writable()
    from .write import export

    return export(source, format, folder, dtype=dtype, tokens=tokens, average=average)
