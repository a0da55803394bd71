"""Which of two responses to the same query is better? Judges decide; win rates with intervals, also by length.

    python sample.py --judge=out/rm/final --samples=out/ppo/samples/samples.jsonl           # against the references
    python sample.py --judge=toy.gold --samples=out/ppo/samples/samples.jsonl,out/dpo/samples/samples.jsonl
    python sample.py --judge=https://api.openai.com/v1#gpt-4o-mini,out/rm/final --samples=... --out_dir=out/judged
    python sample.py --judge=choice,out/rm/final --samples=comparisons_validation.jsonl

A judge is one of

    URL#model       a model behind an OpenAI-compatible endpoint; the key is in OPENAI_API_KEY (evals/chat.py)
    a/directory     a reward model, or its hub id; a response is read as if it had ended
    a.module        a Python module with score(query texts, response texts) -> floats, such as toy.gold
    choice          the labels that the comparisons carry

Samples are files that sample.py has written: one, whose responses meet its references, or two for the same split, the
first meeting the second. Or one file of comparisons (`info, summaries, choice`): there the summary by `ref` is the
reference, and the other is the response; rows without exactly one `ref` are left out, and so are those with a choice
of null: nobody could compare their summaries.

Prints win, tie and lose, the win rate (a tie counts half) with its 95 % bootstrap interval, the same by length of
the response relative to the other (in words; in letters where a script has no blanks), the win rate at equal length,
and for several judges how often two of them agree. With out_dir: winrate.json, verdicts.jsonl (a row per pair) and,
for endpoints, replies.sqlite, from which a stopped run goes on. An endpoint of which no reply has a clear verdict is
an error.
"""

import importlib
import itertools
import os
import types
from dataclasses import dataclass

import numpy as np

from configurator import Count, UserError, configure, explain, require
from data import format_query, parse_row
from evals import chat
from evals.samples import measure
from evals.scores import by_models
from evals.tables import count_words
from hub.files import read_jsonl, split_names, write_json, write_jsonl
from hub.rows import is_incomparable, text_of
from hub.tokenizer import Tokenizer
from runtime import RunConfig, World, open_directory, stage


@dataclass
class Config(RunConfig):
    judge: str = ""  # who compares the samples; a,b: each, and how often they agree
    samples: str = ""  # a samples.jsonl, whose responses meet their references; a,b: those of a meet those of b
    out_dir: str = ""  # where all files go; empty: only print
    micro_batch_size: Count = 64  # rows per forward pass and process, of a reward model


@stage
def main(cfg):
    """Let each judge compare the pairs; print the tables, and write them to out_dir."""
    world = World(cfg)
    if cfg.out_dir:
        out_dir = open_directory(cfg, world)
    pairs = read_pairs(cfg.samples)
    verdicts = {}
    replies = {}
    tables = {}
    for judge in split_names(cfg.judge):
        verdicts[judge], replies[judge] = judge_pairs(cfg, world, judge, pairs)
        tables[judge] = win_table(pairs, verdicts[judge], cfg.seed)
        world.print("", judge)
        for group, row in tables[judge].items():
            world.print(line(group, row))
        name = f"{judge}, length-controlled"
        tables[name] = length_controlled(pairs, verdicts[judge], cfg.seed)
        world.print(line("length-controlled", tables[name]))
    for first, second in itertools.combinations(verdicts, 2):
        name = f"agreement of {first} and {second}"
        tables[name] = agreement(verdicts[first], verdicts[second], cfg.seed)
        world.print("", line(name, tables[name]))

    if cfg.out_dir and world.is_main:
        rows = []
        for number, pair in enumerate(pairs):
            row = {key: pair[key] for key in ("query", "response", "other")}
            row["verdicts"] = {judge: verdicts[judge][number] for judge in verdicts}
            row["replies"] = {judge: said[number] for judge, said in replies.items() if said}
            rows.append(row)
        write_jsonl(out_dir / "verdicts.jsonl", rows)
        write_json(out_dir / "winrate.json", tables)
        print(f"wrote {out_dir}/verdicts.jsonl and winrate.json")
    for judge, said in replies.items():
        if set(verdicts[judge]) == {None}:
            first = next(filter(None, said))[:200]
            mend = f"ask a model that ends with 'Verdict: A'; the first reply begins with {first!r}"
            raise UserError(f"judge {judge}: no reply has a clear verdict; {mend}")


