"""The pictures that runs leave behind."""

import io
from pathlib import Path

import matplotlib

from minitune.support.results import in_bytes
from minitune.support.runs import write_atomically

matplotlib.use("Agg")  # a file, no window
import matplotlib.pyplot as plt  # noqa: E402

plt.rcParams.update(
    {"axes.titlelocation": "left", "axes.spines.top": False, "axes.spines.right": False}
)


def save(figure: plt.Figure, path: Path) -> None:
    """Write the picture, whole or not at all."""
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=150)
    plt.close(figure)
    write_atomically(path, content.getvalue())


def plot_pretraining(
    log: list[dict], uniform: float, unigram: float, final: dict, path: Path
) -> None:
    """Loss over time beside what it should be compared with, and the plateau marked.

    `log` holds the lines of log.jsonl, `uniform` is ln(vocabulary), `unigram` the entropy of the
    words' frequencies, both in nats; `final` the metrics of the whole validation set.
    """
    minutes = [entry["seconds"] / 60 for entry in log]
    losses = [entry["loss"] for entry in log]
    evaluated = [entry for entry in log if "validation" in entry]
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    axes.plot(minutes, losses, color="#9ecae1", linewidth=0.8, label="training, one batch")
    points = [(e["seconds"] / 60, e["validation"]["loss"]) for e in evaluated]
    points.append((minutes[-1], final["loss"]))
    axes.plot(*zip(*points, strict=True), "o-", color="#08519c", markersize=4, label="validation")
    axes.axhline(uniform, color="#636363", linestyle=":")
    axes.axhline(unigram, color="#636363", linestyle="--")
    right = axes.get_xlim()[1]
    labels = {"va": "bottom", "ha": "right", "fontsize": 9, "color": "#636363"}
    axes.text(right, uniform, f"every word equally likely: ln V = {uniform:.2f}", **labels)
    axes.text(right, unigram, f"words by their frequency alone: {unigram:.2f}", **labels)

    start, stop = plateau(minutes, losses, unigram)
    if stop > start:
        axes.axvspan(start, stop, color="#fdd0a2", alpha=0.5, linewidth=0)
        note = "the plateau:\ncontext is not\nused yet"
        axes.text((start + stop) / 2, min(losses), note, ha="center", va="bottom", fontsize=9)
    axes.annotate(
        f"{final['loss']:.2f}",
        points[-1],
        xytext=(-2, -14),
        textcoords="offset points",
        ha="right",
        color="#08519c",
    )
    axes.set(xlabel="minutes of training", ylabel="masked-LM loss (nats a token)")
    axes.set_title("Learning to fill blanks")
    between = (right, (uniform + unigram) / 2)
    axes.legend(
        loc="center right", bbox_to_anchor=between, bbox_transform=axes.transData, frameon=False
    )
    save(figure, path)


def plateau(minutes: list[float], losses: list[float], unigram: float) -> tuple[float, float]:
    """When a smoothed loss came within 0.1 above, and then fell to 0.6 below, the unigram entropy."""
    smooth, inside = losses[0], []
    for minute, loss in zip(minutes, losses, strict=True):
        smooth += 0.2 * (loss - smooth)
        if unigram - 0.6 < smooth < unigram + 0.1:
            inside.append(minute)
    return (inside[0], inside[-1]) if inside else (0.0, 0.0)


COLOURS = {"majority": "#bdbdbd", "nb-svm": "#969696", "scratch": "#fdae6b", "feature": "#9ecae1",
           "adapter": "#3182bd", "full": "#08306b"}  # fmt: skip


def plot_comparison(rows: list[dict], title: str, path: Path) -> None:
    """The rows of comparison.summarise: bars for one number of training rows, curves for several."""
    counts = sorted({row["train_examples"] for row in rows})
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    if len(counts) > 1:
        _label_curves(axes, rows, counts)
    else:
        _bars(axes, rows)
    axes.set_title(title)
    save(figure, path)


CALIBRATED = {"none": "#bdbdbd", "contextual": "#9ecae1", "pmi": "#fdae6b", "prior": "#08306b"}


