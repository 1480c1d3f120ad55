"""A run's directory: locked, left alone where it is refused; a kill loses nothing."""

import contextlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from minitune.support.errors import UserError
from minitune.support.runs import (
    Run,
    refuse_foreign_files,
    write_atomically,
    write_json,
    write_tensors,
)

ROOT = Path(__file__).parents[1]


def open_run(directory, resume=False, overwrite=False):
    return Run.open(directory, resume, overwrite, mark="corpus")


def contents(directory):
    return {path: path.read_bytes() if path.is_file() else None for path in directory.rglob("*")}


def finished(directory):
    """A finished run of a script that leaves a model, with a file of the user's beside it."""
    with open_run(directory) as run:
        run.start({"corpus": "old"})
        run.log(entry(1))
        run.save({"x": torch.ones(1)})
        write_tensors(directory / "model.safetensors", {"x": torch.ones(1)}, {})
        run.finish({"loss": 1.0})
    (directory / "notes.txt").write_text("the user's")
    return directory


# Who may use a directory


def test_a_second_run_in_a_directory_is_refused_before_it_looks(tmp_path):
    """The first has written nothing yet: it may be tokenising for an hour."""
    with open_run(tmp_path / "run"), pytest.raises(UserError, match="another process"):  # noqa: SIM117
        with open_run(tmp_path / "run"):
            pass
    with open_run(tmp_path / "run"):
        pass


def test_a_live_run_cannot_be_resumed_or_overwritten(tmp_path):
    with open_run(tmp_path) as run:
        run.start({"corpus": "x"})
        before = contents(tmp_path)
        for options in ({"resume": True}, {"overwrite": True}, {}):
            with pytest.raises(UserError, match="another process"), open_run(tmp_path, **options):
                pass
        assert contents(tmp_path) == before


HOLD = """
import sys, pathlib
from minitune.support.runs import Run
from minitune.support.errors import UserError
try:
    with Run.open(pathlib.Path(sys.argv[1]), False, False, mark="corpus") as run:
        print("opened", flush=True)
        if sys.stdin.readline():
            run.start({"corpus": "x"})
except UserError as error:
    print(error, flush=True)
"""


