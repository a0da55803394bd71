"""Byte-level BPE from a hub `tokenizer.json`, run by tiktoken and equal to the `tokenizers` library."""

import os
import re
import unicodedata

import tiktoken

from configurator import UserError, explain, require
from hub.fetch import find_model
from hub.files import expand, read_json

# GPT-2's split of text into words, which ByteLevel tokenizers share: a word takes the one space before it
WORDS = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
NEVER_IN_UTF8 = {0xC0, 0xC1, *range(0xF5, 0x100)}  # bytes that need no token
BESIDE = ["tokenizer_config.json", "special_tokens_map.json"]  # These may name the EOS token.
DEFAULT_EOS = "<|endoftext|>"

# What tokenizer.json may say. Anything else would be encoded differently from the library. Its
# `truncation` and `padding` are left from somebody's batch: transformers ignores them as well.
SUPPORTED = {
    ("model", "type"): ("BPE", None),
    ("model", "dropout"): (None, 0),
    ("model", "byte_fallback"): (None, False),
    ("model", "ignore_merges"): (None, False),
    ("model", "continuing_subword_prefix"): (None, ""),
    ("model", "end_of_word_suffix"): (None, ""),
    ("normalizer", "type"): ("NFC",),
    ("pre_tokenizer", "type"): ("ByteLevel",),
    ("pre_tokenizer", "add_prefix_space"): (False,),
    ("pre_tokenizer", "use_regex"): (True, None),
    ("post_processor", "type"): ("ByteLevel", "TemplateProcessing"),
}
SEQUENCES = {"normalizer": "normalizers", "pre_tokenizer": "pretokenizers", "post_processor": "processors"}


class Tokenizer:
    """Text to ids and back.

    eos_token:  what the files beside tokenizer.json name so, else <|endoftext|>; eos_id is its id.
    n_vocab:    ids 0 .. n_vocab - 1 are the tokenizer's. A model's vocabulary is padded to a rounder number.
    pad_id:     n_vocab, an id of its own, for those who need one: with EOS as padding a model never learns to stop
                (detail 3). Rows here are padded with 0, and masks leave that out.
    vocabulary: what each id stands for, {id: bytes, or the text of a special token}. If two tokenizers
                have equal ones, their ids mean the same.
    """

    # tiktoken 0.14 can end in a panic, which no `except Exception` catches, on one kind of very large text.
    max_characters = 900_000

    def __init__(self, path):
        self.path = path
        self.eos_token = eos_named_beside(path)
        spec = read_json(path)
        kind = "only plain byte-level BPE as Pythia's or GPT-2's is supported"
        with explain(f"{path}: {kind}; use another model, or mend the file", UserError, Exception):
            refuse_unsupported(spec)
            self.is_nfc = len(steps(spec, "normalizer")) > 0
            added_tokens = spec.get("added_tokens", [])
            ids = number_tokens(spec["model"]["vocab"], added_tokens)

            self.special = {}  # <|endoftext|> and the like, which no text is encoded to
            self.added = {}  # runs of spaces and the like, which are tokens of their own
            for token in added_tokens:
                text = token["content"]
                if token["special"]:
                    self.special[text] = ids[text]
                elif text != self.eos_token:
                    self.added[self.normalize(text)] = ids[text]
            # transformers makes the EOS token special, whatever tokenizer.json says of it.
            if self.eos_token in ids:
                self.special[self.eos_token] = ids[self.eos_token]
            self.find_added = added_pattern(added_tokens, self.normalize)

            # Padding behind the last id, such as TRL's [PAD], counts for nothing: no text is encoded to it, no response
            # may hold it, and of two models' tokenizers one may have it and the other not.
            padding = set()
            for text, id in self.special.items():
                if "pad" in text.lower() and text != self.eos_token:
                    padding.add(id)
            self.n_vocab = 1 + max(set(ids.values()) - padding)
            self.pad_id = self.n_vocab

            others = {*self.special.values(), *self.added.values()}
            words = {token: id for token, id in ids.items() if id not in others}
            symbols = byte_symbols()
            refuse_merges(words, spec["model"]["merges"], symbols)
            # tiktoken merges the pair of lowest rank first: the ids are in the order of the merges.
            ranks = {bytes(map(symbols.__getitem__, token)): id for token, id in words.items()}
            self.words = tiktoken.Encoding(path, pat_str=WORDS, mergeable_ranks=ranks, special_tokens={})

            self.vocabulary = {id: token for token, id in ranks.items()}
            for text, id in self.added.items():
                self.vocabulary[id] = text.encode()
            for text, id in self.special.items():
                if id < self.n_vocab:
                    self.vocabulary[id] = text

        found = ", ".join(map(repr, list(self.special)[:9])) or "none"
        mend = f"special tokens: {found}; name one as eos_token in tokenizer_config.json beside it"
        require(self.eos_token in self.special, f"{path}: no EOS token {self.eos_token!r}; {mend}")
        self.eos_id = self.special[self.eos_token]

    @classmethod
    def load(cls, source, revision="main"):
        """source: a tokenizer.json, a directory that holds one, or a hub id."""
        if os.path.isfile(expand(source)):
            return cls(expand(source))
        directory = find_model(source, revision, ["tokenizer.json", *BESIDE])
        return cls(os.path.join(directory, "tokenizer.json"))

    def normalize(self, text):
        return unicodedata.normalize("NFC", text) if self.is_nfc else text

    def encode(self, text):
        """Token ids of `text`. A post that quotes <|endoftext|> must not end the query: there it is ordinary text.

        Raises UserError for a text of more than max_characters.
        """
        if len(text) > self.max_characters:
            limit = f"the limit is {self.max_characters:,}; split it or leave it out"
            raise UserError(f"a text has {len(text):,} characters, {limit}")
        text = self.normalize(text)
        ids = []
        start = 0
        # Runs of spaces are cut out, the longest first, before words are split.
        for found in self.find_added.finditer(text):
            if found.group() in self.added:
                ids += self.words.encode_ordinary(text[start : found.start()])
                ids.append(self.added[found.group()])
                start = found.end()
        ids += self.words.encode_ordinary(text[start:])
        return ids

    def decode(self, ids):
        """Text of `ids`; special tokens and ids without a text are left out, broken UTF-8 becomes U+FFFD."""
        known = [self.vocabulary.get(int(id)) for id in ids]
        ordinary = [token for token in known if isinstance(token, bytes)]
        return b"".join(ordinary).decode("utf-8", errors="replace")


