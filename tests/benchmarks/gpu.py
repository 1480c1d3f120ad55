"""How fast minitune is on a GPU, and the best of the others, in turns in the same run.

    python -m tests.benchmarks.gpu                              everything, planned for five minutes on an H100
    python -m tests.benchmarks.gpu attention steps --json gpu.json

    attention   milliseconds of forward and backward, 12 heads of 64. Others: torch's varlen_attn and
                flex_attention, and for equal lengths its SDPA by FlashAttention and by cuDNN. First all
                outputs are compared with the definition.
    steps       tokens a second of whole steps of pretraining, masking included; the share of what the GPU
                reaches in a large matrix multiplication; kernels started and waits for the GPU in a step.
                Others: BertForMaskedLM of transformers, if that is installed, on texts of equal length.
    train       the loss of `train.py --minutes 1`
    finetune    the seconds of two epochs of minilm on Rotten Tomatoes, by `finetune.py --method full`

Without a GPU all of it is tiny, on the processor: that only shows that the program works. With
TRITON_INTERPRET=1 the kernels are then run in Triton's interpreter.
"""

import argparse
import functools
import gc
import json
import os
import statistics
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.utils import counters

from minitune.attention import reference, resolve_backend, self_attention
from minitune.corpus import Corpus
from minitune.data import Dataset
from minitune.model import PRESETS, BertConfig, BertForMaskedLM
from minitune.optimizer import Optimizer
from minitune.pretraining import MASK_RATE, MaskedLanguageModelling
from minitune.support.runs import Run, read_json, write_json
from minitune.support.runtime import Runtime
from minitune.training import Trainer
from tests.benchmarks.speed import flops
from train import PEAK_LR

SAMPLES = Path(__file__).parents[2] / "data" / "samples"
ON_GPU = torch.cuda.is_available()


@dataclass
class Row:
    """A line of the table: minitune's figure, and those of others or why they have none."""

    what: str
    unit: str  # with "ms" and "s" less is better
    minitune: dict[str, float]  # by way of computing
    others: dict[str, float | str] = field(default_factory=dict)
    notes: dict[str, float] = field(default_factory=dict)
    goal: str = ""  # on an H100

    def cells(self) -> list[str]:
        """What the table says."""
        best = min if self.unit in ("ms", "s") else max
        name, ours = best(self.minitune.items(), key=lambda x: x[1])
        found = {side: value for side, value in self.others.items() if not isinstance(value, str)}
        theirs = ratio = ""
        if found:
            side, value = best(found.items(), key=lambda x: x[1])
            theirs = f"{value:,.4g} ({side})"
            ratio = f"{value / ours if best is min else ours / value:.2f}"
        more = (self.minitune | self.others | self.notes).items()
        notes = "; ".join(f"{key}: {x if isinstance(x, str) else f'{x:,.4g}'}" for key, x in more)
        return [self.what, f"{ours:,.4g} {self.unit} ({name})", theirs, ratio, self.goal, notes]


def wait() -> None:
    """Until the GPU has done what it was given."""
    if ON_GPU:
        torch.cuda.synchronize()


def seconds(work: Callable, repeats: int) -> float:
    """How long the work takes: the median, on a GPU by its own clock and with cold caches."""
    work(), work()  # compiles
    if not ON_GPU:
        times = []
        for _ in range(repeats):
            started = time.perf_counter()
            work()
            times.append(time.perf_counter() - started)
        return statistics.median(times)
    # While the GPU clears this, the program gets ahead of it, so that launches do not count.
    cache = torch.empty(1 << 30, dtype=torch.int8, device="cuda")
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for start, end in events:
        for _ in range(10):  # for some milliseconds
            cache.zero_()
        start.record()
        work()
        end.record()
    wait()
    return statistics.median(start.elapsed_time(end) / 1000 for start, end in events)


def corpora() -> dict[str, Corpus]:
    """Tokenised texts by name; on a processor a few samples."""
    if not ON_GPU:
        return dict.fromkeys(
            ("imdb", "rotten_tomatoes"),
            Corpus.open(Dataset(str(SAMPLES / "reviews.txt")), None, 300),
        )
    return {name: Corpus.open(Dataset(name), None, 8192) for name in ("imdb", "rotten_tomatoes")}


# Attention