def process_that_holds(directory):
    """A process that opens a run, says so or why not, and starts it after a line on its stdin."""
    command = [sys.executable, "-c", HOLD, str(directory)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    return subprocess.Popen(command, cwd=ROOT, text=True, **pipes)


def test_of_two_processes_that_race_one_trains_and_the_other_is_told(tmp_path):
    racers = [process_that_holds(tmp_path / "run") for _ in range(2)]
    lines = [racer.stdout.readline() for racer in racers]
    for racer in racers:
        with contextlib.suppress(BrokenPipeError):  # the refused one has ended
            racer.communicate("start\n")
    assert sorted("another process" in line for line in lines) == [False, True]
    assert sorted(line == "opened\n" for line in lines) == [False, True]
    assert json.loads((tmp_path / "run" / "settings.json").read_text()) == {"corpus": "x"}


def test_the_lock_goes_with_a_killed_process(tmp_path):
    process = process_that_holds(tmp_path / "run")
    assert process.stdout.readline() == "opened\n"
    with pytest.raises(UserError, match="another process"), open_run(tmp_path / "run"):
        pass
    process.kill()
    process.communicate()
    with open_run(tmp_path / "run") as run:
        run.start({"corpus": "x"})


def test_of_several_processes_of_one_run_only_the_main_one_locks(tmp_path, monkeypatch):
    with open_run(tmp_path):
        monkeypatch.setenv("RANK", "1")
        with open_run(tmp_path):
            pass
        monkeypatch.setenv("RANK", "0")
        with pytest.raises(UserError, match="another process"), open_run(tmp_path):
            pass


def test_a_file_system_without_locks_is_used_without(tmp_path, monkeypatch):
    def no_locks(*arguments):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", no_locks)
    with open_run(tmp_path / "run") as run:
        run.start({"corpus": "x"})


@pytest.mark.parametrize("error", [None, UserError, KeyboardInterrupt])
def test_what_was_created_for_a_run_that_does_not_start_is_removed(tmp_path, error):
    """As after `--data missing.csv`, or Ctrl-C while a corpus is tokenised."""
    kept = tmp_path / "kept"
    kept.mkdir()
    with contextlib.suppress(*[error] if error else []), open_run(kept / "a" / "b"):
        assert (kept / "a" / "b").is_dir()
        if error:
            raise error
    assert list(tmp_path.rglob("*")) == [kept]


def test_a_run_that_starts_is_kept(tmp_path):
    with pytest.raises(KeyboardInterrupt), open_run(tmp_path / "a" / "b") as run:
        run.start({"corpus": "x"})
        raise KeyboardInterrupt
    with open_run(tmp_path / "a" / "b", resume=True) as run:
        assert run.settings == {"corpus": "x"} and not run.is_finished


def test_runs_inside_runs_that_a_kill_left_empty_can_be_used(tmp_path):
    """finetune.py --seeds 2, killed before its first step."""
    (tmp_path / "full" / "seed-1" / "resume").mkdir(parents=True)
    (tmp_path / "full" / "settings.json.partial").mkdir()
    (tmp_path / "full" / "settings.json.partial" / "settings.json").write_text("{")
    with open_run(tmp_path / "full") as run:
        run.start({"corpus": "x"})


STRANGE = {
    "a text": lambda out: (out / "chapter1.tex").write_text("Years of work."),
    "a text deep below": lambda out: [
        (out / "a" / "b").mkdir(parents=True),
        (out / "a" / "b" / "chapter1.tex").write_text("Years of work."),
    ],
    "a file named as a lock": lambda out: (out / "run.lock").write_text("mine"),
    "a link named as a lock": lambda out: (out / "run.lock").symlink_to(out.parent / "precious"),
    "a run of another script": lambda out: write_json(out / "settings.json", {"job": {}}),
    "a damaged run": lambda out: (out / "settings.json").write_text("{"),
}


@pytest.mark.parametrize("case", STRANGE)
@pytest.mark.parametrize("options", [{}, {"resume": True}, {"overwrite": True}])
def test_a_directory_that_holds_something_else_is_refused_and_left_alone(tmp_path, case, options):
    (tmp_path / "precious").write_text("the user's")
    (tmp_path / "out").mkdir()
    STRANGE[case](tmp_path / "out")
    before = contents(tmp_path)
    with (
        pytest.raises(UserError, match=str(tmp_path / "out")),
        open_run(tmp_path / "out", **options),
    ):
        pass
    assert contents(tmp_path) == before


@pytest.mark.parametrize("options", [{}, {"resume": True, "overwrite": True}])
def test_a_run_is_refused_with_the_ways_out(tmp_path, options):
    before = contents(finished(tmp_path / "out"))
    with (
        pytest.raises(UserError, match="--resume.*--overwrite"),
        open_run(tmp_path / "out", **options),
    ):
        pass
    assert contents(tmp_path / "out") == before


def test_overwriting_removes_the_old_run_when_the_new_one_starts_and_nothing_else(tmp_path):
    out = finished(tmp_path / "out")
    (out / "run.lock").write_text("the user's too")
    before = contents(out)
    with open_run(out, overwrite=True) as run:
        assert contents(out) == before  # it may yet fail: no such file, no memory
        assert run.settings == {} and not run.is_finished and run.load() is None
        run.start({"corpus": "new"})
        names = {path.name: path.read_text() for path in out.iterdir() if path.is_file()}
        assert names.pop("notes.txt") == "the user's"
        assert names.pop("run.lock") == "the user's too"
        assert {name: json.loads(text) for name, text in names.items()} == {
            "settings.json": {"corpus": "new"}
        }
        run.log(entry(1))
    with open_run(out, resume=True) as run:  # a kill here leaves an unfinished run
        assert run.settings == {"corpus": "new"} and not run.is_finished


def test_an_unfinished_run_is_overwritten_from_its_beginning(tmp_path):
    with open_run(tmp_path) as run:
        run.start({"corpus": "old"})
        run.save({"x": torch.ones(1)})
    with open_run(tmp_path, overwrite=True) as run:
        run.start({"corpus": "new"})
        assert not run.state_path.exists()


def test_foreign_files_are_refused_by_name(tmp_path):
    (tmp_path / "table.json").touch()
    refuse_foreign_files(tmp_path, {"table.json"}, "result")
    refuse_foreign_files(tmp_path / "missing", set(), "result")
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(UserError, match="no result: thesis.tex"):
        refuse_foreign_files(tmp_path, {"table.json"}, "result")


# The log


def entry(step):
    return {"step": step, "loss": 6.5, "seconds": 0.5, "validation": {"loss": 6.6}}


def test_a_log_cut_short_by_a_kill_can_be_read(tmp_path):
    run = Run(tmp_path)
    for step in (1, 2, 3):
        run.log(entry(step))
    path = tmp_path / "log.jsonl"
    path.write_text(path.read_text()[:-4])
    assert run.read_log() == [entry(1), entry(2)]
    run.rewind_log(1)
    assert json.loads(path.read_text()) == entry(1)


BAD_LOG = ["[1]", "5", "null", "{}", "{", "[" * 100_000, "\xff", '{"step": 1}']
BAD_LOG += [json.dumps(entry(1) | {key: value}) for key, value in [
    ("step", "1"), ("step", None), ("step", True), ("loss", [6.5]), ("seconds", {}),
    ("validation", 5), ("validation", {"loss": "6.6"}), ("validation", {"loss": None}),
]]  # fmt: skip


@pytest.mark.parametrize("line", BAD_LOG)
def test_a_log_of_another_kind_is_refused_when_a_run_is_resumed(tmp_path, line):
    (tmp_path / "log.jsonl").write_bytes(
        f"{json.dumps(entry(1))}\n".encode() + line.encode("latin-1") + b"\n"
    )
    run = Run(tmp_path)
    run.state_path.parent.mkdir()
    run.save({"x": torch.ones(1)})
    with pytest.raises(UserError, match=r"log\.jsonl, line 2, is damaged"):
        run.load()


def test_a_log_without_end_is_refused(tmp_path):
    (tmp_path / "log.jsonl").touch()
    os.truncate(tmp_path / "log.jsonl", 1 << 40)
    with pytest.raises(UserError, match="log.jsonl has more than"):
        Run(tmp_path).read_log()


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_a_checkpoint_with_numbers_that_are_none_is_refused(tmp_path, number):
    """The best weights are not trained any more, so nothing else would notice."""
    run = Run(tmp_path)
    run.state_path.parent.mkdir()
    run.save({"numbers/step": torch.tensor(3.0), "best/x": torch.tensor([1.0, number, 2.0])})
    with pytest.raises(UserError, match="state.safetensors is damaged: best/x holds NaN"):
        run.load()


def test_a_checkpoint_that_is_no_file_is_refused_not_passed_over(tmp_path):
    run = Run(tmp_path)
    run.state_path.mkdir(parents=True)
    with pytest.raises(UserError, match="state.safetensors is damaged"):
        run.load()


# Files


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool]
)
def test_the_library_reads_what_was_written(tmp_path, dtype):
    path = tmp_path / "model.safetensors"
    matrix = (torch.arange(12).view(3, 4) % 2).to(dtype)
    tensors = {"b.odd": torch.ones(3, dtype=torch.uint8), "matrix": matrix, "turned": matrix.t()}
    tensors |= {"number": torch.tensor(1).to(dtype), "nothing": torch.empty(0, 4, dtype=dtype)}
    write_tensors(path, tensors, {"progress": '{"step": "ü"}'})
    found = load_file(path)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"progress": '{"step": "ü"}'}


