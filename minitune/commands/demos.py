"""Three lessons on a sentence of yours, a screen each.

    python -m minitune.tokenizer "An unforgettable film!"
    python -m minitune.masking "The acting was great and the plot thin."
    python -m minitune.attention "The acting was great."

With the tokenizer and the weights of the last run of train.py, else of the reference run.
"""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch

from minitune.attention import ON_ANY_DEVICE, attention_weights
from minitune.batching import PackedBatch
from minitune.checkpoint import load_masked_lm, load_tokenizer, read_config
from minitune.masking import mask_tokens
from minitune.pretraining import MASK_RATE
from minitune.support import cli
from minitune.support.errors import UserError
from minitune.support.model_names import default_model, find_model
from minitune.support.results import table
from minitune.tokenizer import Tokenizer

SCREEN, HEADS, DRAWS = 24, 4, 5  # tokens, heads and draws that are shown at most


def run(demo: Callable[[str, Tokenizer, Path], None]) -> None:
    """Show this one of the sentence on the command line, with the model that is meant."""

    def main() -> None:
        options = cli.Parser(demo.__doc__)
        options.prog = f"python -m minitune.{demo.__name__.removeprefix('show_')}"
        options.add_argument("sentence", nargs="+", type=cli.text)
        sentence = " ".join(options.parse_args().sentence)
        name, why = default_model()
        source = find_model(name)
        print(f"model: {name} ({why})\n")
        demo(sentence, load_tokenizer(source, read_config(source)), source)

    cli.run_script(main)


def show_tokenizer(sentence: str, tokenizer: Tokenizer, source: Path) -> None:
    """From a sentence to the ids that a model reads, and back."""
    normal = tokenizer.backend.normalizer.normalize_str(sentence)
    words = tokenizer.backend.pre_tokenizer.pre_tokenize_str(normal)
    ids = tokenizer.frame(tokenizer.encode([sentence])[0])
    print("sentence   ", sentence)
    print("normalised ", normal)
    print("words      ", *(word for word, _ in words))
    print("tokens     ", *map(tokenizer.token, ids))
    print("ids        ", *ids)
    print("decoded    ", tokenizer.decode(ids))


def show_masking(sentence: str, tokenizer: Tokenizer, source: Path) -> None:
    """A few draws of what is masked, by tokens and by whole words; and the shares in many draws."""
    tokens, generator = _tokens(sentence, tokenizer), torch.Generator().manual_seed(0)
    rate = MASK_RATE
    if not round(rate * (len(tokens) - 2)):
        raise UserError(f"{rate:.0%} of so few tokens is none: give a longer sentence")
    fates = Counter()  # of the tokens that are to be guessed
    for whole_word in (False, True):
        print(f"{rate:.0%} of the tokens are to be guessed{', in whole words' * whole_word}:")
        for draw in range(1000):
            masked, positions, labels = mask_tokens(tokens, tokenizer, generator, rate, whole_word)
            for new, old in zip(masked[positions].tolist(), labels.tolist(), strict=True):
                is_masked = "[MASK]" if new == tokenizer.mask_id else "another token"
                fates["the token itself" if new == old else is_masked] += 1
            if draw < DRAWS:
                guess = ", ".join(map(tokenizer.token, labels.tolist())) or "none"
                print("   ", *map(tokenizer.token, masked[1:-1].tolist()), f"   ({guess})")
    shares = [f"{count / fates.total():.0%} {fate}" for fate, count in fates.most_common()]
    print(f"\nwhat stands where a token is to be guessed, in 2,000 draws: {', '.join(shares)}")


def show_attention(sentence: str, tokenizer: Tokenizer, source: Path) -> None:
    """Which token each token takes most from, in the first layer; and the backends' differences."""
    tokens, bert = _tokens(sentence, tokenizer), load_masked_lm(source)[0].bert
    batch, layer = PackedBatch.from_sequences([tokens]), bert.layers[0].attention
    with torch.no_grad():
        qkv = layer.qkv(bert.embeddings(batch))[: len(tokens)].unflatten(1, (3, layer.heads, -1))
        q, k, v = qkv.unbind(1)  # (n, H, D) each
        outputs = [f(q, k, v, batch.cu_seqlens, batch.cu_seqlens) for f in ON_ANY_DEVICE.values()]
    names, best = [tokenizer.token(i) for i in tokens.tolist()], attention_weights(q, k).max(-1)
    columns = {"layer 1": lambda i: names[i]}
    for h in range(min(HEADS, layer.heads)):
        columns[f"head {h + 1}"] = lambda i, h=h: (
            f"{names[best.indices[h, i]]} {best.values[h, i]:4.0%}"
        )
    print("the token that each token takes most from, and how much of it:\n")
    print(table(range(len(names)), columns))
    difference = max((output - outputs[0]).abs().max().item() for output in outputs)
    print(f"\n{', '.join(ON_ANY_DEVICE)}: the same output, within {difference:.0e}")


def _tokens(sentence: str, tokenizer: Tokenizer) -> torch.Tensor:
    """(n,) from [CLS] to [SEP]; UserError for a sentence without tokens."""
    (ids,) = tokenizer.encode([sentence])
    if not ids:
        raise UserError("the sentence has no token")
    return torch.tensor(tokenizer.frame(ids[:SCREEN]))
