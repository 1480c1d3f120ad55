"""What a model has learned: ten blanks during training, and the nearest words."""

import pytest
import torch

from minitune.model import BertConfig, BertForMaskedLM
from minitune.probes import SENTENCES, nearest_words, probe, ten_blanks
from minitune.prompting import FillMask, fill_blanks
from minitune.support.runtime import Runtime
from minitune.tokenizer import Tokenizer

CPU = Runtime.start("cpu", "fp32")
TEXTS = [*SENTENCES, "great boring good bad dull fine acting"] * 3


def model_for(tokenizer: Tokenizer, positions=32) -> FillMask:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=positions,
        hidden_dropout_prob=0.5,
        initializer_range=0.5,
    )
    return FillMask(BertForMaskedLM(config), tokenizer, CPU)


def test_every_sentence_has_one_blank():
    assert len(set(SENTENCES)) == 10
    assert all(sentence.count("[MASK]") == 1 for sentence in SENTENCES)


@pytest.mark.parametrize("training", [True, False])
def test_blanks_are_filled_without_dropout_and_training_goes_on(training):
    fill_mask = model_for(Tokenizer.train(TEXTS, 300))
    fill_mask.model.train(training)
    state = torch.get_rng_state()
    found = ten_blanks(fill_mask)
    assert fill_mask.model.training is training
    assert torch.equal(torch.get_rng_state(), state)
    fill_mask.model.eval()
    for sentence, words in zip(SENTENCES, found, strict=True):
        [expected] = fill_blanks(fill_mask, sentence, 3)
        assert words == [[word, pytest.approx(p, abs=1e-4)] for word, p in expected]
    assert len({str(words) for words in found}) > 5


def test_a_sentence_that_does_not_fit_has_no_words():
    found = ten_blanks(model_for(Tokenizer.train(TEXTS, 300), positions=13))
    assert [] in found and any(found)


def test_the_nearest_words_have_the_largest_cosines():
    fill_mask = model_for(tokenizer := Tokenizer.train(TEXTS, 300))
    vectors = fill_mask.model.bert.embeddings.word.weight.detach().double()
    [[great]] = tokenizer.encode(["great"])
    cosines = {}
    for i in range(tokenizer.vocab_size):
        word = tokenizer.token(i)
        if i not in (great, *tokenizer.special_ids) and not word.startswith("##"):
            both = vectors[i] @ vectors[great]
            cosines[word] = (both / vectors[i].norm() / vectors[great].norm()).item()
    expected = sorted(cosines.items(), key=lambda pair: -pair[1])[:8]
    found = nearest_words(fill_mask.model, tokenizer, "great")
    assert found == [[word, pytest.approx(cosine, abs=1e-4)] for word, cosine in expected]
    assert nearest_words(fill_mask.model, tokenizer, "unheardof") == []
    assert probe(fill_mask)["nearest"]["great"] == found
