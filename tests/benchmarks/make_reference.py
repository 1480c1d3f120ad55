"""Make the reference run, data/reference/, of a run of train.py.

    python train.py && python -m tests.benchmarks.make_reference runs/pretrain

Every version of it stays in git for ever. So the weights are float16, half the bytes, and a run
replaces it only where its loss is lower by more than LEAST.
"""

import shutil
import sys
from pathlib import Path

from minitune.checkpoint import load_masked_lm, load_tokenizer, save_model
from minitune.support.cli import run_script
from minitune.support.errors import UserError
from minitune.support.reference import REFERENCE, is_comparable
from minitune.support.runs import read_json

LEAST = 0.05  # nats
COPIED = "settings.json", "log.jsonl", "metrics.json"


def main() -> None:
    """Compare the run with the reference, then take its place."""
    run, old = Path(sys.argv[1]), read_json(REFERENCE / "metrics.json")
    if not is_comparable(read_json(run / "settings.json")):
        raise UserError(f"{run} is no run of train.py with the default options")
    loss = read_json(run / "metrics.json")["loss"]
    if loss > old["loss"] - LEAST:
        raise UserError(f"a loss of {loss:.3f}: the reference has {old['loss']:.3f} and stays")
    model, _ = load_masked_lm(run)
    save_model(model.half(), load_tokenizer(run, model.config), REFERENCE)
    for name in COPIED:
        shutil.copy(run / name, REFERENCE / name)


if __name__ == "__main__":
    run_script(main)
