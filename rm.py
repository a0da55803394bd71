"""The reward model: a scalar head on the SFT model learns which of two responses people prefer.

    python rm.py config/toy_rm.py                                    # a CPU, a minute
    torchrun --nproc_per_node=8 rm.py config/rm_2.8b.py

The reward of a response is the scalar at its EOS token (detail 12). After training, the mean reward of the
SFT references is subtracted from the head's bias (detail 15): a pairwise loss gives that bias no gradient (but
rounding), and the critic that starts from this model inherits it. Writes out_dir/final and out_dir/eval.json.

A row may rank more than two responses (arXiv:2203.02155: all its pairs make one element of the loss), or carry the
probability that its first response is the better one. An ensemble is several runs with --normalize_std and other
seeds; ppo.py and sample.py average the models that are given as --reward_model=a,b,c. With --normalize_only `model` is
a reward model already: it is centred (on normalize_data, if there is any) and evaluated.

Shapes: B rows in a micro-batch, K responses per row (2 for pairs), the best first; T tokens.
"""

from dataclasses import dataclass

from config.fields import TrainConfig
from configurator import Share, configure

TLDR_PAIRS = "vwxyzjn/summarize_from_feedback_oai_preprocessing_1706381144"
TLDR_POSTS = "vwxyzjn/summarize_from_feedback_tldr_3_filtered"


@dataclass
class Config(TrainConfig):
    # ---- models
    model: str = "out/sft_1b/final"  # the SFT model: hub id or directory
    # ---- data
    data: str = TLDR_PAIRS  # hub id, directory or file (hub/reader.py)
    # ---- reward
    normalize_data: str = "auto"  # its responses get mean reward 0; auto: TL;DR's for TL;DR, or `data`'s; empty: none
    normalize_only: bool = False  # train nothing: `model` is a reward model, of another project for example
    normalize_std: bool = False  # also scale them to deviation 1, before training and after (arXiv:1909.08593)
    # ---- loss
    target_clamp: float = 0.5  # keep target probabilities within 0.5 -+ this (arXiv:2212.08073: 0.1); 0.5: as they are
    label_noise: Share = 0.0  # share of labels that are the toss of a coin (arXiv:1706.03741: 0.1)


if __name__ == "__main__":
    cfg = configure(Config)  # before the imports that take seconds: --help and a wrong option are answered at once

import torch
import torch.nn.functional as F

from data import collate, last_scalars
from evals.tables import accuracy_table, overall, report
from model import ScalarModel
from runtime import Run, backward, check_rows, load_model, load_split, optimizer_step, stage, start


@stage
def main(cfg):
    world, data = start(cfg, 2, {"model": cfg.model}, {}, ranked=True)
    if cfg.normalize_only:
        data.n_updates = 0
    tokenizer = data.tokenizer
    references = None
    if cfg.normalize_data:
        references = load_split(cfg, world, tokenizer, reference_source(cfg), cfg.train_split, n_responses=1)
        check_rows(cfg, world, "normalize_data", references)
    new_head = not cfg.normalize_only
    model = load_model(cfg, world, tokenizer, ScalarModel, cfg.model, trainable=True, new_head=new_head)
    run = Run(cfg, world, data, {"model": model})
    for step in run.updates():
        # Gain and bias are set on the new head as well, before it learns. (A resumed run has no step 0.)
        if step == 0 and references and cfg.normalize_std:
            normalize(run, cfg, model, references)
        metrics = update(run, cfg, model)
        metrics.update(optimizer_step(run))
        run.log(metrics, watch=("loss/rm", "train/accuracy"))

    metrics = {}
    details = {}
    table = {}
    if references:
        metrics = normalize(run, cfg, model, references)
        after = mean_and_std(run, cfg, model, references)
        details = {"normalize/mean_after": after[0], "normalize/std_after": after[1]}
    if run.held_out:
        predicted = predict(run, cfg, model, run.held_out)
        table = accuracy_table(run.held_out, predicted["margin"])
        metrics.update(overall(table))
        metrics["eval/loss"] = predicted["loss"].mean().item()
        some = run.held_out.select(range(min(1024, len(run.held_out))))
        details.update(eos_rewards(run, cfg, model, some))
    report(run, metrics, table, details)
    run.export(model)


def reference_source(cfg):
    """The data whose (chosen) responses have mean reward 0 after training."""
    if cfg.normalize_data != "auto":
        return cfg.normalize_data
    return TLDR_POSTS if cfg.data.startswith(TLDR_PAIRS) else cfg.data


def update(run, cfg, model):
    """Accumulate the gradient of this step's batch; returns its loss, accuracy and mean margin (best against worst)."""
    batch = run.batch()
    parts = []
    for indices in run.micro_batches(batch["length"]):
        out = forward(cfg, model, batch[indices], run.world.device)
        loss = out["loss"].sum() / cfg.batch_size
        backward(run, loss, indices)
        margin = out["margin"]
        accuracy = (margin > 0).sum() / cfg.batch_size
        mean_margin = margin.sum() / cfg.batch_size
        parts.append({"loss/rm": loss, "train/accuracy": accuracy, "train/margin": mean_margin})

    return run.world.sum_scalars(parts)


