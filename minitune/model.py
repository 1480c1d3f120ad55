"""BERT (Devlin et al. 2019), every line of it, over packed batches.

The architecture is exactly BERT's: post-LayerNorm, learned positions, token types, the exact GELU
(not its tanh approximation), and a decoder whose matrix is that of the word embeddings. A batch is
its T tokens laid end to end (batching.py), so no sequence is padded.

Two things are for speed alone. If a head reads hidden states at M positions only, the last layer
computes only these. And fast/layers.py has faster versions of simple things. Read pad_rows(x) as x,
ByteDropout as Dropout, and gelu_linear(x, linear) as linear(gelu(x)).

Shapes: T tokens, B sequences, M positions that a head reads, R rows (T or M, plus the rows that
`pad_rows` adds), C = hidden_size, H heads, D = C / H, V = vocab_size.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minitune.attention import attention, self_attention
from minitune.batching import PackedBatch
from minitune.fast.layers import ByteDropout, gelu_linear, pad_rows


@dataclass
class BertConfig:
    """The sizes of a model, under the names that they have in a BERT `config.json`."""

    vocab_size: int = 8192
    hidden_size: int = 256
    num_hidden_layers: int = 4
    num_attention_heads: int = 4  # heads of 64, for which attention kernels are fast
    intermediate_size: int = 1024  # 4 × hidden, as in every BERT
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    hidden_dropout_prob: float = 0.0  # a short run reads no text often enough to overfit
    initializer_range: float = 0.02
    pad_token_id: int = 0
    # The names of a classifier's labels, in the order of its outputs.
    id2label: dict[int, str] = field(default_factory=dict)

    @property
    def head_size(self) -> int:
        """D, the dimensions of one attention head."""
        return self.hidden_size // self.num_attention_heads


PRESETS = {
    "tiny": BertConfig(),
    "small": BertConfig(8192, 384, 6, 6, 1536),  # vocabulary, hidden, layers, heads, intermediate
    "base": BertConfig(8192, 768, 12, 12, 3072),
}


class LayerNorm(nn.LayerNorm):
    """LayerNorm in float32, also under autocast, which multiplies matrices in bfloat16."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x.float(), self.normalized_shape, self.weight, self.bias, self.eps)


class Embeddings(nn.Module):
    """The sum of word, position and token-type embedding, then LayerNorm: (R, C)."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.word = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.token_type = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.norm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = ByteDropout(config.hidden_dropout_prob)

    def forward(self, batch: PackedBatch) -> Tensor:
        starts = batch.cls_positions[batch.sequence_ids]
        positions = torch.arange(batch.tokens.numel(), device=starts.device) - starts
        x = self.word(pad_rows(batch.tokens)) + self.position(pad_rows(positions))
        x = x + self.token_type.weight[0]  # single texts, not pairs: every token has type 0
        return self.dropout(self.norm(x))  # (R, C)


class SelfAttention(nn.Module):
    """Multi-head self-attention and its output projection."""

    def __init__(self, config: BertConfig, backend: str):
        super().__init__()
        self.heads, self.backend = config.num_attention_heads, backend
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)  # query, key and value
        self.out = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor, batch: PackedBatch, positions: Tensor | None = None) -> Tensor:
        qkv = self.qkv(x)[: batch.tokens.numel()].unflatten(1, (3, self.heads, -1))  # (T, 3, H, D)
        lengths = batch.cu_seqlens, batch.max_seqlen, self.backend
        if positions is None:
            y = self_attention(qkv, *lengths)
        else:  # in the last layer a head asks for few tokens
            q, k, v = qkv.unbind(1)
            q = q.index_select(0, positions)
            y = attention(q, k, v, *lengths, batch.count_before(positions))
        return self.out(pad_rows(y.flatten(1)))


class FeedForward(nn.Module):
    """Two linear maps with a GELU in between, for each token by itself."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.up = nn.Linear(config.hidden_size, config.intermediate_size)
        self.down = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return gelu_linear(self.up(x), self.down)  # down(gelu(up(x)))


class Layer(nn.Module):
    """One transformer layer. Post-LayerNorm: it normalises after each residual sum."""

    def __init__(self, config: BertConfig, backend: str):
        super().__init__()
        self.attention = SelfAttention(config, backend)
        self.attention_norm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.feed_forward = FeedForward(config)
        self.feed_forward_norm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = ByteDropout(config.hidden_dropout_prob)
        # Here adapters.py inserts its bottlenecks: after dropout, before the residual sum.
        self.attention_adapter = nn.Identity()
        self.feed_forward_adapter = nn.Identity()

    def forward(self, x: Tensor, batch: PackedBatch, positions: Tensor | None = None) -> Tensor:
        """From (R, C) of all tokens to (R, C) of all, or of those at ascending `positions`."""
        y = self.attention_adapter(self.dropout(self.attention(x, batch, positions)))
        if positions is not None:
            x = x.index_select(0, pad_rows(positions))
        x = self.attention_norm(x + y)
        y = self.feed_forward_adapter(self.dropout(self.feed_forward(x)))
        return self.feed_forward_norm(x + y)


