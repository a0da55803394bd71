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
NEVER_IN_UTF8 = {0xC0, 0xC1, *range(0xF5, 0x100)}  # bytes that need no token

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
    pad_id:  n_vocab, an id of its own, for those who need one: with EOS as padding a model never learns to stop (detail
             3). Rows here are padded with 0, and masks leave that out.
    """

    def __init__(self, path):
        self.path = path
        spec = read_json(path)
        with explain(f"{path}: not a byte-level BPE tokenizer like Pythia's", UserError, Exception):
            refuse_unsupported(spec)
            self.special = {}  # <|endoftext|> and the like, which no text is encoded to
            self.runs = {}  # runs of spaces, which are tokens of their own
            for token in spec["added_tokens"]:
                kind = self.special if token["special"] else self.runs
                kind[token["content"]] = token["id"]
            self.eos_id = self.special[EOS]

            self.bytes = {}  # id -> what it stands for
            symbols = byte_symbols()
            for token, id in spec["model"]["vocab"].items():
                if token not in self.special:
                    self.bytes[id] = bytes(map(symbols.__getitem__, token))
            # tiktoken merges the pair of lowest rank first: the ids are in the order of the merges.
            ranks = {token: id for id, token in self.bytes.items()}
            self.words = tiktoken.Encoding(path, pat_str=WORDS, mergeable_ranks=ranks, special_tokens={})

            for run, id in self.runs.items():
                self.bytes[id] = run.encode()
            longest_first = sorted(self.runs, key=len, reverse=True)
            nothing = "(?!)"
            self.find_runs = re.compile("|".join(map(re.escape, longest_first)) or nothing)
            self.n_vocab = 1 + max(max(self.bytes), max(self.special.values()))
        self.pad_id = self.n_vocab

    @classmethod
    def load(cls, source, revision="main"):
        """source: a tokenizer.json, a directory that holds one, or a hub id."""
        if os.path.isfile(source):
            return cls(source)
        directory = find_model(source, revision, ["tokenizer.json"])
        return cls(os.path.join(directory, "tokenizer.json"))

    def encode(self, text):
        """Token ids of `text`. A post that quotes <|endoftext|> must not end the query: there it is ordinary text."""
        text = unicodedata.normalize("NFC", text)
        ids = []
        start = 0
        # Runs of spaces are cut out, the longest first, before words are split.
        for run in self.find_runs.finditer(text):
            ids += self.words.encode_ordinary(text[start : run.start()])
            ids.append(self.runs[run.group()])
            start = run.end()
        ids += self.words.encode_ordinary(text[start:])
        return ids

    def decode(self, ids):
        """Text of `ids`; special tokens and ids without a text are left out, broken UTF-8 becomes U+FFFD."""
        known = [self.bytes.get(int(id), b"") for id in ids]
        return b"".join(known).decode("utf-8", errors="replace")


def refuse_unsupported(spec):
    """Refuse what would be encoded differently from the library, rather than encode it wrongly."""
    for (part, key), allowed in SUPPORTED.items():
        found = spec[part].get(key)
        require(found in allowed, f"{part}.{key} is {found!r}, supported is {allowed[-1]!r}")

    vocab = spec["model"]["vocab"]
    symbols = byte_symbols()
    for symbol, byte in symbols.items():
        if symbol not in vocab and byte not in NEVER_IN_UTF8:
            raise UserError(f"there is no token for the byte {byte}")
    ids = list(vocab.values())
    require(len(set(ids)) == len(ids), "two tokens have the same id")
    for token in spec["added_tokens"]:
        ids.append(token["id"])
        # Among `symbols` is what a single byte is written as.
        if token["single_word"] or token["lstrip"] or token["rstrip"] or token["content"] in symbols:
            raise UserError(f"the added token {token['content']!r} takes in what stands beside it")
    for id in ids:
        if type(id) is not int or not 0 <= id < 2**31:
            raise UserError(f"the id {id!r} is no number from 0")

    # A merge is written "a b", or ["a", "b"]. Ids serve as ranks, so they must rise with the merges.
    merged = ["".join(merge).replace(" ", "") for merge in spec["model"]["merges"]]
    order = [vocab[token] for token in merged]
    require(order == sorted(order), "the merges are in another order than the ids")


def byte_symbols():
    """The printable character by which tokenizer.json stands for each byte -> that byte."""
    symbols = {}
    n_others = 0
    for byte in range(256):
        is_printable = 33 <= byte < 127 or (byte >= 161 and byte != 173)
        if is_printable:
            symbols[chr(byte)] = byte
        else:
            symbols[chr(256 + n_others)] = byte
            n_others += 1
    return symbols
