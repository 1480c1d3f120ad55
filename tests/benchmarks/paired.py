"""McNemar's test between runs of finetune.py, their ensembles with --bag, and NB-SVM.

    python -m tests.benchmarks.paired runs/finetune/full runs/bag/full

The runs must have the same test rows. Their answers are those in answers.json; NB-SVM is fitted
again to the train rows, all of them. A line a pair: the rows that only one of both has right, and
the probability of a difference at least as large by chance.
"""

import argparse
import itertools
import json
from pathlib import Path

import torch

from minitune.bag_of_words import Bag
from minitune.data import Dataset, Reviews
from minitune.support.baselines import NBSVM
from minitune.support.results import mcnemar


def main() -> None:
    """Print the accuracies, and a line for each pair."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path)
    runs = parser.parse_args().runs
    settings = json.loads((runs[0] / "settings.json").read_text())
    reviews = Reviews.load(Dataset(settings["data"], settings["test"]))
    texts, labels = reviews.texts["test"], reviews.labels["test"]
    model = NBSVM().fit(reviews.texts["train"], reviews.labels["train"].numpy(), len(reviews.names))
    right = {"NB-SVM": torch.from_numpy(model.predict(texts)) == labels}
    for run in runs:
        test = json.loads((run / "answers.json").read_text())["test"]
        assert test["labels"] == labels.tolist(), f"{run} has other test rows than {runs[0]}"
        logits = torch.tensor(test["logits"])
        right[str(run)] = logits.argmax(1) == labels
        if bag := Bag.load(run, len(reviews.names)):
            right[f"{run} + bag"] = bag.together(logits, texts).argmax(1) == labels
    for name, rows in right.items():
        print(f"{name}: {rows.double().mean():.2%} of {len(rows):,} test rows")
    for one, other in itertools.combinations(right, 2):
        ours, theirs, p = mcnemar(right[one].tolist(), right[other].tolist())
        print(f"{one} {ours}, {other} {theirs}: p = {p:.2g}")


if __name__ == "__main__":
    main()
