"""train.py as a whole: kills, Ctrl-C and a NaN lose nothing, and options do what they say."""

import contextlib
import json
import math
import multiprocessing
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file

import minitune.corpus
import train
from minitune.model import PRESETS, BertConfig
from minitune.optimizer import one_cycle
from minitune.pretraining import MaskedBatch
from minitune.support import runs
from minitune.support.cli import run_script
from minitune.support.runs import Run
from minitune.support.runtime import multiplies_bf16
from minitune.training import Trainer

ROOT = Path(__file__).parents[1]
STEPS = 24
SMALL = BertConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    """A small text with something to learn in it."""
    names, verbs = (
        ["a dog", "the cat", "my aunt", "one critic"],
        ["saw", "loved", "left", "praised"],
    )
    rng = random.Random(0)
    lines = [
        f"{rng.choice(names)} {rng.choice(verbs)} film number {i}, and {rng.choice(names)} did not."
        for i in range(400)
    ]
    path = tmp_path_factory.mktemp("text") / "films.txt"
    path.write_text("\n".join(lines))
    return path


def command(text: Path, out: Path, *options: object) -> list[str]:
    words = ["--data", text, "--out", out, "--vocab-size", 200, "--steps", STEPS]
    words += ["--batch-tokens", 256, "--max-len", 32, "--precision", "fp32", *options]
    return [str(word) for word in words]


def run(words: list[str], processor_seconds: float = 0) -> None:
    """`train.py WORDS` with a small model, killed after so many seconds of training; ends by exit().

    Seconds of the processor, not of the clock, so that a busy machine kills at the same moments.
    """
    whole = Trainer.train

    def train_limited(trainer: Trainer) -> dict:
        print(f"before training: {time.process_time()}", file=sys.stderr)
        # Nothing handles SIGPROF: the system ends the process there and then, as with kill -9.
        signal.setitimer(signal.ITIMER_PROF, processor_seconds)
        return whole(trainer)

    torch.set_num_threads(1)
    cache, dropout = Path(words[1]).parent / "cache", float(os.environ.get("DROPOUT", 0.3))
    with (
        mock.patch.object(sys, "argv", ["train.py", *words]),
        mock.patch.object(minitune.corpus, "CACHE", cache),
        mock.patch.object(Trainer, "train", train_limited if processor_seconds else whole),
        mock.patch.dict(PRESETS, tiny=replace(SMALL, hidden_dropout_prob=dropout)),
    ):
        run_script(train.main)


def train_here(*words: object) -> int:
    """The exit status of `train.py WORDS` in this process."""
    with pytest.raises(SystemExit) as ended:
        run(command(*words))
    return ended.value.code


# Processes come from a server that has imported everything once: importing torch takes longer than
# what is tested here.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["torch", "tests.test_resume", "minitune.support.plots"])


def start_apart(words: list[str], notes: Path, seconds: float = 0, **environment: object):
    """`train.py WORDS` in a process of its own, which writes to `notes`."""
    process = SERVER.Process(target=run_apart, args=(words, notes, seconds, environment))
    process.start()
    return process


def run_apart(words: list[str], notes: Path, seconds: float, environment: dict) -> None:
    os.environ.update({name: str(value) for name, value in environment.items()})
    with (
        open(notes, "a") as file,
        contextlib.redirect_stdout(file),
        contextlib.redirect_stderr(file),
    ):
        try:
            if "INTERRUPT" in environment:
                interrupt_at_first_log()
            run(words, seconds)
        finally:
            print(f"after training: {time.process_time()}")


def interrupt_at_first_log() -> None:
    """Send this process Ctrl-C when the first steps are logged."""
    write_line = Run.log

    def log_and_interrupt(run: Run, entry: dict) -> None:
        write_line(run, entry)
        Run.log = write_line
        os.kill(os.getpid(), signal.SIGINT)

    Run.log = log_and_interrupt