# ---------------------------------------------------------------------------- pairs


def read_pairs(samples):
    """The pairs of a file or of two ("a,b"): dicts of query, response, other (texts), choice (1.0 if the response was
    preferred, 0.0 if the other, None if there is no label), and prompt: (name, fields), a row for data.parse_row to
    which a text is added under that name.
    """
    require(samples, "a judge needs samples; give --samples=a.jsonl, or a.jsonl,b.jsonl")
    paths = split_names(samples)
    require(len(paths) <= 2, f"samples {samples}: {len(paths)} files; give one, or two as a,b")
    tables = []
    for path in paths:
        with explain("samples", UserError):
            tables.append(read_jsonl(path))
        require(tables[-1], f"samples {path}: no rows; sample some")
    if "summaries" in tables[0][0]:
        require(len(paths) == 1, f"samples {samples}: comparisons are pairs already; give one file alone")
        return read_comparisons(samples, tables[0])

    ours = tables[0]
    others = tables[-1]
    key = "reference" if len(paths) == 1 else "response"
    sizes = f"{len(ours)} and {len(others)} rows"
    require(len(ours) == len(others), f"samples {samples}: {sizes}; sample both for one split")
    pairs = []
    for number, (row, match) in enumerate(zip(ours, others), 1):
        with explain(f"samples {samples}: row {number}", UserError):
            query = text_of(row, "query")
            require(query == match.get("query"), "the queries differ; sample both for the same split")
            pairs.append({
                "query": query,
                "response": text_of(row, "response"),
                "other": text_of(match, key),
                "choice": None,
                "prompt": ("completion", {"prompt": query}),
            })  # fmt: skip
    return pairs


def read_comparisons(path, rows):
    pairs = []
    for number, row in enumerate(rows, 1):
        with explain(f"samples {path}: row {number}", UserError, LookupError, TypeError, AttributeError):
            pairs += compared(row)
    n_null = sum(map(is_incomparable, rows))
    found = f"{n_null} of {len(rows)} rows have choice null"
    if n_null and os.environ.get("RANK", "0") == "0":
        print(f"samples {path}: {found}: left out", flush=True)
    nothing = f"no row has exactly one summary by 'ref' ({found}); there is nothing to compare"
    require(pairs, f"samples {path}: {nothing}")
    return pairs


def compared(row):
    """A row of comparisons as a list of one pair; of none if nobody could compare its summaries, or if not exactly one
    of them is by `ref`.
    """
    summaries = row["summaries"]
    info = row["info"]
    choice = row.get("choice")
    right = len(summaries) == 2 and choice in (0, 1, None)
    require(right, f"{len(summaries)} summaries, choice {choice!r}; mend it")
    texts = [text_of(summary, "text") for summary in summaries]
    by_ref = [summary.get("policy") == "ref" for summary in summaries]
    if by_ref[0] == by_ref[1] or is_incomparable(row):
        return []
    ref = by_ref.index(True)
    # A tokenizer that leaves the text as it is, and no limit, give the query's text.
    query = format_query(info, types.SimpleNamespace(encode=str), max_tokens=np.inf)
    return [{
        "query": query,
        "response": texts[1 - ref],
        "other": texts[ref],
        "choice": None if choice is None else float(choice != ref),
        "prompt": ("summary", info),
    }]  # fmt: skip


# ---------------------------------------------------------------------------- judges


