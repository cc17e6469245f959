"""The commands of the documentation run, its links lead somewhere, and its generated pages cover every command and key.

The bash and python blocks of a page run in order, in one shell session in an empty folder, as a reader would type them. A
command that fails fails the page, and the test shows its line. Blocks of other languages (text, toml, console) are not run.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import questctl
from questctl.analysis.laws import LAWS
from questctl.config import known_keys
from questctl.quant.methods import METHODS
from questctl.quant.spec import KINDS

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
OTHER_PAGES = [
    ROOT / name for name in ("CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md", "experiments/results/README.md")
]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!https?://|#)([^)#]+)")


def script(page: Path) -> str:
    """The page's bash and python blocks as one bash script."""
    parts = ["set -euxo pipefail"]
    for language, text in BLOCK.findall(page.read_text(encoding="utf-8")):
        if language == "bash":
            parts.append(f"( true )\n{text}")
        elif language == "python":
            parts.append(f"cat > block.py <<'END_OF_BLOCK'\n{text}END_OF_BLOCK\npython block.py")
    return "\n".join(parts)


def name(page: Path) -> str:
    """The name of a page in the list of tests."""
    return page.relative_to(ROOT).as_posix().removesuffix(".md")


@pytest.mark.docs
@pytest.mark.parametrize("page", [p for p in PAGES if len(script(p).splitlines()) > 1], ids=name)
def test_the_commands_of_a_page_run(page, tmp_path):
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "COLUMNS": "100"}
    command = ["bash", "-c", script(page)]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, f"{result.stdout[-2000:]}\n{result.stderr[-3000:]}"


@pytest.fixture(scope="module")
def reference():
    """The module that generates the reference pages."""
    location = importlib.util.spec_from_file_location("reference", DOCS / "_site" / "reference.py")
    module = importlib.util.module_from_spec(location)
    location.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", [*PAGES, *OTHER_PAGES], ids=name)
def test_links_between_pages_lead_somewhere(page, reference):
    prose = BLOCK.sub("", page.read_text(encoding="utf-8"))
    generated = {DOCS / path for path in reference.PAGES}
    targets = [(link, (page.parent / link).resolve()) for link in LINK.findall(prose)]
    assert [link for link, target in targets if not target.exists() and target not in generated] == []


def test_the_generated_command_reference_has_every_command_and_option(reference):
    page = reference.command_line()
    assert "### `questctl train`" in page
    assert "### `questctl runs compare`" in page
    for option in ("`--steps`", "`--branch-from`", "`--law`", "`--product`"):
        assert option in page


def test_the_generated_config_reference_has_every_key_with_a_meaning(reference):
    page = reference.config_keys()
    for key, meaning in known_keys().items():
        assert f"| `{'.'.join(key)}` |" in page, key
        assert meaning, key


def test_the_generated_pages_have_every_method_component_and_law(reference):
    quantizers, laws = reference.quantizers(), reference.laws()
    assert [m for m in METHODS if f"| `{m}` |" not in quantizers] == []
    assert [f for classes in KINDS.values() for c in classes for f in c.forms if f"`{f}`" not in quantizers] == []
    assert [law for law in LAWS if f"| `{law}` |" not in laws] == []


def test_the_generated_python_reference_has_every_public_call_in_a_group(reference):
    groups = reference.groups_of_calls()
    assert {n for names in groups.values() for n in names} == {n for n in questctl.__all__ if not n.startswith("_")}
    assert "Other" not in groups


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`(questctl(?:\.\w+)+)`", (DOCS / "architecture.md").read_text()))))
def test_the_names_of_the_architecture_page_exist(name):
    owner = questctl
    for part in name.split(".")[1:]:
        owner = getattr(owner, part, None) or importlib.import_module(f"{owner.__name__}.{part}")


def test_the_architecture_page_has_every_room():
    page = (DOCS / "architecture.md").read_text(encoding="utf-8")
    rooms = {p.stem if p.suffix else p.name for p in (ROOT / "questctl").iterdir() if not p.name.startswith("__")}
    rooms -= {"py", "experiments"}
    assert [room for room in sorted(rooms) if f"`{room}/`" not in page and f"`{room}.py`" not in page] == []


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("nav:")[2]
    assert [path for p in DOCS.rglob("*.md") if (path := p.relative_to(DOCS).as_posix()) not in navigation] == []


def test_every_study_with_results_is_on_the_site():
    """The strict build of the site refuses a page that the navigation lacks, but runs last."""
    nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    studies = sorted(path.name for path in (ROOT / "experiments" / "results").iterdir() if path.is_dir())
    assert [name for name in studies if f"results/{name}/index.md" not in nav] == []
