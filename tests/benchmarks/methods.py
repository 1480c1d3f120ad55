"""The picture of where each method of fine-tuning sits in a layer.

    python -m tests.benchmarks.methods tests/benchmarks/runs/methods.png

A row for each method, as minitune/methods.py says in words. Residual sums are left out.
"""

import sys
from pathlib import Path

from matplotlib.patches import Circle, Patch, Polygon, Rectangle

from minitune.support.plots import GREY, plt, save

FROZEN, TRAINED, BARE = "#d9d9d9", "#3182bd", "white"
# What a layer computes, from its input to its output, and the head; with the place on the line.
# Before each LayerNorm there is room for an adapter.
PARTS = {
    "q, k, v": 0, "attention": 1.5, "output": 3, "LayerNorm": 5, "up": 6.5, "GELU": 8, "down": 9.5,
    "LayerNorm ": 11.5, "head": 13.5,
}  # fmt: skip
LINEAR, NORMS = ("q, k, v", "output", "up", "down"), ("LayerNorm", "LayerNorm ")
ROWS = {
    "feature": "the head alone",
    "bitfit": "the biases",
    "ia3": "vectors that multiply\nkeys, values and units",
    "lora": "narrow matrices A and B\nbeside each linear map",
    "adapter": "bottlenecks, and the\nLayerNorms behind them",
    "full": "everything, the\nword vectors too",
}
WIDTH, HEIGHT = 1.1, 0.56


def draw_row(axes: plt.Axes, method: str, y: float) -> None:
    """A layer from left to right, with what the method trains in blue."""
    axes.plot([-1, 14.4], [y, y], color=GREY, linewidth=0.8, zorder=0)
    for part, x in PARTS.items():
        colour = BARE if part in ("attention", "GELU") else FROZEN
        if part == "head" or (method == "adapter" and part in NORMS):
            colour = TRAINED
        if method == "full" and colour == FROZEN:
            colour = TRAINED
        left, bottom = x - WIDTH / 2, y - HEIGHT / 2
        style = {"facecolor": colour, "edgecolor": GREY, "linewidth": 0.6}
        axes.add_patch(Rectangle((left, bottom), WIDTH, HEIGHT, **style))
        if method == "bitfit" and part in LINEAR + NORMS:
            axes.add_patch(Rectangle((x + 0.41, bottom), 0.14, HEIGHT, facecolor=TRAINED))
        if method == "lora" and part in LINEAR:
            path = [(x - 0.68, y), (x - 0.68, y - 0.5), (x + 0.68, y - 0.5), (x + 0.68, y)]
            axes.plot(*zip(*path, strict=True), color=GREY, linewidth=0.8, zorder=0)
            draw_bottleneck(axes, x, y - 0.5, 0.28)
    if method == "adapter":
        for norm in NORMS:
            draw_bottleneck(axes, PARTS[norm] - 1, y, 0.5)
    if method == "ia3":
        for behind in ("q, k, v", "GELU"):
            x = PARTS[behind] + 0.75
            axes.add_patch(Circle((x, y), 0.18, facecolor=TRAINED, zorder=2))
            axes.text(x, y - 0.01, "×", color="white", ha="center", va="center", weight="bold")


def draw_bottleneck(axes: plt.Axes, x: float, y: float, height: float) -> None:
    """Two matrices: from many numbers to few, and from few to many."""
    for side in (-1, 1):
        outer, inner = x + 0.38 * side, x + 0.05 * side
        corners = [(outer, y - height / 2), (outer, y + height / 2)]
        corners += [(inner, y + height / 6), (inner, y - height / 6)]
        axes.add_patch(Polygon(corners, facecolor=TRAINED))


def main(path: str) -> None:
    """Draw the picture."""
    figure, axes = plt.subplots(figsize=(10, 4.1))
    for part, x in PARTS.items():
        axes.text(x, 0.55, part, ha="center", fontsize=9, color=GREY)
    for row, (method, words) in enumerate(ROWS.items()):
        y = -1.25 * row
        axes.text(-1.3, y, method, ha="right", va="center", weight="bold")
        axes.text(14.7, y, words, va="center", fontsize=9)
        draw_row(axes, method, y)
    meanings = {"trained": TRAINED, "frozen": FROZEN, "has no weights": BARE}
    boxes = [Patch(facecolor=c, edgecolor=GREY, label=word) for word, c in meanings.items()]
    axes.legend(handles=boxes, ncols=3, frameon=False, loc="lower center", fontsize=9)
    axes.set(xlim=(-3.2, 19), ylim=(-7.8, 1), aspect="equal")
    axes.axis("off")
    save(figure, Path(path))


if __name__ == "__main__":
    main(*sys.argv[1:2])
