"""Fine-tune a pretrained BERT for the sentiment of reviews, by one method or several side by side.

    python finetune.py --method adapter                        small bottlenecks in a frozen network
    python finetune.py --method feature bitfit adapter full    one table, one picture
    python finetune.py --method full --model minilm --data rotten_tomatoes
    python finetune.py --model runs/finetune/adapter --predict "An unforgettable film."
    python finetune.py --model runs/finetune/adapter --predict "An unforgettable film." --explain

The steps below are those of any fine-tuning: get a pretrained model, get labelled texts, train,
compare. Step 3, for one method, is minitune/finetuning.py: decide what is trained, train it, keep
the best by validation, and score the test rows once, at the end.
"""

from minitune.support.cli import answer_at_once
from minitune.support.options import finetune_options

if __name__ == "__main__":
    answer_at_once(finetune_options())  # before torch is imported, which takes seconds

import argparse
import contextlib
import itertools
import json
from collections import Counter
from pathlib import Path

from minitune.attention import resolve_backend
from minitune.bag_of_words import add_bag, ensemble_figures
from minitune.checkpoint import load_tokenizer, read_config, weights_hash
from minitune.classification import Examples, TokenizedTexts
from minitune.commands.labelling import evaluate_explanations, label_new_reviews
from minitune.commands.pages import write_page_of_run
from minitune.data import SPLITS, Dataset, Reviews
from minitune.experiment import Experiment, Setup
from minitune.finetuning import fine_tune
from minitune.merging import merge_runs
from minitune.methods import METHODS, build, check_options, keep_options, options_of
from minitune.peft_files import read_trained
from minitune.second_task import head_of
from minitune.support.baselines import NBSVM, answer_test_rows
from minitune.support.cli import (
    choose_max_len,
    columns,
    drawing,
    options_to_save,
    run_script,
)
from minitune.support.errors import UserError
from minitune.support.model_names import default_model, find_model
from minitune.support.results import COLUMNS, UNEVEN_COLUMNS, summarise, table
from minitune.support.runs import Run, read_json, refuse_foreign_files, write_json
from minitune.support.runtime import Runtime, return_freed_memory

UNEVEN = 1.5  # times the rows of the rarest label; where one has more, the table has macro F1

# On resume these may differ from the saved settings; the others must be the same.
MAY_CHANGE = {"method", "bag", "seed", "seeds", "train_examples", "lr",
              "device", "threads", "precision", "attention", "compile", "cuda_graphs",
              "save_minutes"}  # fmt: skip


# What a run was computed from, beside its options, by the key of its hash in settings.json.
SOURCES = {"base_hash": "base model", "start_hash": "run to train on", "dataset": "data"}


def read_arguments() -> argparse.Namespace:
    """The options; with --resume, those that are not given are the last run's."""
    options = finetune_options()
    args = options.parse_args()
    jobs = bool(args.predict) + bool(args.evaluate)
    if args.explain and jobs != 1 or args.evaluate and not args.explain:
        raise UserError("--explain goes with --predict TEXT, or with --evaluate N")
    if args.merge and (args.predict or args.evaluate or args.resume or args.model):
        raise UserError("--merge takes runs, and --out; not --model, --predict or --resume")
    if args.page and (args.predict or args.evaluate or args.merge or args.resume):
        raise UserError("--page takes a run, --model, and none of --predict, --merge, --resume")
    if args.merge and args.out == options.get_default("out"):
        raise UserError("--merge needs --out, the directory to write to")
    if args.weights and not args.merge:
        raise UserError("--weights goes with --merge")
    if args.resume and not args.predict and (found := list(args.out.rglob("settings.json"))):
        latest = max(found, key=lambda path: path.stat().st_mtime)
        if "experiment" not in (saved := read_json(latest)):
            raise UserError(f"--out {latest.parent} holds something that is no run of this script")
        args = options.resumed(saved, MAY_CHANGE, latest.parent)
    sizes = args.train_examples or []
    if 1 in sizes or (0 in sizes and not args.unlabelled):
        raise UserError(f"--train-examples {min(sizes)}: 2 rows or more, or 0 with --unlabelled")
    if args.unlabelled and (not sizes or args.class_weights != "none"):
        raise UserError("--unlabelled goes with --train-examples, and not with --class-weights")
    if args.bag and args.unlabelled:  # the weights of a bag are fitted on labelled rows
        raise UserError("--bag does not go with --unlabelled")
    # Beside others scratch is there to compare with, and goes without.
    alone = {"scratch"} if args.method == ["scratch"] else set()
    if args.masked_words and (wrong := {"feature", "prompt", *alone} & set(args.method)):
        raise UserError(f"--masked-words does not go with --method {min(wrong)}")
    return args


