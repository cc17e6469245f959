"""All output of questctl: results go to stdout, everything else to stderr; no other module prints.

Results are tables for people and, with `--json`, one JSON document for programs. Progress is a live line on a terminal and a
plain line every few seconds elsewhere. rich honours `NO_COLOR` and the width of the terminal.
"""

from .guard import guarded_streams, is_terminal, open_missing_streams
from .numbers import duration, duration_range, number, rough
from .progress import DataProgress, TrainProgress
from .streams import error, json_text, note, print_json, say, show_log, stderr, stdout, warn, warnings_shown
from .tables import LiveTable, print_table

__all__ = [
    "DataProgress",
    "LiveTable",
    "TrainProgress",
    "duration",
    "duration_range",
    "error",
    "guarded_streams",
    "is_terminal",
    "json_text",
    "note",
    "number",
    "open_missing_streams",
    "print_json",
    "print_table",
    "rough",
    "say",
    "show_log",
    "stderr",
    "stdout",
    "warn",
    "warnings_shown",
]
