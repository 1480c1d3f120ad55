"""The house: imports run one way, and what makes things fast knows nothing of the lessons."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "minitune"
# A floor may import from floors below it; within a floor imports make no circle.
FLOORS = [
    {"train", "finetune", "prompt", "doctor"},
    {"commands"},
    {"finetuning", "self_training", "soup", "experiment", "prediction", "merging"},
    {"checkpoint", "trained", "peft_files", "methods", "second_task"},
    {"pretraining", "classification", "features", "adapters", "lora", "ia3"}
    | {"prompting", "calibration", "cloze", "explain", "temperature", "probes", "bag_of_words"},
    {"model", "attention", "initialization", "optimizer", "training"},
    {"masking", "tokenizer", "corpus", "data"},
    {"fast", "support"},
    {"batching"},
]
FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names}


def room(path: Path) -> str:
    """The module that a file belongs to; files in a folder count as the folder."""
    inside = path.relative_to(PACKAGE) if PACKAGE in path.parents else Path(path.name)
    return inside.parts[0].removesuffix(".py")


def runs_as_a_program(node: ast.AST) -> bool:
    """Whether this is `if __name__ == "__main__":`, where a lesson calls its demonstration."""
    return isinstance(node, ast.If) and "__name__" in ast.unparse(node.test)


def imported(path: Path) -> set[str]:
    """The rooms that a file imports from, anywhere in it but for what runs as a program."""
    module, rooms = ast.parse(path.read_text()), set()
    module.body = [node for node in module.body if not runs_as_a_program(node)]
    for node in ast.walk(module):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        rooms |= {name.split(".")[1] for name in names if name.startswith("minitune.")}
    return rooms - {room(path)}


FILES = [ROOT / f"{script}.py" for script in ("train", "finetune", "prompt")]
FILES += [path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"]


def test_every_module_has_its_floor():
    assert {room(path) for path in FILES} == set(FLOOR)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_one_way(path):
    wrong = [name for name in imported(path) if FLOOR[name] < FLOOR[room(path)]]
    assert not wrong, f"{path.relative_to(ROOT)} imports {wrong} from a floor above"


def test_no_two_modules_import_each_other():
    pairs = {(room(path), name) for path in FILES for name in imported(path)}
    assert not [pair for pair in pairs if pair[::-1] in pairs]
