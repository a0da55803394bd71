"""From text to batches: the tokenizer, the query format, data sets, and which rows make up which step.

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
import unicodedata
from pathlib import Path

import numpy as np
import tiktoken
import torch

from configurator import UserError, explain, require
from model import find_model, read_json

# GPT-2's split of text into words, which ByteLevel tokenizers share: a word takes the one space before it
WORDS = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
EOS = "<|endoftext|>"
MAX_ARTICLE_TOKENS = 1919  # 2047 - 128: what the reference leaves for a CNN/DM article


class Tokenizer:
    """Byte-level BPE from a hub `tokenizer.json`, run by tiktoken and equal to the `tokenizers` library.

    eos_id:  the id of <|endoftext|>.
    n_vocab: ids 0 .. n_vocab - 1 are the tokenizer's. A model's vocabulary is padded to a rounder number.
    pad_id:  n_vocab, an id of its own: with EOS as padding a model never learns to stop (detail 3).
    """

    def __init__(self, path):
        self.path = path
        spec = read_json(path)
        with explain(f"{path}: not a byte-level BPE tokenizer like Pythia's", UserError, Exception):
            self._check(spec)
            vocab, added = spec["model"]["vocab"], spec["added_tokens"]
            special = {token["content"]: token["id"] for token in added if token["special"]}
            self._runs = {token["content"]: token["id"] for token in added if not token["special"]}
            symbols = byte_symbols()
            ranks = {bytes(symbols[s] for s in token): id for token, id in vocab.items() if token not in special}
            self._encoding = tiktoken.Encoding(path, pat_str=WORDS, mergeable_ranks=ranks, special_tokens={})
            self._bytes = {id: token for token, id in ranks.items()} | {id: t.encode() for t, id in self._runs.items()}
            runs = "|".join(re.escape(run) for run in sorted(self._runs, key=len, reverse=True))
            self._cut, self.eos_id = re.compile(f"({runs})" if runs else "(?!)"), special[EOS]
            self.n_vocab = max(*self._bytes, *special.values()) + 1
        self.pad_id = self.n_vocab

    @classmethod
    def load(cls, source, revision="main"):
        """source: a tokenizer.json, a directory that holds one, or a hub id."""
        if os.path.isfile(source):
            return cls(source)
        return cls(os.path.join(find_model(source, revision, ["tokenizer.json"]), "tokenizer.json"))

    @staticmethod
    def _check(spec):
        """Refuse what would be encoded differently from the library, rather than encode it wrongly."""
        model, pre, added = spec["model"], spec["pre_tokenizer"], spec["added_tokens"]
        order = [model["vocab"]["".join(merge).replace(" ", "")] for merge in model["merges"]]  # "a b", or ["a", "b"]
        ids = [*model["vocab"].values(), *(token["id"] for token in added)]
        plain = model["type"] == "BPE" and not model.get("byte_fallback") and not model.get("ignore_merges")
        splits = pre["type"] == "ByteLevel" and not pre["add_prefix_space"] and pre.get("use_regex", True)
        strips = any(t["single_word"] or t["lstrip"] or t["rstrip"] or t["content"] in byte_symbols() for t in added)
        exact = spec["normalizer"]["type"] == "NFC" and all(type(id) is int and 0 <= id < 2**31 for id in ids)
        single = len({*model["vocab"].values()}) == len(model["vocab"])
        # every byte that UTF-8 has; others need no token
        whole = all(s in model["vocab"] for s, b in byte_symbols().items() if b < 0xF5 and b not in (0xC0, 0xC1))
        fits = (plain, splits, not strips, exact, single, whole, order == sorted(order))
        require(all(fits), f"supported model, pre-tokenizer, added tokens, ids, single, whole, merges: {fits}")

    def encode(self, text):
        """Token ids of `text`. A post that quotes <|endoftext|> must not end the query: there it is ordinary text."""
        ids = []
        # runs of spaces are tokens of their own, cut out (longest first) before words are split
        for part in self._cut.split(unicodedata.normalize("NFC", text)):
            ids.extend([self._runs[part]] if part in self._runs else self._encoding.encode_ordinary(part))
        return ids

    def decode(self, ids):
        """Text of `ids`; special tokens and ids without a text are left out, broken UTF-8 becomes U+FFFD."""
        return b"".join(self._bytes.get(int(id), b"") for id in ids).decode("utf-8", errors="replace")


def byte_symbols():
    """The printable character by which tokenizer.json stands for each byte -> that byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(others)}


# ---------------------------------------------------------------------------- queries


