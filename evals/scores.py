"""What scores responses: reward models, or a function of texts. Each becomes a function of lists of ids

    score(queries, responses, indices) -> (rows,)

where indices are the rows of the data that the queries are of.
"""

import importlib
import inspect

import torch

from configurator import explain, require
from data import last_scalars, pick
from hub.files import split_names
from hub.reader import read_split
from model import ScalarModel
from runtime import load_model


def mean(rewards):
    """Rewards (models, B) -> (B,). (arXiv:1706.03741)"""
    return sum(rewards) / len(rewards)


def by_models(cfg, world, tokenizer, sources, combine=mean):
    """The reward models "a,b,c", their rewards (models, B) made one by `combine`; a response is read at its last token.
    """
    models = []
    for source in split_names(sources):
        models.append(load_model(cfg, world, tokenizer, ScalarModel, source))

    def score(queries, responses, indices=None):
        rewards = [last_scalars([model], world.device, queries, responses) for model in models]
        return combine(torch.stack(rewards))

    return score


def from_module(name):
    """The function `score` of a Python module, such as toy.sums."""
    with explain(f"scorer {name!r}: not a module with a function `score`", Exception):
        return importlib.import_module(name).score


def by_function(cfg, world, data, function, split=""):
    """function(texts, texts) -> floats, or with a third argument, which gets the data's rows as dicts.

    split: which one data.train is of; empty: cfg.train_split.
    """
    decode = data.tokenizer.decode
    parameters = inspect.signature(function).parameters
    needed = [name for name, kind in parameters.items() if kind.default is kind.empty]
    # f(queries, responses, rows) or f(queries, responses, rows=None); not f(queries, responses, scale=1.0)
    takes_rows = "rows" in parameters or len(needed) > 2
    if takes_rows:
        rows = [row for _, row in read_split(cfg.data, split or cfg.train_split)]

    def score(queries, responses, indices):
        queries = list(map(decode, queries))
        texts = list(map(decode, responses))
        arguments = [queries, texts]
        if takes_rows:
            # Long rows may have been left out: `index` is that of the row in the file.
            arguments.append(pick(rows, data.train[indices]["index"]))
        try:
            found = function(*arguments)
        except Exception as error:
            error.is_of_user = True  # no trouble with out_dir or memory: `stage` lets it pass as it is
            raise
        with explain("score gave no list of numbers; return one for each text", TypeError, ValueError):
            scores = list(map(float, found))
        counts = f"{len(scores)} for {len(responses)} texts"
        require(len(scores) == len(responses), f"score gave {counts}; return one each")
        return torch.tensor(scores, device=world.device)

    return score
