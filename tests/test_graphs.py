"""CUDA graphs: batches of few shapes that teach the same. Without a GPU a graph calls its work."""

import copy
import itertools
import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import minitune.attention
import minitune.model
from minitune.attention import resolve_backend
from minitune.classification import Classification, Examples, TokenizedTexts
from minitune.corpus import Corpus
from minitune.data import Dataset
from minitune.fast import graphs
from minitune.fast.graphs import Graphs, fill
from minitune.methods import METHODS, options_of
from minitune.model import BertConfig, BertForMaskedLM, BertForSequenceClassification
from minitune.optimizer import Optimizer
from minitune.pretraining import MaskedLanguageModelling
from minitune.support.errors import UserError
from minitune.support.options import finetune_options
from minitune.support.runs import Run
from minitune.support.runtime import Runtime
from minitune.training import Trainer
from tests.test_compiled import ragged_batches

FP32 = Runtime.start("cpu", "fp32")
SAMPLE = Path(__file__).parents[1] / "data" / "samples" / "reviews.txt"


class Called:
    """A graph that computes again, as a GPU does from what it recorded."""

    count = 0

    def __init__(self, work, pool):
        self.work = work
        Called.count += 1

    def replay(self):
        self.result = self.work()


@pytest.fixture
def called(monkeypatch):
    monkeypatch.setattr(graphs, "Recorded", Called)
    monkeypatch.setattr(Called, "count", 0)
    return Called


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    draw, words = random.Random(0), SAMPLE.read_text().split()
    texts = [" ".join(draw.choices(words, k=draw.randint(2, 60))) for _ in range(400)]
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n\n".join(texts))
    return Corpus.open(Dataset(str(path)), None, 300)


def sizes(batch):
    return batch.tokens.numel(), batch.cu_seqlens.numel(), batch.max_seqlen


@pytest.mark.parametrize(("most", "least"), [(64, 0), (100, 500), (512, 2000)])
def test_a_filled_batch_has_the_same_sequences_and_more_of_padding(most, least):
    for batch in ragged_batches(40):
        T, B = batch.tokens.numel(), len(batch.cu_seqlens)
        filled = fill(batch, 600, most, pad_id=7, least=least)
        assert torch.equal(filled.tokens[:T], batch.tokens)
        assert torch.equal(filled.cu_seqlens[:B], batch.cu_seqlens)
        assert filled.cu_seqlens.dtype == batch.cu_seqlens.dtype
        assert set(filled.tokens[T:].tolist()) == {7} and filled.cu_seqlens[-1] == len(
            filled.tokens
        )
        lengths = filled.cu_seqlens.diff()
        assert 1 <= lengths.min() and lengths.max() <= filled.max_seqlen <= most
        assert lengths[B - 1 :].max() < filled.max_seqlen
        assert filled.tokens.numel() % 64 == 0 and filled.tokens.numel() - T >= least


def test_batches_of_all_sizes_have_few_shapes(corpus):
    task = make_task(corpus, 512, 64)
    shapes = {
        sizes(fill(one.batch, 512, 64, 0, 0)) for one in itertools.islice(task.batches(0), 300)
    }
    plain = {sizes(one.batch) for one in itertools.islice(task.batches(0), 300)}
    assert len(shapes) <= 4 and len(plain) > 60


def make_task(corpus, batch_tokens=256, max_len=64, rate=0.15):
    shape = {"batch_tokens": batch_tokens, "max_len": max_len, "rate": rate}
    return MaskedLanguageModelling(corpus, **shape, whole_word=False, seed=0)


def pretrainer(corpus, directory, runtime=FP32, rate=0.15, **options):
    torch.manual_seed(0)
    config = BertConfig(corpus.tokenizer.vocab_size, 64, 2, 2, 64)
    config.hidden_dropout_prob = 0.1 if options.pop("dropout", False) else 0.0
    backend = resolve_backend("auto", runtime.device, runtime.dtype, config.head_size)
    model = BertForMaskedLM(config, backend).to(runtime.device)
    directory.mkdir(exist_ok=True)
    run, optimizer = Run(directory), Optimizer(model, "muon", 0.01, 0.001, 0.01)
    run.start({})
    trainer = Trainer(
        model, optimizer, make_task(corpus, rate=rate), run, runtime, seed=0, **options
    )
    trainer.steps = 16
    return trainer