def forward(cfg, model, rows, device):
    """Reward the responses of rows (a dict of columns) in one forward pass.

    Returns a dict of tensors (B,): loss, the best response's reward, and margin, its distance to the worst one's.
    """
    # All responses of all rows stand one below the other.
    queries = []
    responses = []
    counts = []
    for query, ranked in zip(rows["query"], rows["responses"]):
        queries += [query] * len(ranked)
        responses += ranked
        counts.append(len(ranked))

    rewards = last_scalars([model], device, queries, responses).split(counts)
    rewards = torch.nn.utils.rnn.pad_sequence(rewards, batch_first=True)  # (B, K), 0 where a row has fewer
    counts = torch.tensor(counts, device=device)

    # A label may be a probability; chain-of-thought labels are kept from being too sure.
    target = torch.tensor(rows["target"], device=device)
    target = target.clamp(0.5 - cfg.target_clamp, 0.5 + cfg.target_clamp)

    best = rewards[:, 0]
    worst = rewards.gather(1, counts[:, None] - 1)[:, 0]
    loss = ranking_loss(rewards, target[:, None], counts, cfg.label_noise)
    return {"loss": loss, "best": best, "margin": best - worst}


def ranking_loss(rewards, target=1.0, counts=None, noise=0.0):
    """Mean over all pairs of K ranked responses, rewards (B, K) best first; returns (B,). (arXiv:2203.02155 eq. 1)

    target: a number or (B, 1). counts (B,): how many of a row's K are real, if rows rank different numbers.
    """
    n_responses = rewards.shape[1]
    better, worse = torch.triu_indices(n_responses, n_responses, offset=1, device=rewards.device)
    losses = preference_loss(rewards[:, better], rewards[:, worse], target, noise)
    if counts is None:
        return losses.mean(1)
    real = worse < counts[:, None]
    return (losses * real).sum(1) / real.sum(1)


def preference_loss(chosen, rejected, target=1.0, noise=0.0):
    """Bradley-Terry loss -(p log P(d) + (1 - p) log P(-d)) of rewards (B,), with d = chosen - rejected; returns (B,).

    target: the probability p that `chosen` is the better one; 0.5 is a tie. P is the sigmoid; noise: the probability
    that the labeller tosses a coin, P = (1 - noise) sigmoid + noise / 2. (arXiv:1706.03741 section 2.2.3)
    """

    def log_p(margin):
        if noise:
            return torch.log((1 - noise) * torch.sigmoid(margin) + noise / 2)
        return F.logsigmoid(margin)

    margin = chosen - rejected
    return -(target * log_p(margin) + (1 - target) * log_p(-margin))


def predict(run, cfg, model, rows):
    """What `forward` returns, for every row of a data set, on every rank: a dict of tensors (n,)."""

    def measure(indices):
        return forward(cfg, model, rows[indices], run.world.device)

    return run.world.map_rows(measure, rows["length"], cfg.micro_batch_size)


def mean_and_std(run, cfg, model, rows):
    """Mean and standard deviation (biased) of the rewards of the rows' best responses."""
    rewards = predict(run, cfg, model, rows)["best"].double()
    return rewards.mean().item(), rewards.std(correction=0).item()


@torch.no_grad()
def normalize(run, cfg, model, rows):
    """Shift the head's bias so that the references `rows` have mean reward 0 (detail 15: the mean only, no gain).

    With cfg.normalize_std the weight too, for a standard deviation of 1 (arXiv:1909.08593: gain and bias).
    Returns their mean and standard deviation as they were before.
    """
    mean, std = mean_and_std(run, cfg, model, rows)
    model.score.bias.sub_(mean)
    if cfg.normalize_std:
        model.score.bias.div_(std)
        model.score.weight.div_(std)
    return {"normalize/mean": mean, "normalize/std": std}


def eos_rewards(run, cfg, model, rows):
    """Mean reward of the best responses at EOS and at their other tokens, which were never trained (detail 13); and the
    share of those others that are negative.
    """

    def measure(indices):
        micro = rows[indices]
        best = [responses[0] for responses in micro["responses"]]
        ids, select, _, mask = collate(micro["query"], best, run.world.device)
        # `select` is where a token is predicted: the token itself is one further.
        rewards = model(ids, (select + 1).clamp(max=ids.shape[1] - 1)) * mask  # (B, R), each token's own
        lengths = mask.sum(1)

        at_eos = rewards.gather(1, lengths[:, None] - 1)[:, 0]
        others = (lengths - 1).clamp(min=1)
        negative = (rewards < 0).sum(1) - (at_eos < 0).int()
        return {
            "reward/at_eos": at_eos,
            "reward/elsewhere": (rewards.sum(1) - at_eos) / others,
            "reward/elsewhere_negative": negative / others,
        }

    means = {}
    for name, column in run.world.map_rows(measure, rows["length"], cfg.micro_batch_size).items():
        means[name] = column.mean().item()
    return means


if __name__ == "__main__":
    main(cfg)
