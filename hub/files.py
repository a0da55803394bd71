"""Files that a run reads and writes: JSON, JSON lines, and directories that appear whole or not at all."""

import json
import os
import shutil
from pathlib import Path

from configurator import explain, require

UNREADABLE = (OSError, ValueError, RecursionError)


def read_json(path):
    """Read a JSON object; raises UserError if `path` is missing or holds something else."""
    require(os.path.exists(path), f"{path}: is not there; {what_lies_at(path)}")
    with explain(f"{path}: cannot be read as JSON; check it or copy it again", *UNREADABLE):
        values = json.loads(Path(path).read_bytes())
    kind = type(values).__name__
    require(kind == "dict", f"{path}: holds a {kind}, not a JSON object; copy it again")
    return values


def write_json(path, values):
    """Write a JSON object; a process that is killed meanwhile leaves the old file, whole."""
    temporary = Path(f"{path}.tmp")
    temporary.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    temporary.replace(path)


def read_jsonl(path):
    """The objects of a JSON lines file; raises UserError that names the file, and the line if one is wrong."""
    rows = []
    with explain(f"{path}: cannot be read", *UNREADABLE), open(expand(path), encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            place = f"{path}: line {number}"
            row = parse_object(line, place)
            # Half a pair of surrogates is valid JSON, but no text that can be written again.
            with explain(f"{place} is not a JSON object", *UNREADABLE):
                json.dumps(row, ensure_ascii=False).encode()
            rows.append(row)
    return rows


def parse_object(text, place):
    """The JSON object that a text, or its UTF-8, holds; raises UserError that names its `place` if there is none."""
    with explain(f"{place} is not a JSON object", *UNREADABLE):
        if isinstance(text, bytes):
            text = text.decode("utf-8-sig")
        row = json.loads(text)
    kind = type(row).__name__
    require(kind == "dict", f"{place} holds a {kind}, not a JSON object")
    return row


def write_jsonl(path, rows, mode="w"):
    """Write one JSON object a line; mode "a" appends."""
    with open(path, mode, encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def expand(path):
    """`path` with ~ as the home directory, which the shell leaves in --key=~/path."""
    return os.path.expanduser(path)


def what_lies_at(path):
    """For messages about a path that is not there, or is not what it should be: the nearest directory's contents."""
    directory = Path(path)
    while not os.path.isdir(directory):
        directory = directory.parent
    names = sorted(entry.name for entry in directory.iterdir())
    shown = ", ".join(names[:8]) or "nothing"
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    meant = f"; give {directory}/final" if "final" in names else ""
    return f"in {directory} lie: {shown}{more}{meant}"


def split_names(text):
    """The names in "a,b,c". A path may hold commas itself: what is there on the disk is one name."""
    pieces = text.split(",")
    names = []
    while pieces:
        n_pieces = len(pieces)
        while n_pieces > 1 and not os.path.exists(expand(",".join(pieces[:n_pieces]))):
            n_pieces -= 1
        names.append(",".join(pieces[:n_pieces]))
        pieces = pieces[n_pieces:]
    return names


def move(temporary, final):
    """Give a directory its final name once all of it is on the disk; another of that name is replaced."""
    os.sync()
    shutil.rmtree(final, ignore_errors=True)
    temporary.rename(final)
    os.sync()
