"""Peak memory and time to the first step of train.py, for texts of several sizes.

    python -m tests.benchmarks.memory              200 MB and 1000 MB; ten minutes on two cores
    python -m tests.benchmarks.memory 5 20         other sizes, in MB

Texts stream through, and tokens are read from disk, so the peak should hardly grow with the text.
Each size is run twice: tokenising, and with the tokens of the first run already on disk. Texts,
runs and tokens are deleted in the end.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[2]
MB = 1_000_000
VOCABULARY = 50_000
WORDS_A_LINE = 85, 186  # lines of about 600 to 1300 characters


def write_text(path: Path, size: int) -> None:
    """At least `size` bytes of random words, as frequent as words are: the r-th in 1 of r times."""
    rng = np.random.default_rng(0)
    letters = np.array(list("etaoinshrdlcumwfgypbvk"))
    words = np.array(["".join(rng.choice(letters, rng.integers(2, 11))) for _ in range(VOCABULARY)])
    frequency = (1 / np.arange(1, VOCABULARY + 1)).cumsum()
    with open(path, "w", encoding="utf-8") as file:
        while file.tell() < size:
            lengths = rng.integers(*WORDS_A_LINE, size=100)
            drawn = words[np.searchsorted(frequency, rng.random(lengths.sum()) * frequency[-1])]
            for line in np.split(drawn, lengths.cumsum()[:-1]):
                file.write(" ".join(line) + "\n")


def run(text: Path, out: Path, steps: int) -> tuple[float, int, str]:
    """Run train.py: (seconds until the first step, peak resident bytes, what it printed)."""
    command = [sys.executable, "train.py", "--data", text, "--out", out, "--steps", str(steps)]
    log, first_checkpoint = out.with_suffix(".log"), out / "resume" / "state.safetensors"
    started, seconds, ended = time.monotonic(), None, 0
    with open(log, "w", encoding="utf-8") as file:
        process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)
    while not ended:
        # wait4 and not RUSAGE_CHILDREN, which is the largest of all children so far.
        ended, status, usage = os.wait4(process.pid, os.WNOHANG)
        if seconds is None and first_checkpoint.exists():  # written before the first step
            seconds = time.monotonic() - started
        time.sleep(0.02)
    process.returncode = os.waitstatus_to_exitcode(status)
    printed = log.read_text(encoding="utf-8")
    if process.returncode or seconds is None:
        sys.exit(f"train.py ended with status {process.returncode}:\n{printed}")
    return seconds, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024), printed


def main() -> None:
    """Write each text, train on it twice, print a line for each run, and clean up."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("sizes", nargs="*", type=int, default=[200, 1000], metavar="MB")
    parser.add_argument("--steps", type=int, default=10)
    args = parser.parse_args()
    print("    text        tokens  on disk  to first step     peak  its own figure")
    for size in args.sizes:
        with tempfile.TemporaryDirectory() as folder:
            text = Path(folder) / "text.txt"
            write_text(text, size * MB)
            try:
                for on_disk in ("no", "yes"):
                    out = Path(folder) / f"run-{on_disk}"
                    seconds, peak, printed = run(text, out, args.steps)
                    tokens = re.search(r"([\d,]+) training tokens", printed)[1]
                    reported = json.loads((out / "metrics.json").read_text())["peak_memory_bytes"]
                    line = f"{text.stat().st_size / MB:>5.0f} MB  {tokens:>12}  {on_disk:>7}  "
                    line += f"{seconds:>11.1f} s  {peak / MB:>4.0f} MB  {reported / MB:>11.0f} MB"
                    print(line, flush=True)
            finally:
                if kept := re.search(r"kept in (.+)\)", (Path(folder) / "run-no.log").read_text()):
                    shutil.rmtree(kept[1], ignore_errors=True)


if __name__ == "__main__":
    main()
