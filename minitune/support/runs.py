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

# --overwrite deletes these when the new run starts. Other files are replaced when they are written:
# without its weights, a model directory that is half old and half new cannot be loaded.
OLD_RESULTS = ("metrics.json", "log.jsonl", "model.safetensors", "trained.safetensors",
               "adapter_model.safetensors",
               "answers.json", "bag.json", "report.json", "report.html")  # fmt: skip
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
        self.settings: dict = {}  # of the run to resume; empty for a new one
        self.is_finished = False  # whether the run to resume came to its end
        self.replaces = False  # whether an old run is deleted when this one starts

    @classmethod
    @contextlib.contextmanager
    def open(cls, directory: Path, resume: bool, overwrite: bool, mark: str) -> Iterator["Run"]:
        """A context in which the directory is locked: its run, a new one or one to resume.

        `mark` is a key that only the settings of this script's runs have. UserError if another
        process uses the directory, or if it holds other files, or a run and neither `resume` nor
        `overwrite` is given. If the run does not start, directories made for it are removed. Of
        several processes (torchrun) only the main one locks.
        """
        run, missing = cls(directory), []
        with contextlib.ExitStack() as stack:
            if os.environ.get("RANK", "0") == "0":
                missing = [p for p in (directory, *directory.parents) if not p.exists()]
                stack.enter_context(_locked(directory))
            try:
                run._find_old_run(resume, overwrite, mark)
                yield run
            finally:
                for path in missing:
                    with contextlib.suppress(OSError):  # it is not empty
                        path.rmdir()

    def _find_old_run(self, resume: bool, overwrite: bool, mark: str) -> None:
        """See what the directory holds. UserError where it may not be used."""
        if resume and overwrite:
            raise UserError("--resume and --overwrite exclude each other")
        # A kill can leave empty folders, and *.partial, before settings.json is there.
        found = os.walk(self.directory)
        if not any(names and not folder.endswith(".partial") for folder, _, names in found):
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
            what = f"holds {'a finished' if is_finished else 'an unfinished'} run"
            ways = "add --resume or --overwrite, or name a new --out"
            raise UserError(f"--out {self.directory} {what}: {ways}")

    @property
    def metrics(self) -> dict:
        """What a finished run measured."""
        return read_json(self.directory / "metrics.json")

    def start(self, settings: dict) -> None:
        """Delete the old run that this one replaces, and write settings.json."""
        if self.replaces:
            self.clean_up()
            for name in OLD_RESULTS:
                (self.directory / name).unlink(missing_ok=True)
        self.state_path.parent.mkdir(parents=True, exist_ok=True)
        if settings != self.settings:
            write_json(self.directory / "settings.json", settings)

    def save(self, checkpoint: dict[str, Tensor]) -> None:
        """Replace the checkpoint, in one rename."""
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
        self.read_log()  # a damaged log is an error here, not after training
        return checkpoint

    def log(self, entry: dict) -> None:
        """Append one line to log.jsonl."""
        with open(self.directory / "log.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    def read_log(self) -> list[dict]:
        """The lines of log.jsonl. The last one is left out if a kill has cut it short."""
        path, entries = self.directory / "log.jsonl", []
        if path.exists() and path.stat().st_size > LARGEST_LOG:
            raise UserError(f"{path} has more than {LARGEST_LOG:,} bytes")
        *lines, _ = path.read_bytes().split(b"\n") if path.is_file() else [b""]
        for number, line in enumerate(lines, start=1):
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
        """Delete the lines after this step, since a resumed run repeats these steps."""
        kept = [json.dumps(entry) + "\n" for entry in self.read_log() if entry["step"] <= step]
        write_atomically(self.directory / "log.jsonl", "".join(kept).encode())

    def finish(self, metrics: dict) -> None:
        """Mark the run as finished."""
        write_json(self.directory / "metrics.json", metrics)
        self.clean_up()

    def clean_up(self) -> None:
        """Remove what only an unfinished run needs."""
        shutil.rmtree(self.state_path.parent, ignore_errors=True)


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Make the directory and lock it. The lock ends with this process, even if it is killed."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(directory, os.O_RDONLY)
    except OSError as error:
        raise UserError(f"--out {directory}: {error.strerror}") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Between our open and our lock, a process that did not start may have removed it.
        is_free = os.path.samestat(os.fstat(descriptor), os.stat(directory))
    except (BlockingIOError, FileNotFoundError):
        is_free = False
    except OSError:  # a file system without locks
        is_free = True
    try:
        if not is_free:
            raise UserError(f"--out {directory}: another process is training there")
        yield
    finally:
        os.close(descriptor)  # this unlocks


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
    """A context that gives a path to write to; at its end that file takes the place of `path`.

    It lies in a directory of its own, `path`.partial, since safetensors writes another file beside
    it first. A kill leaves nothing but this directory.
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
    """The text of a small file, such as settings. UserError if it cannot be read, or is large."""
    try:
        if path.exists() and not path.is_file():  # a device or a pipe may never end
            raise ValueError("it is no file")
        if path.stat().st_size > LARGEST_TEXT:
            raise ValueError(f"it has more than {LARGEST_TEXT:,} bytes")
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error


def read_if_there(path: Path) -> dict:
    """The JSON object in a file that older runs do not have; empty without it."""
    return read_json(path) if path.is_file() else {}


def read_json(path: Path) -> dict:
    """The JSON object in a file. UserError if there is none."""
    try:
        value = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} does not hold a JSON object")
    return value
