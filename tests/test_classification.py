"""The task of fine-tuning: cut texts, batches, epochs and the best of them, dropout, accuracy."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn

from minitune.batching import PackedBatch, shuffled_batches
from minitune.classification import Classification, Examples, TokenizedTexts
from minitune.features import Features
from minitune.model import BertConfig, BertForSequenceClassification
from minitune.optimizer import Optimizer
from minitune.support.results import interval
from minitune.support.runs import Run
from minitune.support.runtime import Runtime
from minitune.tokenizer import Tokenizer
from minitune.training import Trainer, evaluate

FIRST_WORD = 5  # w0, after the special tokens; w1 is 6, and so on
CLS, SEP = 2, 3
CPU = Runtime.start("cpu", "fp32")


@pytest.fixture
def tokenizer(tmp_path):
    """A vocabulary in which w0, w1, w2, … are whole words with ids in that order."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(600))]
    (tmp_path / "vocab.txt").write_text("".join(f"{word}\n" for word in words))
    return Tokenizer.load(tmp_path)


def words(count):
    return " ".join(f"w{i}" for i in range(count))


def ids(*numbers):
    """Of these words, in their frame."""
    return [CLS, *(FIRST_WORD + i for i in numbers), SEP]


@pytest.fixture
def examples(tokenizer):
    """40 texts of 3 to 30 tokens; text i begins with word i, and every third is of label 1."""
    rng = np.random.default_rng(0)
    texts = [" ".join(f"w{i + 40 * k}" for k in range(rng.integers(1, 15))) for i in range(39)]
    texts.append("w39 " + words(40))
    labels = torch.tensor([int(i % 3 == 0) for i in range(40)])
    return Examples(TokenizedTexts(texts, tokenizer, 30), labels)


def task_for(examples, batch_tokens=60, epochs=3, seed=0):
    return Classification(examples, examples, batch_tokens=batch_tokens, epochs=epochs, seed=seed)


# Texts that are cut


@pytest.mark.parametrize(
    "max_len, head",
    [(8, 2), (9, 2), (11, 2), (12, 2), (13, 3), (14, 3), (64, 16), (130, 32), (256, 64)],
)
def test_a_long_text_keeps_its_first_quarter_and_its_end(tokenizer, max_len, head):
    room = max_len - 2
    for count in (room + 1, room + 2, 2 * room, 300):
        sequences = TokenizedTexts([words(count)], tokenizer, max_len)
        kept = [*range(head), *range(count - (room - head), count)]
        assert sequences.ids[0].tolist() == ids(*kept)
        assert sequences.lengths.tolist() == [max_len] and sequences.truncated == [True]


@pytest.mark.parametrize("max_len", [8, 9, 256])
def test_a_text_that_fits_is_kept_whole(tokenizer, max_len):
    for count in (1, max_len - 3, max_len - 2):
        sequences = TokenizedTexts([words(count)], tokenizer, max_len)
        assert sequences.ids[0].tolist() == ids(*range(count)) and sequences.truncated == [False]
        assert sequences.lengths.tolist() == [count + 2]


def test_each_text_is_flagged_by_itself(tokenizer):
    sequences = TokenizedTexts([words(6), words(7), "w3", words(50), ""], tokenizer, 8)
    assert sequences.truncated == [False, True, False, True, False]
    assert sequences.lengths.tolist() == [8, 8, 3, 8, 2]


def test_a_choice_of_texts_keeps_what_belongs_to_each(tokenizer):
    whole = Examples(
        TokenizedTexts([words(n) for n in (3, 9, 1, 5)], tokenizer, 8), torch.tensor([0, 1, 1, 0])
    )
    chosen = whole.select(np.array([1, 3]))
    assert [row.tolist() for row in chosen.inputs.ids] == [
        ids(0, 1, 5, 6, 7, 8),
        ids(0, 1, 2, 3, 4),
    ]
    assert chosen.inputs.truncated == [True, False] and chosen.inputs.lengths.tolist() == [8, 7]
    assert chosen.labels.tolist() == [1, 0] and len(chosen) == 2 and chosen.tokens == 15
    assert len(whole) == 4 and whole.tokens == 5 + 8 + 3 + 7


