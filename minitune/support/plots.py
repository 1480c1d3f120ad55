"""The pictures that scripts draw, after the figures are on disk."""

import io
import warnings
from collections.abc import Iterable
from pathlib import Path
from statistics import median

import matplotlib
import numpy as np

from minitune.support.reference import PLATEAU
from minitune.support.results import in_bytes, in_percent, in_seconds
from minitune.support.runs import write_atomically

matplotlib.use("Agg")  # a file, no window
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.colors import PowerNorm  # noqa: E402

plt.rcParams.update({"axes.titlelocation": "left", "figure.constrained_layout.use": True})
plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False})
plt.rcParams["text.parse_math"] = False  # a $ in a name is a dollar

BLUE, LIGHT_BLUE, ORANGE, GREY = "#08519c", "#9ecae1", "#e6550d", "#636363"
SMALL = {"fontsize": 9, "color": GREY}
ACCURACY = "test accuracy (%), with its 95% interval"
COLOURS = {
    "majority": "#bdbdbd", "nb-svm": "#969696", "scratch": "#fdae6b", "feature": "#9ecae1",
    "bitfit": "#66c2a4", "ia3": "#238b45", "lora": "#807dba", "adapter": "#3182bd",
    "full": "#08306b", "prompt": "#e6550d",
    "none": "#bdbdbd", "contextual": "#9ecae1", "pmi": "#fdae6b", "prior": "#08306b",
}  # fmt: skip


def save(figure: plt.Figure, path: Path) -> None:
    """Write the picture, whole or not at all."""
    content = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")  # an empty box stands for it
        figure.savefig(content, format="png", dpi=150)
    plt.close(figure)
    write_atomically(path, content.getvalue())


def plot_pretraining(
    log: list[dict], uniform: float, unigram: float, final: dict, path: Path
) -> None:
    """Loss over time, two losses to compare it with, and the plateau where there is one.

    `log` holds the lines of log.jsonl, `final` the metrics of the whole validation set. Losses to
    compare with, in nats: `uniform` is ln(vocabulary), `unigram` the entropy of word frequencies.
    """
    minutes = [entry["seconds"] / 60 for entry in log] or [0.0]
    losses = [entry["loss"] for entry in log] or [final["loss"]]
    points = [(e["seconds"] / 60, e["validation"]["loss"]) for e in log if "validation" in e]
    points.append((minutes[-1], final["loss"]))
    figure, axes = plt.subplots(figsize=(8, 4.5))
    axes.margins(y=0.1)  # room for the last loss below its point
    axes.plot(minutes, losses, color=LIGHT_BLUE, linewidth=0.8, label="training, one batch")
    axes.plot(*zip(*points, strict=True), "o-", color=BLUE, markersize=4, label="validation")
    offset = {"xytext": (-2, -14), "textcoords": "offset points", "ha": "right"}
    axes.annotate(f"{final['loss']:.2f}", points[-1], color=BLUE, **offset)
    right, middle = axes.get_xlim()[1], (uniform + unigram) / 2
    corner = {"va": "bottom", "ha": "right"} | SMALL
    axes.axhline(uniform, color=GREY, linestyle=":")
    axes.text(right, uniform, f"every word equally likely: ln V = {uniform:.2f}", **corner)
    axes.axhline(unigram, color=GREY, linestyle="--")
    axes.text(right, unigram, f"words by their frequency alone: {unigram:.2f}", **corner)
    if span := plateau(minutes, losses, unigram):
        axes.axvspan(*span, color="#fdd0a2", alpha=0.5, linewidth=0)
        words = " the plateau:\n context is not\n used yet"
        axes.text(span[1], middle, words, va="center", **SMALL)
    axes.set(xlabel="minutes of training", ylabel="masked-LM loss (nats a token)")
    axes.set_title("Learning to fill blanks")
    place = {"bbox_to_anchor": (right, middle), "bbox_transform": axes.transData}
    axes.legend(loc="center right", frameon=False, **place)
    save(figure, path)


def plateau(
    minutes: list[float], losses: list[float], unigram: float, margin: float = PLATEAU
) -> tuple[float, float] | None:
    """The longest time with the loss within `margin` nats of the unigram entropy, or None.

    That is the loss of a model that knows how frequent words are, and nothing else. The loss of one
    batch is noisy, so each is replaced by the median of up to 21 around it. A loss that only falls
    through the margin has no plateau: a line fitted to the medians must fall less than that.
    """
    medians = np.array([median(losses[max(0, i - 10) : i + 11]) for i in range(len(losses))])
    inside = np.abs(medians - unigram) <= margin
    spans = []
    for a, b in np.flatnonzero(np.diff(inside, prepend=False, append=False)).reshape(-1, 2):
        if b - a >= 3:  # points, medians[a:b] are inside
            slope = np.polyfit(range(a, b), medians[a:b], 1)[0]
            if abs(slope) * (b - a) < 1.5 * margin:
                spans.append((minutes[a], minutes[b - 1]))
    return max(spans, key=lambda span: span[1] - span[0], default=None)


