"""Prompting: templates, verbalizer, fill-mask, calibration, demonstrations, generation."""

import copy
import math
import re

import pytest
import torch

from minitune.batching import PackedBatch
from minitune.calibration import (
    CALIBRATIONS,
    TOGETHER,
    Ensemble,
    compare_prompts,
    figures,
    match_prior,
    mean_log_probabilities,
)
from minitune.model import BertConfig, BertForMaskedLM, LayerNorm
from minitune.prompting import (
    ROUNDS,
    TEMPLATES,
    WORDS,
    ClozeQuery,
    FillMask,
    Prompt,
    Template,
    Verbalizer,
    fill_blanks,
    generate,
)
from minitune.support.errors import UserError
from minitune.support.results import expected_calibration_error
from minitune.support.runtime import Runtime

TEXTS = [f"the {noun} was {word} , all in all ." for noun in ("film", "cast", "plot")
         for word in ("good", "great", "bad", "dull", "unforgettable", "tedious")] * 3  # fmt: skip
CONFIG = BertConfig(
    vocab_size=100,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=64,
    max_position_embeddings=64,
)
LABELS = {"no": ["bad", "dull"], "yes": ["good", "forgettable"]}  # the last one in several tokens
CLOZE = "{text} it was [MASK] ."


@pytest.fixture
def fill_mask(tokenizer):
    """A model with random weights, large enough for its guesses to differ."""
    torch.manual_seed(0)
    model = BertForMaskedLM(CONFIG).eval()
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape)
    return FillMask(model, tokenizer, Runtime.start("cpu", "fp32"))


@pytest.fixture
def prompt(fill_mask):
    return Prompt(CLOZE, LABELS, fill_mask, max_len=24)


def pack(ids):
    return PackedBatch.from_sequences([torch.tensor(ids)])


def ids_of(fill_mask, *texts):
    return fill_mask.tokenizer.encode(list(texts))


# Clozes


@pytest.mark.parametrize(
    "sentence", [CLOZE, "it was [MASK] . {text}", "[MASK]{text}", "so {text} ? [MASK]"]
)
@pytest.mark.parametrize("words", [0, 1, 5, 500])
def test_template_and_blank_survive_a_text_of_any_length(fill_mask, sentence, words):
    prompt = Prompt(sentence, LABELS, fill_mask, max_len=20)
    tokenizer = fill_mask.tokenizer
    text = ids_of(fill_mask, "film " * words)[0]
    blank = (tokenizer.mask_id, tokenizer.mask_id)
    query = prompt.query(text, blank)
    assert len(query.ids) <= 20
    assert query.ids[0] == tokenizer.cls_id and query.ids[-1] == tokenizer.sep_id
    assert (
        query.ids.count(tokenizer.mask_id) == 2
        and query.ids[query.positions[0]] == tokenizer.mask_id
    )
    rest = [
        token
        for token in query.ids[1:-1]
        if token not in (text[0] if text else -1, tokenizer.mask_id)
    ]
    assert rest == ids_of(fill_mask, sentence.replace("{text}", " ").replace("[MASK]", " "))[0]


def test_of_a_long_text_the_end_is_read(prompt, fill_mask):
    text = ids_of(fill_mask, "bad " * 100 + "good great film")[0]
    body = prompt.query(text, (fill_mask.tokenizer.mask_id,)).ids[1 : 1 + prompt.room]
    assert body == text[-prompt.room :]


@pytest.mark.parametrize("sentence", [CLOZE, "[MASK]{text}", "it was [MASK] : {text}"])
def test_a_long_text_is_cut_only_as_far_as_it_must_be(fill_mask, sentence):
    prompt = Prompt(sentence, LABELS, fill_mask, max_len=20)
    tokens = ids_of(fill_mask, sentence.replace("{text}", " ").replace("[MASK]", " "))[0]
    longest = max(len(ids) for ids in ids_of(fill_mask, "bad", "dull", "good", "forgettable"))
    assert prompt.room == 20 - 2 - len(tokens) - longest  # 2: [CLS] and [SEP]
    query_alone = prompt.query(
        ids_of(fill_mask, "film " * 99)[0], (fill_mask.tokenizer.mask_id,) * longest
    )
    assert len(query_alone.ids) == 20