def judge_pairs(cfg, world, judge, pairs):
    """One judge's verdicts on all pairs: 1.0 where the response wins, 0.5 for a tie, 0.0 where the other wins, None
    where the judge gave none; and, of an endpoint, its replies (None where it gave none).
    """
    if judge == "choice":
        labels = [pair["choice"] for pair in pairs]
        require(None not in labels, "judge choice: not all rows have one; name a judge")
        return labels, None
    if judge.startswith(("http://", "https://")):
        require(world.size == 1, f"judge {judge}: an endpoint needs no second process; start it without torchrun")
        cache = f"{cfg.out_dir}/replies.sqlite" if cfg.out_dir else ":memory:"
        return chat.ask_all(judge, pairs, cfg.seed, cache)

    if "/" in judge:
        ours = reward_scores(cfg, world, judge, pairs, "response")
        others = reward_scores(cfg, world, judge, pairs, "other")
    else:
        ours, others = module_scores(judge, pairs)
    return verdicts_of(pairs, ours, others), None


def verdicts_of(pairs, ours, others):
    """Whose score is higher in each pair, that of its response or that of the other: 1.0, 0.5 or 0.0."""
    verdicts = []
    for pair, score, other in zip(pairs, ours, others):
        # Equal texts tie, whatever rounding does to them in different micro-batches.
        tie = score == other or pair["response"] == pair["other"]
        verdicts.append(0.5 if tie else float(score > other))
    return verdicts


def reward_scores(cfg, world, source, pairs, side):
    """A reward model's scores of the pairs' responses on one side."""
    tokenizer = Tokenizer.load(source)
    queries = []
    responses = []
    for pair in pairs:
        name, fields = pair["prompt"]
        parsed = parse_row({**fields, name: pair[side]}, tokenizer, cfg.max_query_tokens)
        queries.append(parsed["query"])
        responses.append(parsed["responses"][0])
    return measure(cfg, world, by_models(cfg, world, tokenizer, source), queries, responses)


def module_scores(judge, pairs):
    """A Python module's scores of both sides."""
    cannot = f"judge {judge}: no URL, no model's directory, and no module that can score these"
    with explain(cannot, Exception, UserError):
        score = importlib.import_module(judge).score
        queries = [pair["query"] for pair in pairs]
        ours = list(map(float, score(queries, [pair["response"] for pair in pairs])))
        others = list(map(float, score(queries, [pair["other"] for pair in pairs])))
        fits = len(ours) == len(others) == len(pairs) and np.isfinite(ours + others).all()
        require(fits, "not a score for each text, or not a finite one")
    return ours, others


# ---------------------------------------------------------------------------- statistics


def interval(values, seed=0, resamples=10_000):
    """The mean of `values`, as rate, and low and high, its 95 % bootstrap interval (percentiles of resampled means)."""
    numbers, counts = np.unique(values, return_counts=True)
    n = counts.sum()
    # how often each number is drawn in a resample of n
    draws = np.random.default_rng(seed).multinomial(n, counts / n, size=resamples)
    low, high = np.quantile(draws @ numbers / n, (0.025, 0.975))
    return {"rate": float(np.mean(values)), "low": float(low), "high": float(high)}


def win_rate(verdicts, seed=0):
    """Counts and rate of verdicts (1.0, 0.5, 0.0 or None); the rate is that of those that are not None."""
    given = [verdict for verdict in verdicts if verdict is not None]
    row = {
        "n": len(verdicts),
        "win": given.count(1),
        "tie": given.count(0.5),
        "lose": given.count(0),
        "none": len(verdicts) - len(given),
    }
    if given:
        row.update(interval(given, seed))
    return row


def length_group(response, other):
    """The response's length in words over the other's, to the nearest of 1/4, 0.35, 1/2, 0.71, 1, 1.4, 2, 2.8, 4."""
    ratio = max(count_words(response), 1) / max(count_words(other), 1)
    half_powers = np.clip(np.round(2 * np.log2(ratio)), -4, 4)
    return float(2 ** (half_powers / 2))