def log(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def steps_logged(out: Path) -> list[int]:
    return [entry["step"] for entry in log(out)]


def metrics(out: Path) -> dict:
    return json.loads((out / "metrics.json").read_text())


def assert_same_bits(one: Path, other: Path) -> None:
    a, b = (load_file(out / "model.safetensors") for out in (one, other))
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


@pytest.fixture(scope="module")
def undisturbed(text, tmp_path_factory) -> Path:
    """OUT of a run that nothing disturbed."""
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    assert train_here(text, out) == 0
    return out


EMULATED = pytest.mark.skipif(
    not multiplies_bf16(torch.device("cpu")),
    reason="a step takes seconds where bf16 multiplication is emulated",
)


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=EMULATED)])
def test_killed_at_random_moments_it_ends_with_the_same_bits(text, tmp_path, precision):
    whole, killed, notes = tmp_path / "whole", tmp_path / "killed", tmp_path / "notes"
    process = start_apart(command(text, whole, "--precision", precision), notes, 1000)
    process.join()
    assert process.exitcode == 0, notes.read_text()
    before, after = re.findall(r"(?:before|after) training: ([\d.]+)", notes.read_text())
    seconds = float(after) - float(before)

    rng, kills = random.Random(precision), 0
    # A checkpoint after every step, so that many of the kills fall into the middle of one.
    again = ["--precision", precision, "--save-minutes", "1e-9", "--resume"]
    while not (killed / "metrics.json").exists():
        # Later and later: it gets to its end, though it may by now be slower than it was.
        limit = rng.uniform(0.1, 0.5) * seconds * (1 + kills / 2)
        process = start_apart(command(text, killed, *again), notes, limit)
        process.join()
        assert process.exitcode in (0, -signal.SIGPROF), notes.read_text()
        kills += process.exitcode != 0
        assert kills < 100, "it makes no progress"
    assert kills >= 2, "it is killed too late to prove anything"
    assert "resumed at step" in notes.read_text()
    assert train_here(text, killed, *again) == 0  # the last kill may have hit the clean-up
    assert_same_bits(whole, killed)
    assert steps_logged(killed) == steps_logged(whole)  # no step twice, none missing
    assert not (killed / "resume").exists()


def test_ctrl_c_saves_and_exits_with_130(text, undisturbed, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Run, "log", Run.log)  # as it was, after the test
    interrupt_at_first_log()
    assert train_here(text, tmp_path) == 130
    message = r"saved at step (\d+); the same command with --resume continues"
    step = int(re.search(message, capsys.readouterr().out)[1])
    assert step == log(tmp_path)[-1]["step"] and not (tmp_path / "metrics.json").exists()
    assert train_here(text, tmp_path, "--resume") == 0
    assert f"resumed at step {step} of {STEPS}" in capsys.readouterr().out
    assert_same_bits(undisturbed, tmp_path)


