"""report.html: its figures follow from the run's JSON, and what anybody wrote stays text."""

import json
import random
import sys
from html.parser import HTMLParser

import numpy as np
import pytest

from minitune.support import report
from minitune.support.baselines import answer_test_rows
from minitune.support.errors import UserError
from minitune.support.markup import Html, log_ticks, tag, ticks, together
from minitune.support.reference import REFERENCE
from minitune.support.report import write_report
from minitune.support.report_fine_tuning import record_mistakes

EVIL = "<script>alert(1)</script> & \"'><img src=x onerror=alert(2)>"
TAGS = {
    *("html", "head", "meta", "title", "style", "body", "main", "h1", "h2", "p", "section", "div"),
    *("dl", "dt", "dd", "figure", "svg", "line", "text", "polyline", "circle", "rect", "ul", "ol"),
    *("li", "table", "caption", "thead", "tbody", "tr", "th", "td", "details", "summary", "small"),
    *("blockquote", "code", "footer"),
}
VOID = {"meta"}


class Page(HTMLParser):
    """The elements of a page, its tables by their captions, and its text."""

    def __init__(self, content: str):
        super().__init__()
        self.open, self.elements, self.tables, self.texts = [], [], {}, []
        self.feed(content)
        assert not self.open

    def handle_starttag(self, name, attributes):
        self.elements.append((name, dict(attributes)))
        if name not in VOID:
            self.open.append(name)
        if name == "table":
            self.rows, self.caption = [], ""
        if name == "tr":
            self.rows.append([])
        if name in ("th", "td"):
            self.rows[-1].append("")

    def handle_endtag(self, name):
        assert self.open.pop() == name  # every element is closed where it should be
        if name == "table":
            self.tables[self.caption] = self.rows

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.texts.append(data)
        if "caption" in self.open:
            self.caption += data
        elif "td" in self.open or "th" in self.open:
            self.rows[-1][-1] += " " + data if self.rows[-1][-1] else data

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())


def page_of(directory) -> Page:
    write_report(directory)
    return Page((directory / "report.html").read_text())


def table_of(page: Page, beginning: str) -> list[list[str]]:
    [found] = [rows for caption, rows in page.tables.items() if caption.startswith(beginning)]
    return found


def write(directory, **files):
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (directory / f"{name}.json").write_text(json.dumps(content))