def win_table(pairs, verdicts, seed=0):
    """win_rate of all pairs, and by their length group: {"all": ..., "length x 0.5": ...}."""
    groups = {}
    for pair, verdict in zip(pairs, verdicts):
        group = length_group(pair["response"], pair["other"])
        groups.setdefault(group, []).append(verdict)
    table = {"all": win_rate(verdicts, seed)}
    for group in sorted(groups):
        table[f"length x {group:.2g}"] = win_rate(groups[group], seed)
    return table


def length_controlled(pairs, verdicts, seed=0, resamples=1000):
    """The win rate where both responses of a pair have equally many words, with its 95 % bootstrap interval.

    By a logistic regression of the verdicts on tanh(difference in words / its standard deviation), as in
    arXiv:2404.04475. differs: no term for how hard a prompt is, which takes the samples of many models.
    There is no rate where no verdict is given, or where all differences are the same.
    """
    given = []
    for pair, verdict in zip(pairs, verdicts):
        if verdict is not None:
            difference = count_words(pair["response"]) - count_words(pair["other"])
            given.append((difference, verdict))
    n = len(given)
    differences = [difference for difference, _ in given]
    if len(set(differences)) < 2:
        return {"n": n}

    # Pairs of the same difference and verdict are one case, which counts as often as it is drawn.
    cases, counts = np.unique(given, axis=0, return_counts=True)
    x = np.tanh(cases[:, 0] / np.std(differences))
    outcomes = cases[:, 1]
    rates = []
    for drawn in np.random.default_rng(seed).multinomial(n, counts / n, size=resamples):
        rates.append(sigmoid(fit_logistic(x, outcomes, drawn)[0]))
    low, high = np.quantile(rates, (0.025, 0.975))
    rate = sigmoid(fit_logistic(x, outcomes, counts)[0])
    return {"n": n, "rate": float(rate), "low": float(low), "high": float(high)}


def fit_logistic(x, outcomes, counts):
    """Intercept and slope (2,) of the logistic regression of `outcomes` (n,), from 0 to 1, on `x` (n,): those of the
    highest likelihood, by Newton's method. counts (n,): how often each case was seen.
    """
    design = np.stack([np.ones_like(x), x])  # (2, n)
    # Where x parts all wins from all losses the best slope is infinite. This keeps it finite, and is too small to be
    # seen elsewhere.
    ridge = 1e-4

    def loss(coefficients):
        logits = coefficients @ design
        likelihood = counts @ (outcomes * logits - np.logaddexp(0, logits))
        return ridge / 2 * coefficients @ coefficients - likelihood

    found = np.zeros(2)
    for _ in range(100):
        p = sigmoid(found @ design)
        gradient = design @ (counts * (outcomes - p)) - ridge * found
        curvature = (design * counts * p * (1 - p)) @ design.T + ridge * np.eye(2)
        step = np.linalg.solve(curvature, gradient)
        # Far from the best a whole step can lead further away.
        while loss(found + step) > loss(found):
            step /= 2
        found += step
        if abs(step).max() < 1e-6:
            break
    return found


def sigmoid(x):
    return (1 + np.tanh(x / 2)) / 2  # exp(-x) may be too large for a float


def agreement(first, second, seed=0):
    """How often two judges gave the same verdict, of the pairs on which both gave one, with its interval."""
    same = [float(a == b) for a, b in zip(first, second) if None not in (a, b)]
    if not same:
        return {"n": 0}
    return {"n": len(same), **interval(same, seed)}


def line(group, row):
    counts = "  ".join(f"{name} {x:5d}" for name, x in row.items() if isinstance(x, int))
    text = f"{group:16} {counts}"
    if "rate" in row:
        text += f"  rate {row['rate']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"
    return text


if __name__ == "__main__":
    main(configure(Config))
