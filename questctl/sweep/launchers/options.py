"""The options of each launcher: flags override the table [launcher.NAME] of the sweep file, which overrides the defaults."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, field_validator

from ...config import Section, broken
from ...errors import UsageError, unknown


class LauncherOptions(Section):
    """The options that all launchers share; the local launcher has no others."""

    jobs: int = Field(0, ge=0, description="runs (SLURM: workers) at a time; 0: as many as suit the machine or the sweep")
    jobs_per_gpu: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(1, description="runs that share a GPU; auto: by memory")


class SlurmOptions(LauncherOptions):
    """Directives of the array job, named as in sbatch(1), and shell lines that run before the worker."""

    account: str = ""
    partition: str = ""
    time: str = Field(
        "", description="time limit of one array task; the worker writes a checkpoint before it and is queued again"
    )
    gpus: str = Field("", description="GPUs of one array task: 2, or a100:2")
    cpus: int = Field(0, ge=0, description="cores of one array task")
    memory: str = Field("", description="memory of one array task, such as 32G")
    constraint: str = ""
    modules: tuple[str, ...] = Field((), description="environment modules loaded before the worker starts")
    container: str = Field("", description="image in which apptainer runs the worker")
    directives: tuple[str, ...] = Field((), description="further #SBATCH options, such as --qos=low")
    setup: tuple[str, ...] = Field((), description="further shell lines before the worker, such as source venv/bin/activate")
    warning_s: int = Field(120, gt=0, description="seconds before the time limit at which the worker checkpoints")
    gpu_memory_gib: float = Field(
        0, ge=0, description="memory of the largest GPU of the cluster, for the check of sizes; 0: not known"
    )

    @field_validator("gpus", mode="before")
    @classmethod
    def _count(cls, value: Any) -> Any:
        return str(value) if isinstance(value, int) and not isinstance(value, bool) else value

    @field_validator("modules", "directives", "setup", mode="before")
    @classmethod
    def _several(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    @field_validator("account", "partition", "time", "gpus", "memory", "constraint", "container")
    @classmethod
    def _one_line(cls, value: str) -> str:
        if any(c in value for c in "\n\r"):
            raise ValueError("takes one line")
        return value


class RayOptions(LauncherOptions):
    """The address of the cluster, and the share of it that one run takes."""

    address: str = Field(
        "", description="of a running cluster: HOST:PORT, ray://HOST:PORT or auto; left out: a local one is started"
    )
    cpus: float = Field(1.0, gt=0, description="cores of one run")
    gpus: float | None = Field(None, ge=0, description="GPUs of one run, such as 0.25; left out: 1 / jobs_per_gpu")
    retries: int = Field(2, ge=0, description="times that a run is started again after its worker is lost")
    gpu_memory_gib: float = Field(
        0, ge=0, description="memory of the largest GPU of the cluster, for the check of sizes; 0: not known"
    )

    @field_validator("cpus", "gpus", mode="before")
    @classmethod
    def _whole(cls, value: Any) -> Any:
        return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


KINDS: dict[str, type[LauncherOptions]] = {"local": LauncherOptions, "slurm": SlurmOptions, "ray": RayOptions}


def launcher_options(
    launcher: LauncherOptions | str, tables: Mapping[str, Mapping[str, Any]], flags: Mapping[str, Any] | None = None
) -> LauncherOptions:
    """The options of the launcher of this name: `flags` (by field name, None if not set) override its table in `tables`.

    An options object is returned as it is. Raises UsageError for an unknown launcher, key or flag, and for an invalid value.
    """
    if isinstance(launcher, LauncherOptions):
        return launcher
    if launcher not in KINDS:
        raise UsageError(unknown("--launcher", launcher, KINDS, what="launcher"))
    kind, flags = KINDS[launcher], {name: value for name, value in (flags or {}).items() if value is not None}
    for name in flags:
        if name not in kind.model_fields:
            takers = [k for k, other in KINDS.items() if name in other.model_fields]
            raise UsageError(
                f"--{name.replace('_', '-')}: is an option of --launcher {' and '.join(takers)}, not of {launcher}."
            )
    try:
        return kind.model_validate({**tables.get(launcher, {}), **flags})
    except ValidationError as e:
        first = e.errors(include_url=False)[0]
        key = str(first["loc"][0])
        where = f"--{key.replace('_', '-')}" if key in flags else f"launcher.{launcher}.{key}"
        if first["type"] == "extra_forbidden":
            raise UsageError(unknown(f"launcher.{launcher}", key, kind.model_fields, what="key")) from e
        if key == "jobs_per_gpu":
            raise UsageError(f"{where}: {first['input']!r} is neither a number of runs nor auto.") from e
        if first["type"] == "value_error":
            raise UsageError(f"{where}: {first['input']!r}: {first['ctx']['error']}.") from e
        raise UsageError(broken(where, first)) from e
