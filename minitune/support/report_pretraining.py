"""What the report of a pretraining shows: its loss beside the reference run's, blanks, words."""

import math

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
from minitune.support.plots import plateau
from minitune.support.reference import NEAR, PLATEAU, REFERENCE, is_comparable, last_loss, until
from minitune.support.results import in_seconds
from minitune.support.runs import Run, read_json


def content(settings: dict, metrics: dict, log: list[dict], shown: dict) -> tuple[str, Html]:
    """Title and content."""
    start = settings["init"] or f"{settings['preset']}, from random weights"
    loss = metrics["loss"]
    known = facts(
        [
            ("validation loss", f"{loss:.2f} nats"),
            ("as unsure as among", f"{math.exp(loss):,.0f} words"),
            ("masked tokens guessed", f"{metrics['masked_accuracy']:.1%}"),
            ("trained on", f"{millions(metrics)} million tokens"),
            ("in", plural(metrics["steps"], "step")),
            ("training", in_seconds(metrics["train_seconds"])),
            ("device", f"{metrics['device']}, {metrics['precision']}"),
        ]
    )
    parts = [quiet(f"Pretraining on {settings['data']}"), known, curve(settings, metrics, log)]
    if shown:
        parts += [blanks(log, shown), nearest(shown)]
    else:
        parts.append(quiet("What the model wrote into blanks was not recorded by this run."))
    return f"Pretraining: {start}", together(*parts)


def curve(settings: dict, metrics: dict, log: list[dict]) -> Html:
    """The loss by tokens, beside that of the reference run."""
    reference, there = Run(REFERENCE).read_log(), read_json(REFERENCE / "metrics.json")
    uniform, unigram = metrics["uniform_loss"], metrics["unigram_loss"]
    tokens, losses = [e["tokens"] / 1e6 for e in log], [e["loss"] for e in log]
    last = metrics["tokens"] / 1e6
    checked = [(e["tokens"] / 1e6, e["validation"]["loss"]) for e in log if "validation" in e]
    every = [metrics["loss"], there["loss"], uniform, *losses, *(e["loss"] for e in reference)]
    title = (
        f"The loss ends at {metrics['loss']:.2f} nats, after {millions(metrics)} million tokens. "
    )
    title += f"Every word equally likely would be {uniform:.2f}, by frequency alone {unigram:.2f}."
    left = min([*tokens[:1], reference[0]["tokens"] / 1e6])
    axes = (left, max(last, there["tokens"] / 1e6)), (math.floor(min(every)), max(every) + 0.4)
    names = "million tokens, on a logarithmic axis", "loss: nats a token"
    chart = Chart(title, *axes, *names, log_x=True)
    span = plateau(tokens, losses, unigram)
    if span:
        chart.band(*span)
    chart.rule(uniform, f"every word equally likely: ln V = {uniform:.2f}")
    chart.rule(unigram, f"words by their frequency alone: {unigram:.2f}")
    xs, ys = [e["tokens"] / 1e6 for e in reference], [e["loss"] for e in reference]
    chart.line(*smoothed(xs, ys), "reference", "reference run, training, smoothed")
    chart.line(tokens, losses, "single", "this run, training")
    if checked:
        chart.line(*zip(*checked, strict=True), "mine")
        chart.dots(*zip(*checked, strict=True), "mine", "this run, part of the validation rows")
    chart.dots([last], [metrics["loss"]], "other", "at the end, all validation rows")
    rows = [(f"{x:.3g}", f"{y:.3f}", f"{math.exp(y):,.0f}") for x, y in checked]
    rows.append(("end, all rows", f"{metrics['loss']:.3f}", f"{math.exp(metrics['loss']):,.0f}"))
    head = "million tokens", "validation loss", "as unsure as among this many words"
    figures = details("The figures", table("Evaluations", head, rows))
    about = about_plateau(span, metrics["loss"], unigram)
    words = tag("p", verdict(settings, log, reference)), tag("p", about)
    return section("Is this loss normal?", *words, chart.draw(), figures)


