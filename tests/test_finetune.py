"""Fine-tuning from end to end: one command, all methods, new reviews; nothing is lost."""

import contextlib
import csv
import html
import io
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import matplotlib.image
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import finetune
from minitune import finetuning, methods, self_training, soup
from minitune.bag_of_words import fit_ensemble
from minitune.checkpoint import load_classifier, save_model
from minitune.classification import Examples, TokenizedTexts
from minitune.data import Dataset, Reviews, label_index
from minitune.features import Features, pooled_layers
from minitune.model import BertConfig, BertForMaskedLM
from minitune.prediction import Classifier
from minitune.soup import average
from minitune.support import runs
from minitune.support.baselines import NBSVM
from minitune.support.cli import run_script
from minitune.support.model_names import default_model
from minitune.support.results import summarise
from minitune.support.runs import Run
from minitune.support.runtime import Runtime
from minitune.temperature import fit_temperature
from minitune.tokenizer import Tokenizer

ROOT = Path(__file__).parents[1]
CPU = Runtime.start("cpu", "fp32")
# One word decides, but one label in six is wrong, so that no method is right on all rows. Labels are
# not alike in anything: not in length, not in number, and one needs quotes.
WORDS = {
    "works": ["superb", "charming", "thrilling"],
    "falls flat, alas": ["dull", "clumsy", "tedious"],
}
LABELS = ["falls flat, alas", "works"]  # their order: the alphabet's
OTHERS = ["the", "a", "film", "story", "cast", "hour", "with", "of", "its", "and", "café"]
ROWS, TEST_ROWS, EPOCHS, WRONG = 240, 40, 5, 1 / 6
TINY = [
    *("--epochs", str(EPOCHS), "--max-len", "32", "--batch-tokens", "256", "--lr", "3e-3"),
    *("--adapter-size", "8", "--precision", "fp32", "--device", "cpu"),
]
METHODS = ["feature", "bitfit", "ia3", "lora", "adapter", "full"]
TRAINED = [*METHODS, "scratch"]
KEYS = {
    "method", "accuracy", "loss", "trainable_params", "total_params", "train_seconds", "tokens_per_second",
    "peak_memory_bytes", "saved_bytes", "train_examples", "seed", "device", "precision", "attention",
}  # fmt: skip


# What there is to learn from


def reviews(count: int, seed: int, of_five: int = 3) -> list[dict[str, str]]:
    """Rows with a text and a label, so many of five of which "works".

    In some texts the word that matters stands at the end of many.
    """
    rng, rows = random.Random(seed), []
    for i in range(count):
        label = LABELS[i % 5 < of_five]
        is_long = i % 10 in (1, 7)
        words = [rng.choice(OTHERS) for _ in range(40 if is_long else rng.randint(4, 8))]
        words.insert(40 if is_long else rng.randint(0, 4), rng.choice(WORDS[label]))
        if rng.random() < WRONG:
            label = LABELS[label == LABELS[0]]
        rows.append({"text": " ".join(words).capitalize() + f', "{i}"', "label": label})
    rng.shuffle(rows)
    return rows


