"""The tokenizer files of a BERT directory, read as `transformers` 4.57 reads them, or refused.

    tokenizer.json           all of the tokenizer; an older BERT has only vocab.txt
    tokenizer_config.json    its class, options and special tokens
    special_tokens_map.json, added_tokens.json, config.json    the same, in older directories

The files may be anybody's, so tokenizer.json is not given to the `tokenizers` library: with some of
the normalizers that a file can ask for, it takes any amount of memory and time. Only a vocabulary,
options and added tokens are read. The tokenizer that minitune builds from these must then be equal
to tokenizer.json (`check_equal`).
"""

import json
from pathlib import Path

from tokenizers import AddedToken

from minitune.support.errors import UserError
from minitune.support.runs import read_json, read_text

SPECIAL_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
ROLES = {f"{token[1:-1].lower()}_token": token for token in SPECIAL_TOKENS}  # "pad_token": "[PAD]"
MARKUP = r"(?i)<br\s*/?>"  # line breaks of web reviews, which are no text
# Options of the normalizer: name in tokenizer_config.json -> (name in tokenizer.json, default).
# Of the two files the first decides for BERT's classes, the second for the general class.
OPTIONS = {
    "do_lower_case": ("lowercase", True),
    "strip_accents": ("strip_accents", None),
    "tokenize_chinese_chars": ("handle_chinese_chars", True),
}
BERT_CLASSES, GENERAL_CLASS = ("BertTokenizer", "BertTokenizerFast"), "PreTrainedTokenizerFast"
LARGEST_ID = 10_000_000
MOST_ADDED = 200_000  # characters of all added tokens


def read_files(directory: Path) -> tuple[dict, dict]:
    """(arguments of a Tokenizer, the tokenizer.json that it must be equal to, {} without one).

    Raises UserError, ValueError and, since the files may hold anything, any other exception.
    """
    if not any((directory / name).is_file() for name in ("tokenizer.json", "vocab.txt")):
        raise UserError(f"{directory} has no tokenizer.json and no vocab.txt")
    names = ("tokenizer", "tokenizer_config", "special_tokens_map", "added_tokens", "config")
    paths = [directory / f"{name}.json" for name in names]
    file, config, special_map, added_map, model = (
        read_json(path) if path.is_file() else {} for path in paths
    )
    check(file or not (directory / "tokenizer.json").is_file(), "tokenizer.json is empty")
    kind = config.get("tokenizer_class") or model.get("tokenizer_class") or BERT_CLASSES[0]
    check(kind in (*BERT_CLASSES, GENERAL_CLASS), f"its class is {kind}")
    decoder = config.get("added_tokens_decoder", {})  # id -> token; older directories have none
    if not decoder:
        config |= special_map
    for role, token in ROLES.items():
        check(_contents(config.get(role, token)) == [token], f"its {role} is not {token}")
    check(not config.get("split_special_tokens"), "it has split_special_tokens")

    vocab = file["model"]["vocab"] if file else _read_vocab(directory / "vocab.txt")
    missing = [token for token in SPECIAL_TOKENS if token not in vocab]
    check(not missing, f"it has no {', '.join(missing)}")
    ids = set(vocab.values())
    check(len(ids) == len(vocab) and max(ids) < LARGEST_ID, "an id is too large, or of two tokens")

    normalizer = (file["normalizer"] or {}) if file else {"type": "BertNormalizer"}
    remove_markup = normalizer.get("type") == "Sequence"
    if remove_markup:  # a tokenizer of minitune: first markup is replaced, then as in BERT
        normalizer = normalizer["normalizers"][-1]
    elif kind in BERT_CLASSES or not file:
        normalizer |= {name: config.get(key, default) for key, (name, default) in OPTIONS.items()}
    arguments = {name: value for name, value in normalizer.items() if name != "type"}

    # Added tokens are never split. `transformers` also adds those that only other files name, which
    # is refused here.
    added = [t for t in file.get("added_tokens", []) if t["content"] not in SPECIAL_TOKENS]
    check(sum(len(t["content"]) for t in added) < MOST_ADDED, "its added tokens are too many")
    known = [*SPECIAL_TOKENS, *(t["content"] for t in added)]
    special = ("bos_token", "eos_token", "additional_special_tokens", "extra_special_tokens")
    for token in [*added_map, *_contents([config.get(key) for key in special])]:
        check(token in known, f"the token {token} is not in tokenizer.json, but in another file")
    for index, token in decoder.items():
        same = token["content"] in SPECIAL_TOKENS or {"id": int(index)} | token in added
        check(same, f"the token {token['content']} is another one in tokenizer.json")
    if file:
        file["added_tokens"] = added
    tokens = [AddedToken(**{k: v for k, v in token.items() if k != "id"}) for token in added]
    return arguments | {"vocab": vocab, "added": tokens, "remove_markup": remove_markup}, file


