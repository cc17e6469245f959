"""The bundle of several modules in one file: what is kept and left out, and that it needs only torch and transformers."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

from questctl.export import bundle

PACKAGE = {
    "roots.py": '"""Doc."""\nfrom __future__ import annotations\nfrom .parts import used\nfrom .deep.more import Base\n\n\n'
    "class Root(Base):\n    x = used(3)\n",
    "parts.py": "import math\nimport json\nfrom functools import cache\n\nFACTOR = 2  # why\n\n\n"
    "@cache\ndef used(n: int) -> int:\n"
    "    return helper(n) * FACTOR\n\n\ndef helper(n: int) -> int:\n    return int(math.sqrt(n * n))\n\n\n"
    "def unused() -> str:\n    return json.dumps({})\n",
    "deep/more.py": "from ..parts import helper\n\n\nclass Base:\n    y = helper(4)\n\n    def train(self) -> int:\n"
    "        from ..heavy import fused\n\n        return fused()\n",
}


@pytest.fixture
def package(tmp_path):
    for name, text in PACKAGE.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_it_holds_what_is_used_and_nothing_else(package):
    text = bundle.bundle(package / "roots.py", "Title.")
    space: dict = {"__name__": "bundled"}
    exec(compile(text, "bundled", "exec"), space)
    assert (space["Root"].x, space["Root"].y) == (6, 4)
    with pytest.raises(ImportError, match="heavy is not part of this file"):
        space["Root"]().train()
    assert "unused" not in text
    assert "json" not in text
    assert "FACTOR = 2  # why" in text


def test_two_of_one_name_are_refused(package):
    (package / "roots.py").write_text("from .parts import used\nfrom .deep.more import Base\n\nx = used(Base.y)\n")
    (package / "deep" / "more.py").write_text("def helper() -> int:\n    return 0\n\n\nclass Base:\n    y = helper()\n")
    with pytest.raises(AssertionError, match="helper"):
        bundle.bundle(package / "roots.py", "Title.")


def test_the_model_needs_torch_and_transformers_alone():
    text = bundle.bundle(Path(bundle.__file__).with_name("modeling.py"), "Title.")
    needed = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            needed |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            needed.add((node.module or "").partition(".")[0])
    assert needed - set(sys.stdlib_module_names) == {"torch", "transformers"}
