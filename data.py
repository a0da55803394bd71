"""From rows to batches: the query format, one function per schema, data sets, and which rows make up which step.

    tokenizer = Tokenizer.load("EleutherAI/pythia-160m")
    rows = load_rows("vwxyzjn/summarize_from_feedback_tldr_3_filtered", "train", tokenizer, n_responses=1)
    rows[0]["query"], rows[0]["responses"]         # token ids; each response ends with EOS

A row of any known schema becomes one query and its responses, the best first:

    {subreddit, title, post | article, [summary]}    one response, if there is a summary
    {info, summaries, choice}                        two: the chosen summary and the other
    {prompt, [completion]}                           one, if there is a completion
    {[prompt], chosen, rejected}                     two; without a prompt it is what both transcripts share
    {prompt, responses}                              two or more, ranked, the best first

A prompt or response may also be a chat: a list of {role, content}. A preference may carry `target`, the probability
that its first response is the better one (0.5 is a tie); below 0.5 the responses are taken in reverse.
"""

import bisect
import functools
import hashlib
import os
import re
from pathlib import Path

import numpy as np
import torch

import hub.tokenizer
from configurator import UserError, explain, require
from hub.tokenizer import Tokenizer  # noqa: F401 (notebooks and stages take it from here)

MAX_ARTICLE_TOKENS = 1919  # 2047 - 128: what the reference leaves for a CNN/DM article
ANSWER = "\n\nAssistant:"  # what a response to a chat stands behind


# ---------------------------------------------------------------------------- queries


def format_query(row, tokenizer, max_tokens=512):
    """Token ids of a TL;DR (or CNN/DM) query of at most max_tokens tokens; arXiv:2403.17031 details 2.1 to 2.3.

    row: dict with subreddit, title and post, or with article. A text too long loses its last paragraph (from
    the last newline on) again and again; with none left, its last character. So "TL;DR:" always survives.
    Raises UserError if the query is too long even without its text.
    """
    if row.get("post") is not None:
        head = f"SUBREDDIT: r/{text_of(row, 'subreddit')}\n\nTITLE: {text_of(row, 'title')}\n\nPOST: "
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
        require(end, f"the query has {len(ids)} tokens without its text, more than {max_tokens}; drop the row")
        newline = text.rfind("\n", 0, end)
        end = newline if newline >= 0 else end - 1
        if end < too_long:
            ids = tokenizer.encode(head + text[:end] + tail)
    return ids


def first_length_too_long(head, text, tokenizer, max_tokens):
    """A number of characters of `text` from which on every cut leaves too many tokens, so none need be tokenised.

    Where whitespace follows a word, the tokens before it do not depend on what comes after: the first such place
    with too many tokens before it rules out all cuts behind it.
    """
    places = [match.start() + 1 for match in re.finditer(r"\S(?=\s)", text)]
    first = bisect.bisect_right(places, max_tokens, key=lambda end: len(tokenizer.encode(head + text[:end])))
    if first < len(places):
        return places[first]
    return len(text)


def text_of(row, key):
    value = row.get(key)
    require(isinstance(value, str), f"'{key}' is {value!r}, not a text; correct or drop the row")
    return value


# ---------------------------------------------------------------------------- schemas


def from_post(row):
    """{subreddit, title, post | article, [summary]}"""
    known = row.get("post") is not None or row.get("article") is not None
    require(known, f"its columns {', '.join(row)} fit no schema; see the top of data.py")
    if "summary" not in row:
        return row, []
    # References come without the space that the text after "TL;DR:" begins with (detail 3).
    return row, [" " + text_of(row, "summary").lstrip(" ")]


def from_comparison(row):
    """{info, summaries, choice}"""
    pair = row["summaries"]
    choice = row["choice"]
    require(choice in (0, 1) and len(pair) == 2, f"choice {choice!r} of {len(pair)} summaries; use 0 or 1, of two")
    return row["info"], [text_of(pair[choice], "text"), text_of(pair[1 - choice], "text")]


def from_prompt(row):
    """{[prompt], chosen, rejected} or {prompt, [completion]}"""
    responses = [row[key] for key in ("chosen", "rejected", "completion") if row.get(key) is not None]
    return split_prompt(row.get("prompt"), responses)


def from_ranking(row):
    """{prompt, responses}"""
    return split_prompt(row.get("prompt"), row["responses"])


# The first schema whose column has a value is the row's; a row without any of these is a post.
SCHEMAS = {"summaries": from_comparison, "responses": from_ranking, "prompt": from_prompt, "chosen": from_prompt}


def split_prompt(prompt, responses):
    """Texts or chats -> the prompt's text, and the responses' texts behind it.

    Without a prompt, and where a response is a chat that repeats it, the prompt is what all share up to the last
    answer.
    """
    texts = [chat_text(response) for response in responses]
    repeated = any(isinstance(response, list) and len(response) > 1 for response in responses)
    if prompt is None or repeated:
        shared = os.path.commonprefix(texts)
        end = max(shared.rfind(" "), 0)
        if ANSWER in shared:
            end = shared.rfind(ANSWER) + len(ANSWER)
        return shared[:end], [text[end:] for text in texts]

    answers = []
    for response, text in zip(responses, texts):
        answers.append(text if isinstance(response, str) else text.removeprefix(ANSWER))
    if isinstance(prompt, str):
        return prompt, answers
    return chat_text(prompt) + ANSWER, answers


def chat_text(value):
    """A text as it is; a chat, a list of {role, content}, as "\\n\\nHuman: ...\\n\\nAssistant: ..."."""
    if isinstance(value, str):
        return value
    is_chat = isinstance(value, list) and all(isinstance(turn, dict) for turn in value)
    require(is_chat, f"{value!r} is neither a text nor a list of {{role, content}}; correct or drop the row")
    text = ""
    for turn in value:
        role = text_of(turn, "role")
        name = "Human" if role == "user" else role.capitalize()
        text += f"\n\n{name}: {text_of(turn, 'content')}"
    return text


