"""The doctor: what this machine can do, whether a run is healthy, whether a data file is fit.

    python -m minitune.doctor                     this machine
    python -m minitune.doctor runs/pretrain       a run of train.py or finetune.py
    python -m minitune.doctor reviews.csv imdb    data: files, folders, the names of --data

Each line is a finding, with what to do where something is wrong. The exit status is 1 if a finding
has to be put right. Runs are compared with the log of a reference run of `python train.py`.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from minitune.commands.examine_data import examine_data
from minitune.commands.examine_machine import examine_machine
from minitune.commands.examine_run import examine_run
from minitune.support import cli
from minitune.support.cli import Parser, run_script
from minitune.support.finding import WRONG, Finding
from minitune.support.runtime import Runtime


def main() -> None:
    """Examine what is named, or this machine."""
    options = Parser("Say what this machine can do, whether a run is healthy, or data is fit.")
    options.prog = "python -m minitune.doctor"
    help = "runs, data files, folders, imdb, rotten_tomatoes; none: this machine"
    options.add_argument("subjects", nargs="*", type=cli.text, metavar="RUN_OR_DATA", help=help)
    cli.add_columns(options.group("data"))
    options.add_argument("--json", action="store_true", help="one JSON object a finding")
    args: argparse.Namespace = options.parse_args()
    findings = examine_machine(Runtime.start()) if not args.subjects else _examine(args)
    wrong = 0
    for finding in findings:
        print(json.dumps(asdict(finding)) if args.json else finding.line(), flush=True)
        wrong += finding.kind == WRONG
    if wrong:
        sys.exit(1)


def _examine(args: argparse.Namespace) -> Iterator[Finding]:
    for name in args.subjects:
        is_run = Path(name).is_dir() and any(Path(name).rglob("settings.json"))
        yield from examine_run(Path(name)) if is_run else examine_data(name, cli.columns(args))


if __name__ == "__main__":
    run_script(main)
