"""Self-training: balance, views that correct each other, and labels that nobody gave."""

import numpy as np
import pytest
import torch

from minitune import self_training
from minitune.self_training import (
    HELD_OUT,
    all_views,
    second_view,
    surest,
    taught_rows,
)

N = 400


@pytest.fixture(scope="module", params=["alternating", "pairs", "blocks"])
def reviews(request):
    """Texts, labels (N,), and the answers of a prompt, as log-probabilities (N, 2).

    A text has two of five words of its label. The prompt is right about three texts in four, and
    surer where it is right; the words of a text do not tell where it is wrong.
    """
    rng = np.random.default_rng(0)
    labels = {
        "alternating": np.arange(N) % 2,
        "pairs": np.arange(N) // 2 % 2,
        "blocks": np.arange(N) // (N // 2),
    }[request.param]
    texts = []
    for i in range(N):
        words = [f"{'pn'[labels[i]]}{k}" for k in rng.integers(0, 5, 2)]
        words += [f"w{k}" for k in rng.integers(0, 30, 6)]
        texts.append(" ".join(rng.permutation(words)))
    right = rng.random(N) < 0.75
    margin = np.where(right, rng.gamma(2, 1, N), -rng.gamma(2, 0.5, N))
    margin = np.where(labels == 1, margin, -margin)
    logs = torch.tensor(np.stack([-margin / 2, margin / 2], 1)).float().log_softmax(1)
    return texts, torch.from_numpy(labels), logs


def accuracy(logs, labels):
    return (logs.argmax(1) == labels).double().mean().item()


def test_the_surest_rows_are_as_many_of_each_label_even_where_the_prior_is_not_matched():
    certainty = torch.linspace(0.1, 0.9, 100)  # that a row is of label 1
    logs = torch.stack([1 - certainty**3, certainty**3], 1).log()
    rows = surest(logs, 0.4)
    assert rows.tolist() == [*range(20), *range(80, 100)]


def test_the_views_together_are_right_more_often_than_the_prompt(reviews):
    texts, labels, logs = reviews
    joint = all_views(texts, logs, {})
    assert accuracy(logs, labels) < 0.78
    assert accuracy(joint, labels) > 0.9
    torch.testing.assert_close(joint.exp().sum(1), torch.ones(N))
    assert joint.exp().mean(0).tolist() == pytest.approx([0.5, 0.5], abs=1e-3)


def test_the_bag_of_words_answers_only_for_texts_that_it_has_not_learned_from(reviews):
    """With words that stand in one text only it could repeat each answer, right or wrong."""
    texts, labels, logs = reviews
    alone = [f"only{i}" for i in range(N)]
    answers = second_view(alone, logs, {})
    torch.testing.assert_close(answers, torch.full((N, 2), 0.5).log(), rtol=0, atol=1e-3)


def test_the_bag_of_words_learns_the_labels_that_are_given_not_the_prompts(reviews):
    texts, labels, logs = reviews
    wrong = (logs.argmax(1) != labels).nonzero().flatten().tolist()
    known = {row: int(labels[row]) for row in wrong}
    before, after = second_view(texts, logs, {}), second_view(texts, logs, known)
    assert accuracy(after, labels) > accuracy(before, labels)


def balanced(labels, count):
    """The labels of `count` rows: the first of each label, then the second of each."""
    rows = [
        int(row)
        for pair in zip(*((labels == label).nonzero().flatten() for label in (0, 1)), strict=True)
        for row in pair
    ]
    return {row: int(labels[row]) for row in rows[:count]}


def test_a_bag_of_words_of_the_labels_alone_helps_where_the_prompt_guesses(reviews, monkeypatch):
    texts, labels, logs = reviews
    guesses = logs[torch.randperm(N, generator=torch.Generator().manual_seed(0))]
    known = balanced(labels, 80)
    rest = [row for row in range(N) if row not in known]
    with_it = accuracy(all_views(texts, guesses, known)[rest], labels[rest])
    monkeypatch.setattr(self_training, "AS_MANY", 1e9)
    without = accuracy(all_views(texts, guesses, known)[rest], labels[rest])
    assert accuracy(guesses[rest], labels[rest]) < 0.6 and with_it > 0.7
    assert with_it > without + 0.05


@pytest.mark.parametrize("count", [2, 4])
def test_very_few_labels_do_no_harm(reviews, count):
    texts, labels, logs = reviews
    joint = all_views(texts, logs, balanced(labels, count))
    assert torch.isfinite(joint).all()
    assert accuracy(joint, labels) > accuracy(all_views(texts, logs, {}), labels) - 0.02


class Rows:
    """Inputs whose row i is the number i."""

    def __init__(self, rows):
        self.rows = rows

    def select(self, indices):
        return Rows(self.rows[indices])


def test_the_student_learns_from_sure_rows_and_from_the_labels_that_are_given(reviews):
    _, labels, logs = reviews
    unsure = logs.max(1).values.argsort()[:4].tolist()
    known = {row: 1 - int(logs[row].argmax()) for row in unsure}
    examples = taught_rows(Rows(np.arange(N)), logs, known)
    rows, answers = examples["train"].inputs.rows.tolist(), examples["train"].labels
    held_out = set(examples["validation"].inputs.rows.tolist())
    assert set(rows) == (set(surest(logs)) - held_out) | set(unsure)
    for row, answer in zip(rows, answers, strict=True):
        expected = torch.eye(2)[known[row]] if row in known else logs[row].exp()
        torch.testing.assert_close(answer, expected)


@pytest.mark.parametrize("known", [{}, {row: 0 for row in range(200)}])
def test_rows_without_a_label_choose_the_epoch_by_the_teachers_answers(reviews, known):
    _, _, logs = reviews
    examples = taught_rows(Rows(np.arange(N)), logs, known)
    train, validation = (examples[split].inputs.rows for split in ("train", "validation"))
    assert not set(train) & set(validation) and not set(known) & set(validation)
    assert len(validation) == (N - len(known)) / HELD_OUT
    assert set(train) == (set(surest(logs)) - set(validation)) | set(known)
    assert set(validation) - set(surest(logs))  # the student's answers to sure rows are all right
    assert examples["validation"].labels.tolist() == logs.argmax(1)[validation].tolist()
