"""Damaged files: a loader either loads them or raises a UserError of one line; it never crashes, hangs or fills memory.

Each test takes a small valid input, damages it in ways that know its structure (values of other types, sizes and
names, then bytes), and gives it to the loader. The same code always meets the same damage. The memory that a loader
may take beyond what is in use, and its time, are limited for real. That both outcomes occur is asserted, so that no
test passes by refusing (or loading) everything.
"""

import contextlib
import copy
import faulthandler
import functools
import itertools
import json
import math
import operator
import os
import resource
import signal
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, event, given, note, settings
from hypothesis import strategies as st

import dpo
import ppo
import rm
import sample
import sft
from configurator import UserError, configure
from data import load_rows
from evals import winrate
from hub.tokenizer import Tokenizer
from model import GPTNeoX, GPTNeoXConfig, ScalarModel
from toy.make_data import make_tokenizer
from variants import dpo_losses, grpo, kl_penalty, ppo_max, rloo, truly_ppo

# What no load of the tiny inputs here may take; a normal one takes 10 ms and 1 MB.
SECONDS = 30
MEMORY = 2**31
FIXED_RUN = settings(derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck))

# Texts that stand for JSON which json.dumps would not write; `render` puts it in their place.
RAW = {"@nested": "[" * 3000 + "]" * 3000, "@objects": '{"a":' * 3000 + "1" + "}" * 3000,
       "@deep": "[" * 500 + "]" * 500, "@digits": "9" * 5000, "@1e999": "1e999", "@nothing": "", "@control": '"\x01"',
       "@escape": '"\\x"', "@half": '"\\ud800"', "@twice": '1, "twice": 2', "@-0": "-0", "@01": "01"}  # fmt: skip
INTS = [0, 1, -1, 2, 3, 7, 16, 255, 2**31, 2**32, 2**53 + 1, 2**63, 2**64, -(2**63) - 1, 10**12, 10**400]
FLOATS = [0.5, -0.0, 1.0, 1.5, -0.5, 1e-320, 1e300, -1e300, math.nan, math.inf, -math.inf]
TEXTS = ["", " ", "a", "\n", "a\nb", "a\r\u2028b", "\x00", "\ud800", "\udfff\ud800", "é", "e\u0301", "0", "9" * 30,
         "null", "../x", "a" * 300, "<|endoftext|>", "<|padding|>", "default"]  # fmt: skip
OTHERS = [None, [], {}, [[]], [{}], [None], [1, "a"], {"a": None}, {"": []}, [[["a"]]]]
POOLS = [INTS, FLOATS, TEXTS, OTHERS, [True, False, None]]
VALUES = st.sampled_from([*POOLS, *POOLS, list(RAW)]).flatmap(st.sampled_from)


# ---------------------------------------------------------------------------- damage


def rarely(draw, times):
    """True once in so many times. (Values at an end of a range are drawn more often.)"""
    return draw(st.integers(0, times - 1)) == times // 2


def walk(draw, document, starts):
    """The parent and key of a part of `document`, found from one of the paths `starts` by going down at random."""
    parent = None
    key = None
    start = iter(draw(st.sampled_from(starts)))
    node = document
    while isinstance(node, (dict, list)) and node:
        keys = list(node) if isinstance(node, dict) else range(len(node))
        parent = node
        key = next(start, None)
        if key not in keys:
            key = draw(st.sampled_from(keys))
        node = parent[key]
        if parent is not document and rarely(draw, 4):
            break
    return parent, key


@st.composite
def edited(draw, base, starts=((),)):
    """`base`, a JSON document, after one to three edits of its values, keys and elements."""
    if rarely(draw, 20):
        return copy.deepcopy(draw(VALUES))
    document = [copy.deepcopy(base)]
    for _ in range(draw(st.integers(1, 3))):
        parent, key = walk(draw, document, [(0, *start) for start in starts])
        if parent is None:
            continue
        how = draw(st.sampled_from(["value", "value", "nudge", "delete", "add", "rename", "copy"]))
        note(f"{how} at {key!r}")
        if how == "value":
            parent[key] = copy.deepcopy(draw(VALUES))
        elif how == "nudge":
            parent[key] = nudge(draw, parent[key])
        elif how == "copy":
            other, place = walk(draw, document, [(0, *start) for start in starts])
            parent[key] = copy.deepcopy(other[place])
        elif parent is document:
            continue
        elif how == "delete":
            del parent[key]
        elif isinstance(parent, list):
            parent.insert(key, copy.deepcopy(draw(VALUES)))
        elif how == "add":
            parent[draw(st.sampled_from(TEXTS))] = copy.deepcopy(draw(VALUES))
        else:
            parent[draw(st.sampled_from(TEXTS))] = parent.pop(key)
    return document[0] if document else None


