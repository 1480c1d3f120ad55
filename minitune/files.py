"""Writing files so that a reader never meets half of one, and a kill never leaves one."""

import json
import os
import shutil
from pathlib import Path

import torch
from torch import Tensor

from minitune.errors import UserError


def write_atomically(path: Path, content: bytes) -> None:
    """Temporary file, fsync, rename: `path` holds the old content or all of the new."""
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(content)
    _publish(partial, path)


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """A safetensors file (github.com/huggingface/safetensors, "Format"), atomically, from any device.

    The library's `save` puts the whole file together in memory, as large again as all tensors, and its
    `save_file` writes under a name of its own choice that a kill leaves behind.
    """
    header, offset = {"__metadata__": metadata}, 0
    # The widest numbers first, so that all of them begin at a multiple of their size.
    ordered = dict(sorted(tensors.items(), key=lambda item: -item[1].element_size()))
    for name, tensor in ordered.items():
        place = [offset, offset := offset + tensor.nbytes]
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": place}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    partial = path.with_name(path.name + ".partial")
    with open(partial, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in ordered.values():
            file.write(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    _publish(partial, path)


DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


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
