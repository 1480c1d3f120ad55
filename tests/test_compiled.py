"""Compiled layers, with the compiler's own backend for tests: it traces, and computes as written.

On a CPU the attention of the kernels is computed by `Tiled`, and `pad_rows` does nothing, as on
a GPU. The programs that torch writes are tested where there is a GPU.
"""

import copy
import json
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from torch._dynamo.utils import counters

import minitune.model
import train
from minitune.attention import Tiled
from minitune.batching import PackedBatch
from minitune.fast import compiled
from minitune.fast.compiled import compile_layers, keep_compiled, warm_up
from minitune.methods import METHODS
from minitune.model import BertConfig, BertForMaskedLM, BertForSequenceClassification
from minitune.support.cli import options_to_save
from minitune.support.errors import UserError
from minitune.support.options import finetune_options
from minitune.support.runtime import Runtime
from minitune.training import Trainer

pytest.importorskip("triton")  # there is none for macOS

from minitune.fast.fused_attention import fused, fused_backward, fused_self, fused_self_backward

CONFIG = BertConfig(50, 64, 3, 2, 64)  # vocabulary, hidden, layers, heads, intermediate
FP32 = Runtime.start("cpu", "fp32")


class Context:
    """What an autograd function of torch saves to."""

    def save_for_backward(self, *tensors):
        self.saved_tensors = tensors


@fused.register_kernel("cpu")
def _(q, k, v, cu_seqlens_q, cu_seqlens, max_seqlen):
    ctx = Context()
    out = Tiled.forward(ctx, q, k, v, cu_seqlens_q, cu_seqlens)
    return out.contiguous(), ctx.saved_tensors[4].squeeze(-1).T.contiguous()


@fused_backward.register_kernel("cpu")
def _(d_out, q, k, v, out, lse, cu_seqlens_q, cu_seqlens, max_seqlen):
    ctx = Context()
    ctx.save_for_backward(q, k, v, out, lse.T.unsqueeze(-1), cu_seqlens_q, cu_seqlens)
    return tuple(x.contiguous() for x in Tiled.backward(ctx, d_out)[:3])


@fused_self.register_kernel("cpu")
def _(qkv, cu_seqlens, max_seqlen):
    return fused(*qkv.unbind(1), cu_seqlens, cu_seqlens, max_seqlen)


@fused_self_backward.register_kernel("cpu")
def _(d_out, qkv, out, lse, cu_seqlens, max_seqlen):
    given = *qkv.unbind(1), out, lse, cu_seqlens, cu_seqlens, max_seqlen
    return torch.stack(fused_backward(d_out, *given), 1)


@pytest.fixture
def compiler(monkeypatch):
    """The statistics of the compiler, from nothing."""
    monkeypatch.setattr(minitune.model, "pad_rows", lambda x: x)
    monkeypatch.setattr(compiled, "HOW", {"backend": "aot_eager", "dynamic": True})
    torch._dynamo.reset()
    counters.clear()
    yield counters["stats"]
    torch._dynamo.reset()


def make_model():
    torch.manual_seed(0)
    return BertForMaskedLM(CONFIG, "triton").train()


def ragged_batches(count):
    generator = torch.Generator().manual_seed(0)

    def draw(low, high, size=()):
        return torch.randint(low, high, size, generator=generator)

    for _ in range(count):
        lengths = draw(1, 60, (int(draw(1, 9)),)).tolist()
        yield PackedBatch.from_sequences([draw(0, 50, (n,)) for n in lengths])


def descend(model, batches, runtime=FP32):
    """The losses of a few steps of gradient descent."""
    losses = []
    for batch in batches:
        with runtime.autocast():
            if isinstance(model, BertForMaskedLM):
                positions = torch.arange(0, batch.tokens.numel(), 3, device=batch.tokens.device)
                logits, labels = model(batch, positions), batch.tokens[positions]
            else:
                logits, labels = model(batch), batch.tokens[batch.cls_positions] % 2
            loss = torch.nn.functional.cross_entropy(logits.float(), labels)
        loss.backward()
        losses.append(loss.item())
        with torch.no_grad():
            for p in model.parameters():
                if p.grad is not None:
                    p -= 0.1 * p.grad
        model.zero_grad()
    return losses


