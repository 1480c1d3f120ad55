"""LoRA and (IA)³: what they compute, peft's directories in both directions, merging."""

import json
import math
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from minitune.batching import PackedBatch
from minitune.checkpoint import load_for_classification, weights_hash
from minitune.ia3 import ScaledKeysAndValues, ScaledUnits
from minitune.lora import LINEAR_MAPS, TARGETS, LoRA, insert_lora
from minitune.merging import add_task_vectors, merge, merge_runs
from minitune.methods import build
from minitune.model import BertForSequenceClassification
from minitune.peft_files import PeftDirectory, peft_tensors
from minitune.prediction import Classifier, load_together, predict_together
from minitune.support.errors import UserError
from minitune.support.runtime import Runtime
from tests.benchmarks import lora_pictures
from tests.peft_cases import (
    CONFIG,
    EVERY_MAP,
    FILE,
    LORA,
    OURS,
    SEQUENCES,
    TEXTS,
    write_adapter,
    write_base,
)
from tests.test_finetune import assert_refused, succeed

pytestmark = pytest.mark.usefixtures("fixed_seed")
FP32 = Runtime.start("cpu", "fp32")
LABELS = CONFIG.id2label
CASES = json.loads(FILE.read_text())
each_case = pytest.mark.parametrize("case", CASES)
each_of_ours = pytest.mark.parametrize("case", OURS)


@pytest.fixture
def base(tmp_path):
    write_base(tmp_path / "base")
    return tmp_path / "base"


def batch():
    return PackedBatch.from_sequences([torch.tensor(ids) for ids in SEQUENCES])


@torch.no_grad()
def logits(model):
    return model.eval()(batch())


@torch.no_grad()
def shaken(model, spread=0.1):
    """The model with nothing that trains as it was."""
    for p in (p for p in model.parameters() if p.requires_grad):
        p.add_(torch.randn_like(p), alpha=spread)
    return model


def close(one, other, tolerance=1e-5):
    torch.testing.assert_close(one, other, rtol=0, atol=tolerance)


def saved(directory, case, base, labels=LABELS, max_len=20):
    """A run of one of the cases OURS, and its model."""
    method, options = OURS[case]
    model = shaken(build(method, base, labels, **options))
    directory.mkdir()
    hash = weights_hash(base)
    PeftDirectory(method, "cls", options, labels, max_len, str(base), hash).save(model, directory)
    return model


# What they compute


@torch.no_grad()
def filled(lora):
    """B, and the lengths of DoRA, as after some training."""
    lora.B.normal_(std=0.3)
    if lora.magnitude is not None:
        lora.magnitude.mul_(1 + 0.2 * torch.randn_like(lora.magnitude))
    return lora


@pytest.mark.parametrize("chosen", [[0, 1, 2], [0, 2], [1]])
@pytest.mark.parametrize("dora", [False, True])
def test_each_of_three_maps_has_its_own_low_rank_update_beside_one_multiplication(chosen, dora):
    linear, x = nn.Linear(16, 3 * 16), torch.randn(7, 16)
    lora = filled(LoRA(linear, 3, chosen, rank=4, scale=1.5, dora=dora))
    weight, bias, x64 = linear.weight.double(), linear.bias.double(), x.double()
    expected = []
    for k in range(3):
        W, b = weight[16 * k : 16 * k + 16], bias[16 * k : 16 * k + 16]
        if k in chosen:
            i = chosen.index(k)
            W = W + 1.5 * lora.B[i].double() @ lora.A[i].double()
            if dora:
                W = W / W.norm(dim=1, keepdim=True) * lora.magnitude[i].double()[:, None]
        expected.append(x64 @ W.T + b)
    close(lora(x).double(), torch.cat(expected, 1))
    close(lora.merged()(x).double(), torch.cat(expected, 1))
    assert torch.equal(linear.weight.double(), weight)  # which other runs on this base share
    assert lora.A.shape == (len(chosen), 4, 16) and lora.B.shape == (len(chosen), 16, 4)


