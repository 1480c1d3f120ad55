"""Ask a pretrained BERT in words what it thinks of a review. Nothing here changes a weight.

    python prompt.py "An unforgettable film."                  label, probability, the words it had
    in mind python prompt.py "Dull." --template "{text} It was [MASK]." --words negative=bad,dull
    positive=good python prompt.py --evaluate imdb                           how much depends on how
    one asks python prompt.py --fill "The plot was [MASK] and the acting [MASK]." python prompt.py
    --generate 12 "The film was"

The answer to a cloze ("… It was [MASK].") is read from the probabilities of a few label words at
the mask (minitune/prompting.py). Labels measure how good that is; those of validation rows chose
the default templates, words and calibration.
"""

import argparse
import copy
import functools
import json
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from minitune.attention import BACKENDS, resolve_backend
from minitune.calibration import CALIBRATIONS, compare_prompts
from minitune.checkpoint import (
    default_model,
    find_model,
    load_masked_lm,
    load_tokenizer,
    read_config,
)
from minitune.data import Dataset, Reviews, label_index
from minitune.prediction import Ensemble, print_answers, say
from minitune.prompting import TEMPLATES, WORDS, FillMask, Prompt, fill_blanks, generate, in_words
from minitune.support.baselines import evaluate_baselines
from minitune.support.cli import (
    Parser,
    add_machine_options,
    choose_max_len,
    float_range,
    int_range,
    path,
    run_script,
    text,
)
from minitune.support.errors import UserError
from minitune.support.results import interval, prompt_summary, prompt_table
from minitune.support.runs import read_json, refuse_foreign_files, write_json
from minitune.support.runtime import Runtime
from minitune.tokenizer import Tokenizer

BEST = "prior"  # of CALIBRATIONS, on validation rows of both datasets: tests/benchmarks/LOG.md


def parser() -> Parser:
    """The options, grouped."""
    options = Parser("Ask a masked language model about reviews, with no weight changed.")
    texts = "reviews, or a .txt .csv .tsv .jsonl file, or - for the lines of stdin"
    options.add_argument("texts", nargs="*", metavar="TEXT", type=text, help=texts)
    add = options.group("what else it can do")
    evaluate = "score every template on test rows: imdb, rotten_tomatoes, a file"
    add("--evaluate", evaluate, metavar="DATA")
    add("--fill", "the most probable words for each [MASK] in it", metavar="SENTENCE")
    add("--generate", "write N tokens after each TEXT", int_range(1, 10**6), metavar="N")
    add = options.group("how it is asked")
    add("--model", "minilm, a BERT directory, a hub id; default: the last run of train.py")
    template = "with {text} and [MASK]; several answer together; default: eight of them"
    add("--template", template, default=TEMPLATES, nargs="+", metavar="SENTENCE")
    words = "the words of each label; where data has numbers, 0 is the first label"
    add("--words", words, nargs="+", metavar="LABEL=WORD,WORD")
    calibrate = "three ways that need no labels, or none; default: the best on validation rows"
    add("--calibrate", calibrate, CALIBRATIONS, BEST)
    data = "whose train rows are read for --calibrate prior and --shots"
    add("--data", data, default="imdb")
    unlabelled = "so many reviews for --calibrate prior"
    add("--unlabelled", unlabelled, int_range(1, 10**6), 256, metavar="N")
    add("--shots", "put K answered training reviews in front", int_range(1, 64), 0, metavar="K")
    add("--max-len", "tokens of a question; a text loses its beginning", int_range(8, 10**6), 128)
    add("--batch-tokens", "tokens that are read at a time", int_range(8, 10**7))
    add = options.group("what comes out")
    add("--top", "so many of the most probable words", int_range(1, 1000), 5)
    temperature = "of --generate; 0: always the most probable token"
    add("--temperature", temperature, float_range(0, 100, above=False), 0.7)
    add("--json", "print one JSON object a line", bool)
    curves = "compare.json of finetune.py --train-examples, to be drawn beside the prompt"
    add("--curves", curves, path, metavar="FILE")
    add("--out", "--evaluate writes its results here", path, Path("runs/prompt"))
    add_machine_options(options, BACKENDS)
    return options


