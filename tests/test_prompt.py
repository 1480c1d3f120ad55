"""prompt.py from end to end: what it prints, what it writes, what it refuses; no weight changed."""

import contextlib
import csv
import io
import json
import sys
from types import SimpleNamespace

import matplotlib.image
import pytest
import torch

import prompt
from minitune.calibration import CALIBRATIONS
from minitune.checkpoint import save_model
from minitune.cli import run_script
from minitune.model import BertConfig, BertForMaskedLM, BertForSequenceClassification
from minitune.tokenizer import Tokenizer

GOOD, BAD = ["good", "great", "superb"], ["bad", "dull", "clumsy"]
ROWS = [(f"the {noun} was {word} {word}", label) for label, words in (("yes", GOOD), ("no", BAD))
        for noun in ("film", "cast", "plot", "score", "story", "end", "start", "hero", "joke", "song")
        for word in words]  # fmt: skip
ASK = ["--template", "{text} it is [MASK] .", "it is [MASK] : {text}"]
ASK += ["--words", "no=bad,dull", "yes=good,great"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model directory and data.csv. At the end no file of the model has changed."""
    folder = tmp_path_factory.mktemp("prompting")
    with open(folder / "data.csv", "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *ROWS])
    tokenizer = Tokenizer.train([f"{text} it is . : {label}" for text, label in ROWS], 100)
    config = BertConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=64, max_position_embeddings=64,
    )  # fmt: skip
    for architecture in (BertForMaskedLM, BertForSequenceClassification):
        torch.manual_seed(0)
        config.id2label = {0: "no", 1: "yes"}
        (folder / architecture.__name__).mkdir()
        save_model(architecture(config), tokenizer, folder / architecture.__name__)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    yield folder
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


@pytest.fixture
def ask(folder, tmp_path, monkeypatch):
    """`prompt.py WORDS` in this process and an empty directory."""
    monkeypatch.chdir(tmp_path)

    def run(*words, stdin=b"", model="BertForMaskedLM"):
        options = ["--model", folder / model, "--device", "cpu", "--precision", "fp32"]
        options += ["--data", folder / "data.csv"] * ("--data" not in words)
        options += ["--max-len", "24"] * ("--max-len" not in words)
        with (
            pytest.MonkeyPatch.context() as patch,
            contextlib.redirect_stdout(io.TextIOWrapper(io.BytesIO(), "utf-8", newline="")) as out,
            contextlib.redirect_stderr(io.StringIO()) as err,
            pytest.raises(SystemExit) as ended,
        ):
            patch.setattr(sys, "argv", ["prompt.py", *map(str, (*words, *options))])
            patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"))
            run_script(prompt.main)
        out.flush()
        printed = out.buffer.getvalue().decode()
        return SimpleNamespace(status=ended.value.code, out=printed, err=err.getvalue())

    return run


@pytest.fixture
def succeed(ask):
    def run(*words, **options):
        done = ask(*words, **options)
        assert done.status == 0, done.err
        return done

    return run


# Answers


def test_an_answer_has_label_probability_and_the_words_wanted(succeed):
    done = succeed("the film was good", "a long one " * 30, *ASK)
    rows = list(csv.DictReader(io.StringIO(done.out)))
    assert [row["text"] for row in rows] == ["the film was good", "a long one " * 30]
    assert [row["truncated"] for row in rows] == ["false", "true"]
    for row in rows:
        assert row["label"] in ("no", "yes") and 0.5 <= float(row["probability"]) <= 1
        assert row["words"].count("%") == 5
    assert "1 of 2 had no room in 24 tokens" in done.err
    assert "calibration: prior" in done.err and "best" in done.err


def test_json_is_one_object_a_line(succeed, folder):
    lines = succeed(folder / "data.csv", *ASK, "--json", "--top", "3").out.splitlines()
    answers = [json.loads(line) for line in lines]
    assert [answer["text"] for answer in answers] == [text for text, _ in ROWS]  # in order
    for answer in answers:
        assert set(answer) == {"text", "label", "probabilities", "truncated", "words"}
        assert set(answer["probabilities"]) == {"no", "yes"}
        assert sum(answer["probabilities"].values()) == pytest.approx(1, abs=1e-5)
        assert answer["label"] == max(answer["probabilities"], key=answer["probabilities"].get)
        assert len(answer["words"]) == 3


def test_standard_input_and_accuracy_of_labelled_rows(succeed, folder):
    one = succeed("-", *ASK, "--json", stdin=b"the film was good\nthe film was bad\n")
    two = succeed("the film was good", "the film was bad", *ASK, "--json")
    assert one.out == two.out and "accuracy" not in one.err
    labelled = succeed(folder / "data.csv", *ASK, "--json")
    answers = [json.loads(line)["label"] for line in labelled.out.splitlines()]
    right = sum(answer == label for answer, (_, label) in zip(answers, ROWS, strict=True)) / len(ROWS)
    assert f"accuracy: {right:.2%} of {len(ROWS)} labelled rows" in labelled.err


@pytest.mark.parametrize("calibration", CALIBRATIONS)
def test_every_calibration_answers(succeed, calibration):
    done = succeed("the film was good", *ASK, "--calibrate", calibration)
    assert f"calibration: {calibration}" in done.err


def test_three_labels(succeed):
    [line] = succeed("the cast", "--words", "a=good", "b=bad", "c=dull", *ASK[:3], "--json").out.splitlines()
    assert list(json.loads(line)["probabilities"]) == ["a", "b", "c"]


def test_blanks_are_filled(succeed):
    done = succeed("--fill", "the [MASK] was [MASK]", "--json", "--top", "4")
    blanks = [json.loads(line) for line in done.out.splitlines()]
    assert [blank["blank"] for blank in blanks] == [1, 2]
    for blank in blanks:
        probabilities = [word["probability"] for word in blank["words"]]
        assert len(probabilities) == 4 and probabilities == sorted(probabilities, reverse=True)
    assert succeed("--fill", "the [MASK] was [MASK]").out.startswith("blank 1: ")


def test_text_is_written(succeed):
    done = succeed("--generate", "5", "the film", "--seed", "3")
    assert done.out.startswith("the film")
    assert succeed("--generate", "5", "the film", "--seed", "3").out == done.out
    [line] = succeed("--generate", "5", "the film", "--json").out.splitlines()
    assert set(json.loads(line)) == {"text", "generated"}


# Evaluation


def test_one_table_and_one_picture(succeed, folder, tmp_path):
    done = succeed("--evaluate", folder / "data.csv", *ASK, "--shots", "2", "--out", "result")
    saved = json.loads((tmp_path / "result" / "prompts.json").read_text())
    kinds = {(row["template"], row["calibration"], row["shots"]) for row in saved["rows"]}
    assert len(kinds) == len(saved["rows"]) == 3 * len(CALIBRATIONS) * 2
    assert [row["method"] for row in saved["with_labels"]] == ["majority", "nb-svm"]
    for row in saved["rows"]:
        low, high = row["interval"]
        assert low <= row["accuracy"] <= high and 0.5 <= row["majority_share"] <= 1
        assert 0 <= row["calibration_error"] <= 1
        assert f"{row['accuracy']:.1%}" in done.out
    assert "nb-svm, from 50 labels" in done.out and "with 2 shots" in done.out
    picture = matplotlib.image.imread(tmp_path / "result" / "prompts.png")
    assert picture.std() > 0.01


def test_the_table_says_what_the_answers_are(succeed, folder, tmp_path):
    succeed("--evaluate", folder / "data.csv", *ASK, "--out", "result")
    saved = json.loads((tmp_path / "result" / "prompts.json").read_text())
    tested = [row for label in ("yes", "no") for row in [r for r in ROWS if r[1] == label][-3:]]
    for calibration in CALIBRATIONS:
        texts = [text for text, _ in tested]
        lines = succeed(*texts, *ASK, "--calibrate", calibration, "--json").out.splitlines()
        answers = [json.loads(line)["label"] for line in lines]
        right = sum(a == label for a, (_, label) in zip(answers, tested, strict=True)) / len(tested)
        [row] = [r for r in saved["rows"] if r["calibration"] == calibration and "{" not in r["template"]]
        assert row["accuracy"] == pytest.approx(right)


def test_curves_are_drawn_beside_the_prompt(succeed, ask, folder, tmp_path):
    rows = [{"method": "full", "train_examples": n, "accuracy": 0.6, "spread": None} for n in (16, 64)]
    (tmp_path / "compare.json").write_text(json.dumps({"rows": rows}))
    succeed("--evaluate", folder / "data.csv", *ASK, "--out", "result", "--curves", "compare.json")
    assert matplotlib.image.imread(tmp_path / "result" / "labels.png").std() > 0.01
    (tmp_path / "compare.json").write_text(json.dumps({"rows": rows[:1]}))
    done = ask("--evaluate", folder / "data.csv", *ASK, "--out", "result", "--curves", "compare.json")
    assert done.status == 2 and "--curves compare.json" in done.err


def test_unlabelled_reviews_may_have_no_labels(succeed, tmp_path):
    (tmp_path / "mine.txt").write_text("the film was good\nthe plot was bad\nthe cast was dull\n")
    done = succeed("the film was good", *ASK, "--data", tmp_path / "mine.txt")
    assert "calibration: prior" in done.err


# Bad input: one line that names the culprit, status 2

REFUSED = {
    "nothing to do": ([], ["texts", "--evaluate", "--fill"]),
    "two things to do": (["a film", "--fill", "[MASK]"], ["--fill"]),
    "generate after nothing": (["--generate", "3"], ["--generate"]),
    "an empty text": (["a film", " ", *ASK], ["empty"]),
    "a template without a text": (["a film", "--template", "it was [MASK]"], ["it was [MASK]", "{text}"]),
    "a template without a blank": (["a film", "--template", "{text} fine"], ["{text} fine", "[MASK]"]),
    "a long template": (["a", "--template", "{text} [MASK]" + " the" * 40, *ASK[3:]], ["no room"]),
    "words of nothing": (["a film", "--words", "good", *ASK[:3]], ["--words good"]),
    "a label without words": (["a film", *ASK[:3], "--words", "no=bad", "yes="], ["--words yes="]),
    "one label": (["a film", *ASK[:3], "--words", "no=bad"], ["two labels"]),
    "an unknown word": (["a film", *ASK[:3], "--words", "no=bad", "yes=日本"], ["日本"]),
    "a file that is not there": (["nowhere.csv", *ASK], ["nowhere.csv"]),
    "data that is not there": (["--evaluate", "nowhere.csv", *ASK], ["--evaluate nowhere.csv"]),
    "a sentence without a blank": (["--fill", "the film"], ["--fill", "[MASK]"]),
    "a long sentence": (["--fill", "[MASK]" + " the" * 99], ["--fill", "62"]),
    "more to write than positions": (["--generate", "99", "the film"], ["--generate", "62"]),
    "more shots than room": (["a film", *ASK, "--shots", "20"], ["--shots 20"]),
    "more shots than rows": (["a film", *ASK, "--shots", "64"], ["64"]),
    "labels of other names": (["--evaluate", "DATA", *ASK[:4], "a=bad", "b=good"], ["no is", "a, b"]),
    "more tokens than positions": (["a film", *ASK, "--max-len", "65"], ["--max-len 65", "64"]),
    "a GPU's attention": (["a film", *ASK, "--attention", "triton"], ["--attention triton", "CUDA"]),
    "a blank that is not UTF-8": (["--fill", "caf\udce9 [MASK]"], ["UTF-8"]),
    "a template that is not UTF-8": (["a film", "--template", "{text} caf\udce9 [MASK]"], ["UTF-8"]),
    "shots for a blank": (["--fill", "[MASK]", "--shots", "2"], ["--shots"]),
    "a calibration of its own": (["a film", "--calibrate", "luck"], ["luck"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_refused_in_one_line(ask, folder, tmp_path, case):
    words, naming = REFUSED[case]
    done = ask(*(folder / "data.csv" if word == "DATA" else word for word in words))
    assert done.status == 2
    last = done.err.splitlines()[-1]
    assert "error: " in last and "Traceback" not in done.err
    for part in naming:
        assert part in last
    assert not list(tmp_path.iterdir())


def test_empty_standard_input_is_refused(ask):
    done = ask("-", *ASK, stdin=b"\n \n")
    assert done.status == 2 and "no text" in done.err and done.out == ""


def test_a_model_without_a_masked_lm_head_is_refused(ask):
    done = ask("a film", *ASK, model="BertForSequenceClassification")
    assert done.status == 2 and "no masked-LM head" in done.err


def test_out_that_holds_something_else_is_refused(ask, folder, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("Years of work.")
    done = ask("--evaluate", folder / "data.csv", *ASK, "--out", "thesis")
    assert done.status == 2 and "--out thesis" in done.err and "chapter1.tex" in done.err
