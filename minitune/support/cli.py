"""What the scripts share: their options, and how a script ends."""

import argparse
import contextlib
import io
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from minitune.support.errors import UserError
from minitune.support.runtime import keep_freed_memory

# Options that say what to do in this call, not how a run is computed.
NOT_SAVED = {"help", "out", "resume", "overwrite", "predict", "base", "json"}
LONGEST_ERROR = 600  # characters; an option may hold a whole book


def text(value: str) -> str:
    """A converter for argparse: words in UTF-8, not blank as an unset variable would be."""
    if not value.strip():
        raise argparse.ArgumentTypeError("it is empty")
    try:
        value.encode()
    except UnicodeEncodeError:  # Python hands over bytes that are not UTF-8 as half characters
        raise argparse.ArgumentTypeError("it is not UTF-8") from None
    return value


def path(value: str) -> Path:
    """A converter for argparse: the name of a file or directory."""
    return Path(text(value))


def int_range(low: int, high: int) -> Callable[[str], int]:
    """A converter for argparse: a whole number with low <= number <= high."""
    return _number(int, lambda n: low <= n <= high, f"a whole number from {low:,} to {high:,}")


def float_range(low: float, high: float, *, above: bool = True) -> Callable[[str], float]:
    """A converter for argparse: low < number <= high; where `above` is False, low is good too."""
    words = f"a number {'above' if above else 'from'} {low:g} to {high:g}"
    return _number(float, lambda x: (low < x if above else low <= x) and x <= high, words)


def _number(kind: type, good: Callable, words: str) -> Callable:
    def convert(value: str) -> float:
        with contextlib.suppress(ValueError):  # thousands of digits raise it, too
            if good(number := kind(value)):
                return number
        raise argparse.ArgumentTypeError(f"{value} is not {words}")

    return convert


class Parser(argparse.ArgumentParser):
    """argparse, with errors of one line, and options in groups that take one line each."""

    def __init__(self, description: str):
        super().__init__(description=description, allow_abbrev=False)

    def group(self, title: str) -> Callable:
        """A function that adds an option to a new group of --help."""
        group = self.add_argument_group(title)

        def add(
            flag: str,
            help: str,
            kind: Callable | Iterable[str] = text,
            default: Any = None,
            **more: Any,
        ) -> None:
            """`kind` is a converter, or the words to choose from, or bool for a switch."""
            if kind is bool:
                group.add_argument(flag, help=help, action="store_true")
                return
            more |= {"type": kind} if callable(kind) else {"choices": list(kind)}
            if default is not None and "default" not in help:
                words = " ".join(default) if isinstance(default, list) else default
                help += f" (default: {words})"
            group.add_argument(flag, help=help, default=default, **more)

        return add

    def resumed(self, saved: dict, may_change: set[str], where: object) -> argparse.Namespace:
        """The options; those not given are a saved run's, and the others must not differ from it.

        `saved` is the settings.json of the run in the directory `where`; empty for a new run.
        Raises UserError where it holds what cannot be given as an option.
        """
        words = []
        for action in self._actions:
            value, flag = saved.get(action.dest), action.option_strings[0]
            if action.dest in NOT_SAVED or value is None or value is False:
                continue
            if value is True:
                words.append(flag)
            elif isinstance(value, list):  # in which nothing may look like an option
                words += [flag, *(str(item).replace("-", "~") for item in value)]
            else:
                words.append(f"{flag}={value}")
        try:
            self.parse_args(words)
        except UserError as error:
            raise UserError(f"{where}/settings.json is damaged: {error}") from error
        args = self.parse_args(words + sys.argv[1:])
        if saved:
            check_same(args, saved, may_change, where)
        return args

    def error(self, message: str) -> None:
        raise UserError(message)


def options_to_save(args: argparse.Namespace) -> dict:
    """What a run's settings.json keeps of the options."""
    return {key: value for key, value in vars(args).items() if key not in NOT_SAVED}


def check_same(args: argparse.Namespace, saved: dict, may_change: set[str], where: object) -> None:
    """Raise UserError where an option differs from that of a saved run."""
    for key, value in options_to_save(args).items():
        if key not in may_change and saved.get(key, "none saved") != value:
            flag, other = key.replace("_", "-"), saved.get(key, "none saved")
            raise UserError(f"--{flag} {value}: the run in {where} has {other}")


def add_machine_options(parser: Parser, backends: Iterable[str]) -> None:
    """Options about how to compute, the same in every script; `backends` of attention by name."""
    add = parser.group("how it is computed")
    kinds = ["auto", "fp32", "bf16", "fp16"]
    add(
        "--precision", "of matrix multiplications; auto: bf16 if the hardware has it", kinds, "auto"
    )
    add("--attention", "one of several that compute the same", ["auto", *backends], "auto")
    add(
        "--device",
        "run on this device; auto: a GPU if there is one",
        ["auto", "cpu", "cuda"],
        "auto",
    )
    add("--seed", "of everything that is random", int_range(0, 2**31), 0)


def choose_max_len(given: int | None, positions: int, batch_tokens: int | None = None) -> int:
    """Tokens of a text at most: as given, else 512 or what the model and a batch have room for.

    Raises UserError where a batch or the model has less room than that.
    """
    if given is None:
        return min(512, positions, batch_tokens or 512)
    if batch_tokens and batch_tokens < given:
        raise UserError(f"--batch-tokens {batch_tokens} is less than one text of --max-len")
    if given > positions:
        raise UserError(f"--max-len {given}: the model has {positions} positions")
    return given


@contextlib.contextmanager
def drawing(picture: Path) -> Iterator[Path]:
    """Draw this file in the context. Where that fails a warning says so: the figures are saved."""
    try:
        yield picture
    except Exception as error:
        print(f"warning: {picture} was not drawn: {error}", file=sys.stderr)


def run_script(main: Callable[[], None]) -> None:
    """Run a script's `main`: 0, 2 with one line for what the user can put right, 130 for Ctrl-C."""
    keep_freed_memory()
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the caller
            setattr(sys, name, open(os.devnull, "r+"))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):  # as every file, whatever the locale says
        sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")
    try:
        main()
        sys.stdout.flush()
        status = 0
    except BrokenPipeError:  # the reader, `head` for example, has seen enough
        status = 0
    except (UserError, OSError) as error:  # an OSError here: the disk is full, a path is forbidden
        line = " ".join(str(error).split())
        line = line if len(line) <= LONGEST_ERROR else line[:LONGEST_ERROR] + "..."
        if os.environ.get("RANK", "0") == "0":
            print("error:", "".join(c if c.isprintable() else "?" for c in line), file=sys.stderr)
        status = 2
    except torch.OutOfMemoryError:
        print(
            "error: out of GPU memory; try a smaller --batch-tokens, or --accumulate",
            file=sys.stderr,
        )
        status = 2
    except KeyboardInterrupt:
        status = 130
    try:
        sys.stdout.flush()
    except OSError:  # what is left has nowhere to go, and Python must not try it again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(status)
