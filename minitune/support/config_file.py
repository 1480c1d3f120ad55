"""The `config.json` of a BERT, which may be anybody's: what minitune cannot compute is an error."""

import reprlib
from pathlib import Path

from minitune.support.errors import UserError
from minitune.support.runs import read_json

# What minitune computes, whatever a `config.json` says; where it says otherwise, it is refused.
FIXED = {
    "model_type": "bert", "hidden_act": "gelu", "position_embedding_type": "absolute",
    "is_decoder": False, "tie_word_embeddings": True,
}  # fmt: skip
# Values of the original BERT, for fields that a `config.json` leaves out.
ORIGINAL = {
    "vocab_size": 30522, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
    "intermediate_size": 3072, "hidden_dropout_prob": 0.1,
}  # fmt: skip


def read_config_file(path: Path, defaults: dict) -> dict:
    """The fields of a `config.json` that `defaults` has too; the others are ignored.

    A field whose default is a whole number must be a positive one, another a number from 0 to 1;
    `id2label` must map indices to names. Raises UserError where that is not so.
    """
    if not path.is_file():
        raise UserError(f"{path.parent} is no model directory: it has no config.json")
    raw = read_json(path)
    if "model_type" not in raw:
        raise UserError(f"{path} names no model_type")
    for key, only in FIXED.items():
        if raw.get(key, only) != only:
            raise UserError(f"{path}: {key} is {reprlib.repr(raw[key])}, minitune runs {only} only")
    values = defaults | ORIGINAL | {key: raw[key] for key in raw.keys() & defaults.keys()}
    labels = values.pop("id2label")
    for key, value in values.items():
        if isinstance(defaults[key], int):
            smallest = 0 if key == "pad_token_id" else 1
            possible = type(value) is int and value >= smallest
        else:
            possible = type(value) in (int, float) and 0 <= value < 1
        if not possible:
            raise UserError(f"{path}: {key} cannot be {reprlib.repr(value)}")
    try:
        labels = {int(index): str(label) for index, label in labels.items()}
        "".join(labels.values()).encode()
    except (AttributeError, ValueError):  # no object, an index that is no number, half a character
        raise UserError(f"{path}: id2label is not an object of names") from None
    if values["hidden_size"] % values["num_attention_heads"]:
        raise UserError(f"{path}: hidden_size is no multiple of num_attention_heads")
    return values | {"id2label": labels}
