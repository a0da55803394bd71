"""What runs report of many rows: ROUGE, where and how often a reward model is right, what a rollout's samples say."""

import numpy as np

from data import collate
from model import write_json


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


def report(run, metrics, table, **details):
    """Log the last evaluation's metrics; write them, `details` and a table of rows to eval.json, and print it all."""
    run.log(metrics)
    rows = {"evaluation": {**metrics, **details}, **table}.items()
    run.print("", *(f"{group:44} " + "  ".join(f"{name} {x:.4g}" for name, x in row.items()) for group, row in rows))
    if run.is_main:
        write_json(run.out_dir / "eval.json", {**metrics, **details, "accuracy": table})


def rollout_metrics(batch, kl_coef):
    """What the samples say, before any update; sums are per sequence, in nats."""
    mask, tokens, scores = batch["mask"], batch["mask"].sum().item(), batch["scores"].mean().item()
    kl = batch["kl"].sum(1).mean().item()
    metrics = {
        "objective/kl": kl,
        "objective/kl_coef": kl_coef,
        "objective/entropy": -(batch["logprobs"] * mask).sum(1).mean().item(),
        "objective/non_score_reward": -kl_coef * kl,
        "objective/rlhf_reward": scores - kl_coef * kl,
        "objective/scores": scores,
        "policy/entropy_avg": (batch["entropy"] * mask).sum().item() / tokens,
        "val/num_eos_tokens": batch["has_eos"].sum().item(),
        "val/eos_rate": batch["has_eos"].float().mean().item(),
        "val/response_length": tokens / len(mask),
        "val/generation_gap": ((batch["sampled_logprobs"] - batch["logprobs"]).abs() * mask).sum().item() / tokens,
    }
    for name, column in (("val/perplexity", "logprobs"), ("val/ref_perplexity", "ref_logprobs")):
        metrics[name] = ((batch[column] * mask).sum() / -tokens).exp().item()
    return metrics
