"""Where there is no GPU, Triton kernels are interpreted: said here, since Triton reads it when it is first imported."""

import os
from pathlib import Path

if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_terminal_summary(terminalreporter) -> None:
    """The counts of the fault suite."""
    import tally

    for line in tally.summary():
        terminalreporter.write_line(line)
