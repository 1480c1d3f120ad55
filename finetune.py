"""Fine-tune a pretrained BERT for the sentiment of reviews, in three ways (or all of them, side by side).

    python finetune.py --method adapter                        small bottlenecks in a frozen network
    python finetune.py --method feature adapter full           one table, one picture
    python finetune.py --method full --model minilm --data rotten_tomatoes
    python finetune.py --model runs/finetune/adapter --predict "An unforgettable film."

The steps below are those of any fine-tuning: get a pretrained model, get labelled texts, decide what
is trained, train it, keep the best epoch by validation, and score the test rows once, at the end.
"""

import argparse
import functools
import gc
import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from minitune.attention import choose
from minitune.checkpoint import load_tokenizer, read_config, save_model, weights_hash
from minitune.classification import Classification, Examples, Sequences, evaluate
from minitune.cli import Parser, add_machine_options, check_same, choose_max_len, real, run_script, whole
from minitune.comparison import simple_methods, summarise, table
from minitune.data import Dataset
from minitune.errors import UserError
from minitune.features import extract
from minitune.files import write_json
from minitune.interrupts import Interrupted
from minitune.labelling import label_new_reviews
from minitune.machine import check_device, describe, forget_peak_memory, peak_memory
from minitune.methods import METHODS, build, for_embeddings, summary
from minitune.optimizer import Optimizer
from minitune.precision import Precision
from minitune.prediction import save_trained
from minitune.processes import Processes
from minitune.reviews import SPLITS, Reviews
from minitune.runs import Run, check_strangers
from minitune.sources import default_model, find_model
from minitune.tokenizer import Tokenizer
from minitune.training import Trainer


def parser() -> Parser:
    """The options, grouped."""
    options = Parser("Fine-tune a BERT for the sentiment of reviews, or label new ones with the result.")
    add = options.add_argument_group("what is trained, on what").add_argument
    add("--method", nargs="+", choices=METHODS, default=["adapter"],
        help="one, or several to be compared in one table")  # fmt: skip
    add("--model", help="pretrained: minilm, a BERT directory, a hub id; default: the last run of train.py. "
        "With --predict: what a run of finetune.py wrote")  # fmt: skip
    add("--data", default="imdb", help="imdb, rotten_tomatoes, a .csv .tsv .jsonl file, a folder")
    add("--test", metavar="FILE", help="labelled test rows; default: the last 10%% of each label in --data")
    add("--train-examples", type=whole(2), nargs="+", metavar="N",
        help="train on N rows only; several N draw accuracy against the number of labels")  # fmt: skip
    add("--seeds", type=whole(1, 100), default=1, help="repeat with so many seeds, from --seed on")
    add("--out", type=Path, default=Path("runs/finetune"), help="each method writes to OUT/METHOD")
    add("--resume", action="store_true", help="go on with the runs in --out")
    add("--save-minutes", type=real(0), default=2, help="between checkpoints")
    add = options.add_argument_group("the recipe; what is not given is the method's own").add_argument
    add("--epochs", type=whole(1, 10_000), help="passes over the training rows")
    add("--adapter-size", type=whole(1, 10_000), default=64, help="units in the bottleneck of an adapter")
    add("--max-len", type=whole(8),
        help="tokens of a text; longer ones keep their ends; default: 512, if there is room")  # fmt: skip
    add("--batch-tokens", type=whole(8), help="tokens in a step, all processes together")
    add("--accumulate", type=whole(1, 1024), default=1, help="compute a batch in N parts, for memory")
    add("--lr", type=real(0), help="peak learning rate; young embeddings get five times that")
    add("--weight-decay", type=real(0, closed=True), default=0.01, help="of matrices")
    add = options.add_argument_group("new reviews").add_argument
    add("--predict", nargs="+", metavar="TEXT",
        help="label these texts, or a .txt .csv .tsv .jsonl file, or - for the lines of stdin")  # fmt: skip
    add("--json", action="store_true", help="print one JSON object a review instead of CSV")
    add_machine_options(options)
    return options


MAY_CHANGE = {"out", "method", "seed", "seeds", "train_examples", "lr",
              "device", "precision", "attention", "save_minutes",
              "job", "base", "dataset", "embeddings"}  # fmt: skip  # the last four are no options


@dataclass
class Job:
    """One method on one choice of training rows, and the directory of its run."""

    method: str
    train_examples: int | None  # None: all
    seed: int
    run: Run


