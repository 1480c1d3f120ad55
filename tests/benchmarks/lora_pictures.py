"""Accuracy of LoRA against its rank, and of LoRA and `full` against the learning rate.

    python -m tests.benchmarks.lora_pictures --model runs/pretrain --out runs/lora-pictures

Every point is a training by finetune.py with the rate and the rank below; all else is the method's
own. The accuracy is that of the validation rows, as for every choice. OUT/points.json has the
figures of each training that has ended, and such a training is not repeated: after a stop the same
command goes on. The picture is drawn when all is done.
"""

import argparse
import json
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from statistics import mean

import finetune
from minitune.support.plots import COLOURS, GREY, plt, save
from minitune.support.runs import read_json, write_json
from minitune.support.runtime import keep_freed_memory

RANKS, RATES = (1, 2, 4, 8, 16, 64), (3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
RANK, RATE = 8, 3e-3  # of LoRA, where the other one varies
KEPT = ("validation_accuracy", "validation_loss", "accuracy", "epochs", "steps", "train_seconds")
KEPT += ("trainable_params", "total_params", "device", "threads", "precision", "model", "data")


def trainings(seeds: int) -> list[dict]:
    """What tells each training from the others."""
    rows = [("lora", rank, RATE) for rank in RANKS] + [("full", None, lr) for lr in RATES[:5]]
    rows += [("lora", RANK, lr) for lr in RATES[2:] if lr != RATE]
    names = ("method", "rank", "lr", "seed")
    return [dict(zip(names, (*row, seed), strict=True)) for seed in range(seeds) for row in rows]


def train(words: list[str], method: str, rank: int | None, lr: float, seed: int) -> dict:
    """The figures of a training; `words` are options of finetune.py."""
    with tempfile.TemporaryDirectory() as folder:
        words = [*words, "--method", method, "--lr", str(lr), "--seed", str(seed), "--out", folder]
        sys.argv = ["finetune.py", *words, *(["--lora-rank", str(rank)] if rank else [])]
        finetune.main()
        metrics = read_json(Path(folder) / method / "metrics.json")
    return {key: metrics[key] for key in KEPT}


def plot(points: list[dict], title: str, path: Path) -> None:
    """Two panels with one scale of accuracy: ranks, and rates. A dot for each seed, and means."""
    figure, (by_rank, by_rate) = plt.subplots(1, 2, figsize=(9, 4), sharey=True)

    def draw(axes: plt.Axes, key: str, chosen: list[dict]) -> list[float]:
        accuracies = defaultdict(list)  # of each seed, in percent
        for point in chosen:
            accuracies[point[key]].append(100 * point["validation_accuracy"])
        means = [mean(accuracies[x]) for x in sorted(accuracies)]
        style = {"color": COLOURS[chosen[0]["method"]], "label": chosen[0]["method"]}
        axes.plot(sorted(accuracies), means, **style)
        dots = [(x, y) for x in accuracies for y in accuracies[x]]
        axes.plot(*zip(*dots, strict=True), "o", color=style["color"], markersize=4)
        return means

    lora = [point for point in points if point["method"] == "lora"]
    draw(by_rank, "rank", [point for point in lora if point["lr"] == RATE])
    draw(by_rate, "lr", [point for point in lora if point["rank"] == RANK])
    best = max(draw(by_rate, "lr", [point for point in points if point["method"] == "full"]))
    by_rank.axhline(best, color=COLOURS["full"], linestyle=":", label="full at its best rate")
    by_rank.set_xscale("log", base=2)
    by_rank.set_xticks(RANKS, [f"{rank}" for rank in RANKS])
    by_rate.set_xscale("log")
    by_rate.set_xticks(RATES, [f"{lr:.0e}".replace("e-0", "e-") for lr in RATES])
    by_rank.set(xlabel=f"rank of LoRA (learning rate {RATE:g})", ylabel="validation accuracy (%)")
    by_rate.set(xlabel=f"learning rate (LoRA of rank {RANK})")
    for axes in (by_rank, by_rate):
        axes.minorticks_off()
        axes.legend(frameon=False)
    figure.suptitle(title, fontsize=9, color=GREY)
    save(figure, path)


def main() -> None:
    """Train what is missing, and draw."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", default="rotten_tomatoes")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=1e6, help="train no more after that")
    parser.add_argument("--out", type=Path, required=True)
    args, words = parser.parse_known_args()  # `words` go to finetune.py
    words += ["--model", args.model, "--data", args.data]
    keep_freed_memory()
    args.out.mkdir(parents=True, exist_ok=True)
    file, started = args.out / "points.json", time.monotonic()
    points = read_json(file)["points"] if file.is_file() else []
    for training in trainings(args.seeds):
        if any(training.items() <= point.items() for point in points):
            continue
        if time.monotonic() - started > 60 * args.minutes:
            raise SystemExit("there is more to train: the same command goes on")
        points.append(training | train(words, **training))
        write_json(file, {"points": points})
        print(json.dumps(points[-1]), flush=True)
    title = "{model} on {data}, epochs: {epochs}; {device}, {precision}".format(**points[0])
    plot(points, title, args.out / "lora-pictures.png")


if __name__ == "__main__":
    main()
