"""Labelled texts in memory: what fine-tuning learns from, chooses by, and is scored on."""

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from minitune.data import ACL_IMDB, PACKAGED, Dataset
from minitune.errors import UserError

SENTIMENT = {"0": "negative", "1": "positive"}  # in the sources that minitune knows by name
MOST_LABELS = 100
SPLITS = ("train", "validation", "test")


@dataclass
class Reviews:
    """The texts of each split, and the index of each one's label."""

    names: dict[int, str]  # of the labels
    texts: dict[str, list[str]] = field(default_factory=lambda: {split: [] for split in SPLITS})
    labels: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def load(cls, dataset: Dataset) -> "Reviews":
        """All labelled rows. Raises UserError where there are too few, or labels make no sense."""
        raw = {split: [] for split in SPLITS}
        texts = {split: [] for split in SPLITS}
        unlabelled = Counter()
        for row in dataset.split_rows():
            if row.label:
                texts[row.split].append(row.text)
                raw[row.split].append(row.label)
            else:
                unlabelled[row.split] += 1
        known = dataset.name in PACKAGED or _is_acl_imdb(dataset)
        # The aclImdb tree has unlabelled reviews on purpose, and none of them to test.
        if unlabelled["test"] or (unlabelled and not known):
            option = "--test" if dataset.test and unlabelled["test"] else f"{dataset.option} {dataset.name}"
            raise UserError(f"{option}: {unlabelled.total():,} rows have no label (in a column label)")
        names = _names(raw["train"], SENTIMENT if known else {}, f"{dataset.option} {dataset.name}")
        reviews = cls(names, texts)
        for split in SPLITS:
            labels = [label_index(label, names, known) for label in raw[split]]
            if None in labels:
                wrong = raw[split][labels.index(None)]
                raise UserError(f"{split} rows: the label {wrong} is not in the train rows of {dataset.name}")
            reviews.labels[split] = torch.tensor(labels, dtype=torch.int64)
            if not labels:
                raise UserError(f"{dataset.option} {dataset.name} has too few rows: none is left for {split}")
        return reviews

    def choose(self, split: str, count: int, seed: int) -> np.ndarray:
        """Indices of `count` rows of a split, the labels as even as they can be.

        Random by `seed`; a smaller choice is part of a larger one. Raises UserError for too many.
        """
        labels = self.labels[split].numpy()
        if count > len(labels):
            raise UserError(f"there are {len(labels):,} {split} rows, not {count:,}")
        order = np.random.default_rng(seed).permutation(len(labels))
        # The k-th row of each label comes before the (k+1)-th of any.
        rank = np.empty(len(labels), dtype=np.int64)
        for label in self.names:
            own = order[labels[order] == label]
            rank[own] = np.arange(len(own))
        return order[np.argsort(rank[order], kind="stable")][:count]


def label_index(label: str, names: dict[int, str], numbers_too: bool) -> int | None:
    """Which label a name means, or its number where that may stand for it; None: neither.

    Where names are numbers themselves, "1" is a name and never a number.
    """
    for index, name in names.items():
        if label == name:
            return index
    if not numbers_too or any(name.isdigit() for name in names.values()):
        return None
    return next((index for index in names if label == str(index)), None)


def _names(labels: list[str], known: dict[str, str], source: str) -> dict[int, str]:
    """Index to name, of the distinct labels in the train rows: sorted, numbers by value."""
    distinct = set(labels)
    try:
        "".join(distinct).encode()
    except UnicodeEncodeError:  # JSON can spell half of a surrogate pair
        raise UserError(f"{source}: a label holds half of a character (a lone surrogate)") from None
    if len(distinct) < 2:
        what = f"one label only, {distinct.pop()}" if distinct else "no labelled row to train on"
        raise UserError(f"{source} has {what}: there is nothing to tell apart")
    if len(distinct) > MOST_LABELS:
        raise UserError(f"{source} has {len(distinct):,} different labels, {MOST_LABELS} at most")
    try:
        ordered = sorted(sorted(distinct), key=float)  # "1" and "1.0" in an order of their own
    except ValueError:
        ordered = sorted(distinct)
    return {index: known.get(label, label) for index, label in enumerate(ordered)}


def _is_acl_imdb(dataset: Dataset) -> bool:
    return "/".join(dataset.files[0].parts[-3:-1]) in ACL_IMDB