def nudge(draw, value):
    """A value near `value`, most often of the same type."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return draw(st.sampled_from([value + 1, value - 1, 2 * value, value // 2, -value, str(value)[:9]]))
    if isinstance(value, str):
        return draw(st.sampled_from([value[:-1], value + "a", value + "\n", value.upper(), value * 50, [value]]))
    return draw(st.sampled_from([[value], {"a": value}, list(value or ()), json.dumps(value)]))


def leaves(value, path=()):
    """The paths of all values in a JSON document that hold no other."""
    if isinstance(value, dict):
        keys = list(value)
    elif isinstance(value, list):
        keys = range(len(value))
    else:
        yield path
        return
    for key in keys:
        yield from leaves(value[key], (*path, key))


def put(document, path, value):
    """A copy of `document` with another value at `path`."""
    document = copy.deepcopy(document)
    functools.reduce(operator.getitem, path[:-1], document)[path[-1]] = copy.deepcopy(value)
    return document


def replaced(base, paths=None):
    """The bytes of `base` with one other value at one of the paths, by default those of all leaves."""
    return st.builds(put, st.just(base), st.sampled_from(paths or list(leaves(base))), VALUES).map(render)


class Content(bytes):
    """The bytes of a file, of which a failing test shows the first."""

    def __repr__(self):
        return repr(bytes(self[:600])) + "..." * (len(self) > 600)


def render(document):
    """The bytes of a JSON document, with RAW's texts put in."""
    text = json.dumps(document)
    for name, raw in RAW.items():
        text = text.replace(json.dumps(name), raw)
    return Content(text.encode())


@st.composite
def damaged(draw, content):
    """`content`, bytes, after one to three cuts, insertions and changes of bytes."""
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(content)))
        end = min(start + draw(st.sampled_from([0, 1, 1, 2, 8, 100])), len(content))
        other = draw(st.sampled_from([b"", b"\x00", b"\xff", b'"', b"{", b"}", b",", b"1", b"\n", b"\xed\xa0\x80"]))
        content = content[:start] + draw(st.sampled_from([other, other, content[start:end] * 2])) + content[end:]
        if rarely(draw, 6):
            content = content[: draw(st.integers(0, len(content)))]
    return Content(content)


@st.composite
def files(draw, *bases, starts=((),)):
    """The bytes of a damaged JSON file; every sixth has damaged bytes as well."""
    content = render(draw(edited(draw(st.sampled_from(bases)), starts)))
    return draw(damaged(content)) if rarely(draw, 6) else content


# ---------------------------------------------------------------------------- the property


class Hang(BaseException):
    """Not an Exception, so that no loader takes it for its own."""


@contextlib.contextmanager
def limits(memory):
    """Raise Hang after SECONDS, and let an allocation fail that needs more than `memory` bytes (None: any) anew."""

    def stop(*_):
        raise Hang

    before = resource.getrlimit(resource.RLIMIT_AS)
    used = None
    with contextlib.suppress(OSError):  # only Linux says what is used
        used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    handler = signal.signal(signal.SIGALRM, stop)
    try:
        signal.setitimer(signal.ITIMER_REAL, SECONDS, 5)  # again and again: what is raised in a gc callback is lost
        faulthandler.dump_traceback_later(3 * SECONDS, exit=True)  # a hang outside of Python, which sees no signals
        if used and memory and before[1] == resource.RLIM_INFINITY:
            resource.setrlimit(resource.RLIMIT_AS, (used + memory, before[1]))
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, before)
        faulthandler.cancel_dump_traceback_later()
        signal.signal(signal.SIGALRM, handler)


def outcome(load, memory=MEMORY):
    """'loaded', or 'refused' with a UserError of one line; anything else fails the test."""
    try:
        with limits(memory):
            load()
        return "loaded"
    except UserError as error:
        line = str(error)
    except Hang:
        raise AssertionError(f"not done after {SECONDS} seconds") from None
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a panic of a library in Rust is no Exception
        raise AssertionError(f"{type(error).__name__}: {str(error)[:300]}") from error
    assert line.strip() and line.splitlines() == [line], f"not one line: {line!r}"
    return "refused"


