"""What each step of a recipe was worth: a bar of test accuracy for each, from finished runs.

    python -m tests.benchmarks.recipe --plot recipe.png \\
        --step "from random weights" scratch runs/a/compare.json \\
        --step "pretrained" full runs/a/compare.json runs/b/compare.json

A step is its name, a method as the table of finetune.py calls it ("full + bag" with --bag), and
compare.json of each command that measured it. All their seeds count: the bar is their mean, the
dots are the seeds.
"""

import argparse
import json
from pathlib import Path
from statistics import mean, stdev

from minitune.support.plots import BLUE, GREY, LIGHT_BLUE, plt, save


def accuracies(method: str, files: list[str]) -> list[float]:
    """Of each run of the method in these files, in percent."""
    runs = [run for file in files for run in json.loads(Path(file).read_text())["runs"]]
    found = [100 * run["accuracy"] for run in runs if run["method"] == method]
    if not found:
        raise SystemExit(f"no run of {method} in {', '.join(files)}")
    return found


def main() -> None:
    """Print a line for each step, and draw them."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    words = ("NAME", "METHOD", "FILE")
    parser.add_argument("--step", nargs="+", action="append", required=True, metavar=words[0])
    parser.add_argument("--plot", type=Path, metavar="FILE.png")
    args = parser.parse_args()
    if any(len(step) < len(words) for step in args.step):
        parser.error("--step NAME METHOD FILE…")
    names = [step[0] for step in args.step]
    values = [accuracies(step[1], step[2:]) for step in args.step]
    for name, each in zip(names, values, strict=True):
        spread = f" ± {stdev(each):.1f}" if len(each) > 1 else ""
        print(f"{mean(each):.1f}{spread}% ({', '.join(f'{x:.1f}' for x in each)}): {name}")
    if not args.plot:
        return
    figure, axes = plt.subplots(figsize=(8, 0.5 * len(names) + 1))
    axes.barh(names, [mean(each) for each in values], color=LIGHT_BLUE)
    for row, each in enumerate(values):
        axes.plot(each, [row] * len(each), "o", color=BLUE, markersize=4)
        label = {"ha": "left", "va": "center", "color": GREY}
        axes.text(max(each) + 0.1, row, f"{mean(each):.1f}", **label)
    axes.invert_yaxis()
    axes.set_xlim(min(map(min, values)) - 1, max(map(max, values)) + 1)
    axes.set_xlabel("test accuracy (%): the mean, and a dot for each seed")
    save(figure, args.plot)


if __name__ == "__main__":
    main()
