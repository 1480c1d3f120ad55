"""The tokenizer: a vocabulary learned, saved, and loaded as `transformers` loads it."""

import json
import re

import numpy as np
import pytest
import tokenizers

from minitune.checkpoint import load_tokenizer
from minitune.model import BertConfig
from minitune.support import runs
from minitune.support.errors import UserError
from minitune.tokenizer import SPECIAL_TOKENS, Tokenizer

WORDS = ["".join("abcdefghij"[int(digit)] for digit in f"{i:04d}") + "z" for i in range(300)]
MARKUP_TEXTS = [
    "A waste of time.<br /><br />Bad.",
    "Good.<BR>Ugly.<br/>x <bright> idea < br <br\n/> a<br   />b",
    "[MASK] is <b>text</b>, Ça va?",
]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train([" ".join(WORDS), "a waste of time, good, bad < > / b r [ ]"], 4000)


def write(directory, files):
    """Files by name: bytes, text, or an object for JSON; None removes one."""
    for name, content in files.items():
        if content is None:
            (directory / name).unlink(missing_ok=True)
        elif isinstance(content, bytes):
            (directory / name).write_bytes(content)
        else:
            text = content if isinstance(content, str) else json.dumps(content)
            (directory / name).write_text(text, encoding="utf-8")
    return directory


# Trained


def test_training_twice_gives_the_same_vocabulary():
    rng = np.random.default_rng(0)
    letters = np.array(list("abcdefgh"))
    texts = [" ".join("".join(rng.choice(letters, 5)) for _ in range(50)) for _ in range(40)]
    first, second = (Tokenizer.train(texts, 500) for _ in range(2))
    assert first.vocab_size == 500
    assert first.files() == second.files()


def test_special_tokens_come_first_as_in_bert(tokenizer):
    assert tokenizer.files()["vocab.txt"].decode().splitlines()[:5] == SPECIAL_TOKENS
    assert [tokenizer.token(i) for i in tokenizer.special_ids.tolist()] == SPECIAL_TOKENS
    assert tokenizer.frame([7, 8]) == [2, 7, 8, 3]


def test_decoding_gives_the_text_back(tokenizer):
    text = " ".join(WORDS[:20])
    [ids] = tokenizer.encode([text])
    assert len(ids) == 20
    assert tokenizer.decode(ids) == text


def test_text_is_lower_cased_stripped_of_accents_and_rid_of_line_breaks(tokenizer):
    word, other = WORDS[:2]
    fancy = f"{word.upper()}<br />{other.replace('a', 'á')}"
    plain, fancy = tokenizer.encode([f"{word} {other}", fancy])
    assert plain == fancy


def test_line_breaks_are_removed_and_nothing_like_them(tokenizer):
    with_markup = "Good.<br /><br />Bad.<BR>Ugly.<br/>", "a <bright> idea < br"
    without = "Good.  Bad. Ugly. ", "a <bright> idea < br"
    assert tokenizer.encode(list(with_markup)) == tokenizer.encode(list(without))
    assert "<" in [tokenizer.token(i) for i in tokenizer.encode([with_markup[1]])[0]]


def test_words_are_learned_in_lower_case_and_none_from_markup():
    texts = ["A Fine FILM, truly fine", "a fine film<br />film"]
    vocabulary = Tokenizer.train(texts, 100).backend.get_vocab()
    assert {"a", "fine", "film", "truly"} <= vocabulary.keys()
    assert all(token == token.lower() for token in vocabulary.keys() - set(SPECIAL_TOKENS))
    assert not {"b", "##b", "br", "<"} & vocabulary.keys()


def test_unknown_letters_are_unknown(tokenizer):
    assert tokenizer.encode(["☃"]) == [[tokenizer.unk_id]]


def test_continuations_are_the_entries_that_continue_a_word(tokenizer):
    [ids] = tokenizer.encode([f"{WORDS[0]}q {WORDS[0]}{WORDS[1]}"])
    words = [i for i in ids if not tokenizer.continuation[i]]
    assert len(tokenizer.continuation) == tokenizer.vocab_size
    assert len(words) == 2 and len(ids) > 2


