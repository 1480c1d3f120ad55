"""What the scripts share: their options, and how a script ends."""

import argparse
import contextlib
import io
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from minitune.support.errors import UserError
from minitune.support.text_files import Columns

# Options that say what to do in this call, not how a run is computed.
NOT_SAVED = {"help", "out", "resume", "overwrite", "predict", "explain", "evaluate", "base", "json"}
NOT_SAVED |= {"merge", "weights", "page", "yes"}
# Options that runs of earlier versions have not saved. Such a run was computed with their defaults.
ADDED = {"text_column", "label_column", "class_weights", "lora_targets", "lora_rank", "lora_alpha",
         "lora_dropout", "rslora", "dora", "train", "template", "words", "cloze_len",
         "unlabelled", "masked_words"}  # fmt: skip
LONGEST_ERROR = 600  # characters; an option may hold a whole book


def text(value: str) -> str:
    """A converter for argparse: text in UTF-8 that is not blank."""
    if not value.strip():
        raise argparse.ArgumentTypeError("it is empty")
    try:
        value.encode()
    except UnicodeEncodeError:  # Python gives bytes that are not UTF-8 as half characters
        raise argparse.ArgumentTypeError("it is not UTF-8") from None
    return value


def path(value: str) -> Path:
    """A converter for argparse: the name of a file or directory."""
    return Path(text(value))


def int_range(low: int, high: int) -> Callable[[str], int]:
    """A converter for argparse: a whole number with low <= number <= high."""
    return _number(int, lambda n: low <= n <= high, f"a whole number from {low:,} to {high:,}")


def float_range(low: float, high: float, *, above: bool = True) -> Callable[[str], float]:
    """A converter for argparse: low < number <= high, or low <= number if `above` is False."""
    words = f"a number {'above' if above else 'from'} {low:g} to {high:g}"
    return _number(float, lambda x: (low < x if above else low <= x) and x <= high, words)


def _number(kind: type, is_good: Callable, words: str) -> Callable:
    def convert(value: str) -> float:
        with contextlib.suppress(ValueError):
            if is_good(number := kind(value)):
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
        """The options of a resumed run: those not given are `saved`, its settings.json.

        `saved` is empty for a new run, `where` names the run in errors. Raises UserError where an
        option differs from the saved one and is not in `may_change`, or where a saved one is wrong.
        """
        words = []
        for action in self._actions:
            value, flag = saved.get(action.dest), action.option_strings[0]
            if action.dest in NOT_SAVED or value is None or value is False:
                continue
            if value is True:
                words.append(flag)
            elif isinstance(value, list):  # an item that begins with - would be an option
                words += [flag, *(re.sub("^-", "~", str(item)) for item in value)]
            else:
                words.append(f"{flag}={value}")
        try:
            self.parse_args(words)
        except UserError as error:
            raise UserError(f"{where}/settings.json is damaged: {error}") from error
        args = self.parse_args(words + sys.argv[1:])
        if saved:
            self.check_same(args, saved, may_change, where)
        return args

    def check_same(
        self, args: argparse.Namespace, saved: dict, may_change: set[str], where: object
    ) -> None:
        """Raise UserError where an option differs from that of a saved run."""
        defaults = vars(self.parse_args([]))
        saved = {key: defaults[key] for key in ADDED & defaults.keys()} | saved
        for key, value in options_to_save(args).items():
            other = saved.get(key, "none saved")
            if key not in may_change and other != value:
                flag = key.replace("_", "-")
                raise UserError(f"--{flag} {value}: the run in {where} has {other}")

    def error(self, message: str) -> None:
        raise UserError(message)


def options_to_save(args: argparse.Namespace) -> dict:
    """The options that a run keeps in its settings.json."""
    return {key: value for key, value in vars(args).items() if key not in NOT_SAVED}


def add_columns(add: Callable) -> None:
    """The options that say which columns of a table are meant."""
    name = "the column of a .csv, .tsv or .jsonl file that holds the"
    add("--text-column", f"{name} text", default=Columns().text, metavar="NAME")
    add("--label-column", f"{name} label", default=Columns().label, metavar="NAME")


def columns(args: argparse.Namespace) -> Columns:
    """The values of these two options. UserError where both name one column."""
    if args.text_column == args.label_column:
        raise UserError(f"--text-column and --label-column are both {args.text_column}")
    return Columns(args.text_column, args.label_column)


def choose_max_len(
    given: int | None,
    positions: int,
    batch_tokens: int | None = None,
    default: int = 512,
    option: str = "--max-len",
) -> int:
    """The most tokens of a text: what is given by `option`, else what there is room for.

    That is `default`, or what model and batch have. Raises UserError where they have no room for
    what is given.
    """
    if given is None:
        return min(default, positions, batch_tokens or default)
    if batch_tokens and batch_tokens < given:
        raise UserError(f"--batch-tokens {batch_tokens} is less than one text of {option}")
    if given > positions:
        raise UserError(f"{option} {given}: the model has {positions} positions")
    return given


@contextlib.contextmanager
def drawing(picture: Path) -> Iterator[Path]:
    """A context in which a picture is drawn. An error there is a warning: the figures are saved."""
    try:
        yield picture
    except Exception as error:
        print(f"warning: {picture} was not drawn: {error}", file=sys.stderr)


def print_error(error: str) -> None:
    """One line to stderr, by the main process alone."""
    if os.environ.get("RANK", "0") == "0":
        error = error if len(error) <= LONGEST_ERROR else error[:LONGEST_ERROR] + "..."
        print("error:", "".join(c if c.isprintable() else "?" for c in error), file=sys.stderr)


def answer_at_once(options: Parser) -> None:
    """Exit here for --help, and for options that are wrong in themselves."""
    try:
        options.parse_args()
    except UserError as error:
        print_error(" ".join(str(error).split()))
        sys.exit(2)


def run_script(main: Callable[[], None]) -> None:
    """Run `main` and exit: with 0, with 2 and one line for an error, or with 130 after Ctrl-C."""
    import torch  # takes seconds: it must not be imported only to answer --help

    from minitune.support.runtime import keep_freed_memory

    keep_freed_memory()
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the caller
            setattr(sys, name, open(os.devnull, "r+"))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):  # UTF-8 like every file, whatever the locale
        sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")
    status, error = 0, ""
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, `head` for example, has seen enough
        pass
    except KeyboardInterrupt:
        status = 130
    except torch.OutOfMemoryError:
        error = "out of GPU memory; try a smaller --batch-tokens, --accumulate, --cuda-graphs off"
        status = 2
    except (UserError, OSError) as caught:  # OSError: a full disk, a path that is forbidden
        status, error = 2, " ".join(str(caught).split())
    if status == 2:
        print_error(error)
    try:
        sys.stdout.flush()
    except OSError:  # the rest cannot be written, and Python must not try again at its exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(status)
