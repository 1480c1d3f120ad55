"""A run's directory: who may use it, what it logs, and how it survives a kill.

    OUT/settings.json               the options the run was started with; marks OUT as a run's
    OUT/log.jsonl                   one line a logged step
    OUT/resume/state.safetensors    weights, optimizer and progress; one file, so never half of each
    OUT/metrics.json                written last: a run with this file is finished

Beside them the script writes its result, a model directory for example.
"""

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from minitune.support.errors import UserError

# What --overwrite deletes when the new run starts. Other files are replaced one by one, as they
# are written; without its weights a half-replaced model directory cannot be loaded by mistake.
OLD_RESULTS = ("metrics.json", "model.safetensors", "trained.safetensors", "log.jsonl")
LARGEST_LOG = 1 << 28  # bytes
LARGEST_TEXT = 16 << 20  # bytes; as JSON this may take up to 0.4 GB of memory


def refuse_foreign_files(out: Path, names: set[str], what: str) -> None:
    """Raise UserError where --out holds anything but these names, the files of `what`."""
    if foreign := [path.name for path in out.glob("*") if path.name not in names]:
        raise UserError(f"--out {out} holds what is no {what}: {foreign[0]}")


class Run:
    """One output directory. `Run.open` decides whether it may be used, and locks it."""

    def __init__(self, directory: Path):
        self.directory = directory
        self.state_path = directory / "resume" / "state.safetensors"
        self.settings: dict = {}  # of the run to be resumed; empty for a new one
        self.is_finished = False  # the run to be resumed came to its end
        self.replaces = False  # an old run, which goes when this one starts

    @classmethod
    @contextlib.contextmanager
    def open(cls, directory: Path, resume: bool, overwrite: bool, mark: str) -> Iterator["Run"]:
        """A context in which the directory is locked, with its run: a new one, or one to resume.

        `mark` is a key that the settings of this script's runs have, and those of no other.
        Raises UserError where another process uses the directory, where it holds something else, or
        a run that is neither to be resumed nor overwritten. If the run does not start, directories
        made for it are removed again. Of several processes (torchrun) only the main one locks.
        """
        run, missing, lock = cls(directory), [], None
        try:
            if os.environ.get("RANK", "0") == "0":
                missing = [p for p in (directory, *directory.parents) if not p.exists()]
                lock = _make_and_open(directory)
                _lock(lock, directory)
            run._look(resume, overwrite, mark)
            yield run
        finally:
            for path in missing:
                with contextlib.suppress(OSError):  # it is no longer empty
                    path.rmdir()
            if lock is not None:
                os.close(lock)  # and unlocks

    def _look(self, resume: bool, overwrite: bool, mark: str) -> None:
        """Set what the directory's content says, or raise UserError where it may not be used."""
        if resume and overwrite:
            raise UserError("--resume and --overwrite exclude each other")
        if not _holds_files(self.directory):
            return
        path = self.directory / "settings.json"
        settings = read_json(path) if path.is_file() else {}
        if mark not in settings:
            raise UserError(f"--out {self.directory} holds something that is no run of this script")
        is_finished = (self.directory / "metrics.json").is_file()
        if resume:
            self.settings, self.is_finished = settings, is_finished
        elif overwrite:
            self.replaces = True
        else:
            state = "a finished" if is_finished else "an unfinished"
            raise UserError(
                f"--out {self.directory} holds {state} run: "
                "add --resume or --overwrite, or name a new --out"
            )

    @property
    def metrics(self) -> dict:
        """What a finished run measured."""
        return read_json(self.directory / "metrics.json")

    def start(self, settings: dict) -> None:
        """Remove an old run, if it is replaced, and write the options, which mark a run."""
        if self.replaces:
            self.clean_up()
            for name in OLD_RESULTS:
                (self.directory / name).unlink(missing_ok=True)
        self.state_path.parent.mkdir(parents=True, exist_ok=True)
        if settings != self.settings:
            write_json(self.directory / "settings.json", settings)

    def save(self, checkpoint: dict[str, Tensor]) -> None:
        """Replace the checkpoint by this one, in one rename."""
        write_tensors(self.state_path, checkpoint, {})

    def load(self) -> dict[str, Tensor] | None:
        """The last checkpoint, or None before the first."""
        if self.replaces or not self.state_path.exists():
            return None
        try:
            checkpoint = load_file(self.state_path)
            for name, tensor in checkpoint.items():
                if not tensor.sum().isfinite():
                    raise ValueError(f"{name} holds NaN or infinity")
        except (SafetensorError, OSError, MemoryError, ValueError) as error:
            raise UserError(f"{self.state_path} is damaged: {error}") from error
        self.read_log()  # fails here where it is damaged, not after training
        return checkpoint

    def log(self, entry: dict) -> None:
        """Append one line to log.jsonl."""
        with open(self.directory / "log.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    def read_log(self) -> list[dict]:
        """All whole lines of log.jsonl; a kill may have cut the last one short."""
        path, entries = self.directory / "log.jsonl", []
        if path.exists() and path.stat().st_size > LARGEST_LOG:
            raise UserError(f"{path} has more than {LARGEST_LOG:,} bytes")
        lines = path.read_bytes().splitlines(keepends=True) if path.is_file() else []
        for number, line in enumerate(lines, start=1):
            if not line.endswith(b"\n"):
                continue
            try:
                entry = json.loads(line)
                numbers = [entry["step"], entry["loss"], entry["seconds"]]
                numbers += entry.get("validation", {}).values()
                if not {type(number) for number in numbers} <= {int, float}:
                    raise ValueError("a figure is no number")
            except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
                raise UserError(f"{path}, line {number}, is damaged: {error!r}") from error
            entries.append(entry)
        return entries

    def rewind_log(self, step: int) -> None:
        """Drop the lines of steps that a resumed run is going to do again."""
        kept = [json.dumps(entry) + "\n" for entry in self.read_log() if entry["step"] <= step]
        write_atomically(self.directory / "log.jsonl", "".join(kept).encode())

    def finish(self, metrics: dict) -> None:
        """Mark the run as finished."""
        write_json(self.directory / "metrics.json", metrics)
        self.clean_up()

    def clean_up(self) -> None:
        """Remove what only an unfinished run needs."""
        shutil.rmtree(self.state_path.parent, ignore_errors=True)


def _make_and_open(directory: Path) -> int:
    """A file descriptor of the directory, which is made if it is not there."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        return os.open(directory, os.O_RDONLY)
    except OSError as error:
        raise UserError(f"--out {directory}: {error.strerror}") from error


def _lock(descriptor: int, directory: Path) -> None:
    """Lock an open directory; the lock ends with this process, however that ends."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Between our open and our lock a process that was refused may have removed it again.
        free = os.path.samestat(os.fstat(descriptor), os.stat(directory))
    except (BlockingIOError, FileNotFoundError):
        free = False
    except OSError:  # a file system without locks
        free = True
    if not free:
        raise UserError(f"--out {directory}: another process is training there")


def _holds_files(directory: Path) -> bool:
    """Whether it holds more than what a kill can leave before settings.json is there."""
    return any(names and not root.endswith(".partial") for root, _, names in os.walk(directory))


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that at any moment it holds all of the old content or all of the new."""
    with _new_content(path) as partial:
        partial.write_bytes(content)


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file, atomically, from tensors on any device."""
    on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with _new_content(path) as partial:
        try:
            save_file(on_cpu, partial, metadata)
        except SafetensorError as error:  # the disk is full, for example
            raise OSError(f"{path} cannot be written: {error}") from error
        partial.chmod(partial.parent.stat().st_mode & 0o666)  # the library lets only us read it


@contextlib.contextmanager
def _new_content(path: Path) -> Iterator[Path]:
    """A name for the new content of a file. Written and fsynced, it takes the file's place.

    It lies in a directory of its own, `path`.partial, which is all that a kill can leave:
    safetensors writes to a name of its own choice beside the one that it is given.
    """
    folder = path.with_name(path.name + ".partial")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield folder / path.name
        with open(folder / path.name, "rb") as file:
            os.fsync(file.fileno())
        os.replace(folder / path.name, path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_json(path: Path, value: dict) -> None:
    """`value` as readable JSON, atomically."""
    write_atomically(path, (json.dumps(value, indent=2) + "\n").encode())


def read_text(path: Path) -> str:
    """A file that is small, as settings and vocabularies are, or a UserError that names it."""
    try:
        if path.exists() and not path.is_file():  # a device or a pipe may never end
            raise ValueError("it is no file")
        if path.stat().st_size > LARGEST_TEXT:
            raise ValueError(f"it has more than {LARGEST_TEXT:,} bytes")
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error


def read_json(path: Path) -> dict:
    """A JSON object, or a UserError that names the file."""
    try:
        value = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} does not hold a JSON object")
    return value


def publish_directory(partial: Path, final: Path) -> None:
    """Give a complete directory its final name; if another process was first, keep that one."""
    for file in partial.iterdir():
        with open(file, "rb") as handle:
            os.fsync(handle.fileno())
    try:
        os.rename(partial, final)
    except OSError:
        if not final.is_dir():
            raise
        shutil.rmtree(partial)
