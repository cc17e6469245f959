"""The packages of questctl, for setuptools: those below `questctl/`, and the three folders that are linked into it.

A clone without symbolic links, as git makes it on Windows (`core.symlinks=false`), has text files where the links should be.
There the folders at the top are packaged under the names that they have through the links. `system.package_folder` finds them
in an editable installation. All else about the package is in pyproject.toml.
"""

from fnmatch import fnmatch
from pathlib import Path

from setuptools import find_namespace_packages, setup

LINKED = ("analysis", "kernels", "experiments")  # questctl/NAME → NAME
LEFT_OUT = ("*.__pycache__", "questctl.experiments.results*", "questctl.experiments.law*")


def packages_of(root: Path) -> tuple[list[str], dict[str, str]]:
    """The names of all packages, and the folder of each that is not below its parent."""
    names = find_namespace_packages(str(root), include=["questctl", "questctl.*"])
    moved = {}
    for link in LINKED:
        if not (root / "questctl" / link).is_dir():
            moved[f"questctl.{link}"] = link
            names += [f"questctl.{name}" for name in find_namespace_packages(str(root), include=[link, f"{link}.*"])]
    return [name for name in names if not any(fnmatch(name, pattern) for pattern in LEFT_OUT)], moved


if __name__ == "__main__":
    found, folders = packages_of(Path(__file__).parent)
    setup(packages=found, package_dir=folders)
