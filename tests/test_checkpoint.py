"""Directories: the names of `transformers`, every form a BERT comes in, and errors of one line."""

import json
import math
import os
import shutil
from dataclasses import asdict, replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from minitune.checkpoint import (
    load_bert,
    load_classifier,
    load_masked_lm,
    save_model,
    to_bert,
)
from minitune.model import BertConfig, BertForMaskedLM, BertForSequenceClassification
from minitune.support.config_file import read_config_file
from minitune.support.errors import UserError
from minitune.support.model_names import find_model
from minitune.tokenizer import Tokenizer

CONFIG = BertConfig(
    vocab_size=40,
    hidden_size=8,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=20,
    max_position_embeddings=16,
)
# What BertForMaskedLM(config).save_pretrained of transformers 4.57.6 writes for that configuration.
SAVED_BY_TRANSFORMERS = {
    "bert.embeddings.LayerNorm.bias": (8,),
    "bert.embeddings.LayerNorm.weight": (8,),
    "bert.embeddings.position_embeddings.weight": (16, 8),
    "bert.embeddings.token_type_embeddings.weight": (2, 8),
    "bert.embeddings.word_embeddings.weight": (40, 8),
    "bert.encoder.layer.0.attention.output.LayerNorm.bias": (8,),
    "bert.encoder.layer.0.attention.output.LayerNorm.weight": (8,),
    "bert.encoder.layer.0.attention.output.dense.bias": (8,),
    "bert.encoder.layer.0.attention.output.dense.weight": (8, 8),
    "bert.encoder.layer.0.attention.self.key.bias": (8,),
    "bert.encoder.layer.0.attention.self.key.weight": (8, 8),
    "bert.encoder.layer.0.attention.self.query.bias": (8,),
    "bert.encoder.layer.0.attention.self.query.weight": (8, 8),
    "bert.encoder.layer.0.attention.self.value.bias": (8,),
    "bert.encoder.layer.0.attention.self.value.weight": (8, 8),
    "bert.encoder.layer.0.intermediate.dense.bias": (20,),
    "bert.encoder.layer.0.intermediate.dense.weight": (20, 8),
    "bert.encoder.layer.0.output.LayerNorm.bias": (8,),
    "bert.encoder.layer.0.output.LayerNorm.weight": (8,),
    "bert.encoder.layer.0.output.dense.bias": (8,),
    "bert.encoder.layer.0.output.dense.weight": (8, 20),
    "cls.predictions.bias": (40,),
    "cls.predictions.transform.LayerNorm.bias": (8,),
    "cls.predictions.transform.LayerNorm.weight": (8,),
    "cls.predictions.transform.dense.bias": (8,),
    "cls.predictions.transform.dense.weight": (8, 8),
}
SELF = "bert.encoder.layer.0.attention.self"
TEXTS = [
    "An awful, awful film!",
    "Two hours of pure joy.",
    "Was that Zoë's café?",
    "[MASK] is text",
]


def random_model():
    """A model in which no two tensors are alike."""
    model = BertForMaskedLM(CONFIG)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, generator=generator)
    return model


@pytest.fixture
def model():
    return random_model()


@pytest.fixture
def tokenizer():
    return Tokenizer.train(TEXTS, vocab_size=CONFIG.vocab_size)


@pytest.fixture
def directory(model, tokenizer, tmp_path):
    path = tmp_path / "model"
    path.mkdir()
    save_model(model, tokenizer, path)
    return path


def change_weights(directory, change):
    """Rewrite model.safetensors with change(tensors)."""
    path = directory / "model.safetensors"
    save_file(change(load_file(path)), path)


