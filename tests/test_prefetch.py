"""What is only for a GPU, tried on a CPU: batches prepared ahead, steps that wait for nothing."""

import dataclasses
import math
import os
import signal
import threading
from itertools import count

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from minitune.fast.prefetch import prefetch
from minitune.support.errors import UserError
from minitune.support.runtime import Runtime
from minitune.training import LOG_EVERY, Trainer
from tests.test_training import FP32, Toy, bits, toy_trainer


def test_items_keep_their_order_and_come_to_an_end():
    assert list(prefetch(iter(range(5)))) == [0, 1, 2, 3, 4]
    assert list(prefetch(iter([]))) == []


def test_the_next_item_is_computed_while_one_is_used():
    second = threading.Event()

    def items():
        yield "first"
        second.set()
        yield "second"

    ahead = prefetch(items())
    assert next(ahead) == "first"
    assert second.wait(60)  # nobody has asked for it
    assert next(ahead) == "second"


def test_an_error_comes_in_the_place_of_its_item():
    def items():
        yield from (1, 2)
        raise UserError("a file is damaged")

    ahead = prefetch(items())
    assert [next(ahead), next(ahead)] == [1, 2]
    with pytest.raises(UserError, match="a file is damaged"):
        next(ahead)


def test_an_iterator_that_is_dropped_ends_its_thread():
    before = threading.active_count()
    ahead = prefetch(count())
    assert next(ahead) == 0 and threading.active_count() == before + 1
    del ahead
    assert threading.active_count() == before


def test_ctrl_c_ends_the_wait_for_a_slow_item():
    before, never = threading.active_count(), threading.Event()

    def items():
        yield "first"
        os.kill(os.getpid(), signal.SIGINT)
        never.wait(60)

    def interrupt(number, frame):
        never.set()
        raise KeyboardInterrupt

    handler = signal.signal(signal.SIGINT, interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            list(prefetch(items()))
    finally:
        signal.signal(signal.SIGINT, handler)
    assert threading.active_count() == before


@pytest.mark.parametrize(("device", "elsewhere"), [("cpu", False), ("cuda", True)])
def test_for_a_gpu_alone_batches_are_prepared_in_a_thread(device, elsewhere):
    threads, rows = [], next(Toy().batches(0))

    def batches():
        threads.append(threading.current_thread())
        yield rows

    runtime = dataclasses.replace(FP32, device=torch.device(device))
    [(batch, parts)] = runtime.shares(batches(), 4)
    assert batch is rows and len(parts) == 4
    assert (threads != [threading.current_thread()]) == elsewhere


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Batches come from a thread, and `look_every` is what it is there."""
    shares, start = Runtime.shares, Trainer.__init__

    def start_on_a_gpu(trainer, *args, **options):
        start(trainer, *args, **options)
        trainer.look_every = LOG_EVERY

    monkeypatch.setattr(Runtime, "shares", lambda *args: prefetch(shares(*args)))
    monkeypatch.setattr(Trainer, "__init__", start_on_a_gpu)


def trained(directory, steps: int = 24, **options) -> Trainer:
    trainer = toy_trainer(directory, **options)
    trainer.steps = steps
    trainer.train()
    return trainer


def test_as_on_a_gpu_a_run_has_the_same_bits_and_log(tmp_path, request):
    here = trained(tmp_path / "here", accumulate=3)
    request.getfixturevalue("as_on_a_gpu")
    there = trained(tmp_path / "there", accumulate=3)
    assert bits(there) == bits(here)
    assert [e | {"seconds": 0} for e in there.run.read_log()] == [
        e | {"seconds": 0} for e in here.run.read_log()
    ]


def test_as_on_a_gpu_ctrl_c_saves_at_the_next_look_and_resumes_to_the_same_bits(
    tmp_path, as_on_a_gpu
):
    whole = trained(tmp_path / "whole")
    trainer, loss = toy_trainer(tmp_path / "parts"), whole.task.loss

    def interrupted(model, x, y):
        if trainer.step == 3:
            signal.raise_signal(signal.SIGINT)
        return loss(model, x, y)

    trainer.task.loss, trainer.steps = interrupted, 24
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    resumed = toy_trainer(tmp_path / "parts")
    resumed.restore(trainer.run.load())
    assert resumed.step == LOG_EVERY - 1 and resumed.steps == 24
    resumed.train()
    assert bits(resumed) == bits(whole)


@pytest.mark.parametrize("where", ["loss", "gradient", "loss once"])
def test_as_on_a_gpu_no_checkpoint_or_log_has_a_nan(tmp_path, as_on_a_gpu, where):
    trainer = toy_trainer(tmp_path, save_minutes=1e-9)
    loss = trainer.task.loss

    def spoilt(model, x, y):
        value, _ = loss(model, x, y)
        if trainer.step == 13:
            zero = (model.bias - model.bias).sum()
            if where == "loss once":  # which leaves the weights as they are
                return value, value * math.nan
            value = value + (zero.log() * zero if where == "loss" else zero.sqrt())
        return value, value

    trainer.task.loss, trainer.steps = spoilt, 40
    with pytest.raises(UserError, match=r"nan at step \d+; the last good checkpoint"):
        trainer.train()
    assert trainer.step < 20
    state = trainer.run.load()
    assert state["numbers/step"] == LOG_EVERY - 1
    assert all(tensor.isfinite().all() for tensor in state.values())
    assert all(entry["step"] <= 13 for entry in trainer.run.read_log())


def test_as_on_a_gpu_steps_between_looks_read_no_number(tmp_path, as_on_a_gpu):
    trainer, read = toy_trainer(tmp_path), set()
    trainer.task.evaluation_due = lambda step, steps: False
    trainer.steps = 3 * LOG_EVERY

    class Reads(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.aten._local_scalar_dense.default:
                read.add(trainer.step)
            return function(*args, **(kwargs or {}))

    with Reads():
        trainer.train()
    assert read and all(step % LOG_EVERY in (LOG_EVERY - 1, 0) for step in read), read
