"""Files of rows: read as they are, by their content, and refused by the line."""

import gzip
import json
import os

import pyarrow
import pyarrow.parquet
import pytest
from pipeline import make_data, write_rows

from configurator import UserError
from data import format_query, load_rows
from hub.files import split_names
from hub.reader import has_split, read_split
from hub.tokenizer import Tokenizer

ROWS = [{"prompt": f"say {number}:", "completion": f" {number}"} for number in range(10)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return Tokenizer.load(make_data(tmp_path_factory.mktemp("reader")))


def rows_of(source, split="train"):
    return [row for _, row in read_split(str(source), split)]


def write(path, kind, rows):
    """The rows in a file of this kind, by other libraries than the reader's."""
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    if kind in ("jsonl", "ndjson", "json"):
        path.write_text(lines)
    elif kind == "array.json":
        path.write_text("\ufeff \n" + json.dumps(rows, indent=2))
    elif kind.endswith(".gz"):
        path.write_bytes(gzip.compress(lines.encode()))
    elif kind == "csv":
        import pandas

        pandas.DataFrame(rows).to_csv(path, index=False)
    elif kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


KINDS = ["jsonl", "ndjson", "json", "array.json", "jsonl.gz", "json.gz", "csv", "parquet"]


@pytest.mark.parametrize("kind", KINDS)
def test_rows_come_as_they_are_written(kind, tmp_path):
    odd = [{"prompt": 'a "quoted", line\nand one', "completion": ' "x"'}, {"prompt": "1.50", "completion": "null"}]
    rows = ROWS + odd
    assert rows_of(write(tmp_path / f"x.{kind}", kind, rows)) == rows


def test_a_byte_order_mark_and_empty_lines_are_no_rows(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b'{"prompt": "a"}\r\n\r\n  \n{"prompt": "b\xe2\x80\xa8c"}')
    assert rows_of(path) == [{"prompt": "a"}, {"prompt": "b\u2028c"}]
    assert [place for place, _ in read_split(str(path), "train")] == ["line 1", "line 4"]


def test_texts_that_look_like_other_values_stay_texts(tokenizer, tmp_path):
    """One row's completion is a chat: the column mixes texts with other values."""
    texts = ['"x"', "1.50", "null", "[1]", "true", " 007"]
    rows = [{"prompt": "a:", "completion": text} for text in texts]
    chat = [{"role": "assistant", "content": "yes"}]
    path = write_rows(tmp_path / "x.jsonl", [*rows, {"prompt": "a:", "completion": chat}])
    decoded = [tokenizer.decode(responses[0]) for responses in load_rows(path, "train", tokenizer, 1)["responses"]]
    assert decoded == [*texts, " yes"]


def test_columns_that_nobody_reads_may_hold_anything(tokenizer, tmp_path):
    extras = [{"id": 8}, {"id": 8.5}, {"id": None}, {"id": "2024-01-01"}, {"id": {"a": [1]}}, {"other": 1}]
    path = write_rows(tmp_path / "x.jsonl", [{**row, **extra} for row, extra in zip(ROWS, extras)])
    assert len(load_rows(path, "train", tokenizer, 1)) == len(extras)


def test_a_choice_with_gaps_in_its_column_is_still_a_choice(tokenizer, tmp_path):
    """pandas makes floats of integers with a gap."""
    info = {"subreddit": "pets", "title": "a", "post": "b"}
    texts = [{"text": " one", "policy": "a"}, {"text": " two", "policy": "b"}]
    rows = [{"info": info, "summaries": texts, "choice": 1.0}, {"info": info, "summaries": texts, "choice": None}]
    write(tmp_path / "x.parquet", "parquet", rows[:1])
    (row,) = load_rows(str(tmp_path / "x.parquet"), "train", tokenizer, 2)
    assert [tokenizer.decode(ids) for ids in row["responses"]] == [" two", " one"]
    write(tmp_path / "y.parquet", "parquet", rows)
    # The gap is a pair that nobody could compare: it is left out.
    rows = load_rows(str(tmp_path / "y.parquet"), "train", tokenizer, 2)
    assert rows["index"][:] == [0]
    assert [tokenizer.decode(ids) for ids in rows[0]["responses"]] == [" two", " one"]


def test_csv_has_a_header_and_cells(tokenizer, tmp_path):
    path = tmp_path / "x.csv"
    path.write_text("prompt,chosen,rejected,target\na:, b, c,0.7\na:, b, c,\n")
    assert [row.get("target") for row in rows_of(path)] == [0.7, None]
    assert load_rows(str(path), "train", tokenizer, 2)["target"] == [0.7, 1.0]
    for text, message in {
        "prompt,completion\na: b\n": "line 2 has another number of cells",
        "prompt,completion\na:, b, c\n": "line 2 has another number of cells",
        'prompt,completion\n"a:, b\n': "not a CSV file",
        "prompt,prompt\na,b\n": "the header has a name twice",
        "\nprompt,completion\na,b\n": "line 1 is no header",
        'prompt,completion\n"a\n\nb:",c\n"d\ne:"\n': "line 5 has another number of cells",
    }.items():
        path.write_text(text)
        with pytest.raises(UserError, match=f"x.csv: .*{message}"):
            rows_of(path)
    path.write_text("prompt,chosen,rejected,target\na:, b, c,often\n")
    with pytest.raises(UserError, match="x.csv .*line 2: target 'often' is no probability"):
        load_rows(str(path), "train", tokenizer, 2)
    path.write_text("prompt,completion,target\na:, b,often\n")
    assert len(load_rows(str(path), "train", tokenizer, 1)) == 1  # what is no pair has no such target


@pytest.mark.parametrize(("content", "message"), {
    b'{"prompt": "a"}\n{"prompt": ': "line 2 is not a JSON object",
    b'{"prompt": "a"}\n[1]\n': "line 2 holds a list, not a JSON object",
    b"\xff\xfe\x00": "line 1 is not a JSON object: UnicodeDecodeError: 'utf-8' codec",
}.items())  # fmt: skip
def test_a_wrong_line_is_named(content, message, tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"x.jsonl: {message}"):
        rows_of(path)
    gzipped = tmp_path / "x.jsonl.gz"
    gzipped.write_bytes(gzip.compress(content))
    with pytest.raises(UserError, match=f"x.jsonl.gz: {message}"):
        rows_of(gzipped)
    gzipped.write_bytes(gzip.compress(content * 1000)[:-20])
    with pytest.raises(UserError, match="x.jsonl.gz: "):
        rows_of(gzipped)


@pytest.mark.parametrize("name", ["x.txt", "x.JSONL", "x.gz", "x.jsonl.bz2", "x.parquet.gz", "x"])
@pytest.mark.parametrize("split", ["train", "train[:1]"])
def test_unknown_kinds_of_files_are_named(name, split, tmp_path):
    (tmp_path / name).write_bytes(b'{"prompt": "a"}\n')
    with pytest.raises(UserError, match=f"{name}: its kind is not known; use one of .jsonl, .jsonl.gz, "):
        list(read_split(str(tmp_path / name), split))


def test_a_pretty_printed_object_is_told_from_rows(tmp_path):
    path = tmp_path / "x.json"
    path.write_text(json.dumps({"prompt": "a"}, indent=2))
    with pytest.raises(UserError, match="x.json: neither an array of objects nor one a line: line 1 is not "):
        rows_of(path)


@pytest.mark.parametrize("split", ["train", "train[:2]"])
def test_a_value_that_python_cannot_hold_is_one_line(split, tmp_path):
    """Arrow's days reach further than Python's years."""
    import pyarrow
    import pyarrow.parquet

    days = pyarrow.array([0, 2**31 - 1], pyarrow.date32())
    table = pyarrow.table({"prompt": ["a", "b"], "day": days})
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
    with pytest.raises(UserError, match="x.parquet: holds a value that cannot be read: OverflowError"):
        list(read_split(str(tmp_path / "x.parquet"), split))


@pytest.mark.parametrize("kind", ["parquet", "json"])
def test_files_of_another_kind_are_refused(kind, tmp_path):
    path = tmp_path / f"x.{kind}"
    path.write_bytes(b"[1, 2]")
    with pytest.raises(UserError, match=f"x.{kind}: "):
        rows_of(path)


def test_splits_and_their_parts(tmp_path):
    write_rows(tmp_path / "x_train.jsonl", ROWS)
    write_rows(tmp_path / "x_validation.jsonl", ROWS[:4])
    source = tmp_path / "x_{split}.jsonl"
    assert rows_of(source, "validation") == ROWS[:4]
    assert rows_of(source, "train[:3]") == ROWS[:3]
    assert rows_of(source, "train[90%:]") == ROWS[9:]
    assert rows_of(source, "train[-2:]") == ROWS[8:]
    assert rows_of(source, "train+validation") == ROWS + ROWS[:4]
    assert rows_of(source, "train[:2]+validation[:1]") == ROWS[:2] + ROWS[:1]
    with pytest.raises(UserError, match=r"no such file: .*x_tset.jsonl; in .* lie: x_train.jsonl, x_validation.jsonl"):
        rows_of(source, "tset")
    with pytest.raises(UserError, match=r"'train\[a:' names no rows"):
        rows_of(source, "train[a:")


def test_a_file_without_split_in_its_name_is_all_for_training(tmp_path):
    path = write_rows(tmp_path / "x.jsonl", ROWS)
    assert rows_of(path, "train") == ROWS
    assert not has_split(path, "validation") and has_split(path, "train[90%:]")
    with pytest.raises(UserError, match=r"no \{split\} in its path, so all of its rows are 'train' and none 'tset'"):
        read_split(path, "tset[:4]")


def test_paths_may_hold_brackets_stars_and_a_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "run [1]*").mkdir()
    write_rows(tmp_path / "run [1]*" / "x.jsonl", ROWS)
    assert rows_of("~/run [1]*/x.jsonl") == ROWS
    write_rows(tmp_path / "part-0.jsonl", ROWS[:5])
    write_rows(tmp_path / "part-1.jsonl", ROWS[5:])
    assert rows_of("~/part-*.jsonl") == ROWS
    assert next(iter(read_split("~/part-*.jsonl", "train")))[0] == "part-0.jsonl line 1"


