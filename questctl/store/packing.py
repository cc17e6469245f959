"""Changes of an archive: pack finished runs into it, take them out again, remove them from it.

    pack      write the archive with the new runs beside the old one, read them back and check their hashes, sync, rename;
              then remove the folders
    restore   unpack into hidden folders, check the hashes, rename; then write the archive without the runs

Between the two halves of either operation a run is in both places with the same content, and readers take one of them. After a
kill at any moment, no run is lost and none counts twice; the same command, repeated, finishes the work. A process that changes
an archive holds a lease beside it.
"""

from __future__ import annotations

import os
import shutil
import zipfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from ..errors import DataError, StorageError, UsageError
from .archive import ARCHIVE, SUFFIX, SUMS, Archive, is_archive, open_archive
from .files import copied, storage_errors, sync_folder
from .lease import Lease, LeaseHeld
from .runs import Run, RunStore

STORED = ".safetensors"  # weights hardly shrink
LEFT_BEHIND = ("lease", ".tmp")  # how names of files begin or end that belong to a process at work on a run

Sums = dict[str, str]  # name of a file within a run → its SHA-256


@dataclass(frozen=True)
class Packed:
    """What `archive_runs` did: the archive, the runs packed into it, and those that stay folders, with the reason."""

    path: Path
    runs: tuple[str, ...]
    left: Mapping[str, str]

    def to_json(self) -> dict[str, object]:
        """What `runs archive --json` prints."""
        return {"archive": str(self.path), "bytes": _size(self.path), "runs": list(self.runs), "left": dict(self.left)}


def archive_runs(
    names: Sequence[str] = (), runs: Path | str | None = None, *, to: Path | str | None = None, keep: bool = False
) -> Packed:
    """Pack the named runs, or all finished ones, with all their files, into the archive of their folder or into the file `to`.

    Runs in the archive of their folder are found as before. Runs in another file are read only if the file is named. The
    folders are removed, unless `keep` is set, which makes the file `to` a copy. A run that is not finished, keeps checkpoints
    for branches, or is damaged stays a folder.

    Raises DataError or UsageError if a named run cannot be packed for one of these reasons, UsageError while another process
    changes the archive, and StorageError if the file cannot be written; then nothing has changed.
    """
    store = RunStore(runs)
    store.require()
    path = store.root / ARCHIVE if to is None else Path(to)
    if path.suffix != SUFFIX:
        raise UsageError(f"--to {path}: the name of an archive ends in {SUFFIX}.")
    inside = path.absolute().parent.resolve() == store.root.resolve()
    if inside and path.name != ARCHIVE:
        raise UsageError(f"--to {path}: the archive of {store.root} is {ARCHIVE}; name that, or a file in another folder.")
    if inside and keep:
        raise UsageError(
            f"--keep: a run of {store.root} is in a folder or in {ARCHIVE}, not in both; name a file elsewhere by --to."
        )
    chosen = [store.find(name) for name in dict.fromkeys(names)] if names else [r for r in store.runs() if not r.is_archived]
    left = {run.name: reason for run in chosen if (reason := _stays(run))}
    if names and left:
        name, reason = next(iter(left.items()))
        raise UsageError(f"archive: {name} {reason}.")
    fresh = [run for run in chosen if run.name not in left]
    with ExitStack() as held:
        leases = [held.enter_context(changing(each)) for each in dict.fromkeys((store.root / ARCHIVE, path))]
        before = {run.name: _looks(run) for run in fresh}
        _pack(fresh, path, leases[-1])
        for run in fresh if not keep else ():
            leases[0].check()
            if _looks(run) == before[run.name]:
                run.remove()
            else:
                left[run.name] = "has changed meanwhile; repeat the command"
        for leftover in store.root.glob(".*.tmp"):  # from interrupted removals
            if leftover.is_dir():
                shutil.rmtree(leftover, ignore_errors=True)
    return Packed(path, tuple(run.name for run in fresh if run.name not in left), left)


