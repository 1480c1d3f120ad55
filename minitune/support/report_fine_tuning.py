"""What the report of a fine-tuning shows: right and wrong, how sure, the worst mistakes."""

import math
from pathlib import Path

import numpy as np

from minitune.support.errors import plural
from minitune.support.markup import (
    Chart,
    Html,
    cell,
    details,
    facts,
    quiet,
    section,
    smoothed,
    table,
    tag,
    together,
)
from minitune.support.plots import in_short
from minitune.support.results import (
    calibration_bins,
    expected_calibration_error,
    in_percent,
    in_seconds,
    interval,
    mcnemar,
)
from minitune.support.runs import read_if_there, write_json

MISTAKES, LONGEST = 20, 600  # how many are shown, and characters of each
MOST_COLUMNS = 12  # labels of a whole confusion table


def record_mistakes(directory: Path, texts: list[str], baselines: list[tuple]) -> None:
    """Write report.json: the test rows that were got most wrong, and what the baselines say.

    `texts` are those of the test rows, `baselines` what baselines.answer_test_rows gives.
    """
    keys = ("method", "accuracy", "macro_f1")
    rows = [row for row, _ in baselines]
    if bag := read_if_there(directory / "bag.json"):
        rows.append(bag["figures"])
    rows = [{key: row[key] for key in keys} for row in rows]
    shown = {"baselines": rows, "mistakes": []}
    if answers := read_if_there(directory / "answers.json"):
        logits, labels = (np.array(answers["test"][key]) for key in ("logits", "labels"))
        right = probabilities(logits, 1.0)[np.arange(len(labels)), labels]
        is_right = logits.argmax(1) == labels
        if baselines:  # NB-SVM is the last of them
            paired = mcnemar(is_right.tolist(), (baselines[-1][1] == labels).tolist())
            shown["paired"] = dict(zip(("network", "bag_of_words", "p"), paired, strict=True))
        wrong = np.flatnonzero(~is_right)
        for i in wrong[np.argsort(right[wrong], kind="stable")][:MISTAKES].tolist():
            row = {"row": i, "text": in_short(texts[i], LONGEST)}
            if baselines:
                row["bag_of_words"] = answers["names"][int(baselines[-1][1][i])]
            shown["mistakes"].append(row)
    write_json(directory / "report.json", shown)


def content(
    settings: dict, metrics: dict, log: list[dict], answers: dict, shown: dict
) -> tuple[str, Html]:
    """Title and content."""
    share = metrics["trainable_params"] / metrics["total_params"]
    pairs = [("test accuracy", f"{metrics['accuracy']:.1%}")]
    if answers:
        low, high = interval(metrics["accuracy"], len(answers["test"]["labels"]))
        pairs.append(("95% interval", f"{low:.1%} to {high:.1%}"))
        pairs.append(("macro F1", f"{metrics['macro_f1']:.3f}"))
    for row in shown.get("baselines", []):
        pairs.append((BASELINES.get(row["method"], row["method"]), f"{row['accuracy']:.1%}"))
    if weight := metrics.get("masked_words"):
        pairs.append(("second task", f"masked words, at first with a weight of {weight:g}"))
    pairs += [
        ("trained", f"{in_percent(share)} of {metrics['total_params']:,} parameters"),
        ("training rows", f"{metrics['train_examples']:,}"),
        ("training", in_seconds(metrics["train_seconds"])),
        ("device", f"{metrics['device']}, {metrics['precision']}"),
    ]
    what = f"Fine-tuning {metrics['model']} on {metrics['data']}"
    parts = [quiet(what), facts(pairs)]
    if answers:
        test = answers["test"]
        logits, labels = np.array(test["logits"]), np.array(test["labels"])
        names = [in_short(name, 40) for name in answers["names"]]
        scaled = probabilities(logits, answers["temperature"])
        parts.append(confusion(logits.argmax(1), labels, names))
        if "paired" in shown:
            parts.append(against_bag_of_words(**shown["paired"]))
        parts.append(reliability(logits, labels, answers))
        parts.append(unsure(scaled, labels))
        parts.append(mistakes(shown, scaled, labels, names))
    else:
        parts.append(quiet("The answers on the test rows were not recorded by this run."))
    parts.append(training(log, metrics))
    return f"Fine-tuning: {metrics['method']}", together(*parts)


