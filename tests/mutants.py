"""Do the tests see small bugs? Each bug of mutants.toml goes into a copy of the code; its tests must fail.

    python -m tests.mutants                    all of them, with the tests that should see each
    python -m tests.mutants dropout loop       those whose name or file contains one of these words
    python -m tests.mutants --list

Prints a line a bug, and at the end who survived; exit status 1 if any did. It is no part of the
test suite.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]


def mutants(words: list[str]) -> list[dict]:
    """The bugs {name, file, old, new, tests} that fit one of the words; all of them without words."""
    listed = tomllib.loads((ROOT / "tests" / "mutants.toml").read_text())["mutant"]
    for mutant in listed:
        if (ROOT / mutant["file"]).read_text().count(mutant["old"]) != 1:
            sys.exit(f"{mutant['name']}: its old text does not stand once in {mutant['file']}")
    return [
        mutant
        for mutant in listed
        if not words or any(word in f"{mutant['name']} {mutant['file']}" for word in words)
    ]


def copy_of_the_code(folder: Path) -> None:
    """Everything that git tracks or would track, as it is in the working tree."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file() and not name.startswith("tests/benchmarks/runs/"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)


def fails(tests: str, folder: Path) -> bool:
    """Whether these tests, as arguments of pytest, fail in this copy; 30 minutes without an end count."""
    options = ["-x", "-q", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", *options, *tests.split()]
    try:
        ended = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=1800)
    except subprocess.TimeoutExpired:
        return True
    if ended.returncode > 1:
        sys.exit(f"pytest {tests} does not run:\n{ended.stdout}{ended.stderr}")
    return ended.returncode == 1


def main() -> None:
    """Try each bug."""
    parser = argparse.ArgumentParser(description="Do the tests see small bugs?")
    parser.add_argument(
        "words", nargs="*", help="only bugs whose name or file contains one of these"
    )
    parser.add_argument("--list", action="store_true", help="name them, run nothing")
    args = parser.parse_args()
    chosen = mutants(args.words)
    if args.list:
        print(*(f"{mutant['file']}: {mutant['name']}" for mutant in chosen), sep="\n")
        return
    survivors = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        copy_of_the_code(folder)
        for mutant in chosen:
            path, started = folder / mutant["file"], time.monotonic()
            original = path.read_text()
            path.write_text(original.replace(mutant["old"], mutant["new"]))
            seen = fails(mutant["tests"], folder)
            path.write_text(original)
            survivors += [] if seen else [mutant["name"]]
            seconds = time.monotonic() - started
            print(
                f"{'seen' if seen else 'SURVIVED':8}  {seconds:4.0f} s  {mutant['name']}",
                flush=True,
            )
    print(f"{len(chosen)} bugs, {len(survivors)} not seen", *survivors, sep="\n  ")
    sys.exit(bool(survivors))


if __name__ == "__main__":
    main()
