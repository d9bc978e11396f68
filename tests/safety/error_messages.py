"""The texts of the errors that a user can mend, as the source has them.

A text is put together as far as the source shows it: `{}` stands for a value that only a run
knows. A name stands for the strings that its function, or the module, gives it.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

VALUE = "{}"
CHECKOUT = Path(__file__).resolve().parents[2]

# What to do is an imperative, and it begins a clause.
_VERBS = (
    "add|append|begin|branch|call|check|choose|close|convert|copy|correct|cut|divide|drop|end|free|give|"
    "install|leave|lower|make|measure|mend|merge|move|name|open|pip|put|quote|raise|remove|"
    "rename|replace|restore|resume|run|save|see|set|start|stop|submit|take|train|try|use|wait|"
    "write"
)
_REMEDY = re.compile(rf"(?:(?:[;:.,]|\b(?:and|or|so))\s+|\(|\n)(?:{_VERBS})\b", re.IGNORECASE)
_NAME = re.compile(r"--\w|\b[a-z_]+\.[a-z_]+\b|\b[A-Z]+_[A-Z_]+\b")


@dataclass(frozen=True)
class Message:
    """What one place in the source says to the user.

    Attributes:
        file: where it stands, from the checkout.
        function: in which function, or in none.
        line: its number.
        texts: what it may say; one where nothing in it depends on a condition.
    """

    file: str
    function: str
    line: int
    texts: tuple[str, ...]

    def lacks(self) -> str | None:
        """What is missing: a value, or a remedy; None where both are there."""
        for text in self.texts:
            if not _names_something(text):
                return f"no value, option or key: {text!r}"
            if not _REMEDY.search(text):
                return f"no remedy: {text!r}"
        return None


def user_errors(root: Path, files: Sequence[Path]) -> list[Message]:
    """Every message of the family of `UserError`, and every line of the lists of problems."""
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in files}
    family = _family(trees.values())
    messages = []
    for path, tree in trees.items():
        for function, node in _nodes(tree):
            expression = _said(node, function, family)
            if expression is not None:
                texts = tuple(_texts(expression, [function, tree]))
                name = getattr(function, "name", "")
                messages.append(Message(str(path.relative_to(root)), name, node.lineno, texts))
    return messages


def _family(trees: Iterator[ast.Module]) -> set[str]:
    classes = [n for tree in trees for n in ast.walk(tree) if isinstance(n, ast.ClassDef)]
    family = {"UserError"}
    while (
        more := {
            c.name for c in classes for b in c.bases if isinstance(b, ast.Name) and b.id in family
        }
        - family
    ):
        family |= more
    return family


def _nodes(tree: ast.AST, function: ast.AST | None = None) -> Iterator[tuple[ast.AST, ast.AST]]:
    """Every node with the innermost function around it."""
    for child in ast.iter_child_nodes(tree):
        inner = child if isinstance(child, ast.FunctionDef) else function
        yield inner or tree, child
        yield from _nodes(child, inner)


def _said(node: ast.AST, function: ast.AST, family: set[str]) -> ast.expr | None:
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in family:
        return node.args[0] if node.args else None
    if not getattr(function, "name", "").endswith(("_problem", "_problems")):
        return None
    if isinstance(node, ast.Yield | ast.Return) and isinstance(node.value, ast.JoinedStr):
        return node.value
    return None


def _texts(node: ast.expr, scopes: list[ast.AST]) -> Iterator[str]:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    elif isinstance(node, ast.JoinedStr):
        yield from _joined(node.values, scopes)
    elif isinstance(node, ast.FormattedValue):
        yield from _texts(node.value, scopes)
    elif isinstance(node, ast.BinOp):
        yield from _joined([node.left, node.right], scopes)
    elif isinstance(node, ast.IfExp):
        yield from _texts(node.body, scopes)
        yield from _texts(node.orelse, scopes)
    elif isinstance(node, ast.Name):
        yield from _given(node.id, scopes) or [VALUE]
    else:
        yield VALUE


def _joined(parts: Sequence[ast.expr], scopes: list[ast.AST]) -> Iterator[str]:
    if not parts:
        yield ""
        return
    for first in _texts(parts[0], scopes):
        for rest in _joined(parts[1:], scopes):
            yield first + rest


def _given(name: str, scopes: list[ast.AST]) -> list[str]:
    """The strings that the innermost scope which has any gives to a name."""
    for number, scope in enumerate(scopes):
        values = [
            node.value
            for node in ast.walk(scope)
            if isinstance(node, ast.Assign)
            and any(isinstance(target, ast.Name) and target.id == name for target in node.targets)
            and isinstance(node.value, ast.Constant | ast.JoinedStr | ast.IfExp)
        ] or _arguments(name, scope, scopes[-1])
        if values:
            return [text for value in values for text in _texts(value, scopes[number + 1 :])]
    return []


def _arguments(name: str, function: ast.AST, module: ast.AST) -> list[ast.expr]:
    """What the module's calls of a function of its own give to a parameter."""
    if not isinstance(function, ast.FunctionDef):
        return []
    names = [parameter.arg for parameter in function.args.args]
    if name not in names:
        return []
    calls = [
        node
        for node in ast.walk(module)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == function.name
    ]
    place = names.index(name)
    return [
        argument
        for call in calls
        for argument in (
            *call.args[place : place + 1],
            *(keyword.value for keyword in call.keywords if keyword.arg == name),
        )
    ]


def _names_something(text: str) -> bool:
    """A value, an option (`--steps`), a key (`run.dir`) or a variable (`WORLD_SIZE`)."""
    return VALUE in text or _NAME.search(text) is not None