def classifier_trainer(directory, labels, graphs, class_weights="none", method="full", options=""):
    torch.manual_seed(0)
    config = BertConfig(90, 64, 2, 2, 64, id2label={0: "bad", 1: "fair", 2: "good"})
    model = BertForSequenceClassification(config, pooling=METHODS[method].pooling)
    args = finetune_options().parse_args(options.split())
    METHODS[method].insert(model.bert, **options_of(method, args))
    model.requires_grad_(False)
    for name in METHODS[method].trained(model):
        model.get_parameter(name).requires_grad_()
    texts = object.__new__(TokenizedTexts)
    draw = np.random.default_rng(0)
    texts.ids = [
        draw.integers(5, 90, n).astype(np.int32) for n in draw.integers(3, 60, len(labels))
    ]
    texts.lengths = np.array([len(ids) for ids in texts.ids])
    texts.truncated = [False] * len(labels)
    rows = Examples(texts, labels)
    hard = Examples(texts, labels.argmax(-1) if labels.is_floating_point() else labels)
    plan = {"batch_tokens": 200, "epochs": 2, "seed": 0, "class_weights": class_weights}
    task = Classification(rows, hard, **plan)
    optimizer = Optimizer(model, "adamw", 0.001, 0.001, 0.01)
    directory.mkdir(exist_ok=True)
    trainer = Trainer(model, optimizer, task, Run(directory), FP32, seed=0, graphs=graphs)
    trainer.run.start({})
    trainer.steps = task.steps
    return trainer