def change_config(directory, **values):
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def assert_same_tensors(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


# Written and read


def test_a_saved_model_is_the_model(model, directory):
    loaded, has_head = load_masked_lm(directory)
    assert has_head
    assert loaded.config == CONFIG
    assert_same_tensors(loaded.state_dict(), model.state_dict())


def test_files_names_and_shapes_are_those_of_transformers(directory):
    assert {path.name for path in directory.iterdir()} >= {
        "config.json", "model.safetensors", "tokenizer.json", "vocab.txt"
    }  # fmt: skip
    tensors = load_file(directory / "model.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == SAVED_BY_TRANSFORMERS
    config = json.loads((directory / "config.json").read_text())
    assert config["architectures"] == ["BertForMaskedLM"] and config["model_type"] == "bert"


def test_each_name_means_what_it_says(model):
    """A map wrong both ways would survive a round trip; the whole of it is held to real weights elsewhere."""
    tensors, layer = to_bert(model.state_dict()), model.bert.layers[0]
    fused = torch.cat([tensors[f"{SELF}.{part}.weight"] for part in ("query", "key", "value")])
    assert torch.equal(fused, layer.attention.qkv.weight)
    attention = "bert.encoder.layer.0.attention.output"
    assert torch.equal(tensors[f"{attention}.dense.weight"], layer.attention.out.weight)
    assert torch.equal(tensors[f"{attention}.LayerNorm.bias"], layer.attention_norm.bias)
    assert torch.equal(
        tensors["bert.encoder.layer.0.output.LayerNorm.bias"], layer.feed_forward_norm.bias
    )
    assert torch.equal(tensors["cls.predictions.transform.dense.weight"], model.head.dense.weight)


def test_label_names_survive(model, tokenizer, directory):
    model.config.id2label = {0: "negative", 1: "positive"}
    save_model(model, tokenizer, directory)
    loaded, _ = load_masked_lm(directory)
    assert loaded.config.id2label == {0: "negative", 1: "positive"}


def test_tensorflow_names_of_layer_norm_load(model, directory):
    renamed = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}

    def as_of_old(tensors):
        for new, old in renamed.items():
            tensors = {name.replace(new, old): tensor for name, tensor in tensors.items()}
        return tensors

    change_weights(directory, as_of_old)
    assert "bert.embeddings.LayerNorm.gamma" in load_file(directory / "model.safetensors")
    assert_same_tensors(load_masked_lm(directory)[0].state_dict(), model.state_dict())


def test_bare_bert_model_loads_with_a_new_head(model, directory):
    change_weights(
        directory,
        lambda tensors: (
            {
                name.removeprefix("bert."): tensor
                for name, tensor in tensors.items()
                if name.startswith("bert.")
            }
            | {
                "pooler.dense.weight": torch.zeros(8, 8),
                "embeddings.position_ids": torch.arange(16)[None],
            }
        ),
    )
    loaded, has_head = load_masked_lm(directory)
    assert not has_head
    assert_same_tensors(loaded.bert.state_dict(), model.bert.state_dict())
    assert loaded.head.bias.eq(0).all() and loaded.head.norm.weight.eq(1).all()


def test_half_precision_weights_load_as_float32(model, directory):
    change_weights(
        directory, lambda tensors: {name: tensor.half() for name, tensor in tensors.items()}
    )
    loaded, _ = load_masked_lm(directory)
    halved = {name: tensor.half().float() for name, tensor in model.state_dict().items()}
    assert_same_tensors(loaded.state_dict(), halved)


def test_load_bert_says_what_was_missing(model, directory):
    change_weights(
        directory,
        lambda tensors: {name: t for name, t in tensors.items() if not name.startswith("cls.")},
    )
    missing = load_bert(model, directory, optional=("head.",))
    assert sorted(missing) == [
        "head.bias", "head.dense.bias", "head.dense.weight", "head.norm.bias", "head.norm.weight"
    ]  # fmt: skip


def test_what_a_config_leaves_out_is_as_in_the_original_bert(directory):
    (directory / "config.json").write_text('{"model_type": "bert"}')
    config = BertConfig(**read_config_file(directory / "config.json", asdict(BertConfig())))
    assert (config.vocab_size, config.hidden_size, config.intermediate_size) == (30522, 768, 3072)
    assert (config.num_hidden_layers, config.num_attention_heads) == (12, 12)
    assert (config.max_position_embeddings, config.type_vocab_size) == (512, 2)
    assert (config.layer_norm_eps, config.hidden_dropout_prob) == (1e-12, 0.1)


# What is refused


def remove(name):
    return lambda directory: (directory / name).unlink()


def with_config(**values):
    return lambda directory: change_config(directory, **values)


def without_tensor(name):
    return lambda directory: change_weights(
        directory, lambda t: {k: v for k, v in t.items() if k != name}
    )


def with_shape(name, *shape):
    return lambda directory: change_weights(directory, lambda t: t | {name: torch.zeros(shape)})


def with_number(name, value):
    return lambda directory: change_weights(
        directory, lambda t: t | {name: t[name].index_fill(0, torch.tensor(3), value)}
    )


def cut_weights(size):
    def cut(directory):
        path = directory / "model.safetensors"
        path.write_bytes(path.read_bytes()[:size])

    return cut


REFUSED = {
    "no config.json": (remove("config.json"), "no config.json"),
    "broken config.json": (
        lambda d: (d / "config.json").write_text("{"),
        "config.json cannot be read",
    ),
    "another model": (with_config(model_type="roberta"), "roberta"),
    "another activation": (with_config(hidden_act="relu"), "hidden_act is .relu"),
    "relative positions": (with_config(position_embedding_type="relative_key"), "relative_key"),
    "a decoder": (with_config(is_decoder=True), "is_decoder"),
    "an untied decoder": (with_config(tie_word_embeddings=False), "tie_word_embeddings"),
    "a size that is text": (with_config(hidden_size="8"), "hidden_size"),
    "a size with a fraction": (with_config(hidden_size=8.5), "hidden_size"),
    "a size of nothing": (with_config(num_attention_heads=0), "num_attention_heads"),
    "heads that do not fit": (with_config(num_attention_heads=3), "num_attention_heads"),
    "labels in a list": (with_config(id2label=["bad", "good"]), "id2label"),
    "no weights": (remove("model.safetensors"), "no such file"),
    "pickle only": (
        lambda d: (d / "model.safetensors").rename(d / "pytorch_model.bin"),
        r"pytorch_model\.bin, which is never read",
    ),
    "empty weights": (cut_weights(0), "cannot be read"),
    "weights cut in the header": (cut_weights(100), "cannot be read"),
    "weights cut at the end": (cut_weights(-1), "cannot be read"),
    "weights that are none": (
        lambda d: (d / "model.safetensors").write_bytes(b"<!DOCTYPE html> not found"),
        "cannot be read",
    ),
    "a missing tensor": (
        without_tensor("bert.embeddings.word_embeddings.weight"),
        "word_embeddings.weight",
    ),
    "a missing third of a fused one": (without_tensor(f"{SELF}.key.bias"), r"self\.key\.bias"),
    "half a head": (without_tensor("cls.predictions.bias"), r"cls\.predictions\.bias"),
    "a layer too few": (with_config(num_hidden_layers=2), r"layer\.1\."),
    "a wrong size": (with_config(vocab_size=41), r"\(40, 8\).*\(41, 8\)"),
    "a wrong key": (
        with_shape(f"{SELF}.key.weight", 8, 9),
        r"self\.key\.weight has shape \(8, 9\)",
    ),
    "rows moved from key to query": (
        lambda d: [
            with_shape(f"{SELF}.{part}.bias", n)(d) for part, n in (("query", 9), ("key", 7))
        ],
        r"self\.query\.bias has shape \(9,\)",
    ),
    "a scalar": (with_shape("cls.predictions.bias"), r"cls\.predictions\.bias has shape \(\)"),
    "whole numbers": (
        lambda d: change_weights(d, lambda t: t | {f"{SELF}.key.bias": torch.zeros(8).long()}),
        r"self\.key\.bias has type I64",
    ),
    "NaN in an encoder": (with_number(f"{SELF}.key.bias", math.nan), r"key\.bias holds NaN"),
    "infinity in a head": (
        with_number("cls.predictions.bias", -math.inf),
        r"bias holds NaN or inf",
    ),
    "a header of 5 MB": (
        lambda d: (d / "model.safetensors").write_bytes((5 << 20).to_bytes(8, "little") + b"{}"),
        "header has more than",
    ),
    "a header longer than the file": (
        lambda d: (d / "model.safetensors").write_bytes((1 << 20).to_bytes(8, "little") + b"{}"),
        "cannot be read",
    ),
    "a long end of zeros": (
        lambda d: os.truncate(d / "model.safetensors", 1 << 40),
        "cannot be read",
    ),
    "labels with half a character": (
        with_config(id2label={"0": "good \ud83d", "1": "bad"}),
        "id2label is not an object of names",
    ),
    "deep JSON": (
        lambda d: (d / "config.json").write_text('{"id2label": ' + "[" * 100_000),
        "config.json cannot be read",
    ),
    "a config.json without end": (
        lambda d: os.truncate(d / "config.json", 1 << 40),
        "more than 16,777,216 bytes",
    ),
}
TOO_LARGE = {
    "vocab_size": (36_000_000, r"word_embeddings\.weight has shape \(40, 8\).*\(36000000, 8\)"),
    "max_position_embeddings": (2**31, r"position_embeddings\.weight has shape \(16, 8\)"),
    "type_vocab_size": (10**9, r"token_type_embeddings\.weight has shape \(2, 8\)"),
    "hidden_size": (2**63, r"word_embeddings\.weight has shape \(40, 8\)"),
    "intermediate_size": (10**400, r"intermediate\.dense\.weight has shape \(20, 8\)"),
    "num_hidden_layers": (10**9, r"layer\.1\.attention\.output\.dense\.weight is missing"),
    "num_attention_heads": (2**31, "hidden_size is no multiple of num_attention_heads"),
}


@pytest.mark.parametrize("key", TOO_LARGE)
def test_a_size_that_the_weights_do_not_have_is_refused_before_a_model_is_built(
    directory, monkeypatch, key
):
    value, message = TOO_LARGE[key]
    change_config(directory, **{key: value})
    monkeypatch.setattr("minitune.checkpoint.BertForMaskedLM", lambda *_: pytest.fail("was built"))
    with pytest.raises(UserError, match=message):
        load_masked_lm(directory)


@pytest.mark.parametrize("damage, message", REFUSED.values(), ids=REFUSED.keys())
def test_refused_with_one_line_that_says_why(directory, damage, message):
    damage(directory)
    with pytest.raises(UserError, match=message) as error:
        load_masked_lm(directory)
    assert "\n" not in str(error.value)
    assert str(directory) in str(error.value)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"problem_type": "multi_label_classification"}, "multi_label_classification"),
        ({"problem_type": "regression"}, "regression"),
        ({"pooling": "magic"}, "magic"),
        ({"pooling": ["cls"]}, "cls"),
    ],
)
def test_a_classifier_that_answers_in_another_way_is_refused(tokenizer, tmp_path, values, message):
    labels = replace(CONFIG, id2label={0: "a", 1: "b"})
    save_model(BertForSequenceClassification(labels), tokenizer, tmp_path)
    assert load_classifier(tmp_path).config.id2label == labels.id2label
    change_config(tmp_path, problem_type="single_label_classification")
    load_classifier(tmp_path)
    change_config(tmp_path, **values)
    with pytest.raises(UserError, match=message) as error:
        load_classifier(tmp_path)
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


