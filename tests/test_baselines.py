"""Baselines: NB-SVM against dense and hand-made numbers, odd texts, and figures of test rows."""

import numpy as np
import pytest

from minitune.data import Dataset, Reviews
from minitune.support import baselines
from minitune.support.baselines import (
    NBSVM,
    Matrix,
    evaluate_baselines,
    log_count_ratio,
    majority,
    train_svm,
)

pytestmark = pytest.mark.filterwarnings("error")  # no division by zero behind the scenes

GOOD = ["a good film", "good acting , good story", "what a good story", "good !"]
BAD = ["a bad film", "bad acting , bad story", "what a bad story", "bad !"]
TEXTS, LABELS = GOOD + BAD, np.array([1] * 4 + [0] * 4)


def sparse(dense):
    rows, columns = dense.nonzero()
    return Matrix(rows, columns, dense.shape)


def random_problem(seed, texts=60, features=90):
    generator = np.random.default_rng(seed)
    dense = generator.random((texts, features)) < 0.1
    dense[3] = dense[:, 5] = False
    scale = generator.normal(size=features)
    signs = np.where(generator.random(texts) < 0.4, 1.0, -1.0)
    return dense, scale, signs


def objective(weights, x, signs, cost):
    return weights @ weights / 2 + cost * (np.maximum(0, 1 - signs * (x @ weights)) ** 2).sum()


def ridge_regressions(x, signs, cost):
    """The same minimum another way: least squares on the texts inside the margin, until they stay."""
    inside = np.ones(len(signs), dtype=bool)
    for _ in range(100):
        chosen = x[inside]
        hessian = np.eye(x.shape[1]) + 2 * cost * chosen.T @ chosen
        weights = np.linalg.solve(hessian, 2 * cost * chosen.T @ signs[inside])
        before, inside = inside, signs * (x @ weights) < 1
        if (before == inside).all():
            return weights
    raise AssertionError("no solution to compare with")


def test_majority():
    assert majority(np.array([2, 0, 2, 1]), 3) == 2
    assert majority(np.array([1, 0]), 2) == 0
    assert isinstance(majority(np.array([1]), 2), int)


def test_products_are_those_of_the_dense_matrix():
    dense, scale, signs = random_problem(0)
    assert np.allclose(sparse(dense).times(scale), dense @ scale)
    assert np.allclose(sparse(dense).transposed_times(signs), dense.T @ signs)


def test_log_count_ratio_by_hand():
    dense = np.array([[1, 1, 0, 1], [0, 1, 1, 1], [1, 0, 0, 1]])  # the last column is the bias
    # With one added to each: 3, 2, 1 of 6 in the class, 1, 2, 2 of 5 in the rest.
    expected = [np.log(3 / 6 * 5), np.log(2 / 6 * 5 / 2), np.log(1 / 6 * 5 / 2), 1]
    assert np.allclose(log_count_ratio(sparse(dense), np.array([True, False, True])), expected)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("cost", [0.01, 0.1, 1])
def test_svm_finds_the_minimum(seed, cost):
    dense, scale, signs = random_problem(seed)
    expected = ridge_regressions(dense * scale, signs, cost)
    weights = train_svm(sparse(dense), scale, signs, cost, tolerance=1e-14)
    assert np.allclose(weights, expected, atol=1e-5)
    quick = train_svm(sparse(dense), scale, signs, cost, tolerance=1e-3)
    lowest = objective(expected, dense * scale, signs, cost)
    assert lowest <= objective(quick, dense * scale, signs, cost) <= lowest / (1 - 1e-3)
    assert not np.allclose(quick, weights, atol=1e-5)  # or the line before says nothing


def test_pairs_matter():
    texts = [
        "good",
        "good",
        "not bad",
        "bad",
        "bad",
        "not good",
    ] * 3  # no weights of single words do this
    model = NBSVM().fit(texts, np.array([1, 1, 1, 0, 0, 0] * 3), 2)
    assert model.predict(["not good", "good", "bad", "so bad", "it is not bad"]).tolist() == [
        0,
        1,
        0,
        0,
        1,
    ]


def test_features_are_words_and_pairs_within_a_text():
    model = NBSVM().fit(["a b", "b c a b"], np.array([0, 1]), 2)
    assert len(model.features) == 3 + 3  # a, b, c; a b, b c, c a; no b b across texts


def test_case_markup_and_repeats_do_not_count():
    model = NBSVM().fit(TEXTS, LABELS, 2)
    plain = model._matrix(["good good film"])
    odd = model._matrix(["GOOD <br />good<br/>FILM"])
    assert np.array_equal(plain.columns, odd.columns)
    assert (
        plain.columns.size == 4
    )  # good, film, good film and the bias; the pair good good is unknown


