"""How text becomes numbers: WordPiece tokens, and their ids (with the library `tokenizers`).

WordPiece (Schuster & Nakajima 2012; BERT's lower-cased variant) keeps frequent words whole and
splits rare ones: "unforgettable" may become "un", "##forget", "##table". "##" says that a token
continues a word. A vocabulary of some thousand tokens is learned from the train rows.
"""

import functools
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import tokenizers
import torch
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from minitune.support.errors import UserError
from minitune.support.tokenizer_files import (
    MARKUP,
    SPECIAL_TOKENS,
    check_equal,
    file_contents,
    read_files,
)


class Tokenizer:
    """Text to ids and back. `encode` gives ids without [CLS] and [SEP]; `frame` adds them.

    These are special tokens: [CLS] begins each sequence, [SEP] ends it, [MASK] is a blank to be
    filled, and [UNK] stands for what the vocabulary cannot spell. If a text contains "[MASK]", that
    is read as ordinary text.
    """

    def __init__(
        self,
        vocab: dict[str, int],
        added: Sequence[tokenizers.AddedToken] = (),
        remove_markup: bool = True,
        **options: bool | None,
    ):
        """`vocab` gives each token an id; `added` tokens are never split.

        Markup is the `<br />` of reviews from the web. `options` are those of BERT's normalizer,
        `lowercase` for example.
        """
        ids = [vocab[token] for token in SPECIAL_TOKENS]
        self.pad_id, self.unk_id, self.cls_id, self.sep_id, self.mask_id = ids
        self.special_ids = torch.tensor(ids)  # (5,)
        self.backend = tokenizers.Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
        normalizer = normalizers.BertNormalizer(**options)
        if remove_markup:
            without = normalizers.Replace(tokenizers.Regex(MARKUP), " ")
            normalizer = normalizers.Sequence([without, normalizer])
        self.backend.normalizer = normalizer
        self.backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        self.backend.decoder = decoders.WordPiece()
        # The same as `frame`, for other programs that load the saved file.
        self.backend.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[("[CLS]", self.cls_id), ("[SEP]", self.sep_id)],
        )
        self.backend.add_tokens(list(added))
        self.tokens = {index: token for token, index in self.backend.get_vocab().items()}
        self.vocab_size = max(self.tokens) + 1  # some ids may have no token

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "Tokenizer":
        """Learn a lower-cased vocabulary of `vocab_size` tokens, with all letters of the texts.

        The same texts give the same vocabulary. The library alone would not do that: it numbers
        letters in the random order of a hash map, and these numbers decide between equally frequent
        tokens. So the letters are sorted here, and given to it as the first tokens.
        """
        texts = list(texts)
        tokenizer = cls({token: index for index, token in enumerate(SPECIAL_TOKENS)})
        trainer = trainers.WordPieceTrainer(
            vocab_size=vocab_size,
            special_tokens=SPECIAL_TOKENS + sorted(_alphabet(tokenizer.backend, texts)),
            show_progress=False,
        )
        tokenizer.backend.train_from_iterator(texts, trainer)
        return cls(tokenizer.backend.get_vocab())

    @classmethod
    def load(cls, directory: Path, remove_markup: bool = False) -> "Tokenizer":
        """The tokenizer of a BERT directory, as AutoTokenizer of `transformers` 4.57 reads it.

        With `remove_markup` it removes markup even if the files do not say so. Raises UserError if
        the files are damaged or hold another kind of tokenizer.
        """
        try:
            arguments, file = read_files(directory)
            tokenizer = cls(**arguments)
            if file:
                check_equal(file, json.loads(tokenizer.backend.to_str()))
            return cls(**arguments | {"remove_markup": True}) if remove_markup else tokenizer
        except UserError:
            raise
        except Exception as error:  # the files may hold anything, and so cause any exception
            why = error if type(error) is ValueError else repr(error)
            raise UserError(f"the tokenizer in {directory} cannot be used: {why}") from error

    def files(self, max_length: int | None = None) -> dict[str, bytes]:
        """The files, name to content, that hold this tokenizer in a model directory.

        `max_length` is that of the model's sequences.
        """
        return file_contents(json.loads(self.backend.to_str()), max_length)

    def encode(self, texts: list[str]) -> list[list[int]]:
        """The token ids of each text."""
        encoded = self.backend.encode_batch_fast(texts, add_special_tokens=False)
        return [text.ids for text in encoded]

    def frame(self, ids: Iterable[int]) -> list[int]:
        """[CLS] ids [SEP]: the sequence that the model reads."""
        return [self.cls_id, *ids, self.sep_id]

    def decode(self, ids: Iterable[int]) -> str:
        """The ids as readable text, special tokens included."""
        return self.backend.decode(list(ids), skip_special_tokens=False)

    def token(self, index: int) -> str:
        """The vocabulary entry with this id."""
        return self.tokens.get(index, f"[unused{index}]")

    @functools.cached_property
    def continuation(self) -> torch.Tensor:
        """(vocab_size,) bool: which tokens continue a word."""
        return torch.tensor([self.token(i).startswith("##") for i in range(self.vocab_size)])


def _alphabet(backend: tokenizers.Tokenizer, texts: list[str]) -> set[str]:
    """Every letter in the texts that can continue a word, as "##a"."""
    letters = set()
    for character in set().union(*(re.sub(MARKUP, " ", text) for text in texts)):
        # Behind an "a" it is inside a word, if it is no punctuation.
        word = backend.normalizer.normalize_str("a" + character)
        words = backend.pre_tokenizer.pre_tokenize_str(word)
        if len(words) == 1:
            letters.update("##" + letter for letter in words[0][0][1:])
    return letters


if __name__ == "__main__":
    from minitune.commands import demos

    demos.run(demos.show_tokenizer)