def test_the_file_replaces_the_old_one_and_is_open_to_the_same_people_as_any_other(tmp_path):
    path, other = tmp_path / "model.safetensors", tmp_path / "config.json"
    path.write_bytes(b"old")
    write_tensors(path, {"x": torch.ones(2, requires_grad=True)}, {})
    write_atomically(other, b"{}")
    assert sorted(tmp_path.iterdir()) == sorted([path, other])
    assert path.stat().st_mode == other.stat().st_mode
    assert load_file(path)["x"].tolist() == [1, 1]


WRITERS = {
    "model.safetensors": lambda path: write_tensors(path, {"x": torch.ones(9)}, {"format": "pt"}),
    "config.json": lambda path: write_json(path, {"new": True}),
}


@pytest.mark.parametrize("name", WRITERS)
def test_new_content_is_on_disk_before_it_takes_the_place_of_the_old(tmp_path, monkeypatch, name):
    """Else a power failure after the rename leaves an empty file, and nothing of the old one."""
    path, synced, fsync, replace = tmp_path / name, [], os.fsync, os.replace
    path.write_bytes(b"old")

    def recording_fsync(descriptor):
        fsync(descriptor)
        synced.append((os.fstat(descriptor).st_ino, os.fstat(descriptor).st_size))

    def checking_replace(source, target):
        assert synced == [(os.stat(source).st_ino, os.stat(source).st_size)]
        assert path.read_bytes() == b"old" and path == Path(target)  # nothing was written in place
        replace(source, target)
        synced.append("replaced")

    monkeypatch.setattr(os, "fsync", recording_fsync)
    monkeypatch.setattr(os, "replace", checking_replace)
    WRITERS[name](path)
    assert synced[1:] == ["replaced"] and path.stat().st_ino == synced[0][0]


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("call", ["os.fsync", "os.replace", "pathlib.Path.mkdir"])
def test_a_full_disk_keeps_the_old_content_and_leaves_nothing(tmp_path, monkeypatch, name, call):
    (tmp_path / name).write_bytes(b"old")

    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(call, full)
    with pytest.raises(OSError, match="No space left"):
        WRITERS[name](tmp_path / name)
    monkeypatch.undo()
    assert contents(tmp_path) == {tmp_path / name: b"old"}


