"""Masked-language-model corruption (Devlin et al. 2019, section 3.1): one pure function.

Of the tokens chosen for prediction 80% become [MASK], 10% a random word and 10% stay as they are,
so that the model must keep a good guess at every position, not only where it sees a [MASK].
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Masked(NamedTuple):
    """What the model reads, and what it is asked."""

    tokens: Tensor  # (T,) corrupted copy of the input
    positions: Tensor  # (M,) which tokens are to be predicted
    labels: Tensor  # (M,) what stood there


def mask_tokens(
    tokens: Tensor,
    generator: torch.Generator,
    *,
    rate: float,
    mask_id: int,
    special_ids: Tensor,
    vocab_size: int,
    continuation: Tensor | None = None,
) -> Masked:
    """Corrupt the packed tokens (T,) of a batch, leaving the input as it is.

    Of the tokens that are not special, the share `rate` is chosen: exactly so many, in random
    places, since products of one size at every step are faster and take less memory than many
    sizes. With `continuation`, a bool for each word of the vocabulary that tells whether it goes on
    a word ("##ing"), whole words are chosen instead of tokens (the BERT authors' 2019 update), up
    to that share. `special_ids` are never chosen and never put in as a random word.
    """
    ordinary_places = (~torch.isin(tokens, special_ids)).nonzero().squeeze(1)
    wanted = round(rate * ordinary_places.numel())
    if continuation is None:
        draw = torch.rand(ordinary_places.numel(), generator=generator)
    else:  # one draw a word, shared by its tokens, so that they stand together in the order below
        word = (~continuation[tokens]).cumsum(0)
        draw = torch.rand(tokens.numel() + 1, generator=generator)[word][ordinary_places]
    order = draw.argsort()
    if continuation is not None and 0 < wanted < order.numel():
        # Do not cut a word in two: stop before the one that would go beyond.
        wanted = int(torch.searchsorted(draw[order], draw[order[wanted]]))
    positions = ordinary_places[order[:wanted]].sort().values
    labels = tokens[positions]

    # One draw decides a token's fate. Two independent ones ("80%, else 50%") are the usual way to
    # get the shares wrong.
    fate = torch.rand(positions.numel(), generator=generator)
    ordinary = torch.ones(vocab_size, dtype=torch.bool)
    ordinary[special_ids] = False
    ordinary = ordinary.nonzero().squeeze(1)
    random = ordinary[torch.randint(ordinary.numel(), positions.shape, generator=generator)]

    corrupted = tokens.clone()
    corrupted[positions[fate < 0.8]] = mask_id
    swapped = (fate >= 0.8) & (fate < 0.9)
    corrupted[positions[swapped]] = random[swapped]
    return Masked(corrupted, positions, labels)
