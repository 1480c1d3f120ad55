"""Ask a pretrained BERT in words what it thinks of a review. Nothing here changes a weight.

    python prompt.py "An unforgettable film."              label, probability, most probable words
    python prompt.py "Dull." --template "{text} It was [MASK]." --words no=bad,dull yes=good
    python prompt.py --evaluate imdb                       every template, with every calibration
    python prompt.py --fill "The plot was [MASK] and the acting [MASK]."
    python prompt.py --generate 12 "The film was"
    python prompt.py --explain "An unforgettable film."    what each word adds to the answer
    python prompt.py --look "The acting was [MASK]."       a picture of every head's attention
    python prompt.py --page demo.html                      the model in a file for any browser

The model fills the blank of a cloze, "An unforgettable film. It was [MASK].", and the probabilities
of a few words there, once they are calibrated, are its answer: minitune/prompting.py,
minitune/calibration.py. The default templates, words and calibration were chosen on validation
rows; --evaluate measures all of them on test rows.
"""

from minitune.support.cli import answer_at_once
from minitune.support.options import prompt_options

if __name__ == "__main__":
    answer_at_once(prompt_options())  # before torch is imported, which takes seconds

import argparse
import copy
import functools
import json
import reprlib
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from minitune import checkpoint
from minitune.attention import resolve_backend
from minitune.calibration import Ensemble, compare_prompts, draw_unlabelled
from minitune.cloze import ClozeClassifier, OneTemplate
from minitune.commands.labelling import rows_to_label
from minitune.commands.pages import page_of_prompts
from minitune.data import Dataset, Reviews
from minitune.explain import Question, attention_maps
from minitune.initialization import NEIGHBOUR_LAYERS, from_scratch, neighbour_offset
from minitune.prediction import ExplainedPrediction, explained
from minitune.prompting import (
    TEMPLATES,
    FillMask,
    Prompt,
    fill_blanks,
    generate,
    in_words,
    match_labels,
    read_words,
    with_blanks,
)
from minitune.support import cli
from minitune.support.answers import print_answers, say
from minitune.support.baselines import evaluate_baselines
from minitune.support.errors import UserError, plural
from minitune.support.model_names import began_at_random, default_model, find_model
from minitune.support.page import check_path, write_page
from minitune.support.results import interval, prompt_summary, prompt_table
from minitune.support.runs import read_json, refuse_foreign_files, write_json
from minitune.support.runtime import Runtime

BEST = "prior"  # of CALIBRATIONS, on validation rows of both datasets: tests/benchmarks/LOG.md
RESULTS = ("prompts.json", "prompts.png", "labels.png")


def read_arguments() -> argparse.Namespace:
    """The options, checked: exactly one job is given."""
    args = prompt_options().parse_args()
    jobs = args.texts or args.generate, args.evaluate, args.fill, args.look, args.page
    if sum(map(bool, jobs)) != 1:
        jobs = "texts (also with --generate N), --evaluate DATA, --fill SENTENCE, --look SENTENCE"
        raise UserError(f"give one of: {jobs}, --page NAME.html")
    if args.generate and not args.texts:
        raise UserError("--generate needs a text to continue")
    if args.shots and (args.fill or args.generate or args.look):
        raise UserError("--shots is for reviews")
    if args.explain and (args.generate or not args.texts):
        raise UserError("--explain goes with texts")
    if args.explain and len(args.template) > 1:
        if args.template != list(TEMPLATES):
            raise UserError("--explain takes one --template")
        args.template = list(TEMPLATES[:1])
    args.out = args.out or Path("runs/attention.png" if args.look else "runs/prompt")
    if args.look and (args.out.suffix != ".png" or args.out.is_dir()):
        raise UserError(f"--out {args.out}: --look writes a picture, NAME.png")
    args.words = read_words(args.words)
    if args.page:
        check_path(args.page)
    return args


def main() -> None:
    """A pretrained model, as it is, and one of six jobs for it."""
    args = read_arguments()
    precision = "fp32" if args.explain else args.precision
    runtime = Runtime.start(args.device, precision, args.threads)
    name, why = (args.model, "as given") if args.model else default_model()
    source = find_model(name)
    head_size = checkpoint.read_config(source).head_size
    attention = resolve_backend(args.attention, runtime.device, runtime.dtype, head_size)
    model, has_head = checkpoint.load_masked_lm(source, attention)
    if not has_head and not args.look:
        way_out = f"python train.py --init {name} gives it one"
        raise UserError(f"{name} has no masked-LM head to fill blanks with; {way_out}")
    tokenizer = checkpoint.load_tokenizer(source, model.config)
    fill_mask = FillMask(model.to(runtime.device).eval(), tokenizer, runtime, args.batch_tokens)
    machine = f"{runtime.describe()}; precision: {runtime.precision}; attention: {attention}"
    say(f"model: {name} ({why}); {machine}")

    if args.fill:
        fill(args, fill_mask)
    elif args.look:
        look(args, fill_mask, name, source)
    elif args.generate:
        write_on(args, fill_mask)
    else:
        cli.choose_max_len(args.max_len, model.config.max_position_embeddings)
        prompts = [
            Prompt(sentence, args.words, fill_mask, args.max_len) for sentence in args.template
        ]
        if args.evaluate:
            evaluate(args, prompts, name)
        elif args.page:
            page = page_of_prompts(calibrated(args, prompts), name)
            print(write_page(args.page, page, args.yes))
        else:
            classify(args, calibrated(args, prompts))


