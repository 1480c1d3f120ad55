"""Explanations: integrated gradients against float64 and known answers, occlusion, rollout, the deletion test."""

import json
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import finetune
from minitune import explain as module
from minitune.batching import PackedBatch
from minitune.checkpoint import save_model
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
from minitune.methods import METHODS, build
from minitune.model import BertConfig, BertForSequenceClassification
from minitune.prediction import Classifier
from minitune.support.errors import UserError
from minitune.support.explanations import coloured, word_table
from minitune.support.runtime import Runtime

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
    """Classifiers, adapters and LoRA begin at zero or nearly so."""
    for name, parameter in model.named_parameters():
        if "classifier" in name or "adapter" in name or name.endswith(".B"):
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


@pytest.mark.parametrize("method", [method for method in METHODS if method != "prompt"])
def test_every_method_can_be_explained(base, tokenizer, method):
    options = {"adapter": {"adapter_size": 4}}
    options["lora"] = {"lora_targets": "query,value", "lora_rank": 2, "lora_alpha": 2.0}
    model = build(method, base, NAMES, **options.get(method, {}))
    question = ask(with_opinions(model), tokenizer)
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
    monkeypatch.setattr(module, "rollout", lambda question: torch.rand(len(question.words)))
    question = ask(BagOfWords(lambda x: x), tokenizer, "so good. " * 5 + "a joke, " * 10)
    own = explain(question)
    values = sorted(own.attributions, reverse=True)
    found = deletion_test(question, own, torch.Generator().manual_seed(0))
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


# finetune.py --explain


@pytest.fixture
def finetune_py(model, tokenizer, tmp_path, monkeypatch, capsys):
    """Runs the script on a fine-tuned model; returns the lines of stdout, and keeps stderr."""
    save_model(model, tokenizer, tmp_path)

    def run(*options):
        command = ["finetune.py", "--model", str(tmp_path), *options]
        monkeypatch.setattr(sys, "argv", command)
        capsys.readouterr()
        finetune.main()
        out, run.err = capsys.readouterr()
        return out.splitlines()

    return run


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_json_has_the_prediction_and_what_each_word_adds_in_float32(finetune_py, precision, model):
    lines = finetune_py("--predict", *TEXTS, "--explain", "--json", "--precision", precision)
    assert "precision: fp32" in finetune_py.err
    plain = finetune_py("--predict", *TEXTS, "--json", "--precision", "fp32")
    for line, without, text in zip(lines, plain, TEXTS, strict=True):
        answer, expected = json.loads(line), json.loads(without)
        why = answer.pop("explanation")
        assert answer["probabilities"] == pytest.approx(expected["probabilities"], abs=1e-5)
        assert answer | {"probabilities": 0} == expected | {"probabilities": 0}
        assert "".join(why["words"]) == text.lower().replace("é", "e").replace(" ", "")
        total = why["without_words"] + sum(why["attributions"])
        change = abs(why["difference"] - why["without_words"])
        assert abs(total - why["difference"]) <= 0.0201 * change
        assert why["error"] <= 0.02 and why["label"] == answer["label"] != why["other"]


def test_a_table_has_all_that_adds_up_and_the_error_of_the_sum(finetune_py):
    why = json.loads(finetune_py("--predict", TEXT, "--explain", "--json")[0])["explanation"]
    first, _, *rows, no_words, total, last, _ = finetune_py("--predict", TEXT, "--explain")
    assert first.startswith(why["label"]) and first.endswith(f"not {why['other']}")
    pairs = sorted(zip(why["words"], why["attributions"], strict=True), key=lambda p: -abs(p[1]))
    assert [row.split() for row in rows] == [[word, f"{added:+.2f}"] for word, added in pairs]
    assert float(no_words.split()[-1]) == pytest.approx(why["without_words"], abs=0.006)
    assert float(total.split()[-1]) == pytest.approx(why["difference"], abs=0.006)
    assert f"completeness error {why['error']:.2%} with {why['steps']} steps" in last
    assert "trusted" not in last


def test_an_explanation_with_a_wrong_sum_says_so(finetune_py, monkeypatch):
    monkeypatch.setattr(module, "MOST_STEPS", module.FIRST_STEPS)
    monkeypatch.setattr(module, "integrated_gradients", lambda question, _: question.ids / 7.0)
    lines = finetune_py("--predict", TEXT, "--explain")
    assert "not to be trusted" in lines[-2]


