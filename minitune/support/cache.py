"""A directory that one process makes, and any number of processes read."""

import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from minitune.support.errors import UserError
from minitune.support.runs import read_json, write_json


def make_once(
    directory: Path, names: list[str], build: Callable[[Path], None], log: Callable[[str], None]
) -> None:
    """Make a directory of files with these names, unless it is there and nothing is damaged.

    `build` gets another directory to write them to, which is renamed when it is complete. A process
    that wants to make one beside it waits meanwhile. To find damage all files are read, 1 to 2 GB a
    second, and compared with their checksums in index.json.
    """
    if not _damaged(directory, names):
        return
    directory.parent.mkdir(parents=True, exist_ok=True)
    partial = directory.with_name(f"{directory.name}.partial")
    lock = os.open(directory.parent, os.O_RDONLY)
    try:
        with suppress(OSError):  # on a file system without locks nobody waits
            fcntl.flock(lock, fcntl.LOCK_EX)
        if not (damaged := _damaged(directory, names)):
            return  # the process that was waited for has made it
        if directory.exists():
            log(f"{directory}: {damaged} is not what was written there")
        for old in (directory, partial):  # the latter is of a process that was killed
            shutil.rmtree(old, ignore_errors=True)
        partial.mkdir()
        build(partial)
        write_json(partial / "index.json", {name: _facts(partial / name) for name in names})
        for file in partial.iterdir():
            with open(file, "rb") as handle:
                os.fsync(handle.fileno())
        os.rename(partial, directory)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        os.close(lock)  # this unlocks


def _damaged(directory: Path, names: list[str]) -> str:
    """The name of a file that is not as the index says; empty if all are."""
    name = "index.json"
    try:
        index = read_json(directory / name)
        for name in names:
            if not (directory / name).is_file() or index[name] != _facts(directory / name):
                return name
    except (OSError, UserError, LookupError):
        return name
    return ""


def _facts(file: Path) -> list:
    """Its size and its checksum."""
    with open(file, "rb") as opened:
        return [file.stat().st_size, hashlib.file_digest(opened, "sha256").hexdigest()]