# Saved


@pytest.mark.parametrize("token", SPECIAL_TOKENS)
def test_special_tokens_in_a_text_are_text(tokenizer, token, tmp_path):
    write(tmp_path, tokenizer.files())
    for each in (tokenizer, Tokenizer.load(tmp_path)):
        [ids] = each.encode([f"{WORDS[0]} {token} {WORDS[1]}"])
        special = set(each.special_ids.tolist()) - {each.unk_id}  # some letters are unknown here
        assert not special & set(ids)
        assert len(ids) > 3


def test_the_saved_files_hold_the_same_tokenizer(tokenizer, tmp_path):
    write(tmp_path, tokenizer.files(512))
    texts = [" ".join(WORDS[::7]) + " unheard-of words, Ça va?", *MARKUP_TEXTS]
    loaded = Tokenizer.load(tmp_path)
    assert loaded.encode(texts) == tokenizer.encode(texts)
    assert loaded.files(512) == tokenizer.files(512)


def test_tokenizer_json_alone_gives_other_programs_the_same_ids_for_raw_text(tokenizer, tmp_path):
    """`transformers` reads it by this same library, for the class that the files name."""
    write(tmp_path, tokenizer.files(512))
    file = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in MARKUP_TEXTS[:2]:
        [ids] = tokenizer.encode([text])
        assert file.encode(text).ids == tokenizer.frame(ids)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert config["model_max_length"] == 512
    assert config["mask_token"] == "[MASK]" and file.token_to_id("[MASK]") == tokenizer.mask_id
    assert file.encode("[MASK]").ids == tokenizer.frame([tokenizer.mask_id])  # a blank, over there


@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_vocab_txt_alone_gives_the_ids_of_tokenizer_json(tokenizer, tmp_path, line_end):
    write(tmp_path, tokenizer.files())
    text = tokenizer.files()["vocab.txt"].decode()
    write(tmp_path, {"tokenizer.json": None, "tokenizer_config.json": None})
    (tmp_path / "vocab.txt").write_text(text, newline=line_end)
    loaded = Tokenizer.load(tmp_path, remove_markup=True)
    assert loaded.encode(MARKUP_TEXTS) == tokenizer.encode(MARKUP_TEXTS)


def test_markup_is_removed_where_the_caller_wants_it_or_the_files_say_so(tokenizer, tmp_path):
    write(tmp_path, {"vocab.txt": tokenizer.files()["vocab.txt"]})
    size = BertConfig(vocab_size=tokenizer.vocab_size)
    [with_markup] = load_tokenizer(tmp_path, size, remove_markup=False).encode(["a<br />b"])
    [without] = load_tokenizer(tmp_path, size).encode(["a<br />b"])
    assert [tokenizer.token(i) for i in without] == ["a", "b"]
    assert [tokenizer.token(i) for i in with_markup] == ["a", "<", "b", "##r", "/", ">", "b"]
    write(tmp_path, load_tokenizer(tmp_path, size).files())
    assert load_tokenizer(tmp_path, size, remove_markup=False).encode(["a<br />b"]) == [without]


# Loaded as `transformers` does

WORDS_AND_PARTS = "the film world World cafe café Café 中 国 ##国 < > / br e ##1 covid ##s ."
VOCAB = SPECIAL_TOKENS + WORDS_AND_PARTS.split()
TEXT = "The World: Café 中国 <e1> covids<br />film"
BERT = {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True,
        "strip_accents": None, "lowercase": True}  # fmt: skip
REMOVE = {"type": "Replace", "pattern": {"Regex": r"(?i)<br\s*/?>"}, "content": " "}
FRAME = {"type": "BertProcessing", "sep": ["[SEP]", 3], "cls": ["[CLS]", 2]}
GENERAL = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "[UNK]"}


def added(content, index, **flags):
    """An entry in the list added_tokens of a tokenizer.json."""
    default = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": index, "content": content} | default | {"special": True} | flags


FIVE = [added(token, index) for index, token in enumerate(SPECIAL_TOKENS)]


