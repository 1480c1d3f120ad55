"""Writing files so that a reader never meets half of one, and a kill never leaves one."""

import json
import os
import shutil
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from minitune.errors import UserError


def write_atomically(path: Path, content: bytes) -> None:
    """Temporary file, fsync, rename: `path` holds the old content or all of the new."""
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(content)
    _publish(partial, path)


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """A safetensors file, atomically; straight from the tensors, which are not copied in memory."""
    partial = path.with_name(path.name + ".partial")
    save_file(tensors, partial, metadata=metadata)
    _publish(partial, path)


def _publish(partial: Path, final: Path) -> None:
    with open(partial, "rb") as file:
        os.fsync(file.fileno())
    os.replace(partial, final)


def write_json(path: Path, value: dict) -> None:
    """`value` as readable JSON, atomically."""
    write_atomically(path, (json.dumps(value, indent=2) + "\n").encode())


def read_json(path: Path) -> dict:
    """A JSON object, or a UserError that names the file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} does not hold a JSON object")
    return value


def publish_directory(partial: Path, final: Path) -> None:
    """Give a directory that is complete its final name; if another process was first, keep that one."""
    for file in partial.iterdir():
        with open(file, "rb") as handle:
            os.fsync(handle.fileno())
    try:
        os.rename(partial, final)
    except OSError:
        if not final.is_dir():
            raise
        shutil.rmtree(partial)
