"""Speed and memory of a training step against length and batch size, for each attention.

    python -m tests.benchmarks.cost --plot cost.png           ten minutes on two cores
    python -m tests.benchmarks.cost --lengths 64 512 --batches 2048

Masked words, the preset `tiny` with positions for 2,048 tokens. First 4,096 tokens a step in
sequences of one length, then sequences of 256 tokens and more or fewer of them. Every figure comes
from a process of its own: speed is the best of a few steps, memory the peak of a step beyond what
was there before it (weights, gradients and the optimizer's state were).
"""

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from minitune.attention import BACKENDS, obstacle_to_triton, resolve_backend
from minitune.batching import PackedBatch
from minitune.model import PRESETS, BertForMaskedLM
from minitune.optimizer import Optimizer
from minitune.support.plots import plt, save
from minitune.support.runtime import Runtime, keep_freed_memory
from tests.benchmarks.attention import in_new_process

CONFIG = replace(PRESETS["tiny"], max_position_embeddings=2048)
LENGTH, TOKENS = 256, 4096  # where the other one varies
RATE, STEPS = 0.15, 3
COLOURS = {
    "reference": "#969696",
    "padded": "#756bb1",
    "tiled": "#fd8d3c",
    "sdpa": "#08519c",
    "triton": "#31a354",
}


class Stepper:
    """A model, its optimizer, and a step of it."""

    def __init__(self, backend: str, runtime: Runtime):
        torch.manual_seed(0)
        self.model = BertForMaskedLM(CONFIG, backend).to(runtime.device)
        self.optimizer = Optimizer(self.model, "adamw", 1e-3, 1e-3, 0.01)
        self.runtime, self.device = runtime, runtime.device

    def batch(self, n: int, tokens: int) -> tuple[PackedBatch, Tensor, Tensor]:
        """Sequences of n random words, the blanks in them, and what belongs there."""
        sequences = list(torch.randint(5, CONFIG.vocab_size, (max(1, tokens // n), n)))
        batch = PackedBatch.from_sequences(sequences)
        T = batch.tokens.numel()
        positions = torch.randperm(T)[: round(RATE * T)].sort().values
        return tuple(x.to(self.device) for x in (batch, positions, batch.tokens[positions]))

    def step(self, batch: PackedBatch, positions: Tensor, labels: Tensor) -> float:
        """Seconds."""
        started = time.perf_counter()
        with self.runtime.autocast():
            loss = F.cross_entropy(self.model(batch, positions).float(), labels)
        loss.backward()
        for part in self.optimizer.parts:
            part.step()
        loss.item()  # waits for a GPU
        for p in self.model.parameters():
            p.grad.zero_()  # kept, so that the memory of a step is that of its activations
        return time.perf_counter() - started


def speed(backend: str, precision: str, device: str, n: int, tokens: int) -> float:
    """Tokens a second, of the best of a few steps."""
    keep_freed_memory()  # as the scripts do
    stepper = Stepper(backend, Runtime.start(device, precision))
    batch = stepper.batch(n, tokens)
    stepper.step(*batch)  # the first compiles kernels
    return batch[0].tokens.numel() / min(stepper.step(*batch) for _ in range(STEPS))


def memory(backend: str, precision: str, device: str, n: int, tokens: int) -> int:
    """Peak bytes of a step, beyond what was there."""
    stepper = Stepper(backend, Runtime.start(device, precision))
    stepper.step(*stepper.batch(32, 64))  # libraries take memory when they are first used
    batch = stepper.batch(n, tokens)
    stepper.runtime.reset_peak_memory()
    before = stepper.runtime.peak_memory()
    stepper.step(*batch)
    return stepper.runtime.peak_memory() - before


def plot(rows: list[dict], title: str, path: Path) -> None:
    """Speed and memory, against length and against batch size."""
    figure, panels = plt.subplots(2, 2, figsize=(9, 7), layout="constrained")
    labels = {
        "length": f"tokens a sequence ({TOKENS:,} a step)",
        "batch": f"tokens a step (sequences of {LENGTH})",
    }
    units = {"tokens_per_second": "tokens a second", "MB": "peak of a step (MB)"}
    for line, (varied, label) in zip(panels, labels.items(), strict=True):
        chosen = [row for row in rows if row["varied"] == varied]
        for axes, (key, unit) in zip(line, units.items(), strict=True):
            for name in dict.fromkeys(row["attention"] for row in chosen):
                points = [(row[varied], row[key]) for row in chosen if row["attention"] == name]
                width = 5 if name == "tiled" else 1.5  # sdpa, drawn above it, needs the same memory
                points, style = zip(*points, strict=True), {"color": COLOURS[name], "label": name}
                axes.plot(*points, "o-", linewidth=width, **style)
            ticks = sorted({row[varied] for row in chosen})
            axes.set_xscale("log", base=2)
            axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
            axes.set(xlabel=label, ylabel=unit, ylim=(0, None))
    panels[0][0].legend(frameon=False)
    figure.suptitle(title)
    save(figure, path)


def main() -> None:
    """A line for each figure."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--lengths", type=int, nargs="+", default=[32, 64, 128, 256, 512, 1024, 2048])
    add("--batches", type=int, nargs="+", default=[512, 1024, 2048, 4096, 8192, 16384])
    add("--precision", choices=["auto", "fp32", "bf16", "fp16"], default="auto")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--plot", type=Path, metavar="PATH", help="draw a picture too")
    add("--json", type=Path, metavar="PATH", help="write the figures there")
    args = parser.parse_args()
    runtime = Runtime.start(args.device, args.precision)
    device = runtime.device
    obstacle = obstacle_to_triton(device, CONFIG.head_size)
    names = [name for name in BACKENDS if name != "triton" or not obstacle]
    chosen = resolve_backend("auto", device, runtime.dtype, CONFIG.head_size)
    title = f"{runtime.describe()}, {runtime.precision}; auto is {chosen}"
    print(title)
    rows = []
    shapes = [("length", n, TOKENS) for n in args.lengths]
    shapes += [("batch", LENGTH, tokens) for tokens in args.batches]
    for varied, n, tokens in shapes:
        for name in names:
            problem = name, runtime.precision, args.device, n, tokens
            rate = in_new_process(speed, *problem)
            peak = in_new_process(memory, *problem, returns_memory=True)
            row = {"attention": name, "varied": varied, "length": n, "batch": tokens}
            rows.append(row | {"tokens_per_second": rate, "MB": peak / 1e6})
            figures = f"{rate:9,.0f} tokens/s{peak / 1e6:8,.0f} MB"
            print(f"{tokens:6,} tokens of {n:5,}  {name:<10}{figures}", flush=True)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    if args.plot:
        plot(rows, title, args.plot)


if __name__ == "__main__":
    main()