def fill(args: argparse.Namespace, fill_mask: FillMask) -> None:
    """--fill: the most probable words for each blank of a sentence."""
    for number, words in enumerate(fill_blanks(fill_mask, args.fill, args.top), start=1):
        listed = [{"word": word, "probability": probability} for word, probability in words]
        line = json.dumps({"blank": number, "words": listed}, ensure_ascii=False)
        print(line if args.json else f"blank {number}: {in_words(words)}")


def look(args: argparse.Namespace, fill_mask: FillMask, name: str, source: Path) -> None:
    """--look: a picture of all attention weights; of a run of train.py its first weights, too."""
    bert, tokenizer = fill_mask.model.bert, fill_mask.tokenizer
    ids = torch.tensor(with_blanks(args.look, tokenizer), device=fill_mask.runtime.device)
    if len(ids) > bert.config.max_position_embeddings:
        raise UserError(f"--look: {len(ids)} tokens are more than the model has positions")
    maps, offsets = {"": attention_maps(bert, ids).cpu().numpy()}, []
    settings = read_json(source / "settings.json") if began_at_random(source) else {}
    seed = settings.get("seed")  # the first weights follow from it
    if isinstance(seed, int) and 0 <= seed <= 2**31:
        start = from_scratch(bert.config, seed).bert
        maps = {"before training": attention_maps(start, ids.cpu()).numpy(), "after": maps[""]}
        offsets = [[neighbour_offset(head) for head in range(bert.config.num_attention_heads)]]
        offsets *= NEIGHBOUR_LAYERS
    args.out.parent.mkdir(parents=True, exist_ok=True)
    from minitune.support import plots  # matplotlib takes a second to import

    tokens = [tokenizer.token(i) for i in ids.tolist()]
    plots.plot_attention(maps, tokens, offsets, f"{name}: {args.look}", args.out)
    print(f"wrote {args.out}: how much each token (row) takes of each token (column)")


def write_on(args: argparse.Namespace, fill_mask: FillMask) -> None:
    """--generate: each text, and the tokens that the model writes after it."""
    for text in args.texts:
        written = generate(fill_mask, text, args.generate, args.temperature, args.seed)
        line = {"text": text, "generated": written}
        print(json.dumps(line, ensure_ascii=False) if args.json else written)


def calibrated(args: argparse.Namespace, prompts: list[Prompt]) -> Ensemble:
    """All templates together, with the train rows that --shots and --calibrate need."""
    if args.shots:
        demonstrate(args, prompts, Reviews.load(Dataset(args.data, columns=cli.columns(args))))
    unlabelled = []
    if args.calibrate == "prior":
        texts = [row.text for row in Dataset(args.data, columns=cli.columns(args)).rows("train")]
        unlabelled = prompts[0].fill_mask.tokenizer.encode(choose_unlabelled(args, texts))
    ensemble = Ensemble(prompts, args.calibrate, unlabelled)
    best = " (the best on validation rows)" if args.calibrate == BEST else ""
    say(f"{plural(len(prompts), 'template')}; calibration: {args.calibrate}{best}")
    return ensemble


def classify(args: argparse.Namespace, ensemble: Ensemble) -> None:
    """The label of each text."""
    rows = rows_to_label(args.texts, "TEXT", ensemble.names, cli.columns(args))
    predict = functools.partial(ensemble.predict, count=args.top)
    if args.explain:  # one after the other
        predict = functools.partial(map, functools.partial(explain_answer, ensemble))
    cut = f"had no room in {args.max_len} tokens: their ends were read"
    print_answers(rows, predict, args.json, cut)


def explain_answer(ensemble: Ensemble, text: str) -> ExplainedPrediction:
    """The answer of the first template to a text, and what each word of the query adds to it."""
    prompt, tokenizer = ensemble.prompts[0], ensemble.prompts[0].fill_mask.tokenizer
    (ids,) = tokenizer.encode([text])
    if set(ids) <= set(tokenizer.special_ids.tolist()):
        raise UserError(f"{reprlib.repr(text)}: it has no word that the model knows")
    query = prompt.query(ids, [tokenizer.mask_id])
    how = [prompt.template], prompt.verbalizer, prompt.max_len
    model = ClozeClassifier(prompt.fill_mask.model, tokenizer, *how)
    model.offsets[0] = ensemble.biases[0]
    first = OneTemplate(model.to(prompt.fill_mask.runtime.device), 0, *query.positions)
    budget = prompt.fill_mask.batch_tokens
    question = Question(first, tokenizer, query.ids, ensemble.names, budget)
    return explained(text, len(ids) > prompt.room, question, ensemble.names)


