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
reference, and the other is the response; rows without exactly one `ref` are left out.

Prints win, tie and lose, the win rate (a tie counts half) with its 95 % bootstrap interval, the same by length of
the response relative to the other (in words), and for several judges how often two of them agree. With out_dir:
winrate.json, verdicts.jsonl (a row per pair) and, for endpoints, replies.sqlite, from which a stopped run goes on.
"""

import functools
import importlib
import itertools
import json
import types

import numpy as np

import runtime
from configurator import UserError, explain, require
from data import Tokenizer, format_query, last_scalars, parse_row, text_of
from evals import chat
from model import ScalarModel, write_json

WRONG = (OSError, ValueError, RecursionError, UserError)


def read_rows(path):
    """The objects of a JSON lines file; raises UserError that names the file, and the line if one is wrong."""
    rows, unreadable = [], f"samples {path}: cannot be read; give a file that sample.py wrote"
    with explain(unreadable, *WRONG), open(path, encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            with explain(f"line {number} is not a JSON object", *WRONG):
                rows.append(json.loads(line))
                require(isinstance(rows[-1], dict), f"but a {type(rows[-1]).__name__}")
                json.dumps(rows[-1], ensure_ascii=False).encode()  # ValueError for half a pair of surrogates
    require(rows, f"samples {path}: no rows; sample some")
    return rows


def read_pairs(samples):
    """The pairs of a file or of two ("a,b"): dicts of query, response, other (texts), choice (1.0 if the response was
    preferred, 0.0 if the other, None if there is no label), and prompt: (name, fields), a row for data.parse_row to
    which a text is added under that name.
    """
    require(samples, "a judge needs samples; give --samples=a.jsonl, or a.jsonl,b.jsonl")
    paths = samples.split(",")
    require(len(paths) <= 2, f"samples {samples}: {len(paths)} files; give one, or two as a,b")
    tables = [read_rows(path) for path in paths]
    if "summaries" in tables[0][0]:
        require(len(paths) == 1, f"samples {samples}: comparisons are pairs already; give one such file alone")
        pairs = []
        for number, row in enumerate(tables[0], 1):
            with explain(f"samples {samples}: row {number}", UserError, LookupError, TypeError, AttributeError):
                pairs += compared(row)
        require(pairs, f"samples {samples}: no row has exactly one summary by 'ref'; there is nothing to compare")
        return pairs
    ours, other = tables[0], tables[-1]
    require(len(ours) == len(other), f"samples {samples}: {len(ours)} and {len(other)} rows; sample both for one split")
    pairs, key = [], "reference" if len(paths) == 1 else "response"
    for number, (row, match) in enumerate(zip(ours, other), 1):
        with explain(f"samples {samples}: row {number}", UserError):
            query = text_of(row, "query")
            require(query == match.get("query"), "the queries differ; sample both for the same split")
            texts = dict(query=query, response=text_of(row, "response"), other=text_of(match, key))
            pairs.append({**texts, "choice": None, "prompt": ("completion", {"prompt": query})})
    return pairs


def compared(row):
    """A row of comparisons as a list of one pair, or of none if not exactly one of its summaries is by `ref`."""
    summaries, info, choice = row["summaries"], row["info"], row.get("choice")
    require(len(summaries) == 2 and choice in (0, 1, None), f"{len(summaries)} summaries, choice {choice!r}; mend it")
    texts, by_ref = [text_of(summary, "text") for summary in summaries], [s.get("policy") == "ref" for s in summaries]
    if by_ref[0] == by_ref[1]:
        return []
    ref = by_ref.index(True)
    # a tokenizer that leaves the text as it is, and no limit: the query's text
    query = format_query(info, types.SimpleNamespace(encode=str), max_tokens=np.inf)
    won = None if choice is None else float(choice != ref)
    return [dict(query=query, response=texts[1 - ref], other=texts[ref], choice=won, prompt=("summary", info))]


def judge_pairs(run, measure, judge, pairs):
    """One judge's verdicts on all pairs: 1.0 where the response wins, 0.5 for a tie, 0.0 where the other wins, None
    where the judge gave none; and, of an endpoint, its replies (None where it gave none).
    """
    if judge == "choice":
        require(all(pair["choice"] is not None for pair in pairs), "judge choice: not all rows have one; name a judge")
        return [pair["choice"] for pair in pairs], None
    if judge.startswith(("http://", "https://")):
        require(run.size == 1, f"judge {judge}: an endpoint needs no second process; start it without torchrun")
        cache = run.out_dir / "replies.sqlite" if run.cfg.out_dir else ":memory:"
        return chat.ask_all(judge, pairs, run.cfg.seed, cache)
    if "/" in judge:
        ours, others = (reward_scores(run, measure, judge, pairs, side) for side in ("response", "other"))
    else:
        cannot = f"judge {judge}: no URL, no model's directory, and no module that can score these"
        with explain(cannot, Exception, UserError):
            score = importlib.import_module(judge).score
            queries, *texts = ([pair[key] for pair in pairs] for key in ("query", "response", "other"))
            ours, others = ([float(x) for x in score(queries, side)] for side in texts)
            fits = len(ours) == len(others) == len(pairs) and np.isfinite(ours + others).all()
            require(fits, "not a score for each text, or not a finite one")
    # equal texts tie, whatever rounding does to them in different micro-batches
    ties = [a == b or pair["response"] == pair["other"] for a, b, pair in zip(ours, others, pairs)]
    return [0.5 if tie else float(a > b) for a, b, tie in zip(ours, others, ties)], None


def reward_scores(run, measure, source, pairs, side):
    """A reward model's scores of the pairs' responses on one side."""
    run.tokenizer = Tokenizer.load(source)
    score = functools.partial(last_scalars, [runtime.load_model(run, ScalarModel, source)], run.device)
    rows = [{**pair["prompt"][1], pair["prompt"][0]: pair[side]} for pair in pairs]
    rows = [parse_row(row, run.tokenizer, run.cfg.max_query_tokens) for row in rows]
    return measure(run, run.cfg, score, [row["query"] for row in rows], [row["responses"][0] for row in rows])


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
    row = dict(n=len(verdicts), win=given.count(1), tie=given.count(0.5), lose=given.count(0))
    row["none"] = len(verdicts) - len(given)
    return row | (interval(given, seed) if given else {})


def length_group(response, other):
    """The response's length in words over the other's, to the nearest of 1/4, 0.35, 1/2, 0.71, 1, 1.4, 2, 2.8, 4."""
    ratio = max(len(response.split()), 1) / max(len(other.split()), 1)
    return float(2 ** (np.clip(np.round(2 * np.log2(ratio)), -4, 4) / 2))


def win_table(pairs, verdicts, seed=0):
    """win_rate of all pairs, and by their length group: {"all": ..., "length x 0.5": ...}."""
    groups = [length_group(pair["response"], pair["other"]) for pair in pairs]
    table = {"all": win_rate(verdicts, seed)}
    for group in sorted(set(groups)):
        table[f"length x {group:.2g}"] = win_rate([v for v, g in zip(verdicts, groups) if g == group], seed)
    return table


def agreement(first, second, seed=0):
    """How often two judges gave the same verdict, of the pairs on which both gave one, with its interval."""
    same = [float(a == b) for a, b in zip(first, second) if None not in (a, b)]
    return {"n": len(same)} | (interval(same, seed) if same else {})


def judge_all(run, measure):
    """Let each judge of cfg.judge compare the pairs of cfg.samples; print the tables, and write them to cfg.out_dir.

    measure: sample.py's, which applies a function to micro-batches of rows.
    """
    cfg, pairs = run.cfg, read_pairs(run.cfg.samples)
    verdicts, replies, tables = {}, {}, {}
    for judge in cfg.judge.split(","):
        verdicts[judge], replies[judge] = judge_pairs(run, measure, judge, pairs)
        tables[judge] = win_table(pairs, verdicts[judge], cfg.seed)
        run.print("", judge, *(line(group, row) for group, row in tables[judge].items()))
    for a, b in itertools.combinations(verdicts, 2):
        tables[f"agreement of {a} and {b}"] = same = agreement(verdicts[a], verdicts[b], cfg.seed)
        run.print("", line(f"agreement of {a} and {b}", same))
    if cfg.out_dir and run.is_main:
        rows = []
        for i, pair in enumerate(pairs):
            row = {key: pair[key] for key in ("query", "response", "other")}
            row["verdicts"] = {judge: verdicts[judge][i] for judge in verdicts}
            rows.append(row | {"replies": {judge: said[i] for judge, said in replies.items() if said}})
        runtime.write_jsonl(run.out_dir / "verdicts.jsonl", rows)
        write_json(run.out_dir / "winrate.json", tables)
        print(f"wrote {run.out_dir}/verdicts.jsonl and winrate.json")


def line(group, row):
    counts = "  ".join(f"{name} {x:5d}" for name, x in row.items() if isinstance(x, int))
    return f"{group:16} {counts}" + ("  rate {rate:.3f} [{low:.3f}, {high:.3f}]".format(**row) if "rate" in row else "")