def test_a_terminal_gets_the_words_in_colours(finetune_py, monkeypatch):
    why = json.loads(finetune_py("--predict", TEXT, "--explain", "--json")[0])["explanation"]
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    _, words, legend, _ = finetune_py("--predict", TEXT, "--explain")
    assert words == coloured(why["words"], why["attributions"])
    assert f"blue: for {why['label']}; orange: for {why['other']}" in legend


def test_colours_say_the_sign_and_grow_with_the_number():
    line = coloured(["a", "b", "c", "d", "e"], [8.0, 1.0, -1.0, -4.0, 0.9])
    assert line.split() == [
        "\033[30;48;5;75ma\033[0m", "\033[30;48;5;195mb\033[0m", "\033[30;48;5;230mc\033[0m",
        "\033[30;48;5;208md\033[0m", "e",
    ]  # fmt: skip
    assert coloured(["a", "b"], [0.0, 0.0]) == "a b"


def test_a_table_of_many_words_has_the_sum_of_those_it_leaves_out():
    numbers = [(-1) ** i * i / 4 for i in range(30)]
    _, *rows, rest, last = word_table(list(map(str, range(30))), numbers, {"all": 7.0}).split("\n")
    assert [row.split()[0] for row in rows] == [str(i) for i in range(29, 9, -1)]
    assert rest.split() == ["(10", "other", "words)", f"{sum(numbers[:10]):+.2f}"]
    assert last.split() == ["all", "+7.00"]


@pytest.fixture
def reviews(tmp_path):
    """A file whose test rows are two long texts and a short one of each label."""
    file, texts = tmp_path / "reviews.csv", [f"{text} {TEXT} {TEXT}" for text in TEXTS[1:]]
    rows = [
        f'"{text}",{label}' for label in NAMES.values() for text in [*texts * 9, "so good", *texts]
    ]
    file.write_text("\n".join(["text,label", *rows]))
    return file


def test_the_deletion_test_is_on_long_test_rows_and_the_same_for_a_seed(finetune_py, reviews):
    command = ["--explain", "--evaluate", "4", "--data", str(reviews), "--json"]
    rows = [json.loads(line) for line in finetune_py(*command)]
    names = ["integrated gradients", "occlusion", "attention rollout", "random"]
    assert [row["ranking"] for row in rows] == names
    assert [row["texts"] for row in rows] == [4] * 4
    for row in rows:
        assert row["times_random"] == pytest.approx(row["drop"] / rows[-1]["drop"])
    assert rows[1]["spearman"] == pytest.approx(1) and abs(rows[0]["spearman"]) <= 1
    assert [json.loads(line) for line in finetune_py(*command)] == rows
    first, header, *table = finetune_py(*command[:-1])
    assert first.startswith("4 test rows of ")
    assert [line.split("  ")[0] for line in table] == names
    assert f"{rows[0]['drop']:.2f}" in table[0] and f"{rows[0]['spearman']:.2f}" in table[0]
    more = [
        json.loads(line) for line in finetune_py("--evaluate", "99", *command[:1], *command[3:])
    ]
    assert more[0]["texts"] == 6  # of nine test rows three are short


@pytest.mark.parametrize(
    "options",
    [
        ["--explain"],
        ["--evaluate", "3"],
        ["--predict", "so good", "--evaluate", "3"],
        ["--predict", "so good", "--evaluate", "3", "--explain"],
    ],
)
def test_explain_goes_with_one_of_two_jobs(finetune_py, options):
    with pytest.raises(UserError, match="--explain goes with --predict TEXT, or with --evaluate N"):
        finetune_py(*options)


def test_test_rows_that_are_too_short_are_an_error_of_one_line(finetune_py, tmp_path):
    file = tmp_path / "short.csv"
    file.write_text("text,label\n" + "so good,good\nawful,bad\n" * 20)
    with pytest.raises(UserError, match="no test row has 20 words"):
        finetune_py("--explain", "--evaluate", "3", "--data", str(file))


def test_a_text_that_cannot_be_explained_is_named(finetune_py):
    with pytest.raises(UserError, match="'漢字': nothing to explain"):
        finetune_py("--predict", "so good", "漢字", "--explain")


def test_from_python_too(model, tokenizer):
    classifier = Classifier(model, tokenizer, NAMES, 16, Runtime.start("cpu", "fp32"))
    answer = classifier.explain(TEXT)
    assert answer.truncated and len(answer.explanation.words) < 14
    assert answer.label == classifier.predict([TEXT])[0].label