def read_arguments() -> tuple[argparse.Namespace, list[Job]]:
    """The options and the runs they ask for; with --resume, options that are not given are the last run's."""
    options = parser()
    args = options.parse_args()
    if args.predict:
        return args, []
    if args.resume and (found := list(args.out.rglob("settings.json"))):
        latest = max(found, key=lambda path: path.stat().st_mtime)
        args = options.resumed(Run(latest.parent).settings, MAY_CHANGE, args.out)
    check_device(args.device)
    methods = [name for name in METHODS if name in args.method]
    if len(methods) > 1 and "scratch" not in methods:
        methods.append("scratch")  # methods are compared with what they start from, nothing
    own = {*METHODS, "compare.json", "compare.json.partial", "compare.png"}
    check_strangers(args.out, own, "run of finetune.py")
    sizes = list(dict.fromkeys(args.train_examples or [None]))
    jobs = []
    for method, size, k in itertools.product(methods, sizes, range(args.seeds)):
        directory = args.out / method
        if len(sizes) > 1:
            directory /= str(size)
        if k:
            directory /= f"seed-{args.seed + k}"
        run = Run.open(directory, args.resume)
        check_same(args, run.settings, MAY_CHANGE, directory)
        job = {"method": method, "train_examples": size, "seed": args.seed + k}
        if run.settings and run.settings.get("job") != job:
            raise UserError(f"--resume: the run in {directory} is another: {run.settings.get('job')}")
        jobs.append(Job(**job, run=run))
    return args, jobs


def main() -> None:
    """The job, top to bottom."""
    args, jobs = read_arguments()
    if args.predict:
        label_new_reviews(args)
        return
    processes = Processes(args.device)
    say = functools.partial(print, flush=True) if processes.is_main else lambda *_: None
    precision = Precision.choose(args.precision, processes.device)
    if processes.is_main:
        jobs[0].run.check_writable()

    # 1. A pretrained model.
    name, why = (args.model, "as asked") if args.model else default_model()
    source = find_model(name)
    config, base = read_config(source), weights_hash(source)
    say(f"model: {name} ({why}), {config.num_hidden_layers} layers of {config.hidden_size}")
    tokenizer = load_tokenizer(source, config)
    attention = choose(args.attention, processes.device, precision.dtype, config.head_size)
    args.max_len = choose_max_len(args.max_len, config.max_position_embeddings, args.batch_tokens)

    # 2. Labelled reviews, as token ids.
    dataset = Dataset(args.data, args.test)
    reviews = Reviews.load(dataset)
    rows = ", ".join(f"{len(reviews.texts[split]):,} {split}" for split in SPLITS)
    say(f"data: {args.data}: {rows} rows; labels: {', '.join(reviews.names.values())}")
    for job in jobs:  # too many asked for is an error now, not after the first run
        reviews.choose("train", job.train_examples or 0, job.seed)
    examples = {
        split: Examples(Sequences(reviews.texts[split], tokenizer, args.max_len), reviews.labels[split])
        for split in SPLITS
    }
    cut = sum(examples["train"].inputs.truncated) / len(examples["train"])
    say(f"texts of more than {args.max_len} tokens keep their two ends: {cut:.0%} of the training rows")
    say(f"device: {describe(processes.device)}")
    say(f"precision: {precision.name} ({precision.why}); attention: {attention}")

    # 3. Train each method from the same weights, on the same rows.
    settings = {k: v for k, v in vars(args).items() if k not in ("out", "resume", "predict", "json")}
    settings |= {"base": base, "dataset": dataset.fingerprint()}
    common = Common(
        args, settings, name, source, tokenizer, reviews, examples, processes, precision, attention, say
    )
    results = []
    for job in jobs:
        results.append(fine_tune(job, common))
        gc.collect()  # the next one's peak memory is its own

    # 4. Compare, also with methods that need no network.
    processes.close()
    if not processes.is_main:
        return
    # All rows are the same rows whatever the seed, and these methods have nothing else random in them.
    for size, seed in dict.fromkeys((job.train_examples, job.train_examples and job.seed) for job in jobs):
        chosen = reviews.choose("train", size, seed) if size else None
        results += simple_methods(reviews, chosen, seed)
    rows = summarise(results, len(reviews.texts["test"]))
    print(f"\n{len(reviews.texts['test']):,} test rows of {args.data}:\n{table(rows)}")
    write_json(args.out / "compare.json", {"rows": rows, "runs": results})
    from minitune.plots import plot_comparison  # matplotlib takes a second to import

    plot_comparison(rows, f"{name} on {args.data}", args.out / "compare.png")
    print(f"wrote {args.out}: a directory for each method, compare.png, compare.json")


@dataclass
class Common:
    """What all methods share."""

    args: argparse.Namespace
    settings: dict
    name: str  # of the pretrained model, as given
    source: Path  # its directory
    tokenizer: Tokenizer
    reviews: Reviews
    examples: dict[str, Examples]
    processes: Processes
    precision: Precision
    attention: str  # the backend that --attention stands for
    say: Callable[[str], None]


