"""Whether a data file is fit: rows, labels, duplicates, lengths, unknown tokens."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from minitune.checkpoint import load_tokenizer, read_config
from minitune.data import PACKAGED, SPLITS, Dataset, Reviews, Row
from minitune.support.baselines import evaluate_baselines
from minitune.support.errors import UserError, plural
from minitune.support.finding import GOOD, NOTE, WRONG, Finding
from minitune.support.model_names import default_model, find_model
from minitune.support.text_files import DEFAULT_COLUMNS, Columns

LONG = 512  # tokens that the default model reads of a text


def examine_data(name: str, columns: Columns = DEFAULT_COLUMNS) -> Iterator[Finding]:
    """Rows, labels, duplicates, lengths, unknown tokens; and the accuracy that is to be beaten."""
    try:
        dataset = Dataset(name, option="data", columns=columns)
        rows = list(dataset.split_rows())
    except UserError as error:
        if name not in PACKAGED and not Path(name).exists():
            raise  # no such file is no finding
        is_other = "no column named" in str(error)
        advice = "name it by --text-column or --label-column" if is_other else "put that right"
        yield Finding(name, WRONG, str(error), advice)
        return
    if not rows:
        yield Finding(name, WRONG, f"{name} holds no text", "add rows")
        return
    counts = Counter(row.split for row in rows)
    parts = ", ".join(f"{counts[split]:,} {split}" for split in SPLITS)
    yield Finding(name, GOOD, f"{name}: {plural(len(rows), 'row')} ({parts})")
    yield from _examine_duplicates(name, rows)
    yield from _examine_tokens(name, rows)
    labels = Counter(row.label for row in rows)
    if set(labels) == {None}:
        found = f"{name}: no labels: for train.py, not for finetune.py"
        yield Finding(name, NOTE, found)
        return
    try:
        reviews = Reviews.of(rows, dataset)
    except UserError as error:
        advice = "finetune.py cannot use it; train.py can" if None in labels else "add rows"
        yield Finding(name, WRONG, str(error), advice)
        return
    shares = [(labels[key], key) for key in labels]
    found = f"{name}: labels: " + ", ".join(
        f"{key} {n / len(rows):.0%}" for n, key in sorted(shares)
    )
    rarest = min(shares)[0] / len(rows) * len(shares)  # 1 where labels are even
    advice = "read macro F1 beside the accuracy; --class-weights balanced helps the rare ones"
    yield Finding(name, *([GOOD, found] if rarest > 0.5 else [NOTE, found, advice]))
    texts = {"train": reviews.texts["train"], "test": reviews.texts["validation"]}
    answers = {"train": reviews.labels["train"], "test": reviews.labels["validation"]}
    majority, nbsvm = evaluate_baselines(texts, answers, len(reviews.names))
    found = f"{name}: to beat, on its validation rows: the most frequent label "
    found += f"{majority['accuracy']:.1%}, NB-SVM (a bag of words) {nbsvm['accuracy']:.1%}"
    yield Finding(name, GOOD, found)
    if nbsvm["accuracy"] <= majority["accuracy"]:
        found = f"{name}: words alone tell nothing of the labels"
        yield Finding(name, NOTE, found, "too few rows, or labels that do not fit their texts?")


def _examine_duplicates(name: str, rows: list[Row]) -> Iterator[Finding]:
    """Texts that occur twice: within a split they count double, across splits they leak."""
    same: dict[str, list[Row]] = {}  # the rows of each text
    for row in rows:
        same.setdefault(row.text.strip(), []).append(row)
    labels = [{row.label for row in each} - {None} for each in same.values()]
    if contradictions := sum(len(given) > 1 for given in labels):
        found = f"{name}: {plural(contradictions, 'text')} with more than one label"
        yield Finding(name, WRONG, found, "decide which label is right, and keep that row")
    twice = len(rows) - len(same)
    across = sum(len({row.split for row in each}) > 1 for each in same.values())
    if across:
        found = f"{name}: {plural(across, 'text')} in two splits: the test is too easy"
        yield Finding(name, WRONG, found, "keep one row of each text")
    elif twice:
        found = f"{name}: {plural(twice, 'row')} with the text of an earlier row"
        yield Finding(name, NOTE, found, "keep one row of each text")
    else:
        yield Finding(name, GOOD, f"{name}: no text occurs twice")


def _examine_tokens(name: str, rows: list[Row]) -> Iterator[Finding]:
    """How long the texts are, and how much of them the default model's vocabulary knows."""
    model, _ = default_model()
    source = find_model(model)
    tokenizer = load_tokenizer(source, read_config(source))
    lengths, unknown = [], 0
    for start in range(0, len(rows), 1000):
        for ids in tokenizer.encode([row.text for row in rows[start : start + 1000]]):
            lengths.append(len(ids))
            unknown += ids.count(tokenizer.unk_id)
    share, cut = unknown / max(sum(lengths), 1), sum(length > LONG - 2 for length in lengths)
    middle = plural(int(np.median(lengths)), "token")
    found = f"{name}: {middle} in the middle, {max(lengths):,} at most (tokenizer of {model})"
    yield Finding(name, GOOD, found)
    if cut:
        found = f"{name}: {cut / len(rows):.1%} of the texts have more than {LONG} tokens"
        yield Finding(name, NOTE, found, "their middles are not read")
    if share > 0.01:
        found = f"{name}: {share:.1%} of the tokens are [UNK], unknown to {model}"
        yield Finding(name, WRONG, found, "pretrain on this text: python train.py --data …")
    if empty := lengths.count(0):
        found = f"{name}: {plural(empty, 'text')} without a token, of characters that are removed"
        yield Finding(name, WRONG, found, "take them out")
