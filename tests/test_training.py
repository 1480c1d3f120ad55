"""The loop's parts: what is optimised how, what a batch in parts weighs, where training starts."""

import copy
import functools
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from minitune.batching import PackedBatch
from minitune.initialization import start_with_frequencies, start_with_neighbours
from minitune.model import BertConfig, BertForMaskedLM
from minitune.optimizer import LRMultipliers, Muon, Optimizer, one_cycle
from minitune.pretraining import MaskedBatch, MaskedLanguageModelling
from minitune.support.errors import UserError
from minitune.support.runs import Run
from minitune.support.runtime import Runtime, multiplies_bf16
from minitune.training import Trainer

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
    options = SimpleNamespace(
        rate=0.15, summary_weight=1.0, tokenizer=SimpleNamespace(special_ids=SPECIAL)
    )
    loss = functools.partial(MaskedLanguageModelling.loss, options)
    task = SimpleNamespace(loss=loss, baseline="", unit="")
    optimizer = Optimizer(model, "muon", 0.01, 0.001, 0.01)
    run = Run(tmp_path)
    return Trainer(model, optimizer, task, run, FP32, seed=0, accumulate=accumulate)


def gradients(accumulate: int, tmp_path) -> tuple[float, dict]:
    model = small_model()
    trainer = trainer_for(model, tmp_path, accumulate)
    loss, _, _ = trainer._gradients(some_batch())
    return loss, {name: p.grad for name, p in model.named_parameters()}


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
        _, norm, _ = trainer._gradients(some_batch())
        trainer._apply(norm)
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
    assert FP32.describe_precision() == "fp32 (as given)"
    with pytest.raises(UserError, match="fp16"):
        Runtime.start("cpu", "fp16")


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