def fuzz(cases, load, examples, memory=MEMORY):
    """Give `examples` of the strategy `cases` to `load`; each is loaded or refused, and both happen."""
    seen = Counter()

    @settings(FIXED_RUN, max_examples=examples)
    @given(cases)
    def run(case):
        kind = outcome(lambda: load(case), memory)
        event(kind)
        seen[kind] += 1

    run()
    assert min(seen["loaded"], seen["refused"]) >= examples / 20, f"not much of a test: {seen}"


# ---------------------------------------------------------------------------- tokenizer.json


TOKENIZER = make_tokenizer()
SAMPLE = "SUBREDDIT: r/pets\n\nTITLE: é e\u0301\n\nPOST:   Anna's 12 \x00\xff \ud800<|endoftext|>     哈\nTL;DR:"


def read_tokenizer(path):
    """Load, encode and decode: whatever loads must give ids below its own n_vocab, and take any text."""
    tokenizer = Tokenizer.load(str(path))
    for text in ("", SAMPLE, "".join(map(chr, range(1, 400)))):
        ids = [*tokenizer.encode(text), tokenizer.eos_id]
        assert all(type(id) is int and 0 <= id < tokenizer.n_vocab for id in ids), ids
        assert isinstance(tokenizer.decode(ids), str)


def without(token, other):
    """A tokenizer.json in which `token` has the id of `other`, or, if that is itself, is gone."""
    document = copy.deepcopy(TOKENIZER)
    vocab = document["model"]["vocab"]
    vocab[token] = vocab[other]
    if token == other:
        del vocab[token]
    return render(document)


def test_tokenizer_json(tmp_path):
    """Its vocabulary, merges and added tokens, with ids of all kinds, missing bytes and odd contents."""
    path = tmp_path / "tokenizer.json"
    path.write_bytes(render(TOKENIZER))
    assert outcome(lambda: read_tokenizer(path)) == "loaded"

    def load(content):
        path.write_bytes(content)
        read_tokenizer(path)

    starts = [(), ("model",), ("model", "vocab"), ("model", "merges"), ("added_tokens",), ("pre_tokenizer",)]
    vocab = list(TOKENIZER["model"]["vocab"])
    others = [path for path in leaves(TOKENIZER) if path[1:2] not in [("vocab",), ("merges",)]]
    tokens = st.sampled_from([vocab[:100], vocab[-9:]]).flatmap(st.sampled_from)  # bytes, and words
    twice = st.builds(without, tokens, tokens) | tokens.map(lambda token: without(token, token))
    fuzz(files(TOKENIZER, starts=starts) | replaced(TOKENIZER, others) | twice, load, 400)


@pytest.mark.parametrize("value", [-1, 0.5, 1.0, True, None, "1", [], math.nan, math.inf, 2**31, 2**32, 2**99], ids=str)
@pytest.mark.parametrize("path", [("added_tokens", 0), ("added_tokens", -1), ("model", "vocab")], ids=str)
def test_tokenizer_ids(tmp_path, path, value):
    """An id of another type or size, of a special token, of a run of spaces, and of a byte."""
    path = (*path, "a" if path[1] == "vocab" else "id")
    (tmp_path / "tokenizer.json").write_bytes(render(put(TOKENIZER, path, value)))
    outcome(lambda: read_tokenizer(tmp_path))


@pytest.mark.parametrize("content", ["", " ", "a", "\u0120", "ab", "\ud800", "<|endoftext|>", None, 1, []], ids=repr)
@pytest.mark.parametrize("place", [0, 1, -1])
def test_tokenizer_contents(tmp_path, place, content):
    """An added token, special or not, that is another token, a byte's symbol, or no text."""
    document = put(TOKENIZER, ("added_tokens", place, "content"), content)
    (tmp_path / "tokenizer.json").write_bytes(render(document))
    outcome(lambda: read_tokenizer(tmp_path))


# ---------------------------------------------------------------------------- a model's directory


