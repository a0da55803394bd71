"""Direct preference optimisation: the policy learns from pairs, with no reward model and no sampling.

    python dpo.py config/toy_dpo.py                                  # a CPU, a minute
    torchrun --nproc_per_node=8 dpo.py config/dpo_2.8b.py

The reference never changes, so its log-probabilities are computed once, before the first update.
Writes out_dir/final and, if there is an eval_split, out_dir/eval.json: the accuracy of the implicit reward
beta * log(policy / reference).

Shapes: B pairs in a micro-batch, R response tokens.
"""

from dataclasses import dataclass
from typing import Literal

from config.fields import TrainConfig
from configurator import Positive, Share, UserError, configure, require


@dataclass
class Config(TrainConfig):
    # ---- models
    model: str = "out/sft_1b/final"  # the SFT model, where the policy starts: hub id or directory
    reference: str = ""  # the frozen reference; empty: the same as model
    # ---- data
    data: str = "vwxyzjn/summarize_from_feedback_oai_preprocessing_1706381144"  # hub id, directory or file
    # ---- loss
    beta: Positive = 0.05  # strength of the pull towards the reference
    loss_type: Literal["sigmoid", "hinge", "ipo"] = "sigmoid"  # more: variants/dpo_losses.py
    label_smoothing: Share = 0.0  # probability that a label is wrong, for loss_type sigmoid
    sft_coef: float = 0.0  # weight of an added SFT loss, per token of the chosen responses


if __name__ == "__main__":
    cfg = configure(Config)  # before the imports that take seconds: --help and a wrong option are answered at once

import torch
import torch.nn.functional as F

from data import collate
from evals.tables import accuracy_table, overall, report
from model import GPTNeoX
from runtime import Run, backward, load_model, optimizer_step, stage, start


@stage
def main(cfg, loss=None, before_batch=None, kept=()):
    """Load data and models, train, evaluate, and write out_dir/final. All but cfg are doors:

    loss(cfg, logprobs, micro) -> (B,), (B, 2)      in place of `pair_loss`
    before_batch(run, model, batch, columns)        before each update, of whose pairs `batch` is: may add tensors with
                                                    a row for each to the dict `columns`; `loss` finds them in `micro`
    kept                                            {name: module} that a checkpoint keeps, besides the policy
    """
    if loss is None:
        loss = pair_loss
        # Called for its errors alone: settings that do not fit are refused before anything is loaded.
        pair_loss(cfg, torch.zeros(1, 2), {"ref_logprobs": torch.zeros(1, 2)})
    models = {"model": cfg.model, "reference": cfg.reference or cfg.model}
    world, data = start(cfg, 2, models, {"loss": loss, "before_batch": before_batch})
    n_vocab = data.tokenizer.n_vocab
    soft = f"{cfg.data}: soft labels (target) are for variants/dpo_losses.py; or use label_smoothing"
    require(loss is not pair_loss or min(data.train["target"]) == 1, soft)

    # The reference goes as soon as it has been asked: the policy takes its place in memory.
    reference = load_model(cfg, world, data.tokenizer, GPTNeoX, cfg.reference or cfg.model)
    ref_logprobs = predict(cfg, world, n_vocab, reference, data.train)  # (n, 2)
    if data.held_out:
        ref_held_out = predict(cfg, world, n_vocab, reference, data.held_out)
    del reference

    model = load_model(cfg, world, data.tokenizer, GPTNeoX, cfg.model, trainable=True)
    run = Run(cfg, world, data, {"model": model})
    run.models.update(kept)
    for _ in run.updates():
        metrics = update(run, cfg, model, ref_logprobs, loss, before_batch)
        metrics.update(optimizer_step(run))
        run.log(metrics, watch=("loss/dpo", "rewards/accuracies"))

    if run.held_out:
        ratios = predict(cfg, world, n_vocab, model, run.held_out) - ref_held_out  # (n, 2)
        table = accuracy_table(run.held_out, cfg.beta * (ratios[:, 0] - ratios[:, 1]))
        report(run, overall(table), table, {})
    run.export(model)


