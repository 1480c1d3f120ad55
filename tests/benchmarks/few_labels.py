"""Accuracy against the number of labels, a curve a method, each the mean of several draws of rows.

    python finetune.py --method prompt feature --train-examples 16 64 256 1000 --seeds 5 --out runs/few
    python finetune.py --method prompt --unlabelled --train-examples 0 64 --seeds 5 --out runs/self
    python -m tests.benchmarks.few_labels --runs runs/few runs/self --plot few.png
    python -m tests.benchmarks.few_labels --contrastive runs/few/contrastive.jsonl --labels 16 64

The first two lines train (finetune.py --resume goes on after a kill). The third collects what
these runs measured into one table and one picture. The last one adds a method to compare with, a
line of JSON a training: it goes on after the last line that is there.

Contrastive features (Tunstall et al. 2022, "Efficient Few-Shot Learning Without Prompts", SetFit):
N texts make N^2 pairs. The encoder learns to give two texts of one label vectors of one direction,
and two of different labels vectors at right angles; a logistic regression learns from the vectors.
"""

import argparse
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import mean, stdev

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from minitune.attention import resolve_backend
from minitune.batching import reading_tokens, sorted_batches
from minitune.checkpoint import load_for_classification, load_tokenizer, read_config
from minitune.classification import Examples, TokenizedTexts
from minitune.data import Dataset, Reviews
from minitune.methods import for_all_parameters
from minitune.model import Bert, mean_of_tokens
from minitune.optimizer import Optimizer, one_cycle
from minitune.support.model_names import find_model
from minitune.support.plots import COLOURS, GREY, plt, save
from minitune.support.results import TOGETHER
from minitune.support.runtime import Runtime

STEPS, TEXTS = 60, 16  # of contrastive training: steps, and texts in each, all pairs of which count
UNLABELLED, CONTRASTIVE = " + unlabelled", "#8c510a"  # behind a method's name; a colour
NO_TRAINING = {"method": "prompt", "train_examples": 0}
NO_LABELS = 4  # where on the logarithmic axis the accuracy without labels stands


def vectors(bert: Bert, inputs: TokenizedTexts) -> Tensor:
    """(B, C), each of length 1: the mean over the tokens of a text."""
    batch = inputs.pack()
    return F.normalize(mean_of_tokens(bert(batch), batch))


def train_encoder(bert: Bert, examples: Examples, seed: int) -> None:
    """All pairs of a batch: cosine 1 where the labels are the same, else 0."""
    draw = np.random.default_rng(seed)
    rate = for_all_parameters(bert.config.hidden_size) / 3
    optimizer = Optimizer(bert, "adamw", rate, rate, weight_decay=0.01)
    for step in range(STEPS):
        size = min(TEXTS, len(examples))
        batch = examples.select(draw.choice(len(examples), size, replace=False))
        x = vectors(bert, batch.inputs)
        same = (batch.labels[:, None] == batch.labels).float()
        ((x @ x.T - same) ** 2).mean().backward()
        optimizer.set_rate(one_cycle(step, STEPS, 0.1))
        for part in optimizer.parts:
            part.step()
        optimizer.zero_grad()


