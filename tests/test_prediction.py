"""New texts: answers in their order whatever the batching, under the names the model was trained with."""

import csv
import io
import itertools
import json
import os
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from minitune.checkpoint import save_model, weights_hash
from minitune.classification import TokenizedTexts
from minitune.commands.labelling import rows_to_label
from minitune.features import FeatureClassifier
from minitune.methods import build
from minitune.model import BertConfig, BertForSequenceClassification
from minitune.prediction import Classifier
from minitune.support import answers
from minitune.support.answers import Prediction, print_answers
from minitune.support.errors import UserError
from minitune.support.runtime import Runtime
from minitune.trained import Trained

FP32 = Runtime.start("cpu", "fp32")
CONFIG = BertConfig(
    vocab_size=80,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=24,
    max_position_embeddings=32,
    initializer_range=0.2,
)
NAMES = {0: "zebra", 1: "aardvark", 2: "mole"}  # an order of its own
TEXTS = [
    "Two hours of pure joy.", "awful", "An awful, awful film! And what a joke, and so on and on.", "joy",
    "Was that Zoë's café?", "so good, so pure, so awful, so bad", "a bad joke", "of a film, of a joke", "!",
    "and on and on and on and on and on and on and on and on and on and on and on and on and on and on",
]  # fmt: skip
METHODS = ("feature", "adapter", "full")

each_method = pytest.mark.parametrize("method", METHODS)
pytestmark = pytest.mark.usefixtures("fixed_seed")


def head_of(model):
    return model.head.classifier if isinstance(model, FeatureClassifier) else model.classifier


@torch.no_grad()
def give_opinions(model, tokenizer):
    """Make the model answer now this, now that."""
    head, sequences = head_of(model.eval()), TokenizedTexts(TEXTS, tokenizer, 16)
    nn.init.normal_(head.weight, std=0.5)
    head.bias.sub_(model(sequences.pack()).mean(0))
    return model


def save_run(method, base, directory, tokenizer, max_len=16):
    """What a run of this method leaves; returns the model."""
    options = {"adapter_size": 4} if method == "adapter" else {}
    model = give_opinions(build(method, base, NAMES, **options), tokenizer)
    directory.mkdir()
    (directory / "settings.json").write_text(
        json.dumps({"max_len": max_len, "experiment": {"method": method}})
    )
    if method == "full":
        save_model(model, tokenizer, directory)
    else:
        described = (method, model.pooling, options, NAMES, max_len, str(base), weights_hash(base))
        Trained(*described).save(model, directory)
    return model


@pytest.fixture
def classifier(tokenizer):
    model = BertForSequenceClassification(replace(CONFIG, id2label=NAMES))
    return Classifier(give_opinions(model, tokenizer), tokenizer, NAMES, 16, FP32)


def predict(classifier, texts, batch_tokens=100):
    return classifier.predict(texts, batch_tokens)


def assert_alike(found, expected):
    assert [p.text for p in found] == [p.text for p in expected]
    for one, other in zip(found, expected, strict=True):
        assert one.label == other.label and one.truncated == other.truncated
        assert one.probabilities == pytest.approx(other.probabilities, abs=1e-5)


# Order and batching


def test_order_of_input_is_order_of_output_whatever_the_batching(classifier):
    together = predict(classifier, TEXTS, 100_000)
    assert [p.text for p in together] == TEXTS
    scores = sorted(p.probabilities["mole"] for p in together)
    assert min(b - a for a, b in itertools.pairwise(scores)) > 1e-4  # so no two can be confused
    assert_alike([predict(classifier, [text])[0] for text in TEXTS], together)
    for batch_tokens in (1, 16, 64):
        assert_alike(predict(classifier, TEXTS, batch_tokens), together)
    assert_alike(predict(classifier, TEXTS[::-1], 64), together[::-1])


def test_no_texts_have_no_answers(classifier):
    assert predict(classifier, []) == []


def test_the_same_text_has_the_same_answer_each_time(classifier):
    found = predict(classifier, ["so good"] * 3 + ["awful"] + ["so good"])
    assert_alike([found[4]] * 3, found[:3])


# What an answer says