# Batches


def rows(batch):
    """Which of the 40 texts these are, by their first words."""
    return [int(ids[1]) - FIRST_WORD for ids in batch.inputs.ids]


def test_a_batch_holds_its_rows_and_their_labels(examples):
    batch = examples.select(np.array([7, 39, 0]))
    (packed,), labels = batch.to(CPU.device)
    starts = packed.tokens[packed.cu_seqlens[:-1].long() + 1]
    assert (starts - FIRST_WORD).tolist() == [7, 39, 0] and labels.tolist() == [0, 1, 1]
    assert (len(batch), batch.tokens) == (3, packed.tokens.numel())


@pytest.mark.parametrize("parts", [1, 2, 3, 7, 50])
def test_parts_of_a_batch_hold_every_row_once_and_none_is_empty(examples, parts):
    batch = examples.select(np.array([3, 1, 4, 15, 9, 2, 6]))
    shares = batch.split(parts)
    assert len(shares) == min(parts, 7) and all(len(share) for share in shares)
    assert [row for share in shares for row in rows(share)] == [3, 1, 4, 15, 9, 2, 6]
    assert torch.equal(torch.cat([share.labels for share in shares]), batch.labels)
    sizes = [len(share) for share in shares]
    assert max(sizes) - min(sizes) <= 1 and sum(share.tokens for share in shares) == batch.tokens


def test_the_losses_of_parts_add_up_to_that_of_the_whole(examples):
    model, task = classifier(), task_for(examples)
    batch = examples.select(np.arange(13))
    with torch.no_grad():
        minimised, reported = task.loss(model, *batch.to(CPU.device))
        parts = [task.loss(model, *part.to(CPU.device))[0].item() for part in batch.split(4)]
        inputs, labels = batch.to(CPU.device)
        p = model(*inputs).double().softmax(-1)
    whole = minimised.item()
    assert reported.item() == whole
    assert len(set(parts)) == 4 and sum(parts) == pytest.approx(whole, rel=1e-5)
    by_hand = -sum(math.log(p[i, label]) for i, label in enumerate(labels.tolist()))
    assert whole == pytest.approx(by_hand, rel=1e-5)


@pytest.mark.parametrize("batch_tokens", [30, 60, 250, 100_000])
def test_every_epoch_reads_each_row_once(examples, batch_tokens):
    task, start = task_for(examples, batch_tokens, epochs=4), 0
    assert len(task.epoch_ends) == 4 and task.steps == task.epoch_ends[-1]
    batches = task.batches(0)
    epochs = []
    for end in task.epoch_ends:
        own = [next(batches) for _ in range(end - start)]
        assert all(batch.tokens <= batch_tokens for batch in own)
        epochs.append([i for batch in own for i in rows(batch)])
        assert sorted(epochs[-1]) == list(range(40))
        start = end
    if batch_tokens < 100_000:
        assert epochs[0] != epochs[1]


def test_validation_is_due_at_the_end_of_each_epoch(examples):
    task = task_for(examples, epochs=4)
    due = [step for step in range(1, task.steps + 1) if task.evaluation_due(step, task.steps)]
    assert due == task.epoch_ends


@pytest.mark.parametrize("first", [0, 1, 5, 17])
def test_a_resumed_run_goes_on_with_the_batches_that_are_left(examples, first):
    task = task_for(examples)
    assert task.steps > 17
    whole = [rows(batch) for batch in itertools.islice(task.batches(0), task.steps)]
    left = itertools.islice(task_for(examples).batches(first), task.steps - first)
    assert [rows(batch) for batch in left] == whole[first:]


def test_the_order_of_rows_depends_on_the_seed(examples):
    orders = {seed: rows(next(task_for(examples, seed=seed).batches(0))) for seed in (0, 1)}
    assert orders[0] != orders[1]
    assert orders[0] == next(shuffled_batches(examples.inputs.lengths, 60, 0)).tolist()


