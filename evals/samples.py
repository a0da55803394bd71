"""Sampling for sample.py: responses to a split or to a prompt, and what is measured of them."""

import functools
import math
import sys

import numpy as np

import runtime
from configurator import require
from data import collate, last_scalars, uniforms
from evals.colour import coloured
from evals.tables import rouge
from model import GPTNeoX, ScalarModel


def sample(run, cfg, model, queries, *key):
    """Responses to queries (lists of ids): lists of ids that end with EOS, unless cut off at response_length.

    key: numbers that, with cfg.seed, decide the tokens drawn.
    """
    draws = uniforms((len(queries), cfg.response_length), cfg.seed, *key)
    eos_id, size = run.tokenizer.eos_id, cfg.micro_batch_size
    rows = runtime.generate_rows(run, model, queries, draws, cfg.temperature, eos_id, size)[0].tolist()
    return [row[: row.index(eos_id) + 1] if eos_id in row else row for row in rows]


def measure(run, cfg, function, queries, responses):
    """Apply function(queries, responses) -> (rows,) to micro-batches of all rows; returns a list of n floats."""

    def apply(index):
        return {"x": function([queries[i] for i in index], [responses[i] for i in index])}

    lengths = [len(query) + len(response) for query, response in zip(queries, responses)]
    return run.map_rows(apply, lengths, cfg.micro_batch_size)["x"].tolist()


def log_ratios(model, reference, device, temperature, n_vocab, queries, responses):
    """log p - log p_reference of each token: (B, R), 0 behind a response. A row's sum estimates the KL, in nats.

    Greedy responses (temperature 0) are no samples: theirs is the log-ratio at temperature 1.
    """
    ids, select, targets, mask = collate(queries, responses, device)
    ours, theirs = (m.logprobs(ids, select, targets, temperature or 1.0, n_vocab) for m in (model, reference))
    return (ours - theirs) * mask


def compare(run, cfg, model, reference, query, response):
    """The response's text for a terminal: tokens that the model finds likelier than the reference does on green."""
    ratios = log_ratios(model, reference, run.device, cfg.temperature, run.tokenizer.n_vocab, [query], [response])[0]
    return coloured(run.tokenizer, response, ratios.tolist()) + f" {ratios.sum():+.2f} nats"


def best_of(n, scores, responses, eos_id):
    """Of n rounds of responses to the same queries, the best to each by score; without EOS there is none (detail 13).

    By arXiv:2009.01325 such a policy's KL to the one that is sampled from is at most log n - (n - 1) / n.
    """
    ends = [row[-1] == eos_id for row in responses]
    best = np.where(ends, scores, -np.inf).reshape(n, -1).argmax(0)
    return [responses[k * len(best) + i] for i, k in enumerate(best)]


def evaluate(run, cfg, source):
    """Sample from one model for a split; returns (one dict per row, the summary), the same on every rank."""
    model = runtime.load_model(run, GPTNeoX, source)
    tokenizer, rows = run.tokenizer, run.load(cfg.data, cfg.split, n_responses=1)[:]
    queries, references = rows["query"], [responses[0] for responses in rows["responses"]]
    reward_models = [runtime.load_model(run, ScalarModel, name) for name in filter(None, cfg.reward_model.split(","))]
    score, n = functools.partial(last_scalars, reward_models, run.device), cfg.best_of
    responses = sample(run, cfg, model, queries * n)
    if n > 1:
        responses = best_of(n, measure(run, cfg, score, queries * n, responses), responses, tokenizer.eos_id)
    ids = {"query": queries, "response": responses, "reference": references}
    columns = {name: [tokenizer.decode(row) for row in column] for name, column in ids.items()}
    columns |= {"tokens": [len(row) for row in responses], "reference_tokens": [len(row) for row in references]}
    columns["length_ratio"] = [tokens / of for tokens, of in zip(columns["tokens"], columns["reference_tokens"])]
    columns["eos"] = [row[-1] == tokenizer.eos_id for row in responses]
    if reward_models:
        columns["score"] = measure(run, cfg, score, queries, responses)
        columns["reference_score"] = measure(run, cfg, score, queries, references)
    if cfg.reference:
        anchor = runtime.load_model(run, GPTNeoX, cfg.reference)
        ratios = functools.partial(log_ratios, model, anchor, run.device, cfg.temperature, tokenizer.n_vocab)
        columns["kl"] = measure(run, cfg, lambda *rows: ratios(*rows).sum(1), queries, responses)
        for text, query, response in zip(columns["query"][: cfg.compare], queries, responses):
            run.print("", text, compare(run, cfg, model, anchor, query, response))
    means = {name: float(np.mean(column)) for name, column in columns.items() if name not in ids}
    bound = {"kl_bound": math.log(n) - (n - 1) / n} if n > 1 else {}
    summary = {"n": len(queries), **means, **bound, **rouge(columns["reference"], columns["response"])}
    run.print(source, *(f"{name:18} {value:10.4f}" for name, value in summary.items()))
    return [dict(zip(columns, values)) for values in zip(*columns.values())], {"model": source, **summary}


def complete(run, cfg):
    """Print a response to cfg.prompt, or to each line of stdin, where \\n stands for a line break."""
    require(run.size == 1, "a prompt is for one process; start it without torchrun")
    model = runtime.load_model(run, GPTNeoX, cfg.model)
    anchor = cfg.compare and runtime.load_model(run, GPTNeoX, cfg.reference)
    texts = (line.rstrip("\n").replace("\\n", "\n") for line in sys.stdin) if cfg.prompt == "-" else [cfg.prompt]
    for number, text in enumerate(filter(str.strip, texts)):
        query = run.tokenizer.encode(text)
        response = sample(run, cfg, model, [query], number)[0]
        run.print(compare(run, cfg, model, anchor, query, response) if anchor else run.tokenizer.decode(response))
