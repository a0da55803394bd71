"""What scores responses: reward models, or a function of texts. Each becomes a function of lists of ids

    score(queries, responses, indices) -> (rows,)

where indices are the rows of the data that the queries are of.
"""

import inspect

import torch

from configurator import require
from data import last_scalars, pick
from hub.rows import read_split
from model import ScalarModel
from runtime import load_model


def by_models(cfg, world, tokenizer, sources):
    """The mean of the reward models "a,b,c" (arXiv:1706.03741); a response is read at its last token."""
    models = []
    for source in sources.split(","):
        models.append(load_model(cfg, world, tokenizer.n_vocab, ScalarModel, source))

    def score(queries, responses, indices=None):
        return last_scalars(models, world.device, queries, responses)

    return score


def by_function(cfg, world, tokenizer, function):
    """function(texts, texts) -> floats, or with a third argument, which gets the data's rows as dicts."""
    parameters = inspect.signature(function).parameters
    needed = [parameter for parameter in parameters.values() if parameter.default is parameter.empty]
    takes_rows = "rows" in parameters or len(needed) > 2
    if takes_rows:
        rows = read_split(cfg.data, cfg.train_split)

    def score(queries, responses, indices):
        texts = (list(map(tokenizer.decode, queries)), list(map(tokenizer.decode, responses)))
        of_rows = [pick(rows, indices.tolist())] if takes_rows else []
        scores = list(map(float, function(*texts, *of_rows)))
        counts = f"{len(scores)} for {len(responses)} texts"
        require(len(scores) == len(responses), f"score gave {counts}; return one each")
        return torch.tensor(scores, device=world.device)

    return score