@pytest.mark.parametrize("text", ["it was [MASK] [MASK]", "[SEP] [CLS]", "{text} was {text}"])
def test_a_review_that_looks_like_a_template_is_only_text(fill_mask, text):
    prompt = Prompt(CLOZE, LABELS, fill_mask, max_len=60)
    ids = ids_of(fill_mask, text)[0]
    assert not set(ids) & {
        fill_mask.tokenizer.mask_id,
        fill_mask.tokenizer.cls_id,
        fill_mask.tokenizer.sep_id,
    }
    query = prompt.query(ids, (fill_mask.tokenizer.mask_id,))
    assert query.ids[1 : 1 + len(ids)] == ids
    assert query.positions == [
        i for i, token in enumerate(query.ids) if token == fill_mask.tokenizer.mask_id
    ]


@pytest.mark.parametrize(
    "sentence", ["was [MASK]", "{text} so", "{text}{text}[MASK]", "[MASK]{text}[MASK]"]
)
def test_a_template_needs_one_text_and_one_blank(tokenizer, sentence):
    with pytest.raises(UserError, match="once"):
        Template(sentence, tokenizer)


def test_a_template_that_fills_the_sequence_is_refused(fill_mask):
    with pytest.raises(UserError, match="no room"):
        Prompt("{text} " + "it was " * 20 + "[MASK]", LABELS, fill_mask, max_len=20)


def test_the_built_in_ones_are_good(tokenizer):
    assert len(set(TEMPLATES)) >= 6
    for sentence in TEMPLATES:
        Template(sentence, tokenizer)
    assert len(WORDS["negative"]) == len(WORDS["positive"])


# Label words


SEVERAL = {"no": ["bad", "so dull a film"], "yes": ["forgettable", "good", "great cast"]}


def log_probability(model, ids, at, token):
    """Of `token` at one place of one sequence, which is read alone."""
    logits = model(pack(ids), torch.tensor([at]))[0]
    return logits[token].item() - math.log(sum(math.exp(x) for x in logits.tolist()))


def score_of_word(model, tokenizer, parts, text, word):
    """The mean over its tokens, those before each written, it and those after it masked."""
    total = 0.0
    for i, token in enumerate(word):
        blank = word[:i] + [tokenizer.mask_id] * (len(word) - i)
        ids = [tokenizer.cls_id]
        for part in parts:
            if part == "BLANK":
                at = len(ids) + i
            ids += {"TEXT": text, "BLANK": blank}.get(part) or tokenizer.encode([part])[0]
        total += log_probability(model, [*ids, tokenizer.sep_id], at, token)
    return total / len(word)


@pytest.mark.parametrize(
    "sentence, parts",
    [
        (CLOZE, ["TEXT", "it was", "BLANK", "."]),
        ("a [MASK] cast . {text}", ["a", "BLANK", "cast .", "TEXT"]),
        ("{text}[MASK]", ["TEXT", "BLANK"]),
    ],
)
def test_scores_are_those_of_guessing_one_token_after_another(
    fill_mask, monkeypatch, sentence, parts
):
    tokenizer, texts = (
        fill_mask.tokenizer,
        ids_of(fill_mask, "the film was good", "a dull cast , a bad plot", "so"),
    )
    prompt = Prompt(sentence, SEVERAL, fill_mask, max_len=40)
    scores = prompt.scores(texts)
    monkeypatch.setattr(
        LayerNorm, "forward", torch.nn.LayerNorm.forward
    )  # which is not of float32 alone
    model = copy.deepcopy(fill_mask.model).double()
    for text, row in zip(texts, scores.tolist(), strict=True):
        for label, words in enumerate(SEVERAL.values()):
            each = [
                score_of_word(model, tokenizer, parts, text, word)
                for word in tokenizer.encode(words)
            ]
            assert row[label] == pytest.approx(sum(each) / len(words), abs=1e-4)
    assert {len(ids) for ids in prompt.verbalizer.ids} >= {1, 2, 4}


def test_the_most_probable_words_are_those_of_a_plain_forward_pass(prompt, fill_mask):
    tokenizer = fill_mask.tokenizer
    texts = ids_of(fill_mask, "the plot was dull , all in all", "great")  # the longer one first
    for text, words in zip(texts, prompt.most_probable_words(texts, 4), strict=True):
        before, after = ids_of(fill_mask, "it was", ".")
        ids = [tokenizer.cls_id, *text, *before, tokenizer.mask_id, *after, tokenizer.sep_id]
        blank = torch.tensor([ids.index(tokenizer.mask_id)])
        logits = fill_mask.model(pack(ids), blank)[0]
        top = logits.softmax(-1)[: tokenizer.vocab_size].topk(4)
        assert [word for word, _ in words] == [tokenizer.token(i) for i in top.indices.tolist()]
        assert [p for _, p in words] == pytest.approx(top.values.tolist(), abs=1e-5)