@pytest.mark.parametrize("steps", [1, 24])  # 1: the weights are ruined by the last step
def test_a_nan_stops_the_run_and_keeps_the_last_good_checkpoint(text, tmp_path, steps, capsys):
    options = text, tmp_path, "--optimizer", "adamw", "--steps", steps
    assert train_here(*options, "--lr", "1e38", "--save-minutes", "1e-9") == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and ("nan" in line or "inf" in line)
    assert str(tmp_path / "resume") in line and "--resume with a lower --lr" in line
    state = load_file(tmp_path / "resume" / "state.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in state.values())
    assert train_here(*options, "--resume", "--lr", "1e-3") == 0  # as the message says


def test_resuming_a_finished_run_changes_nothing(text, undisturbed):
    before = {path.name: path.read_bytes() for path in undisturbed.iterdir()}
    assert train_here(text, undisturbed, "--resume") == 0
    assert {path.name: path.read_bytes() for path in undisturbed.iterdir()} == before


def test_the_checkpoint_stays_until_the_metrics_are_there(tmp_path, monkeypatch):
    run, written = Run(tmp_path), []
    run.start({})
    run.save({"x": torch.ones(1)})

    def write_json(path, value):
        written.append(path.name)
        assert run.state_path.is_file()

    monkeypatch.setattr(runs, "write_json", write_json)
    run.finish({"loss": 1.0})
    assert written == ["metrics.json"] and not run.state_path.exists()


def test_a_reader_that_leaves_does_not_end_a_training(text, tmp_path):
    code = "import sys, tests.test_resume as t; t.run(sys.argv[1:])"
    words = command(text, tmp_path, "--steps", 3)
    process = subprocess.Popen(
        [sys.executable, "-c", code, *words],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout.readline() == b"model: tiny, from random weights\n"
    process.stdout.close()  # as `| head -1` does
    assert process.stderr.read() == b"" and process.wait() == 0
    assert metrics(tmp_path)["steps"] == 3 and (tmp_path / "model.safetensors").is_file()


# Options


def test_too_little_time_is_a_warning_in_the_last_line_too(text, tmp_path, capsys):
    words = command(text, tmp_path, "--minutes", "1e-9")
    place = words.index("--steps")
    del words[place : place + 2]
    with pytest.raises(SystemExit) as ended:
        run(words)
    lines = capsys.readouterr().out.splitlines()
    assert ended.value.code == 0 and metrics(tmp_path)["steps"] == 1
    assert lines.count(lines[-1]) == 2 and lines[-1].startswith("warning: so few steps")
    assert "--minutes" in lines[-1]
    [said] = re.findall(r"1 of ([\d,]+) validation batches is read", "\n".join(lines))
    assert metrics(tmp_path)["validation_every"] == int(said.replace(",", "")) > 1


def test_weight_decay_shrinks_what_has_no_gradient_by_the_rate_of_each_step(text, tmp_path):
    for decay in ("0", "0.5"):
        assert train_here(text, tmp_path / decay, "--weight-decay", decay) == 0
    # No sequence is as long as these positions.
    name = "bert.embeddings.position_embeddings.weight"
    kept, shrunk = (load_file(tmp_path / x / "model.safetensors")[name][32:] for x in ("0", "0.5"))
    factor = math.prod(1 - 1e-3 * one_cycle(step, STEPS) * 0.5 for step in range(STEPS))
    assert factor < 0.995
    torch.testing.assert_close(shrunk, factor * kept, rtol=1e-5, atol=0)


def test_accumulate_computes_a_batch_in_parts(text, tmp_path, monkeypatch):
    split, parts = MaskedBatch.split, []

    def count(batch, at_most):
        shares = split(batch, at_most)
        parts.append(len(shares))
        return shares

    monkeypatch.setattr(MaskedBatch, "split", count)
    assert train_here(text, tmp_path, "--accumulate", 3, "--steps", 4) == 0
    assert parts == [3] * 4


def test_threads_are_those_of_the_option_and_are_saved(text, tmp_path):
    try:
        assert train_here(text, tmp_path, "--steps", 2, "--threads", 2) == 0
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    settings = json.loads((tmp_path / "settings.json").read_text())
    assert settings["threads"] == metrics(tmp_path)["threads"] == 2


# Two processes


def two_processes(words: list[str], notes: Path, **environment: object) -> list[int]:
    """Exit codes of `torchrun --nproc-per-node 2 train.py WORDS`, in the environment it makes."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": 2, "MASTER_ADDR": "localhost", "MASTER_PORT": port, **environment}
    processes = [start_apart(words, notes, RANK=rank, LOCAL_RANK=rank, **shared) for rank in (0, 1)]
    for process in processes:
        process.join()
    return [process.exitcode for process in processes]


def test_two_processes_do_what_one_does_and_resume_to_the_same_bits(text, tmp_path, monkeypatch):
    monkeypatch.setenv("DROPOUT", "0")  # which is another in each process
    one, two, resumed = tmp_path / "one", tmp_path / "two", tmp_path / "resumed"
    notes, environment = tmp_path / "notes", {"DROPOUT": 0}
    assert train_here(text, one) == 0
    assert two_processes(command(text, two), notes, **environment) == [0, 0], notes.read_text()
    assert steps_logged(two) == steps_logged(one)  # one writer: every line once
    for key in ("loss", "gradient_norm"):
        values = [[entry[key] for entry in log(out)] for out in (two, one)]
        assert values[0] == pytest.approx(values[1], rel=1e-3)
    assert metrics(two)["loss"] == pytest.approx(metrics(one)["loss"], rel=1e-3)

    interrupted = two_processes(command(text, resumed), notes, INTERRUPT=1, **environment)
    assert interrupted == [130, 130] and not (resumed / "metrics.json").exists()
    words = command(text, resumed, "--resume")
    assert two_processes(words, notes, **environment) == [0, 0], notes.read_text()
    assert "resumed at step" in notes.read_text()
    assert_same_bits(two, resumed)
