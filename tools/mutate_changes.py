"""Small changes of Python source, drawn by seed: what ``mutate.py`` tries one at a time."""

from __future__ import annotations

import ast
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

TURNED: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.GtE, ast.GtE: ast.Lt, ast.Gt: ast.LtE, ast.LtE: ast.Gt, ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is,
}  # fmt: skip
EDGE: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt,
}  # fmt: skip
EXCHANGED: dict[type[ast.operator], ast.operator] = {ast.Add: ast.Sub(), ast.Sub: ast.Add()}


@dataclass(frozen=True, kw_only=True)
class Change:
    """``old``, a stretch of a file, becomes ``new``; as many lines as before.

    ``function`` is the first line of the function around it, 0 outside all of them.
    """

    file: str
    function: int
    line: int
    kind: str
    start: int
    end: int
    old: str
    new: str

    def __str__(self) -> str:
        old, new = (" ".join(text.split()) for text in (self.old, self.new))
        return f"{self.file}:{self.line}: {self.kind}: {old}  ->  {new}"


def changes_of(path: Path, root: Path) -> list[Change]:
    """Every single change of a file, in a fixed order."""
    text, file = path.read_bytes(), str(path.relative_to(root))
    starts = [0]
    for line in text.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    found = []
    for node, function, kind, new in _variants(ast.parse(text)):
        start = starts[node.lineno - 1] + node.col_offset
        end = starts[(node.end_lineno or node.lineno) - 1] + (node.end_col_offset or 0)
        old = text[start:end].decode()
        new += "\n" * old.count("\n")
        new = new if isinstance(node, ast.stmt) else f"({new})"
        span = {"function": function, "line": node.lineno, "start": start, "end": end}
        found.append(Change(file=file, kind=kind, old=old, new=new, **span))
    return sorted(found, key=lambda c: (c.start, c.end, c.kind, c.new))


Located = ast.expr | ast.stmt


def _variants(tree: ast.AST) -> Iterator[tuple[Located, int, str, str]]:
    """Nodes with the function around them, what would change, and their text after it."""
    for node, function in _nodes(tree, 0):
        for at, kind, new in _of_node(node):
            yield at, function, kind, new


def _of_node(node: ast.AST) -> Iterator[tuple[Located, str, str]]:
    match node:
        case ast.Compare():
            yield from _comparisons(node)
        case ast.BoolOp():
            other = ast.Or() if isinstance(node.op, ast.And) else ast.And()
            yield node, "and/or", ast.unparse(ast.BoolOp(op=other, values=node.values))
        case ast.UnaryOp(op=ast.Not()):
            yield node, "not", ast.unparse(node.operand)
        case ast.UnaryOp(op=ast.USub()):
            yield node, "sign", ast.unparse(node.operand)
        case ast.BinOp(op=ast.Add() | ast.Sub()) if not _of_sequences(node):
            op = EXCHANGED[type(node.op)]
            yield node, "+/-", ast.unparse(ast.BinOp(left=node.left, op=op, right=node.right))
        case ast.AugAssign(op=ast.Add() | ast.Sub()):
            op = EXCHANGED[type(node.op)]
            turned = ast.AugAssign(target=node.target, op=op, value=node.value)
            yield node, "+/-", ast.unparse(turned)
        case ast.If() | ast.IfExp() if not _fixed(node.test):
            yield node.test, "if", "False"
            yield node.test, "if", "True"
        case ast.comprehension():
            for test in node.ifs:
                yield test, "if", "True"
        case ast.Return(value=ast.Constant() as constant):
            yield from _constants(constant)


def _nodes(tree: ast.AST, function: int) -> Iterator[tuple[ast.AST, int]]:
    """All nodes but those inside formatted strings, whose positions Python 3.11 does not know.

    A function's defaults and decorators run where it is defined.
    """
    if isinstance(tree, ast.JoinedStr):
        return
    yield tree, function
    body: list[ast.stmt] = []
    inside = function
    if isinstance(tree, ast.FunctionDef | ast.AsyncFunctionDef):
        body = tree.body
        inside = min(node.lineno for node in (tree, *tree.decorator_list))
    for child in ast.iter_child_nodes(tree):
        yield from _nodes(child, inside if child in body else function)


def _comparisons(node: ast.Compare) -> Iterator[tuple[Located, str, str]]:
    for table, kind in ((TURNED, "comparison"), (EDGE, "edge")):
        for i, op in enumerate(node.ops):
            if type(op) in table:
                ops = [*node.ops[:i], table[type(op)](), *node.ops[i + 1 :]]
                other = ast.Compare(left=node.left, ops=ops, comparators=node.comparators)
                yield node, kind, ast.unparse(other)


def _constants(constant: ast.Constant) -> Iterator[tuple[Located, str, str]]:
    match constant.value:
        case bool() as value:
            yield constant, "return", repr(not value)
        case int() | float() as value:
            yield constant, "return", repr(value + 1)
        case str() as value:
            yield constant, "return", repr(f"{value}x")
        case None:
            yield constant, "return", "0"


def _of_sequences(node: ast.BinOp) -> bool:
    """Text or a list put together: to subtract would be an error and nothing else."""
    kinds = (ast.JoinedStr, ast.Tuple, ast.List)
    return any(
        isinstance(side, kinds) or (isinstance(side, ast.Constant) and isinstance(side.value, str))
        for side in (node.left, node.right)
    )


def _fixed(test: ast.expr) -> bool:
    return isinstance(test, ast.Constant) or ast.unparse(test) == "TYPE_CHECKING"


def drawn(sources: Path, *, root: Path, seed: int, count: int) -> list[Change]:
    every = [c for path in sorted(sources.rglob("*.py")) for c in changes_of(path, root)]
    return random.Random(seed).sample(every, min(count, len(every)))
