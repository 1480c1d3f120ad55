"""A run's directory: what it may overwrite, what it logs, and how it survives a kill.

    OUT/settings.json               the options the run was started with; marks OUT as a run's
    OUT/log.jsonl                   one line a logged step
    OUT/resume/state.safetensors    weights, optimizer and progress; one file, so never half of each
    OUT/run.lock                    held by the process that trains, so that no second one does
    OUT/metrics.json                written last: a run with this file is finished

Beside them the job writes what it was for, a model directory for example.
"""

import fcntl
import json
import os
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from minitune.support.errors import UserError

NOT_YET_A_RUN = (".partial", ".lock")  # all that a kill can leave before settings.json is there


def check_strangers(out: Path, own: set[str], what: str) -> None:
    """Raise UserError where --out holds anything but these names; `what` they belong to."""
    if strangers := [path.name for path in out.glob("*") if path.name not in own]:
        raise UserError(f"--out {out} holds what is no {what}: {strangers[0]}")


class Run:
    """One output directory. `Run.open` decides whether it may be used."""

    def __init__(self, directory: Path):
        self.directory = directory
        self.state_path = directory / "resume" / "state.safetensors"
        self.lock_path = directory / "run.lock"

    @classmethod
    def open(cls, directory: Path, resume: bool, mark: str) -> "Run":
        """A new run, or with `resume` the one that is there; UserError where neither is safe.

        `mark` is a key that the settings of this script's runs have, and those of no other.
        """
        run = cls(directory)
        if directory.exists() and not directory.is_dir():
            raise UserError(f"--out {directory} is a file")
        names = {path.name for path in directory.glob("*") if path.suffix not in NOT_YET_A_RUN}
        if names and mark not in run.settings:
            raise UserError(f"--out {directory} holds something that is no run of this script")
        if names and not resume:
            state = "a finished" if run.is_finished else "an unfinished"
            raise UserError(
                f"--out {directory} holds {state} run: add --resume, or name a new --out"
            )
        return run

    @property
    def is_finished(self) -> bool:
        """Whether the run came to its end."""
        return (self.directory / "metrics.json").is_file()

    @property
    def metrics(self) -> dict:
        """What a finished run measured."""
        return read_json(self.directory / "metrics.json")

    @property
    def settings(self) -> dict:
        """The options of the run that is there; empty for a new one."""
        path = self.directory / "settings.json"
        return read_json(path) if path.is_file() else {}

    def check_writable(self) -> None:
        """Fail before the work, not after: make the directory, and take away again what was made."""
        missing = [path for path in (self.directory, *self.directory.parents) if not path.exists()]
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--out {self.directory}: {error.strerror}") from error
        for path in missing:
            path.rmdir()

    def start(self, settings: dict) -> None:
        """Claim the directory, and only then note the options, which mark it as a run's."""
        self.directory.mkdir(parents=True, exist_ok=True)
        # The system drops the lock with the process, however it ends.
        self._lock = open(self.lock_path, "w")  # noqa: SIM115
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"--out {self.directory}: another process is training there") from None
        write_json(self.directory / "settings.json", settings)
        self.state_path.parent.mkdir(exist_ok=True)

    def save(self, tensors: dict[str, Tensor], progress: dict) -> None:
        """Replace the checkpoint by this one, in one rename."""
        write_tensors(self.state_path, tensors, {"progress": json.dumps(progress)})

    def load(self) -> tuple[dict[str, Tensor], dict] | None:
        """The last checkpoint, or None before the first."""
        if not self.state_path.is_file():
            return None
        try:
            with safe_open(self.state_path, "pt") as file:
                progress = json.loads(file.metadata()["progress"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"{self.state_path} is damaged: {error}") from error
        self.read_log()  # fails here where it is damaged, not after training
        return tensors, progress

    def log(self, entry: dict) -> None:
        """Append one line to log.jsonl."""
        with open(self.directory / "log.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    def read_log(self) -> list[dict]:
        """All whole lines of log.jsonl; a kill may have cut the last one short."""
        path = self.directory / "log.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
        try:
            return [json.loads(line) for line in lines if line.endswith("\n")]
        except ValueError as error:
            raise UserError(f"{path} is damaged: {error}") from error

    def rewind_log(self, step: int) -> None:
        """Drop the lines of steps that a resumed run is going to do again."""
        kept = [json.dumps(entry) + "\n" for entry in self.read_log() if entry["step"] <= step]
        write_atomically(self.directory / "log.jsonl", "".join(kept).encode())

    def finish(self, metrics: dict) -> None:
        """Mark the run as finished."""
        write_json(self.directory / "metrics.json", metrics)
        self.clean_up()

    def clean_up(self) -> None:
        """Remove what only a run that goes on needs."""
        shutil.rmtree(self.state_path.parent, ignore_errors=True)
        self.lock_path.unlink(missing_ok=True)


def write_atomically(path: Path, content: bytes) -> None:
    """Temporary file, fsync, rename: `path` holds the old content or all of the new."""
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(content)
    _publish(partial, path)


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """A safetensors file (github.com/huggingface/safetensors, "Format"), atomically, from any device.

    The library's `save` puts the whole file together in memory, as large again as all tensors, and
    its `save_file` writes under a name of its own choice that a kill leaves behind.
    """
    header, offset = {"__metadata__": metadata}, 0
    # The widest numbers first, so that all of them begin at a multiple of their size.
    ordered = dict(sorted(tensors.items(), key=lambda item: -item[1].element_size()))
    for name, tensor in ordered.items():
        place = [offset, offset := offset + tensor.nbytes]
        header[name] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": place,
        }
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
