"""The pictures that runs leave behind."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # a file, no window
import matplotlib.pyplot as plt  # noqa: E402


def plot_pretraining(log: list[dict], uniform: float, unigram: float, final: dict, path: Path) -> None:
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
    axes.annotate(f"{final['loss']:.2f}", points[-1], xytext=(-2, -14), textcoords="offset points",
                  ha="right", color="#08519c")  # fmt: skip
    axes.set(xlabel="minutes of training", ylabel="masked-LM loss (nats a token)")
    axes.set_title("Learning to fill blanks", loc="left")
    axes.legend(loc="upper right", bbox_to_anchor=(1, 0.72), frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plateau(minutes: list[float], losses: list[float], unigram: float) -> tuple[float, float]:
    """When a smoothed loss came within 0.1 above, and then fell to 0.6 below, the unigram entropy."""
    smooth, inside = losses[0], []
    for minute, loss in zip(minutes, losses, strict=True):
        smooth += 0.2 * (loss - smooth)
        if unigram - 0.6 < smooth < unigram + 0.1:
            inside.append(minute)
    return (inside[0], inside[-1]) if inside else (0.0, 0.0)
