"""prompt.py from end to end: what it prints, what it writes, what it refuses; no weight changed."""

import contextlib
import csv
import io
import json
import math
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import matplotlib.image
import pytest
import torch
import torch.nn.functional as F

import minitune.support.plots
import prompt
from minitune.batching import PackedBatch
from minitune.calibration import CALIBRATIONS, TOGETHER
from minitune.checkpoint import load_masked_lm, read_config, save_model, weights_hash
from minitune.explain import attention_maps
from minitune.initialization import from_scratch, neighbour_offset
from minitune.model import BertConfig, BertForMaskedLM, BertForSequenceClassification
from minitune.prompting import with_blanks
from minitune.support.cli import run_script
from minitune.tokenizer import Tokenizer

GOOD, BAD = ["good", "great", "superb"], ["bad", "dull", "clumsy"]
ROWS = [(f"the {noun} was {word} {word}", label) for label, words in (("yes", GOOD), ("no", BAD))
        for noun in ("film", "cast", "plot", "score", "story", "end", "start", "hero", "joke", "song")
        for word in words]  # fmt: skip
ASK = ["--template", "{text} it is [MASK] .", "it is [MASK] : {text}"]
ASK += ["--words", "no=bad,dull", "yes=good,great"]


def pretrain(model, tokenizer):
    """A second of reading "TEXT it is WORD .", where WORD is one that such reviews have."""
    asked = [(f"{text} it is", f". {label}", word) for text, label in ROWS
             for word in (("good", "great") if label == "yes" else ("bad", "dull"))]  # fmt: skip
    asked += [("it is", f": {before.removesuffix(' it is')}", word) for before, _, word in asked]
    before, after, words = (tokenizer.encode(list(parts)) for parts in zip(*asked, strict=True))
    cls, mask, sep = tokenizer.cls_id, tokenizer.mask_id, tokenizer.sep_id
    pairs = list(zip(before, after, strict=True))
    batch = PackedBatch.from_sequences([torch.tensor([cls, *x, mask, *y, sep]) for x, y in pairs])
    blanks, targets = (batch.tokens == mask).nonzero().squeeze(1), torch.tensor(words).squeeze(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(model(batch, blanks), targets).backward()
        optimizer.step()
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three model directories and data.csv. At the end no file of a model has changed.

    "learned" knows the reviews, "biased" does too but says "good" all the time, "classifier" has no
    words.
    """
    folder = tmp_path_factory.mktemp("prompting")
    with open(folder / "data.csv", "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *ROWS])
    tokenizer = Tokenizer.train([f"{text} it is . : {label}" for text, label in ROWS], 110)
    config = BertConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
        hidden_dropout_prob=0.3,  # which must have no part in an answer
        id2label={0: "no", 1: "yes"},
    )
    torch.manual_seed(0)
    model = pretrain(BertForMaskedLM(config).eval(), tokenizer)
    for name in ("learned", "biased"):
        (folder / name).mkdir()
        save_model(model, tokenizer, folder / name)
        model.head.bias.data[sum(tokenizer.encode(["good", "great"]), [])] += 20
    (folder / "classifier").mkdir()
    save_model(BertForSequenceClassification(config), tokenizer, folder / "classifier")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    yield folder
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


@pytest.fixture
def ask(folder, tmp_path, monkeypatch):
    """`prompt.py WORDS` in this process and an empty directory."""
    monkeypatch.chdir(tmp_path)

    def run(*words, stdin=b"", model="learned"):
        options = ["--model", folder / model, "--device", "cpu"]
        options += ["--data", folder / "data.csv"] * ("--data" not in words)
        for option, value in (("--precision", "fp32"), ("--max-len", "24")):
            options += [option, value] * (option not in words)
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


# --explain

ONE = ["--template", ASK[1], *ASK[3:]]


@pytest.mark.parametrize("options", [[], ["--calibrate", "none"], ["--shots", "2"]])
def test_an_explanation_is_of_the_answer_of_one_calibrated_template(succeed, options):
    texts = ["the film was superb", "the plot was clumsy and the cast clumsy"]
    plain = succeed(*texts, *ONE, *options, "--json").out.splitlines()
    lines = succeed(*texts, *ONE, *options, "--json", "--explain", "--precision", "bf16").out
    for line, without, text in zip(lines.splitlines(), plain, texts, strict=True):
        answer, expected = json.loads(line), json.loads(without)
        assert answer["label"] == expected["label"]
        assert answer["probabilities"] == pytest.approx(expected["probabilities"], abs=1e-4)
        why = answer["explanation"]
        assert why["words"][-len(text.split()) - 3 :] == [*text.split(), "it", "is", "."]
        p = answer["probabilities"]
        logit = math.log(p[why["label"]] / p[why["other"]])
        assert why["difference"] == pytest.approx(logit, abs=1e-4) and why["error"] <= 0.02
        change = why["difference"] - why["without_words"]
        assert sum(why["attributions"]) == pytest.approx(change, rel=0.021)


def test_the_word_that_decides_adds_most(succeed):
    out = succeed("the film was superb superb", *ONE, "--json", "--explain").out
    why = json.loads(out)["explanation"]
    added = dict(zip(why["words"], why["attributions"], strict=True))
    assert why["label"] == "yes" and added["superb"] == max(added.values()) > 0.1


def test_without_a_template_the_first_one_is_explained(succeed):
    out = succeed("the film was superb", *ASK[3:], "--explain", "--json").out
    words = json.loads(out)["explanation"]["words"]
    assert words == ["the", "film", "was", "superb", "it", "was", "."]  # around the blank


@pytest.mark.parametrize(
    ("words", "naming"),
    [
        (["a film", *ASK, "--explain"], ["--explain takes one --template"]),
        (["--explain"], ["give one of"]),
        (["--fill", "it is [MASK]", "--explain"], ["--explain goes with texts"]),
        (["a film", "--generate", "3", "--explain"], ["--explain goes with texts"]),
        (["a film", *ONE[:3], "no=bad", "yes=goodgreat", "--explain"], ["words of one token"]),
        (["漢", *ONE, "--explain"], ["漢", "no word that the model knows"]),
    ],
)
def test_what_cannot_be_explained_is_refused(refused, words, naming):
    refused(*words, naming=naming)


# --look

SENTENCE = "the film was [MASK] ."


@pytest.fixture
def drawn(succeed):
    """What --look draws: the arguments of plot_attention."""

    def run(*words, **options):
        calls = []
        plot = minitune.support.plots.plot_attention
        with pytest.MonkeyPatch.context() as patch:
            name = "minitune.support.plots.plot_attention"
            patch.setattr(name, lambda *args: calls.append(args) or plot(*args))
            succeed("--look", *words, **options)
        (arguments,) = calls
        return arguments

    return run


def test_look_draws_the_weights_of_every_head(drawn, folder):
    maps, tokens, offsets, title, path = drawn(SENTENCE)
    assert tokens == ["[CLS]", "the", "film", "was", "[MASK]", ".", "[SEP]"] and not offsets
    model, _ = load_masked_lm(folder / "learned")
    tokenizer = Tokenizer.load(folder / "learned")
    ids = tokenizer.encode(["the film was", "."])
    ids = tokenizer.frame([*ids[0], tokenizer.mask_id, *ids[1]])
    expected = attention_maps(model.bert, torch.tensor(ids))
    assert torch.equal(torch.from_numpy(maps[""]), expected) and expected.shape == (1, 2, 7, 7)
    assert str(path) == "runs/attention.png" and SENTENCE in title
    assert matplotlib.image.imread(path).std() > 0.01


def test_look_draws_a_run_of_train_py_before_and_after(drawn, folder, tmp_path):
    shutil.copytree(folder / "learned", "run")
    Path("run/metrics.json").write_text('{"method": "pretrain"}')
    Path("run/settings.json").write_text('{"seed": 7, "init": null}')
    maps, _, offsets, _, path = drawn(SENTENCE, "--out", "new/look.png", model=tmp_path / "run")
    assert list(maps) == ["before training", "after"] and str(path) == "new/look.png"
    start, tokenizer = from_scratch(read_config(folder / "learned"), 7), Tokenizer.load(Path("run"))
    ids = torch.tensor(with_blanks(SENTENCE, tokenizer))
    assert torch.equal(torch.from_numpy(maps["before training"]), attention_maps(start.bert, ids))
    assert offsets == [[-1, 1]] * 2
    alone, *_ = drawn(SENTENCE)
    assert (maps["after"] == alone[""]).all()
    # Its start is not random, or cannot be known.
    for settings in ({"seed": 7, "init": "minilm"}, {"seed": 2**70}, {"seed": -1}, {"seed": "7"}):
        Path("run/settings.json").write_text(json.dumps(settings))
        assert list(drawn(SENTENCE, model=tmp_path / "run")[0]) == [""]


def test_look_needs_no_masked_lm_head(drawn):
    maps, *_ = drawn(SENTENCE, model="classifier")
    assert maps[""].shape == (1, 2, 7, 7)


def test_a_head_that_starts_with_neighbours_takes_most_from_there():
    config = BertConfig(vocab_size=200, num_hidden_layers=2)
    ids = torch.randint(5, 200, (40,), generator=torch.Generator().manual_seed(0))
    for layer in attention_maps(from_scratch(config, 0).bert, ids):
        for head, weights in enumerate(layer):
            means = {o: weights.diagonal(o).mean().item() for o in range(-5, 6)}
            assert max(means, key=means.get) == neighbour_offset(head)
    assert [neighbour_offset(head) for head in range(6)] == [-1, 1, -2, 2, -3, 3]


@pytest.mark.parametrize(
    ("words", "naming"),
    [
        (["--look", SENTENCE, "--out", "look.jpg"], ["--out look.jpg", ".png"]),
        (["--look", SENTENCE, "--out", "folder.png"], ["--out folder.png"]),
        (["--look", "so " * 90], ["--look: 182 tokens"]),
        (["--look", SENTENCE, "--fill", SENTENCE], ["give one of", "--look"]),
        (["--look", SENTENCE, "a text"], ["give one of"]),
        (["--look", SENTENCE, "--shots", "2"], ["--shots"]),
    ],
)
def test_what_look_cannot_do_is_refused(refused, tmp_path, words, naming):
    (tmp_path / "folder.png").mkdir()
    refused(*words, naming=naming)


# Answers


def test_an_answer_has_label_probability_and_the_most_probable_words(succeed):
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
    right = sum(answer == label for answer, (_, label) in zip(answers, ROWS, strict=True)) / len(
        ROWS
    )
    assert f"accuracy: {right:.2%} of {len(ROWS)} labelled rows" in labelled.err


@pytest.mark.parametrize("calibration", CALIBRATIONS)
def test_who_knows_the_reviews_is_right_about_them(succeed, folder, calibration):
    done = succeed(folder / "data.csv", *ASK, "--calibrate", calibration)
    assert f"calibration: {calibration}" in done.err
    assert "accuracy: 100.00% of 60 labelled rows" in done.err
    for row, (_, label) in zip(csv.DictReader(io.StringIO(done.out)), ROWS, strict=True):
        assert row["words"].split()[0] in {"no": ["bad", "dull"], "yes": ["good", "great"]}[label]


def test_the_order_in_which_labels_are_typed_does_not_matter(succeed):
    one, two = ([*ASK[:3], "--words", *words] for words in (ASK[-2:], ASK[:-3:-1]))
    for calibration in CALIBRATIONS:
        options = ["--calibrate", calibration, "--json"]
        answers = [
            json.loads(succeed("the film was good", *asked, *options).out) for asked in (one, two)
        ]
        assert answers[0]["label"] == answers[1]["label"] == "yes"
        assert answers[0]["probabilities"] == pytest.approx(answers[1]["probabilities"], abs=1e-5)


def test_the_lesson(succeed, folder):
    """A model that nearly always says "good" is right half the time until it is calibrated."""
    accuracies = {}
    for calibration in ("none", "prior"):
        lines = succeed(
            folder / "data.csv", *ASK, "--calibrate", calibration, "--json", model="biased"
        )
        answers = [json.loads(line)["label"] for line in lines.out.splitlines()]
        accuracies[calibration] = (
            sum(a == label for a, (_, label) in zip(answers, ROWS, strict=True)) / 60
        )
        if calibration == "none":
            assert set(answers) == {"yes"}
    assert accuracies["none"] == 0.5 and accuracies["prior"] > 0.9


def test_the_prior_is_that_of_train_rows(succeed, folder, tmp_path):
    """Other test rows change no answer; fewer train rows do, and so does no calibration."""
    rows = [row for label in ("yes", "no") for row in ROWS if row[1] == label]
    with open(tmp_path / "other.csv", "w", encoding="utf-8", newline="") as file:
        other = [
            ("so bad" if i % 30 >= 27 else text, label) for i, (text, label) in enumerate(rows)
        ]
        csv.writer(file).writerows([("text", "label"), *other])
    with open(tmp_path / "same.csv", "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *rows])
    texts = ["the film was good", "the plot was clumsy"]
    one = succeed(*texts, *ASK, "--json", "--data", "same.csv").out
    assert succeed(*texts, *ASK, "--json", "--data", "other.csv").out == one
    assert succeed(*texts, *ASK, "--json", "--data", "same.csv", "--unlabelled", "3").out != one
    assert (
        succeed(*texts, *ASK, "--json", "--calibrate", "none", "--data", "nowhere.csv").out != one
    )


def test_demonstrations_stand_in_front_of_a_text(succeed):
    plain = succeed("the film was good", *ASK, "--calibrate", "none", "--json").out
    shown = succeed("the film was good", *ASK, "--calibrate", "none", "--json", "--shots", "2")
    assert json.loads(shown.out)["probabilities"] != json.loads(plain)["probabilities"]
    again = succeed(
        "the film was good", *ASK, "--calibrate", "none", "--json", "--shots", "2", "--seed", "9"
    )
    assert again.out != shown.out  # others were chosen


def test_templates_answer_together(succeed):
    each = [json.loads(succeed("a good plot", "--template", template, *ASK[3:], "--json").out)
            for template in ASK[1:3]]  # fmt: skip
    [together] = map(json.loads, succeed("a good plot", *ASK, "--json").out.splitlines())
    products = {name: math.sqrt(math.prod(answer["probabilities"][name] for answer in each))
                for name in ("no", "yes")}  # fmt: skip
    for name, product in products.items():
        assert together["probabilities"][name] == pytest.approx(
            product / sum(products.values()), abs=1e-5
        )


@pytest.mark.parametrize(
    "more",
    [
        ["--batch-tokens", "8"],
        *(["--attention", name] for name in ("reference", "padded", "tiled", "sdpa")),
    ],
)
def test_how_it_is_computed_changes_no_answer(succeed, folder, more):
    one, two = (
        succeed(folder / "data.csv", *ASK, "--json", *options).out for options in ([], more)
    )
    for a, b in zip(one.splitlines(), two.splitlines(), strict=True):
        a, b = json.loads(a), json.loads(b)
        assert (a["text"], a["label"]) == (b["text"], b["label"])
        assert a["probabilities"] == pytest.approx(b["probabilities"], abs=1e-4)


def test_a_text_that_looks_like_a_template_is_only_text(succeed):
    texts = ["it was [MASK]", "{text} [SEP] [CLS]", "[MASK] [MASK] [MASK]"]
    lines = succeed(*texts, *ASK, "--json", "--max-len", "60").out.splitlines()
    assert [json.loads(line)["text"] for line in lines] == texts
    assert not any(json.loads(line)["truncated"] for line in lines)


@pytest.mark.parametrize("max_len, same", [("24", True), ("60", False)])
def test_of_a_long_text_so_many_tokens_are_read_as_max_len_allows(succeed, max_len, same):
    end = " the film was good" * 6
    lines = succeed(f"bad bad{end}", f"great great{end}", *ASK, "--json", "--max-len", max_len).out
    bad, great = map(json.loads, lines.splitlines())
    assert bad["truncated"] == great["truncated"] == same
    assert (bad["probabilities"] == great["probabilities"]) == same


def test_a_word_may_be_several(succeed):
    one, two = (
        json.loads(succeed("the cast", *ASK[:3], "--words", "a=good", f"b={word}", "--json").out)
        for word in ("bad", "bad joke")
    )
    assert one["probabilities"] != two["probabilities"]


def test_three_labels(succeed):
    [line] = succeed(
        "the cast", "--words", "a=good", "b=bad", "c=dull", *ASK[:3], "--json"
    ).out.splitlines()
    assert list(json.loads(line)["probabilities"]) == ["a", "b", "c"]


def test_blanks_are_filled(succeed):
    done = succeed("--fill", "the [MASK] was [MASK]", "--json", "--top", "4")
    blanks = [json.loads(line) for line in done.out.splitlines()]
    assert [blank["blank"] for blank in blanks] == [1, 2]
    for blank in blanks:
        probabilities = [word["probability"] for word in blank["words"]]
        assert len(probabilities) == 4 and probabilities == sorted(probabilities, reverse=True)
    assert succeed("--fill", "the [MASK] was [MASK]").out.startswith("blank 1: ")


def test_temperature_zero_writes_the_same_whatever_the_seed(succeed):
    words = ["--generate", "20", "the film", "--temperature"]
    cold = {succeed(*words, "0", "--seed", seed).out for seed in "01"}
    default = {succeed(*words[:-1], "--seed", seed).out for seed in "0123"}
    assert len(cold) == 1 and len(default) > 1
    assert {succeed(*words, "0.7", "--seed", seed).out for seed in "0123"} == default


def test_text_is_written(succeed):
    done = succeed("--generate", "5", "the film", "--seed", "3")
    assert done.out.startswith("the film")
    assert succeed("--generate", "5", "the film", "--seed", "3").out == done.out
    hot = ["--generate", "20", "the film", "--temperature", "9"]
    assert len({succeed(*hot, "--seed", seed).out for seed in "0123"}) == 4
    [line] = succeed("--generate", "5", "the film", "--json").out.splitlines()
    assert set(json.loads(line)) == {"text", "generated"}


@pytest.mark.parametrize(
    "words", [["--evaluate", "DATA", "--out", "out"], ["--fill", "the [MASK]"]]
)
def test_words_of_any_language_are_printed_in_any_locale(folder, tmp_path, words):
    tokenizer = Tokenizer.train(
        ["日 本 は い い"] * 9 + [f"{text} it is . :" for text, _ in ROWS], 60
    )
    config = BertConfig(vocab_size=60, hidden_size=16, num_hidden_layers=1, num_attention_heads=1)
    (tmp_path / "model").mkdir()
    save_model(BertForMaskedLM(config), tokenizer, tmp_path / "model")
    options = ["--model", "model", "--template", "{text} 日 [MASK]", "--words", "no=b", "yes=g"]
    options += ["--top", "60"]
    words = [str(folder / "data.csv") if word == "DATA" else word for word in words]
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    command = [sys.executable, str(Path(prompt.__file__)), *words, *options]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, env=environment)
    assert done.returncode == 0, done.stderr.decode()
    assert "日" in done.stdout.decode()


@pytest.fixture
def padded(folder, tmp_path):
    """A model with more embeddings than its tokenizer has entries."""
    tokenizer = Tokenizer.load(folder / "learned")
    config = BertConfig(vocab_size=400, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    torch.manual_seed(0)
    (tmp_path / "padded").mkdir()
    save_model(BertForMaskedLM(config), tokenizer, tmp_path / "padded")
    return tmp_path / "padded"


def test_only_words_that_exist_are_among_the_most_probable(succeed, padded):
    filled = json.loads(succeed("--fill", "the [MASK]", "--json", "--top", "50", model=padded).out)
    assert len(filled["words"]) == 50 and all(word["word"] for word in filled["words"])
    answer = json.loads(succeed("the film", *ASK, "--json", "--top", "50", model=padded).out)
    assert len(answer["words"]) == 50


def test_only_words_that_exist_are_written(succeed, padded, monkeypatch):
    decoded, decode = [], Tokenizer.decode
    monkeypatch.setattr(
        Tokenizer, "decode", lambda self, ids: decoded.extend(ids) or decode(self, ids)
    )
    succeed("--generate", "40", "the", "--temperature", "5", model=padded)
    assert max(decoded) < Tokenizer.load(padded).vocab_size


def test_a_number_is_the_place_of_a_label_in_words(succeed, tmp_path):
    with open(tmp_path / "numbers.csv", "w", encoding="utf-8", newline="") as file:
        rows = [(text, ("no", "yes").index(label)) for text, label in ROWS]
        csv.writer(file).writerows([("text", "label"), *rows])
    assert "accuracy: 100.00% of 60" in succeed("numbers.csv", *ASK).err
    done = succeed(
        "--evaluate", "numbers.csv", *ASK, "--out", "result", "--calibrate", "none", "--json"
    )
    assert all(
        json.loads(line)["accuracy"] == 1 for line in done.out.splitlines()[: len(CALIBRATIONS)]
    )


# Evaluation


def test_one_table_and_one_picture(succeed, folder, tmp_path):
    done = succeed("--evaluate", folder / "data.csv", *ASK, "--shots", "2", "--out", "result")
    saved = json.loads((tmp_path / "result" / "prompts.json").read_text())
    kinds = {(row["template"], row["calibration"], row["shots"]) for row in saved["rows"]}
    assert len(kinds) == len(saved["rows"]) == 3 * len(CALIBRATIONS) * 2
    assert [row["method"] for row in saved["with_labels"]] == ["majority", "nb-svm"]
    for row in saved["rows"]:
        low, high = row["interval"]
        assert low - 1e-9 <= row["accuracy"] <= high + 1e-9 and 0.5 <= row["majority_share"] <= 1
        assert 0 <= row["calibration_error"] <= 1
        assert f"{row['accuracy']:.1%}" in done.out
    assert "nb-svm, from 50 labels" in done.out and "with 2 shots" in done.out
    picture = matplotlib.image.imread(tmp_path / "result" / "prompts.png")
    assert picture.std() > 0.01


@pytest.mark.parametrize("model", ["learned", "biased"])
def test_the_table_says_what_the_answers_are(succeed, folder, tmp_path, model):
    done = succeed("--evaluate", folder / "data.csv", *ASK, "--out", "result", model=model)
    saved = json.loads((tmp_path / "result" / "prompts.json").read_text())
    tested = [row for label in ("yes", "no") for row in [r for r in ROWS if r[1] == label][-3:]]
    assert "6 test rows" in done.out and len(saved["rows"]) == 3 * len(CALIBRATIONS)
    for row in saved["rows"]:
        texts, alone = [text for text, _ in tested], "{text}" in row["template"]
        templates = [row["template"]] if alone else ASK[1:3]
        asked = ["--template", *templates, *ASK[3:], "--calibrate", row["calibration"]]
        lines = succeed(*texts, *asked, "--json", model=model).out.splitlines()
        answers = [json.loads(line)["label"] for line in lines]
        right = sum(a == label for a, (_, label) in zip(answers, tested, strict=True)) / len(tested)
        assert row["accuracy"] == pytest.approx(right)
        assert Counter(answers)[row["majority_answer"]] == pytest.approx(6 * row["majority_share"])
        assert row["majority_share"] == pytest.approx(Counter(answers).most_common(1)[0][1] / 6)


def test_what_is_evaluated_and_what_is_shown(succeed, folder, monkeypatch):
    """Test rows are evaluated; train rows are demonstrations, or read without their labels."""
    compared, shown = [], []
    compare, demonstrate = prompt.compare_prompts, prompt.Prompt.demonstrate

    def watched(prompts, texts, labels, unlabelled):
        decode = prompts[0].fill_mask.tokenizer.decode
        tested = dict(zip(map(decode, texts), labels.tolist(), strict=True))
        compared.append((tested, set(map(decode, unlabelled)), len(prompts[0].demonstrations)))
        return compare(prompts, texts, labels, unlabelled)

    def watched_too(self, texts, labels):
        shown.append((list(map(self.fill_mask.tokenizer.decode, texts)), labels))
        demonstrate(self, texts, labels)

    monkeypatch.setattr(prompt, "compare_prompts", watched)
    monkeypatch.setattr(prompt.Prompt, "demonstrate", watched_too)
    asked = [
        "--evaluate",
        folder / "data.csv",
        *ASK,
        "--shots",
        "2",
        "--unlabelled",
        "7",
        "--out",
        "result",
    ]
    succeed(*asked)
    labels = {text: ("no", "yes").index(label) for text, label in ROWS}
    test = [text for label in (1, 0) for text in [t for t in labels if labels[t] == label][-3:]]
    (_, _, without), (tested, unlabelled, with_shots) = compared
    assert (compared[0][0], compared[0][1]) == (tested, unlabelled)
    assert tested == {text: labels[text] for text in test} and without == 0 < with_shots
    assert len(unlabelled) == 7 and unlabelled <= labels.keys() - set(test)
    for texts, answers in shown:
        assert sorted(answers) == [0, 1] and [labels[text] for text in texts] == answers
        assert not set(texts) & set(test)


def test_every_interval_is_of_six_rows(succeed, folder, tmp_path):
    succeed("--evaluate", folder / "data.csv", *ASK, "--out", "result", model="biased")
    saved = json.loads((tmp_path / "result" / "prompts.json").read_text())
    known = {0.5: (0.1876, 0.8124), 1.0: (0.6097, 1.0)}  # Wilson's, of 3 and of 6
    rows = [row for row in saved["rows"] + saved["with_labels"] if row["accuracy"] in known]
    assert {row["accuracy"] for row in rows} == set(known) and rows[-1]["method"] == "nb-svm"
    for row in rows:
        assert row["interval"] == pytest.approx(known[row["accuracy"]], abs=1e-4)


def test_evaluation_as_json(succeed, folder):
    lines = succeed(
        "--evaluate", folder / "data.csv", *ASK, "--out", "result", "--json"
    ).out.splitlines()
    rows = [json.loads(line) for line in lines]
    assert len(rows) == 3 * len(CALIBRATIONS) + 2
    assert all(set(row) >= {"accuracy", "interval"} for row in rows)
    assert [row.get("method") for row in rows[-2:]] == ["majority", "nb-svm"]


def test_an_evaluation_may_be_made_again(succeed, folder, tmp_path):
    for _ in range(2):
        succeed("--evaluate", folder / "data.csv", *ASK, "--out", "result")
    assert {path.name for path in (tmp_path / "result").iterdir()} == {
        "prompts.json",
        "prompts.png",
    }


@pytest.mark.parametrize("broken", ["prompt_table", "plot_prompts", "plot_comparison"])
def test_results_are_written_before_they_are_printed_and_drawn(
    ask, folder, tmp_path, monkeypatch, broken
):
    def fail(*arguments):
        raise OSError("no space left")

    module = prompt if broken == "prompt_table" else minitune.support.plots
    monkeypatch.setattr(module, broken, fail)
    (tmp_path / "compare.json").write_text(json.dumps({"rows": curve()}))
    options = [*ASK, "--out", "result", "--curves", "compare.json"]
    done = ask("--evaluate", folder / "data.csv", *options)
    assert done.status == (2 if broken == "prompt_table" else 0)
    saved = json.loads((tmp_path / "result" / "prompts.json").read_text())
    assert len(saved["rows"]) == 3 * len(CALIBRATIONS)
    assert ("warning: result/" in done.err) == (broken != "prompt_table")


def test_nothing_changes_a_weight(succeed, folder, monkeypatch):
    """Not in the file, and not in memory while it runs."""
    loaded, load = [], prompt.checkpoint.load_masked_lm

    def watched(*arguments):
        model, has_head = load(*arguments)
        loaded.append(
            (model, {name: tensor.clone() for name, tensor in model.state_dict().items()})
        )
        return model, has_head

    monkeypatch.setattr(prompt.checkpoint, "load_masked_lm", watched)
    before = weights_hash(folder / "learned")
    jobs = [["a film", *ASK, "--calibrate", name, "--shots", "2"] for name in CALIBRATIONS]
    jobs += [[folder / "data.csv", *ASK], ["--fill", "the [MASK]"], ["--generate", "9", "the"]]
    jobs += [["--evaluate", folder / "data.csv", *ASK, "--shots", "2", "--out", "result"]]
    for job in jobs:
        succeed(*job)
        assert weights_hash(folder / "learned") == before
    assert len(loaded) == len(jobs)
    for model, tensors in loaded:
        state = model.state_dict()
        assert state.keys() == tensors.keys()
        assert all(torch.equal(tensor, state[name]) for name, tensor in tensors.items())
        assert all(parameter.grad is None for parameter in model.parameters())


def curve():
    """Rows of a compare.json of finetune.py."""
    row = {"method": "full", "accuracy": 0.6, "interval": [0.5, 0.7], "spread": None}
    return [row | {"train_examples": n} for n in (16, 64)]


def test_the_prompt_beside_curves_is_of_all_templates(succeed, folder, tmp_path, monkeypatch):
    rows = curve()
    (tmp_path / "compare.json").write_text(json.dumps({"rows": rows}))
    drawn = []
    monkeypatch.setattr(
        minitune.support.plots, "plot_comparison", lambda *arguments: drawn.append(arguments)
    )
    for calibration in ("prior", "pmi"):
        options = [
            "--calibrate",
            calibration,
            "--shots",
            "2",
            "--out",
            "result",
            "--curves",
            "compare.json",
        ]
        succeed("--evaluate", folder / "data.csv", *ASK, *options)
        curves, *_, prompted = drawn.pop()
        assert [row["train_examples"] for row in curves] == [16, 64]
        assert (prompted["template"], prompted["shots"]) == (TOGETHER, 0)
        assert prompted["calibration"] == calibration


def test_curves_are_drawn_beside_the_prompt(succeed, ask, folder, tmp_path):
    rows = curve()
    (tmp_path / "compare.json").write_text(json.dumps({"rows": rows}))
    succeed("--evaluate", folder / "data.csv", *ASK, "--out", "result", "--curves", "compare.json")
    assert matplotlib.image.imread(tmp_path / "result" / "labels.png").std() > 0.01
    (tmp_path / "compare.json").write_text(json.dumps({"rows": rows[:1]}))
    done = ask(
        "--evaluate", folder / "data.csv", *ASK, "--out", "result", "--curves", "compare.json"
    )
    assert done.status == 2 and "--curves compare.json" in done.err


def test_unlabelled_reviews_may_have_no_labels(succeed, tmp_path):
    (tmp_path / "mine.txt").write_text("the film was good\nthe plot was bad\nthe cast was dull\n")
    done = succeed("the film was good", *ASK, "--data", tmp_path / "mine.txt")
    assert "calibration: prior" in done.err


def test_a_prior_without_train_rows_is_refused(refused, tmp_path):
    for name in ("train/pos", "train/neg", "test/pos", "test/neg"):
        (tmp_path / "tree" / name).mkdir(parents=True)
    (tmp_path / "tree/test/pos/1_9.txt").write_text("the film was good")
    refused("a film", *ASK, "--data", "tree", naming=["--calibrate prior", "no train rows"])


# Bad input: one line that names the culprit, status 2

REFUSED = {
    "nothing to do": ([], ["texts", "--evaluate", "--fill"]),
    "two things to do": (["a film", "--fill", "[MASK]"], ["--fill"]),
    "two other things to do": (
        ["--evaluate", "DATA", "--generate", "3"],
        ["--evaluate", "--generate"],
    ),
    "evaluate and a text": (["a film", "--evaluate", "DATA"], ["texts", "--evaluate"]),
    "generate after nothing": (["--generate", "3"], ["--generate"]),
    "an empty text": (["a film", " ", *ASK], ["empty"]),
    "a template without a text": (
        ["a film", "--template", "it was [MASK]"],
        ["it was [MASK]", "{text}"],
    ),
    "a template with two texts": (
        ["a", "--template", "{text} {text} [MASK]"],
        ["{text} {text}", "once"],
    ),
    "a template with two blanks": (
        ["a", "--template", "{text} [MASK] [MASK]"],
        ["[MASK] [MASK]", "once"],
    ),
    "a small blank": (["a film", "--template", "{text} [mask]"], ["{text} [mask]", "[MASK] once"]),
    "an empty template": (["a film", "--template", ""], ["--template", "empty"]),
    "a template that is only a text": (["a", "--template", "{text}"], ["{text}", "[MASK] once"]),
    "one bad template of two": (["a film", *ASK[:2], "it is", *ASK[3:]], ["'it is'", "{text}"]),
    "a template without a blank": (
        ["a film", "--template", "{text} fine"],
        ["{text} fine", "[MASK]"],
    ),
    "a long template": (["a", "--template", "{text} [MASK]" + " the" * 40, *ASK[3:]], ["no room"]),
    "words of nothing": (["a film", "--words", "good", *ASK[:3]], ["--words good"]),
    "a label without words": (["a film", *ASK[:3], "--words", "no=bad", "yes="], ["--words yes="]),
    "words of no label": (["a film", *ASK[:3], "--words", "=bad", "yes=good"], ["--words =bad"]),
    "only commas": (["a film", *ASK[:3], "--words", "no=,,", "yes=good"], ["--words no=,,"]),
    "the same label twice": (["a film", *ASK[:3], "--words", "no=bad", "no=dull"], ["two labels"]),
    "an unknown part": (
        ["a film", *ASK[:3], "--words", "no=bad", "yes=good,goo日"],
        ["goo日", "yes"],
    ),
    "one label": (["a film", *ASK[:3], "--words", "no=bad"], ["two labels"]),
    "an unknown word": (["a film", *ASK[:3], "--words", "no=bad", "yes=日本"], ["日本"]),
    "a file that is not there": (["nowhere.csv", *ASK], ["nowhere.csv"]),
    "unlabelled reviews that are not there": (
        ["a", *ASK, "--data", "nowhere.csv"],
        ["--data nowhere.csv"],
    ),
    "one label to evaluate": (["--evaluate", "one.csv", *ASK], ["one.csv", "one label only, yes"]),
    "no label to evaluate": (["--evaluate", "bare.csv", *ASK], ["bare.csv", "no label"]),
    "too little to evaluate": (["--evaluate", "few.csv", *ASK], ["few.csv", "too few rows"]),
    "three labels for two": (["--evaluate", "three.csv", *ASK], ["three.csv", "so-so", "no, yes"]),
    "another label in a file": (["three.csv", *ASK], ["row 3", "so-so", "no, yes"]),
    "labels in capitals": (["DATA", *ASK[:4], "No=bad", "Yes=good"], ["row 1", "yes", "No, Yes"]),
    "shots of other labels": (
        ["a", *ASK[:4], "a=bad", "b=good", "--shots", "2"],
        ["data.csv", "a, b"],
    ),
    "a file without texts": (["empty.csv", *ASK], ["no text"]),
    "a file that is no UTF-8": (["latin.txt", *ASK], ["latin.txt", "UTF-8"]),
    "data that is not there": (["--evaluate", "nowhere.csv", *ASK], ["--evaluate nowhere.csv"]),
    "a sentence without a blank": (["--fill", "the film"], ["--fill", "[MASK]"]),
    "a long sentence": (["--fill", "[MASK]" + " the" * 99], ["102 tokens", "64 positions"]),
    "more to write than positions": (["--generate", "99", "the film"], ["103", "64 positions"]),
    "nothing to write": (["--generate", "0", "the film"], ["--generate", "0"]),
    "a negative temperature": (
        ["--generate", "3", "the film", "--temperature", "-1"],
        ["--temperature", "-1"],
    ),
    "a temperature that is no number": (
        ["--generate", "3", "the film", "--temperature", "nan"],
        ["nan"],
    ),
    "no words to print": (["a film", *ASK, "--top", "0"], ["--top", "0"]),
    "no shots": (["a film", *ASK, "--shots", "0"], ["--shots", "0"]),
    "a file for results": (["--evaluate", "DATA", *ASK, "--out", "few.csv"], ["few.csv"]),
    "results below a file": (["--evaluate", "DATA", *ASK, "--out", "few.csv/x"], ["few.csv/x"]),
    "curves that are not there": (
        ["--evaluate", "DATA", *ASK, "--curves", "nowhere.json"],
        ["nowhere.json"],
    ),
    "half precision": (["a film", *ASK, "--precision", "fp16"], ["--precision fp16"]),
    "a text that is no UTF-8": (["caf\udce9", *ASK], ["UTF-8"]),
    "a text to continue that is no UTF-8": (["--generate", "3", "caf\udce9"], ["UTF-8"]),
    "words that are no UTF-8": (
        ["a film", *ASK[:3], "--words", "no=bad", "yes=caf\udce9"],
        ["UTF-8"],
    ),
    "an empty model": (["a film", "--model", ""], ["--model", "empty"]),
    "an empty dataset": (["a film", *ASK, "--data", " "], ["--data", "empty"]),
    "an empty output": (["--evaluate", "DATA", *ASK, "--out", ""], ["--out", "empty"]),
    "nothing to evaluate": (["--evaluate", ""], ["--evaluate", "empty"]),
    "nothing to fill": (["--fill", ""], ["--fill", "empty"]),
    "empty words": (["a film", *ASK[:3], "--words", ""], ["--words", "empty"]),
    "no curves": (["--evaluate", "DATA", *ASK, "--curves", ""], ["--curves", "empty"]),
    "shots for a text to continue": (["--generate", "3", "a", "--shots", "2"], ["--shots"]),
    "no such option": (["a film", *ASK, "--templates", "x"], ["--templates"]),
    "more shots than room": (["a film", *ASK, "--shots", "20"], ["--shots 20"]),
    "more shots than rows": (["a film", *ASK, "--shots", "64"], ["64"]),
    "labels of other names": (
        ["--evaluate", "DATA", *ASK[:4], "a=bad", "b=good"],
        ["no is", "a, b"],
    ),
    "more tokens than positions": (["a film", *ASK, "--max-len", "65"], ["--max-len 65", "64"]),
    "a GPU's attention": (
        ["a film", *ASK, "--attention", "triton"],
        ["--attention triton", "CUDA"],
    ),
    "a blank that is not UTF-8": (["--fill", "caf\udce9 [MASK]"], ["UTF-8"]),
    "a template that is not UTF-8": (
        ["a film", "--template", "{text} caf\udce9 [MASK]"],
        ["UTF-8"],
    ),
    "shots for a blank": (["--fill", "[MASK]", "--shots", "2"], ["--shots"]),
    "a calibration of its own": (["a film", "--calibrate", "luck"], ["luck"]),
}


FILES = {
    "one.csv": b"text,label\n" + b"a film,yes\n" * 40,
    "bare.csv": b"text\n" + b"a film\n" * 40,
    "few.csv": b"text,label\na film,yes\na plot,no\n",
    "three.csv": b"text,label\n" + b"a film,yes\na plot,no\na joke,so-so\n" * 20,
    "empty.csv": b"text,label\n",
    "latin.txt": b"caf\xe9\n",
}


def contents(folder):
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.fixture
def refused(ask, tmp_path):
    """prompt.py refuses in one line that names the culprit, and leaves nothing behind."""

    def run(*words, naming=(), **more):
        before = contents(tmp_path)
        done = ask(*words, **more)
        assert done.status == 2, (done.out, done.err)
        chatter = ("model: ", "1 template; calibration: ", "2 templates; calibration: ")
        [line] = [line for line in done.err.splitlines() if not line.startswith(chatter)]
        assert line.startswith("error: ") and len(line) < 1000 and done.out == ""
        for part in naming:
            assert part in line
        assert contents(tmp_path) == before

    return run


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_refused_in_one_line(refused, folder, tmp_path, case):
    for name, content in FILES.items():
        (tmp_path / name).write_bytes(content)
    words, naming = REFUSED[case]
    refused(*(folder / "data.csv" if word == "DATA" else word for word in words), naming=naming)


@pytest.mark.parametrize(
    "stdin, naming", [(b"", "no text"), (b"\n \n", "no text"), (b"caf\xe9\n", "UTF-8")]
)
def test_bad_standard_input_is_refused(refused, stdin, naming):
    refused("-", *ASK, stdin=stdin, naming=[naming])


JOBS = [["a film", *ASK], ["--fill", "[MASK]"], ["--generate", "3", "the film"]]


@pytest.mark.parametrize("words", [*JOBS, ["--evaluate", "DATA", *ASK, "--out", "result"]])
def test_weights_whose_products_are_no_numbers_are_refused(
    refused, folder, tmp_path_factory, words
):
    damaged = tmp_path_factory.mktemp("damaged")
    model, _ = prompt.checkpoint.load_masked_lm(folder / "learned")
    model.bert.layers[0].feed_forward.down.weight.data.fill_(1e38)
    save_model(model, Tokenizer.load(folder / "learned"), damaged)
    words = [folder / "data.csv" if word == "DATA" else word for word in words]
    refused(*words, model=damaged, naming=["weights"])


@pytest.mark.parametrize("words", JOBS)
@pytest.mark.parametrize(
    "model, naming", [("classifier", "no masked-LM head"), ("nowhere", "nowhere")]
)
def test_a_model_that_cannot_fill_blanks_is_refused(refused, monkeypatch, words, model, naming):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    refused(*words, model=model, naming=[naming])


@pytest.mark.parametrize("name", ["chapter1.tex", "metrics.json", "prompts.json.old"])
def test_out_that_holds_something_else_is_refused(refused, folder, tmp_path, name):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / name).write_text("Years of work.")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path / "thesis")
        refused("--evaluate", folder / "data.csv", *ASK, "--out", ".", naming=["--out", name])
    assert (tmp_path / "thesis" / name).read_text() == "Years of work."


# Odd input that once went wrong


def test_a_template_with_dollars_is_drawn(succeed, folder, tmp_path):
    template = "{text} $\\frac [MASK]$ ."
    succeed("--evaluate", folder / "data.csv", "--template", template, *ASK[3:], "--out", "result")
    assert (tmp_path / "result" / "prompts.png").is_file()


def test_the_lowest_temperature_writes_the_most_probable(succeed):
    words = ["--generate", "5", "the film", "--temperature"]
    assert succeed(*words, "1e-320").out == succeed(*words, "0").out


def test_what_is_written_begins_with_the_prompt_as_it_was_given(succeed):
    assert succeed("--generate", "3", "The Film, 日本:").out.startswith("The Film, 日本:")


@pytest.mark.parametrize("words", [["--fill", "the [MASK]"], ["--generate", "3", "the film"]])
def test_the_default_of_max_len_is_no_obstacle_to_other_jobs(folder, monkeypatch, words):
    monkeypatch.setattr(sys, "argv", ["prompt.py", *words, "--model", str(folder / "learned")])
    with pytest.raises(SystemExit) as ended:
        run_script(prompt.main)
    assert ended.value.code == 0


@pytest.mark.parametrize("name", ["one.csv", "bare.csv", "few.csv"])
def test_an_error_about_evaluate_names_evaluate(refused, tmp_path, name):
    (tmp_path / name).write_bytes(FILES[name])
    refused("--evaluate", name, *ASK, naming=[f"--evaluate {name}"])


@pytest.mark.parametrize(
    "change",
    [
        {"accuracy": "high"},
        {"accuracy": None},
        {"accuracy": math.nan},
        {"accuracy": 60.0},
        {"interval": None},
        {"interval": [0.5]},
        {"interval": [0.5, math.inf]},
        {"train_examples": "many"},
        {"train_examples": None},
        {"train_examples": 0},
    ],
)
def test_damaged_curves_are_refused_before_the_work(refused, folder, tmp_path, change):
    rows = curve()
    (tmp_path / "compare.json").write_text(json.dumps({"rows": [rows[0] | change, rows[1]]}))
    options = ["--out", "result", "--curves", "compare.json"]
    refused("--evaluate", folder / "data.csv", *ASK, *options, naming=["--curves compare.json"])


@pytest.mark.parametrize("word", ["bad", "BAD"])
def test_one_word_for_two_labels_is_refused(refused, word):
    refused("a film", *ASK[:3], "--words", "no=bad", f"yes=good,{word}", naming=["--words"])
