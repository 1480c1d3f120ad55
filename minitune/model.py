"""BERT (Devlin et al. 2019), every line of it, over packed batches.

The architecture is BERT to the letter: post-LayerNorm, learned positions, token types, exact GELU,
a masked-LM decoder tied to the word embeddings. What differs from most code is how it is run: a
batch is its T tokens laid end to end (see attention.py), so nothing here knows of padded sequences,
and where a head reads a few tokens only, the last layer computes keys and values of the others, and
no more.

Shapes: T tokens in the batch, M of them wanted, R rows (T or M, on a CPU rounded up, see
`rounded`), B sequences, C = hidden_size, H heads, D = C / H, V = vocab_size.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minitune.attention import attention
from minitune.batching import PackedBatch
from minitune.fast.layers import Dropout, GeluLinear, rounded


@dataclass
class BertConfig:
    """The fields of a BERT `config.json` that shape the computation, under the names used there."""

    vocab_size: int = 8192
    hidden_size: int = 256
    num_hidden_layers: int = 4
    num_attention_heads: int = 4  # heads of 64, the size that attention kernels like best
    intermediate_size: int = 1024  # 4 × hidden, as in every BERT
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    hidden_dropout_prob: float = 0.0  # a short run never sees a text often enough to overfit it
    initializer_range: float = 0.02
    pad_token_id: int = 0
    # Names of the labels in the order of the classifier's outputs; empty where there is none.
    id2label: dict[int, str] = field(default_factory=dict)

    @property
    def head_size(self) -> int:
        """D, the dimensions of one attention head."""
        return self.hidden_size // self.num_attention_heads


PRESETS = {
    "tiny": BertConfig(),
    "small": BertConfig(
        hidden_size=384, num_hidden_layers=6, num_attention_heads=6, intermediate_size=1536
    ),
    "base": BertConfig(
        hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072
    ),
}


@dataclass
class Wanted:
    """The tokens of a batch whose last hidden states a head reads."""

    rows: Tensor  # (R,) their indices, ascending, then what `rounded` adds
    count: int  # M
    cu_seqlens: Tensor  # (B+1,) int32, how they are spread over the sequences

    @classmethod
    def of(cls, tokens: Tensor, batch: PackedBatch) -> "Wanted":
        """These M indices into the packed tokens, ascending, each of them once."""
        cu_seqlens = torch.searchsorted(tokens, batch.cu_seqlens.to(tokens.dtype), out_int32=True)
        return cls(rounded(tokens), tokens.numel(), cu_seqlens)


def at(wanted: Wanted | None, x: Tensor) -> Tensor:
    """The rows of these tokens; None wants all of them."""
    return x if wanted is None else x.index_select(0, wanted.rows)


class LayerNorm(nn.LayerNorm):
    """LayerNorm in float32, whatever autocast is doing around it."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x.float(), self.normalized_shape, self.weight, self.bias, self.eps)


class Embeddings(nn.Module):
    """Word + position + token type, then LayerNorm: (R, C), the T tokens and what `rounded` adds to them."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.word = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.token_type = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.norm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = Dropout(config.hidden_dropout_prob)

    def forward(self, batch: PackedBatch) -> Tensor:
        lengths = batch.cu_seqlens.diff()
        offsets = batch.cu_seqlens[:-1].repeat_interleave(lengths, output_size=batch.tokens.numel())
        positions = torch.arange(batch.tokens.numel(), device=offsets.device) - offsets
        # minitune reads single texts, so every token is of type 0.
        x = (
            self.word(rounded(batch.tokens))
            + self.position(rounded(positions))
            + self.token_type.weight[0]
        )
        return self.dropout(self.norm(x))  # (R, C)


class SelfAttention(nn.Module):
    """Multi-head self-attention and its output projection."""

    def __init__(self, config: BertConfig, backend: str):
        super().__init__()
        self.heads, self.backend = config.num_attention_heads, backend
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)  # three products in one
        self.out = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor, batch: PackedBatch, wanted: Wanted | None = None) -> Tensor:
        C, T = x.size(1), batch.tokens.numel()
        if wanted is None:
            M, cu_seqlens_q = T, None
            q, k, v = self.qkv(x).chunk(3, dim=1)
        else:  # these ask, all are asked
            M, cu_seqlens_q = wanted.count, wanted.cu_seqlens
            (w_q, w_kv), (b_q, b_kv) = (
                p.split([C, 2 * C]) for p in (self.qkv.weight, self.qkv.bias)
            )
            q = F.linear(at(wanted, x), w_q, b_q)
            k, v = F.linear(x, w_kv, b_kv).chunk(2, dim=1)
        R = q.size(0)
        q, k, v = (y[:n].unflatten(1, (self.heads, -1)) for y, n in ((q, M), (k, T), (v, T)))
        y = attention(
            q, k, v, batch.cu_seqlens, batch.max_seqlen, self.backend, cu_seqlens_q
        )  # (M, H, D)
        return self.out(F.pad(y.flatten(1), (0, 0, 0, R - M)))


class FeedForward(nn.Module):
    """Two linear maps with a GELU between, applied to every token by itself."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.up = nn.Linear(config.hidden_size, config.intermediate_size)
        self.down = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x)
        if (
            not torch.is_grad_enabled()
        ):  # nothing is kept, and autocast casts weights once for many batches
            return self.down(F.gelu(x))
        # Autocast does not look into a hand-written function, so here weights are cast by hand.
        return GeluLinear.apply(x, self.down.weight.to(x.dtype), self.down.bias.to(x.dtype))


