"""Sampling for sample.py: responses to a split or to a prompt, and what is measured of them."""

import functools
import math
import sys

import numpy as np

from configurator import require
from data import collate, join, pick, uniforms
from evals import scores
from evals.colour import coloured, pieces
from evals.tables import rouge
from hub.reader import has_split
from model import GPTNeoX
from runtime import generate_rows, load_model, load_split


def evaluate(cfg, world, tokenizer, source):
    """Sample from one model for a split; returns (one dict per row, the summary), the same on every rank."""
    import pandas  # here, since it takes a second; datasets brings it

    load = functools.partial(load_model, cfg, world, tokenizer)
    model = load(GPTNeoX, source)
    rows = load_split(cfg, world, tokenizer, cfg.data, split_of(cfg), n_responses=0, ranked=True)
    queries = list(rows["query"])
    references = [responses[0] for responses in rows["responses"] if responses]
    has_references = len(references) == len(queries)
    if not has_references:
        world.print(f"{len(queries) - len(references)} of {len(queries)} rows have no reference: no ROUGE")
    responses = sample(cfg, world, tokenizer, model, queries * cfg.best_of)
    if cfg.reward_model:
        reward = scores.by_models(cfg, world, tokenizer, cfg.reward_model)
    if cfg.best_of > 1:  # sample.py has seen to a reward model
        rewards = measure(cfg, world, reward, queries * cfg.best_of, responses)
        responses = pick_best(cfg.best_of, rewards, responses, tokenizer.eos_id)

    frame = pandas.DataFrame()
    frame["query"] = list(map(tokenizer.decode, queries))
    frame["response"] = list(map(tokenizer.decode, responses))
    if has_references:
        frame["reference"] = list(map(tokenizer.decode, references))
    frame["tokens"] = list(map(len, responses))
    if has_references:
        frame["reference_tokens"] = list(map(len, references))
        frame["length_ratio"] = frame["tokens"] / frame["reference_tokens"]
    frame["eos"] = [ids[-1] == tokenizer.eos_id for ids in responses]
    if cfg.reward_model:
        frame["score"] = measure(cfg, world, reward, queries, responses)
    if cfg.reward_model and has_references:
        frame["reference_score"] = measure(cfg, world, reward, queries, references)
    if cfg.reference:
        ratios = ratio_function(cfg, world, tokenizer, model, load(GPTNeoX, cfg.reference))

        def kl(queries, responses):
            return ratios(queries, responses).sum(1)

        frame["kl"] = measure(cfg, world, kl, queries, responses)
    rows = frame.to_dict("records")
    for row, query, response in list(zip(rows, queries, responses))[: cfg.compare]:
        numbers = ratios([query], [response])[0].tolist()
        row["token_kl"] = list(zip(pieces(tokenizer, response), numbers))
        world.print("", row["query"], compare(tokenizer, response, numbers))

    summary = {"n": len(frame)}
    summary.update(frame.mean(numeric_only=True))
    if cfg.best_of > 1:
        # arXiv:2009.01325: how far best-of-n as a policy is from the one that is sampled from, at most.
        n = cfg.best_of
        summary["kl_bound"] = math.log(n) - (n - 1) / n
    if has_references:
        summary.update(rouge(frame["reference"], frame["response"]))
    world.print(source)
    for name, value in summary.items():
        world.print(f"{name:18} {value:10.4f}")
    return rows, {"model": source, **summary}


def split_of(cfg):
    """The split to sample for: by default the held-out one, if a file holds such."""
    if cfg.split:
        return cfg.split
    return "validation" if has_split(cfg.data, "validation") else "train"


def sample(cfg, world, tokenizer, model, queries, *key):
    """Responses to queries (lists of ids): lists of ids that end with EOS, unless cut off at response_length.

    key: numbers that, with cfg.seed, decide the tokens drawn.
    """
    shape = (len(queries), cfg.response_length)
    draws = uniforms(shape, cfg.seed, *key)
    eos_id = tokenizer.eos_id
    n_rows = cfg.micro_batch_size
    tokens, _ = generate_rows(cfg, world, model, queries, draws, eos_id, tokenizer.n_vocab, n_rows)
    responses = []
    for ids in tokens.tolist():
        if eos_id in ids:
            ids = ids[: ids.index(eos_id) + 1]
        responses.append(ids)
    return responses


def measure(cfg, world, function, queries, responses):
    """Apply function(queries, responses) -> (rows,) to micro-batches of all rows; returns a list of n floats."""

    def measure_some(indices):
        return {"values": function(pick(queries, indices), pick(responses, indices))}

    lengths = list(map(len, join(queries, responses)))
    columns = world.map_rows(measure_some, lengths, cfg.micro_batch_size)
    return columns["values"].tolist()


def ratio_function(cfg, world, tokenizer, model, reference):
    """A function of queries and responses (lists of ids) -> log p - log p_reference of each token (B, R), 0 after a
    response. A row's sum estimates the KL, in nats.

    Greedy responses (temperature 0) are no samples: theirs is the log-ratio at temperature 1.
    """

    def ratios(queries, responses):
        ids, select, targets, mask = collate(queries, responses, world.device)
        temperature = cfg.temperature or 1.0
        options = {"temperature": temperature, "n_vocab": tokenizer.n_vocab}
        logprobs = model.logprobs(ids, select, targets, **options)
        ref_logprobs = reference.logprobs(ids, select, targets, **options)
        return (logprobs - ref_logprobs) * mask

    return ratios


def pick_best(n, rewards, responses, eos_id):
    """Of n rounds of responses to the same queries, the best to each by reward.

    A response without EOS is taken only where all are so: its reward means nothing (detail 13).
    """
    ends = [ids[-1] == eos_id for ids in responses]
    rounds = np.where(ends, rewards, -np.inf).reshape(n, -1)  # (n, queries)
    n_queries = rounds.shape[1]
    # A round's responses stand together: its q-th is at round * n_queries + q.
    best = rounds.argmax(0) * n_queries + np.arange(n_queries)
    return pick(responses, best)


def compare(tokenizer, response, numbers):
    """The response's text for a terminal: tokens that the model finds likelier than the reference does on green."""
    text = coloured(tokenizer, response, numbers)
    return f"{text} {sum(numbers):+.2f} nats"


def complete(cfg, world, tokenizer):
    """Print a response to cfg.prompt, or to each line of stdin, where \\n stands for a line break."""
    require(world.size == 1, "a prompt is for one process; start it without torchrun")
    load = functools.partial(load_model, cfg, world, tokenizer, GPTNeoX)
    model = load(cfg.model)
    if cfg.compare:
        ratios = ratio_function(cfg, world, tokenizer, model, load(cfg.reference))
    for number, text in enumerate(prompts(cfg)):
        query = tokenizer.encode(text)
        response = sample(cfg, world, tokenizer, model, [query], number)[0]
        if cfg.compare:
            numbers = ratios([query], [response])[0].tolist()
            world.print(compare(tokenizer, response, numbers))
        else:
            world.print(tokenizer.decode(response))


def prompts(cfg):
    if cfg.prompt != "-":
        yield cfg.prompt
        return
    for line in sys.stdin:
        if line.strip():
            yield line.rstrip("\n").replace("\\n", "\n")
