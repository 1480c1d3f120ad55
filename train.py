"""Pretrain a BERT from scratch by guessing masked words (Devlin et al. 2019).

    python train.py                                 17 minutes on two CPU cores, IMDb reviews
    python train.py --minutes 40 --data my.txt      longer, on your own text
    python train.py --init minilm --out runs/more   continue from real weights
    python train.py --resume                        continue after a kill or Ctrl-C

The numbered steps in `pretrain` are those of any pretraining: choose a model, get text and a
vocabulary, mask words, train, look at the result. The directory --out can be loaded here, and in
`transformers` as BertForMaskedLM.
"""

from minitune.support.cli import answer_at_once
from minitune.support.options import train_options

if __name__ == "__main__":
    answer_at_once(train_options())  # before torch is imported, which takes seconds

import argparse
import math
import time
from dataclasses import replace

import numpy as np
import torch

from minitune.attention import resolve_backend
from minitune.checkpoint import load_masked_lm, load_tokenizer, read_config, save_model
from minitune.corpus import Chunks, Corpus
from minitune.data import Dataset
from minitune.initialization import start_with_frequencies, start_with_neighbours
from minitune.model import PRESETS, BertForMaskedLM
from minitune.optimizer import Optimizer
from minitune.pretraining import MaskedLanguageModelling
from minitune.probes import SENTENCES, probe, ten_blanks
from minitune.prompting import ClozeQuery, FillMask, in_words
from minitune.support import cli
from minitune.support.cli import choose_max_len
from minitune.support.errors import UserError, plural
from minitune.support.model_names import find_model
from minitune.support.plan import plan_steps
from minitune.support.runs import Run, write_json
from minitune.support.runtime import Runtime
from minitune.training import Trainer

STARTED = time.monotonic()
PEAK_LR = {"muon": 0.01, "adamw": 0.001}
# Where --batch-tokens is not given: tokens in a step, and a factor for the rates above, which were
# measured with those of a CPU. A GPU is busy with more tokens only, and for these twice the rate
# is better than four times (tests/benchmarks/LOG.md).
DEFAULTS_BY_DEVICE = {"cpu": (4096, 1), "cuda": (65536, 2)}
# Options that the loss depends on, and {steps: loss} as measured with their defaults
# (tests/benchmarks/LOG.md).
RECIPE = ("data", "preset", "init", "vocab_size", "mask_rate", "whole_word", "summary_weight",
          "batch_tokens", "optimizer", "lr", "adamw_lr", "weight_decay")  # fmt: skip
MEASURED = {1404: 4.11, 3630: 3.54}
FEW_STEPS = 200  # where a run is planned by time
TOO_FEW = "warning: so few steps teach next to nothing; take more --minutes or a smaller --preset"
# Options that may differ when a run is resumed.
MAY_CHANGE = {"lr", "adamw_lr", "save_minutes",
              "device", "threads", "precision", "attention", "compile", "cuda_graphs"}  # fmt: skip


def main() -> None:
    """Read the options, lock --out, train."""
    options = train_options()
    args = options.parse_args()
    with Run.open(args.out, args.resume, args.overwrite, mark="corpus") as run:
        pretrain(options.resumed(run.settings, MAY_CHANGE, args.out), run)