def restore_runs(names: Sequence[str] = (), runs: Path | str | None = None) -> list[str]:
    """Turn the named runs of an archive, or all, back into folders, and remove them from the archive; returns their names.

    `runs` is a folder of runs or an archive. Raises DataError for a run that is not in the archive, or damaged in it; then all
    runs before it are folders, and none is lost. Raises LeaseHeld if a live process trains a run of that name.
    """
    store = RunStore(runs)
    store.require()
    if store.archive is None:
        raise DataError(f"{store.root}: has no archive.")
    path, root = store.archive, store.root.parent if is_archive(store.root) else store.root
    with changing(path) as lease:
        archive = open_archive(path)
        chosen = [store.find(name).name for name in names] if names else sorted(archive.runs)
        if absent := [name for name in chosen if name not in archive.runs]:
            raise DataError(f"restore: {absent[0]} is not in {path}.")
        done = []
        try:
            for name in chosen:
                lease.check()
                _restore(archive, name, root)
                done.append(name)
        finally:
            _write_without(path, set(done), lease)
        return done


def drop_runs(names: Collection[str], store: RunStore) -> None:
    """Remove runs from the archive of a folder, as far as it holds them. Raises StorageError or UsageError."""
    if store.archive is None or not open_archive(store.archive).runs & set(names):
        return
    with changing(store.archive) as lease:
        _write_without(store.archive, set(names), lease)


@contextmanager
def changing(path: Path, doing: str = "changing this archive") -> Iterator[Lease]:
    """Hold the lease of an archive. Raises UsageError while another process holds it, StorageError for a read-only folder."""
    lease = Lease(path.with_name(f".{path.name}.lease"))
    with storage_errors(path, "written"):
        try:
            lease.claim()
        except LeaseHeld as e:
            raise UsageError(f"{path}: another process is {doing}; wait for it.") from e
    try:
        for leftover in path.parent.glob(f".{path.name}.*.tmp"):  # from a process that was killed: only this one may write now
            leftover.unlink(missing_ok=True)
        yield lease
    finally:
        lease.release()


def _stays(run: Run) -> str:
    """Why a run stays a folder; empty if it can be packed."""
    if run.is_archived:
        return f"is in {run.path.parent} already"
    try:
        run.config()
        if run.result() is None:
            return f"is not finished ({run.state()})"
    except DataError as e:
        return f"is damaged: {str(e).removesuffix('.')}"
    return "keeps checkpoints, from which branches may start" if run.kept_path.exists() else ""


def _files(folder: Path) -> dict[str, Path]:
    """The files of a run by their names in it, without those of a process at work on it."""
    paths = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    begin, end = LEFT_BEHIND
    return {
        name: path
        for name, path in paths.items()
        if not name.startswith((begin, "checkpoints/")) and not name.endswith(end) and name != SUMS
    }


def _looks(run: Run) -> dict[str, tuple[int, int, int]]:
    """Sizes, times and inodes of the files of a run, which tell whether one of them has changed."""
    stats = {name: path.stat() for name, path in _files(run.path).items()}
    return {name: (s.st_size, s.st_mtime_ns, s.st_ino) for name, s in stats.items()}


def _pack(runs: Sequence[Run], path: Path, lease: Lease) -> None:
    """Add runs to the archive at `path`; a run replaces one of the same name with other content."""
    old = open_archive(path) if path.exists() else None
    twice = [run for run in runs if old and run.name in old.runs]
    same = {run.name for run in twice if old and _sums_in(old, run.name) == _sums_of(run.path)}
    fresh = [run for run in runs if run.name not in same]
    if not fresh:
        return
    with _replacing(path, lease) as temporary:
        if old is not None and len(twice) > len(same):
            _copy(old, temporary, {run.name for run in twice} - same)
        elif old is not None:
            shutil.copyfile(path, temporary)
        with zipfile.ZipFile(temporary, "a") as file:
            written = {run.name: _add(file, run) for run in fresh}
        whole = Archive(temporary)
        for run in fresh:  # their folders are removed next
            if _sums_in(whole, run.name) != written[run.name] or _sums_within(whole, run.name) != written[run.name]:
                raise StorageError(f"{path}: what was written of {run.name} reads back as something else; its folder is kept.")


def _add(file: zipfile.ZipFile, run: Run) -> Sums:
    """Add a run to an archive; the hashes of its files. Raises DataError if its weights are not those of its result."""
    sums: Sums = {}
    for name, path in _files(run.path).items():
        info = zipfile.ZipInfo.from_file(path, f"{run.name}/{name}", strict_timestamps=False)
        info.compress_type = zipfile.ZIP_STORED if path.suffix == STORED else zipfile.ZIP_DEFLATED
        with path.open("rb") as source, file.open(info, "w") as target:
            sums[name] = copied(source, target)
    if not _are_of_result(run, sums.get(run.model_path.name)):
        raise DataError(f"{run.model_path}: is damaged (its hash differs); restore it, or remove the run (questctl runs rm).")
    file.writestr(f"{run.name}/{SUMS}", "".join(f"{digest}  {name}\n" for name, digest in sums.items()))
    return sums


