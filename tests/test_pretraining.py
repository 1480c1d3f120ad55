"""The task of pretraining: what is masked at each step, both losses, and the validation rows."""

import itertools
import json
import math
import re
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

import minitune.corpus
import train
from minitune.batching import PackedBatch
from minitune.checkpoint import load_masked_lm, load_tokenizer
from minitune.corpus import Corpus
from minitune.data import Dataset
from minitune.initialization import from_scratch, start_with_frequencies
from minitune.model import BertConfig, BertForMaskedLM
from minitune.optimizer import Optimizer
from minitune.pretraining import MaskedBatch, MaskedLanguageModelling
from minitune.prompting import FillMask, fill_blanks, in_words
from minitune.support.options import train_options
from minitune.support.runtime import Runtime

CPU = torch.device("cpu")
SPECIAL = torch.tensor([0, 1, 2, 3, 4])
CLS, SEP, MASK = 2, 3, 4
CONFIG = BertConfig(90, 64, 2, 2, 128)


def masked_batch(lengths, seed=0) -> MaskedBatch:
    """Random words in frames; of each sequence that has any word, some are masked."""
    rng = torch.Generator().manual_seed(seed)
    sequences = [torch.randint(5, 90, (n,), generator=rng) for n in lengths]
    batch = PackedBatch.from_sequences(sequences)
    first, end = batch.cu_seqlens[:-1].long(), batch.cu_seqlens[1:].long()
    batch.tokens[end - 1], batch.tokens[first] = SEP, CLS
    words = torch.ones(sum(lengths), dtype=torch.bool)
    words[end - 1] = words[first] = False
    positions = (words & (torch.rand(len(words), generator=rng) < 0.3)).nonzero().squeeze(1)
    labels = batch.tokens[positions].clone()
    batch.tokens[positions[::2]] = MASK
    return MaskedBatch(batch, positions, labels)


def restored(batch: MaskedBatch) -> torch.Tensor:
    """The tokens before masking."""
    tokens = batch.batch.tokens.clone()
    tokens[batch.positions] = batch.labels
    return tokens


def sequences(batch: MaskedBatch) -> list[list[int]]:
    """The tokens before masking, sequence by sequence."""
    return [s.tolist() for s in restored(batch).split(batch.batch.cu_seqlens.diff().tolist())]


# A batch in parts


@pytest.mark.parametrize("parts", [1, 2, 3, 7, 8, 9, 50])
@pytest.mark.parametrize(
    "lengths", [[5] * 8, [1, 2, 3, 4, 5, 6, 7, 8], [40, 1, 1, 1, 1, 1, 1, 1], [9]]
)
def test_parts_of_a_batch_are_whole_sequences_and_together_all_of_it(lengths, parts):
    whole = masked_batch(lengths)
    shares = whole.split(parts)
    assert 1 <= len(shares) <= parts
    found = [share.batch.cu_seqlens.diff().tolist() for share in shares]
    assert sum(found, []) == lengths
    assert all(found)  # none is empty
    assert torch.equal(torch.cat([share.batch.tokens for share in shares]), whole.batch.tokens)
    assert torch.equal(torch.cat([share.labels for share in shares]), whole.labels)
    assert sum(len(share) for share in shares) == len(whole)
    assert torch.equal(torch.cat([restored(share) for share in shares]), restored(whole))
    for share in shares:
        assert share.batch.cu_seqlens[0] == 0
        assert share.batch.max_seqlen == max(share.batch.cu_seqlens.diff().tolist())


def test_parts_are_about_equal_in_tokens():
    shares = masked_batch([10] * 100).split(4)
    assert [share.tokens for share in shares] == [250] * 4


# The losses


