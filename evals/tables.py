"""What runs report of many rows: ROUGE, and where and how often a reward model is right."""

import os
import unicodedata
from types import SimpleNamespace

import numpy as np
import regex  # it knows scripts, and tiktoken brings it
from tqdm import tqdm

from hub.files import write_json


def rouge(references, responses):
    """Mean ROUGE F-measures by the rouge-score library: {name: 0 to 1}.

    The library keeps the letters a to z and digits alone. That is right for English, where one letter in 10,000 is
    another (café). Where more than one in 200 of the references' letters are others (in German one in 50), the tokens
    are those of `words` and the names end in _unicode. The references decide for all rows and all models: means of the
    two kinds cannot be compared.
    """
    from rouge_score.rouge_scorer import RougeScorer  # here, since it takes a second

    letters = regex.findall(r"\p{L}", " ".join(references).lower())
    n_lost = sum(not letter.isascii() for letter in letters)
    suffix = ""
    tokenizer = None  # the library's own
    if n_lost > len(letters) / 200:
        suffix = "_unicode"
        tokenizer = SimpleNamespace(tokenize=words)

    scorer = RougeScorer(["rouge1", "rouge2", "rougeL", "rougeLsum"], tokenizer=tokenizer)
    pairs = list(zip(references, responses))
    is_main = os.environ.get("RANK", "0") == "0"
    bar = tqdm(pairs, desc="ROUGE", delay=2, leave=False, disable=not is_main)
    scores = [scorer.score(reference, response) for reference, response in bar]
    means = {}
    for name in scorer.rouge_types:
        measures = [score[name].fmeasure for score in scores]
        means[name + suffix] = float(np.mean(measures))
    return means


# Scripts without blanks between words: Han, kana, and those of South-East Asia, which Unicode knows by how lines may
# break in them (Thai, Lao, Khmer, Myanmar and a few more).
UNSPACED = r"\p{scx=Han}\p{scx=Hiragana}\p{scx=Katakana}\p{Line_Break=Complex_Context}"
UNSPACED_LETTER = rf"[[\p{{L}}\p{{N}}]&&[{UNSPACED}]]\p{{M}}*"
SPACED_WORD = rf"[[\p{{L}}\p{{N}}]--[{UNSPACED}]][[\p{{L}}\p{{M}}\p{{N}}]--[{UNSPACED}]]*"
WORD = regex.compile(f"{UNSPACED_LETTER}|{SPACED_WORD}", regex.VERSION1)  # version 1 has && and -- of sets


def words(text):
    """The words of a text in any script, without case: runs of letters and digits with the marks on them; in scripts
    without blanks single letters. Texts that Unicode calls equivalent (é in one code point or two) have equal words.
    """
    return WORD.findall(unicodedata.normalize("NFC", text.casefold()))


def count_words(text):
    """How many pieces between blanks a text has; of a piece in a script without blanks, how many `words`."""
    n_words = 0
    for piece in text.split():
        unspaced = regex.search(UNSPACED_LETTER, piece, regex.VERSION1)
        n_words += len(words(piece)) if unspaced else 1
    return n_words


def accuracy_table(rows, margins):
    """How often the better response has the higher score: overall and by batch, confidence, policies and margin.

    rows: a data set of pairs. margins (n,): score of the chosen minus score of the rejected response.
    Confidence is symmetric about 5, so |c - 5| is its strength (detail 6). Returns {group: {"accuracy", "expected",
    "n"}}: expected is the accuracy that the margins promise, the mean of sigmoid(|margin|). Pairs whose labels are ties
    are left out; a margin of 0 is wrong.
    """
    import pandas  # here, since it takes a second; datasets brings it

    margins = np.asarray(margins.cpu(), dtype=np.float64)
    sizes = np.abs(margins)
    frame = pandas.DataFrame()
    frame["batch"] = rows["batch"]
    frame["|confidence - 5|"] = [str(abs(c - 5)) if c else "" for c in rows["confidence"]]
    frame["policies"] = rows["policies"]
    bins = np.floor(2 * sizes) / 2
    frame["margin"] = [f"{low} to {low + 0.5}" for low in bins]
    frame.insert(0, "", "all")  # a group of all rows, first and under no title
    titles = list(frame.columns)

    frame["accuracy"] = margins > 0
    frame["expected"] = 1 / (1 + np.exp(-sizes))
    frame["n"] = 1
    is_tie = np.asarray(rows["target"]) == 0.5
    frame = frame[~is_tie]
    table = {}
    for title in titles:
        known = frame[frame[title] != ""]
        groups = known.groupby(title)
        means = groups.agg({"accuracy": "mean", "expected": "mean", "n": "sum"})
        for group, row in means.to_dict("index").items():
            name = f"{title} {group}".strip()
            table[name] = row
    return table


def overall(table):
    """The metric of an accuracy table; {} if there is none, for all labels are ties."""
    if not table:
        return {}
    return {"eval/accuracy": table["all"]["accuracy"]}


def report(run, metrics, table, details):
    """Log the last evaluation's metrics; write them, `details` and a table of rows to eval.json, and print it all."""
    run.log(metrics)
    metrics = {**metrics, **details}
    if metrics:
        run.world.print("", line("evaluation", metrics))
    for group, row in table.items():
        run.world.print(line(group, row))
    if run.world.is_main:
        write_json(run.out_dir / "eval.json", {**metrics, "accuracy": table})


def line(group, row):
    numbers = "  ".join(f"{name} {x:.4g}" for name, x in row.items())
    return f"{group:44} {numbers}"