def test_three_labels():
    texts = ["red rose", "red wine", "blue sea", "blue sky", "green leaf", "green grass"]
    model = NBSVM().fit(texts, np.array([0, 0, 1, 1, 2, 2]), 3)
    assert model.predict(["a green car", "red", "the blue rose"]).tolist() == [2, 0, 1]


def test_two_labels_are_one_problem(monkeypatch):
    calls = []

    def counted(*arguments):
        calls.append(arguments)
        return train_svm(*arguments)

    monkeypatch.setattr(baselines, "train_svm", counted)
    NBSVM().fit(TEXTS, LABELS, 2)
    assert len(calls) == 1


def test_two_labels_give_what_one_against_the_rest_gives():
    two, three = NBSVM().fit(TEXTS, LABELS, 2), NBSVM().fit(TEXTS, LABELS, 3)
    assert np.allclose(two.weights, three.weights[:2], atol=0.02)


@pytest.mark.parametrize("flip", [False, True])
def test_unknown_words_get_the_frequent_label(flip):
    labels = 1 - LABELS[1:] if flip else LABELS[1:]
    model = NBSVM().fit(TEXTS[1:], labels, 2)
    assert model.predict(["", "xyzzy plugh", "<br />"]).tolist() == [majority(labels, 2)] * 3


def test_a_label_without_texts_is_never_predicted():
    model = NBSVM().fit(TEXTS, 2 * LABELS, 4)
    assert model.predict([*TEXTS, "", "xyzzy"]).tolist()[:8] == (2 * LABELS).tolist()
    assert set(model.predict(["", "xyzzy", "good bad"])) <= {0, 2}
    assert NBSVM().fit(GOOD, np.ones(4, dtype=int), 2).predict([*TEXTS, ""]).tolist() == [1] * 9


def test_two_texts_and_none():
    model = NBSVM().fit(["good", "bad"], np.array([1, 0]), 2)
    assert model.predict(["bad film", "good film"]).tolist() == [0, 1]
    assert model.predict([]).shape == (0,)
    empty = NBSVM().fit(["", "<br />", " "], np.array([0, 1, 1]), 2)
    assert empty.predict(["", "word"]).tolist() == [1, 1]


def test_the_same_twice():
    first, second = NBSVM().fit(TEXTS, LABELS, 2), NBSVM().fit(TEXTS, LABELS, 2)
    assert np.array_equal(first.weights, second.weights)


# What they are worth on test rows

ROWS = {"train": [*GOOD, *BAD, "bad", "bad !"], "test": ["good", "so good", "good !", "bad film"]}
RIGHT = {"train": np.array([1] * 4 + [0] * 6), "test": np.array([1, 1, 1, 0])}


def test_baselines_learn_from_train_rows_and_are_measured_on_test_rows():
    rows = {row["method"]: row for row in evaluate_baselines(ROWS, RIGHT, 2)}
    assert list(rows) == ["majority", "nb-svm"]
    assert rows["majority"]["accuracy"] == 1 / 4  # most train rows are bad, most test rows good
    assert rows["nb-svm"]["accuracy"] == 1
    assert all(row["train_examples"] == 10 for row in rows.values())
    wrong = RIGHT | {"test": 1 - RIGHT["test"]}
    assert [row["accuracy"] for row in evaluate_baselines(ROWS, wrong, 2)] == [3 / 4, 0]


def test_baselines_learn_from_the_chosen_rows_alone():
    chosen = np.array([0, 1, 2, 4])  # three good ones and a bad one
    rows = evaluate_baselines(ROWS, RIGHT, 2, chosen)
    assert rows[0]["accuracy"] == 3 / 4 and rows[0]["train_examples"] == 4
    half = evaluate_baselines(ROWS, RIGHT, 2, np.array([0, 1, 4, 5]))
    assert [row["accuracy"] for row in half] == [1 / 4, 1]
    only_good = evaluate_baselines(ROWS, RIGHT, 2, np.arange(4))
    assert [row["accuracy"] for row in only_good] == [3 / 4, 3 / 4]


def test_nb_svm_has_its_figure_on_rotten_tomatoes():
    reviews = Reviews.load(Dataset("rotten_tomatoes"))
    _, row = evaluate_baselines(reviews.texts, reviews.labels, 2)
    assert row["accuracy"] == 668 / 852  # 78.4%: as in every table of the project
