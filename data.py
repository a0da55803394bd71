"""From rows to batches: the query format, tokenised data sets, and which rows make up which step.

    tokenizer = Tokenizer.load("EleutherAI/pythia-160m")
    rows = load_rows("vwxyzjn/summarize_from_feedback_tldr_3_filtered", "train", tokenizer, n_responses=1)
    rows[0]["query"], rows[0]["responses"]         # token ids; each response ends with EOS

A row of any known schema (hub/rows.py) becomes one query and its responses, the best first. A preference may carry
`target`, the probability that its first response is the better one (0.5 is a tie); below 0.5 the responses are taken in
reverse.
"""

import bisect
import functools
import hashlib
import re
from pathlib import Path

import numpy as np
import torch

import hub.rows
import hub.tokenizer
from configurator import UserError, explain, require
from hub.rows import read_split, schema_of, text_of
from hub.tokenizer import Tokenizer  # noqa: F401 (notebooks and stages take it from here)

MAX_ARTICLE_TOKENS = 1919  # 2047 - 128: what the reference leaves for a CNN/DM article


# ---------------------------------------------------------------------------- queries


def format_query(row, tokenizer, max_tokens=512):
    """Token ids of a TL;DR (or CNN/DM) query of at most max_tokens tokens; arXiv:2403.17031 details 2.1 to 2.3.

    row: dict with subreddit, title and post, or with article. A text too long loses its last paragraph (from
    the last newline on) again and again; with none left, its last character. So "TL;DR:" always survives.
    Raises UserError if the query is too long even without its text.
    """
    if row.get("post") is not None:
        subreddit = text_of(row, "subreddit")
        title = text_of(row, "title")
        head = f"SUBREDDIT: r/{subreddit}\n\nTITLE: {title}\n\nPOST: "
        text = text_of(row, "post")
        tail = "\n\nTL;DR:"
    else:
        head = "Article:\n"
        text = text_of(row, "article")
        tail = "\n\nTL;DR:\n"
    ids = tokenizer.encode(head + text + tail)
    if len(ids) <= max_tokens:
        return ids

    too_long = first_length_too_long(head, text, tokenizer, max_tokens)
    end = len(text)
    while len(ids) > max_tokens:
        rest = len(ids)
        require(end > 0, f"the query has {rest} tokens without its text, more than {max_tokens}; drop the row")
        newline = text.rfind("\n", 0, end)
        end = newline if newline >= 0 else end - 1
        # A cut that is known to be too long need not be tokenised: `ids` stay those of a longer one, too long as well.
        if end < too_long:
            ids = tokenizer.encode(head + text[:end] + tail)
    return ids


def first_length_too_long(head, text, tokenizer, max_tokens):
    """A length such that `text` cut there, or after it, has too many tokens.

    Where whitespace follows a word, the tokens before it do not depend on what comes after. So the first end of a word
    with too many tokens before it rules out all longer cuts. The count rises from word to word: bisection finds it.
    """

    def n_tokens(end):
        return len(tokenizer.encode(head + text[:end]))

    ends_of_words = [match.end() for match in re.finditer(r"\S(?=\s)", text)]
    first = bisect.bisect_right(ends_of_words, max_tokens, key=n_tokens)
    if first == len(ends_of_words):
        return len(text)
    return ends_of_words[first]


# ---------------------------------------------------------------------------- rows


def parse_row(row, tokenizer, max_query_tokens):
    """One row of any schema -> query ids, responses (the best first, each ends with EOS), and where it came from."""
    target = row.get("target")
    if target is None:
        target = 1.0
    if not isinstance(target, (int, float)) or not 0 <= target <= 1:
        raise UserError(f"target {target!r} is no probability; correct it")

    prompt, texts = schema_of(row)(row)
    # The better response comes first.
    if target < 0.5:
        texts = texts[::-1]
    if isinstance(prompt, str):
        query = tokenizer.encode(prompt)
    else:
        # An article may be as long as the reference lets it.
        if prompt.get("post") is None:
            max_query_tokens = max(max_query_tokens, MAX_ARTICLE_TOKENS)
        query = format_query(prompt, tokenizer, max_query_tokens)

    extra = row.get("extra") or {}
    summaries = row.get("summaries") or []
    policies = sorted(str(summary.get("policy") or "?") for summary in summaries)
    return {
        "query": query,
        "responses": [tokenizer.encode(text) + [tokenizer.eos_id] for text in texts],
        "batch": str(row.get("batch") or ""),
        "confidence": int(extra.get("confidence") or 0),
        "policies": " / ".join(policies),
        "target": float(max(target, 1 - target)),
    }


