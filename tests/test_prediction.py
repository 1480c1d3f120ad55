"""New texts: answers in their order whatever the batching, under the names the model was trained with."""

import itertools
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from minitune import prediction
from minitune.checkpoint import Trained, save_model, weights_hash
from minitune.classification import Sequences
from minitune.features import FeatureClassifier
from minitune.finetuning import build
from minitune.model import BertConfig, BertForSequenceClassification
from minitune.prediction import Classifier
from minitune.support.errors import UserError
from minitune.support.runtime import Runtime

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
    head, sequences = head_of(model.eval()), Sequences(TEXTS, tokenizer, 16)
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
    return list(classifier.predict(texts, batch_tokens))


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


@pytest.mark.parametrize("block", [1, 3, 5, 10])
def test_order_holds_over_blocks(classifier, monkeypatch, block):
    expected = predict(classifier, TEXTS)
    monkeypatch.setattr(prediction, "BLOCK", block)
    assert_alike(predict(classifier, iter(TEXTS)), expected)


def test_texts_are_read_as_answers_are_asked_for(classifier, monkeypatch):
    monkeypatch.setattr(prediction, "BLOCK", 3)
    texts = iter(TEXTS)
    answers = classifier.predict(texts, 64)
    assert next(answers).text == TEXTS[0]
    assert next(texts) == TEXTS[3]


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
        sequences = Sequences([text], classifier.tokenizer, 16)
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


def test_a_model_that_was_only_pretrained_is_refused(base):
    with pytest.raises(UserError, match="is no classifier: fine-tune it first") as error:
        Classifier.load(str(base), FP32)
    assert "\n" not in str(error.value) and str(base) in str(error.value)


def cut_weights(directory):
    path = directory / "trained.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def of_json(change):
    return lambda directory: change_json(directory / "trained.json", change)


DAMAGES = {
    "no weights": (
        lambda d: (d / "trained.safetensors").unlink(),
        r"trained\.safetensors cannot be read",
    ),
    "weights cut at the end": (cut_weights, r"trained\.safetensors cannot be read"),
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
        "does not fit its description",
    ),
    "another method": (
        of_json(lambda raw: raw | {"method": "feature"}),
        r"trained\.json is damaged",
    ),
    "a size with room for no memory": (
        of_json(lambda raw: raw | {"adapter_size": 10_000}),
        "does not fit its description",
    ),
    "another size": (
        of_json(lambda raw: raw | {"adapter_size": 5}),
        "does not fit its description",
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
    with pytest.raises(UserError, match="no numbers"):
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