def fine_tune(job: Job, common: Common) -> dict:
    """One method, from the pretrained weights to its accuracy on the test rows; returns the metrics."""
    args, run, processes, precision = common.args, job.run, common.processes, common.precision
    say, recipe, device = common.say, METHODS[job.method], processes.device
    say(f"\n{job.method}: {recipe.summary}")
    for key in ("base", "dataset"):
        if run.settings and run.settings[key] != common.settings[key]:
            raise UserError(f"the {key} of the run in {run.directory} has changed since it began")
    if run.is_finished:
        run.clean_up()  # killed between its last two lines
        say(f"{run.directory} is finished")
        return run.metrics
    started = time.monotonic()
    forget_peak_memory(device)
    checkpoint = run.load()
    # The model comes first: where its file is damaged, no directory is left behind.
    torch.manual_seed(job.seed)
    model = build(job.method, common.source, common.reviews.names, args.adapter_size, args.attention)
    model.to(device)
    if run.settings:  # a run that goes on keeps its own
        faster = run.settings.get("embeddings", 1.0)
    else:
        faster = for_embeddings(job.method, common.source)
    if processes.is_main:
        described = {k: v for k, v in vars(job).items() if k != "run"}
        run.start(common.settings | {"job": described, "embeddings": faster})
    processes.agree(None)  # the directory is there, and this job's

    # The rows it learns from. With few labels, as few choose the best epoch: no more would be at hand.
    examples = dict(common.examples)
    if count := job.train_examples:
        for split in ("train", "validation"):
            few = min(count, len(examples[split]))
            examples[split] = examples[split].select(common.reviews.choose(split, few, job.seed))
    tokens = examples["train"].tokens

    # The part of it that learns.
    learner, extraction_seconds = model, 0.0
    if job.method == "feature":
        directory = run.state_path.parent
        examples, extraction_seconds = extract(model.bert, examples, directory, processes, precision)
        learner, precision = model.head, Precision("fp32")
        learner.standardise(examples["train"].inputs.matrix)
    # The head of "feature" reads vectors, one a text, so that its budget counts texts.
    asked = args.batch_tokens if learner is model else None
    batch_tokens = asked or recipe.batch_tokens(examples["train"])
    epochs = args.epochs or recipe.epochs(examples["train"], batch_tokens)
    task = Classification(
        examples["train"], examples["validation"], batch_tokens=batch_tokens, epochs=epochs, seed=job.seed
    )
    lr = args.lr or recipe.lr(model.bert.config.hidden_size)
    optimizer = Optimizer(learner, recipe.optimizer, lr, recipe.adamw * lr, args.weight_decay, faster)
    trainer = Trainer(
        learner,
        optimizer,
        task,
        run,
        processes,
        precision,
        seed=job.seed,
        warmup=0.1,
        accumulate=args.accumulate,
        save_minutes=args.save_minutes,
    )
    trainer.steps = task.steps
    total_params = sum(p.numel() for p in model.parameters())
    trainable_params = sum(p.numel() for p in trainer.parameters)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    say(f"trains {trainable_params:,} of {total_params:,} parameters: {summary(trained)}")
    rate = f"{recipe.optimizer} at {lr:.2g}"
    rate += f", adamw at {recipe.adamw * lr:.2g} for the rest" if recipe.optimizer == "muon" else ""
    if faster != 1:
        rate += f", {faster:g} times that for embeddings"
    say(f"{epochs} epochs, {task.steps:,} steps of at most {batch_tokens:,} {task.unit}, {rate}")

    # Train; the best epoch by validation stays.
    if checkpoint:
        trainer.restore(*checkpoint)
        say(f"resumed at step {trainer.step:,} of {trainer.steps:,}")
    if processes.is_main:
        run.rewind_log(trainer.step)
    try:
        validation = trainer.train()
    except Interrupted:
        say(f"\ninterrupted: saved at step {trainer.step:,}; go on with --resume --out {args.out}")
        raise

    # Score the test rows, this once, and keep what was trained.
    learner.eval()
    with precision.autocast(device):
        test = evaluate(learner, examples["test"], batch_tokens, processes)
    best = 1 + task.epoch_ends.index(trainer.best["step"])
    say(f"best epoch {best} of {epochs}: validation accuracy {validation['accuracy']:.2%}")
    say(f"test accuracy {test['accuracy']:.2%}")
    seconds = trainer.seconds + extraction_seconds
    metrics = {
        "method": job.method,
        **test,
        "validation_accuracy": validation["accuracy"],
        "validation_loss": validation["loss"],
        "best_epoch": best,
        "epochs": epochs,
        "steps": trainer.steps,
        "lr": lr,
        "embeddings": faster,
        "trainable_params": trainable_params,
        "total_params": total_params,
        "train_seconds": round(seconds, 1),
        "total_seconds": round(time.monotonic() - started, 1),
        # A frozen encoder reads each text once, however many epochs its head trains.
        "tokens_per_second": round((tokens if learner is not model else trainer.tokens) / seconds),
        "peak_memory_bytes": peak_memory(device),
        "train_examples": len(examples["train"]),
        "seed": job.seed,
        "model": common.name,
        "data": args.data,
        "device": describe(device),
        "precision": common.precision.name,
        "attention": common.attention,
    }
    if processes.is_main:
        if job.method in ("full", "scratch"):
            save_model(model, common.tokenizer, run.directory)
            weights = run.directory / "model.safetensors"
        else:
            names, base_hash = common.reviews.names, common.settings["base"]
            weights = save_trained(
                run.directory, job.method, model, names, common.name, base_hash, args.max_len
            )
        metrics |= {"saved_bytes": weights.stat().st_size, "trained": trained}
        run.finish(metrics)
    return metrics


if __name__ == "__main__":
    run_script(main)