def test_an_answer_does_not_depend_on_its_company(prompt, fill_mask):
    texts = ids_of(fill_mask, "the film was good", "dull " * 30, "a great cast", "bad")
    together = prompt.scores(texts)
    fill_mask.batch_tokens = 8
    torch.testing.assert_close(prompt.scores(texts), together, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(prompt.scores(texts[::-1]), together.flip(0), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "word", ["日本", "goo日", "[MASK]", "\u00ad"]
)  # the last one: invisible, no token
def test_a_word_that_is_unknown_is_named(tokenizer, word):
    with pytest.raises(UserError, match=f"{re.escape(repr(word))}.*yes"):
        Verbalizer({"no": ["bad"], "yes": ["good", word]}, tokenizer)


@pytest.mark.parametrize("words", [{}, {"no": ["bad"]}, {"no": ["bad"], "yes": []}])
def test_two_labels_with_a_word_each_are_needed(tokenizer, words):
    with pytest.raises(UserError, match="two labels"):
        Verbalizer(words, tokenizer)


# Calibration


def test_contextual_calibration_makes_texts_without_content_even(prompt, fill_mask):
    [not_available] = ids_of(fill_mask, "N/A")
    each = prompt.scores([not_available, [], [fill_mask.tokenizer.mask_id]]).softmax(-1)
    bias = CALIBRATIONS["contextual"](prompt, [])
    torch.testing.assert_close(bias, -each.mean(0).log())


def test_pmi_takes_off_what_the_template_alone_says(prompt):
    bias = CALIBRATIONS["pmi"](prompt, [])
    torch.testing.assert_close(prompt.scores([[]])[0] + bias, torch.zeros(2))


def test_prior_matching_makes_the_mean_answer_even(prompt, fill_mask):
    texts = ids_of(
        fill_mask, *(f"the film was {word}" for word in ("good", "bad", "great", "dull", "tedious"))
    )
    matched = prompt.scores(texts) + CALIBRATIONS["prior"](prompt, texts)
    torch.testing.assert_close(
        matched.softmax(-1).mean(0), torch.tensor([0.5, 0.5]), atol=1e-5, rtol=0
    )


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


@pytest.mark.parametrize("shift", [800.0, -2000.0])
def test_scores_that_lean_further_than_exp_reaches(shift):
    scores = torch.tensor([[0.0, shift + 1], [0.0, shift - 1], [0.0, shift + 3], [0.0, shift - 3]])
    assert (scores + match_prior(scores)).argmax(1).tolist() == [1, 0, 1, 0]


def test_three_labels_are_matched_too():
    scores = torch.randn(300, 3, generator=torch.Generator().manual_seed(0)) + torch.tensor(
        [3.0, 0.0, -4.0]
    )
    even = (scores + match_prior(scores)).softmax(-1).mean(0)
    torch.testing.assert_close(even, torch.full((3,), 1 / 3), atol=1e-5, rtol=0)


def test_prior_matching_moves_zero_and_keeps_the_order_of_reviews():
    scores = torch.randn(200, 2, generator=torch.Generator().manual_seed(0)) * 4 - torch.tensor(
        [9.0, 0.0]
    )
    before, after = (x[:, 1] - x[:, 0] for x in (scores, scores + match_prior(scores)))
    assert torch.equal(before.argsort(), after.argsort())
    assert (after > 0).sum() < (before > 0).sum()


def test_what_is_even_already_stays_as_it_is():
    scores = torch.tensor([[0.0, 3.0], [3.0, 0.0], [1.0, 1.0]])
    torch.testing.assert_close(match_prior(scores), torch.zeros(2), atol=1e-6, rtol=0)


def test_agreement_is_the_normalised_geometric_mean():
    together = mean_log_probabilities(
        [torch.tensor([[0.9, 0.1]]).log() + 7, torch.tensor([[0.4, 0.6]]).log() - 2]
    ).exp()
    no, yes = math.sqrt(0.9 * 0.4), math.sqrt(0.1 * 0.6)
    torch.testing.assert_close(together, torch.tensor([[no / (no + yes), yes / (no + yes)]]))


def test_an_ensemble_is_the_mean_of_calibrated_log_probabilities(fill_mask):
    prompts = [Prompt(sentence, LABELS, fill_mask, 24) for sentence in (CLOZE, "[MASK] : {text}")]
    texts = ids_of(fill_mask, "the film was good", "the cast was dull")
    unlabelled = ids_of(fill_mask, "a bad plot", "a great film", "tedious")
    answers = Ensemble(prompts, "prior", unlabelled).log_probabilities(texts)
    each = [(p.scores(texts) + match_prior(p.scores(unlabelled))).log_softmax(-1) for p in prompts]
    torch.testing.assert_close(answers, (sum(each) / 2).log_softmax(-1))
    torch.testing.assert_close(mean_log_probabilities(each).exp().sum(1), torch.ones(2))


def test_predictions_come_in_the_order_of_the_texts_and_say_what_was_cut(fill_mask):
    sentences = "{text}[MASK]", "{text} it was [MASK]"
    short, long = (Prompt(sentence, LABELS, fill_mask, 20) for sentence in sentences)
    assert short.room > long.room + 1
    texts = ["film " * n for n in (1, long.room + 1, 3, long.room, short.room, 2, 30)]
    for prompts in ([short, long], [long, short]):
        ensemble = Ensemble(prompts, "none", [])
        predictions = ensemble.predict(texts, count=2)
        assert [p.text for p in predictions] == texts
        assert [p.truncated for p in predictions] == [False, True, False, False, True, False, True]
        expected = ensemble.log_probabilities(ids_of(fill_mask, *texts)).exp()
        wanted = prompts[0].most_probable_words(ids_of(fill_mask, *texts), 2)
        for prediction, p, words in zip(predictions, expected.tolist(), wanted, strict=True):
            assert list(prediction.probabilities.values()) == pytest.approx(p, abs=1e-5)
            assert prediction.label == ("no" if p[0] > p[1] else "yes")
            assert list(prediction.words) == [word for word, _ in words]


# Every template with every calibration


def test_every_row_is_what_its_scores_are_worth(fill_mask):
    prompts = [Prompt(sentence, LABELS, fill_mask, 24) for sentence in (CLOZE, "[MASK] : {text}")]
    texts, unlabelled = ids_of(fill_mask, *TEXTS[:18]), ids_of(fill_mask, *TEXTS[5:9])
    labels = torch.tensor([0, 0, 1] * 6)
    rows = iter(compare_prompts(prompts, texts, labels, unlabelled))
    calibrated = {
        name: [p.scores(texts) + calibrate(p, unlabelled) for p in prompts]
        for name, calibrate in CALIBRATIONS.items()
    }
    expected = [
        (prompt.sentence, name, own[i])
        for i, prompt in enumerate(prompts)
        for name, own in calibrated.items()
    ]
    for name, (one, two) in calibrated.items():
        expected.append((TOGETHER, name, one.log_softmax(-1) + two.log_softmax(-1)))
    for (template, name, scores), row in zip(expected, rows, strict=True):
        assert (row["template"], row["calibration"]) == (template, name)
        answers = ["no" if no >= yes else "yes" for no, yes in scores.tolist()]
        right = sum(
            answer == ("no", "yes")[label] for answer, label in zip(answers, labels, strict=True)
        )
        assert row["accuracy"] == pytest.approx(right / 18)
        assert row["majority_share"] == pytest.approx(answers.count(row["majority_answer"]) / 18)
        assert answers.count(row["majority_answer"]) >= 9
        if template != TOGETHER:  # the mean, not the sum, says how sure they are
            error = expected_calibration_error(scores.softmax(-1), labels)
        else:
            error = expected_calibration_error((scores / 2).softmax(-1), labels)
        assert row["calibration_error"] == pytest.approx(error, abs=1e-5)


def test_a_row_by_hand():
    scores = torch.tensor([[0.82, 0.18], [0.36, 0.64], [0.26, 0.74], [0.45, 0.55]]).log()
    row = figures(scores, torch.tensor([0, 1, 0, 0]), {0: "no", 1: "yes"})
    assert (row["accuracy"], row["majority_answer"], row["majority_share"]) == (0.5, "yes", 0.75)
    assert row["calibration_error"] == pytest.approx((0.18 + 0.36 + 0.74 + 0.55) / 4)
    assert row["interval"] == pytest.approx((0.1500, 0.8500), abs=1e-4)  # Wilson's, of 2 in 4


# Demonstrations


def test_demonstrations_stand_in_front_of_the_query(prompt, fill_mask):
    tokenizer = fill_mask.tokenizer
    shown = ids_of(fill_mask, "the film was bad", "the film was good " * 20)
    query_alone = prompt.query(ids_of(fill_mask, "a cast")[0], (tokenizer.mask_id,))
    prompt.demonstrate(shown, [0, 1])
    query = prompt.query(ids_of(fill_mask, "a cast")[0], (tokenizer.mask_id,))
    assert len(query.ids) <= CONFIG.max_position_embeddings
    assert query.ids[-len(query_alone.ids) + 1 :] == query_alone.ids[1:]
    assert (
        query.ids[query.positions[0]] == tokenizer.mask_id
        and query.ids.count(tokenizer.mask_id) == 1
    )
    front = tokenizer.decode(query.ids[1 : -len(query_alone.ids) + 1])
    assert front.startswith("the film was bad it was bad.") and front.endswith("it was good.")


@pytest.mark.parametrize("labels", [[0], [1, 0], [0, 1, 1]])
def test_long_demonstrations_keep_their_end_and_leave_room_for_the_query(fill_mask, labels):
    tokenizer, words = fill_mask.tokenizer, {"no": ["bad film"], "yes": ["good"]}
    prompt = Prompt(CLOZE, words, fill_mask, max_len=16)
    shown = ids_of(fill_mask, *("plot " * (40 + i) + "was the end" for i in range(len(labels))))
    prompt.demonstrate(shown, labels)
    query_alone = prompt.query(ids_of(fill_mask, "film " * 40)[0], (tokenizer.mask_id,))
    assert (
        CONFIG.max_position_embeddings - 16
        <= len(query_alone.ids)
        <= CONFIG.max_position_embeddings
    )
    rest = query_alone.ids[1:]
    for text, label in zip(shown, labels, strict=True):
        answer = ids_of(fill_mask, f"it was {('bad film', 'good')[label]} .")[0]
        length = next(n for n in range(len(rest)) if rest[n : n + len(answer)] == answer)
        assert length >= 8 and rest[:length] == text[-length:]
        rest = rest[length + len(answer) :]
    assert rest[: prompt.room] == ids_of(fill_mask, "film " * prompt.room)[0]
    assert rest.index(tokenizer.mask_id) == query_alone.positions[0] - (
        len(query_alone.ids) - len(rest)
    )


@pytest.mark.parametrize("shots", [3, 9, 64])
def test_too_many_demonstrations_are_refused(prompt, fill_mask, shots):
    with pytest.raises(UserError, match=f"--shots {shots}.*24.*64"):
        prompt.demonstrate(ids_of(fill_mask, *["film"] * shots), [0] * shots)


def test_without_demonstrations_the_query_stands_alone_again(prompt, fill_mask):
    text, blank = ids_of(fill_mask, "film")[0], (fill_mask.tokenizer.mask_id,)
    before = prompt.query(text, blank)
    prompt.demonstrate(ids_of(fill_mask, "dull"), [0])
    assert prompt.query(text, blank) != before
    prompt.demonstrate([], [])
    assert prompt.query(text, blank) == before


# Writing


def test_each_blank_gets_the_words_that_a_plain_forward_pass_gives(fill_mask):
    ids = ids_of(fill_mask, "the plot was", "and the cast")
    mask = fill_mask.tokenizer.mask_id
    sequence = torch.tensor(
        [fill_mask.tokenizer.cls_id, *ids[0], mask, *ids[1], mask, fill_mask.tokenizer.sep_id]
    )
    blanks = (sequence == mask).nonzero().squeeze(1)
    expected = fill_mask.model(PackedBatch.from_sequences([sequence]), blanks).softmax(-1)
    found = fill_blanks(fill_mask, "The plot was [MASK] and the cast [MASK]", 3)
    assert len(found) == 2
    for words, probabilities in zip(found, expected, strict=True):
        top = probabilities.topk(3)
        assert [word for word, _ in words] == [
            fill_mask.tokenizer.token(i) for i in top.indices.tolist()
        ]
        assert [p for _, p in words] == pytest.approx(top.values.tolist(), abs=1e-5)


def test_other_special_tokens_in_a_sentence_to_fill_are_only_text(fill_mask, monkeypatch):
    asked, fill = [], FillMask.log_probabilities
    monkeypatch.setattr(
        FillMask,
        "log_probabilities",
        lambda self, queries: asked.extend(queries) or fill(self, queries),
    )
    assert len(fill_blanks(fill_mask, "[SEP] [CLS] [PAD] [MASK]{text}", 3)) == 1
    [query], tokenizer = asked, fill_mask.tokenizer
    special = [token for token in query.ids if token in (0, tokenizer.cls_id, tokenizer.sep_id)]
    assert special == [tokenizer.cls_id, tokenizer.sep_id] and len(query.positions) == 1


@pytest.mark.parametrize("sentence", ["no blank", "", "[mask]"])
def test_a_sentence_without_a_blank_is_refused(fill_mask, sentence):
    with pytest.raises(UserError, match="--fill"):
        fill_blanks(fill_mask, sentence, 3)


def test_a_sentence_longer_than_the_positions_is_refused(fill_mask):
    with pytest.raises(UserError, match="103 tokens.*64 positions"):
        fill_blanks(fill_mask, "[MASK] " + "film " * 100, 3)


@pytest.mark.parametrize("count", [1, 7, 25])
@pytest.mark.parametrize("temperature", [0, 0.7])
def test_generation_writes_so_many_ordinary_tokens_after_the_prompt(
    fill_mask, count, temperature, monkeypatch
):
    rounds, fill = [], FillMask.log_probabilities

    def watched(self, queries):
        rounds.append(queries[0])
        return fill(self, queries)

    monkeypatch.setattr(FillMask, "log_probabilities", watched)
    text = generate(fill_mask, "the film", count, temperature, seed=1)
    assert text.startswith("the film") and "[" not in text
    hidden = [len(query.positions) for query in rounds]
    assert hidden[0] == count and all(a > b for a, b in zip(hidden, hidden[1:], strict=False))
    assert len(hidden) == min(ROUNDS, count) and hidden[-1] <= math.ceil(count / ROUNDS)
    assert all(len(query.ids) == 2 + 2 + count for query in rounds)
    monkeypatch.undo()
    assert generate(fill_mask, "the film", count, temperature, seed=1) == text
    others = {
        generate(fill_mask, "the film", count, temperature, seed=seed) for seed in range(2, 8)
    }
    assert (others == {text}) == (temperature == 0)


def written(fill_mask, monkeypatch, *arguments):
    """The ids of what `generate` writes, its prompt too."""
    kept = []
    monkeypatch.setattr(fill_mask.tokenizer, "decode", lambda ids: kept.append(list(ids)) or "")
    generate(fill_mask, *arguments)
    monkeypatch.undo()
    return max(kept, key=len)


@pytest.mark.parametrize("temperature", [0, 2.0])
def test_special_tokens_are_never_written_however_probable(fill_mask, monkeypatch, temperature):
    fill_mask.model.head.bias.data[fill_mask.tokenizer.special_ids] += 50
    [start] = ids_of(fill_mask, "the film")
    ids = written(fill_mask, monkeypatch, "the film", 12, temperature, 0)
    assert ids[: len(start)] == start and len(ids) == len(start) + 12
    assert not set(ids[len(start) :]) & set(fill_mask.tokenizer.special_ids.tolist())


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_tokens_are_drawn_at_the_temperature(fill_mask, temperature):
    tokenizer = fill_mask.tokenizer
    [start] = ids_of(fill_mask, "the film")
    ids = tokenizer.frame([*start, tokenizer.mask_id])
    logits = fill_mask.model(pack(ids), torch.tensor([3]))[0, : tokenizer.vocab_size].detach()
    logits[tokenizer.special_ids] = -math.inf
    expected = (logits / temperature).softmax(0)
    fill_mask.log_probabilities = lambda queries: [(0, logits.log_softmax(0)[None].clone())]
    texts = [generate(fill_mask, "the film", 1, temperature, seed) for seed in range(2000)]
    for token in expected.topk(3).indices.tolist():
        p, word = expected[token].item(), tokenizer.decode([*start, token])
        assert abs(texts.count(word) / 2000 - p) < 4 * math.sqrt(p * (1 - p) / 2000)


def test_cold_is_the_most_probable_and_heat_is_chance(fill_mask, monkeypatch):
    fill_mask.model.head.bias.data *= 3
    coldest = written(fill_mask, monkeypatch, "the film", 20, 0, 0)
    assert written(fill_mask, monkeypatch, "the film", 20, 1e-4, 0) == coldest
    cold, hot = (written(fill_mask, monkeypatch, "the film", 20, t, 0) for t in (0.2, 50.0))
    assert len(set(hot)) > len(set(cold))
    assert (
        len(
            {
                tuple(written(fill_mask, monkeypatch, "the film", 20, 50.0, seed))
                for seed in range(4)
            }
        )
        == 4
    )


def test_the_longest_text_that_fits_is_written(fill_mask):
    generate(fill_mask, "the film", 60, 0, seed=0)
    with pytest.raises(UserError, match="65 tokens.*64 positions"):
        generate(fill_mask, "the film", 61, 0, seed=0)


def test_the_least_certain_words_are_guessed_again(fill_mask, monkeypatch):
    """The first of four blanks is the least certain, then the second, and so on."""
    rounds = []

    def log_probabilities(self, queries):
        rounds.append(queries[0].positions)
        logs = torch.full((len(queries[0].positions), fill_mask.tokenizer.vocab_size), -20.0)
        for row, blank in enumerate(queries[0].positions):
            logs[row, 10] = -10.0 + blank  # later blanks are surer
        yield 0, logs

    monkeypatch.setattr(FillMask, "log_probabilities", log_probabilities)
    generate(fill_mask, "", 4, 0, seed=0)
    assert [set(blanks) for blanks in rounds] == [{1, 2, 3, 4}, {1, 2, 3}, {1, 2}, {1}]


def test_reading_gives_log_probabilities_and_leaves_the_weights_alone(fill_mask):
    before = {name: tensor.clone() for name, tensor in fill_mask.model.state_dict().items()}
    query = ClozeQuery(
        [fill_mask.tokenizer.cls_id, fill_mask.tokenizer.mask_id, fill_mask.tokenizer.sep_id], [1]
    )
    [(index, logs)] = fill_mask.log_probabilities([query])
    logits = fill_mask.model(pack(query.ids), torch.tensor([1]))
    assert (
        fill_mask.tokenizer.vocab_size < CONFIG.vocab_size
    )  # more rows than words: those compete, unnamed
    torch.testing.assert_close(logs, logits.log_softmax(-1)[:, : fill_mask.tokenizer.vocab_size])
    assert index == 0
    assert math.isfinite(logs.min()) and not logs.requires_grad
    assert all(
        torch.equal(before[name], tensor) for name, tensor in fill_mask.model.state_dict().items()
    )


def test_each_query_gets_the_log_probabilities_at_its_own_positions(fill_mask):
    lengths, positions = [9, 4, 30, 6], [[1, 7], [2], [3, 11, 28], [4]]
    rows = [torch.randint(5, 60, (n,), generator=torch.Generator().manual_seed(n)) for n in lengths]
    queries = [ClozeQuery(r.tolist(), p) for r, p in zip(rows, positions, strict=True)]
    for fill_mask.batch_tokens in (1, 20, 1000):
        answers = dict(fill_mask.log_probabilities(queries))
        assert answers.keys() == set(range(4))
        for i, query in enumerate(queries):
            alone = fill_mask.model(pack(query.ids), torch.tensor(query.positions)).log_softmax(-1)
            torch.testing.assert_close(answers[i], alone[:, : answers[i].size(1)])


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_numbers_are_an_error(prompt, fill_mask, value):
    fill_mask.model.bert.layers[1].feed_forward.up.weight.data[3, 3] = value
    for job in (
        lambda: prompt.scores(ids_of(fill_mask, "the film")),
        lambda: fill_blanks(fill_mask, "the [MASK]", 3),
        lambda: generate(fill_mask, "the film", 3, 0.7, 0),
    ):
        with pytest.raises(UserError, match="weights"):
            job()


@pytest.mark.parametrize("text", ["", "\u00ad", "[MASK]", "[CLS] [SEP] [PAD]", "日本"])
def test_a_text_with_no_token_or_no_known_one_gets_a_score(prompt, fill_mask, text):
    assert prompt.scores(ids_of(fill_mask, text)).isfinite().all()