@pytest.mark.parametrize(("rate", "weight"), [(0.15, 1.0), (0.4, 0.5), (0.15, 0.0)])
def test_what_is_minimised_is_both_losses_and_what_is_reported_that_of_the_masked_tokens(
    rate, weight
):
    torch.manual_seed(0)
    masked, model = masked_batch((5, 9, 30, 2, 17, 12)), BertForMaskedLM(CONFIG)
    task = MaskedLanguageModelling.__new__(MaskedLanguageModelling)
    task.rate, task.summary_weight = rate, weight
    task.special_ids, task.pad = SPECIAL, 0
    minimised, reported = task.loss(model, *masked.to(CPU))

    with torch.no_grad():
        logs = model(masked.batch, torch.arange(masked.tokens)).double().log_softmax(-1)
    of_masked = -sum(
        logs[i, label].item()
        for i, label in zip(masked.positions.tolist(), masked.labels.tolist(), strict=True)
    )
    bag, cls = 0.0, 0  # each [CLS] guesses every word of its sequence, masked or not
    for tokens in sequences(masked):
        bag -= sum(logs[cls, word].item() for word in tokens if word > MASK)
        cls += len(tokens)
    assert bag > 100
    assert reported.item() == pytest.approx(of_masked, rel=1e-5)
    assert minimised.item() == pytest.approx(of_masked + rate * weight * bag, rel=1e-5)


# A task over a corpus


@pytest.fixture
def task(tmp_path, monkeypatch):
    """Makes the task over 300 texts, each of which begins with a word of its own."""
    monkeypatch.setattr(minitune.corpus, "CACHE", tmp_path / "cache")
    rng = np.random.default_rng(0)
    words = ["".join("abcdefghij"[int(digit)] for digit in f"{i:04d}") + "z" for i in range(40)]
    texts = [" ".join(rng.choice(words, rng.integers(2, 40))) for _ in range(300)]
    (tmp_path / "texts.txt").write_text("\n".join(texts) + "\n")
    # Too few entries for all words to be whole.
    corpus = Corpus.open(Dataset(str(tmp_path / "texts.txt")), None, 64)
    defaults = {"max_len": 32, "batch_tokens": 128, "rate": 0.15, "whole_word": False, "seed": 0}

    def build(**options):
        return MaskedLanguageModelling(corpus, **(defaults | options))

    build.corpus, build.corpus_path = corpus, tmp_path / "texts.txt"
    return build


def assert_same(first, second):
    assert torch.equal(first.batch.tokens, second.batch.tokens)
    assert torch.equal(first.batch.cu_seqlens, second.batch.cu_seqlens)
    assert torch.equal(first.positions, second.positions)
    assert torch.equal(first.labels, second.labels)


def test_a_step_has_the_same_batch_wherever_training_was_taken_up(task):
    from_start, from_step = task().batches(0), task().batches(37)
    for _ in range(37):
        next(from_start)
    for _ in range(5):
        assert_same(next(from_start), next(from_step))


def test_another_epoch_masks_other_words(task):
    epochs = task(max_len=16)
    batches, seen = epochs.batches(0), 0
    places = {}  # of each text: which tokens were masked, one set an epoch
    while seen < 2 * len(epochs.train):
        step = next(batches)
        cu = step.batch.cu_seqlens.tolist()
        seen += len(cu) - 1
        for text, first, last in zip(sequences(step), cu, cu[1:], strict=False):
            inside = step.positions[(step.positions >= first) & (step.positions < last)] - first
            places.setdefault(tuple(text), []).append(inside.tolist())
    twice = [sets for sets in places.values() if len(sets) == 2]
    assert len(twice) > 100
    assert np.mean([first == second for first, second in twice]) < 0.1


def test_validation_is_the_same_for_every_run(task):
    usual = task().validation_batches(quick=False)
    for other in (task(seed=5), task(rate=0.4), task(whole_word=True)):
        for first, second in zip(usual, other.validation_batches(quick=False), strict=True):
            assert_same(first, second)


def test_validation_reads_every_token_once_and_masks_15_percent_of_them(task):
    several = task(max_len=12, rate=0.4)
    chunks = [
        chunk for batch in several.validation_batches(quick=False) for chunk in sequences(batch)
    ]
    words = sorted(word for chunk in chunks for word in chunk if word not in (CLS, SEP))
    ends = np.load(task.corpus.directory / "validation.ends.npy")
    assert max(np.diff(ends, prepend=0)) > 2 * 10  # so that a text is cut into several chunks
    tokens = np.fromfile(task.corpus.directory / "validation.tokens", task.corpus.dtype)
    assert words == sorted(tokens.tolist())
    masked = sum(len(batch) for batch in several.validation_batches(quick=False))
    assert masked / len(words) == pytest.approx(0.15, abs=0.02)