def test_probabilities_are_those_of_a_softmax_and_the_label_has_the_highest(classifier):
    for text, answer in zip(TEXTS, predict(classifier, TEXTS), strict=True):
        assert list(answer.probabilities) == ["zebra", "aardvark", "mole"]
        assert sum(answer.probabilities.values()) == pytest.approx(1, abs=1e-6)
        assert answer.label == max(answer.probabilities, key=answer.probabilities.get)
        sequences = TokenizedTexts([text], classifier.tokenizer, 16)
        with torch.no_grad():
            logits = classifier.model(sequences.pack()).double()
        expected = logits.softmax(-1)[0].tolist()
        assert list(answer.probabilities.values()) == pytest.approx(expected, abs=1e-5)
    assert len({p.label for p in predict(classifier, TEXTS)}) > 1


def test_an_answer_says_whether_the_text_was_cut(classifier):
    found = predict(classifier, TEXTS)
    lengths = [len(ids) + 2 for ids in classifier.tokenizer.encode(TEXTS)]
    assert [p.truncated for p in found] == [length > 16 for length in lengths]
    assert {True, False} == {p.truncated for p in found}
    assert [p.text for p in found] == TEXTS  # as it was given, even so


def test_dropout_is_off(tokenizer):
    model = BertForSequenceClassification(
        replace(CONFIG, id2label=NAMES, hidden_dropout_prob=0.5)
    ).train()
    classifier = Classifier(model, tokenizer, NAMES, 16, FP32)
    assert_alike(predict(classifier, TEXTS), predict(classifier, TEXTS))


# From texts, files and standard input to lines


def parrot(texts):
    """Answers that say which text they belong to."""
    return [Prediction(text, "good", {"good": 0.75, "bad": 0.25}, len(text) > 20) for text in texts]


@pytest.fixture
def answer(monkeypatch, capsys):
    """print_answers, with a parrot for a model: (stdout, stderr, the texts of each block)."""

    def run(*arguments, stdin=b"", as_json=False, predict=parrot):
        blocks = []

        def recorded(texts):
            blocks.append(texts)
            return predict(texts)

        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        rows = rows_to_label([*map(str, arguments)], "--predict", {0: "bad", 1: "good"})
        print_answers(rows, recorded, as_json, "were long")
        return *capsys.readouterr(), blocks

    return run


ODD_TEXTS = [
    "plain", 'She said "no".', "one, two", "first\nsecond", "first\rsecond", "first\r\nsecond",
    "\rx", "x\r", '"', "a\u2028b", "\ttabs\t", " spaces ", "null", "=1+1", "caf\u00e9 \u2603",
]  # fmt: skip


def test_csv_is_read_back_as_the_same_texts(answer, tmp_path):
    rows = "".join(json.dumps({"text": text}) + "\n" for text in ODD_TEXTS)
    (tmp_path / "odd.jsonl").write_text(rows)
    out, err, _ = answer(tmp_path / "odd.jsonl")
    assert out.startswith("label,probability,truncated,text\ngood,0.7500,false,plain\n")
    found = list(csv.DictReader(io.StringIO(out, newline=""), strict=True))
    assert [row["text"] for row in found] == ODD_TEXTS and err == ""
    assert {(row["label"], row["probability"], row["truncated"]) for row in found} == {
        ("good", "0.7500", "false")
    }
    out, _, _ = answer(tmp_path / "odd.jsonl", as_json=True)
    assert [json.loads(line)["text"] for line in out.removesuffix("\n").split("\n")] == ODD_TEXTS


def test_arguments_are_answered_in_their_order(answer, tmp_path):
    (tmp_path / "a.txt").write_text("second\nthird\n")
    (tmp_path / "B.CSV").write_text("text,label\nsixth,good\nseventh,bad\n")
    stdin = "\ufefffourth\r\n \nfif\u00e9th".encode()
    out, err, _ = answer("first", tmp_path / "a.txt", "-", tmp_path / "B.CSV", stdin=stdin)
    texts = [row["text"] for row in csv.DictReader(out.splitlines())]
    assert texts == ["first", "second", "third", "fourth", "fif\u00e9th", "sixth", "seventh"]
    assert err == "accuracy: 50.00% of 2 labelled rows\n"


def test_what_was_cut_is_counted_over_all_blocks(answer, monkeypatch):
    monkeypatch.setattr(answers, "BLOCK", 2)
    out, err, blocks = answer("short", "x" * 21, "x" * 20, "x" * 22, "short too")
    assert blocks == [["short", "x" * 21], ["x" * 20, "x" * 22], ["short too"]]
    assert err == "2 of 5 were long\n" and out.count("label,probability") == 1


