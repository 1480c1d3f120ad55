"""Every attention backend against the definition, written out in float64."""

import pytest
import torch

from minitune.attention import BACKENDS, attention, choose

HEADS = 3
LENGTHS = [[1], [7], [128], [40] * 6, [129, 1, 64, 64, 127], [512, 3]]


def definition(q, k, v, lengths):
    """For each sequence and head: weights exp(q·k / √D), normalised over the keys, times v."""
    outputs = []
    for q1, k1, v1 in zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True):
        weights = (torch.einsum("ihd,jhd->hij", q1, k1) / q.size(-1) ** 0.5).exp()
        total = weights.sum(-1).T  # (length, H)
        outputs.append(torch.einsum("hij,jhd->ihd", weights, v1) / total[..., None])
    return torch.cat(outputs)


def random_inputs(lengths, head_size, dtype=torch.float32):
    """q, k, v and the gradient of the output, all of shape (T, H, D)."""
    generator = torch.Generator().manual_seed(sum(lengths) + head_size)
    shape = (4, sum(lengths), HEADS, head_size)
    return torch.randn(shape, generator=generator).to(dtype).unbind()


def cumulative(lengths):
    return torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)


def output_and_gradients(function, inputs):
    *qkv, upstream = inputs
    qkv = [x.clone().requires_grad_() for x in qkv]
    output = function(*qkv)
    return [output.detach(), *torch.autograd.grad(output, qkv, upstream)]


def compare(backend, lengths, inputs):
    """(name, computed, exact) for the output and the gradients of q, k and v."""
    cu_seqlens = cumulative(lengths)
    computed = output_and_gradients(
        lambda q, k, v: attention(q, k, v, cu_seqlens, max(lengths), backend), inputs
    )
    exact = output_and_gradients(
        lambda q, k, v: definition(q, k, v, lengths), [x.double() for x in inputs]
    )
    assert all(x.dtype == inputs[0].dtype and x.shape == inputs[0].shape for x in computed)
    return zip(("output", "dq", "dk", "dv"), [x.double() for x in computed], exact, strict=True)


@pytest.mark.parametrize("head_size", [32, 64])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_float32_output_and_gradients_are_those_of_the_definition(backend, lengths, head_size):
    for name, computed, exact in compare(backend, lengths, random_inputs(lengths, head_size)):
        assert (computed - exact).abs().max() <= 1e-5, name


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16_is_off_by_rounding_only(backend, lengths):
    # 1% of each sequence's own norm: two to three roundings of 2⁻⁸. The small absolute part is for
    # a sequence of one token, where dq and dk are zero.
    inputs = random_inputs(lengths, 64, torch.bfloat16)
    for name, computed, exact in compare(backend, lengths, inputs):
        for ours, true in zip(computed.split(lengths), exact.split(lengths), strict=True):
            assert (ours - true).norm() <= 0.01 * true.norm() + 1e-4, name


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_scores_do_not_overflow(backend):
    q, k, v, _ = random_inputs([5, 3], 32)
    k = torch.nn.functional.normalize(k, dim=-1) * 1000
    q = k * 10  # a token matches itself so well that it attends to nothing else
    out = attention(q, k, v, cumulative([5, 3]), 5, backend)
    torch.testing.assert_close(out, v)


@pytest.mark.parametrize("n", [1, 2, 7, 16, 33, 128, 129, 512])
def test_bfloat16_softmax_on_cpu_is_rounded_once(n):
    # What `reference` relies on. One rounding costs at most 2⁻⁸ of the value; 0.1% more is room for the
    # float32 arithmetic before it. A softmax with bfloat16 steps on the way is off by eight times that.
    scores = (4 * torch.randn(20, n, generator=torch.Generator().manual_seed(n))).bfloat16()
    exact = torch.softmax(scores.double(), -1)
    error = (torch.softmax(scores, -1).double() - exact).abs() / exact
    assert error.max() <= 2**-8 * 1.001


@pytest.mark.parametrize("name", [*BACKENDS, "a name of the future"])
def test_choose_passes_names_through(name):
    assert choose(name, torch.device("cpu"), torch.bfloat16) == name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_auto_stands_for_a_backend_that_exists(device, dtype):
    assert choose("auto", torch.device(device), dtype) in BACKENDS


def test_auto_computes_what_the_backend_it_stands_for_computes():
    lengths = [3, 9]
    for dtype in (torch.float32, torch.bfloat16):
        *qkv, _ = random_inputs(lengths, 32, dtype)
        chosen = choose("auto", torch.device("cpu"), dtype)
        expected = attention(*qkv, cumulative(lengths), 9, chosen)
        assert torch.equal(attention(*qkv, cumulative(lengths), 9), expected)


def test_unknown_backend_is_a_key_error():
    *qkv, _ = random_inputs([2], 32)
    with pytest.raises(KeyError, match="fast"):
        attention(*qkv, cumulative([2]), 2, "fast")
