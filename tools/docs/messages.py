"""Every warning and error that a user can meet, read from source: `python -m tools.docs.messages` lists them.

What is filled in at run time is an ellipsis. An error that says what an argument must be explains itself.
"""

from __future__ import annotations

import ast
import itertools
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
PACKAGES = ("linmu_ops", "linmu_models", "distill")
NOT_FOR_USERS = ("linmu_ops/_testing.py",)
WARNS = re.compile(r"(^|\.)(warn|warn_once)$")
ENDS = ("stop",)  # prints one line, and ends the command
GAP = "…"


class Message(NamedTuple):
    file: str
    line: int
    is_warning: bool
    text: str

    @property
    def explains_itself(self) -> bool:
        """It says what something must be."""
        return not self.is_warning and re.search(r"\bmust\b", self.text) is not None


class Words(NamedTuple):
    """What an expression may read: `known` are the values of names, by assignments in reach."""

    known: dict[str, list[ast.expr]]

    def of(self, node: ast.expr) -> list[str]:
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            return [node.value]
        if isinstance(node, ast.IfExp):
            return [text for text in self.of(node.body) + self.of(node.orelse) if text]
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            return [a + b for a in self.of(node.left) for b in self.of(node.right)]
        if isinstance(node, ast.JoinedStr):
            return ["".join(parts) for parts in itertools.product(*map(self.of, node.values))]
        if isinstance(node, ast.FormattedValue):
            return self.of(node.value)
        if isinstance(node, ast.Dict):
            return [text for value in node.values for text in self.of(value)]
        if isinstance(node, ast.Subscript):
            return self.of(node.value)
        if isinstance(node, ast.Name) and node.id in self.known:
            found = Words({name: values for name, values in self.known.items() if name != node.id})
            return [text for value in self.known[node.id] for text in found.of(value)]
        if isinstance(node, ast.Call):  # a function of this file, or one that puts words around those that it is given
            if isinstance(node.func, ast.Name) and node.func.id in self.known:
                return self.of(node.func)
            given = [text for argument in node.args for text in self.of(argument) if " " in text]
            return [GAP + text + GAP for text in given] or [GAP]
        return [GAP]


def values(nodes: Iterable[ast.AST]) -> dict[str, list[ast.expr]]:
    """{name: what it may be} by assignments, and of functions by what they return."""
    found: dict[str, list[ast.expr]] = {}
    for node in nodes:
        if isinstance(node, ast.FunctionDef):
            returned = [n.value for n in ast.walk(node) if isinstance(n, ast.Return) and n.value is not None]
            found[node.name] = returned
        elif isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
            found.setdefault(node.targets[0].id, []).append(node.value)
    words = (ast.Constant, ast.JoinedStr, ast.IfExp, ast.Dict, ast.Subscript)
    kept: dict[str, list[ast.expr]] = {
        name: [v for v in given if isinstance(v, words)] for name, given in found.items()
    }
    return {name: given for name, given in kept.items() if given}


def told(node: ast.AST) -> tuple[bool, list[ast.expr]] | None:
    """(is a warning, what may hold its words) of a statement that tells a user something."""
    if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
        return False, node.exc.args
    if isinstance(node, ast.Return) and isinstance(node.value, ast.Call):
        return (False, node.value.args) if ast.unparse(node.value.func).endswith("Error") else None
    if isinstance(node, ast.Call):
        name = ast.unparse(node.func)
        if WARNS.search(name):
            return True, node.args
        if name in ENDS:
            return False, node.args
    return None


def scopes(tree: ast.Module) -> Iterator[tuple[list[ast.AST], dict[str, list[ast.expr]]]]:
    """Each function's statements, and what names mean in it; first those outside of functions."""
    functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    outer = values(tree.body)
    inside = {id(node): function for function in functions for node in ast.walk(function)}
    yield [node for node in ast.walk(tree) if id(node) not in inside], outer
    for function in functions:  # of nested ones the innermost comes last
        nodes = [node for node in ast.walk(function) if inside[id(node)] is function]
        yield nodes, outer | values(nodes)


def messages() -> Iterator[Message]:
    """All of them: one for each text; a text that is nothing but what is filled in is told where it is made."""
    for package in PACKAGES:
        for file in sorted((ROOT / package).rglob("*.py")):
            path = file.relative_to(ROOT).as_posix()
            if path in NOT_FOR_USERS:
                continue
            for nodes, known in scopes(ast.parse(file.read_text())):
                for node in nodes:
                    if (found := told(node)) is not None:
                        is_warning, arguments = found
                        texts = {" ".join(t.split()) for argument in arguments for t in Words(known).of(argument)}
                        for text in sorted({re.sub(rf"{GAP}({GAP})*", GAP, text) for text in texts}):
                            if re.search(r"[a-z]+ +(\S+ )*[a-z]+", text):
                                yield Message(path, getattr(node, "lineno", 0), is_warning, text)


if __name__ == "__main__":
    for message in messages():
        if not message.explains_itself:
            print(f"{message.file}:{message.line}: {'warning: ' * message.is_warning}{message.text}")