def test_dropout_is_on_what_the_update_reads_and_on_nothing_else():
    linear, x = nn.Linear(16, 8), torch.ones(4000, 16)
    lora = filled(LoRA(linear, 1, [0], rank=2, scale=1.0, dropout=0.5)).train()
    update = lora(x) - linear(x)
    close(update.mean(0), (lora.B[0] @ lora.A[0]).sum(1), tolerance=0.05)
    assert update.std(0).min() > 0.01
    close(lora.eval()(x) - linear(x), (lora.B[0] @ lora.A[0]).sum(1).expand(4000, 8))


def test_the_length_of_a_row_counts_as_a_constant_in_the_gradient_of_dora():
    linear, x = nn.Linear(6, 5), torch.randn(3, 6)
    lora = filled(LoRA(linear.requires_grad_(False), 1, [0], rank=2, scale=2.0, dora=True))
    lora(x).square().sum().backward()
    A, B = (p[0].detach().clone().requires_grad_() for p in (lora.A, lora.B))
    m = lora.magnitude[0].detach().clone().requires_grad_()
    W = linear.weight + 2 * B @ A
    y = x @ (W * (m / W.norm(dim=1).detach())[:, None]).T + linear.bias
    y.square().sum().backward()
    for ours, expected in ((lora.A, A), (lora.B, B), (lora.magnitude, m)):
        close(ours.grad[0], expected.grad)


@pytest.mark.parametrize("rslora, scale", [(False, 16 / 4), (True, 16 / 2)])
def test_the_scale_is_alpha_over_the_rank_or_over_its_root(rslora, scale):
    model = BertForSequenceClassification(CONFIG)
    insert_lora(model.bert, EVERY_MAP, 4, 16, rslora=rslora)
    loras = [module for module in model.modules() if isinstance(module, LoRA)]
    assert len(loras) == len(LINEAR_MAPS) * CONFIG.num_hidden_layers
    assert {lora.scale for lora in loras} == {scale}


def test_ia3_multiplies_keys_values_and_the_inputs_of_the_second_map():
    linear, x = nn.Linear(8, 24), torch.randn(5, 8)
    scaled = ScaledKeysAndValues(linear)
    nn.init.normal_(scaled.keys), nn.init.normal_(scaled.values)
    q, k, v = linear(x).chunk(3, 1)
    close(scaled(x), torch.cat([q, k * scaled.keys, v * scaled.values], 1))
    close(scaled.merged()(x), scaled(x))
    units = ScaledUnits(linear)
    nn.init.normal_(units.units)
    close(units(x), F.linear(x * units.units, linear.weight, linear.bias))
    close(units.merged()(x), units(x))


@each_of_ours
def test_training_starts_from_what_the_pretrained_network_computes(base, case):
    method, options = OURS[case]
    model, (plain, _) = (
        build(method, base, LABELS, **options),
        load_for_classification(base, LABELS),
    )
    with torch.no_grad():
        positions = batch().cls_positions
        close(model.eval().bert(batch(), positions), plain.eval().bert(batch(), positions), 1e-6)


@pytest.mark.parametrize("target", TARGETS)
def test_a_target_is_one_linear_map_of_every_layer(base, target):
    options = LORA | {"lora_targets": target}
    names = peft_tensors(build("lora", base, LABELS, **options))
    found = [name for name in names if name.endswith("lora_A.weight")]
    inside = "attention.self." if target in ("query", "key", "value") else ""
    paths = [f"base_model.model.bert.encoder.layer.{i}.{inside}{target}" for i in (0, 1)]
    assert found == [f"{path}.lora_A.weight" for path in paths]


@pytest.mark.parametrize("case", ["lora", "lora with dora", "ia3"])
def test_everything_that_trains_has_a_gradient_and_nothing_else(base, case):
    method, options = OURS[case]
    model = shaken(build(method, base, LABELS, **options))
    F.cross_entropy(model(batch()), torch.tensor([0, 2, 1])).backward()
    for name, p in model.named_parameters():
        assert (p.grad is not None) == p.requires_grad, name
        assert p.grad is None or p.grad.any(), name


def test_in_bf16_the_frozen_maps_are_cast_and_the_answers_are_near(base):
    method, options = OURS["lora with dora"]
    model = shaken(build(method, base, LABELS, **options))
    exact = logits(model)
    bf16 = Runtime.start("cpu", "bf16")
    bf16.cast_frozen(model.bert)
    down = model.bert.layers[0].feed_forward.down
    assert down.weight.dtype == torch.bfloat16 and down.A.dtype == torch.float32
    with bf16.autocast():
        close(logits(model).float(), exact, tolerance=0.1 * exact.abs().max().item())