@pytest.mark.parametrize("block", [1, 3, 5, 10])
def test_the_order_holds_over_blocks(answer, classifier, monkeypatch, block):
    expected = predict(classifier, TEXTS)
    monkeypatch.setattr(answers, "BLOCK", block)
    out, _, blocks = answer(*TEXTS, as_json=True, predict=classifier.predict)
    assert_alike([Prediction(**json.loads(line)) for line in out.splitlines()], expected)
    assert [len(texts) for texts in blocks[:-1]] == [block] * (len(blocks) - 1)


def test_a_block_is_answered_before_the_next_is_read(answer, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(answers, "BLOCK", 2)
    (tmp_path / "a.csv").write_text("text\nfirst\nsecond\nthird\n  \n")
    with pytest.raises(UserError, match="line 5: the column text is empty"):
        answer(tmp_path / "a.csv")
    assert [line.split(",")[-1] for line in capsys.readouterr().out.splitlines()[1:]] == [
        "first",
        "second",
    ]


def test_a_block_holds_a_limited_number_of_characters(answer, monkeypatch, tmp_path):
    monkeypatch.setattr(answers, "BLOCK_CHARACTERS", 50)
    (tmp_path / "a.txt").write_text("".join(letter * 20 + "\n" for letter in "abcdefg"))
    _, _, blocks = answer(tmp_path / "a.txt")
    assert [[text[0] for text in block] for block in blocks] == [
        ["a", "b", "c"],
        ["d", "e", "f"],
        ["g"],
    ]


def test_an_endless_line_of_standard_input_is_refused(monkeypatch):
    monkeypatch.setattr(answers, "LONGEST_LINE", 1000)

    class Endless(io.RawIOBase):
        """A line without an end, of which only so much is ever read."""

        def readable(self):
            return True

        def readinto(self, buffer):
            buffer[:300] = b"x" * 300
            return 300

    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BufferedReader(Endless())))
    with pytest.raises(UserError, match="standard input: a line of more than 1,000 bytes"):
        list(rows_to_label(["-"], "--predict", {}))


def test_a_slow_pipe_gets_each_answer_when_its_text_is_there(monkeypatch, capsys):
    reader, writer = os.pipe()
    monkeypatch.setattr(sys, "stdin", os.fdopen(reader))
    os.write(writer, b"first\nsecond\nthi")
    later = ["rd \u2603\n".encode()[:5], "rd \u2603\n".encode()[5:] + b"fourth\nfifth", None]
    blocks = []

    def predict(texts):
        blocks.append(texts)
        for part in later[: 1 + (len(blocks) == 1)]:  # only now is there more to read
            later.remove(part)
            os.close(writer) if part is None else os.write(writer, part)
        return parrot(texts)

    print_answers(rows_to_label(["-"], "--predict", {}), predict, True, "")
    assert blocks == [["first", "second"], ["third \u2603", "fourth"], ["fifth"]]
    answered = [json.loads(line)["text"] for line in capsys.readouterr().out.splitlines()]
    assert answered == ["first", "second", "third \u2603", "fourth", "fifth"]


@pytest.mark.parametrize("stdin", [b"fine\ncaf\xe9\n", b"fine\n\xf0\x9f", b"\xff\xfef\0i\0"])
def test_standard_input_that_is_not_utf8_is_refused(answer, stdin):
    with pytest.raises(UserError, match="standard input: not UTF-8"):
        answer("-", stdin=stdin)


def test_zero_bytes_on_standard_input_are_refused(answer):
    with pytest.raises(UserError, match="standard input: .* zero bytes"):
        answer("-", stdin="fine".encode("utf-16-le"))


REVIEWS = [
    "good", "Good.", "10/10", "8.5/10", "9/11/2001", "and/or", "AC/DC", "Face/Off", "w/o", "4.5",
    "S.W.A.T", "WALL.E", "Great film...I loved it", "Great film...loved it", "Great...great",
    "So-so...", "a.m.", "U.S.A.", "etc.", "I loved it.Great", "I loved it.Really",
    "Not good.Not bad.", "What a film .", "...", "http", "Mr. Bean", "Good acting/bad plot",
    "It is a 10/10 film", "4/5 stars", "Great film, see more at www.imdb.com",
    "It was good.\nReally", "5 stars.", "v1.0", "No. 1", "jsonl", "good-bye", "nowhere", "csv",
    "reviews/", "imdb", "x" * 5000,
]  # fmt: skip
FILES = [
    "my reviews.csv", "missing.CSV", "reviews.Txt", "a b c d e f.jsonl", ".csv", "reviews.tsv",
    "REVIEWS.JSONL", "no/such/file.csv", "10/10.txt", "/tmp/my reviews.csv",
]  # fmt: skip


