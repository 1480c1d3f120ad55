"""What each step of a recipe was worth: the test accuracy of each, from finished runs.

    python -m tests.benchmarks.recipe --plot recipe.png \\
        --step "from random weights" scratch runs/a/compare.json \\
        --step "pretrained" full runs/a/compare.json runs/b/compare.json

A step is its name, a method as the table of finetune.py calls it ("full + bag" with --bag), and
compare.json of each command that measured it. Every run of the method in these files counts: the
bar is the mean of its seeds, the dots are the seeds.
"""

import argparse
import json
from pathlib import Path
from statistics import mean, stdev

from minitune.support.plots import BLUE, GREY, LIGHT_BLUE, plt, save


def accuracies(method: str, files: list[str]) -> list[float]:
    """Of each run of the method in these files, in percent; all have learned from as many rows."""
    runs = [run for file in files for run in json.loads(Path(file).read_text())["runs"]]
    runs = [run for run in runs if run["method"] == method]
    if len({run["train_examples"] for run in runs}) != 1:
        raise SystemExit(f"{method}: no run in {', '.join(files)}, or runs on more and fewer rows")
    return [100 * run["accuracy"] for run in runs]


def main() -> None:
    """Print a line for each step, and draw them."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    what = "a name, a method, and compare.json of one command or more"
    parser.add_argument("--step", nargs="+", action="append", required=True, help=what)
    parser.add_argument("--plot", type=Path, metavar="FILE.png")
    args = parser.parse_args()
    if any(len(step) < 3 for step in args.step):
        parser.error(f"--step takes {what}")
    names = [step[0] for step in args.step]
    values = [accuracies(step[1], step[2:]) for step in args.step]
    for name, each in zip(names, values, strict=True):
        spread = f" ± {stdev(each):.1f}" if len(each) > 1 else ""
        print(f"{mean(each):.1f}{spread}% ({', '.join(f'{x:.1f}' for x in each)}): {name}")
    if not args.plot:
        return
    figure, axes = plt.subplots(figsize=(8, 0.5 * len(names) + 1))
    lowest = min(map(min, values)) - 1
    rows = range(len(names))
    axes.barh(rows, [mean(each) - lowest for each in values], left=lowest, color=LIGHT_BLUE)
    axes.set_yticks(rows, names)
    for row, each in zip(rows, values, strict=True):
        axes.plot(each, [row] * len(each), "o", color=BLUE, markersize=4)
        axes.text(max(each) + 0.1, row, f"{mean(each):.1f}", va="center", color=GREY)
    axes.invert_yaxis()
    axes.set_xlim(lowest, max(map(max, values)) + 1)
    axes.set_xlabel("test accuracy (%): the mean, and a dot for each seed; the axis is cut")
    save(figure, args.plot)


if __name__ == "__main__":
    main()
