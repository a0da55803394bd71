"""Tokenised rows: a row of any schema becomes a query and its responses, and a split a table on the disk."""

import functools
import hashlib
import os
from pathlib import Path

import numpy as np
from tqdm import tqdm

import hub.queries
import hub.reader
import hub.rows
import hub.tokenizer
from configurator import UserError, explain, require
from hub.queries import MAX_ARTICLE_TOKENS, format_query
from hub.reader import read_split
from hub.rows import from_comparison, is_incomparable, schema_of

WRONG_VALUES = (LookupError, TypeError, ValueError, AttributeError, OverflowError)


def parse_row(row, tokenizer, max_query_tokens):
    """One row of any schema -> query ids, responses (the best first, each ends with EOS), and where it came from.

    target: the probability that the first of two responses is the better one; NaN if nobody could compare them.
    """
    schema = schema_of(row)
    prompt, texts = schema(row)
    # The better response comes first.
    target = target_of(row) if len(texts) == 2 else 1.0
    if target < 0.5:
        texts = texts[::-1]
    if isinstance(prompt, str):
        query = tokenizer.encode(prompt)
    else:
        # An article may be as long as the reference lets it.
        if prompt.get("post") is None:
            max_query_tokens = max(max_query_tokens, MAX_ARTICLE_TOKENS)
        query = format_query(prompt, tokenizer, max_query_tokens)

    labels = {"confidence": 0, "policies": ""}
    if schema is from_comparison:
        labels = labels_of(row)
    return {
        "query": query,
        "responses": [encode_response(text, tokenizer) for text in texts],
        "target": max(target, 1 - target),
        "batch": str(row.get("batch") or ""),
        **labels,
    }


def target_of(row):
    """The probability that a pair's first response is the better one; NaN if nobody could compare the two."""
    if is_incomparable(row):
        return np.nan
    target = row.get("target")
    if target is None:
        return 1.0
    if not isinstance(target, (int, float)) or not 0 <= target <= 1:
        raise UserError(f"target {target!r:.80} is no probability; correct it")
    return float(target)


def labels_of(row):
    """How sure the labeller of a comparison was, and whose summaries they are."""
    extra = row.get("extra") or {}
    require(isinstance(extra, dict), f"extra {extra!r:.80} is no object; correct or drop it")
    confidence = extra.get("confidence") or 0
    known = isinstance(confidence, (int, float)) and abs(confidence) < 100
    require(known, f"confidence {confidence!r:.80} is no number from 1 to 9; correct or drop it")
    policies = sorted(str(summary.get("policy") or "?") for summary in row["summaries"])
    return {"confidence": int(confidence), "policies": " / ".join(policies)}


def encode_response(text, tokenizer):
    """Token ids of a response, with EOS; those that the text itself spells out at its end are that EOS."""
    while text.rstrip().endswith(tokenizer.eos_token):
        text = text.rstrip().removesuffix(tokenizer.eos_token)
    return tokenizer.encode(text) + [tokenizer.eos_id]


def load_rows(source, split, tokenizer, n_responses=0, max_length=0, max_query_tokens=512, ranked=False,
              too_long="stop"):  # fmt: skip
    """Tokenise a split once (the result is kept in the cache of `datasets`): columns query, responses, ...

    source: see hub/reader.py. `index` is a row's number in it, and `place` where it stands there.
    n_responses: how many responses of each row are needed and kept, the best first (PPO 0, SFT 1, preferences 2).
    ranked: keep all responses of a row that has more.
    max_length: the longest query + response allowed, 0 for any.
    too_long: what to do with a longer row: "stop" (an error), "drop", or "cut" its responses, which keep their EOS.
    Judged pairs whose choice is null, which nobody could compare, are left out; how many is printed.
    Raises UserError for missing files, columns or rows, naming them.
    """
    raw = read_split(source, split)

    def tokenise(row):
        # Where responses are not needed, a summary that is no text is no error.
        if not n_responses and not isinstance(row.get("summary"), str):
            row = {key: value for key, value in row.items() if key != "summary"}
        parsed = parse_row(row, tokenizer, max_query_tokens)
        query = parsed["query"]
        responses = parsed["responses"]
        if not ranked:
            responses = responses[:n_responses]
        if not query or len(responses) < n_responses:
            found = f"{len(query)} query tokens and {len(responses)} responses"
            columns = ", ".join(row)
            needed = f"but a query and {n_responses} are needed; correct or drop the row"
            raise UserError(f"{found} come of the columns {columns:.200}, {needed}")
        length = len(query) + max(map(len, responses), default=0)
        return {**parsed, "responses": responses, "length": length}

    def tokenise_all():
        bar = tqdm(raw, desc=f"tokenising {raw.name}", unit=" rows", delay=2, mininterval=1)
        for index, (place, row) in enumerate(bar):
            # A row may hold anything: whatever goes wrong with it is told by its place.
            where = f"{raw.name}: {place}"
            with explain(where, UserError, *WRONG_VALUES):
                parsed = tokenise(row)
            yield {**parsed, "index": index, "place": place}

    # The code is part of the cache's key: a changed format must not read old rows.
    modules = (hub.queries, hub.reader, hub.rows, hub.tokenizer)
    sources = [__file__, tokenizer.path, *(module.__file__ for module in modules)]
    contents = [Path(path).read_bytes() for path in sources]
    key = repr((raw.fingerprint, tokenizer.eos_id, max_query_tokens, n_responses, ranked, contents))
    key = hashlib.sha256(key.encode()).hexdigest()[:32]
    with explain(f"{raw.name}: its values cannot be kept in columns", ValueError, OverflowError):
        rows = load_table(key, tokenise_all())
    require(len(rows), f"{raw.name}: no rows; give a split that has some")
    is_null = np.isnan(np.asarray(rows["target"]))
    if is_null.any():
        found = f"{is_null.sum()} of {len(rows)} rows have choice null: left out"
        rows = leave_out(raw.name, rows, is_null, found)
    if max_length:
        rows = handle_long_rows(raw.name, rows, max_length, too_long)
    return rows


