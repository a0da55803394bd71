"""Direct preference optimisation: the policy learns from pairs, with no reward model and no sampling.

    python dpo.py config/toy_dpo.py                                  # a CPU, a minute
    torchrun --nproc_per_node=8 dpo.py config/dpo_2.8b.py

The reference never changes, so its log-probabilities are computed once, before the first update.
Writes out_dir/final and, if there is an eval_split, out_dir/eval.json: the accuracy of the implicit reward
beta * log(policy / reference).

Shapes: B pairs in a micro-batch, R response tokens.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

import runtime
from configurator import Positive, Share, configure, require
from data import collate
from evals.tables import accuracy_table, report
from model import GPTNeoX


@dataclass
class Config(runtime.TrainConfig):
    model: str = "out/sft_1b/final"  # the SFT model, where the policy starts: hub id or directory
    reference: str = ""  # the frozen reference; empty: the same as model
    data: str = "vwxyzjn/summarize_from_feedback_oai_preprocessing_1706381144"  # hub id, directory or file with {split}
    beta: Positive = 0.05  # strength of the pull towards the reference
    loss_type: str = "sigmoid"  # one of those that dpo_loss lists
    label_smoothing: Share = 0.0  # probability that a label is wrong, for sigmoid and robust
    sft_coef: float = 0.0  # weight of an added SFT loss, per token of the chosen responses


def dpo_loss(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta, loss_type="sigmoid",
             label_smoothing=0.0, lengths=None):  # fmt: skip
    """Losses (B,) and implicit rewards (B,), (B,) from summed log-probabilities (B,) of the responses.

    c, r: log-ratio, policy to reference, of the chosen and the rejected response; D = c - r; e: label_smoothing;
    s, ls: the sigmoid and its logarithm. lengths (B, 2): the responses' tokens, for ipo_norm.
    Raises UserError for an unknown loss_type and for a label_smoothing that it has no use for.
    """
    c, r, b, e = policy_chosen - ref_chosen, policy_rejected - ref_rejected, beta, label_smoothing
    D, s, ls = c - r, torch.sigmoid, F.logsigmoid
    losses = {
        "sigmoid": lambda: -(1 - e) * ls(b * D) - e * ls(-b * D),  # arXiv:2305.18290 eq. 7; with e: cDPO
        "robust": lambda: (-(1 - e) * ls(b * D) + e * ls(-b * D)) / (1 - 2 * e),  # arXiv:2403.00409
        "hinge": lambda: F.relu(1 - b * D),  # arXiv:2309.06657, hinge-norm
        "ipo": lambda: (D - 1 / (2 * b)) ** 2,  # arXiv:2310.12036 eq. 17
        "ipo_norm": lambda: (c / lengths[:, 0] - r / lengths[:, 1] - 1 / (2 * b)) ** 2,
        "apo_zero": lambda: 1 - s(b * c) + s(b * r),  # arXiv:2408.06266
    }
    require(loss_type in losses, f"loss_type {loss_type!r} is not known; use one of {', '.join(losses)}")
    fits = e == 0 or (e < 0.5 and loss_type in ("sigmoid", "robust"))
    require(fits, f"label_smoothing {e} does not fit loss_type {loss_type!r}; sigmoid and robust take one below 0.5")
    return losses[loss_type](), beta * c, beta * r


def pair_logprobs(run, model, rows):
    """Summed log-probabilities (B, 2) of the chosen and rejected responses (EOS included), and their lengths (B, 2).

    One pass and not two, since a sharded model gathers its parameters once for each.
    """
    flat = [response for row in rows["responses"] for response in row]
    ids, select, targets, mask = collate([query for query in rows["query"] for _ in range(2)], flat, run.device)
    logprobs = model.logprobs(ids, select, targets, 1.0, run.tokenizer.n_vocab)  # (2 B, R)
    return {"logprobs": (logprobs * mask).sum(1).view(-1, 2), "lengths": mask.sum(1).view(-1, 2)}


def predict(run, cfg, model, rows):
    """Summed log-probabilities (n, 2) of every pair of a data set, on every rank."""
    return run.map_rows(lambda i: pair_logprobs(run, model, rows[i]), rows["length"], cfg.micro_batch_size)["logprobs"]


def update(run, cfg, model, rows, ref_logprobs):
    """Accumulate the gradient of the batch `rows` with ref_logprobs (batch, 2); returns the batch's metrics."""
    names = ("loss/dpo", "rewards/chosen", "rewards/rejected", "rewards/accuracies", "logps/chosen", "logps/rejected")
    parts, n_tokens = [], sum(len(chosen) for chosen, _ in rows["responses"])
    for index in run.accumulate(rows["length"], cfg.micro_batch_size):
        logprobs, lengths = pair_logprobs(run, model, rows[index]).values()  # (B, 2)
        pairs = (*logprobs.unbind(1), *ref_logprobs[index].unbind(1))
        losses, chosen, rejected = dpo_loss(*pairs, cfg.beta, cfg.loss_type, cfg.label_smoothing, lengths)
        loss = losses.sum() / cfg.batch_size - cfg.sft_coef * logprobs[:, 0].sum() / n_tokens
        runtime.backward(run, loss, index)
        values = (losses, chosen, rejected, chosen > rejected, *logprobs.unbind(1))
        parts.append({name: value.sum() / cfg.batch_size for name, value in zip(names, values)})
    metrics = run.sum(parts)
    return metrics | {"rewards/margins": metrics["rewards/chosen"] - metrics["rewards/rejected"]}


@runtime.stage
def main(cfg):
    dpo_loss(*torch.zeros(4, 1), cfg.beta, cfg.loss_type, cfg.label_smoothing, torch.ones(1, 2))  # refuses wrong ones
    run = runtime.start(cfg, n_responses=2)
    require(min(run.rows["target"]) == 1, f"{cfg.data}: DPO does not use soft labels (target); use label_smoothing")
    reference = runtime.load_model(run, GPTNeoX, cfg.reference or cfg.model)
    ref_logprobs = predict(run, cfg, reference, run.rows)  # (n, 2)
    ref_held_out = predict(run, cfg, reference, run.held_out) if run.held_out else None
    del reference
    model = runtime.load_model(run, GPTNeoX, cfg.model, trainable=True)
    for _ in run.train({"model": model}):
        index = run.batch()
        metrics = update(run, cfg, model, run.rows.select(index), ref_logprobs[index])
        run.log(metrics | runtime.optimizer_step(run), watch=("loss/dpo", "rewards/accuracies"))
    if run.held_out:
        ratios = predict(run, cfg, model, run.held_out) - ref_held_out  # (n, 2)
        table = accuracy_table(run.held_out, cfg.beta * (ratios[:, 0] - ratios[:, 1]))
        report(run, {"eval/accuracy": table["all"]["accuracy"]} if table else {}, table)
    runtime.export(run, model)


if __name__ == "__main__":
    main(configure(Config))
