"""README and RESULTS.md stay true: commands run, links lead somewhere, the order is the package's."""

import csv
import io
import json
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import minitune
import minitune.corpus
from minitune.checkpoint import save_model
from minitune.data import Dataset
from minitune.model import BertConfig, BertForMaskedLM, BertForSequenceClassification
from minitune.tokenizer import Tokenizer

ROOT = Path(__file__).parents[1]
SAMPLES = ROOT / "data" / "samples"
README, RESULTS = ROOT / "README.md", ROOT / "tests" / "benchmarks" / "RESULTS.md"
LOG = ROOT / "tests" / "benchmarks" / "LOG.md"
BLOCKS = [
    (page, language, block)
    for page in (README, RESULTS)
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(), re.M | re.S)
]
COMMANDS = sorted(
    {
        part.strip()
        for _, language, block in BLOCKS
        if not language
        for line in block.splitlines()
        for part in re.split(r"&&|\||>", line)  # of `cat FILE | python … > ANOTHER` the middle
        if part.strip().startswith(("python ", "torchrun ")) and "pytest" not in part
    }
)
# Small sizes for the measurements, which take minutes otherwise; the rest only show their options.
MEASUREMENTS = {
    "tests.benchmarks.attention": "--tokens 64 --lengths 32 --rounds 1",
}


def test_the_readme_has_the_two_commands_of_a_fresh_machine():
    lines = [line for page, _, block in BLOCKS if page == README for line in block.splitlines()]
    assert "pip install -r requirements.txt && python train.py" in lines
    assert any(
        line.startswith("pip install") and line.endswith("python -m pytest -n auto")
        for line in lines
    )


def test_the_readme_is_short():
    assert len(README.read_bytes()) <= 11 * 1024


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Instead of what takes minutes to make: a pretrained BERT, a fine-tuned one, reviews."""
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
    with open(folder / "long.csv", "w", newline="") as file:  # of twenty words or more
        csv.writer(file).writerows(
            [("text", "label"), *((4 * row.text, row.label) for row in rows)]
        )
    row = {"method": "full", "accuracy": 0.5, "interval": [0.4, 0.6], "spread": None}
    rows = [row | {"train_examples": count} for count in (16, 64)]
    (folder / "compare.json").write_text(json.dumps({"rows": rows}))
    return SimpleNamespace(
        pretrained=folder / "BertForMaskedLM",
        fine_tuned=folder / "BertForSequenceClassification",
        data=folder / "reviews.csv",
        long=folder / "long.csv",
        curves=folder / "compare.json",
    )


def quicker(words: list[str], out: Path, tiny) -> list:
    """The same command on less data and for fewer steps. Of an option given twice, the last counts."""
    if "train.py" in words:
        if "--data" not in words:
            words = [*words, "--data", SAMPLES / "reviews.txt"]
        return [*words, "--steps", "2", "--batch-tokens", "512", "--out", out]
    if "prompt.py" in words:  # the small vocabulary of the tiny model has few words
        replaced = {
            "imdb": tiny.data,
            "rotten_tomatoes": tiny.data,
            "runs/few/compare.json": tiny.curves,
        }
        words = [replaced.get(word, word) for word in words]
        words += ["--model", tiny.pretrained, "--data", tiny.data]
        if "--evaluate" in words:
            words += ["--out", out]
        if "--look" in words:
            words += ["--out", out.with_suffix(".png")]
        if {"--fill", "--generate", "--look"} & set(words):
            return words
        return [*words, "--words", "negative=bad", "positive=good", "--unlabelled", "8"]
    if "--page" in words:
        return [*words, "--model", tiny.fine_tuned, "--page", out.with_suffix(".html")]
    if "finetune.py" in words and {"--predict", "--explain"} & set(words):
        few = ["--evaluate", "2", "--data", tiny.long] if "--evaluate" in words else []
        return [*words, "--model", tiny.fine_tuned, *few]
    if "finetune.py" in words:
        limits = ["--epochs", "1", "--max-len", "32", "--data", tiny.data]
        limits += ["--words", "negative=the", "positive=a"]  # tokens of the small vocabulary
        sizes = ["8", "16"] if "--train-examples" in words else ["16"]
        return [
            *words,
            "--model",
            tiny.pretrained,
            "--out",
            out,
            *limits,
            "--train-examples",
            *sizes,
        ]
    if "tests.exercises" in words or words[2].startswith("minitune."):
        return words
    if words[2] in MEASUREMENTS:
        plot = ["--plot", out.with_suffix(".png")] if "--plot" in words else []
        return [*words[:3], *MEASUREMENTS[words[2]].split(), *plot]
    return [*words, "--help"]


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("python ")])
def test_command_runs(command, tmp_path, tiny, monkeypatch, capfd):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(minitune.corpus, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(sys, "stdin", io.StringIO((SAMPLES / "reviews.txt").read_text()))
    words = [str(word) for word in quicker(shlex.split(command), tmp_path / "run", tiny)]
    if "tests.exercises" in words:
        monkeypatch.chdir(tmp_path)  # where it writes files to fill in
    as_module = words[1] == "-m"
    monkeypatch.setattr(sys, "argv", words[2 if as_module else 1 :])
    try:
        if as_module:
            runpy.run_module(words[2], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(words[1], run_name="__main__")
    except SystemExit as ended:
        assert not ended.code, capfd.readouterr().err
    out, _ = capfd.readouterr()
    assert out.strip()
    if "--out" in words:
        assert any((tmp_path / "run").rglob("*.json")) or (tmp_path / "run.png").is_file()


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("torchrun ")])
def test_command_with_several_processes_runs(command, tmp_path, tiny):
    words = [str(word) for word in quicker(shlex.split(command), tmp_path / "run", tiny)]
    words[:1] = [sys.executable, "-m", "torch.distributed.run"]
    result = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "run" / "metrics.json").is_file()


def test_the_python_example_of_the_readme_runs(tiny, monkeypatch, capfd):
    (example,) = [block for page, language, block in BLOCKS if language == "python"]
    exec(example.replace("runs/finetune/adapter", str(tiny.fine_tuned)), {})
    assert re.match(r"(negative|positive) \{'negative': 0\.\d+", capfd.readouterr().out)


def anchors(page: Path) -> set[str]:
    """The names that headings of a page get: lower case, spaces as dashes, no punctuation."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [README, RESULTS, LOG], ids=lambda page: page.name)
def test_links_lead_to_files_and_headings_that_exist(page):
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if target.startswith("http"):
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


def test_readme_and_package_give_the_same_reading_order():
    listed = re.findall(r"^\| `(\w+)\.py` \|", README.read_text(), re.M)
    assert listed == re.findall(r"^    (\w+) {2,}\S", minitune.__doc__, re.M)
    lessons = {path.stem for path in (ROOT / "minitune").glob("*.py")} - {"__init__"}
    assert set(listed) == lessons