def verdict(settings: dict, log: list[dict], reference: list[dict]) -> str:
    """The loss beside the reference run's after as many tokens."""
    if not is_comparable(settings) or not log:
        return (
            "The reference run had other data, another model or another mask rate (tiny, on imdb, "
            "30%), so its losses are no measure of this run. The two lines across are: below the "
            "lower one, the model uses the words around a blank."
        )
    before = until(log[-1]["tokens"], reference)
    mine, other = last_loss(log), last_loss(before)
    words = (
        f"In its last steps the training loss was {mine:.2f}. The reference run had {other:.2f} "
    )
    words += "after as many tokens. " if before[-1] is not reference[-1] else "at its end. "
    if mine <= other + NEAR:
        return words + "That is normal."
    return words + f"That is {mine - other:.2f} worse: see what differs from the default options."


def about_plateau(span: tuple[float, float] | None, loss: float, unigram: float) -> str:
    """Where the loss stood still, and whether it has left that."""
    words = "There is no plateau."
    if span:
        words = (
            f"The plateau, shaded, lasts from {span[0]:.3g} to {span[1]:.3g} million tokens: the "
        )
        words += "model knows how frequent words are and does not yet use the words around a blank."
    if loss > unigram - PLATEAU:
        return words + " The loss ends no better than by frequency alone: train for longer."
    return words + f" At the end the loss is {unigram - loss:.2f} below the unigram entropy."


def millions(entry: dict) -> str:
    """How many million tokens."""
    return f"{entry['tokens'] / 1e6:.3g}"


def blanks(log: list[dict], shown: dict) -> Html:
    """What the model wrote into the same blanks from evaluation to evaluation."""
    columns = [("start", shown["start"]["blanks"])]
    columns += [(millions(e), e["blanks"]) for e in log if "blanks" in e]
    columns.append(("end", shown["end"]["blanks"]))
    head = ["sentence", *(name for name, _ in columns)]
    best, several = [], []
    for i, sentence in enumerate(shown["sentences"]):
        words = [answers[i] for _, answers in columns]
        sentence = sentence.replace("[MASK]", "____")
        best.append([sentence, *(written(each[:1]) for each in words)])
        several.append([sentence, *(tag("td", *map(with_share, each)) for each in words)])
    caption = "The most probable word, and its probability, after this many million tokens"
    more = table("The most probable words", head, several)
    return section(
        "What was learned when",
        quiet(
            "At each evaluation of the training the model filled the same ten blanks. Look for the "
            "order: frequent words, then words that fit the grammar, then words that fit the sense."
        ),
        tag("div", table(caption, head, best), class_="words"),
        details("The three most probable words", tag("div", more, class_="words")),
    )


def written(words: list[list]) -> Html:
    """A cell with the first of these words, coloured by its probability."""
    for word, p in words:
        return cell(word, tag("small", f"{p:.0%}"), share=p)
    return cell("–")


def with_share(pair: list) -> Html:
    """A word and its probability."""
    return tag("div", f"{pair[0]} {pair[1]:.0%}")


def nearest(shown: dict) -> Html:
    """The words nearest to a few, before training and after."""
    parts = []
    for word, before in shown["start"]["nearest"].items():
        after = shown["end"]["nearest"][word]
        if not after:
            parts.append(quiet(f"“{word}” is not in the vocabulary."))
            continue
        lists = []
        for name, words in (("start", before), ("end", after)):
            rows = [[near, cell(f"{cosine:.2f}", share=max(0.0, cosine))] for near, cosine in words]
            lists.append(table(f"“{word}” at the {name}", ["word", "cosine"], rows))
        parts.append(tag("div", *lists, class_="pair"))
    why = "By the cosine of the word embeddings: words that stand in the same places become alike."
    return section("Nearest words", quiet(why), *parts)