def update(run, cfg, model, ref_logprobs, loss, before_batch=None):
    """Accumulate the gradient of this step's batch; ref_logprobs (n, 2) are of all rows. Returns its metrics."""
    batch = run.batch()
    columns = {"ref_logprobs": ref_logprobs[run.row_indices()]}
    if before_batch is not None:
        before_batch(run, model, batch, columns)
    n_tokens = sum(len(chosen) for chosen, _ in batch["responses"])
    parts = []
    for indices in run.micro_batches(batch["length"]):
        micro = {name: column[indices] for name, column in columns.items()}
        logprobs = pair_logprobs(model, batch[indices], run.world.device, run.tokenizer.n_vocab)  # (B, 2)
        losses, rewards = loss(cfg, logprobs, micro)
        chosen, rejected = logprobs.unbind(1)
        # Each micro-batch adds its share of the whole batch's mean.
        sft_loss = -chosen.sum() / n_tokens
        backward(run, losses.sum() / cfg.batch_size + cfg.sft_coef * sft_loss, indices)

        values = {
            "loss/dpo": losses,
            "rewards/chosen": rewards[:, 0],
            "rewards/rejected": rewards[:, 1],
            "rewards/accuracies": rewards[:, 0] > rewards[:, 1],
            "logps/chosen": chosen,
            "logps/rejected": rejected,
            "logps/accuracies": chosen > rejected,
        }
        parts.append({name: value.sum() / cfg.batch_size for name, value in values.items()})

    metrics = run.world.sum_scalars(parts)
    metrics["rewards/margins"] = metrics["rewards/chosen"] - metrics["rewards/rejected"]
    return metrics


def pair_logprobs(model, rows, device, n_vocab):
    """Summed log-probabilities (B, 2) of the chosen and rejected responses, EOS included.

    One pass and not two, since a sharded model gathers its parameters once for each.
    """
    queries = []
    responses = []
    for query, pair in zip(rows["query"], rows["responses"]):
        queries += [query, query]
        responses += pair
    ids, select, targets, mask = collate(queries, responses, device)
    logprobs = model.logprobs(ids, select, targets, n_vocab=n_vocab)  # (2 B, R)
    return (logprobs * mask).sum(1).view(-1, 2)


def pair_loss(cfg, logprobs, micro):
    """Losses (B,) and implicit rewards (B, 2) from logprobs (B, 2) of the chosen and rejected responses."""
    pairs = torch.cat((logprobs, micro["ref_logprobs"]), dim=1)  # (B, 4), in the order that dpo_loss takes them
    losses, *rewards = dpo_loss(*pairs.unbind(1), cfg.beta, cfg.loss_type, cfg.label_smoothing)
    return losses, torch.stack(rewards, dim=1)


def dpo_loss(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta, loss_type="sigmoid",
             label_smoothing=0.0):  # fmt: skip
    """Losses (B,) and implicit rewards (B,), (B,) from summed log-probabilities (B,) of the responses.

    label_smoothing: the probability that a label is wrong. Raises UserError where loss_type has no use for it.
    """
    fits = label_smoothing == 0 or (loss_type == "sigmoid" and label_smoothing < 0.5)
    require(fits, f"label_smoothing {label_smoothing} does not fit {loss_type!r}; sigmoid takes one below 0.5")
    chosen_ratio = policy_chosen - ref_chosen
    rejected_ratio = policy_rejected - ref_rejected
    margin = chosen_ratio - rejected_ratio

    if loss_type == "sigmoid":
        # arXiv:2305.18290 eq. 7; with label_smoothing: cDPO
        right = F.logsigmoid(beta * margin)
        wrong = F.logsigmoid(-beta * margin)
        losses = -(1 - label_smoothing) * right - label_smoothing * wrong
    elif loss_type == "hinge":
        # arXiv:2309.06657, hinge-norm
        losses = F.relu(1 - beta * margin)
    elif loss_type == "ipo":
        # arXiv:2310.12036 eq. 17
        losses = (margin - 1 / (2 * beta)) ** 2
    else:
        raise UserError(f"loss_type {loss_type!r} is not known; use one of sigmoid, hinge, ipo")
    return losses, beta * chosen_ratio, beta * rejected_ratio


def predict(cfg, world, n_vocab, model, rows):
    """Summed log-probabilities (n, 2) of every pair of a data set, on every rank."""

    def measure(indices):
        return {"logprobs": pair_logprobs(model, rows[indices], world.device, n_vocab)}

    return world.map_rows(measure, rows["length"], cfg.micro_batch_size)["logprobs"]


if __name__ == "__main__":
    main(cfg)