def read_arguments() -> argparse.Namespace:
    """The options, with one thing to do."""
    args = parser().parse_args()
    asked = [
        args.evaluate is not None,
        args.fill is not None,
        args.generate is not None or bool(args.texts),
    ]
    if sum(asked) != 1:
        raise UserError(
            "give one of: texts (also with --generate N), --evaluate DATA, --fill SENTENCE"
        )
    if args.generate and not args.texts:
        raise UserError("--generate needs a text to go on after")
    if args.shots and (args.fill is not None or args.generate):
        raise UserError("--shots is for reviews")
    args.words = read_words(args.words) if args.words else WORDS
    return args


def read_words(arguments: list[str]) -> dict[str, list[str]]:
    """`negative=bad,dull` and so on as {label: words}."""
    words: dict[str, list[str]] = {}
    for argument in arguments:
        label, equals, listed = argument.partition("=")
        own = [word.strip() for word in listed.split(",") if word.strip()]
        if not (label.strip() and equals and own):
            raise UserError(f"--words {argument}: should be LABEL=WORD or LABEL=WORD,WORD")
        words.setdefault(label.strip(), []).extend(own)
    return words


def main() -> None:
    """The job, top to bottom."""
    args = read_arguments()
    runtime = Runtime.start(args.device, args.precision)

    # 1. A pretrained model, as it is.
    name, why = (args.model, "as asked") if args.model else default_model()
    source = find_model(name)
    attention = resolve_backend(
        args.attention, runtime.device, runtime.dtype, read_config(source).head_size
    )
    model, has_head = load_masked_lm(source, attention)
    if not has_head:
        raise UserError(
            f"{name} has no masked-LM head to ask; python train.py --init {name} gives it one"
        )
    tokenizer = load_tokenizer(source, model.config)
    fill_mask = FillMask(model.to(runtime.device).eval(), tokenizer, runtime, args.batch_tokens)
    say(
        f"model: {name} ({why}); {runtime.describe()}; "
        f"precision: {runtime.precision}; attention: {attention}"
    )

    # 2. The sentences it is asked to complete.
    if args.fill is not None:
        print_blanks(fill_blanks(fill_mask, args.fill, args.top), args.json)
        return
    if args.generate is not None:
        for text in args.texts:
            written = generate(fill_mask, text, args.generate, args.temperature, args.seed)
            if args.json:
                written = json.dumps({"text": text, "generated": written}, ensure_ascii=False)
            print(written)
        return
    choose_max_len(args.max_len, model.config.max_position_embeddings)
    prompts = [Prompt(sentence, args.words, fill_mask, args.max_len) for sentence in args.template]

    # 3. Answers, or how good they are.
    if args.evaluate is not None:
        evaluate(args, prompts, name)
        return
    unlabelled = []
    if args.shots:
        demonstrate(args, prompts, Reviews.load(Dataset(args.data)))
    if args.calibrate == "prior":
        texts = [row.text for row in Dataset(args.data).rows("train")]
        unlabelled = some_reviews(args, texts, tokenizer)
    ensemble = Ensemble(prompts, args.calibrate, unlabelled)
    best = " (the best on validation rows)" if args.calibrate == BEST else ""
    say(f"{len(prompts)} templates; calibration: {args.calibrate}{best}")
    cut = f"had no room in {args.max_len} tokens: their ends were read"
    predict = functools.partial(ensemble.predict, count=args.top)
    print_answers(args.texts, "TEXT", ensemble.names, predict, args.json, cut)


def some_reviews(
    args: argparse.Namespace, texts: list[str], tokenizer: Tokenizer
) -> list[list[int]]:
    """--unlabelled of these texts, as token ids; nobody looks at their labels."""
    rows = np.random.default_rng(args.seed).permutation(len(texts))[: args.unlabelled]
    return tokenizer.encode([texts[i] for i in rows])


def demonstrate(args: argparse.Namespace, prompts: list[Prompt], reviews: Reviews) -> None:
    """Put --shots labelled training reviews in front of every question."""
    labels = matching_labels(prompts[0].words.names, reviews, args.evaluate or args.data)
    chosen = reviews.balanced_subset("train", args.shots, args.seed)
    texts = prompts[0].fill_mask.tokenizer.encode([reviews.texts["train"][i] for i in chosen])
    for prompt in prompts:
        prompt.demonstrate(texts, labels[reviews.labels["train"][chosen]].tolist())