def tokenizer_json(more=(), vocab=VOCAB, **parts):
    """A tokenizer.json in BERT's form, with other parts, and more added tokens."""
    vocab = {token: index for index, token in enumerate(vocab)}
    model = {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
             "max_input_chars_per_word": 100, "vocab": vocab}  # fmt: skip
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [*FIVE, *more],
        "normalizer": BERT, "pre_tokenizer": {"type": "BertPreTokenizer"}, "post_processor": FRAME,
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True}, "model": model,
    } | parts  # fmt: skip


FOLDED = "the world [UNK] cafe 中 国 < e ##1 > covid ##s < br / > film"
CASED = BERT | {"lowercase": False}
CASED_TOKENS = "[UNK] World [UNK] Café 中 国 < e ##1 > covid ##s < br / > film"
E1, COVID = added("<e1>", 24), added("covid", 21)
TRUNCATED = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
# Files of a directory -> the tokens of TEXT in transformers 4.57 (checked by
# check_transformers.py).
FOLLOWED = {
    "as BERT has it": ({"tokenizer.json": tokenizer_json()}, FOLDED),
    "truncation, which is for callers": ({"tokenizer.json": tokenizer_json(truncation=TRUNCATED)}, FOLDED),
    "cased, but only in tokenizer.json": ({"tokenizer.json": tokenizer_json(normalizer=CASED)}, FOLDED),
    "cased, of the general class": (
        {"tokenizer.json": tokenizer_json(normalizer=CASED), "tokenizer_config.json": GENERAL},
        CASED_TOKENS,
    ),
    "do_lower_case": (
        {"tokenizer.json": tokenizer_json(), "tokenizer_config.json": {"do_lower_case": False}},
        CASED_TOKENS,
    ),
    "do_lower_case, of the general class": (
        {"tokenizer.json": tokenizer_json(), "tokenizer_config.json": GENERAL | {"do_lower_case": False}},
        FOLDED,
    ),
    "strip_accents": (
        {"tokenizer.json": tokenizer_json(), "tokenizer_config.json": {"strip_accents": False}},
        FOLDED.replace("cafe", "café"),
    ),
    "tokenize_chinese_chars": (
        {"tokenizer.json": tokenizer_json(), "tokenizer_config.json": {"tokenize_chinese_chars": False}},
        FOLDED.replace("国", "##国"),
    ),
    "markup removed": (
        {
            "tokenizer.json": tokenizer_json(normalizer={"type": "Sequence", "normalizers": [REMOVE, BERT]}),
            "tokenizer_config.json": GENERAL,
        },
        FOLDED.replace(" < br / >", ""),
    ),
    "a special token of the model's own": (
        {"tokenizer.json": tokenizer_json([E1])},
        FOLDED.replace("< e ##1 >", "<e1>"),
    ),
    "a token of the model's own": (
        {"tokenizer.json": tokenizer_json([COVID | {"special": False}])},
        FOLDED.replace("##s", "[UNK]"),
    ),
    "a whole word of the model's own": (
        {"tokenizer.json": tokenizer_json([COVID | {"single_word": True}])},
        FOLDED,
    ),
    "the same tokens in other files": (
        {
            "tokenizer.json": tokenizer_json([E1]),
            "added_tokens.json": {"<e1>": 24},
            "special_tokens_map.json": {"additional_special_tokens": ["<e1>"], "cls_token": "[CLS]"},
        },
        FOLDED.replace("< e ##1 >", "<e1>"),
    ),
    "vocab.txt": ({"vocab.txt": "\n".join(VOCAB)}, FOLDED),
    "vocab.txt, cased": (
        {"vocab.txt": "\n".join(VOCAB), "tokenizer_config.json": {"do_lower_case": False}},
        CASED_TOKENS,
    ),
    "vocab.txt with lines twice": ({"vocab.txt": "\n".join([*VOCAB, "the", "film", "."])}, FOLDED),
}  # fmt: skip


