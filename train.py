"""Pretrain a BERT from scratch by filling blanks (Devlin et al. 2019).

    python train.py                                 20 minutes on two CPU cores, IMDb reviews
    python train.py --minutes 40 --data my.txt      longer, on your own text
    python train.py --init minilm --out runs/more   go on from real weights
    python train.py --resume                        go on after a kill or Ctrl-C

The steps below are those of any pretraining: get text, learn a vocabulary, hide words, guess them,
look at the result. What is written to --out loads here and in `transformers` as BertForMaskedLM.
"""

import argparse
import time
from dataclasses import replace
from pathlib import Path

import torch

from minitune.attention import BACKENDS, resolve_backend
from minitune.checkpoint import find_model, load_masked_lm, load_tokenizer, read_config, save_model
from minitune.corpus import Corpus
from minitune.data import Dataset
from minitune.initialization import start_with_frequencies, start_with_neighbours
from minitune.model import PRESETS, BertForMaskedLM
from minitune.optimizer import Optimizer
from minitune.pretraining import MaskedLanguageModelling, fill_examples
from minitune.support.cli import (
    Parser,
    add_machine_options,
    choose_max_len,
    float_range,
    int_range,
    path,
    run_script,
)
from minitune.support.errors import UserError
from minitune.support.runs import Run
from minitune.support.runtime import Runtime
from minitune.training import Trainer, train_or_say_how_to_go_on

STARTED = time.monotonic()


def parser() -> Parser:
    """The options, grouped."""
    options = Parser("Pretrain a BERT from scratch by filling blanks.")
    add = options.group("what is trained, on what")
    add("--data", "imdb, rotten_tomatoes, a .txt .csv .tsv .jsonl file, a folder", default="imdb")
    add("--preset", "size of the model", PRESETS, "tiny")
    init = "start from these weights: minilm, a BERT directory, a hub id"
    add("--init", init, metavar="MODEL")
    add("--vocab-size", "entries of a new vocabulary", int_range(64, 10**6), 8192)
    add("--out", "directory of the run", path, Path("runs/pretrain"))
    add("--resume", "continue the run in --out", bool)
    add("--overwrite", "replace the run in --out", bool)
    add = options.group("how long")
    add("--minutes", "for all of it, tokenising included", float_range(0, 1e6), 17)
    add("--steps", "exactly so many optimizer steps instead", int_range(1, 10**9))
    add("--save-minutes", "minutes between checkpoints", float_range(0, 1e6), 2)
    add = options.group("the recipe")
    add("--mask-rate", "share of tokens to guess", float_range(0, 0.9), 0.15)
    add("--whole-word", "hide whole words, not single tokens", bool)
    summary = "of guessing a text's words from [CLS] alone; 0: only what BERT does"
    add("--summary-weight", summary, float_range(0, 100, above=False), 1.0)
    max_len = "tokens in a sequence at most; default: 512, if there is room"
    add("--max-len", max_len, int_range(8, 10**6))
    add("--batch-tokens", "tokens in a step, all processes together", int_range(8, 10**7), 4096)
    add(
        "--accumulate", "compute a batch in N parts, for memory", int_range(1, 1024), 1, metavar="N"
    )
    add("--optimizer", "for the hidden matrices", ["muon", "adamw"], "muon")
    lr = "peak learning rate of that optimizer; default: muon 0.01, adamw 0.001"
    add("--lr", lr, float_range(0, 1e38))
    add("--adamw-lr", "of AdamW, for the rest, beside Muon", float_range(0, 1e38), 1e-3)
    add("--weight-decay", "of matrices", float_range(0, 100, above=False), 0.01)
    add_machine_options(options, BACKENDS)
    return options


PEAK_LR = {"muon": 0.01, "adamw": 0.001}
MAY_CHANGE = {"out", "lr", "adamw_lr", "device", "precision", "attention", "save_minutes"}


def main() -> None:
    """Read the options, lock --out, train."""
    options = parser()
    args = options.parse_args()
    with Run.open(args.out, args.resume, args.overwrite, mark="corpus") as run:
        pretrain(options.resumed(run.settings, MAY_CHANGE, args.out), run)