def check_equal(file: dict, built: dict) -> None:
    """Raise ValueError where a tokenizer.json differs from that of the tokenizer built from it."""
    cls, sep = ([token, built["model"]["vocab"][token]] for token in ("[CLS]", "[SEP]"))
    if file["post_processor"] == {"type": "BertProcessing", "sep": sep, "cls": cls}:
        file["post_processor"] = built["post_processor"]  # an older spelling of the same
    file["model"] = {"type": "WordPiece"} | file["model"]  # older files leave it out
    for part in ("added_tokens", "normalizer", "pre_tokenizer", "post_processor", "model"):
        check(file[part] == built[part], f"the {part} of tokenizer.json is not one of BERT's")


def file_contents(document: dict, max_length: int | None) -> dict[str, bytes]:
    """The files of a tokenizer, from the JSON that the library makes of it.

    PreTrainedTokenizerFast is the class for which `transformers` 4 and 5 take all of
    tokenizer.json. BertTokenizer would read vocab.txt alone (4) or bring its own normalizer (5),
    and would not remove markup.
    """
    vocab, added = document["model"]["vocab"], document["added_tokens"]
    *_, normalizer = document["normalizer"].get("normalizers", [document["normalizer"]])
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    special = [{"id": vocab[t], "content": t, **flags, "special": True} for t in SPECIAL_TOKENS]
    document["added_tokens"] = special + added
    config = {"tokenizer_class": GENERAL_CLASS, "model_max_length": max_length, **ROLES}
    config["model_input_names"] = ["input_ids", "token_type_ids", "attention_mask"]
    config |= {key: normalizer[name] for key, (name, _) in OPTIONS.items()}
    tokens = {index: token for token, index in vocab.items()}
    tokens |= {token["id"]: token["content"] for token in added}
    # An id without a token gets the last token: of equal lines in vocab.txt the last one counts.
    last = tokens[max(tokens)]
    lines = [tokens.get(index, last) for index in range(max(tokens) + 1)]
    return {
        "tokenizer_config.json": json.dumps(config, indent=2).encode(),
        "tokenizer.json": json.dumps(document, indent=2, ensure_ascii=False).encode(),
        "vocab.txt": "".join(f"{token}\n" for token in lines).encode(),
    }


def check(condition: object, why: str) -> None:
    """Raise ValueError unless the condition holds."""
    if not condition:
        raise ValueError(why)


def _contents(value: str | dict | list | None) -> list[str]:
    """The tokens in a value of tokenizer_config.json: a string, {"content": string}, or several."""
    if isinstance(value, dict):
        value = [value["content"]] if "content" in value else list(value.values())
    if isinstance(value, list):
        return [content for part in value for content in _contents(part)]
    return [value] if value else []


def _read_vocab(path: Path) -> dict[str, int]:
    """A token a line, with its number as id; of equal lines the last counts."""
    lines = read_text(path).removesuffix("\n").split("\n")
    return {token: index for index, token in enumerate(lines)}