@pytest.mark.parametrize(
    "labels, message",
    [
        ({0: "same", 1: "same"}, "two labels of id2label have the same name"),
        ({0: "good", 1: ""}, "or one has none"),
        ({0: "good", 2: "bad"}, "two labels or more"),
        ({0: "good"}, "two labels or more"),
    ],
)
def test_labels_that_cannot_be_told_apart_are_refused(tokenizer, tmp_path, labels, message):
    model = BertForSequenceClassification(replace(CONFIG, id2label=labels))
    save_model(model, tokenizer, tmp_path)
    with pytest.raises(UserError, match=message):
        load_classifier(tmp_path)


@pytest.mark.parametrize("name", ["/no/such/model", "./model", "runs/a/b", "two words"])
def test_a_name_that_is_no_model_is_refused_without_asking_the_hub(name):
    with pytest.raises(UserError, match=name):
        find_model(name)


def test_a_file_is_no_model(directory):
    with pytest.raises(UserError, match="no model directory"):
        find_model(str(directory / "config.json"))


def test_an_empty_directory_is_no_model(directory):
    shutil.rmtree(directory)
    directory.mkdir()
    with pytest.raises(UserError, match="no config.json"):
        load_masked_lm(find_model(str(directory)))
    with pytest.raises(UserError, match="no tokenizer.json"):
        Tokenizer.load(directory)