def parse_row(row, tokenizer, max_query_tokens):
    """One row of any schema -> query ids, responses (the best first, each ends with EOS), and where it came from."""
    target = row.get("target")
    if target is None:
        target = 1.0
    is_probability = isinstance(target, (int, float)) and 0 <= target <= 1
    require(is_probability, f"target {target!r} is no probability; correct it")

    schema = next((SCHEMAS[column] for column in SCHEMAS if row.get(column) is not None), from_post)
    prompt, texts = schema(row)
    if target < 0.5:
        texts = texts[::-1]
    if isinstance(prompt, str):
        query = tokenizer.encode(prompt)
    else:
        is_post = prompt.get("post") is not None
        query = format_query(prompt, tokenizer, max_query_tokens if is_post else max(max_query_tokens, MAX_ARTICLE_TOKENS))
    extra = row.get("extra") or {}
    policies = sorted(str(summary.get("policy") or "?") for summary in row.get("summaries") or [])
    return {
        "query": query,
        "responses": [tokenizer.encode(text) + [tokenizer.eos_id] for text in texts],
        "batch": str(row.get("batch") or ""),
        "confidence": int(extra.get("confidence") or 0),
        "policies": " / ".join(policies),
        "target": float(max(target, 1 - target)),
    }


# ---------------------------------------------------------------------------- data sets


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
        if not n_responses:
            row = {key: value for key, value in row.items() if key != "summary"}
        with explain(f"{name}: row {index}", UserError, LookupError, TypeError, ValueError, AttributeError):
            parsed = parse_row(row, tokenizer, max_query_tokens)
            query = parsed["query"]
            responses = parsed["responses"]
            if not ranked:
                responses = responses[:n_responses]
            found = f"{len(query)} query tokens and {len(responses)} responses"
            fits = query and len(responses) >= n_responses
            require(fits, f"{found}, but a query and {n_responses} are needed; correct or drop the row")
        length = len(query) + max(map(len, responses), default=0)
        return {**parsed, "responses": responses, "length": length}

    # The code is part of the cache's key: a changed format must not read old rows.
    code = [Path(path).read_bytes() for path in (__file__, hub.tokenizer.__file__, tokenizer.path)]
    key = repr((raw._fingerprint, max_query_tokens, n_responses, ranked, code))
    fingerprint = hashlib.sha256(key.encode()).hexdigest()[:16]
    with explain(f"{name}: its values cannot be kept in columns", ValueError, OverflowError):
        rows = raw.map(tokenise, with_indices=True, remove_columns=raw.column_names, new_fingerprint=fingerprint)
    if max_length:
        refuse_long_rows(name, np.asarray(rows["length"]), max_length)
    return rows


def refuse_long_rows(name, lengths, max_length):
    long = lengths > max_length
    first = long.argmax()
    wrong = f"row {first} has {lengths[first]} tokens, more than max_length {max_length}"
    require(not long.any(), f"{name}: {wrong} ({long.sum()} such rows of {len(lengths)}); raise it, or leave them out")


def read_split(source, split):
    """The raw rows as a `datasets.Dataset`."""
    import datasets  # here, since it takes a second and a notebook may only want the tokenizer

    datasets.disable_progress_bars()
    name = split.split("[")[0]  # of "train[:100]"
    path = source.replace("{split}", name)
    kind = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}.get(Path(path).suffix)
    with explain(f"{path} [{split}]: cannot be loaded; check path, split and file", Exception):
        if kind is None:
            return datasets.load_dataset(path, split=split)
        return datasets.load_dataset(kind, split=split, data_files={name: path})


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
        epoch = permutation(n_rows, seed, place // n_rows)
        indices.append(epoch[place % n_rows])
    return np.array(indices)


def uniforms(shape, *key):
    """Random numbers in [0, 1), a pure function of `key`, for example (seed, step)."""
    return torch.from_numpy(np.random.default_rng(key).random(shape, dtype=np.float32))


def pad_right(id_lists):
    """Lists of ids -> ids (B, T) of the longest one's length, 0 behind the others; lengths (B,)."""
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in id_lists], batch_first=True)
    return ids, torch.tensor([len(row) for row in id_lists])


def collate(queries, responses, device="cpu"):
    """Rows of query and response ids -> ids (B, T), and where and what the model must predict.

        column      0 .. Q-2    Q-1   Q  ..  Q+R-2   Q+R-1
        ids         query ..... q     r0 ..  r(R-2)  r(R-1)
        predicts    -           r0    r1 ..  r(R-1)  -          <- `select` = Q-1 .. Q+R-2, `targets` = r0 .. r(R-1)

    Returns ids (B, T), select (B, R), targets (B, R), mask (B, R), which is True on each row's own response.
    """
    ids, lengths = pad_right([query + response for query, response in zip(queries, responses)])
    targets, response_lens = pad_right(responses)
    columns = torch.arange(targets.shape[1])  # (R,)
    select = (lengths - response_lens - 1)[:, None] + columns
    select = select.clamp(max=ids.shape[1] - 1)
    mask = columns < response_lens[:, None]
    return ids.to(device), select.to(device), targets.to(device), mask.to(device)


def last_scalars(models, device, queries, responses):
    """Values (B,), the mean over models, at the last token of query + response: EOS, if there is one (detail 12)."""
    ids, lengths = pad_right([query + response for query, response in zip(queries, responses)])
    ids = ids.to(device)
    last = lengths[:, None].to(device) - 1
    return sum(model(ids, last)[:, 0] for model in models) / len(models)