TINY = GPTNeoXConfig(vocab_size=11, hidden_size=8, num_hidden_layers=1, num_attention_heads=1)
KINDS = (GPTNeoX, ScalarModel)
SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F4": 1}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A directory of each kind of model, by the kind."""
    directories = {kind: tmp_path_factory.mktemp(kind.__name__) for kind in KINDS}
    for kind, directory in directories.items():
        model = kind(TINY)
        model.save_pretrained(directory)
        assert outcome(lambda kind=kind, directory=directory: use_model(kind, directory)) == "loaded"
    return directories


def use_model(kind, directory):
    """Load a model and run it on one token: a model that loads must fit itself."""
    kind.from_pretrained(str(directory))(torch.tensor([[0]]))


def config_loader(directories):
    """A function of the bytes of a config.json, that loads the model of each directory with it."""

    def load(content):
        for kind, directory in directories.items():
            (directory / "config.json").write_bytes(content)
            GPTNeoXConfig.from_directory(str(directory))
            use_model(kind, directory)

    return load


def config_bases(directory):
    """config.json as this project writes it, and as transformers 5 does."""
    ours = json.loads((directory / "config.json").read_text())
    rope = dict(rope_type="default", rope_theta=ours["rotary_emb_base"], partial_rotary_factor=ours["rotary_pct"])
    theirs = {key: value for key, value in ours.items() if not key.startswith("rotary")}
    return ours, {**theirs, "rope_parameters": rope}


@pytest.fixture
def copies(models, tmp_path):
    """Copies of the models' directories, free to be damaged."""
    directories = {kind: tmp_path / kind.__name__ for kind in models}
    for kind, directory in directories.items():
        directory.mkdir()
        for path in models[kind].iterdir():
            (directory / path.name).write_bytes(path.read_bytes())
    return directories


def test_config_json(copies):
    """Sizes, fractions and flags of all kinds, also those under transformers 5's names."""
    bases = config_bases(copies[GPTNeoX])
    load = config_loader(copies)
    for base in bases:
        assert outcome(lambda base=base: load(render(base))) == "loaded"
    fuzz(files(*bases, starts=[(), (), ("rope_parameters",)]) | st.one_of(*map(replaced, bases)), load, 700)


SHAPE = ["vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"]


@pytest.mark.parametrize("size", [10**5, 10**9, 10**12, 2**62, 10**400], ids=["1e5", "1e9", "1e12", "2^62", "1e400"])
@pytest.mark.parametrize("name", SHAPE)
def test_a_huge_model_is_refused_before_it_is_built(copies, name, size):
    """A config.json that asks for more than its weights hold costs neither minutes nor gigabytes."""
    base, _ = config_bases(copies[GPTNeoX])
    content = render({**base, name: size})
    assert outcome(lambda: config_loader(copies)(content)) == "refused"


# ---------------------------------------------------------------------------- safetensors


def parse_safetensors(content):
    """The tensors of a valid file: a list of [name, dtype, shape, bytes]."""
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    body = content[8 + length :]
    header.pop("__metadata__")
    tensors = []
    for name, entry in header.items():
        start, end = entry["data_offsets"]
        tensors.append([name, entry["dtype"], entry["shape"], body[start:end]])
    return tensors


def build(tensors):
    """A header and values in which each tensor's bytes follow those of the one before."""
    header = {}
    body = b""
    for name, dtype, shape, values in tensors:
        start = len(body)
        body += values
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, len(body)]}
    return header, body


def join(header, body, length=None):
    return Content((len(header) if length is None else length).to_bytes(8, "little") + header + body)


BUFFER = "gpt_neox.layers.0.attention.bias"


