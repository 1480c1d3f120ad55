"""Safetensors files that may be anybody's: what does not fit is an error, and no memory is used."""

import math
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from minitune.support.errors import UserError

LARGEST_HEADER = 4 << 20  # bytes, a hundred times that of the largest BERT
FLOATS = {"F64", "F32", "F16", "BF16"}


class TensorFile:
    """An open safetensors file. Its header has names, shapes and types; tensors are read singly."""

    def __init__(
        self, path: Path, described_in: str, rename: Callable[[str], str] = lambda name: name
    ):
        """`described_in` is the file that says which shapes to expect; it is named in errors.

        Tensors are known by `rename` of their names in the file. UserError if it cannot be read.
        """
        self.path, self.described_in = path, described_in
        try:
            with open(path, "rb") as file:
                if int.from_bytes(file.read(8), "little") > LARGEST_HEADER:
                    raise OSError(f"its header has more than {LARGEST_HEADER:,} bytes")
            self.file = safe_open(path, "pt")
        except (SafetensorError, OSError, MemoryError) as error:
            raise UserError(f"{path} cannot be read: {error}") from error
        self.names = {rename(name): name for name in self.file.keys()}  # noqa: SIM118

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor; UserError where it is missing or does not hold floats."""
        if name not in self.names:
            raise UserError(f"{self.path}: {name} is missing")
        header = self.file.get_slice(self.names[name])
        if header.get_dtype() not in FLOATS:
            raise UserError(f"{self.path}: {name} has type {header.get_dtype()}, not a float type")
        return tuple(header.get_shape())

    def check(self, name: str, expected: tuple[int, ...]) -> None:
        """Raise UserError where a tensor is missing or has another shape."""
        if (found := self.shape(name)) != expected:
            raise UserError(
                f"{self.path}: {name} has shape {found}, {self.described_in} says {expected}"
            )

    def read(self, name: str, expected: tuple[int, ...]) -> Tensor:
        """A tensor in float32; UserError where it does not fit, or holds NaN or infinity."""
        self.check(name, expected)
        tensor = self.file.get_tensor(self.names[name]).float()
        if not all(map(math.isfinite, tensor.aminmax())):
            raise UserError(f"{self.path}: {name} holds NaN or infinity")
        return tensor
