"""Parquet files and data sets of the hub: splits by their names, labels, batches, what is refused."""

import json
import sys
from pathlib import Path

import pytest

from minitune.data import Dataset, Reviews
from minitune.support import sources, text_files
from minitune.support.errors import UserError
from minitune.support.text_files import Columns, read_rows

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

SPLITS = ("train", "validation", "test")
NAMES = ["neg", "pos"]


def write(path: Path, columns: dict, names: list[str] | None = None, group: int = 7) -> Path:
    """A parquet file; `names` are those of the numbers in its column `label`, as the hub has them."""
    table = pyarrow.table(columns)
    if names:
        label = {"names": names, "_type": "ClassLabel"}
        info = {"info": {"features": {"text": {"dtype": "string"}, "label": label}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(info)})
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(table, path, row_group_size=group)
    return path


def reviews(split: str, count: int, labels: tuple[int, ...] = (0, 1)) -> dict:
    """As many of each label, in blocks by label; each text says what it is."""
    pairs = [(f"{split} {label} {i}", label) for label in labels for i in range(count)]
    return {"text": [text for text, _ in pairs], "label": [label for _, label in pairs]}


@pytest.fixture
def imdb(tmp_path):
    """The files of stanfordnlp/imdb, small."""
    root = tmp_path / "imdb"
    name = "plain_text/{}-00000-of-00001.parquet"
    write(root / name.format("test"), reviews("test", 10), NAMES)
    write(root / name.format("train"), reviews("train", 20), NAMES)
    write(root / name.format("unsupervised"), reviews("unsupervised", 40, (-1,)), NAMES)
    (root / "README.md").write_text("not a review")
    return root


def texts(dataset: Dataset, split: str) -> list[str]:
    return [row.text for row in dataset.rows(split)]


def test_the_test_file_is_the_test_half_and_the_rest_is_split(imdb):
    dataset = Dataset(str(imdb))
    assert texts(dataset, "test") == reviews("test", 10)["text"]
    assert texts(dataset, "validation") == ["train 0 19", "train 1 19"] + [
        f"unsupervised -1 {i}" for i in (38, 39)
    ]
    train = [f"train {label} {i}" for label in (0, 1) for i in range(19)]
    assert texts(dataset, "train") == train + [f"unsupervised -1 {i}" for i in range(38)]


def test_classifiers_get_the_labelled_rows_with_their_names(imdb):
    loaded = Reviews.load(Dataset(str(imdb / "plain_text")))
    assert loaded.names == {0: "neg", 1: "pos"}
    assert {split: len(loaded.texts[split]) for split in SPLITS} == dict(
        zip(SPLITS, (38, 2, 20), strict=True)
    )
    for split in SPLITS:
        for text, label in zip(loaded.texts[split], loaded.labels[split].tolist(), strict=True):
            assert text.split()[:2] == ["test" if split == "test" else "train", str(label)]


def test_a_validation_file_is_all_there_is_to_validate(tmp_path):
    for split, count in zip(SPLITS, (30, 4, 5), strict=True):
        write(tmp_path / split / "0000.parquet", reviews(split, count))
    dataset = Dataset(str(tmp_path))
    for split, count in zip(SPLITS, (30, 4, 5), strict=True):
        assert sorted(texts(dataset, split)) == sorted(reviews(split, count)["text"])
    assert Reviews.load(dataset).names == {0: "0", 1: "1"}  # no names in the files


def test_a_test_file_of_ones_own_replaces_the_test_half_alone(imdb, tmp_path):
    mine = write(tmp_path / "mine.parquet", {"text": ["so so", "fine"], "label": ["neg", "pos"]})
    dataset = Dataset(str(imdb), str(mine))
    assert texts(dataset, "test") == ["so so", "fine"]
    assert texts(dataset, "train") == texts(Dataset(str(imdb)), "train")


def test_one_file_is_split_like_any_other(tmp_path):
    file = write(tmp_path / "test.parquet", reviews("x", 20))
    dataset = Dataset(str(file))
    assert texts(dataset, "test") == [f"x {label} {i}" for label in (0, 1) for i in (18, 19)]


def test_other_columns_are_not_read(tmp_path):
    columns = {"body": ["good", "bad"], "stars": [5, 1], "vector": [[0.0] * 100] * 2}
    file = write(tmp_path / "a.parquet", columns)
    rows = list(read_rows(file, Columns("body", "stars")))
    assert [(row.text, row.label) for row in rows] == [("good", "5"), ("bad", "1")]
    with pytest.raises(UserError, match="no column named text .columns: body, stars, vector"):
        list(read_rows(file))


