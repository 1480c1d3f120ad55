"""Prompting's parts: clozes that keep their blank, label words, calibration, demonstrations, writing."""

import math

import pytest
import torch

from minitune.calibration import CALIBRATIONS, Ensemble, agree, expected_calibration_error, match_prior
from minitune.errors import UserError
from minitune.generation import fill_blanks, generate
from minitune.model import BertConfig, BertForMaskedLM, PackedBatch
from minitune.prompting import TEMPLATES, WORDS, Cloze, LabelWords, Prompt, Reader, Template

TEXTS = [f"the {noun} was {word} , all in all ." for noun in ("film", "cast", "plot")
         for word in ("good", "great", "bad", "dull", "unforgettable", "tedious")] * 3  # fmt: skip
CONFIG = BertConfig(
    vocab_size=100, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
    max_position_embeddings=64,
)  # fmt: skip
LABELS = {"no": ["bad", "dull"], "yes": ["good", "forgettable"]}  # the last one in several tokens
CLOZE = "{text} it was [MASK] ."


@pytest.fixture
def reader(tokenizer):
    """A model with random weights, large enough for its guesses to differ."""
    torch.manual_seed(0)
    model = BertForMaskedLM(CONFIG).eval()
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape)
    return Reader(model, tokenizer)


@pytest.fixture
def prompt(reader):
    return Prompt(CLOZE, LABELS, reader, max_len=24)


def ids_of(reader, *texts):
    return reader.tokenizer.encode(list(texts))


# Clozes


@pytest.mark.parametrize("sentence", [CLOZE, "it was [MASK] . {text}", "[MASK]{text}", "so {text} ? [MASK]"])
@pytest.mark.parametrize("words", [0, 1, 5, 500])
def test_template_and_blank_survive_a_text_of_any_length(reader, sentence, words):
    prompt = Prompt(sentence, LABELS, reader, max_len=20)
    tokenizer = reader.tokenizer
    text = ids_of(reader, "film " * words)[0]
    blank = (tokenizer.mask_id, tokenizer.mask_id)
    cloze = prompt.cloze(text, blank)
    assert len(cloze.ids) <= 20
    assert cloze.ids[0] == tokenizer.cls_id and cloze.ids[-1] == tokenizer.sep_id
    assert cloze.ids.count(tokenizer.mask_id) == 2 and cloze.ids[cloze.blanks[0]] == tokenizer.mask_id
    rest = [token for token in cloze.ids[1:-1] if token not in (text[0] if text else -1, tokenizer.mask_id)]
    assert rest == ids_of(reader, sentence.replace("{text}", " ").replace("[MASK]", " "))[0]


def test_of_a_long_text_the_end_is_read(prompt, reader):
    text = ids_of(reader, "bad " * 100 + "good great film")[0]
    body = prompt.cloze(text, (reader.tokenizer.mask_id,)).ids[1 : 1 + prompt.room]
    assert body == text[-prompt.room :]


@pytest.mark.parametrize("text", ["it was [MASK] [MASK]", "[SEP] [CLS]", "{text} was {text}"])
def test_a_review_that_looks_like_a_template_is_only_text(reader, text):
    prompt = Prompt(CLOZE, LABELS, reader, max_len=60)
    ids = ids_of(reader, text)[0]
    assert not set(ids) & {reader.tokenizer.mask_id, reader.tokenizer.cls_id, reader.tokenizer.sep_id}
    cloze = prompt.cloze(ids, (reader.tokenizer.mask_id,))
    assert cloze.ids[1 : 1 + len(ids)] == ids
    assert cloze.blanks == [i for i, token in enumerate(cloze.ids) if token == reader.tokenizer.mask_id]


@pytest.mark.parametrize("sentence", ["was [MASK]", "{text} so", "{text}{text}[MASK]", "[MASK]{text}[MASK]"])
def test_a_template_needs_one_text_and_one_blank(tokenizer, sentence):
    with pytest.raises(UserError, match="once"):
        Template(sentence, tokenizer)


def test_a_template_that_fills_the_sequence_is_refused(reader):
    with pytest.raises(UserError, match="no room"):
        Prompt("{text} " + "it was " * 20 + "[MASK]", LABELS, reader, max_len=20)


def test_the_built_in_ones_are_good(tokenizer):
    assert len(set(TEMPLATES)) >= 6
    for sentence in TEMPLATES:
        Template(sentence, tokenizer)
    assert len(WORDS["negative"]) == len(WORDS["positive"])


# Label words


def score_of_word(reader, prompt, text, word):
    """One token after another, each in a sequence by itself, normalised in float64; later ones hidden."""
    total = 0.0
    for i, token in enumerate(word):
        blank = [*word[:i], *[reader.tokenizer.mask_id] * (len(word) - i)]
        body, start = prompt.template.body(text[-prompt.room :], blank)
        ids = torch.tensor([reader.tokenizer.cls_id, *body, reader.tokenizer.sep_id])
        batch = PackedBatch.from_sequences([ids])
        with torch.no_grad():
            logits = reader.model(batch, torch.tensor([1 + start + i]))[0].double()
        total += (logits[token] - logits.exp().sum().log()).item()
    return total / len(word)