# Directories of peft


@each_case
def test_what_peft_saved_gives_the_logits_that_peft_computed(base, tmp_path, case):
    write_adapter(tmp_path / "peft", CASES[case], base)
    classifier = Classifier.load(str(tmp_path / "peft"), FP32)
    expected = torch.tensor(CASES[case]["logits"])
    close(logits(classifier.model), expected)
    plain = logits(Classifier.load(str(base), FP32).model)
    assert (plain - expected).abs().max() > 0.1
    assert (classifier.labels, classifier.max_len) == (LABELS, CONFIG.max_position_embeddings)


@each_of_ours
def test_what_is_saved_are_the_tensors_and_the_settings_that_peft_loaded(base, tmp_path, case):
    saved(tmp_path / "run", case, base)
    tensors = load_file(tmp_path / "run" / "adapter_model.safetensors")
    assert {name: list(t.shape) for name, t in tensors.items()} == CASES[case]["tensors"]
    config = json.loads((tmp_path / "run" / "adapter_config.json").read_text())
    loaded, own = CASES[case]["config"], ("auto_mapping", "base_model_name_or_path")
    for key in config.keys() - own:
        theirs = loaded[key]
        if key == "modules_to_save":  # peft adds the classifier's possible names
            theirs = list(dict.fromkeys(name for name in theirs if name != "score"))
        assert config[key] == theirs, key
    assert config["base_model_name_or_path"] == str(base)


@each_of_ours
def test_reloaded_it_gives_the_same_bits_with_labels_and_length(base, tmp_path, case):
    other = {0: "one", 1: "two", 2: "three", 3: "four"}
    model = saved(tmp_path / "run", case, base, other)
    loaded = Classifier.load(str(tmp_path / "run"), FP32)
    assert torch.equal(logits(loaded.model), logits(model))
    assert (loaded.labels, loaded.max_len, loaded.base_hash) == (other, 20, weights_hash(base))
    trains = {name for name, p in loaded.model.named_parameters() if p.requires_grad}
    assert trains == {name for name, p in model.named_parameters() if p.requires_grad}


def test_on_another_base_it_is_refused(base, tmp_path):
    saved(tmp_path / "run", "lora", base)
    tensors = load_file(base / "model.safetensors")
    tensors["classifier.bias"] += 1
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="trained on another base model"):
        Classifier.load(str(tmp_path / "run"), FP32)


def test_what_peft_leaves_out_comes_from_the_base_or_is_an_error(base, tmp_path):
    write_adapter(tmp_path / "peft", CASES["query and value"], base)
    tensors = load_file(base / "model.safetensors")
    bare = {name: t for name, t in tensors.items() if "pooler" not in name}
    save_file(bare, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="no pooler"):
        Classifier.load(str(tmp_path / "peft"), FP32)
    config = json.loads((base / "config.json").read_text())
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    del config["id2label"], config["label2id"]
    (base / "config.json").write_text(json.dumps(config))
    labels = Classifier.load(str(tmp_path / "peft"), FP32).labels
    assert labels == {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"id2label": {"0": "a", "1": "b", "2": "b"}}, "the same name"),
        ({"id2label": {"1": "a", "2": "b", "3": "c"}}, "from 0 on"),
        ({"problem_type": "multi_label_classification"}, "problem_type"),
    ],
)
def test_labels_of_the_base_that_cannot_be_are_refused(base, tmp_path, config, message):
    write_adapter(tmp_path / "peft", CASES["query and value"], base)
    raw = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(raw | config))
    with pytest.raises(UserError, match=message):
        Classifier.load(str(tmp_path / "peft"), FP32)


def test_of_an_older_peft_which_has_neither_rslora_nor_dora(base, tmp_path):
    case = CASES["query and value"]
    config = {key: v for key, v in case["config"].items() if key not in ("use_dora", "use_rslora")}
    write_adapter(tmp_path / "peft", case | {"config": config}, base)
    classifier = Classifier.load(str(tmp_path / "peft"), FP32)
    close(logits(classifier.model), torch.tensor(case["logits"]))