def test_a_quick_evaluation_reads_every_eighth_batch(task):
    many = task(max_len=12, batch_tokens=12)
    batches, quick = many.validation_batches(quick=False), many.validation_batches(quick=True)
    assert len(batches) > 16
    assert list(map(id, quick)) == list(map(id, batches[::8]))


def test_a_run_evaluates_twelve_times_but_not_at_its_end_where_all_rows_are_read(task):
    due = task().evaluation_due
    assert [step for step in range(1, 61) if due(step, 60)] == list(range(5, 60, 5))
    assert [step for step in range(1, 4) if due(step, 3)] == [1, 2]


@pytest.mark.parametrize("rate", [0.15, 0.3])
def test_training_masks_this_share_of_the_words(task, rate):
    batches = task(rate=rate).batches(0)
    for _ in range(5):
        step = next(batches)
        words = ~torch.isin(restored(step), SPECIAL)
        assert len(step) == round(rate * words.sum().item())


def test_whole_words_are_masked_whole_in_training(task):
    words = task(whole_word=True, rate=0.3)
    continuation = words.tokenizer.continuation
    batches = words.batches(0)
    followed = 0
    for _ in range(20):
        step = next(batches)
        chosen = torch.zeros(step.tokens, dtype=torch.bool)
        chosen[step.positions] = True
        first = torch.zeros(step.tokens, dtype=torch.bool)
        first[step.batch.cu_seqlens[:-1].long() + 1] = True  # a chunk may begin amid a word
        goes_on = continuation[restored(step)] & ~first
        assert torch.equal(chosen[goes_on], chosen[goes_on.roll(-1)])
        followed += goes_on.sum().item()
    assert followed > 100


# train.py


@pytest.fixture
def pretrain(task, tmp_path, monkeypatch):
    """Runs train.py in this process, on the texts of `task`, and gives the directory of the run."""
    small = replace(CONFIG, vocab_size=8192, hidden_dropout_prob=0.0)
    monkeypatch.setitem(train.PRESETS, "tiny", small)

    def run(*options):
        out = tmp_path / "run"
        given = ["--data", task.corpus_path, "--out", out, "--vocab-size", 64, "--steps", 1]
        given += ["--max-len", 32, "--batch-tokens", 128, "--precision", "fp32", "--device", "cpu"]
        monkeypatch.setattr(sys, "argv", ["train.py", *map(str, [*given, *options])])
        train.main()
        return out

    return run


def random_start(corpus, seed):
    """The model that train.py starts from, as its docstrings say."""
    model = from_scratch(replace(CONFIG, vocab_size=corpus.tokenizer.vocab_size), seed)
    start_with_frequencies(model.head, torch.from_numpy(corpus.unigrams))
    return model


OTHER_OPTIONS = {  # than the defaults: what they mean for the task, the optimizer, and the run
    "--mask-rate 0.4": ("rate", 0.4),
    "--whole-word": ("whole_word", True),
    "--summary-weight 0.5": ("summary_weight", 0.5),
    "--seed 3": ("seed", 3),
    "--max-len 16": ("max_len", 16),
    "--batch-tokens 64": ("batch_tokens", 64),
    "--optimizer adamw": ("name", "adamw"),
    "--lr 0.02": ("lr", 0.02),
    "--adamw-lr 0.004": ("adamw_lr", 0.004),
    "--weight-decay 0.5": ("weight_decay", 0.5),
    "--accumulate 2": ("accumulate", 2),
}