@pytest.mark.parametrize("files, expected", FOLLOWED.values(), ids=FOLLOWED.keys())
def test_a_directory_is_read_as_transformers_reads_it(tmp_path, files, expected):
    loaded = Tokenizer.load(write(tmp_path, files))
    [ids] = loaded.encode([TEXT])
    assert [loaded.token(i) for i in ids] == expected.split()
    (tmp_path / "saved").mkdir()
    saved = write(tmp_path / "saved", loaded.files())
    assert Tokenizer.load(saved).encode([TEXT]) == [ids]
    file = tokenizers.Tokenizer.from_file(str(saved / "tokenizer.json"))
    assert file.encode(TEXT).ids == loaded.frame(ids)


def test_a_cased_tokenizer_is_saved_as_one(tmp_path):
    for files in (FOLLOWED["do_lower_case"][0], FOLLOWED["cased, of the general class"][0]):
        config = json.loads(Tokenizer.load(write(tmp_path, files)).files()["tokenizer_config.json"])
        assert config["do_lower_case"] is False
        assert (config["strip_accents"], config["tokenize_chinese_chars"]) == (None, True)


def test_ids_without_a_token_are_counted_and_kept(tmp_path):
    lines = [*VOCAB, "the", "film", "."]
    loaded = Tokenizer.load(write(tmp_path, {"vocab.txt": "\n".join(lines)}))
    assert loaded.vocab_size == len(lines) == 27
    assert loaded.encode(["the film."]) == [[24, 25, 26]]
    assert [loaded.token(i) for i in (5, 6, 23, 24)] == [
        "[unused5]",
        "[unused6]",
        "[unused23]",
        "the",
    ]
    assert len(loaded.continuation) == 27 and loaded.continuation.sum() == 3
    assert loaded.decode([24, 5, 25]) == "the film"
    again = Tokenizer.load(write(tmp_path, {"vocab.txt": loaded.files()["vocab.txt"]}))
    assert again.tokens == loaded.tokens
    with pytest.raises(UserError, match="27.*26"):
        load_tokenizer(tmp_path, BertConfig(vocab_size=26))
    assert load_tokenizer(tmp_path, BertConfig(vocab_size=27)).vocab_size == 27


# Refused


def config(**values):
    """A good tokenizer.json, beside such a tokenizer_config.json."""
    return {"tokenizer.json": tokenizer_json(), "tokenizer_config.json": values}


def normalized_by(*normalizers):
    return {
        "tokenizer.json": tokenizer_json(
            normalizer={"type": "Sequence", "normalizers": normalizers}
        )
    }


def model(**values):
    return {"tokenizer.json": tokenizer_json(model=tokenizer_json()["model"] | values)}


