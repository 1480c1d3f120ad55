"""Small questions that show what a pretrained model has learned: ten blanks, and nearest words.

The blanks are asked at each evaluation of a training. First the model writes frequent words into
all of them, later words that fit the grammar, and at last words that fit the sense.
"""

import torch.nn.functional as F

from minitune.model import BertForMaskedLM
from minitune.prompting import FillMask, fill_blanks
from minitune.support.errors import UserError
from minitune.tokenizer import Tokenizer

SENTENCES = (
    "It was one [MASK] the best films of the year.",
    "The book was better [MASK] the film.",
    "The actors [MASK] very good in this film.",
    "He leaves his wife, and she never sees [MASK] again.",
    "There are too many [MASK] in this story.",
    "It was a complete waste of [MASK] and money.",
    "The film was so boring that I fell [MASK].",
    "They call it a comedy, but I did not [MASK] once.",
    "I loved it. What a [MASK] film!",
    "I hated it. What a [MASK] film!",
)
WORDS = ("great", "boring")


def probe(fill_mask: FillMask) -> dict:
    """The answers to both questions as JSON, `blanks` and `nearest`."""
    model, tokenizer = fill_mask.model, fill_mask.tokenizer
    nearest = {word: nearest_words(model, tokenizer, word) for word in WORDS}
    return {"blanks": ten_blanks(fill_mask), "nearest": nearest}


def ten_blanks(fill_mask: FillMask, count: int = 3) -> list[list]:
    """For each of SENTENCES the most probable words, each with its probability.

    There are none where the model cannot read a sentence: its vocabulary may have letters only, and
    then a sentence has more tokens than it has positions.
    """
    was_training, answers = fill_mask.model.training, []
    fill_mask.model.eval()
    for sentence in SENTENCES:
        try:
            [words] = fill_blanks(fill_mask, sentence, count)
        except UserError:
            words = []
        answers.append([[word, round(p, 4)] for word, p in words])
    fill_mask.model.train(was_training)
    return answers


def nearest_words(
    model: BertForMaskedLM, tokenizer: Tokenizer, word: str, count: int = 8
) -> list[list]:
    """The words with the most similar embeddings, each with its cosine; none for an unknown word.

    A word here is one token that begins a word.
    """
    ids = tokenizer.encode([word])[0]
    if len(ids) != 1 or ids[0] in tokenizer.special_ids:
        return []
    vectors = F.normalize(model.bert.embeddings.word.weight.detach().float().cpu(), dim=1)
    cosines = (vectors @ vectors[ids[0]])[: tokenizer.vocab_size]
    cosines[ids[0]] = cosines[tokenizer.special_ids] = cosines[tokenizer.continuation] = -2
    best = cosines.topk(min(count, len(cosines)))
    found = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return [[tokenizer.token(i), round(cosine, 4)] for i, cosine in found if cosine > -2]