def choose_unlabelled(args: argparse.Namespace, texts: list[str]) -> list[str]:
    """--unlabelled of these texts, drawn at random without a look at their labels."""
    rows = draw_unlabelled(args.unlabelled, len(texts), args.seed)
    return [texts[i] for i in rows]


def demonstrate(args: argparse.Namespace, prompts: list[Prompt], reviews: Reviews) -> None:
    """Put --shots training reviews with their labels in front of every query."""
    labels = matching_labels(prompts[0], reviews, args.evaluate or args.data)
    chosen = reviews.balanced_subset("train", args.shots, args.seed)
    texts = prompts[0].fill_mask.tokenizer.encode([reviews.texts["train"][i] for i in chosen])
    for prompt in prompts:
        prompt.demonstrate(texts, labels[reviews.labels["train"][chosen]].tolist())


def matching_labels(prompt: Prompt, reviews: Reviews, source: str) -> Tensor:
    """For each label of the data the index of the prompt's label with that name or number."""
    return torch.tensor(match_labels(reviews.names, prompt.verbalizer.names, source))


def evaluate(args: argparse.Namespace, prompts: list[Prompt], model: str) -> None:
    """Every template with every calibration on the test rows: one table and one picture."""
    curves = read_curves(args.curves) if args.curves else []
    names = {*RESULTS, *(f"{name}.partial" for name in RESULTS)}
    refuse_foreign_files(args.out, names, "result of prompt.py")
    reviews = Reviews.load(Dataset(args.evaluate, option="--evaluate", columns=cli.columns(args)))
    encode = prompts[0].fill_mask.tokenizer.encode
    texts = encode(reviews.texts["test"])
    labels = matching_labels(prompts[0], reviews, args.evaluate)[reviews.labels["test"]]
    unlabelled = encode(choose_unlabelled(args, reviews.texts["train"]))
    compared = {0: prompts}
    if args.shots:  # with and without demonstrations, to see what they are worth
        compared[args.shots] = [copy.copy(prompt) for prompt in prompts]
        demonstrate(args, compared[args.shots], reviews)
    prompts[0].scores([[]])  # damaged weights are an error before --out is made
    args.out.mkdir(parents=True, exist_ok=True)
    say(f"data: {args.evaluate}: {reviews.describe()}")

    started, rows = time.monotonic(), []
    for shots, several in compared.items():
        compared_rows = compare_prompts(several, texts, labels, unlabelled)
        rows += [row | {"shots": shots} for row in compared_rows]
    seconds = round(time.monotonic() - started, 1)
    baselines = evaluate_baselines(reviews.texts, reviews.labels, len(reviews.names))
    baselines = [row | {"interval": interval(row["accuracy"], len(texts))} for row in baselines]
    facts = {"model": model, "data": args.evaluate, "words": args.words, "max_len": args.max_len}
    device = prompts[0].fill_mask.runtime.describe()
    facts |= {"seed": args.seed, "seconds": seconds, "device": device}
    write_json(args.out / "prompts.json", facts | {"rows": rows, "with_labels": baselines})

    if args.json:
        print(*map(json.dumps, rows + baselines), sep="\n")
    else:
        print(f"{plural(len(texts), 'test row')} of {args.evaluate}:")
        print(prompt_table(rows, baselines), *prompt_summary(rows), sep="\n")
    counts = f"{plural(len(prompts), 'template')}, {plural(len(texts), 'text')}"
    say(f"{counts} and {len(unlabelled):,} unlabelled: {seconds:.0f} s")
    draw(args, rows, baselines, curves, title=f"{model} on {args.evaluate}")
    say(f"wrote {args.out}: prompts.json, prompts.png{', labels.png' if curves else ''}")


def draw(
    args: argparse.Namespace, rows: list[dict], baselines: list[dict], curves: list, title: str
) -> None:
    """The accuracy of each prompt; and with --curves, that of all templates beside fine-tuning."""
    from minitune.support import plots  # matplotlib takes a second to import

    with cli.drawing(args.out / "prompts.png") as picture:
        plots.plot_prompts(rows, baselines, title, picture)
    if curves:
        # The last such row is that of all templates together.
        *_, prompt = (r for r in rows if (r["shots"], r["calibration"]) == (0, args.calibrate))
        with cli.drawing(args.out / "labels.png") as picture:
            plots.plot_comparison(curves, title, picture, prompt)


def read_curves(path: Path) -> list[dict]:
    """The rows of a compare.json of finetune.py with several numbers of training rows."""
    try:
        rows = read_json(path)["rows"]
        shares = np.array([[row["accuracy"], *row["interval"]] for row in rows], dtype=float)
        counts = {int(row["train_examples"]) for row in rows}
        if len(counts) > 1 and min(counts) > 0 and ((0 <= shares) & (shares <= 1)).all():
            return rows
    except (KeyError, TypeError, ValueError, OverflowError):
        pass
    raise UserError(f"--curves {path}: no compare.json of finetune.py --train-examples N N")


if __name__ == "__main__":
    cli.run_script(main)
