"""What the scripts share: options, one-line errors, and the device in words."""

import argparse
import contextlib
import math
import os
import sys
from collections.abc import Callable

import torch

from minitune.attention import BACKENDS
from minitune.support.errors import UserError
from minitune.support.runtime import keep_freed_memory


class Parser(argparse.ArgumentParser):
    """argparse, with errors of one line and defaults shown in --help."""

    def __init__(self, description: str):
        super().__init__(
            description=description,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
            allow_abbrev=False,
        )

    def resumed(self, saved: dict, may_change: set[str], where: object) -> argparse.Namespace:
        """The options, where those that are not given are a saved run's, and others must not differ."""
        self.set_defaults(**{key: value for key, value in saved.items() if key != "out"})
        args = self.parse_args()
        check_same(args, saved, may_change, where)
        return args

    def error(self, message: str) -> None:
        raise UserError(message)


def check_same(args: argparse.Namespace, saved: dict, may_change: set[str], where: object) -> None:
    """Raise UserError where an option differs from that of a saved run."""
    for key, value in saved.items():
        if key not in may_change and getattr(args, key, value) != value:
            flag = key.replace("_", "-")
            raise UserError(f"--{flag} {getattr(args, key)}: the run in {where} has {value}")


def whole(low: int, high: float = math.inf) -> Callable[[str], int]:
    """A converter for argparse: a whole number with low <= number <= high."""
    return _number(int, lambda n: low <= n <= high, f"a whole number from {low:,}", high)


def real(above: float, high: float = math.inf, *, closed: bool = False) -> Callable[[str], float]:
    """A converter for argparse: a finite number with above < number <= high; `closed`: above is good too."""
    kind = f"a number {'from' if closed else 'above'} {above:,}"
    return _number(
        float,
        lambda x: (above <= x if closed else above < x) and x <= high and x < math.inf,
        kind,
        high,
    )


def _number(kind: type, good: Callable, words: str, high: float) -> Callable:
    def convert(text: str) -> float:
        with contextlib.suppress(ValueError):
            if good(value := kind(text)):
                return value
        upper = "" if high == math.inf else f" to {high:,}"
        raise argparse.ArgumentTypeError(f"{text} is not {words}{upper}")

    return convert


def add_machine_options(parser: argparse.ArgumentParser) -> None:
    """Options about how to compute, the same in every script."""
    group = parser.add_argument_group("how it is computed")
    group.add_argument(
        "--precision",
        choices=["auto", "fp32", "bf16", "fp16"],
        default="auto",
        help="of the matrix products; auto: bf16 where the hardware has it",
    )
    group.add_argument(
        "--attention",
        choices=["auto", *BACKENDS],
        default="auto",
        help="which attention; auto picks by measurement",
    )
    group.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="where")
    group.add_argument("--seed", type=whole(0, 2**31), default=0, help="of everything random")


def choose_max_len(asked: int | None, positions: int, batch_tokens: int | None = None) -> int:
    """Tokens of a text at most: as asked, else 512 or what the model and a batch have room for.

    Raises UserError where a batch or the model has less room than asked for.
    """
    if asked is None:
        return min(512, positions, batch_tokens or 512)
    if batch_tokens and batch_tokens < asked:
        raise UserError(f"--batch-tokens {batch_tokens} is less than one text of --max-len")
    if asked > positions:
        raise UserError(f"--max-len {asked}: the model has {positions} positions")
    return asked


def check_utf8(what: str, *texts: str) -> None:
    """Raise UserError for texts of the command line that are not UTF-8."""
    try:
        "".join(texts).encode()
    except UnicodeEncodeError:  # Python hands over bytes that are no UTF-8 as half characters
        raise UserError(f"{what} is not UTF-8") from None


def run_script(main: Callable[[], None]) -> None:
    """Run a script's `main`: 0, 2 with one line for what the user can put right, 130 for Ctrl-C."""
    keep_freed_memory()
    try:
        main()
        sys.stdout.flush()
        status = 0
    except BrokenPipeError:  # the reader, `head` for example, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 0
    except (UserError, OSError) as error:  # an OSError here: the disk is full, a path is forbidden
        if os.environ.get("RANK", "0") == "0":
            line = " ".join(str(error).split())
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
    sys.stdout.flush()
    sys.exit(status)
