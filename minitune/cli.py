"""What the scripts share: options, one-line errors, and the choice of a model."""

import argparse
import ctypes
import os
import sys
from collections.abc import Callable

import torch

from minitune.attention import BACKENDS
from minitune.errors import UserError


class Parser(argparse.ArgumentParser):
    """argparse, with errors of one line and defaults shown in --help."""

    def __init__(self, description: str):
        super().__init__(
            description=description,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> None:
        raise UserError(message)


def number(
    kind: type, low: float, high: float = float("inf"), closed: bool | None = None
) -> Callable[[str], float]:
    """A converter for argparse: a finite number with low < number <= high.

    `closed`: low itself is good too; so it is for int, where `closed` does not say otherwise.
    """
    closed = kind is int if closed is None else closed

    def convert(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text} is not a number") from None
        if not (low <= value if closed else low < value) or value > high or value == float("inf"):
            bounds = f"from {low:,}" if closed else f"above {low:,}"
            upper = "" if high == float("inf") else f" to {high:,}"
            raise argparse.ArgumentTypeError(f"{text} is not {bounds}{upper}")
        return value

    return convert


def add_machine_options(parser: argparse.ArgumentParser) -> None:
    """Options about how to compute, the same in every script."""
    group = parser.add_argument_group("how it is computed")
    group.add_argument("--precision", choices=["auto", "fp32", "bf16", "fp16"], default="auto",
                       help="of the matrix products; auto: bf16 where the hardware has it")  # fmt: skip
    group.add_argument("--attention", choices=["auto", *BACKENDS], default="auto",
                       help="which attention; auto picks by measurement")  # fmt: skip
    group.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="where")
    group.add_argument("--seed", type=number(int, 0, 2**31), default=0,
                       help="of everything random")  # fmt: skip


def check_device(name: str) -> None:
    """Refuse a GPU that is not there."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no CUDA device here")


def keep_freed_memory() -> None:
    """Ask glibc to keep freed tensors' memory instead of returning it to the system each time.

    Activations of several MB are allocated and freed at every step; by default each one is mapped,
    zeroed page by page and unmapped again, which costs a few per cent of a training step on a CPU.
    """
    if sys.platform.startswith("linux"):
        try:
            mallopt = ctypes.CDLL("libc.so.6").mallopt
        except (OSError, AttributeError):
            return  # another C library; only speed is lost
        M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
        mallopt(M_MMAP_THRESHOLD, 1 << 30)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def run_script(main: Callable[[], None]) -> None:
    """Run a script's `main`: 0, 2 with one line for what the user can put right, 130 for Ctrl-C."""
    keep_freed_memory()
    try:
        main()
        status = 0
    except (UserError, OSError) as error:  # an OSError here: the disk is full, a path is forbidden
        if os.environ.get("RANK", "0") == "0":
            line = " ".join(str(error).split())
            print("error:", "".join(c if c.isprintable() else "?" for c in line), file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        status = 130
    sys.stdout.flush()
    sys.exit(status)


def describe(device: torch.device) -> str:
    """The device in words, for metrics.json and the first lines of a run."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = torch.cpu.get_capabilities().get("cpu_name", "CPU")
    return f"{name}, {torch.get_num_threads()} threads"
