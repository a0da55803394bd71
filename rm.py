"""The reward model: a scalar head on the SFT model learns which of two responses people prefer.

    python rm.py config/toy_rm.py                                    # a CPU, a minute
    torchrun --nproc_per_node=8 rm.py config/rm_2.8b.py

The reward of a response is the scalar at its EOS token (detail 12). After training, the mean reward of the
SFT references is subtracted from the head's bias (detail 15): a pairwise loss gives that bias no gradient (but
rounding), and the critic that starts from this model inherits it. Writes out_dir/final and out_dir/eval.json.

A row may rank more than two responses (arXiv:2203.02155: all its pairs make one element of the loss), or carry the
probability that its first response is the better one. An ensemble is several runs with --normalize_std and other
seeds; ppo.py and sample.py average the models that are given as --reward_model=a,b,c.

Shapes: B rows in a micro-batch, K responses per row (2 for pairs), the best first; T tokens.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

import runtime
from configurator import Share, configure
from data import last_scalars
from evals.tables import accuracy_table, eos_rewards, report
from model import ScalarModel


@dataclass
class Config(runtime.TrainConfig):
    model: str = "out/sft_1b/final"  # the SFT model: hub id or directory
    data: str = "vwxyzjn/summarize_from_feedback_oai_preprocessing_1706381144"  # hub id, directory or file with {split}
    normalize_data: str = "vwxyzjn/summarize_from_feedback_tldr_3_filtered"  # its references get mean reward 0
    normalize_std: bool = False  # and deviation 1, before training and after (arXiv:1909.08593); needs normalize_data
    target_clamp: float = 0.5  # keep target probabilities within 0.5 -+ this (arXiv:2212.08073: 0.1); 0.5: as they are
    label_noise: Share = 0.0  # share of labels that are the toss of a coin (arXiv:1706.03741: 0.1)


def preference_loss(chosen, rejected, target=1.0, noise=0.0):
    """Bradley-Terry loss -(p log P(d) + (1 - p) log P(-d)) of rewards (B,), with d = chosen - rejected; returns (B,).

    target: the probability p that `chosen` is the better one; 0.5 is a tie. P is the sigmoid; noise: the probability
    that the labeller tosses a coin, P = (1 - noise) sigmoid + noise / 2. (arXiv:1706.03741 section 2.2.3)
    """

    def log_p(d):
        return torch.log((1 - noise) * torch.sigmoid(d) + noise / 2) if noise else F.logsigmoid(d)

    margin = chosen - rejected
    return -(target * log_p(margin) + (1 - target) * log_p(-margin))


def ranking_loss(rewards, target=1.0, counts=None, noise=0.0):
    """Mean over all pairs of K ranked responses, rewards (B, K) best first; returns (B,). (arXiv:2203.02155 eq. 1)

    target: a number or (B, 1). counts (B,): how many of a row's K are real, if rows rank different numbers.
    """
    better, worse = torch.triu_indices(rewards.shape[1], rewards.shape[1], offset=1, device=rewards.device)
    losses = preference_loss(rewards[:, better], rewards[:, worse], target, noise)
    real = torch.ones_like(losses) if counts is None else worse < counts[:, None]
    return (losses * real).sum(1) / real.sum(1)


def forward(cfg, model, rows, device):
    """Reward the responses of rows (a dict of columns) in one forward pass.

    Returns a dict of tensors (B,): loss, the best response's reward, and margin, its distance to the worst one's.
    """
    counts = [len(row) for row in rows["responses"]]
    flat = [(query, response) for query, row in zip(rows["query"], rows["responses"]) for response in row]
    rewards = last_scalars([model], device, *zip(*flat)).split(counts)
    rewards = torch.nn.utils.rnn.pad_sequence(rewards, batch_first=True)  # (B, K), 0 where a row has fewer
    counts, target = torch.tensor(counts, device=device), torch.tensor(rows["target"], device=device)
    target = target.clamp(0.5 - cfg.target_clamp, 0.5 + cfg.target_clamp)
    loss = ranking_loss(rewards, target[:, None], counts, cfg.label_noise)
    return dict(loss=loss, best=rewards[:, 0], margin=rewards[:, 0] - rewards.gather(1, counts[:, None] - 1)[:, 0])


def update(run, cfg, model, rows):
    """Accumulate the gradient of the batch `rows`; returns its loss, accuracy and mean margin (best against worst)."""
    parts = []
    for index in run.accumulate(rows["length"], cfg.micro_batch_size):
        out = forward(cfg, model, rows[index], run.device)
        loss, right, margin = (x.sum() / cfg.batch_size for x in (out["loss"], out["margin"] > 0, out["margin"]))
        runtime.backward(run, loss, index)
        parts.append({"loss/rm": loss, "train/accuracy": right, "train/margin": margin})
    return run.sum(parts)


def predict(run, cfg, model, rows):
    """What `forward` returns, for every row of a data set, on every rank: a dict of tensors (n,)."""
    return run.map_rows(lambda i: forward(cfg, model, rows[i], run.device), rows["length"], cfg.micro_batch_size)


@torch.no_grad()
def normalize(run, cfg, model, rows):
    """Shift the head's bias so that the references `rows` have mean reward 0 (detail 15: the mean only, no gain).

    With cfg.normalize_std the weight too, for a standard deviation of 1 (arXiv:1909.08593: gain and bias).
    Returns their mean and standard deviation as they were before.
    """
    rewards = predict(run, cfg, model, rows)["best"].double()
    mean, std = rewards.mean().item(), rewards.std(correction=0).item()
    model.score.bias.sub_(mean)
    if cfg.normalize_std:
        model.score.bias.div_(std)
        model.score.weight.div_(std)
    return {"normalize/mean": mean, "normalize/std": std}


@runtime.stage
def main(cfg):
    run = runtime.start(cfg, n_responses=2, ranked=True)
    references = cfg.normalize_data and run.load(cfg.normalize_data, cfg.train_split, n_responses=1)
    model = runtime.load_model(run, ScalarModel, cfg.model, trainable=True, new_head=True)
    for step in run.train({"model": model}):
        if step == 0 and references and cfg.normalize_std:
            normalize(run, cfg, model, references)
        metrics = update(run, cfg, model, run.rows.select(run.batch()))
        run.log(metrics | runtime.optimizer_step(run), watch=("loss/rm", "train/accuracy"))
    metrics, details, table = {}, {}, {}
    if references:
        metrics = normalize(run, cfg, model, references)
        after = predict(run, cfg, model, references)["best"].double()
        details = {"normalize/mean_after": after.mean().item(), "normalize/std_after": after.std(correction=0).item()}
    if run.held_out:
        out = predict(run, cfg, model, run.held_out)
        table = accuracy_table(run.held_out, out["margin"])
        accuracy = {"eval/accuracy": table["all"]["accuracy"]} if table else {}  # {}: all are ties
        metrics |= {**accuracy, "eval/loss": out["loss"].mean().item()}
        details |= eos_rewards(run, cfg, model, run.held_out.select(range(min(1024, len(run.held_out)))))
    report(run, metrics, table, **details)
    runtime.export(run, model)


if __name__ == "__main__":
    main(configure(Config))