@pytest.mark.parametrize("options", ["", *OTHER_OPTIONS, "--optimizer adamw --lr 0.02"])
def test_each_option_has_its_effect_on_a_step(task, pretrain, monkeypatch, options):
    parts = []
    loss_of = MaskedLanguageModelling.loss
    counted = lambda *given: parts.append(1) or loss_of(*given)  # noqa: E731
    monkeypatch.setattr(MaskedLanguageModelling, "loss", counted)
    out = pretrain(*options.split())

    recipe = {"rate": 0.3, "whole_word": False, "summary_weight": 1.0, "seed": 0}
    recipe |= {"max_len": 32, "batch_tokens": 128, "name": "muon", "lr": None, "adamw_lr": 0.001}
    recipe |= {"weight_decay": 0.01, "accumulate": 1}
    for option, (name, value) in OTHER_OPTIONS.items():
        if option in options:
            recipe[name] = value
    name, lr, adamw_lr, decay, accumulate = (
        recipe.pop(key) for key in ("name", "lr", "adamw_lr", "weight_decay", "accumulate")
    )
    model = random_start(task.corpus, recipe["seed"])
    optimizer = Optimizer(model, name, lr or train.PEAK_LR[name], adamw_lr, decay)
    batch = next(task(**recipe).batches(0))
    both, reported = loss_of(task(**recipe), model, *batch.to(CPU))
    (both / len(batch)).backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()
    for part in optimizer.parts:
        part.step()

    (entry,) = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert entry["loss"] == pytest.approx(reported.item() / len(batch), rel=1e-5)
    assert entry["gradient_norm"] == pytest.approx(norm, rel=1e-4)
    assert len(parts) == accumulate
    saved, _ = load_masked_lm(out)
    for (key, expected), found in zip(model.named_parameters(), saved.parameters(), strict=True):
        if accumulate == 1:  # else rounding differs, and a first step makes much of it
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6, msg=key)


def test_the_figures_are_those_of_the_saved_model_and_of_the_validation_rows(task, pretrain):
    out = pretrain("--steps", 3, "--optimizer", "adamw", "--lr", 0.02)
    model, _ = load_masked_lm(out)
    batches = task().validation_batches(quick=False)
    with torch.no_grad():
        logits = torch.cat([model(b.batch, b.positions) for b in batches]).double()
    labels = torch.cat([batch.labels for batch in batches])
    figures = json.loads((out / "metrics.json").read_text())
    loss = -logits.log_softmax(-1)[range(len(labels)), labels].mean().item()
    accuracy = (logits.argmax(-1) == labels).double().mean().item()
    assert figures["loss"] == pytest.approx(loss, rel=1e-5) and 0 < accuracy < 1
    assert figures["masked_accuracy"] == pytest.approx(accuracy)
    p = task.corpus.unigrams / task.corpus.unigrams.sum()
    assert figures["unigram_loss"] == pytest.approx(-(p[p > 0] * np.log(p[p > 0])).sum())
    assert figures["uniform_loss"] == pytest.approx(math.log(task.corpus.tokenizer.vocab_size))
    steps = itertools.islice(task().batches(0), 3)
    assert figures["steps"] == 3 and figures["tokens"] == sum(step.tokens for step in steps)
    assert figures["total_params"] == sum(p.numel() for p in model.parameters())


def test_a_picture_that_cannot_be_drawn_loses_nothing(pretrain, monkeypatch, capsys):
    def broken(*_):
        raise ValueError("negative values")

    monkeypatch.setattr("minitune.support.plots.plot_pretraining", broken)
    out = pretrain()
    found = {path.name for path in out.iterdir()}
    assert found >= {"metrics.json", "model.safetensors"} and "loss.png" not in found
    printed = capsys.readouterr()
    assert f"warning: {out}/loss.png was not drawn: negative values" in printed.err
    assert f"wrote {out}" in printed.out


