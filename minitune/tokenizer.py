"""WordPiece tokens: train a vocabulary, load one, turn text into ids (on the `tokenizers` library).

WordPiece (Schuster & Nakajima 2012; BERT's lower-cased variant) keeps frequent words whole and
spells rare ones in pieces: "unforgettable" may become "un", "##forget", "##table".
"""

import functools
import json
import re
from collections.abc import Iterable
from pathlib import Path

import tokenizers
import torch
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from minitune.support.errors import UserError

SPECIAL_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
# Options of a tokenizer_config.json with their defaults, and what the normalizer calls them.
OPTIONS = {"do_lower_case": True, "strip_accents": None, "tokenize_chinese_chars": True}
NORMALIZER = dict(zip(OPTIONS, ("lowercase", "strip_accents", "handle_chinese_chars"), strict=True))
LINE_BREAK = re.compile(r"<br\s*/?>", re.IGNORECASE)  # markup of web reviews, not text


class Tokenizer:
    """Text to ids and back. Ids come without [CLS] and [SEP]; `frame` adds them."""

    def __init__(self, backend: tokenizers.Tokenizer):
        self.backend = backend
        backend.no_truncation()  # a saved file may ask for either, and packed batches want neither
        backend.no_padding()
        backend.encode_special_tokens = True  # a review that says "[MASK]" is text, not a blank
        missing = [token for token in SPECIAL_TOKENS if backend.token_to_id(token) is None]
        if missing:
            raise UserError(f"the tokenizer has no {', '.join(missing)}: not a BERT tokenizer")
        ids = [backend.token_to_id(token) for token in SPECIAL_TOKENS]
        self.pad_id, self.unk_id, self.cls_id, self.sep_id, self.mask_id = ids
        self.special_ids = torch.tensor(ids)
        self.vocab_size = backend.get_vocab_size()

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "Tokenizer":
        """Learn a lower-cased vocabulary of `vocab_size` entries from the texts, letters always included.

        The same texts give the same vocabulary. The library numbers the letters inside words in the
        order of a hash map, which differs from run to run, and decides ties by those numbers; so
        the letters are found first, and numbered in order.
        """
        texts = [clean(text) for text in texts]
        backend = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
        _as_in_bert(backend, lowercase=True)
        letters = sorted(_letters(backend, texts))
        trainer = trainers.WordPieceTrainer(
            vocab_size=vocab_size, special_tokens=SPECIAL_TOKENS + letters, show_progress=False
        )
        backend.train_from_iterator(texts, trainer)
        vocab = backend.get_vocab()
        backend = tokenizers.Tokenizer(
            models.WordPiece(vocab, unk_token="[UNK]")
        )  # letters: not special
        backend.add_special_tokens(SPECIAL_TOKENS)
        _as_in_bert(backend, lowercase=True)
        return cls(backend)

    @classmethod
    def load(cls, directory: Path) -> "Tokenizer":
        """Read `tokenizer.json`, or `vocab.txt` where an older BERT has only that."""
        try:
            if (directory / "tokenizer.json").is_file():
                backend = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
            elif (directory / "vocab.txt").is_file():
                vocab = models.WordPiece.read_file(str(directory / "vocab.txt"))
                backend = tokenizers.Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
                backend.add_special_tokens(
                    [t for t in SPECIAL_TOKENS if t in vocab]
                )  # marks, adds none
                path = directory / "tokenizer_config.json"
                options = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
                _as_in_bert(
                    backend, *(options.get(key, default) for key, default in OPTIONS.items())
                )
            else:
                raise UserError(f"{directory} has no tokenizer.json and no vocab.txt")
        except UserError:
            raise
        except Exception as error:  # the library raises bare Exception for a broken file
            raise UserError(f"the tokenizer in {directory} cannot be read: {error}") from error
        return cls(backend)

    def files(self) -> dict[str, bytes]:
        """The files of a model directory that hold this tokenizer, by name."""
        vocab = sorted(self.backend.get_vocab().items(), key=lambda entry: entry[1])
        normalizer = json.loads(self.backend.to_str())["normalizer"] or {}
        # Without these, transformers lower-cases whatever tokenizer.json says.
        options = {key: normalizer.get(ours, OPTIONS[key]) for key, ours in NORMALIZER.items()}
        return {
            "tokenizer_config.json": json.dumps(options).encode(),
            "tokenizer.json": self.backend.to_str(pretty=True).encode(),
            "vocab.txt": "".join(f"{token}\n" for token, _ in vocab).encode(),
        }

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text, in order."""
        encoded = self.backend.encode_batch_fast(
            [clean(text) for text in texts], add_special_tokens=False
        )
        return [text.ids for text in encoded]

    def frame(self, ids: Iterable[int]) -> list[int]:
        """[CLS] ids [SEP]: the sequence that the model reads."""
        return [self.cls_id, *ids, self.sep_id]

    def decode(self, ids: Iterable[int]) -> str:
        """Readable text, special tokens included."""
        return self.backend.decode(list(ids), skip_special_tokens=False)

    def token(self, index: int) -> str:
        """The vocabulary entry with this id."""
        return self.backend.id_to_token(index)

    @functools.cached_property
    def continuation(self) -> torch.Tensor:
        """Bool (vocab_size,): which entries continue a word that an earlier token began."""
        return torch.tensor([self.token(i).startswith("##") for i in range(self.vocab_size)])


def clean(text: str) -> str:
    """The text without the line-break markup that web reviews carry."""
    return LINE_BREAK.sub(" ", text)


def _as_in_bert(
    backend: tokenizers.Tokenizer,
    lowercase: bool,
    strip_accents: bool | None = None,
    chinese: bool = True,
) -> None:
    """BERT's clean-up, its split at spaces and punctuation, and its [CLS] text [SEP] frame.

    The frame is for other programs that read the file; minitune adds both itself after cutting.
    """
    backend.normalizer = normalizers.BertNormalizer(
        lowercase=lowercase, strip_accents=strip_accents, handle_chinese_chars=chinese
    )
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    cls, sep = backend.token_to_id("[CLS]"), backend.token_to_id("[SEP]")
    if cls is not None and sep is not None:
        backend.post_processor = tokenizers.processors.BertProcessing(
            ("[SEP]", sep), ("[CLS]", cls)
        )


def _letters(backend: tokenizers.Tokenizer, texts: list[str]) -> set[str]:
    """Every letter that may stand inside a word, as "##a"."""
    letters = set()
    for character in set().union(*texts):
        word = backend.normalizer.normalize_str("a" + character)
        pieces = backend.pre_tokenizer.pre_tokenize_str(word)
        if len(pieces) == 1:  # not split off, as punctuation is
            letters.update("##" + letter for letter in pieces[0][0][1:])
    return letters
