"""Sampling for sample.py: responses to a split or to a prompt, and what is measured of them."""

import functools
import math
import sys

import numpy as np
import pandas

from configurator import require
from data import collate, last_scalars, uniforms
from evals.colour import coloured
from evals.tables import rouge
from model import GPTNeoX, ScalarModel
from runtime import generate_rows, load_model, load_split


def sample(cfg, world, tokenizer, model, queries, *key):
    """Responses to queries (lists of ids): lists of ids that end with EOS, unless cut off at response_length.

    key: numbers that, with cfg.seed, decide the tokens drawn.
    """
    draws = uniforms((len(queries), cfg.response_length), cfg.seed, *key)
    eos_id = tokenizer.eos_id
    responses, _ = generate_rows(cfg, world, model, queries, draws, eos_id, tokenizer.n_vocab, cfg.micro_batch_size)
    rows = responses.tolist()
    return [row[: row.index(eos_id) + 1] if eos_id in row else row for row in rows]


def measure(cfg, world, function, queries, responses):
    """Apply function(queries, responses) -> (rows,) to micro-batches of all rows; returns a list of n floats."""

    def apply(indices):
        values = function([queries[i] for i in indices], [responses[i] for i in indices])
        return {"values": values}

    lengths = [len(query) + len(response) for query, response in zip(queries, responses)]
    return world.map_rows(apply, lengths, cfg.micro_batch_size)["values"].tolist()


def reward_function(cfg, world, tokenizer, sources):
    """A function of queries and responses (lists of ids) -> rewards (rows,): the mean of reward models "a,b,c"."""
    models = []
    for source in sources.split(","):
        models.append(load_model(cfg, world, tokenizer.n_vocab, ScalarModel, source))
    return functools.partial(last_scalars, models, world.device)


def log_ratios(model, reference, device, temperature, n_vocab, queries, responses):
    """log p - log p_reference of each token: (B, R), 0 behind a response. A row's sum estimates the KL, in nats.

    Greedy responses (temperature 0) are no samples: theirs is the log-ratio at temperature 1.
    """
    ids, select, targets, mask = collate(queries, responses, device)
    options = (temperature or 1.0, n_vocab)
    logprobs = model.logprobs(ids, select, targets, *options)
    ref_logprobs = reference.logprobs(ids, select, targets, *options)
    return (logprobs - ref_logprobs) * mask


def best_of(n, scores, responses, eos_id):
    """Of n rounds of responses to the same queries, the best to each by score; without EOS there is none (detail 13).

    By arXiv:2009.01325 such a policy's KL to the one that is sampled from is at most log n - (n - 1) / n.
    """
    ends = [row[-1] == eos_id for row in responses]
    rounds = np.where(ends, scores, -np.inf).reshape(n, -1)
    n_queries = rounds.shape[1]
    return [responses[best * n_queries + query] for query, best in enumerate(rounds.argmax(0))]


def evaluate(cfg, world, tokenizer, source):
    """Sample from one model for a split; returns (one dict per row, the summary), the same on every rank."""
    model = load_model(cfg, world, tokenizer.n_vocab, GPTNeoX, source)
    rows = load_split(cfg, world, tokenizer, cfg.data, cfg.split, n_responses=1)[:]
    queries = rows["query"]
    references = [responses[0] for responses in rows["responses"]]
    responses = sample(cfg, world, tokenizer, model, queries * cfg.best_of)
    reward = None
    if cfg.reward_model:
        reward = reward_function(cfg, world, tokenizer, cfg.reward_model)
    if cfg.best_of > 1:
        scores = measure(cfg, world, reward, queries * cfg.best_of, responses)
        responses = best_of(cfg.best_of, scores, responses, tokenizer.eos_id)

    frame = pandas.DataFrame()
    for name, lists in {"query": queries, "response": responses, "reference": references}.items():
        frame[name] = [tokenizer.decode(ids) for ids in lists]
    frame["tokens"] = [len(ids) for ids in responses]
    frame["reference_tokens"] = [len(ids) for ids in references]
    frame["length_ratio"] = frame["tokens"] / frame["reference_tokens"]
    frame["eos"] = [ids[-1] == tokenizer.eos_id for ids in responses]
    if reward is not None:
        frame["score"] = measure(cfg, world, reward, queries, responses)
        frame["reference_score"] = measure(cfg, world, reward, queries, references)
    if cfg.reference:
        reference = load_model(cfg, world, tokenizer.n_vocab, GPTNeoX, cfg.reference)
        ratios = functools.partial(log_ratios, model, reference, world.device, cfg.temperature, tokenizer.n_vocab)
        frame["kl"] = measure(cfg, world, lambda *lists: ratios(*lists).sum(1), queries, responses)
        for number in range(min(cfg.compare, len(queries))):
            text = compare(tokenizer, ratios, queries[number], responses[number])
            world.print("", frame["query"][number], text)

    summary = {"n": len(frame), **frame.mean(numeric_only=True)}
    if cfg.best_of > 1:
        summary["kl_bound"] = math.log(cfg.best_of) - (cfg.best_of - 1) / cfg.best_of
    summary.update(rouge(frame["reference"], frame["response"]))
    world.print(source, *(f"{name:18} {value:10.4f}" for name, value in summary.items()))
    return frame.to_dict("records"), {"model": source, **summary}


def compare(tokenizer, ratios, query, response):
    """The response's text for a terminal: tokens that the model finds likelier than the reference does on green."""
    numbers = ratios([query], [response])[0]
    return coloured(tokenizer, response, numbers.tolist()) + f" {numbers.sum():+.2f} nats"


def complete(cfg, world, tokenizer):
    """Print a response to cfg.prompt, or to each line of stdin, where \\n stands for a line break."""
    require(world.size == 1, "a prompt is for one process; start it without torchrun")
    model = load_model(cfg, world, tokenizer.n_vocab, GPTNeoX, cfg.model)
    if cfg.compare:
        reference = load_model(cfg, world, tokenizer.n_vocab, GPTNeoX, cfg.reference)
        ratios = functools.partial(log_ratios, model, reference, world.device, cfg.temperature, tokenizer.n_vocab)
    texts = [cfg.prompt]
    if cfg.prompt == "-":
        texts = (line.rstrip("\n").replace("\\n", "\n") for line in sys.stdin)
    for number, text in enumerate(filter(str.strip, texts)):
        query = tokenizer.encode(text)
        response = sample(cfg, world, tokenizer, model, [query], number)[0]
        if cfg.compare:
            world.print(compare(tokenizer, ratios, query, response))
        else:
            world.print(tokenizer.decode(response))
