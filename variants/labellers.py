"""Who says which of two responses is better, for variants/online_rlhf.py: a judge, or the toy's labellers, who err.

A labeller is a function label(queries, firsts, seconds) of lists of texts. It returns for each pair the probability
that the first response is the better one, 0.5 for a tie, and None where it cannot say.
"""

import numpy as np

from configurator import require
from evals.winrate import judge_pairs
from toy import gold, make_data


def by_name(cfg, world, number):
    """The function that cfg.labeller names, for this round; None stands for people."""
    if cfg.labeller == "people":
        return None
    if cfg.labeller == "toy.gold":
        return by_toy(cfg.seed, number)
    return by_judge(cfg, world)


def by_toy(seed, number):
    """Labels 1.0 and 0.0 by gold, wrong as often as those of toy/make_data.py. Draws depend on seed, round and row."""

    def label(queries, firsts, seconds):
        golds = zip(gold.score(queries, firsts), gold.score(queries, seconds))
        draws = np.random.default_rng((seed, number)).random(len(queries))
        targets = []
        for draw, (first, second) in zip(draws, golds):
            prefers_first = draw < make_data.prob_first(first, second)
            targets.append(float(prefers_first))
        return targets

    return label


def by_judge(cfg, world):
    """A judge of evals/winrate.py: a model behind an endpoint, a reward model, a module."""

    def label(queries, firsts, seconds):
        verdicts, _ = judge_pairs(cfg, world, cfg.labeller, for_judges(queries, firsts, seconds))
        return verdicts

    return label


def for_judges(queries, firsts, seconds):
    """The pairs as evals/winrate.py takes them: the first is the response, the second the other."""
    pairs = []
    for query, first, second in zip(queries, firsts, seconds):
        pair = {"query": query, "response": first, "other": second, "choice": None}
        pair["prompt"] = ("completion", {"prompt": query})
        pairs.append(pair)
    return pairs


def texts_of(rows):
    """The columns of rows as in variants/pairs.py: queries, firsts, seconds."""
    queries = [row["prompt"] for row in rows]
    firsts = [row["responses"][0] for row in rows]
    seconds = [row["responses"][1] for row in rows]
    return queries, firsts, seconds


def ask(label, rows):
    """Enter each row's target; rows: see variants/pairs.py."""
    targets = label(*texts_of(rows))
    counts = f"{len(targets)} for {len(rows)} pairs"
    require(len(targets) == len(rows), f"label gave {counts}; return one each")
    for row, target in zip(rows, targets):
        row["target"] = target