def test_an_error_of_the_library_while_writing_is_one_of_the_system(tmp_path, monkeypatch):
    """Which run_script prints in one line; a full disk is such an error."""

    def full(*arguments, **options):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("minitune.support.runs.save_file", full)
    with pytest.raises(OSError, match="model.safetensors cannot be written: .*No space left"):
        WRITERS["model.safetensors"](tmp_path / "model.safetensors")
    assert contents(tmp_path) == {}


KILLED = """
import os, pathlib, signal, sys, torch
from minitune.support import runs
os.fsync = lambda descriptor: os.kill(os.getpid(), signal.SIGKILL)
runs.write_tensors(pathlib.Path(sys.argv[1]), {"x": torch.zeros(9)}, {})
"""


def test_a_kill_while_writing_keeps_the_old_content_and_the_next_write_cleans_up(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"old")
    command = [sys.executable, "-c", KILLED, str(path)]
    assert subprocess.run(command, cwd=ROOT).returncode == -signal.SIGKILL
    assert path.read_bytes() == b"old"
    assert {left.name for left in tmp_path.iterdir()} == {path.name, f"{path.name}.partial"}
    write_tensors(path, {"x": torch.ones(9)}, {})
    assert load_file(path)["x"].sum() == 9 and list(tmp_path.iterdir()) == [path]


def test_a_checkpoint_is_removed_only_when_the_metrics_are_there(tmp_path, monkeypatch):
    run, removed, rmtree = Run(tmp_path), [], shutil.rmtree

    def checking_rmtree(path, **options):
        if path == run.state_path.parent:
            removed.append(json.loads((tmp_path / "metrics.json").read_text()))
        rmtree(path, **options)

    run.start({"corpus": "x"})
    run.save({"x": torch.ones(1)})
    monkeypatch.setattr(shutil, "rmtree", checking_rmtree)
    run.finish({"loss": 1.0})
    assert removed == [{"loss": 1.0}] and not run.state_path.parent.exists()


def test_parts_of_one_tensor_are_written_apart(tmp_path):
    """As query, key and value of a fused matrix."""
    fused = torch.arange(12.0).view(6, 2)
    write_tensors(tmp_path / "x", dict(zip("qkv", fused.chunk(3), strict=True)), {})
    found = load_file(tmp_path / "x")
    assert torch.equal(torch.cat([found[name] for name in "qkv"]), fused)
