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

from configurator import Positive, Share, UserError, configure, require
from data import collate
from evals.tables import accuracy_table, report
from model import GPTNeoX
from runtime import Run, TrainConfig, backward, load_model, optimizer_step, stage, start

LOSSES = "sigmoid, robust, hinge, ipo, ipo_norm, apo_zero"


@dataclass
class Config(TrainConfig):
    # ---- models
    model: str = "out/sft_1b/final"  # the SFT model, where the policy starts: hub id or directory
    reference: str = ""  # the frozen reference; empty: the same as model
    # ---- data
    data: str = "vwxyzjn/summarize_from_feedback_oai_preprocessing_1706381144"  # hub id, directory or file with {split}
    # ---- loss
    beta: Positive = 0.05  # strength of the pull towards the reference
    loss_type: str = "sigmoid"  # one of those that dpo_loss lists
    label_smoothing: Share = 0.0  # probability that a label is wrong, for sigmoid and robust
    sft_coef: float = 0.0  # weight of an added SFT loss, per token of the chosen responses


@stage
def main(cfg):
    nothing = torch.zeros(1)
    dpo_loss(nothing, nothing, nothing, nothing, cfg.beta, cfg.loss_type, cfg.label_smoothing, torch.ones(1, 2))  # refuses
    world, data = start(cfg, n_responses=2)
    n_vocab = data.tokenizer.n_vocab
    require(min(data.train["target"]) == 1, f"{cfg.data}: DPO does not use soft labels (target); use label_smoothing")
    reference = load_model(cfg, world, n_vocab, GPTNeoX, cfg.reference or cfg.model)
    ref_logprobs = predict(cfg, world, n_vocab, reference, data.train)  # (n, 2)
    if data.held_out:
        ref_held_out = predict(cfg, world, n_vocab, reference, data.held_out)
    del reference

    model = load_model(cfg, world, n_vocab, GPTNeoX, cfg.model, trainable=True)
    run = Run(cfg, world, data, {"model": model})
    for _ in run.train():
        metrics = update(run, cfg, model, ref_logprobs)
        metrics.update(optimizer_step(run))
        run.log(metrics, watch=("loss/dpo", "rewards/accuracies"))

    if run.held_out:
        ratios = predict(cfg, world, n_vocab, model, run.held_out) - ref_held_out  # (n, 2)
        table = accuracy_table(run.held_out, cfg.beta * (ratios[:, 0] - ratios[:, 1]))
        metrics = {}
        if table:  # {}: all are ties
            metrics["eval/accuracy"] = table["all"]["accuracy"]
        report(run, metrics, table)
    run.export(model)


def update(run, cfg, model, ref_logprobs):
    """Accumulate the gradient of this step's batch; ref_logprobs (n, 2) are of all rows. Returns the batch's metrics."""
    batch_indices = run.batch_indices()
    batch = run.rows.select(batch_indices)
    batch_ref_logprobs = ref_logprobs[batch_indices]
    n_tokens = sum(len(chosen) for chosen, _ in batch["responses"])
    parts = []
    for indices in run.micro_batches(batch["length"]):
        pairs = pair_logprobs(model, batch[indices], run.world.device, run.tokenizer.n_vocab)
        chosen, rejected = pairs["logprobs"].unbind(1)  # (B,) each
        ref_chosen, ref_rejected = batch_ref_logprobs[indices].unbind(1)
        losses, chosen_rewards, rejected_rewards = dpo_loss(
            chosen, rejected, ref_chosen, ref_rejected,
            cfg.beta, cfg.loss_type, cfg.label_smoothing, pairs["lengths"],
        )  # fmt: skip
        loss = losses.sum() / cfg.batch_size - cfg.sft_coef * chosen.sum() / n_tokens
        backward(run, loss, indices)
        values = {
            "loss/dpo": losses,
            "rewards/chosen": chosen_rewards,
            "rewards/rejected": rejected_rewards,
            "rewards/accuracies": chosen_rewards > rejected_rewards,
            "logps/chosen": chosen,
            "logps/rejected": rejected,
        }
        parts.append({name: value.sum() / cfg.batch_size for name, value in values.items()})
    metrics = run.world.sum_scalars(parts)
    metrics["rewards/margins"] = metrics["rewards/chosen"] - metrics["rewards/rejected"]
    return metrics


def pair_logprobs(model, rows, device, n_vocab):
    """Summed log-probabilities (B, 2) of the chosen and rejected responses (EOS included), and their lengths (B, 2).

    One pass and not two, since a sharded model gathers its parameters once for each.
    """
    queries = []
    responses = []
    for query, pair in zip(rows["query"], rows["responses"]):
        queries += [query, query]
        responses += pair
    ids, select, targets, mask = collate(queries, responses, device)
    logprobs = model.logprobs(ids, select, targets, 1.0, n_vocab)  # (2 B, R)
    return {"logprobs": (logprobs * mask).sum(1).view(-1, 2), "lengths": mask.sum(1).view(-1, 2)}


def dpo_loss(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta, loss_type="sigmoid",
             label_smoothing=0.0, lengths=None):  # fmt: skip
    """Losses (B,) and implicit rewards (B,), (B,) from summed log-probabilities (B,) of the responses.

    lengths (B, 2): the responses' tokens, for ipo_norm. label_smoothing: the probability that a label is wrong.
    Raises UserError for an unknown loss_type and for a label_smoothing that it has no use for.
    """
    takes_smoothing = loss_type in ("sigmoid", "robust") and label_smoothing < 0.5
    wrong_smoothing = f"label_smoothing {label_smoothing} does not fit loss_type {loss_type!r}"
    require(label_smoothing == 0 or takes_smoothing, f"{wrong_smoothing}; sigmoid and robust take one below 0.5")
    chosen_ratio = policy_chosen - ref_chosen
    rejected_ratio = policy_rejected - ref_rejected
    margin = chosen_ratio - rejected_ratio
    right = F.logsigmoid(beta * margin)  # log-probability of the label, and of its opposite
    wrong = F.logsigmoid(-beta * margin)

    if loss_type == "sigmoid":  # arXiv:2305.18290 eq. 7; with label_smoothing: cDPO
        losses = -(1 - label_smoothing) * right - label_smoothing * wrong
    elif loss_type == "robust":  # arXiv:2403.00409
        losses = (-(1 - label_smoothing) * right + label_smoothing * wrong) / (1 - 2 * label_smoothing)
    elif loss_type == "hinge":  # arXiv:2309.06657, hinge-norm
        losses = F.relu(1 - beta * margin)
    elif loss_type == "ipo":  # arXiv:2310.12036 eq. 17
        losses = (margin - 1 / (2 * beta)) ** 2
    elif loss_type == "ipo_norm":
        per_token = chosen_ratio / lengths[:, 0] - rejected_ratio / lengths[:, 1]
        losses = (per_token - 1 / (2 * beta)) ** 2
    elif loss_type == "apo_zero":  # arXiv:2408.06266
        losses = 1 - torch.sigmoid(beta * chosen_ratio) + torch.sigmoid(beta * rejected_ratio)
    else:
        raise UserError(f"loss_type {loss_type!r} is not known; use one of {LOSSES}")
    return losses, beta * chosen_ratio, beta * rejected_ratio


def predict(cfg, world, n_vocab, model, rows):
    """Summed log-probabilities (n, 2) of every pair of a data set, on every rank."""

    def measure(indices):
        return pair_logprobs(model, rows[indices], world.device, n_vocab)

    return world.map_rows(measure, rows["length"], cfg.micro_batch_size)["logprobs"]


if __name__ == "__main__":
    main(configure(Config))
