"""The kernels against the definition; run by test_kernels.py, on a GPU or in Triton's interpreter.

TRITON_INTERPRET=1 python -m pytest tests/kernels_in_their_own_process.py
"""

import pytest
import torch

from minitune.attention import resolve_backend
from minitune.batching import PackedBatch
from minitune.fast.fused_attention import fused, fused_backward, fused_self, fused_self_backward
from minitune.fast.layers import pad_rows
from minitune.model import BertConfig, Layer
from minitune.support.errors import UserError
from tests.attention_oracle import assert_is_the_definition, compute, cumulative, random_inputs

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
each_dtype = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str
)


def inputs(lengths, head_size, dtype=torch.float32, heads=2, counts=None):
    return [x.to(DEVICE) for x in random_inputs(lengths, head_size, dtype, heads, counts)]


def run(lengths, tensors):
    return compute("triton", lengths, tensors)


# Around the blocks of 32, 64 and 128 tokens; from 128 tokens on there are other tiles.
LENGTHS = [[1], [31, 32, 33, 1], [63, 64, 65], [129, 1, 127, 128, 7]]


@each_dtype
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_output_and_gradients_are_those_of_the_definition(lengths, dtype):
    assert_is_the_definition("triton", lengths, inputs(lengths, 64, dtype))


def test_many_blocks_of_keys_and_queries():
    assert_is_the_definition("triton", [512], inputs([512], 64, torch.bfloat16, heads=1))


@each_dtype
@pytest.mark.parametrize("head_size", [32, 128])
def test_other_sizes_of_heads(head_size, dtype):
    lengths = [70, 3]
    assert_is_the_definition("triton", lengths, inputs(lengths, head_size, dtype))


@each_dtype
@pytest.mark.parametrize("counts", [[1, 1, 1], [0, 20, 65], [70, 0, 0]], ids=str)
def test_only_some_tokens_may_be_queries(counts, dtype):
    lengths = [70, 20, 130]
    tensors = inputs(lengths, 32, dtype, counts=counts)
    assert_is_the_definition("triton", lengths, tensors, counts)


def test_tensors_of_any_strides():
    lengths = [40, 9]
    q, k, v, upstream = inputs(lengths, 32)
    turned = (
        v.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    )  # (T, H, D) with tokens next to each other
    constant = torch.ones((), device=DEVICE).expand_as(upstream)  # the gradient of a sum
    assert turned.stride(-1) != 1 and constant.stride() == (0, 0, 0)
    assert_is_the_definition("triton", lengths, [q, k.contiguous(), turned, constant])
    by_head = q.transpose(0, 1).contiguous().transpose(0, 1)  # strides that are none of k's
    assert by_head.stride(1) != k.stride(1)
    assert_is_the_definition("triton", lengths, [by_head, k, v, upstream])


def test_large_scores_do_not_overflow():
    # Scores of ±1000: past the last key weights may not become ∞ on the way to being masked.
    lengths = [5, 3]
    for sign in (1, -1):
        q, k, v, upstream = inputs(lengths, 32)
        q, k = torch.full_like(q, sign * 14.0), torch.full_like(k, 14.0)
        expected = torch.cat([x.mean(0, keepdim=True).expand_as(x) for x in v.split(lengths)])
        computed = run(lengths, [q, k, v, upstream])
        torch.testing.assert_close(computed[0], expected)
        assert all(x.isfinite().all() for x in computed)


def test_equal_inputs_give_equal_bits_whatever_the_neighbours_are():
    first, second, third = 33, 70, 5
    tensors = inputs([first, second, third], 32)
    together = run([first, second, third], tensors)
    again = run([first, second, third], tensors)
    alone = run([second], [x[first : first + second] for x in tensors])
    for x, y, z in zip(together, again, alone, strict=True):
        assert torch.equal(x, y)
        assert torch.equal(x[first : first + second], z)


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_q_k_and_v_in_one_tensor_give_the_same_bits(lengths):
    q, k, v, upstream = inputs(lengths, 64, torch.bfloat16)
    out, *gradients = run(lengths, [q, k, v, upstream])
    qkv = torch.stack([q.detach(), k.detach(), v.detach()], 1).requires_grad_()
    same, _ = fused_self(qkv, cumulative(lengths).to(DEVICE), max(lengths))
    assert torch.equal(same, out)
    (gradient,) = torch.autograd.grad(same, qkv, upstream)
    assert torch.equal(gradient, torch.stack(gradients, 1))


def test_torch_knows_the_shapes_strides_and_gradients_of_all_operations():
    lengths = [5, 3]
    q, k, v, upstream = inputs(lengths, 32)
    cu_seqlens = cumulative(lengths).to(DEVICE)
    qkv = [x.detach().requires_grad_() for x in (q, k, v)]
    torch.library.opcheck(fused, (*qkv, cu_seqlens, cu_seqlens, 5))
    out, lse = fused(q, k, v, cu_seqlens, cu_seqlens, 5)
    saved = q, k, v, out, lse, cu_seqlens, cu_seqlens, 5
    torch.library.opcheck(fused_backward, (upstream, *saved))
    together = torch.stack([q, k, v], 1)
    torch.library.opcheck(fused_self, (together.detach().requires_grad_(), cu_seqlens, 5))
    out, lse = fused_self(together, cu_seqlens, 5)
    torch.library.opcheck(fused_self_backward, (upstream, together, out, lse, cu_seqlens, 5))


def test_a_layer_under_autocast_is_close_to_the_same_without():
    torch.manual_seed(0)
    config = BertConfig(hidden_size=64, num_attention_heads=2, intermediate_size=64)
    layer = Layer(config, "triton").to(DEVICE)
    batch = PackedBatch.from_sequences([torch.zeros(n) for n in (9, 40)]).to(DEVICE)
    x = torch.randn(49, 64, device=DEVICE, requires_grad=True)
    exact = layer(pad_rows(x), batch)[:49]
    with torch.autocast(DEVICE.type, torch.bfloat16):
        close = layer(pad_rows(x), batch)[:49]
    (slope,), (exact_slope,) = (
        torch.autograd.grad((y * x.detach()).sum(), x) for y in (close, exact)
    )
    assert (close - exact).norm() <= 0.01 * exact.norm()
    assert (slope - exact_slope).norm() <= 0.02 * exact_slope.norm()


def test_a_size_of_heads_that_has_no_kernel():
    with pytest.raises(UserError, match="heads of 32, 64 or 128, and the model's have 48"):
        resolve_backend("triton", DEVICE, torch.float32, 48)
