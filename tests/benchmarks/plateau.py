"""The plateau of a BERT that is trained from scratch, from four starts. Takes about 4 · MINUTES.

    python -m tests.benchmarks.plateau [--minutes 3] [--out runs/plateau]

Trains the preset `tiny` on the same IMDb batches, each way for the same time, and draws the losses.
All start with the log-frequency bias of the decoder.

    adamw        BERT's initial weights; AdamW for all of them
    muon         the same weights; Muon for the hidden matrices
    sinusoids    Muon, and positions that start as small sinusoids
    neighbours   Muon, and heads that start by attending to the words next to each word, as train.py
"""

import argparse
import copy
import json
import time
from dataclasses import replace
from pathlib import Path

import torch

from minitune.corpus import Corpus
from minitune.data import Dataset
from minitune.initialization import (
    start_with_frequencies,
    start_with_neighbours,
    start_with_sinusoids,
)
from minitune.model import PRESETS, BertForMaskedLM
from minitune.optimizer import Optimizer
from minitune.pretraining import MaskedLanguageModelling
from minitune.support.plots import plt, save
from minitune.support.runtime import Runtime

WAYS = {
    "adamw": "AdamW, random weights",
    "muon": "Muon, random weights",
    "sinusoids": "Muon, sinusoid positions",
    "neighbours": "Muon, heads that start with the neighbours",
}


def prepare(model: BertForMaskedLM, way: str) -> None:
    """Give a randomly initialised model the initial weights of this way."""
    if way == "sinusoids":
        start_with_sinusoids(model.bert.embeddings.position, scale=0.02)
    if way == "neighbours":
        start_with_neighbours(model.bert)


def main() -> None:
    """Train each way, and draw."""
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    options.add_argument("--minutes", type=float, default=3)
    options.add_argument("--out", type=Path, default=Path("runs/plateau"))
    args = options.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    runtime = Runtime.start("cpu")
    corpus = Corpus.open(Dataset("imdb"), None, 8192)
    task = MaskedLanguageModelling(
        corpus, max_len=128, batch_tokens=4096, rate=0.15, whole_word=False, seed=0
    )
    torch.manual_seed(0)
    config = replace(PRESETS["tiny"], vocab_size=corpus.tokenizer.vocab_size)
    random = BertForMaskedLM(config)
    start_with_frequencies(random.head, torch.from_numpy(corpus.unigrams))

    curves = {}
    for way in WAYS:
        model = copy.deepcopy(random)
        prepare(model, way)
        name, lr = ("adamw", 1e-3) if way == "adamw" else ("muon", 0.01)
        optimizer = Optimizer(model, name, lr, adamw_lr=1e-3, weight_decay=0.01)
        curve, started = [], time.monotonic()
        for step, batch in enumerate(task.batches(0)):
            if time.monotonic() - started > 60 * args.minutes:
                break
            with runtime.autocast():
                loss, reported = task.loss(model, *batch.to(runtime.device))
            (loss / len(batch)).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.set_rate(min(1.0, (step + 1) / 50))
            for part in optimizer.parts:
                part.step()
            optimizer.zero_grad()
            minutes = (time.monotonic() - started) / 60
            curve.append((round(minutes, 4), round(reported.item() / len(batch), 4)))
        curves[way] = curve
        last = [loss for _, loss in curve[-20:]]
        print(f"{WAYS[way]}: {len(curve)} steps, loss {sum(last) / len(last):.2f}", flush=True)
    (args.out / "curves.json").write_text(json.dumps(curves))
    draw(curves, corpus.unigram_entropy(), args.out / "plateau.png")
    print(f"wrote {args.out}/plateau.png")


def draw(curves: dict, unigram: float, path: Path) -> None:
    """Smoothed losses over minutes."""
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    colors = "#969696", "#fd8d3c", "#6baed6", "#08519c"
    for (way, curve), color in zip(curves.items(), colors, strict=True):
        smooth, points = curve[0][1], []
        for minute, loss in curve:
            smooth += 0.08 * (loss - smooth)
            points.append((minute, smooth))
        axes.plot(*zip(*points, strict=True), color=color, label=WAYS[way])
    axes.axhline(unigram, color="#636363", linestyle="--", linewidth=1)
    note, style = (
        f"words by their frequency alone: {unigram:.2f}",
        {"fontsize": 9, "color": "#636363"},
    )
    axes.text(axes.get_xlim()[1], unigram, note, va="bottom", ha="right", **style)
    axes.set(xlabel="minutes on two CPU cores", ylabel="masked-LM loss (nats a token)")
    axes.set_title("The plateau, and the way out of it", loc="left")
    axes.legend(frameon=False, loc="lower left")
    axes.spines[["top", "right"]].set_visible(False)
    save(figure, path)


if __name__ == "__main__":
    main()
