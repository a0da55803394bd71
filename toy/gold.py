"""The gold score: what the toy labellers really want. The pipeline never sees it; we check with it.

    python toy/gold.py out/toy/ppo/samples/samples.jsonl out/toy/sft/samples/samples.jsonl

prints one line per file: the number of rows, the mean gold score of the responses with its 95 %
interval (1.96 standard errors), the mean of the references, and the win rate, the share of rows in
which the response beats its reference (a tie counts half). A row is a JSON object with `query` (the
formatted query text), `response` (text without EOS) and, in all rows or in none, `reference`.

`score` has the signature of a reward function, so PPO can also be run on gold itself:

    ppo.main(cfg, score=toy.gold.score)
"""
import json
import math
import re
import sys

if __package__:
    from . import world
else:  # run as a script: Python then looks for modules in toy/ itself
    import world

FACT, WRONG, FILLER, GIBBERISH = 1.0, -1.0, -0.25, -0.5
LIMIT = 4.0  # four facts: the range is symmetric, so that one long babble does not rule a mean

# "in the", "in", "the" right before a place and "at" right before a time are part of the phrase.
GLUE = re.compile(r"\b(?:in the|in|the) (?=(?:{where})\b)|\bat (?=(?:{when})\b)".format(
    **{slot: "|".join(values) for slot, values in world.SLOTS.items()}))
TOKEN = re.compile(world.WORD.pattern + r"|\S")  # a word, or a single sign that is not a letter
POST = re.compile(r"POST: (.*?)\n\nTL;DR:", re.DOTALL)


def gold_score(post, summary):
    """How good `summary` is for `post`, in [-4, 4]. Pure: the facts are read from the post's text.

    +1     a fact of the post, the first time it is stated
    -1     a value that the post does not state (each time)
    -0.25  any other known word, and a fact that is stated again
    -0.5   a word or sign that the world does not have
    0      the glue of a phrase ("in the kitchen", "at dawn"), a full stop at the end, no words

    So the best summary states every fact once, and says nothing else. Word order is not judged.
    """
    facts = set(world.parse_facts(post).values())
    tokens = TOKEN.findall(GLUE.sub("", summary))
    if tokens and tokens[-1] == ".":
        tokens.pop()
    total, stated = 0.0, set()
    for token in tokens:
        if token in facts:
            total += FILLER if token in stated else FACT
            stated.add(token)
        elif token in world.SLOT_OF:
            total += WRONG
        else:
            total += FILLER if token in world.LEXICON else GIBBERISH
    return max(-LIMIT, min(LIMIT, total))


def post_of(query):
    """Cut the post out of a formatted query text; ValueError if it is not one of the toy world."""
    match = POST.search(query)
    if match is None:
        raise ValueError(f"no 'POST: ... TL;DR:' in {query[:50]!r}; give the whole query text")
    if not world.parse_facts(match[1]):
        raise ValueError(f"the post {match[1][:50]!r} states no fact; gold scores toy data only")
    return match[1]


def score(query_texts, response_texts):
    """Gold scores of a batch: lists of B query texts and B response texts -> list of B floats."""
    pairs = zip(query_texts, response_texts, strict=True)
    return [gold_score(post_of(query), response) for query, response in pairs]


def mean_interval(values):
    """Mean and half width of its 95 % interval, 1.96 * s / sqrt(n); NaN for a single value."""
    n, mean = len(values), sum(values) / len(values)
    if n == 1:
        return mean, math.nan
    variance = sum((value - mean) ** 2 for value in values) / (n - 1)
    return mean, 1.96 * math.sqrt(variance / n)


def evaluate(rows):
    """Statistics of samples as a flat dict, one row of a table.

    rows: list of dicts with `query`, `response` and, in all or in none, `reference`.
    Returns n, gold_mean, gold_ci95 (half width), gold_reference_mean and win_rate; the last two are
    None without references. Raises ValueError that names the row (counted from 1) and the trouble.
    """
    if not rows:
        raise ValueError("no rows; sample at least one response")
    keys = ["query", "response"] + ["reference"] * any("reference" in row for row in rows)
    for number, row in enumerate(rows, 1):
        for key in keys:
            if not isinstance(row.get(key), str):
                raise ValueError(f"row {number} has no text {key!r}; a row needs {', '.join(keys)}")
        try:
            post_of(row["query"])
        except ValueError as error:
            raise ValueError(f"row {number}: {error}") from error
    queries = [row["query"] for row in rows]
    golds = score(queries, [row["response"] for row in rows])
    mean, half_width = mean_interval(golds)
    stats = {"n": len(rows), "gold_mean": mean, "gold_ci95": half_width,
             "gold_reference_mean": None, "win_rate": None}
    if "reference" in keys:
        references = score(queries, [row["reference"] for row in rows])
        wins = [0.5 * (gold == ref) + (gold > ref) for gold, ref in zip(golds, references)]
        stats["gold_reference_mean"] = sum(references) / len(rows)
        stats["win_rate"] = sum(wins) / len(rows)
    return stats


def evaluate_file(path):
    """`evaluate` over a jsonl file; every complaint is a ValueError that begins with the path."""
    rows = []
    try:
        with open(path, encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                try:
                    row = json.loads(line)
                except json.JSONDecodeError:
                    row = None
                if not isinstance(row, dict):
                    raise ValueError(f"line {number} is not a JSON object; write one per line")
                rows.append(row)
        return evaluate(rows)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}; give the path of a samples file") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def main(paths):
    if {"-h", "--help"} & set(paths):
        print(__doc__)
        return
    if not paths:
        sys.exit("gold: no samples file; usage: python toy/gold.py samples.jsonl [more.jsonl ...]")
    for path in paths:
        try:
            stats = evaluate_file(path)
        except ValueError as error:
            sys.exit(f"gold: {error}")
        line = "{n} rows, gold {gold_mean:.3f} +- {gold_ci95:.3f}".format(**stats)
        if stats["win_rate"] is not None:
            line += ", references {gold_reference_mean:.3f}".format(**stats)
            line += ", win rate {win_rate:.3f}".format(**stats)
        print(f"{path}: {line}")


if __name__ == "__main__":
    main(sys.argv[1:])