def open_runs(args: argparse.Namespace, stack: contextlib.ExitStack) -> list[Experiment]:
    """The runs that the options describe, each locked until the stack is closed."""
    methods = [name for name in METHODS if name in args.method]
    if len(methods) > 1 and "scratch" not in methods:
        methods.append("scratch")  # so that the table shows what pretraining is worth
    names = {*METHODS, "compare.json", "compare.png"}
    names |= {f"{name}.partial" for name in names}  # a kill may leave it
    refuse_foreign_files(args.out, names, "run of finetune.py")
    sizes = list(dict.fromkeys(args.train_examples or [None]))
    experiments = []
    for method, size, k in itertools.product(methods, sizes, range(args.seeds)):
        directory = args.out / method
        if len(sizes) > 1:
            directory /= str(size)
        if k:
            directory /= f"seed-{args.seed + k}"
        run = Run.open(directory, args.resume, args.overwrite, mark="experiment")
        experiment = Experiment(method, size, args.seed + k, stack.enter_context(run))
        if settings := experiment.run.settings:
            finetune_options().check_same(args, settings, MAY_CHANGE, directory)
            if not settings.keys() >= {"base_hash", "dataset", "soup"}:
                raise UserError(f"--resume: the settings of the run in {directory} are not whole")
            if settings["experiment"] != experiment.description:
                raise UserError(f"--resume: the run in {directory} is {settings['experiment']}")
        experiments.append(experiment)
    return experiments


def finished_runs(out: Path, settings: dict) -> list[tuple[Path, dict, dict]]:
    """(directory, experiment, metrics) of all runs in --out on this base model and data."""
    runs = {}
    for file in sorted(out.rglob("metrics.json")):
        metrics, saved = read_json(file), read_json(file.with_name("settings.json"))
        kinds = [type(metrics.get(key)) for key in ("accuracy", "train_examples")]
        if kinds != [float, int] or metrics.get("method") not in list(METHODS):
            raise UserError(f"{file} is damaged: it has no accuracy of a method")
        same = {key: metrics.get(key) for key in ("method", "train_examples", "seed")}
        if saved.get("experiment") not in (same, same | {"train_examples": None}):
            raise UserError(f"{file} is damaged: settings.json beside it has another experiment")
        if all(saved.get(key) == settings[key] for key in SOURCES):
            runs[json.dumps(saved["experiment"])] = file.parent, saved["experiment"], metrics
    return sorted(runs.values(), key=lambda run: list(METHODS).index(run[2]["method"]))


def main() -> None:
    """Label new reviews, merge runs, write a page, or lock --out and fine-tune."""
    args = read_arguments()
    if args.page:
        write_page_of_run(args)
        return
    if args.evaluate:
        evaluate_explanations(args)
        return
    if args.predict:
        label_new_reviews(args)
        return
    if args.merge:
        merge_runs(args)
        return
    with contextlib.ExitStack() as stack:
        fine_tune_all(args, open_runs(args, stack))