def matching_labels(names: dict[int, str], reviews: Reviews, source: str) -> Tensor:
    """Which of the prompt's labels each label of the data is."""
    matches = [label_index(name, names, numbers_too=True) for name in reviews.names.values()]
    if None in matches:
        stranger = reviews.names[matches.index(None)]
        raise UserError(
            f"{source}: the label {stranger} is none of --words: {', '.join(names.values())}"
        )
    return torch.tensor(matches)


def evaluate(args: argparse.Namespace, prompts: list[Prompt], name: str) -> None:
    """Every template with every calibration on the test rows: one table and one picture."""
    curves = read_curves(args.curves) if args.curves else []
    results = {"prompts.json", "prompts.png", "labels.png"}
    refuse_foreign_files(
        args.out, results | {f"{name}.partial" for name in results}, "result of prompt.py"
    )
    reviews = Reviews.load(Dataset(args.evaluate, option="--evaluate"))
    tokenizer = prompts[0].fill_mask.tokenizer
    labels = matching_labels(prompts[0].words.names, reviews, args.evaluate)[reviews.labels["test"]]
    texts = tokenizer.encode(reviews.texts["test"])
    unlabelled = some_reviews(args, reviews.texts["train"], tokenizer)
    asked = [(0, prompts)]
    if args.shots:  # do demonstrations help?
        with_shots = [copy.copy(prompt) for prompt in prompts]
        demonstrate(args, with_shots, reviews)
        asked.append((args.shots, with_shots))
    args.out.mkdir(parents=True, exist_ok=True)
    rows, started = [], time.monotonic()
    for shots, own in asked:
        rows += [row | {"shots": shots} for row in compare_prompts(own, texts, labels, unlabelled)]
    seconds = time.monotonic() - started
    baselines = evaluate_baselines(reviews.texts, reviews.labels, len(reviews.names))
    baselines = [row | {"interval": interval(row["accuracy"], len(texts))} for row in baselines]
    if args.json:
        print(*map(json.dumps, rows + baselines), sep="\n")
    else:
        print(f"{len(texts):,} test rows of {args.evaluate}:\n{prompt_table(rows, baselines)}")
        print("\n".join(prompt_summary(rows)))
    say(
        f"{len(prompts)} templates, {len(texts):,} texts and {len(unlabelled):,} unlabelled: {seconds:.0f} s"
    )
    settings = {"model": name, "data": args.evaluate, "words": args.words, "max_len": args.max_len}
    device = prompts[0].fill_mask.runtime.describe()
    settings |= {"seed": args.seed, "seconds": round(seconds, 1), "device": device}
    write_json(args.out / "prompts.json", settings | {"rows": rows, "with_labels": baselines})
    from minitune.support.plots import (  # matplotlib takes a second to import
        plot_prompts,
        plot_when_labels_pay,
    )

    title = f"{name} on {args.evaluate}"
    plot_prompts(rows, baselines, title, args.out / "prompts.png")
    if curves:
        without_labels = [
            row for row in rows if not row["shots"] and row["calibration"] == args.calibrate
        ]
        plot_when_labels_pay(curves, without_labels[-1], title, args.out / "labels.png")
    say(f"wrote {args.out}: prompts.png, prompts.json{', labels.png' if curves else ''}")


def read_curves(path: Path) -> list[dict]:
    """The rows of finetune.py's compare.json, if they hold several numbers of training rows."""
    try:
        rows = []
        for row in read_json(path)["rows"]:
            method, count, accuracy = (
                str(row["method"]),
                int(row["train_examples"]),
                float(row["accuracy"]),
            )
            low, high = map(float, row["interval"])
            if not (count > 0 and 0 <= accuracy <= 1 and -0.01 < low <= high < 1.01):
                raise ValueError
            rows.append(
                {
                    "method": method,
                    "train_examples": count,
                    "accuracy": accuracy,
                    "interval": (low, high),
                }
            )
        if len({row["train_examples"] for row in rows}) > 1:
            return rows
    except (AttributeError, KeyError, TypeError, ValueError):
        pass
    raise UserError(
        f"--curves {path}: no compare.json of finetune.py with several --train-examples"
    )


def print_blanks(blanks: list[list[tuple[str, float]]], as_json: bool) -> None:
    """One line a blank."""
    for number, words in enumerate(blanks, start=1):
        if as_json:
            listed = [{"word": word, "probability": probability} for word, probability in words]
            print(json.dumps({"blank": number, "words": listed}, ensure_ascii=False))
        else:
            print(f"blank {number}: {in_words(words)}")


if __name__ == "__main__":
    run_script(main)