def format_query(row, tokenizer, max_tokens=512):
    """Token ids of a TL;DR (or CNN/DM) query of at most max_tokens tokens; arXiv:2403.17031 details 2.1 to 2.3.

    row: dict with subreddit, title and post, or with article. A text too long loses its last paragraph (from
    the last newline on) again and again; with none left, its last character. So "TL;DR:" always survives.
    Raises UserError if the query is too long even without its text.
    """
    if row.get("post") is not None:
        head = f"SUBREDDIT: r/{text_of(row, 'subreddit')}\n\nTITLE: {text_of(row, 'title')}\n\nPOST: "
        text, tail = text_of(row, "post"), "\n\nTL;DR:"
    else:
        head, text, tail = "Article:\n", text_of(row, "article"), "\n\nTL;DR:\n"
    ids = tokenizer.encode(head + text + tail)
    if len(ids) <= max_tokens:
        return ids
    # Where whitespace follows a word, the tokens before it do not depend on what comes after. So the first such
    # place with too many tokens before it rules out all cuts behind it, and none of them need be tokenised.
    places = [match.start() + 1 for match in re.finditer(r"\S(?=\s)", text)]
    first_bad = bisect.bisect_right(places, max_tokens, key=lambda end: len(tokenizer.encode(head + text[:end])))
    too_long = places[first_bad] if first_bad < len(places) else len(text)
    end = len(text)
    while len(ids) > max_tokens:
        require(end, f"the query has {len(ids)} tokens without its text, more than {max_tokens}; drop the row")
        newline = text.rfind("\n", 0, end)
        end = newline if newline >= 0 else end - 1
        if end < too_long:
            ids = tokenizer.encode(head + text[:end] + tail)
    return ids


def text_of(row, key):
    value = row.get(key)
    require(isinstance(value, str), f"'{key}' is {value!r}, not a text; correct or drop the row")
    return value


def chat_text(value):
    """A text as it is; a chat, a list of {role, content}, as "\\n\\nHuman: ...\\n\\nAssistant: ..."."""
    if isinstance(value, str):
        return value
    chat = isinstance(value, list) and all(isinstance(turn, dict) for turn in value)
    require(chat, f"{value!r} is neither a text nor a list of {{role, content}}; correct or drop the row")
    turns = [(text_of(turn, "role"), text_of(turn, "content")) for turn in value]
    return "".join(f"\n\n{'Human' if role == 'user' else role.capitalize()}: {content}" for role, content in turns)


def split_prompt(row, keys):
    """The prompt and the responses of `keys`; an implicit prompt is what all share up to the last answer."""
    answer, texts = "\n\nAssistant:", [chat_text(row[key]) for key in keys]
    whole = any(isinstance(row[key], list) and len(row[key]) > 1 for key in keys)  # a chat that repeats its prompt
    if row.get("prompt") is None or whole:
        shared = os.path.commonprefix(texts)
        cut = shared.rfind(answer) + len(answer) if answer in shared else max(shared.rfind(" "), 0)
        return shared[:cut], [text[cut:] for text in texts]
    texts = [text if isinstance(row[key], str) else text.removeprefix(answer) for key, text in zip(keys, texts)]
    return chat_text(row["prompt"]) + ("" if isinstance(row["prompt"], str) else answer), texts


