"""The measurements of a GPU, on tiny sizes where there is none: every section runs, every side is right."""

import json
import sys

import pytest
import torch

from minitune.attention import resolve_backend
from minitune.support.runtime import Runtime
from tests.benchmarks import gpu

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="it would take minutes")
RUNTIME = Runtime.start("cpu")
OURS = resolve_backend("auto", RUNTIME.device, RUNTIME.dtype, 64)  # "padded" where bf16 is fast


def measured(monkeypatch, tmp_path, *sections: str) -> dict[str, dict]:
    path = tmp_path / "gpu.json"
    monkeypatch.setattr(sys, "argv", ["gpu.py", *sections, "--json", str(path)])
    gpu.main()
    return {row["what"]: row for row in json.loads(path.read_text())["rows"]}


def test_each_side_of_attention_gives_what_the_definition_gives(monkeypatch, tmp_path, capsys):
    rows = measured(monkeypatch, tmp_path, "attention")  # it compares them
    assert len(rows) == 6
    sides = {key for row in rows.values() for key in row["notes"]}
    assert sides == {f"{OURS} forward", "SDPA MATH forward", "flex_attention forward"}
    printed = capsys.readouterr().out
    for what in rows:
        assert f"| {what} |" in printed


@pytest.mark.parametrize("name", ["another", OURS])
def test_a_side_that_is_wrong_has_no_figure_and_minitune_fails(monkeypatch, tmp_path, capsys, name):
    sides = gpu.sides
    monkeypatch.setattr(gpu, "sides", lambda *args: sides(*args) | {name: lambda qkv: qkv[:, 2]})
    if name == "another":
        for row in measured(monkeypatch, tmp_path, "attention").values():
            assert row["others"][name].startswith("ArithmeticError: its output is off by")
    else:
        with pytest.raises(SystemExit, match="failed: attention"):
            measured(monkeypatch, tmp_path, "attention")


def test_steps_and_scripts_have_their_figures(monkeypatch, tmp_path, capsys):
    rows = measured(monkeypatch, tmp_path, "steps", "train", "finetune")
    steps, train, finetune = rows.values()
    assert steps["minitune"]["eager"] > 0 and steps["notes"]["eager: share of the peak"] > 0
    assert 4 < train["minitune"]["loss"] < 7  # of 300 words
    assert finetune["minitune"]["full"] > 0 and 0 <= finetune["notes"]["accuracy"] <= 1


def test_the_table_compares_with_the_best_of_the_others():
    slower = gpu.Row("a", "ms", {"eager": 3.0, "compiled": 2.0}, {"x": 4.0, "y": 8.0, "z": "no"})
    assert slower.cells()[1:4] == ["2 ms (compiled)", "4 (x)", "2.00"]
    assert slower.cells()[-1] == "eager: 3; compiled: 2; x: 4; y: 8; z: no"
    faster = gpu.Row("b", "tokens/s", {"eager": 3.0, "compiled": 2.0}, {"x": 4.0, "y": 6.0})
    assert faster.cells()[1:4] == ["3 tokens/s (eager)", "6 (y)", "0.50"]


def test_a_section_that_is_not_there_is_refused(monkeypatch, tmp_path, capsys):
    with pytest.raises(SystemExit):
        measured(monkeypatch, tmp_path, "attention", "speed")
    assert "no section speed" in capsys.readouterr().err