@pytest.mark.parametrize("text", REVIEWS)
def test_a_review_is_no_name_of_a_file(answer, monkeypatch, tmp_path, text):
    monkeypatch.chdir(tmp_path)
    out, _, blocks = answer(text, as_json=True)
    assert blocks == [[text]] and json.loads(out)["text"] == text


@pytest.mark.parametrize("name", FILES)
def test_a_name_of_a_file_that_is_not_there_is_no_review(answer, monkeypatch, tmp_path, name):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f"--predict {re.escape(name)}: no such file"):
        answer(name)


def test_a_file_is_read_whatever_its_name(answer, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    Path("my reviews.csv").write_text("text\ninside\n")
    Path("Good.").write_text("not a file of reviews")
    Path("folder").mkdir()
    Path("folder/a.TXT").write_text("one\ntwo\n")
    assert answer("my reviews.csv")[2] == [["inside"]]
    assert answer("folder")[2] == [["one", "two"]]
    with pytest.raises(UserError, match="--predict Good.: the name must end in .txt, .csv"):
        answer("Good.")


# From disk


@each_method
def test_label_names_travel_in_their_order(base, tmp_path, tokenizer, method):
    model = save_run(method, base, tmp_path / "run", tokenizer)
    loaded = Classifier.load(str(tmp_path / "run"), FP32)
    assert list(loaded.labels.items()) == list(NAMES.items())
    assert_alike(
        predict(loaded, TEXTS), predict(Classifier(model, tokenizer, NAMES, 16, FP32), TEXTS)
    )
    head = head_of(loaded.model)
    for (
        index,
        name,
    ) in NAMES.items():  # the name is that of the output, not its place in the alphabet
        nn.init.zeros_(head.weight)
        head.bias.data = 5.0 * nn.functional.one_hot(torch.tensor(index), 3)
        [answer] = predict(loaded, ["so good"])
        assert answer.label == name and answer.probabilities[name] > 0.9


@each_method
def test_a_text_is_cut_where_it_was_in_training(base, tmp_path, tokenizer, method):
    save_run(method, base, tmp_path / "run", tokenizer, max_len=9)
    loaded = Classifier.load(str(tmp_path / "run"), FP32)
    assert loaded.max_len == 9
    seven, eight = " ".join(["on"] * 7), " ".join(["on"] * 8)
    assert [p.truncated for p in predict(loaded, [seven, eight])] == [False, True]


@pytest.mark.parametrize("method", ["feature", "adapter"])
@pytest.mark.usefixtures("base")
def test_a_base_named_from_one_directory_is_found_from_another(
    tmp_path, tokenizer, method, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    save_run(method, Path("base"), tmp_path / "run", tokenizer)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert Classifier.load(str(tmp_path / "run"), FP32).labels == NAMES


def change_json(path, change):
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


def without(*keys):
    return lambda raw: {key: value for key, value in raw.items() if key not in keys}


def test_a_classifier_without_label_names_has_those_of_transformers(base, tmp_path, tokenizer):
    """Which leaves them out of config.json where they are LABEL_0, LABEL_1, and so on."""
    model = save_run("full", base, tmp_path / "run", tokenizer)
    (tmp_path / "run" / "settings.json").unlink()
    change_json(tmp_path / "run" / "config.json", without("id2label", "label2id"))
    loaded = Classifier.load(str(tmp_path / "run"), FP32)
    assert loaded.labels == {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}
    assert loaded.max_len == CONFIG.max_position_embeddings
    expected = predict(Classifier(model, tokenizer, loaded.labels, 32, FP32), TEXTS)
    assert_alike(predict(loaded, TEXTS), expected)


@pytest.mark.parametrize("method", ["full", "adapter", "feature"])
def test_the_saved_temperature_makes_answers_less_sure_and_changes_no_label(
    base, tmp_path, tokenizer, method
):
    save_run(method, base, tmp_path / "run", tokenizer)
    name = "config.json" if method == "full" else "trained.json"
    key = "softmax_temperature" if method == "full" else "temperature"
    plain = predict(Classifier.load(str(tmp_path / "run"), FP32), TEXTS)
    change_json(tmp_path / "run" / name, without(key))  # as runs had it before there was one
    assert_alike(predict(Classifier.load(str(tmp_path / "run"), FP32), TEXTS), plain)
    change_json(tmp_path / "run" / name, lambda raw: raw | {key: 2.5})
    scaled = predict(Classifier.load(str(tmp_path / "run"), FP32), TEXTS)
    for before, after in zip(plain, scaled, strict=True):
        powers = {name: p ** (1 / 2.5) for name, p in before.probabilities.items()}
        for name, p in after.probabilities.items():
            assert p == pytest.approx(powers[name] / sum(powers.values()), abs=1e-5)
        assert after.label == before.label
        assert after.probabilities[after.label] < before.probabilities[before.label]


def test_an_explained_answer_has_the_probabilities_of_the_same_temperature(classifier):
    classifier.model.temperature = 3.0
    [plain] = predict(classifier, ["good"])
    explained = classifier.explain("good")
    assert explained.label == plain.label
    assert explained.probabilities == pytest.approx(plain.probabilities, abs=1e-6)


def test_two_probabilities_that_are_rounded_to_one_number_change_no_label(classifier):
    logits = torch.tensor([1.0, 1.0000001, -5.0])
    classifier.model = lambda batch: logits.expand(len(batch.cu_seqlens) - 1, 3)
    classifier.model.temperature = 20.0
    [answer] = predict(classifier, ["good"])
    assert len(set(answer.probabilities.values())) == 2
    assert answer.label == list(answer.probabilities)[1]


def test_a_model_that_was_only_pretrained_is_refused(base):
    with pytest.raises(UserError, match="is no classifier: fine-tune it first") as error:
        Classifier.load(str(base), FP32)
    assert "\n" not in str(error.value) and str(base) in str(error.value)


def cut_weights(directory):
    path = directory / "trained.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def of_tensors(change):
    def damage(directory):
        path = directory / "trained.safetensors"
        save_file(change(load_file(path)), path, {"format": "pt"})

    return damage


def of_json(change):
    return lambda directory: change_json(directory / "trained.json", change)


DAMAGES = {
    "no weights": (
        lambda d: (d / "trained.safetensors").unlink(),
        r"trained\.safetensors cannot be read",
    ),
    "weights cut at the end": (cut_weights, r"trained\.safetensors cannot be read"),
    "a tensor too many": (
        of_tensors(lambda tensors: tensors | {"pooler.dense.bias": torch.zeros(16)}),
        "does not fit its description",
    ),
    "a tensor too few": (of_tensors(without("classifier.bias")), "does not fit its description"),
    "broken JSON": (
        lambda d: (d / "trained.json").write_text("{"),
        r"trained\.json cannot be read",
    ),
    "no labels": (of_json(without("labels")), r"trained\.json is damaged.*labels"),
    "no base": (of_json(without("base")), r"trained\.json is damaged.*base"),
    "a base that is a word": (
        of_json(lambda raw: raw | {"base": "minilm"}),
        r"trained\.json is damaged",
    ),
    "a method of no name": (
        of_json(lambda raw: raw | {"method": "magic"}),
        r"trained\.json is damaged.*magic",
    ),
    "no pooling": (of_json(without("pooling")), r"trained\.json is damaged.*pooling"),
    "a pooling of no name": (of_json(lambda raw: raw | {"pooling": "magic"}), "damaged.*magic"),
    "labels in a word": (of_json(lambda raw: raw | {"labels": "ab"}), "damaged"),
    "a temperature of zero": (of_json(lambda raw: raw | {"temperature": 0}), "temperature 0"),
    "a temperature that is a word": (
        of_json(lambda raw: raw | {"temperature": "hot"}),
        "temperature 'hot'",
    ),
    "a temperature above all float32": (
        of_json(lambda raw: raw | {"temperature": 10**400}),
        "temperature 1000",
    ),
    "a head that the method does not train": (
        of_json(
            lambda raw: without("adapter_size")(raw) | {"method": "bitfit", "pooling": "layers"}
        ),
        "neither pretrained nor trained",
    ),
    "one label": (of_json(lambda raw: raw | {"labels": ["a"]}), "damaged"),
    "no labels at all": (of_json(lambda raw: raw | {"labels": []}), "damaged"),
    "the same label twice": (of_json(lambda raw: raw | {"labels": ["a", "b", "a"]}), "damaged"),
    "a label of no name": (of_json(lambda raw: raw | {"labels": ["a", "", "b"]}), "damaged"),
    "a label that is a number": (of_json(lambda raw: raw | {"labels": ["a", 1, "b"]}), "damaged"),
    "half a character": (of_json(lambda raw: raw | {"labels": ["a", "\ud800", "b"]}), "damaged"),
    "a million labels": (
        of_json(lambda raw: raw | {"labels": [str(i) for i in range(10**6)]}),
        "damaged",
    ),
    "a base with a zero byte": (
        of_json(lambda raw: raw | {"base": raw["base"] | {"path": "a\0b"}}),
        "damaged",
    ),
    "a base of no name": (
        of_json(lambda raw: raw | {"base": raw["base"] | {"path": ""}}),
        "damaged",
    ),
    "a base that is a number": (
        of_json(lambda raw: raw | {"base": raw["base"] | {"path": 7}}),
        "damaged",
    ),
    "a size of nothing": (of_json(lambda raw: raw | {"adapter_size": 0}), "damaged.*adapter_size"),
    "a huge size": (of_json(lambda raw: raw | {"adapter_size": 10**9}), "damaged.*adapter_size"),
    "a size with a fraction": (of_json(lambda raw: raw | {"adapter_size": 4.0}), "damaged"),
    "a size that is true": (of_json(lambda raw: raw | {"adapter_size": True}), "damaged"),
    "a size of a size": (of_json(lambda raw: raw | {"adapter_size": [4]}), "damaged"),
    "an option too many": (of_json(lambda raw: raw | {"depth": 4}), "damaged.*depth"),
    "a limit of nothing": (of_json(lambda raw: raw | {"max_len": 0}), r"trained\.json is damaged"),
    "a limit of more than the model has": (
        of_json(lambda raw: raw | {"max_len": CONFIG.max_position_embeddings + 1}),
        r"trained\.json is damaged",
    ),
    "a limit that is a word": (
        of_json(lambda raw: raw | {"max_len": "long"}),
        r"trained\.json is damaged",
    ),
    "a label too many": (
        of_json(lambda raw: raw | {"labels": [*raw["labels"], "newt"]}),
        r"classifier\.weight has shape \(3, 16\), trained\.json says \(4, 16\)",
    ),
    "another method": (
        of_json(lambda raw: raw | {"method": "feature"}),
        r"trained\.json is damaged",
    ),
    "a size with room for no memory": (
        of_json(lambda raw: raw | {"adapter_size": 10_000}),
        r"trained\.json says",
    ),
    "another size": (
        of_json(lambda raw: raw | {"adapter_size": 5}),
        r"down\.weight has shape \(4, 16\), trained\.json says \(5, 16\)",
    ),
    "no size": (of_json(without("adapter_size")), r"trained\.json is damaged.*adapter_size"),
}


@pytest.mark.parametrize("damage, message", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_run_is_refused_with_one_line(base, tmp_path, tokenizer, damage, message):
    save_run("adapter", base, tmp_path / "run", tokenizer)
    damage(tmp_path / "run")
    with pytest.raises(UserError, match=message) as error:
        Classifier.load(str(tmp_path / "run"), FP32)
    assert "\n" not in str(error.value) and str(tmp_path / "run") in str(error.value)


@pytest.mark.parametrize("method", ["full", "adapter", "feature"])
def test_weights_that_are_no_numbers_give_an_error_and_no_answer(base, tmp_path, tokenizer, method):
    save_run(method, base, tmp_path / "run", tokenizer)
    [path] = (tmp_path / "run").glob("*.safetensors")
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith("classifier.weight"))
    tensors[name][0, 0] = float("nan")
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(UserError, match="NaN or infinity"):
        predict(Classifier.load(str(tmp_path / "run"), FP32), TEXTS)


@pytest.mark.parametrize("max_len", ["long", 2, CONFIG.max_position_embeddings + 1])
def test_a_limit_that_a_whole_model_cannot_have_is_refused(base, tmp_path, tokenizer, max_len):
    save_run("full", base, tmp_path / "run", tokenizer)
    change_json(tmp_path / "run" / "settings.json", lambda raw: raw | {"max_len": max_len})
    with pytest.raises(UserError, match=r"settings\.json is damaged"):
        Classifier.load(str(tmp_path / "run"), FP32)


def test_what_was_saved_says_on_which_base(base, tmp_path, tokenizer):
    save_run("adapter", base, tmp_path / "run", tokenizer)
    trained = Trained.read(tmp_path / "run")
    assert trained.find_base(tmp_path / "run") == base
    (base / "model.safetensors").unlink()
    with pytest.raises(UserError, match="needs its base model.*model.safetensors"):
        trained.find_base(tmp_path / "run")
    shutil.rmtree(base)
    with pytest.raises(UserError, match=str(base)):
        trained.find_base(tmp_path / "run")
