"""The lessons' own source: with a body removed, as an answer, and with a typical mistake in it.

A lesson is a function or method of minitune, by its path: "minitune.model:Layer.forward". Its source
is found by name and read as text, so nothing of minitune is imported, but for `compiled`.
"""

import ast
import importlib
import textwrap
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).parents[2]
TO_DO = 'raise NotImplementedError("not written yet")'
Definition = ast.FunctionDef | ast.ClassDef


@dataclass(frozen=True)
class Lesson:
    """Where a function or method stands, and its lines."""

    path: str

    @property
    def module(self) -> str:
        """The name by which it is imported."""
        return self.path.split(":")[0]

    @property
    def name(self) -> str:
        """Of the function, with its class before it if it is a method."""
        return self.path.split(":")[1]

    @property
    def file(self) -> Path:
        """Relative to the project."""
        return Path(*self.module.split(".")).with_suffix(".py")

    @cached_property
    def lines(self) -> list[str]:
        """Of the whole file."""
        return (ROOT / self.file).read_text().splitlines()

    @cached_property
    def tree(self) -> ast.Module:
        """Of the whole file."""
        return ast.parse("\n".join(self.lines))

    @cached_property
    def nodes(self) -> list[Definition]:
        """The function, after its class if it is a method. LookupError where there is none."""
        nodes = find(self.tree, self.name)
        if not nodes:
            raise LookupError(f"{self.file} has no {self.name}")
        return nodes

    def text(self, node: ast.AST) -> list[str]:
        """The lines of a node, decorators included."""
        first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
        return self.lines[first - 1 : node.end_lineno]

    @property
    def code(self) -> str:
        """The function alone, from the left margin."""
        return textwrap.dedent("\n".join(self.text(self.nodes[-1])))

    @property
    def place(self) -> tuple[int, int]:
        """The numbers of its first line and its last."""
        last = self.nodes[-1].end_lineno
        return last - len(self.text(self.nodes[-1])) + 1, last

    def answer(self) -> Iterator[str]:
        """Where it stands, and its lines with their numbers."""
        first, last = self.place
        yield f"{self.file}, lines {first} to {last}:"
        yield from (f"{n:>5}  {self.lines[n - 1]}".rstrip() for n in range(first, last + 1))

    def compiled(self, edits: Iterable[tuple[str, str]]) -> Callable:
        """The function after these edits (old text, new text), among its module's names."""
        code = self.code
        for old, new in edits:
            code = code.replace(old, new)
        code = "class Outer:\n" + textwrap.indent(code, "    ")  # where super() is understood
        names = dict(vars(importlib.import_module(self.module)))
        exec(compile(code, f"<{self.name}>", "exec"), names)
        return vars(names["Outer"])[self.nodes[-1].name]


def find(tree: ast.Module, name: str) -> list[Definition]:
    """The nodes of "Class.method" or "function"; empty where one is missing."""
    found: list[Definition] = []
    for part in name.split("."):
        body = (found[-1] if found else tree).body
        # Of two with one name the last counts, as in Python.
        named = [n for n in body if isinstance(n, Definition) and n.name == part]
        if not named:
            return []
        found.append(named[-1])
    return found


def is_written(tree: ast.Module, name: str) -> bool:
    """Whether this function has a body that is more than a docstring and a placeholder."""
    nodes = find(tree, name)
    body = nodes[-1].body[ast.get_docstring(nodes[-1]) is not None :] if nodes else []
    return any(
        not isinstance(statement, ast.Pass)
        and not (isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant))
        and not (isinstance(statement, ast.Raise) and "NotImplementedError" in ast.dump(statement))
        for statement in body
    )


def file_to_fill_in(heading: str, lessons: Iterable[Lesson]) -> str:
    """A Python file: the heading, imports, and the lessons with their bodies removed.

    Of a method's class stays what is no method, and __init__. The imports are those of the removed
    lines too.
    """
    tops: dict[tuple[str, str], list[Lesson]] = {}  # methods of one class stand in one class
    for lesson in lessons:
        tops.setdefault((lesson.module, lesson.nodes[0].name), []).append(lesson)
    imports: set[tuple[str, str]] = set()
    parts = []
    for (_, name), holes in tops.items():
        kept, lines = without_bodies(holes)
        used = {n.id for node in kept for n in ast.walk(node) if isinstance(n, ast.Name)}
        imports |= imports_of(holes[0], used - {name for _, name in tops} - {name})
        parts.append("\n".join(lines))
    by_origin: dict[str, list[str]] = {}
    for origin, name in sorted(imports):
        by_origin.setdefault(origin, []).append(name)
    ordered = [f"import {name}" for name in by_origin.pop("", [])]
    ordered += [f"from {origin} import {', '.join(names)}" for origin, names in by_origin.items()]
    ordered.sort(key=lambda line: "minitune" in line)  # after Python's own and torch
    return "\n\n\n".join([f'"""{heading}\n"""\n\n' + "\n".join(ordered), *parts]) + "\n"


def without_bodies(holes: list[Lesson]) -> tuple[list[ast.AST], list[str]]:
    """(nodes that the file needs, lines) of one function, or of a class with one hole or more."""
    top, functions = holes[0].nodes[0], [hole.nodes[-1] for hole in holes]
    first = top.end_lineno - len(holes[0].text(top)) + 1
    lines: dict[int, str] = dict(enumerate(holes[0].text(top), start=first))
    for function in functions:
        start = function.body[0].lineno
        if ast.get_docstring(function) is not None:
            start = function.body[0].end_lineno + 1
        indent = " " * function.body[0].col_offset
        for number in range(start, function.end_lineno + 1):
            del lines[number]
        lines[start] = indent + TO_DO
    kept_names = {"__init__", *(function.name for function in functions)}
    others = [
        node
        for node in (top.body if isinstance(top, ast.ClassDef) else [])
        if isinstance(node, ast.FunctionDef) and node.name not in kept_names
    ]
    for node in others:
        size = len(holes[0].text(node))
        for number in range(node.end_lineno - size, node.end_lineno + 1):  # and the empty line
            lines.pop(number, None)
    kept = [top] if top in functions else [*top.bases, *(n for n in top.body if n not in others)]
    return kept, [line for _, line in sorted(lines.items())]


def imports_of(lesson: Lesson, used: set[str]) -> set[tuple[str, str]]:
    """(module or "", name) that another file must import to have these names of the lesson's file."""
    found = set()
    for node in lesson.tree.body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            origin = node.module if isinstance(node, ast.ImportFrom) else ""
            for alias in node.names:
                if (alias.asname or alias.name.split(".")[0]) in used:
                    found.add((origin, ast.unparse(alias)))
        elif isinstance(node, Definition):
            found |= {(lesson.module, name) for name in {node.name} & used}
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            for target in getattr(node, "targets", None) or [node.target]:
                names = {n.id for n in ast.walk(target) if isinstance(n, ast.Name)}
                found |= {(lesson.module, name) for name in names & used}
    return found
