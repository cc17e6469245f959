"""Arithmetic over the columns of a table, as `--map` takes it: `D=flops/(6*N)`, `N=params_M*1e6`, `` loss=`val loss`*0.693 ``.

The grammar is that of Python's expressions, cut down to numbers, names, + - * / **, parentheses and the functions in FUNCTIONS;
nothing else is evaluated. A name is that of a column, with dots where the table is nested; backticks enclose any other name.
"""

from __future__ import annotations

import ast
import dataclasses
import math
import operator
import re
from collections.abc import Callable

FUNCTIONS: dict[str, Callable[[float], float]] = {
    "exp": math.exp,
    "log": math.log,
    "log2": math.log2,
    "log10": math.log10,
    "sqrt": math.sqrt,
}
_BINARY: dict[type, Callable[[float, float], float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: operator.pow,
}
_UNARY: dict[type, Callable[[float], float]] = {ast.USub: operator.neg, ast.UAdd: operator.pos}
_QUOTED = re.compile(r"`([^`]+)`")


@dataclasses.dataclass(frozen=True)
class Formula:
    """A parsed expression; `names` are the columns it needs, in order."""

    text: str
    names: tuple[str, ...]
    tree: ast.expr
    quoted: tuple[str, ...]  # the names in backticks, which the tree calls _0, _1, …

    def value(self, value_of: Callable[[str], float]) -> float:
        """The value where `value_of` gives that of a name. Raises ArithmeticError or ValueError outside a domain."""
        return float(self._value(self.tree, value_of))

    def _value(self, node: ast.expr, value_of: Callable[[str], float]) -> float:
        if isinstance(node, ast.Constant):
            return float(node.value)  # type: ignore[arg-type]
        if isinstance(node, ast.BinOp):
            return _BINARY[type(node.op)](self._value(node.left, value_of), self._value(node.right, value_of))
        if isinstance(node, ast.UnaryOp):
            return _UNARY[type(node.op)](self._value(node.operand, value_of))
        if isinstance(node, ast.Call):
            return FUNCTIONS[node.func.id](self._value(node.args[0], value_of))  # type: ignore[attr-defined]
        return value_of(_name(node, self.quoted))


def is_formula(text: str) -> bool:
    """Whether a text is more than a name: has an operator, a call or backticks."""
    return bool(re.search(r"[-+*/()`]", text)) or bool(re.fullmatch(r"[\d.]+(e[+-]?\d+)?", text))


def parse(text: str) -> Formula:
    """A formula. Raises ValueError, which says what is not allowed."""
    quoted = tuple(_QUOTED.findall(text))
    if beside := re.search(r"`[^`]+`(\w+)|(\w+)`[^`]+`", text):
        raise ValueError(f"'{text}' lacks a sign beside '{beside[1] or beside[2]}'")
    counter = iter(range(len(quoted)))
    try:
        tree = ast.parse(_QUOTED.sub(lambda _: f"_{next(counter)}_", text.replace("^", "**")).strip(), mode="eval").body
    except (SyntaxError, RecursionError):
        raise ValueError(f"'{text}' is no formula; names with spaces or slashes stand in backticks: `val loss`*1.2") from None
    names: dict[str, None] = {}
    _check(tree, quoted, text, names)
    return Formula(text, tuple(names), tree, quoted)


def _check(node: ast.expr, quoted: tuple[str, ...], text: str, names: dict[str, None]) -> None:
    """Refuse anything outside the grammar, and collect the names."""
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float) and not isinstance(node.value, bool):
        return
    if isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
        _check(node.left, quoted, text, names)
        _check(node.right, quoted, text, names)
    elif isinstance(node, ast.UnaryOp) and type(node.op) in _UNARY:
        _check(node.operand, quoted, text, names)
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in FUNCTIONS and len(node.args) == 1:
        _check(node.args[0], quoted, text, names)
    elif isinstance(node, ast.Name | ast.Attribute) and (name := _name(node, quoted)):
        names.setdefault(name)
    else:
        allowed = f"numbers, columns, + - * / ** ( ) and {', '.join(FUNCTIONS)}"
        held = re.sub(r"_(\d+)_", lambda at: f"`{quoted[int(at[1])]}`", ast.unparse(node))
        raise ValueError(f"'{text}' holds '{held}', and a formula takes {allowed}")


def _name(node: ast.expr, quoted: tuple[str, ...]) -> str:
    """The name of a column, dotted if it is nested; empty if the node is not a name."""
    if isinstance(node, ast.Attribute):
        inner = _name(node.value, quoted)
        return f"{inner}.{node.attr}" if inner else ""
    if not isinstance(node, ast.Name):
        return ""
    if (match := re.fullmatch(r"_(\d+)_", node.id)) and int(match[1]) < len(quoted):
        return quoted[int(match[1])]
    return node.id
