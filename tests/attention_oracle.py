"""What the tests of attention share: the definition, written out in float64, and inputs like the model's."""

import torch

from minitune.attention import BACKENDS, attention

# The kernels of "triton" are tested in a process of their own: see test_kernels.py.
HERE = [name for name in BACKENDS if name != "triton"]


def definition(q, k, v, lengths):
    """For each sequence and head: weights exp(q·k / √D), normalised over the keys, times v."""
    outputs = []
    for q1, k1, v1 in zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True):
        weights = (torch.einsum("ihd,jhd->hij", q1, k1) / q.size(-1) ** 0.5).exp()
        total = weights.sum(-1).T  # (length, H)
        outputs.append(torch.einsum("hij,jhd->ihd", weights, v1) / total[..., None])
    return torch.cat(outputs)


def random_inputs(lengths, head_size, dtype=torch.float32, heads=3):
    """q, k, v and the gradient of the output, (T, H, D) each: views of one tensor, as in the model."""
    generator = torch.Generator().manual_seed(sum(lengths) + head_size)
    shape = (sum(lengths), 4, heads, head_size)
    return torch.randn(shape, generator=generator).to(dtype).unbind(1)


def cumulative(lengths):
    return torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)


def output_and_gradients(function, inputs):
    *qkv, upstream = inputs
    qkv = [x.detach().requires_grad_() for x in qkv]
    output = function(*qkv)
    return [output.detach(), *torch.autograd.grad(output, qkv, upstream)]


def compute(backend, lengths, inputs):
    """The output and the gradients of q, k and v."""
    cu_seqlens = cumulative(lengths).to(inputs[0].device)
    return output_and_gradients(
        lambda q, k, v: attention(q, k, v, cu_seqlens, max(lengths), backend), inputs
    )


def assert_is_the_definition(backend, lengths, inputs):
    """Output and gradients, to the rounding of the inputs' dtype."""
    computed = compute(backend, lengths, inputs)
    exact = output_and_gradients(
        lambda q, k, v: definition(q, k, v, lengths), [x.double() for x in inputs]
    )
    assert all(x.dtype == inputs[0].dtype and x.shape == inputs[0].shape for x in computed)
    for name, ours, true in zip(("output", "dq", "dk", "dv"), computed, exact, strict=True):
        if inputs[0].dtype == torch.float32:
            assert (ours - true).abs().max() <= 1e-5, name
            continue
        # 1% of each sequence's own norm: two to three roundings of 2⁻⁸, and for float16 an eighth of it.
        # The small absolute part is for a sequence of one token, where dq and dk are zero.
        share = 0.01 if inputs[0].dtype == torch.bfloat16 else 0.01 / 8
        for ours1, true1 in zip(ours.double().split(lengths), true.split(lengths), strict=True):
            assert (ours1 - true1).norm() <= share * (true1.norm() + 0.01), name
