"""A page: one HTML file that holds a model and computes its answers in any browser, offline.

    page.html    the document, with the places of the parts below
    page.css     how it looks
    bert.js      BERT in plain JavaScript, to be read
    answers.js   from a text to labels, blanks, attention, and what each word adds
    page.js      what is typed and shown

The weights are int8: a few neighbours in a row of a matrix are whole numbers from -127 to 127,
times a scale of their own. With one scale for a whole row, its largest number would decide how
coarse all others are, and the error of a logit be twice as large. Small matrices and vectors are
float32.
"""

import base64
import dataclasses
import html
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer
from torch import Tensor, nn

from minitune.support.errors import UserError
from minitune.support.results import in_bytes
from minitune.support.runs import write_atomically

FOLDER = Path(__file__).parent
FIRST_LINE = "<!doctype html><!-- a page of minitune -->"
LARGE = 50_000_000  # bytes: a page that is larger needs --yes
SMALL = 4096  # numbers: a matrix of fewer is float32
# Numbers that share a scale: rounding the matrices of layers harms more than that of embeddings.
LAYER_GROUP, EMBEDDING_GROUP = 8, 32
# The tensors that bert.js computes with.
KNOWN = re.compile(
    r"(bert\.embeddings\.\w+|pooler\.dense|(head\.)?classifier|head\.(dense|norm))\.(weight|bias)|"
    r"head\.(bias|mean|std)|"
    r"bert\.layers\.\d+\.(attention\.(qkv|out)|feed_forward\.(up|down)|"
    r"(attention|feed_forward)_(norm|adapter\.(up|down)))\.(weight|bias)"
)


def quantise(matrix: np.ndarray, group: int) -> tuple[np.ndarray, np.ndarray, float]:
    """A matrix (R, C) as int8 (N, group) times uint16 scales (N, 1) times a unit, nearly.

    A group is a whole row where its size does not divide C.
    """
    columns = matrix.shape[1]
    groups = matrix.reshape(-1, columns if columns % group else group).astype(np.float64)
    exact = np.abs(groups).max(1, keepdims=True) / 127
    unit = max(exact.max(), 1e-30) / 65535
    scales = np.ceil(exact / unit).clip(1, 65535)  # not below the exact ones, or 127 is too little
    return np.rint(groups / (scales * unit)).astype(np.int8), scales.astype(np.uint16), unit


def append(content: bytearray, array: np.ndarray) -> int:
    """Add an array to the content; returns where it starts, a multiple of 4 as JavaScript wants."""
    content += bytes(-len(content) % 4)
    start = len(content)
    content += array.astype(array.dtype.newbyteorder("<")).tobytes()
    return start


def pack(tensors: dict[str, Tensor]) -> tuple[list[dict], bytes]:
    """Where each tensor lies, for bert.js, and all of them in one block of bytes.

    A tensor of one dimension is a matrix of one row.
    """
    table, content = [], bytearray()
    for name, tensor in tensors.items():
        array = np.atleast_2d(tensor.detach().float().cpu().numpy())
        place = {"name": name, "rows": array.shape[0], "columns": array.shape[1]}
        if len(array) > 1 and array.size >= SMALL:
            group = EMBEDDING_GROUP if name.startswith("bert.embeddings.") else LAYER_GROUP
            array, scales, unit = quantise(array, group)
            place |= {"group": array.shape[1], "scales": append(content, scales), "unit": unit}
        table.append(place | {"start": append(content, array)})
    return table, bytes(content)


def describe_tokenizer(tokenizer: Tokenizer) -> dict:
    """What bert.js needs of a BERT tokenizer; UserError for what it does not know."""
    document = json.loads(tokenizer.to_str())
    model, added = document["model"], document["added_tokens"]
    *markup, options = document["normalizer"].get("normalizers", [document["normalizer"]])
    for token in added:
        if token["single_word"] or token["lstrip"] or token["rstrip"]:
            raise UserError(f"a page cannot look for the added token {token['content']!r}")
    ids = model["vocab"] | {token["content"]: token["id"] for token in added}
    vocab: list[str | None] = [None] * (max(ids.values()) + 1)
    for token, index in ids.items():
        vocab[index] = token
    for token in added:
        if token["normalized"]:  # it is looked for in the normalized text
            token["content"] = tokenizer.normalizer.normalize_str(token["content"])
    accents = options["strip_accents"]
    return {
        "vocab": vocab,
        "added": [{key: token[key] for key in ("content", "id", "normalized")} for token in added],
        "apart": [ids[content] for content in ids if content not in model["vocab"]],
        "longest": model["max_input_chars_per_word"],
        "markup": bool(markup),
        "clean": options["clean_text"],
        "chinese": options["handle_chinese_chars"],
        "accents": options["lowercase"] if accents is None else accents,
        "lowercase": options["lowercase"],
    } | {name: ids[f"[{name.upper()}]"] for name in ("unk", "cls", "sep", "mask")}


def make_page(name: str, model: nn.Module, tokenizer: Tokenizer, facts: dict[str, Any]) -> str:
    """The document. `model` has the parts of minitune/model.py; `facts` say how it answers.

    They are "labels" (a list of names), and "classifier" or "prompts", the other one being empty:

        classifier   {"pooling", "temperature", "room": tokens of a text, "beginning": how many of
                     them are from the beginning of a longer one}
        prompts      [{"sentence", "parts": of the template, "room": tokens of a text, "words": the
                     label of each word, "bias": of each label, "blanks": [{"ids", "guesses"}]}]

    Raises UserError where the model has a tensor that bert.js does not know.
    """
    tensors = model.state_dict()
    for tensor in tensors:
        if not KNOWN.fullmatch(tensor):
            raise UserError(f"{name}: a page cannot compute with {tensor}")
    table, weights = pack(tensors)
    config = dataclasses.asdict(model.bert.config) | {"id2label": None}
    facts = {"name": name, "config": config, "tensors": table} | facts
    facts["parameters"] = sum(parameter.numel() for parameter in model.parameters())
    facts["tokenizer"] = describe_tokenizer(tokenizer)
    parts = {"name": html.escape(name), "weights": base64.b64encode(weights).decode()}
    # Inside a script element "<" is all that could be taken for HTML.
    parts["facts"] = json.dumps(facts).replace("<", "\\u003c")
    for file in ("page.css", "bert.js", "answers.js", "page.js"):
        parts[file] = (FOLDER / file).read_text(encoding="utf-8")
    document = (FOLDER / "page.html").read_text(encoding="utf-8")
    return re.sub(r"\{\{(\S+)\}\}", lambda place: parts[place[1]], document)


def check_path(path: Path) -> None:
    """Raise UserError where a page should not be written: over a file that is none, for example."""
    if path.suffix != ".html":
        raise UserError(f"--page {path}: should end with .html")
    if not path.parent.is_dir():
        raise UserError(f"--page {path}: there is no such folder")
    if path.exists():
        with open(path, "rb") as file:  # an OSError for a directory
            if file.read(len(FIRST_LINE)) != FIRST_LINE.encode():
                raise UserError(
                    f"--page {path}: there is such a file, which is no page of minitune"
                )


def write_page(path: Path, page: str, yes: bool) -> str:
    """Write the document, and say so; UserError where it is large and `yes` is False."""
    content = page.encode()
    if len(content) > LARGE and not yes:
        raise UserError(f"--page {path} would have {in_bytes(len(content))}; add --yes to write it")
    write_atomically(path, content)
    return f"wrote {path}, {in_bytes(len(content))}: open it in a browser"
