"""Nothing is lost: kill -9 at any moment, Ctrl-C, a NaN. Real processes, real signals."""

import json
import math
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from minitune.support.runtime import multiplies_bf16

ROOT = Path(__file__).parents[1]
STEPS = 24


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    """A small text with something to learn in it."""
    names, verbs = (
        ["a dog", "the cat", "my aunt", "one critic"],
        ["saw", "loved", "left", "praised"],
    )
    rng = random.Random(0)
    lines = [
        f"{rng.choice(names)} {rng.choice(verbs)} the film number {i}, and {rng.choice(names)} did not."
        for i in range(400)
    ]
    path = tmp_path_factory.mktemp("text") / "films.txt"
    path.write_text("\n".join(lines))
    return path


def command(text: Path, out: Path, *options: str) -> list[str]:
    return [
        *("train.py", "--data", str(text), "--out", str(out), "--vocab-size", "200"),
        *("--steps", str(STEPS), "--batch-tokens", "256", "--max-len", "32", *options),
    ]


def train(text: Path, out: Path, *options: str) -> subprocess.CompletedProcess:
    process = [sys.executable, *command(text, out, *options)]
    return subprocess.run(process, cwd=ROOT, capture_output=True, text=True)


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "model.safetensors")


def steps_logged(out: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (out / "log.jsonl").read_text().splitlines()]


def assert_same_bits(one: Path, other: Path) -> None:
    a, b = weights(one), weights(other)
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


EMULATED = pytest.mark.skipif(
    not multiplies_bf16(torch.device("cpu")),
    reason="a step takes seconds where bf16 products are emulated",
)


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=EMULATED)])
def test_killed_at_random_moments_it_ends_with_the_same_bits(text, tmp_path, precision):
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    options = ("--precision", precision)
    assert train(text, undisturbed, *options).returncode == 0

    rng, kills = random.Random(precision), 0
    # A checkpoint after every step, so that many of the kills fall into the middle of one.
    again = command(text, killed, *options, "--save-minutes", "1e-9", "--resume")
    while not (killed / "metrics.json").exists():
        process = start(again)
        wait_for_line(
            process, b"to beat"
        )  # the next thing is training; a kill before it proves little
        try:
            process.wait(timeout=rng.uniform(0.1, 2.5) + kills / 10)  # ends on a slow machine, too
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills += 1
    assert kills >= 3
    assert (
        train(text, killed, "--resume").returncode == 0
    )  # the last kill may have hit the clean-up
    assert_same_bits(undisturbed, killed)
    assert steps_logged(killed) == steps_logged(undisturbed)  # no step twice, none missing
    assert not (killed / "resume").exists()


def start(arguments: list[str]) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, *arguments], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )


def wait_for_line(process: subprocess.Popen, words: bytes) -> None:
    for line in process.stdout:
        if words in line:
            return


def wait_for_log(out: Path, process: subprocess.Popen) -> None:
    """Until a step has been logged."""
    log = out / "log.jsonl"
    while not (log.exists() and log.stat().st_size) and process.poll() is None:
        time.sleep(0.01)


def test_ctrl_c_saves_and_exits_with_130(text, tmp_path):
    undisturbed, stopped = tmp_path / "undisturbed", tmp_path / "stopped"
    assert train(text, undisturbed).returncode == 0
    process = start(command(text, stopped))
    wait_for_log(stopped, process)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate()
    assert process.returncode == 130
    step = int(
        re.search(rb"saved at step (\d+); the same command with --resume continues", output)[1]
    )
    assert step > 0 and not (stopped / "metrics.json").exists()
    resumed = train(text, stopped, "--resume")
    assert resumed.returncode == 0 and f"resumed at step {step} of {STEPS}" in resumed.stdout
    assert_same_bits(undisturbed, stopped)


@pytest.mark.parametrize("steps", ["1", "24"])  # 1: the weights are ruined by the last step
def test_a_nan_stops_the_run_and_keeps_the_last_good_checkpoint(text, tmp_path, steps):
    options = ("--optimizer", "adamw", "--precision", "fp32", "--save-minutes", "1e-9")
    result = train(text, tmp_path / "run", *options, "--lr", "1e38", "--steps", steps)
    assert result.returncode == 2
    [line] = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert ("nan" in line or "inf" in line) and "checkpoint" in line and "--lr" in line
    assert "Traceback" not in result.stderr
    state = load_file(tmp_path / "run" / "resume" / "state.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in state.values())
    # The way out that the message names.
    result = train(text, tmp_path / "run", "--resume", "--lr", "1e-3", "--steps", steps)
    assert result.returncode == 0, result.stderr


def test_resuming_a_finished_run_changes_nothing(text, tmp_path):
    out = tmp_path / "run"
    assert train(text, out, "--steps", "2").returncode == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert train(text, out, "--resume", "--steps", "2").returncode == 0
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_minutes_fix_the_number_of_steps_from_the_measured_speed(text, tmp_path):
    started = time.monotonic()
    result = train(text, tmp_path / "run", "--steps", "1")
    assert result.returncode == 0
    overhead = time.monotonic() - started
    options = command(text, tmp_path / "timed")
    untimed = [option for option in options if option not in ("--steps", str(STEPS))]
    timed = [sys.executable, *untimed, "--minutes", str((overhead + 10) / 60)]
    assert subprocess.run(timed, cwd=ROOT).returncode == 0
    metrics = json.loads((tmp_path / "timed" / "metrics.json").read_text())
    assert 1 < metrics["steps"] < 10_000


def distributed(text: Path, out: Path, *options: str) -> subprocess.CompletedProcess:
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
    ]
    process = [*launch, *command(text, out, *options)]
    return subprocess.run(process, cwd=ROOT, capture_output=True, text=True)


def losses(out: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (out / "log.jsonl").read_text().splitlines()]


def test_two_processes_follow_the_loss_curve_of_one(text, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    options = ("--precision", "fp32")
    assert train(text, one, *options).returncode == 0
    result = distributed(text, two, *options)
    assert result.returncode == 0, result.stderr
    assert steps_logged(two) == steps_logged(one)  # one writer: every line once
    assert losses(two) == pytest.approx(losses(one), rel=1e-3)
    final = [json.loads((out / "metrics.json").read_text()) for out in (one, two)]
    assert final[1]["loss"] == pytest.approx(final[0]["loss"], rel=1e-3)
    assert math.isfinite(final[1]["loss"])


def test_two_processes_resume(text, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    assert distributed(text, one, "--precision", "fp32").returncode == 0
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
    ]
    more = ("--precision", "fp32", "--save-minutes", "1e-9")  # a checkpoint after every step
    process = start([*launch[1:], *command(text, two, *more)])
    wait_for_log(two, process)
    process.send_signal(signal.SIGTERM)
    process.wait()
    assert not (two / "metrics.json").exists()
    result = distributed(text, two, "--precision", "fp32", "--resume")
    assert result.returncode == 0, result.stderr
    assert int(re.search(r"resumed at step (\d+) of", result.stdout)[1]) > 0
    assert_same_bits(one, two)