GROW = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 1000}
REGEX = {"type": "Replace", "pattern": {"Regex": "(" * 50_000}, "content": ""}
REFUSED = {
    "no files": ({}, "no tokenizer.json and no vocab.txt"),
    "a Japanese tokenizer": (config(tokenizer_class="BertJapaneseTokenizer"), "BertJapanese"),
    "another class in config.json": (
        {"vocab.txt": "\n".join(VOCAB), "config.json": {"tokenizer_class": "RobertaTokenizer"}},
        "RobertaTokenizer",
    ),
    "another [MASK]": (config(mask_token="<mask>"), "mask_token"),
    "another [UNK], as an object": (config(unk_token=added("<unk>", 7)), "unk_token"),
    "split special tokens": (config(split_special_tokens=True), "split_special_tokens"),
    "an option that is no option": (config(do_lower_case="no"), "bool"),
    "tokens in added_tokens.json alone": (
        {"vocab.txt": "\n".join(VOCAB), "added_tokens.json": {"<e1>": 24}},
        "<e1>",
    ),
    "tokens in tokenizer_config.json alone": (config(additional_special_tokens=["<e1>"]), "<e1>"),
    "tokens in special_tokens_map.json alone": (
        {"tokenizer.json": tokenizer_json(), "special_tokens_map.json": {"bos_token": "<e1>"}},
        "<e1>",
    ),
    "an added token with other flags": (
        {
            "tokenizer.json": tokenizer_json([COVID]),
            "tokenizer_config.json": {
                "added_tokens_decoder": {"21": added("covid", 21, single_word=True)}
            },
        },
        "covid",
    ),
    "an added token with an id that it cannot have": (
        {"tokenizer.json": tokenizer_json([added("<e1>", 30)])},
        "added_tokens",
    ),
    "an added token without a letter": ({"tokenizer.json": tokenizer_json([added("", 24)])}, "added"),
    "very many added tokens": (
        {"tokenizer.json": tokenizer_json([added(f"<{'x' * 100}{i}>", 24 + i) for i in range(3000)])},
        "too many",
    ),
    "a normalizer that makes texts grow": (normalized_by(GROW, GROW, GROW, BERT), "normalizer"),
    "a regular expression without end": (normalized_by(REGEX, BERT), "normalizer"),
    "a normalizer of another kind": (normalized_by({"type": "NFD"}, {"type": "Lowercase"}), "tokeniz"),
    "no normalizer": ({"tokenizer.json": tokenizer_json(normalizer=None)}, "normalizer"),
    "another pre-tokenizer": (
        {"tokenizer.json": tokenizer_json(pre_tokenizer={"type": "Whitespace"})},
        "pre_tokenizer",
    ),
    "no frame": ({"tokenizer.json": tokenizer_json(post_processor=None)}, "post_processor"),
    "a frame of other ids": (
        {"tokenizer.json": tokenizer_json(post_processor=FRAME | {"cls": ["[CLS]", 1]})},
        "post_processor",
    ),
    "another model": (model(type="BPE"), "model"),
    "a part of another model": (model(merges=[]), "model"),
    "words of other lengths": (model(max_input_chars_per_word=10), "model"),
    "two tokens of one id": (model(vocab=tokenizer_json()["model"]["vocab"] | {"x": 6}), "two tokens"),
    "an id of four billion": (model(vocab=tokenizer_json()["model"]["vocab"] | {"x": 2**32 - 1}), "large"),
    "an id that is no number": (model(vocab=tokenizer_json()["model"]["vocab"] | {"x": "y"}), "tokenizer"),
    "half a character": (model(vocab=tokenizer_json()["model"]["vocab"] | {"\ud800": 24}), "surrogates"),
    "a vocabulary that is a list": (model(vocab=VOCAB), "tokenizer"),
    "no [MASK]": ({"vocab.txt": "\n".join(VOCAB[:4])}, r"\[MASK\]"),
    "vocab.txt that is empty": ({"vocab.txt": ""}, r"\[PAD\]"),
    "vocab.txt that is not UTF-8": ({"vocab.txt": b"[PAD]\n\xff"}, "utf-8"),
    "JSON without end": ({"tokenizer.json": '{"a":' * 100_000}, "tokenizer"),
    "an empty object beside vocab.txt": (
        {"tokenizer.json": {}, "vocab.txt": "\n".join(VOCAB)},
        "tokenizer.json is empty",
    ),
    "JSON of another kind": ({"tokenizer.json": [1]}, "tokenizer.json"),
    "nothing of a tokenizer": ({"tokenizer.json": {"model": 3}}, "tokenizer"),
}  # fmt: skip


@pytest.mark.parametrize("files, message", REFUSED.values(), ids=REFUSED.keys())
def test_a_directory_that_is_not_berts_is_refused_in_a_line(tmp_path, files, message):
    with pytest.raises(UserError, match=message) as error:
        Tokenizer.load(write(tmp_path, files))
    assert "\n" not in str(error.value) and len(str(error.value)) < 1000
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize("name", ["tokenizer.json", "vocab.txt", "added_tokens.json"])
def test_a_huge_file_is_not_read(tmp_path, monkeypatch, name):
    write(tmp_path, {"vocab.txt": "\n".join(VOCAB), name: " " * 2000})
    monkeypatch.setattr(runs, "LARGEST_TEXT", 1999)
    with pytest.raises(
        UserError, match=re.escape(f"{name} cannot be read: it has more than 1,999 bytes")
    ):
        Tokenizer.load(tmp_path)
