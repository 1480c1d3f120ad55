"""Comparing a learner's code with the lesson's, and naming the mistake.

Both are put in the lesson's place in turn, the same things are observed in the project, and compared
one after the other. Where they differ, so do the lesson's lines with a known mistake in them: the
mistake that is observed to do the same is the one that was made.
"""

import ast
import contextlib
import functools
import importlib
import inspect
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from tests.exercises import observations
from tests.exercises.source import is_written
from tests.exercises.table import Edits, Exercise

Functions = dict[str, Callable]  # by the path of the lesson in whose place they stand
Seen = list[tuple[str, Any]]  # (what was observed, in words; its value)


class NotWritten(Exception):
    """A function to write is not there, or has no body."""


def written_functions(exercise: Exercise) -> Functions:
    """What a learner wrote. Raises NotWritten, or what the code raises."""
    tree = ast.parse(exercise.file.read_text(), str(exercise.file))
    names = [lesson.name for lesson in exercise.lessons]
    missing = [name for name in names if not is_written(tree, name)]
    if missing == names:
        raise NotWritten("not written yet")
    if missing:
        raise NotWritten(f"{missing[0]} is not written yet")
    module = types.ModuleType(exercise.name)
    exec(compile(tree, str(exercise.file), "exec"), vars(module))
    return {lesson.path: get(module, lesson.name) for lesson in exercise.lessons}


def lessons_own(exercise: Exercise, edits: Edits = ()) -> Functions:
    """The lesson's own functions; with edits, the one that they are for is made from the changed lines."""
    functions = {}
    for lesson in exercise.lessons:
        functions[lesson.path] = get(importlib.import_module(lesson.module), lesson.name)
    if edits:
        lesson = exercise.lesson_of(edits)
        functions[lesson.path] = lesson.compiled(edits)
    return functions


def get(owner: Any, name: str) -> Any:
    """`owner.name`, where the name may have dots."""
    return functools.reduce(getattr, name.split("."), owner)


@contextlib.contextmanager
def in_place(functions: Functions) -> Iterator[None]:
    """The project with these functions where the lessons' own stand."""
    before = []
    for path, function in functions.items():
        module, name = path.split(":")
        original = get(importlib.import_module(module), name)
        for put, owner, key in places(module, name, original):
            before.append((put, owner, key, original))
            put(owner, key, function)
    try:
        yield
    finally:
        for put, owner, key, original in reversed(before):
            put(owner, key, original)


def places(module: str, name: str, original: Callable) -> list[tuple[Callable, Any, str]]:
    """(how to put something there, owner, name) for each place where a lesson's function stands.

    A method stands in its class; a function in its module, in those that import it, and in tables.
    """
    outer, _, last = name.rpartition(".")
    if outer:
        return [(put_method, get(sys.modules[module], outer), last)]
    ours = [m for n, m in sys.modules.items() if n.startswith(("minitune", "tests.exercises"))]
    tables = [vars(m) for m in ours]
    tables += [value for names in tables for value in names.values() if type(value) is dict]
    put = dict.__setitem__
    return [(put, table, key) for table in tables for key in table if table[key] is original]


def put_method(owner: type, name: str, function: Callable) -> None:
    """Set it, and let super() in it, which was written in another class, be that of `owner`."""
    setattr(owner, name, function)
    function = inspect.unwrap(function)
    if inspect.isfunction(function):
        closure = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
        for variable, cell in closure:
            if variable == "__class__":
                cell.cell_contents = owner


def observe(exercise: Exercise, functions: Functions) -> tuple[Seen, BaseException | None]:
    """What `observations` looks at in this exercise, with these functions in place, and an error."""
    seen: Seen = []
    with in_place(functions), torch.random.fork_rng():
        torch.manual_seed(0)
        try:
            for one in getattr(observations, exercise.name)():
                seen.append(one)
        except (Exception, SystemExit) as error:
            return seen, error
    return seen, None


@functools.cache
def right(exercise: Exercise) -> Seen:
    """What is observed of the lesson's own lines."""
    seen, error = observe(exercise, lessons_own(exercise))
    if error:
        raise error
    return seen


@functools.cache
def with_mistakes(exercise: Exercise) -> dict[str, Seen]:
    """What is observed of each mistake."""
    items = exercise.mistakes.items()
    return {words: observe(exercise, lessons_own(exercise, edits))[0] for words, edits in items}


def verdict(exercise: Exercise, seen: Seen) -> list[str]:
    """What is wrong, in words, by what was observed; empty where all is as it should be."""
    expected = right(exercise)
    differs = [not same(mine, good) for (_, mine), (_, good) in zip(seen, expected, strict=False)]
    if not any(differs):
        return []
    first = differs.index(True)  # mistakes further on may follow from this one
    (words, value), (_, good) = seen[first], expected[first]
    agree: dict[str, int] = {}  # how much else is as with this mistake
    for mistake, theirs in with_mistakes(exercise).items():
        until_here = zip(seen[: first + 1], theirs, strict=False)
        if len(theirs) > first and all(same(a, b) for (_, a), (_, b) in until_here):
            agree[mistake] = sum(same(a, b) for (_, a), (_, b) in zip(seen, theirs, strict=False))
    return [*([max(agree, key=agree.get)] if agree else []), f"{words}: {difference(value, good)}"]


def same(a: Any, b: Any) -> bool:
    """Equal; numbers to three digits, since float32 rounds and sums have several orders."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        rounding = {"rtol": 1e-3, "atol": 1e-4, "equal_nan": True}
        return a.shape == b.shape and torch.allclose(a.double(), b.double(), **rounding)
    return type(a) is type(b) and a == b


def difference(mine: Any, good: Any) -> str:
    """Two values that are not the same, in words."""
    if isinstance(good, Tensor):
        if not isinstance(mine, Tensor):
            return f"a tensor is expected, and it is {mine!r:.60}"
        if mine.shape != good.shape:
            return f"the shape is {tuple(mine.shape)}, expected is {tuple(good.shape)}"
        if not mine.isfinite().all():
            return "there are numbers that are not finite (nan or inf)"
        off, size = (mine - good).abs().max().item(), good.abs().mean().item()
        return f"numbers are off by up to {off:.2g}, where the right ones are about {size:.2g}"
    if isinstance(good, list) and isinstance(mine, list):
        parts = {"missing": set(good) - set(mine), "too many": set(mine) - set(good)}
        found = [f"{what}: {', '.join(sorted(part)[:3])}" for what, part in parts.items() if part]
        return "; ".join(found) or "the order differs, or something stands there twice"
    return "that is not so" if good is True else f"{mine!s:.60} where {good!s:.60} is expected"
