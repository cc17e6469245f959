"""Bundle a module and everything that it needs from the package into one Python file for an export.

    every statement of the module is kept;  for each name that a kept statement uses, the statement that defines it is kept too,
    in the same module or in the one it is imported from;  and so on

The file in an export is thus the code of the training, reduced to what it needs, and no second copy has to be maintained. This
works for plain modules: definitions at the top level, relative imports of names, no name defined twice. An import inside a
function is for a path that only training takes (its fused kernels). It is left out, and the file raises ImportError there.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass, field
from pathlib import Path

from ..system import PACKAGE, package_folder


@dataclass
class Source:
    """A parsed module: its statements, the names they define, and its imports by name."""

    path: Path
    lines: list[str] = field(default_factory=list)
    statements: list[ast.stmt] = field(default_factory=list)
    defined: dict[str, int] = field(default_factory=dict)  # name → index of the statement that defines it
    outer: dict[str, str] = field(default_factory=dict)  # name → its import line, for other packages
    inner: dict[str, tuple[Path, str]] = field(default_factory=dict)  # name → module of this package, and its name there

    @classmethod
    def read(cls, path: Path) -> Source:
        """Parse a module of the package."""
        text = path.read_text(encoding="utf-8")
        source = cls(path, text.splitlines())
        for node in ast.parse(text).body:
            if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
                for inside in node.body:
                    source._import(inside)
            elif isinstance(node, ast.Import | ast.ImportFrom):
                source._import(node)
            elif not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)):
                for name in _targets(node):
                    source.defined[name] = len(source.statements)
                source.statements.append(node)
        return source

    def _import(self, node: ast.stmt) -> None:
        assert isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names:
            name = alias.asname or alias.name.partition(".")[0]
            spelled = alias.name + (f" as {alias.asname}" if alias.asname else "")
            if isinstance(node, ast.Import):
                self.outer[name] = f"import {spelled}"
            elif node.level == 0:
                self.outer[name] = f"from {node.module} import {spelled}"
            else:
                folder = self.path.parent
                for _ in range(node.level - 1):
                    folder = folder.parent
                path = _in_package(folder.joinpath(*(node.module or "").split(".")).with_suffix(".py"))
                if path.is_file():  # otherwise the name is a module, which kept statements must not use
                    self.inner[name] = path, alias.name

    def text(self, index: int) -> str:
        """The source lines of a statement, with its decorators and trailing comments."""
        node = self.statements[index]
        first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
        lines = self.lines[first - 1 : node.end_lineno]
        for late in (n for n in ast.walk(node) if isinstance(n, ast.ImportFrom) and n.level):
            assert late.lineno == late.end_lineno
            lines[late.lineno - first] = " " * late.col_offset + f'raise ImportError("{late.module} is not part of this file")'
        return "\n".join(lines)


def bundle(module: Path, title: str) -> str:
    """The text of a file with everything in `module` and all that it needs of the package; `title` becomes its docstring."""
    sources: dict[Path, Source] = {}
    kept: dict[Path, set[int]] = {}
    imports: set[str] = set()
    order: list[Path] = []

    def source(path: Path) -> Source:
        if path not in sources:
            sources[path], kept[path] = Source.read(path), set()
            for other, _ in sources[path].inner.values():
                source(other)
            order.append(path)  # after every module that it imports
        return sources[path]

    def need(path: Path, index: int) -> None:
        if index in kept[path]:
            return
        kept[path].add(index)
        here = sources[path]
        for node in ast.walk(here.statements[index]):
            if isinstance(node, ast.Name):
                name = node.id
                if name in here.defined:
                    need(path, here.defined[name])
                elif name in here.inner:
                    other, its_name = here.inner[name]
                    assert name == its_name, f"{path}: {its_name} as {name}"
                    need(other, source(other).defined[name])
                elif name in here.outer:
                    imports.add(here.outer[name])

    module = module.resolve()
    for i in range(len(source(module).statements)):
        need(module, i)
    names = [name for path in order for name, i in sources[path].defined.items() if i in kept[path]]
    assert len(names) == len(set(names)), sorted(n for n in names if names.count(n) > 1)
    parts = [
        f"\n\n# --- {path.relative_to(PACKAGE.parent) if path.is_relative_to(PACKAGE.parent) else path.name}\n\n\n"
        + "\n\n\n".join(sources[path].text(i) for i in sorted(kept[path]))
        for path in order
        if kept[path]
    ]
    lines = sorted(imports, key=lambda line: (line.split()[1], line))
    head = f'"""{title}"""\n\nfrom __future__ import annotations\n\n'
    return head + "\n".join(lines) + "\n" + "".join(parts) + "\n"


def _in_package(path: Path) -> Path:
    """The path of a module, even if its folder is linked into the package and the clone has no links."""
    if path.is_file() or not path.is_relative_to(PACKAGE):
        return path
    folder, *rest = path.relative_to(PACKAGE).parts
    return package_folder(folder).joinpath(*rest)


def _targets(node: ast.stmt) -> list[str]:
    """The names that a statement defines."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return [node.name]
    nodes = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [n.id for target in nodes for n in ast.walk(target) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)]
