"""Feature extraction: a text's vector, a frozen encoder, blocks on disk, the head."""

import numpy as np
import pytest
import torch
from safetensors.torch import save

from minitune import features
from minitune.batching import PackedBatch
from minitune.checkpoint import load_for_classification, weights_hash
from minitune.classification import Classification, Examples, TokenizedTexts
from minitune.features import FeatureHead, Features, extract, feature_size, pooled_layers
from minitune.methods import build
from minitune.model import Bert, BertConfig
from minitune.optimizer import Optimizer
from minitune.prediction import Classifier
from minitune.support.errors import UserError
from minitune.support.runs import Run
from minitune.support.runtime import Runtime
from minitune.trained import Trained
from minitune.training import Trainer

CONFIG = BertConfig(
    vocab_size=60,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=24,
    max_position_embeddings=32,
    initializer_range=0.2,
    hidden_dropout_prob=0.3,
)
NAMES = {0: "negative", 1: "positive"}
TEXTS = [
    "An awful, awful film!", "Two hours of pure joy.", "a bad joke", "so good", "so bad", "joy",
    "Was that a joke, or two hours of film, or a café?", "pure joy, so pure", "awful", "good good film",
]  # fmt: skip
LABELS = torch.tensor([0, 1, 0, 1, 0, 1, 0, 1, 0, 1])
FP32 = Runtime.start("cpu", "fp32")
pytestmark = pytest.mark.usefixtures("fixed_seed")


@pytest.fixture
def examples(tokenizer):
    whole = Examples(TokenizedTexts(TEXTS, tokenizer, 32), LABELS)
    return {"train": whole, "validation": whole.select(np.array([7, 2, 5]))}


