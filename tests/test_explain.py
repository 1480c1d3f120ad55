"""Explanations: integrated gradients against float64 and known answers, occlusion, rollout, the deletion test."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from minitune import explain as module
from minitune.batching import PackedBatch
from minitune.explain import (
    Explanation,
    Question,
    attention_maps,
    deletion_test,
    explain,
    integrated_gradients,
    occlusion,
    rollout,
    spearman,
    words_of,
)
from minitune.finetuning import METHODS, build
from minitune.model import BertConfig, BertForSequenceClassification
from minitune.support.errors import UserError

CONFIG = BertConfig(
    vocab_size=70,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=24,
    max_position_embeddings=64,
    initializer_range=0.3,
)
NAMES = {0: "bad", 1: "fair", 2: "good"}
TEXT = "An unforgettable film: two hours of pure joy, and what a joke!"
TEXTS = [TEXT, "an awful film, so awful", "a café so good"]

pytestmark = pytest.mark.usefixtures("fixed_seed")


def with_opinions(model):
    """Classifiers begin at zero or nearly so."""
    for name, parameter in model.named_parameters():
        if "classifier" in name or "adapter" in name:
            nn.init.normal_(parameter, std=0.5)
    return model.eval()


@pytest.fixture
def model():
    return with_opinions(BertForSequenceClassification(replace(CONFIG, id2label=NAMES)))


def ask(model, tokenizer, text=TEXT, batch_tokens=None):
    return Question(
        model, tokenizer, tokenizer.frame(tokenizer.encode([text])[0]), NAMES, batch_tokens
    )


@pytest.fixture
def question(model, tokenizer):
    return ask(model, tokenizer)


class BagOfWords(nn.Module):
    """Logits that are sums over tokens of a function of the word embedding."""

    pooling = "mean"

    def __init__(self, of_embedding):
        super().__init__()
        self.bert = nn.Module()
        self.bert.embeddings = nn.Module()
        self.bert.embeddings.word = nn.Embedding(CONFIG.vocab_size, 16)
        self.maps, self.of_embedding = nn.Linear(16, 3, bias=False), of_embedding

    def forward(self, batch):
        each = self.maps(self.of_embedding(self.bert.embeddings.word(batch.tokens)))
        return torch.zeros(len(batch.cu_seqlens) - 1, 3).index_add(0, batch.sequence_ids, each)


# Integrated gradients


def in_float64(monkeypatch, model):
    """The same model and text in float64, as f of the word embeddings (n, C)."""
    norm = "minitune.model.LayerNorm.forward"
    monkeypatch.setattr(norm, nn.LayerNorm.forward)  # ours is float32
    monkeypatch.setattr("minitune.model.mean_of_tokens", lambda x, batch: x.mean(0, keepdim=True))
    model = model.double()
    embedding = model.bert.embeddings.word

    class Given(nn.Module):
        def forward(self, tokens):
            return F.pad(self.embedded, (0, 0, 0, len(tokens) - len(self.embedded)))

    model.bert.embeddings.word = given = Given()

    def f(question, embedded):
        given.embedded = embedded
        logits = model(PackedBatch.from_sequences([question.ids]))[0]
        return logits[question.label] - logits[question.other]

    return f, embedding


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_each_token_adds_what_gradients_in_float64_along_the_path_say(
    tokenizer, monkeypatch, pooling
):
    config = replace(CONFIG, id2label=NAMES)
    model = with_opinions(BertForSequenceClassification(config, pooling=pooling))
    question = ask(model, tokenizer)
    steps = 64
    found = integrated_gradients(question, steps).double()
    f, embedding = in_float64(monkeypatch, model)
    start, end = embedding(question.without_words).detach(), embedding(question.ids).detach()
    expected = torch.zeros(len(question.ids), dtype=torch.float64)
    for k in range(steps):
        point = (start + (k + 0.5) / steps * (end - start)).requires_grad_()
        (gradient,) = torch.autograd.grad(f(question, point), point)
        expected += (gradient * (end - start)).sum(1) / steps
    assert expected.abs().max() > 0.05
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_with_many_steps_the_sum_is_the_change_of_f_to_a_thousandth(model, tokenizer):
    for text in TEXTS:
        question = ask(model, tokenizer, text)
        change = question.value - question.values([question.without_words]).item()
        found = integrated_gradients(question, 1024)
        assert found.sum().item() == pytest.approx(change, rel=1e-3, abs=1e-5)


def test_of_a_linear_model_each_token_adds_its_own_term_in_one_step(tokenizer):
    question = ask(BagOfWords(lambda x: x), tokenizer)
    terms = question.model.maps(question.model.bert.embeddings.word.weight).detach()
    terms = terms[:, question.label] - terms[:, question.other]
    expected = terms[question.ids] - terms[question.without_words]
    found = integrated_gradients(question, 1)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert found[[0, -1]].tolist() == [0.0, 0.0]  # [CLS] and [SEP] do not change


def test_a_saturated_model_is_explained_where_its_gradient_is_next_to_nothing(tokenizer):
    question = ask(BagOfWords(lambda x: torch.tanh(4 * x)), tokenizer)
    found = explain(question)
    change = found.difference - found.without_words
    assert found.trusted and sum(found.attributions) == pytest.approx(change, rel=0.02)


def test_an_explanation_does_not_depend_on_the_batching(model, tokenizer):
    several = [
        integrated_gradients(ask(model, tokenizer, batch_tokens=budget), 8)
        for budget in (1, 50, 10_000)
    ]
    torch.testing.assert_close(several[1:], several[:1] * 2, rtol=1e-4, atol=1e-5)


def test_no_weight_and_no_later_answer_changes(model, tokenizer, question):
    batch, before = PackedBatch.from_sequences([question.ids]), dict(model.state_dict())
    before = {name: tensor.clone() for name, tensor in before.items()}
    answer = model(batch)
    explain(question)
    assert torch.equal(model(batch), answer)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("method", METHODS)
def test_every_method_can_be_explained(base, tokenizer, method):
    options = {"adapter_size": 4} if METHODS[method].options else {}
    question = ask(with_opinions(build(method, base, NAMES, **options)), tokenizer)
    found = explain(question)
    assert found.error <= 0.02 and max(map(abs, found.attributions)) > 1e-3


def test_features_that_do_not_vary_leave_their_gradient_finite(base, tokenizer):
    model = with_opinions(build("feature", base, NAMES))
    nn.init.zeros_(model.bert.embeddings.norm.weight)
    nn.init.zeros_(model.bert.embeddings.norm.bias)
    of_tokens = integrated_gradients(ask(model, tokenizer), 8)
    assert of_tokens.isfinite().all()


# What an explanation says


def test_it_compares_the_predicted_label_with_the_best_other_one(model, tokenizer, question):
    logits = model(PackedBatch.from_sequences([question.ids]))[0].detach()
    best, second, _ = logits.sort(descending=True).indices.tolist()
    found = explain(question)
    assert (found.label, found.other) == (NAMES[best], NAMES[second])
    assert found.difference == pytest.approx((logits[best] - logits[second]).item())
    hidden = tokenizer.frame([tokenizer.mask_id] * (len(question.ids) - 2))
    logits = model(PackedBatch.from_sequences([torch.tensor(hidden)]))[0]
    assert found.without_words == pytest.approx((logits[best] - logits[second]).item(), abs=1e-5)


def test_steps_are_doubled_until_the_sum_fits(question, monkeypatch):
    monkeypatch.setattr(module, "FIRST_STEPS", 1)
    monkeypatch.setattr(module, "GOOD_ERROR", 1e-3)
    found = explain(question)
    assert found.steps > 1 and found.error <= 1e-3
    errors = []
    for steps in (1, found.steps // 2):
        monkeypatch.setattr(module, "FIRST_STEPS", steps)
        monkeypatch.setattr(module, "MOST_STEPS", steps)
        errors.append(explain(question).error)
    assert min(errors) > 1e-3  # with fewer it did not fit


def test_an_explanation_whose_sum_is_off_is_not_trusted():
    def of_sum(total):
        return Explanation("good", "bad", 3.0, 1.0, ["a", "b"], [total + 1, -1.0], 8)

    assert of_sum(2.0).error == pytest.approx(0) and of_sum(2.0).trusted
    assert of_sum(1.92).error == pytest.approx(0.04) and of_sum(1.92).trusted
    assert of_sum(2.12).error == pytest.approx(0.06) and not of_sum(2.12).trusted


def test_pieces_are_summed_to_words_and_special_tokens_are_in_none(tokenizer, question):
    pieces = [tokenizer.token(i) for i in question.ids.tolist()]
    assert any(piece.startswith("##") for piece in pieces)
    words = TEXT.lower().replace(":", " :").replace(",", " ,").replace("!", " !").split()
    assert question.words == words
    spelled = [""] * (len(words) + 1)
    for piece, word in zip(pieces, question.word_of.tolist(), strict=True):
        spelled[word] += piece.removeprefix("##")
    assert spelled == [*words, "[CLS][SEP]"]
    of_tokens = torch.arange(len(pieces), dtype=torch.float32)
    expected = [of_tokens[question.word_of == word].sum().item() for word in range(len(words))]
    assert question.sum_of_words(of_tokens).tolist() == expected


def test_a_text_that_was_cut_inside_a_word_has_words(tokenizer):
    ids = tokenizer.frame([tokenizer.backend.token_to_id("##o"), *tokenizer.encode(["so good"])[0]])
    words, word_of = words_of(torch.tensor(ids), tokenizer)
    assert words == ["##o", "so", "good"] and word_of[1] == 0


@pytest.mark.parametrize("text", ["", " \u200b ", "漢字", "漢"])
def test_a_text_without_a_known_word_is_an_error_of_one_line(model, tokenizer, text):
    with pytest.raises(UserError, match="no word that the model knows"):
        ask(model, tokenizer, text)


def test_damaged_weights_are_an_error_of_one_line(model, tokenizer):
    nn.init.constant_(model.classifier.bias, torch.nan)
    with pytest.raises(UserError, match="damaged"):
        ask(model, tokenizer)


# Occlusion, rollout, the deletion test


def test_occlusion_is_the_fall_of_f_with_all_pieces_of_a_word_hidden(model, tokenizer, question):
    found = occlusion(question)
    assert found.shape == (len(question.words),)
    for word in (1, len(question.words) - 1):
        ids = [
            tokenizer.mask_id if of == word else token
            for token, of in zip(question.ids.tolist(), question.word_of.tolist(), strict=True)
        ]
        assert ids.count(tokenizer.mask_id) >= (2 if word == 1 else 1)
        logits = model(PackedBatch.from_sequences([torch.tensor(ids)]))[0]
        fall = question.value - (logits[question.label] - logits[question.other]).item()
        assert found[word].item() == pytest.approx(fall, abs=1e-5)


def test_attention_maps_are_the_weights_that_the_layers_use(model, question):
    maps, bert = attention_maps(model.bert, question.ids), model.bert
    n = len(question.ids)
    assert maps.shape == (2, 2, n, n)
    torch.testing.assert_close(maps.sum(-1), torch.ones(2, 2, n))
    mixed = []
    for layer in bert.layers:  # what goes into `out` is the weighted sum of the values
        layer.attention.out.register_forward_pre_hook(lambda _, args: mixed.append(args[0][:n]))
    batch = PackedBatch.from_sequences([question.ids])
    x = bert.embeddings(batch)
    for layer, weights, k in zip(bert.layers, maps, range(2), strict=True):
        value = layer.attention.qkv(x)[:n, 2 * 16 :].unflatten(1, (2, 8))
        x = layer(x, batch)
        expected = torch.einsum("hmn,nhd->mhd", weights, value).flatten(1)
        torch.testing.assert_close(mixed[k], expected)


def test_rollout_multiplies_half_identity_half_attention(model, question):
    first, second = attention_maps(model.bert, question.ids).double().mean(1)
    eye = torch.eye(len(question.ids), dtype=torch.float64)
    product = (second + eye) @ (first + eye) / 4
    of_tokens = product[0].float()  # of [CLS]
    torch.testing.assert_close(rollout(question), question.sum_of_words(of_tokens))
    assert rollout(question).sum().item() == pytest.approx(1 - product[0, [0, -1]].sum().item())
    model.pooling = "mean"
    torch.testing.assert_close(rollout(question), question.sum_of_words(product.mean(0).float()))


def test_deletion_hides_the_ten_words_that_matter_where_ten_do(tokenizer, monkeypatch):
    monkeypatch.delitem(module.RANKINGS, "attention rollout")  # there is no attention
    question = ask(BagOfWords(lambda x: x), tokenizer, "so good. " * 5 + "a joke, " * 10)
    own = explain(question)
    values = sorted(own.attributions, reverse=True)
    found = deletion_test(question, torch.Generator().manual_seed(0))
    for name in ("integrated gradients", "occlusion"):
        assert found[name]["drop"] == pytest.approx(sum(values[:10]), abs=1e-4)
        assert found[name]["spearman"] > 0.5  # equal words are in any order
    mean = 10 * sum(values) / len(values)
    spread = torch.tensor(values).std().item() * 10**0.5
    assert abs(found["random"]["drop"] - mean) < spread < found["occlusion"]["drop"] - mean


def test_spearman_is_the_correlation_of_ranks():
    x = torch.tensor([3.0, 1.0, 2.0, 10.0])
    assert spearman(x, x.exp()) == pytest.approx(1)
    assert spearman(x, -x) == pytest.approx(-1)
    # Ranks 2 0 1 3 and 0 1 2 3: 1 - 6 (4 + 1 + 1) / (4 · 15).
    assert spearman(x, torch.tensor([0.0, 1.0, 2.0, 3.0])) == pytest.approx(0.4)