def make_compiled(model, runtime=FP32):
    compile_layers(model.bert)
    warm_up(model.bert, 40, 200, runtime.autocast())
    return model


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_ragged_batches_are_compiled_once_and_give_the_same_losses(compiler, precision):
    runtime = Runtime.start("cpu", precision)
    model = make_compiled(make_model(), runtime)
    assert compiler["unique_graphs"] == 1 and not counters["graph_break"]
    losses = descend(model, ragged_batches(12), runtime)
    assert losses == descend(make_model(), ragged_batches(12), runtime)
    assert compiler["unique_graphs"] == 1
    with torch.no_grad():  # evaluation is another program
        for batch in ragged_batches(4):
            model.eval()(batch, batch.cls_positions)
    assert compiler["unique_graphs"] == 2


# The lowest layer gets inputs that need no gradient, which is another program.
@pytest.mark.parametrize("method", ["lora", "adapter"])
def test_what_a_method_inserts_is_compiled_too(compiler, method):
    def make():
        torch.manual_seed(0)
        options, method1 = options_to_save(finetune_options().parse_args([])), METHODS[method]
        config = BertConfig(50, 64, 3, 2, 64, id2label={0: "bad", 1: "good"})
        model = BertForSequenceClassification(config, "triton", method1.pooling)
        method1.insert(model.bert, **{name: options[name] for name in method1.options})
        model.requires_grad_(False)
        for name in method1.trained(model):
            model.get_parameter(name).requires_grad_()
        return model.train()

    model = make_compiled(make())
    assert not counters["graph_break"]
    assert descend(model, ragged_batches(4)) == descend(make(), ragged_batches(4))
    assert compiler["unique_graphs"] == 2


def test_a_copy_of_a_compiled_model_runs_the_same_program(compiler):
    compiled.HOW["backend"] = "eager"
    model = make_compiled(make_model())
    copied = copy.deepcopy(model)
    keep_compiled(model, copied)
    assert [bool(layer._compiled_call_impl) for layer in copied.bert.layers] == [True, True, False]
    descend(copied, ragged_batches(2))
    assert compiler["unique_graphs"] == 1


def test_models_one_after_another_are_all_compiled(compiler):
    compiled.HOW["backend"] = "eager"
    with torch._dynamo.config.patch(recompile_limit=1):  # as after eight models
        for count, size in enumerate((32, 64), start=1):
            model = BertForMaskedLM(replace(CONFIG, hidden_size=size), "triton")
            FP32.compile_layers(model.bert, 40, 200)
            assert compiler["unique_graphs"] == count


def test_warming_up_changes_nothing(compiler):
    compiled.HOW["backend"] = "eager"
    model, plain = make_compiled(make_model().eval()), make_model()
    assert not model.training and all(p.grad is None for p in model.parameters())
    assert_equal_bits(model, plain)


def assert_equal_bits(model, other):
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name


@pytest.fixture
def pretrain(compiler, tmp_path, monkeypatch):
    """Runs a small train.py as on a GPU, in this process; gives the directory and the settings."""
    monkeypatch.setitem(train.PRESETS, "tiny", replace(CONFIG, vocab_size=8192))
    monkeypatch.setattr(train, "resolve_backend", lambda *_: "triton")
    monkeypatch.setattr(Runtime, "compiles", lambda self, choice, *others: choice == "on")
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"a film of {n} words " * (n % 9 + 2) for n in range(40)))

    def run(name, *options, length=("--steps", 6)):
        out = tmp_path / name
        given = ["--data", text, "--out", out, "--vocab-size", 80, *length, "--device", "cpu"]
        given += ["--max-len", 32, "--batch-tokens", 128, "--precision", "fp32"]
        monkeypatch.setattr(sys, "argv", ["train.py", *map(str, [*given, *options])])
        train.main()
        return out, json.loads((out / "metrics.json").read_text())

    return run


