"""WordPiece tokens: train a vocabulary, load one, turn text into ids (on the `tokenizers` library).

WordPiece (Schuster & Nakajima 2012; BERT's lower-cased variant) keeps frequent words whole and
splits rare ones: "unforgettable" may become "un", "##forget", "##table".
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
    GENERAL_CLASS,
    MARKUP,
    OPTIONS,
    ROLES,
    SPECIAL_TOKENS,
    check_equal,
    read_files,
)


class Tokenizer:
    """Text to ids and back. Ids come without [CLS] and [SEP]; `frame` adds them.

    The five special tokens are not looked for in a text: "[MASK]" in a review is no blank.
    """

    def __init__(
        self,
        vocab: dict[str, int],
        added: Sequence[tokenizers.AddedToken] = (),
        remove_markup: bool = True,
        **options: bool | None,
    ):
        """Entries with ids, `added` tokens that are never split, options of BERT's normalizer."""
        ids = [vocab[token] for token in SPECIAL_TOKENS]
        self.pad_id, self.unk_id, self.cls_id, self.sep_id, self.mask_id = ids
        self.special_ids = torch.tensor(ids)  # (5,)
        self.backend = tokenizers.Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
        steps = [normalizers.BertNormalizer(**options)]
        if remove_markup:
            steps.insert(0, normalizers.Replace(tokenizers.Regex(MARKUP), " "))
        self.backend.normalizer = normalizers.Sequence(steps) if remove_markup else steps[0]
        self.backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        self.backend.decoder = decoders.WordPiece()
        # What `frame` does, for programs that read the saved file.
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
        """Learn a lower-cased vocabulary of `vocab_size` entries, with the alphabet of the texts.

        The same texts give the same vocabulary. The library numbers the letters inside words in the
        order of a hash map, which differs from run to run, and decides ties by those numbers; so
        the letters are found first, and numbered in order.
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

        `remove_markup`: whatever the files say. Raises UserError for a tokenizer that is damaged or
        of another kind.
        """
        try:
            arguments, file = read_files(directory)
            tokenizer = cls(**arguments)
            if file:
                check_equal(file, json.loads(tokenizer.backend.to_str()))
            return cls(**arguments | {"remove_markup": True}) if remove_markup else tokenizer
        except UserError:
            raise
        except Exception as error:  # of any class, since the files may hold anything
            why = error if type(error) is ValueError else repr(error)
            raise UserError(f"the tokenizer in {directory} cannot be used: {why}") from error

    def files(self, max_length: int | None = None) -> dict[str, bytes]:
        """The files of a model directory that hold this tokenizer, by name.

        `max_length` is the longest sequence that the model reads. PreTrainedTokenizerFast is the
        class for which `transformers` 4 and 5 take all of tokenizer.json. BertTokenizer reads
        vocab.txt alone (4) or has its own normalizer (5): it does not remove markup.
        """
        document = json.loads(self.backend.to_str())
        *_, normalizer = document["normalizer"].get("normalizers", [document["normalizer"]])
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        special = zip(self.special_ids.tolist(), SPECIAL_TOKENS, strict=True)
        special = [{"id": i, "content": t, **flags, "special": True} for i, t in special]
        document["added_tokens"] = special + document["added_tokens"]
        config = {"tokenizer_class": GENERAL_CLASS, "model_max_length": max_length, **ROLES}
        config["model_input_names"] = ["input_ids", "token_type_ids", "attention_mask"]
        config |= {key: normalizer[name] for key, (name, _) in OPTIONS.items()}
        # An id without a token is a repeat of the last token: readers keep a token's last line.
        last = self.tokens[self.vocab_size - 1]
        lines = [self.tokens.get(index, last) for index in range(self.vocab_size)]
        return {
            "tokenizer_config.json": json.dumps(config, indent=2).encode(),
            "tokenizer.json": json.dumps(document, indent=2, ensure_ascii=False).encode(),
            "vocab.txt": "".join(f"{token}\n" for token in lines).encode(),
        }

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text, in order."""
        encoded = self.backend.encode_batch_fast(texts, add_special_tokens=False)
        return [text.ids for text in encoded]

    def frame(self, ids: Iterable[int]) -> list[int]:
        """[CLS] ids [SEP]: the sequence that the model reads."""
        return [self.cls_id, *ids, self.sep_id]

    def decode(self, ids: Iterable[int]) -> str:
        """Readable text, special tokens included."""
        return self.backend.decode(list(ids), skip_special_tokens=False)

    def token(self, index: int) -> str:
        """The vocabulary entry with this id."""
        return self.tokens.get(index, f"[unused{index}]")

    @functools.cached_property
    def continuation(self) -> torch.Tensor:
        """Bool (vocab_size,): which entries continue a word that an earlier token began."""
        return torch.tensor([self.token(i).startswith("##") for i in range(self.vocab_size)])


def _alphabet(backend: tokenizers.Tokenizer, texts: list[str]) -> set[str]:
    """Every letter of the texts that may stand inside a word, as "##a"."""
    letters = set()
    for character in set().union(*(re.sub(MARKUP, " ", text) for text in texts)):
        word = backend.normalizer.normalize_str("a" + character)
        words = backend.pre_tokenizer.pre_tokenize_str(word)
        if len(words) == 1:  # not split off, as punctuation is
            letters.update("##" + letter for letter in words[0][0][1:])
    return letters