def fine_tuned(
    directory, names=("bad", "good"), rows=200, seed=0, log=30, texts=None, baselines=None
):
    """The files of a run of finetune.py with made-up logits; (logits, labels) of the test rows."""
    rng = np.random.default_rng(seed)
    answers = {"names": list(names), "temperature": 1.7}
    for split in ("validation", "test"):
        labels = rng.integers(0, len(names), rows)
        logits = rng.normal(size=(rows, len(names))).round(6)
        logits[np.arange(rows), labels] += 1.2
        answers[split] = {"labels": labels.tolist(), "logits": logits.tolist()}
    logits, labels = (np.array(answers["test"][key]) for key in ("logits", "labels"))
    metrics = {"method": "full", "accuracy": float((logits.argmax(1) == labels).mean())}
    metrics |= {"macro_f1": 0.5, "trainable_params": 10, "total_params": 1000, "device": "a CPU"}
    metrics |= {"train_examples": 99, "train_seconds": 1.5, "precision": "fp32", "model": "base"}
    metrics |= {"data": "some.csv", "validation_loss": 0.5, "best_training": 1}
    write(directory, answers=answers, metrics=metrics, settings={"experiment": {}})
    lines = [{"step": k, "loss": 1 / k, "seconds": k} for k in range(1, log + 1)]
    lines[-1]["validation"] = {"loss": 0.5, "accuracy": 0.8}
    (directory / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    texts = texts or [f"row {i} is {names[labels[i]]}" for i in range(rows)]
    both = {"train": texts, "test": texts}, {"train": labels, "test": labels}
    record_mistakes(directory, texts, baselines or answer_test_rows(*both, len(names)))
    return logits, labels


def reference_log() -> list[dict]:
    return [json.loads(line) for line in (REFERENCE / "log.jsonl").read_text().splitlines()]


def pretrained(directory, data="imdb", log=None, answers=3):
    """The files of a run of train.py that logged what the reference run did."""
    entries = log or reference_log()
    words = [[["the", 0.25], [",", 0.125], [EVIL, 0.01]][:answers]] * 10
    for k, entry in enumerate(entry for entry in entries if "validation" in entry):
        entry["blanks"] = [[[f"word{k}x{i}", 0.5]] for i in range(10)]
    settings = json.loads((REFERENCE / "settings.json").read_text()) | {"data": data}
    metrics = json.loads((REFERENCE / "metrics.json").read_text())
    shown = {"sentences": [f"sentence {i} [MASK]." for i in range(10)]}
    nearest = {"great": [["good", 0.9], [EVIL, 0.5]], "boring": []}
    shown |= {key: {"blanks": words, "nearest": nearest} for key in ("start", "end")}
    write(directory, settings=settings, metrics=metrics, report=shown)
    (directory / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return entries


# What anybody wrote stays text, and nothing is loaded


def assert_harmless(page: Page):
    assert {name for name, _ in page.elements} <= TAGS
    for _, attributes in page.elements:
        for name, value in attributes.items():
            assert not name.startswith("on") and name not in ("src", "href")
            assert "url(" not in value and "//" not in value
    [policy] = [a["content"] for _, a in page.elements if "http-equiv" in a]
    assert policy.startswith("default-src 'none'") and "script" not in policy


def test_markup_in_labels_reviews_and_names_stays_text(tmp_path):
    directory = tmp_path / "a<b>'\"&"
    fine_tuned(directory, (EVIL[:39], "good"), texts=[f"{EVIL} {i}" for i in range(200)])
    metrics = json.loads((directory / "metrics.json").read_text())
    write(
        directory, metrics=metrics | {"method": EVIL, "data": EVIL, "model": EVIL, "device": EVIL}
    )
    page = page_of(directory)
    assert_harmless(page)
    assert page.text.count("<script>alert(1)</script>") > 20
    assert "a<b>'\"&" in page.text


def test_markup_in_words_and_settings_of_a_pretraining_stays_text(tmp_path):
    pretrained(tmp_path / "<i>", data=EVIL)
    page = page_of(tmp_path / "<i>")
    assert_harmless(page)
    assert EVIL in page.text


def test_only_markup_is_not_escaped():
    assert (
        tag("p", "<b>", Html("<i></i>"), title='"<') == '<p title="&quot;&lt;">&lt;b&gt;<i></i></p>'
    )
    assert together(3, "&", None) == "3&amp;None"


@pytest.mark.parametrize("make", [fine_tuned, pretrained])
def test_a_page_can_be_used_without_eyes_and_without_a_mouse(tmp_path, make):
    make(tmp_path)
    page = page_of(tmp_path)
    assert_harmless(page)
    assert ("html", {"lang": "en"}) in page.elements
    assert [name for name, _ in page.elements if name in ("h1", "h2")][:2] == ["h1", "h2"]
    for name, attributes in page.elements:
        if name == "svg":
            is_named = len(attributes.get("aria-label", "")) > 20 and attributes["role"] == "img"
            assert is_named or attributes["aria-hidden"] == "true"
        if name == "th":
            assert attributes["scope"] in ("row", "col")
        if attributes.get("class") == "scroll":
            assert attributes["tabindex"] == "0" and attributes["aria-label"]


def test_the_largest_page_stays_below_300_kilobytes(tmp_path):
    names = [f"{'ä<&' * 100} {i}" for i in range(100)]
    rng = random.Random(0)
    texts = ["".join(rng.choices("<&\"'ä語 ", k=5000)) for _ in range(3000)]
    baselines = [({"method": "nb-svm", "accuracy": 0.5, "macro_f1": 0.5}, [7] * 3000)]
    options = {"texts": texts, "baselines": baselines}
    fine_tuned(tmp_path / "a", names, rows=3000, log=20_000, **options)
    entries = []
    for k in range(1, 20_001):
        entries.append({"step": k, "loss": 5.0, "tokens": 4096 * k, "seconds": k})
        if k % 900 == 0:
            entries[-1]["validation"] = {"loss": 4.0, "accuracy": 0.1}
    pretrained(tmp_path / "b", log=entries)
    for directory in (tmp_path / "a", tmp_path / "b"):
        assert_harmless(page_of(directory))
        assert (directory / "report.html").stat().st_size < 300_000


# The figures


def softmax(row, temperature=1.0):
    powers = np.exp((row - row.max()) / temperature)
    return powers / powers.sum()


def test_the_tables_of_right_and_wrong_follow_from_the_answers(tmp_path):
    names = ["a", "b", "c"]
    logits, labels = fine_tuned(tmp_path, names)
    answers = [row.argmax() for row in logits]
    page = page_of(tmp_path)
    head, *rows = table_of(page, "Test rows")
    assert head == ["right label", *names]
    for i, row in enumerate(rows):
        pairs = list(zip(labels, answers, strict=True))
        assert row == [names[i], *(str(pairs.count((i, j))) for j in range(3))]
    for i, row in enumerate(table_of(page, "Each label by itself")[1:]):
        right = sum(a == b == i for a, b in zip(labels, answers, strict=True))
        due, given = labels.tolist().count(i), answers.count(i)
        assert row == [
            names[i], str(due), f"{right / due:.1%}", f"{right / given:.1%}",
            f"{2 * right / (due + given):.3f}",
        ]  # fmt: skip
    assert f"{np.mean(labels == answers):.1%}" in page.text


def test_many_labels_are_shown_by_their_most_frequent_confusions(tmp_path):
    names = [f"label {i}" for i in range(20)]
    logits, labels = fine_tuned(tmp_path, names, rows=2000)
    counts = {}
    for right, row in zip(labels, logits, strict=True):
        if row.argmax() != right:
            pair = names[right], names[row.argmax()]
            counts[pair] = counts.get(pair, 0) + 1
    _, *rows = table_of(page_of(tmp_path), "The most frequent confusions")
    assert [int(n) for *_, n in rows] == sorted(counts.values(), reverse=True)[:20]
    assert all(counts[a, b] == int(n) for a, b, n in rows)


def test_the_figures_of_calibration_follow_from_the_answers(tmp_path):
    logits, labels = fine_tuned(tmp_path)
    page = page_of(tmp_path)
    saved = json.loads((tmp_path / "answers.json").read_text())["validation"]
    for row, temperature in zip(table_of(page, "ECE")[1:], (1.0, 1.7), strict=True):
        bins, losses = {}, []
        for z, label in zip(logits, labels, strict=True):
            p = softmax(z, temperature)
            losses.append(-np.log(p[label]))
            bins.setdefault(min(int(p.max() * 10), 9), []).append((p.max(), p.argmax() == label))
        gaps = (abs(sum(p - right for p, right in inside)) for inside in bins.values())
        pairs = zip(saved["logits"], saved["labels"], strict=True)
        validation = [-np.log(softmax(np.array(z), temperature)[y]) for z, y in pairs]
        assert row[1:] == [
            f"{temperature:.3f}", f"{sum(gaps) / 200:.4f}",
            f"{np.mean(losses):.4f}", f"{np.mean(validation):.4f}",
        ]  # fmt: skip
        name = "before" if temperature == 1 else "after"
        shown = [r for r in table_of(page, "Answers by")[1:] if r[0].startswith(name)]
        for (_, count, mean, right), k in zip(shown, sorted(bins), strict=True):
            expected = [f"{100 * x:.1f}%" for x in np.mean(bins[k], axis=0)]
            assert [count, mean, right] == [str(len(bins[k])), *expected]


def test_the_accuracy_of_the_surest_rows_follows_from_the_answers(tmp_path):
    logits, labels = fine_tuned(tmp_path)
    rows = sorted(
        ((softmax(z, 1.7).max(), z.argmax() == y) for z, y in zip(logits, labels, strict=True)),
        key=lambda row: -row[0],
    )
    for share, count, lowest, accuracy in table_of(page_of(tmp_path), "The surest")[1:]:
        n = round(float(share.rstrip("%")) / 100 * 200)
        assert (int(count), lowest) == (n, f"{rows[n - 1][0]:.1%}")
        assert accuracy == f"{np.mean([right for _, right in rows[:n]]):.1%}"


@pytest.mark.parametrize("names", [("bad", "good"), ("bad", "fair", "fine", "good", "great")])
def test_the_mistakes_are_the_rows_with_the_least_probability_of_the_right_label(tmp_path, names):
    logits, labels = fine_tuned(tmp_path, names)
    pairs = enumerate(zip(logits, labels, strict=True))
    wrong = [(softmax(z)[y], i) for i, (z, y) in pairs if z.argmax() != y]
    saved = json.loads((tmp_path / "report.json").read_text())
    assert [row["row"] for row in saved["mistakes"]] == [i for _, i in sorted(wrong)[:20]]
    page = page_of(tmp_path)
    words = "Right where the bag of words is wrong: 0 rows. Wrong where it is right: "
    assert f"{words}{len(wrong)} rows. If both were equally good" in page.text
    assert f"probability {2 * 0.5 ** len(wrong):.2g} (McNemar" in page.text
    for row in saved["mistakes"]:
        i = row["row"]
        right, answer = names[labels[i]], names[logits[i].argmax()]
        assert row["bag_of_words"] == right  # the word stands in the text
        p = softmax(logits[i], 1.7).max()
        facts = f"right: {right}; answer: {answer}, {p:.1%}; bag of words: {right}"
        assert f"row {i} is {right} {facts}" in page.text


def test_blanks_stand_under_the_tokens_after_which_they_were_filled(tmp_path):
    entries = [entry for entry in pretrained(tmp_path) if "validation" in entry]
    page = page_of(tmp_path)
    head, *rows = table_of(page, "The most probable word, and its probability")
    tokens = [f"{entry['tokens'] / 1e6:.3g}" for entry in entries]
    assert head == ["sentence", "start", *tokens, "end"] and len(entries) == 12
    for i, row in enumerate(rows):
        assert row == [
            f"sentence {i} ____.",
            "the 25%",
            *(f"word{k}x{i} 50%" for k in range(12)),
            "the 25%",
        ]
    assert table_of(page, "“great” at the end")[1:] == [["good", "0.90"], [EVIL, "0.50"]]
    assert "“boring” is not in the vocabulary" in page.text
    final = json.loads((REFERENCE / "metrics.json").read_text())["loss"]
    losses = [*(entry["validation"]["loss"] for entry in entries), final]
    shown = [row[1] for row in table_of(page, "Evaluations")[1:]]
    assert shown == [f"{loss:.3f}" for loss in losses]


@pytest.mark.parametrize(
    "data, worse, words",
    [
        ("imdb", 0.0, "had {loss:.2f} at its end. That is normal."),
        ("imdb", 0.5, "That is 0.50 worse"),
        ("mine.txt", 0.5, "The reference run had other data, another model or another mask rate"),
    ],
)
def test_the_loss_is_compared_with_the_reference_run_where_it_can_be(tmp_path, data, worse, words):
    log = reference_log()
    pretrained(tmp_path, data, [entry | {"loss": entry["loss"] + worse} for entry in log])
    loss = np.mean([entry["loss"] for entry in log[-10:]])
    assert words.format(loss=loss) in page_of(tmp_path).text


def test_a_short_run_is_compared_after_as_many_tokens(tmp_path):
    log = reference_log()[:60]
    pretrained(tmp_path, log=log)
    loss = np.mean([entry["loss"] for entry in log[-10:]])
    expected = (
        f"was {loss:.2f}. The reference run had {loss:.2f} after as many tokens. That is normal."
    )
    assert expected in page_of(tmp_path).text


@pytest.mark.parametrize(
    "loss, words",
    [
        (3.75, "The plateau, shaded, lasts from 0.0396 to 0.161 million tokens"),
        (3.75, "At the end the loss is 2.93 below the unigram entropy."),
        (6.60, "The loss ends no better than by frequency alone: train for longer."),
    ],
)
def test_it_says_where_the_plateau_is_and_whether_it_was_left(tmp_path, loss, words):
    pretrained(tmp_path)
    metrics = json.loads((tmp_path / "metrics.json").read_text()) | {"loss": loss}
    write(tmp_path, metrics=metrics)
    assert words in page_of(tmp_path).text


# Files of other times, and damaged ones


def test_older_runs_have_a_page_of_what_they_recorded(tmp_path):
    fine_tuned(tmp_path / "a")
    pretrained(tmp_path / "b", log=reference_log())
    for name in ("a/answers.json", "a/report.json", "b/report.json"):
        (tmp_path / name).unlink()
    assert "not recorded by this run" in page_of(tmp_path / "a").text
    assert "not recorded by this run" in page_of(tmp_path / "b").text


def test_a_page_can_be_written_again_from_the_files(tmp_path, monkeypatch, capsys):
    fine_tuned(tmp_path / "a")
    pretrained(tmp_path / "b")
    before = {}
    for name in "ab":
        write_report(tmp_path / name)
        before[name] = (tmp_path / name / "report.html").read_bytes()
        (tmp_path / name / "report.html").unlink()
    monkeypatch.setattr(sys, "argv", ["report", str(tmp_path / "a"), str(tmp_path / "b")])
    report.main()
    assert capsys.readouterr().out.count("wrote") == 2
    for name in "ab":
        assert (tmp_path / name / "report.html").read_bytes() == before[name]


@pytest.mark.parametrize(
    "name, content",
    [
        ("metrics", {}),
        ("answers", {"names": ["bad", "good"], "temperature": 0, "test": {"labels": [0]}}),
        ("report", {"mistakes": [{"row": 10**9}]}),
        ("report", {"mistakes": 3}),
        (
            "report",
            {"mistakes": [{"row": 0, "text": "half of a pair: \ud800", "bag_of_words": ""}]},
        ),
        ("answers", {"names": ["bad"], "temperature": 1, "test": {"labels": [], "logits": []}}),
    ],
)
def test_damaged_files_are_an_error_of_one_line_and_leave_no_page(tmp_path, name, content):
    fine_tuned(tmp_path)
    write(tmp_path, **{name: content})
    with pytest.raises(UserError, match="damaged") as error:
        write_report(tmp_path)
    assert "\n" not in str(error.value) and not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    "low, high", [(0, 1), (0.5, 1.02), (3, 9.4), (0, 16.5), (0, 123456), (0, 1e-3)]
)
def test_ticks_are_round_and_inside(low, high):
    found = ticks(low, high)
    assert 3 <= len(found) <= 7 and low <= found[0] and found[-1] <= high
    assert all(
        len(f"{value:g}".replace("0", "").replace(".", "").replace("-", "")) <= 6 for value in found
    )


def test_ticks_of_a_logarithmic_axis():
    assert log_ticks(0.04, 16.5) == [0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10]
    assert log_ticks(7e-5, 16.5) == [0.0001, 0.001, 0.01, 0.1, 1, 10]  # more have no room