# Validation, and the best epoch


class Table(nn.Module):
    """A classifier whose features are the logits."""

    def forward(self, logits):
        return logits


def some_logits(rows=11, labels=3):
    torch.manual_seed(0)
    return torch.randn(rows, labels), torch.randint(labels, (rows,))


@pytest.mark.parametrize("batch_tokens", [1, 4, 100])
def test_accuracy_and_loss_are_those_of_a_loop_over_the_rows(batch_tokens):
    logits, labels = some_logits()
    batches = Examples(Features(logits), labels).batches(batch_tokens)
    metrics = evaluate(Table(), batches, CPU)
    right, loss = 0, 0.0
    for row, label in zip(logits.double().tolist(), labels.tolist(), strict=True):
        right += max(range(3), key=row.__getitem__) == label
        loss += math.log(sum(math.exp(x) for x in row)) - row[label]
    assert 0 < right < 11
    assert metrics == {"accuracy": right / 11, "loss": pytest.approx(loss / 11, rel=1e-6)}


# Uneven labels


@pytest.mark.parametrize("class_weights, share", [("none", 0.1), ("balanced", 0.5)])
def test_balanced_weights_let_a_rare_label_count_as_much_as_a_frequent_one(
    tmp_path, class_weights, share
):
    # All rows have the same text, so that all it can learn is how frequent label 1 is.
    train = Examples(Features(torch.ones(40, 1)), torch.tensor(4 * [*9 * [0], 1]))
    shape = {"batch_tokens": 40, "epochs": 300, "seed": 0}
    task = Classification(train, train, class_weights=class_weights, **shape)
    model, run = nn.Linear(1, 2), Run(tmp_path)
    run.start({})
    trainer = Trainer(model, Optimizer(model, "adamw", 0.1, 0.1, 0.0), task, run, CPU, seed=0)
    trainer.steps = task.steps
    trainer.train()
    # What is reported has no weights, so that runs can be compared.
    loss = -0.1 * math.log(share) - 0.9 * math.log(1 - share)
    assert run.read_log()[-1]["loss"] == pytest.approx(loss, abs=1e-3)


def test_balanced_weights_are_those_of_the_training_rows(examples):
    model = classifier()
    few = examples.select(np.array([0, 1, 2]))  # of 40 rows 14 have label 1; here it is one of 3
    task = Classification(
        examples, few, batch_tokens=60, epochs=1, seed=0, class_weights="balanced"
    )
    inputs, labels = few.to(CPU.device)
    with torch.no_grad():
        logs = model(*inputs).double().log_softmax(-1)
        minimised, reported = task.loss(model, inputs, labels)
    by_hand = [-logs[i, y].item() for i, y in enumerate(labels.tolist())]
    weights = [40 / (2 * (14 if y else 26)) for y in labels.tolist()]
    assert reported.item() == pytest.approx(sum(by_hand), rel=1e-6)
    weighted = sum(w * x for w, x in zip(weights, by_hand, strict=True))
    assert minimised.item() == pytest.approx(weighted, rel=1e-6)


def test_labels_may_be_probabilities(examples):
    model, probabilities = classifier(), torch.tensor([[0.9, 0.1], [0.25, 0.75], [0.0, 1.0]])
    train = Examples(examples.inputs.select(np.array([0, 1, 2])), probabilities)
    task = Classification(train, examples, batch_tokens=60, epochs=1, seed=0)
    inputs, labels = train.to(CPU.device)
    with torch.no_grad():
        logs = model(*inputs).double().log_softmax(-1)
        minimised, reported = task.loss(model, inputs, labels)
    by_hand = -(probabilities.double() * logs).sum().item()
    assert minimised.item() == reported.item() == pytest.approx(by_hand, rel=1e-6)


def classifier(**options):
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24} | options
    names = {0: "a", 1: "b"}
    return BertForSequenceClassification(
        BertConfig(605, 16, initializer_range=0.2, id2label=names, **sizes)
    )


