"""The texts of the errors that a user can mend, as the source has them.

A text is put together as far as the source shows it: `{path}` stands for a value that only a run
knows, under the name that the source has for it. A name stands for the strings that its function,
or the module, gives it; a parameter for those that calls do, and `remedy` also for those of other
modules.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]

# What to do is an imperative, and it begins a clause.
_VERBS = (
    "add|append|begin|branch|call|check|choose|close|convert|copy|correct|cut|divide|drop|end|free|give|"
    "install|leave|lower|make|measure|mend|merge|move|name|open|pip|put|quote|raise|remove|"
    "rename|replace|restore|resume|run|save|see|set|start|stop|submit|take|train|try|use|wait|"
    "write"
)
_REMEDY = re.compile(rf"(?:(?:[;:.,]|\b(?:and|or|so))\s+|\(|\n)(?:{_VERBS})\b", re.IGNORECASE)
# What is wrong stands before that: a thing, and its value. A thing is an option (`--steps`), a key
# (`run.dir`) or a variable (`WORLD_SIZE`), has a word before its value, or is a value that says by
# itself what it is: a place, or the text of another error.
_OPTION = re.compile(r"--[a-z][a-z-]*")
_PLACES = "path|file|folder|directory|dir|prefix|source|script|output|checkpoint|root|place"
_THING = re.compile(
    rf"{_OPTION.pattern}|--\{{|\b[a-z_]+\.[a-z_]+\b|\b[A-Z]+_[A-Z_]+\b"
    rf"|\w ?= ?\{{|[A-Za-z]{{2,}} [`'(]?\{{"
    rf"|\{{\w*(?:{_PLACES}|option|flag|key|name|error|problem)s?\}}"
)
# Known to a run alone, or written out because the condition leaves one only.
_VALUE = re.compile(r"\{|=\s?\w|\b\d+\b")


@dataclass(frozen=True)
class Message:
    """What one place in the source says to the user.

    Attributes:
        file: where it stands, from the checkout.
        function: in which function, or in none.
        line: its number.
        texts: what it may say; one where nothing in it depends on a condition.
        switches: options of the command lines that have no value.
    """

    file: str
    function: str
    line: int
    texts: tuple[str, ...]
    switches: frozenset[str] = frozenset()

    def lacks(self) -> str | None:
        """What is missing: thing, value or remedy; None where all three are there."""
        for text in self.texts:
            remedy = _REMEDY.search(text)
            if remedy is None:
                return f"no remedy: {text!r}"
            wrong = text[: remedy.start()]
            if not _THING.search(wrong):
                return f"no thing: {text!r}"
            option = _OPTION.search(wrong)
            is_switch = option is not None and option[0] in self.switches
            if not is_switch and not _VALUE.search(wrong):
                return f"no value: {text!r}"
        return None


_Calls = dict[str, list[tuple[ast.Call, list[ast.AST]]]]


def user_errors(root: Path, files: Sequence[Path]) -> list[Message]:
    """Every message of the family of `UserError`, and every line of the lists of problems."""
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in files}
    family = _family(trees.values())
    calls = _calls(trees.values())
    switches = frozenset(
        flag for tree in trees.values() for node in ast.walk(tree) for flag in _switch(node)
    )
    messages = []
    for path, tree in trees.items():
        for function, node in _nodes(tree):
            expression = _said(node, function, family)
            if expression is not None:
                texts = tuple(_texts(expression, [function, tree], calls))
                name = getattr(function, "name", "")
                file = str(path.relative_to(root))
                messages.append(Message(file, name, node.lineno, texts, switches))
    return messages


def _switch(node: ast.AST) -> Iterator[str]:
    """The option that a call declares, if it is one without a value."""
    if isinstance(node, ast.Call) and any(
        isinstance(given.value, ast.Constant) and given.value.value == "store_true"
        for given in node.keywords
    ):
        yield from (
            argument.value
            for argument in node.args
            if isinstance(argument, ast.Constant) and isinstance(argument.value, str)
        )


def _family(trees: Iterable[ast.Module]) -> set[str]:
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


def _calls(trees: Iterable[ast.Module]) -> _Calls:
    """Every call of a plain name, with its function and module."""
    calls: _Calls = {}
    for tree in trees:
        for function, node in _nodes(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                calls.setdefault(node.func.id, []).append((node, [function, tree]))
    return calls


def _said(node: ast.AST, function: ast.AST, family: set[str]) -> ast.expr | None:
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in family:
        return node.args[0] if node.args else None
    if not getattr(function, "name", "").endswith(("_problem", "_problems")):
        return None
    if isinstance(node, ast.Yield | ast.Return) and isinstance(node.value, ast.JoinedStr):
        return node.value
    return None


def _texts(node: ast.expr, scopes: list[ast.AST], calls: _Calls) -> Iterator[str]:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    elif isinstance(node, ast.JoinedStr):
        yield from _joined(node.values, scopes, calls)
    elif isinstance(node, ast.FormattedValue):
        yield from _texts(node.value, scopes, calls)
    elif isinstance(node, ast.BinOp):
        yield from _joined([node.left, node.right], scopes, calls)
    elif isinstance(node, ast.IfExp):
        yield from _texts(node.body, scopes, calls)
        yield from _texts(node.orelse, scopes, calls)
    elif isinstance(node, ast.Name):
        yield from _given(node.id, scopes, calls) or [f"{{{node.id}}}"]
    elif (option := _argument(node)) is not None:
        yield option
    elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.GeneratorExp):
        # Lines that are joined.
        yield from _texts(node.args[0].elt, scopes, calls)
    else:
        yield f"{{{_label(node)}}}"


def _argument(node: ast.expr) -> str | None:
    """What `argument("name", value)` writes on a command line; in Python the name is another."""
    match node:
        case ast.Call(func=ast.Name(id="argument"), args=[ast.Constant(value=str(name)), *value]):
            option = f"--{name.replace('_', '-')}"
            known = value and isinstance(value[0], ast.Constant)
            return f"{option} {{{_label(value[0])}}}" if value and not known else option
    return None


def _label(node: ast.AST) -> str:
    """What the source calls a value: its last name, or that of what it is made from."""
    match node:
        case ast.Name(id=name) | ast.Attribute(attr=name):
            return name
        case ast.Call(func=function, args=arguments):
            values = [a for a in arguments if not isinstance(a, ast.Constant)]
            if values:
                return _label(values[-1])
            changed = arguments and isinstance(function, ast.Attribute)
            return _label(function.value if changed else function)
        case ast.Subscript(value=inner) | ast.FormattedValue(value=inner):
            return _label(inner)
    return ""


def _joined(parts: Sequence[ast.expr], scopes: list[ast.AST], calls: _Calls) -> Iterator[str]:
    if not parts:
        yield ""
        return
    for first in _texts(parts[0], scopes, calls):
        for rest in _joined(parts[1:], scopes, calls):
            yield first + rest


def _given(name: str, scopes: list[ast.AST], calls: _Calls) -> list[str]:
    """The strings that the innermost scope which has any gives to a name."""
    for number, scope in enumerate(scopes):
        outer = scopes[number + 1 :]
        values: list[tuple[ast.expr, list[ast.AST], _Calls]] = [
            (node.value, outer, calls)
            for node in ast.walk(scope)
            if isinstance(node, ast.Assign)
            and any(isinstance(target, ast.Name) and target.id == name for target in node.targets)
            and isinstance(node.value, ast.Constant | ast.JoinedStr | ast.IfExp)
        ] or list(_arguments(name, scope, scopes[-1], calls))
        if values:
            return [text for value in values for text in _texts(*value)]
    return []


def _arguments(
    name: str, function: ast.AST, module: ast.AST, calls: _Calls
) -> Iterator[tuple[ast.expr, list[ast.AST], _Calls]]:
    """What calls of a function give to a parameter, as `_texts` takes it.

    What a caller was itself given is not looked for: a function may call itself.
    """
    if not isinstance(function, ast.FunctionDef):
        return
    names = [parameter.arg for parameter in function.args.args]
    if name not in names:
        return
    place = names.index(name)
    for call, scopes in calls.get(function.name, []):
        # A value from another module is known to a run alone; a private name there is another's.
        if scopes[-1] is not module and (name != "remedy" or function.name.startswith("_")):
            continue
        for argument in (
            *call.args[place : place + 1],
            *(keyword.value for keyword in call.keywords if keyword.arg == name),
        ):
            yield argument, scopes, {}
