"""What runs report of many rows: ROUGE, and where and how often a reward model is right."""

import numpy as np

from hub.files import write_json


def rouge(references, responses):
    """Mean ROUGE F-measures by the rouge-score library."""
    from rouge_score.rouge_scorer import RougeScorer  # here, since it takes a second

    names = ["rouge1", "rouge2", "rougeL", "rougeLsum"]
    scorer = RougeScorer(names)
    scores = [scorer.score(reference, response) for reference, response in zip(references, responses)]
    return {name: float(np.mean([score[name].fmeasure for score in scores])) for name in names}


def accuracy_table(rows, margins):
    """How often the better response has the higher score: overall and by batch, confidence, policies and margin.

    rows: a data set of pairs. margins (n,): score of the chosen minus score of the rejected response.
    Confidence is symmetric about 5, so |c - 5| is its strength (detail 6). Returns {group: {"accuracy", "expected",
    "n"}}: expected is the accuracy that the margins promise, the mean of sigmoid(|margin|). Pairs whose labels are ties
    are left out; a margin of 0 is wrong.
    """
    import pandas  # here, since it takes a second; datasets brings it

    margins = np.asarray(margins.cpu(), dtype=np.float64)
    sizes = np.floor(2 * np.abs(margins)) / 2
    frame = pandas.DataFrame({
        "": "all",
        "batch": rows["batch"],
        "|confidence - 5|": [str(abs(c - 5)) if c else "" for c in rows["confidence"]],
        "policies": rows["policies"],
        "margin": [f"{low} to {low + 0.5}" for low in sizes],
    })  # fmt: skip
    titles = list(frame.columns)
    frame["accuracy"] = margins > 0
    frame["expected"] = 1 / (1 + np.exp(-np.abs(margins)))
    frame["n"] = 1
    frame = frame[np.asarray(rows["target"]) != 0.5]
    table = {}
    for title in titles:
        groups = frame[frame[title] != ""].groupby(title)
        means = groups.agg({"accuracy": "mean", "expected": "mean", "n": "sum"})
        for group, row in means.to_dict("index").items():
            table[f"{title} {group}".strip()] = row
    return table


def report(run, metrics, table, details=None):
    """Log the last evaluation's metrics; write them, `details` and a table of rows to eval.json, and print it all."""
    run.log(metrics)
    metrics = {**metrics, **(details or {})}
    run.world.print("")
    for group, row in {"evaluation": metrics, **table}.items():
        numbers = "  ".join(f"{name} {x:.4g}" for name, x in row.items())
        run.world.print(f"{group:44} {numbers}")
    if run.world.is_main:
        write_json(run.out_dir / "eval.json", {**metrics, "accuracy": table})
