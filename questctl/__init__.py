"""questctl: train low-bit language models, fit their scaling laws, and find out which bits pay.

One call for each thing that the command line can do; each docstring gives arguments, result and errors.

    Configure   make_config · explain_config · train_command
    Data        prepare_data · data_info
    Train       train · estimate_run · run_study · estimate_study
    Sweep       run_sweep · estimate_sweep · simulate_sweep · launch_commands
    Look        load_runs · list_runs · run_details · compare_runs · diagnose_health · check_collapse · write_report
    Manage      import_runs · push_runs · remove_runs · archive_runs · restore_runs · sync_runs
    Evaluate    evaluate_run · generate_text
    Fit         fit_sources · fit_knobs · forecast · best_schedule
    Plan        predict · plan_budget · plan_next_runs · compute_multiplier · untrained_formats
    Layers      quantize_ · calibrate_ · freeze_ · describe
    Compress    quantize_run · allocate_bits · probe_run · export_run
    Measure     benchmark · read_benchmark · compile_kernels
    Machine     check_machine · check_training · run_demo · estimate_demo

The names are looked up when they are first used: `import questctl` loads neither torch nor pandas. The rooms behind them, such
as `questctl.quant` and `questctl.analysis`, are attributes too.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .bench.suite import benchmark as benchmark
    from .bench.suite import compile_kernels as compile_kernels
    from .bench.suite import read_benchmark as read_benchmark
    from .config.commands import make_config as make_config
    from .config.commands import train_command as train_command
    from .config.describe import explain_config as explain_config
    from .data.info import data_info as data_info
    from .data.info import prepare_data as prepare_data
    from .demo import estimate_demo as estimate_demo
    from .demo import run_demo as run_demo
    from .doctor import check_machine as check_machine
    from .evaluate import evaluate_run as evaluate_run
    from .evaluate import generate_text as generate_text
    from .export.api import export_run as export_run
    from .posttraining.api import allocate_bits as allocate_bits
    from .posttraining.api import probe_run as probe_run
    from .posttraining.api import quantize_run as quantize_run
    from .quant.modules import calibrate_ as calibrate_
    from .quant.modules import describe as describe
    from .quant.modules import freeze_ as freeze_
    from .quant.modules import quantize_ as quantize_
    from .scaling.best_schedule import best_schedule as best_schedule
    from .scaling.comparison import compare_runs as compare_runs
    from .scaling.fit import fit_sources as fit_sources
    from .scaling.forecast import forecast as forecast
    from .scaling.health import check_collapse as check_collapse
    from .scaling.health import diagnose_health as diagnose_health
    from .scaling.imports import import_runs as import_runs
    from .scaling.knobs import fit_knobs as fit_knobs
    from .scaling.plan import compute_multiplier as compute_multiplier
    from .scaling.plan import plan_budget as plan_budget
    from .scaling.plan import plan_next_runs as plan_next_runs
    from .scaling.plan import untrained_formats as untrained_formats
    from .scaling.prediction import predict as predict
    from .scaling.report import write_report as write_report
    from .store import load_runs as load_runs
    from .store.listing import list_runs as list_runs
    from .store.listing import remove_runs as remove_runs
    from .store.listing import run_details as run_details
    from .store.packing import archive_runs as archive_runs
    from .store.packing import restore_runs as restore_runs
    from .store.sync import sync_runs as sync_runs
    from .sweep.estimate import estimate_run as estimate_run
    from .sweep.on_cluster import simulate_sweep as simulate_sweep
    from .sweep.run import estimate_sweep as estimate_sweep
    from .sweep.run import launch_commands as launch_commands
    from .sweep.run import run_sweep as run_sweep
    from .sweep.study import estimate_study as estimate_study
    from .sweep.study import run_study as run_study
    from .training import train as train
    from .training.agreement import check_training as check_training
    from .training.trackers import push_runs as push_runs

_MODULES = {  # public name → the module that defines it
    "allocate_bits": "posttraining",
    "archive_runs": "store.packing",
    "benchmark": "bench",
    "best_schedule": "scaling.best_schedule",
    "calibrate_": "quant.modules",
    "check_collapse": "scaling",
    "check_machine": "doctor",
    "check_training": "training.agreement",
    "compare_runs": "scaling.comparison",
    "compile_kernels": "bench",
    "compute_multiplier": "scaling",
    "data_info": "data.info",
    "describe": "quant.modules",
    "diagnose_health": "scaling",
    "estimate_demo": "demo",
    "estimate_run": "sweep.estimate",
    "estimate_study": "sweep.study",
    "estimate_sweep": "sweep.run",
    "evaluate_run": "evaluate",
    "explain_config": "config.describe",
    "export_run": "export",
    "fit_knobs": "scaling.knobs",
    "fit_sources": "scaling",
    "forecast": "scaling.forecast",
    "freeze_": "quant.modules",
    "generate_text": "evaluate",
    "import_runs": "scaling.imports",
    "launch_commands": "sweep.run",
    "list_runs": "store.listing",
    "load_runs": "store",
    "make_config": "config.commands",
    "plan_budget": "scaling",
    "plan_next_runs": "scaling",
    "predict": "scaling",
    "prepare_data": "data.info",
    "probe_run": "posttraining",
    "push_runs": "training.trackers",
    "quantize_": "quant.modules",
    "quantize_run": "posttraining",
    "read_benchmark": "bench",
    "remove_runs": "store.listing",
    "restore_runs": "store.packing",
    "run_demo": "demo",
    "run_details": "store.listing",
    "run_study": "sweep.study",
    "run_sweep": "sweep.run",
    "simulate_sweep": "sweep.on_cluster",
    "sync_runs": "store.sync",
    "train": "training",
    "train_command": "config.commands",
    "untrained_formats": "scaling",
    "write_report": "scaling",
}
_ROOMS = (
    "analysis",
    "bench",
    "config",
    "data",
    "errors",
    "evaluate",
    "export",
    "kernels",
    "models",
    "posttraining",
    "quant",
    "scaling",
    "store",
    "sweep",
    "training",
)

__all__ = sorted(["__version__", *_MODULES])  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from .system import package_version

        return package_version()
    if name in _MODULES:
        if _MODULES[name] not in ("bench", "quant.modules"):  # times the machine as it is; works in programs of others
            from .system import wait_passively

            wait_passively()
        return getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
    if name in _ROOMS:
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module 'questctl' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__, *_ROOMS])
