"""Temperature scaling: the smallest loss on validation rows, and no label changes."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from minitune.classification import Examples
from minitune.features import Features
from minitune.support.results import macro_f1
from minitune.support.runtime import Runtime
from minitune.temperature import fit_temperature, logits_of, score

CPU = Runtime.start("cpu", "fp32")


def overconfident(rows=400, labels=3, times=4.0, seed=0):
    """Logits that are `times` too large for labels drawn by softmax(logits / times)."""
    torch.manual_seed(seed)
    logits = torch.randn(rows, labels)
    drawn = torch.multinomial(logits.softmax(-1), 1).squeeze(1)
    return times * logits, drawn


def loss(logits, labels, temperature):
    return F.cross_entropy(logits.double() / temperature, labels).item()


@pytest.mark.parametrize("times", [0.25, 1.0, 4.0])
def test_it_finds_by_how_much_logits_are_too_large(times):
    logits, labels = overconfident(20_000, times=times)
    assert fit_temperature(logits, labels) == pytest.approx(times, rel=0.05)


@pytest.mark.parametrize("seed", range(5))
def test_no_other_temperature_has_a_smaller_loss(seed):
    logits, labels = overconfident(60, seed=seed)
    best = fit_temperature(logits, labels)
    losses = [loss(logits, labels, t) for t in np.geomspace(0.05, 20, 2001)]
    assert loss(logits, labels, best) <= min(losses)
    assert loss(logits, labels, best) < loss(logits, labels, 1.0) - 1e-4
    assert torch.equal((logits / best).argmax(-1), logits.argmax(-1))


def test_where_all_rows_are_right_nothing_is_known_and_it_stays_one():
    logits = torch.tensor([[2.0, -1.0], [0.1, 0.3]])
    assert fit_temperature(logits, torch.tensor([0, 1])) == 1
    assert fit_temperature(logits, torch.tensor([1, 0])) == 1  # nor where all are wrong
    assert fit_temperature(torch.zeros(2, 2), torch.tensor([1, 0])) == 1


def test_logits_come_in_the_order_of_the_examples_and_processes_share_them(monkeypatch):
    matrix = torch.arange(22.0).view(11, 2)
    inputs = Features(matrix)
    inputs.lengths = np.array([5, 1, 4, 2, 3, 9, 8, 7, 6, 10, 11])
    monkeypatch.setattr(Features, "pack", lambda features: features.matrix)
    examples = Examples(inputs, torch.zeros(11, dtype=torch.int64))

    class Identity(torch.nn.Module):
        def forward(self, batch):
            return batch

    assert torch.equal(logits_of(Identity(), examples, 2, 12, CPU), matrix)
    total = torch.zeros(11, 2)
    monkeypatch.setattr(Runtime, "sum", lambda self, tensor: tensor)
    for rank in range(8):  # some of them have no batch
        share = Runtime(CPU.device, CPU.precision, rank=rank, world_size=8)
        total += logits_of(Identity(), examples, 2, 12, share)
    assert torch.equal(total, matrix)


def test_the_score_is_that_of_a_loop_over_the_rows():
    logits, labels = overconfident(50)
    found = score(logits, labels)
    right = [row.argmax().item() == label for row, label in zip(logits, labels, strict=True)]
    assert found["accuracy"] == sum(right) / 50
    each = [
        -row.double().log_softmax(-1)[label].item()
        for row, label in zip(logits, labels, strict=True)
    ]
    assert found["loss"] == pytest.approx(sum(each) / 50)


@pytest.mark.parametrize(
    "labels, answers, expected",
    [
        ([0, 0, 0, 1], [0, 0, 0, 0], (6 / 7 + 0) / 2),  # accuracy 3/4
        ([0, 1, 2], [0, 1, 2], 1.0),
        ([0, 1, 1, 2], [0, 1, 2, 2], (1 + 2 / 3 + 2 / 3) / 3),
        ([0, 0], [0, 3], (2 / 3 + 0) / 2),  # as scikit-learn: a label that is only given counts
    ],
)
def test_macro_f1_lets_every_label_count_alike(labels, answers, expected):
    assert macro_f1(labels, answers) == pytest.approx(expected)