@pytest.fixture
def directory(tmp_path):
    path = tmp_path / "resume"
    path.mkdir()
    return path


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Four texts a file, few a batch: 3 files for training rows, 1 for validation rows."""
    monkeypatch.setattr(features, "BLOCK", 4)
    monkeypatch.setattr(features, "reading_tokens", lambda device: 20)


def one_by_one(bert: Bert, inputs: TokenizedTexts) -> torch.Tensor:
    """(N, F) features in float64, without dropout, one text and one layer after another."""
    bert.eval()
    rows = []
    for i in range(len(inputs.lengths)):
        batch, parts = inputs.select(np.array([i])).pack(), []
        x = bert.embeddings(batch)
        for layer in [*bert.layers, None]:
            wide = x[: batch.tokens.numel()].double()
            mean = wide.sum(0) / len(wide)
            parts += [mean, ((wide - mean).square().sum(0) / len(wide)).sqrt()]
            x = layer(x, batch) if layer else None
        rows.append(torch.cat(parts))
    return torch.stack(rows).detach()


def assert_alike(features, expected):
    """Deviations by their squares: near zero the root makes much of a last digit."""
    both = []
    for pooled in (features, expected):
        means, deviations = pooled.double().view(len(pooled), -1, 2, CONFIG.hidden_size).unbind(2)
        both.append(torch.stack([means, deviations.square()]))
    torch.testing.assert_close(*both, rtol=0, atol=1e-5)


def assert_unchanged(module, before):
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def count_texts(bert) -> list[int]:
    """A list that grows by the number of texts whenever the encoder reads a batch."""
    read = []
    bert.embeddings.register_forward_hook(
        lambda _, inputs, __: read.append(len(inputs[0].cu_seqlens) - 1)
    )
    return read


def extract_all(bert, examples, directory, runtime=FP32):
    """Features (N, F) and seconds of each split."""
    return {
        split: extract(bert, rows.inputs, directory / split, runtime)
        for split, rows in examples.items()
    }


# A text's vector


def test_features_are_mean_and_deviation_of_the_embeddings_and_of_each_layer(examples):
    bert, inputs = Bert(CONFIG).eval(), examples["train"].inputs
    pooled = pooled_layers(bert, inputs.pack())
    assert pooled.shape == (len(TEXTS), feature_size(bert)) and feature_size(bert) == 2 * 3 * 16
    assert_alike(pooled, one_by_one(bert, inputs))


def test_features_of_a_text_do_not_depend_on_the_batch():
    bert = Bert(CONFIG).eval()
    texts = [torch.randint(60, (length,)) for length in (5, 1, 16, 3)]
    before = pooled_layers(bert, PackedBatch.from_sequences(texts))
    for changed in range(len(texts)):
        others = [(text + 1) % 60 if i == changed else text for i, text in enumerate(texts)]
        after = pooled_layers(bert, PackedBatch.from_sequences(others))
        for i in range(len(texts)):
            assert torch.equal(before[i], after[i]) == (i != changed), (
                f"text {i} after changing {changed}"
            )
    for i, text in enumerate(texts):
        alone = pooled_layers(bert, PackedBatch.from_sequences([text]))
        assert_alike(alone, before[i : i + 1])


# Extraction


def test_extracted_rows_stand_in_the_order_of_the_texts_and_have_no_dropout(examples, directory):
    bert = Bert(CONFIG).train()
    for split, (matrix, seconds) in extract_all(bert, examples, directory).items():
        assert seconds > 0 and not matrix.requires_grad
        assert_alike(matrix, one_by_one(bert, examples[split].inputs))


def test_blocks_on_disk_are_not_computed_again(examples, directory):
    bert = Bert(CONFIG)
    read = count_texts(bert)
    first = extract_all(bert, examples, directory)
    assert sum(read) == len(TEXTS) + 3 and len(list(directory.iterdir())) == 4
    read.clear()
    again = extract_all(bert, examples, directory)
    assert read == []
    for split, (matrix, seconds) in again.items():
        assert torch.equal(matrix, first[split][0])
        assert seconds == first[split][1]  # of the work, not of reading it back


def test_a_killed_extraction_continues_with_what_is_missing(examples, directory):
    bert = Bert(CONFIG)
    first = extract_all(bert, examples, directory)
    (directory / "train-00001.safetensors").unlink()
    (directory / "train-00001.safetensors.partial").mkdir()
    read = count_texts(bert)
    again = extract_all(bert, examples, directory)
    assert sum(read) == 4
    for split, (matrix, _) in again.items():
        assert torch.equal(matrix, first[split][0])


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"half a block",
        {"features": torch.zeros(4, 5), "seconds": torch.tensor(1.0)},
        {"features": torch.zeros(3, 96), "seconds": torch.tensor(1.0)},
        {"features": torch.zeros(4, 96)},
        {"seconds": torch.tensor(1.0)},
    ],
)
def test_a_damaged_block_is_an_error_of_one_line(examples, directory, content):
    path = directory / "train-00001.safetensors"
    path.write_bytes(content if isinstance(content, bytes) else save(content))
    with pytest.raises(UserError, match="train-00001.safetensors is damaged") as error:
        extract_all(Bert(CONFIG), examples, directory)
    assert "\n" not in str(error.value)


def test_two_processes_share_the_blocks_and_both_have_all(examples, directory, tmp_path):
    bert, inputs = Bert(CONFIG), examples["train"].inputs
    whole, _ = extract(bert, inputs, directory / "train", FP32)
    read, shared = count_texts(bert), tmp_path / "shared"
    matrices, sizes = {}, {"device": FP32.device, "precision": "fp32", "world_size": 2}

    class Second(Runtime):
        def barrier(self):
            pass

    def second():  # the first process waits for the others: here, by being them
        matrices[1], _ = extract(bert, inputs, shared, Second(**sizes, rank=1))

    class First(Runtime):
        barrier = staticmethod(second)

    matrices[0], _ = extract(bert, inputs, shared, First(**sizes, rank=0))
    assert sum(read) == len(TEXTS)
    for matrix in matrices.values():
        assert torch.equal(matrix, whole)


# The head


def test_the_head_sees_features_of_mean_0_and_spread_1():
    head, matrix = FeatureHead(4, 4), torch.randn(50, 4) * torch.tensor([1e-3, 1.0, 50.0, 0.0]) + 7
    torch.nn.init.eye_(head.classifier.weight)
    head.standardise(matrix)
    seen = head(matrix)
    torch.testing.assert_close(seen.mean(0), torch.zeros(4), rtol=0, atol=1e-3)
    spread = torch.tensor([1.0, 1.0, 1.0, 0.0])  # a feature that never changes says nothing
    torch.testing.assert_close(seen.std(0, correction=0), spread, rtol=1e-3, atol=1e-6)
    others = torch.randn(5, 4)  # by the same mean and spread, whatever is in their batch
    assert torch.equal(head(others)[:2], head(others[:2]))


def test_an_untrained_head_has_no_opinion():
    head = FeatureHead(6, 3)
    assert head(torch.randn(5, 6)).eq(0).all()


def test_a_head_can_start_with_the_frequencies_of_the_labels():
    head = FeatureHead(6, 3)
    head.start_with_frequencies(torch.tensor([0] * 15 + [2] * 5))
    p = head(torch.randn(5, 6)).softmax(-1)
    torch.testing.assert_close(p[:, 0] / p[:, 2], torch.full((5,), 3.0))
    assert (p[:, 1] < 0.05).all() and head.classifier.bias.requires_grad


def test_the_head_computes_in_float32_under_autocast():
    head, matrix = FeatureHead(6, 3), torch.randn(5, 6)
    torch.nn.init.normal_(head.classifier.weight)
    expected = head(matrix)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(head(matrix), expected)


def test_features_are_packed_by_row():
    matrix = torch.randn(6, 3)
    inputs = Features(matrix)
    assert torch.equal(inputs.select(np.array([4, 0, 4])).pack(), matrix[[4, 0, 4]])
    assert inputs.lengths.tolist() == [1] * 6


# All of it


def fine_tuned(base, examples, run):
    """A feature classifier after extraction and training, and the features of each split."""
    model = build("feature", base, NAMES)
    run.start({})
    extracted = {}
    for split, (matrix, _) in extract_all(model.bert, examples, run.state_path.parent).items():
        extracted[split] = Examples(Features(matrix), examples[split].labels)
    model.head.standardise(extracted["train"].inputs.matrix)
    task = Classification(
        extracted["train"], extracted["validation"], batch_tokens=4, epochs=30, seed=0
    )
    optimizer = Optimizer(model.head, "adamw", 0.05, 0.05, 0.0)
    trainer = Trainer(model.head, optimizer, task, run, FP32, seed=0)
    trainer.steps = task.steps
    trainer.train()
    return model.eval(), extracted


def test_the_encoder_stays_as_it_was_bit_for_bit(base, examples, tmp_path):
    before = load_for_classification(base, NAMES)[0].bert.state_dict()
    model, _ = fine_tuned(base, examples, Run(tmp_path / "run"))
    assert_unchanged(model.bert, before)
    assert all(p.grad is None for p in model.bert.parameters())
    assert model.head.classifier.weight.abs().max() > 0.05


def test_what_the_head_learned_from_features_holds_for_texts(base, examples, tmp_path):
    model, extracted = fine_tuned(base, examples, Run(tmp_path / "run"))
    train = examples["train"]
    with torch.no_grad():
        of_features = model.head(extracted["train"].inputs.matrix)
        of_texts = model(train.inputs.pack())
    torch.testing.assert_close(of_texts, of_features, rtol=0, atol=1e-4)
    assert of_texts.argmax(-1).tolist() == LABELS.tolist()


def test_saved_and_reloaded_it_gives_the_same_bits(base, examples, tmp_path):
    model, _ = fine_tuned(base, examples, Run(tmp_path / "run"))
    described = ("feature", "layers", {}, NAMES, 32, str(base), weights_hash(base))
    Trained(*described).save(model, tmp_path / "run")
    loaded = Classifier.load(str(tmp_path / "run"), FP32)
    batch = examples["train"].inputs.pack()
    with torch.no_grad():
        assert torch.equal(loaded.model(batch), model.eval()(batch))
    predictions = list(loaded.predict(TEXTS, 100))
    assert [p.label for p in predictions] == [NAMES[label] for label in LABELS.tolist()]
