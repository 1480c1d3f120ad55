"""The picture at the top of the README: from text to a sentiment, four ways, with measured figures.

    python -m tests.benchmarks.path tests/benchmarks/runs/path.png

Every figure comes from a committed run in tests/benchmarks/runs/: its metrics, not this file.
"""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

RUNS = Path(__file__).parent / "runs"
BLUE, LIGHT, GREY = "#08519c", "#deebf7", "#636363"


def read(name: str) -> dict:
    """The JSON of a committed run."""
    return json.loads((RUNS / name).read_text())


def box(axes: plt.Axes, x: float, y: float, title: str, lines: str, width: float = 2.5) -> None:
    """A box with its centre at (x, y): what is run, and what it does."""
    corner = (x - width / 2, y - 0.42)
    style = {"boxstyle": "round,pad=0.02,rounding_size=0.08", "facecolor": LIGHT, "edgecolor": BLUE}
    axes.add_patch(matplotlib.patches.FancyBboxPatch(corner, width, 0.84, **style))
    axes.text(x, y + 0.17, title, ha="center", va="center", weight="bold", color=BLUE)
    axes.text(x, y - 0.17, lines, ha="center", va="center", fontsize=9)


def arrow(axes: plt.Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    """An arrow between two boxes."""
    axes.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": GREY})


def main(path: str) -> None:
    """Draw the picture."""
    pretrained = read("default/metrics.json")
    fine_tuned = {row["method"]: row for row in read("finetune/tiny-imdb.json")["rows"]}
    prompted = next(
        row
        for row in reversed(read("prompt/tiny-imdb.json")["rows"])
        if row["calibration"] == "prior"
    )
    ways = [
        ("feature", "frozen network,\nlinear classifier", fine_tuned["feature"]["accuracy"]),
        ("adapter", "frozen network,\nsmall trained layers", fine_tuned["adapter"]["accuracy"]),
        ("full", "every weight\nis trained", fine_tuned["full"]["accuracy"]),
        ("prompt.py", "nothing is trained,\nno labels", prompted["accuracy"]),
    ]
    figure, axes = plt.subplots(figsize=(10, 3.9))
    box(axes, 1.4, 1.5, "film reviews", "without labels")
    minutes, loss = pretrained["total_seconds"] / 60, pretrained["loss"]
    box(axes, 4.6, 1.5, "train.py", f"guess hidden words:\n{minutes:.0f} minutes, loss {loss:.2f}")
    arrow(axes, (2.68, 1.5), (3.32, 1.5))
    for row, (title, lines, accuracy) in enumerate(ways):
        y = 3.0 - row
        arrow(axes, (5.88, 1.5), (6.62, y))
        box(axes, 7.9, y, title, lines)
        axes.text(9.4, y, f"{accuracy:.1%}", va="center", fontsize=15, weight="bold", color=BLUE)
    axes.text(4.6, 3.0, "finetune.py, with labels", ha="center", color=GREY, style="italic")
    axes.text(10.35, 3.66, "test accuracy", ha="right", fontsize=9, color=GREY)
    nb_svm = fine_tuned["nb-svm"]["accuracy"]
    note = f"IMDb, tiny BERT, two CPU cores. A bag of words (NB-SVM) has {nb_svm:.1%}."
    axes.text(0.15, -0.62, note, fontsize=9, color=GREY)
    axes.set(xlim=(0, 10.5), ylim=(-0.75, 3.8))
    axes.axis("off")
    figure.tight_layout(pad=0.2)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main(*sys.argv[1:2])
