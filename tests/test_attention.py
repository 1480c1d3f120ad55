"""Every attention backend against the definition, written out in float64."""

import subprocess
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from minitune.attention import Tiled, attention, resolve_backend
from minitune.fast import padded_attention as padded_attention
from minitune.support.errors import UserError
from tests.attention_oracle import (
    HERE,
    assert_is_the_definition,
    compute,
    cumulative,
    output_and_gradients,
    random_inputs,
)

BLOCK = Tiled.KEY_BLOCK
LENGTHS = [[1], [7], [BLOCK - 1], [BLOCK], [BLOCK + 1], [40] * 6, [129, 1, 64, 64, 127], [512, 3]]
MIXED = [129, 5, 9, 64, 64, 20, 1]
FEWER = [[1] * 7, [20, 1, 2, 10, 10, 0, 1], [0, 0, 0, 64, 1, 0, 0]]  # queries of each
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CPU = torch.device("cpu")


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", HERE)
def test_output_and_gradients_are_those_of_the_definition(backend, dtype, lengths):
    assert_is_the_definition(backend, lengths, random_inputs(lengths, 64, dtype))


@pytest.mark.parametrize("head_size", [8, 32, 128])
@pytest.mark.parametrize("backend", HERE)
def test_other_sizes_of_heads(backend, head_size):
    lengths = [70, 5, 5]
    assert_is_the_definition(backend, lengths, random_inputs(lengths, head_size))


