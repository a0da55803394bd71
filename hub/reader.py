"""The rows of a split as its files hold them: nothing is guessed, cast, or remembered by a file's name.

A source is one of

    mine_{split}.jsonl      files, one a split: .jsonl, .ndjson, .json, .csv (with a header), each also as .gz; .parquet
    mine.jsonl              such a file with no split in its name: all of its rows are `train`
    a/directory             of such files, in the hub's layout
    name/of-a-set           a data set of the hub; name/of-a-set:config for one of its configurations (or folders), and
                            name/of-a-set@revision or name/of-a-set:config@revision for a version

and a split is train, train[:100], train[90%:], train+validation, or several such parts joined by +.
"""

import contextlib
import csv
import glob
import gzip
import hashlib
import io
import itertools
import json
import os
import shutil
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, hf_hub_download

from configurator import UserError, explain, require
from hub.fetch import explain_hub, fetch
from hub.files import UNREADABLE, expand, parse_object, what_lies_at

CARDS = ["README.md", ".huggingface.yaml"]  # say what the configurations of a data set are
CONVERTED = "refs/convert/parquet"  # where the hub keeps a copy of each public data set, a folder a configuration
JSON = "extension<arrow.json>"  # in the names of Arrow types
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
        find = find_files if is_on_disk(source) else find_on_hub
        return find_split(source, split, find)


def is_on_disk(source):
    """Whether a source is a file or a directory, there or not."""
    is_there = os.path.exists(expand(source)) or os.path.isdir(expand(source.split(":")[0]))
    return is_there or kind_of(source) in READERS or source.startswith(("~", "/", "."))


def has_split(source, split):
    """Whether rows can be held out for `split`: a file with no {split} in its path holds `train` alone."""
    return kind_of(source) not in READERS or "{split}" in source or split_name(split) == "train"


def kind_of(path):
    """The file's suffix, with .gz behind it if that is there."""
    packed = ".gz" if path.endswith(".gz") else ""
    return Path(path.removesuffix(packed)).suffix + packed


def split_name(part):
    """train of train[:100]"""
    return part.split("[")[0].strip()


def find_split(source, split, find):
    """find: (source, the name of a split) -> the paths of its files, on this machine."""
    parts = []
    digest = hashlib.sha256()
    for part in split.split("+"):
        paths = find(source, split_name(part))
        for path in paths:
            known = ", ".join(READERS)
            require(kind_of(path) in READERS, f"{path}: its kind is not known; use one of {known}")
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


# ---------------------------------------------------------------------------- on the disk


def find_files(source, name):
    """The paths of a split's files."""
    path = expand(source.replace("{split}", name))
    directory, _, config = path.partition(":")
    if os.path.isdir(path):
        directory = path
        config = ""
    if os.path.isdir(directory):
        return files_of_directory(directory, name, config, f"{directory}:{{}}")
    alone = f"there is no {{split}} in its path, so all of its rows are 'train' and none {name!r}"
    require(has_split(source, name), f"{alone}; use train, or train[:90%] and train[90%:]")
    # A path may hold [ and *, too.
    paths = [path] if os.path.exists(path) else sorted(glob.glob(path))
    require(paths, f"no such file: {path}; {what_lies_at(path)}")
    return paths


def files_of_directory(path, name, config, called):
    """By the rules of the `datasets` library: the names of files and folders, or the README's list, say what is in a
    split. config: one of the README's configurations, or a folder if it has none.
    called: what a user writes for the configuration {}.
    """
    import datasets  # here, since it takes a second and a notebook may only want the tokenizer

    with explain(f"is not laid out as a data set; {what_lies_at(path)}", Exception):
        configs = datasets.get_dataset_config_names(path)
        default = datasets.get_dataset_default_config_name(path)
    folder = os.path.join(path, config)
    if configs == ["default"] and config not in configs and os.path.isdir(folder):
        return files_of_directory(folder, name, "default", called)
    config = config or default
    require(config in configs, name_one(configs, called))

    with explain(f"is not laid out as a data set; {what_lies_at(path)}", Exception):
        files = datasets.load_dataset_builder(path, config).config.data_files
    found = ", ".join(map(str, files))
    parts = "use one of these, or a part such as train[90%:]"
    require(name in files, f"has no split {name!r}, but {found}; {parts}")
    return list(files[name])


