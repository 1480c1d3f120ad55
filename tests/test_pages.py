"""Pages: what they compute in Node is what torch computes; in Chromium they can be used."""

import json
import re
import shutil
import subprocess
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import AddedToken
from torch import nn

import finetune
import prompt
from minitune.batching import PackedBatch
from minitune.calibration import Ensemble
from minitune.checkpoint import load_masked_lm, save_model
from minitune.classification import TokenizedTexts
from minitune.commands.pages import page_of_classifier, page_of_prompts
from minitune.methods import build
from minitune.model import BertConfig
from minitune.prediction import Classifier
from minitune.prompting import TEMPLATES, FillMask, Prompt
from minitune.support.cli import run_script
from minitune.support.errors import UserError
from minitune.support.page import check_path, pack, quantise, write_page
from minitune.support.runtime import Runtime
from minitune.support.tokenizer_files import SPECIAL_TOKENS
from minitune.tokenizer import Tokenizer
from tests.chromium import PROGRAM, Chromium

NODE = shutil.which("node")
in_node = pytest.mark.skipif(not NODE, reason="needs Node: apt-get install nodejs")
in_chromium = pytest.mark.skipif(not PROGRAM, reason="needs Chromium: apt-get install chromium")

TEXTS = [f"{first} {noun} was {word}" for first in ("the", "a", "it is said that this")
         for noun in ("film", "plot", "unforgettable cast", "café", "<i>score</i>", "movie's end")
         for word in ("good", "great , superb !", "bad", "dull .", "neither good nor bad : so-so")]  # fmt: skip
CONFIG = BertConfig(
    vocab_size=220, hidden_size=64, num_hidden_layers=2, num_attention_heads=2,
    intermediate_size=128, max_position_embeddings=40,
)  # fmt: skip
LABELS = {0: "dull", 1: "<script>document.title = 'run'</script>", 2: "good"}
OPTIONS = {
    "feature": {}, "bitfit": {}, "adapter": {"adapter_size": 70}, "full": {}, "ia3": {},
    "lora": {"lora_targets": "query,value", "lora_rank": 4, "lora_alpha": 16.0},
}  # fmt: skip
# Accents, ligatures, capital letters that lower-case in several ways, Chinese, Korean, Thai,
# emoji with joiners, control and format characters, unusual spaces, punctuation of several kinds,
# combining marks in the wrong order, half-width letters, a word of more than 100 letters.
UNICODE = (
    """\
Café CAFÉ cafe\u0301 ﬁlm ÅNGSTRÖM Straße STRASSE İstanbul ΟΔΥΣΣΕΥΣ ǅungla ŉ
电影很好看 映画は素晴らしい 영화 좋아요 หนังดี \U00020000\U0002a6df\uf900 ｆｉｌｍ
👍🏽 👩‍👩‍👧 ❤️ good\u200bgood so\u00adso bad\ufffdbad a\x00b\x07c d\x7fe \ufeffgreat\u2028dull\u2029film\x85plot
no\u00a0break thin\u2009space ideographic\u3000space tab\tnew\nline\r\n\x0b\x0c
“good” ‘bad’ «so» ¿qué? ¡no! 10€ $5 5+5=10 a_b `c` ~d ^e |f| <br/>g<BR />h<br>i ‽ … ‥ — 〈x〉
e\u0323\u0302 q\u0307\u0323 \u0301good ä\u0308 नमस्ते हिन्दी עִבְרִית العَرَبِيَّة русский Ёлка
"""
    + "unforgettable" * 9
    + " [MASK] [CLS] ##good xx\U000e0001yy \ue000 \U0001f9ff"
)


@pytest.fixture
def runtime():
    return Runtime.start("cpu", "fp32")


@pytest.fixture
def classifier(base, tokenizer, runtime):
    """A classifier of a method, with random weights that make a difference."""

    def make(method, max_len=30):
        model = build(method, base, LABELS, **OPTIONS[method])
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                nn.init.normal_(
                    parameter, std=0.3 if "embeddings" in name or "classifier" in name else 0.12
                )
            elif parameter.requires_grad:
                parameter.data.add_(torch.randn_like(parameter), alpha=0.2)
        if method == "feature":
            model.head.standardise(torch.randn(9, len(model.head.mean)))
        return Classifier(model, tokenizer, LABELS, max_len, runtime)

    return make


