"""The pairs of a round of variants/online_rlhf.py, in a file: two responses to each prompt, then a label for each pair.

A line is {"prompt", "responses": [first, second], "target": P(the first is better)}; target is null until there is one.
"""

import os
from dataclasses import replace

import numpy as np

from configurator import UserError, explain, require
from data import batch_indices, pick
from evals.samples import sample
from hub.files import read_jsonl, write_jsonl
from hub.table import target_of
from hub.tokenizer import Tokenizer
from model import GPTNeoX
from runtime import Done, load_model, load_split
from variants import ensemble, labellers

TARGET = '"target": 1 if the first response is the better one, 0 if the second, 0.5 for a tie'


def sample_pairs(cfg, world, path, number, policy, members):
    """Write the rows that are to be labelled in round `number`, unless they are there.

    policy, members: directories of the models that sample, and that choose which pairs are labelled.
    """
    if world.agree_on(path.exists()):
        return
    cfg = replace(cfg, micro_batch_size=cfg.rollout_micro_batch_size)  # no pass here has gradients
    tokenizer = Tokenizer.load(cfg.model)
    model = load_model(cfg, world, tokenizer, GPTNeoX, policy)
    prompts = load_split(cfg, world, tokenizer, cfg.data, cfg.train_split, n_responses=0)
    indices = batch_indices(len(prompts), cfg.pool, number - 1, cfg.seed)  # each round has others
    queries = prompts[indices]["query"]
    firsts = sample(cfg, world, tokenizer, model, queries, number, 0)
    seconds = sample(cfg, world, tokenizer, model, queries, number, 1)

    rows = []
    for query, *both in zip(queries, firsts, seconds):
        responses = list(map(tokenizer.decode, both))
        # Between equal texts there is nothing to choose.
        if responses[0] != responses[1]:
            prompt = tokenizer.decode(query)
            rows.append({"prompt": prompt, "responses": responses, "target": None})
    require(rows, f"round {number}: no two responses differ; raise pool, or temperature")
    if members and cfg.choose == "disagreement":
        margins = ensemble.margins_of(cfg, world, members, rows)
        order = np.argsort(-ensemble.disagreement(margins), kind="stable")
        rows = pick(rows, order)
    world.print(f"round {number}: {len(rows)} of {cfg.pool} pairs differ; labels: {cfg.n_labels}")
    write_whole(world, path, rows[: cfg.n_labels])


def label_pairs(world, path, label):
    """The rows of a file, after those without a target have got one; a row of which nobody can say is left out.

    label: see variants/labellers.py; None stands for people, for whom the run stops.
    """
    rows = world.agree_on(read_jsonl(path))  # as long as rank 0 has not written it anew
    waiting = [row for row in rows if row.get("target") is None]
    if waiting and label is None:
        task = f"give each a {TARGET}, or delete its line; then run the same command again"
        world.print(f"{path}: {len(waiting)} of {len(rows)} pairs have no label; {task}")
        raise Done
    if waiting:
        labellers.ask(label, waiting)
        rows = [row for row in rows if row["target"] is not None]
        write_whole(world, path, rows)

    require(rows, f"{path}: no pair has a label; ask another labeller, or raise pool")
    for number, row in enumerate(rows, 1):
        with explain(f"{path}: line {number}", UserError):
            target_of(row)
    return rows


def write_whole(world, path, rows):
    """Write a file that is complete or not there; all processes wait for it."""
    if world.is_main:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_jsonl(f"{path}.tmp", rows)
        os.replace(f"{path}.tmp", path)
    world.agree_on(None)
