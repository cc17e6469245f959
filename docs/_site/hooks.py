"""mkdocs hooks: add the generated reference pages, and the pages of the repository that lie outside docs/.

Pages outside docs/ (results of studies, benchmarks, CONTRIBUTING.md) stay beside what they describe, where GitHub shows them.
The site gets a copy of each, and links to them, which are relative to the repository, are rewritten to the copies.
"""

from __future__ import annotations

import os
import posixpath
import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

DOCS = Path(__file__).resolve().parent.parent
ROOT = DOCS.parent
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]  # the repository's questctl, and reference.py

import reference  # noqa: E402

LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!https?://|#|mailto:)([^)#\s]+)(#[^)\s]*)?\)")


def outside() -> dict[str, str]:
    """Path in the repository → path in the site, for each page and picture from outside docs/."""
    pages = {
        "CONTRIBUTING.md": "contributing.md",
        "CHANGELOG.md": "changelog.md",
        "experiments/results/README.md": "results/index.md",
        "benchmarks/README.md": "results/benchmarks.md",
        "benchmarks/results/README.md": "results/unmeasured.md",
    }
    for path in sorted((ROOT / "experiments" / "results").glob("*/README.md")):
        study = path.parent.name
        pages[f"experiments/results/{study}/README.md"] = f"results/{study}/index.md"
        pages |= {f"experiments/results/{study}/{p.name}": f"results/{study}/{p.name}" for p in path.parent.glob("*.png")}
    return pages


PLACES = outside()
SOURCES = {site: repository for repository, site in PLACES.items()}


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that are not in docs/."""
    for path, page in reference.PAGES.items():
        files.append(File.generated(config, path, content=page()))
    for repository, site in PLACES.items():
        files.append(File.generated(config, site, abs_src_path=str(ROOT / repository)))
    return files


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Any) -> str:
    """Point links between pages of the repository at their places in the site; files that are not pages become plain text."""
    here = SOURCES.get(page.file.src_uri, f"docs/{page.file.src_uri}")

    def rewrite(match: re.Match[str]) -> str:
        picture, text, link, anchor = match[1], match[2], match[3], match[4] or ""
        target = posixpath.normpath(posixpath.join(posixpath.dirname(here), link))
        if target not in PLACES and f"{target}/README.md" in PLACES:
            target += "/README.md"
        if target not in PLACES and not target.startswith("docs/"):
            assert (ROOT / target).exists(), f"{here}: the link {link} leads nowhere"
            return text
        site = PLACES.get(target, target.removeprefix("docs/"))
        return f"{picture}[{text}]({os.path.relpath(site, posixpath.dirname(page.file.src_uri) or '.')}{anchor})"

    return LINK.sub(rewrite, markdown)
