"""The README stays true: every command in it runs, on less data or for fewer steps."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from minitune.checkpoint import save_model
from minitune.data import Dataset
from minitune.model import BertConfig, BertForMaskedLM, BertForSequenceClassification
from minitune.tokenizer import Tokenizer

ROOT = Path(__file__).parents[1]
SAMPLES = ROOT / "data" / "samples"
FENCED = re.findall(
    r"^```(\w*)\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL
)
BLOCKS = [block for language, block in FENCED if not language]
COMMANDS = sorted(
    {
        part.strip()
        for block in BLOCKS
        for line in block.splitlines()
        for part in re.split(r"&&|\||>", line)  # of `cat FILE | python … > ANOTHER` the middle
        if part.strip().startswith(("python ", "torchrun ")) and "pytest" not in part
    }
)


def test_the_readme_has_the_two_commands_of_a_fresh_machine():
    lines = [line for block in BLOCKS for line in block.splitlines()]
    assert "pip install -r requirements.txt && python train.py" in lines
    assert any(
        line.startswith("pip install") and line.endswith("python -m pytest") for line in lines
    )


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """In place of what takes minutes to make: a BERT that is pretrained, one that is fine-tuned, reviews."""
    folder = tmp_path_factory.mktemp("tiny")
    rows = list(Dataset(str(SAMPLES / "reviews.csv")).read())
    tokenizer = Tokenizer.train([row.text for row in rows], 300)
    config = BertConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        id2label={0: "negative", 1: "positive"},
    )
    for architecture in (BertForMaskedLM, BertForSequenceClassification):
        (folder / architecture.__name__).mkdir()
        save_model(architecture(config), tokenizer, folder / architecture.__name__)
    lines = (SAMPLES / "reviews.csv").read_text().splitlines(keepends=True)
    (folder / "reviews.csv").write_text("".join(lines[:1] + 4 * lines[1:]))
    rows = [
        {"method": "full", "train_examples": n, "accuracy": 0.5, "spread": None} for n in (16, 64)
    ]
    (folder / "compare.json").write_text(json.dumps({"rows": rows}))
    return SimpleNamespace(
        pretrained=folder / "BertForMaskedLM",
        fine_tuned=folder / "BertForSequenceClassification",
        data=folder / "reviews.csv",
        curves=folder / "compare.json",
    )


def quicker(words, out, tiny):
    """The same command on less data and for fewer steps. Of an option given twice, the last counts."""
    if "train.py" in words:
        if (
            "--data" not in words and len(words) > 2
        ):  # only the plain `python train.py` reads all of IMDb
            words = [*words, "--data", SAMPLES / "reviews.txt"]
        return [*words, "--steps", "2", "--batch-tokens", "512", "--out", out]
    if "prompt.py" in words:  # the small vocabulary of the tiny model has few words
        instead = {
            "imdb": tiny.data,
            "rotten_tomatoes": tiny.data,
            "runs/few/compare.json": tiny.curves,
        }
        words = [instead.get(word, word) for word in words]
        words += ["--model", tiny.pretrained, "--data", tiny.data]
        if "--evaluate" in words:
            words += ["--out", out]
        if "--fill" in words or "--generate" in words:
            return words
        return [*words, "--words", "negative=bad", "positive=good", "--unlabelled", "8"]
    if "finetune.py" in words and "--predict" in words:
        return [*words, "--model", tiny.fine_tuned]
    if "finetune.py" in words:
        words = [
            *words,
            "--model",
            tiny.pretrained,
            "--out",
            out,
            "--epochs",
            "1",
            "--max-len",
            "32",
        ]
        if "--data" not in words or "imdb" in words:
            words += ["--data", tiny.data]
        sizes = ["8", "16"] if "--train-examples" in words else ["16"]
        return [*words, "--train-examples", *sizes]
    return [*words, "--help"]  # a benchmark takes minutes


@pytest.mark.parametrize("command", COMMANDS)
def test_command_runs(command, tmp_path, tiny):
    words = shlex.split(command)
    if words[0] == "python":
        words[0] = sys.executable
    else:
        words[:1] = [sys.executable, "-m", "torch.distributed.run"]
    words = [str(word) for word in quicker(words, tmp_path / "run", tiny)]
    some_lines = (SAMPLES / "reviews.txt").read_text()  # for a command that reads a pipe
    result = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, input=some_lines)
    assert result.returncode == 0, result.stderr
    assert result.stdout


def test_the_files_that_the_readme_names_exist():
    text = (ROOT / "README.md").read_text()
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert target.startswith("http") or (ROOT / target).exists(), target
