"""Byte-level BPE from a hub `tokenizer.json`, run by tiktoken and equal to the `tokenizers` library."""

import os
import re
import unicodedata

import tiktoken

from configurator import UserError, explain, require
from hub.files import read_json
from hub.weights import find_model

# GPT-2's split of text into words, which ByteLevel tokenizers share: a word takes the one space before it
WORDS = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
EOS = "<|endoftext|>"

# What tokenizer.json may say. Anything else would be encoded differently from the library.
SUPPORTED = {
    ("model", "type"): ("BPE",),
    ("model", "byte_fallback"): (None, False),
    ("model", "ignore_merges"): (None, False),
    ("normalizer", "type"): ("NFC",),
    ("pre_tokenizer", "type"): ("ByteLevel",),
    ("pre_tokenizer", "add_prefix_space"): (False,),
    ("pre_tokenizer", "use_regex"): (None, True),
}


class Tokenizer:
    """Text to ids and back.

    eos_id:  the id of <|endoftext|>.
    n_vocab: ids 0 .. n_vocab - 1 are the tokenizer's. A model's vocabulary is padded to a rounder number.
    pad_id:  n_vocab, an id of its own: with EOS as padding a model never learns to stop (detail 3).
    """

    def __init__(self, path):
        self.path = path
        spec = read_json(path)
        with explain(f"{path}: not a byte-level BPE tokenizer like Pythia's", UserError, Exception):
            refuse_unsupported(spec)
            special = {}
            self._runs = {}  # of spaces, which are tokens of their own
            for token in spec["added_tokens"]:
                kind = special if token["special"] else self._runs
                kind[token["content"]] = token["id"]

            symbols = byte_symbols()
            ranks = {}
            for token, id in spec["model"]["vocab"].items():
                if token not in special:
                    ranks[bytes(symbols[symbol] for symbol in token)] = id
            self._encoding = tiktoken.Encoding(path, pat_str=WORDS, mergeable_ranks=ranks, special_tokens={})

            self._bytes = {id: token for token, id in ranks.items()}
            self._bytes.update((id, run.encode()) for run, id in self._runs.items())
            longest_first = sorted(self._runs, key=len, reverse=True)
            self._cut = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
            self.eos_id = special[EOS]
            self.n_vocab = max(*self._bytes, *special.values()) + 1
        self.pad_id = self.n_vocab

    @classmethod
    def load(cls, source, revision="main"):
        """source: a tokenizer.json, a directory that holds one, or a hub id."""
        if os.path.isfile(source):
            return cls(source)
        return cls(os.path.join(find_model(source, revision, ["tokenizer.json"]), "tokenizer.json"))

    def encode(self, text):
        """Token ids of `text`. A post that quotes <|endoftext|> must not end the query: there it is ordinary text."""
        ids = []
        text = unicodedata.normalize("NFC", text)
        start = 0
        # Runs of spaces are cut out, the longest first, before words are split.
        for run in self._cut.finditer(text):
            ids += self._encoding.encode_ordinary(text[start : run.start()])
            ids.append(self._runs[run.group()])
            start = run.end()
        return ids + self._encoding.encode_ordinary(text[start:])

    def decode(self, ids):
        """Text of `ids`; special tokens and ids without a text are left out, broken UTF-8 becomes U+FFFD."""
        return b"".join(self._bytes.get(int(id), b"") for id in ids).decode("utf-8", errors="replace")


def refuse_unsupported(spec):
    """Refuse what would be encoded differently from the library, rather than encode it wrongly."""
    for (part, key), allowed in SUPPORTED.items():
        found = spec[part].get(key)
        require(found in allowed, f"{part}.{key} is {found!r}, supported is {allowed[-1]!r}")

    vocab = spec["model"]["vocab"]
    symbols = byte_symbols()
    ids = list(vocab.values())
    require(len(set(ids)) == len(ids), "two tokens have the same id")
    for token in spec["added_tokens"]:
        ids.append(token["id"])
        strips = token["single_word"] or token["lstrip"] or token["rstrip"] or token["content"] in symbols
        require(not strips, f"the added token {token['content']!r} takes in what stands beside it")
    require(all(type(id) is int and 0 <= id < 2**31 for id in ids), "an id is no number from 0")

    for symbol, byte in symbols.items():
        never_in_utf8 = byte >= 0xF5 or byte in (0xC0, 0xC1)
        require(never_in_utf8 or symbol in vocab, f"there is no token for the byte {byte}")
    # A merge is written "a b", or ["a", "b"].
    merged = [vocab["".join(merge).replace(" ", "")] for merge in spec["model"]["merges"]]
    require(merged == sorted(merged), "the merges are in another order than the ids")


def byte_symbols():
    """The printable character by which tokenizer.json stands for each byte -> that byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    symbols = {chr(byte): byte for byte in printable}
    symbols.update((chr(256 + number), byte) for number, byte in enumerate(others))
    return symbols