def batches() -> Iterator[tuple[str, list[int], str]]:
    """(what it is, lengths, goal)."""
    lengths = {name: c.chunks("train", 512).lengths for name, c in corpora().items()}
    mixed = np.random.default_rng(0).permutation(lengths["imdb"])
    many, few = (32768, 16384) if ON_GPU else (200, 100)
    middle = np.sort(mixed)[len(mixed) // 2 :]
    snippets = np.random.default_rng(0).permutation(lengths["rotten_tomatoes"])
    for what, drawn, tokens, goal in (
        ("IMDb, mixed", mixed, many, "1.35 x varlen_attn"),
        ("IMDb, sorted", middle, many, "1.35 x varlen_attn"),
        ("snippets", snippets, few, "3.5 x varlen_attn"),
    ):
        yield what, drawn[drawn.cumsum() <= tokens].tolist(), goal
    for n, goal in ((128, "1.5"), (512, "1.25"), (2048, "1.25")):
        n, count = (n, many // n) if ON_GPU else (n // 16, 2)
        yield f"{count} of {n}", [n] * count, f"{goal} x varlen_attn"


def sides(
    lengths: list[int], cu_seqlens: Tensor, backend: str, with_flex: bool
) -> dict[str, Callable]:
    """{name: its attention over packed qkv (T, 3, H, D), as a model has them} of what runs here."""
    n = max(lengths)
    found = {backend: lambda qkv: self_attention(qkv, cu_seqlens, n, backend)}
    if ON_GPU and find_spec("torch.nn.attention.varlen"):
        from torch.nn.attention.varlen import varlen_attn

        found["varlen_attn"] = lambda qkv: varlen_attn(*qkv.unbind(1), cu_seqlens, cu_seqlens, n, n)
    if min(lengths) == n:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        def equal(qkv: Tensor, kernel: SDPBackend) -> Tensor:
            q, k, v = (x.unflatten(0, (-1, n)).transpose(1, 2) for x in qkv.unbind(1))
            with sdpa_kernel(kernel):
                return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(0, 1)

        names = ("FLASH_ATTENTION", "CUDNN_ATTENTION") if ON_GPU else ("MATH",)
        for name in names:
            kernel = SDPBackend.__members__[name]
            found[f"SDPA {name}"] = lambda qkv, kernel=kernel: equal(qkv, kernel)
    if with_flex:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        T, device = int(cu_seqlens[-1]), cu_seqlens.device
        text = torch.repeat_interleave(cu_seqlens.diff())
        make, flex = create_block_mask, flex_attention
        if ON_GPU:
            make, flex = torch.compile(make), torch.compile(flex)
        mask = make(lambda b, h, i, j: text[i] == text[j], None, None, T, T, device)

        def over_all(qkv: Tensor) -> Tensor:
            q, k, v = (x.transpose(0, 1)[None] for x in qkv.unbind(1))
            return flex(q, k, v, block_mask=mask)[0].transpose(0, 1)

        found["flex_attention"] = over_all
    return found


def measure_attention(runtime: Runtime) -> Iterator[Row]:
    """All sides on all batches."""
    heads, size, repeats = (12, 64, 20) if ON_GPU else (2, 32, 1)
    backend = resolve_backend("auto", runtime.device, runtime.dtype, size)
    if os.environ.get("TRITON_INTERPRET") == "1":
        backend = "triton"
    for what, lengths, goal in batches():
        torch.manual_seed(0)
        qkv = torch.randn(sum(lengths), 3, heads, size, device=runtime.device, dtype=runtime.dtype)
        upstream = torch.randn_like(qkv[:, 0])
        cu_seqlens = F.pad(torch.tensor(lengths, device=runtime.device).cumsum(0), (1, 0)).int()
        exact = reference(*qkv.float().unbind(1), cu_seqlens, cu_seqlens)
        row = Row(f"attention, {what}", "ms", {}, goal=goal)
        for name, attend in sides(lengths, cu_seqlens, backend, "mixed" in what).items():
            figures = row.minitune if name == backend else row.others
            try:
                error = (attend(qkv) - exact).norm() / exact.norm()
                if not error < 0.02:
                    raise ArithmeticError(f"its output is off by {error:.1%}")
                row.notes[f"{name} forward"] = 1000 * seconds(
                    functools.partial(attend, qkv), repeats
                )
                figures[name] = 1000 * seconds(
                    functools.partial(forward_and_backward, attend, qkv, upstream), repeats
                )
            except Exception as problem:  # a side that does not run here
                if name == backend:
                    raise
                figures[name] = why(problem)
        yield row


def why(problem: Exception) -> str:
    """One line."""
    return f"{type(problem).__name__}: {problem}".splitlines()[0]


def forward_and_backward(attend: Callable, qkv: Tensor, upstream: Tensor) -> None:
    """The gradient of (T, 3, H, D), from that of the output (T, H, D)."""
    qkv = qkv.detach().requires_grad_()
    torch.autograd.grad(attend(qkv), qkv, upstream)


# Steps of pretraining


def peak(dtype: torch.dtype) -> float:
    """Operations a second in a large matrix multiplication."""
    n = 8192 if ON_GPU else 256
    a = torch.randn(n, n, dtype=dtype, device="cuda" if ON_GPU else "cpu")
    return 2 * n**3 / seconds(lambda: a @ a, 10)


WARM, COUNTED = (20, 30) if ON_GPU else (1, 2)  # steps
WAYS = "eager", "graphs", "graphs, compiled"
THEIR_WAYS = "eager", "compiled"


def repeat(step: Callable, times: int) -> float:
    """Seconds until a GPU has done that many steps."""
    started = time.perf_counter()
    for _ in range(times):
        step()
    wait()
    return time.perf_counter() - started


def launches(work: Callable) -> int:
    """How many kernels are started."""
    with torch.profiler.profile() as profile:
        work()
        wait()
    started = "launchkernel", "graphlaunch"
    events = profile.key_averages()
    return sum(e.count for e in events if any(name in e.key.lower() for name in started))


def waits(work: Callable) -> int:
    """How often the program waits for the GPU."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        work()
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in seen)


def measure_steps(runtime: Runtime) -> Iterator[Row]:
    """minitune by itself for each preset and batch, and transformers beside `base`."""
    corpus, best = corpora()["imdb"], peak(runtime.dtype)
    print(f"peak: {best / 1e12:,.3g} TFLOP/s")
    cases = [("base", "adamw", 32768, ""), ("base", "adamw", 65536, "680,000 tokens/s"),
             ("tiny", "muon", 4096, "600,000 tokens/s"),
             ("tiny", "muon", 65536, "2,800,000 tokens/s")]  # fmt: skip
    for preset, name, batch_tokens, goal in cases if ON_GPU else [("tiny", "muon", 256, "")]:
        what = f"{preset}, {name}, {batch_tokens:,} tokens a step"
        row = Row(what, "tokens/s", {}, goal=goal)
        config = replace(PRESETS[preset], vocab_size=corpus.tokenizer.vocab_size)
        for way in WAYS if ON_GPU else ("eager",):
            row.minitune[way], notes = pretrain(runtime, corpus, config, batch_tokens, name, way)
            shares = {"share of the peak": notes.pop("operations/s") / best}
            row.notes |= {f"{way}: {key}": value for key, value in (shares | notes).items()}
        if batch_tokens in (32768, 256) and find_spec("transformers"):
            for way in THEIR_WAYS if ON_GPU else ("eager",):
                try:
                    speed = of_transformers(runtime, config, way)
                except Exception as problem:
                    speed = why(problem)
                row.others[f"transformers, {way}"] = speed
        yield row


def pretrain(
    runtime: Runtime, corpus: Corpus, config: BertConfig, batch_tokens: int, name: str, way: str
) -> tuple[float, dict]:
    """(tokens a second, other figures) of the training loop; `name` is the optimizer."""
    torch.compiler.reset()  # it keeps few programs
    torch.manual_seed(0)
    max_len = min(512, batch_tokens)
    backend = resolve_backend("auto", runtime.device, runtime.dtype, config.head_size)
    model = BertForMaskedLM(config, backend).to(runtime.device).train()
    started = time.perf_counter()
    if "compiled" in way:
        runtime.compile_layers(model.bert, max_len, batch_tokens)
    shape = {"max_len": max_len, "batch_tokens": batch_tokens}
    task = MaskedLanguageModelling(corpus, rate=MASK_RATE, whole_word=False, seed=0, **shape)
    optimizer = Optimizer(model, name, PEAK_LR[name], PEAK_LR["adamw"], 0.01)
    trainer = Trainer(model, optimizer, task, Run(Path()), runtime, seed=0, graphs="graphs" in way)
    trainer.steps = 10**6
    runtime.reset_peak_memory()
    computer = trainer.computer()
    shares, done = computer.shares(0), []

    def step() -> None:
        batch, parts = next(shares)
        _, norm = computer.backward(batch, parts)
        computer.update(norm)
        done.append(batch)

    repeat(step, WARM)
    notes = {"warm-up, s": time.perf_counter() - started}
    graphs = counters["stats"]["unique_graphs"]
    elapsed, counted = repeat(step, COUNTED), done[WARM:]
    notes["operations/s"] = sum(flops(batch, config) for batch in counted) / elapsed
    notes["compiled again"] = counters["stats"]["unique_graphs"] - graphs
    notes["peak memory, GB"] = runtime.peak_memory() / 1e9
    if ON_GPU:
        notes |= {"launches": launches(step), "waits": waits(step)}
    return sum(batch.tokens for batch in counted) / elapsed, notes


def of_transformers(runtime: Runtime, config: BertConfig, way: str) -> float:
    """Tokens a second of its BertForMaskedLM with SDPA and fused AdamW, on texts of equal length."""
    import transformers

    names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
    sizes = {name: getattr(config, name) for name in (*names, "intermediate_size")}
    texts, length = (64, 512) if ON_GPU else (2, 16)
    torch.manual_seed(0)
    theirs = transformers.BertConfig(**sizes, attn_implementation="sdpa")
    model = transformers.BertForMaskedLM(theirs).to(runtime.device).train()
    run = torch.compile(model) if way == "compiled" else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    ids = torch.randint(5, config.vocab_size, (texts, length), device=runtime.device)
    labels = torch.where(torch.rand(ids.shape, device=ids.device) < 0.15, ids, -100)

    def step() -> None:
        with runtime.autocast():
            loss = run(input_ids=ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    repeat(step, WARM)
    return COUNTED * ids.numel() / repeat(step, COUNTED)


# The scripts


def call(main: Callable, words: str, out: Path) -> None:
    """Do a script's job in this process."""
    with mock.patch.object(sys, "argv", ["script", *words.split(), "--out", str(out)]):
        main()


def small_pretraining(out: Path) -> None:
    """A run of train.py that takes a second."""
    import train

    words = f"--data {SAMPLES}/reviews.txt --vocab-size 300 --steps 2 --batch-tokens 256"
    call(train.main, f"{words} --max-len 64", out)


def measure_train(runtime: Runtime) -> Iterator[Row]:
    """`python train.py --minutes 1`, from here on."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        if ON_GPU:
            import train

            train.STARTED = time.monotonic()  # the minute begins here
            call(train.main, "--minutes 1", out)
        else:
            small_pretraining(out)
        metrics = read_json(out / "metrics.json")
    notes = {key: metrics[key] for key in ("steps", "tokens_per_second", "masked_accuracy")}
    yield Row("train.py --minutes 1", "nats", {"loss": metrics["loss"]}, notes=notes, goal="3.54")


def measure_finetune(runtime: Runtime) -> Iterator[Row]:
    """`python finetune.py --method full` on Rotten Tomatoes."""
    import finetune

    with tempfile.TemporaryDirectory() as folder:
        out, words = Path(folder) / "run", "--model minilm --data rotten_tomatoes --epochs 2"
        if not ON_GPU:
            small_pretraining(Path(folder) / "base")
            words = (
                f"--model {folder}/base --data {SAMPLES}/reviews.csv --epochs 1 --batch-tokens 512"
            )
        call(finetune.main, f"--method full {words}", out)
        metrics = read_json(out / "full" / "metrics.json")
    notes = {key: metrics[key] for key in ("steps", "tokens_per_second", "accuracy")}
    ours = {"full": metrics["train_seconds"]}
    yield Row("minilm, Rotten Tomatoes, 2 epochs", "s", ours, notes=notes, goal="5 s")


SECTIONS = {"attention": measure_attention, "steps": measure_steps, "train": measure_train,
            "finetune": measure_finetune}  # fmt: skip
HEADINGS = ["what", "minitune", "best other", "times as fast", "goal on an H100", "more"]


def measure(sections: list[str], runtime: Runtime) -> tuple[list[Row], list[str]]:
    """The rows of these sections, each printed when it is there, and the sections that failed."""
    rows, failed = [], []
    for section in sections:
        try:
            for row in SECTIONS[section](runtime):
                rows.append(row)
                print(f"{section}: {json.dumps(asdict(row))}", flush=True)
        except Exception:  # the others are measured nevertheless
            traceback.print_exc()
            failed.append(section)
        gc.collect()
    return rows, failed


def table(rows: list[Row]) -> str:
    """In Markdown."""
    lines = [HEADINGS, ["---"] * len(HEADINGS), *(row.cells() for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def main() -> None:
    """Measure, print, write. Exit status 1 if a section failed."""
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    options.add_argument("sections", nargs="*", metavar="SECTION", help=", ".join(SECTIONS))
    options.add_argument("--json", type=Path, metavar="PATH", help="write the figures there too")
    args = options.parse_args()
    if unknown := set(args.sections) - set(SECTIONS):
        options.error(f"no section {', '.join(sorted(unknown))}; there are {', '.join(SECTIONS)}")
    started, runtime = time.monotonic(), Runtime.start()
    rows, failed = measure(args.sections or list(SECTIONS), runtime)
    machine = f"{runtime.describe()}, torch {torch.__version__}, {runtime.precision}"
    print(f"\n{machine}, {time.monotonic() - started:.0f} s\n\n{table(rows)}")
    if not ON_GPU:
        print("\nno GPU here: tiny sizes, which only show that the program works")
    if args.json:
        write_json(args.json, {"machine": machine, "rows": [asdict(row) for row in rows]})
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
