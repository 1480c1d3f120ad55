"""Masked-language-model corruption (Devlin et al. 2019, section 3.1): one pure function.

Of the tokens chosen for prediction 80% become [MASK], 10% a random word and 10% stay as they are,
so that the model must keep a good guess at every position, not only where it sees a [MASK].
"""

import torch
from torch import Generator, Tensor

from minitune.tokenizer import Tokenizer


def mask_tokens(
    tokens: Tensor, tokenizer: Tokenizer, generator: Generator, rate: float, whole_word: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Choose tokens (T,) of a packed batch and corrupt them in a copy; special tokens never are.

    Returns the corrupted tokens (T,), the ascending positions (M,) of those chosen, and their
    labels (M,), the ids that stood there. M is `rate` of the tokens that are not special: exactly,
    since matrix multiplications of one size at every step are faster than those of many sizes.
    With `whole_word` all tokens of a word are chosen or none (the BERT authors' update of 2019);
    M may then be slightly smaller.
    """
    ordinary = (~torch.isin(tokens, tokenizer.special_ids)).nonzero().squeeze(1)  # positions
    count = round(rate * ordinary.numel())
    if not whole_word:
        draw = torch.rand(ordinary.numel(), generator=generator)
    else:  # one draw for all tokens of a word, so that they stand side by side in the order below
        words = (~tokenizer.continuation[tokens]).cumsum(0)  # the number of each token's word
        draw = torch.rand(tokens.numel() + 1, generator=generator)[words][ordinary]
    order = draw.argsort()
    if whole_word and 0 < count < order.numel():
        # Stop before the word that `count` would cut in two.
        count = int(torch.searchsorted(draw[order], draw[order[count]]))
    positions = ordinary[order[:count]].sort().values
    labels = tokens[positions]

    # One draw decides what becomes of a token.
    fate = torch.rand(positions.numel(), generator=generator)
    vocabulary = torch.ones(tokenizer.vocab_size, dtype=torch.bool)
    vocabulary[tokenizer.special_ids] = False
    vocabulary = vocabulary.nonzero().squeeze(1)
    random = vocabulary[torch.randint(vocabulary.numel(), positions.shape, generator=generator)]

    corrupted = tokens.clone()
    corrupted[positions[fate < 0.8]] = tokenizer.mask_id
    swapped = (fate >= 0.8) & (fate < 0.9)
    corrupted[positions[swapped]] = random[swapped]
    return corrupted, positions, labels