def round_weights(model):
    """Give a model the weights that its page has, so that both compute the same."""
    state = model.state_dict()
    table, content = pack(state)
    for place, (name, weight) in zip(table, state.items(), strict=True):
        if "unit" in place:
            count = weight.numel() // place["group"]
            numbers = np.frombuffer(content, np.int8, weight.numel(), place["start"])
            scales = np.frombuffer(content, "<u2", count, place["scales"]) * place["unit"]
            rounded = numbers.reshape(count, -1) * scales[:, None]
            weight.copy_(torch.from_numpy(rounded).view(weight.shape))
            assert name == place["name"]


@pytest.fixture
def ensemble(base, tokenizer, runtime):
    """Two prompts, with words of one token and of several."""
    model, _ = load_masked_lm(base)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.12)
    fill_mask = FillMask(model.eval(), tokenizer, runtime)
    words = {"bad": ["bad", "dull"], "good": ["good", "sogood", "great"]}
    assert {len(ids) for ids in tokenizer.encode(["bad", "sogood"])} > {1}
    sentences = ["{text} : it was [MASK] .", "a [MASK] film : {text}"]
    prompts = [Prompt(sentence, words, fill_mask, 24) for sentence in sentences]
    prompts[1].demonstrate(tokenizer.encode(["the plot was dull"]), [0])
    return Ensemble(prompts, "pmi", [])


@pytest.fixture
def node(tmp_path):
    def run(page, calls):
        (tmp_path / "page.html").write_text(page, encoding="utf-8")
        command = [NODE, Path(__file__).with_name("page_in_node.js"), tmp_path / "page.html"]
        done = subprocess.run(command, input=json.dumps(calls).encode(), stdout=subprocess.PIPE)
        assert done.returncode == 0
        return json.loads(done.stdout)

    return run


@pytest.mark.parametrize("columns", [64, 40])
def test_int8_is_off_by_half_a_step_at_most(columns, fixed_seed):
    matrix = torch.randn(5, columns).mul(torch.tensor([[1e-6], [1], [3], [1e4], [0]])).numpy()
    numbers, scales, unit = quantise(matrix, 16)
    assert len(scales) == (20 if columns == 64 else 5) and abs(numbers).max() == 127
    groups = matrix.reshape(numbers.shape)
    assert (abs(numbers * scales * unit - groups) <= 0.501 * scales * unit).all()
    assert (scales * unit <= abs(groups).max(1, keepdims=True) / 127 + unit).all()


def letter_tokenizer(added=(), **options):
    """Every letter of UNICODE and TEXTS, and what normalizing may make of it, is a token."""
    text = "".join([UNICODE, *TEXTS])
    text += unicodedata.normalize("NFD", text)
    letters = sorted({*text, *"".join(letter.lower() for letter in text)} - {*" \n"})
    tokens = [*SPECIAL_TOKENS, *letters, *("##" + letter for letter in letters)]
    return Tokenizer({token: i for i, token in enumerate(tokens)}, added, **options)


@in_node
def test_token_ids_are_those_of_the_tokenizer(classifier, node):
    asked = classifier("full")
    asked.tokenizer = letter_tokenizer()
    texts = [*TEXTS, UNICODE, *UNICODE.split(), "", " \n"]
    expected = asked.tokenizer.encode(texts)
    page = page_of_classifier(asked, "x")
    assert node(page, [{"encode": text} for text in texts]) == expected
    assert sum(expected, []).count(asked.tokenizer.unk_id) == 2  # the word of over 100 letters


@in_node
@pytest.mark.parametrize("options", [{"lowercase": False}, {"strip_accents": False},
    {"lowercase": False, "strip_accents": True, "handle_chinese_chars": False, "clean_text": False}])  # fmt: skip
def test_token_ids_with_other_options_and_added_tokens(classifier, node, options):
    asked = classifier("full")
    added = [AddedToken("SO-SO", normalized=False), AddedToken("so", normalized=False)]
    added += [AddedToken("Great Film", normalized=True), AddedToken("a.b", normalized=True)]
    asked.tokenizer = letter_tokenizer(added, remove_markup=False, **options)
    texts = [*TEXTS, UNICODE, "SO-SO so-so somesoSO", "a GREAT FILM Great film a.b acb A.B"]
    page = page_of_classifier(asked, "x")
    assert node(page, [{"encode": text} for text in texts]) == asked.tokenizer.encode(texts)