def name_one(configs, called):
    return f"its configurations are {', '.join(configs)}; name one of them: {called.format(configs[0])}"


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
        with explain("neither an array of objects nor one a line", UserError):
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
            names = table.fieldnames or []
            require(names, "line 1 is no header; name the columns there")
            require(len(set(names)) == len(names), "the header has a name twice; rename that column")
            for row in table:
                n_cells = len(row) + len(row.pop(None, []))
                fits = n_cells == len(names) and None not in row.values()
                # A cell may have several lines, and the last has been read.
                n_further = sum(cell.count("\n") for cell in row.values() if cell)
                place = f"line {table.line_num - n_further}"
                require(fits, f"{place} has another number of cells than the header")
                row = {column: cell for column, cell in row.items() if cell}
                # What is no number stays a text: it may be about something else than pairs.
                with contextlib.suppress(ValueError, KeyError):
                    row["target"] = float(row["target"])
                yield place, row


def read_parquet(path):
    import pyarrow.parquet

    number = 0
    with explain("not a parquet file", pyarrow.ArrowException):
        file = pyarrow.parquet.ParquetFile(path)
    mixed = [field for field in file.schema_arrow if JSON in str(field.type)]
    # Not every date or list of Arrow's is one of Python's.
    wrong_values = (pyarrow.ArrowException, OverflowError, TypeError, ValueError)
    with explain("holds a value that cannot be read", *wrong_values):
        for batch in file.iter_batches(batch_size=1000):
            for row in batch.to_pylist():
                for field in mixed:
                    row[field.name] = decode_json(row[field.name], field.type)
                yield f"row {number}", row
                number += 1


def decode_json(value, kind):
    """A value of an Arrow type: where the rows' own types differ, `datasets` has put them into texts of JSON."""
    if value is None or JSON not in str(kind):
        return value
    if hasattr(kind, "value_type"):
        return [decode_json(item, kind.value_type) for item in value]
    if hasattr(kind, "fields"):
        return {field.name: decode_json(value[field.name], field.type) for field in kind}
    return json.loads(value)


READERS = {
    ".jsonl": read_lines,
    ".jsonl.gz": read_lines,
    ".ndjson": read_lines,
    ".ndjson.gz": read_lines,
    ".json": read_array,
    ".json.gz": read_array,
    ".csv": read_csv,
    ".csv.gz": read_csv,
    ".parquet": read_parquet,
}


# ---------------------------------------------------------------------------- the hub


def find_on_hub(source, name):
    """The paths of a split's files, fetched into the cache of the hub's library."""
    repository, at, revision = source.partition("@")
    repository, _, config = repository.partition(":")
    called = f"{repository}:{{}}{at}{revision}"
    with explain("no file or directory of that name", UserError):
        cards = fetch(repository, revision or "main", CARDS, kind="dataset")
    with explain_hub(repository, revision, "dataset"):
        layout = layout_of(repository, cards)

    script = f"{repository.split('/')[-1]}.py"
    converted = f"try the hub's copy, {repository}:CONFIGURATION@{CONVERTED}"
    require(not (layout / script).exists(), f"its rows are made by {script}, which is not run here; {converted}")
    if revision == CONVERTED:
        folders = sorted(path.name for path in layout.iterdir() if path.is_dir())
        if not config and len(folders) == 1:
            config = folders[0]
        require(config in folders, name_one(folders, called))

    paths = []
    for file in files_of_directory(str(layout), name, config, called):
        file = os.path.relpath(file, layout)
        with explain_hub(repository, revision, "dataset"):
            paths.append(hf_hub_download(repository, file, repo_type="dataset", revision=layout.name))
    return paths


def layout_of(repository, cards):
    """A directory of files that have the names of those of a commit, but hold nothing: only its cards are whole.

    By these the `datasets` library says what is in a split, before that is fetched, and without a network. (Its own
    load_dataset then gives the rows of whichever revision it fetched last: huggingface/datasets#7928.)
    """
    import datasets

    commit = os.path.basename(cards)
    layout = Path(os.path.realpath(datasets.config.HF_DATASETS_CACHE), "nplus", repository, commit)
    if not layout.exists():
        temporary = Path(f"{layout}.{os.getpid()}")
        for file in HfApi().list_repo_files(repository, repo_type="dataset", revision=commit):
            path = Path(f"{temporary}{os.path.normpath('/' + file)}")  # no name may lead out of the directory
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("{}")  # valid where the library reads JSON
            if file in CARDS:
                shutil.copy(os.path.join(cards, file), path)
        # Another process may have been first.
        with contextlib.suppress(OSError):
            temporary.rename(layout)
    return layout