@st.composite
def edited_tensors(draw, base):
    """A valid file of other tensors: names, dtypes, shapes, values, order and number may have changed."""
    tensors = copy.deepcopy(base)
    for _ in range(draw(st.integers(1, 2))):
        index = draw(st.integers(0, len(tensors) - 1))
        name, dtype, shape, values = tensors[index]
        other = draw(st.sampled_from([*TEXTS, BUFFER, tensors[0][0], name + "\n", name[:-1]]))
        how = draw(st.sampled_from(["drop", "name", "dtype", "dtype", "shape", "values", "add", "order", "half"]))
        if how == "drop" and len(tensors) > 1:
            tensors.pop(index)
        elif how == "name":
            tensors[index][0] = other
        elif how == "dtype":
            new = draw(st.sampled_from(list(SIZES)))
            tensors[index][1:] = [new, shape, bytes(SIZES[new] * math.prod(shape))]
        elif how == "half":
            tensors[index][1:] = [dtype.replace("F32", "BF16"), shape, values[: len(values) // 2]]
        elif how == "shape":
            tensors[index][2] = draw(st.sampled_from([shape[::-1], [math.prod(shape)], [*shape, 1], [1, *shape], []]))
        elif how == "values":
            value = draw(st.sampled_from([bytes(4), b"\xff" * 4, b"\x00\x00\x80\x7f", b"\x00\x00\x80\xff"]))
            tensors[index][3] = value + values[4:]
        elif how == "add":
            shape = draw(st.sampled_from([[0], [0, 2**40], [2, 0], [1], []]))
            tensors.append([other, "F32", shape, bytes(4 * math.prod(shape))])
        elif how == "order":
            tensors.insert(0, tensors.pop())
    return tensors


@st.composite
def safetensors(draw, base):
    """A damaged file: tensors changed as a whole, or header, header's length or bytes changed."""
    how = draw(st.sampled_from(["tensors"] * 5 + ["header"] * 2 + ["length", "bytes", "twice"]))
    tensors = draw(edited_tensors(base)) if how == "tensors" else base
    header, body = build(tensors)
    if how == "header":
        metadata = draw(st.sampled_from([{}, {"__metadata__": {"format": "pt"}}]))
        names = [(name, key) for name in header for key in header[name]]
        header = draw(edited({**metadata, **header}, [(), *names]))
    text = render(header)
    if how == "twice":
        name = draw(st.sampled_from(list(header)))
        text = render({name: header[draw(st.sampled_from(list(header)))]})[:-1] + b"," + text[1:]
    length = len(text)
    if how == "length":
        odd = st.sampled_from([0, 1, 7, 8, length - 1, length + 1, length + 8, 2**20, 2**31, 2**40, 2**63, 2**64 - 1])
        length = draw(odd)
        text += draw(st.sampled_from([b"", b"", b" ", b" " * 8, b"\x00"]))
    content = join(text, body, length)
    return draw(damaged(content)) if how == "bytes" or rarely(draw, 10) else content


@pytest.mark.parametrize("kind", KINDS)
def test_safetensors(copies, kind):
    """Header, its length, names, dtypes, shapes, offsets and values."""
    directory = copies[kind]
    path = directory / "model.safetensors"
    base = parse_safetensors(path.read_bytes())
    header, body = build(base)

    def load(content):
        path.write_bytes(content)
        use_model(kind, directory)

    assert outcome(lambda: load(join(render(header), body))) == "loaded"
    fuzz(safetensors(base), load, 400)


def test_safetensors_index(copies):
    """File names and tensor names of a model in two files."""
    directory = copies[GPTNeoX]
    path = directory / "model.safetensors"
    tensors = parse_safetensors(path.read_bytes())
    path.unlink()
    parts = {}
    for number, part in enumerate((tensors[::2], tensors[1::2]), 1):
        name = f"model-{number}-of-2.safetensors"
        header, body = build(part)
        (directory / name).write_bytes(join(render(header), body))
        parts.update((tensor[0], name) for tensor in part)
    index = {"metadata": {"total_size": len(body)}, "weight_map": parts}

    def load(content):
        (directory / "model.safetensors.index.json").write_bytes(content)
        use_model(GPTNeoX, directory)

    assert outcome(lambda: load(render(index))) == "loaded"
    names = [*TEXTS, "config.json", ".", "..", "model-1-of-2.safetensors", "/model-2-of-2.safetensors"]
    odd = st.tuples(st.sampled_from([*parts, BUFFER, "a\nb"]), st.sampled_from(names)).map(lambda edit: dict([edit]))
    moved = odd.map(lambda edit: render({**index, "weight_map": {**parts, **edit}}))
    fuzz(files(index, starts=[(), ("metadata",), ("weight_map",)]) | moved, load, 300)


# ---------------------------------------------------------------------------- rows


POST = {"subreddit": "pets", "title": "is this normal", "post": "Anna danced.\nit was dawn."}
CHAT = [{"role": "user", "content": "who?"}, {"role": "assistant", "content": "Anna"}]
OTHER = [CHAT[0], {"role": "assistant", "content": "nobody"}]
ROWS = {
    "post": {**POST, "summary": "Anna danced"},
    "article": {"article": "Anna danced. " * 3, "summary": "Anna danced"},
    "pair": {"info": POST, "choice": 0, "batch": "7", "extra": {"confidence": 8},
             "summaries": [{"text": " Anna", "policy": "x"}, {"text": " a dog", "policy": "y"}]},
    "article pair": {"info": {"article": "Anna danced."}, "choice": 1, "target": 0.75,
                     "summaries": [{"text": " Anna"}, {"text": " a dog"}]},
    "completion": {"prompt": "who?", "completion": " Anna"},
    "preference": {"prompt": "who?", "chosen": " Anna", "rejected": " nobody", "target": 0.25},
    "transcripts": {"chosen": "\n\nHuman: who?\n\nAssistant: Anna", "rejected": "\n\nHuman: who?\n\nAssistant: nobody"},
    "chats": {"chosen": CHAT, "rejected": OTHER},
    "chat prompt": {"prompt": CHAT[:1], "chosen": CHAT[1:], "rejected": OTHER[1:]},
    "ranking": {"prompt": "who?", "responses": [" Anna", " she", " nobody"], "target": 1},
}  # fmt: skip
OPTIONS = [dict(n_responses=0), dict(n_responses=1), dict(n_responses=2), dict(n_responses=2, ranked=True),
           dict(n_responses=1, max_length=60), dict(n_responses=0, max_query_tokens=5)]  # fmt: skip


@st.composite
def jsonl(draw, base):
    """The bytes of one to three rows like `base`, most of them damaged, and how to load them."""
    paths = list(leaves(base))
    rows = []
    for _ in range(draw(st.integers(1, 3))):
        how = draw(st.sampled_from(["edited", "put", "put", "whole"]))
        rows.append(draw(edited(base)) if how == "edited" else base)
        if how == "put":
            rows[-1] = put(base, draw(st.sampled_from(paths)), draw(VALUES))
    content = Content(b"\n".join(map(render, rows)) + b"\n")
    content = draw(damaged(content)) if rarely(draw, 8) else content
    return content, draw(st.sampled_from(OPTIONS))


@pytest.fixture
def read_rows(tmp_path, monkeypatch):
    """A function of the bytes of a jsonl file and of options, that loads the rows and looks at each."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "tokenizer.json").write_bytes(render(TOKENIZER))
    tokenizer = Tokenizer.load(str(tmp_path))

    def read(case):
        content, options = case
        path = tmp_path / "x.jsonl"
        path.write_bytes(content)
        rows = load_rows(str(path), "train", tokenizer, **options)
        assert len(rows)
        for row in rows:
            assert row["query"] and len(row["responses"]) >= options["n_responses"]
            assert all(0 <= id < tokenizer.n_vocab for ids in (row["query"], *row["responses"]) for id in ids)

    return read


@pytest.mark.parametrize("name", ROWS)
def test_rows(read_rows, name):
    """Each schema: missing keys, nulls, other types, nested and huge values, odd escapes, bytes that are no JSON."""
    needed = min(2, sum(key in ROWS[name] for key in ("summary", "completion")) or 2)
    whole = render(ROWS[name]) + b"\n"
    for options in OPTIONS:
        fits = options["n_responses"] <= needed and "max_query_tokens" not in options
        assert not fits or outcome(lambda options=options: read_rows((whole * 2, options)), None) == "loaded"
    fuzz(jsonl(ROWS[name]), read_rows, 100, memory=None)


MIXED = [None, True, False, 0, 0.5, 2**63, 1e300, math.inf, "9" * 30, "a"]


@pytest.mark.parametrize("path", [("target",), ("choice",), ("extra", "confidence")], ids="_".join)
def test_columns_of_mixed_types(read_rows, path):
    """What a data set's column must hold together: every pair of types and sizes, one in each of two rows."""
    base = {**ROWS["pair"], "target": 0.5}
    seen = Counter()
    for values in itertools.product(MIXED, MIXED):
        content = b"\n".join(render(put(base, path, value)) for value in values)
        seen[outcome(lambda content=content: read_rows((content, dict(n_responses=2))), memory=None)] += 1
    assert seen["loaded"] and seen["refused"]


# ---------------------------------------------------------------------------- configuration


STAGES = (sft, rm, ppo, dpo, sample, winrate, dpo_losses, grpo, kl_penalty, ppo_max, rloo, truly_ppo)
KEYS = sorted({key for stage in STAGES for key in stage.Config.__dataclass_fields__})
# values as they may stand behind `key =` in a file; none of them costs time to compute
LITERALS = ["1", "0", "-1", "1e-5", "1_000", "0x10", "1e999", "-1e999", "1e999 - 1e999", "10**400", "10**5000",
            "-10**5000", "1.5", "True", "None", "...", "1j", "''", "'cosine'", "'cpu'", "'a\\nb'", "'\\ud800'", "'\\0'",
            "b'a'", "[]", "[1, [2]]", "{}", "{1: 2}", "(1,)", "()", "lambda: 0", "lr", "seed * 2", "out_dir + '/x'",
            "nothing", "1 / 0", "'a' + 1", "[" * 150 + "]" * 150, "[" * 3000 + "]" * 3000, "-" * 3000 + "1",
            "'" + "a" * 3000 + "'", "", "1e", "'a", "(", "1 if", "é", "\ud800", "\x00", "0777",
            "__import__('numpy').zeros((2, 2))"]  # fmt: skip
ARGUMENTS = ["", "1", "0", "-1", "1e-5", "1_000", "\uff11", "0x10", "inf", "nan", "1e999", "9" * 5000, "true", "Off",
             "None", " 1 ", "cosine", "COSINE", "cpu", "a\nb", "\n", "\udcff", "é", "=", "--", "{split}"]  # fmt: skip
NAMES = st.sampled_from([*KEYS, "batchsize", "_own", "x", "é", "class"])


@st.composite
def config_files(draw):
    """The bytes of a config file of assignments, their values (or what stands between) damaged."""
    signs = st.sampled_from(["="] * 9 + ["==", ":", ": float =", "+=", " ", "= seed ="])
    assignment = st.builds("{} {} {}".format, NAMES, signs, st.sampled_from(LITERALS))
    line = st.one_of(assignment, assignment, st.sampled_from(["", "# é", '"""text"""', "import math", "  seed = 1"]))
    text = "".join(f"{part}\n" for part in draw(st.lists(line, max_size=3)))
    return text.encode("utf-8", "surrogatepass")


@st.composite
def valid_arguments(draw, stage):
    """--key=value with the default of the key."""
    default = stage.Config()
    keys = draw(st.lists(st.sampled_from(sorted(vars(default))), max_size=2))
    return [f"--{key}={getattr(default, key)}" for key in keys]


@st.composite
def arguments(draw):
    """A command line with one argument or two that have odd keys or values. None can hold a NUL byte."""
    stage = draw(st.sampled_from(STAGES))
    words = st.builds("{}{}{}{}".format, st.sampled_from(["--"] * 9 + ["-", "--no-", "---"]), NAMES,
                      st.sampled_from(["=", "=", "=", "", " ", "\n", "=="]), st.sampled_from(ARGUMENTS))  # fmt: skip
    odd = draw(st.lists(words | st.sampled_from(["-", "--", "--=1", "--\n", "-x\ny"]), max_size=2))
    return stage.Config, draw(valid_arguments(stage)) + odd


def test_config_file(tmp_path):
    """Every kind of literal, and text that is no Python, on the right of each field's name."""
    path = tmp_path / "config.py"

    def load(case):
        stage, content = case
        path.write_bytes(content)
        configure(stage.Config, [str(path)])

    assert outcome(lambda: load((sft, b"lr = 1e-5\nbatch_size = 8\n"))) == "loaded"
    fuzz(st.tuples(st.sampled_from(STAGES), config_files()), load, 400)


def test_command_line(tmp_path):
    """Keys and values that a shell can pass on: a text without NUL, with bytes that are no UTF-8 as surrogates."""
    assert outcome(lambda: configure(sft.Config, ["--lr=1e-5", "--scratch"])) == "loaded"
    fuzz(arguments(), lambda case: configure(*case), 500)


@pytest.mark.parametrize("name", ["none.py", "a\nb.py", "", "\udcff", "a" * 300, "directory"])
def test_config_path(tmp_path, name):
    """A path of a config file that is not there, or is no file."""
    (tmp_path / "directory").mkdir()
    assert outcome(lambda: configure(sft.Config, [str(tmp_path) + "/" + name])) == "refused"