BASELINES = {"majority": "most frequent label", "nb-svm": "bag of words (NB-SVM)"}


def probabilities(logits: np.ndarray, temperature: float) -> np.ndarray:
    """softmax(logits / temperature), (N, L)."""
    z = logits / temperature
    powers = np.exp(z - z.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)


def confusion(given: np.ndarray, labels: np.ndarray, names: list[str]) -> Html:
    """Which labels are taken for which."""
    count = len(names)
    counts = np.zeros((count, count), dtype=int)
    np.add.at(counts, (labels, given), 1)
    true, answered, right = counts.sum(1), counts.sum(0), counts.diagonal()
    each = [
        [names[k], f"{true[k]:,}", ratio(right[k], true[k]), ratio(right[k], answered[k]),
         f"{2 * right[k] / max(true[k] + answered[k], 1):.3f}"]
        for k in range(count)
    ]  # fmt: skip
    head = ["label", "rows", "recall", "precision", "F1"]
    by_label = table("Each label by itself", head, each)
    if count <= MOST_COLUMNS:
        rows = []
        for i, name in enumerate(names):
            shares = counts[i] / max(true[i], 1)
            cells = (
                cell(f"{counts[i, j]:,}", share=shares[j], class_=None if i == j else "wrong")
                for j in range(count)
            )
            rows.append([name, *cells])
        caption = "Test rows by their right label and the answer"
        content = table(caption, ["right label", *names], rows)
    else:
        wrong = counts * (1 - np.eye(count, dtype=int))
        order = np.argsort(-wrong, axis=None, kind="stable")[:MISTAKES]
        pairs = [divmod(int(k), count) for k in order if wrong.flat[k]]
        rows = [[names[i], names[j], f"{counts[i, j]:,}"] for i, j in pairs]
        content = table("The most frequent confusions", ["right label", "answer", "rows"], rows)
    return section("Right and wrong", content, by_label)


def against_bag_of_words(network: int, bag_of_words: int, p: float) -> Html:
    """A sentence on the rows that only one of both has right."""
    words = f"Right where the bag of words is wrong: {plural(network, 'row')}. Wrong where it is "
    words += f"right: {plural(bag_of_words, 'row')}. If both were equally good, chance alone would "
    words += f"make a difference as large with probability {p:.2g} (McNemar's test, exact)."
    return quiet(words)


def ratio(part: int, whole: int) -> str:
    """A share in percent."""
    return f"{part / whole:.1%}" if whole else "–"


def reliability(logits: np.ndarray, labels: np.ndarray, answers: dict) -> Html:
    """How often answers of a probability are right, before temperature scaling and after."""
    temperature = answers["temperature"]
    title = "How often answers of a probability are right. On the diagonal they are as often right "
    title += "as they say; below it they are too sure."
    chart = Chart(
        title,
        (0, 1),
        (0, 1),
        "probability of the answer",
        "share that is right",
        "{:.0%}",
        "{:.0%}",
    )
    chart.line([0, 1], [0, 1], "rule")
    rows, losses = [], []
    for name, t, kind in (("before", 1.0, "other"), ("after", temperature, "mine")):
        p = probabilities(logits, t)
        bins = calibration_bins(p, labels)
        xs, ys = [x for *_, x, _ in bins], [y for *_, y in bins]
        chart.line(xs, ys, kind)
        chart.dots(xs, ys, kind, f"{name}, temperature {t:.2f}")
        error = expected_calibration_error(p, labels)
        test, validation = (mean_loss(answers[split], t) for split in ("test", "validation"))
        losses.append((name, f"{t:.3f}", f"{error:.4f}", f"{test:.4f}", f"{validation:.4f}"))
        rows += [
            (f"{name}, from {low:.0%}", f"{n:,}", f"{x:.1%}", f"{y:.1%}") for low, n, x, y in bins
        ]
    words = "One number, the temperature, divides all logits, and is saved with the model. "
    if temperature == 1:
        words += "Here it is 1: no labelled rows could tell how sure the model may be. "
    else:
        words += f"It was fitted on the validation rows: {temperature:.3f}. "
    words += "Above 1 it makes answers less sure, below 1 surer; no label changes."
    head = ["", "temperature", "ECE, test", "loss, test", "loss, validation"]
    return section(
        "Can its probabilities be believed?",
        tag("p", words),
        chart.draw(),
        table(
            "ECE: how far probability and truth are apart, on average (Guo et al. 2017)",
            head,
            losses,
        ),
        details(
            "The figures",
            table(
                "Answers by their probability", ["", "answers", "mean probability", "right"], rows
            ),
        ),
    )


