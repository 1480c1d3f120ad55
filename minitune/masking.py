"""Masking, BERT's training task (Devlin et al. 2019, section 3.1): some tokens are to be guessed.

BERT guesses 15% of the tokens. train.py guesses 30%: there is more to learn from each text, with
less to guess it from (Wettig et al. 2022, "Should You Mask 15% in Masked Language Modeling?").

Of the tokens to be guessed 80% become [MASK], 10% become a random token and 10% stay as they are.
Hence the model cannot rely on seeing a [MASK], and must have a good guess for every token.
"""

import torch
from torch import Generator, Tensor

from minitune.tokenizer import Tokenizer


def mask_tokens(
    tokens: Tensor, tokenizer: Tokenizer, generator: Generator, rate: float, whole_word: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Choose some of the tokens (T,) of a packed batch at random, and mask them in a copy.

    Returns (the tokens (T,) after masking, the ascending positions (M,) of the chosen tokens, their
    labels (M,), which are their ids before masking). Special tokens are never chosen.

    M is `rate` of the ordinary tokens, those that are not special. The number is exact, since
    matrix multiplications are faster when each step has the same sizes. With `whole_word` all
    tokens of a word are chosen or none (the BERT authors' update of 2019); M may then be slightly
    smaller.
    """
    ordinary = (~torch.isin(tokens, tokenizer.special_ids)).nonzero().squeeze(1)  # positions
    count = round(rate * ordinary.numel())
    if not whole_word:
        draw = torch.rand(ordinary.numel(), generator=generator)
        chosen = draw.topk(count, largest=False, sorted=False).indices
    else:  # one number for all tokens of a word, so that `order` keeps them together
        words = (~tokenizer.continuation[tokens]).cumsum(0)  # of each token, counted from 1
        draw = torch.rand(tokens.numel() + 1, generator=generator)[words][ordinary]
        order = draw.argsort()
        if 0 < count < order.numel():
            # Stop before the word that would be cut in two: in draw[order], which ascends, the
            # first place that has the same number as place `count`.
            count = int(torch.searchsorted(draw[order], draw[order[count]]))
        chosen = order[:count]
    positions = ordinary[chosen].sort().values
    labels = tokens[positions]

    # One number for each chosen token: below 0.8 it is masked, below 0.9 replaced, else kept.
    u = torch.rand(positions.numel(), generator=generator)
    vocabulary = torch.ones(tokenizer.vocab_size, dtype=torch.bool)
    vocabulary[tokenizer.special_ids] = False
    vocabulary = vocabulary.nonzero().squeeze(1)
    random = vocabulary[torch.randint(vocabulary.numel(), positions.shape, generator=generator)]

    masked = tokens.clone()
    masked[positions[u < 0.8]] = tokenizer.mask_id
    is_random = (u >= 0.8) & (u < 0.9)
    masked[positions[is_random]] = random[is_random]
    return masked, positions, labels


if __name__ == "__main__":
    from minitune.commands import demos

    demos.run(demos.show_masking)