def handle_long_rows(name, rows, max_length, too_long):
    """Refuse, drop or cut rows of more than max_length tokens, and say how many they are."""
    lengths = np.asarray(rows["length"])
    is_long = lengths > max_length
    if not is_long.any():
        return rows

    first = int(is_long.argmax())
    found = f"{rows[first]['place']} has {lengths[first]} tokens, more than {max_length}"
    count = f"{is_long.sum()} such rows of {len(rows)}"
    mend = "give --too_long=drop or cut, or change max_length or response_length within the model's positions"
    require(too_long != "stop", f"{name}: {found} ({count}); {mend}")

    if too_long == "cut":
        rows = rows.map(functools.partial(cut_row, max_length=max_length))
        is_long = np.asarray(rows["length"]) > max_length
    others = ", the others cut" if too_long == "cut" else ""
    return leave_out(name, rows, is_long, f"{found} ({count}): {is_long.sum()} dropped{others}")


def leave_out(name, rows, is_out, found):
    """The rows that are not `is_out` (n,); says what was `found`."""
    require(not is_out.all(), f"{name}: no row is left; {found}")
    if os.environ.get("RANK", "0") == "0":
        print(f"{name}: {found}", flush=True)
    return rows.select(np.flatnonzero(~is_out))


def cut_row(row, max_length):
    """Cut the responses of a row to max_length, but for EOS; a query that leaves no room for them stays too long."""
    room = max_length - len(row["query"])
    if room < 2:
        return row
    responses = []
    for ids in row["responses"]:
        if len(ids) > room:
            ids = ids[: room - 1] + ids[-1:]
        responses.append(ids)
    length = len(row["query"]) + max(map(len, responses), default=0)
    return {**row, "responses": responses, "length": length}


# ---------------------------------------------------------------------------- the cache


def load_table(key, rows):
    """The `datasets.Dataset` of this key. rows: an iterable of dicts, asked for only if there is none yet.

    key: a text that changes with all that decides what the rows are.
    """
    import datasets  # here, since it takes a second

    directory = Path(datasets.config.HF_DATASETS_CACHE) / "nplus"
    path = directory / f"{key}.arrow"
    if not path.exists():
        directory.mkdir(parents=True, exist_ok=True)
        temporary = directory / f"{key}.{os.getpid()}.tmp"
        try:
            write_table(temporary, rows)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    table = datasets.table.MemoryMappedTable.from_file(str(path))
    return datasets.Dataset(table, fingerprint=key)


def write_table(path, rows):
    from datasets import Features, List, Value
    from datasets.arrow_writer import ArrowWriter

    ids = List(Value("int32"))
    texts = dict.fromkeys(("batch", "policies", "place"), Value("string"))
    numbers = dict.fromkeys(("length", "confidence", "index"), Value("int64"))
    columns = {"query": ids, "responses": List(ids), "target": Value("float64")}
    features = Features({**columns, **texts, **numbers})
    writer = ArrowWriter(features=features, path=str(path))
    for row in rows:
        writer.write(row)
    writer.finalize()