def test_a_number_without_a_name_is_no_label(tmp_path):
    file = write(tmp_path / "a.parquet", {"text": list("abc"), "label": [1, -1, 0]}, NAMES)
    assert [row.label for row in read_rows(file)] == ["pos", None, "neg"]
    file = write(tmp_path / "b.parquet", {"text": list("ab"), "label": [1, -1]})
    assert [row.label for row in read_rows(file)] == ["1", "-1"]  # ratings may be negative


def test_rows_are_read_in_batches(tmp_path, monkeypatch):
    file = write(tmp_path / "a.parquet", reviews("x", 50), group=1000)
    expected, sizes = list(read_rows(file)), []

    class Batches(parquet.ParquetFile):
        def iter_batches(self, *arguments, **options):
            for batch in super().iter_batches(*arguments, **options):
                sizes.append(batch.num_rows)
                yield batch

    monkeypatch.setattr(parquet, "ParquetFile", Batches)
    monkeypatch.setattr(text_files, "PARQUET_ROWS", 8)
    rows = read_rows(file)
    assert next(rows).text == "x 0 0" and sizes == [8]
    assert [expected[0], *rows] == expected and len(expected) == 100 and max(sizes) == 8


def test_a_file_is_never_whole_in_memory(tmp_path):
    columns = {"text": [f"{i} " + "word " * 400 for i in range(4000)]}
    table = pyarrow.table(columns)
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=100, use_dictionary=False)
    del table
    before, most = pyarrow.total_allocated_bytes(), 0
    for _ in read_rows(tmp_path / "a.parquet"):
        most = max(most, pyarrow.total_allocated_bytes() - before)
    assert 0 < most < 1 << 20 < 4000 * 2000  # bytes; the text has 8 MB


def test_the_fingerprint_sees_a_new_part(imdb):
    before = Dataset(str(imdb)).fingerprint()
    write(imdb / "plain_text" / "train-00001-of-00002.parquet", reviews("more", 1))
    assert Dataset(str(imdb)).fingerprint() != before


def test_a_name_of_the_hub_is_downloaded(imdb, monkeypatch):
    asked = []

    def download(name, **options):
        asked.append((name, options))
        return str(imdb)

    monkeypatch.setattr(sources, "snapshot_download", download)
    assert texts(Dataset("stanfordnlp/imdb"), "test") == texts(Dataset(str(imdb)), "test")
    options = {"repo_type": "dataset", "allow_patterns": ["*.parquet"]}
    assert asked == [("stanfordnlp/imdb", options)]
    for name in ("nowhere/a.csv", f"{imdb.parent}/nothing", "imdb.txt"):
        with pytest.raises(UserError, match="no such file or directory"):
            Dataset(name)
    assert len(asked) == 1

    def fail(name, **options):
        raise OSError("no network\nmore lines")

    monkeypatch.setattr(sources, "snapshot_download", fail)
    with pytest.raises(UserError, match="hub gave none: no network$"):
        Dataset("stanfordnlp/imdb")


def test_what_cannot_be_read_is_refused_with_one_line(tmp_path, monkeypatch):
    (tmp_path / "no.parquet").write_bytes(b"PAR1 but no table")
    cut = write(tmp_path / "cut.parquet", reviews("x", 500))
    cut.write_bytes(cut.read_bytes()[:-30])
    empty_cell = write(tmp_path / "empty.parquet", {"text": ["a", None], "label": [0, 1]})
    numbers = write(tmp_path / "numbers.parquet", {"text": [1, 2], "label": [0, 1]})
    for file, message in (
        (tmp_path / "no.parquet", "not a parquet file"),
        (cut, "not a parquet file"),
        (empty_cell, "empty.parquet, row 2: the column text is empty"),
        (numbers, "row 1: the column text holds 1, not a string"),
    ):
        with pytest.raises(UserError, match=message) as error:
            list(read_rows(file))
        assert "\n" not in str(error.value)
    for folder in ("one", "two"):
        write(tmp_path / "several" / folder / "train.parquet", reviews("x", 5))
    with pytest.raises(UserError, match="2 folders with parquet files; name one, .*several/one"):
        Dataset(str(tmp_path / "several"))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match="numbers.parquet: .* need pyarrow: pip install pyarrow"):
        list(read_rows(numbers))
