"""What evaluations report of many rows: ROUGE, and where and how often a reward model is right."""

import numpy as np

from data import collate


def rouge(references, responses):
    """Mean ROUGE F-measures by the rouge-score library."""
    from rouge_score.rouge_scorer import RougeScorer  # here, since it takes a second

    scorer = RougeScorer(["rouge1", "rouge2", "rougeL", "rougeLsum"])
    scores = [scorer.score(*texts) for texts in zip(references, responses)]
    return {name: float(np.mean([score[name].fmeasure for score in scores])) for name in scores[0]}


def accuracy_table(rows, margins):
    """How often the better response has the higher score: overall and by batch, confidence, policies and margin.

    rows: a data set of pairs. margins (n,): score of the chosen minus score of the rejected response.
    Confidence is symmetric about 5, so |c - 5| is its strength (detail 6). Returns {group: {"accuracy", "expected",
    "n"}}: expected is the accuracy that the margins promise, the mean of sigmoid(|margin|). Pairs whose labels are ties
    are left out; a margin of 0 is wrong.
    """
    import pandas  # here, since it takes a second; datasets brings it

    margins = np.asarray(margins.cpu(), dtype=np.float64)
    strength = [str(abs(c - 5)) if c else "" for c in rows["confidence"]]
    columns = {"": "all", "batch": rows["batch"], "|confidence - 5|": strength, "policies": rows["policies"]}
    columns["margin"] = [f"{low} to {low + 0.5}" for low in np.floor(2 * np.abs(margins)) / 2]
    frame = pandas.DataFrame({**columns, "right": margins > 0, "sure": 1 / (1 + np.exp(-np.abs(margins)))})
    frame, table = frame[np.asarray(rows["target"]) != 0.5], {}
    for title in columns:
        groups = frame[frame[title] != ""].groupby(title)
        means = groups.agg(accuracy=("right", "mean"), expected=("sure", "mean"), n=("right", "size"))
        table |= {f"{title} {group}".strip(): row for group, row in means.to_dict("index").items()}
    return table


def eos_rewards(run, cfg, model, rows):
    """Mean reward of the best responses at EOS and at their other tokens, which were never trained (detail 13); and the
    share of those others that are negative."""

    def read(index):
        micro = rows[index]
        ids, select, _, mask = collate(micro["query"], [row[0] for row in micro["responses"]], run.device)
        rewards, n = model(ids, (select + 1).clamp(max=ids.shape[1] - 1)) * mask, mask.sum(1)
        at_eos = rewards.gather(1, n[:, None] - 1)[:, 0]
        elsewhere, negative = rewards.sum(1) - at_eos, (rewards < 0).sum(1) - (at_eos < 0).int()
        n = (n - 1).clamp(min=1)
        return {"at_eos": at_eos, "elsewhere": elsewhere / n, "elsewhere_negative": negative / n}

    means = run.map_rows(read, rows["length"], cfg.micro_batch_size)
    return {f"reward/{name}": x.mean().item() for name, x in means.items()}
