"""The rows of a split as its files hold them: nothing is guessed, cast, or remembered by a file's name.

A source is one of

    mine_{split}.jsonl      files, one a split: .jsonl, .ndjson, .json, .csv (with a header), each also as .gz; .parquet
    mine.jsonl              such a file with no split in its name: all of its rows are `train`
    a/directory             of such files, in the hub's layout
    name/of-a-set           a data set of the hub; name:config@revision for one of its configurations or versions

and a split is train, train[:100], train[90%:], train+validation, or several such parts joined by +.
"""

import csv
import glob
import gzip
import hashlib
import io
import itertools
import json
import os
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from configurator import UserError, explain, require
from hub.files import UNREADABLE, expand, parse_object, what_lies_at

CSV_CELL = 2**30  # characters of the longest cell; the csv module would stop at 131,072


@dataclass
class Split:
    """The rows of a split: iterating gives pairs (place, row), for example ("line 3", {"prompt": ...})."""

    name: str
    fingerprint: str  # another one if the rows are others
    read: Callable  # () -> iterator

    def __iter__(self):
        return self.read()


def read_split(source, split):
    """Find the rows of a split; they are read when they are asked for. Raises UserError if there are none to find."""
    with explain(f"{source} [{split}]", UserError):
        if is_on_disk(source):
            return from_disk(source, split)
        return from_hub(source, split)


def is_on_disk(source):
    """Whether a source is a file or a directory, there or not."""
    return kind_of(source) in READERS or os.path.exists(expand(source)) or source.startswith(("~", "/", "."))


def has_split(source, split):
    """Whether rows can be held out for `split`: a file with no {split} in its path holds `train` alone."""
    return kind_of(source) not in READERS or "{split}" in source or split_name(split) == "train"


def kind_of(path):
    """The file's suffix, without .gz."""
    return Path(path.removesuffix(".gz")).suffix


def split_name(part):
    """train of train[:100]"""
    return part.split("[")[0].strip()


# ---------------------------------------------------------------------------- on the disk


def from_disk(source, split):
    parts = []
    digest = hashlib.sha256()
    for part in split.split("+"):
        paths = find_files(source, split_name(part))
        start, end = bounds_of(part, paths)
        parts.append((paths, start, end))
        for path in paths:
            with explain("cannot be read", OSError), open(path, "rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        digest.update(repr((start, end)).encode())

    several = sum(len(paths) for paths, _, _ in parts) > 1

    def read():
        for paths, start, end in parts:
            yield from itertools.islice(read_files(paths, several), start, end)

    return Split(f"{source} [{split}]", digest.hexdigest(), read)


def find_files(source, name):
    """The paths of a split's files."""
    path = expand(source.replace("{split}", name))
    if os.path.isdir(path) and kind_of(path) not in READERS:
        return files_of_directory(path, name)
    alone = f"there is no {{split}} in its path, so all of its rows are 'train' and none {name!r}"
    require(has_split(source, name), f"{alone}; use train, or train[:90%] and train[90%:]")
    # A path may hold [ and *, too.
    paths = [path] if os.path.exists(path) else sorted(glob.glob(path))
    require(paths, f"no such file: {path}; {what_lies_at(path)}")
    return paths


def files_of_directory(path, name):
    """By the rules of the `datasets` library: the names of files and folders, or the README's list, say what is in a
    split.
    """
    import datasets  # here, since it takes a second and a notebook may only want the tokenizer

    with explain(f"{path}: is not laid out as a data set; {what_lies_at(path)}", Exception):
        files = datasets.load_dataset_builder(path).config.data_files
    found = ", ".join(map(str, files))
    require(name in files, f"{path}: has no split {name!r}, but {found}; use one of these")
    for file in files[name]:
        known = ", ".join(READERS)
        require(kind_of(file) in READERS, f"{file}: its kind is not known; use one of {known}")
    return list(files[name])


def bounds_of(part, paths):
    """The rows start .. end - 1 that "train[:100]" names; end is None for all."""
    if "[" not in part:
        return 0, None
    import datasets

    n_rows = sum(1 for _ in read_files(paths))
    with explain(f"{part!r} names no rows; write for example train[:100] or train[90%:]", Exception):
        instruction = datasets.ReadInstruction.from_spec(part.strip())
        (absolute,) = instruction.to_absolute({split_name(part): n_rows})
    return absolute.from_, absolute.to


def read_files(paths, name_them=False):
    """The rows of these files, one after the other."""
    for path in paths:
        where = f"{os.path.basename(path)} " if name_them else ""
        reader = READERS[kind_of(path)]
        with explain(path, UserError), explain("cannot be read", *UNREADABLE, EOFError, zlib.error):
            for place, row in reader(path):
                yield f"{where}{place}", row


def open_bytes(path):
    if path.endswith(".gz"):
        return gzip.open(path)
    return open(path, "rb")


def read_lines(path):
    """One JSON object a line."""
    with open_bytes(path) as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield f"line {number}", parse_object(line, f"line {number}")


def read_array(path):
    """One JSON array of objects; or, since such files are named .json as well, one object a line."""
    with open_bytes(path) as file:
        start = file.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n")  # a byte order mark and blanks may stand before it
    if not start.startswith(b"["):
        yield from read_lines(path)
        return
    with open_bytes(path) as file:
        rows = json.load(file)
    for number, row in enumerate(rows):
        require(isinstance(row, dict), f"row {number} is {row!r:.40}, not a JSON object")
        yield f"row {number}", row


def read_csv(path):
    """A header, and rows of texts; an empty cell is no value."""
    csv.field_size_limit(CSV_CELL)
    with open_bytes(path) as file, io.TextIOWrapper(file, "utf-8-sig", newline="") as text:
        table = csv.DictReader(text, strict=True)
        with explain("not a CSV file", csv.Error):
            for row in table:
                place = f"line {table.line_num}"
                n_cells = len(row) + len(row.pop(None, []))
                fits = n_cells == len(table.fieldnames) and None not in row.values()
                require(fits, f"{place} has another number of cells than the header")
                row = {column: cell for column, cell in row.items() if cell}
                if "target" in row:
                    with explain(place, ValueError):
                        row["target"] = float(row["target"])
                yield place, row


def read_parquet(path):
    import pyarrow.parquet

    number = 0
    with explain("not a parquet file", pyarrow.ArrowException):
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=1000):
            for row in batch.to_pylist():
                yield f"row {number}", row
                number += 1


READERS = {
    ".jsonl": read_lines,
    ".ndjson": read_lines,
    ".json": read_array,
    ".csv": read_csv,
    ".parquet": read_parquet,
}


# ---------------------------------------------------------------------------- the hub


def from_hub(source, split):
    """A data set of the hub, which the `datasets` library fetches and keeps by its version."""
    import datasets

    datasets.disable_progress_bars()
    name, _, revision = source.partition("@")
    name, _, config = name.partition(":")
    missing = "no file or directory, nor to be had from the hub"
    with explain(missing, Exception):
        rows = datasets.load_dataset(name, config or None, split=split, revision=revision or None)
    # In such a column the library decodes each text that happens to be JSON: "1.50" would become a number.
    mixed = [column for column, kind in rows.features.items() if isinstance(kind, datasets.Json)]
    require(not mixed, f"the columns {mixed} mix texts with other values; download the file, and give its path")

    def read():
        for number, row in enumerate(rows):
            yield f"row {number}", row

    return Split(f"{source} [{split}]", rows._fingerprint, read)
