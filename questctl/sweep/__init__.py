"""Sweeps and studies: many runs from one TOML file, trained by any number of workers on one or many machines.

    run          train a sweep, or estimate it           study         search learning rates, train, compare, judge claims
    sweep_file   a sweep file → its cells                study_file    a sweep file with a section [study]
    manifest     a sweep's record beside its runs        study_folder  table, JSON, page and figure of a study
    worker       trains cells until none is free         lr_search     the rule by which learning rates are found
    attempt      one attempt at a cell, and its ranks    node          the same on one of several nodes
    launchers    start workers: here, SLURM, Ray         costs         operations, time, memory and disk of cells
    outcomes     what has become of each cell            slots         where runs can be put on this machine
    stop_rule    the section [stop]                      estimate      what a single run would take
    stopping     when a cell is judged and stopped early
    resource_rules   the section [resources]             resources     what its rules mean for each cell

The run folders are the only state: nothing else says what is done. Messages go to the logger `questctl.sweep`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..lazy import lazy_names

if TYPE_CHECKING:
    from .launchers.options import LauncherOptions as LauncherOptions
    from .launchers.options import RayOptions as RayOptions
    from .launchers.options import SlurmOptions as SlurmOptions
    from .manifest import open_sweep as open_sweep
    from .study_file import load_study as load_study

_MODULES = {
    "LauncherOptions": "launchers.options",
    "RayOptions": "launchers.options",
    "SlurmOptions": "launchers.options",
    "load_study": "study_file",
    "open_sweep": "manifest",
}

__all__ = sorted(_MODULES)  # noqa: PLE0605


__getattr__ = lazy_names(__name__, _MODULES)