def mean_loss(rows: dict, temperature: float) -> float:
    """Of the rows of a split in answers.json at this temperature, in nats."""
    logits, labels = (np.array(rows[key]) for key in ("logits", "labels"))
    p = probabilities(logits, temperature)[np.arange(len(labels)), labels]
    return float(-np.log(np.maximum(p, 1e-300)).mean())


def unsure(p: np.ndarray, labels: np.ndarray) -> Html:
    """Accuracy on those test rows only of which the model is surest."""
    confidence = p.max(1)
    order = np.argsort(-confidence, kind="stable")
    right = (p.argmax(1) == labels)[order].cumsum() / np.arange(1, len(labels) + 1)
    first = max(1, len(labels) // 20)  # of fewer rows the accuracy says little
    xs = np.arange(first, len(labels) + 1) / len(labels)
    ys = right[first - 1 :]
    title = (
        f"Accuracy by the share of rows that are answered, the surest first: {right[-1]:.1%} of all"
    )
    low = max(0.0, math.floor(20 * ys.min() - 0.2) / 20)
    shape = (0, 1), (low, 1.02)
    chart = Chart(
        title, *shape, "share of the test rows that are answered", "accuracy", "{:.0%}", "{:.0%}"
    )
    chart.line(xs.tolist(), ys.tolist(), "mine")
    rows = []
    for share in (1.0, 0.9, 0.8, 0.7, 0.5, 0.25):
        n = max(1, round(share * len(labels)))
        rows.append(
            [f"{share:.0%}", f"{n:,}", f"{confidence[order[n - 1]]:.1%}", f"{right[n - 1]:.1%}"]
        )
    head = ["answered", "rows", "lowest probability", "accuracy"]
    return section(
        "If unsure reviews are left out",
        quiet("If a person reads the unsure reviews, the rest should be right more often."),
        chart.draw(),
        table("The surest rows alone", head, rows),
    )


def mistakes(shown: dict, p: np.ndarray, labels: np.ndarray, names: list[str]) -> Html:
    """The test rows with the lowest probabilities of the right label."""
    items = []
    for row in shown.get("mistakes", []):
        i = row["row"]
        answer = int(p[i].argmax())
        words = f"right: {names[labels[i]]}; answer: {names[answer]}, {p[i, answer]:.1%}"
        if opinion := row.get("bag_of_words"):
            words += f"; bag of words: {in_short(opinion, 40)}"
        items.append(tag("li", tag("blockquote", row["text"]), quiet(words)))
    if not items:
        return Html("")
    why = (
        "The test rows with the lowest probability of the right label. Some of them are hard, some "
    )
    why += "have a wrong label. NB-SVM, a bag of words, was trained on the same labelled rows."
    return section("Got most wrong", quiet(why), tag("ol", *items, class_="mistakes"))


def training(log: list[dict], metrics: dict) -> Html:
    """The loss by steps; of several trainings (--soup) one after another."""
    if len(log) < 2:
        return Html("")
    log = [
        entry for entry in log if entry.get("training", 1) == (metrics.get("best_training") or 1)
    ]
    steps, losses = [e["step"] for e in log], [e["loss"] for e in log]
    checked = [(e["step"], e["validation"]["loss"]) for e in log if "validation" in e]
    highest = max([1e-6, *losses, *(y for _, y in checked)])
    title = (
        f"Training loss over {steps[-1]:,} steps; validation loss {metrics['validation_loss']:.3f}"
    )
    chart = Chart(title, (0, steps[-1]), (0, 1.1 * highest), "steps", "nats a row", "{:,.0f}")
    chart.line(*smoothed(steps, losses), "reference", "training, smoothed")
    if checked:
        chart.line(*zip(*checked, strict=True), "mine")
        chart.dots(*zip(*checked, strict=True), "mine", "validation rows")
    rows = [(f"{step:,}", f"{loss:.4f}") for step, loss in checked]
    figures = details("The figures", table("Evaluations", ["step", "validation loss"], rows))
    return section("Training", chart.draw(), figures)
