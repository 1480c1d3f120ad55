"""The lessons that show what they do with a sentence."""

import re
import runpy
import sys

import pytest
import torch

from minitune.checkpoint import load_masked_lm
from minitune.commands import demos
from minitune.explain import attention_maps
from minitune.model import BertConfig

CONFIG = BertConfig(
    vocab_size=60,
    hidden_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=24,
    max_position_embeddings=64,
    initializer_range=0.5,
)
TEXTS = ["The acting was great, and the plot thin!"]
pytestmark = [
    pytest.mark.usefixtures("fixed_seed"),
    pytest.mark.filterwarnings("ignore:.*found in sys.modules"),  # not so in a process of its own
]


@pytest.fixture
def show(base, monkeypatch, capsys):
    """`python -m minitune.LESSON WORDS` with the model in `base`; returns (status, out, err)."""
    monkeypatch.setattr(demos, "default_model", lambda: (str(base), "of the test"))

    def run(lesson, *words):
        monkeypatch.setattr(sys, "argv", [lesson, *words])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            runpy.run_module(f"minitune.{lesson}", run_name="__main__")
        return ended.value.code, *capsys.readouterr()

    return run


def test_the_tokenizer_shows_the_way_from_text_to_ids_and_back(show, tokenizer):
    status, out, _ = show("tokenizer", "The  plot", "was THIN!")
    lines = dict(line.split("  ", 1) for line in out.splitlines()[2:])
    lines = {key: value.strip() for key, value in lines.items()}
    assert status == 0 and lines["sentence"] == "The  plot was THIN!"
    assert lines["normalised"] == "the  plot was thin!" and lines["words"] == "the plot was thin !"
    ids = tokenizer.frame(tokenizer.encode(["The plot was THIN!"])[0])
    assert lines["ids"] == " ".join(map(str, ids))
    assert lines["tokens"] == " ".join(map(tokenizer.token, ids))
    assert lines["decoded"] == "[CLS] the plot was thin! [SEP]"


def test_masking_shows_what_is_to_be_guessed_and_how_often_it_is_masked(show, tokenizer):
    status, out, _ = show("masking", TEXTS[0])
    drawn = re.findall(r"^    (.+) {4}\((.+)\)$", out, re.M)
    assert status == 0 and len(drawn) == 10
    tokens = [tokenizer.token(i) for i in tokenizer.encode(TEXTS)[0]]
    for masked, guess in drawn:
        changed = [old for old, new in zip(tokens, masked.split(), strict=True) if old != new]
        assert set(changed) <= set(re.findall(r"(,|[^,]+)(?:, |$)", guess))  # "great, ,, was"
    assert "[MASK]" in out
    last = out.splitlines()[-1].removeprefix(
        "what stands where a token is to be guessed, in 2,000 draws: "
    )
    shares = {fate: int(share) for share, fate in re.findall(r"(\d+)% ([^,]+)", last)}
    assert shares["[MASK]"] == pytest.approx(80, abs=3) and sum(shares.values()) in (99, 100, 101)
    assert shares["another token"] == pytest.approx(10, abs=3)


def test_attention_shows_where_each_token_takes_most_from(show, base, tokenizer):
    status, out, _ = show("attention", TEXTS[0])
    ids = tokenizer.frame(tokenizer.encode(TEXTS)[0])
    (weights,) = attention_maps(load_masked_lm(base)[0].bert, torch.tensor(ids))
    _, *rows = [line.split() for line in out.split("\n\n")[2].splitlines()]
    assert status == 0 and [row[0] for row in rows] == [tokenizer.token(i) for i in ids]
    for i, row in enumerate(rows):
        for head in range(2):
            share, j = weights[head, i].max(-1)
            assert row[1 + 2 * head : 3 + 2 * head] == [tokenizer.token(ids[j]), f"{share:.0%}"]
    difference = float(re.search(r"the same output, within (\S+)", out)[1])
    assert difference < 1e-5


@pytest.mark.parametrize("lesson", ["tokenizer", "masking", "attention"])
def test_what_cannot_be_shown_is_an_error_of_one_line(show, lesson):
    for words in ([], [""], ["\udcff"], *([["\u200b"]] if lesson != "tokenizer" else [])):
        status, _, err = show(lesson, *words)
        assert status == 2 and re.fullmatch(r"error: .+\n", err), words


def test_a_sentence_too_short_to_mask_is_an_error_of_one_line(show):
    assert show("masking", "!")[0] == 2


def test_a_long_sentence_fits_on_a_screen(show):
    _, out, _ = show("attention", "so great, " * 300)
    assert len(out.splitlines()) < 40
