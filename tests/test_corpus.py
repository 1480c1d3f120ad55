"""From texts to batches: tokens kept on disk, their chunks, and the order of batches."""

import fcntl
import math
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

import minitune.corpus
from minitune.batching import fill_batches, shuffled_batches
from minitune.corpus import Corpus
from minitune.data import Dataset
from minitune.support.errors import UserError
from minitune.tokenizer import SPECIAL_TOKENS, Tokenizer


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(minitune.corpus, "CACHE", tmp_path / "cache")
    return tmp_path / "cache"


def made(cache):
    """What is in the cache."""
    return sorted(cache.iterdir())


def dataset(tmp_path, texts):
    path = tmp_path / "texts.txt"
    path.write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
    return Dataset(str(path))


def unique_words(count):
    """Words that occur once each, so that every token of a corpus of them tells its place."""
    letters = "abcdefghij"
    return ["".join(letters[int(digit)] for digit in f"{i:04d}") + "z" for i in range(count)]


WORDS = unique_words(300)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train([" ".join(WORDS)], 4000)


# The corpus


def test_the_vocabulary_is_learned_from_training_rows_only(tmp_path, cache):
    texts = [f"{word} common" for word in unique_words(200)]
    secret = "abracadabra"
    labelled = [(text, "0") for text in texts[:100]] + [(text, "1") for text in texts[100:]]
    for split, first in (("validation", 85), ("test", 90)):
        rows = list(labelled)
        for label in (0, 100):
            for i in range(first, first + 5 if split == "validation" else 100):
                rows[label + i] = (f"{secret} common", str(label // 100))
        path = tmp_path / f"{split}.csv"
        path.write_text("text,label\n" + "".join(f"{text},{label}\n" for text, label in rows))
        data = Dataset(str(path))
        assert secret in " ".join(row.text for row in data.rows(split))
        vocabulary = set(Corpus.open(data, None, 4000).tokenizer.backend.get_vocab())
        assert "common" in vocabulary and texts[0].split()[0] in vocabulary
        assert secret not in vocabulary


def test_test_rows_are_not_in_the_corpus(tmp_path, cache):
    words = unique_words(100)
    path = tmp_path / "a.csv"
    path.write_text("text,label\n" + "".join(f"{word},0\n" for word in words))
    corpus = Corpus.open(Dataset(str(path)), None, 4000)
    assert len(corpus.chunks("train", 16)) == 85 and len(corpus.chunks("validation", 16)) == 5
    assert corpus.unigrams.sum() == 85


@pytest.fixture(params=[(1 << 20, 1 << 18), (30, 3)], ids=["at once", "in parts"])
def corpus_of(request, tmp_path, cache, monkeypatch):
    """Texts of so many words -> (their token ids in order, the corpus)."""
    characters, texts_at_once = request.param
    monkeypatch.setattr(minitune.corpus, "CHARACTERS_AT_ONCE", characters)
    monkeypatch.setattr(minitune.corpus, "TEXTS_AT_ONCE", texts_at_once)

    def build(counts):
        words = unique_words(sum(counts) + 1)
        ends = np.cumsum(counts)
        texts = [" ".join(words[a:b]) for a, b in zip([0, *ends], ends, strict=False)]
        corpus = Corpus.open(dataset(tmp_path, [*texts, words[-1]]), None, 20_000)
        ids = corpus.tokenizer.encode(texts)
        assert [len(text) for text in ids] == list(counts)  # whole words, each an id of its own
        return ids, corpus

    return build


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("max_len", [8, 16, 50])
def test_chunks_are_the_texts_cut_one_by_one(corpus_of, max_len, overlap):
    body = max_len - 2
    counts = [1, body - 1, body, body + 1, 2 * body, 2 * body + 4, 5, 7 * max_len]
    texts, corpus = corpus_of(counts)
    expected = []
    for text in texts:
        for start in range(0, len(text), body):
            if overlap:
                start = min(start, max(len(text) - body, 0))
            expected.append([2, *text[start : start + body], 3])
    chunks = corpus.chunks("train", max_len, overlap)
    assert [sequence.tolist() for sequence in chunks.read(range(len(chunks)))] == expected
    assert chunks.lengths.tolist() == [len(sequence) for sequence in expected]
    assert len(chunks) == len(expected)


def test_every_token_is_counted_once(corpus_of):
    texts, corpus = corpus_of([3, 40, 9, 1, 7])
    counts = np.bincount(sum(texts, []), minlength=corpus.tokenizer.vocab_size)
    assert corpus.unigrams.tolist() == counts.tolist()


def test_reading_some_chunks_gives_those(corpus_of):
    _, corpus = corpus_of([3, 40, 9])
    chunks = corpus.chunks("train", 16)
    every = chunks.read(range(len(chunks)))
    for i, sequence in zip([2, 0, 3], chunks.read(np.array([2, 0, 3])), strict=True):
        assert torch.equal(sequence, every[i])
        assert sequence.dtype == torch.int64


def test_texts_without_a_token_are_left_out(tmp_path, cache):
    corpus = Corpus.open(
        dataset(tmp_path, ["one", "<br />", "two", "three", "\u200b", "four"]), None, 300
    )
    assert (corpus.chunks("train", 16).lengths > 2).all()
    assert len(corpus.chunks("train", 16)) == 3


def test_ids_beyond_16_bits_survive(tmp_path, cache, tokenizer):
    words = unique_words(10_000)
    vocabulary = {
        token: i for i, token in enumerate([*SPECIAL_TOKENS, *(f"x{i}" for i in range(70_000))])
    }
    vocabulary |= {word: 70_005 + i for i, word in enumerate(words)}
    (tmp_path / "vocab.txt").write_text("".join(f"{token}\n" for token in vocabulary))
    large = Tokenizer.load(tmp_path)
    corpus = Corpus.open(dataset(tmp_path, [words[-2], words[-1], words[0]]), large, 0)
    [sequence] = corpus.chunks("train", 16).read([1])
    assert sequence[1] == 70_005 + 9_999


def test_the_second_time_nothing_is_tokenised(tmp_path, cache, monkeypatch, capsys):
    data = dataset(tmp_path, ["one two", "three", "four"])
    first = Corpus.open(data, None, 100)
    assert "tokenising" in capsys.readouterr().out

    def fail(*arguments):
        raise AssertionError("tokenised again")

    monkeypatch.setattr(minitune.corpus, "_build", fail)
    second = Corpus.open(Dataset(data.name), None, 100)
    assert second.directory == first.directory
    assert second.tokenizer.files() == first.tokenizer.files()
    assert capsys.readouterr().out == ""


def test_other_text_or_another_vocabulary_is_another_corpus(tmp_path, cache, tokenizer):
    data = dataset(tmp_path, ["one two", "three", "four"])
    directories = {Corpus.open(data, None, 100).directory, Corpus.open(data, None, 101).directory}
    directories.add(Corpus.open(data, tokenizer, 100).directory)
    changed = dataset(tmp_path, ["one two", "three", "four", "five"])
    directories.add(Corpus.open(changed, None, 100).directory)
    assert len(directories) == 4
    assert (
        Corpus.open(data, tokenizer, 100).directory == Corpus.open(data, tokenizer, 200).directory
    )


def content(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def overwritten(path):
    """The same size, but two bytes in the middle."""
    data = bytearray(path.read_bytes())
    half = len(data) // 2
    data[half - 1 : half + 1] = [data[half - 1] ^ 255, data[half] ^ 255]
    path.write_bytes(data)


def replaced_by_a_directory(path):
    path.unlink()
    path.mkdir()


DAMAGE = {
    "overwritten": overwritten,
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),  # zero is [PAD]
    "cut short": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\n"),
    "missing": lambda path: path.unlink(),
    "a directory": replaced_by_a_directory,
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_file_is_found_and_everything_tokenised_again(tmp_path, cache, capsys, damage):
    data = dataset(tmp_path, ["one two three four", "three", "four"])
    directory = Corpus.open(data, None, 100).directory
    before = content(directory)
    for name in minitune.corpus.FILES:
        damage(directory / name)
        capsys.readouterr()
        Corpus.open(data, None, 100)
        first, second = capsys.readouterr().out.splitlines()
        assert str(directory) in first and name in first and "tokenising" in second
        assert content(directory) == before
    assert made(cache) == [directory]


def test_a_pipe_in_place_of_the_index_is_not_waited_for(tmp_path, cache):
    data = dataset(tmp_path, ["one two three four", "three", "four"])
    directory = Corpus.open(data, None, 100).directory
    before = content(directory)
    (directory / "index.json").unlink()
    os.mkfifo(directory / "index.json")
    Corpus.open(data, None, 100)
    assert content(directory) == before


@pytest.mark.parametrize(
    "text", [None, "", "{", "[]", "{}", '{"train.tokens": 3}', "[" * 100_000, "\0"]
)
def test_a_damaged_index_is_written_again(tmp_path, cache, text):
    data = dataset(tmp_path, ["one two three four", "three", "four"])
    directory = Corpus.open(data, None, 100).directory
    before = content(directory)
    (directory / "index.json").unlink()
    if text is not None:
        (directory / "index.json").write_text(text)
    Corpus.open(data, None, 100)
    assert content(directory) == before
    assert made(cache) == [directory]


def test_a_corpus_has_its_name_only_when_it_is_complete_and_on_disk(tmp_path, cache, monkeypatch):
    data = dataset(tmp_path, ["one two", "three", "four"])
    directory = cache / Corpus.key(data, None, 100)
    synced, published = set(), []
    fsync, rename = os.fsync, os.rename

    def note_fsync(descriptor):
        assert not directory.exists()
        synced.add(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def note_rename(old, new):
        published.append((Path(new), set(os.listdir(old))))
        rename(old, new)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "rename", note_rename)
    Corpus.open(data, None, 100)
    assert published == [(directory, {*minitune.corpus.FILES, "index.json"})]
    assert synced >= {*minitune.corpus.FILES, "index.json"}


def test_what_a_killed_process_left_is_removed(tmp_path, cache):
    data = dataset(tmp_path, ["one two", "three", "four"])
    directory = cache / Corpus.key(data, None, 100)
    for name in (directory.name, "another"):
        (cache / f"{name}.partial").mkdir(parents=True)
        (cache / f"{name}.partial" / "leftover").write_bytes(b"half")
    Corpus.open(data, None, 100)
    assert made(cache) == sorted([directory, cache / "another.partial"])
    assert not (directory / "leftover").exists()


def test_a_process_waits_while_another_one_makes_the_same_corpus(tmp_path, cache):
    data = dataset(tmp_path, ["one two", "three", "four"])
    directory = cache / Corpus.key(data, None, 100)
    cache.mkdir(exist_ok=True)
    waiting = threading.Thread(target=Corpus.open, args=(data, None, 100), daemon=True)
    lock = os.open(cache, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    waiting.start()
    waiting.join(0.3)
    assert waiting.is_alive() and made(cache) == []
    os.close(lock)
    waiting.join(60)
    assert made(cache) == [directory]


def test_two_processes_that_start_at_once_share_a_damaged_corpus(tmp_path, cache):
    data = dataset(tmp_path, ["one two", "three", "four"])
    directory = Corpus.open(data, None, 100).directory
    before = content(directory)
    overwritten(directory / "train.tokens")
    command = (
        "import minitune.corpus as c; from minitune.data import Dataset\n"
        f"print(len(c.Corpus.open(Dataset({data.name!r}), None, 100).chunks('train', 16)))"
    )
    environment = os.environ | {"MINITUNE_CACHE": str(cache)}
    started = [
        subprocess.Popen([sys.executable, "-c", command], env=environment, stdout=subprocess.PIPE)
        for _ in range(2)
    ]
    for process in started:
        output = process.communicate(timeout=120)[0].decode()
        assert (process.returncode, output.splitlines()[-1]) == (0, "2")
    assert content(directory) == before
    assert made(cache) == [directory]


def test_bad_input_leaves_nothing_behind(tmp_path, cache):
    path = tmp_path / "texts.txt"
    path.write_bytes(b"fine\n" * 1000 + "café\n".encode("latin-1"))
    with pytest.raises(UserError, match="texts.txt: not UTF-8"):
        Corpus.open(Dataset(str(path)), None, 100)
    assert made(cache) == []


def test_ctrl_c_while_tokenising_leaves_nothing_behind(tmp_path, cache, monkeypatch):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    data = dataset(tmp_path, ["one", "two", "three"])
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Tokenizer, "encode", interrupt)
        Corpus.open(data, None, 100)
    assert made(cache) == []
    assert len(Corpus.open(data, None, 100).chunks("train", 16)) == 2


def test_unigram_entropy_of_a_hand_example(tmp_path, cache):
    corpus = Corpus.open(dataset(tmp_path, ["a a b c", "c b a a", "a"]), None, 100)
    assert corpus.unigram_entropy() == pytest.approx(1.5 * math.log(2))  # 1/2, 1/4, 1/4


# Batches


LENGTHS = np.random.default_rng(0).integers(3, 129, 5000).astype(np.int32)
BUDGET = 1024


def take(count, **options):
    batches = shuffled_batches(LENGTHS, BUDGET, **options)
    return [next(batches).tolist() for _ in range(count)]


def epochs(count, **options):
    """The batches of so many epochs, told apart by every sequence having come once."""
    batches, found = shuffled_batches(LENGTHS, BUDGET, **options), []
    for _ in range(count):
        epoch, left = [], len(LENGTHS)
        while left > 0:
            epoch.append(next(batches).tolist())
            left -= len(epoch[-1])
        found.append(epoch)
    return found


def test_every_sequence_comes_once_an_epoch():
    for epoch in epochs(3, seed=1):
        assert sorted(i for batch in epoch for i in batch) == list(range(len(LENGTHS)))


def test_batches_respect_the_budget_and_are_nearly_full():
    [epoch] = epochs(1, seed=1)
    sizes = [int(LENGTHS[batch].sum()) for batch in epoch]
    assert max(sizes) <= BUDGET
    assert np.mean(sizes) > 0.9 * BUDGET


def test_lengths_are_alike_within_a_batch_and_mixed_between():
    [epoch] = epochs(1, seed=1)
    within = np.mean([np.std(LENGTHS[batch]) for batch in epoch])
    means = [np.mean(LENGTHS[batch]) for batch in epoch]
    assert within < 0.2 * np.std(LENGTHS)
    assert abs(np.corrcoef(means[:-1], means[1:])[0, 1]) < 0.3


def test_epochs_differ_and_so_do_seeds():
    first, second = epochs(2, seed=1)
    assert first != second
    assert take(20, seed=1) != take(20, seed=2)
    assert take(20, seed=1) == take(20, seed=1)


@pytest.mark.parametrize("skip", [1, 100, 700])
def test_skipping_is_dropping_the_first_batches(skip):
    assert take(20, seed=1, skip=skip) == take(skip + 20, seed=1)[skip:]


def test_a_sequence_longer_than_the_budget_is_a_batch_of_its_own():
    lengths = np.array([5, 90, 6, 7], dtype=np.int32)
    batches = shuffled_batches(lengths, 20, seed=0)
    first = [next(batches).tolist() for _ in range(2)]
    assert sorted(map(sorted, first)) == [[0, 2, 3], [1]]


def test_filling_drops_none_and_keeps_the_order():
    lengths = np.array([4, 6, 10, 30, 1, 9, 10, 2])
    order = np.array([7, 0, 1, 2, 3, 4, 5, 6])
    batches = [batch.tolist() for batch in fill_batches(order, lengths, 10)]
    assert batches == [[7, 0], [1], [2], [3], [4, 5], [6]]
    assert fill_batches(np.array([], dtype=int), lengths, 10) == []
