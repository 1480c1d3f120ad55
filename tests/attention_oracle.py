"""What the tests of attention share: the definition in float64, and inputs like the model's."""

import torch

from minitune.attention import BACKENDS, attention

# The kernels of "triton" are tested in a process of their own: see test_kernels.py.
HERE = [name for name in BACKENDS if name != "triton"]


def definition(q, k, v, counts, lengths):
    """For each sequence and head: weights exp(q·k / √D), normalised over the keys, times v.

    `counts` are the numbers of queries, `lengths` those of keys.
    """
    outputs = []
    for q1, k1, v1 in zip(q.split(counts), k.split(lengths), v.split(lengths), strict=True):
        weights = (torch.einsum("ihd,jhd->hij", q1, k1) / q.size(-1) ** 0.5).exp()
        total = weights.sum(-1).T  # (count, H)
        outputs.append(torch.einsum("hij,jhd->ihd", weights, v1) / total[..., None])
    return torch.cat(outputs)


def random_inputs(lengths, head_size, dtype=torch.float32, heads=3, counts=None):
    """q, k, v and the gradient of the output, (T, H, D) each: views of one tensor, as in the model.

    With `counts`, how many queries each sequence has, the first and the last are (M, H, D).
    """
    generator = torch.Generator().manual_seed(sum(lengths) + head_size)
    shape = (sum(lengths), 4, heads, head_size)
    q, k, v, upstream = torch.randn(shape, generator=generator).to(dtype).unbind(1)
    M = sum(counts or lengths)
    return q[:M], k, v, upstream[:M]


def cumulative(lengths):
    return torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)


def output_and_gradients(function, inputs):
    *qkv, upstream = inputs
    qkv = [x.detach().requires_grad_() for x in qkv]
    output = function(*qkv)
    return [output.detach(), *torch.autograd.grad(output, qkv, upstream)]


def compute(backend, lengths, inputs, counts=None):
    """The output and the gradients of q, k and v."""
    device = inputs[0].device
    cu_seqlens_q = cumulative(counts).to(device) if counts else None
    return output_and_gradients(
        lambda *qkv: attention(
            *qkv, cumulative(lengths).to(device), max(lengths), backend, cu_seqlens_q
        ),
        inputs,
    )


def assert_is_the_definition(backend, lengths, inputs, counts=None):
    """Output and gradients, to the rounding of the inputs' dtype."""
    computed = compute(backend, lengths, inputs, counts)
    counts = counts or lengths
    exact = output_and_gradients(
        lambda q, k, v: definition(q, k, v, counts, lengths), [x.double() for x in inputs]
    )
    rows = {"output": counts, "dq": counts, "dk": lengths, "dv": lengths}
    for (name, rows1), ours, true in zip(rows.items(), computed, exact, strict=True):
        assert ours.dtype == inputs[0].dtype and ours.shape == true.shape, name
        if inputs[0].dtype == torch.float32:
            assert (ours - true).abs().max() <= 1e-5, name
            continue
        # 1% of each sequence's own norm: two to three roundings of 2⁻⁸, and for float16 an eighth
        # of it. The small absolute part is for a sequence of one token, where dq and dk are zero.
        share = 0.01 if inputs[0].dtype == torch.bfloat16 else 0.01 / 8
        for ours1, true1 in zip(ours.double().split(rows1), true.split(rows1), strict=True):
            assert (ours1 - true1).norm() <= share * (true1.norm() + 0.01), name
