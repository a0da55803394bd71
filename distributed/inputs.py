"""What a run is made from besides its configuration: rows, tokenizer, weights, functions.

Rank 0 reads the rows first. To resume a run with others of any of these is refused.
"""

import contextlib
import functools
import hashlib
import inspect
import json
from pathlib import Path

import pyarrow

from configurator import explain, require
from data import load_rows
from hub.config import GPTNeoXConfig
from hub.fetch import find_model
from hub.files import read_json, split_names, write_json
from hub.reader import has_split, read_split
from hub.weights import weight_files


def load_splits(cfg, world, tokenizer, **options):
    """The rows to train on, and those that are held out: None without an eval_split, or if `data` has no splits."""
    train = load_split(cfg, world, tokenizer, cfg.data, cfg.train_split, **options)
    held_out = None
    if cfg.eval_split and has_split(cfg.data, cfg.eval_split):
        held_out = load_split(cfg, world, tokenizer, cfg.data, cfg.eval_split, **options)
    elif cfg.eval_split:
        mend = "--train_split=train[:90%] --eval_split=train[90%:] would do so"
        world.print(f"{cfg.data}: without {{split}} in its path no rows are held out, and none evaluated; {mend}")
    return train, held_out


def load_split(cfg, world, tokenizer, source, split, n_responses, **options):
    """`load_rows` with the limits of the configuration and of the model, on rank 0 first."""
    options.setdefault("max_query_tokens", cfg.max_query_tokens)

    def load():
        directory = find_model(split_names(cfg.model)[0], patterns=["config.json"])
        limit = GPTNeoXConfig.from_directory(directory).max_position_embeddings
        if n_responses == 0:
            limit -= getattr(cfg, "response_length", 0)  # the responses are still to come
        require(limit > 0, f"response_length: {directory} has no positions left for a query; lower it")

        longest = options.pop("max_length", getattr(cfg, "max_length", 0)) or limit
        return load_rows(source, split, tokenizer, n_responses, min(limit, longest), too_long=cfg.too_long, **options)

    return world.main_first(load)


def check_inputs(cfg, world, data, models, functions):
    """Compare with what out_dir/config.json says that the run began with; a new run is entered there.

    models: {the name of a field: its sources, as in --reward_model=a,b}. functions: {the name of a door: what came
    through it}. Raises UserError that names what is another one.
    """
    compare(cfg, world, fingerprints(cfg, data, models, functions) if world.is_main else None)


def check_rows(cfg, world, name, rows):
    """The same for further rows: those of the field `name`."""
    compare(cfg, world, {name: fingerprint_rows(rows)} if world.is_main else None)


def compare(cfg, world, inputs):
    """inputs: {name: digest}, on rank 0."""
    inputs = world.agree_on(inputs)
    path = Path(cfg.out_dir) / "config.json"
    stored = read_json(path)
    was = stored.get("inputs", {})
    changed = sorted(name for name in inputs if was.get(name, inputs[name]) != inputs[name])
    mend = "choose another out_dir, or go on knowingly with --accept_changes"
    found = f"{cfg.out_dir} holds a run that began with another {', another '.join(changed)}"
    require(not changed or cfg.accept_changes, f"{found}; {mend}")
    if world.is_main:
        write_json(path, {**stored, "inputs": {**was, **inputs}})


def fingerprints(cfg, data, models, functions):
    inputs = {"train_split": fingerprint_rows(data.train)}
    if data.held_out:
        inputs["eval_split"] = fingerprint_rows(data.held_out)
    if functions.get("score") is not None:
        # It may look at any column.
        inputs["data"] = read_split(cfg.data, cfg.train_split).fingerprint[:16]
    tokens = sorted(data.tokenizer.vocabulary.items())
    inputs["tokenizer"] = short(hashlib.sha256(repr([tokens, data.tokenizer.eos_id]).encode()))
    from_scratch = getattr(cfg, "scratch", False)
    for field, sources in models.items():
        marks = [fingerprint_model(source, from_scratch) for source in split_names(sources)]
        inputs[field] = ",".join(marks)
    for door, function in functions.items():
        inputs[door] = describe(function)
    return inputs


def short(digest):
    return digest.hexdigest()[:16]


def fingerprint_rows(rows):
    """A digest of the token ids, whichever file and code they come from."""
    digest = hashlib.sha256()
    table = rows.with_format("arrow")[:]
    for name in ("query", "responses", "length", "target"):
        values = table[name].combine_chunks()
        while pyarrow.types.is_list(values.type):
            values = values.flatten()
        digest.update(values.to_numpy())
    return short(digest)


def fingerprint_model(source, scratch=False):
    """A digest of config.json and of the weights, if they are read."""
    directory = find_model(source)
    digest = hashlib.sha256(json.dumps(read_json(f"{directory}/config.json")).encode())
    if not scratch:
        for path in sorted(set(weight_files(directory).values())):
            with explain(f"{path}: cannot be read", OSError), open(path, "rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return short(digest)


def describe(function):
    """A function's name, and a digest of its source and of what it holds: two lambdas have one name.

    Other functions and values that it looks up by name are not seen.
    """
    if function is None:
        return None
    held = what_it_holds(function)
    function = getattr(function, "func", function)  # of a functools.partial
    if not hasattr(function, "__qualname__"):
        function = type(function)  # of an object that can be called
    try:
        source = inspect.getsource(function)
    except (OSError, TypeError):
        source = ""  # typed in by hand
    digest = hashlib.sha256(source.encode() + held.encode())
    return f"{function.__qualname__} {short(digest)}"


def what_it_holds(function):
    """The values in a function: arguments of a functools.partial, a closure's, constants, an object's."""
    held = []
    if isinstance(function, functools.partial):
        held += [*function.args, *function.keywords.items()]
        function = function.func
    held.append(getattr(function, "__code__", None))
    owner = getattr(function, "__self__", function)  # of a method
    held += getattr(owner, "__dict__", {}).items()
    # A cell may be empty still.
    with contextlib.suppress(ValueError):
        for cell in getattr(function, "__closure__", None) or ():
            held.append(cell.cell_contents)
    return repr(plain(tuple(held)))


def plain(value):
    """A number, a text, or a tuple of such; of a code object its constants. Of anything else only the type counts: its
    text is another one in the next process, and a list or a dict may be a cache that the run fills.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, tuple):
        return tuple(map(plain, value))
    return plain(getattr(value, "co_consts", type(value).__qualname__))