def train_in_place(model, task, directory, before):
    """Train at a rate that changes no weight; each step's (loss, metrics of validation)."""
    torch.manual_seed(before)
    run = Run(directory)
    run.start({})
    trainer = Trainer(model, Optimizer(model, "adamw", 1e-30, 1e-30, 0.0), task, run, CPU, seed=5)
    trainer.steps = task.steps
    trainer.train()
    return [(entry["loss"], entry["validation"]) for entry in run.read_log()]


def test_dropout_is_on_in_training_by_each_steps_own_seed_and_off_in_evaluation(examples, tmp_path):
    model = classifier(hidden_dropout_prob=0.3).eval()
    task = task_for(examples, batch_tokens=10_000, epochs=5)  # every step has all rows
    (inputs, labels) = examples.to(CPU.device)
    with torch.no_grad():
        logs = model(*inputs).double().log_softmax(-1)
    loss = -logs[range(40), labels].mean().item()
    steps = train_in_place(model, task, tmp_path / "one", before=0)
    for _, metrics in steps:
        assert metrics["loss"] == pytest.approx(loss, rel=1e-5)
        assert metrics["accuracy"] == (logs.argmax(-1) == labels).double().mean().item()
    losses = sorted([loss, *(reported for reported, _ in steps)])
    assert len(losses) == 6 and min(np.diff(losses)) > 1e-4  # no two steps drop the same numbers
    assert steps == train_in_place(model, task, tmp_path / "two", before=1)


def test_dropout_stands_after_the_embeddings_in_each_layer_twice_and_before_the_classifier():
    model, seen = classifier(hidden_dropout_prob=0.3).train(), []
    names = {module: name for name, module in model.named_modules()}

    def watch(module, inputs, output):
        seen.append((names[module], [inputs[0], output]))

    for name, module in model.named_modules():
        if name.endswith("dropout") or name in ("bert.embeddings", "classifier"):
            module.register_forward_hook(watch)
    model(PackedBatch.from_sequences([torch.tensor(ids(1, 2, 3)), torch.tensor(ids(4))]))
    layers = [f"bert.layers.{i}.dropout" for i in (0, 0, 1, 1)]
    embedded = ["bert.embeddings.dropout", "bert.embeddings"]
    assert [name for name, _ in seen] == [*embedded, *layers, "dropout", "classifier"]
    for name, (before, after) in seen:
        if name.endswith("dropout"):
            number = before != 0  # rows of padding are zero before
            assert number.any() and 0.1 < (after[number] == 0).double().mean() < 0.5
    assert seen[0][1][1] is seen[1][1][1]  # what the embeddings give has been through dropout
    assert seen[-2][1][1] is seen[-1][1][0]  # and so has what the classifier reads


def test_evaluation_leaves_the_model_in_its_mode(examples):
    for training in (True, False):
        model = classifier(hidden_dropout_prob=0.3).train(training)
        first, second = (evaluate(model, examples.batches(60), CPU) for _ in range(2))
        assert first == second and model.training is training


def test_processes_share_the_rows_out_and_add_up_what_they_found():
    logits, labels = some_logits()
    examples, found = Examples(Features(logits), labels), []

    class Share(Runtime):
        def sum(self, tensor):
            found.append(tensor)
            return tensor

    for rank in (0, 1):
        share = Share(CPU.device, "fp32", rank=rank, world_size=2)
        evaluate(Table(), examples.batches(3), share)
    loss, right = sum(found).tolist()
    whole = evaluate(Table(), examples.batches(3), CPU)
    assert 0 < found[0][0] < loss  # each read a part
    assert (right / 11, loss / 11) == (whole["accuracy"], pytest.approx(whole["loss"], rel=1e-6))


class Threshold(nn.Module):
    """Says 1 of a number below `w`, and 0 of one above it; `seen` are the thresholds validated."""

    def __init__(self):
        super().__init__()
        self.w, self.seen = nn.Parameter(torch.zeros(1)), []

    def forward(self, x):
        if not self.training:
            self.seen.append(self.w.item())
        return torch.cat([torch.zeros_like(x), self.w - x], dim=1)