def test_a_compiled_run_that_is_resumed_has_the_bits_and_loss_of_others(
    pretrain, compiler, monkeypatch, capsys
):
    compiled.HOW["backend"] = "eager"
    out, metrics = pretrain("compiled", "--compile", "on")
    assert compiler["unique_graphs"] == 2  # for training, and for evaluations
    assert metrics["compiled"] is True
    assert "; compile: on" in (printed := capsys.readouterr().out) and "compiled the la" in printed
    _, plain = pretrain("plain", "--compile", "off")
    assert metrics["loss"] == plain["loss"] and plain["compiled"] is False
    assert "; compile: off" in capsys.readouterr().out

    update, options = Trainer.update, ("--compile", "on", "--save-minutes", "1e-9")

    def fail_at_step_4(trainer, norm):
        if trainer.step == 4:
            raise KeyboardInterrupt
        update(trainer, norm)

    monkeypatch.setattr(Trainer, "update", fail_at_step_4)
    with pytest.raises(KeyboardInterrupt):
        pretrain("resumed", *options)
    monkeypatch.setattr(Trainer, "update", update)
    torch._dynamo.reset()
    again, metrics = pretrain("resumed", "--resume", *options)
    assert "resumed at step 4 of 6" in capsys.readouterr().out and metrics["compiled"] is True
    ours, theirs = (load_file(directory / "model.safetensors") for directory in (again, out))
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_a_run_is_planned_by_the_speed_of_compiled_layers(pretrain, monkeypatch):
    compiled.HOW["backend"], backward, models = "eager", Trainer.backward, []

    def record(trainer, *batch):
        models.append(trainer.model)
        return backward(trainer, *batch)

    monkeypatch.setattr(Trainer, "backward", record)
    pretrain("planned", "--compile", "on", length=("--minutes", 0.001))
    assert models[0] is not models[-1]  # the plan is made with a copy
    assert all(model.bert.layers[0]._compiled_call_impl for model in models)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_on_a_gpu_ragged_batches_are_compiled_once_and_a_resumed_run_has_the_same_bits():
    gpu = Runtime.start("cuda", "bf16")
    batches = [batch.to(gpu.device) for batch in ragged_batches(20)]
    torch._dynamo.reset()
    counters.clear()
    model = make_compiled(make_model().to(gpu.device), gpu)
    losses = descend(model, batches, gpu)
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    plain = descend(make_model().to(gpu.device), batches, gpu)
    assert max(abs(a - b) for a, b in zip(losses, plain, strict=True)) <= 0.02
    torch._dynamo.reset()  # as in another process
    first = make_compiled(make_model().to(gpu.device), gpu)
    descend(first, batches[:7], gpu)
    torch._dynamo.reset()
    second = make_compiled(copy.deepcopy(first), gpu)
    descend(second, batches[7:], gpu)
    assert_equal_bits(second, model)


@pytest.mark.parametrize(
    ("choice", "minutes", "compiles"),
    [("auto", 5, True), ("auto", 4, False), ("on", 0, True), ("off", 17, False)],
)
def test_layers_are_compiled_on_a_gpu_where_that_pays(choice, minutes, compiles):
    gpu = Runtime(torch.device("cuda"), "bf16")
    assert gpu.compiles(choice, "triton", minutes) == compiles


def test_layers_are_not_compiled_on_a_cpu_or_with_other_attention():
    gpu = Runtime(torch.device("cuda"), "bf16")
    for runtime, attention in (gpu, "sdpa"), (FP32, "triton"), (FP32, "sdpa"):
        assert not runtime.compiles("auto", attention)
        with pytest.raises(UserError, match="--compile on needs a CUDA device and --attention tri"):
            runtime.compiles("on", attention)


def test_a_compiler_that_fails_is_one_line(compiler, monkeypatch):
    def fail(graph, inputs):
        raise RuntimeError("no compiler here\nand many lines")

    monkeypatch.setattr(compiled, "HOW", {"backend": fail, "dynamic": True})
    with pytest.raises(UserError, match=r"failed \(.*no compiler here\); try --compile off"):
        FP32.compile_layers(make_model().bert, 40, 200)