def test_added_tokens_of_another_kind_are_refused(classifier, tokenizer):
    asked = classifier("full")
    vocab = {token: i for i, token in tokenizer.tokens.items()}
    asked.tokenizer = Tokenizer(vocab, [AddedToken("so", single_word=True)])
    with pytest.raises(UserError, match="added token 'so'"):
        page_of_classifier(asked, "x")


@in_node
@pytest.mark.parametrize("method", OPTIONS)
def test_labels_are_those_of_torch(classifier, node, method, fixed_seed):
    asked = classifier(method)
    asked.model.temperature = 1.3
    texts = [TEXTS[0], TEXTS[-1], " ".join(TEXTS[40:48]), "", UNICODE]
    inputs = TokenizedTexts(texts, asked.tokenizer, asked.max_len)
    found = node(page_of_classifier(asked, method), [{"answer": text} for text in texts])
    round_weights(asked.model)
    with torch.no_grad():
        expected = asked.model(inputs.pack()).div(1.3).log_softmax(-1)
    assert [one["ids"] for one in found] == [ids.tolist() for ids in inputs.ids]
    assert [one["cut"] for one in found] == inputs.truncated
    assert expected.std(0).max() > 0.1  # the texts differ
    assert torch.tensor([one["logs"] for one in found]).sub(expected).abs().max() < 1e-4


@in_node
def test_labels_of_prompts_are_those_of_torch(ensemble, node, tokenizer, fixed_seed):
    texts = [TEXTS[3], " ".join(TEXTS[20:24])]
    calls = [{"answer": text, "question": i} for text in texts for i in range(3)]
    found = node(page_of_prompts(ensemble, "x"), calls)
    round_weights(ensemble.prompts[0].fill_mask.model)
    ids = tokenizer.encode(texts)
    scores = [p.scores(ids) + b for p, b in zip(ensemble.prompts, ensemble.biases, strict=True)]
    each = [*(score.log_softmax(-1) for score in scores), ensemble.log_probabilities(ids)]
    assert each[0].sub(each[1]).abs().max() > 0.1  # the questions differ
    expected = torch.stack(each, dim=1).flatten(0, 1)
    assert torch.tensor([one["logs"] for one in found]).sub(expected).abs().max() < 1e-4
    for asked, one in zip(ensemble.prompts, found[3:5], strict=True):
        assert one["cut"] and one["ids"] == asked.query(ids[1], [tokenizer.mask_id]).ids
        (likely,) = asked.most_probable_words(ids[1:], 5)
        (filled,) = one["filled"]
        assert filled[0][0] == likely[0][0] and filled[0][1] == pytest.approx(
            likely[0][1], abs=0.02
        )


@in_node
def test_blanks_in_a_text_are_filled(ensemble, node, tokenizer, fixed_seed):
    fill_mask, text = ensemble.prompts[0].fill_mask, "The [MASK] was[MASK]!"
    (found,) = node(page_of_prompts(ensemble, "x"), [{"answer": text}])
    round_weights(fill_mask.model)
    a, b, c = tokenizer.encode(["The ", " was", "!"])
    mask = tokenizer.mask_id
    assert found["ids"] == tokenizer.frame([*a, mask, *b, mask, *c]) and found["logs"] is None
    batch = PackedBatch.from_sequences([torch.tensor(found["ids"])])
    with torch.no_grad():
        expected = fill_mask.model(batch, torch.tensor(found["blanks"])).softmax(-1)
    for likely, row in zip(found["filled"], expected, strict=True):
        for word, probability in likely:
            assert row[tokenizer.backend.token_to_id(word)] == pytest.approx(probability, abs=1e-4)


@in_node
def test_the_effect_of_a_word_is_what_hiding_it_takes_away(classifier, node, tokenizer, fixed_seed):
    asked, text = classifier("adapter"), "an unforgettable, superb café!"
    (found,) = node(page_of_classifier(asked, "x"), [{"answer": text, "effects": True}])
    round_weights(asked.model)
    assert found["words"] == ["an", "unforgettable", ",", "superb", "cafe", "!"]
    sequences = [torch.tensor(found["ids"])]
    for word in range(len(found["words"])):
        hidden = sequences[0].clone()
        hidden[torch.tensor(found["wordOf"]) == word] = tokenizer.mask_id
        sequences.append(hidden)
    with torch.no_grad():
        p = asked.model(PackedBatch.from_sequences(sequences)).softmax(-1)
    odds = torch.logit(p[:, p[0].argmax()])
    assert torch.tensor(found["effects"]).sub(odds[0] - odds[1:]).abs().max() < 1e-4