def load_rows(source, split, tokenizer, n_responses=0, max_length=0, max_query_tokens=512, ranked=False):
    """Tokenise a split once (`datasets` caches the result): columns query, responses, length, batch, ...

    source: a jsonl or parquet file (`{split}` in its path is replaced), or a directory or hub id that
            `datasets` can load.
    n_responses: how many responses of each row are needed and kept, the best first (PPO 0, SFT 1, preferences 2).
    ranked: keep all responses of a row that has more.
    max_length: the longest query + response allowed, 0 for any. A longer row is an error.
    Raises UserError for missing files, columns or rows, naming them.
    """
    raw = read_split(source, split)
    name = f"{source} [{split}]"
    require(len(raw), f"{name}: no rows; give a split that has some")

    def tokenise(row, index):
        # Where responses are not needed, a summary that is no text is no error.
        if not n_responses:
            row = {key: value for key, value in row.items() if key != "summary"}
        # A row may hold anything: whatever goes wrong with it is told by its number.
        with explain(f"{name}: row {index}", UserError, LookupError, TypeError, ValueError, AttributeError):
            parsed = parse_row(row, tokenizer, max_query_tokens)
            query = parsed["query"]
            responses = parsed["responses"]
            if not ranked:
                responses = responses[:n_responses]
            if not query or len(responses) < n_responses:
                found = f"{len(query)} query tokens and {len(responses)} responses"
                raise UserError(f"{found}, but a query and {n_responses} are needed; correct or drop the row")

        length = len(query) + max(map(len, responses), default=0)
        return {**parsed, "responses": responses, "length": length}

    # The code is part of the cache's key: a changed format must not read old rows.
    sources = (__file__, hub.rows.__file__, hub.tokenizer.__file__, tokenizer.path)
    code = [Path(path).read_bytes() for path in sources]
    key = repr((raw._fingerprint, max_query_tokens, n_responses, ranked, code))
    fingerprint = hashlib.sha256(key.encode()).hexdigest()[:16]
    with explain(f"{name}: its values cannot be kept in columns", ValueError, OverflowError):
        rows = raw.map(
            tokenise,
            with_indices=True,
            remove_columns=raw.column_names,
            new_fingerprint=fingerprint,
        )
    if max_length:
        refuse_long_rows(name, np.asarray(rows["length"]), max_length)
    return rows


def refuse_long_rows(name, lengths, max_length):
    is_long = lengths > max_length
    if is_long.any():
        first = is_long.argmax()
        found = f"row {first} has {lengths[first]} tokens, more than max_length {max_length}"
        count = f"{is_long.sum()} such rows of {len(lengths)}"
        raise UserError(f"{name}: {found} ({count}); raise it, or leave them out")


# ---------------------------------------------------------------------------- batches


@functools.lru_cache(maxsize=4)
def permutation(n_rows, *key):
    return np.random.default_rng(key).permutation(n_rows)


def batch_indices(n_rows, batch_size, step, seed):
    """Positions (batch_size,) of a step's rows: a pure function of its arguments. Each epoch has its own shuffle
    (detail 21).
    """
    indices = []
    for place in range(step * batch_size, (step + 1) * batch_size):
        epoch = place // n_rows
        indices.append(permutation(n_rows, seed, epoch)[place % n_rows])
    return np.array(indices)


def uniforms(shape, *key):
    """Random numbers in [0, 1), a pure function of `key`, for example (seed, step)."""
    return torch.from_numpy(np.random.default_rng(key).random(shape, dtype=np.float32))


def pad_right(id_lists):
    """Lists of ids -> ids (B, T) of the longest one's length; lengths (B,). What fills up the others is never read."""
    rows = [torch.tensor(ids) for ids in id_lists]
    lengths = torch.tensor([len(ids) for ids in id_lists])
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True), lengths


def collate(queries, responses, device="cpu"):
    """Rows of query and response ids -> ids (B, T), and where and what the model must predict.

        column      0 .. Q-2    Q-1   Q  ..  Q+R-2   Q+R-1
        ids         query ..... q     r0 ..  r(R-2)  r(R-1)
        predicts    -           r0    r1 ..  r(R-1)  -          <- `select` = Q-1 .. Q+R-2, `targets` = r0 .. r(R-1)

    Returns ids (B, T), select (B, R), targets (B, R), mask (B, R), which is True on each row's own response.
    """
    ids, lengths = pad_right(join(queries, responses))
    targets, response_lens = pad_right(responses)
    columns = torch.arange(targets.shape[1])  # (R,)
    # The last token of the query predicts the first of the response.
    last_of_query = lengths - response_lens - 1
    select = last_of_query[:, None] + columns
    select = select.clamp(max=ids.shape[1] - 1)  # a short response's pad columns may point past the end
    mask = columns < response_lens[:, None]
    return ids.to(device), select.to(device), targets.to(device), mask.to(device)


def join(queries, responses):
    return [query + response for query, response in zip(queries, responses)]


def pick(lists, indices):
    """The lists at these positions."""
    return [lists[index] for index in indices]


def last_scalars(models, device, queries, responses):
    """Values (B,), the mean over models, at the last token of query + response: EOS, if there is one (detail 12)."""
    ids, lengths = pad_right(join(queries, responses))
    ids = ids.to(device)
    last = lengths[:, None].to(device) - 1
    return sum(model(ids, last)[:, 0] for model in models) / len(models)