def test_directories_are_laid_out_as_on_the_hub(tmp_path):
    (tmp_path / "data").mkdir()
    write(tmp_path / "data" / "train-00000-of-00002.parquet", "parquet", ROWS[:5])
    write(tmp_path / "data" / "train-00001-of-00002.parquet", "parquet", ROWS[5:])
    write(tmp_path / "data" / "test-00000-of-00001.parquet", "parquet", ROWS[:1])
    assert rows_of(tmp_path) == ROWS
    assert rows_of(tmp_path, "train[4:6]+test") == [*ROWS[4:6], ROWS[0]]
    with pytest.raises(UserError, match="has no split 'validation', but train, test"):
        rows_of(tmp_path, "validation")


def test_directories_may_have_configurations(tmp_path):
    """Those that the README lists; without a list, folders."""
    for name, rows in {"easy": ROWS[:2], "hard": ROWS}.items():
        (tmp_path / name).mkdir()
        write_rows(tmp_path / name / "train.jsonl", rows)
    assert rows_of(f"{tmp_path}:easy") == ROWS[:2]
    listed = "- config_name: {0}\n  data_files: {0}/*.jsonl\n"
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{listed.format('easy')}{listed.format('hard')}---\n")
    assert rows_of(f"{tmp_path}:hard") == ROWS
    for config in ("", ":easier"):
        with pytest.raises(UserError, match=f"its configurations are easy, hard; name one of them: {tmp_path}:easy"):
            rows_of(f"{tmp_path}{config}")


