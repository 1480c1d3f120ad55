"""How fast pretraining runs, and how close to what the machine can do.

    python -m tests.benchmarks.speed [--preset tiny] [--batch-tokens 4096] [--rounds 5]

In turns, so that noise falls on both: a round of training steps, then a round of the matrix
multiplications of such a step alone, at the same shapes and in the same precision (for every linear
map: forward, input gradient, weight gradient). Prints real tokens per second, the FLOP/s of forward
and backward and of the multiplications alone, their ratio, and the optimizer's share of a step;
medians over the rounds.

    FLOPs of a step = 3 · [(L-1)·T·24d² + T·6d² + M·18d²       linear maps; those of the last layer
                           + 4d·((L-1)·Σnᵢ² + Σmᵢnᵢ)           attention
                           + M·2(d² + dV)]                     the head

for T tokens in sequences of nᵢ, of which M, mᵢ in each, are read (blanks and [CLS]); two for a
multiplication with its addition, backward twice forward; lookups, LayerNorm, softmax and GELU count
nothing.
"""

import argparse
import statistics
import time
from dataclasses import replace

import torch

from minitune.attention import resolve_backend
from minitune.corpus import Corpus
from minitune.data import Dataset
from minitune.model import PRESETS, BertForMaskedLM
from minitune.optimizer import Optimizer
from minitune.pretraining import MaskedBatch, MaskedLanguageModelling
from minitune.support.runtime import Runtime, keep_freed_memory


def flops(masked: MaskedBatch, config) -> float:
    """Of one training step, by the formula above."""
    d, L, V = config.hidden_size, config.num_hidden_layers, config.vocab_size
    T, lengths = masked.tokens, masked.batch.cu_seqlens.diff().double()
    M = len(masked) + len(lengths)
    queries = masked.batch.count_before(masked.positions).diff() + 1  # the blanks, and [CLS]
    attention = 4 * d * ((L - 1) * (lengths**2).sum().item() + (queries * lengths).sum().item())
    layers = T * (L - 1) * 24 * d**2 + T * 6 * d**2 + M * 18 * d**2
    return 3 * (layers + attention + M * 2 * (d**2 + d * V))


def matmuls(T: int, M: int, config, dtype: torch.dtype) -> tuple[list, float]:
    """The operands of a step's matrix multiplications, and their FLOPs."""
    d, f, V = config.hidden_size, config.intermediate_size, config.vocab_size
    shapes = [(T, d, 3 * d), (T, d, d), (T, d, f), (T, f, d)] * (config.num_hidden_layers - 1)
    shapes += [(T, d, 3 * d), (M, d, d), (M, d, f), (M, f, d)]  # the last layer
    shapes += [(M, d, d), (M, d, V)]  # the head
    operands = [
        [torch.randn(size, dtype=dtype) for size in ((rows, a), (b, a), (rows, b))]
        for rows, a, b in shapes
    ]
    return operands, sum(3 * 2.0 * rows * a * b for rows, a, b in shapes)


def multiply(operands: list) -> float:
    """Seconds for forward, input gradient and weight gradient of every linear map."""
    started = time.perf_counter()
    for x, weight, gradient in operands:
        torch.mm(x, weight.t())
        torch.mm(gradient, weight)
        torch.mm(gradient.t(), x)
    return time.perf_counter() - started


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    options.add_argument("--preset", choices=PRESETS, default="tiny")
    options.add_argument("--batch-tokens", type=int, default=4096)
    options.add_argument("--max-len", type=int, default=512)
    options.add_argument("--mask-rate", type=float, default=0.15)
    options.add_argument("--precision", default="auto")
    options.add_argument("--attention", default="auto")
    options.add_argument("--optimizer", default="muon")
    options.add_argument("--rounds", type=int, default=5)
    args = options.parse_args()
    keep_freed_memory()  # as the scripts do
    runtime = Runtime.start("cpu", args.precision)
    corpus = Corpus.open(Dataset("imdb"), None, 8192)
    config = replace(PRESETS[args.preset], vocab_size=corpus.tokenizer.vocab_size)
    model = BertForMaskedLM(
        config, resolve_backend(args.attention, runtime.device, runtime.dtype, config.head_size)
    )
    optimizer = Optimizer(model, args.optimizer, 1e-3, 1e-3, 0.01)
    task = MaskedLanguageModelling(
        corpus,
        max_len=args.max_len,
        batch_tokens=args.batch_tokens,
        rate=args.mask_rate,
        whole_word=False,
        seed=0,
    )
    batches = task.batches(0)
    T = args.batch_tokens
    read = round(T * args.mask_rate) + T // args.max_len
    operands, matmul_flops = matmuls(T, read, config, runtime.dtype)

    rates = {"tokens/s": [], "step": [], "matmuls": [], "share": [], "optimizer": []}
    for round_number in range(args.rounds + 1):
        tokens = done = model_seconds = optimizer_seconds = 0.0
        for _ in range(8):
            started = time.perf_counter()
            batch = next(batches)
            with runtime.autocast():
                loss, _ = task.loss(model, *batch.to(runtime.device))
            (loss / len(batch)).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            middle = time.perf_counter()
            for part in optimizer.parts:
                part.step()
            optimizer.zero_grad()
            optimizer_seconds += time.perf_counter() - middle
            model_seconds += middle - started
            tokens += batch.tokens
            done += flops(batch, config)
        peak = matmul_flops / statistics.median(multiply(operands) for _ in range(4))
        if round_number == 0:
            continue  # warming up
        rates["tokens/s"].append(tokens / (model_seconds + optimizer_seconds))
        rates["step"].append(done / model_seconds / 1e9)
        rates["matmuls"].append(peak / 1e9)
        rates["share"].append(done / model_seconds / peak)
        rates["optimizer"].append(optimizer_seconds / (model_seconds + optimizer_seconds))
    median = {name: statistics.median(values) for name, values in rates.items()}
    spread = f"{min(rates['share']):.0%} to {max(rates['share']):.0%}"
    print(f"{args.preset}, {T} tokens a step, {runtime.precision}, {args.optimizer}")
    print(f"tokens/s                     {median['tokens/s']:,.0f}")
    print(f"forward and backward         {median['step']:,.0f} GFLOP/s")
    print(f"its matmuls alone            {median['matmuls']:,.0f} GFLOP/s")
    print(f"share of that peak           {median['share']:.0%} ({spread})")
    print(f"optimizer's share of a step  {median['optimizer']:.0%}")


if __name__ == "__main__":
    main()
