"""Where training starts: initial weights from which a small BERT leaves the plateau within a minute.

Normal random weights are in model.initialize. What is here is for pretraining from nothing.
"""

import math

import torch
from torch import Tensor, nn

from minitune.model import Bert, MaskedLMHead


def sinusoid_angles(positions: Tensor, size: int) -> Tensor:
    """Angles (n, size / 2) of the sinusoids that encode positions (Vaswani et al. 2017, section 3.5)."""
    return positions[:, None] * torch.exp(torch.arange(0, size, 2) * (-math.log(10000.0) / size))


@torch.no_grad()
def start_with_sinusoids(positions: nn.Embedding, scale: float) -> None:
    """Initial position embeddings: sinusoids of this amplitude, from which the learned ones go on."""
    angles = sinusoid_angles(torch.arange(positions.num_embeddings), positions.embedding_dim)
    positions.weight[:, 0::2], positions.weight[:, 1::2] = (
        scale * angles.sin(),
        scale * angles.cos(),
    )


@torch.no_grad()
def start_with_neighbours(
    bert: Bert, scale: float = 0.1, sharpness: float = 1.5, layers: int = 2
) -> None:
    """Initial weights with which the first layers attend to the words next to each word.

    A BERT from random weights sits on a plateau at the entropy of single words: attention is near
    uniform, a bag of words, until it has found out which positions are neighbours. Here it knows
    from the start. Positions begin as sinusoids p(i), large beside the words (whose spread is
    0.02), and head h of a lower layer begins as a rotation: query and key select the D
    fastest-turning coordinates, the key turned back by the head's offset o, so that

        q(i) · k(j) = sharpness² p(i) · p(j - o),   largest where j = i + o.

    Offsets are -1, +1, -2, +2, … . All of it is only where training starts; every weight is
    learned. In spirit like the mimetic initialization of Trockman & Kolter (2023), who copy the
    look of trained query-key products. Measured effect: tests/benchmarks/LOG.md.
    """
    C, D = bert.config.hidden_size, bert.config.hidden_size // bert.config.num_attention_heads
    start_with_sinusoids(bert.embeddings.position, scale)
    for layer in bert.layers[:layers]:
        query, key, _ = layer.attention.qkv.weight.view(3, -1, D, C)  # views, each (H, D, C)
        for head in range(len(query)):
            offset = (head // 2 + 1) * (1 if head % 2 else -1)
            turn = sinusoid_angles(torch.tensor([offset]), C)[0, : D // 2]
            query[head], key[head] = 0.0, 0.0
            query[head, :, :D] = sharpness * torch.eye(D)
            even, odd = range(0, D, 2), range(1, D, 2)
            # sin((j - o) w) and cos((j - o) w) from sin(j w) and cos(j w).
            key[head, even, even] = key[head, odd, odd] = sharpness * turn.cos()
            key[head, even, odd] = -sharpness * turn.sin()
            key[head, odd, even] = sharpness * turn.sin()


@torch.no_grad()
def start_with_frequencies(head: MaskedLMHead, counts: Tensor) -> None:
    """Initial bias of the decoder: the logarithm of each word's frequency, from its counts (V,).

    Training then begins at the unigram entropy; it would reach it anyway, a hundred steps later.
    """
    smoothed = counts.double() + 1  # a word that never occurred must not start at minus infinity
    head.bias.copy_((smoothed / smoothed.sum()).log())
