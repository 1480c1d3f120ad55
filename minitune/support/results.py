"""Results as figures and text: intervals, calibration error, and the tables that scripts print.

Everything here takes rows, which are dictionaries of figures, and gives rows or text.
"""

import contextlib
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from statistics import mean, pstdev, stdev

import numpy as np


def interval(accuracy: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """95% confidence interval of an accuracy measured on n rows (Wilson 1927).

    The accuracy is always inside: where all rows are right or all are wrong, one end is equal to
    it, and rounding would put that end on the wrong side as often as not.
    """
    center = (accuracy + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(accuracy * (1 - accuracy) / n + z * z / (4 * n * n))
    return max(0.0, min(center - half, accuracy)), min(1.0, max(center + half, accuracy))


def expected_calibration_error(
    probabilities: np.ndarray, labels: np.ndarray, bins: int = 10
) -> float:
    """How far the probability of an answer is from its chance to be right, on average.

    `probabilities` (N, L), `labels` (N,). Answers are put into bins by their probability; each bin
    adds |accuracy - mean probability|, weighted by its share of the answers (Guo et al. 2017, "On
    Calibration of Modern Neural Networks").
    """
    probabilities = np.asarray(probabilities, dtype=np.float64)
    confidence, right = probabilities.max(1), probabilities.argmax(1) == np.asarray(labels)
    bin_of = np.minimum((confidence * bins).astype(int), bins - 1)
    return float(np.abs(np.bincount(bin_of, weights=right - confidence)).sum() / len(confidence))


def summarise(runs: list[dict], test_rows: int, order: Sequence[str] = ()) -> list[dict]:
    """One row for each method and number of training rows: the means over the runs' seeds.

    Two figures say how sure the accuracy is: `interval`, for which test rows there happen to be,
    and `spread`, the sample standard deviation between seeds (None for one seed). Methods come in
    this `order`, others after them.
    """
    groups = defaultdict(list)
    for run in runs:
        groups[run["train_examples"], run["method"]].append(run)
    rows = []
    for count, method in sorted(groups, key=lambda g: (g[0], [*order, g[1]].index(g[1]))):
        group = groups[count, method]
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
    """A size in words."""
    return f"{number / 1e6:,.1f} MB" if number >= 1e5 else f"{number / 1e3:,.0f} kB"


def in_percent(share: float) -> str:
    """A share in words, with two digits of whatever is not zero: 4.8%, 0.047%."""
    digits = 1 - math.floor(math.log10(100 * share)) if share > 0 else 1
    return f"{share:.{max(1, digits)}%}"


def in_seconds(seconds: float) -> str:
    """A time in words."""
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
    """The rows of `summarise` as text, a line each; the first `left` columns begin at the left.

    A cell whose figure a row lacks stays empty.
    """
    lines = [list(columns), *([_cell(row, cell) for cell in columns.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    align = [str.ljust] * left + [str.rjust] * (len(widths) - left)
    return "\n".join(
        "  ".join(f(*cell) for f, *cell in zip(align, line, widths, strict=True)) for line in lines
    )


def _cell(row: dict, cell: Callable[[dict], str]) -> str:
    with contextlib.suppress(KeyError):
        return cell(row)
    return ""


TOGETHER = "all of them together"  # stands for a template in the rows of an ensemble


def prompt_table(rows: list[dict], baselines: list[dict]) -> str:
    """The rows of `compare_prompts` as text, and those of baselines, which learned from labels."""
    words = "{method}, from {train_examples:,} labels"
    named = [row | {"template": words.format(**row)} for row in baselines]
    return table(rows + named, PROMPT_COLUMNS, left=3)


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