def test_parquet_columns_of_json_are_decoded(tmp_path):
    """`datasets` has such columns where a text and a chat stand below each other, or turns with other keys."""
    chat = [{"role": "user", "content": '{"a": 1}'}, {"role": "assistant", "content": "1.50", "name": "x"}]
    texts = {
        "prompt": ['"a"', json.dumps(chat), None],
        "messages": [[json.dumps(turn) for turn in chat], None, []],
        "inner": [{"role": "user", "content": '"1"'}, None, {"role": "[1]", "content": "[1]"}],
    }
    json_type = pyarrow.json_()
    turn = pyarrow.struct({"role": pyarrow.string(), "content": json_type})
    kinds = {"prompt": json_type, "messages": pyarrow.list_(json_type), "inner": turn}
    table = pyarrow.table({name: pyarrow.array(values).cast(kinds[name]) for name, values in texts.items()})
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
    rows = rows_of(tmp_path / "x.parquet")
    assert [row["prompt"] for row in rows] == ["a", chat, None]
    assert [row["messages"] for row in rows] == [chat, None, []]
    assert rows[0]["inner"] == {"role": "user", "content": "1"}
    assert rows[2]["inner"] == {"role": "[1]", "content": [1]}


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet", "directory"])
def test_a_changed_file_of_the_same_name_size_and_time_is_read_anew(kind, tokenizer, tmp_path):
    """As `cp -p`, rsync or an archive leave it."""
    source = tmp_path / f"x.{kind}"
    for text in ("old", "new"):
        rows = [{"prompt": "a:", "completion": f" {text}"}]
        path = source
        if kind == "directory":
            source.mkdir(exist_ok=True)
            path = source / "train.jsonl"
        write(path, "jsonl" if kind == "directory" else kind, rows)
        os.utime(path, (1.6e9, 1.6e9))
        assert tokenizer.decode(load_rows(str(source), "train", tokenizer, 1)[0]["responses"][0]) == f" {text}"