def eos_named_beside(path):
    """The text of the EOS token, by the files that transformers writes beside tokenizer.json."""
    for name in BESIDE:
        file = os.path.join(os.path.dirname(path), name)
        settings = read_json(file) if os.path.exists(file) else {}
        # These add to a text what tokenizer.json does not know of.
        for key in ("add_bos_token", "add_prefix_space"):
            require(not settings.get(key), f"{file}: {key} gives other ids; set it to false")

        token = settings.get("eos_token")
        if isinstance(token, dict):
            token = token.get("content")
        if token:
            return str(token)
    return DEFAULT_EOS


def steps(spec, part):
    """The steps of a part of tokenizer.json: none, one, or those of a Sequence."""
    step = spec.get(part)
    if step and step.get("type") == "Sequence":
        return step[SEQUENCES[part]]
    return [step] if step else []


def refuse_unsupported(spec):
    """Refuse what would be encoded differently from the library, rather than encode it wrongly."""
    for (part, key), allowed in SUPPORTED.items():
        for step in steps(spec, part):
            found = step.get(key)
            require(found in allowed, f"{part}.{key} is {found!r}, supported is {allowed[0]!r}")
    require(len(steps(spec, "pre_tokenizer")) == 1, "pre_tokenizer is not one ByteLevel")

    for step in steps(spec, "post_processor"):
        if step["type"] == "TemplateProcessing":
            # "A" stands for the text; what else is there, the library adds to it.
            pieces = [piece.get("Sequence", {}).get("id") for piece in step["single"]]
            require(pieces == ["A"], "post_processor adds tokens to each text, such as a BOS")


def number_tokens(vocab, added_tokens):
    """The id of each token by its text; what the library would number or find otherwise is refused."""
    ids = dict(vocab)
    next_id = len(vocab)
    for token in added_tokens:
        text = token["content"]
        # The library numbers added tokens itself, whatever the file says.
        id = ids.setdefault(text, next_id)
        next_id = max(next_id, id + 1)
        require(text and token["id"] == id, f"the added token {text!r} has not the library's id {id}")

        takes_more = token["single_word"] or token["lstrip"] or token["rstrip"]
        if not token["special"] and (takes_more or not token["normalized"]):
            raise UserError(f"the added token {text!r} is neither special nor plain, normalized text")

    for id in ids.values():
        if type(id) is not int or not 0 <= id < 2**31:
            raise UserError(f"the id {id!r} is no number from 0")
    require(len(set(ids.values())) == len(ids), "two tokens have the same id")
    return ids


def added_pattern(added_tokens, normalize):
    """Added tokens in a normalized text, the longest first.

    Special ones are found, too: as in the library they stay text, and no other is found within.
    """
    texts = [normalize(token["content"]) for token in added_tokens if token["normalized"]]
    longest_first = sorted(texts, key=len, reverse=True)
    nothing = "(?!)"
    return re.compile("|".join(map(re.escape, longest_first)) or nothing)


def refuse_merges(words, merges, symbols):
    """Refuse merges that tiktoken, for which the ids alone count, would make otherwise.

    Merges that no training makes can pass; bench/tokenizer_all.py takes the time to find those.
    """
    for symbol, byte in symbols.items():
        if symbol not in words and byte not in NEVER_IN_UTF8:
            raise UserError(f"there is no token for the byte {byte}, or it is an added one")

    # A merge is written ["a", "b"], or "a b".
    if merges and isinstance(merges[0], list):
        merges = map("".join, merges)
    merged = [merge.replace(" ", "") for merge in merges]
    longer = [token for token in sorted(words, key=words.get) if token not in symbols]
    require(merged == longer, "each longer token needs one merge, in the order of the ids")


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
