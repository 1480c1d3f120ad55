"""80/10/10 masking: the shares, what is never touched, and what a seed fixes."""

from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch

from minitune.masking import mask_tokens

MASK = 4
SPECIAL = torch.tensor([0, 1, 2, 3, MASK])
VOCABULARY = 1000
MILLION = 1_000_000


CONTINUATION = torch.arange(VOCABULARY) >= 500  # half of the vocabulary continues a word


class Masked(NamedTuple):
    tokens: torch.Tensor
    positions: torch.Tensor
    labels: torch.Tensor


def mask(tokens, seed=0, rate=0.15, whole_word=False):
    tokenizer = SimpleNamespace(
        mask_id=MASK, special_ids=SPECIAL, vocab_size=VOCABULARY, continuation=CONTINUATION
    )
    generator = torch.Generator().manual_seed(seed)
    return Masked(*mask_tokens(tokens, tokenizer, generator, rate, whole_word))


def random_tokens(count, lowest=0, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(lowest, VOCABULARY, (count,), generator=generator)


def assert_share(events, share):
    """Within 5 standard deviations: fails by chance once in two million."""
    spread = (share * (1 - share) / events.numel()) ** 0.5
    assert events.double().mean().item() == pytest.approx(share, abs=5 * spread)


@pytest.mark.parametrize("rate", [0.05, 0.15, 0.5])
def test_so_many_tokens_are_chosen_as_asked(rate):
    tokens = random_tokens(MILLION, lowest=5)
    chosen = torch.zeros(MILLION, dtype=torch.bool)
    chosen[mask(tokens, rate=rate).positions] = True
    assert_share(chosen, rate)
    assert_share(chosen[1:] & chosen[:-1], rate**2)  # neighbours are chosen independently


def test_80_percent_become_mask_10_random_10_stay():
    tokens = random_tokens(MILLION, lowest=5)
    masked = mask(tokens)
    now = masked.tokens[masked.positions]
    chance = 0.1 / (VOCABULARY - 5)  # a random word may be the word that stood there
    assert_share(now == MASK, 0.8)
    assert_share(now == masked.labels, 0.1 + chance)
    assert_share((now != MASK) & (now != masked.labels), 0.1 - chance)


def test_random_words_are_any_ordinary_word_and_never_a_special_one():
    tokens = torch.full((MILLION,), 7)
    masked = mask(tokens, rate=0.9)
    put_in = masked.tokens[(masked.tokens != MASK) & (masked.tokens != 7)]
    assert not torch.isin(put_in, SPECIAL).any()
    assert set(put_in.tolist()) == set(range(5, VOCABULARY)) - {7}
    assert_share(put_in < 5 + (VOCABULARY - 5) // 2, (497 - 1) / (995 - 1))


@pytest.mark.parametrize("whole_words", [False, True])
def test_special_tokens_are_never_chosen(whole_words):
    tokens = random_tokens(100_000)
    special = torch.isin(tokens, SPECIAL)
    masked = mask(tokens, rate=0.9, whole_word=whole_words)
    assert special.sum() > 100
    assert not special[masked.positions].any()
    assert torch.equal(masked.tokens[special], tokens[special])


def test_only_chosen_positions_change_and_labels_are_what_stood_there():
    tokens = random_tokens(10_000)
    masked = mask(tokens)
    assert torch.equal(masked.labels, tokens[masked.positions])
    restored = masked.tokens.clone()
    restored[masked.positions] = masked.labels
    assert torch.equal(restored, tokens)


def test_positions_are_sorted_and_unique():
    positions = mask(random_tokens(10_000)).positions
    assert positions.numel() > 1000
    assert (positions.diff() > 0).all()


@pytest.mark.parametrize("whole_words", [False, True])
def test_the_input_is_left_as_it_is(whole_words):
    tokens = random_tokens(10_000)
    before = tokens.clone()
    masked = mask(tokens, rate=0.9, whole_word=whole_words)
    assert torch.equal(tokens, before)
    assert not torch.equal(masked.tokens, before)
    assert torch.equal(SPECIAL, torch.tensor([0, 1, 2, 3, MASK]))


def test_the_seed_alone_decides():
    tokens = random_tokens(10_000)
    for first, second in zip(mask(tokens, seed=3), mask(tokens, seed=3), strict=True):
        assert torch.equal(first, second)
    assert not torch.equal(mask(tokens, seed=3).positions, mask(tokens, seed=4).positions)
    state = torch.random.get_rng_state()
    mask(tokens)
    assert torch.equal(torch.random.get_rng_state(), state)  # torch's own generator is not used


@pytest.mark.parametrize("count", [1000, 1, 0])
def test_nothing_chosen_is_fine(count):
    tokens = random_tokens(count)
    masked = mask(tokens, rate=1e-12)
    assert masked.positions.shape == masked.labels.shape == (0,)
    assert torch.equal(masked.tokens, tokens)


def test_whole_words_are_chosen_whole_at_the_same_token_rate():
    tokens = random_tokens(MILLION, lowest=5)
    tokens[0] = 5
    masked = mask(tokens, whole_word=True)
    chosen = torch.zeros(MILLION, dtype=torch.bool)
    chosen[masked.positions] = True
    goes_on = CONTINUATION[tokens]
    assert torch.equal(chosen[1:][goes_on[1:]], chosen[:-1][goes_on[1:]])
    assert_share(chosen[~goes_on], 0.15)  # words
    assert chosen.double().mean().item() == pytest.approx(0.15, abs=0.005)  # tokens
    assert_share(masked.tokens[masked.positions] == MASK, 0.8)  # each token meets its own fate


def test_a_word_does_not_go_on_over_a_separator():
    cls, sep, begins, goes_on = 2, 3, 10, 600
    sequence = torch.tensor([cls, goes_on, begins, goes_on, sep])
    tokens = sequence.repeat(20_000)
    masked = mask(tokens, rate=0.5, whole_word=True)
    chosen = torch.zeros(len(tokens), dtype=torch.bool)
    chosen[masked.positions] = True
    chosen = chosen.view(-1, 5)
    assert not chosen[:, [0, 4]].any()
    assert torch.equal(chosen[:, 2], chosen[:, 3])
    assert_share(chosen[:, 1] & chosen[:, 2], 0.25)  # the rest of a cut word is a word by itself
    assert_share(chosen[1:, 1] & chosen[:-1, 3], 0.25)
