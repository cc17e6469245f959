"""From runs and tables to points, a fitted law, a plan for a budget, a report, and the health of runs.

    sources → `sources.load_sources` → points → `fit.fit_sources` → a fit and its document
                                                → `plan.plan_budget`, `plan_next_runs`, … → `plan_files`: files to run
                                                → `prediction.predict` → losses of models not trained
                                                → `report.write_report` → a page and figures
    run folders → `health.diagnose_health`

Names are imported when they are first used: importing this room loads neither pandas nor scipy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..lazy import lazy_names

if TYPE_CHECKING:
    from .fit import FitResult as FitResult
    from .fit import fit_points as fit_points
    from .fit import fit_sources as fit_sources
    from .health import check_collapse as check_collapse
    from .health import diagnose_health as diagnose_health
    from .plan import compute_multiplier as compute_multiplier
    from .plan import plan_budget as plan_budget
    from .plan import plan_next_runs as plan_next_runs
    from .plan import untrained_formats as untrained_formats
    from .prediction import predict as predict
    from .report import write_report as write_report
    from .sources import Sources as Sources
    from .sources import load_sources as load_sources

_MODULES = {  # name → the module that defines it
    "FitResult": "fit",
    "Sources": "sources",
    "compute_multiplier": "plan",
    "check_collapse": "health",
    "diagnose_health": "health",
    "fit_points": "fit",
    "fit_sources": "fit",
    "load_sources": "sources",
    "plan_budget": "plan",
    "plan_next_runs": "plan",
    "untrained_formats": "plan",
    "predict": "prediction",
    "write_report": "report",
}

__all__ = sorted(_MODULES)  # noqa: PLE0605


__getattr__ = lazy_names(__name__, _MODULES)
