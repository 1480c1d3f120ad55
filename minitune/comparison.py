"""Fine-tuning runs side by side, with simple methods for company: their figures and their table."""

import time
from collections import defaultdict
from statistics import mean, stdev

import numpy as np

from minitune.baselines import NBSVM, majority
from minitune.classification import interval
from minitune.reviews import Reviews

ORDER = ("majority", "nb-svm", "scratch", "feature", "adapter", "full")


def simple_methods(reviews: Reviews, chosen: np.ndarray | None, seed: int) -> list[dict]:
    """Metrics of the most frequent label and of a bag of words, on the same rows as everything else."""
    labels = reviews.labels["train"].numpy()
    chosen = np.arange(len(labels)) if chosen is None else chosen
    texts = [reviews.texts["train"][i] for i in chosen]
    test = reviews.labels["test"].numpy()
    common = {"train_examples": len(chosen), "seed": seed}
    answer = majority(labels[chosen], len(reviews.names))
    rows = [{"method": "majority", "accuracy": float((test == answer).mean()), **common}]
    started = time.monotonic()
    bag = NBSVM().fit(texts, labels[chosen], len(reviews.names))
    seconds = round(time.monotonic() - started, 1)
    accuracy = float((bag.predict(reviews.texts["test"]) == test).mean())
    return [*rows, {"method": "nb-svm", "accuracy": accuracy, "train_seconds": seconds, **common}]


def summarise(runs: list[dict], test_rows: int) -> list[dict]:
    """One row a method and number of training rows: means over seeds, and how sure the accuracy is."""
    groups = defaultdict(list)
    for run in runs:
        groups[run["train_examples"], run["method"]].append(run)
    rows = []
    for (count, method), group in sorted(groups.items(), key=lambda g: (g[0][0], ORDER.index(g[0][1]))):
        row = {"method": method, "train_examples": count, "seeds": len(group)}
        for key in group[0]:
            if isinstance(group[0][key], int | float) and key not in row and key != "seed":
                row[key] = mean(run[key] for run in group)
        accuracies = [run["accuracy"] for run in group]
        row["interval"] = interval(row["accuracy"], test_rows)  # which test rows there happen to be
        row["spread"] = stdev(accuracies) if len(group) > 1 else None  # which seed
        rows.append(row)
    return rows


HEADER = ("method", "labels", "test accuracy", "95% interval", "trained", "share", "seconds", "tokens/s",
          "memory", "saved")  # fmt: skip


def table(rows: list[dict]) -> str:
    """The rows as text, one line each."""
    return aligned([HEADER, *(_cells(row) for row in rows)])


def aligned(lines: list[tuple[str, ...]], left: int = 1) -> str:
    """Cells in columns, the first `left` of which begin at the left."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    align = [str.ljust] * left + [str.rjust] * (len(widths) - left)
    padded = [[f(*cell) for f, *cell in zip(align, line, widths, strict=True)] for line in lines]
    return "\n".join("  ".join(line) for line in padded)


def _cells(row: dict) -> tuple[str, ...]:
    low, high = row["interval"]
    accuracy = f"{row['accuracy']:.1%}"
    if row["spread"] is not None:
        accuracy += f" ± {100 * row['spread']:.1f}"
    cells = [row["method"], f"{row['train_examples']:,}", accuracy, f"{100 * low:.1f} to {100 * high:.1f}"]
    if "trainable_params" in row:
        share = row["trainable_params"] / row["total_params"]
        cells += [f"{row['trainable_params']:,.0f}", f"{share:.1%}"]
    else:
        cells += ["", ""]
    cells.append(f"{row['train_seconds']:,.0f}" if "train_seconds" in row else "")
    cells.append(f"{row['tokens_per_second']:,.0f}" if "tokens_per_second" in row else "")
    for key in ("peak_memory_bytes", "saved_bytes"):
        cells.append(in_bytes(row[key]) if key in row else "")
    return tuple(cells)


def in_bytes(number: float) -> str:
    """A size in words."""
    return f"{number / 1e6:,.1f} MB" if number >= 1e5 else f"{number / 1e3:,.0f} kB"
