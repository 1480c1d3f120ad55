"""A bag of words beside a network: the two numbers that join them, and what is saved."""

import itertools
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from minitune import bag_of_words
from minitune.bag_of_words import Bag, add_bag, ensemble_figures, fit_ensemble
from minitune.data import Reviews
from minitune.support.baselines import NBSVM
from minitune.support.errors import UserError

TEXTS = [
    "a good film",
    "not bad at all",
    "what a good story",
    "a bad film",
    "not good",
    "bad , bad",
]
LABELS = np.array([1, 1, 1, 0, 0, 0])
NEW = ["a good story", "bad at what ?", "not good", "", "xyzzy", "A GOOD<br />film not bad"]


def voters(seed: int, rows: int = 80, labels: int = 3) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Two that know something of the labels, one more than the other."""
    generator = torch.Generator().manual_seed(seed)
    truth = torch.randint(labels, (rows,), generator=generator)
    signal = F.one_hot(truth, labels).double()
    noise = [torch.randn(rows, labels, generator=generator).double() for _ in range(2)]
    return [signal + noise[0], 3 * signal + 2 * noise[1]], truth


def penalised_loss(weights: list[float], logits: list[torch.Tensor], labels: torch.Tensor) -> float:
    together = sum(w * each for w, each in zip(weights, logits, strict=True))
    right = together.log_softmax(-1)[torch.arange(len(labels)), labels]
    return -right.sum().item() + sum((w - 1) ** 2 for w in weights) / 2


@pytest.mark.parametrize("seed", range(3))
def test_both_numbers_are_where_the_loss_is_smallest(seed):
    logits, labels = voters(seed)
    found = fit_ensemble(logits, labels)
    lowest = penalised_loss(found, logits, labels)
    for a, b in itertools.product((-0.01, 0, 0.01), repeat=2):
        if a or b:
            assert penalised_loss([found[0] + a, found[1] + b], logits, labels) > lowest


def test_one_that_guesses_counts_for_nothing_and_one_that_shouts_for_less():
    [good, _], labels = voters(0, rows=4000)
    noise = torch.randn(good.shape, generator=torch.Generator().manual_seed(9)).double()
    guesses = fit_ensemble([good, noise], labels)
    assert abs(guesses[1]) < 0.1 < guesses[0]
    assert fit_ensemble([good, 10 * noise], labels)[0] == pytest.approx(guesses[0], abs=0.01)
    assert fit_ensemble([10 * good], labels)[0] == pytest.approx(guesses[0] / 10, abs=0.01)


def test_few_rows_that_are_all_right_do_not_make_it_certain():
    logits = torch.tensor([[2.0, -2.0], [-2.0, 2.0]])
    for weight in fit_ensemble([logits, 10 * logits], torch.tensor([0, 1])):
        assert 0 < weight < 2


@pytest.mark.parametrize("num_labels", [2, 4])
def test_ngrams_give_the_scores_of_the_whole(num_labels):
    labels = LABELS if num_labels == 2 else np.array([1, 3, 2, 0, 1, 0])
    whole = NBSVM().fit(TEXTS, labels, num_labels)
    ngrams = json.loads(json.dumps(whole.ngrams(1000)))
    assert len(ngrams) == len(whole.features) + 1 and "not bad" in ngrams and "at" in ngrams
    assert len(ngrams["not bad"]) == (1 if num_labels == 2 else num_labels)
    again = NBSVM.from_ngrams(ngrams)
    np.testing.assert_allclose(again.scores(NEW), whole.scores(NEW), atol=0.01)
    assert again.scores(NEW).std() > 0.05
    assert again.scores([]).shape == (0, num_labels)


def test_the_largest_weights_are_kept():
    whole = NBSVM().fit(TEXTS, LABELS, 2)
    few, every = whole.ngrams(5), whole.ngrams(1000)
    assert len(few) == 6 and few.items() <= every.items()
    least = min(abs(w) for name, [w] in few.items() if name)
    assert all(abs(w) <= least for name, [w] in every.items() if name not in few)
    # A word that stands only in a pair is known, and scores nothing by itself.
    model = NBSVM.from_ngrams({"": [0.25], "not bad": [1.0], "film": [0.5]})
    scores = model.scores(["not bad", "bad", "not", "bad not", "a film", "not bad film"])
    assert scores[:, 1].tolist() == [1.25, 0.25, 0.25, 0.25, 0.75, 1.75]
    assert (scores[:, 0] == -scores[:, 1]).all()


def test_longer_ngrams_are_read_back():
    whole = NBSVM(longest=3).fit(TEXTS, LABELS, 2)
    ngrams = whole.ngrams(1000)
    assert "a good film" in ngrams and "a good film not" not in ngrams
    again = NBSVM.from_ngrams(ngrams)
    np.testing.assert_allclose(again.scores(NEW), whole.scores(NEW), atol=0.01)


def test_a_saved_bag_answers_as_before(tmp_path):
    bag = Bag(NBSVM.from_ngrams(NBSVM().fit(TEXTS, LABELS, 2).ngrams(1000)))
    logits = torch.randn(len(TEXTS), 2, generator=torch.Generator().manual_seed(0))
    bag.fit(logits, TEXTS, torch.from_numpy(LABELS))
    assert bag.network != 1 != bag.bag
    expected = bag.network * logits + bag.bag * torch.from_numpy(bag.model.scores(TEXTS))
    assert torch.allclose(bag.together(logits, TEXTS).double(), expected, atol=1e-5)
    figures = {"method": "full + bag", "accuracy": 0.5, "train_examples": 6, "seed": 0}
    bag.save(tmp_path, figures)
    again = Bag.load(tmp_path, 2)
    assert torch.equal(again.together(logits, TEXTS), bag.together(logits, TEXTS))
    assert ensemble_figures(tmp_path) == [figures]
    assert Bag.load(tmp_path / "elsewhere", 2) is None
    assert ensemble_figures(tmp_path / "elsewhere") == []


def test_with_many_labels_the_file_stays_small_enough_to_be_read(tmp_path, monkeypatch):
    monkeypatch.setattr(bag_of_words, "WEIGHTS", 40)
    labels = np.array([1, 3, 2, 0, 1, 0])
    logits, rows = torch.zeros(6, 4).tolist(), labels.tolist()
    answers = {split: {"logits": logits, "labels": rows} for split in ("validation", "test")}
    (tmp_path / "answers.json").write_text(json.dumps(answers))
    metrics = {"method": "full", "train_examples": 6, "seed": 0}
    (tmp_path / "metrics.json").write_text(json.dumps(metrics))
    texts = {"validation": TEXTS, "test": TEXTS}
    reviews = Reviews(
        dict(enumerate("abcd")), texts, dict.fromkeys(texts, torch.from_numpy(labels))
    )
    add_bag(tmp_path, NBSVM().fit(TEXTS, labels, 4), reviews, None, 0)
    ngrams = json.loads((tmp_path / "bag.json").read_text())["ngrams"]
    assert len(ngrams) == 40 // 4 + 1
    assert ensemble_figures(tmp_path)[0]["accuracy"] > 0.5  # the network knows nothing


GOOD = {"network": 1.0, "bag": 1.0, "figures": {}, "ngrams": {"": [0.0], "a": [1.0]}}
DAMAGED = {
    "no JSON": "{",
    "nothing": {},
    "no weight": GOOD | {"bag": None},
    "not finite": GOOD | {"network": math.inf},
    "a word for a weight": GOOD | {"ngrams": {"": [0.0], "a": ["one"]}},
    "no bias": GOOD | {"ngrams": {"a": [1.0]}},
    "weights of another number of labels": GOOD | {"ngrams": {"": [0, 0, 0], "a": [0, 0, 0]}},
    "uneven": GOOD | {"ngrams": {"": [0.0], "a": [0.0, 1.0]}},
    "a list": GOOD | {"ngrams": ["a"]},
    "an n-gram as long as a review": GOOD | {"ngrams": {"": [0.0], " ".join("abcdefgh" * 20): [1]}},
    "NaN": GOOD | {"ngrams": {"": [math.nan], "a": [1.0]}},
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED.keys())
def test_a_damaged_file_is_refused_with_one_line(tmp_path, content):
    content = content if isinstance(content, str) else json.dumps(content)
    (tmp_path / "bag.json").write_text(content)
    for read in (lambda: Bag.load(tmp_path, 2), lambda: ensemble_figures(tmp_path)):
        with pytest.raises(UserError, match="bag.json") as error:
            read()
        assert "\n" not in str(error.value)
