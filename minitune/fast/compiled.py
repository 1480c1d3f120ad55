"""Layers compiled by torch.compile, for a GPU: few kernels instead of one for each operation.

It writes a kernel for neighbouring operations, such as a bias, a residual sum and LayerNorm, which
alone would each read and write all hidden states. Attention is already one operation
(fused_attention.py), and matrix multiplications stay as they are.
"""

import torch
from torch import nn

from minitune.batching import PackedBatch

# dynamic: one program for batches of all sizes. deterministic: measured times do not choose how a
# sum is divided, so that equal runs give equal bits.
HOW = {"backend": "inductor", "dynamic": True, "options": {"deterministic": True}}


def compile_layers(bert: nn.Module) -> None:
    """Let the layers of a `Bert` be compiled when they are first called.

    The last one is not, since a head reads few rows of it. Nor are the embeddings: their gradient
    would be summed in random order.
    """
    for layer in bert.layers[:-1]:
        layer.compile(**HOW)


def keep_compiled(module: nn.Module, copied: nn.Module) -> None:
    """Let a deep copy be compiled as the module is, which torch does not copy."""
    for original, its_copy in zip(module.modules(), copied.modules(), strict=True):
        if original._compiled_call_impl is not None:
            its_copy.compile(**HOW)


def warm_up(bert: nn.Module, max_len: int, batch_tokens: int, autocast: torch.autocast) -> None:
    """Compile for training now: compute the gradients of an example batch, and drop them.

    How the compiler divides sums over tokens depends on the first batch that it sees. If that is
    always the same, then a resumed run ends with the same bits as one that was not interrupted.
    """
    count = max(2, batch_tokens // max_len)
    # Numbers that are equal in the first batch are taken to be equal in all.
    count += count + 1 == max_len  # as many elements has cu_seqlens
    tokens = torch.zeros(max_len, dtype=torch.int64)
    batch = PackedBatch.from_sequences([tokens] * count).to(bert.embeddings.word.weight.device)
    was_training = bert.training
    bert.train()
    with autocast:
        hidden = bert(batch)
    if hidden.requires_grad:
        hidden.sum().backward()
    bert.zero_grad()
    bert.train(was_training)