def parse_row(row, tokenizer, max_query_tokens):
    """One row of any schema -> query ids, responses (the best first, each ends with EOS), and where it came from."""
    target = 1.0 if row.get("target") is None else row["target"]
    require(isinstance(target, (int, float)) and 0 <= target <= 1, f"target {target!r} is no probability; correct it")
    meta = dict(batch=str(row.get("batch") or ""), confidence=0, policies="", target=float(max(target, 1 - target)))
    if "summaries" in row:
        choice, pair = row["choice"], row["summaries"]
        require(choice in (0, 1) and len(pair) == 2, f"choice {choice!r} of {len(pair)} summaries; use 0 or 1, of two")
        texts, source = [text_of(pair[which], "text") for which in (choice, 1 - choice)], row["info"]
        meta["confidence"] = int((row.get("extra") or {}).get("confidence") or 0)
        meta["policies"] = " / ".join(sorted(str(summary.get("policy") or "?") for summary in pair))
    elif "prompt" in row or "chosen" in row:
        ranked = dict(enumerate(row.get("responses") or []))
        keys = [key for key in ("chosen", "rejected", "completion") if row.get(key) is not None]
        source, texts = split_prompt({**row, **ranked}, list(ranked) or keys)
    else:
        known = row.get("post") is not None or row.get("article") is not None
        require(known, f"its columns {', '.join(row)} fit no schema; see the top of data.py")
        # references come without the space that the text after "TL;DR:" begins with (detail 3)
        source, texts = row, [" " + text_of(row, "summary").lstrip(" ")] if "summary" in row else []
    if isinstance(source, dict):
        limit = max_query_tokens if source.get("post") is not None else max(max_query_tokens, MAX_ARTICLE_TOKENS)
        query = format_query(source, tokenizer, limit)
    else:
        query = tokenizer.encode(source)
    responses = [tokenizer.encode(text) + [tokenizer.eos_id] for text in (texts if target >= 0.5 else texts[::-1])]
    return dict(query=query, responses=responses, **meta)


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
        with explain(f"{name}: row {index}", UserError, LookupError, TypeError, ValueError, AttributeError):
            used = {key: value for key, value in row.items() if n_responses or key != "summary"}
            parsed = parse_row(used, tokenizer, max_query_tokens)
            query, responses = parsed["query"], parsed["responses"][: None if ranked else n_responses]
            found = f"{len(query)} query tokens and {len(responses)} responses"
            fits = query and len(responses) >= n_responses
            require(fits, f"{found}, but a query and {n_responses} are needed; correct or drop the row")
            return {**parsed, "responses": responses, "length": len(query) + max(map(len, responses), default=0)}

    # the code is part of the key: a changed format must not read an old cache
    code = (Path(path).read_bytes() for path in (__file__, tokenizer.path))
    key = repr((raw._fingerprint, max_query_tokens, n_responses, ranked, *code))
    fingerprint = hashlib.sha256(key.encode()).hexdigest()[:16]
    with explain(f"{name}: its values cannot be kept in columns", ValueError, OverflowError):
        rows = raw.map(tokenise, with_indices=True, remove_columns=raw.column_names, new_fingerprint=fingerprint)
    lengths = np.asarray(rows["length"])
    long = lengths > (max_length or np.inf)
    first = f"row {long.argmax()} has {lengths[long.argmax()]} tokens, more than max_length {max_length}"
    require(not long.any(), f"{name}: {first} ({long.sum()} such rows of {len(rows)}); raise it, or leave them out")
    return rows


def read_split(source, split):
    """The raw rows as a `datasets.Dataset`."""
    import datasets  # here, since it takes a second and a notebook may only want the tokenizer

    datasets.disable_progress_bars()
    name = split.split("[")[0]  # of "train[:100]"
    path = source.replace("{split}", name)
    kind = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}.get(Path(path).suffix)
    with explain(f"{path} [{split}]: cannot be loaded; check path, split and file", Exception):
        return datasets.load_dataset(kind or path, split=split, data_files={name: path} if kind else None)


# ---------------------------------------------------------------------------- batches


@functools.lru_cache(maxsize=4)
def permutation(n_rows, *key):
    return np.random.default_rng(key).permutation(n_rows)


def batch_rows(n_rows, batch_size, step, seed):
    """Rows (batch_size,) of a step: a pure function of its arguments. Each epoch has its own shuffle (detail 21)."""
    places = np.arange(step * batch_size, (step + 1) * batch_size)
    return np.array([permutation(n_rows, seed, place // n_rows)[place % n_rows] for place in places])


def uniforms(shape, *key):
    """Random numbers in [0, 1), a pure function of `key`, for example (seed, step)."""
    return torch.from_numpy(np.random.default_rng(key).random(shape, dtype=np.float32))


def pad_right(rows):
    """Lists of ids -> ids (B, T) of the longest row's length, 0 behind the others; lengths (B,)."""
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    return ids, torch.tensor([len(row) for row in rows])


def collate(queries, responses, device="cpu"):
    """Rows of query and response ids -> ids (B, T), and where and what the model must predict.

        column      0 .. Q-2    Q-1   Q  ..  Q+R-2   Q+R-1
        ids         query ..... q     r0 ..  r(R-2)  r(R-1)
        predicts    -           r0    r1 ..  r(R-1)  -          <- `select` = Q-1 .. Q+R-2, `targets` = r0 .. r(R-1)

    Returns ids (B, T), select (B, R), targets (B, R), mask (B, R), which is True on each row's own response.
    """
    ids, lengths = pad_right([[*query, *response] for query, response in zip(queries, responses)])
    targets, response_lens = pad_right(responses)
    columns = torch.arange(targets.shape[1])  # (R,)
    select = (lengths - response_lens - 1)[:, None] + columns
    mask = columns < response_lens[:, None]
    return tuple(x.to(device) for x in (ids, select.clamp(max=ids.shape[1] - 1), targets, mask))


def last_scalars(models, device, queries, responses):
    """Values (B,), the mean over models, at the last token of query + response: EOS, if there is one (detail 12)."""
    ids, lengths = pad_right([query + response for query, response in zip(queries, responses)])
    return sum(model(ids.to(device), lengths[:, None].to(device) - 1)[:, 0] for model in models) / len(models)