@pytest.mark.parametrize("counts", FEWER, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", HERE)
def test_only_some_tokens_may_be_queries(backend, dtype, counts):
    assert_is_the_definition(backend, MIXED, random_inputs(MIXED, 32, dtype, counts=counts), counts)


@pytest.mark.parametrize("backend", HERE)
def test_large_scores_do_not_overflow(backend):
    q, k, v, _ = random_inputs([5, 3], 32)
    k = torch.nn.functional.normalize(k, dim=-1) * 1000
    q = k * 10  # a token matches itself so well that it attends to nothing else
    out = attention(q, k, v, cumulative([5, 3]), 5, backend)
    torch.testing.assert_close(out, v)


@pytest.mark.parametrize("n", [1, 2, 7, 16, 33, 128, 129, 512])
def test_bfloat16_softmax_on_cpu_is_rounded_once(n):
    # What `reference` relies on. One rounding costs at most 2⁻⁸ of the value; 0.1% more is room for
    # the float32 arithmetic before it. A softmax with bfloat16 steps on the way is off by eight
    # times that.
    scores = (4 * torch.randn(20, n, generator=torch.Generator().manual_seed(n))).bfloat16()
    exact = torch.softmax(scores.double(), -1)
    error = (torch.softmax(scores, -1).double() - exact).abs() / exact
    assert error.max() <= 2**-8 * 1.001


# The tiled backend


def test_tiled_gradients_are_those_of_its_output(monkeypatch):
    monkeypatch.setattr(Tiled, "KEY_BLOCK", 4)
    lengths = [1, 3, 4, 5, 5, 9]
    *qkv, _ = random_inputs(lengths, 4, torch.float64, heads=2)
    qkv = [x.detach().requires_grad_() for x in qkv]
    assert torch.autograd.gradcheck(
        lambda *qkv: attention(*qkv, cumulative(lengths), 9, "tiled"), qkv
    )


@pytest.mark.parametrize("block", [1, 4, 64])
def test_tiles_of_any_size_give_the_same(monkeypatch, block):
    lengths = [1, 3, 4, 5, 9, 9]
    inputs = random_inputs(lengths, 8, torch.float64)
    expected = compute("reference", lengths, inputs)
    monkeypatch.setattr(Tiled, "KEY_BLOCK", block)
    for ours, true in zip(compute("tiled", lengths, inputs), expected, strict=True):
        assert (ours - true).abs().max() <= 1e-12


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tiled_is_deterministic_and_sums_in_float32_under_autocast_too(dtype):
    lengths = [70, 70, 9]
    inputs = random_inputs(lengths, 32, dtype)
    expected = compute("tiled", lengths, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        computed = compute("tiled", lengths, inputs)
    assert all(torch.equal(a, b) for a, b in zip(computed, expected, strict=True))


class LargestResult(TorchDispatchMode):
    """Counts the elements of the largest tensor that any operation inside gives."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, list | tuple) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.parametrize("lengths", [[512], [200, 56, 128, 128]], ids=str)
def test_memory_of_tiled_grows_with_the_tokens_not_with_their_square(lengths):
    T, H, D = 512, 2, 32
    inputs = random_inputs(lengths, D, heads=H)
    saved = []
    hooks = torch.autograd.graph.saved_tensors_hooks(
        lambda x: saved.append(x.numel()) or x, lambda x: x
    )
    with LargestResult() as largest, hooks:
        compute("tiled", lengths, inputs)
    assert largest.elements <= T * H * BLOCK
    ends = len(lengths) + 1
    assert sorted(saved) == sorted(
        [ends, ends, T * H] + 4 * [T * H * D]
    )  # of q and k; lse; q, k, v, out
    with LargestResult() as largest:
        compute("reference", lengths, inputs)
    assert largest.elements > T * H * BLOCK


# The padded backend


@pytest.fixture
def set_sizes(monkeypatch):
    """Change the constants of padded_attention.py, and forget what it remembers of the old ones."""

    def change(**sizes):
        for name, size in sizes.items():
            monkeypatch.setattr(padded_attention, name, size)
        padded_attention.plan.cache_clear()

    yield change
    padded_attention.plan.cache_clear()


@pytest.mark.parametrize(
    "scores", [1, 64, 2**22]
)  # one, two, all of the sequences of four tokens at a time
def test_padded_gradients_are_those_of_its_output(set_sizes, scores):
    set_sizes(KEY_MULTIPLE=4, GROUP_SCORES=scores)
    lengths = [1, 3, 4, 5, 5, 9]
    *qkv, _ = random_inputs(lengths, 4, torch.float64, heads=2)
    qkv = [x.detach().requires_grad_() for x in qkv]
    assert torch.autograd.gradcheck(
        lambda *qkv: attention(*qkv, cumulative(lengths), 9, "padded"), qkv
    )


def test_padded_gradients_of_fewer_queries_are_those_of_its_output(set_sizes):
    set_sizes(KEY_MULTIPLE=4, QUERY_MULTIPLE=2)
    lengths, counts = [1, 3, 1, 2, 5, 9], [1, 1, 0, 2, 3, 1]
    *qkv, _ = random_inputs(lengths, 4, torch.float64, heads=2, counts=counts)
    qkv = [x.detach().requires_grad_() for x in qkv]
    assert torch.autograd.gradcheck(
        lambda *qkv: attention(*qkv, cumulative(lengths), 9, "padded", cumulative(counts)), qkv
    )


def test_padded_refuses_rows_that_belong_to_no_sequence():
    *qkv, _ = random_inputs([9], 8)
    qkv = [x.detach().requires_grad_() for x in qkv]
    with pytest.raises(ValueError, match="9 queries, 9 keys; lengths of 8, 8"):
        attention(*qkv, cumulative([8]), 8, "padded")


def test_padded_lets_short_sequences_share_their_rows():
    inputs = random_inputs([30, 30, 4, 60, 5], 8, torch.bfloat16, heads=2)
    with LargestResult() as largest:
        compute("padded", [30, 30, 4, 60, 5], inputs)
    assert largest.elements == 3 * 2 * 64 * 64  # not five times


def test_padded_computes_few_rows_for_few_queries():
    lengths, counts = [256] * 4, [1, 2, 1, 16]
    inputs = random_inputs(lengths, 8, torch.bfloat16, heads=2, counts=counts)
    with LargestResult() as largest:
        compute("padded", lengths, inputs, counts)
    assert largest.elements == 4 * 2 * 16 * 256


@pytest.mark.parametrize(
    ("head_size", "kept"), [(16, True), (8, False)]
)  # 128 tokens, kept up to 8·D
def test_padded_keeps_a_softmax_only_if_it_is_small(head_size, kept):
    saved = []
    inputs = random_inputs([128], head_size, heads=2)
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: saved.append(x.numel()) or x, lambda x: x
    ):
        compute("padded", [128], inputs)
    assert (2 * 128 * 128 in saved) == kept
    assert_is_the_definition("padded", [128], inputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_padded_is_close_to_itself_without_gradients(dtype):
    """Where no gradient is needed, it is torch's kernel."""
    lengths = [70, 64, 5]
    *qkv, _ = random_inputs(lengths, 32, dtype)
    evaluated = attention(*qkv, cumulative(lengths), 70, "padded")
    trained = attention(
        *(x.detach().requires_grad_() for x in qkv), cumulative(lengths), 70, "padded"
    )
    assert trained.grad_fn is not None and evaluated.grad_fn is None
    torch.testing.assert_close(evaluated, trained.detach(), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_padded_computes_in_the_precision_of_its_inputs_under_autocast_too(dtype):
    lengths = [70, 64, 5]
    inputs = random_inputs(lengths, 32, dtype)
    expected = compute("padded", lengths, inputs)

    def forward(*qkv):
        with torch.autocast("cpu", torch.bfloat16):  # in training the backward pass is outside
            return attention(*qkv, cumulative(lengths), 70, "padded")

    computed = output_and_gradients(forward, inputs)
    assert all(torch.equal(a, b) for a, b in zip(computed, expected, strict=True))


def test_padded_multiplies_few_different_shapes():
    """Of all lengths from 1 to 128 it makes two, 64 and 128, in batches of any number."""
    lengths, shapes = list(range(1, 129)), set()

    class Shapes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.aten.bmm.default:
                shapes.add((args[0].shape, args[1].shape))
            return function(*args, **(kwargs or {}))

    inputs = random_inputs(lengths, 8, torch.bfloat16)
    with Shapes():
        compute("padded", lengths, inputs)
    assert {max(a[1:]) for a, _ in shapes} == {64, 128} and len(shapes) <= 2 * 3


def test_padded_computes_a_group_at_a_time(set_sizes):
    lengths = [64] * 20
    inputs = random_inputs(lengths, 8, torch.bfloat16, heads=2)
    for sequences in (20, 3):
        set_sizes(GROUP_SCORES=sequences * 2 * 64 * 64)
        with LargestResult() as largest:
            compute("padded", lengths, inputs)
        assert largest.elements == sequences * 2 * 64 * 64


# The choice


@pytest.mark.parametrize("name", [*HERE, "a name of the future"])
def test_choose_passes_names_through(name):
    assert resolve_backend(name, CPU, torch.bfloat16, 64) == name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_auto_on_a_gpu_is_triton_where_it_runs(monkeypatch, dtype):
    cuda = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    assert [resolve_backend("auto", cuda, dtype, size) for size in (32, 64, 128)] == ["triton"] * 3
    assert resolve_backend("auto", cuda, dtype, 48) == "sdpa"
    with pytest.raises(UserError, match="heads of 32, 64 or 128, and the model's have 48"):
        resolve_backend("triton", cuda, dtype, 48)


def test_auto_on_an_old_gpu_is_sdpa(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert resolve_backend("auto", torch.device("cuda"), torch.float16, 64) == "sdpa"


def test_auto_on_a_gpu_without_triton_is_sdpa(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert resolve_backend("auto", torch.device("cuda"), torch.float16, 64) == "sdpa"
    with pytest.raises(UserError, match="triton is not installed"):
        resolve_backend("triton", torch.device("cuda"), torch.float16, 64)


def test_triton_on_a_cpu_is_a_user_error():
    with pytest.raises(UserError, match="needs a CUDA device"):
        resolve_backend("triton", CPU, torch.float32, 32)


def test_the_scripts_start_without_triton():
    code = "import sys; sys.modules['triton'] = None; import train, finetune, prompt"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_unknown_backend_is_a_key_error():
    *qkv, _ = random_inputs([2], 32)
    with pytest.raises(KeyError, match="fast"):
        attention(*qkv, cumulative([2]), 2, "fast")
