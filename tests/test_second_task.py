"""Masked words as a second task of fine-tuning: its batches, its loss, its wiring."""

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from minitune import methods
from minitune.checkpoint import load_masked_lm, save_model
from minitune.classification import Classification, Examples, TokenizedTexts
from minitune.model import BertConfig, BertForMaskedLM
from minitune.optimizer import Optimizer
from minitune.second_task import RATE, ClassificationAndMaskedWords, head_of
from minitune.support.runs import Run
from minitune.support.runtime import Runtime
from minitune.tokenizer import Tokenizer
from minitune.training import Trainer
from tests.test_finetune import assert_refused, metrics, options, succeed, weights
from tests.test_finetune import folder as folder  # a fixture

CPU = Runtime.start("cpu", "fp32")
WEIGHT = 0.7


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A masked language model without dropout, and 60 texts of words that it knows."""
    directory, rng = tmp_path_factory.mktemp("base"), np.random.default_rng(0)
    words = [f"{a}{b}" for a in "bcdfg" for b in ("an", "et", "im", "op", "ul")]
    texts = [" ".join(rng.choice(words, rng.integers(3, 30))) for _ in range(60)]
    tokenizer = Tokenizer.train(texts, 60)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 64, "max_position_embeddings": 64, "hidden_dropout_prob": 0.0}
    config = BertConfig(vocab_size=tokenizer.vocab_size, **sizes)
    save_model(BertForMaskedLM(config), tokenizer, directory)
    labels = torch.from_numpy(rng.integers(0, 2, 60))
    return directory, tokenizer, Examples(TokenizedTexts(texts, tokenizer, 32), labels)


def task_for(base, weight=WEIGHT, train=None, seed=0, **more):
    directory, tokenizer, examples = base
    options = {"batch_tokens": 200, "epochs": 3, "seed": seed} | more
    second = {"tokenizer": tokenizer, "head": head_of(directory), "weight": weight}
    return ClassificationAndMaskedWords(train or examples, examples, **second, **options)


def model_of(base, method="full"):
    torch.manual_seed(1)
    how = {"adapter_size": 8} if method == "adapter" else {}
    return methods.build(method, base[0], {0: "a", 1: "b"}, "reference", **how).train()


def test_a_batch_has_masked_tokens_the_words_below_them_and_the_labels_of_classification(base):
    plain = Classification(base[2], base[2], batch_tokens=200, epochs=3, seed=0)
    task, masked, count = task_for(base), 0, 0
    pairs = zip(plain.batches(0), task.batches(0), strict=False)
    for step, (examples, batch) in enumerate(itertools.islice(pairs, task.steps)):
        packed, tokens = examples.inputs.pack(), batch.masked.batch.tokens
        assert torch.equal(batch.labels, examples.labels) and len(batch) == len(examples)
        assert batch.tokens == examples.tokens
        # Only chosen tokens differ, and their words are those of the text.
        restored = tokens.scatter(0, batch.masked.positions, batch.masked.labels)
        assert torch.equal(restored, packed.tokens)
        assert torch.equal(batch.masked.batch.cu_seqlens, packed.cu_seqlens)
        masked += len(batch.masked)
        count += batch.tokens - 2 * len(batch)  # without [CLS] and [SEP]
        # The factor makes a mean over texts of a mean over words, and falls to zero.
        mean = batch.factor * len(batch.masked) / len(batch)
        assert mean == pytest.approx(WEIGHT * (1 - step / task.steps))
    assert masked / count == pytest.approx(RATE, abs=0.02)


def test_a_step_has_the_same_batch_wherever_a_run_began_and_another_one_in_another_epoch(base):
    task = task_for(base)
    seven, later = list(itertools.islice(task.batches(0), 7)), next(task.batches(6))
    assert torch.equal(seven[6].masked.batch.tokens, later.masked.batch.tokens)
    assert torch.equal(seven[6].masked.positions, later.masked.positions)
    assert seven[6].factor == later.factor
    several = task_for(base, batch_tokens=10**4)  # all rows in each step
    a, b = (batch.masked.positions.tolist() for batch in itertools.islice(several.batches(0), 2))
    assert a != b


@pytest.mark.parametrize("method", ["full", "adapter"])  # they read [CLS], and all tokens
@pytest.mark.parametrize("parts", [1, 3])
def test_the_gradient_is_that_of_both_losses_written_down_plainly(base, method, parts):
    task, model = task_for(base), model_of(base, method)
    batch = next(task.batches(4))
    reported = 0.0
    for part in batch.split(parts):
        minimised, shown = task.loss(model, *part.to(torch.device("cpu")))
        (minimised / len(batch)).backward()
        reported += shown.item() / len(batch)
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    model.zero_grad()
    packed, words = batch.masked.batch, batch.masked.labels
    labels_loss = F.cross_entropy(model(packed), batch.labels)
    head, embeddings = load_masked_lm(base[0])[0].head, model.bert.embeddings.word.weight
    hidden = model.bert(packed)[batch.masked.positions]
    x = head.norm(F.gelu(head.dense(hidden)))
    words_loss = F.cross_entropy(x @ embeddings.T + head.bias, words)
    (labels_loss + WEIGHT * (1 - 4 / task.steps) * words_loss).backward()
    for name, p in model.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(found[name], p.grad, atol=2e-6, rtol=1e-4)
    assert reported == pytest.approx(labels_loss.item(), abs=1e-5)
    assert not any(p.grad is not None for p in task.head.parameters())


def test_soft_labels_and_class_weights_count_as_without_it(base):
    _, _, examples = base
    probabilities = F.one_hot(examples.labels, 2).float() * 0.8 + 0.1
    soft = replace(examples, labels=probabilities)
    for more in ({"class_weights": "balanced"}, {"train": soft}):
        task, model = task_for(base, **more), model_of(base)
        batch = next(task.batches(0))
        inputs, labels = batch.to(torch.device("cpu"))
        both, shown = task.loss(model, inputs, labels)
        logits = model(batch.masked.batch).float()
        assert shown.item() == pytest.approx(task.compare(logits, labels)[1].item(), rel=1e-5)
        hidden = model.bert.at(batch.masked.batch, batch.masked.positions)
        guesses = task.head(hidden, model.bert.embeddings.word.weight)
        second = F.cross_entropy(guesses, batch.masked.labels, reduction="sum")
        expected = task.compare(logits, labels)[0] + batch.factor * second
        assert both.item() == pytest.approx(expected.item(), rel=1e-5)


def trainer_for(base, directory, accumulate=1):
    model, task = model_of(base), task_for(base)
    directory.mkdir(exist_ok=True)
    optimizer, run = Optimizer(model, "adamw", 1e-3, 1e-3, 0.01), Run(directory)
    run.start({})
    trainer = Trainer(model, optimizer, task, run, CPU, seed=0, accumulate=accumulate)
    trainer.steps = task.steps
    return trainer


def trained(trainer) -> list[torch.Tensor]:
    return [p.detach().clone() for p in nn.ParameterList(trainer.model.parameters())]


def test_a_resumed_run_ends_with_the_same_bits_and_parts_of_a_batch_add_up(base, tmp_path):
    whole = trainer_for(base, tmp_path / "whole")
    whole.train()
    first = trainer_for(base, tmp_path / "part")
    first.observe = lambda: first.signals.append(2) or {}  # Ctrl-C at the first evaluation
    with pytest.raises(KeyboardInterrupt):
        first.train()
    assert 0 < first.step < first.steps
    again = trainer_for(base, tmp_path / "part")
    again.restore(again.run.load())
    again.train()
    assert all(map(torch.equal, trained(whole), trained(again)))
    parts = trainer_for(base, tmp_path / "parts", accumulate=3)
    parts.train()
    for p, q in zip(trained(whole), trained(parts), strict=True):
        torch.testing.assert_close(p, q, atol=1e-4, rtol=1e-3)


# From end to end


def test_the_option_changes_what_is_trained_and_not_scratch(folder, tmp_path):
    words = ["--method", "full", "adapter", "--epochs", "1"]
    for name, more in (("without", []), ("with", ["--masked-words", "0.5"])):
        succeed(*options(folder, tmp_path / name, *words, *more))
    for method in ("full", "adapter", "scratch"):
        pairs = (weights(tmp_path / name / method) for name in ("without", "with"))
        a, b = (dict(tensors) for tensors in pairs)
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a) == (method == "scratch")
    settings = json.loads((tmp_path / "with" / "full" / "settings.json").read_text())
    assert settings["masked_words"] == 0.5
    assert metrics(tmp_path / "with" / "full")["masked_words"] == 0.5
    assert metrics(tmp_path / "with" / "scratch")["masked_words"] == 0
    page = (tmp_path / "with" / "full" / "report.html").read_text()
    assert "masked words, at first with a weight of 0.5" in page
    assert "masked words" not in (tmp_path / "without" / "full" / "report.html").read_text()
    # What is saved is a classifier like any other.
    answer = succeed("--model", tmp_path / "with" / "full", "--predict", "A superb film.")
    assert "works" in answer.out or "falls flat" in answer.out


def test_it_goes_with_a_soup_and_with_unlabelled_rows(folder, tmp_path):
    words = ["--epochs", "1", "--masked-words", "0.5", "--words", "works=the", "falls flat, alas=a"]
    succeed(*options(folder, tmp_path / "a", "--method", "full", "--soup", "2", *words))
    words += ["--unlabelled", "--train-examples", "16"]
    succeed(*options(folder, tmp_path / "b", "--method", "lora", *words))
    assert metrics(tmp_path / "b" / "lora")["masked_words"] == 0.5


@pytest.mark.parametrize("method", ["feature", "prompt", "scratch"])
def test_methods_that_cannot_have_it_are_refused(folder, tmp_path, method):
    words = options(folder, tmp_path / "out", "--method", method, "--masked-words", "0.5")
    assert_refused(*words, naming=f"--masked-words does not go with --method {method}")
    assert not (tmp_path / "out").exists()


def test_a_base_without_a_head_is_refused(folder, tmp_path):
    model = methods.build("full", folder / "base", {0: "a", 1: "b"}, "reference")
    (tmp_path / "classifier").mkdir()
    save_model(model, Tokenizer.load(folder / "base"), tmp_path / "classifier")
    words = options(folder, tmp_path / "out", "--method", "full", "--masked-words", "0.5")
    assert_refused(*words, "--model", tmp_path / "classifier", naming="has no masked-LM head")