def model_is_intact(run: Run) -> bool:
    """Whether the weights of a finished run have the hash in its result; true if it has no weights."""
    if not run.model_path.exists():
        return True
    with run.model_path.open("rb") as source:
        return _are_of_result(run, copied(source))


def _are_of_result(run: Run, digest: str | None) -> bool:
    return digest is None or run.model_sha256() in (None, digest)


def _sums_of(folder: Path) -> Sums:
    """The hashes of the files of a run folder."""
    sums = {}
    for name, path in _files(folder).items():
        with path.open("rb") as source:
            sums[name] = copied(source)
    return sums


def _sums_in(archive: Archive, run: str) -> Sums:
    """The hashes that an archive records of a run. Raises DataError if their list is damaged."""
    lines = archive.read(f"{run}/{SUMS}").decode().splitlines()
    return {name: digest for digest, _, name in (line.partition("  ") for line in lines)}


def _sums_within(archive: Archive, run: str) -> Sums:
    """The hashes of an archived run's files, computed from their content. Raises DataError if one is damaged."""
    inner = f"{run}/"
    return {name.removeprefix(inner): archive.copy(name) for name in archive.files_of(run) if name != f"{inner}{SUMS}"}


@contextmanager
def _replacing(path: Path, lease: Lease) -> Iterator[Path]:
    """A temporary file that durably replaces `path` unless the block raises. An OSError becomes a StorageError."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with storage_errors(path, "written"):
        try:
            yield temporary
            with temporary.open("rb+") as f:
                os.fsync(f.fileno())
            lease.check()
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        sync_folder(path.parent)


def _copy(archive: Archive, target: Path, without: Collection[str]) -> None:
    """Write to `target` the runs of an archive, without those in `without`."""
    with zipfile.ZipFile(target, "w") as file:
        for name in sorted(archive.runs - set(without)):
            for inner in archive.files_of(name):
                info = archive.files[inner]
                fresh = zipfile.ZipInfo(inner, info.date_time)
                fresh.compress_type, fresh.external_attr, fresh.file_size = (
                    info.compress_type,
                    info.external_attr,
                    info.file_size,
                )
                with file.open(fresh, "w") as out:
                    archive.copy(inner, out)


def _write_without(path: Path, names: Collection[str], lease: Lease) -> None:
    """Write the archive anew without some runs; if none is left, remove it."""
    archive = open_archive(path)
    gone = archive.runs & set(names)
    if gone == archive.runs:
        lease.check()
        with storage_errors(path, "removed"):
            path.unlink()
            sync_folder(path.parent)
    elif gone:
        with _replacing(path, lease) as temporary:
            _copy(archive, temporary, gone)


def _restore(archive: Archive, name: str, root: Path) -> None:
    """Make the folder of an archived run, unless a finished one is there. Raises DataError if the archived run is damaged."""
    folder, hidden = root / name, root / f".{name}.{os.getpid()}.restored.tmp"
    if Run(folder).result_path.exists():
        return
    try:
        unpack(archive, name, hidden)
        install(hidden, folder)
    finally:
        shutil.rmtree(hidden, ignore_errors=True)


def unpack(archive: Archive, name: str, folder: Path) -> None:
    """Write the files of an archived run into `folder`, and check their hashes. Raises DataError if one differs."""
    with storage_errors(folder, "written"):
        for inner, digest in _sums_in(archive, name).items():
            target = folder / inner
            target.parent.mkdir(parents=True, exist_ok=True)
            with target.open("wb") as out:
                if archive.copy(f"{name}/{inner}", out) != digest:
                    raise DataError(f"{archive.path}/{name}/{inner}: is damaged (its hash differs).")
                out.flush()
                os.fsync(out.fileno())


def install(hidden: Path, folder: Path) -> None:
    """Move the finished run in the folder `hidden` to `folder`, where it may replace an unfinished one.

    Raises LeaseHeld if a live process trains the unfinished run, and StorageError.
    """
    with storage_errors(folder, "written"):
        if folder.exists():
            Run(folder).remove()
        os.rename(hidden, folder)  # fails if a worker has just begun that folder
        sync_folder(folder.parent)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