def test_a_run_logs_the_blanks_at_each_evaluation_and_reports_them(pretrain, monkeypatch):
    # A training that leaves the weights as they are has the same answers at each evaluation.
    options = ("--steps", 26, "--lr", "1e-30", "--adamw-lr", "1e-30", "--weight-decay", 0)
    out = pretrain(*options)
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    shown = json.loads((out / "report.json").read_text())
    evaluated = [entry for entry in log if "validation" in entry]
    assert len(evaluated) == 12 and all("blanks" in entry for entry in evaluated)
    model, _ = load_masked_lm(out)
    saved = FillMask(model, load_tokenizer(out, model.config), Runtime.start("cpu", "fp32"))
    for entry in [*evaluated, shown["start"], shown["end"]]:
        assert len(entry["blanks"]) == len(shown["sentences"]) == 10
        for sentence, words in zip(shown["sentences"], entry["blanks"], strict=True):
            if words:
                [expected] = fill_blanks(saved, sentence, 3)
                assert [p for _, p in words] == pytest.approx([p for _, p in expected], abs=2e-4)
    page = (out / "report.html").read_text()
    assert "What was learned when" in page and f">{evaluated[3]['tokens'] / 1e6:.3g}<" in page


def test_a_run_whose_report_fails_is_finished(pretrain, monkeypatch, capsys):
    def broken(*_):
        raise ValueError("no such figure")

    monkeypatch.setattr("minitune.support.report.write_report", broken)
    out = pretrain()
    found = {path.name for path in out.iterdir()}
    assert found >= {"metrics.json", "model.safetensors", "loss.png"}
    assert "report.html was not drawn: no such figure" in capsys.readouterr().err


def test_examples_show_the_guesses_for_the_masked_word(task, capsys):
    held_out, tokenizer = task().held_out, task.corpus.tokenizer
    fill_mask = FillMask(random_start(task.corpus, 0).eval(), tokenizer, Runtime.start("cpu"))
    lines = train.fill_examples(fill_mask, held_out)
    texts = [tokenizer.decode(ids[1:-1].tolist()) for ids in held_out.read(range(len(held_out)))]
    assert len(lines) == 6
    for text, answer in zip(lines[::2], lines[1::2], strict=True):
        word, guesses = re.fullmatch(r" +it was: (\w+); the model says: (.*)", answer).groups()
        before, after = text.strip().split("____")
        assert any(full.startswith(f"{before}{word}{after}") for full in texts)
        (expected,) = fill_blanks(fill_mask, text.strip().replace("____", "[MASK]"), 4)
        assert guesses == in_words(expected)


def parse(words: list[str], device: str = "cpu"):
    args = train_options().parse_args(words)
    train.choose_batch_and_rates(args, device)
    return args


@pytest.mark.parametrize(
    ("device", "words", "batch", "lr", "adamw_lr"),
    [
        ("cpu", "", 4096, 0.01, 0.001),
        ("cuda", "", 65536, 0.02, 0.002),
        ("cuda", "--optimizer adamw", 65536, 0.002, 0.002),
        ("cuda", "--lr 0.02", 65536, 0.02, 0.002),
        ("cuda", "--batch-tokens 8192", 8192, 0.01, 0.001),  # the rates that were measured
    ],
)
def test_a_gpu_has_a_batch_and_rates_of_its_own(device, words, batch, lr, adamw_lr):
    args = parse(words.split(), device)
    assert (args.batch_tokens, args.lr, args.adamw_lr) == (batch, lr, adamw_lr)


def test_a_plan_says_what_the_default_recipe_comes_to_and_no_other():
    for steps, loss in train.MEASURED.items():
        assert f"near a loss of {loss:.1f}" in train.expectation(parse([]), steps)
    (few, high), *_, (many, low) = train.MEASURED.items()
    between = float(train.expectation(parse([]), (few + many) // 2).split()[-1])
    assert low < between < high
    for steps in (100, 20_000):  # nobody has measured that
        assert not train.expectation(parse([]), steps)
    assert train.expectation(parse(["--max-len", "512"]), many)  # what the default comes to
    for other in (
        ["--data", "mine.txt"], ["--lr", "0.1"], ["--preset", "small"], ["--max-len", "64"],
        ["--mask-rate", "0.15"],
    ):  # fmt: skip
        assert not train.expectation(parse(other), many)
    assert not train.expectation(parse([], "cuda"), many)
