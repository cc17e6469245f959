"""The pages of docs/ and the README are true: every bash and python block runs, page by page, in one empty folder.

A page's blocks run in order in one shell session, as its reader would type them; a command that fails fails the page, and the
test shows the line. Blocks of any other language (text, toml, console) are shown, not run. Links between pages lead somewhere.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted((ROOT / "docs").glob("*.md"))
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


@pytest.mark.docs
@pytest.mark.parametrize("page", [p for p in PAGES if len(script(p).splitlines()) > 1], ids=lambda p: p.stem)
def test_the_commands_of_a_page_run(page, tmp_path):
    here = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "COLUMNS": "100"}
    result = subprocess.run(["bash", "-c", script(page)], cwd=tmp_path, env=here, capture_output=True, text=True, check=False)
    assert result.returncode == 0, f"{result.stdout[-2000:]}\n{result.stderr[-3000:]}"


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "benchmarks" / "README.md", *PAGES], ids=lambda p: p.stem)
def test_links_between_pages_lead_somewhere(page):
    prose = BLOCK.sub("", page.read_text(encoding="utf-8"))
    assert [link for link in LINK.findall(prose) if not (page.parent / link).exists()] == []
