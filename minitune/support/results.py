"""Results: confidence intervals, calibration error, and the tables that scripts print.

A row is a dictionary of figures; a table is a list of rows, or the text made of it.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from statistics import mean, pstdev, stdev

import numpy as np


def interval(accuracy: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """95% confidence interval of an accuracy measured on n rows (Wilson 1927).

    Where all rows are right or all are wrong, one end is equal to the accuracy; the minimum and
    maximum below keep rounding from putting that end on the wrong side of it.
    """
    center = (accuracy + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(accuracy * (1 - accuracy) / n + z * z / (4 * n * n))
    return max(0.0, min(center - half, accuracy)), min(1.0, max(center + half, accuracy))


def calibration_bins(
    probabilities: np.ndarray, labels: np.ndarray, bins: int = 10
) -> list[tuple[float, int, float, float]]:
    """Answers in bins by their probability; `probabilities` (N, L), `labels` (N,).

    For each bin that has answers: (lower end, answers, mean probability, share that is right).
    """
    probabilities = np.asarray(probabilities, dtype=np.float64)
    confidence, right = probabilities.max(1), probabilities.argmax(1) == np.asarray(labels)
    bin_of = np.minimum((confidence * bins).astype(int), bins - 1)
    found = []
    for k in np.unique(bin_of).tolist():
        inside = bin_of == k
        found.append((k / bins, int(inside.sum()), confidence[inside].mean(), right[inside].mean()))
    return found


def expected_calibration_error(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """How far the probability of an answer is from how often such answers are right, on average.

    The mean of |accuracy - mean probability| over the bins, weighted by their numbers of answers
    (Guo et al. 2017, "On Calibration of Modern Neural Networks").
    """
    bins = calibration_bins(probabilities, labels)
    return float(sum(n * abs(right - mean) for _, n, mean, right in bins) / len(labels))


def macro_f1(labels: Sequence[int], answers: Sequence[int]) -> float:
    """The mean over labels of F1 = 2 right / (times given + times due): rare labels count fully.

    Over the labels that occur, in either; always answering the most frequent label scores badly.
    """
    right = Counter(a for a, b in zip(labels, answers, strict=True) if a == b)
    either = Counter(labels) + Counter(answers)
    return mean(2 * right[label] / count for label, count in either.items())


def mcnemar(right: Sequence[bool], other: Sequence[bool]) -> tuple[int, int, float]:
    """Whether two classifiers differ by more than chance, on the same rows (McNemar 1947).

    `right` and `other` say which rows each has right. Returns on how many rows only the first is
    right, on how many only the other is, and the probability of a difference at least as large if
    both were equally good. Each of these rows would then go to either of them by a fair coin, so
    that the probability is exact: that of a binomial distribution, both tails.
    """
    ours = sum(a and not b for a, b in zip(right, other, strict=True))
    theirs = sum(b and not a for a, b in zip(right, other, strict=True))
    count = ours + theirs
    ways = sum(math.comb(count, k) for k in range(min(ours, theirs) + 1))
    return ours, theirs, min(1.0, 2 * ways / 2**count)


def summarise(runs: list[dict], test_rows: int, order: Sequence[str] = ()) -> list[dict]:
    """One row for each method and number of training rows: the means over the runs' seeds.

    Two figures say how certain the accuracy is: `interval`, which depends on the number of test
    rows, and `spread`, the sample standard deviation between seeds (None for one seed). Methods
    come in this `order`, others after them.
    """
    rank = {method: place for place, method in enumerate(order)}
    groups = defaultdict(list)
    for run in sorted(runs, key=lambda r: (r["train_examples"], rank.get(r["method"], len(rank)))):
        groups[run["method"], run["train_examples"]].append(run)
    rows = []
    for (method, count), group in groups.items():
        row = {"method": method, "train_examples": count, "seeds": len(group)}
        for key in group[0]:
            values = [run.get(key) for run in group]
            numbers = all(isinstance(value, int | float) for value in values)
            if numbers and key not in row and key != "seed":
                row[key] = mean(values)
        row["interval"] = interval(row["accuracy"], test_rows)
        accuracies = [run["accuracy"] for run in group]
        row["spread"] = stdev(accuracies) if len(group) > 1 else None
        rows.append(row)
    return rows


def in_bytes(number: float) -> str:
    """A size as text: 22.3 MB."""
    return f"{number / 1e6:,.1f} MB" if number >= 1e5 else f"{number / 1e3:,.0f} kB"


def in_percent(share: float) -> str:
    """A share as text, a small one with two digits that are not zero: 4.8%, 0.047%."""
    digits = 1 - math.floor(math.log10(100 * share)) if share > 0 else 1
    return f"{share:.{max(1, digits)}%}"


def in_seconds(seconds: float) -> str:
    """A time as text: 85 s, 4.1 min."""
    return f"{seconds / 60:.1f} min" if seconds >= 90 else f"{seconds:.2g} s"


def _accuracy(row: dict) -> str:
    spread = "" if row["spread"] is None else f" ± {100 * row['spread']:.1f}"
    return f"{row['accuracy']:.1%}{spread}"


def _interval(row: dict) -> str:
    return "{:.1f} to {:.1f}".format(*(100 * end for end in row["interval"]))


COLUMNS: dict[str, Callable[[dict], str]] = {
    "method": lambda row: row["method"],
    "labels": lambda row: f"{row['train_examples']:,}",
    "test accuracy": _accuracy,
    "95% interval": _interval,
    "trained": lambda row: f"{row['trainable_params']:,.0f}",
    "share": lambda row: in_percent(row["trainable_params"] / row["total_params"]),
    "seconds": lambda row: f"{row['train_seconds']:,.0f}",
    "tokens/s": lambda row: f"{row['tokens_per_second']:,.0f}",
    "memory": lambda row: in_bytes(row["peak_memory_bytes"]),
    "saved": lambda row: in_bytes(row["saved_bytes"]),
}
# Where labels are uneven, the accuracy says little of the rare ones.
UNEVEN_COLUMNS = COLUMNS | {"macro F1": lambda row: f"{row['macro_f1']:.3f}"}
PROMPT_COLUMNS: dict[str, Callable[[dict], str]] = {
    "shots": lambda row: str(row["shots"]),
    "template": lambda row: row["template"],
    "calibration": lambda row: row["calibration"],
    "accuracy": lambda row: f"{row['accuracy']:.1%}",
    "95% interval": _interval,
    "most frequent answer": lambda row: f"{row['majority_share']:.0%} {row['majority_answer']}",
    "ECE": lambda row: f"{row['calibration_error']:.3f}",
}


def table(rows: list[dict], columns: dict = COLUMNS, left: int = 1) -> str:
    """The rows as text, a line each, under a line of column names.

    The first `left` columns are aligned at the left, the others at the right. `columns` maps a name
    to the function that makes the cell of a row; a cell is empty where the row lacks its figure.
    """

    def cell(row: dict, text_of: Callable[[dict], str]) -> str:
        try:
            return text_of(row)
        except KeyError:
            return ""

    lines = [list(columns)]
    lines += [[cell(row, text_of) for text_of in columns.values()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        for i, width in enumerate(widths):
            line[i] = line[i].ljust(width) if i < left else line[i].rjust(width)
    return "\n".join(map("  ".join, lines))


TOGETHER = "all of them together"  # the template of a row that is about an ensemble


def prompt_table(rows: list[dict], baselines: list[dict]) -> str:
    """The rows of `compare_prompts` as text, and those of baselines, which learned from labels."""
    for row in baselines:
        name = f"{row['method']}, from {row['train_examples']:,} labels"
        rows = [*rows, row | {"template": name}]
    return table(rows, PROMPT_COLUMNS, left=3)


def prompt_summary(rows: list[dict]) -> list[str]:
    """A line for each calibration and number of shots: the templates' range, and their ensemble."""
    groups = defaultdict(list)
    for row in rows:
        groups[row["calibration"], row["shots"]].append(row)
    lines = []
    for (name, shots), group in groups.items():
        each = [row["accuracy"] for row in group if row["template"] != TOGETHER]
        line = f"{name}: templates from {min(each):.1%} to {max(each):.1%}"
        for together in (row for row in group if row["template"] == TOGETHER):
            line += f", standard deviation {100 * pstdev(each):.1f} points"
            line += f"; together {together['accuracy']:.1%}"
        lines.append(line + (f", with {shots} shots" if shots else ""))
    return lines
