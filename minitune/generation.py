"""Writing with a masked language model: fill the blanks of a sentence, or go on after one."""

import torch

from minitune.errors import UserError
from minitune.prompting import MASK, Cloze, Reader, most_probable

ROUNDS = 10  # as in the paper; more words come one at a time, fewer badly together


def fill_blanks(reader: Reader, sentence: str, count: int) -> list[list[tuple[str, float]]]:
    """For each [MASK] of the sentence the `count` most probable words, each blank by itself.

    Raises UserError where there is no [MASK], or the sentence is longer than the model's positions.
    """
    if MASK not in sentence:
        raise UserError(f"--fill: the sentence has no {MASK}")
    tokenizer, ids = reader.tokenizer, []
    for part in tokenizer.encode(sentence.split(MASK)):
        ids += [*part, tokenizer.mask_id]
    ids = _framed(reader, ids[:-1], "--fill")
    blanks = [i for i, token in enumerate(ids) if token == tokenizer.mask_id]
    ((_, logs),) = reader.fill([Cloze(ids, blanks)])
    return [most_probable(blank, count, tokenizer) for blank in logs]


def generate(reader: Reader, prompt: str, count: int, temperature: float, seed: int) -> str:
    """The prompt with `count` tokens after it, by iterative unmasking.

    Mask-predict (Ghazvininejad et al. 2019): all blanks are filled at once, each by itself, which reads
    badly together; then the words that the model is least sure of are hidden again and guessed anew beside
    those that stay, fewer in every round. Words are drawn at this `temperature`; 0 takes the most probable.

    Raises UserError where the tokens are more than the model's positions.
    """
    tokenizer = reader.tokenizer
    start = tokenizer.encode([prompt])[0]
    ids = torch.tensor(_framed(reader, [*start, *[tokenizer.mask_id] * count], "--generate"))
    blanks = torch.arange(count) + len(start) + 1
    sureness = torch.zeros(count)  # log-probability of each word when it was written
    generator = torch.Generator().manual_seed(seed)
    rounds = min(ROUNDS, count)
    for done in range(rounds):
        hidden = sureness.argsort()[: count - count * done // rounds]  # all of them in the first round
        ids[blanks[hidden]] = tokenizer.mask_id
        ((_, logs),) = reader.fill([Cloze(ids.tolist(), blanks[hidden].tolist())])
        logs[:, tokenizer.special_ids] = -torch.inf  # neither a new blank nor the end of the text
        if temperature:
            odds = (logs.double() - logs.amax(-1, keepdim=True)) / temperature
            words = torch.multinomial(odds.softmax(-1), 1, generator=generator).squeeze(1)
        else:
            words = logs.argmax(-1)
        ids[blanks[hidden]] = words
        sureness[hidden] = logs.gather(1, words[:, None]).squeeze(1)
    written, given = tokenizer.decode(ids[1:-1].tolist()), tokenizer.decode(start)
    return prompt + written[len(given) :]


def _framed(reader: Reader, ids: list[int], option: str) -> list[int]:
    """With [CLS] and [SEP]."""
    longest = reader.model.config.max_position_embeddings - 2
    if len(ids) > longest:
        raise UserError(f"{option}: {len(ids)} tokens, the model has room for {longest}")
    return [reader.tokenizer.cls_id, *ids, reader.tokenizer.sep_id]