@in_node
def test_attention_is_the_softmax_of_queries_and_keys(classifier, node, fixed_seed):
    asked = classifier("full")
    (found,) = node(page_of_classifier(asked, "x"), [{"answer": TEXTS[-1]}])
    round_weights(asked.model)
    batch = PackedBatch.from_sequences([torch.tensor(found["ids"])])
    T, bert = len(found["ids"]), asked.model.bert
    with torch.no_grad():
        x = bert.embeddings(batch)
        for layer, shown in zip(bert.layers, found["attention"], strict=True):
            q, k, _ = layer.attention.qkv(x)[:T].unflatten(1, (3, 2, -1)).unbind(1)
            weights = torch.einsum("thd,shd->hts", q, k).div(32**0.5).softmax(-1)
            assert weights.std() > 0.01
            assert torch.tensor(shown).view(2, T, T).sub(weights).abs().max() < 1e-4
            x = layer(x, batch)


@pytest.fixture
def tab(tmp_path, classifier, ensemble, fixed_seed):
    """Chromium with the page of a classifier, from a file."""
    asked = classifier("adapter")
    pages = {"classifier": page_of_classifier(asked, "runs/<img src=x onerror=alert(1)>")}
    pages["prompts"] = page_of_prompts(ensemble, "masked")
    with Chromium() as tab:
        tab.asked = asked

        def show(name):
            path = tmp_path / f"{name} <b> & ü.html"
            write_page(path, pages[name], yes=False)
            tab.open(path)
            tab.wait_for(DONE)

        tab.show = show
        show("classifier")
        yield tab


DONE = "document.documentElement.dataset.state === 'done'"


def type_text(tab, text):
    tab.evaluate("document.getElementById('text').select()")
    tab.insert(text)
    tab.wait_for(DONE)


def text_of(tab, selector):
    return tab.evaluate(f"document.querySelector({selector!r}).textContent")


@in_chromium
def test_a_page_in_chromium(tab, tmp_path):
    # What is typed is answered as torch answers it; what anybody wrote stays text.
    text = "<script>alert(1)</script> the film was good"
    type_text(tab, text)
    (answer,) = tab.asked.predict([text])
    label, share = text_of(tab, "#label").rsplit(", ", 1)
    assert label == answer.label
    assert float(share[:-1]) / 100 == pytest.approx(answer.probabilities[label], abs=0.02)
    names = "[...document.querySelectorAll('#labels .name')].map((e) => e.textContent)"
    assert tab.evaluate(names) == list(LABELS.values())
    assert text_of(tab, "h1") == "runs/<img src=x onerror=alert(1)>"
    assert tab.evaluate("document.querySelectorAll('img, main script').length") == 0
    assert tab.evaluate("document.title").startswith("runs/<img")
    shaded = (
        "[...document.querySelectorAll('#words span')].every((e) => e.style.background && e.title)"
    )
    assert text_of(tab, "#words").split()[:3] == ["<", "script", ">"] and tab.evaluate(shaded)

    # The keyboard alone: from the text to the heads and to the tokens, and among them.
    tab.evaluate("document.getElementById('text').focus()")
    before = text_of(tab, "#looks")
    for key in ("Tab", "ArrowDown", "ArrowRight", "Tab", "End", "ArrowLeft"):
        tab.press(key)
    assert tab.evaluate("document.activeElement.textContent") == "good"
    assert text_of(tab, "#looks").startswith("Layer 2, head 2: “good” attends to “")
    assert text_of(tab, "#looks") != before

    # A screen reader hears names for all controls.
    nodes = tab.call("Accessibility.getFullAXTree")["nodes"]
    controls = {"textbox", "radio", "button", "combobox", "radiogroup", "toolbar"}
    named = [(n["role"]["value"], n["name"]["value"]) for n in nodes
             if not n["ignored"] and n["role"]["value"] in controls]  # fmt: skip
    assert ("textbox", "A review") in named and ("radio", "Layer 2, head 2") in named
    assert all(name for _, name in named)

    # Dark where the system is dark, and letters that can be read on either.
    for dark in (False, True):
        tab.screenshot(tmp_path / "page.png", width=320, dark=dark)
        assert tab.evaluate("document.documentElement.scrollWidth") == 320
        ink, paper = (tab.evaluate(f"getComputedStyle(document.body).{name}")
                      for name in ("color", "backgroundColor"))  # fmt: skip
        light, lighter = (sum(map(int, re.findall(r"\d+", colour))) for colour in (ink, paper))
        assert (light > lighter) == dark and abs(light - lighter) > 500

    # A masked language model: its blanks, and those of the text.
    tab.show("prompts")
    assert text_of(tab, "#filled h3").endswith(": it was ____ .")
    type_text(tab, "a [MASK] film and a [MASK]")
    assert tab.evaluate("document.querySelectorAll('#filled .bars').length") == 2
    assert tab.evaluate("document.getElementById('answer').hidden")

    # Nothing was loaded but the two files, and nothing failed.
    urls = [
        e["params"]["request"]["url"]
        for e in tab.events
        if e["method"] == "Network.requestWillBeSent"
    ]
    assert {url.split(":")[0] for url in urls} <= {"file", "blob"}
    assert sum(url.startswith("file:") for url in urls) == 2
    problems = ("Log.entryAdded", "Runtime.exceptionThrown", "Runtime.consoleAPICalled")
    assert not [e for e in tab.events if e["method"] in problems]