def assert_same_gradients(plain, filled):
    by = filled.computer()
    assert isinstance(by, Graphs)
    for (batch, parts), (same, more) in itertools.islice(
        zip(plain.shares(0), by.shares(0), strict=False), 6
    ):
        assert batch.tokens == same.tokens
        loss, norm = plain.backward(batch, parts)
        loss2, norm2 = by.backward(same, more)
        torch.testing.assert_close(loss2, loss, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(norm2, norm, rtol=1e-4, atol=1e-6)
        for (name, p), q in zip(plain.trained.items(), filled.trained.values(), strict=True):
            gradient = torch.zeros_like(p) if p.grad is None else p.grad
            assert (q.grad - gradient).abs().max() <= 1e-4, name
        plain.update(norm), by.update(norm2)


@pytest.mark.parametrize("rate", [0.15, 0.5])
def test_padding_changes_no_gradient_of_masked_words(corpus, tmp_path, called, rate):
    plain = pretrainer(corpus, tmp_path / "a", rate=rate)
    assert_same_gradients(plain, pretrainer(corpus, tmp_path / "b", rate=rate, graphs=True))
    assert called.count > 0


LABELS = torch.arange(50) % 3
SOFT = torch.nn.functional.one_hot(LABELS, 3) * 0.7 + 0.1


@pytest.mark.parametrize(
    ("labels", "class_weights"), [(LABELS, "none"), (LABELS, "balanced"), (SOFT, "none")], ids=str
)
def test_padding_changes_no_gradient_of_labels(tmp_path, called, labels, class_weights):
    plain = classifier_trainer(tmp_path / "a", labels, False, class_weights)
    filled = classifier_trainer(tmp_path / "b", labels, True, class_weights)
    assert_same_gradients(plain, filled)
    assert called.count > 0


class Refuse(TorchDispatchMode):
    """Refuses what a CUDA graph cannot record: reading a number, and tensors from Python's."""

    NOT_RECORDED = {
        torch.ops.aten._local_scalar_dense.default,
        torch.ops.aten.lift_fresh.default,
        torch.ops.aten.nonzero.default,
    }

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function not in self.NOT_RECORDED, function
        return function(*args, **(kwargs or {}))


class Watched(Called):
    def replay(self):
        with Refuse():
            super().replay()


WAYS = [("full", ""), ("bitfit", ""), ("ia3", ""), ("adapter", ""), ("lora", "")]
WAYS.append(("lora", "--dora --lora-targets key,value"))


@pytest.mark.parametrize(("method", "options"), WAYS)
def test_the_steps_of_every_method_can_be_recorded(tmp_path, monkeypatch, method, options):
    monkeypatch.setattr(graphs, "Recorded", Watched)
    # Its lengths are read on the processor alone.
    monkeypatch.setitem(
        minitune.attention.ON_ANY_DEVICE, "sdpa", lambda q, k, v, *_: q + k.mean(0) + v.mean(0)
    )
    trainer = classifier_trainer(tmp_path, LABELS, True, method=method, options=options)
    trainer.train()


def test_steps_of_pretraining_can_be_recorded(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(graphs, "Recorded", Watched)
    monkeypatch.setattr(minitune.model, "attention", lambda q, k, v, *_: q)
    monkeypatch.setattr(minitune.model, "self_attention", lambda qkv, *_: qkv.sum(1))
    pretrainer(corpus, tmp_path, graphs=True).train()


def test_batches_of_unknown_words_are_filled(corpus, tmp_path, called):
    trainer = pretrainer(corpus, tmp_path, rate=0.5, graphs=True)
    read = trainer.task.train.read

    def spoil(indices):
        return [torch.where(ids > 4, trainer.task.tokenizer.unk_id, ids) for ids in read(indices)]

    trainer.task.train.read = spoil
    for _, [((batch, positions), _)] in itertools.islice(trainer.computer().shares(0), 20):
        assert positions.max() < batch.tokens.numel() and positions.diff().min() == 1


def test_a_run_by_graphs_learns_as_one_without(corpus, tmp_path, called):
    plain, graphed = (pretrainer(corpus, tmp_path / str(way), graphs=way) for way in (False, True))
    assert graphed.train()["loss"] == pytest.approx(plain.train()["loss"], abs=2e-4)
    assert 2 <= called.count <= 8  # graphs, two for each shape
    logged = [[e["loss"] for e in t.run.read_log()] for t in (plain, graphed)]
    assert logged[1] == pytest.approx(logged[0], abs=2e-4)


def state(trainer):
    return {name: tensor.clone() for name, tensor in trainer._state().items()}


def assert_resumes(corpus, tmp_path, runtime):
    whole = pretrainer(corpus, tmp_path / "whole", runtime, graphs=True, dropout=True)
    whole.train()
    first = pretrainer(corpus, tmp_path / "part", runtime, graphs=True, dropout=True)
    by = first.computer()
    for batch, parts in itertools.islice(by.shares(0), 9):
        _, norm = by.backward(batch, parts)
        by.update(norm)
        first.step, first.tokens = first.step + 1, first.tokens + batch.tokens
        first.seconds = 1.0
    again = pretrainer(corpus, tmp_path / "part", runtime, graphs=True, dropout=True)
    again.restore(state(first))
    again.train()
    for name, p in whole.trained.items():
        assert torch.equal(again.trained[name], p), name


def test_a_resumed_run_has_the_same_bits(corpus, tmp_path, called):
    assert_resumes(corpus, tmp_path, FP32)


def test_rates_of_a_graph_follow_the_schedule(corpus, tmp_path, called):
    trainer, plain = (pretrainer(corpus, tmp_path / str(k), graphs=not k) for k in range(2))
    trainer.computer()
    for trainer.step in (0, 3, 15):
        plain.step = trainer.step
        trainer.set_rate(), plain.set_rate()
        for group, other in zip(trainer.optimizer.groups, plain.optimizer.groups, strict=True):
            assert isinstance(group["lr"], torch.Tensor)
            assert group["lr"].item() == pytest.approx(other["lr"], rel=1e-6)


def test_a_copy_for_the_plan_has_rates_of_its_own(corpus, tmp_path, called):
    trainer = pretrainer(corpus, tmp_path, graphs=True)
    trainer.computer()
    probe = copy.copy(trainer)
    probe.optimizer = copy.deepcopy(trainer.optimizer)
    probe.computer()
    before = [float(group["lr"]) for group in trainer.optimizer.groups]
    probe.optimizer.set_rate(0.0)
    assert [float(group["lr"]) for group in trainer.optimizer.groups] == before


def test_a_signal_and_a_nan_are_seen(corpus, tmp_path, called):
    trainer = pretrainer(corpus, tmp_path, graphs=True)
    by = trainer.computer()
    (batch, parts), *_ = itertools.islice(by.shares(0), 1)
    for _ in range(3):
        by.backward(batch, parts)
    trainer.signals.append(2)
    by.backward(batch, parts)
    assert trainer._look() == 1
    with torch.no_grad():
        trainer.model.head.bias[7] = math.nan
    by.backward(batch, parts)
    with pytest.raises(UserError, match="is nan"):
        trainer._look()


def test_a_step_that_cannot_be_recorded_has_a_way_out(corpus, tmp_path, monkeypatch):
    def fail(work, pool):
        raise RuntimeError("operation not permitted")

    monkeypatch.setattr(graphs, "Recorded", fail)
    with pytest.raises(RuntimeError, match="operation not permitted") as raised:
        pretrainer(corpus, tmp_path, graphs=True).train()
    assert raised.value.__notes__[0].endswith("try --cuda-graphs off")


@pytest.mark.parametrize(
    ("device", "attention", "accumulate", "choice", "precision", "expected"),
    [
        ("cuda", "triton", 1, "auto", "bf16", True),
        ("cuda", "triton", 1, "off", "bf16", False),
        ("cuda", "sdpa", 1, "auto", "bf16", False),
        ("cuda", "triton", 2, "auto", "bf16", False),
        ("cuda", "triton", 1, "auto", "fp16", False),
        ("cpu", "triton", 1, "auto", "bf16", False),
    ],
)
def test_where_steps_are_recorded(device, attention, accumulate, choice, precision, expected):
    runtime = Runtime(torch.device(device), precision)
    assert runtime.repeats_graphs(choice, attention, accumulate) == expected


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_on_a_gpu_a_graph_computes_what_its_kernels_do_and_resumes_to_the_same_bits(
    corpus, tmp_path, monkeypatch
):
    gpu = Runtime.start("cuda", "bf16")
    recorded = pretrainer(corpus, tmp_path / "recorded", gpu, graphs=True, dropout=True)
    recorded.train()
    assert_resumes(corpus, tmp_path, gpu)
    monkeypatch.setattr(graphs, "Recorded", Called)
    again = pretrainer(corpus, tmp_path / "called", gpu, graphs=True, dropout=True)
    again.train()
    for name, p in recorded.trained.items():
        assert torch.equal(again.trained[name], p), name
