"""What is looked at in each exercise: (what it is, in words; its value), the simplest first.

Everything is computed by the project, in which the code to check stands in its place. Random weights
are large, so that every part matters.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.overrides import TorchFunctionMode

from minitune.adapters import Adapter, adapter_parameters, insert_adapters
from minitune.attention import _tiled_forward, attention_weights, one_sequence, reference
from minitune.batching import PackedBatch
from minitune.calibration import match_prior
from minitune.corpus import Corpus
from minitune.data import Dataset
from minitune.explain import Question, integrated_gradients
from minitune.fast.layers import pad_rows
from minitune.lora import LoRA
from minitune.masking import mask_tokens
from minitune.model import BertConfig, BertForMaskedLM, BertForSequenceClassification, Layer
from minitune.pretraining import MaskedLanguageModelling
from minitune.prompting import FillMask, Prompt
from minitune.support.runtime import Runtime
from minitune.support.tokenizer_files import SPECIAL_TOKENS
from minitune.tokenizer import Tokenizer
from tests.exercises.source import ROOT

Observed = Iterator[tuple[str, Any]]
SAMPLES = ROOT / "data" / "samples"
SMALL = BertConfig(
    vocab_size=300,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=24,
    max_position_embeddings=64,
    initializer_range=0.2,
    id2label={0: "negative", 1: "positive"},
)


def masking() -> Observed:
    """200 words, of which 80% are chosen: figures of that many hardly depend on the draws."""
    names = [*SPECIAL_TOKENS, *(f"word{i}" for i in range(200))]
    tokenizer = Tokenizer({name: i for i, name in enumerate(names)})
    tokens = torch.randint(5, len(names), (100_000,))
    tokens[::40], tokens[39::40] = tokenizer.cls_id, tokenizer.sep_id
    given = tokens.clone()

    def mask(seed: int) -> tuple[Tensor, Tensor, Tensor]:
        return mask_tokens(tokens, tokenizer, Generator().manual_seed(seed), 0.8, False)

    corrupted, positions, labels = mask(1)
    yield "the tokens that were given stay as they are", torch.equal(tokens, given)
    tokens = given
    special = torch.isin(tokens[positions], tokenizer.special_ids).sum().item()
    yield "how many special tokens are chosen", special
    yield "how many tokens are chosen", len(positions)
    yield "how many labels there are", len(labels)
    yield "the labels are what stood at the positions", torch.equal(labels, tokens[positions])
    yield "the positions ascend", torch.equal(positions, positions.unique())
    others = torch.ones_like(tokens, dtype=torch.bool)
    others[positions] = False
    yield "all other tokens stay as they are", torch.equal(corrupted[others], tokens[others])
    now = corrupted[positions]
    masked, kept = now == tokenizer.mask_id, now == labels
    yield "the share of the chosen tokens that becomes [MASK]", share(masked)
    yield "the share that becomes another word", share(~masked & ~kept)
    random = now[~masked & ~kept]
    strange = torch.isin(random, tokenizer.special_ids).sum().item()
    yield "how many of the random words are special tokens", strange
    yield "how many words there are among the random ones", len(random.unique())
    yield "the same seed masks the same", torch.equal(mask(1)[0], corrupted)
    yield "another seed masks other tokens", not torch.equal(mask(2)[1], positions)


def share(chosen: Tensor) -> str:
    """In whole percent."""
    return f"{chosen.double().mean():.0%}"


def attention() -> Observed:
    q, k, v = torch.randn(3, 6, 3, 8)  # three heads
    yield "the weights for 6 tokens", attention_weights(q, k)
    yield "the output for 6 tokens", one_sequence(q, k, v)
    yield "the output for 4 queries and 6 keys", one_sequence(q[:4], k, v)
    yield "the output where scores are in the hundreds", one_sequence(100 * q, k, v)


def packed() -> Observed:
    q, k, v = torch.randn(3, 9, 3, 8)
    cu_seqlens = torch.tensor([0, 2, 7, 9], dtype=torch.int32)
    yield (
        "the output for sequences of 2, 5 and 2 tokens",
        reference(q, k, v, cu_seqlens, cu_seqlens),
    )
    one = cu_seqlens[:2]
    yield "the output for one sequence", reference(q[:2], k[:2], v[:2], one, one)
    three = torch.arange(4, dtype=torch.int32)
    yield "the output for one query in each sequence", reference(q[:3], k, v, three, cu_seqlens)


def online_softmax() -> Observed:
    q, k, v = torch.randn(3, 2, 3, 200, 8)  # two sequences, three heads, several blocks of keys
    out, lse = _tiled_forward(q, k[..., :9, :], v[..., :9, :])
    yield "the output for 9 keys, which are one block", out
    yield "lse for 9 keys", lse
    with LargestTensor() as largest:
        out, lse = _tiled_forward(q, 5 * k, v)
    yield "the output for 200 keys, which are several blocks", out
    yield "lse for 200 keys", lse
    yield "no more scores are held at once than those of a block", largest.numel <= 2 * 3 * 200 * 64
    out, lse = _tiled_forward(100 * q, k, v)
    yield "the output where scores are in the hundreds", out


class LargestTensor(TorchFunctionMode):
    """How many numbers the largest tensor has that is computed in this context."""

    numel = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.numel = max(self.numel, result.numel())
        return result


class Times(nn.Module):
    """Stands for an adapter or dropout, so that one can see where it is."""

    def __init__(self, factor: float):
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * x


def layer() -> Observed:
    block = large_weights(Layer(SMALL, "reference"))
    batch = PackedBatch.from_sequences([torch.arange(5), torch.arange(3)])
    x = pad_rows(torch.randn(8, SMALL.hidden_size))
    yield "the output for two sequences", block(x, batch)[:8]
    block.attention_adapter, block.feed_forward_adapter = Times(3), Times(-2)
    yield "the output with adapters", block(x, batch)[:8]
    block.dropout = Times(0.3)
    yield "the output with dropout", block(x, batch)[:8]
    yield "the output at two positions", block(x, batch, torch.tensor([0, 6]))[:2]


def masked_loss() -> Observed:
    corpus = Corpus.open(
        Dataset(str(SAMPLES / "reviews.txt")), None, SMALL.vocab_size, lambda _: None
    )
    task = MaskedLanguageModelling(
        corpus, max_len=32, batch_tokens=96, rate=0.2, whole_word=False, seed=0, summary_weight=0.7
    )
    model = large_weights(BertForMaskedLM(SMALL))
    hidden, words = torch.randn(5, SMALL.hidden_size), model.bert.embeddings.word.weight
    yield "the head's logits", model.head(hidden, words)
    inputs, labels = next(task.batches(0)).to(torch.device("cpu"))
    minimised, reported = task.loss(model, inputs, labels)
    yield "the loss that is reported", reported
    yield "the loss that is minimised", minimised


def adapter() -> Observed:
    inside = large_weights(Adapter(16, 4))
    yield "the adapter's output", inside(torch.randn(5, 16))
    model = BertForSequenceClassification(SMALL)
    insert_adapters(model.bert, 4)
    yield "the names of what is trained", sorted(adapter_parameters(model))


def lora() -> Observed:
    x = torch.randn(5, 16)
    single = large_weights(LoRA(nn.Linear(16, 16), 1, [0], rank=2, scale=0.5))
    several = large_weights(LoRA(nn.Linear(16, 48), 3, [0, 2], rank=2, scale=0.5))
    yield "the output for one map", single(x)
    yield "the output for maps 0 and 2 of three", several(x)
    several.dropout = Times(0.3)
    yield "the output with dropout", several(x)
    yield "the merged weight of one map", single.adapted()
    yield "the merged weights of maps 0 and 2 of three", several.adapted()
    yield (
        "the merged map computes the same",
        torch.allclose(single.merged()(x), single(x), atol=1e-5),
    )


def prompt() -> Observed:
    texts = [row.text for row in Dataset(str(SAMPLES / "reviews.csv")).read()]
    tokenizer = Tokenizer.train(texts, SMALL.vocab_size)
    model = large_weights(BertForMaskedLM(SMALL)).eval()
    fill_mask = FillMask(model, tokenizer, Runtime(torch.device("cpu"), "fp32"))
    words = {"negative": ["not", "bad"], "positive": ["good", "and", "of"]}
    single = Prompt("{text} It was [MASK].", words, fill_mask, 64)
    ids = tokenizer.encode(texts[:4])
    yield "the scores of four texts, for words of one token", single.scores(ids)
    words = {"negative": ["unforgettable", "bad"], "positive": ["good", "wonderfully"]}
    several = Prompt("{text} It was [MASK].", words, fill_mask, 64)
    yield "the scores of four texts, for words of several tokens", several.scores(ids)
    scores = 2 * torch.randn(50, 3) + torch.tensor([3.0, 0.0, 1.0])
    leveled = (scores + match_prior(scores)).softmax(-1)
    yield "the mean answer after its prior is matched", leveled.mean(0)


def gradients() -> Observed:
    texts = [row.text for row in Dataset(str(SAMPLES / "reviews.csv")).read()]
    tokenizer = Tokenizer.train(texts, SMALL.vocab_size)
    model = large_weights(BertForSequenceClassification(SMALL)).eval()
    ids = tokenizer.frame(tokenizer.encode(["Two hours of pure joy."])[0])
    question = Question(model, tokenizer, ids, SMALL.id2label)
    yield "what each token adds, with 4 steps", integrated_gradients(question, 4)
    in_parts = Question(model, tokenizer, ids, SMALL.id2label, batch_tokens=2 * len(ids))
    yield "what each token adds, with 2 texts in a batch", integrated_gradients(in_parts, 5)
    change = question.value - question.values([question.without_words]).item()
    error = abs(integrated_gradients(question, 256).sum().item() / change - 1)
    yield "with 256 steps the sum is f(text) - f(text without words), to 2%", error < 0.02


@torch.no_grad()
def large_weights(module: nn.Module) -> nn.Module:
    """With nothing left at 0 or 1, nor near it."""
    for parameter in module.parameters():
        parameter.add_(0.3 * torch.randn_like(parameter))
    return module
