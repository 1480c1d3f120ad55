"""The README stays true: every command in it runs, on less data or for fewer steps."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BLOCKS = re.findall(r"^```\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
COMMANDS = sorted(
    {
        part.strip()
        for block in BLOCKS
        for line in block.splitlines()
        for part in line.split("&&")
        if part.strip().startswith(("python ", "torchrun ")) and "pytest" not in part
    }
)


def test_the_readme_has_the_two_commands_of_a_fresh_machine():
    lines = [line for block in BLOCKS for line in block.splitlines()]
    assert "pip install -r requirements.txt && python train.py" in lines
    assert any(line.startswith("pip install") and line.endswith("python -m pytest") for line in lines)


@pytest.mark.parametrize("command", COMMANDS)
def test_command_runs(command, tmp_path):
    words = shlex.split(command)
    if words[0] == "python":
        words[0] = sys.executable
    else:
        words[:1] = [sys.executable, "-m", "torch.distributed.run"]
    if "train.py" in words:
        # Of an option given twice, the last counts.
        words += ["--steps", "2", "--batch-tokens", "512", "--out", str(tmp_path / "run")]
    else:
        words += ["--help"]  # a benchmark takes minutes
    result = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_the_files_that_the_readme_names_exist():
    text = (ROOT / "README.md").read_text()
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert target.startswith("http") or (ROOT / target).exists(), target
