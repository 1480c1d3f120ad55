"""The reference run of `python train.py`: a model to use, and losses to compare with."""

from pathlib import Path
from statistics import mean

REFERENCE = Path(__file__).parents[2] / "data" / "reference"
# Its settings. With others a loss is not to be compared with its own.
SETTINGS = {"data": "imdb", "preset": "tiny", "init": None, "vocab_size": 8192, "mask_rate": 0.3}
PLATEAU = 0.1  # nats: as near to the unigram entropy a model uses no context
NEAR = 0.25  # nats by which runs with these settings differ by chance
LOGGED = 10  # entries of a log whose mean is "the loss at a step": single steps differ by chance


def is_comparable(settings: dict) -> bool:
    """Whether a run of train.py had the settings of the reference run."""
    return all(settings.get(key) == value for key, value in SETTINGS.items())


def last_loss(log: list[dict]) -> float:
    """The training loss at the end of a log."""
    return mean(entry["loss"] for entry in log[-LOGGED:])


def until(tokens: int, log: list[dict]) -> list[dict]:
    """The part of a log that had read at most as many tokens; the first entry if there is none."""
    return [entry for entry in log if entry["tokens"] <= tokens] or log[:1]