def test_a_lora_on_the_pooler_beside_ia3_is_refused(base, tmp_path):
    tensors = {"base_model.model.bert.pooler.dense.lora_A.weight": [2, 16]}
    tensors |= {"base_model.model.bert.pooler.dense.lora_B.weight": [16, 2]}
    case = CASES["ia3"]
    write_adapter(tmp_path / "peft", case | {"tensors": case["tensors"] | tensors}, base)
    with pytest.raises(UserError, match="there is no .*pooler.dense.lora"):
        Classifier.load(str(tmp_path / "peft"), FP32)


def test_a_directory_that_names_no_base_needs_one(base, tmp_path):
    write_adapter(tmp_path / "peft", CASES["lora"], "")
    with pytest.raises(UserError, match="--base"):
        Classifier.load(str(tmp_path / "peft"), FP32)
    classifier = Classifier.load(str(tmp_path / "peft"), FP32, base=str(base))
    close(logits(classifier.model), torch.tensor(CASES["lora"]["logits"]))


def without(*parts):
    """A change of the tensors: those with one of these parts in their names are left out."""
    return lambda tensors: {n: t for n, t in tensors.items() if not any(p in n for p in parts)}


def renamed(old, new):
    return lambda tensors: {name.replace(old, new): t for name, t in tensors.items()}


def added(name, shape=(4, 16)):
    return lambda tensors: tensors | {f"base_model.model.{name}": torch.zeros(shape)}