def pretrain(args: argparse.Namespace, run: Run) -> None:
    """The job, top to bottom. With --resume, options that are not given are the run's."""
    runtime = Runtime.start(args.device, args.precision, args.threads)
    if run.is_finished:
        run.clean_up()  # it may have been killed just before that
        runtime.log(f"{args.out} is finished; its figures are in {args.out}/metrics.json")
        return
    if args.resume and not run.settings:
        runtime.log(f"nothing to resume in {args.out}: starting from step 0")
    choose_batch_and_rates(args, runtime.device.type)

    # 1. The model: pretrained weights, or a preset, which gets random weights in step 2.
    torch.manual_seed(args.seed)
    source = find_model(args.init) if args.init else None
    config = read_config(source) if source else PRESETS[args.preset]
    attention = resolve_backend(args.attention, runtime.device, runtime.dtype, config.head_size)
    compiles = runtime.compiles(args.compile, attention, 0 if args.steps else args.minutes)
    graphs = runtime.repeats_graphs(args.cuda_graphs, attention, args.accumulate)
    args.max_len = choose_max_len(args.max_len, config.max_position_embeddings, args.batch_tokens)
    tokenizer, origin = None, f"{args.preset}, from random weights"
    if source:
        tokenizer = load_tokenizer(source, config)
        model, has_head = load_masked_lm(source, attention)
        origin = f"{args.init} ({source}), its masked-LM head {'too' if has_head else 'new'}"
    runtime.log(f"model: {origin}")

    # 2. The text as token ids, and for a new model a vocabulary. Of several processes the main one
    #    tokenises, and the others wait.
    dataset = Dataset(args.data, columns=cli.columns(args))
    key = Corpus.key(dataset, tokenizer, args.vocab_size)
    if run.settings.get("corpus", key) != key:
        raise UserError(f"--data {args.data} has changed since the run in {args.out} began")
    opening = dataset, tokenizer, args.vocab_size, runtime.log
    corpus = Corpus.open(*opening) if runtime.is_main else None
    runtime.barrier()
    corpus = corpus or Corpus.open(*opening)
    if not source:
        model = BertForMaskedLM(replace(config, vocab_size=corpus.tokenizer.vocab_size), attention)
        start_with_neighbours(model.bert)
        start_with_frequencies(model.head, torch.from_numpy(corpus.unigrams))
    model.to(runtime.device)

    # 3. The task: which tokens are masked, and what a guess costs.
    recipe = {"rate": args.mask_rate, "whole_word": args.whole_word, "seed": args.seed}
    recipe |= {"max_len": args.max_len, "batch_tokens": args.batch_tokens}
    task = MaskedLanguageModelling(corpus, summary_weight=args.summary_weight, **recipe)
    parameters = sum(p.numel() for p in model.parameters())
    tokens, sequences = corpus.unigrams.sum(), len(task.train)
    runtime.log(f"data: {args.data}, {tokens:,} training tokens in {sequences:,} sequences")
    runtime.log(f"{parameters:,} parameters on {runtime.describe()}")
    by = "; CUDA graphs: on" if graphs else ""
    runtime.log(runtime.describe_ways(attention, compiles) + by)
    rates = f"{args.lr:g} ({args.optimizer}) and {args.adamw_lr:g} (adamw)"
    runtime.log(f"a step: {args.batch_tokens:,} tokens; peak learning rates: {rates}")
    runtime.log(
        f"to beat: every word equally likely, ln V = {task.uniform:.2f} nats; "
        f"words by their frequency alone, unigram entropy = {task.unigram:.2f}"
    )

    # 4. Train.
    optimizer = Optimizer(model, args.optimizer, args.lr, args.adamw_lr, args.weight_decay)
    options = {"accumulate": args.accumulate, "save_minutes": args.save_minutes, "graphs": graphs}
    trainer = Trainer(model, optimizer, task, run, runtime, seed=args.seed, **options)
    trainer.started, trainer.steps = STARTED, args.steps or 0
    fill_mask = FillMask(model, corpus.tokenizer, runtime)
    trainer.observe = lambda: {"blanks": ten_blanks(fill_mask)}
    start = probe(fill_mask)  # before a checkpoint is loaded
    if compiles:
        runtime.compile_layers(model.bert, args.max_len, args.batch_tokens // args.accumulate)
    checkpoint = run.load()
    if runtime.is_main:
        run.start(cli.options_to_save(args) | {"corpus": key})
    if checkpoint:
        trainer.restore(checkpoint)
        runtime.log(f"resumed at step {trainer.step:,} of {trainer.steps:,}")
    elif not args.steps:
        plan_steps(trainer, STARTED + 60 * args.minutes)
        plan = f"plan: {plural(trainer.steps, 'step')} in {args.minutes:g} minutes"
        runtime.log(plan + expectation(args, trainer.steps))
        if trainer.steps < FEW_STEPS:
            runtime.log(TOO_FEW)
    final = trainer.train()

    # 5. Write the result first, then look at it.
    guessed = f"{final['accuracy']:.1%} of the masked tokens right"
    runtime.log(f"validation: loss {final['loss']:.3f}, {guessed}")
    runtime.close()
    if not runtime.is_main:
        return
    save_model(model, corpus.tokenizer, args.out)
    seconds, total = trainer.seconds, trainer.earlier_seconds + time.monotonic() - STARTED
    metrics = {"method": "pretrain", "loss": final["loss"], "masked_accuracy": final["accuracy"]}
    metrics |= {"uniform_loss": task.uniform, "unigram_loss": task.unigram, "seed": args.seed}
    metrics |= {"validation_every": trainer.validation_every, "train_examples": len(task.train)}
    metrics |= {"trainable_params": parameters, "total_params": parameters}
    metrics |= {"steps": trainer.steps, "tokens": trainer.tokens}
    metrics |= {"train_seconds": round(seconds, 1), "total_seconds": round(total, 1)}
    metrics |= {"tokens_per_second": round(trainer.tokens / seconds)}
    metrics |= {"saved_bytes": (args.out / "model.safetensors").stat().st_size}
    metrics |= {"peak_memory_bytes": runtime.peak_memory(), "device": runtime.describe()}
    metrics |= {"threads": torch.get_num_threads(), "precision": runtime.precision}
    run.finish(metrics | {"attention": attention, "compiled": compiles, "graphs": graphs})
    model.eval()
    for line in fill_examples(fill_mask, task.held_out):
        runtime.log(line)
    with cli.drawing(args.out / "loss.png") as picture:
        from minitune.support.plots import plot_pretraining  # matplotlib takes a second to import

        plot_pretraining(run.read_log(), task.uniform, task.unigram, final, picture)
    with cli.drawing(args.out / "report.html"):
        from minitune.support.report import write_report

        shown = {"sentences": SENTENCES, "start": start, "end": probe(fill_mask)}
        write_json(args.out / "report.json", shown)
        write_report(args.out)
    runtime.log(f"wrote {args.out}: the model, report.html, loss.png, metrics.json, log.jsonl")
    if trainer.steps < FEW_STEPS and not args.steps:
        runtime.log(TOO_FEW)


def choose_batch_and_rates(args: argparse.Namespace, device: str) -> None:
    """Set the batch and the peak rates that are not given to those of a device, "cpu" or "cuda"."""
    tokens, factor = DEFAULTS_BY_DEVICE["cpu" if args.batch_tokens else device]
    args.batch_tokens = args.batch_tokens or tokens
    args.lr = args.lr or factor * PEAK_LR[args.optimizer]
    args.adamw_lr = args.adamw_lr or factor * PEAK_LR["adamw"]


def expectation(args: argparse.Namespace, steps: int) -> str:
    """Words on the loss to expect after `steps`; none where it was not measured."""
    measured = train_options().parse_args([])
    choose_batch_and_rates(measured, "cpu")
    is_default = all(getattr(args, key) == getattr(measured, key) for key in RECIPE)
    is_default &= args.max_len in (None, 512)  # the default is 512 once a model is chosen
    if not (is_default and min(MEASURED) <= steps <= max(MEASURED)):
        return ""
    loss = np.interp(math.log(steps), [math.log(n) for n in MEASURED], list(MEASURED.values()))
    return f"; such runs end near a loss of {loss:.1f}"


def fill_examples(fill_mask: FillMask, chunks: Chunks, count: int = 3) -> list[str]:
    """Lines to print: validation texts with one word masked, and the model's guesses."""
    tokenizer, token, lines = fill_mask.tokenizer, fill_mask.tokenizer.token, []
    for chunk in chunks.read(torch.linspace(0, len(chunks) - 1, count).long().unique().tolist()):
        ids = tokenizer.frame(chunk[1:-1][:20].tolist())
        starts_word = ~tokenizer.continuation[ids]
        # The longest word, and one that is a single token: the rest of a word would give it away.
        words = [i for i in range(len(ids) - 1) if token(ids[i]).isalpha() and starts_word[i + 1]]
        if words:
            masked = max(words, key=lambda i: len(token(ids[i])))
            query = ClozeQuery([*ids[:masked], tokenizer.mask_id, *ids[masked + 1 :]], [masked])
            [[guesses]] = fill_mask.words([query], 4)
            lines.append("  " + tokenizer.decode(query.ids[1:-1]).replace("[MASK]", "____"))
            lines.append(f"      it was: {token(ids[masked])}; the model says: {in_words(guesses)}")
    return lines


if __name__ == "__main__":
    cli.run_script(main)
