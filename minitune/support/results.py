"""Fine-tuning runs side by side, with simple methods for company: their figures and their table."""

import math
from collections import defaultdict
from statistics import mean, pstdev, stdev

import torch
from torch import Tensor

ORDER = ("majority", "nb-svm", "scratch", "feature", "adapter", "full")


def summarise(runs: list[dict], test_rows: int) -> list[dict]:
    """One row a method and number of training rows: means over seeds, and how sure the accuracy is."""
    groups = defaultdict(list)
    for run in runs:
        groups[run["train_examples"], run["method"]].append(run)
    rows = []
    for (count, method), group in sorted(
        groups.items(), key=lambda g: (g[0][0], ORDER.index(g[0][1]))
    ):
        row = {"method": method, "train_examples": count, "seeds": len(group)}
        for key in group[0]:
            if isinstance(group[0][key], int | float) and key not in row and key != "seed":
                row[key] = mean(run[key] for run in group)
        accuracies = [run["accuracy"] for run in group]
        row["interval"] = interval(row["accuracy"], test_rows)  # which test rows there happen to be
        row["spread"] = stdev(accuracies) if len(group) > 1 else None  # which seed
        rows.append(row)
    return rows


HEADER = (
    "method",
    "labels",
    "test accuracy",
    "95% interval",
    "trained",
    "share",
    "seconds",
    "tokens/s",
    "memory",
    "saved",
)


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
    cells = [
        row["method"],
        f"{row['train_examples']:,}",
        accuracy,
        f"{100 * low:.1f} to {100 * high:.1f}",
    ]
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


def interval(accuracy: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """95% confidence interval of an accuracy measured on n rows (Wilson 1927)."""
    center = (accuracy + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(accuracy * (1 - accuracy) / n + z * z / (4 * n * n))
    return center - half, center + half


def expected_calibration_error(probabilities: Tensor, labels: Tensor, bins: int = 10) -> float:
    """How far the probability (N, L) of an answer is from its chance to be right, on average.

    Answers are put in bins by their probability: Guo et al. 2017, "On Calibration of Modern Neural
    Networks".
    """
    confidence, answers = probabilities.double().max(-1)
    right = (answers == labels).double()
    bin_of = (confidence * bins).long().clamp_max(bins - 1)
    gaps = torch.zeros(bins, dtype=torch.float64).index_add(0, bin_of, right - confidence)
    return (gaps.abs().sum() / len(labels)).item()


TOGETHER = "all of them together"


PROMPT_HEADER = (
    "shots",
    "template",
    "calibration",
    "accuracy",
    "95% interval",
    "most frequent answer",
    "ECE",
)


def prompt_table(rows: list[dict], baselines: list[dict]) -> str:
    """The rows as text; `baselines`: rows of baselines.evaluate_baselines, which learned from labels."""
    lines = [PROMPT_HEADER]
    for row in rows + baselines:
        low, high = row["interval"]
        figures = (f"{row['accuracy']:.1%}", f"{100 * low:.1f} to {100 * high:.1f}")
        if "method" in row:
            words = f"{row['method']}, from {row['train_examples']:,} labels"
            lines.append(("", words, "", *figures, "", ""))
            continue
        answer = f"{row['majority_share']:.0%} {row['majority_answer']}"
        shots, error = str(row["shots"]), f"{row['calibration_error']:.3f}"
        lines.append((shots, row["template"], row["calibration"], *figures, answer, error))
    return aligned(lines, left=3)


def prompt_summary(rows: list[dict]) -> list[str]:
    """What the table says about templates, their ensemble and demonstrations, a line for each calibration."""
    lines = []
    for name in dict.fromkeys(row["calibration"] for row in rows):
        for shots in sorted({row["shots"] for row in rows}):
            own = [row for row in rows if (row["calibration"], row["shots"]) == (name, shots)]
            own = {row["template"]: row["accuracy"] for row in own}
            together = own.pop(TOGETHER, None)
            each = list(own.values())
            line = f"{name}: templates from {min(each):.1%} to {max(each):.1%}"
            if together is not None:
                line += (
                    f", standard deviation {100 * pstdev(each):.1f} points; together {together:.1%}"
                )
            lines.append(line + (f", with {shots} shots" if shots else ""))
    return lines