DAMAGED = {
    "another method": ({"peft_type": "LOHA"}, None, "peft_type is LOHA"),
    "no method": ({"peft_type": None}, None, "peft_type is None"),
    "ranks that differ": ({"rank_pattern": {"query": 2}}, None, "minitune has no rank_pattern"),
    "biases": ({"bias": "all"}, None, "minitune has no bias"),
    "a changed base": ({"init_lora_weights": "pissa"}, None, "minitune has no init_lora_weights"),
    "what the future brings": ({"use_magic": True}, None, "minitune has no use_magic"),
    "no rank": ({"r": 0}, None, "damaged"),
    "a rank of the wrong type": ({"r": "4"}, None, "damaged"),
    "another rank": ({"r": 2}, None, "shape"),
    "a rank above the size": ({"r": 17}, None, "rank 17"),
    "alpha is no number": ({"lora_alpha": None}, None, "damaged"),
    "alpha is infinite": ({"lora_alpha": math.inf}, None, "damaged"),
    "alpha is above all float32": ({"lora_alpha": 10**309}, None, "damaged"),
    "no LoRA": ({}, without("lora"), "no linear map"),
    "no classifier": ({}, without("classifier"), "classifier.weight is missing"),
    "no B": ({}, without("layer.1.attention.self.query.lora_B"), "lora_B.weight is missing"),
    "only one layer": ({}, without("layer.1"), "is missing"),
    "RoBERTa": ({}, renamed("bert.encoder", "roberta.encoder"), "minitune has no .*roberta"),
    "a decoder": ({}, renamed("bert.encoder.layer", "model.layers"), "minitune has no"),
    "an unknown target": ({}, added("bert.encoder.layer.0.gate.lora_A.weight"), "gate.lora_A"),
    "half a pooler": (
        {}, added("bert.pooler.dense.bias", (16,)), "pooler.dense.weight is missing",
    ),
    "half a LoRA on the pooler": (
        {}, added("bert.pooler.dense.lora_A.weight"), "pooler.dense.lora_B.weight is missing",
    ),
    "LoRA on embeddings": ({}, added("bert.embeddings.lora_embedding_A"), "lora_embedding_A"),
    "one layer more": (
        {}, added("bert.encoder.layer.2.attention.self.query.lora_A.weight"), "layer.2",
    ),
    "lengths without dora": (
        {}, added("bert.encoder.layer.0.attention.self.query.lora_magnitude_vector", (16,)),
        "lora_magnitude_vector",
    ),
    "dora without lengths": ({"use_dora": True}, None, "lora_magnitude_vector is missing"),
    "NaN": ({}, lambda tensors: {n: t * math.nan for n, t in tensors.items()}, "NaN"),
    "a regression": (
        {}, lambda tensors: {n: t[:1] if "classifier" in n else t for n, t in tensors.items()},
        "a classifier of 1 label",
    ),
    "no file of weights": ({}, "absent", "cannot be read"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGED)
def test_what_does_not_fit_is_one_line_and_never_skipped(base, tmp_path, damage):
    settings, change, message = DAMAGED[damage]
    case = CASES["query and value"]
    write_adapter(tmp_path / "peft", case | {"config": case["config"] | settings}, base)
    weights = tmp_path / "peft" / "adapter_model.safetensors"
    if change == "absent":
        weights.unlink()
    elif change:
        save_file(change(load_file(weights)), weights)
    with pytest.raises(UserError, match=message) as error:
        Classifier.load(str(tmp_path / "peft"), FP32)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


@pytest.mark.parametrize(
    "settings",
    [
        {"auto_mapping": {"minitune": {}}},
        {"auto_mapping": {"minitune": []}},
        {"auto_mapping": [1]},
        {
            "auto_mapping": {
                "minitune": {"labels": ["a", "a"], "max_len": 9, "base": {"sha256": "0"}}
            }
        },
    ],
)
def test_damaged_labels_are_one_line(base, tmp_path, settings):
    case = CASES["lora"]
    write_adapter(tmp_path / "peft", case | {"config": case["config"] | settings}, base)
    with pytest.raises(UserError, match="damaged") as error:
        Classifier.load(str(tmp_path / "peft"), FP32)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("targets", ["", "dense", "query,gate", "classifier"])
def test_targets_that_do_not_exist_are_refused(targets):
    with pytest.raises(UserError, match="no target"):
        insert_lora(BertForSequenceClassification(CONFIG).bert, targets, 4, 16)


def test_a_rank_above_the_size_of_the_maps_is_refused():
    insert_lora(BertForSequenceClassification(CONFIG).bert, EVERY_MAP, 16, 16)
    with pytest.raises(UserError, match="rank 17.* 16"):
        insert_lora(BertForSequenceClassification(CONFIG).bert, EVERY_MAP, 17, 16)


def test_a_directory_of_peft_is_trained_on_and_takes_the_names_of_the_data(base, tmp_path):
    write_adapter(tmp_path / "peft", CASES["dora"], base)
    rows = [
        (f"{text} {i}", label) for i in range(40) for text, label in zip(TEXTS, "xyz", strict=True)
    ]
    lines = [f'"{text}",{label}' for text, label in rows]
    (tmp_path / "data.csv").write_text("\n".join(["text,label", *lines]))
    words = ["--model", tmp_path / "peft", "--method", "lora", "--data", tmp_path / "data.csv"]
    words += ["--out", tmp_path / "out", "--epochs", "1", "--precision", "fp32", "--device", "cpu"]
    words += ["--lr", "1e-12", "--max-len", "32"]
    succeed(*words)
    run = Classifier.load(str(tmp_path / "out" / "lora"), FP32)
    close(logits(run.model), torch.tensor(CASES["dora"]["logits"]))
    assert run.labels == {0: "x", 1: "y", 2: "z"}
    config = json.loads((tmp_path / "out" / "lora" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["use_dora"]) == (4, 3, True)
    lines = [line for line in lines if not line.endswith("z")]
    (tmp_path / "data.csv").write_text("\n".join(["text,label", *lines]))
    assert_refused(*words, "--out", tmp_path / "other", naming="has the labels")


# Merging


@each_of_ours
def test_merged_it_computes_the_same_with_plain_linear_maps(base, case):
    method, options = OURS[case]
    model = shaken(build(method, base, LABELS, **options))
    before, frozen = logits(model), {n: p.clone() for n, p in model.state_dict().items()}
    merge(model)
    close(logits(model), before)
    plain = BertForSequenceClassification(CONFIG)
    plain.load_state_dict(model.state_dict())  # nothing more, nothing less
    changed = [name for name, p in plain.state_dict().items() if not torch.equal(p, frozen[name])]
    assert changed and all(".layers." in name for name in changed)


def options(*runs, out, weights=None, overwrite=False, base=None):
    runs = [str(run) for run in runs]
    return SimpleNamespace(merge=runs, weights=weights, out=out, overwrite=overwrite, base=base)


def test_a_bag_of_words_is_not_merged_and_that_is_said(base, tmp_path, capsys):
    saved(tmp_path / "run", "lora", base)
    ngrams = {"": [0.0] * 3, "film": [1.0] * 3}
    bag = {"network": 1.0, "bag": 1.0, "ngrams": ngrams}
    (tmp_path / "run" / "bag.json").write_text(json.dumps(bag))
    merge_runs(options(tmp_path / "run", out=tmp_path / "merged"))
    assert "without their bags of words" in capsys.readouterr().out
    assert Classifier.load(str(tmp_path / "run"), FP32).bag
    assert Classifier.load(str(tmp_path / "merged"), FP32).bag is None


@each_of_ours
def test_a_merged_directory_predicts_as_the_run(base, tmp_path, case):
    saved(tmp_path / "run", case, base)
    merge_runs(options(tmp_path / "run", out=tmp_path / "merged"))
    run, merged = (Classifier.load(str(tmp_path / name), FP32) for name in ("run", "merged"))
    close(logits(merged.model), logits(run.model))
    assert (merged.labels, merged.max_len) == (run.labels, run.max_len)
    for one, other in zip(run.predict(TEXTS), merged.predict(TEXTS), strict=True):
        assert one.label == other.label
    assert not [module for module in merged.model.modules() if isinstance(module, LoRA)]


def test_task_vectors_are_added_with_their_weights(base, tmp_path):
    for name, case in (("one", "lora"), ("two", "lora of two maps")):
        saved(tmp_path / name, case, base)
        merge_runs(options(tmp_path / name, out=tmp_path / f"{name}, merged"))
    merge_runs(
        options(tmp_path / "one", tmp_path / "two", out=tmp_path / "sum", weights=[0.7, -0.1])
    )
    start, one, two, total = (
        load_file(tmp_path / name / "model.safetensors")
        for name in ("base", "one, merged", "two, merged", "sum")
    )
    for name, tensor in total.items():
        a, b, zero = one[name].double(), two[name].double(), start[name].double()
        if name.startswith("classifier."):
            zero = torch.zeros_like(zero)
        close(tensor.double(), zero + 0.7 * (a - zero) - 0.1 * (b - zero), tolerance=1e-6)
    merge_runs(options(tmp_path / "one", tmp_path / "two", out=tmp_path / "mean"))
    mean = load_file(tmp_path / "mean" / "model.safetensors")
    for name, tensor in mean.items():
        close(tensor, (one[name] + two[name]) / 2, tolerance=1e-6)


def test_one_model_of_weight_one_is_that_model_to_the_bit():
    model, base = {"w": torch.randn(9), "head": torch.randn(2)}, {"w": torch.randn(9)}
    total = add_task_vectors(base, [model], [1.0])
    assert all(torch.equal(total[name], model[name]) for name in model)


def test_what_cannot_be_merged_is_refused_and_nothing_is_written(base, tmp_path):
    saved(tmp_path / "run", "lora", base)
    merge_runs(options(tmp_path / "run", out=tmp_path / "merged"))
    saved(tmp_path / "other labels", "lora", base, {0: "a", 1: "b"})
    shutil.copytree(base, tmp_path / "other base")
    tensors = load_file(base / "model.safetensors")
    tensors["classifier.bias"] += 1
    save_file(tensors, tmp_path / "other base" / "model.safetensors", {"format": "pt"})
    saved(tmp_path / "on another base", "lora", tmp_path / "other base")
    (tmp_path / "adapter").mkdir()
    described = {"method": "adapter", "pooling": "mean", "adapter_size": 4, "labels": ["a", "b"]}
    described |= {"max_len": 9, "base": {"path": str(base), "sha256": weights_hash(base)}}
    (tmp_path / "adapter" / "trained.json").write_text(json.dumps(described))
    run, out = tmp_path / "run", tmp_path / "out"
    for runs, weights, message in (
        ([tmp_path / "merged"], None, "holds no LoRA and no"),
        ([base], None, "holds no LoRA and no"),
        ([tmp_path / "adapter"], None, "adapter cannot be merged"),
        ([tmp_path / "absent"], None, "absent"),
        ([run, tmp_path / "other labels"], None, "other labels"),
        ([run, tmp_path / "on another base"], None, "another base model"),
        ([run], [0.5, 0.5], "2 for 1"),
        ([run, run], [1.0], "1 for 2"),
    ):
        with pytest.raises(UserError, match=message):
            merge_runs(options(*runs, out=out, weights=weights))
        assert not out.exists(), message
    for directory in (run, base):
        before = {path.name: path.read_bytes() for path in directory.iterdir()}
        with pytest.raises(UserError, match="something that is no run"):
            merge_runs(options(run, out=directory, overwrite=True))
        assert before == {path.name: path.read_bytes() for path in directory.iterdir()}
    with pytest.raises(UserError, match="--overwrite"):
        merge_runs(options(run, out=tmp_path / "merged"))
    merge_runs(options(run, out=tmp_path / "merged", overwrite=True))


# Several on one base


def test_runs_that_share_a_base_give_what_each_gives_alone(base, tmp_path):
    alone = {}
    for case in OURS:
        saved(tmp_path / case, case, base)
        alone[case] = logits(Classifier.load(str(tmp_path / case), FP32).model)
    together = load_together({case: str(tmp_path / case) for case in OURS}, FP32)
    for case in [*OURS, *OURS]:
        assert torch.equal(logits(together[case].model), alone[case]), case
    models = [classifier.model for classifier in together.values()]
    for name, p in models[0].named_parameters():
        if not p.requires_grad:
            places = {model.get_parameter(name).data_ptr() for model in models}
            assert len(places) == 1, f"{name} is in memory {len(places)} times"


def test_in_one_batch_each_text_may_name_its_own_run(base, tmp_path):
    texts, names = [*TEXTS, *TEXTS, "Fine."], ["lora", "ia3", "lora", "dora", "dora", "ia3", "lora"]
    cases = {"lora": "lora", "ia3": "ia3", "dora": "lora with dora"}
    for name, case in cases.items():
        saved(tmp_path / name, case, base)
    classifiers = load_together({name: str(tmp_path / name) for name in cases}, FP32)
    answers = predict_together(classifiers, texts, names)
    for text, name, answer in zip(texts, names, answers, strict=True):
        [alone] = Classifier.load(str(tmp_path / name), FP32).predict([text])
        assert answer.text == text and answer.label == alone.label
        assert answer.probabilities == pytest.approx(alone.probabilities, abs=1e-6)
    assert len({tuple(answer.probabilities.values()) for answer in answers}) == len(texts)
    assert predict_together(classifiers, [], []) == []
    with pytest.raises(UserError, match="no classifier is named other"):
        predict_together(classifiers, ["Fine."], ["other"])
    for wrong in ([], ["lora", "lora"]):
        with pytest.raises(UserError, match="1 texts and"):
            predict_together(classifiers, ["Fine."], wrong)


# The benchmark


def test_accuracy_against_rank_and_rate_trains_each_point_once(tmp_path, monkeypatch):
    trained = []

    def train(words, **training):
        trained.append(tuple(training.values()))
        figures = {"validation_accuracy": 0.8, "model": "a", "data": "b", "device": "c"}
        return figures | {"precision": "fp32", "epochs": 2}

    monkeypatch.setattr(lora_pictures, "train", train)
    words = ["--model", "a", "--seeds", "2", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["lora_pictures", *words])
    lora_pictures.main()
    ranks = {rank for method, rank, lr, _ in trained if method == "lora" and lr == 3e-3}
    assert ranks == {1, 2, 4, 8, 16, 64}
    for method, rates in (("lora", (3e-4, 3e-2)), ("full", (3e-5, 3e-3))):
        found = {lr for name, rank, lr, _ in trained if name == method and rank in (None, 8)}
        assert len(found) == 5 and (min(found), max(found)) == rates
    assert len(trained) == len(set(trained)) == 2 * (6 + 4 + 5)
    assert (tmp_path / "lora-pictures.png").is_file()
    points = json.loads((tmp_path / "points.json").read_text())["points"]
    (tmp_path / "points.json").write_text(json.dumps({"points": points[:3] + points[5:]}))
    lora_pictures.main()
    assert trained[30:] == trained[3:5]
