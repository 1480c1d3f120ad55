"""Every attention backend: time and memory against the length of the sequences.

    python -m tests.benchmarks.attention --plot attention.png
    python -m tests.benchmarks.attention --tokens 4096 --lengths 64 128 256 --ragged

The number of tokens is fixed: longer sequences are fewer. Backends take turns, so that noise falls
on all alike; times are medians, `ratio` compares forward + backward with the reference's. Work
counts as 4n²D operations a head forward, and 2.5 times that backward, which multiplies five times
instead of twice. Memory is the peak of one forward and backward beyond what was there: GPU memory,
or the resident set of a process of its own.
"""

import argparse
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from minitune.attention import BACKENDS, attention, obstacle_to_triton
from minitune.support.plots import plt, save
from minitune.support.runtime import Runtime, keep_freed_memory


class Problem:
    """A packed batch of about `tokens` tokens in sequences of n, and what to do with it."""

    def __init__(self, args: argparse.Namespace, n: int, tokens: int):
        self.runtime, heads = Runtime.start(args.device, args.precision), args.heads
        self.device, dtype = self.runtime.device, self.runtime.dtype
        torch.manual_seed(0)
        lengths = torch.randint(1 if args.ragged else n, n + 1, (tokens,))
        lengths = lengths[lengths.cumsum(0) <= tokens]
        self.n, T = int(lengths.max()), int(lengths.sum())
        self.cu_seqlens = F.pad(lengths.cumsum(0), (1, 0)).int().to(self.device)
        self.qkv = torch.randn(T, 3, heads, args.head_size).to(self.device, dtype).requires_grad_()
        self.upstream = torch.randn(T, heads, args.head_size).to(self.device, dtype)
        self.operations = 4 * int((lengths**2).sum()) * heads * args.head_size

    def forward(self, backend: str) -> Tensor:
        """The output of a backend."""
        q, k, v = self.qkv.unbind(1)
        return attention(q, k, v, self.cu_seqlens, self.n, backend)

    def both(self, backend: str) -> None:
        """Forward and backward."""
        torch.autograd.grad(self.forward(backend), self.qkv, self.upstream)

    def seconds(self, work: Callable, backend: str) -> float:
        """How long the work takes."""
        started = time.perf_counter()
        work(backend)
        if self.device.type == "cuda":  # which works asynchronously
            torch.cuda.synchronize(self.device)
        return time.perf_counter() - started


def backends(args: argparse.Namespace) -> list[str]:
    """What runs here."""
    obstacle = obstacle_to_triton(torch.device(args.device), args.head_size)
    return [name for name in BACKENDS if name != "triton" or not obstacle]


def memory(args: argparse.Namespace, n: int, backend: str) -> int:
    """Bytes that forward and backward need at their peak."""
    Problem(args, 32, 32).both(backend)  # libraries take memory when they are first used
    problem = Problem(args, n, args.tokens)
    problem.runtime.reset_peak_memory()
    before = problem.runtime.peak_memory()
    problem.both(backend)
    return problem.runtime.peak_memory() - before


def in_new_process(work: Callable, *args, returns_memory: bool = False):
    """What `work` returns there; with `returns_memory` freed memory goes back to the system."""
    os.environ.pop(THRESHOLD, None)
    if returns_memory:
        os.environ[THRESHOLD] = "65536"  # bytes; from there on glibc gives back what is freed
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(work, args)


THRESHOLD = "MALLOC_MMAP_THRESHOLD_"  # read by glibc when a process starts


def measure(args: argparse.Namespace, n: int) -> dict[str, dict]:
    """{backend: its figures} at one length; the figures are printed too."""
    problem, names = Problem(args, n, args.tokens), backends(args)
    times = {(name, work): [] for name in names for work in (problem.forward, problem.both)}
    for _ in range(args.rounds + 1):
        for (name, work), seconds in times.items():
            seconds.append(problem.seconds(work, name))
    # Without the first, which compiles.
    ms = {key: 1e3 * statistics.median(taken[1:]) for key, taken in times.items()}
    figures = {}
    for name in names:
        if args.device == "cuda":
            peak = memory(args, n, name) / 1e6
        else:
            peak = in_new_process(memory, args, n, name, returns_memory=True) / 1e6
        forward, both = ms[name, problem.forward], ms[name, problem.both]
        ratio, speed = both / ms["reference", problem.both], 3.5 * problem.operations / both / 1e9
        line = f"{n:6}  {name:<12}{forward:8.2f} ms{both:10.2f} ms{ratio:8.2f}{speed:9.3f}"
        print(f"{line}{peak:7.0f} MB")
        figures[name] = {"ms": both, "MB": peak}
    return figures


def plot(results: dict[int, dict], title: str, path: Path) -> None:
    """Time and memory against length."""
    figure, panels = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
    for axes, unit, what in zip(
        panels, ("ms", "MB"), ("forward + backward", "peak memory"), strict=True
    ):
        for name in results[min(results)]:
            axes.loglog([*results], [row[name][unit] for row in results.values()], "o-", label=name)
        axes.set(xlabel="tokens a sequence", ylabel=f"{what} ({unit})")
        axes.set_xticks([*results], labels=[*results])
        axes.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
    panels[0].legend(frameon=False)
    figure.suptitle(title)
    save(figure, path)


def main() -> None:
    """A line for each backend at each length."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--tokens", type=int, default=16384, help="in a batch")
    add("--lengths", type=int, nargs="+", default=[32, 64, 128, 256, 512, 1024, 2048])
    add("--ragged", action="store_true", help="sequences of 1 to n tokens")
    add("--heads", type=int, default=4)
    add("--head-size", type=int, default=64)
    add("--precision", choices=["auto", "fp32", "bf16", "fp16"], default="auto")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--rounds", type=int, default=10)
    add("--plot", type=Path, metavar="PATH", help="draw a picture too")
    args = parser.parse_args()
    keep_freed_memory()  # as the scripts do
    runtime = Runtime.start(args.device, args.precision)
    args.precision, machine = runtime.precision, runtime.describe()
    title = f"{args.tokens:,} tokens, {args.heads} heads of {args.head_size}, {args.precision}"
    title += f"; {machine}"
    print(title)
    print("     n  backend      forward   + backward   ratio  TFLOP/s    memory")
    results = {n: measure(args, n) for n in args.lengths}
    if args.plot:
        plot(results, title, args.plot)


if __name__ == "__main__":
    main()