def write_csv(path: Path, rows: list[dict[str, str]]) -> None:
    with open(path, "w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows(rows)


def contents(directory: Path) -> dict[str, bytes]:
    """All files under a directory."""
    paths = [path for path in directory.rglob("*") if path.is_file()]
    return {str(path.relative_to(directory)): path.read_bytes() for path in paths}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A directory with the model `base`, data.csv and test.csv; nothing in it may change."""
    folder = tmp_path_factory.mktemp("fine-tuning")
    rows = reviews(ROWS, seed=0)
    write_csv(folder / "data.csv", rows)
    write_csv(folder / "test.csv", reviews(TEST_ROWS, seed=1, of_five=2))
    tokenizer = Tokenizer.train([row["text"] for row in rows], 300)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
        hidden_dropout_prob=0.3,
    )
    model, direction = BertForMaskedLM(config), torch.randn(config.hidden_size)
    for sign, label in zip(
        (-1, 1), LABELS, strict=True
    ):  # as if pretrained: it knows which words are alike
        [ids] = zip(*tokenizer.encode(WORDS[label]), strict=True)
        model.bert.embeddings.word.weight.data[list(ids)] += sign * 0.1 * direction
    (folder / "base").mkdir()
    save_model(model, tokenizer, folder / "base")
    before = contents(folder)
    yield folder
    assert contents(folder) == before


def options(folder: Path, out: Path, *more: str) -> list[str]:
    """Of a command that trains. Later options win."""
    data = [
        "--model",
        folder / "base",
        "--data",
        folder / "data.csv",
        "--test",
        folder / "test.csv",
    ]
    return [str(word) for word in (*data, *TINY, "--out", out, *more)]


# Ways to run it


def run(*words: object, stdin: bytes = b"") -> SimpleNamespace:
    """`finetune.py WORDS` in this process: its status, out and err."""
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(io.TextIOWrapper(io.BytesIO(), "latin-1", newline="")) as out,
        contextlib.redirect_stderr(io.StringIO()) as err,
        pytest.raises(SystemExit) as ended,
    ):
        patch.setattr(sys, "argv", ["finetune.py", *map(str, words)])
        patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"))
        run_script(finetune.main)
    out.flush()
    printed = out.buffer.getvalue().decode(out.encoding)
    return SimpleNamespace(status=ended.value.code, out=printed, err=err.getvalue())


def succeed(*words: object, stdin: bytes = b"") -> SimpleNamespace:
    done = run(*words, stdin=stdin)
    assert done.status == 0, done.err
    return done


def assert_refused(*words: object, naming: object = "") -> None:
    done = run(*words)
    assert done.status == 2
    assert done.err.startswith("error: ") and done.err.count("\n") == 1
    assert str(naming) in done.err


# Processes to be killed come from a server that has imported everything once: importing torch takes
# longer than what is tested here.
KILLABLE = multiprocessing.get_context("forkserver")
KILLABLE.set_forkserver_preload(["torch", "tests.test_finetune", "minitune.support.plots"])


def run_apart(words: list[str], notes: Path, processor_seconds: float = 0) -> int | None:
    """The exit code of `finetune.py WORDS` in its own process, killed after so many seconds.

    Seconds of the processor, not of the clock, so that a busy machine kills at the same moments.
    """
    process = KILLABLE.Process(target=_apart, args=(words, notes, processor_seconds))
    process.start()
    process.join()
    return process.exitcode


def _apart(words: list[str], notes: Path, processor_seconds: float) -> None:
    torch.set_num_threads(1)
    sys.argv = ["finetune.py", *words]
    # Nothing handles SIGPROF: the system ends the process there and then, as with kill -9.
    signal.setitimer(signal.ITIMER_PROF, processor_seconds)
    with (
        open(notes, "a") as file,
        contextlib.redirect_stdout(file),
        contextlib.redirect_stderr(file),
    ):
        try:
            run_script(finetune.main)
        finally:
            print(f"processor seconds: {time.process_time()}")


# What was written


def metrics(run_directory: Path) -> dict:
    return json.loads((run_directory / "metrics.json").read_text())


def log(run_directory: Path) -> list[dict]:
    return [json.loads(line) for line in (run_directory / "log.jsonl").read_text().splitlines()]


def weights(run_directory: Path) -> dict[str, torch.Tensor]:
    [path] = run_directory.glob("*.safetensors")
    return load_file(path)


def assert_same_bits(one: Path, other: Path) -> None:
    a, b = weights(one), weights(other)
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def assert_picture(path: Path) -> None:
    pixels = matplotlib.image.imread(path)
    height, width = pixels.shape[:2]
    assert height > 300 and width > 500
    assert (
        len(np.unique(pixels.reshape(height * width, -1), axis=0)) > 10
    )  # there is something in it


def table(out: str) -> list[str]:
    """The lines of the comparison on stdout, without the heading."""
    [heading] = re.findall(r"^[\d,]+ test rows of .*:$", out, re.MULTILINE)
    lines = out.partition(heading)[2].strip().splitlines()
    assert lines[0].startswith("method") and lines[-1].startswith("wrote ")
    return lines[1:-1]


def rows_of_networks(out: str) -> list[str]:
    """Those whose figures are kept in runs; the others are measured again."""
    return [line for line in table(out) if line.split()[0] in TRAINED]


# One command, one table


@pytest.fixture(scope="module")
def compared(folder, tmp_path_factory):
    """All methods in one command: (OUT, what it printed)."""
    out = tmp_path_factory.mktemp("compared") / "finetune"
    done = succeed(*options(folder, out, "--method", *METHODS))
    assert done.err == ""
    return out, done.out


def test_it_prints_one_table_of_all_methods_and_three_to_beat(compared, folder):
    out, printed = compared
    assert printed.startswith(f"model: {folder / 'base'} (given by --model)")
    rows = [line.split() for line in table(printed)]
    assert [row[0] for row in rows] == ["majority", "nb-svm", "scratch", *METHODS]
    assert {row[1] for row in rows} == {"228"}  # of 240; 5% choose the best epoch
    accuracy = {row[0]: row[2] for row in rows}
    assert {
        name: f"{metrics(out / name)['accuracy']:.1%}" for name in TRAINED
    }.items() <= accuracy.items()


def test_it_compares_in_json_and_in_a_picture_too(compared):
    out, _ = compared
    compare = json.loads((out / "compare.json").read_text())
    assert [row["method"] for row in compare["rows"]][2:] == ["scratch", *METHODS]
    assert all(
        row["interval"][0] <= row["accuracy"] <= row["interval"][1] for row in compare["rows"]
    )
    assert compare["runs"][: len(TRAINED)] == [metrics(out / name) for name in TRAINED]
    assert_picture(out / "compare.png")
    assert {path.name for path in out.iterdir()} == {"compare.json", "compare.png", *TRAINED}


@pytest.mark.parametrize("method", TRAINED)
def test_metrics_and_log(compared, folder, method):
    out, printed = compared
    figures = metrics(out / method)
    assert figures.keys() >= KEYS
    assert (figures["method"], figures["seed"], figures["precision"]) == (method, 0, "fp32")
    assert 0 <= figures["accuracy"] <= 1 and figures["loss"] > 0
    assert figures["saved_bytes"] == next((out / method).glob("*.safetensors")).stat().st_size
    share = figures["trainable_params"] / figures["total_params"]
    assert share == 1 if method in ("full", "scratch") else 0 < share < 0.5
    count, total = f"{figures['trainable_params']:,}", f"{figures['total_params']:,}"
    assert f"trains {count} of {total} parameters" in printed
    entries = log(out / method)
    steps = [entry["step"] for entry in entries]
    assert steps == sorted(set(steps)) and steps[-1] == figures["steps"]
    validated = [entry for entry in entries if "validation" in entry]
    assert len(validated) == figures["epochs"] == EPOCHS
    assert figures["validation_accuracy"] == max(e["validation"]["accuracy"] for e in validated)
    best = validated[figures["best_epoch"] - 1]["validation"]
    assert (best["accuracy"], best["loss"]) == (
        figures["validation_accuracy"],
        figures["validation_loss"],
    )
    assert not (out / method / "resume").exists()


def test_it_learns(compared):
    for name in set(METHODS) - {"ia3"}:  # whose rate is three times that of this test
        losses = [e["validation"]["loss"] for e in log(compared[0] / name) if "validation" in e]
        assert losses[-1] < losses[0]
    accuracy = {name: metrics(compared[0] / name)["accuracy"] for name in METHODS}
    # Always saying "works" gives 0.35, the opposite 0.65.
    assert accuracy["full"] > 0.75 and accuracy["feature"] > 0.75


def test_full_leaves_a_bert_with_its_labels(compared, folder):
    out, _ = compared
    config = json.loads((out / "full" / "config.json").read_text())
    assert config["architectures"] == ["BertForSequenceClassification"]
    assert config["id2label"] == {str(i): name for i, name in enumerate(LABELS)}
    assert config["label2id"] == {name: i for i, name in enumerate(LABELS)}
    assert load_classifier(out / "full").config.id2label == dict(enumerate(LABELS))
    assert contents(out / "full").keys() - contents(folder / "base").keys() == {
        "log.jsonl", "metrics.json", "settings.json", "answers.json", "report.json", "report.html"
    }  # fmt: skip


@pytest.mark.parametrize("method", ["feature", "bitfit", "adapter"])
def test_the_others_leave_only_what_they_trained(compared, folder, method):
    directory = compared[0] / method
    files = {"trained.safetensors", "trained.json", "settings.json", "metrics.json", "log.jsonl"}
    files |= {"answers.json", "report.json", "report.html"}
    assert contents(directory).keys() == files
    tensors, figures = weights(directory), metrics(directory)
    statistics = (
        {"head.mean", "head.std"} if method == "feature" else set()
    )  # measured, not trained
    trained = {
        name.removeprefix("head."): t for name, t in tensors.items() if name not in statistics
    }
    assert sorted(trained) == sorted(name.removeprefix("head.") for name in figures["trained"])
    assert sum(tensor.numel() for tensor in trained.values()) == figures["trainable_params"]
    description = json.loads((directory / "trained.json").read_text())
    assert (description["method"], description["labels"]) == (method, LABELS)
    assert description["base"]["path"] == str(folder / "base")
    assert description["base"]["sha256"]


@pytest.mark.parametrize("method", ["lora", "ia3"])
def test_lora_and_ia3_leave_a_directory_of_peft(compared, folder, method):
    directory = compared[0] / method
    files = {"adapter_model.safetensors", "adapter_config.json", "answers.json"}
    files |= {"report.json", "report.html"}
    assert contents(directory).keys() == files | {"settings.json", "metrics.json", "log.jsonl"}
    count = sum(tensor.numel() for tensor in weights(directory).values())
    assert count == metrics(directory)["trainable_params"]
    config = json.loads((directory / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(folder / "base")
    assert config["auto_mapping"]["minitune"]["labels"] == LABELS


@pytest.mark.parametrize("method", ["lora", "ia3", "adapter", "bitfit", "feature"])
def test_a_run_can_be_trained_on(compared, folder, tmp_path, method):
    start, out = compared[0] / method, tmp_path / "out"
    words = ["--model", start, "--method", method, "--epochs", "1", "--lr", "1e-12"]
    succeed(*options(folder, out, *words))
    assert metrics(out / method)["validation_accuracy"] == metrics(start)["validation_accuracy"]
    before, after = weights(start), weights(out / method)
    assert before.keys() == after.keys()
    for name in before:
        torch.testing.assert_close(after[name], before[name], rtol=1e-5, atol=1e-6)
    one, other = (answers("A superb film", "--model", run) for run in (start, out / method))
    assert one[0]["probabilities"] == pytest.approx(other[0]["probabilities"], abs=1e-5)


def test_a_run_that_is_trained_on_keeps_its_size_and_its_settings_say_so(
    compared, folder, tmp_path
):
    start = tmp_path / "start" / "lora"
    words = ["--method", "lora", "--epochs", "1", "--lora-rank", "3", "--rslora"]
    succeed(*options(folder, tmp_path / "start", *words))
    words = ["--model", start, "--method", "lora", "--epochs", "1"]
    succeed(*options(folder, tmp_path / "on", *words))
    settings = json.loads((tmp_path / "on" / "lora" / "settings.json").read_text())
    config = json.loads((tmp_path / "on" / "lora" / "adapter_config.json").read_text())
    assert settings["lora_rank"] == config["r"] == 3
    assert settings["rslora"] is config["use_rslora"] is True
    out = tmp_path / "refused"
    assert_refused(*options(folder, out, *words, "--lora-rank", "2"), naming="has 3")
    words = ["--model", compared[0] / "adapter", "--method", "adapter", "--adapter-size", "3"]
    assert_refused(*options(folder, out, *words), naming="--adapter-size 3")
    assert not out.exists()


def test_a_run_is_not_trained_on_by_another_method_or_for_other_labels(compared, folder, tmp_path):
    out, start = tmp_path / "out", compared[0] / "lora"
    words = options(folder, out, "--model", start, "--method", "ia3")
    assert_refused(*words, naming="is a run of lora")
    other = (folder / "data.csv").read_text(encoding="utf-8").replace(",works", ",shines")
    (tmp_path / "other.csv").write_text(other, encoding="utf-8")
    words = options(folder, out, "--model", start, "--method", "lora")
    words[words.index("--test") : words.index("--test") + 2] = []
    assert_refused(*words, "--data", tmp_path / "other.csv", naming="labels")
    assert_refused(*options(folder, out, "--base", folder / "base"), naming="--base")
    assert not out.exists()


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_run_is_not_overwritten_by_a_training_that_starts_from_it(
    compared, folder, tmp_path, method
):
    shutil.copytree(compared[0] / method, tmp_path / method)
    words = ["--model", tmp_path / method, "--method", method, "--overwrite"]
    before = contents(tmp_path)
    assert_refused(*options(folder, tmp_path, *words), naming="--overwrite would delete")
    assert contents(tmp_path) == before


@pytest.mark.parametrize("method", ["lora", "ia3"])
def test_a_merged_run_gives_the_answers_of_the_run(compared, folder, tmp_path, method):
    out = tmp_path / "merged"
    done = succeed("--merge", compared[0] / method, "--out", out)
    assert "falls flat, alas, works" in done.out
    texts = texts_of(folder)[:5]
    before = answers(*texts, "--model", compared[0] / method)
    after = answers(*texts, "--model", out)
    for one, other in zip(before, after, strict=True):
        assert one.pop("probabilities") == pytest.approx(other.pop("probabilities"), abs=1e-5)
        assert one == other
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == ["BertForSequenceClassification"]
    run, nothing = str(compared[0] / method), tmp_path / "nothing"
    succeed("--merge", run, run, "--weights", "1", "-1", "--out", nothing)
    base, left = weights(folder / "base"), weights(nothing)
    for name in base.keys() & left.keys():  # a run less itself leaves the base
        torch.testing.assert_close(left[name], base[name], rtol=0, atol=1e-6)
    assert not left["classifier.weight"].any()
    assert_refused("--merge", out, "--out", tmp_path / "again", naming="holds no LoRA")
    assert_refused("--merge", compared[0] / method, "--out", out, naming="--overwrite")
    inside = compared[0] / method / "merged"
    assert_refused("--merge", compared[0] / method, "--out", inside, naming="lies inside")
    beside = compared[0] / "merged"  # where the next finetune.py would find what is no run of it
    assert_refused("--merge", compared[0] / method, "--out", beside, naming="which holds runs")
    assert not inside.exists() and not beside.exists()
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize(
    "words, naming",
    [
        (["--lora-rank", "0"], "--lora-rank"),
        (["--lora-rank", "33"], "rank 33"),
        (["--lora-targets", "query,dense"], "no target dense"),
        (["--lora-targets", "query value"], "no target"),
        (["--lora-dropout", "1"], "--lora-dropout"),
        (["--merge", "absent"], "--out"),
        (["--merge", "absent", "--predict", "A film."], "--merge"),
        (["--weights", "1"], "--weights goes with --merge"),
    ],
)
def test_bad_options_of_lora_are_one_line_before_anything_is_trained(
    folder, tmp_path, words, naming
):
    out = tmp_path / "out"
    if "--merge" in words:
        assert_refused(*words, naming=naming)
    else:
        assert_refused(*options(folder, out, "--method", "full", "lora", *words), naming=naming)
    assert not out.exists()


# What the figures claim, computed again from what was saved


@pytest.mark.parametrize("method", TRAINED)
def test_probabilities_are_those_of_the_answers_at_the_saved_temperature(compared, folder, method):
    directory, rows = compared[0] / method, rows_of(folder)
    saved, figures = json.loads((directory / "answers.json").read_text()), metrics(directory)
    assert saved["names"] == LABELS and saved["temperature"] == figures["temperature"] != 1
    validation = (torch.tensor(saved["validation"][key]) for key in ("logits", "labels"))
    assert fit_temperature(*validation) == pytest.approx(figures["temperature"], rel=1e-3)
    classifier = Classifier.load(str(directory), CPU)
    for split in ("validation", "test"):
        logits = torch.tensor(saved[split]["logits"], dtype=torch.float64)
        expected = (logits / figures["temperature"]).softmax(-1)
        answers = classifier.predict([row["text"] for row in rows[split]])
        found = [[answer.probabilities[name] for name in LABELS] for answer in answers]
        torch.testing.assert_close(torch.tensor(found).double(), expected, rtol=0, atol=1e-5)
        assert [LABELS[i] for i in logits.argmax(-1)] == [answer.label for answer in answers]
        assert [LABELS[i] for i in saved[split]["labels"]] == [row["label"] for row in rows[split]]
    found = [LABELS.index(answer.label) for answer in answers]
    f1 = []
    for k in range(2):
        right = sum(a == b == k for a, b in zip(found, saved["test"]["labels"], strict=True))
        f1.append(2 * right / (found.count(k) + saved["test"]["labels"].count(k)))
    assert figures["macro_f1"] == pytest.approx(sum(f1) / 2)


def rows_of(folder: Path) -> dict[str, list[dict[str, str]]]:
    """The rows of each split: all of test.csv, and of data.csv the last 5% of each label apart."""
    rows, test = (
        list(csv.DictReader((folder / name).read_text(encoding="utf-8").splitlines()))
        for name in ("data.csv", "test.csv")
    )
    held_out = []
    for label in LABELS:
        of_label = [row for row in rows if row["label"] == label]
        held_out += of_label[len(of_label) - round(0.05 * len(of_label)) :]
    return {
        "train": [row for row in rows if row not in held_out],
        "validation": [row for row in rows if row in held_out],
        "test": test,
    }


def few(rows: list[dict], count: int, seed: int) -> list[dict]:
    """The choice of training or validation rows that a run with few labels makes."""
    labels = torch.tensor([LABELS.index(row["label"]) for row in rows])
    reviews = Reviews(dict(enumerate(LABELS)), texts={}, labels={"train": labels})
    chosen = reviews.balanced_subset("train", count, seed)
    return [rows[i] for i in chosen]


def score(directory: Path, rows: list[dict]) -> tuple[float, float]:
    """(accuracy, loss) on these rows of what a run saved, one text after another."""
    classifier, right, loss = Classifier.load(str(directory), CPU), 0, 0.0
    assert classifier.model.temperature == metrics(directory)["temperature"]
    classifier.model.temperature = 1.0
    for row in rows:
        [answer] = classifier.predict([row["text"]])
        right += answer.label == row["label"]
        loss -= math.log(answer.probabilities[row["label"]])
    return right / len(rows), loss / len(rows)


def assert_figures(directory: Path, rows: dict[str, list[dict]]) -> None:
    """The figures of a run are those of the saved model on these rows, and on no others."""
    figures = metrics(directory)
    for split, prefix in (("test", ""), ("validation", "validation_")):
        accuracy, loss = score(directory, rows[split])
        assert figures[f"{prefix}accuracy"] == accuracy, split
        assert figures[f"{prefix}loss"] == pytest.approx(loss, abs=1e-5), split
    losses = [score(directory, rows[split])[1] for split in rows]
    assert min(abs(a - b) for a, b in itertools.combinations(losses, 2)) > 1e-4


@pytest.mark.parametrize("method", [name for name in TRAINED if name != "ia3"])
def test_the_report_has_the_worst_mistakes_and_what_a_bag_of_words_says(compared, folder, method):
    rows, directory = rows_of(folder), compared[0] / method
    shown = json.loads((directory / "report.json").read_text())
    model = NBSVM().fit(
        [row["text"] for row in rows["train"]],
        np.array([LABELS.index(row["label"]) for row in rows["train"]]),
        2,
    )
    opinions = model.predict([row["text"] for row in rows["test"]])
    answers = Classifier.load(str(directory), CPU).predict([row["text"] for row in rows["test"]])
    wrong = []
    for i, (row, answer) in enumerate(zip(rows["test"], answers, strict=True)):
        if row["label"] != answer.label:
            wrong.append((answer.probabilities[row["label"]], i))
    assert [m["row"] for m in shown["mistakes"]] == [i for _, i in sorted(wrong)][:20] != []
    page = html.unescape((directory / "report.html").read_text())
    for mistake in shown["mistakes"]:
        text = rows["test"][mistake["row"]]["text"]
        assert mistake["text"] == text and text in page
        assert mistake["bag_of_words"] == LABELS[opinions[mistake["row"]]]
    assert [row["method"] for row in shown["baselines"]] == ["majority", "nb-svm"]
    assert f"{metrics(directory)['macro_f1']:.3f}" in page


def test_a_bag_of_words_answers_together_with_the_network(compared, folder, tmp_path):
    rows, run_directory = rows_of(folder), tmp_path / "out" / "adapter"
    shutil.copytree(compared[0] / "adapter", run_directory)
    before = contents(run_directory)
    words = options(folder, tmp_path / "out", "--method", "adapter")
    done = succeed(*words, "--resume", "--bag")
    assert [line.split("  ")[0] for line in table(done.out)][2:] == ["adapter", "adapter + bag"]
    changed = {name for name, data in contents(run_directory).items() if data != before.get(name)}
    assert changed == {"bag.json", "report.json", "report.html"}  # the network is as it was
    saved, answers = (
        json.loads((run_directory / f"{name}.json").read_text()) for name in ("bag", "answers")
    )
    labels = np.array([LABELS.index(row["label"]) for row in rows["train"]])
    model = NBSVM().fit([row["text"] for row in rows["train"]], labels, 2)
    accuracy = {}
    for split in ("validation", "test"):
        logits = saved["network"] * np.array(answers[split]["logits"])
        logits += saved["bag"] * model.scores([row["text"] for row in rows[split]])
        accuracy[split] = (logits.argmax(1) == answers[split]["labels"]).mean()
    assert saved["figures"]["accuracy"] == accuracy["test"]
    assert saved["figures"]["validation_accuracy"] == accuracy["validation"]
    compare = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert compare["rows"][-1]["accuracy"] == accuracy["test"]
    assert score(run_directory, rows["test"])[0] == accuracy["test"]
    best = fit_ensemble(
        [torch.tensor(answers["validation"]["logits"]),
         torch.from_numpy(model.scores([row["text"] for row in rows["validation"]]))],
        torch.tensor(answers["validation"]["labels"]),
    )  # fmt: skip
    assert [saved["network"], saved["bag"]] == pytest.approx(best, abs=1e-3)
    said = succeed("--model", run_directory, "--predict", "A superb film", "--explain").err
    assert "without its bag of words" in said
    figures = metrics(run_directory)
    assert (saved["figures"]["loss"], accuracy["test"]) != (figures["loss"], figures["accuracy"])
    assert f"{accuracy['test']:.1%}" in (run_directory / "report.html").read_text()
    # A later command without it keeps the row; a new run in its place has none.
    assert table(succeed(*words, "--resume").out)[-1].startswith("adapter + bag")
    succeed(*words, "--overwrite", "--epochs", "1")
    assert not (run_directory / "bag.json").exists()


def test_the_bag_of_words_of_few_rows_has_learned_from_these_alone(folder, tmp_path):
    rows, few_rows = rows_of(folder), {}
    words = ["--method", "feature", "--train-examples", "24", "--seed", "3", "--bag"]
    succeed(*options(folder, tmp_path / "out", *words))
    saved, answers = (
        json.loads((tmp_path / "out" / "feature" / f"{name}.json").read_text())
        for name in ("bag", "answers")
    )
    for split, count in (("train", 24), ("validation", 12)):
        few_rows[split] = few(rows[split], count, 3)
    labels = np.array([LABELS.index(row["label"]) for row in few_rows["train"]])
    model = NBSVM().fit([row["text"] for row in few_rows["train"]], labels, 2)
    known = [LABELS.index(row["label"]) for row in few_rows["validation"]]
    assert answers["validation"]["labels"] == known
    scores = torch.from_numpy(model.scores([row["text"] for row in few_rows["validation"]]))
    logits = torch.tensor(answers["validation"]["logits"])
    best = fit_ensemble([logits, scores], torch.tensor(known))
    assert [saved["network"], saved["bag"]] == pytest.approx(best, abs=1e-3)
    assert saved["figures"]["train_examples"] == 24


# Without ia3: by chance it has the same loss on the rows of two splits.
@pytest.mark.parametrize("method", [name for name in TRAINED if name != "ia3"])
def test_accuracy_and_loss_are_those_of_the_saved_model(compared, folder, method):
    assert_figures(compared[0] / method, rows_of(folder))


def wilson(accuracy: float, n: int) -> tuple[float, float]:
    """The ends p of the interval are where |p - accuracy| is 1.96 standard errors of p."""
    z = 1.96
    a, b, c = 1 + z * z / n, -(2 * accuracy + z * z / n), accuracy**2
    root = math.sqrt(max(0, b * b - 4 * a * c))
    return (-b - root) / (2 * a), (-b + root) / (2 * a)


def assert_comparison(out: Path, folder: Path, seeds: dict[int | None, list[int]]) -> None:
    """compare.json says what follows from the runs in OUT and from the rows alone.

    `seeds` are those of each number of training rows, None for all of them.
    """
    compare, rows = json.loads((out / "compare.json").read_text()), rows_of(folder)
    runs = [json.loads(path.read_text()) for path in out.rglob("metrics.json")]
    assert [run for run in compare["runs"] if "saved_bytes" in run] == sorted(
        runs, key=compare["runs"].index
    )
    for size, of_size in seeds.items():
        chosen = [few(rows["train"], size, seed) if size else rows["train"] for seed in of_size]
        baselines = {"majority": [], "nb-svm": []}
        for learned in chosen if size else chosen[:1]:
            labels = [row["label"] for row in learned]
            frequent = max(LABELS, key=labels.count)
            right = [row["label"] == frequent for row in rows["test"]]
            baselines["majority"].append(sum(right) / len(right))
            indices = np.array([LABELS.index(label) for label in labels])
            model = NBSVM().fit([row["text"] for row in learned], indices, 2)
            answers = model.predict([row["text"] for row in rows["test"]])
            right = [
                row["label"] == LABELS[i] for row, i in zip(rows["test"], answers, strict=True)
            ]
            baselines["nb-svm"].append(sum(right) / len(right))
        count = size or len(rows["train"])
        of_count = [run for run in runs if run["train_examples"] == count]
        for method in {run["method"] for run in of_count} | baselines.keys():
            accuracies = baselines.get(method) or [
                run["accuracy"] for run in of_count if run["method"] == method
            ]
            [row] = [
                row
                for row in compare["rows"]
                if (row["method"], row["train_examples"]) == (method, count)
            ]
            assert row["seeds"] == len(accuracies)
            assert row["accuracy"] == pytest.approx(statistics.mean(accuracies), abs=1e-12)
            assert row["interval"] == pytest.approx(wilson(row["accuracy"], TEST_ROWS), abs=1e-9)
            if len(accuracies) > 1:
                assert row["spread"] == pytest.approx(statistics.stdev(accuracies), abs=1e-12)
            else:
                assert row["spread"] is None


def test_the_comparison_follows_from_the_runs_and_the_rows(compared, folder):
    out, _ = compared
    assert_comparison(out, folder, {None: [0]})
    rows = {row["method"]: row for row in json.loads((out / "compare.json").read_text())["rows"]}
    assert rows["majority"]["accuracy"] == 0.35  # the label of most training rows
    assert len({row["accuracy"] for row in rows.values()}) >= 4


@pytest.fixture(scope="module")
def few_labels(folder, tmp_path_factory):
    """Features from 8 and from 6 labels with three seeds: (OUT, what it printed)."""
    out = tmp_path_factory.mktemp("few") / "out"
    sizes = ("--train-examples", "8", "6", "--seeds", "3", "--seed", "1")
    return out, succeed(*options(folder, out, "--method", "feature", *sizes)).out


def test_few_labels_choose_the_rows_that_train_and_half_as_many_that_validate(few_labels, folder):
    out, printed = few_labels
    rows, means = rows_of(folder), []
    for path, size, seed in (
        ("8", 8, 1), ("8/seed-2", 8, 2), ("8/seed-3", 8, 3), ("6", 6, 1), ("6/seed-2", 6, 2)
    ):  # fmt: skip
        directory = out / "feature" / path
        assert (metrics(directory)["train_examples"], metrics(directory)["seed"]) == (size, seed)
        counts = {"train": size, "validation": size // 2}
        chosen = {split: few(rows[split], count, seed) for split, count in counts.items()}
        assert_figures(directory, chosen | {"test": rows["test"]})
        # The head's mean is that of the features of the rows that it learned from.
        model = Classifier.load(str(directory), CPU)
        sequences = TokenizedTexts([row["text"] for row in chosen["train"]], model.tokenizer, 32)
        with torch.no_grad():
            features = pooled_layers(model.model.bert, sequences.pack())
        means.append(weights(directory)["head.mean"])
        torch.testing.assert_close(means[-1], features.mean(0), rtol=0, atol=1e-5)
    assert len({tuple(mean.tolist()) for mean in means}) == len(means)


def test_the_comparison_of_few_labels_follows_from_the_runs_and_the_rows(few_labels, folder):
    out, printed = few_labels
    assert_comparison(out, folder, {6: [1, 2, 3], 8: [1, 2, 3]})
    rows = [line.split() for line in table(printed)]
    assert [row[:2] for row in rows] == [
        [method, count] for count in ("6", "8") for method in ("majority", "nb-svm", "feature")
    ]
    assert all(row[3] == "±" for row in rows if row[0] == "feature")
    assert len({metrics(path.parent)["accuracy"] for path in out.rglob("metrics.json")}) > 2
    assert_picture(out / "compare.png")


def test_a_finished_comparison_of_few_labels_prints_its_table_again(few_labels):
    out, printed = few_labels
    again = succeed("--resume", "--out", out)
    assert rows_of_networks(again.out) == rows_of_networks(printed)


# Learning from reviews without labels


UNLABELLED = ["--unlabelled", "--words", "works=superb", "falls flat, alas=dull", "--epochs", "2"]


@contextlib.contextmanager
def with_other_labels(known: np.ndarray) -> Iterator[None]:
    """In this context all training rows have the wrong label but those that are `known`."""
    load, subset = Reviews.load.__func__, Reviews.balanced_subset

    def load_wrong(cls: type, dataset: object) -> Reviews:
        reviews = load(cls, dataset)
        unknown = np.setdiff1d(np.arange(len(reviews.labels["train"])), known)
        reviews.labels["train"][unknown] = 1 - reviews.labels["train"][unknown]
        return reviews

    def choose(self: Reviews, split: str, count: int, seed: int) -> np.ndarray:
        return known if split == "train" else subset(self, split, count, seed)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Reviews, "load", classmethod(load_wrong))
        patch.setattr(Reviews, "balanced_subset", choose)
        yield


@pytest.mark.parametrize("method, count", [("feature", 0), ("full", 8)])
def test_no_label_but_those_that_are_given_is_read(folder, tmp_path, method, count):
    data = Dataset(str(folder / "data.csv"), str(folder / "test.csv"))
    known = Reviews.load(data).balanced_subset("train", count, 0)
    words = ["--method", method, "--train-examples", count, *UNLABELLED]
    one, other = tmp_path / "one", tmp_path / "other"
    succeed(*options(folder, one, *words))
    with with_other_labels(known):
        succeed(*options(folder, other, *words))
    assert_same_bits(one / method, other / method)
    figures = metrics(one / method)
    assert figures["train_examples"] == count and figures["unlabelled"] > 80
    assert figures["temperature"] == 1  # a teacher's answers do not tell how sure one may be
    assert figures["accuracy"] == metrics(other / method)["accuracy"]


def test_the_prompt_is_asked_once_for_all_sizes_and_not_again_by_a_run_that_is_resumed(
    folder, tmp_path, monkeypatch
):
    asked, ask = [], self_training.build
    monkeypatch.setattr(self_training, "build", lambda *a, **k: asked.append(1) or ask(*a, **k))
    words = ["--method", "feature", *UNLABELLED, "--train-examples"]
    succeed(*options(folder, tmp_path / "both", *words, "0", "8"))
    assert len(asked) == 1
    with monkeypatch.context() as patch:
        patch.setattr(finetuning, "train", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        assert run(*options(folder, tmp_path / "one", *words, "8")).status == 130
    assert len(asked) == 2
    succeed(*options(folder, tmp_path / "one", *words, "8", "--resume"))
    assert len(asked) == 2
    assert_same_bits(tmp_path / "both" / "feature" / "8", tmp_path / "one" / "feature")


def test_a_soup_keeps_the_best_of_its_trainings_and_of_their_averages(folder, tmp_path):
    out = tmp_path / "out"
    done = succeed(*options(folder, out, "--method", "adapter", "--soup", "3", "--epochs", "2"))
    figures, entries = metrics(out / "adapter"), log(out / "adapter")
    assert [e["training"] for e in entries if "validation" in e] == [1, 1, 2, 2, 3, 3]
    candidates = figures["candidates"]
    trainings = [one for one in candidates if one["average_of"] == 1]
    averages = sorted(one["average_of"] for one in candidates if one["average_of"] > 1)
    assert sorted(one["best_training"] for one in trainings) == [1, 2, 3] and averages == [2, 3]
    for training in trainings:
        number = training["best_training"]
        validated = [e for e in entries if "validation" in e and e["training"] == number]
        best = max(validated, key=lambda e: (e["validation"]["accuracy"], -e["validation"]["loss"]))
        assert training["best_epoch"] == validated.index(best) + 1
        assert {key: training[key] for key in ("accuracy", "loss")} == best["validation"]
    assert len({training["loss"] for training in trainings}) == 3  # each had an order of its own
    for mean in candidates:
        if mean["average_of"] == 1:
            continue
        line = f"the average of {mean['average_of']} trainings: validation accuracy "
        assert f"{line}{mean['accuracy']:.2%}\n" in done.out
    best = max(candidates, key=lambda c: (c["accuracy"], -c["loss"]))
    assert (figures["validation_accuracy"], figures["validation_loss"]) == (
        best["accuracy"],
        best["loss"],
    )
    for key in ("best_training", "average_of"):
        assert figures[key] == best.get(key)
    last = {e["training"]: e["step"] for e in entries}
    assert figures["steps"] == sum(last.values())


@pytest.mark.parametrize("apart", [0, 1000])
def test_trainings_of_a_soup_start_alike_and_differ_by_their_seed_alone(
    folder, tmp_path, monkeypatch, apart
):
    words = ("--method", "adapter", "--epochs", "1", "--seed", "3")
    succeed(*options(folder, tmp_path / "alone", *words))
    kept = []
    monkeypatch.setattr(soup, "SOUP_SEEDS", apart)
    monkeypatch.setattr(soup, "average", lambda these: kept.extend(these) or average(these))
    succeed(*options(folder, tmp_path / "soup", *words, "--soup", "2"))
    alone = weights(tmp_path / "alone" / "adapter")
    assert [all(torch.equal(t, alone[name]) for name, t in one.items()) for one in kept] == [
        True,
        apart == 0,
    ]
    for name, mean in average(kept).items():
        expected = (kept[0][name].double() + kept[1][name].double()) / 2
        torch.testing.assert_close(mean.double(), expected, atol=1e-7, rtol=0)


def test_the_comparison_keeps_the_methods_of_earlier_calls_on_the_same_rows(
    folder, tmp_path, monkeypatch
):
    out, data = tmp_path / "out", shutil.copy(folder / "data.csv", tmp_path / "data.csv")
    words = ("--data", str(data), "--epochs", "1", "--method")

    def methods():
        rows = json.loads((out / "compare.json").read_text())["rows"]
        return [row["method"] for row in rows]

    succeed(*options(folder, out, *words, "feature"))
    first = metrics(out / "feature")
    done = succeed(*options(folder, out, *words, "adapter"))
    assert methods() == ["majority", "nb-svm", "feature", "adapter"]
    assert [line.split()[0] for line in table(done.out)] == methods()
    compare = json.loads((out / "compare.json").read_text())
    assert compare["runs"][:2] == [first, metrics(out / "adapter")]
    # Replaced on request, and the other one is kept.
    assert_refused(*options(folder, out, *words, "feature"), naming="--overwrite")
    succeed(*options(folder, out, *words, "feature", "--overwrite", "--seed", "3"))
    assert metrics(out / "feature")["seed"] == 3 and methods()[2:] == ["feature", "adapter"]
    # On another base, or on other rows, accuracies are no comparison.
    other = shutil.copytree(folder / "base", tmp_path / "base")
    tensors = load_file(other / "model.safetensors")
    tensors["cls.predictions.bias"] += 1
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    succeed(*options(folder, out, *words, "bitfit", "--model", str(other)))
    assert methods() == ["majority", "nb-svm", "bitfit"]
    write_csv(Path(data), reviews(ROWS, seed=5))
    succeed(*options(folder, out, *words, "full"))
    assert methods() == ["majority", "nb-svm", "full"]


def test_a_figure_that_not_every_seed_has_is_in_no_mean():
    """The best epoch of a soup, for example, where the average was better for one of the seeds."""
    common = {"method": "full", "train_examples": 8}
    runs = [
        common | {"accuracy": 0.5, "seed": 0, "best_epoch": 3, "steps": 7},
        common | {"accuracy": 0.6, "seed": 1, "best_epoch": None, "steps": 9},
    ]
    for group in (runs, runs[::-1]):
        [row] = summarise(group, TEST_ROWS)
        assert row["steps"] == 8 and "best_epoch" not in row


def test_a_picture_that_fails_is_a_warning_and_loses_nothing(folder, tmp_path, monkeypatch, capfd):
    def fail(*_):
        raise RuntimeError("no font")

    monkeypatch.setattr("minitune.support.plots.plot_comparison", fail)
    monkeypatch.setattr("minitune.support.report.write_report", fail)
    monkeypatch.setattr(
        sys, "argv", ["finetune.py", *options(folder, tmp_path, "--method", "feature")]
    )
    finetune.main()
    warnings = capfd.readouterr().err
    assert "compare.png was not drawn: no font" in warnings
    assert "report.html was not drawn: no font" in warnings
    assert Classifier.load(str(tmp_path / "feature"), CPU).labels == dict(enumerate(LABELS))
    assert_comparison(tmp_path, folder, {None: [0]})


@pytest.mark.parametrize("content", ["{}", '{"method": "feature"}', "[]", "NaN"])
def test_damaged_figures_of_an_earlier_run_are_an_error_before_anything_is_trained(
    folder, tmp_path, content
):
    succeed(*options(folder, tmp_path, "--method", "feature", "--epochs", "1"))
    (tmp_path / "feature" / "metrics.json").write_text(content)
    before = contents(tmp_path)
    words = options(folder, tmp_path, "--method", "adapter", "--epochs", "1")
    assert_refused(*words, naming=tmp_path / "feature" / "metrics.json")
    assert contents(tmp_path) == before


@pytest.mark.parametrize("experiment", [None, {"method": "feature"}, {"method": "full"}, "feature"])
def test_settings_that_do_not_fit_the_figures_beside_them_are_an_error(
    folder, tmp_path, experiment
):
    succeed(*options(folder, tmp_path, "--method", "feature", "--epochs", "1"))
    settings = tmp_path / "feature" / "settings.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"experiment": experiment}))
    words = options(folder, tmp_path, "--method", "adapter", "--epochs", "1")
    assert_refused(*words, naming=tmp_path / "feature" / "metrics.json")
    assert not (tmp_path / "adapter").exists()


def test_a_seed_gives_the_same_bits_alone_and_among_others_and_another_gives_others(
    folder, tmp_path
):
    words = ("--method", "adapter", "--epochs", "1")
    succeed(*options(folder, tmp_path / "two", *words, "--seeds", "2", "--seed", "5"))
    succeed(*options(folder, tmp_path / "one", *words, "--seed", "6"))
    five, six = (tmp_path / "two" / "adapter" / path for path in ("", "seed-6"))
    assert [metrics(path)["seed"] for path in (five, six)] == [5, 6]
    assert_same_bits(six, tmp_path / "one" / "adapter")
    a, b = weights(five), weights(six)
    assert not any(torch.equal(a[name], b[name]) for name in a)


DEFAULT_RUN = {"data": "imdb", "init": None, "vocab_size": 8192}


def test_without_a_model_the_last_run_of_train_py_on_imdb_is_taken(folder, tmp_path, monkeypatch):
    runs = {  # the newest first
        "toy": ("pretrain", DEFAULT_RUN | {"data": "mine.txt"}),
        "more": ("pretrain", DEFAULT_RUN | {"init": "minilm"}),
        "words": ("pretrain", DEFAULT_RUN | {"vocab_size": 300}),
        "tuned": ("full", DEFAULT_RUN),
        "x": ("pretrain", DEFAULT_RUN),
        "older": ("pretrain", DEFAULT_RUN),
    }
    for age, (name, (method, settings)) in enumerate(runs.items()):
        directory = shutil.copytree(folder / "base", tmp_path / "runs" / name)
        (directory / "settings.json").write_text(json.dumps(settings))
        path = directory / "metrics.json"
        path.write_text(json.dumps({"method": method, "steps": 4148, "loss": 3.752}))
        os.utime(path, (time.time(), time.time() - age))
    monkeypatch.chdir(tmp_path)
    words = options(folder, Path("runs/finetune"), "--method", "feature", "--epochs", "1")[2:]
    first_line = succeed(*words).out.splitlines()[0]
    assert first_line.startswith("model: runs/x (the last run of train.py on IMDb: 4,148 steps, ")
    assert "loss 3.75)" in first_line
    assert metrics(tmp_path / "runs" / "finetune" / "feature")["model"] == "runs/x"


def test_a_run_on_other_text_is_named_and_not_taken(tmp_path, monkeypatch):
    directory = tmp_path / "runs" / "toy"
    directory.mkdir(parents=True)
    (directory / "settings.json").write_text(json.dumps(DEFAULT_RUN | {"data": "mine.txt"}))
    (directory / "metrics.json").write_text(json.dumps({"method": "pretrain"}))
    monkeypatch.chdir(tmp_path)
    name, why = default_model()
    assert name == "reference" and "runs/toy was trained on other text: name it with --model" in why


@pytest.mark.parametrize(
    ("method", "init", "embeddings", "lowest_layer"),
    [("full", None, 5, 1 / 3), ("full", "minilm", 1, 1 / 3), ("full", "no run", 1, 1 / 3)]
    + [("scratch", "no run", 5, 1), ("adapter", None, 1, 1)],
)
def test_word_vectors_and_lower_layers_learn_at_rates_of_their_own(
    folder, tmp_path, method, init, embeddings, lowest_layer
):
    model = shutil.copytree(folder / "base", tmp_path / "model")
    if init != "no run":
        (model / "metrics.json").write_text(json.dumps({"method": "pretrain"}))
        (model / "settings.json").write_text(json.dumps({"init": init}))
    done = succeed(
        *options(
            folder, tmp_path / "out", "--model", str(model), "--method", method, "--epochs", "1"
        )
    )
    assert (", embeddings at 5 times that" in done.out) == (embeddings == 5)
    assert (", lowest layer at 0.33 times that" in done.out) == (lowest_layer != 1)
    expected = {"embeddings": embeddings, "lowest_layer": lowest_layer}
    assert metrics(tmp_path / "out" / method)["lr_multipliers"] == expected


@pytest.mark.parametrize(
    ("method", "rows", "length", "epochs", "batch_tokens"),
    [
        ("full", 8, 10, 20, 10),  # a row a step, and no more than 20 epochs
        ("full", 800, 10, 16, 320),  # 32 rows a step, and 400 steps
        ("bitfit", 12_800, 10, 1, 320),
        ("adapter", 20_000, 300, 1, 4096),  # fewer rows where they are long
        ("feature", 20_000, 1, 20, 256),
        ("scratch", 100, 5000, 4, 5000),  # at least one row
    ],
)
def test_the_recipe_suits_the_number_of_rows(method, rows, length, epochs, batch_tokens):
    lengths = np.full(rows, length)
    train = Examples(SimpleNamespace(lengths=lengths, unit="tokens"), torch.zeros(rows).long())
    args = SimpleNamespace(epochs=None, batch_tokens=None, lr=None)
    recipe = methods.METHODS[method].recipe(args, train, 768, Path("no run"))
    assert (recipe["epochs"], recipe["batch_tokens"]) == (epochs, batch_tokens)
    args = SimpleNamespace(epochs=3, batch_tokens=6000, lr=0.5)
    given = methods.METHODS[method].recipe(args, train, 768, Path("no run"))
    assert [given[key] for key in ("epochs", "batch_tokens", "lr")] == [3, 6000, 0.5]


def test_the_learning_rates_of_the_methods():
    lr = {name: method.lr(768) for name, method in methods.METHODS.items()}
    of_all = {"full": 20 / 768**2, "scratch": 20 / 768**2, "prompt": 20 / 768**2}
    frozen = {"feature": 3e-4, "bitfit": 3e-3, "ia3": 1e-2, "lora": 200 / 768**2, "adapter": 1e-2}
    assert lr == frozen | of_all
    train = Examples(Features(torch.zeros(9, 1)), torch.zeros(9).long())
    args = SimpleNamespace(epochs=None, batch_tokens=None, lr=None)
    recipe = methods.METHODS["adapter"].recipe(args, train, 768, Path("no run"))
    assert (recipe["optimizer"], recipe["adamw_lr"]) == ("muon", pytest.approx(2e-3))


def test_the_lowest_layer_of_full_learns_a_third_of_what_the_highest_does(compared, folder):
    # A step of AdamW is about as large as the learning rate, whatever the gradient.
    before, after = weights(folder / "base"), weights(compared[0] / "full")
    changes = [
        torch.cat(
            [
                (after[name] - before[name]).abs().flatten()
                for name in before
                if name.startswith(f"bert.encoder.layer.{i}.") and name.endswith("LayerNorm.bias")
            ]
        ).mean()
        for i in (0, 1)
    ]
    assert 0.2 < changes[0] / changes[1] < 0.5


def test_the_seconds_of_features_are_those_of_reading_the_training_rows_and_of_training(
    folder, tmp_path, monkeypatch
):
    extract, seconds = finetuning.extract, iter([10.0, 2000.0, 30_000.0])
    monkeypatch.setattr(finetuning, "extract", lambda *a: (extract(*a)[0], next(seconds)))
    succeed(*options(folder, tmp_path, "--method", "feature", "--epochs", "1"))
    figures = metrics(tmp_path / "feature")
    assert 10 <= figures["train_seconds"] < 1000
    tokenizer = Tokenizer.load(folder / "base")
    train = TokenizedTexts([row["text"] for row in rows_of(folder)["train"]], tokenizer, 32)
    expected = train.lengths.sum() / figures["train_seconds"]  # each text is read once
    assert figures["tokens_per_second"] == pytest.approx(expected, rel=0.02)


def test_a_tenth_of_the_steps_warm_up(folder, tmp_path, monkeypatch):
    factors, set_rate = [], soup.Optimizer.set_rate
    monkeypatch.setattr(
        soup.Optimizer,
        "set_rate",
        lambda self, factor: [factors.append(factor), set_rate(self, factor)],
    )
    words = ("--method", "feature", "--epochs", "10", "--accumulate", "2")
    succeed(*options(folder, tmp_path, *words))
    steps = metrics(tmp_path / "feature")["steps"]
    assert len(factors) == steps >= 10
    assert factors.index(max(factors)) + 1 == round(steps / 10)


def test_each_option_of_the_recipe_has_its_effect(folder, tmp_path):
    def run_with(name, *words):
        succeed(*options(folder, tmp_path / name, "--method", "adapter", "--epochs", "1", *words))
        return metrics(tmp_path / name / "adapter"), weights(tmp_path / name / "adapter")

    figures, trained = run_with("as it is")
    for words, key, expected in (
        (("--epochs", "2"), "epochs", 2),
        (("--lr", "1e-3"), "lr", 1e-3),
        (("--batch-tokens", "128"), "batch_tokens", 128),
        (("--adapter-size", "5"), "trainable_params", 2 * 2 * (2 * 32 * 5 + 32 + 5) + 4 * 64 + 66),
        (("--weight-decay", "9"), "steps", figures["steps"]),
        (("--accumulate", "2"), "steps", figures["steps"]),
        (("--class-weights", "balanced"), "steps", figures["steps"]),
        (("--max-len", "16"), "method", "adapter"),
    ):
        changed, other = run_with(words[0], *words)
        assert changed[key] == expected, words
        assert not torch.equal(other["classifier.weight"], trained["classifier.weight"]), words
    assert json.loads((tmp_path / "--max-len/adapter/trained.json").read_text())["max_len"] == 16


def test_features_of_few_uneven_rows_are_no_worse_than_the_most_frequent_label(folder, tmp_path):
    rng = random.Random(0)
    rows = [
        {"text": " ".join(rng.choices(OTHERS, k=6)) + f" {i}", "label": LABELS[i % 10 > 0]}
        for i in range(200)
    ]
    write_csv(tmp_path / "data.csv", rows)
    words = ("--data", str(tmp_path / "data.csv"), "--test", str(tmp_path / "data.csv"))
    words += ("--method", "feature", "--lr", "3e-4", "--epochs", "2")
    for weights, always in (("none", True), ("balanced", False)):
        out = tmp_path / weights
        succeed(*options(folder, out, *words, "--class-weights", weights))
        assert (metrics(out / "feature")["accuracy"] == 0.9) == always  # there is nothing to learn


def test_where_labels_are_uneven_macro_f1_stands_beside_the_accuracy(folder, compared, tmp_path):
    out, printed = compared
    assert "macro F1" in printed  # 14 test rows of one label and 26 of the other
    last = {row.split()[0]: row.split()[-1] for row in table(printed)}
    for row in json.loads((out / "compare.json").read_text())["rows"]:
        assert last[row["method"]] == f"{row['macro_f1']:.3f}"
    assert last["majority"] == f"{(0 + 2 * 14 / (14 + 40)) / 2:.3f}"
    each = [[row for row in reviews(100, seed=1) if row["label"] == label] for label in LABELS]
    write_csv(tmp_path / "even.csv", each[0][:10] + each[1][:10])
    words = ("--method", "feature", "--epochs", "1", "--test", str(tmp_path / "even.csv"))
    assert "macro F1" not in succeed(*options(folder, tmp_path / "out", *words)).out


# New reviews


def answers(*words: object, stdin: bytes = b"") -> list[dict]:
    done = succeed(
        "--predict", *words, "--json", "--precision", "fp32", "--device", "cpu", stdin=stdin
    )
    return [json.loads(line) for line in done.out.splitlines()]


def texts_of(folder: Path) -> list[str]:
    with open(folder / "test.csv", encoding="utf-8", newline="") as file:
        return [row["text"] for row in csv.DictReader(file)]


@pytest.mark.parametrize("method", TRAINED)
def test_predicting_the_test_rows_gives_the_accuracy_of_the_run(compared, folder, method):
    directory = compared[0] / method
    words = ["--model", directory, "--predict", folder / "test.csv", "--precision", "fp32"]
    done = succeed(*words, "--device", "cpu")
    assert (
        f"accuracy: {metrics(directory)['accuracy']:.2%} of {TEST_ROWS} labelled rows" in done.err
    )
    assert "accuracy" not in done.out
    table = list(csv.reader(io.StringIO(done.out)))
    assert table[0] == ["label", "probability", "truncated", "text"]
    assert [row[3] for row in table[1:]] == texts_of(folder)  # the order of the file
    cut = sum(row[2] == "true" for row in table[1:])
    assert cut == sum(len(text.split()) > 40 for text in texts_of(folder))
    assert f"{cut} of {TEST_ROWS} had more than 32 tokens" in done.err
    if method == "full":
        assert "full" in done.err.splitlines()[0]  # says which model it is
    # The same from Python, with defaults.
    [answer] = Classifier.load(str(directory)).predict([table[1][3]])
    assert (answer.text, answer.label) == (table[1][3], table[1][0])

    objects = answers(folder / "test.csv", "--model", directory)
    for answer, (label, probability, truncated, text) in zip(objects, table[1:], strict=True):
        assert list(answer) == ["text", "label", "probabilities", "truncated"]
        assert (answer["text"], answer["label"]) == (text, label)
        assert list(answer["probabilities"]) == LABELS
        assert sum(answer["probabilities"].values()) == pytest.approx(1, abs=1e-5)
        assert label == max(LABELS, key=answer["probabilities"].get)
        assert f"{answer['probabilities'][label]:.4f}" == probability
        assert answer["truncated"] is (truncated == "true")


def test_columns_of_other_names_train_and_are_labelled(folder, tmp_path):
    rows = [{"id": i, "review": row["text"], "stars": row["label"], "text": "no"}
            for i, row in enumerate(reviews(ROWS, seed=0))]  # fmt: skip
    write_csv(tmp_path / "mine.csv", rows)
    named = ["--text-column", "review", "--label-column", "stars"]
    data = ["--model", folder / "base", "--data", tmp_path / "mine.csv", *TINY]
    succeed(*data, *named, "--method", "feature", "--out", tmp_path / "out")
    run = tmp_path / "out" / "feature"
    done = succeed("--model", run, "--predict", tmp_path / "mine.csv", *named)
    assert f"of {ROWS} labelled rows" in done.err
    table = list(csv.DictReader(io.StringIO(done.out)))
    assert [row["text"] for row in table] == [row["review"] for row in rows]
    assert_refused(*data, *named[:2], "--overwrite", "--out", tmp_path / "out", naming="label")
    assert metrics(run)["accuracy"] > 0.6


def test_all_ways_to_hand_over_texts_give_the_same_answers(compared, folder, tmp_path):
    texts = texts_of(folder)[:12]
    lines = "\n".join(texts).encode()
    (tmp_path / "a.txt").write_bytes(lines)
    write_csv(tmp_path / "a.csv", [{"id": str(i), "text": text} for i, text in enumerate(texts)])
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    model = ["--model", compared[0] / "feature"]
    expected = answers(*texts, *model)
    assert [answer["text"] for answer in expected] == texts
    assert len({answer["label"] for answer in expected}) == 2
    for name in ("a.txt", "a.csv", "a.jsonl"):
        assert answers(tmp_path / name, *model) == expected
    assert answers("-", *model, stdin=lines) == expected
    # What stands beside a text changes its answer by no more than rounding; `alone` is one text a
    # batch.
    again = answers(texts[0], tmp_path / "a.txt", *model)
    alone = answers(*texts, *model, "--batch-tokens", "8")
    for answer, other in zip([*again, *alone], [expected[0], *expected, *expected], strict=True):
        assert answer["text"] == other["text"] and answer["label"] == other["label"]
        assert answer["probabilities"] == pytest.approx(other["probabilities"], abs=1e-5)


def test_base_says_where_the_pretrained_model_of_a_run_is(compared, folder, tmp_path):
    run, base = tmp_path / "adapter", tmp_path / "base"
    shutil.copytree(compared[0] / "adapter", run)
    shutil.copytree(folder / "base", base)
    description = json.loads((run / "trained.json").read_text())
    description["base"] |= {"path": str(tmp_path / "gone"), "relative": None}
    (run / "trained.json").write_text(json.dumps(description))
    words = ("A superb film.", "--model", run)
    assert_refused("--predict", *words, naming="--base")
    expected = answers("A superb film.", "--model", compared[0] / "adapter")
    assert answers(*words, "--base", base) == expected
    assert_refused("--predict", *words, "--base", compared[0] / "full", naming="another base")
    whole = ("--predict", "A film.", "--model", compared[0] / "full")
    assert_refused(*whole, "--base", base, naming="needs no other")
    assert_refused("--base", base, naming="--predict")


def test_json_is_one_object_a_line_in_utf8(compared):
    text = 'Café: "superb",\nsaid one; a second line\u2028and \N{CLAPPER BOARD}.'
    done = succeed("--predict", text, "--json", "--model", compared[0] / "full")
    assert done.out.count("\n") == 1 and "Café" in done.out
    assert json.loads(done.out)["text"] == text


def test_rows_without_a_label_do_not_count(compared, folder, tmp_path):
    rows = [
        {"text": f"A {word} film.", "label": label} for label in LABELS for word in WORDS[label]
    ]
    wrong = dict(rows[0], label=rows[-1]["label"])
    write_csv(tmp_path / "a.csv", [*rows, wrong, dict(rows[0], label="")])
    done = succeed(
        "--predict", tmp_path / "a.csv", "--model", compared[0] / "full", "--precision", "fp32"
    )
    found = answers(tmp_path / "a.csv", "--model", compared[0] / "full")
    right = sum(a["label"] == row["label"] for a, row in zip(found, [*rows, wrong], strict=False))
    assert f"accuracy: {right / 7:.2%} of 7 labelled rows" in done.err
    assert right >= 5  # it has learned these words
    write_csv(tmp_path / "b.csv", [dict(row, label="") for row in rows])
    assert (
        "accuracy"
        not in succeed("--predict", tmp_path / "b.csv", "--model", compared[0] / "full").err
    )


def test_a_label_that_is_a_number_is_first_a_name():
    names = {0: "-1", 1: "0", 2: "1"}
    assert [label_index(label, names, numbers_too=True) for label in ("-1", "0", "1")] == [0, 1, 2]


def test_without_a_model_the_newest_run_answers(compared, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    now = time.time()
    for age, name in enumerate(["scratch", "adapter", "feature"]):  # a comparison ends with scratch
        shutil.copytree(compared[0] / name, tmp_path / "runs" / "finetune" / name)
        os.utime(tmp_path / "runs" / "finetune" / name / "metrics.json", (now, now - age))
    done = succeed("--predict", "A superb film.")
    assert done.err.startswith("model: runs/finetune/adapter;")
    os.utime(tmp_path / "runs" / "finetune" / "feature" / "metrics.json")
    shutil.copytree(tmp_path / "runs" / "finetune", tmp_path / "scratch" / "mine")
    os.utime(tmp_path / "scratch" / "mine" / "feature" / "metrics.json", (now + 9, now + 9))
    done = succeed("--predict", "A superb film.", "--out", "scratch/mine")
    assert done.err.startswith("model: scratch/mine/feature;")


# Nothing is lost


@pytest.mark.parametrize(("method", "soup"), [("feature", "1"), ("full", "1"), ("adapter", "2")])
def test_killed_at_random_moments_it_ends_with_the_same_bits(folder, tmp_path, method, soup):
    undisturbed, killed, notes = tmp_path / "undisturbed", tmp_path / "killed", tmp_path / "notes"
    size = (
        ("32", "3") if method == "feature" else ("128", "1")
    )  # of a feature run the tokens are its rows
    more = ["--method", method, "--batch-tokens", size[0], "--epochs", size[1], "--soup", soup]
    assert run_apart(options(folder, undisturbed, *more), notes) == 0
    seconds = float(notes.read_text().rpartition("processor seconds: ")[2])

    rng, kills = random.Random(method), 0
    # A checkpoint after every step, so that many of the kills fall into the middle of one.
    again = options(folder, killed, *more, "--save-minutes", "1e-9", "--resume")
    while not (killed / method / "metrics.json").exists():
        # Later and later: it gets to its end, though it may by now be slower than it was.
        code = run_apart(again, notes, rng.uniform(0.1, 0.4) * seconds * (1 + kills / 3))
        assert code in (0, -signal.SIGPROF), notes.read_text()
        kills += code != 0
        assert kills < 100, "it makes no progress"
    assert kills >= 2, "it is killed too late to prove anything"
    assert (
        run_apart(again, notes) == 0
    )  # the last kill may have hit the clean-up, or the comparison
    assert_same_bits(undisturbed / method, killed / method)
    steps = [[entry["step"] for entry in log(out / method)] for out in (undisturbed, killed)]
    assert steps[0] == steps[1]  # no step twice, none missing
    assert contents(undisturbed).keys() == contents(killed).keys()


def test_ctrl_c_saves_and_resume_goes_on_with_all_methods(compared, folder, tmp_path, monkeypatch):
    undisturbed, printed = compared
    out, write_line = tmp_path / "out", Run.log

    def log_and_interrupt(run, entry):
        write_line(run, entry)
        if run.directory.name == "adapter":
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "log", log_and_interrupt)
        stopped = run(*options(folder, out, "--method", *METHODS))
    assert stopped.status == 130 and "Traceback" not in stopped.err
    assert "the same command with --resume continues" in stopped.out
    assert (out / "feature" / "metrics.json").exists()
    assert (out / "adapter" / "resume" / "state.safetensors").exists()
    assert not (out / "adapter" / "metrics.json").exists() and not (out / "full").exists()

    done = succeed("--resume", "--out", out)  # everything else is as it was asked for
    step = re.search(r"saved at step (\d+);", stopped.out)[1]
    assert int(step) > 0 and f"resumed at step {step} of" in done.out
    for method in TRAINED:
        assert_same_bits(undisturbed / method, out / method)
    assert [line.split()[:3] for line in table(done.out)] == [
        line.split()[:3] for line in table(printed)
    ]


def test_resume_keeps_an_option_that_is_zero(folder, tmp_path):
    words = ("--method", "feature", "--epochs", "1", "--weight-decay", "0")
    succeed(*options(folder, tmp_path, *words))
    succeed("--resume", "--out", tmp_path)
    assert_refused("--resume", "--out", tmp_path, "--weight-decay", "0.5", naming="weight-decay")


def test_a_finished_command_only_prints_its_table_again(compared):
    out, printed = compared
    before = contents(out)
    again = succeed("--resume", "--out", out)
    assert rows_of_networks(again.out) == rows_of_networks(printed)
    after = contents(out)
    for name in ("compare.json", "compare.png"):  # these are recomputed
        assert before.pop(name) and after.pop(name)
    assert after == before


def test_runs_of_before_there_were_answers_are_compared_and_have_a_page(compared, folder, tmp_path):
    out = shutil.copytree(compared[0], tmp_path / "out")
    for method in TRAINED:
        for name in ("answers.json", "report.json", "report.html"):
            (out / method / name).unlink()
        figures = metrics(out / method)
        del figures["macro_f1"], figures["temperature"]
        (out / method / "metrics.json").write_text(json.dumps(figures))
    printed = succeed(*options(folder, out, "--method", *METHODS, "--resume")).out
    accuracies = [row.split()[:5] for row in rows_of_networks(compared[1])]
    assert [row.split()[:5] for row in rows_of_networks(printed)] == accuracies
    for method in TRAINED:
        page = (out / method / "report.html").read_text()
        assert "not recorded by this run" in page and f"Fine-tuning: {method}" in page


def test_a_finished_command_is_not_overwritten(compared, folder):
    out, _ = compared
    before = contents(out)
    for method in TRAINED:
        assert_refused(*options(folder, out, "--method", method), naming=out / method)
    assert contents(out) == before


def test_killed_before_the_metrics_are_written_it_still_has_its_checkpoint(
    folder, tmp_path, monkeypatch
):
    write_json = runs.write_json

    def interrupted(path, value):
        if path.name == "metrics.json":
            raise KeyboardInterrupt
        write_json(path, value)

    with monkeypatch.context() as patch:
        patch.setattr(runs, "write_json", interrupted)
        words = options(folder, tmp_path, "--method", "bitfit", "--epochs", "1")
        assert run(*words).status == 130
    trained = weights(tmp_path / "bitfit")
    assert "resumed at step" in succeed("--resume", "--out", tmp_path).out
    assert all(torch.equal(t, trained[name]) for name, t in weights(tmp_path / "bitfit").items())


@pytest.fixture
def unfinished(folder, tmp_path, monkeypatch):
    """OUT of a run of copies of everything, interrupted after its last step."""
    for name in ("base", "data.csv", "test.csv"):
        copy = shutil.copytree if name == "base" else shutil.copy2
        copy(folder / name, tmp_path / name)

    def interrupt(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("minitune.finetuning.save_model", interrupt)
        words = options(tmp_path, tmp_path / "out", "--method", "full", "--epochs", "1")
        assert run(*words).status == 130
    return tmp_path / "out"


@pytest.mark.parametrize("changed", ["base/model.safetensors", "data.csv", "test.csv"])
def test_resume_notices_that_the_base_or_the_data_changed(unfinished, tmp_path, changed):
    path = tmp_path / changed
    content = bytearray(path.read_bytes())
    content[-10 if path.suffix == ".safetensors" else 20] ^= (
        1  # a letter of a text becomes another one
    )
    path.write_bytes(content)
    before = contents(unfinished)
    assert_refused("--resume", "--out", unfinished, naming="changed")
    assert contents(unfinished) == before


DAMAGED_SETTINGS = {
    "method": [-5, "abc", [], ["x"], {}],
    "model": [-5, ["x"], "/no/such/model"],
    "data": [True, [], "/no/such/data"],
    "test": [1.5, {"a": 1}],
    "train_examples": [-5, [1], ["x"], True],
    "seeds": [0, -5, 10**30, 1.5, "", ["x"]],
    "save_minutes": [-1, [], "x"],
    "epochs": [0, "x", 10**30],
    "soup": [0, {}, True],
    "lr": [-1, "x", []],
    "max_len": [1, "x", []],
    "experiment": [None, 7, {}, []],
    "base_hash": [None, 7],
    "dataset": [None, "x"],
}


@pytest.mark.parametrize("key", DAMAGED_SETTINGS)
def test_damaged_settings_are_an_error_of_one_line_and_lose_nothing(unfinished, key):
    path = unfinished / "full" / "settings.json"
    settings = json.loads(path.read_text())
    for value in DAMAGED_SETTINGS[key]:
        path.write_text(json.dumps(settings | {key: value}))
        before = contents(unfinished)
        assert_refused("--resume", "--out", unfinished)
        assert contents(unfinished) == before, value
    path.write_text(json.dumps({name: value for name, value in settings.items() if name != key}))
    if key in ("experiment", "base_hash", "dataset", "soup"):
        assert_refused("--resume", "--out", unfinished)


def test_a_finished_run_is_not_compared_on_other_test_rows(unfinished, tmp_path):
    succeed("--resume", "--out", unfinished)
    write_csv(tmp_path / "test.csv", reviews(20, seed=2))
    assert_refused("--resume", "--out", unfinished, naming="changed")


# Two processes


def test_two_processes_do_what_one_does(folder, tmp_path):
    # Without dropout, which differs between processes.
    base = shutil.copytree(folder / "base", tmp_path / "base")
    config = json.loads((base / "config.json").read_text()) | {"hidden_dropout_prob": 0.0}
    (base / "config.json").write_text(json.dumps(config))
    one, two = tmp_path / "one", tmp_path / "two"
    words = ("--model", str(base), "--epochs", "2", "--method", *METHODS)
    printed = succeed(*options(folder, one, *words)).out
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "finetune.py"]
    command = [sys.executable, *launch, *options(folder, two, *words)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in table(done.stdout)] == [
        line.split()[0] for line in table(printed)
    ]
    for method in TRAINED:
        entries = [log(out / method) for out in (one, two)]
        # One writer: every line once.
        assert [entry["step"] for entry in entries[1]] == [entry["step"] for entry in entries[0]]
        losses = [[entry["loss"] for entry in of_one] for of_one in entries]
        assert losses[1] == pytest.approx(losses[0], rel=1e-3, abs=1e-4)
    assert contents(two).keys() == contents(one).keys()
