"""The loop's parts: what is optimised how, what a batch in parts weighs, where training starts."""

import copy
import dataclasses
import itertools
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import minitune.support.plan
import minitune.training
from minitune.batching import PackedBatch
from minitune.initialization import start_with_frequencies, start_with_neighbours
from minitune.model import BertConfig, BertForMaskedLM
from minitune.optimizer import LRMultipliers, Muon, Optimizer, one_cycle
from minitune.pretraining import MaskedBatch, MaskedLanguageModelling
from minitune.support.errors import UserError
from minitune.support.plan import plan_steps
from minitune.support.runs import Run
from minitune.support.runtime import Runtime, multiplies_bf16
from minitune.training import Trainer

ROOT = Path(__file__).parents[1]
FP32 = Runtime.start("cpu", "fp32")
SPECIAL = torch.tensor([0, 1, 2, 3, 4])
CONFIG = BertConfig(
    vocab_size=90, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128
)


def small_model() -> BertForMaskedLM:
    torch.manual_seed(0)
    return BertForMaskedLM(CONFIG)


def some_batch(lengths=(5, 9, 30, 2, 17, 12)) -> MaskedBatch:
    generator = torch.Generator().manual_seed(1)
    batch = PackedBatch.from_sequences(
        [torch.randint(5, 90, (n,), generator=generator) for n in lengths]
    )
    # Crowded at one end: parts differ in how many blanks they have.
    positions = torch.cat([torch.arange(0, 14), torch.tensor([40, 73])])
    return MaskedBatch(batch, positions, batch.tokens[positions])


def trainer_for(model, tmp_path, accumulate=1) -> Trainer:
    task = object.__new__(MaskedLanguageModelling)  # without a corpus
    task.rate, task.summary_weight = 0.15, 1.0
    task.special_ids, task.pad = SPECIAL, 0
    optimizer = Optimizer(model, "muon", 0.01, 0.001, 0.01)
    run = Run(tmp_path)
    return Trainer(model, optimizer, task, run, FP32, seed=0, accumulate=accumulate)


def share_of(trainer: Trainer) -> tuple[MaskedBatch, list]:
    return next(trainer.runtime.shares(iter([some_batch()]), trainer.accumulate))