class Layer(nn.Module):
    """One transformer block. Post-LayerNorm: normalise after each residual sum."""

    def __init__(self, config: BertConfig, backend: str):
        super().__init__()
        self.attention = SelfAttention(config, backend)
        self.attention_norm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.feed_forward = FeedForward(config)
        self.feed_forward_norm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = Dropout(config.hidden_dropout_prob)
        # Where adapters.py puts its bottlenecks: after dropout, before the residual sum.
        self.attention_adapter = nn.Identity()
        self.feed_forward_adapter = nn.Identity()

    def forward(self, x: Tensor, batch: PackedBatch, wanted: Wanted | None = None) -> Tensor:
        """(R, C) to (R, C), of all tokens; or of those wanted, where the others are just attended to."""
        y = self.attention_adapter(self.dropout(self.attention(x, batch, wanted)))
        x = self.attention_norm(at(wanted, x) + y)
        y = self.feed_forward_adapter(self.dropout(self.feed_forward(x)))
        return self.feed_forward_norm(x + y)


class Bert(nn.Module):
    """Embeddings and a stack of layers: a packed batch in, one vector a token out."""

    def __init__(self, config: BertConfig, attention_backend: str = "sdpa"):
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        self.layers = nn.ModuleList(
            Layer(config, attention_backend) for _ in range(config.num_hidden_layers)
        )

    def forward(self, batch: PackedBatch, wanted: Tensor | None = None) -> Tensor:
        """Hidden states (T, C); or (M, C) of the M tokens `wanted`, different indices into the packed ones.

        What nobody reads is not computed: of other tokens the last layer needs keys and values,
        which is a sixth of its work and less.
        """
        x = self.embeddings(batch)
        for layer in self.layers[:-1]:
            x = layer(x, batch)
        if wanted is None:
            return self.layers[-1](x, batch)[: batch.tokens.numel()]
        ascending, order = wanted.sort()
        x = self.layers[-1](x, batch, Wanted.of(ascending, batch))
        return x.index_select(0, order.argsort())  # in the order asked for


class Pooler(nn.Module):
    """BERT's summary of a sequence: a tanh layer over the hidden state of its [CLS] token."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, bert: Bert, batch: PackedBatch) -> Tensor:
        return torch.tanh(self.dense(bert(batch, batch.cu_seqlens[:-1])))  # (B, C)


def mean_of_tokens(hidden: Tensor, batch: PackedBatch) -> Tensor:
    """The mean over each sequence's tokens, in float32: (T, C) to (B, C)."""
    lengths = batch.cu_seqlens.diff()
    B, T = lengths.numel(), hidden.size(0)
    owner = torch.arange(B, device=lengths.device).repeat_interleave(lengths, output_size=T)
    sums = hidden.new_zeros(B, hidden.size(1), dtype=torch.float32).index_add(
        0, owner, hidden.float()
    )
    return sums / lengths[:, None]


class MeanPooler(nn.Module):
    """Another summary of a sequence: the mean of its tokens. BERT has none such, and no weights for it."""

    def forward(self, bert: Bert, batch: PackedBatch) -> Tensor:
        return mean_of_tokens(bert(batch), batch)  # (B, C)


class MaskedLMHead(nn.Module):
    """Scores every word of the vocabulary. The decoder's matrix is the word embedding itself."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.norm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, hidden: Tensor, word_embeddings: Tensor) -> Tensor:
        return F.linear(self.norm(F.gelu(self.dense(hidden))), word_embeddings, self.bias)


class BertForMaskedLM(nn.Module):
    """BERT with the head that pretraining uses."""

    def __init__(self, config: BertConfig, attention_backend: str = "sdpa"):
        super().__init__()
        self.config = config
        self.bert = Bert(config, attention_backend)
        self.head = MaskedLMHead(config)
        self.apply(lambda module: initialize(module, config))

    def forward(self, batch: PackedBatch, positions: Tensor) -> Tensor:
        """Logits (M, V) at the M given positions, indices into the packed tokens.

        Only those: over all T positions the product with the vocabulary would cost two thirds of
        what the whole of the tiny encoder does.
        """
        hidden = rounded(self.bert(batch, positions))
        return self.head(hidden, self.bert.embeddings.word.weight)[: positions.numel()]


class BertForSequenceClassification(nn.Module):
    """BERT with the head that fine-tuning uses: one score a label for each sequence."""

    def __init__(self, config: BertConfig, attention_backend: str = "sdpa"):
        super().__init__()
        self.config = config
        self.bert = Bert(config, attention_backend)
        self.pooler = Pooler(config)
        self.dropout = Dropout(config.hidden_dropout_prob)
        self.classifier = nn.Linear(config.hidden_size, len(config.id2label))
        self.apply(lambda module: initialize(module, config))

    def forward(self, batch: PackedBatch) -> Tensor:
        """Logits (B, labels)."""
        return self.classifier(self.dropout(self.pooler(self.bert, batch)))


def initialize(module: nn.Module, config: BertConfig) -> None:
    """BERT's initial weights: normal with a small spread, zero biases."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=config.initializer_range)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)