def fine_tune_all(args: argparse.Namespace, experiments: list[Experiment]) -> None:
    """The job, top to bottom."""
    runtime = Runtime.start(args.device, args.precision, args.threads)

    # 1. A pretrained model.
    why = "given by --model"
    if args.model is None:
        args.model, why = default_model()
    directory = source = find_model(args.model)
    start = read_trained(directory)
    if start and start.is_whole:  # a run of prompt is a pretrained model, too
        start = None
    if start:
        source = start.find_base(directory, args.base)
    elif args.base:
        raise UserError(f"--base goes with --predict or --merge: {directory} is a whole model")
    config = read_config(source)
    size = f"{config.num_hidden_layers} layers of {config.hidden_size}"
    runtime.log(f"model: {args.model} ({why}), {size}")
    for experiment in experiments:
        check_options(experiment.method, config, args)
        if experiment.run.directory.resolve() == directory.resolve():
            raise UserError(f"--overwrite would delete {directory}, which --model names")
        if start and experiment.method != start.method:
            raise UserError(f"{directory} is a run of {start.method}: --method {start.method}")
    if start:
        keep_options(start, directory, args)
    tokenizer = load_tokenizer(source, config)
    attention = resolve_backend(args.attention, runtime.device, runtime.dtype, config.head_size)
    compiles = runtime.compiles(args.compile, attention)
    args.max_len = choose_max_len(args.max_len, config.max_position_embeddings, args.batch_tokens)

    # 2. Labelled reviews, as token ids.
    dataset = Dataset(args.data, args.test, columns=columns(args))
    reviews = Reviews.load(dataset)
    runtime.log(f"data: {args.data}: {reviews.describe()}")
    same = start is None or start.labels == reviews.names
    if start and start.foreign:  # peft saves no names of labels: those of the data are taken
        same = len(start.labels) == len(reviews.names)
    if not same:
        raise UserError(f"{directory} has the labels {', '.join(start.labels.values())}")
    for experiment in experiments:  # too many rows are an error now, not after the first run
        reviews.balanced_subset("train", experiment.train_examples or 0, experiment.seed)
    if args.unlabelled and max(args.train_examples) >= len(reviews.texts["train"]):
        raise UserError("--unlabelled: --train-examples leaves no row without a label")
    asks = start is None and any(experiment.method == "prompt" for experiment in experiments)
    if args.unlabelled or asks:  # a base that fills no blanks is an error now, too
        build("prompt", source, reviews.names, **options_of("prompt", args))
    head = head_of(source).to(runtime.device) if args.masked_words else None
    examples = {}
    for split in SPLITS:
        sequences = TokenizedTexts(reviews.texts[split], tokenizer, args.max_len)
        examples[split] = Examples(sequences, reviews.labels[split])
    cut = sum(examples["train"].inputs.truncated) / len(examples["train"])
    runtime.log(
        f"{cut:.0%} of the training rows have over {args.max_len} tokens; two ends are kept"
    )
    runtime.log(f"device: {runtime.describe()}\n{runtime.describe_ways(attention, compiles)}")

    # 3. Train each method from the same weights, on the same rows.
    settings = options_to_save(args)
    settings |= {"base_hash": weights_hash(source), "dataset": dataset.fingerprint()}
    settings["start_hash"] = weights_hash(directory, start.weights) if start else None
    for run in (experiment.run for experiment in experiments if experiment.run.settings):
        for key, what in SOURCES.items():
            if run.settings.get(key) != settings[key]:
                raise UserError(f"the {what} of the run in {run.directory} has changed since then")
    what = args, settings, source, start, tokenizer, reviews, examples, runtime, attention
    setup = Setup(*what, head=head)
    finished_runs(args.out, settings)  # what is damaged is an error now
    for experiment in experiments:
        return_freed_memory()  # each one's peak memory is its own
        fine_tune(experiment, setup)

    # 4. Compare all runs in --out, and with methods that need no network.
    runtime.close()
    if not runtime.is_main:
        return
    runs = finished_runs(args.out, settings)
    results = [metrics for *_, metrics in runs]
    # With all rows nothing in the baselines depends on a seed.
    choices = ((one["train_examples"], one["train_examples"] and one["seed"]) for _, one, _ in runs)
    baselines = {}
    for size, seed in dict.fromkeys(choices):
        chosen = None if size is None else reviews.balanced_subset("train", size, seed)
        rows, model = (reviews.texts, reviews.labels, len(reviews.names), chosen), NBSVM()
        baselines[size, seed] = answer_test_rows(*rows, model)
        results += [row | {"seed": seed} for row, _ in baselines[size, seed]]
        for experiment in experiments if args.bag else []:
            if (size, seed) == (experiment.train_examples, size and experiment.seed):
                add_bag(experiment.run.directory, model, reviews, size, experiment.seed)
    results += [row for directory, *_ in runs for row in ensemble_figures(directory)]
    order = dict.fromkeys(["majority", "nb-svm", "scratch", *METHODS])
    order = [name for method in order for name in (method, f"{method} + bag")]
    test_rows = len(reviews.texts["test"])
    rows = summarise(results, test_rows, order)
    counts = Counter(reviews.labels["test"].tolist()).values()
    shown = UNEVEN_COLUMNS if max(counts) > UNEVEN * min(counts) else COLUMNS
    runtime.log(f"\n{test_rows:,} test rows of {args.data}:\n{table(rows, shown)}")
    write_json(args.out / "compare.json", {"rows": rows, "runs": results})
    with drawing(args.out / "compare.png") as picture:
        from minitune.support.plots import plot_comparison  # matplotlib takes a second to import

        plot_comparison(rows, f"{args.model} on {args.data}", picture)
    for experiment in experiments:
        directory, size = experiment.run.directory, experiment.train_examples
        with drawing(directory / "report.html"):
            from minitune.support.report import write_report
            from minitune.support.report_fine_tuning import record_mistakes

            answered = baselines[size, size and experiment.seed]
            record_mistakes(directory, reviews.texts["test"], answered)
            write_report(directory)
    runtime.log(f"wrote {args.out}: a directory for each method, compare.png, compare.json")


if __name__ == "__main__":
    run_script(main)
