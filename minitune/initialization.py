"""Initial weights with which a small BERT learns sooner, for pretraining from scratch.

They replace some of BERT's random weights (model.initialize). How much that helps is measured in
tests/benchmarks/LOG.md.
"""

import math

import torch
from torch import Tensor, nn

from minitune.model import Bert, BertConfig, BertForMaskedLM, MaskedLMHead

NEIGHBOUR_LAYERS = 2  # the first layers, whose heads start by attending to neighbours


def neighbour_offset(head: int) -> int:
    """Where the neighbour stands that this head starts with: -1, +1, -2, +2, … of each token."""
    return (head // 2 + 1) * (1 if head % 2 else -1)


def from_scratch(config: BertConfig, seed: int) -> BertForMaskedLM:
    """The model that `train.py --seed` begins with, except for the decoder's bias."""
    torch.manual_seed(seed)
    model = BertForMaskedLM(config)
    start_with_neighbours(model.bert)
    return model.eval()


def sinusoid_angles(positions: Tensor, size: int) -> Tensor:
    """Angles (n, size / 2) of sinusoids at positions (n,) (Vaswani et al. 2017, section 3.5)."""
    return positions[:, None] * torch.exp(torch.arange(0, size, 2) * (-math.log(10000.0) / size))


@torch.no_grad()
def start_with_sinusoids(positions: nn.Embedding, scale: float) -> None:
    """Initialise position embeddings with sinusoids of amplitude `scale`."""
    angles = sinusoid_angles(torch.arange(positions.num_embeddings), positions.embedding_dim)
    positions.weight[:, 0::2] = scale * angles.sin()
    positions.weight[:, 1::2] = scale * angles.cos()


@torch.no_grad()
def start_with_neighbours(
    bert: Bert, scale: float = 0.1, sharpness: float = 1.5, layers: int = NEIGHBOUR_LAYERS
) -> None:
    """Initialise the first layers so that their heads attend to the words next to each word.

    With random weights, attention gives nearly the same weight to all words. The loss then stays
    for long at the entropy of single words, until training has found out which positions are
    neighbours. Here the position embeddings p(i) are sinusoids with amplitude `scale`, five times
    the spread of the word embeddings. The query of a head is a copy of those D coordinates that
    have the highest frequencies. The key is the same, shifted by the head's offset o, so that

        q(i) · k(j) = sharpness² p(i) · p(j - o),   which is largest where j = i + o.

    The offsets of the heads are -1, +1, -2, +2, … . The second layer starts in the same way, since
    the residual sums carry the positions there. All weights are then trained as usual. The idea is
    that of Trockman & Kolter (2023, "Mimetic Initialization of Self-Attention Layers").
    """
    C, D = bert.config.hidden_size, bert.config.head_size
    start_with_sinusoids(bert.embeddings.position, scale)
    even, odd = range(0, D, 2), range(1, D, 2)
    for layer in bert.layers[:layers]:
        query, key, _ = layer.attention.qkv.weight.view(3, -1, D, C)  # views, each (H, D, C)
        for head in range(len(query)):
            turn = sinusoid_angles(torch.tensor([neighbour_offset(head)]), C)[0, : D // 2]
            query[head], key[head] = 0.0, 0.0
            query[head, :, :D] = sharpness * torch.eye(D)
            # sin(jw - ow) = sin jw cos ow - cos jw sin ow
            # cos(jw - ow) = cos jw cos ow + sin jw sin ow
            key[head, even, even] = key[head, odd, odd] = sharpness * turn.cos()
            key[head, even, odd] = -sharpness * turn.sin()
            key[head, odd, even] = sharpness * turn.sin()


@torch.no_grad()
def start_with_frequencies(head: MaskedLMHead, counts: Tensor) -> None:
    """Initialise the decoder's bias with the log frequency of each token, from its `counts` (V,).

    The loss then begins at the unigram entropy, otherwise reached after a hundred steps.
    """
    smoothed = counts.double() + 1  # the logarithm of zero would be minus infinity
    head.bias.copy_((smoothed / smoothed.sum()).log())