def test_long_rows_are_dropped_or_cut_and_counted(tokenizer, tmp_path, capsys):
    words = [3, 60, 5, 200]
    rows = [{"prompt": "a b:", "completion": " c" * n} for n in words]
    rows.append({"prompt": "a " * 90, "completion": " c"})  # no room for an answer
    path = write_rows(tmp_path / "x.jsonl", rows)
    whole = load_rows(path, "train", tokenizer, 1)
    n_query = len(whole[0]["query"])

    kept = load_rows(path, "train", tokenizer, 1, max_length=40, too_long="drop")
    assert kept["index"] == [0, 2] and kept["place"] == ["line 1", "line 3"]
    assert "line 2 has" in (said := capsys.readouterr().out) and "3 such rows of 5): 3 dropped" in said

    cut = load_rows(path, "train", tokenizer, 1, max_length=40, too_long="cut")
    assert cut["index"] == [0, 1, 2, 3]
    for row, before in zip(cut, whole):
        room = min(len(before["responses"][0]), 40 - n_query)
        assert row["responses"][0] == [*before["responses"][0][: room - 1], tokenizer.eos_id]
        assert row["length"] == n_query + room
    assert "1 dropped, the others cut" in capsys.readouterr().out


def test_an_end_that_is_spelled_out_is_the_end(tokenizer, tmp_path):
    """A completion that ends in the text of EOS has one EOS; elsewhere that text is a text."""
    texts = [" yes", " yes<|endoftext|>", " yes<|endoftext|>\n", " a <|endoftext|> b"]
    path = write_rows(tmp_path / "x.jsonl", [{"prompt": "a:", "completion": text} for text in texts])
    responses = [responses[0] for responses in load_rows(path, "train", tokenizer, 1)["responses"]]
    assert responses[:3] == [[*tokenizer.encode(" yes"), tokenizer.eos_id]] * 3
    assert responses[3] == [*tokenizer.encode(texts[3]), tokenizer.eos_id]
    assert tokenizer.eos_id not in responses[3][:-1]


def one_character_at_a_time(row, tokenizer, max_tokens):
    """Detail 2.2 as the reference does it."""
    text = row["post"]
    while True:
        ids = tokenizer.encode(f"SUBREDDIT: r/{row['subreddit']}\n\nTITLE: {row['title']}\n\nPOST: {text}\n\nTL;DR:")
        if len(ids) <= max_tokens:
            return ids
        newline = text.rfind("\n")
        text = text[:newline] if newline >= 0 else text[:-1]


POSTS = {
    "Chinese": "今天天气很好，我们去公园散步。" * 8,
    "Thai": "เมื่อวานสุนัขของเพื่อนบ้านวิ่งหนีออกจากบ้าน" * 4,
    "base64": "aGVsbG8gd29ybGQx" * 10,
    "marks that NFC joins": "cafe\u0301e\u0301 " * 30,
    "contractions": "don't'll'sx'd " * 20,
    "paragraphs": "one two three\nfour-five!!six\n" * 12,
    "a character without a name": "ab\u0378cd." * 20,
}


@pytest.mark.parametrize("name", POSTS)
def test_a_post_is_cut_as_by_the_one_character_loop(name, real_tokenizer):
    tokenizer = Tokenizer.load(str(real_tokenizer))
    row = {"subreddit": "pets", "title": "a", "post": POSTS[name]}
    for max_tokens in range(27, 60):
        assert format_query(row, tokenizer, max_tokens) == one_character_at_a_time(row, tokenizer, max_tokens)


def test_names_with_commas_that_are_on_the_disk_are_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "lr=1,seed=1").mkdir()
    (tmp_path / "lr=1,seed=2").mkdir()
    assert split_names("a,b") == ["a", "b"]
    assert split_names("lr=1,seed=1,lr=1,seed=2") == ["lr=1,seed=1", "lr=1,seed=2"]
    assert split_names("x,~/lr=1,seed=1,y") == ["x", "~/lr=1,seed=1", "y"]