def gradients(accumulate: int, tmp_path) -> tuple[float, dict]:
    model = small_model()
    trainer = trainer_for(model, tmp_path, accumulate)
    loss, _ = trainer.backward(*share_of(trainer))
    return loss.item(), {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("accumulate", [2, 4, 50])
def test_a_batch_in_parts_gives_the_gradients_of_the_whole(tmp_path, accumulate):
    whole, in_parts = gradients(1, tmp_path), gradients(accumulate, tmp_path)
    assert in_parts[0] == pytest.approx(whole[0], abs=1e-6)
    for name, gradient in whole[1].items():
        if gradient is None:  # token types but the first, positions not reached: nothing flows
            assert in_parts[1][name] is None
        else:
            torch.testing.assert_close(in_parts[1][name], gradient, rtol=1e-4, atol=1e-6)


def test_muon_has_the_hidden_matrices_and_only_matrices_decay():
    model = small_model()
    muon, adamw = Optimizer(model, "muon", 0.01, 0.001, 0.01).parts
    names = {id(p): name for name, p in model.named_parameters()}
    assert {names[id(p)] for p in muon.param_groups[0]["params"]} == {
        f"bert.layers.{layer}.{matrix}.weight"
        for layer in range(2)
        for matrix in ("attention.qkv", "attention.out", "feed_forward.up", "feed_forward.down")
    }
    decayed = {
        names[id(p)]
        for group in adamw.param_groups
        if group["weight_decay"]
        for p in group["params"]
    }
    assert decayed == {
        "head.dense.weight",
        "bert.embeddings.word.weight",
        "bert.embeddings.position.weight",
        "bert.embeddings.token_type.weight",
    }
    free = [group for group in adamw.param_groups if not group["weight_decay"]]
    assert all(p.ndim == 1 for group in free for p in group["params"])
    assert {group["weight_decay"] for group in adamw.param_groups} == {0, 0.01}
    assert sum(len(g["params"]) for part in (muon, adamw) for g in part.param_groups) == len(names)


@pytest.mark.parametrize(("name", "adamw_lr"), [("muon", 0.001), ("adamw", 0.01)])
def test_embeddings_and_lower_layers_learn_at_rates_of_their_own(name, adamw_lr):
    sizes = {"hidden_size": 16, "num_hidden_layers": 4, "intermediate_size": 32}
    model = BertForMaskedLM(BertConfig(vocab_size=50, **sizes))
    *_, adamw = Optimizer(model, name, 0.01, 0.001, 0.01, LRMultipliers(5, 1 / 8)).parts
    names = {id(p): name for name, p in model.named_parameters()}
    rates = {
        names[id(p)]: group["peak_lr"] for group in adamw.param_groups for p in group["params"]
    }
    multiples = {
        "bert.embeddings.word.weight": 5,
        "bert.embeddings.position.weight": 5,
        "bert.embeddings.norm.weight": 1,
        "head.dense.weight": 1,
    }
    for layer, multiple in enumerate([1 / 8, 1 / 4, 1 / 2, 1]):
        multiples[f"bert.layers.{layer}.feed_forward_norm.weight"] = multiple
        multiples[f"bert.layers.{layer}.attention.qkv.bias"] = multiple
        if name == "adamw":
            multiples[f"bert.layers.{layer}.attention.qkv.weight"] = multiple
    for part, multiple in multiples.items():
        assert rates[part] == pytest.approx(multiple * adamw_lr), part


@pytest.mark.parametrize(("has_bf16", "tolerance"), [(True, 1e-2), (False, 5e-2)])
def test_muon_is_that_of_torch_whether_or_not_there_are_bf16_products(
    monkeypatch, has_bf16, tolerance
):
    monkeypatch.setattr("minitune.optimizer.multiplies_bf16", lambda device: has_bf16)
    generator = torch.Generator().manual_seed(0)
    shapes = [(24, 8), (8, 8), (8, 24), (24, 8), (8, 8)]
    start = [torch.randn(shape, generator=generator) for shape in shapes]
    ours, theirs = ([nn.Parameter(x.clone()) for x in start] for _ in range(2))
    optimizers = (
        Muon(ours, 0.1, 0.2),
        torch.optim.Muon(theirs, lr=0.1, weight_decay=0.2, ns_steps=4),
    )
    for _ in range(3):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn(p.shape, generator=generator)
            q.grad = p.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for p, q, x in zip(ours, theirs, start, strict=True):
        assert (p - q).norm() < tolerance * (q - x).norm()


def test_a_matrix_without_a_gradient_stays_as_it_is():
    still, moved = nn.Parameter(torch.ones(4, 4)), nn.Parameter(torch.ones(4, 4))
    moved.grad = torch.eye(4)
    Muon([still, moved], 0.1, 0.5).step()
    assert torch.equal(still, torch.ones(4, 4)) and not torch.equal(moved, torch.ones(4, 4))


def test_the_optimizer_goes_on_from_its_state(tmp_path):
    torch.manual_seed(0)
    model = small_model()
    trainer = trainer_for(model, tmp_path)
    trainer.steps = 4

    def step(trainer):
        _, norm = trainer.backward(*share_of(trainer))
        trainer.update(norm)
        trainer.step += 1

    step(trainer), step(trainer)
    twin = trainer_for(copy.deepcopy(model), tmp_path)
    for name, tensor in twin.optimizer.state().items():
        tensor.copy_(trainer.optimizer.state()[name])
    twin.step, twin.steps = 2, 4
    step(trainer), step(twin)
    for a, b in zip(trainer.model.parameters(), twin.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_schedule_rises_to_the_peak_and_ends_at_zero():
    factors = [one_cycle(step, 100) for step in range(101)]
    assert factors[4] == 1.0 and factors[0] == pytest.approx(0.2)
    assert factors[100] == 0.0 and 0 < factors[99] < 0.02
    assert factors[5:] == sorted(factors[5:], reverse=True)
    assert one_cycle(0, 1) == 1.0


def test_heads_start_by_attending_to_the_words_next_door():
    torch.manual_seed(0)
    config = BertConfig(num_hidden_layers=3)
    model = BertForMaskedLM(config)
    before = model.bert.layers[2].attention.qkv.weight.clone()
    start_with_neighbours(model.bert)
    batch = PackedBatch.from_sequences([torch.randint(5, config.vocab_size, (100,))])
    x = model.bert.embeddings(batch)[:100]
    q, k, _ = model.bert.layers[0].attention.qkv(x).view(100, 3, 4, 64).unbind(1)
    weights = torch.einsum("ihd,jhd->hij", q / 8, k).softmax(-1)
    for head, offset in enumerate([-1, 1, -2, 2]):
        mass = {o: weights[head].diagonal(o).mean().item() for o in range(-5, 6)}
        assert max(mass, key=mass.get) in (offset, offset - int(math.copysign(1, offset)))
        assert sum(m for o, m in mass.items() if o * offset > 0) > 0.4  # on its own side
    assert torch.equal(model.bert.layers[2].attention.qkv.weight, before)


def test_a_fresh_head_guesses_words_by_their_frequency():
    model = small_model()
    counts = torch.arange(90)
    start_with_frequencies(model.head, counts)
    smoothed = (counts + 1) / (counts + 1).sum()
    torch.testing.assert_close(model.head.bias.softmax(0), smoothed, rtol=1e-5, atol=1e-8)


def test_auto_precision_says_why_and_a_cpu_refuses_fp16():
    chosen = Runtime.start("cpu", "auto")
    assert chosen.precision == ("bf16" if multiplies_bf16(chosen.device) else "fp32")
    assert "bf16" in chosen.describe_precision()
    assert FP32.describe_precision() == "fp32 (--precision)"
    with pytest.raises(UserError, match="fp16"):
        Runtime.start("cpu", "fp16")


@pytest.mark.parametrize(
    ("name", "instructions", "faster"),
    [
        ("Intel Xeon", ["avx512_bf16", "amx_bf16"], True),
        ("Intel Xeon", ["avx512_bf16"], False),
        ("AMD EPYC", ["avx512_bf16"], True),
        ("AMD EPYC", ["avx2"], False),
    ],
)
def test_bf16_is_chosen_only_where_the_processor_is_faster_with_it(
    monkeypatch, name, instructions, faster
):
    abilities = {"cpu_name": name} | dict.fromkeys(instructions, True)
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: abilities)
    assert multiplies_bf16.__wrapped__(torch.device("cpu")) == faster


@pytest.mark.parametrize("name", ["fp32", "bf16"])
def test_frozen_maps_give_the_numbers_that_autocast_gives(name):
    model, masked, runtime = small_model(), some_batch(), Runtime.start("cpu", name)
    for parameter in model.bert.layers[0].parameters():
        parameter.requires_grad_(False)

    def logits():
        with torch.no_grad(), runtime.autocast():
            return model(masked.batch, masked.positions)

    before = logits()
    runtime.cast_frozen(model)
    assert torch.equal(logits(), before)
    changed = {name for name, p in model.named_parameters() if p.dtype != torch.float32}
    maps = ["attention.qkv", "attention.out", "feed_forward.up", "feed_forward.down"]
    frozen = {f"bert.layers.0.{path}.{kind}" for path in maps for kind in ("weight", "bias")}
    assert changed == (frozen if name == "bf16" else set())  # no LayerNorm, and nothing that trains


# The loop, on a task whose every number can be computed by hand


class Rows:
    """Some rows of numbers (N, 3) with labels (N,), as a batch."""

    def __init__(self, x, y):
        self.x, self.y, self.tokens = x, y, len(y)

    def __len__(self):
        return len(self.y)

    def split(self, parts):
        return [Rows(x, y) for x, y in zip(self.x.chunk(parts), self.y.chunk(parts), strict=True)]

    def to(self, device):
        return (self.x,), self.y


class Toy:
    """Three classes of random rows; 120 validation rows in 24 batches."""

    unit, baseline, evaluations, score = "rows", "chance", 12, None
    start_counts = False

    def __init__(self, clock=None):
        self.clock, self.read = clock, 0

    def batches(self, first_step):
        for step in itertools.count(first_step):
            rng = torch.Generator().manual_seed(step)
            yield Rows(3 * torch.randn(8, 3, generator=rng), torch.randint(3, (8,), generator=rng))

    def loss(self, model, x, y):
        loss = nn.functional.cross_entropy(model(*x), y, reduction="sum")
        return loss, loss

    def evaluation_due(self, step, steps):
        return step % max(1, steps // 12) == 0 and step < steps

    def validation_batches(self, quick):
        rng = torch.Generator().manual_seed(99)
        x, y = torch.randn(24, 5, 3, generator=rng), torch.randint(3, (24, 5), generator=rng)
        return [Rows(x, y) for x, y in zip(x, y, strict=True)][:: 8 if quick else 1]


class Linear(nn.Linear):
    """A model in which a row costs time of the clock: a unit to train, a third of it to read."""

    clock = None

    def forward(self, x):
        if self.clock:
            self.clock.now += len(x) * self.clock.seconds_a_row / (1 if self.training else 3)
        return super().forward(x)


class Clock:
    """Stands for the module `time`."""

    def __init__(self):
        self.now, self.seconds_a_row = 1000.0, 0.125  # a second a step

    def monotonic(self):
        return self.now

    def __deepcopy__(self, memo):
        return self


@pytest.fixture
def clock(monkeypatch):
    """The time that the loop sees."""
    clock = Clock()
    for module in (minitune.training, minitune.support.plan):
        monkeypatch.setattr(module, "time", clock)
    return clock


def toy_trainer(directory, clock=None, *, lr=0.1, decay=0.0, **options) -> Trainer:
    torch.manual_seed(0)
    model = Linear(3, 3)
    model.clock = clock
    directory.mkdir(exist_ok=True)
    run = Run(directory)
    run.start({})
    optimizer = Optimizer(model, "adamw", lr, 0.0, decay)
    return Trainer(model, optimizer, Toy(), run, FP32, seed=0, **options)


def bits(trainer) -> list[float]:
    return [x for p in trainer.model.parameters() for x in p.flatten().tolist()]


@pytest.mark.parametrize("accumulate", [1, 3])
def test_training_is_clipped_adamw_with_warmup_and_linear_decay(tmp_path, accumulate):
    trainer = toy_trainer(tmp_path, decay=0.3, warmup=0.25, accumulate=accumulate)
    trainer.steps = 40
    twin = copy.deepcopy(trainer.model)
    trainer.train()

    norms, moments = [], [(torch.zeros_like(p), torch.zeros_like(p)) for p in twin.parameters()]
    for step, rows in enumerate(itertools.islice(Toy().batches(0), 40)):
        grads = torch.autograd.grad(
            nn.functional.cross_entropy(twin(rows.x), rows.y), list(twin.parameters())
        )
        norms.append(sum(g.square().sum() for g in grads).sqrt().item())
        rate = 0.1 * ((step + 1) / 10 if step < 10 else (40 - step) / 30)
        for p, g, (m, v) in zip(twin.parameters(), grads, moments, strict=True):
            g = g / max(1, norms[-1])
            m.mul_(0.9).add_(g, alpha=0.1)
            v.mul_(0.98).addcmul_(g, g, value=0.02)
            update = m / (1 - 0.9 ** (step + 1))
            update /= (v / (1 - 0.98 ** (step + 1))).sqrt() + 1e-8
            with torch.no_grad():
                p -= rate * (0.3 * p * (p.ndim == 2) + update)
    assert max(norms) > 2 and min(norms) < 1  # some are clipped, some are not
    for p, q in zip(trainer.model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)
    logged = {entry["step"]: entry["gradient_norm"] for entry in trainer.run.read_log()}
    assert {step: pytest.approx(norms[step - 1], rel=1e-3) for step in logged} == logged


def test_a_gradient_that_is_no_number_stops_training_before_it_does_harm(tmp_path):
    trainer = toy_trainer(tmp_path)
    trainer.steps, before = 3, bits(trainer)

    def loss(model, x, y):
        value = nn.functional.cross_entropy(model(*x), y) + (model.bias - model.bias).sum().sqrt()
        return value, value  # finite, but its gradient is inf - inf

    trainer.task.loss = loss
    with pytest.raises(UserError, match="is nan at step 0; none saved"):
        trainer.train()
    assert bits(trainer) == before


def test_evaluations_are_logged_at_their_steps_and_all_rows_are_read_at_the_end(tmp_path):
    trainer = toy_trainer(tmp_path)
    trainer.steps = 24
    final = trainer.train()
    evaluated = [e["step"] for e in trainer.run.read_log() if "validation" in e]
    assert evaluated == list(range(2, 24, 2))
    x, y = zip(*((b.x, b.y) for b in Toy().validation_batches(quick=False)), strict=True)
    logits, labels = trainer.model(torch.cat(x)), torch.cat(y)
    assert final["accuracy"] == (logits.argmax(-1) == labels).double().mean().item()
    loss = nn.functional.cross_entropy(logits, labels).item()
    assert final["loss"] == pytest.approx(loss, rel=1e-5)


def dropped_in_training(directory) -> list[list[bool]]:
    """Which inputs dropout drops, at each step of a training with evaluations in between."""
    trainer, masks = toy_trainer(directory), []
    trainer.model = nn.Sequential(nn.Dropout(0.5), trainer.model)
    trainer.steps = 6

    def look(dropout, x, y):
        if trainer.model.training:
            masks.append((y == 0).flatten().tolist())
        else:
            assert torch.equal(x[0], y)

    trainer.model[0].register_forward_hook(look)
    trainer.train()
    evaluated = [entry["step"] for entry in trainer.run.read_log() if "validation" in entry]
    assert evaluated == [1, 2, 3, 4, 5]
    return masks


def test_dropout_depends_on_the_step_alone_and_is_off_in_evaluations(tmp_path):
    masks = dropped_in_training(tmp_path / "a")
    assert len(masks) == 6 and all(4 < sum(mask) < 20 for mask in masks)  # of 24
    assert len(set(map(tuple, masks))) == 6
    torch.rand(7)  # whatever else was random before
    assert dropped_in_training(tmp_path / "b") == masks


# A run that is planned by time. A step takes a second, all evaluations 24 rows of a third.

EVALUATIONS = (120 + 12 * 15) / 8 / 3  # seconds: one full one, twelve quick ones


def test_a_plan_fills_the_time_and_leaves_the_model_alone(tmp_path, clock):
    planned, given = toy_trainer(tmp_path / "a", clock), toy_trainer(tmp_path / "b", clock)
    before, started = bits(planned), clock.now
    plan_steps(planned, started + 300)
    probe = clock.now - started
    assert probe == pytest.approx(16)  # 5% of the time, and the step in which it was over
    assert planned.steps == int(300 - probe - EVALUATIONS)
    assert bits(planned) == before and planned.step == planned.tokens == planned.seconds == 0
    planned.train()
    assert 298 <= clock.now - started <= 300
    given.steps = planned.steps
    given.train()
    assert bits(given) == bits(planned)


def test_slow_first_steps_do_not_count_in_a_plan(tmp_path, clock):
    trainer = toy_trainer(tmp_path, clock)
    calls, loss = itertools.count(), trainer.task.loss

    def slow_at_first(model, x, y):
        clock.now += 1 if next(calls) < 3 else 0
        return loss(model, x, y)

    trainer.task.loss = slow_at_first
    started = clock.now
    plan_steps(trainer, started + 300)
    assert trainer.steps == int(300 - (clock.now - started) - EVALUATIONS)


@pytest.mark.parametrize(("seconds", "every"), [(100, 1), (60, 2), (30, 3)])
def test_evaluation_takes_at_most_a_fifth_of_the_time(tmp_path, clock, capsys, seconds, every):
    trainer, started = toy_trainer(tmp_path, clock), clock.now
    plan_steps(trainer, started + seconds)
    left = seconds - (clock.now - started)
    assert every == trainer.validation_every == math.ceil(EVALUATIONS / (left / 5))
    said = "1 of" in capsys.readouterr().out
    assert said == (every > 1)
    read = []
    trainer.model.register_forward_hook(
        lambda model, x, out: None if model.training else read.append(len(x[0]))
    )
    trainer.evaluate()
    assert len(read) == 24 // every
    trainer.train()
    assert clock.now - started <= seconds + 2


@pytest.mark.parametrize(("factor", "step"), [(3, 50), (1 / 3, 50), (5, 130), (5, 190), (0.2, 220)])
def test_a_run_ends_in_time_when_the_speed_changes(tmp_path, clock, capsys, factor, step):
    trainer, started, loss = toy_trainer(tmp_path, clock), clock.now, Toy().loss

    def change(model, x, y):
        if trainer.step == step:
            clock.seconds_a_row = 0.125 * factor
        return loss(model, x, y)

    plan_steps(trainer, started + 300)
    planned, trainer.task.loss = trainer.steps, change
    trainer.save_minutes = 0.5
    trainer.train()
    assert clock.now - started == pytest.approx(300, rel=0.08)
    log = trainer.run.read_log()
    assert log[0]["steps"] == planned and log[-1]["steps"] == log[-1]["step"] == trainer.steps
    assert "the speed has changed" in capsys.readouterr().out
    assert trainer.run.load()["numbers/steps"] == trainer.steps
    assert (trainer.steps > planned) == (factor < 1)


def test_a_resumed_run_keeps_the_changed_plan_and_ends_with_the_same_bits(tmp_path, clock):
    trainer, loss = toy_trainer(tmp_path, clock), Toy().loss
    plan_steps(trainer, clock.now + 100)
    planned, saved = trainer.steps, {}

    def change(model, x, y):
        if trainer.step == 30:
            clock.seconds_a_row = 0.375
        if trainer.step > 45:
            trainer.save()
            saved.update(trainer.run.load())
        return loss(model, x, y)

    trainer.task.loss = change
    trainer.train()
    resumed = toy_trainer(tmp_path, clock)
    resumed.restore(saved)
    assert resumed.steps == trainer.steps < planned and resumed.step == trainer.steps - 1
    resumed.train()
    assert bits(resumed) == bits(trainer)


def test_a_time_that_is_over_gives_one_step(tmp_path, clock):
    trainer = toy_trainer(tmp_path, clock)
    plan_steps(trainer, clock.now - 5)
    assert trainer.steps == 1
    trainer.train()
    assert [entry["step"] for entry in trainer.run.read_log()] == [1]


def test_the_report_says_how_many_minutes_are_left(tmp_path, clock, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    trainer = toy_trainer(tmp_path, clock)
    trainer.steps = 240
    trainer.train()
    lines = [line for line in capsys.readouterr().out.splitlines() if "min left" in line]
    assert lines[0].startswith("step     20 of 240   validation loss ")
    assert [line.split()[-3:] for line in lines[:2]] == [
        ["3.7", "min", "left"],
        ["3.3", "min", "left"],
    ]
    assert all("8 rows/s" in line and "(chance)" in line for line in lines)


def test_without_a_terminal_a_line_comes_every_minute_between_evaluations(tmp_path, clock, capsys):
    trainer = toy_trainer(tmp_path, clock)
    trainer.task.evaluation_due = lambda step, steps: step == 200
    trainer.steps = 240
    trainer.train()
    lines = [line for line in capsys.readouterr().out.splitlines() if "min left" in line]
    assert [line.split(" of ")[0].split()[1] for line in lines] == ["10", "80", "150", "200"]
    assert ["training loss" in line for line in lines] == [True, True, True, False]


# Checkpoints


def test_a_checkpoint_counts_the_time_of_all_processes(tmp_path, clock):
    first = toy_trainer(tmp_path, clock)
    first.steps = 5
    clock.now += 60
    first.train()
    evaluations = (120 + 4 * 15) / 8 / 3
    seconds = first.run.load()["numbers/earlier_seconds"].item()
    assert seconds == pytest.approx(60 + 5 + evaluations)
    clock.now += 10_000  # nobody trains
    second = toy_trainer(tmp_path, clock)
    second.restore(first.run.load())
    clock.now += 7
    second.save()
    saved = second.run.load()
    assert saved["numbers/earlier_seconds"].item() == pytest.approx(60 + 5 + evaluations + 7)
    assert saved["numbers/seconds"] == first.seconds == pytest.approx(5)


def test_the_loss_scale_of_float16_is_in_a_checkpoint_and_may_be_missing_there(tmp_path):
    def scaled():
        trainer = toy_trainer(tmp_path)
        trainer.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=4)
        trainer.steps = 6
        return trainer

    first, plain, second, third = scaled(), toy_trainer(tmp_path), scaled(), scaled()
    first.train()
    checkpoint = first.run.load()
    plain.restore(checkpoint)  # the rest in float32
    second.restore(checkpoint)
    assert second.scaler.state_dict() == first.scaler.state_dict()
    assert second.scaler.scale(torch.ones(())) == 2048
    plain.save()
    third.restore(plain.run.load())
    assert third.scaler.get_scale() == 1024 and bits(third) == bits(second) == bits(first)


def number(name, value):
    return lambda state: state.update(
        {
            f"numbers/{name}": torch.tensor(
                value, dtype=None if type(value) is int else torch.float64
            )
        }
    )


def tensor(name, value):
    return lambda state: state.update({name: value})


def removed(start):
    return lambda state: [state.pop(name) for name in [*state] if name.startswith(start)]


MOMENT = "optimizer/weight/exp_avg"
CRAFTED = {
    "a negative step": number("step", -5.0),
    "a step beyond the end": number("step", 7.0),
    "a step of another type": number("step", 3),
    "a step with a fraction": number("step", 3.5),
    "no step": removed("numbers/step"),
    "no numbers": removed("numbers/"),
    "several steps": number("step", [3.0, 4.0]),
    "another number of steps": number("steps", 60.0),
    "no steps": number("steps", 0.0),
    "a step that is no number": number("step", math.nan),
    "a step without end": number("steps", math.inf),
    "negative time": number("seconds", -1.0),
    "no time": number("seconds", 0.0),
    "endless time": number("earlier_seconds", math.inf),
    "no validation": number("validation_every", 0.0),
    "a best step without evaluation": number("best_step", 3.0),
    "a best step to come": number("best_step", 8.0),
    "no best step": number("best_step", 0.0),
    "an unknown number": number("rank", 0.0),
    "no optimizer state": removed("optimizer/"),
    "one moment missing": removed(MOMENT),
    "no weights": removed("model/"),
    "no best weights": removed("best/"),
    "nothing": removed(""),
    "weights of another shape": tensor("model/weight", torch.zeros(3, 4)),
    "weights of another type": tensor("model/weight", torch.zeros(3, 3, dtype=torch.float64)),
    "a scalar for a moment": tensor(MOMENT, torch.zeros(())),
    "an unknown tensor": tensor("soup/weight", torch.zeros(3, 3)),
    "a nameless tensor": tensor("", torch.zeros(3, 3)),
}


@pytest.mark.parametrize("craft", CRAFTED)
def test_a_checkpoint_that_is_not_of_this_run_is_refused_and_changes_nothing(tmp_path, craft):
    def trainer():
        made = toy_trainer(tmp_path)
        made.task.score = lambda metrics: metrics["accuracy"]
        made.task.evaluation_due = lambda step, steps: step % 2 == 0
        made.best_weights = {name: p.detach().clone() for name, p in made.trained.items()}
        made.steps = 6
        return made

    first = trainer()
    first.train()
    checkpoint = first.run.load()
    trainer().restore(dict(checkpoint))  # as it is, it is good
    CRAFTED[craft](checkpoint)
    second = trainer()
    before = bits(second)
    with pytest.raises(UserError) as error:
        second.restore(checkpoint)
    message = str(error.value)
    assert str(first.run.state_path) in message and "\n" not in message and len(message) < 600
    assert bits(second) == before and second.step == 0
    if "optimizer" in craft or "moment" in craft:
        assert "optimizer/" in message


# What the user sees


def test_a_line_is_printed_by_the_main_process_only(capsys):
    FP32.log("once")
    dataclasses.replace(FP32, rank=1).log("twice")
    assert capsys.readouterr().out == "once\n"


@pytest.mark.parametrize("reader", ["has left", "is a full disk"])
def test_a_stdout_that_cannot_be_written_stops_nothing(tmp_path, reader):
    code = """if True:
        from minitune.support.cli import run_script
        from minitune.support.runtime import Runtime
        def work():
            runtime = Runtime.start("cpu", "fp32")
            for i in range(1000):
                runtime.log("x" * 1000)
            open("done", "w").write(str(i))
        run_script(work)"""
    out, left = (
        os.pipe()[::-1] if reader == "has left" else (os.open("/dev/full", os.O_WRONLY), None)
    )
    if left is not None:
        os.close(left)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.run(
        [sys.executable, "-c", code],
        stdout=out,
        stderr=subprocess.PIPE,
        cwd=tmp_path,
        env=environment,
    )
    assert (process.returncode, process.stderr) == (0, b"")
    assert (tmp_path / "done").read_text() == "999"
