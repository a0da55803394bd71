"""From rows to batches: the query format, tokenised data sets, and which rows make up which step.

    tokenizer = Tokenizer.load("EleutherAI/pythia-160m")
    rows = load_rows("vwxyzjn/summarize_from_feedback_tldr_3_filtered", "train", tokenizer, n_responses=1)
    rows[0]["query"], rows[0]["responses"]         # token ids; each response ends with EOS

A row of any known schema (hub/rows.py) becomes one query, a post cut to its length (hub/queries.py), and its responses,
the best first (hub/table.py). A preference may carry `target`, the probability that its first response is the better
one (0.5 is a tie); below 0.5 the responses are taken in reverse.
"""

import functools

import numpy as np
import torch

# Notebooks and stages take these from here.
from hub.queries import format_query  # noqa: F401
from hub.table import load_rows, parse_row  # noqa: F401
from hub.tokenizer import Tokenizer  # noqa: F401


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
        order = permutation(n_rows, seed, epoch)
        indices.append(order[place % n_rows])
    return np.array(indices)


def uniforms(shape, *key):
    """Random numbers in [0, 1), float64, a pure function of `key`, for example (seed, step).

    The first 24 bits are one draw, the others a second: ids less likely than 2^-24 have their share of these.
    """
    generator = np.random.default_rng(key)
    coarse = generator.random(shape, dtype=np.float32)
    fine = generator.random(shape)
    return torch.from_numpy(coarse + 2.0**-24 * fine)


def pad_right(id_lists):
    """Lists of ids -> ids (B, T) of the longest one's length; lengths (B,). What fills up the others is never read."""
    rows = [torch.tensor(ids) for ids in id_lists]
    lengths = torch.tensor([len(ids) for ids in id_lists])
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return padded, lengths


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
    tensors = (ids, select, targets, mask)
    return [tensor.to(device) for tensor in tensors]


def join(queries, responses):
    return [query + response for query, response in zip(queries, responses)]


def pick(lists, indices):
    """The lists at these positions."""
    return [lists[index] for index in indices]


class Rows:
    """Rows in memory, like those of a data set: rows["length"] is a column, rows[indices] are a dict of columns.

    (A selection of a data set stays on the disk; to make one takes milliseconds, which a small model has not.)
    """

    def __init__(self, columns):
        self.columns = columns

    def __getitem__(self, key):
        if isinstance(key, str):
            return self.columns[key]
        return {name: pick(column, key) for name, column in self.columns.items()}


def last_scalars(models, device, queries, responses):
    """Values (B,), the mean over models, at the last token of query + response: EOS, if there is one (detail 12)."""
    ids, lengths = pad_right(join(queries, responses))
    ids = ids.to(device)
    last = lengths[:, None].to(device) - 1
    scalars = [model(ids, last)[:, 0] for model in models]
    return sum(scalars) / len(models)