def pretrain(args: argparse.Namespace, run: Run) -> None:
    """The job, top to bottom. With --resume, options that are not given are the run's."""
    runtime = Runtime.start(args.device, args.precision)
    if run.is_finished:
        run.clean_up()  # killed between its last two lines
        runtime.log(f"{args.out} is finished; its figures are in {args.out}/metrics.json")
        return
    if args.resume and not run.settings:
        runtime.log(f"nothing to resume in {args.out}: starting again from step 0")

    # 1. The model: random, or real weights. Its tokenizer comes with it, or is learned.
    torch.manual_seed(args.seed)
    tokenizer = None
    if args.init:
        source = find_model(args.init)
        config = read_config(source)
        tokenizer = load_tokenizer(source, config)
    else:
        config = PRESETS[args.preset]
        runtime.log(f"model: {args.preset}, from random weights")
    attention = resolve_backend(args.attention, runtime.device, runtime.dtype, config.head_size)
    if args.init:
        model, has_head = load_masked_lm(source, attention)
        head = "too" if has_head else "new"
        runtime.log(f"model: {args.init} ({source}), its masked-LM head {head}")
    args.max_len = choose_max_len(args.max_len, config.max_position_embeddings, args.batch_tokens)

    # 2. The text, as token ids. The main process tokenises, the others wait for it.
    dataset = Dataset(args.data)
    key = Corpus.key(dataset, tokenizer, args.vocab_size)
    if run.settings.get("corpus", key) != key:
        raise UserError(f"--data {args.data} has changed since the run in {args.out} began")
    corpus = Corpus.open(dataset, tokenizer, args.vocab_size) if runtime.is_main else None
    runtime.barrier()
    corpus = corpus or Corpus.open(dataset, tokenizer, args.vocab_size)
    if not args.init:
        config = replace(config, vocab_size=corpus.tokenizer.vocab_size)
        model = BertForMaskedLM(config, attention)
        start_with_neighbours(model.bert)
        start_with_frequencies(model.head, torch.from_numpy(corpus.unigrams))
    model.to(runtime.device)

    # 3. The task: which words are hidden, and what a guess costs.
    task = MaskedLanguageModelling(
        corpus,
        max_len=args.max_len,
        batch_tokens=args.batch_tokens,
        rate=args.mask_rate,
        whole_word=args.whole_word,
        summary_weight=args.summary_weight,
        seed=args.seed,
    )
    total_params = sum(p.numel() for p in model.parameters())
    runtime.log(
        f"data: {args.data}, {corpus.unigrams.sum():,} training tokens in {len(task.train):,} sequences"
    )
    runtime.log(f"{total_params:,} parameters on {runtime.describe()}")
    runtime.log(f"precision: {runtime.describe_precision()}; attention: {attention}")
    runtime.log(
        f"to beat: every word equally likely, ln V = {task.uniform:.2f} nats; "
        f"words by their frequency alone, unigram entropy = {task.unigram:.2f}"
    )

    # 4. Train.
    lr = args.lr or PEAK_LR[args.optimizer]
    optimizer = Optimizer(model, args.optimizer, lr, args.adamw_lr, args.weight_decay)
    trainer = Trainer(
        model,
        optimizer,
        task,
        run,
        runtime,
        seed=args.seed,
        accumulate=args.accumulate,
        save_minutes=args.save_minutes,
    )
    checkpoint = run.load()
    if runtime.is_main:
        settings = {
            k: str(v) if isinstance(v, Path) else v
            for k, v in vars(args).items()
            if k not in ("resume", "overwrite")
        }
        run.start(settings | {"corpus": key})
    if checkpoint:
        trainer.restore(*checkpoint)
        runtime.log(f"resumed at step {trainer.step:,} of {trainer.steps:,}")
    elif args.steps:
        trainer.steps = args.steps
    else:
        trainer.steps = trainer.plan(STARTED + 60 * args.minutes)
        runtime.log(f"{trainer.steps:,} steps fit into {args.minutes:g} minutes")
    final = train_or_say_how_to_go_on(trainer, args.out)

    # 5. Look at the result, and keep it.
    runtime.log(
        f"validation: loss {final['loss']:.3f}, {final['accuracy']:.1%} of the masked words right"
    )
    runtime.close()
    if not runtime.is_main:
        return
    for line in fill_examples(model, task, runtime):
        print(line)
    save_model(model, corpus.tokenizer, args.out)
    run.finish(
        {
            "method": "pretrain",
            "loss": final["loss"],
            "masked_accuracy": final["accuracy"],
            "uniform_loss": task.uniform,
            "unigram_loss": task.unigram,
            "trainable_params": total_params,
            "total_params": total_params,
            "steps": trainer.steps,
            "tokens": trainer.tokens,
            "train_seconds": round(trainer.seconds, 1),
            "total_seconds": round(time.monotonic() - STARTED, 1),
            "tokens_per_second": round(trainer.tokens / trainer.seconds),
            "peak_memory_bytes": runtime.peak_memory(),
            "saved_bytes": (args.out / "model.safetensors").stat().st_size,
            "train_examples": len(task.train),
            "seed": args.seed,
            "device": runtime.describe(),
            "precision": runtime.precision,
            "attention": attention,
        }
    )
    from minitune.support.plots import plot_pretraining  # matplotlib takes a second to import

    plot_pretraining(run.read_log(), task.uniform, task.unigram, final, args.out / "loss.png")
    print(f"wrote {args.out}: the model, loss.png, metrics.json, log.jsonl")


if __name__ == "__main__":
    run_script(main)