@pytest.fixture
def run_script_with(monkeypatch, tmp_path, capsys):
    """Run a script in an empty directory: its exit status and what it printed."""
    monkeypatch.chdir(tmp_path)

    def run(script, *words):
        monkeypatch.setattr(sys, "argv", [script.__file__, *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            run_script(script.main)
        return ended.value.code, "".join(capsys.readouterr())

    return run


def test_finetune_writes_a_page(run_script_with, base, tokenizer, tmp_path):
    model = build("full", base, {0: "no", 1: "yes"})
    (tmp_path / "run").mkdir()
    save_model(model, tokenizer, tmp_path / "run")
    status, printed = run_script_with(finetune, "--model", "run", "--page", "demo.html")
    assert status == 0 and re.search("wrote demo.html, 0.2 MB", printed)
    page = (tmp_path / "demo.html").read_text(encoding="utf-8")
    facts = json.loads(re.search(r'id="facts">(.*?)</script>', page)[1])
    assert (facts["labels"], facts["name"]) == (["no", "yes"], "run")
    for words, why in (
        (["--model", base], "is no classifier"),
        (["--model", "run", "--page", "run"], "should end with .html"),
        (["--model", "run", "--page", "no/demo.html"], "no such folder"),
        (["--model", "run", "--predict", "good"], "--page takes a run"),
    ):
        status, printed = run_script_with(finetune, *(["--page", "other.html"] + words))
        assert status == 2 and why in printed and printed.count("\n") <= 2
    assert not (tmp_path / "other.html").exists()


def test_prompt_writes_a_page(run_script_with, base, tmp_path):
    options = ["--model", base, "--page", "demo.html", "--max-len", 20, "--device", "cpu"]
    options += ["--words", "no=bad", "yes=good", "--calibrate", "none"]
    assert run_script_with(prompt, *options)[0] == 0
    page = (tmp_path / "demo.html").read_text(encoding="utf-8")
    facts = json.loads(re.search(r'id="facts">(.*?)</script>', page)[1])
    assert facts["labels"] == ["no", "yes"] and len(facts["prompts"]) == len(TEMPLATES)
    status, printed = run_script_with(prompt, *options, "--fill", "[MASK]")
    assert status == 2 and "give one of" in printed


def test_a_page_replaces_pages_only(tmp_path, classifier):
    page, path = page_of_classifier(classifier("full"), "x"), tmp_path / "page.html"
    for _ in range(2):
        check_path(path)
        write_page(path, page, yes=False)
    path.write_text("<!doctype html><p>mine")
    with pytest.raises(UserError, match="no page of minitune"):
        check_path(path)
    with pytest.raises(UserError, match="should end with .html"):
        check_path(tmp_path / "reviews.csv")
    assert path.read_text() == "<!doctype html><p>mine"


def test_a_large_page_needs_a_yes(tmp_path):
    page, path = "x" * 50_000_001, tmp_path / "page.html"
    with pytest.raises(UserError, match=r"50\.0 MB; add --yes"):
        write_page(path, page, yes=False)
    assert not path.exists()
    write_page(path, page, yes=True)
    assert path.stat().st_size == 50_000_001


def test_what_the_page_cannot_compute_is_refused(classifier):
    asked = classifier("full")
    asked.model.extra = nn.Linear(2, 2)
    with pytest.raises(UserError, match="cannot compute with extra.weight"):
        page_of_classifier(asked, "runs/odd")