def logistic_regression(x: Tensor, labels: Tensor, count: int) -> torch.nn.Linear:
    """Of vectors (N, C) and labels (N,), with the weight decay that scikit-learn has by default."""
    head = torch.nn.Linear(x.size(1), count)
    torch.nn.init.zeros_(head.weight)
    search = torch.optim.LBFGS(head.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        search.zero_grad()
        value = F.cross_entropy(head(x), labels, reduction="sum") + head.weight.square().sum() / 2
        value.backward()
        return value

    search.step(loss)
    return head


@torch.no_grad()
def read(bert: Bert, inputs: TokenizedTexts) -> Tensor:
    """The vectors (N, C) of all texts."""
    found = torch.empty(len(inputs.lengths), bert.config.hidden_size)
    for rows in sorted_batches(inputs.lengths, reading_tokens(found.device)):
        found[torch.from_numpy(rows)] = vectors(bert, inputs.select(rows))
    return found


def contrastive(args: argparse.Namespace) -> None:
    """A line for each number of labels and draw that is not there yet."""
    done = []
    if args.contrastive.is_file():
        done = [json.loads(line) for line in args.contrastive.read_text().splitlines()]
    source, runtime = find_model(args.model), Runtime.start("cpu", "fp32")
    config = read_config(source)
    backend = resolve_backend("auto", runtime.device, runtime.dtype, config.head_size)
    reviews, examples = Reviews.load(Dataset(args.data)), {}
    for split in ("train", "test"):
        tokenizer = load_tokenizer(source, config)
        inputs = TokenizedTexts(reviews.texts[split], tokenizer, args.max_len)
        examples[split] = Examples(inputs, reviews.labels[split])
    for labels in args.labels:
        for seed in range(args.draws):
            row = {"method": "contrastive", "train_examples": labels, "seed": seed}
            if any(row.items() <= other.items() for other in done):
                continue
            started = time.monotonic()
            bert = load_for_classification(source, reviews.names, backend, "mean")[0].bert
            few = examples["train"].select(reviews.balanced_subset("train", labels, seed))
            train_encoder(bert, few, seed)
            head = logistic_regression(read(bert, few.inputs), few.labels, len(reviews.names))
            seconds = time.monotonic() - started
            answers = head(read(bert, examples["test"].inputs)).argmax(1)
            row["accuracy"] = (answers == examples["test"].labels).double().mean().item()
            row["train_seconds"] = round(seconds, 1)
            with args.contrastive.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(row, flush=True)


def measured(paths: list[Path]) -> Iterator[dict]:
    """The runs under these directories: method, train_examples, seed, accuracy, train_seconds.

    The method has "+ unlabelled" behind it where the run learned from unlabelled reviews too.
    """
    for path in paths:
        for file in sorted(path.rglob("*.jsonl")):
            rows = [json.loads(line) for line in file.read_text().splitlines()]
            yield from (row for row in rows if "accuracy" in row)
        for file in sorted(path.rglob("prompts.json")):  # of prompt.py --evaluate
            rows = json.loads(file.read_text())["rows"]
            found = {"template": TOGETHER, "calibration": "prior", "shots": 0}
            yield from (row | NO_TRAINING for row in rows if found.items() <= row.items())
        for file in sorted(path.rglob("metrics.json")):  # of finetune.py
            run = json.loads(file.read_text())
            suffix = UNLABELLED if run["unlabelled"] else ""
            yield run | {"method": run["method"] + suffix}
        for file in sorted(path.rglob("compare.json")):
            yield from (run for run in json.loads(file.read_text())["runs"] if "trained" not in run)


def curves(runs: list[dict]) -> dict[str, dict[int, list[float]]]:
    """method -> number of labels -> the accuracy of each draw."""
    found: dict[str, dict[int, list[float]]] = {}
    # Two commands that draw the same rows measure the same baseline.
    different = {(run["method"], run["train_examples"], run.get("seed")): run for run in runs}
    for method, count, seed in sorted(different, key=lambda key: key[1]):
        if method != "majority":
            of_count = found.setdefault(method, {}).setdefault(count, [])
            of_count.append(different[method, count, seed]["accuracy"])
    return found


def labels_for(accuracy: float, curve: dict[int, list[float]]) -> float | None:
    """How many labels a method needs for an accuracy, by straight lines over log(labels); or None.

    Le Scao & Rush 2021, "How Many Data Points is a Prompt Worth?".
    """
    points = [(math.log(n), mean(values)) for n, values in curve.items() if n]
    for (x, low), (right, high) in zip(points, points[1:], strict=False):
        if low <= accuracy <= high:
            share = (accuracy - low) / (high - low) if high > low else 0.0
            return math.exp(x + share * (right - x))
    return None


def table(found: dict[str, dict[int, list[float]]]) -> str:
    """A Markdown table: mean and standard deviation over the draws."""
    counts = sorted({n for curve in found.values() for n in curve})
    lines = ["| method | " + " | ".join(f"{n:,}" for n in counts) + " |"]
    lines += ["| --- " * (len(counts) + 1) + "|"]
    for method, curve in found.items():
        cells = []
        for values in (curve.get(n, []) for n in counts):
            spread = f" ± {100 * stdev(values):.1f}" if len(values) > 1 else ""
            cells.append(f"{100 * mean(values):.1f}{spread}" if values else "")
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(
    found: dict[str, dict[int, list[float]]], title: str, pair: tuple[str, str], path: Path
) -> None:
    """A curve a method with a band of one standard deviation; the distance between a pair drawn."""
    figure, axes = plt.subplots(figsize=(8, 4.8))
    for method, curve in found.items():
        x = [n or NO_LABELS for n in curve]
        y = np.array([100 * mean(values) for values in curve.values()])
        band = [100 * stdev(v) if len(v) > 1 else 0.0 for v in curve.values()]
        colour = COLOURS.get(method.removesuffix(UNLABELLED), CONTRASTIVE)
        style = {"linestyle": "--" if method.endswith(UNLABELLED) else "-", "color": colour}
        axes.plot(x, y, marker="o", markersize=4, label=method, **style)
        axes.fill_between(x, y - band, y + band, color=colour, alpha=0.15, linewidth=0)
    method, head = pair
    for few, values in found.get(method, {}).items():
        if many := labels_for(mean(values), found.get(head, {})):
            x, y = few or NO_LABELS, 100 * mean(values)
            style = {"arrowstyle": "<->", "color": GREY, "shrinkA": 4, "shrinkB": 0}
            axes.annotate("", (many, y), (x, y), arrowprops=style)
            words = f"the {method} is worth {many - few:,.0f} labels of {head}"
            middle = math.sqrt(many * x)
            axes.text(middle, y + 0.3, words, ha="center", va="bottom", fontsize=9, color=GREY)
            break
    counts = sorted({n for curve in found.values() for n in curve})
    axes.set_xscale("log")
    axes.set_xticks([n or NO_LABELS for n in counts], [f"{n:,}" for n in counts])
    axes.minorticks_off()
    axes.set(xlabel="labelled reviews", ylabel="test accuracy (%), mean and deviation of the draws")
    axes.set_title(title)
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    save(figure, path)


def main() -> None:
    """Train contrastive features, or collect what was measured."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--contrastive", type=Path, metavar="FILE.jsonl")
    parser.add_argument("--model", default="runs/pretrain")
    parser.add_argument("--data", default="imdb")
    parser.add_argument("--labels", nargs="+", type=int, default=[16, 64, 256, 1000])
    parser.add_argument("--draws", type=int, default=5)
    parser.add_argument("--max-len", type=int, default=256)
    parser.add_argument("--runs", nargs="+", type=Path, default=[], metavar="DIR")
    parser.add_argument("--title", default="Few labels")
    parser.add_argument("--pair", nargs=2, default=["prompt", "feature"])
    parser.add_argument("--plot", type=Path, metavar="FILE.png")
    args = parser.parse_args()
    if args.contrastive:
        contrastive(args)
    found = curves(list(measured(args.runs)))
    if found:
        print(table(found))
    if args.plot:
        plot(found, args.title, args.pair, args.plot)


if __name__ == "__main__":
    main()
