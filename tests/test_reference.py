"""The reference run: it is what its files say, and it answers where there is no run of one's own."""

import json
import math
import sys

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Generator

import prompt
from minitune.batching import PackedBatch
from minitune.checkpoint import load_masked_lm, load_tokenizer
from minitune.classification import TokenizedTexts
from minitune.data import Dataset, Reviews
from minitune.masking import mask_tokens
from minitune.pretraining import VALIDATION_RATE
from minitune.support.cli import run_script
from minitune.support.options import train_options
from minitune.support.reference import REFERENCE, is_comparable
from minitune.support.runs import Run, read_json
from tests.benchmarks import make_reference

ROWS = 48  # validation reviews, about 2,000 masked tokens
METRICS = read_json(REFERENCE / "metrics.json")


def test_every_version_of_the_weights_is_small():
    weights = load_file(REFERENCE / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}
    assert (REFERENCE / "model.safetensors").stat().st_size < 12e6


def test_it_was_made_by_the_default_recipe_and_its_log_is_whole():
    assert is_comparable(read_json(REFERENCE / "settings.json"))
    assert is_comparable(vars(train_options().parse_args([])))
    log = Run(REFERENCE).read_log()
    assert [entry["step"] for entry in log] == sorted({entry["step"] for entry in log})
    last = log[-1]
    assert (last["step"], last["tokens"]) == (METRICS["steps"], METRICS["tokens"])


def test_its_loss_and_accuracy_come_out_again_on_a_few_validation_rows():
    model, has_head = load_masked_lm(REFERENCE)
    assert has_head
    tokenizer = load_tokenizer(REFERENCE, model.config)
    texts = Reviews.load(Dataset("imdb")).texts["validation"][:: 1246 // ROWS]
    batch = PackedBatch.from_sequences(
        [torch.from_numpy(ids).long() for ids in TokenizedTexts(texts, tokenizer, 512).ids]
    )
    generator = Generator().manual_seed(0)
    batch.tokens, positions, labels = mask_tokens(
        batch.tokens, tokenizer, generator, VALIDATION_RATE, whole_word=False
    )
    with torch.no_grad():
        logits = model(batch, positions)
    losses, right = F.cross_entropy(logits, labels, reduction="none"), logits.argmax(-1) == labels
    for found, key in ((losses, "loss"), (right.float(), "masked_accuracy")):
        error = found.std().item() / math.sqrt(len(labels))
        assert abs(found.mean().item() - METRICS[key]) < 4 * error < 0.1 * METRICS["loss"]


def test_it_answers_where_no_model_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["--fill", "An awful movie. It was [MASK].", "--top", "20", "--json", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["prompt.py", *words])
    with pytest.raises(SystemExit) as ended:
        run_script(prompt.main)
    done = capsys.readouterr()
    assert not ended.value.code, done.err
    first_line = done.err.splitlines()[0]
    assert first_line.startswith("model: reference (there is no run of train.py on IMDb here; ")
    assert f"{METRICS['steps']:,} steps, loss {METRICS['loss']:.2f}" in first_line
    assert "bad" in [guess["word"] for guess in json.loads(done.out)["words"]]


@pytest.mark.parametrize(
    ("settings", "loss", "reason"),
    [
        ({}, METRICS["loss"] - 0.03, "stays"),
        ({"data": "mine.txt"}, 1.0, "default options"),
        ({"mask_rate": 0.15}, 1.0, "default options"),
    ],
)
def test_it_is_replaced_only_by_a_better_run_of_the_default(
    tmp_path, monkeypatch, capsys, settings, loss, reason
):
    before = {path: path.read_bytes() for path in REFERENCE.iterdir()}
    chosen = read_json(REFERENCE / "settings.json") | settings
    (tmp_path / "settings.json").write_text(json.dumps(chosen))
    (tmp_path / "metrics.json").write_text(json.dumps({"loss": loss}))
    monkeypatch.setattr(sys, "argv", ["make_reference", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        run_script(make_reference.main)
    assert ended.value.code == 2 and reason in capsys.readouterr().err
    assert {path: path.read_bytes() for path in REFERENCE.iterdir()} == before