def numbers(*rows):
    """Examples of (number, label)."""
    return Examples(
        Features(torch.tensor([[float(x)] for x, _ in rows])), torch.tensor([y for _, y in rows])
    )


def train_threshold(tmp_path, validation):
    """Five epochs of a step each, in which training only ever pushes the threshold up."""
    train = numbers((100, 1), (100, 1))
    task = Classification(train, validation, batch_tokens=2, epochs=5, seed=0)
    model, run = Threshold(), Run(tmp_path)
    run.start({})
    optimizer = Optimizer(model, "adamw", 1.0, 1.0, 0.0)
    trainer = Trainer(model, optimizer, task, run, CPU, seed=0)
    trainer.steps = task.steps
    metrics = trainer.train()
    assert len(model.seen) == 5 and model.seen == sorted(set(model.seen))
    return trainer, metrics


def test_the_weights_of_the_best_epoch_stay(tmp_path):
    # The threshold goes 1, 2, 2.75, 3.25, 3.5: between the two rows in the third epoch only.
    trainer, metrics = train_threshold(tmp_path, numbers((2.5, 1), (3, 0)))
    assert trainer.model.w.item() == trainer.model.seen[2] and 2.5 < trainer.model.w.item() < 3
    assert trainer.best_step == 3 and metrics["accuracy"] == 1.0
    logged = {e["step"]: e["validation"] for e in trainer.run.read_log() if "validation" in e}
    assert [logged[step]["accuracy"] for step in (1, 2, 3, 4, 5)] == [0.5, 0.5, 1.0, 0.5, 0.5]
    assert metrics == logged[3]
    saved = trainer.run.load()
    assert saved["model/w"].item() == saved["best/w"].item() == trainer.model.seen[2]


def test_among_epochs_of_equal_accuracy_the_surest_is_the_best(tmp_path):
    # Right on both rows from the second epoch on; the loss is least midway, as in the third.
    trainer, metrics = train_threshold(tmp_path, numbers((1.5, 1), (4, 0)))
    logged = [e["validation"] for e in trainer.run.read_log() if "validation" in e]
    assert [e["accuracy"] for e in logged] == [0.5, 1, 1, 1, 1]
    assert metrics == min(logged, key=lambda e: e["loss"]) == logged[2] and trainer.best_step == 3
    assert trainer.model.w.item() == trainer.model.seen[2]


def test_the_first_of_equals_is_the_best(tmp_path):
    trainer, _ = train_threshold(tmp_path, numbers((-1e6, 1), (1e6, 0)))
    assert trainer.best_step == 1 and trainer.model.w.item() == trainer.model.seen[0]


# The first four are in Newcombe (1998), "Two-sided confidence intervals for the single proportion",
# table I.
@pytest.mark.parametrize(
    "right, n, low, high",
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (29, 29, 0.8830, 1.0),
    ],
)
def test_the_interval_of_an_accuracy_is_wilsons(right, n, low, high):
    assert interval(right / n, n) == (pytest.approx(low, abs=6e-5), pytest.approx(high, abs=6e-5))


def test_more_rows_make_a_narrower_interval_around_the_accuracy():
    (low, high), (inner_low, inner_high) = interval(0.9, 100), interval(0.9, 10_000)
    assert low < inner_low < 0.9 < inner_high < high


@pytest.mark.parametrize("start_counts", [False, True])
def test_where_the_start_counts_the_smallest_loss_is_best(examples, start_counts):
    shape = {"batch_tokens": 60, "epochs": 1, "seed": 0}
    task = Classification(examples, examples, **shape, start_counts=start_counts)
    likely, lucky = {"accuracy": 0.8, "loss": 0.4}, {"accuracy": 0.9, "loss": 0.5}
    assert (task.score(likely) > task.score(lucky)) == start_counts