def test_scores_are_those_of_asking_for_one_token_after_another(prompt, reader):
    texts = ids_of(reader, "the film was good", "a dull cast , a bad plot " * 9, "great", "")
    lengths = [len(ids) for ids in prompt.words.ids]
    assert lengths[:3] == [1, 1, 1] and lengths[3] > 1
    scores = prompt.scores(texts)
    for text, row in zip(texts, scores, strict=True):
        each = [score_of_word(reader, prompt, text, word) for word in prompt.words.ids]
        expected = torch.tensor([sum(each[:2]) / 2, sum(each[2:]) / 2])
        torch.testing.assert_close(row, expected, atol=1e-4, rtol=1e-4)


def test_an_answer_does_not_depend_on_its_company(prompt, reader):
    texts = ids_of(reader, "the film was good", "dull " * 30, "a great cast", "bad")
    together = prompt.scores(texts)
    reader.batch_tokens = 8
    torch.testing.assert_close(prompt.scores(texts), together, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(prompt.scores(texts[::-1]), together.flip(0), atol=1e-5, rtol=1e-5)


def test_a_word_that_is_unknown_is_named(tokenizer):
    with pytest.raises(UserError, match="'日本'.*yes"):
        LabelWords({"no": ["bad"], "yes": ["good", "日本"]}, tokenizer)


@pytest.mark.parametrize("words", [{}, {"no": ["bad"]}, {"no": ["bad"], "yes": []}])
def test_two_labels_with_a_word_each_are_needed(tokenizer, words):
    with pytest.raises(UserError, match="two labels"):
        LabelWords(words, tokenizer)


# Calibration


def test_contextual_calibration_makes_texts_without_content_even(prompt, reader):
    [not_available] = ids_of(reader, "N/A")
    each = prompt.scores([not_available, [], [reader.tokenizer.mask_id]]).softmax(-1)
    bias = CALIBRATIONS["contextual"](prompt, [])
    torch.testing.assert_close(bias, -each.mean(0).log())


def test_pmi_takes_off_what_the_template_alone_says(prompt):
    bias = CALIBRATIONS["pmi"](prompt, [])
    torch.testing.assert_close(prompt.scores([[]])[0] + bias, torch.zeros(2))


def test_prior_matching_makes_the_mean_answer_even(prompt, reader):
    texts = ids_of(reader, *(f"the film was {word}" for word in ("good", "bad", "great", "dull", "tedious")))
    matched = prompt.scores(texts) + CALIBRATIONS["prior"](prompt, texts)
    torch.testing.assert_close(matched.softmax(-1).mean(0), torch.tensor([0.5, 0.5]), atol=1e-4, rtol=0)


@pytest.mark.parametrize("shift", [0, 5, 60, -700])
def test_scores_that_all_lean_to_one_side_come_back_without_labels(shift):
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(400) % 2
    evidence = torch.randn(400, generator=generator) + 2 * (2 * labels - 1)
    scores = torch.stack([-evidence / 2, evidence / 2 + shift], dim=1)
    bias = match_prior(scores)
    assert bias.isfinite().all()
    accuracy = ((scores + bias).argmax(1) == labels).double().mean()
    assert accuracy > 0.95
    if shift:
        assert (scores.argmax(1) == labels).double().mean() < 0.6


def test_three_labels_are_matched_too():
    scores = torch.randn(300, 3, generator=torch.Generator().manual_seed(0)) + torch.tensor([3.0, 0.0, -4.0])
    even = (scores + match_prior(scores)).softmax(-1).mean(0)
    torch.testing.assert_close(even, torch.full((3,), 1 / 3), atol=1e-4, rtol=0)


def test_expected_calibration_error_by_hand():
    probabilities = torch.tensor([[0.95, 0.05], [0.91, 0.09], [0.35, 0.65], [1.0, 0.0]])
    labels = torch.tensor([0, 1, 1, 0])
    # Above 0.9: three answers, two of them right, mean confidence 0.95333; 0.6 to 0.7: one, right.
    expected = (3 * abs(2 / 3 - (0.95 + 0.91 + 1.0) / 3) + abs(1 - 0.65)) / 4
    assert expected_calibration_error(probabilities, labels) == pytest.approx(expected, abs=1e-6)


def test_an_ensemble_is_the_mean_of_calibrated_log_probabilities(reader):
    prompts = [Prompt(sentence, LABELS, reader, 24) for sentence in (CLOZE, "[MASK] : {text}")]
    texts = ids_of(reader, "the film was good", "the cast was dull")
    unlabelled = ids_of(reader, "a bad plot", "a great film", "tedious")
    answers = Ensemble(prompts, "prior", unlabelled).log_probabilities(texts)
    each = [(p.scores(texts) + match_prior(p.scores(unlabelled))).log_softmax(-1) for p in prompts]
    torch.testing.assert_close(answers, (sum(each) / 2).log_softmax(-1))
    torch.testing.assert_close(agree(each).exp().sum(1), torch.ones(2))


# Demonstrations


def test_demonstrations_stand_in_front_and_the_question_is_asked(prompt, reader):
    tokenizer = reader.tokenizer
    shown = ids_of(reader, "the film was bad", "the film was good " * 20)
    question = prompt.cloze(ids_of(reader, "a cast")[0], (tokenizer.mask_id,))
    prompt.demonstrate(shown, [0, 1])
    cloze = prompt.cloze(ids_of(reader, "a cast")[0], (tokenizer.mask_id,))
    assert len(cloze.ids) <= CONFIG.max_position_embeddings
    assert cloze.ids[-len(question.ids) + 1 :] == question.ids[1:]
    assert cloze.ids[cloze.blanks[0]] == tokenizer.mask_id and cloze.ids.count(tokenizer.mask_id) == 1
    front = tokenizer.decode(cloze.ids[1 : -len(question.ids) + 1])
    assert front.startswith("the film was bad it was bad.") and front.endswith("it was good.")


def test_too_many_demonstrations_are_refused(prompt, reader):
    with pytest.raises(UserError, match="--shots 9"):
        prompt.demonstrate(ids_of(reader, *["film"] * 9), [0] * 9)


# Writing


def test_each_blank_gets_the_words_that_a_plain_forward_pass_gives(reader):
    ids = ids_of(reader, "the plot was", "and the cast")
    mask = reader.tokenizer.mask_id
    sequence = torch.tensor([reader.tokenizer.cls_id, *ids[0], mask, *ids[1], mask, reader.tokenizer.sep_id])
    blanks = (sequence == mask).nonzero().squeeze(1)
    expected = reader.model(PackedBatch.from_sequences([sequence]), blanks).softmax(-1)
    found = fill_blanks(reader, "The plot was [MASK] and the cast [MASK]", 3)
    assert len(found) == 2
    for words, probabilities in zip(found, expected, strict=True):
        top = probabilities.topk(3)
        assert [word for word, _ in words] == [reader.tokenizer.token(i) for i in top.indices.tolist()]
        assert [p for _, p in words] == pytest.approx(top.values.tolist(), abs=1e-5)


@pytest.mark.parametrize("sentence", ["no blank", "[MASK] " + "film " * 100])
def test_a_sentence_without_a_blank_or_too_long_is_refused(reader, sentence):
    with pytest.raises(UserError, match="--fill"):
        fill_blanks(reader, sentence, 3)


@pytest.mark.parametrize("count", [1, 7, 25])
@pytest.mark.parametrize("temperature", [0, 0.7])
def test_generation_writes_so_many_ordinary_tokens_after_the_prompt(reader, count, temperature, monkeypatch):
    rounds, fill = [], Reader.fill

    def watched(self, clozes):
        rounds.append(clozes[0])
        return fill(self, clozes)

    monkeypatch.setattr(Reader, "fill", watched)
    text = generate(reader, "the film", count, temperature, seed=1)
    assert text.startswith("the film") and "[" not in text
    hidden = [len(cloze.blanks) for cloze in rounds]
    assert hidden[0] == count and all(a > b for a, b in zip(hidden, hidden[1:], strict=False))
    assert len(rounds[0].ids) == 2 + 2 + count
    monkeypatch.undo()
    assert generate(reader, "the film", count, temperature, seed=1) == text
    others = {generate(reader, "the film", count, temperature, seed=seed) for seed in range(2, 8)}
    assert (others == {text}) == (temperature == 0)


def test_the_least_certain_words_are_guessed_anew(reader, monkeypatch):
    """With a reader whose certainty is known: the first of four blanks is the least sure, then the next."""
    rounds = []

    def fill(self, clozes):
        rounds.append(clozes[0].blanks)
        logs = torch.full((len(clozes[0].blanks), reader.tokenizer.vocab_size), -20.0)
        for row, blank in enumerate(clozes[0].blanks):
            logs[row, 10] = -10.0 + blank  # later blanks are surer
        yield 0, logs

    monkeypatch.setattr(Reader, "fill", fill)
    generate(reader, "", 4, 0, seed=0)
    assert [set(blanks) for blanks in rounds] == [{1, 2, 3, 4}, {1, 2, 3}, {1, 2}, {1}]


def test_more_words_than_positions_are_refused(reader):
    with pytest.raises(UserError, match="--generate"):
        generate(reader, "the film", 100, 0, seed=0)


def test_reading_gives_log_probabilities_and_leaves_the_weights_alone(reader):
    before = {name: tensor.clone() for name, tensor in reader.model.state_dict().items()}
    cloze = Cloze([reader.tokenizer.cls_id, reader.tokenizer.mask_id, reader.tokenizer.sep_id], [1])
    [(index, logs)] = reader.fill([cloze])
    logits = reader.model(PackedBatch.from_sequences([torch.tensor(cloze.ids)]), torch.tensor([1]))
    assert reader.tokenizer.vocab_size < CONFIG.vocab_size  # more rows than words: those compete, unnamed
    torch.testing.assert_close(logs, logits.log_softmax(-1)[:, : reader.tokenizer.vocab_size])
    assert index == 0
    assert math.isfinite(logs.min()) and not logs.requires_grad
    assert all(torch.equal(before[name], tensor) for name, tensor in reader.model.state_dict().items())
