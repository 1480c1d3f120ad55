"""Initial weights for pretraining from scratch, with which a small BERT learns sooner.

BERT's own random weights are in model.initialize; the functions here overwrite some of them. What
that is worth: tests/benchmarks/LOG.md.
"""

import math

import torch
from torch import Tensor, nn

from minitune.model import Bert, MaskedLMHead


def sinusoid_angles(positions: Tensor, size: int) -> Tensor:
    """Angles (n, size / 2) of sinusoids at positions (n,) (Vaswani et al. 2017, section 3.5)."""
    return positions[:, None] * torch.exp(torch.arange(0, size, 2) * (-math.log(10000.0) / size))


@torch.no_grad()
def start_with_sinusoids(positions: nn.Embedding, scale: float) -> None:
    """Initialise the learned position embeddings with sinusoids of this amplitude."""
    angles = sinusoid_angles(torch.arange(positions.num_embeddings), positions.embedding_dim)
    positions.weight[:, 0::2] = scale * angles.sin()
    positions.weight[:, 1::2] = scale * angles.cos()


@torch.no_grad()
def start_with_neighbours(
    bert: Bert, scale: float = 0.1, sharpness: float = 1.5, layers: int = 2
) -> None:
    """Initialise the first layers so that their heads attend to the words next to each word.

    With random weights attention is near uniform, a bag of words, and the loss stays on a plateau
    at the entropy of single words until training has found out which positions are neighbours.
    Here positions begin as sinusoids p(i) with amplitude 0.1, where word embeddings have a standard
    deviation of 0.02. In each head the query copies the D position coordinates of the highest
    frequencies, and the key copies them rotated by the head's offset o, so that

        q(i) · k(j) = sharpness² p(i) · p(j - o),   largest where j = i + o.

    Offsets are -1, +1, -2, +2, … . All weights are then trained as usual. Trockman & Kolter (2023,
    "Mimetic Initialization of Self-Attention Layers") do the same in spirit.
    """
    C, D = bert.config.hidden_size, bert.config.head_size
    start_with_sinusoids(bert.embeddings.position, scale)
    even, odd = range(0, D, 2), range(1, D, 2)
    for layer in bert.layers[:layers]:
        query, key, _ = layer.attention.qkv.weight.view(3, -1, D, C)  # views, each (H, D, C)
        for head in range(len(query)):
            offset = (head // 2 + 1) * (1 if head % 2 else -1)
            turn = sinusoid_angles(torch.tensor([offset]), C)[0, : D // 2]
            query[head], key[head] = 0.0, 0.0
            query[head, :, :D] = sharpness * torch.eye(D)
            # sin((j - o) w) and cos((j - o) w) from sin(j w) and cos(j w).
            key[head, even, even] = key[head, odd, odd] = sharpness * turn.cos()
            key[head, even, odd] = -sharpness * turn.sin()
            key[head, odd, even] = sharpness * turn.sin()


@torch.no_grad()
def start_with_frequencies(head: MaskedLMHead, counts: Tensor) -> None:
    """Initialise the decoder's bias with log frequencies, from how often each word occurs (V,).

    Training then begins at the unigram entropy, which it would reach a hundred steps later anyway.
    """
    smoothed = counts.double() + 1  # a word that never occurred must not start at minus infinity
    head.bias.copy_((smoothed / smoothed.sum()).log())