def plot_comparison(rows: list[dict], title: str, path: Path, prompt: dict | None = None) -> None:
    """Rows of results.summarise: bars for one number of training rows, curves for several.

    Of three networks or more, the accuracy against the number of trained parameters stands below.
    `prompt` is a row of calibration.compare_prompts, drawn as a line: it has no number of labels.
    """
    several = len({row["train_examples"] for row in rows}) > 1
    trained = {row.get("trainable_params", 0) for row in rows} - {0}
    panels = 2 if not several and len(trained) >= 3 else 1
    height = 4.5 if several else 1.5 + 0.5 * len(rows)
    figure, axes = plt.subplots(
        panels, figsize=(8, height + 3.5 * (panels - 1)), height_ratios=[height, 3.5][:panels]
    )
    if panels == 2:
        axes, below = axes
        _against_parameters(below, rows)
    if prompt:
        low, high = prompt["interval"]
        axes.axhspan(100 * low, 100 * high, color=ORANGE, alpha=0.15, linewidth=0)
        axes.axhline(100 * prompt["accuracy"], color=ORANGE, label="prompt, no labels")
    (_curves if several else _bars)(axes, rows)
    axes.set_title(in_short(title, 70))
    save(figure, path)


def plot_prompts(rows: list[dict], baselines: list[dict], title: str, path: Path) -> None:
    """Rows of calibration.compare_prompts: a line for each template, a dot for each calibration.

    Of rows with several numbers of demonstrations, those with the most. `baselines` are vertical
    lines.
    """
    shots = max(row["shots"] for row in rows)
    rows = [row for row in rows if row["shots"] == shots]
    templates = list(dict.fromkeys(row["template"] for row in rows))
    figure, axes = plt.subplots(figsize=(8, min(50, 1.8 + 0.36 * len(templates))))
    for k, (name, colour) in enumerate(_colours(row["calibration"] for row in rows).items()):
        chosen = [row for row in rows if row["calibration"] == name]
        y = [templates.index(row["template"]) + 0.15 * (k - 1.5) for row in chosen]
        x, errors = _with_errors(chosen)
        style = {"fmt": "o", "markersize": 5, "elinewidth": 1, "color": colour}
        axes.errorbar(x, y, xerr=errors, label=name, **style)
    for k, row in enumerate(sorted(baselines, key=lambda row: row["accuracy"])):
        side = "left" if k else "right"  # names on two sides do not overlap
        axes.axvline(100 * row["accuracy"], color=GREY, linestyle=":", linewidth=1)
        name = f" {in_short(row['method'], 30)} "
        axes.text(100 * row["accuracy"], -1.05, name, ha=side, va="bottom", **SMALL)
    axes.set_yticks(range(len(templates)), [in_short(template, 45) for template in templates])
    axes.set(ylim=(len(templates) - 0.4, -1), xlabel=ACCURACY)
    axes.set_title(in_short(title, 60) + (f", {shots} shots" if shots else ""), pad=14)
    axes.legend(title="calibration", frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    save(figure, path)


def plot_attention(
    maps: dict[str, np.ndarray], tokens: list[str], offsets: list[list[int]], title: str, path: Path
) -> None:
    """Attention weights, a square for each layer (row) and head; darker is more.

    `maps` are (layers, heads, n, n) by name, drawn side by side: in a square each of the n tokens
    has a row, which says how much it takes of each token. `offsets` has a list for each of the
    first layers: where the neighbour stands that a head starts with. Those heads are marked, with
    the mean weight of that neighbour.
    """
    layers, heads = next(iter(maps.values())).shape[:2]
    side = max(0.75, min(1.3, 16 / (heads * len(maps))))  # inches
    figure = plt.figure(figsize=(side * heads * len(maps) + 2.5, side * layers + 2))
    marked = "\norange: a head that starts with the neighbour at this offset, and the weight of it"
    figure.suptitle(in_short(title, 90) + marked * bool(offsets), x=0.01, ha="left")
    shown = [in_short(token, 12) for token in tokens] if len(tokens) <= 40 else []
    small = {"fontsize": 7, "pad": 2}
    parts = figure.subfigures(1, len(maps), squeeze=False)[0]
    for part, (name, weights) in zip(parts, maps.items(), strict=True):
        part.suptitle(name, fontsize=10)
        grid = part.subplots(layers, heads, sharex=True, sharey=True, squeeze=False)
        for layer, head in np.ndindex(layers, heads):
            axes, square = grid[layer, head], weights[layer, head]
            axes.imshow(square, cmap="Blues", norm=PowerNorm(0.5, 0, 1), aspect="auto")
            axes.spines[:].set_visible(True)
            axes.tick_params(length=0, labelsize=min(7, 60 * side / len(tokens)))
            axes.tick_params("x", rotation=90)
            if layer == 0:
                axes.set_title(f"head {head + 1}", loc="center", color=GREY, **small)
            if head == 0:
                axes.set_ylabel(f"layer {layer + 1}", **SMALL)
            if layer < len(offsets) and abs(offset := offsets[layer][head]) < len(tokens):
                share = square.diagonal(offset).mean()
                axes.set_title(f"{offset:+d}: {share:.0%}", color=ORANGE, **small)
                axes.spines[:].set(color=ORANGE, linewidth=1.5)
        grid[0, 0].set(xticks=range(len(shown)), xticklabels=shown)
        grid[0, 0].set(yticks=range(len(shown)), yticklabels=shown)
    save(figure, path)


def in_short(text: str, width: int) -> str:
    """The text in one line of at most `width` characters; a longer one loses its middle."""
    text = "".join(c if c.isprintable() else " " for c in text)
    half = (width - 1) // 2
    return text if len(text) <= width else f"{text[:half]}…{text[-half:]}"


def _colours(names: Iterable[str]) -> dict[str, str]:
    """A colour for each name, in order; one that is not in COLOURS gets a spare colour."""
    spare = iter(plt.cm.Dark2.colors * 100)
    return {name: COLOURS.get(name) or next(spare) for name in dict.fromkeys(names)}


def _with_errors(rows: list[dict]) -> tuple[np.ndarray, np.ndarray]:
    """Accuracies in percent (N,), and how far their intervals reach below and above (2, N)."""
    accuracy = 100 * np.array([row["accuracy"] for row in rows])
    low, high = 100 * np.array([row["interval"] for row in rows]).T
    return accuracy, np.stack([accuracy - low, high - accuracy]).clip(min=0)


def _bars(axes: plt.Axes, rows: list[dict]) -> None:
    """Accuracy of each method with its interval, and what it cost."""
    colours = _colours(row["method"] for row in rows)
    x, errors = _with_errors(rows)
    axes.barh(range(len(rows)), x, xerr=errors, color=list(colours.values()), ecolor="black")
    for y, row in enumerate(rows):
        words = [f"{row['accuracy']:.1%}"]
        if "saved_bytes" in row:
            share = row["trainable_params"] / row["total_params"]
            words += [f"trains {in_percent(share)}", f"saves {in_bytes(row['saved_bytes'])}"]
        if "train_seconds" in row:
            words.append(in_seconds(row["train_seconds"]))
        axes.text(102, y, "   ".join(words), va="center", fontsize=9)
    axes.set_yticks(range(len(rows)), [in_short(name, 30) for name in colours])
    axes.set(xlim=(0, 100), xlabel=ACCURACY)


def _against_parameters(axes: plt.Axes, rows: list[dict]) -> None:
    """Accuracy against the number of trained parameters, with its interval."""
    colours = _colours(row["method"] for row in rows)
    networks = [row for row in rows if row.get("trainable_params")]
    for k, row in enumerate(sorted(networks, key=lambda row: row["trainable_params"])):
        x, name = row["trainable_params"], in_short(row["method"], 30)
        y, errors = _with_errors([row])
        style = {"fmt": "o", "markersize": 6, "capsize": 2, "color": colours[row["method"]]}
        axes.errorbar([x], y, yerr=errors, **style)
        # Above and below in turn: the names of neighbours stay apart.
        end, offset, side = (y + errors[1], 3, "bottom") if k % 2 else (y - errors[0], -3, "top")
        place = {"xytext": (0, offset), "textcoords": "offset points", "ha": "center", "va": side}
        axes.annotate(name, (x, end[0]), fontsize=9, **place)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
    axes.margins(0.15)
    axes.set(xlabel="trained parameters", ylabel="test accuracy (%)")


def _curves(axes: plt.Axes, rows: list[dict]) -> None:
    """Accuracy against the number of labels, with its interval."""
    counts = sorted({row["train_examples"] for row in rows})
    none = min(filter(None, counts)) / 4  # where no labels stand on the logarithmic axis
    for k, (method, colour) in enumerate(_colours(row["method"] for row in rows).items()):
        chosen = [row for row in rows if row["method"] == method]
        # Side by side: otherwise one error bar would hide another.
        x = [(row["train_examples"] or none) * 1.02**k for row in chosen]
        y, errors = _with_errors(chosen)
        style = {"fmt": "o-", "markersize": 4, "capsize": 2, "color": colour}
        axes.errorbar(x, y, yerr=errors, label=in_short(method, 30), **style)
    axes.set_xscale("log", base=4)
    axes.set_xticks([count or none for count in counts], [f"{count:,}" for count in counts])
    axes.minorticks_off()
    axes.set(xlabel="labelled reviews to train on", ylabel=ACCURACY)
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