class Bert(nn.Module):
    """The encoder: embeddings and layers. It gives one vector for each token of a packed batch."""

    def __init__(self, config: BertConfig, attention_backend: str = "sdpa"):
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        self.layers = nn.ModuleList(
            Layer(config, attention_backend) for _ in range(config.num_hidden_layers)
        )

    def forward(self, batch: PackedBatch, positions: Tensor | None = None) -> Tensor:
        """Hidden states (T, C); or (M, C) at M ascending positions in the packed tokens."""
        x = self.embeddings(batch)
        for layer in self.layers[:-1]:
            x = layer(x, batch)
        x = self.layers[-1](x, batch, positions)
        return x[: batch.tokens.numel() if positions is None else positions.numel()]

    def at(self, batch: PackedBatch, positions: Tensor) -> Tensor:
        """Hidden states (M, C) at M positions in the packed tokens, in any order."""
        ascending, order = positions.sort()
        # The argsort of a permutation is its inverse: back to the order of `positions`.
        return self(batch, ascending).index_select(0, order.argsort())


class Pooler(nn.Module):
    """BERT's summary of a sequence: a tanh layer over the hidden state of its [CLS] token."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def positions(self, batch: PackedBatch) -> Tensor | None:
        """The ascending positions of the hidden states that it reads; None: all."""
        return batch.cls_positions

    def forward(self, hidden: Tensor, batch: PackedBatch) -> Tensor:
        return torch.tanh(self.dense(hidden))  # (B, C)


def mean_of_tokens(hidden: Tensor, batch: PackedBatch) -> Tensor:
    """The mean over each sequence's tokens, in float32: (T, C) to (B, C)."""
    lengths = batch.cu_seqlens.diff()[:, None]
    sums = hidden.new_zeros(len(lengths), hidden.size(1), dtype=torch.float32)
    return sums.index_add(0, batch.sequence_ids, hidden.float()) / lengths


class MeanPooler(nn.Module):
    """Another summary of a sequence, which BERT does not have: the mean over its tokens."""

    def __init__(self, config: BertConfig):  # it has no weights
        super().__init__()

    def positions(self, batch: PackedBatch) -> Tensor | None:
        return None

    def forward(self, hidden: Tensor, batch: PackedBatch) -> Tensor:
        return mean_of_tokens(hidden, batch)  # (B, C)


# By the name that is saved with a model. To add one: a class here, which a method in methods.py
# names as its `pooling`; and, if words are to be explained with it, explain.rollout.
POOLERS = {"cls": Pooler, "mean": MeanPooler}


class MaskedLMHead(nn.Module):
    """Scores for all tokens of the vocabulary. Its last matrix is that of the word embeddings."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.norm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, hidden: Tensor, word_embeddings: Tensor) -> Tensor:
        return F.linear(self.norm(F.gelu(self.dense(hidden))), word_embeddings, self.bias)


class BertForMaskedLM(nn.Module):
    """BERT with the head for pretraining."""

    def __init__(self, config: BertConfig, attention_backend: str = "sdpa"):
        super().__init__()
        self.config = config
        self.bert = Bert(config, attention_backend)
        self.head = MaskedLMHead(config)
        self.apply(lambda module: initialize(module, config))

    def forward(self, batch: PackedBatch, positions: Tensor) -> Tensor:
        """Logits (M, V) at M positions in the packed tokens, in any order."""
        hidden = pad_rows(self.bert.at(batch, positions))
        return self.head(hidden, self.bert.embeddings.word.weight)[: positions.numel()]


class BertForSequenceClassification(nn.Module):
    """BERT with the head for fine-tuning: one score for each label of a sequence."""

    temperature = 1.0  # of its probabilities, softmax(logits / temperature); see temperature.py

    def __init__(self, config: BertConfig, attention_backend: str = "sdpa", pooling: str = "cls"):
        """`pooling` is a key of POOLERS."""
        super().__init__()
        self.config = config
        self.bert = Bert(config, attention_backend)
        self.pooling, self.pooler = pooling, POOLERS[pooling](config)
        self.dropout = ByteDropout(config.hidden_dropout_prob)
        self.classifier = nn.Linear(config.hidden_size, len(config.id2label))
        self.apply(lambda module: initialize(module, config))

    def forward(self, batch: PackedBatch) -> Tensor:
        """Logits (B, labels)."""
        return self.classify(self.bert(batch, self.pooler.positions(batch)), batch)

    def classify(self, hidden: Tensor, batch: PackedBatch) -> Tensor:
        """Logits (B, labels) from the hidden states that the pooler reads."""
        return self.classifier(self.dropout(self.pooler(hidden, batch)))


def initialize(module: nn.Module, config: BertConfig) -> None:
    """BERT's initial weights: normally distributed with a small spread; biases are zero."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=config.initializer_range)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)