def plot_prompts(rows: list[dict], baselines: list[dict], title: str, path: Path) -> None:
    """The rows of prompt_comparison.compare_prompts: a line for each template, a dot for each calibration.

    `baselines`: rows of baselines.evaluate_baselines, drawn as lines across.
    """
    shots = max(row["shots"] for row in rows)
    rows = [row for row in rows if row["shots"] == shots]
    templates = list(dict.fromkeys(row["template"] for row in rows))
    figure, axes = plt.subplots(figsize=(8, 1.8 + 0.36 * len(templates)), layout="constrained")
    for k, (name, colour) in enumerate(CALIBRATED.items()):
        own = [row for row in rows if row["calibration"] == name]
        y = [templates.index(row["template"]) + 0.15 * (k - 1.5) for row in own]
        x = [100 * row["accuracy"] for row in own]
        errors = [[100 * abs(row["accuracy"] - edge) for row, edge in zip(own, edges, strict=True)]
                  for edges in zip(*(row["interval"] for row in own), strict=True)]  # fmt: skip
        axes.errorbar(
            x, y, xerr=errors, fmt="o", markersize=5, elinewidth=1, color=colour, label=name
        )
    for row in baselines:
        x, words = 100 * row["accuracy"], row["method"]
        axes.axvline(x, color="#636363", linestyle=":", linewidth=1)
        axes.text(x, -0.9, words, ha="center", va="bottom", fontsize=9, color="#636363")
    axes.set_yticks(range(len(templates)), templates, parse_math=False)
    axes.set_ylim(len(templates) - 0.4, -1)
    axes.set_xlabel("test accuracy (%), with its 95% interval")
    axes.set_title(title + (f", {shots} shots" if shots else ""), pad=14)
    axes.legend(title="calibration", frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    save(figure, path)


def plot_when_labels_pay(curves: list[dict], prompted: dict, title: str, path: Path) -> None:
    """Accuracy against labels (rows of comparison.summarise), and that of a prompt, which needs none."""
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    _label_curves(axes, curves, sorted({row["train_examples"] for row in curves}))
    axes.axhspan(
        *(100 * edge for edge in prompted["interval"]), color="#e6550d", alpha=0.15, linewidth=0
    )
    axes.axhline(100 * prompted["accuracy"], color="#e6550d", label="prompt, no labels")
    axes.legend(
        frameon=False, loc="lower right", bbox_to_anchor=(1, 0.08)
    )  # below the prompt's interval
    axes.set_title(title)
    save(figure, path)


def _bars(axes: plt.Axes, rows: list[dict]) -> None:
    """Accuracy of each method with its interval, and what it cost."""
    for y, row in enumerate(rows):
        accuracy, (low, high) = 100 * row["accuracy"], row["interval"]
        error = [[accuracy - 100 * low], [100 * high - accuracy]]
        axes.barh(y, accuracy, color=COLOURS[row["method"]], xerr=error, error_kw={"elinewidth": 1})
        cost = ""
        if "saved_bytes" in row:
            share, saved = (
                row["trainable_params"] / row["total_params"],
                in_bytes(row["saved_bytes"]),
            )
            cost = f"   trains {share:.1%}, saves {saved}, {_time(row['train_seconds'])}"
        elif "train_seconds" in row:
            cost = f"   {_time(row['train_seconds'])}"
        axes.text(100 * high + 0.5, y, f"{accuracy:.1f}%{cost}", va="center", fontsize=9)
    axes.set_yticks(range(len(rows)), [row["method"] for row in rows])
    axes.set(
        xlim=(min(45, 100 * min(row["accuracy"] for row in rows) - 5), 135),
        xticks=range(50, 101, 10),
    )
    axes.set_xlabel("test accuracy (%), with its 95% interval")


def _label_curves(axes: plt.Axes, rows: list[dict], counts: list[int]) -> None:
    """Accuracy against the number of labels; bars show the spread between seeds."""
    for method in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == method]
        x = [row["train_examples"] for row in own]
        y = [100 * row["accuracy"] for row in own]
        spread = [100 * (row["spread"] or 0) for row in own]
        axes.errorbar(
            x,
            y,
            yerr=spread,
            marker="o",
            markersize=4,
            capsize=2,
            color=COLOURS[method],
            label=method,
        )
    axes.set_xscale("log", base=4)
    axes.set_xticks(counts, [f"{count:,}" for count in counts])
    axes.set(xlabel="labelled reviews to train on", ylabel="test accuracy (%)")
    axes.legend(frameon=False)


def _time(seconds: float) -> str:
    return f"{seconds / 60:.1f} min" if seconds >= 90 else f"{seconds:.0f} s"
